"""Attacks: what a checkpoint, a dump, a trace or a text could do to the machine of whoever opens it.

Others stand with what they attack: SQL in test_query.py, test_trace.py and test_parts.py; pickles in test_models.py and
importers/test_importing_refused.py; hostile text on the page in app/test_browser_tokens.py, app/test_tokens.py and
app/test_steer.py, in a report in test_report.py, on a terminal in test_commands_steer.py. SECURITY.md has the list.
"""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import re
import socket
import struct
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import checkpoint
import duckdb
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from blocks import LAYERS, RUN
from commandline import Command
from routed import random_trace

from workbench import connection, corpus, files, models, query, schema
from workbench.combine import attached, merge, working
from workbench.dataset_folder import export_dataset
from workbench.errors import InputError, RunError
from workbench.export import export, save_table
from workbench.extract import sample, split
from workbench.figures import plain, save
from workbench.importers import FORMATS, import_routing, vllm
from workbench.recipe import read_recipe
from workbench.store import Writer
from workbench.tracefile import Trace
from workbench.validate import validate

HOSTILE = (
    "<script>alert(1)</script>", "\"><img src=x onerror=alert(1)>", "[l](javascript:alert(1))", "$\\href{x}{y}$",
    "<a href='javascript:alert(1)'>x</a>", "<b>x</b>", "\x1b]0;title\x07", "\u202egnp.exe",
)  # fmt: skip


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self) -> Any:
        return (Path.touch, (self.touched,))


# --- code that comes with a checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return checkpoint.folder(tmp_path_factory.mktemp("security") / "model")


@pytest.fixture
def remote(folder: Path, tmp_path: Path) -> Path:
    """A checkpoint whose configuration names code of its own, for model, configuration and tokenizer."""
    import shutil

    made = shutil.copytree(folder, tmp_path / "remote")
    touched = tmp_path / "touched"
    code = f"open({str(touched)!r}, 'w').close()\n"
    code += "from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast\n"
    code += "class Evil(OlmoeForCausalLM): pass\nclass EvilConfig(OlmoeConfig): pass\n"
    code += "class EvilTokenizer(PreTrainedTokenizerFast): pass\n"
    (made / "evil.py").write_text(code)
    for name, mapped in {
        "config.json": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"},
        "tokenizer_config.json": {"AutoTokenizer": [None, "evil.EvilTokenizer"]},
    }.items():
        found = json.loads((made / name).read_text())
        (made / name).write_text(json.dumps(found | {"auto_map": mapped}))
    return made


@pytest.mark.parametrize("unknown", [False, True])
def test_code_of_a_checkpoint_does_not_run(remote: Path, tmp_path: Path, workbench: Command, unknown: bool):
    """Where transformers knows the family it takes its own code; where it doesn't, the checkpoint is refused."""
    if unknown:
        found = json.loads((remote / "config.json").read_text())
        (remote / "config.json").write_text(json.dumps(found | {"model_type": "evil"}))
        for call in (models.load, models.describe, models.outline):
            with pytest.raises(InputError):
                call(remote)
        assert workbench("models", remote).code == 2
        refused = workbench(
            "trace", remote, "--corpus", checkpoint.corpus(tmp_path / "c.jsonl"), "--out", tmp_path / "t"
        )
        assert refused.code == 2
    else:
        assert type(models.load(remote).module).__module__.startswith("transformers.")
        models.describe(remote)
    assert not (tmp_path / "touched").exists()


