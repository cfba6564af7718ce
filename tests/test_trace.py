"""Reading traces: the right order, the right errors, and SQL that can't leave the file."""

import os
import shutil
import subprocess
import sys
import threading
import time

import duckdb
import numpy as np
import pandas as pd
import pytest
from test_store import LAYERS, RUN, VOCABULARY, make_block, write

from workbench import connection, schema
from workbench.errors import InputError
from workbench.store import Writer
from workbench.tracefile import Trace, info


@pytest.fixture(scope="module")
def blocks():
    """Sequences out of order, as batches sorted by length are."""
    return [make_block([5, 2, 9], [4, 7, 3]), make_block([0, 7], [6, 1])]


@pytest.fixture(scope="module")
def path(blocks, tmp_path_factory):
    path = tmp_path_factory.mktemp("trace") / "t.duckdb"
    write(path, blocks)
    return path


def test_order_is_that_of_tokens(path, blocks):
    trace = Trace(path)
    tokens = trace.tokens()
    assert tokens["seq"].tolist() == [0] * 6 + [2] * 7 + [5] * 4 + [7] + [9] * 3
    assert tokens["pos"].tolist() == [*range(6), *range(7), *range(4), 0, *range(3)]
    assert tokens["phase"].unique().tolist() == ["prompt"]
    sequences = trace.sequences()
    assert sequences["seq"].tolist() == [0, 2, 5, 7, 9] and sequences["row"].tolist() == [0, 2, 5, 7, 9]
    assert trace.sequence_index().tolist() == np.repeat(range(5), sequences["n_tokens"]).tolist()
    assert sequences["seq"].to_numpy()[trace.sequence_index()].tolist() == tokens["seq"].tolist()
    order = np.argsort(np.concatenate([block.tokens["seq"] for block in blocks]), kind="stable")
    for layer in range(2):
        expected = np.concatenate([block.routing[layer].experts for block in blocks])[order]
        np.testing.assert_array_equal(trace.experts(layer), expected)
        weights = np.concatenate([block.routing[layer].weights for block in blocks])[order]
        np.testing.assert_allclose(trace.weights(layer), weights, atol=1 / 131070)
    for name in ("token_id", "nll"):
        expected = np.concatenate([block.tokens[name] for block in blocks])[order]
        np.testing.assert_array_equal(tokens[name], expected)


def test_arrays_agree_with_selections(path):
    """The view gives the same numbers, to the bit."""
    trace = Trace(path)
    frame = trace.sql("SELECT expert, weight FROM selections WHERE layer = 1 ORDER BY seq, pos, rank")
    np.testing.assert_array_equal(frame["expert"], trace.experts(1).ravel())
    np.testing.assert_array_equal(frame["weight"], trace.weights(1).ravel())


def test_facts(path):
    trace = Trace(path)
    assert (trace.n_tokens, trace.n_sequences, trace.n_layers) == (21, 5, 2)
    assert trace.run == "first" and trace.recorded == {"ids", "weights"}
    assert trace.layers["n_experts"].tolist() == [16, 16]
    assert trace.runs().loc[0, "corpus"] == {"names": ["a"], "fingerprint": "x"}
    assert trace.vocabulary()["text"].tolist() == [f"t{i}" for i in range(5)]
    assert "21 tokens, 5 sequences, 2 layers" in repr(trace)
    facts = info(path)
    assert facts["runs"][0]["tokens"] == 21 and facts["runs"][0]["experts"] == [16] and facts["format"] == schema.FORMAT


def test_an_empty_run(tmp_path):
    trace = write(tmp_path / "t.duckdb", [])
    assert trace.n_tokens == 0 and trace.experts(0).shape == (0, 4) and trace.weights(1).shape == (0, 4)
    assert len(trace.tokens()) == len(trace.sequences()) == len(trace.sequence_index()) == 0
    assert info(tmp_path / "t.duckdb")["runs"][0]["tokens"] == 0


