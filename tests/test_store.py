"""Writing traces: what goes in comes out, and nothing that was committed is ever lost."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench import connection, schema, store, transaction
from workbench.arrays import from_arrays
from workbench.errors import InputError, RunError
from workbench.routing import NO_EXPERT, Routing
from workbench.store import Block, Writer, check_target
from workbench.tracefile import Trace
from workbench.transaction import to_fixed, to_float
from workbench.validate import validate

RUN = {"run": "first", "model": "tiny", "recorded": ["ids", "weights"], "corpus": {"names": ["a"], "fingerprint": "x"}}
LAYERS = [{"name": f"layers.{i}", "n_experts": 16, "top_k": 4, "gating": "softmax, top-k"} for i in range(2)]


def make_block(seqs, lengths, *, layers=LAYERS, seed=0) -> Block:
    """Random whole sequences; the same ids and seed give the same block."""
    random = np.random.default_rng([seed, *seqs])
    n = sum(lengths)
    routing = []
    for layer in layers:
        experts = np.argsort(random.random((n, layer["n_experts"])), axis=1)[:, : layer["top_k"]].astype(np.uint16)
        weights = random.random(experts.shape, dtype=np.float32)
        routing.append(Routing(experts, weights))
    rows = [
        {"seq": seq, "sha256": f"{seq:064x}", "n_prompt": n, "n_tokens": n, "lang": "en", "metadata": {"row": seq}}
        for seq, n in zip(seqs, lengths, strict=True)
    ]
    tokens = {
        "seq": np.repeat(np.array(seqs, dtype=np.int32), lengths),
        "pos": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "token_id": random.integers(0, 5, n).astype(np.int32),
        "phase": np.ones(n, dtype=np.uint8),
        "nll": random.random(n, dtype=np.float32),
    }
    return Block(rows, tokens, routing)


VOCABULARY = {i: f"t{i}" for i in range(5)}


def write(path, blocks, *, run=RUN, layers=LAYERS, mode="new") -> Trace:
    with Writer(path, run, layers, mode=mode) as writer:
        writer.add_vocabulary(VOCABULARY)
        for block in blocks:
            if not writer.finished_sequences.issuperset(row["seq"] for row in block.sequences):
                writer.append(block)
    return Trace(path, run["run"])


def problems(path) -> list[str]:
    found = validate(path)
    return found[found["severity"] == "error"]["message"].tolist()


def dump(path) -> dict[str, list]:
    """Every table in a fixed order, without what depends on the clock."""
    tables = {}
    with connection.reading(path) as con:
        for table in schema.TABLES:
            columns = "* EXCLUDE (started, finished)" if table == "runs" else "*"
            tables[table] = con.execute(f"SELECT {columns} FROM {table} ORDER BY ALL").fetchall()
    return tables


# --- round trips


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_arrays_come_back(data, tmp_path_factory):
    n = data.draw(st.sampled_from([0, 1, 2, 7, 40]), "tokens")
    n_layers = data.draw(st.integers(1, 3), "layers")
    n_experts = data.draw(st.sampled_from([1, 2, 8, 255, 256, 257, 700]), "experts")
    k = data.draw(st.one_of(st.just(1), st.integers(1, min(n_experts, 9)), st.just(min(n_experts, 40))), "k")
    dtype = data.draw(st.sampled_from(["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    largest = min(n_experts, np.iinfo(dtype).max)
    if k > largest:
        k = int(largest)
    experts = np.argsort(random.random((n, n_layers, largest)), axis=2)[:, :, :k].astype(dtype)
    dropped = np.zeros(experts.shape, dtype=bool)
    if dtype in ("int16", "int32", "int64") and data.draw(st.booleans(), "dropped"):
        kept = random.integers(0, k + 1, size=(n, n_layers, 1))
        dropped = np.arange(k) >= kept
        experts[dropped] = -1
    weights = None
    if data.draw(st.booleans(), "weights"):
        kind = data.draw(st.sampled_from(["float16", "float32", "float64"]))
        weights = (random.random(experts.shape) * data.draw(st.sampled_from([1e-3, 1, 2.5, 3000]))).astype(kind)
    seq = np.sort(random.integers(0, 5, n)) if data.draw(st.booleans(), "sequences") else None
    path = tmp_path_factory.mktemp("arrays") / "t.duckdb"
    trace = from_arrays(path, experts, weights, n_experts=n_experts, seq=seq)

    assert trace.n_tokens == n and trace.n_layers == n_layers
    empty = n > 0 and dropped.all(axis=(0, 2)).any()  # a layer without any choice is told, whyever that is
    assert bool(problems(path)) == empty
    for layer in range(n_layers):
        expected = np.where(dropped[:, layer], NO_EXPERT, experts[:, layer].astype(np.uint16))
        np.testing.assert_array_equal(trace.experts(layer), expected)
        if weights is not None:
            expected = np.where(dropped[:, layer], 0, weights[:, layer].astype(np.float32))
            scale = np.maximum(1, 2 ** np.ceil(np.log2(np.maximum(expected.max(axis=1, initial=1), 1))))
            assert (
                np.abs(trace.weights(layer) - expected) <= scale[:, None] / 131070 * 1.001 + expected * 2.0**-23
            ).all()
    if seq is not None:
        assert trace.tokens()["seq"].tolist() == seq.tolist()


@given(st.lists(st.floats(0, 2.0**60, width=32), min_size=1, max_size=4))
def test_fixed_point(row):
    weights = np.array([row], dtype=np.float32)
    fixed, scale = to_fixed(weights)
    assert scale[0] == 1 or scale[0] / 2 < weights.max() <= scale[0]
    assert (np.abs(to_float(fixed, scale[:, None]) - weights) <= scale[0] / 131070 * 1.001).all()
    order = np.argsort(weights[0])
    assert (np.diff(fixed[0][order].astype(int)) >= 0).all()


def test_everything_recorded(tmp_path):
    n, layers = 30, LAYERS
    block = make_block([3, 1], [10, 20])
    random = np.random.default_rng(1)
    routing = [
        Routing(
            one.experts,
            one.weights,
            entropy=random.random(n, dtype=np.float32),
            margin=np.where(np.arange(n) == 4, np.nan, 0.5).astype(np.float32),
            logits=random.standard_normal((n, 16), dtype=np.float32),
            norms=random.random((n, 4), dtype=np.float32),
            shift=random.random(n, dtype=np.float32) * 2,
            lookahead=one.experts[::-1] if layer == 0 else None,
        )
        for layer, one in enumerate(block.routing)
    ]
    block.tokens["predicted"] = np.where(np.arange(n) % 7, block.tokens["token_id"][::-1], -1)
    profiles = [np.full((2, 16), 1 / 16, dtype=np.float32) for _ in layers]
    profiles[1][0] = np.arange(16) / 120
    recorded = [name for name in schema.RECORDABLE if name != "ids"]
    path = tmp_path / "all.duckdb"
    trace = write(path, [Block(block.sequences, block.tokens, routing, profiles)], run=RUN | {"recorded": recorded})
    order = np.r_[10:30, 0:10]  # sequence 1 comes before 3
    for layer, one in enumerate(routing):
        np.testing.assert_array_equal(trace.experts(layer), one.experts[order])
        for name in ("entropy", "margin", "logits", "norms", "shift"):
            np.testing.assert_array_equal(getattr(trace, name)(layer), getattr(one, name)[order])
        np.testing.assert_array_equal(trace.profiles(layer), profiles[layer][::-1])
    np.testing.assert_array_equal(trace.lookahead(0), routing[0].lookahead[order])
    np.testing.assert_array_equal(trace.predictions(), block.tokens["predicted"][order])
    assert trace.recorded == frozenset(schema.RECORDABLE)
    assert problems(path) == []


def test_fewer_than_k(tmp_path):
    """A block may come with a narrower array than top_k, and with gaps."""
    block = make_block([0], [6])
    experts = block.routing[0].experts[:, :2].copy()
    experts[2, 0] = NO_EXPERT
    experts[3] = NO_EXPERT
    narrow = Routing(experts, np.full((6, 2), 0.5, dtype=np.float32))
    trace = write(tmp_path / "t.duckdb", [Block(block.sequences, block.tokens, [narrow, block.routing[1]])])
    assert trace.experts(0)[2].tolist() == [experts[2, 1], NO_EXPERT, NO_EXPERT, NO_EXPERT]
    assert (trace.experts(0)[3] == NO_EXPERT).all() and (trace.weights(0)[3] == 0).all()
    assert trace.weights(0)[2, 0] == pytest.approx(0.5, abs=1e-5)


def test_odd_text(tmp_path):
    """Texts that break naive writers: NUL, lone surrogates, quotes; metadata that JSON has no word for."""
    block = make_block([0], [5])
    block.sequences[0].update(lang="d\ud800e", source='it\'s "x"')
    block.sequences[0]["metadata"] = {"a": float("nan"), "b": ["ü", np.int64(3)]}
    path = tmp_path / "odd'name.duckdb"
    with Writer(path, RUN, LAYERS) as writer:
        writer.add_vocabulary({0: "a\x00b", 1: "\ud83d", 2: "<script>", 3: "", 4: "ü"})
        writer.append(block)
    trace = Trace(path)
    row = trace.sequences().iloc[0]
    assert (row["lang"], row["source"], row["b"]) == ("d?e", 'it\'s "x"', ["ü", 3])
    assert pd.isna(row["a"])
    assert trace.vocabulary()["text"].tolist() == ["a\x00b", "?", "<script>", "", "ü"]


# --- refusals


@pytest.mark.parametrize("bad", [-0.25, np.nan, np.inf, -np.inf])
def test_bad_weight_names_layer_and_token(tmp_path, bad):
    path = tmp_path / "t.duckdb"
    good, broken = make_block([0], [5]), make_block([7], [9])
    assert broken.routing[1].weights is not None
    broken.routing[1].weights[6, 2] = bad
    with pytest.raises(RunError, match=r"layer 1 \(layers.1\), sequence 7, position 6.*1 whole sequences \(5 tokens\)"):
        write(path, [good, broken])
    assert Trace(path).n_sequences == 1 and problems(path) == []
    assert Trace(path).runs()["status"].tolist() == ["failed"]


def test_bad_expert_and_shape(tmp_path):
    block = make_block([0], [5])
    block.routing[0].experts[3, 1] = 16
    with pytest.raises(RunError, match="expert id 16 of 16 experts: layer 0 .*position 3"):
        write(tmp_path / "a.duckdb", [block])
    block = make_block([0], [5])
    with pytest.raises(RunError, match="1 layers; run 'first' was begun with 2"):
        write(tmp_path / "b.duckdb", [Block(block.sequences, block.tokens, block.routing[:1])])
    with pytest.raises(RunError, match="layer 0 came without entropy"):
        write(tmp_path / "c.duckdb", [block], run=RUN | {"recorded": ["entropy"]})
    with pytest.raises(RunError, match="positions"):
        backwards = block.tokens | {"pos": np.arange(5)[::-1]}
        write(tmp_path / "d.duckdb", [Block(block.sequences, backwards, block.routing)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(experts=np.zeros((4, 2))), r"shape \(4, 2\)"),
        (dict(experts=np.zeros((4, 1, 1))), "expected integers"),
        (dict(experts=[[[8, 1]]]), r"experts\[0, 0, 0\] is 8; layer 0 has 8 experts"),
        (dict(experts=[[[0, 1]], [[3, 3]]]), r"experts\[1, 0\] is \[3, 3\]: an expert is chosen at most once"),
        (dict(experts=[[[-2, 1]]]), r"experts\[0, 0, 0\] is -2"),
        (dict(weights=[[[0.5, -1]]]), r"weights\[0, 0, 1\] is -1.0"),
        (dict(weights=[[[np.nan, 1]]]), r"weights\[0, 0, 0\] is nan"),
        (dict(weights=[[[1.0]]]), "expected numbers of shape"),
        (dict(seq=[0, 1]), "expected 1 integers"),
        (dict(experts=[[[0, 1]], [[2, 3]]], seq=[4, 2]), "seq falls at token 1"),
        (dict(sequences=pd.DataFrame({"seq": [5]})), "no row for sequence 0"),
        (dict(token_ids=[0.5]), "expected 1 integers"),
        (dict(token_ids=[2**31]), "token_ids range from 2147483648 to 2147483648"),
        (dict(token_ids=[-5]), "token_ids range from -5"),
        (dict(n_experts=[8, 8]), "n_experts names 2 layers"),
        (dict(n_experts=70_000), "expected 1 <= top_k <= n_experts"),
    ],
)
def test_arrays_refused(tmp_path, change, message):
    arguments = dict(experts=[[[0, 1]]], n_experts=8) | change
    with pytest.raises(InputError, match=message):
        from_arrays(tmp_path / "t.duckdb", **arguments)
    assert list(tmp_path.glob("*.duckdb")) == []


def test_target_checks(tmp_path):
    path = tmp_path / "t.duckdb"
    write(path, [make_block([0], [5])])
    with pytest.raises(InputError, match="--overwrite.*--resume.*--append"):
        write(path, [])
    with pytest.raises(InputError, match="Leave out --append"):
        check_target(tmp_path / "none.duckdb", "append")
    with pytest.raises(InputError, match="not a folder"):
        check_target(tmp_path / "no" / "t.duckdb", "new")
    with pytest.raises(InputError, match="is a folder"):
        check_target(tmp_path, "overwrite")
    with pytest.raises(InputError, match="already has a run 'first'"):
        write(path, [], mode="append")
    with pytest.raises(InputError, match="can't record wieghts"):
        Writer(path, RUN | {"recorded": ["wieghts"]}, LAYERS)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="not a DuckDB file"):
        check_target(tmp_path / "text", "append")


def test_append_and_overwrite(tmp_path):
    path = tmp_path / "t.duckdb"
    write(path, [make_block([0], [5])])
    write(path, [make_block([0, 1], [5, 6])], run=RUN | {"run": "second"}, mode="append")
    assert Trace(path).run == "second" and Trace(path, "first").n_tokens == 5
    assert problems(path) == []
    write(path, [make_block([0], [3])], run=RUN | {"run": "third"}, mode="overwrite")
    assert Trace(path).runs()["run"].tolist() == ["third"]
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == ["t.duckdb"]


def test_overwrite_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "t.duckdb"
    write(path, [make_block([0], [5])])
    before = dump(path)
    with pytest.raises(KeyError), Writer(path, RUN | {"run": "other"}, LAYERS, mode="overwrite"):
        raise KeyError("the model failed")
    assert dump(path) == before


# --- growing, resuming, being killed


def test_readers_see_a_run_grow(tmp_path, monkeypatch):
    monkeypatch.setattr(transaction, "COMMIT_TOKEN_LAYERS", 50)
    path = tmp_path / "t.duckdb"
    with Writer(path, RUN, LAYERS) as writer:
        writer.add_vocabulary(VOCABULARY)
        for seq in range(6):
            writer.append(make_block([seq], [30]))
        deadline = time.monotonic() + 20
        while (early := Trace(path)).n_sequences < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert early.n_sequences >= 3
        assert early.runs()["status"].tolist() == ["running"]
        writer.append(make_block([6], [30]))
    assert Trace(path).n_sequences == 7
    assert len(early.experts(0)) == len(early.tokens()) == len(early.sequence_index()) == early.n_tokens
    assert len(early.sequences()) == early.n_sequences < 7


def test_commit_waits_for_time_too(tmp_path, monkeypatch):
    monkeypatch.setattr(transaction, "COMMIT_SECONDS", 0.2)
    path = tmp_path / "t.duckdb"
    with Writer(path, RUN, LAYERS) as writer:
        writer.append(make_block([0], [5]))
        deadline = time.monotonic() + 20
        while Trace(path).n_sequences == 0 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert Trace(path).n_sequences == 1


def test_queue_is_bounded_by_bytes(tmp_path, monkeypatch):
    block = make_block([0], [1000])
    monkeypatch.setattr(store, "QUEUE_BYTES", 3 * block.nbytes)
    most = 0
    with Writer(tmp_path / "t.duckdb", RUN, LAYERS) as writer:
        take = writer._take

        def slow(*args):
            nonlocal most
            most = max(most, writer._queued)
            time.sleep(0.02)
            take(*args)

        monkeypatch.setattr(writer, "_take", slow)
        for seq in range(12):
            writer.append(make_block([seq], [1000]))
    assert block.nbytes < most <= 3 * block.nbytes
    assert Trace(tmp_path / "t.duckdb").n_sequences == 12


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("Query interrupted")])
def test_ctrl_c_is_an_interrupted_run(tmp_path, error):
    with pytest.raises(type(error)), Writer(tmp_path / "t.duckdb", RUN, LAYERS) as writer:
        writer.append(make_block([0], [5]))
        raise error
    assert Trace(tmp_path / "t.duckdb").runs()["status"].tolist() == ["interrupted"]


def test_why_nothing_can_be_written():
    assert store._reason(duckdb.Error("IO Error: No space left on device.")).startswith("the disk is full (IO Error")
    assert store._reason(duckdb.Error("Failed to commit (bad allocation)")).startswith("memory ran out (Failed to")


def test_resume_equals_uninterrupted(tmp_path):
    blocks = [make_block([2 * i + 1, 2 * i], [4 + i, 3]) for i in range(6)]
    whole, parts = tmp_path / "whole.duckdb", tmp_path / "parts.duckdb"
    write(whole, blocks)
    with pytest.raises(KeyboardInterrupt), Writer(parts, RUN, LAYERS, mode="resume") as writer:  # no file yet: begins
        writer.add_vocabulary({0: "t0"})
        for block in blocks[:2]:
            writer.append(block)
        raise KeyboardInterrupt
    assert Trace(parts).runs()["status"].tolist() == ["interrupted"]
    with Writer(parts, RUN, LAYERS, mode="resume") as writer:
        assert writer.finished_sequences == {0, 1, 2, 3}
    write(parts, blocks, mode="resume")
    assert dump(parts) == dump(whole)
    assert problems(parts) == []


@pytest.mark.parametrize(
    ("run", "layers", "message"),
    [
        (RUN | {"run": "typo"}, LAYERS, "no run 'typo'.*first"),
        (RUN | {"model": "other"}, LAYERS, "its model is 'tiny', now it is 'other'"),
        (RUN | {"recorded": ["ids"]}, LAYERS, "its recorded is"),
        (RUN | {"corpus": {"names": ["b"]}}, LAYERS, "its corpus is"),
        (RUN, [LAYERS[0], LAYERS[1] | {"n_experts": 8}], "MoE layers are not the same"),
    ],
)
def test_resume_refuses_another_run(tmp_path, run, layers, message):
    path = tmp_path / "t.duckdb"
    write(path, [make_block([0], [5])])
    before = dump(path)
    with pytest.raises(InputError, match=message):
        write(path, [], run=run, layers=layers, mode="resume")
    assert dump(path) == before


CHILD = textwrap.dedent(
    """
    import sys
    sys.path[:0] = sys.argv[2:]
    import test_store
    from workbench import transaction
    from workbench.store import Writer
    transaction.COMMIT_TOKEN_LAYERS = 2_000
    with Writer(sys.argv[1], test_store.RUN, test_store.LAYERS, mode="resume") as writer:
        writer.add_vocabulary(test_store.VOCABULARY)
        print("open", flush=True)
        for seq in range(0, 120, 2):
            if seq not in writer.finished_sequences:
                writer.append(test_store.make_block([seq + 1, seq], [150, 250]))
    print("done", flush=True)
    """
)


def child(path) -> subprocess.Popen:
    here = Path(__file__).parent
    command = [sys.executable, "-c", CHILD, str(path), str(here), str(here.parent)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_at_random_moments(tmp_path):
    """kill -9, again and again: the file always opens with whole sequences, and resuming ends as an undisturbed run."""
    path, moments = tmp_path / "t.duckdb", np.random.default_rng(0).uniform(0.0, 0.9, size=4)
    counts = []
    for moment in moments:
        process = child(path)
        assert process.stdout is not None and process.stdout.readline() == "open\n"
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        trace = Trace(path)
        counts.append(trace.n_sequences)
        assert trace.n_sequences % 2 == 0, "half a block was committed"
        assert problems(path) == []
    assert counts == sorted(counts)
    process = child(path)
    assert process.wait(60) == 0
    undisturbed = tmp_path / "undisturbed.duckdb"
    write(undisturbed, [make_block([seq + 1, seq], [150, 250]) for seq in range(0, 120, 2)])
    assert dump(path) == dump(undisturbed)


def test_second_writer_is_refused(tmp_path):
    path = tmp_path / "t.duckdb"
    with (
        Writer(path, RUN, LAYERS),
        pytest.raises(InputError, match="being written by another process"),
        Writer(path, RUN | {"run": "b"}, LAYERS, mode="append"),
    ):
        pass
    process = child(tmp_path / "u.duckdb")
    assert process.stdout is not None and process.stdout.readline() == "open\n"
    with (
        pytest.raises(InputError, match="being written by another process"),
        Writer(tmp_path / "u.duckdb", RUN, LAYERS, mode="resume"),
    ):
        pass
    process.kill()  # the lock goes with the process
    process.wait()
    with Writer(tmp_path / "u.duckdb", RUN, LAYERS, mode="resume"):
        pass


def test_readers_hold_the_writer_up_only_while_they_read(tmp_path):
    path = tmp_path / "t.duckdb"
    write(path, [make_block([0], [5])])
    con = duckdb.connect(str(path), read_only=True)
    threading.Timer(0.5, con.close).start()
    write(path, [make_block([1], [5])], run=RUN | {"run": "second"}, mode="append")
    assert len(Trace(path).runs()) == 2


FULL_DISK = textwrap.dedent(
    """
    import resource, sys
    sys.path[:0] = sys.argv[2:]
    import test_store
    from workbench import transaction
    from workbench.errors import RunError
    from workbench.store import Writer
    transaction.COMMIT_TOKEN_LAYERS = 40_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000_000, 4_000_000))
    try:
        with Writer(sys.argv[1], test_store.RUN, test_store.LAYERS) as writer:
            writer.add_vocabulary(test_store.VOCABULARY)
            for seq in range(60):
                writer.append(test_store.make_block([seq], [8_000]))
    except RunError as error:
        print(error)
        sys.exit(1)
    """
)


def test_full_disk(tmp_path):
    """A file that can't grow: the error says what is kept, the file opens, and resuming with room finishes it."""
    path, here = tmp_path / "t.duckdb", Path(__file__).parent
    command = [sys.executable, "-c", FULL_DISK, str(path), str(here), str(here.parent)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1, result.stderr
    kept = Trace(path).n_sequences
    assert "the disk is full" in result.stdout
    assert f"{kept} whole sequences ({8000 * kept:,} tokens) are kept" in result.stdout
    assert 0 < kept < 60 and problems(path) == []
    trace = write(path, [make_block([seq], [8000]) for seq in range(kept + 1)], mode="resume")
    assert trace.n_sequences == kept + 1 and problems(path) == []


def test_many_commits_do_not_bloat(tmp_path, monkeypatch):
    """One commit or many: about the same size, and nothing left over in the folder."""
    blocks = [make_block([seq], [20_000]) for seq in range(12)]
    write(tmp_path / "one.duckdb", blocks)
    monkeypatch.setattr(transaction, "COMMIT_TOKEN_LAYERS", 100_000)
    write(tmp_path / "many.duckdb", blocks)
    sizes = {path.name: path.stat().st_size for path in tmp_path.glob("*.duckdb")}
    assert sizes["many.duckdb"] < 1.35 * sizes["one.duckdb"], json.dumps(sizes)
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".wal", ".new", ".before")]


def test_exceptions_of_the_caller_pass_through(tmp_path):
    path = tmp_path / "t.duckdb"
    with pytest.raises(ZeroDivisionError), Writer(path, RUN, LAYERS) as writer:
        writer.append(make_block([0], [5]))
        assert os.getpid() / 0
    assert Trace(path).n_sequences == 1 and Trace(path).runs()["status"].tolist() == ["failed"]
