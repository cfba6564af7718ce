"""The Consistency page as a script: the what-if answers at once, and is what the analyses say."""

import numpy as np
import pytest
from pages import answered, headings, opened, said
from routed import random_trace

from workbench.analysis.cache import REAL, cache
from workbench.analysis.cache_speed import amount, rounded, speeds, what_if
from workbench.arrays import from_arrays
from workbench.slicing import sample
from workbench.tracefile import Trace


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    found = tmp_path_factory.mktemp("consistency") / "t.duckdb"
    random_trace(found, n_experts=8, dropped=0)
    return found


def metrics(page):
    return {one.label: one.value for one in page.metric}


def test_what_if(monkeypatch, path):
    page = opened(monkeypatch, path, "consistency")
    trace = sample(Trace(path), 50_000)
    found = cache(trace, policies=(*REAL, "belady"))

    def expected(policy, capacity, **given):
        table = speeds(found, trace.layers["n_experts"].tolist(), bytes_per_expert=20e6, **given)
        return what_if(table, policy, capacity)

    answer = expected("lru", 4)
    assert metrics(page)["Hit rate"] == f"{answer['hit_rate']:.1%}"
    assert metrics(page)["Tokens a second"] == rounded(answer["tokens_per_second"])
    assert amount(answer["memory_gb"]) in said(page)
    page.slider("consistency_capacity").set_value(6)
    page.selectbox("consistency_policy").select("belady")
    page.number_input("consistency_bandwidth").set_value(5.0)
    page.number_input("consistency_compute").set_value(3.0)
    page.slider("consistency_overlap").set_value(0.5)
    answered(page)
    answer = expected("belady", 6, bandwidth=5.0, compute_ms=3.0, overlap=0.5)
    assert metrics(page)["Hit rate"] == f"{answer['hit_rate']:.1%}"
    assert metrics(page)["Of full speed"] == f"{answer['of_resident']:.1%}"
    assert metrics(page)["Against no cache"] == f"{answer['speedup']:.2f} ×"


def test_what_is_simulated_anew(monkeypatch, path):
    """Texts that advance together, and a cache that begins empty."""
    page = opened(monkeypatch, path, "consistency", consistency_batch="3", consistency_keep="false")
    found = cache(sample(Trace(path), 50_000), policies=(*REAL, "belady"), batch=3, keep=False)
    row = found[found["layer"].isna() & (found["policy"] == "lru") & (found["capacity"] == 4)].iloc[0]
    if row["hit_rate"] == row["hit_rate"]:
        assert metrics(page)["Hit rate"] == f"{row['hit_rate']:.1%}"
    else:
        assert "can't hold what one token needs" in said(page)


def test_too_small_a_cache(monkeypatch, path):
    page = opened(monkeypatch, path, "consistency", consistency_capacity="1")
    assert "can't hold what one token needs" in said(page) and not page.metric


@pytest.mark.parametrize(
    ("tab", "heading"),
    [
        ("Local consistency", "Local routing consistency"),
        ("Known segments", "The cache that knows the next tokens"),
        ("Policies", "Hit rate of every policy and capacity"),
        ("Prefetch", "Can the next layer's experts be told in time?"),
    ],
)
def test_tabs(monkeypatch, path, tab, heading):
    page = opened(monkeypatch, path, "consistency", consistency_tab=tab)
    assert headings(page) == [heading] and page.dataframe


def test_unknown_size(monkeypatch, path):
    """The speed analysis asks for a size; the page says so."""
    page = opened(monkeypatch, path, "consistency", consistency_tab="Speed")
    assert "the size of an expert" in said(page).replace("\\", "")


@pytest.mark.parametrize(("page", "tab"), [("consistency", "What if"), ("specialisation", "Load"), ("experts", "")])
def test_a_run_without_a_token(monkeypatch, tmp_path, page, tab):
    from_arrays(tmp_path / "t.duckdb", np.zeros((0, 2, 2), int), n_experts=4)
    found = opened(monkeypatch, tmp_path / "t.duckdb", page, **{f"{page}_tab": tab})
    assert "the texts that are looked at have no tokens" in said(found).replace("\\", "")


def test_without_a_trace(monkeypatch):
    assert "No trace is open" in said(opened(monkeypatch, None, "consistency"))
