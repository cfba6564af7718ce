"""The documentation: it builds, its links resolve, its commands parse, its examples run, it leaves nothing out."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
import typer
from commandline import Command

from workbench import analysis
from workbench.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
MARKDOWN = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + PAGES
METRICS = [page for page in PAGES if page.parent.name == "metrics" and page.name != "index.md"]
COMMANDS = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```", flags=re.M | re.S)

RUN = ["start.md", "howto/trace.md", "howto/steer.md", "howto/paper.md", "howto/metric.md", "api.md"]
"""Pages whose Python is run on the small trace."""
GENERATED = {"cli.md"}
"""Pages that docs/hooks.py makes while the site is built."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    text = page.read_text(encoding="utf-8")
    return [found["code"] for found in FENCE.finditer(text) if found["language"] == language]


def commands(page: Path) -> list[list[str]]:
    """Every `workbench …` line in the shell blocks of a page, as words."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"(\S*/)?workbench ", line)]


def slug(heading: str) -> str:
    """The anchor of a heading, as both Python-Markdown and GitHub make it of plain words."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", text))


def prose(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


class Links(HTMLParser):
    """What a built page links to and loads, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key in ("id", "name") and value:
                self.anchors.add(value)
            elif key in ("href", "src") and value:
                (self.targets if tag == "a" else self.loaded).add(value)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it: strict, so that a warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture
def folder(demo_trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the small trace as demo.duckdb."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.duckdb").symlink_to(demo_trace)
    return tmp_path


# ---------------------------------------------------------------------------------------------------- the built site


def test_links_and_anchors_of_the_site_resolve(site: Path):
    pages = {page: Links(page.read_text(encoding="utf-8")) for page in site.rglob("*.html")}
    assert len(pages) >= len(PAGES)
    wrong = []
    for page, found in pages.items():
        if page.name == "404.html":  # its links are from the root of a server
            continue
        for target in found.targets | found.loaded:
            path, anchor = urldefrag(unquote(target))
            if re.match(r"[a-z]+:", target) or target.startswith("//"):
                continue
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                wrong.append(f"{page.relative_to(site)}: {target}")
            elif anchor and file.suffix == ".html" and anchor not in pages[file].anchors | {"__skip"}:
                wrong.append(f"{page.relative_to(site)}: no anchor {target}")
    assert not wrong


def test_the_site_needs_no_network(site: Path):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not {url for url in Links(text).loaded if re.match(r"(https?:)?//", url)}, page
        assert not re.findall(r"""(?:import|fetch)\(["']https?://[^"']+""", text), page


def test_every_page_is_in_the_site_and_no_mark_is_left(site: Path):
    for page in PAGES:
        built = (site / page.relative_to(ROOT / "docs")).with_suffix(".html").read_text(encoding="utf-8")
        assert "<!-- definition" not in built and "<!-- example" not in built, page


def test_the_reference_has_every_command_and_option(site: Path):
    text = (site / "cli.html").read_text(encoding="utf-8")
    for command, has in COMMANDS.items():
        assert f"workbench-{command}" in Links(text).anchors
        for option in has.params:
            assert all(spelling in text for spelling in option.opts if spelling.startswith("--")), (command, option)


def test_the_python_reference_has_every_public_name(site: Path):
    import workbench

    anchors = Links((site / "api.html").read_text(encoding="utf-8")).anchors
    known = {anchor.rpartition(".")[2] for anchor in anchors}
    assert not set(workbench.__all__) - {"analysis"} - known


def test_mathematics_is_drawn_without_scripts(site: Path):
    assert "<math " in (site / "metrics" / "index.html").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ sources


@pytest.mark.parametrize("page", MARKDOWN, ids=name)
def test_links_of_the_sources_resolve(page: Path):
    """On a code host the same pages are read without being built."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, anchor = urldefrag(unquote(target))
        if re.match(r"[a-z]+:", target) or Path(path).name in GENERATED:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            wrong.append(target)
        elif anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text(encoding="utf-8")), flags=re.M)
            if anchor not in {slug(heading) for heading in headings}:
                wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", MARKDOWN, ids=name)
def test_files_that_are_named_exist(page: Path):
    """`tests/test_x.py`, `workbench/x.py`, `docs/x.md` in running text."""
    if page.name == "CHANGELOG.md":  # what was true once may be gone
        return
    named = re.findall(
        r"`((?:tests|workbench|docs|kernels|probes|data|app|notebooks)/[\w/.-]+)`", page.read_text("utf-8")
    )
    wanted = {each for each in named if "NAME" not in each}
    assert not {each for each in wanted if not (ROOT / each).exists()}


@pytest.mark.parametrize("page", MARKDOWN, ids=name)
def test_commands_parse(page: Path):
    """The command, its options and the number of its arguments are those that the command line has."""
    for words in commands(page):
        assert words[0] in COMMANDS, words
        parse(words)


def parse(words: list[str]) -> None:
    """Parse a command as typer does, without running it."""
    try:
        COMMANDS[words[0]].make_context(words[0], words[1:])
    except Exception as error:
        pytest.fail(f"workbench {shlex.join(words)}: {error}")


def test_a_wrong_option_would_be_found():
    with pytest.raises(pytest.fail.Exception):
        parse(["trace", "demo", "--corpora", "udhr"])
    with pytest.raises(pytest.fail.Exception):
        parse(["export", "demo.duckdb", "--table"])


@pytest.mark.parametrize("page", MARKDOWN, ids=name)
def test_analyses_and_their_options_exist(page: Path):
    for words in commands(page):
        if words[0] == "analyze" and len(words) > 1:
            ask, _ = analysis.find(words[1])
            options = dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "--set")
            analysis.arguments(ask, options)


@pytest.mark.parametrize("page", MARKDOWN, ids=name)
def test_python_compiles(page: Path):
    for code in blocks(page, "python"):
        compile(code, name(page), "exec")


# ----------------------------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize("metric", analysis.NAMES)
def test_every_metric_has_definition_range_source_example(metric: str):
    sections = [
        section
        for page in METRICS
        for section in re.split(r"^(?=## )", page.read_text(encoding="utf-8"), flags=re.M)
        if section.startswith(f"## {metric}\n")
    ]
    assert len(sections) == 1
    for part in ("<!-- definition -->", "- **Range:** ", "- **Source:** ", "- **Elsewhere:** ", "<!-- example -->"):
        assert sections[0].count(part) == 1, part
    assert f"workbench analyze {metric} " in sections[0]
    definition = (analysis.file(metric).__doc__ or "").strip()
    assert len(definition) > 300 and definition.partition("\n")[0].endswith((".", "?"))
    rows, _, findings = (ROOT / "docs" / "metrics" / f"{metric}.txt").read_text(encoding="utf-8").partition("\n\n")
    assert len(rows.splitlines()) >= 2 and findings.startswith("- ")
    assert (ROOT / "docs" / "metrics" / f"{metric}.webp").stat().st_size > 1000


def test_every_metric_is_in_the_tables_of_metrics():
    for page in (ROOT / "docs" / "metrics" / "index.md", ROOT / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert not [metric for metric in analysis.NAMES if metric not in text]


@pytest.mark.parametrize("metric", ["load", "balance", "expert_values", "coactivation", "partners", "layer_links"])
def test_output_on_the_page_has_the_columns_of_today(metric: str, folder: Path, workbench: Command):
    (asked,) = [words for page in METRICS for words in commands(page) if words[:2] == ["analyze", metric]]
    result = workbench(*asked[: asked.index("--figure")])
    header = (ROOT / "docs" / "metrics" / f"{metric}.txt").read_text(encoding="utf-8").split("\n", 1)[0]
    assert result.code == 0 and result.out.split("\n", 1)[0].split() == header.split()


# ----------------------------------------------------------------------------------------------------- what is run


@pytest.mark.parametrize("page", RUN)
def test_python_runs(page: str, folder: Path):
    for code in blocks(ROOT / "docs" / page, "python"):
        exec(compile(code, page, "exec"), {})


def test_the_start_page_leads_to_figures(folder: Path, workbench: Command):
    """The shell blocks of "A text, a trace, a figure"; not `app`, which stays open, nor `report`, which takes long."""
    ran = 0
    for block in blocks(ROOT / "docs" / "start.md", "sh")[1:4]:
        shell = "\n".join(line for line in block.splitlines() if not line.startswith("workbench "))
        subprocess.run(["bash", "-ec", shell], check=True)
        for line in block.splitlines():
            words = shlex.split(line, comments=True) if line.startswith("workbench ") else []
            if words and words[1] not in ("app", "report"):
                result = workbench(*words[1:])
                assert result.code == 0, (line, result)
                ran += 1
    assert ran >= 5
    assert "plotly" in (folder / "load.html").read_text("utf-8")
    assert (folder / "languages.html").exists()


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=name)
def test_cheap_commands_run(page: Path, folder: Path, workbench: Command):
    """`info`, `query`, `validate`, `export` on demo.duckdb, and `models` of what is bundled, as they are written."""
    for words in commands(page):
        asks = words[0] in ("info", "query", "validate", "export") and words[1] == "demo.duckdb"
        if asks or words == ["models"]:
            assert workbench(*words).code == 0, words
