"""Routing that other tools have recorded, as traces.

>>> import_routing("vllm", ["request.npy"], "t.duckdb", model="Qwen/Qwen3-30B-A3B", n_experts=128)  # doctest: +SKIP

One file a format; each says where the format comes from. Importers read text by text and write as they read, so that
memory stays flat; what is written gets its name only when all of it was good.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import filelock

from workbench.errors import InputError, RunError
from workbench.importers import sequence_table
from workbench.importers.text import Text
from workbench.output import new_file
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace
from workbench.transaction import clean

FORMATS = {
    "olmoe": "JSON lines of OLMoE's run_moe_analysis.py",
    "vllm": "routed_experts of vLLM: .npy, .npz, or responses as .json, .jsonl",
    "sglang": "responses of SGLang with routed_experts: .json, .jsonl",
    "sglang-recorder": "counts of SGLang's expert distribution recorder: .pt",
    "llama.cpp": "CSV of llama.cpp's moe-trace",
    "policylang": "traces of MoE-PolicyLang: .parquet, .jsonl",
    "moe-lrc": "top-k tables of moe-lrc: .safetensors",
}
"""Name and content of each format."""


def import_routing(
    form: str,
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    model: str | None = None,
    n_experts: int | None = None,
    top_k: int | None = None,
    n_layers: int | None = None,
    dense_layers: Sequence[int] = (),
    sequences: str | os.PathLike | None = None,
    tokenizer: str | None = None,
    run: str | None = None,
    overwrite: bool = False,
) -> Trace:
    """Write what another tool recorded as a trace.

    form          one of FORMATS
    paths         its files, in the order in which their texts are numbered
    out           the trace to write; InputError if it exists, unless `overwrite`
    model         name of the model; needed where the files don't tell it
    n_experts     E, the same in every layer; needed where the files don't tell it
    top_k         k; needed for sglang, sglang-recorder and llama.cpp's `layer,expert`
    n_layers      layers that the files have; needed for sglang
    dense_layers  layers of the model that have no router, left out; their rows must be zeros
    sequences     a table with a row a text: see `workbench.importers.sequence_table`. It wins over the dump
    tokenizer     folder or Hub id of the tokenizer (or `demo`) that token ids become text with
    run           name of the run in the file; default: the format and the first file's name

    Returns the trace. Raises InputError, naming file, text, token and layer, if a file isn't as its format has it, or
    holds what no router can have chosen; then nothing is left under the name `out`.
    """
    if form not in FORMATS:
        raise InputError(f"no format {form!r}; choose from {', '.join(FORMATS)}.")
    files = [Path(path) for path in paths]
    if not files:
        raise InputError("no file to import: name at least one.")
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: no such file.")
    for name, given in {"--n-experts": n_experts, "--top-k": top_k, "--n-layers": n_layers}.items():
        if given is not None and not 1 <= given < int(NO_EXPERT):
            raise InputError(f"{name} is {given}; expected 1 to {int(NO_EXPERT) - 1}.")
    run = clean(run or f"{form}.{files[0].name}") or form  # as it will be in the trace
    corpus = {"imported_from": form, "files": [path.name for path in files]}
    facts = {"run": run, "engine": f"imported from {form}", "corpus": corpus}
    with _new_trace(Path(out), overwrite) as partial:
        if form == "sglang-recorder":
            from workbench.importers import sglang_recorder

            if sequences is not None or tokenizer is not None:
                raise InputError("a run that counts has no texts: leave out --sequences and --tokenizer.")
            facts["model"] = _need("--model-name", model)
            sglang_recorder.write(partial, files, facts, _need("--top-k", top_k), n_experts, n_layers, dense_layers)
        else:
            from workbench.importers.writing import write

            read = _texts(form, files, n_experts, top_k, n_layers)
            first = next(read, None)
            if first is None:
                raise InputError(f"{files[0]}: no text in it; expected {FORMATS[form]}.")
            facts["model"] = model or _need("--model-name", first.model)
            size = _size(first, n_experts, top_k, n_layers)
            rows = _joined(chain([first], read), sequences)
            write(partial, rows, first, size, facts, dense_layers, tokenizer)
    return Trace(out, run)


def _texts(
    form: str, files: list[Path], n_experts: int | None, top_k: int | None, n_layers: int | None
) -> Iterator[Text]:
    from workbench.importers import llama_cpp, moe_lrc, olmoe, policylang, sglang, vllm

    match form:
        case "olmoe":
            return olmoe.texts(files)
        case "vllm":
            return vllm.texts(files)
        case "sglang":
            return sglang.texts(files, _need("--top-k", top_k), _need("--n-layers", n_layers))
        case "llama.cpp":
            return llama_cpp.texts(files, top_k, _need("--n-experts", n_experts))
        case "policylang":
            return policylang.texts(files)
        case _:
            return moe_lrc.texts(files)


_MEANING = {
    "--model-name": "the name of the model",
    "--n-experts": "how many experts a layer has",
    "--top-k": "how many experts a token has",
    "--n-layers": "how many layers the model has",
}


def _need(option: str, value: Any) -> Any:
    if value is None:
        raise InputError(f"the files don't tell {_MEANING[option]}: give {option}.")
    return value


def _size(text: Text, n_experts: int | None, top_k: int | None, n_layers: int | None) -> int:
    """Number of experts. InputError if the first text isn't of the sizes that were given."""
    found = {"--n-experts": text.n_experts, "--n-layers": text.experts.shape[1], "--top-k": text.experts.shape[2]}
    for option, given in {"--n-experts": n_experts, "--n-layers": n_layers, "--top-k": top_k}.items():
        if given is not None and found[option] not in (None, given):
            raise InputError(f"{text.where}: {option} is {given}; the file has {found[option]}.")
    return _need("--n-experts", n_experts or text.n_experts)


@contextmanager
def _new_trace(out: Path, overwrite: bool) -> Iterator[Path]:
    """A name beside `out` to write a trace to, which becomes `out` when the block ends well."""
    lock = filelock.FileLock(out.parent / f".{out.name}.lock", timeout=0)
    with new_file(out, overwrite) as partial:
        try:
            with lock:
                yield partial
                Path(f"{out}.wal").unlink(missing_ok=True)  # of the file that is replaced
        except filelock.Timeout:
            raise InputError(f"{out} is being written by another process. Write to another file.") from None
        except RunError as error:
            raise RunError(
                f"the import broke off: {error.__cause__ or error}. Nothing was written to {out}."
            ) from error
        finally:
            Path(f"{partial}.wal").unlink(missing_ok=True)
            (partial.parent / f".{partial.name}.lock").unlink(missing_ok=True)


def _joined(texts: Iterator[Text], table: str | os.PathLike | None) -> Iterator[tuple[Text, dict[str, Any]]]:
    """Each text with its columns, those of the table too."""
    if table is None:
        yield from ((text, dict(text.fields)) for text in texts)
        return
    path = Path(table)
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    rows = sequence_table.rows(path)
    n = 0
    for n, text in enumerate(texts, start=1):
        found = next(rows, None)
        if found is None:
            raise InputError(f"{path} has {n - 1:,} rows; the dump has more texts. Expected a row a text.")
        yield text, {**text.fields, **found[1]}
    if (more := next(rows, None)) is not None:
        raise InputError(f"{more[0]}: the dump has only {n:,} texts. Expected a row a text.")
