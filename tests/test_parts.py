"""Traces as folders of Parquet parts: written, read like a file, confined, and what is said of broken ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import blocks
import duckdb
import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from blocks import LAYERS, RUN, make_block, rows_of, write_file, write_folder, write_part
from commandline import Command, refused

from workbench import analysis, connection, parts, query, schema
from workbench.combine import merge
from workbench.errors import InputError, RunError
from workbench.export import export
from workbench.location import Url, filesystem, located
from workbench.tracefile import Trace, info
from workbench.validate import validate

GROUPS = [range(0, 5), range(5, 9), range(9, 16)]


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path) -> Iterator[str]:
    """Where to write a trace: on this machine, and behind a URL."""
    if request.param == "local":
        yield str(tmp_path / "lang=de [1]" / "parts")  # neither a column nor a pattern
        return
    memory = fsspec.filesystem("memory")
    yield f"memory://{tmp_path.name}/parts"
    if memory.exists(f"/{tmp_path.name}"):
        memory.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def local(tmp_path) -> Path:
    write_folder(tmp_path / "parts", GROUPS)
    return tmp_path / "parts"


# --- what is read


def test_a_folder_has_what_a_file_of_the_same_run_has(folder: str, tmp_path: Path):
    one, other = write_folder(folder, GROUPS), write_file(tmp_path / "one.duckdb", GROUPS)
    assert rows_of(folder) == rows_of(tmp_path / "one.duckdb")
    for layer in range(len(LAYERS)):
        for name in ("experts", "weights", "entropy", "profiles"):
            np.testing.assert_array_equal(getattr(one, name)(layer), getattr(other, name)(layer))
    for name in ("tokens", "sequences", "vocabulary"):
        pd.testing.assert_frame_equal(getattr(one, name)(), getattr(other, name)())
    pd.testing.assert_frame_equal(one.layers, other.layers)
    assert one.runs()["recipe"].tolist() == other.runs()["recipe"].tolist() == [RUN["recipe"]]
    asked = (
        "SELECT layer, expert, count(*) AS n, typeof(any_value(weight)) AS t FROM selections GROUP BY ALL ORDER BY ALL"
    )
    pd.testing.assert_frame_equal(one.sql(asked), other.sql(asked))
    some = other.sequence_ids[::3]
    np.testing.assert_array_equal(one.only(some).experts(1), other.only(some).experts(1))
    assert validate(folder).empty and validate(tmp_path / "one.duckdb").empty
    facts = info(folder)
    assert facts["bytes"] > 1000 and facts["file"] == folder and facts["runs"][0]["tokens"] == one.n_tokens
    assert str(one.path) == folder and one.path.name == "parts"


def test_commands_take_a_folder(local: Path, tmp_path: Path, workbench: Command):
    assert json.loads(workbench("info", local, "--json").out)["runs"][0]["sequences"] == 16
    assert "no problems" in workbench("validate", local).out
    assert workbench("analyze", "load", local, "--out", tmp_path / "t.csv").code == 0
    assert json.loads(workbench("query", local, "SELECT count(*) AS n FROM sequences", "--json").out) == [{"n": 16}]
    assert workbench("export", local, "--table", "selections", "--out", tmp_path / "s.parquet").code == 0
    assert pq.read_metadata(tmp_path / "s.parquet").num_rows == Trace(local).n_tokens * len(LAYERS) * blocks.K
    assert workbench("report", local, "--out", tmp_path / "r.html").code == 0
    assert "made" in (tmp_path / "r.html").read_text()


def test_a_command_takes_a_url(workbench: Command, tmp_path: Path):
    url = f"memory://{tmp_path.name}/x"
    write_folder(url, GROUPS)
    assert workbench("info", url, "--json").code == 0
    refused(
        workbench("info", f"memory://{tmp_path.name}/nothing"), f"memory://{tmp_path.name}/nothing", "format.parquet"
    )
    refused(workbench("info", "nowhere://bucket/x"), "nowhere://bucket/x", "fsspec")


def test_the_demonstration_as_a_folder(demo_trace: Path, tmp_path: Path):
    merge([demo_trace], f"{tmp_path}/parts/")
    assert rows_of(demo_trace, times=True) == rows_of(tmp_path / "parts", times=True)
    for name, options in {
        "specialization": {"by": "lang"},
        "coactivation": {},
        "uncertainty": {},
        "consistency": {},
    }.items():
        ask, _ = analysis.find(name)
        one, other = (ask(Trace(path), **options) for path in (demo_trace, tmp_path / "parts"))
        pd.testing.assert_frame_equal(one, other)
    assert query.examples("x").keys()
    for sql in query.examples(Trace(demo_trace).run).values():
        assert len(query.ask(demo_trace, sql)) == len(query.ask(tmp_path / "parts", sql)) > 0


def test_a_trace_stays_as_it_was_while_the_folder_grows(folder: str):
    parts.begin(folder, RUN, LAYERS)
    assert Trace(folder).n_sequences == 0
    write_part(folder, "a", range(5, 9))
    before = Trace(folder)
    experts, tokens = before.experts(0), before.tokens()
    write_part(folder, "b", range(0, 5))
    np.testing.assert_array_equal(before.experts(0), experts)
    pd.testing.assert_frame_equal(before.tokens(), tokens)
    assert Trace(folder).n_sequences == 9
    assert Trace(folder).runs()["status"].tolist() == ["running"]


def test_several_runs_in_a_folder(folder: str, tmp_path: Path):
    write_folder(folder, GROUPS)
    write_folder(folder, GROUPS[:1], run=RUN | {"run": "second"}, mode="append")
    write_file(tmp_path / "two.duckdb", GROUPS)
    write_file(tmp_path / "two.duckdb", GROUPS[:1], run=RUN | {"run": "second"}, mode="append")
    assert rows_of(folder) == rows_of(tmp_path / "two.duckdb")
    with pytest.raises(InputError, match="already has a run 'second'"):
        parts.begin(folder, RUN | {"run": "second"}, LAYERS, mode="append")


def test_other_widths_and_dictionaries_are_read(local: Path):
    """A part that another program wrote, with wider numbers and its columns in another order."""
    before = rows_of(local)
    for name in ("routing", "tokens"):
        file = next((local / name).iterdir())
        wide = pq.read_table(file)
        for column in ("seq", "pos"):
            wide = wide.set_column(wide.column_names.index(column), column, wide[column].cast(pa.int64()))
        pq.write_table(wide.select(sorted(wide.column_names)), file)
    assert rows_of(local) == before


# --- what is written


def test_a_part_is_there_only_when_it_is_whole(folder: str, monkeypatch):
    write_folder(folder, GROUPS[:1])
    before = rows_of(folder)
    put = parts._put

    def die(where, name, *more):
        if name.startswith("sequences/"):
            raise OSError("No space left on device")
        put(where, name, *more)

    monkeypatch.setattr(parts, "_put", die)
    with pytest.raises(RunError, match="No space left"):
        write_part(folder, "late", GROUPS[1])
    assert rows_of(folder) == before
    monkeypatch.undo()
    write_part(folder, "late", GROUPS[1])  # tried again
    assert Trace(folder).n_sequences == 9 and validate(folder).empty


def test_a_part_that_is_written_again_is_replaced(folder: str):
    write_folder(folder, GROUPS)
    before = rows_of(folder)
    write_part(folder, "made-000001", GROUPS[1])
    assert rows_of(folder) == before


def test_tables_of_an_earlier_attempt_go(folder: str):
    parts.begin(folder, RUN, LAYERS)
    write_part(folder, "a", GROUPS[0])
    parts.write(folder, "a", parts.transaction(folder))  # nothing in it
    assert Trace(folder).n_sequences == 0
    assert {name: len(rows) for name, rows in rows_of(folder).items() if rows} == {"runs": 1, "layers": 3}


def test_what_died_leaves_nothing_after_the_run(local: Path):
    (local / "routing" / ".a.parquet.12345678").write_bytes(b"half")
    (local / "routing" / "left.parquet").write_bytes(b"half, of a part that was never committed")
    before = rows_of(local)
    parts.finish(local, "made")
    assert not (local / "routing" / ".a.parquet.12345678").exists()
    assert rows_of(local) == before and validate(local).empty


def test_rows_of_a_layer_are_row_groups(local: Path):
    file = pq.ParquetFile(next((local / "routing").iterdir()))
    column = file.schema_arrow.names.index("layer")
    found = [file.metadata.row_group(group).column(column).statistics for group in range(file.num_row_groups)]
    assert [(one.min, one.max) for one in found] == [(0, 0), (1, 1), (2, 2)]
    assert file.metadata.row_group(0).column(column).compression == "ZSTD"


def test_resume(folder: str):
    assert parts.begin(folder, RUN, LAYERS, mode="resume") == []
    write_part(folder, "a", GROUPS[0])
    started = Trace(folder).started
    parts.finish(folder, "made", "interrupted")
    assert Trace(folder).runs()["status"].tolist() == ["interrupted"]
    assert parts.begin(folder, RUN, LAYERS, mode="resume") == ["a"]
    assert Trace(folder).started == started and Trace(folder).runs()["status"].tolist() == ["running"]
    with pytest.raises(InputError, match="its dtype is 'float32', now it is 'int8'"):
        parts.begin(folder, RUN | {"dtype": "int8"}, LAYERS, mode="resume")
    with pytest.raises(InputError, match="MoE layers are not the same"):
        parts.begin(folder, RUN, LAYERS[:2], mode="resume")


def test_begin_refuses(folder: str, tmp_path: Path):
    write_folder(folder, GROUPS)
    before = rows_of(folder)
    with pytest.raises(InputError, match="not empty.*--overwrite.*--resume"):
        parts.begin(folder, RUN, LAYERS)
    with pytest.raises(InputError, match="can't record beauty"):
        parts.begin(folder, RUN | {"recorded": ["beauty"]}, LAYERS, mode="overwrite")
    with pytest.raises(InputError, match="part '../x': expected letters"):
        write_part(folder, "../x", GROUPS[0])
    with pytest.raises(InputError, match="no run 'x'"):
        parts.transaction(folder, "x")
    assert rows_of(folder) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    for mode in parts.MODES:
        with pytest.raises(InputError, match="full"):
            parts.begin(tmp_path / "full", RUN, LAYERS, mode=mode)
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"


def test_overwrite_removes_the_trace_only(local: Path):
    (local / "notes.txt").write_text("mine")
    write_folder(local, GROUPS[:1], mode="overwrite")
    assert Trace(local).n_sequences == 5 and (local / "notes.txt").read_text() == "mine"


# --- what is refused


def test_what_is_no_trace(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty is a folder but not a trace: it is empty"):
        Trace(tmp_path / "empty")
    (tmp_path / "empty" / "a.csv").write_text("a")
    with pytest.raises(InputError, match="it holds a.csv, but no format.parquet"):
        Trace(tmp_path / "empty")
    with pytest.raises(InputError, match="no such file"):
        Trace(tmp_path / "nothing")
    with pytest.raises(InputError, match="is a folder; expected a DuckDB file"):
        connection.connect(tmp_path, read_only=False)


def test_a_newer_format_is_refused(local: Path):
    pq.write_table(pa.table({"version": [schema.FORMAT + 1], "written_by": ["x"]}), local / "format.parquet")
    with pytest.raises(InputError, match=f"format {schema.FORMAT + 1}.*Update the workbench"):
        Trace(local)


@pytest.mark.parametrize("table", ["format", "runs", "sequences", "tokens", "routing"])
@pytest.mark.parametrize("harm", ["cut", "empty", "text"])
def test_a_damaged_part_is_named(local: Path, table: str, harm: str):
    file = local / "format.parquet" if table == "format" else sorted((local / table).iterdir())[-1]
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello, this is no Parquet"}[harm])
    with pytest.raises(InputError, match=f"{file.name}.* is damaged or cut short"):
        trace = Trace(local)
        trace.tokens()
        trace.experts(0)
    with pytest.raises((InputError, RunError), match=file.name):
        export(local, table if table != "format" else "runs", local.parent / "out.csv")
    assert not (local.parent / "out.csv").exists()


def test_a_flipped_byte_is_found(local: Path):
    file = sorted((local / "routing").iterdir())[1]
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 3] ^= 255
    file.write_bytes(whole)
    found = validate(local)
    assert (
        found["check"].tolist()[0] == "parts" and file.name in found["message"][0] and "damaged" in found["message"][0]
    )


def test_a_part_whose_files_disagree_is_named(local: Path):
    names = sorted(path.name for path in (local / "routing").iterdir())
    shutil.copy(local / "routing" / names[0], local / "routing" / names[1])
    found = validate(local)
    assert (found["check"] == "parts").sum() == 1
    message = found.loc[found["check"] == "parts", "message"].item()
    assert names[1].removesuffix(".parquet") in message and "routing" in message
    with pytest.raises(InputError, match="validate"):
        Trace(local).experts(0)
    (local / "routing" / names[1]).unlink()
    assert "no rows in routing" in validate(local).set_index("check").loc["parts", "message"]


def test_a_sequence_in_two_parts_is_found(local: Path):
    write_part(local, "twice", range(3, 5))
    assert "sequence_unique" in validate(local)["check"].tolist()


def test_a_column_that_is_missing_is_named(local: Path):
    file = sorted((local / "tokens").iterdir())[-1]
    pq.write_table(pq.read_table(file).drop_columns("nll"), file)
    with pytest.raises(InputError, match="nll"):
        Trace(local).tokens()


# --- confined


def serialized(sql: str) -> str:
    """The query as JSON, as it stands in a string of SQL."""
    with duckdb.connect() as con:
        return con.execute("SELECT json_serialize_sql(?)", [sql]).fetchall()[0][0].replace("'", "''")


def test_a_question_sees_the_folder_only(folder: str, tmp_path: Path):
    trace = write_folder(folder, GROUPS)
    secret = tmp_path / "secret.parquet"
    pq.write_table(pa.table({"a": [1]}), secret)
    inside = str(located(folder) / "new.csv")
    copying = f"WITH x AS (COPY (SELECT 1) TO '{inside}') SELECT 1"
    twice = serialized(copying).replace("'", "''")
    bad = [
        f"SELECT * FROM read_parquet('{secret}')",
        f"FROM '{secret}'",
        f"SELECT * FROM read_text('{tmp_path}/../secret.parquet')",
        "SELECT * FROM glob('/*')",
        f"COPY (SELECT 1) TO '{inside}'",
        f"COPY (SELECT 1) TO '{tmp_path}/new.csv'",
        f"COPY (PIVOT sequences ON lang USING count(*)) TO '{inside}'",
        f"EXPLAIN ANALYZE COPY (PIVOT sequences ON lang USING count(*)) TO '{inside}'",
        f"WITH x AS (COPY (PIVOT sequences ON lang USING count(*)) TO '{inside}') SELECT 1",
        f"WITH x AS (COPY (SELECT 1) TO '{inside}') SELECT 1",
        f"WITH x AS NOT MATERIALIZED (/* */ COPY (SELECT 1) TO '{inside}') SELECT 1",
        f"WITH x AS (\u200bCOPY (SELECT 1) TO '{inside}') SELECT 1",
        f"FROM json_execute_serialized_sql('{serialized(copying)}')",
        f"FROM query('FROM json_execute_serialized_sql(''{twice}'')')",
        f"SELECT 1 FROM enable_profiling(format = 'json', save_location = '{inside}')",
        f"ATTACH '{inside}'",
        "SET enable_external_access = true",
        "CREATE TABLE x AS SELECT 1",
        "DROP VIEW tokens",
        "SELECT 1; SELECT 2",
        "INSTALL httpfs",
        "FROM secret",
    ]
    fs, root = filesystem(located(folder))
    before = {name: fs.cat_file(name) for name in fs.find(root)}
    for sql in bad:
        for ask in (trace.sql, lambda sql: query.ask(folder, sql)):
            with pytest.raises(InputError):
                ask(sql)
        assert {name: fs.cat_file(name) for name in fs.find(root)} == before, sql
    assert not (tmp_path / "new.csv").exists()


def test_a_url_reads_nothing_but_parts(tmp_path: Path):
    memory = fsspec.filesystem("memory")
    url = f"memory://{tmp_path.name}/parts"
    trace = write_folder(url, GROUPS)
    with memory.open(f"/{tmp_path.name}/secret.parquet", "wb") as file:
        pq.write_table(pa.table({"a": [1]}), file)
    memory.copy(f"/{tmp_path.name}/secret.parquet", f"/{tmp_path.name}/parts/.secret.parquet")
    with connection.reading(url) as con:
        (protocol,) = [name for name in con.list_filesystems() if name.startswith("parts-")]
    for name in (
        f"{protocol}://../secret.parquet",
        f"{protocol}://.secret.parquet",
        f"memory://{tmp_path.name}/secret.parquet",
    ):
        with pytest.raises(InputError):
            trace.sql(f"SELECT * FROM read_parquet('{name}')")


def test_two_urls_in_one_question(tmp_path: Path):
    urls = [f"memory://{tmp_path.name}/{name}" for name in "ab"]
    for url, seqs in zip(urls, GROUPS, strict=False):
        write_folder(url, [seqs])
    merged = merge(urls, tmp_path / "both.duckdb")
    assert merged.sequence_ids.tolist() == list(range(9))


# --- where


@pytest.mark.parametrize(
    "given, kind, text",
    [
        ("s3://bucket/a/b", Url, "s3://bucket/a/b"),
        ("s3://bucket/a/", Url, "s3://bucket/a"),
        ("memory://x", Url, "memory://x"),
        ("file:///tmp/x", Path, "/tmp/x"),
        ("FILE:///tmp/x", Path, "/tmp/x"),
        ("local:///tmp/x", Path, "/tmp/x"),
        ("S3://Bucket/a", Url, "s3://Bucket/a"),
        ("a/b.duckdb", Path, "a/b.duckdb"),
        (Url("s3://bucket/a"), Url, "s3://bucket/a"),
    ],
)
def test_located(given, kind: type, text: str):
    found = located(given)
    assert isinstance(found, kind) and str(found) == text
    assert str(found / "c") == f"{text}/c" and located(str(found)) == found


def test_a_url_without_a_host_is_refused():
    with pytest.raises(InputError, match="s3:///x: nothing between"):
        located("s3:///x")


def test_a_filesystem_that_does_not_answer(workbench: Command, tmp_path: Path):
    """Packages behind fsspec raise what they like: s3fs lets botocore's exceptions through, which are no OSErrors."""

    class NoAnswer(Exception):
        pass

    class Silent(fsspec.AbstractFileSystem):
        protocol = "silent"

        def exists(self, path: str, **kwargs: Any) -> bool:
            raise NoAnswer("nobody\nanswers")

        def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
            self.exists(path)

        def makedirs(self, path: str, exist_ok: bool = False) -> None:
            self.exists(path)

    fsspec.register_implementation("silent", Silent, clobber=True)
    file = tmp_path / "a.duckdb"
    write_file(file, GROUPS)
    refused(workbench("info", "silent://there/trace"), "silent://there/trace can't be read: nobody.")
    refused(workbench("merge", file, "--out", "silent://there/trace"), "silent://there/trace can't be read: nobody.")
    with pytest.raises(RunError, match="silent://there/trace can't be written: nobody."):
        parts.write_header("silent://there/trace", {"run": "a"}, LAYERS)


def test_memory_from_the_environment(local: Path, monkeypatch, tmp_path: Path):
    monkeypatch.setenv(connection.MEMORY, "123MiB")
    merge([local], tmp_path / "one.duckdb")
    for path in (local, tmp_path / "one.duckdb"):
        assert Trace(path).sql("SELECT current_setting('memory_limit') AS m")["m"].tolist() == ["123.0 MiB"]
    monkeypatch.setenv(connection.MEMORY, "much")
    with pytest.raises(InputError, match="WORKBENCH_MEMORY is 'much'; expected a size such as 4GB"):
        Trace(local)


def test_a_block_has_what_the_tests_think():
    block = make_block(range(3))
    assert block.n_tokens == sum(row["n_tokens"] for row in block.sequences)