def test_code_of_a_checkpoint_runs_when_asked(remote: Path, tmp_path: Path, monkeypatch):
    """Or the test above tests nothing."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    with suppress(InputError):  # the class isn't one that can be traced
        models.load(remote, trust_remote_code=True)
    assert (tmp_path / "touched").exists()


def test_a_chat_template_is_no_program(folder: Path, tmp_path: Path):
    model = models.load(folder)
    attack = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch T') }}"
    model.tokenizer.chat_template = attack.replace("T", str(tmp_path / "touched"))
    rows = corpus.from_rows([{"messages": [{"role": "user", "content": "hi"}]}])
    from workbench.capture import trace

    with pytest.raises(InputError):
        trace(model, rows, tmp_path / "t.duckdb", progress=False)
    assert not (tmp_path / "touched").exists()


# --- pickles


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("ending", ["npy", "npz", "pt", "jsonl", "json", "csv", "parquet", "safetensors"])
def test_a_pickle_is_loaded_by_no_importer(form: str, ending: str, tmp_path: Path):
    path = tmp_path / f"x_00.{ending}"
    for write in (
        lambda: path.write_bytes(pickle.dumps(Payload(tmp_path / "touched"))),
        lambda: torch.save({"logical_count": Payload(tmp_path / "touched")}, path),
        lambda: np.save(path.open("wb"), np.array([Payload(tmp_path / "touched")], object), allow_pickle=True),
    ):
        write()
        with pytest.raises(InputError):
            import_routing(form, [path], tmp_path / "t.duckdb", model="m", n_experts=8, top_k=2, n_layers=2)
    assert not (tmp_path / "touched").exists() and not (tmp_path / "t.duckdb").exists()


# --- traces that somebody else made


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.txt"
    path.write_text("hush")
    return path


def everything(path: Path, folder: Path) -> None:
    """Whatever reads a trace; it may refuse."""
    folder.mkdir()
    for ask in (
        lambda: [export(path, name, folder / f"{name}.csv") for name in ("sequences", "vocabulary", "routing")],
        lambda: export(path, "selections", folder / "selections.csv"),
        lambda: export(path, "routing", folder / "routing.parquet", unnest=True),
        lambda: export_dataset(path, folder / "data"),
        lambda: merge([path], folder / "merged.duckdb"),
        lambda: merge([path], f"{folder / 'parts'}/"),
        lambda: split(path, folder / "split", by="lang"),
        lambda: sample(path, folder / "sample.duckdb", sequences=2),
        lambda: validate(path),
        lambda: Trace(path).weights(0),
        lambda: Trace(path).sql("FROM selections"),
        lambda: query.ask(path, "FROM selections"),
    ):
        try:
            ask()
        except (InputError, RunError) as refused:
            assert "hush" not in str(refused)


VIEW_AS_TABLE = f"""
    ALTER TABLE vocabulary RENAME TO words;
    CREATE VIEW vocabulary AS SELECT run, token_id, {{text}} AS text FROM words;
    CREATE MACRO duckdb_tables() AS TABLE SELECT unnest({[*schema.columns()]}) AS table_name, false AS internal,
        'main' AS schema_name, system.main.current_database() AS database_name"""
"""A view that a macro says is a table."""
LOGGING = "enable_logging('QueryLog', storage='file', storage_config=struct_pack(path := '{secret}'[:-4] || '.log'))"


@pytest.mark.parametrize(
    "attack",
    [
        "CREATE OR REPLACE VIEW selections AS SELECT content AS run FROM read_text('{secret}')",
        "CREATE MACRO regexp_matches(a, b) AS (SELECT content = 'hush' FROM read_text('{secret}'))",
        "CREATE MACRO to_json(a) AS (SELECT content FROM read_text('{secret}'))",
        "CREATE MACRO list_transform(a, b) AS (SELECT [content] FROM read_text('{secret}'))",
        "CREATE MACRO len(a) AS (SELECT length(content) FROM read_text('{secret}'))",
        "DROP TABLE profiles; CREATE VIEW profiles AS SELECT content AS run FROM read_text('{secret}')",
        VIEW_AS_TABLE.format(text="(SELECT content FROM read_text('{secret}'))"),
        VIEW_AS_TABLE.format(text="(SELECT 'x' FROM enable_profiling(format='json', save_location='{secret}'))"),
        "CREATE MACRO max(a) AS (SELECT 3 FROM enable_profiling(format='json', save_location='{secret}'))",
        f"CREATE MACRO max(a) AS (SELECT 3 FROM {LOGGING})",
        f"CREATE OR REPLACE VIEW selections AS SELECT 3 AS run FROM {LOGGING}",
    ],
)
def test_the_sql_in_a_trace_reads_no_file(attack: str, tmp_path: Path, secret: Path):
    """A DuckDB file can hold views and macros: SQL of whoever made it."""
    path = tmp_path / "t.duckdb"
    random_trace(path)
    with duckdb.connect(str(path)) as con:
        con.execute(attack.format(secret=secret))
    everything(path, tmp_path / "out")
    assert secret.read_text() == "hush" and not secret.with_suffix(".log").exists()
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"hush" not in file.read_bytes(), file


def test_a_view_is_no_table(tmp_path: Path):
    """Whatever the macros of the trace say."""
    path = tmp_path / "t.duckdb"
    random_trace(path)
    with duckdb.connect(str(path)) as con:
        con.execute(VIEW_AS_TABLE.format(text="'x'"))
    for ask in (lambda: Trace(path), lambda: merge([path], tmp_path / "merged.duckdb")):
        with pytest.raises(InputError, match="lacks the tables vocabulary"):
            ask()


def test_what_is_merged_is_confined(tmp_path: Path, secret: Path):
    """From when the traces are attached, before anything in them is read; a folder's files can still be."""
    path = tmp_path / "t.duckdb"
    random_trace(path)
    merge([path], f"{tmp_path / 'parts'}/")
    for out in (None, tmp_path / "out.duckdb"):
        if out is not None:
            schema.create(out)
        with working(out) as con:
            attached(con, [tmp_path / "parts"])
            assert con.execute("SELECT count(*) FROM t0.tokens").fetchall() != [(0,)]
            for attack in (f"FROM read_text('{secret}')", f"COPY (SELECT 1) TO '{secret}'", "SET threads = 1"):
                with pytest.raises((duckdb.PermissionException, duckdb.InvalidInputException)):
                    con.execute(attack)
    assert secret.read_text() == "hush"


