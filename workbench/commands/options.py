"""Arguments and options that several commands have."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from workbench.bundled import MODELS
from workbench.errors import InputError
from workbench.location import local_path, located

File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        parser=located,
        help="A trace: the DuckDB file that `workbench trace` wrote, or a folder of Parquet parts (a path or a URL).",
    ),
]
Run = Annotated[str | None, typer.Option(help="Which run of the file; by default the last one that finished.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Layout = Annotated[
    str,
    typer.Option(
        metavar="screen|column|text|page",
        help="Of the figure. For papers: column (3.25 inches wide, 8 points), text (5.5, 9) or page (6.75, 9).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Checkpoint = Annotated[str, typer.Argument(metavar="MODEL", help="A Hub id, a folder, `demo` or `demo-early`.")]
Demo = Annotated[str, typer.Argument(metavar="[MODEL]", help="A Hub id, a folder, `demo` or `demo-early`.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16 or int8.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the checkpoint brings along.")]


def check_output(path: Path | None, suffixes: Sequence[str], overwrite: bool) -> None:
    """InputError, before the work begins, if an output of one of these kinds can't be written to `path`."""
    if path is None:
        return
    path = local_path(path)
    if path.suffix not in suffixes:
        raise InputError(f"{path}: can't tell the format from {path.suffix!r}; expected {', '.join(suffixes)}.")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or replace it with --overwrite.")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent} is not a folder; create it first.")


def check_layout(layout: str, figure: Path | None) -> None:
    """InputError, before the work begins, for a layout that there isn't, or one without a figure."""
    from workbench.layouts import LAYOUTS

    if layout not in LAYOUTS:
        raise InputError(f"--layout {layout!r}: expected one of {', '.join(LAYOUTS)}.")
    if layout != "screen" and figure is None:
        raise InputError(f"--layout {layout} is of a figure: give --figure x.pdf, too.")


def model_and_prompt(words: list[str]) -> tuple[str, str]:
    """What [MODEL] PROMPT says; InputError for more words, and for a bundled model's name without a prompt."""
    if len(words) > 2:
        raise InputError(f"expected a model and a prompt, found {len(words)} words: put the prompt in quotes.")
    if len(words) == 1 and words[0] in MODELS:
        raise InputError(
            f"{words[0]!r} is a model, and there is no prompt: add one in quotes. If it is the prompt, name the model "
            f"too: demo {words[0]}."
        )
    model, prompt = ("demo", *words)[-2:]
    return model, prompt


def pair(text: str, option: str, example: str) -> tuple[str, str]:
    """Name and value of an option such as NAME=VALUE, which may be given several times."""
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise InputError(f"{option} {text!r}: expected NAME=VALUE, as in `{option} {example}`")
    return name, value
