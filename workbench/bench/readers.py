"""What `workbench bench fuzz` reads: for each reader a valid input, and what is done with it.

Dumps of other tools come from tests/dumps.py, which writes each format as its tool documents it: it takes a checkout.
"""

import gzip
import importlib.util
import itertools
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench import corpus, query
from workbench.analysis import filters
from workbench.arrays import from_arrays
from workbench.combine import merge
from workbench.errors import InputError
from workbench.importers import import_routing, sequence_table
from workbench.recipe import read_recipe
from workbench.tracefile import Trace
from workbench.validate import validate

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Reader:
    """write(folder) -> the files of a valid input; read(files) reads them; share of all inputs."""

    write: Callable[[Path], list[Path]]
    read: Callable[[list[Path]], Any]
    share: int


@cache
def dumps() -> Any:
    """tests/dumps.py."""
    file = ROOT / "tests" / "dumps.py"
    if not file.is_file():
        raise InputError(f"{file} is missing: fuzz in a checkout of the workbench.")
    spec = importlib.util.spec_from_file_location("dumps", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["dumps"] = module  # its dataclasses look for it there
    spec.loader.exec_module(module)
    return module


# --- traces


def _trace_file(folder: Path) -> list[Path]:
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((40, 2, 8)), axis=2)[:, :, :2]
    rows = pd.DataFrame({"lang": ["en", "de", "en", None], "domain": list("abab"), "topic": ["x", "y", "<b>", "z"]})
    texts = {i: f"w{i}" for i in range(40)}
    path = folder / "t.duckdb"
    from_arrays(
        path, experts, random.random(experts.shape, np.float32) / 2, n_experts=8, seq=np.repeat(range(4), 10),
        sequences=rows, token_ids=np.arange(40), vocabulary=texts,
    )  # fmt: skip
    return [path]


def _folder(folder: Path) -> list[Path]:
    (file,) = _trace_file(folder)
    merge([file], f"{folder / 'parts'}/")
    file.unlink()
    return sorted((folder / "parts").rglob("*.parquet"))


def _read_trace(files: list[Path]) -> None:
    path = files[0] if files[0].suffix == ".duckdb" else next(one for one in files[0].parents if one.name == "parts")
    trace = Trace(path)
    trace.tokens()
    trace.vocabulary()
    trace.weights(trace.n_layers - 1)
    validate(path)
    query.ask(path, "SELECT layer, expert, count(*) FROM selections GROUP BY ALL", memory="200MB")


# --- corpora

_ROWS = [
    {"text": "The cat\nsat, on a mat.", "lang": "en", "domain": "a", "n": 1},
    {"text": 'Die "Katze" saß', "lang": "de", "domain": "b", "n": None},
    {"text": "猫が座った 🙂", "lang": "ja", "domain": "a", "n": 3},
] * 4


def _corpus(ending: str, folder: Path) -> list[Path]:
    path = folder / f"c.{ending}"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _ROWS)
    frame = pd.DataFrame(_ROWS)
    match ending:
        case "parquet":
            frame.to_parquet(path)
        case "csv" | "tsv":
            frame.to_csv(path, index=False, sep="," if ending == "csv" else "\t")
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode(), mtime=0))
        case "jsonl.xz":
            path.write_bytes(lzma.compress(lines.encode()))
        case "jsonl.zst":
            import pyarrow as pa

            with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), "zstd") as stream:
                stream.write(lines.encode())
        case _:
            path.write_text(lines, encoding="utf-8")
    return [path]


def _read_corpus(files: list[Path]) -> None:
    (path,) = files
    for _ in itertools.islice(corpus.read(path, bad_rows="skip"), 1000):
        pass
    for _ in itertools.islice(corpus.read(path), 1000):
        pass


def _table(folder: Path) -> list[Path]:
    path = folder / "rows.jsonl"
    rows = [{"lang": "en", "text": "a b", "token_ids": [1, 2, 3], "n_prompt": 2, "topic": {"a": [1]}}] * 3
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [path]


def _read_table(files: list[Path]) -> None:
    list(sequence_table.rows(files[0]))


# --- texts that are asked


def _recipe(folder: Path) -> list[Path]:
    path = folder / "r.json"
    edits = [
        {"kind": "Ablate", "layer": 3, "experts": [5, 7], "scope": "phase=prompt & token~[0-9]"},
        {"kind": "Bias", "layer": 1, "experts": [2], "strength": 0.5},
        {"kind": "Scale", "layer": 0, "experts": [1], "factor": 2.0},
        {"kind": "SetTopK", "layer": 0, "k": 2},
    ]
    from workbench.recipe import FORMAT, VERSION

    model = {"name": "m", "family": "olmoe", "layers": [[32, 4]] * 6}
    found = {"format": FORMAT, "version": VERSION, "model": model, "source": {"by": "hand"}}
    path.write_text(json.dumps(found | {"interventions": edits}))
    return [path]


