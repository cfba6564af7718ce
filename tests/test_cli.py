"""Every command with good and bad input: what it prints, its exit code, and that nothing is lost."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import checkpoint
import duckdb
import pandas as pd
import pytest
import torch
import transformers
from commandline import Command, refused
from transformers import LlamaConfig, LlamaForCausalLM

from workbench import analysis, cli
from workbench.errors import RunError
from workbench.schema import RECORDABLE
from workbench.tracefile import Trace


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model: a checkpoint; texts.jsonl: a corpus."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # `main` says so before transformers is imported, which here it is
    transformers.logging.disable_progress_bar()
    path = tmp_path_factory.mktemp("cli")
    checkpoint.folder(path / "model")
    checkpoint.corpus(path / "texts.jsonl", n=60)
    return path


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    """A finished trace with two runs."""
    from workbench.capture import trace
    from workbench.models import load

    model, out = load(folder / "model"), folder / "t.duckdb"
    record = [name for name in RECORDABLE if name != "logits"]
    trace(model, folder / "texts.jsonl", out, record=record, run="one", progress=False)
    trace(model, folder / "texts.jsonl", out, run="two", mode="append", max_tokens=200, progress=False)
    return out


def tracing(folder: Path, out: Path, *more: object, corpus: object = None, model: object = None) -> list[object]:
    return ["trace", model or folder / "model", "--corpus", corpus or folder / "texts.jsonl", "--out", out, *more]


# trace


def test_trace(workbench: Command, folder: Path, tmp_path: Path):
    out = tmp_path / "t.duckdb"
    result = workbench(*tracing(folder, out, "--record", "ids, entropy", "--run", "mine", "--max-tokens", 300))
    assert result.code == 0 and result.err == ""
    found = Trace(out)
    assert f"{out}: {found.n_tokens:,} tokens of {found.n_sequences} texts at 3 routers" in result.out
    assert "workbench report" in result.out
    assert found.run == "mine" and found.recorded == {"ids", "entropy"} and 300 <= found.n_tokens < 400
    again = workbench(*tracing(folder, out, "--append", "--generate", 2, "--max-tokens", 30))
    assert again.code == 0 and len(Trace(out).runs()) == 2
    replaced = workbench(
        *tracing(folder, out, "--overwrite", "--max-length", 20, "--long", "split", "--dtype", "bfloat16")
    )
    assert replaced.code == 0 and Trace(out).runs()["dtype"].tolist() == ["bfloat16"]
    assert max(Trace(out).sequences()["n_tokens"].tolist()) == 20


def test_trace_as_a_process(folder: Path, tmp_path: Path):
    """The installed entry point, good and bad; the words of the error are on stderr."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "workbench", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    out = tmp_path / "t.duckdb"
    done = run(*tracing(folder, out, "--max-tokens", 100))
    assert (done.returncode, done.stderr) == (0, "")
    again = run(*tracing(folder, out))
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == (
        f"error: {out} exists. Replace it with --overwrite, finish its run with --resume, or add a run with --append.\n"
    )
    assert run("trace", "--no-such-option").returncode == 2
    assert run("validate", out).returncode == 0


def test_columns_and_bad_rows(workbench: Command, folder: Path, tmp_path: Path):
    corpus, out = tmp_path / "c.csv", tmp_path / "t.duckdb"
    corpus.write_text('body,tongue\n"Good day",en\n"",de\nBonjour,fr\n')
    mapped = ("--column", "text=body", "--column", "lang=tongue")
    refused(workbench(*tracing(folder, out, corpus=corpus)), "no column 'text'", "--column text=body")
    refused(workbench(*tracing(folder, out, *mapped, corpus=corpus)), f"{corpus}:3: 'body' is empty", "--bad-rows skip")
    assert not out.exists()
    result = workbench(*tracing(folder, out, *mapped, "--bad-rows", "skip", corpus=corpus))
    assert result.code == 0 and "c: 1 bad rows skipped; the first:" in result.out
    assert Trace(out).sequences()["lang"].tolist() == ["en", "fr"]
    refused(
        workbench(*tracing(folder, tmp_path / "u.duckdb", "--column", "text")), "--column 'text': expected NAME=VALUE"
    )