def test_which_run(tmp_path):
    path = tmp_path / "t.duckdb"
    write(path, [make_block([0], [5])])
    with pytest.raises(KeyboardInterrupt), Writer(path, RUN | {"run": "broken"}, LAYERS, mode="append"):
        raise KeyboardInterrupt
    assert Trace(path).run == "first"  # the last that finished
    assert Trace(path, "broken").n_tokens == 0
    with pytest.raises(InputError, match=r"no run 'typo'.*first \(finished\), broken \(interrupted\)"):
        Trace(path, "typo")


def test_not_recorded(path):
    trace = Trace(path)
    for name in ("entropy", "margin", "logits", "norms", "profiles"):
        with pytest.raises(InputError, match=f"{name} .* not recorded in run 'first'.*--record ids,weights,{name}"):
            getattr(trace, name)(0)
    with pytest.raises(InputError, match="layer 2: run 'first' has layers 0 to 1"):
        trace.experts(2)


# --- files that are no traces


def broken_files(path, folder):
    whole = path.read_bytes()
    yield "missing", "no such file"
    (folder / "empty").touch()
    yield "empty", "is empty"
    (folder / "text").write_text("hello")
    yield "text", "not a DuckDB file"
    (folder / "list.json").write_text('[{"a": 1}]')
    yield "list.json", "not a DuckDB file"
    (folder / "noise").write_bytes(os.urandom(50_000))
    yield "noise", "not a DuckDB file"
    for part in (100, 9_000, 13_000, len(whole) // 2, len(whole) - 150_000):
        (folder / f"cut{part}").write_bytes(whole[:part])
        yield f"cut{part}", "cut short|not a DuckDB file|damaged"
    (folder / "folder").mkdir()
    yield "folder", "is a folder"
    duckdb.connect(str(folder / "other")).execute("CREATE TABLE t (a INTEGER)").close()
    yield "other", "not a trace: it has no table `format` .its tables: t"
    for version, message in ((schema.FORMAT + 1, "Update the workbench"), (0, "Trace again")):
        shutil.copy(path, folder / f"v{version}")
        duckdb.connect(str(folder / f"v{version}")).execute("UPDATE format SET version = ?", [version]).close()
        yield f"v{version}", f"has trace format {version}.*{message}"
    shutil.copy(path, folder / "dropped")
    duckdb.connect(str(folder / "dropped")).execute("DROP TABLE profiles").close()
    yield "dropped", "lacks the tables profiles"
    shutil.copy(path, folder / "runless")
    duckdb.connect(str(folder / "runless")).execute("DELETE FROM runs").close()
    yield "runless", "holds no run"


def test_bad_files(path, tmp_path):
    for name, message in broken_files(path, tmp_path):
        with pytest.raises(InputError, match=message):
            Trace(tmp_path / name)


def test_a_part_is_lost_later(path, tmp_path):
    """What opens but can't be read through gives the same kind of error."""
    copy = tmp_path / "t.duckdb"
    whole = bytearray(path.read_bytes())
    copy.write_bytes(whole)
    trace = Trace(copy)
    for start in range(3 * 4096, len(whole), schema.BLOCK_SIZE):
        whole[start + 64 : start + 128] = bytes(64)  # a checksum no longer fits
    copy.write_bytes(whole)
    with pytest.raises(InputError, match="damaged"):
        trace.experts(0)


# --- locks


HOLD = """
import duckdb, sys, time
con = duckdb.connect(sys.argv[1])
print("held", flush=True)
time.sleep(float(sys.argv[2]))
"""


def test_waits_for_a_writer(path, tmp_path, monkeypatch):
    copy = tmp_path / "t.duckdb"
    shutil.copy(path, copy)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(copy), "1"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert Trace(copy).n_tokens == 21
    with subprocess.Popen([sys.executable, "-c", HOLD, str(copy), "30"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        start = time.monotonic()
        with (
            pytest.raises(InputError, match="in use by another process and stayed locked for 0 s"),
            connection.reading(copy, wait=0.3),
        ):
            pass
        assert time.monotonic() - start < 10
        process.kill()


def test_threads_read_at_once(path):
    """As the page does: arrays, SQL and exports from several threads of one process."""
    trace, errors = Trace(path), []

    def ask(question):
        try:
            for _ in range(4):
                question()
        except Exception as error:
            errors.append(error)

    questions = [lambda: trace.experts(0), lambda: trace.sql("SELECT count(*) FROM routing"), trace.tokens, trace.runs]
    threads = [threading.Thread(target=ask, args=[question]) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# --- SQL


def test_sql(path):
    trace = Trace(path)
    frame = trace.sql("SELECT lang, sum(n_tokens)::INTEGER AS n FROM sequences GROUP BY lang")
    assert frame.to_dict("records") == [{"lang": "en", "n": 21}]
    with pytest.raises(InputError, match="the query failed.*nope"):
        trace.sql("SELECT nope FROM tokens")
    with pytest.raises(InputError, match="There are 2 statements"):
        trace.sql("SELECT 1 AS one; SELECT 2 AS two")


@pytest.mark.parametrize("opened", ["reading", "writing"])
def test_an_interrupt_while_duckdb_opens_the_file(path, monkeypatch, opened):
    """DuckDB makes a RuntimeError of Ctrl-C; it is one for whoever handles it."""

    def interrupted(*_: object, **__: object) -> None:
        raise RuntimeError("Query interrupted")

    monkeypatch.setattr(connection, "_check", interrupted)
    with pytest.raises(KeyboardInterrupt), getattr(connection, opened)(path, wait=1):
        pass


def test_sql_stays_inside(path, tmp_path, monkeypatch):
    """No file is read or written, no setting and no table is changed, no Python name is seen."""
    secret, target = tmp_path / "secret.csv", tmp_path / "out"
    secret.write_text("a,b\n1,2\n")
    frame = pd.DataFrame({"a": [1]})  # a name that a query might reach
    assert len(frame) == 1
    before = path.read_bytes()
    trace = Trace(path)
    for query in (
        f"SELECT * FROM '{secret}'",
        f"SELECT * FROM read_csv('{secret}')",
        f"SELECT * FROM read_text('{secret}')",
        f"SELECT * FROM glob('{tmp_path}/*')",
        f"COPY tokens TO '{target}'",
        f"EXPORT DATABASE '{target}'",
        f"ATTACH '{target}' AS other",
        f"ATTACH '{target}' AS other; CREATE TABLE other.t AS SELECT 1",
        "SET enable_external_access = true",
        f"SET enable_external_access = true; SELECT * FROM read_text('{secret}')",
        "RESET enable_external_access",
        "SET lock_configuration = false",
        f"SET temp_directory = '{target}'",
        f"CALL enable_logging(storage_path = '{target}')",
        f"PRAGMA profile_output = '{target}'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT * FROM 'https://example.org/x.csv'",
        "DELETE FROM tokens",
        "CREATE TABLE t (a INTEGER)",
        "DROP TABLE tokens",
        "UPDATE runs SET run = 'x'",
        "SELECT * FROM frame",
        "SELECT getenv('HOME')",
    ):
        with pytest.raises(InputError):
            trace.sql(query)
    assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == [secret]
    assert trace.n_tokens == 21 and len(trace.tokens()) == 21


def test_reads_a_layer_without_the_rest(tmp_path):
    """Memory for one question is that of one layer."""
    layers = [LAYERS[0] | {"name": str(i)} for i in range(6)]
    path = tmp_path / "t.duckdb"
    run = RUN | {"recorded": ["ids"]}
    with Writer(path, run, layers) as writer:
        writer.add_vocabulary(VOCABULARY)
        writer.append(make_block([3], [2000], layers=layers))
    trace = Trace(path)
    experts = trace.experts(5)
    assert experts.dtype == np.uint16 and experts.shape == (2000, 4) and experts.nbytes == 16_000
