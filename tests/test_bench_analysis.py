"""The benchmark of analyses: it runs, and it stops where a number differs."""

import json
from dataclasses import replace

import numpy as np
import pytest

from workbench.bench import analysis as bench
from workbench.bench import large as bench_large
from workbench.bench.generated import Generated, fill
from workbench.errors import InputError
from workbench.tracefile import Trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    return bench.write(tmp_path_factory.mktemp("bench") / "t.duckdb", 1200, 2)


def test_made_up_routing():
    source = Generated(2000, n_layers=2, n_experts=20, top_k=3, length=50)
    experts = source.experts(1)
    assert experts.shape == (2000, 3) and experts.dtype == np.uint16 and experts.max() < 20
    assert all(len(set(token)) == 3 for token in experts.tolist())
    assert np.array_equal(experts, Generated(2000, n_layers=2, n_experts=20, top_k=3, length=50).experts(1))
    assert not np.array_equal(experts, source.experts(0))
    kept = np.mean([len(set(a) & set(b)) for a, b in zip(experts[:-1].tolist(), experts[1:].tolist(), strict=True)])
    assert kept > 3 * 3 / 20 * 1.5  # neighbours have more in common than chance would give
    assert len(np.unique(Generated(400, n_layers=1, n_experts=8, top_k=8, length=20).experts(0)[7])) == 8
    with pytest.raises(InputError, match="layers 0 to 1"):
        source.experts(2)
    assert source.seconds > 0


def test_texts_do_not_depend_on_the_split():
    loads, group, seed = np.ones((1, 10)), np.zeros(4, np.int64), np.uint64(5)
    whole, parts = np.empty((4, 9, 2), np.uint16), np.empty((4, 9, 2), np.uint16)
    fill(whole, group, loads, seed, 0)
    fill(parts[:1], group[:1], loads, seed, 0)
    fill(parts[1:], group[1:], loads, seed, 1)
    assert np.array_equal(whole, parts)


def test_made_up_routing_stands_in_for_a_trace(trace):
    source = Generated(1200, n_layers=2, length=300)
    assert source.n_tokens == trace.n_tokens and source.n_sequences == trace.n_sequences
    assert np.array_equal(source.sequence_index(), trace.sequence_index())
    ours, theirs = source.tokens(), trace.tokens()
    assert list(ours) == list(theirs) and ours["token_id"].equals(theirs["token_id"])
    columns = ["n_tokens", "lang", "domain", "source"]
    assert source.sequences()[columns].astype(str).equals(trace.sequences()[columns].astype(str))
    for layer in range(2):
        assert np.array_equal(source.experts(layer), trace.experts(layer))
    assert set(source.layers) <= set(trace.layers)


def test_first_texts_in_memory(trace):
    held = bench.Held(trace, 2)
    assert held.n_tokens == 600 and held.n_sequences == 2 and len(held.sequences()) == 2 and len(held.tokens()) == 600
    assert np.array_equal(held.experts(1), trace.experts(1)[:600])
    lists = bench.as_lists(held)
    assert lists.layers[1][1][-1] == trace.experts(1)[599].tolist() and lists.langs == ["en", "de"]
    assert bench.Held(held, 1).n_tokens == 300


@pytest.mark.parametrize("name", list(bench.comparisons()))
def test_a_changed_number_stops_it(trace, name):
    references, held = bench.load_references(), bench.Held(trace, 2)
    one = replace(bench.comparisons()[name], n_texts=None, complete=lambda trace: None)
    measured = bench.compare(name, one, held, references, 1)
    assert measured["ratio"] > 0 and measured["reference_tokens"] == 600

    def wrong(code, lists):
        numbers = np.array(one.loops(code, lists), float)
        numbers[np.flatnonzero(np.isfinite(numbers))[-1]] += 1e-6
        return numbers

    with pytest.raises(AssertionError, match=f"{name}: the numbers differ"):
        bench.compare(name, replace(one, loops=wrong), held, references, 1)
    with pytest.raises(AssertionError, match="differ"):
        bench.compare(name, replace(one, ask=lambda trace: []), held, references, 1)


def test_torch_is_compared_too(trace, monkeypatch):
    references, held = bench.load_references(), bench.Held(trace)
    assert bench.compare_with_torch(held, references, 1)["ratio"] > 0
    honest = references.srp_in_torch
    monkeypatch.setattr(references, "srp_in_torch", lambda *arguments: [x * 1.001 for x in honest(*arguments)])
    with pytest.raises(AssertionError, match="torch"):
        bench.compare_with_torch(held, references, 1)


def test_against_and_large(monkeypatch, capsys):
    few = {"load": bench.comparisons()["load"]}
    monkeypatch.setattr(bench, "comparisons", lambda: few)
    result = bench.against(1200, 2, repeats=1)
    assert set(result["analyses"]) == {"load"} and result["tokens"] == 1200 and result["srp_in_torch"]["ratio"] > 0
    capsys.readouterr()
    bench_large.measure(4000, 2)
    large = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(large["parts"]) == {"SRP", "SCH", "cache"} and large["tokens"] == 4000
    assert large["peak_bytes"] > 10_000_000 and all(part["rows"] for part in large["parts"].values())


def test_run_is_one_json_object(monkeypatch):
    monkeypatch.setattr(bench, "against", lambda *sizes: {"sizes": sizes})
    monkeypatch.setattr(bench, "large", lambda *sizes: {"sizes": sizes})
    both = bench.run()
    assert both["against"] == {"sizes": (200_000, 16)} and both["large"] == {"sizes": (11_500_000, 16)}
    assert json.loads(json.dumps(both))["bench"] == "analysis"
    assert "large" not in bench.run(quick=True, only="against") and "against" not in bench.run(only="large")
    with pytest.raises(InputError, match="no part 'small'.*against or large"):
        bench.run(only="small")


def test_references_come_from_a_checkout(tmp_path):
    with pytest.raises(InputError, match="checkout"):
        bench.load_references(tmp_path / "tests" / "references.py")