@pytest.mark.parametrize(
    "name, content, parts",
    [
        ("empty.jsonl", b"", ("the corpus is empty",)),
        ("none.jsonl", b'{"text": null}\n', ("none.jsonl:1", "'text' is missing (null)")),
        ("blank.jsonl", b'{"text": "good"}\n{"text": " \\n"}\n', ("blank.jsonl:2", "only white space")),
        ("number.jsonl", b'{"text": 3}\n', ("number.jsonl:1", "3, of type int; expected text")),
        ("latin.txt", "schön\nübel\n".encode("latin-1"), ("latin.txt:1", "is not UTF-8", "iconv")),
        ("latin.jsonl", b'{"text": "ok"}\n{"text": "\xfc"}\n', ("latin.jsonl:2", "is not UTF-8")),
        ("broken.jsonl", b'{"text": "ok"}\n{"text": \n', ("broken.jsonl:2", "not JSON")),
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"text": "ok"}\n' * 500, mtime=0)[:-20],
            ("cut.jsonl.gz", "truncated or damaged"),
        ),
        ("short.parquet", b"PAR1", ("short.parquet", "not a whole Parquet file")),
        ("big.txt", b"x" * 200_000, ("200,000 tokens; expected at most 256", "--long split", "--long cut")),
        ("book.pdf", b"%PDF", ("unknown kind of file '.pdf'",)),
    ],
)
def test_corpora_that_are_refused(name, content, parts, workbench: Command, folder: Path, tmp_path: Path):
    corpus, out = tmp_path / name, tmp_path / "t.duckdb"
    corpus.write_bytes(content)
    refused(workbench(*tracing(folder, out, corpus=corpus)), *parts)
    assert [one.name for one in tmp_path.iterdir()] == [name]


def test_a_row_of_200_kilobytes_can_be_cut_or_split(workbench: Command, folder: Path, tmp_path: Path):
    corpus, out = tmp_path / "big.txt", tmp_path / "t.duckdb"
    corpus.write_bytes(b"x" * 200_000)
    assert workbench(*tracing(folder, out, "--long", "cut", corpus=corpus)).code == 0
    assert Trace(out).sequences()["n_tokens"].tolist() == [256]
    some = ("--long", "split", "--max-tokens", 600, "--overwrite")
    assert workbench(*tracing(folder, out, *some, corpus=corpus)).code == 0
    assert Trace(out).sequences()["n_tokens"].tolist() == [256] * 3
    assert Trace(out).sequences()["split_parts"].tolist() == [782] * 3


def test_names_that_mean_nothing(workbench: Command, folder: Path, tmp_path: Path):
    out = tmp_path / "t.duckdb"
    refused(workbench(*tracing(folder, out, corpus="udrh")), "'udrh'", "Did you mean udhr?")
    refused(workbench(*tracing(folder, out, corpus="no/such.jsonl")), "no such file or folder")
    refused(workbench(*tracing(folder, out, model=tmp_path / "nothing")), "no such folder")
    refused(workbench(*tracing(folder, out, "--record", "ids,gate")), "can't record gate", "choose from ids, weights")
    refused(workbench(*tracing(folder, out, "--dtype", "int3")), "'int3'", "expected 'auto', 'float32'")
    refused(workbench(*tracing(folder, tmp_path / "no" / "t.duckdb")), "is not a folder: create it first")
    refused(workbench(*tracing(folder, out, "--resume", "--append")), "exclude each other")
    refused(workbench(*tracing(folder, out, "--append")), "does not exist, so no run can be added")
    assert list(tmp_path.iterdir()) == []


def test_models_that_are_refused(workbench: Command, folder: Path, tmp_path: Path):
    out = tmp_path / "t.duckdb"
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    weights = (folder / "model" / "model.safetensors").read_bytes()

    def copy(name: str) -> Path:
        path = tmp_path / name
        path.mkdir()
        for one in (folder / "model").iterdir():
            (path / one.name).write_bytes(one.read_bytes())
        return path

    cut, without, garbled, mute = copy("cut"), copy("without"), copy("garbled"), copy("mute")
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    (without / "model.safetensors").unlink()
    (garbled / "config.json").write_text('{"model_type": ')
    for one in mute.glob("*token*"):
        one.unlink()
    for model, parts in {
        tmp_path / "dense": ("is not a mixture of experts", "`workbench models` lists the families"),
        cut: ("cut", "truncated or broken"),
        without: ("without", "can't be loaded"),
        garbled: ("garbled", "can't be loaded"),
        mute: ("mute has no tokenizer",),
        folder / "texts.jsonl": ("is a file. Expected the folder of a checkpoint",),
        folder: ("has no config.json",),
    }.items():
        refused(workbench(*tracing(folder, out, model=model)), *parts)
        assert not out.exists()
    refused(workbench("models", tmp_path / "dense"), "is not a mixture of experts")