@pytest.mark.parametrize(
    "action",
    [
        "INSERT INTO vocabulary SELECT 'x', 0, content FROM read_text('{secret}')",
        "INSERT INTO vocabulary SELECT 'x', 0, 'y' FROM enable_profiling(format='json', save_location='{secret}')",
        f"INSERT INTO vocabulary SELECT 'x', 0, 'y' FROM {LOGGING}",
    ],
)
@pytest.mark.parametrize("mode", ["append", "resume"])
def test_the_triggers_of_a_trace_reach_no_file(action: str, mode: str, tmp_path: Path, secret: Path):
    """They run when a run is added to the trace, or goes on."""
    path = tmp_path / "t.duckdb"
    with Writer(path, RUN, LAYERS):
        pass
    with duckdb.connect(str(path)) as con:
        for event in ("INSERT", "UPDATE"):
            con.execute(
                f"CREATE TRIGGER t{event} AFTER {event} ON runs FOR EACH STATEMENT {action}".format(secret=secret)
            )
    with pytest.raises(RunError), Writer(path, RUN | ({"run": "b"} if mode == "append" else {}), LAYERS, mode=mode):
        pass
    assert secret.read_text() == "hush" and not secret.with_suffix(".log").exists()
    assert Trace(path, RUN["run"]).sql("FROM vocabulary").empty


def test_values_of_a_trace_are_no_paths(tmp_path: Path):
    """`split` names files after values."""
    path = tmp_path / "a" / "t.duckdb"
    path.parent.mkdir()
    names = ("../../up", "/tmp/escaped", "..", ".", "a/b", "a\\b", "CON", "x" * 5000, "\0", "", " ", "*", "~")
    random_trace(path, n_texts=1, languages=names)
    before = {one for one in tmp_path.rglob("*")}
    split(path, tmp_path / "a" / "out", by="lang")
    made = {one for one in tmp_path.rglob("*")} - before
    assert len(list((tmp_path / "a" / "out").glob("*.duckdb"))) == len(names)
    assert all(one.is_relative_to(tmp_path / "a" / "out") or one.name.startswith(".") for one in made), made
    assert not Path("/tmp/escaped.duckdb").exists()


