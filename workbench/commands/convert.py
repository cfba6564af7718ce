"""Routing that other tools have recorded: `import`."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from workbench.commands.options import Overwrite
from workbench.errors import InputError


class Dump(Enum):
    olmoe = "olmoe"
    vllm = "vllm"
    sglang = "sglang"
    sglang_recorder = "sglang-recorder"
    llama_cpp = "llama.cpp"
    policylang = "policylang"
    moe_lrc = "moe-lrc"


def import_(
    form: Annotated[Dump, typer.Argument(metavar="FORMAT", help=f"One of {', '.join(dump.value for dump in Dump)}.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="What the tool wrote.")],
    out: Annotated[Path, typer.Option(help="The trace to write.")],
    model_name: Annotated[
        str | None, typer.Option(help="Name of the model. [default: what the files say, if they do]")
    ] = None,
    n_experts: Annotated[
        int | None, typer.Option(help="Experts of a layer. [default: what the files say, if they do]")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts of a token. Needed for SGLang and llama.cpp's `layer,expert`.")
    ] = None,
    n_layers: Annotated[
        int | None, typer.Option(help="Layers that the files have. Needed for SGLang's responses.")
    ] = None,
    dense_layers: Annotated[
        str | None, typer.Option(help="Layers of the model without a router, all zeros in the files, as in 0,1.")
    ] = None,
    sequences: Annotated[
        Path | None,
        typer.Option(
            help="A table with a row a text, in order: lang, domain, source, segment_id, n_prompt, text, token_ids, "
            "and any metadata (.csv, .tsv, .jsonl, .parquet)."
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer that shows token ids as text: a folder, a Hub id, or `demo`.")
    ] = None,
    run: Annotated[str | None, typer.Option(help="Name of the run. [default: format and first file]")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Turn routing that another tool has recorded into a trace."""
    from workbench.importers import import_routing

    trace = import_routing(
        form.value,
        files,
        out,
        model=model_name,
        n_experts=n_experts,
        top_k=top_k,
        n_layers=n_layers,
        dense_layers=_numbers(dense_layers or ""),
        sequences=sequences,
        tokenizer=tokenizer,
        run=run,
        overwrite=overwrite,
    )
    print(f"{out}: {trace.n_tokens:,} tokens of {trace.n_sequences:,} texts at {trace.n_layers} routers")
    print(f"next:  workbench analyze load {out}")


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if bad := [part for part in parts if not (part.isascii() and part.isdigit())]:
        raise InputError(f"--dense-layers: {bad[0]!r} is not the number of a layer; expected numbers such as 0,1.")
    return [int(part) for part in parts]
