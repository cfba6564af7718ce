"""What mkdocs makes while it builds the site: the command line's reference, the definitions of metrics, MathML.

The pages of metrics have two marks under each heading `## NAME`: `<!-- definition -->` becomes the docstring of
`workbench/analysis/NAME.py` and the function's options, `<!-- example -->` the output that docs/examples.py wrote.
"""

import inspect
import re
from pathlib import Path

import latex2mathml.converter
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent


@event_priority(100)  # before mkdocs-jupyter looks for notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "cli.md", content=cli()))
    for notebook in notebooks():
        files.append(File(f"notebooks/{notebook.name}", str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the notebooks that there are into the navigation; let fences of mathematics be drawn."""
    fence = {"name": "math", "class": "math", "format": mathml}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    there = [f"notebooks/{notebook.name}" for notebook in notebooks()]
    nav = config.nav or []
    config.nav = [*nav[:4], *([{"Notebooks": there}] if there else []), *nav[4:]]
    return config


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return metrics(markdown) if page.file.src_uri.startswith("metrics/") else markdown


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Take out the script of nbconvert that would load Mermaid from another server: no notebook draws with it."""
    return re.sub(r'<script type="module">(?:(?!</script>).)*?mermaid.*?</script>', "", output, flags=re.S)


def notebooks() -> list[Path]:
    return sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


def cli() -> str:
    """The reference of all commands, as Markdown."""
    import typer
    from typer.cli import get_docs_for_click

    from workbench.cli import app

    group = typer.main.get_command(app)
    text = get_docs_for_click(obj=group, ctx=typer.Context(group), name="workbench")
    return text.replace("# `workbench`", "# Command line", 1).replace("{FILE}", "FILE")


def metrics(markdown: str) -> str:
    """A page of metrics with its marks filled in."""
    head, *sections = re.split(r"^(?=## )", markdown, flags=re.M)
    for number, section in enumerate(sections):
        name = section.split()[1]
        for mark, filled in (("<!-- definition -->", definition), ("<!-- example -->", example)):
            if mark in section:
                section = section.replace(mark, filled(name))
        sections[number] = section
    return head + "".join(sections)


def definition(name: str) -> str:
    """The docstring of an analysis, and below it, folded, those of its function and its options."""
    from workbench import analysis

    ask, _ = analysis.find(name)
    question, _, text = inspect.cleandoc(analysis.file(name).__doc__ or "").partition("\n")
    options = "\n".join(f"{option}" for option in list(inspect.signature(ask).parameters.values())[1:])
    folded = indented(f"```text\n{inspect.getdoc(ask)}\n```\n\n```python\n{options}\n```")
    return f'**{question}**\n{text}\n\n??? note "Options and columns"\n\n{folded}\n'


def example(name: str) -> str:
    """Figure, first rows and findings of the command above."""
    rows, _, found = (ROOT / "docs" / "metrics" / f"{name}.txt").read_text(encoding="utf-8").partition("\n\n")
    return (
        f"![Figure of {name}]({name}.webp)\n\nWithout `--figure` the table is printed, which begins:\n\n"
        f"```text\n{rows}\n```\n\nWhat a report says of it:\n\n{escaped(found)}"
    )


def indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


def escaped(text: str) -> str:
    """Sentences that quote tokens, with nothing of them read as Markdown or HTML."""
    lines = (line.removeprefix("- ") for line in text.splitlines() if line)
    return "".join(
        "- " + re.sub(r"([\\`*_{}\[\]()#+!|~^$<>&-])", lambda c: f"&#{ord(c[0])};", line) + "\n" for line in lines
    )


def mathml(source: str, *_: object, **__: object) -> str:
    """LaTeX in a fence ```math as MathML, which browsers draw without any script."""
    return latex2mathml.converter.convert(source, display="block")