@pytest.mark.parametrize("name", ["p[ab]", "p*", "p?", "[[]", "'; DROP TABLE x; --", "%2e%2e"])
def test_a_folder_is_no_pattern(name: str, tmp_path: Path):
    """Parts in a folder whose name matches others are those of that folder."""
    random_trace(tmp_path / "other.duckdb", n_texts=3)
    mine = random_trace(tmp_path / "mine.duckdb", n_texts=1, seed=5).trace
    merge([tmp_path / "other.duckdb"], f"{tmp_path / 'pa'}/")
    merge([tmp_path / "mine.duckdb"], f"{tmp_path / name}/")
    found = Trace(tmp_path / name)
    assert found.n_sequences == mine.n_sequences and (found.experts(0) == mine.experts(0)).all()
    assert validate(tmp_path / name).empty or name == "[[]"
    assert export(tmp_path / name, "tokens", tmp_path / "t.csv") == mine.n_tokens


def test_a_question_sees_nothing_beside_or_above_the_parts(tmp_path: Path):
    parts = tmp_path / "parts"
    random_trace(tmp_path / "t.duckdb")
    merge([tmp_path / "t.duckdb"], f"{parts}/")
    (tmp_path / "parts-secret").mkdir()
    for path in (tmp_path / "parts-secret" / "x.parquet", tmp_path / "x.parquet"):
        pd.DataFrame({"a": ["hush"]}).to_parquet(path)
    for sql in (
        f"FROM read_parquet('{tmp_path}/parts-secret/x.parquet')",  # a name that begins as the folder's
        f"FROM read_parquet('{parts}/../x.parquet')",
        f"FROM read_parquet('{parts}/../parts-secret/x.parquet')",
        f"FROM read_parquet('{parts}-secret/*')",
        f"FROM parquet_kv_metadata('{tmp_path}/x.parquet')",
        f"FROM read_duckdb('{tmp_path}/t.duckdb')",
        "FROM which_secret('s3://x', 's3')",
        "FROM duckdb_extensions()",
        "FROM sqlite_scan('a', 'b')",
        "FROM read_xlsx('a.xlsx')",
        "FROM 's3://bucket/x.parquet'",
        f"EXPLAIN ANALYZE COPY tokens TO '{parts}/new.csv'",
    ):
        for path in (parts, tmp_path / "t.duckdb"):
            with pytest.raises(InputError) as refused:
                query.ask(path, sql)
            assert "hush" not in str(refused.value)
    assert not (parts / "new.csv").exists()


# --- text


def test_hostile_names_are_text_in_every_file(tmp_path: Path, workbench: Command):
    """A run, a language and a token that are markup: in figures, tables and on the terminal they are shown."""
    path = tmp_path / "t.duckdb"
    random_trace(path, n_texts=2, languages=HOSTILE)
    for metric in ("load", "specialization"):
        by = ("--by", "lang") if metric == "specialization" else ()
        out = workbench("analyze", metric, path, *by, "--figure", tmp_path / f"{metric}.html", "--overwrite")
        assert out.code == 0 and "\x1b]0" not in out.out, out.err
        drawn = (tmp_path / f"{metric}.html").read_text(encoding="utf-8")
        assert "<script>alert(1)" not in drawn and "<img src=x" not in drawn
    shown = workbench("query", path, "SELECT DISTINCT lang FROM sequences")
    assert "\x1b]0" not in shown.out and "\u202e" not in shown.out and "<script>" in shown.out


def test_plotly_takes_no_markup(tmp_path: Path):
    """Plotly draws <b>, <a href> and <br> in any text; `plain` is what all figures put text through."""
    for text in HOSTILE:
        shown = plain(text)
        assert not re.search(r"<\s*[a-z/]", shown) and shown.isprintable()
    save(go.Figure(layout={"title": plain(HOSTILE[0])}), tmp_path / "f.html")
    assert "<script>alert(1)" not in (tmp_path / "f.html").read_text()


FORMULAS = ("=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(1)", "\t=1", "\r=1", "\n=1", '=HYPERLINK("http://x")')