def _read_recipe(files: list[Path]) -> None:
    read_recipe(files[0])


@cache
def _asked() -> Path:
    """A trace that questions are asked of; it lasts as long as the process."""
    import tempfile

    return _trace_file(Path(tempfile.mkdtemp()))[0]


QUESTIONS = (
    "SELECT lang, count(*) AS n FROM sequences GROUP BY ALL ORDER BY n",
    "SELECT layer, expert, avg(weight) FROM selections JOIN sequences USING (run, seq) WHERE lang = 'de' GROUP BY ALL",
    "WITH a AS (SELECT unnest(experts) AS e FROM routing) SELECT e, count(*) FROM a GROUP BY e HAVING count(*) > 1",
    "FROM read_csv('/etc/passwd')", "COPY tokens TO '/tmp/escaped.csv'", "ATTACH '/tmp/escaped.db'; SELECT 1",
    "SELECT * FROM read_text('/etc/hostname')", "SET enable_external_access = true", "PIVOT tokens ON phase",
    "SELECT getenv('HOME'), current_setting('temp_directory')", "EXPLAIN ANALYZE COPY (SELECT 1) TO '/tmp/escaped'",
    "INSTALL httpfs", "SELECT regexp_extract(text, '(a+)+$') FROM vocabulary", "SUMMARIZE routing",
    "COPY (PIVOT sequences ON lang USING count(*)) TO '/tmp/escaped.csv'", "EXPLAIN/**/(FORMAT json) SELECT 1",
    "WITH x AS (COPY (SELECT 1) TO '/tmp/escaped.csv') SELECT 1",
    "FROM query('FROM json_execute_serialized_sql(json_serialize_sql(''SELECT 1''))')",
)  # fmt: skip
FILTERS = (
    "lang=de,en & phase=prompt", 'token=" the" & position=4-15', "text~(ab|c)+ & lang~^d", "topic=x & position=256+",
    'token="\\n"', "phase=generated",
)  # fmt: skip


def _lines(texts: tuple[str, ...], folder: Path) -> list[Path]:
    """A file a text."""
    paths = [folder / f"{number}.txt" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return paths


def _each(ask: Callable[[str], Any], valid: tuple[str, ...], files: list[Path]) -> None:
    """Ask the one that was edited."""
    for path, text in zip(files, valid, strict=True):
        if (found := path.read_bytes().decode(errors="surrogateescape")) != text:
            ask(found)


def _ask(sql: str) -> None:
    query.ask(_asked(), sql, most_rows=1000, memory="200MB", seconds=5)


def _filter(text: str) -> None:
    filters.mask(Trace(_asked()), text)


def _import(form: str, files: list[Path]) -> None:
    out = files[0].parent / "out.duckdb"
    out = files[0].parent.parent / "out.duckdb" if form == "moe-lrc" else out
    out.unlink(missing_ok=True)
    try:
        import_routing(form, files, out, model="m", n_experts=16, top_k=4, n_layers=2)
    except InputError:
        if out.exists():
            raise AssertionError("a refused import left a file") from None
        raise
    if "error" in set(validate(out)["severity"]):
        raise AssertionError("an import made a trace with faults")


def _dump(name: str, folder: Path) -> list[Path]:
    made = dumps()
    return getattr(made, name)(folder, made.planted((5, 4, 4), n_layers=2))


IMPORTS = {
    "olmoe": "olmoe", "vllm_npz": "vllm", "vllm_npy": "vllm", "vllm_json": "vllm", "sglang": "sglang",
    "sglang_openai": "sglang", "recorder": "sglang-recorder", "llama_cpp": "llama.cpp",
    "policylang_jsonl": "policylang", "policylang_parquet": "policylang", "moe_lrc": "moe-lrc",
}  # fmt: skip
CORPORA = {"jsonl": 9, "csv": 9, "tsv": 4, "txt": 3, "parquet": 6, "jsonl.gz": 3, "jsonl.xz": 2, "jsonl.zst": 2}

READERS: dict[str, Reader] = {
    "trace file": Reader(_trace_file, _read_trace, 3),
    "folder of parts": Reader(_folder, _read_trace, 3),
    "recipe": Reader(_recipe, _read_recipe, 20),
    "query": Reader(partial(_lines, QUESTIONS), partial(_each, _ask, QUESTIONS), 8),
    "filter": Reader(partial(_lines, FILTERS), partial(_each, _filter, FILTERS), 6),
    "table of texts": Reader(_table, _read_table, 4),
    **{f"corpus {ending}": Reader(partial(_corpus, ending), _read_corpus, n) for ending, n in CORPORA.items()},
    **{f"import {name}": Reader(partial(_dump, name), partial(_import, form), 2) for name, form in IMPORTS.items()},
}
"""Each reader by name. Shares are chosen so that none takes most of the time."""