# Files that are no traces


@pytest.fixture(params=["nothing", "empty", "text", "database", "newer", "cut", "folder"])
def bad_file(request, file: Path, tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "bad.duckdb"
    match request.param:
        case "nothing":
            return path, "no such file"
        case "empty":
            path.touch()
            return path, "is empty; expected a trace file"
        case "text":
            path.write_text("dear diary\n" * 1000)
            return path, "it is not a DuckDB file"
        case "database":
            with duckdb.connect(str(path)) as con:
                con.execute("CREATE TABLE t AS SELECT 1 AS x")
            return path, "is a DuckDB file but not a trace"
        case "newer":
            path.write_bytes(file.read_bytes())
            with duckdb.connect(str(path)) as con:
                con.execute("UPDATE format SET version = 99")
            return path, "has trace format 99; this workbench reads format 3. Update the workbench"
        case "cut":
            path.write_bytes(file.read_bytes()[:-300_000])
            return path, "cut short"
    path.mkdir()
    return path, "is a folder"


def test_files_that_are_no_traces(bad_file: tuple[Path, str], workbench: Command, folder: Path, tmp_path: Path):
    path, message = bad_file
    before = path.read_bytes() if path.is_file() else None
    commands: list[list[object]] = [
        ["info", path],
        ["validate", path],
        ["query", path, "SELECT 1"],
        ["analyze", "load", path],
        ["report", path, "--out", tmp_path / "r.html"],
        ["export", path, "--table", "tokens", "--out", tmp_path / "t.csv"],
    ]
    if message != "no such file":
        commands.append(tracing(folder, path, "--append"))
    if message not in ("no such file", "is a folder"):
        commands.append(tracing(folder, path, "--resume"))
    for command in commands:
        refused(workbench(*command), message, str(path))
    assert (path.read_bytes() if path.is_file() else None) == before
    assert {one.name for one in tmp_path.iterdir()} <= {"bad.duckdb"}


# Reading commands


def test_names_that_are_too_long(workbench: Command, folder: Path, file: Path, tmp_path: Path):
    name = "x" * 5_000
    commands = [["info", name], ["validate", name], ["query", name, "SELECT 1"], ["merge", name, "--out", "t.duckdb"]]
    commands += [["report", file, "--out", tmp_path / name], ["sample", file, "--out", name, "--sequences", "3"]]
    commands += [tracing(folder, tmp_path / name), tracing(folder, tmp_path / "t.duckdb", corpus=name)]
    for command in commands:
        refused(workbench(*command), "xxx: ")
    assert list(tmp_path.iterdir()) == []


def test_info(workbench: Command, file: Path):
    facts = json.loads(workbench("info", file, "--json").out)
    assert [run["run"] for run in facts["runs"]] == ["one", "two"] and facts["format"] == 3
    text = workbench("info", file)
    assert text.code == 0 and "one" in text.out and f"{Trace(file, 'one').n_tokens:,}" in text.out


def test_validate(workbench: Command, file: Path, tmp_path: Path):
    assert workbench("validate", file).out == f"{file}: no problems\n"
    assert json.loads(workbench("validate", file, "--json").out) == []
    broken = tmp_path / "broken.duckdb"
    broken.write_bytes(file.read_bytes())
    with duckdb.connect(str(broken)) as con:
        con.execute("UPDATE routing SET experts = [1, 1, 2]::USMALLINT[] WHERE run = 'one' AND seq = 4 AND layer = 1")
    result = workbench("validate", broken)
    assert result.code == 1 and "error" in result.out
    problems = json.loads(workbench("validate", broken, "--run", "one", "--json").out)
    assert {(row["run"], row["layer"], row["seq"]) for row in problems} == {("one", 1, 4)}
    assert workbench("validate", broken, "--run", "two").code == 0
    refused(workbench("validate", file, "--run", "three"), "no run 'three'", "one (finished), two (finished)")


def test_query(workbench: Command, file: Path):
    result = workbench(
        "query", file, "SELECT lang, count(*) AS n FROM sequences WHERE run = 'one' GROUP BY 1 ORDER BY 1"
    )
    assert result.code == 0 and re.search(r"en\s+20\n", result.out)
    rows = json.loads(
        workbench("query", file, "SELECT experts, started, 'nan'::FLOAT AS x FROM routing, runs LIMIT 2", "--json").out
    )
    assert len(rows) == 2 and len(rows[0]["experts"]) == 3 and rows[0]["x"] is None
    assert rows[0]["started"].startswith("20")
    before = file.read_bytes()
    for sql, why in (
        ("SELEC 1", "Parser Error: syntax error"),
        ("DROP TABLE tokens", "DROP is refused"),
        ("SELECT * FROM '/etc/passwd'", "the query failed"),
        ("COPY runs TO '/tmp/never.csv'", "COPY is refused"),
    ):
        result = workbench("query", file, sql)
        assert result.code == 2 and result.err.startswith(f"error: {why}"), result
    assert file.read_bytes() == before


def test_control_characters_do_not_reach_the_terminal(workbench: Command, file: Path):
    assert "\x1b" not in workbench("query", file, "SELECT chr(27) || '[31m' AS x, [chr(27)] AS y").out
    pivoted = "PIVOT (SELECT chr(27) || chr(155) || chr(8238) || 'é' AS x) ON x USING count(*)"
    for as_json in ((), ("--json",)):
        printed = workbench("query", file, pivoted, *as_json)
        assert printed.code == 0 and "é" in printed.out and printed.out.replace("\n", "").isprintable(), printed
    failed = workbench("report", file, "--run", "\x1b[31m\x9b1m")
    refused(failed, "no run", "\\x9b1m")
    assert failed.err.strip().isprintable()


def test_messages_keep_their_lines_and_nothing_else_that_is_no_text(workbench: Command, file: Path, tmp_path: Path):
    hostile = tmp_path / "t.duckdb"
    hostile.write_bytes(file.read_bytes())
    with duckdb.connect(hostile) as con:
        con.execute("UPDATE runs SET run = chr(27) || '[31m' || chr(155) || chr(10) || run")
    failed = workbench("report", hostile, "--run", "nope")
    assert failed.code == 2 and "no run 'nope'" in failed.err and "\\x1b[31m" in failed.err
    assert failed.err.replace("\n", "").isprintable()


def test_export(workbench: Command, file: Path, tmp_path: Path):
    n = Trace(file, "one").n_tokens * 3
    result = workbench("export", file, "--table", "routing", "--run", "one", "--out", tmp_path / "r.parquet")
    assert result.code == 0 and f"{n:,} rows" in result.out and len(pd.read_parquet(tmp_path / "r.parquet")) == n
    assert workbench("export", file, "--table", "selections", "--run", "one", "--out", tmp_path / "s.csv").code == 0
    assert len(pd.read_csv(tmp_path / "s.csv")) == 3 * n
    unnested = ("export", file, "--table", "routing", "--unnest", "--run", "one", "--out", tmp_path / "u.csv")
    assert workbench(*unnested).code == 0
    assert {"expert", "weight", "entropy"} <= set(pd.read_csv(tmp_path / "u.csv").columns)
    refused(workbench(*unnested), "exists", "--overwrite")
    assert workbench(*unnested, "--overwrite").code == 0
    refused(workbench("export", file, "--table", "secrets", "--out", tmp_path / "x.csv"), "no table 'secrets'")
    refused(
        workbench("export", file, "--table", "tokens", "--out", tmp_path / "x.xls"), "'.xls'; expected .csv, .parquet"
    )


def test_models(workbench: Command, folder: Path):
    families = json.loads(workbench("models", "--json").out)
    assert len(families) >= 72
    assert "olmoe" in workbench("models").out
    facts = json.loads(workbench("models", folder / "model", "--json").out)
    assert (facts["family"], len(facts["layers"]), facts["experts"], facts["top_k"]) == ("olmoe", 3, "8", "3")
    text = workbench("models", folder / "model").out
    assert "olmoe" in text and f"{facts['parameters']:,}" in text


def test_report(workbench: Command, file: Path, tmp_path: Path):
    out = tmp_path / "r.html"
    out.write_text("an old one")
    refused(workbench("report", file, "--out", out), "exists", "--overwrite")
    assert out.read_text() == "an old one"
    result = workbench("report", file, "--run", "one", "--out", out, "--overwrite")
    assert result.code == 0 and f"{out}: open it" in result.out
    assert out.read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")


# analyze

QUICK = {
    name: [f"--set={option}=20" for option in ("n_resamples", "n_permutations") if option in parameters]
    for name in analysis.NAMES
    for parameters in [analysis.find(name)[0].__code__.co_varnames]
}


OPTIONS = {
    "specialization": ["--by", "lang"],
    "contrast": ["--set=group=lang=en"],
    "task_experts": ["--set=task=domain=law"],
    "loss_correlation": ["--by", "difficulty", "--set=reference=0", "--set=common=false"],
    "placement": ["--set=time_limit=1", "--set=devices=2"],
    "sensitivity": ["--set=corpus={folder}/texts.jsonl", "--set=max_tokens=500", "--set=layers=1"],
    "permutation": ["--set=other={folder}/model"],
}


@pytest.mark.parametrize("name", analysis.NAMES)
def test_analyze(name: str, workbench: Command, folder: Path, file: Path, tmp_path: Path):
    options = [option.format(folder=folder) for option in OPTIONS.get(name, [])] + QUICK[name]
    looks_at = [file, "--run", "one"] if analysis.subject(analysis.find(name)[0]) == "trace" else [folder / "model"]
    command = ["analyze", name.replace("_", "-"), *looks_at, *options]
    csv, parquet, tex, html = (tmp_path / f"x.{kind}" for kind in ("csv", "parquet", "tex", "html"))
    results = [
        workbench(*command, "--out", csv, "--figure", html),
        workbench(*command, "--out", parquet),
        workbench(*command, "--out", tex, "--json"),
    ]
    assert [result.code for result in results] == [0, 0, 0], results
    table, same = pd.read_csv(csv), pd.read_parquet(parquet)
    assert len(table) == len(same) == len(json.loads(results[2].out)) > 0
    assert list(table.columns) == list(same.columns)
    assert "\\toprule" in tex.read_text()
    assert "plotly" in html.read_text(encoding="utf-8").lower()
    refused(workbench(*command, "--figure", html), "exists", "--overwrite")


def test_analyze_draws_svg(workbench: Command, file: Path, tmp_path: Path):
    from workbench.errors import InputError
    from workbench.figures import find_browser

    try:
        find_browser()
    except InputError as error:
        pytest.skip(str(error))
    out = tmp_path / "f.svg"
    result = workbench("analyze", "load", file, "--run", "one", *QUICK["load"], "--figure", out)
    assert result.code == 0 and out.read_text(encoding="utf-8").startswith("<svg"), result


def test_analyze_explains_itself(workbench: Command):
    listed = workbench("analyze").out
    assert [line.split()[0] for line in listed.strip().splitlines()] == list(analysis.NAMES)
    explained = workbench("analyze", "balance").out
    assert "MaxVio" in explained and "dead_below: float = 0.1" in explained


def test_analyze_refuses(workbench: Command, folder: Path, file: Path, tmp_path: Path):
    refused(workbench("analyze", "similarity", folder / "model", "--run", "one"), "takes no run of a trace")
    refused(workbench("analyze", "agreement", file, "--set", "other=three"), "three")
    refused(workbench("analyze", "uncertainty", file, "--set", "measures=experts_to_mass"), "--record", "logits")
    refused(workbench("analyze", "cache", file, "--set", "capacities=4,many"), "'many'; expected a whole number")
    refused(workbench("analyze", "cache", file, "--set", "keep=perhaps"), "'perhaps'; expected true or false")
    refused(workbench("analyze", "astrology", file), "no analysis 'astrology'", "choose from load")
    refused(workbench("analyze", "load", file, "--set", "planets=9"), "no option 'planets'")
    refused(workbench("analyze", "load", file, "--set", "planets"), "expected NAME=VALUE")
    refused(workbench("analyze", "specialization", file, "--by", "height"), "height")
    refused(workbench("analyze", "load", file, "--out", tmp_path / "t.xls"), "'.xls'; expected .csv, .parquet, .tex")
    refused(workbench("analyze", "load", file, "--figure", tmp_path / "f.bmp"), "'.bmp'; expected .html")
    refused(workbench("analyze", "load", file, "--out", tmp_path / "no" / "t.csv"), "is not a folder")
    refused(workbench("analyze", "load", file, "--run", "three"), "no run 'three'")
    assert list(tmp_path.iterdir()) == []


# place, prune, merge-experts


@pytest.mark.parametrize("form, suffix", [("table", ".csv"), ("sglang", ".json"), ("vllm", ".json")])
def test_place(form: str, suffix: str, workbench: Command, file: Path, tmp_path: Path):
    out = tmp_path / f"p{suffix}"
    command = ["place", file, "--devices", 2, "--format", form, "--time-limit", 1, "--out", out]
    assert workbench(*command).code == 0 and out.stat().st_size > 0
    refused(workbench(*command), "exists", "--overwrite")


def test_place_refuses(workbench: Command, file: Path, tmp_path: Path):
    refused(workbench("place", file, "--devices", 3, "--out", tmp_path / "p.csv"), "3")
    refused(
        workbench("place", file, "--devices", 2, "--format", "vllm", "--out", tmp_path / "p.csv"), "'.csv'", ".json"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["prune", "merge-experts"])
def test_fewer_experts(verb: str, workbench: Command, folder: Path, file: Path, tmp_path: Path):
    scores, out = tmp_path / "scores.csv", tmp_path / "smaller"
    asked = workbench("analyze", "importance", file, "--run", "one", *QUICK["importance"], "--out", scores)
    assert asked.code == 0, asked
    command = [verb, folder / "model", "--importance", scores, "--keep", 4, "--out", out]
    result = workbench(*command, "--corpus", folder / "texts.jsonl", "--max-tokens", 500)
    assert result.code == 0 and "original" in result.out and "random 4" in result.out, result
    described = json.loads(workbench("models", out, "--json").out)
    assert {layer["n_experts"] for layer in described["layers"]} == {4}
    refused(workbench(*command), "exists")
    refused(workbench(*command[:-1], tmp_path / "other", "--score", "beauty"), "beauty")
    refused(
        workbench(verb, folder / "model", "--importance", scores, "--keep", 9, "--out", tmp_path / "more"), "9", "8"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scores.csv", "smaller"]


# bench


@pytest.mark.parametrize("what", [pytest.param("trace", marks=pytest.mark.slow), "store"])
def test_bench(what: str, workbench: Command, tmp_path: Path):
    """That the benchmarks run, not what they measure. The last line is the result."""
    result = workbench("bench", what, "--quick", "--out", tmp_path / "b.json")
    assert result.code == 0, result
    last = json.loads(result.out.strip().splitlines()[-1])
    assert last == json.loads((tmp_path / "b.json").read_text())
    assert last["device"] and re.fullmatch(r"\d{4}-\d\d-\d\d", last["date"])


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


CTRL_C = [
    KeyboardInterrupt(),
    RuntimeError("Query interrupted"),
    caused(SystemError("CPUDispatcher returned a result with an exception set"), KeyboardInterrupt()),
    caused(RunError("the model failed"), RuntimeError("Query interrupted")),
]


@pytest.mark.parametrize("error", CTRL_C, ids=["Python", "DuckDB", "numba", "within the model"])
def test_ctrl_c_in_native_code_is_ctrl_c(error, workbench: Command, monkeypatch, folder: Path, tmp_path: Path):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("workbench.models.load", fail)
    trace = ("trace", folder / "model", "--corpus", folder / "texts.jsonl", "--out", tmp_path / "t.duckdb")
    result = workbench(*trace)
    assert (result.code, result.err) == (130, "interrupted: the same command finishes it\n")
    monkeypatch.setattr("workbench.tracefile.info", fail)
    assert workbench("info", folder / "t.duckdb").code == 130


def test_ctrl_c_while_the_command_starts(workbench: Command, monkeypatch):
    """The signal comes while the commands are imported."""
    monkeypatch.setitem(sys.modules, "workbench.cli", Interrupted("workbench.cli"))
    try:
        result = workbench("info", "any.duckdb")
    except KeyboardInterrupt:
        pytest.fail("a traceback")
    assert (result.code, result.out, result.err) == (130, "", "")


class Interrupted(ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise KeyboardInterrupt


def test_every_command_has_help(workbench: Command):
    for command in cli.app.registered_commands:
        name = command.name or getattr(command.callback, "__name__", "")
        result = workbench(name, "--help")
        assert result.code == 0 and "Usage" in result.out