def test_cells_that_a_spreadsheet_would_run(tmp_path: Path):
    frame = pd.DataFrame({"text": list(FORMULAS), "=header": list(FORMULAS)})
    save_table(frame, tmp_path / "a.csv")
    path = tmp_path / "t.duckdb"
    random_trace(path, n_texts=1, languages=FORMULAS)
    export(path, "sequences", tmp_path / "b.csv")
    for name in ("a.csv", "b.csv"):
        with (tmp_path / name).open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert len(cells) >= 18
        assert not [cell for cell in cells if re.match(r"[=+@\t\r\n]|-(?!\d+(\.\d+)?$)", cell)], name
        assert sum(cell.lstrip("'").startswith("=1") for cell in cells) >= 1  # they are there


def test_cells_that_latex_would_run(tmp_path: Path):
    attacks = [r"\input{/etc/passwd}", r"\write18{id}", "^^5cinput", "$x$", "%", "&", "#1", "~"]
    save_table(pd.DataFrame({"text": attacks}), tmp_path / "a.tex")
    made = (tmp_path / "a.tex").read_text()
    body = made[made.index(r"\midrule") : made.index(r"\bottomrule")]
    assert r"\input" not in body and r"\write" not in body and "^^" not in body and "$" not in body.replace(r"\$", "")


# --- small files that are large


GIVEN: dict[str, Any] = {"model": "m", "n_experts": 16, "top_k": 2}


def peak(call: Any) -> int:
    """Most bytes that Python and NumPy held during a call that is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_line_that_fills_the_memory(tmp_path: Path, monkeypatch):
    """A gzip file of 20 kB with a line, and with a text, of 20 MB, where 1 MB is the limit."""
    monkeypatch.setattr(files, "MOST_BYTES", 1 << 20)
    for name in ("a.jsonl.gz", "a.csv.gz", "a.txt.gz"):
        with gzip.open(tmp_path / name, "wb") as file:
            file.write(b"x" * 20_000_000)
        assert peak(lambda name=name: list(corpus.read(tmp_path / name))) < 8 << 20
    (tmp_path / "folder").mkdir()
    with gzip.open(tmp_path / "folder" / "a.txt.gz", "wb") as file:
        file.write(b"x\n" * 10_000_000)
    assert peak(lambda: list(corpus.read(tmp_path / "folder"))) < 200 << 20


def test_an_archive_that_fills_the_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(vllm, "MOST_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w") as file:
        np.lib.format.write_array(file, np.zeros((20_000, 100, 10), np.uint8))
    importing = lambda: import_routing("vllm", [tmp_path / "a.npz"], tmp_path / "t", model="m", n_experts=16)  # noqa: E731
    assert (tmp_path / "a.npz").stat().st_size < 100_000 and peak(importing) < 4 << 20


@pytest.mark.parametrize("shape", [(10**12, 8, 8), (2**40, 2**20, 8), (1, 2**62, 2**62), (10**30, 1, 1)])
def test_a_header_that_says_too_much(shape: tuple[int, ...], tmp_path: Path):
    """An array of .npy, .npz and base64 whose header asks for more than the file holds."""
    header = repr({"descr": "<i4", "fortran_order": False, "shape": shape}).encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 64
    (tmp_path / "a.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", data)
    for name in ("a.npy", "a.npz"):
        assert peak(lambda name=name: import_routing("vllm", [tmp_path / name], tmp_path / "t", **GIVEN)) < 4 << 20


def test_a_safetensors_header_that_says_too_much(tmp_path: Path):
    path = tmp_path / "m_00.safetensors"
    tensors = json.dumps({"c4": {"dtype": "I8", "shape": [10**12, 8, 8], "data_offsets": [0, 64 * 10**12]}}).encode()
    for data in (struct.pack("<Q", 2**62) + b"{}", struct.pack("<Q", len(tensors)) + tensors + b"\0" * 64):
        path.write_bytes(data)
        assert peak(lambda: import_routing("moe-lrc", [path], tmp_path / "t", **GIVEN)) < 4 << 20


def test_a_tensor_that_is_more_than_its_file(tmp_path: Path):
    """One number, repeated by a stride of 0 or left out of a sparse tensor."""
    path = tmp_path / "a.pt"
    sparse = torch.sparse_coo_tensor(torch.zeros(3, 1, dtype=torch.int64), torch.ones(1), (10**5, 10**4, 10**3))
    for tensor in (torch.ones(1, dtype=torch.int32).expand(10**6, 10**4, 10**3), sparse.int()):
        torch.save({"logical_count": tensor}, path)
        assert peak(lambda: import_routing("sglang-recorder", [path], tmp_path / "t", **GIVEN)) < 4 << 20


@pytest.mark.parametrize("text", ["[" * 10**6, '{"a":' * 10**5, "1" * 10**6, '{"format": ' + "9" * 5000 + "}"])
def test_json_that_is_deep_or_long(text: str, tmp_path: Path):
    for ending, read in {
        "jsonl": lambda path: list(corpus.read(path)),
        "json": lambda path: import_routing("sglang", [path], tmp_path / "t", top_k=2, n_layers=1),
        "recipe.json": read_recipe,
    }.items():
        path = tmp_path / f"a.{ending}"
        path.write_text(text)
        with pytest.raises(InputError):
            read(path)


# --- this machine


def test_spilled_data_is_for_its_owner_only(tmp_path: Path):
    """What DuckDB can't hold in memory goes to a folder that others can't look into, nor guess the name of."""
    con = connection.in_memory()
    folder = Path(con.execute("SELECT current_setting('temp_directory')").fetchall()[0][0])
    assert folder.parent.stat().st_mode & 0o077 == 0
    other = connection.in_memory().execute("SELECT current_setting('temp_directory')").fetchall()[0][0]
    assert Path(other) != folder and Path(other).parent == folder.parent


def test_a_trace_spills_nothing_beside_it(tmp_path: Path):
    """A query over a file that sorts more than its memory holds."""
    path = tmp_path / "t.duckdb"
    random_trace(path)
    with connection.writing(path, wait=1) as con:
        written = con.execute("SELECT current_setting('temp_directory')").fetchall()
    before = sorted(tmp_path.iterdir())
    with connection.reading(path) as con:
        con.execute("SET memory_limit = '60MB'")
        assert con.execute("SELECT current_setting('temp_directory')").fetchall() == written
        con.execute("SELECT hash(i) AS h, md5(i::VARCHAR) AS m FROM range(2000000) a(i) ORDER BY h, m").fetchone()
        folder = Path(written[0][0])
        assert list(folder.iterdir()) and folder.parent.stat().st_mode & 0o077 == 0
        assert sorted(tmp_path.iterdir()) == before


def test_the_page_listens_on_this_machine_only():
    """The settings that `workbench app` starts its server with; tests/app/test_browser_query.py uses one."""
    from workbench.commands.page import SETTINGS

    assert SETTINGS["server.address"] == "localhost"
    assert socket.gethostbyname(SETTINGS["server.address"]).startswith("127.")
    assert "server.enableCORS" not in SETTINGS and "server.enableXsrfProtection" not in SETTINGS


@pytest.mark.slow
def test_a_running_page_is_reached_from_this_machine_only(tmp_path: Path):
    """Every socket that the server listens on is of a loopback address; a page of another origin gets no session."""
    import http.client

    from browser import serving

    path = tmp_path / "t.duckdb"
    random_trace(path)
    with serving(path, "--model", "demo") as server:
        port = int(server.url.rsplit(":", 1)[1].strip("/"))
        listening = []
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                address, state = line.split()[1], line.split()[3]
                if state == "0A" and int(address.split(":")[1], 16) == port:
                    listening.append(address.split(":")[0])
        assert listening and set(listening) <= {"0100007F", "00000000000000000000000001000000"}, listening
        asked = http.client.HTTPConnection("localhost", port)
        upgrade = {
            "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }  # fmt: skip
        asked.request("GET", "/_stcore/stream", headers=upgrade | {"Origin": "https://example.org"})
        assert asked.getresponse().status == 403
