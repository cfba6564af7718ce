"""Clusters and maps of sequences find planted groups, and none in noise."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import KNOWS, planted
from routed import full_trace
from scipy import sparse
from scipy.spatial.distance import cdist

from workbench.errors import InputError
from workbench.tracefile import Trace
from workbench_probes import clusters, sequence_map
from workbench_probes import sequence_map as draw_map
from workbench_probes.clusters import figure, findings, rooted


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    return planted(tmp_path_factory.mktemp("clusters") / "t.duckdb")


@pytest.mark.parametrize("method", ["kmeans", "agglomerative"])
def test_clusters(trace: Trace, method: str):
    found = clusters(trace, method=method, n_resamples=20).set_index("layer")
    known = found.loc[KNOWS]
    assert known["ami"] == pytest.approx(1) and known["high"] <= 1
    assert (known["n_clusters"], known["n_labels"], known["n_sequences"], known["n_groups"]) == (2, 2, 60, 30)
    assert abs(found.loc[0, "ami"]) < 0.15 and abs(found.loc[2, "ami"]) < 0.15
    others = clusters(trace, method=method, features=["weights", "tokens"], layers=[0, KNOWS], n_resamples=2)
    assert others["layer"].fillna(-1).tolist() == [0, KNOWS, -1, -1] and others["ami"].iloc[1] == pytest.approx(1)
    assert abs(others["ami"].iloc[-1]) < 0.15
    frame = found.reset_index()
    assert list(figure(frame).data[0].x) == ["0", "1", "2", "all"]
    assert "AMI 1.00" in findings(frame)[0]


def test_fewer_routings_than_labels(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    rows = pd.DataFrame({"lang": ["de", "en", "fr"] * 4})
    experts = (np.arange(12) % 2)[:, None, None]
    two = full_trace(tmp_path / "t.duckdb", experts, n_experts=2, seq=range(12), sequences=rows)
    row = clusters(two, n_resamples=5).iloc[0]
    assert (row["n_clusters"], row["n_labels"]) == (2, 3)
    assert not [one for one in recwarn if "distinct clusters" in str(one.message)]


def test_distances_are_hellingers():
    shares = np.random.default_rng(0).dirichlet(np.ones(5), 6).astype(np.float32)
    expected = np.sqrt(((np.sqrt(shares[:, None]) - np.sqrt(shares[None])) ** 2).sum(-1))
    for given in (shares, sparse.csr_array(shares)):
        points = rooted(given)
        np.testing.assert_allclose(
            cdist(np.asarray(points.todense() if sparse.issparse(points) else points), np.sqrt(shares)),
            expected,
            atol=1e-5,
        )


def test_a_map_puts_a_language_together(trace: Trace):
    found = sequence_map(trace, layers=[KNOWS])
    assert found["seq"].tolist() == list(range(60)) and found["label"].tolist() == found["lang"].tolist()
    distance = cdist(found[["x", "y"]], found[["x", "y"]]) + 1e9 * np.eye(60)
    same = found["label"].to_numpy()[distance.argmin(axis=1)] == found["label"].to_numpy()
    assert same.mean() > 0.9
    pd.testing.assert_frame_equal(found, sequence_map(trace, layers=[KNOWS]))
    assert len(sequence_map(trace, features="tokens")) == 60
    few = sequence_map(trace, "domain", max_rows=20)
    assert len(few) == 20 and few["by"].unique().tolist() == ["domain"]


def test_the_map_as_a_figure(trace: Trace):
    from workbench_probes.sequence_map import figure, findings

    found = draw_map(trace)
    assert sorted(part.name for part in figure(found).data) == ["de", "en"]
    assert sum(len(part.x) for part in figure(found).data) == 60
    assert "60 sequences of 2 values of language" in findings(found)[0]


def test_small_and_wrong(trace: Trace, tmp_path: Path):
    for ask, options, said in [
        (clusters, {"method": "dbscan"}, "method is 'dbscan'"),
        (clusters, {"n_clusters": 1}, "1 clusters of 60 sequences"),
        (clusters, {"n_clusters": 61}, "61 clusters of 60 sequences"),
        (clusters, {"features": ["hidden"]}, "no shares of anything"),
        (clusters, {"by": "loss"}, "is a number"),
        (clusters, {"by": "token_class"}, "'token_class' is a property of tokens; clusters and maps are of sequences"),
        (sequence_map, {"by": "phase"}, "choose a column such as lang"),
        (clusters, {"max_rows": 1}, "max_rows is 1"),
        (clusters, {"seed": 2**32}, "seed is 4,294,967,296; expected less than 4,294,967,296"),
        (sequence_map, {"seed": 2**32}, "expected less than 4,294,967,296"),
        (sequence_map, {"method": "pca"}, "method is 'pca'"),
        (sequence_map, {"features": "hidden"}, "no shares of anything"),
        (sequence_map, {"max_rows": 3}, "a map takes at least 4|everywhere"),
    ]:
        with pytest.raises(InputError, match=said):
            ask(trace, **options)
    if find_spec("umap") is None:
        with pytest.raises(InputError, match="pip install umap-learn"):
            sequence_map(trace, method="umap")
    rows = pd.DataFrame({"lang": ["de", "en"] * 4, "topic": "x"})
    alike = full_trace(tmp_path / "t.duckdb", np.zeros((8, 1, 1), int), n_experts=1, seq=range(8), sequences=rows)
    with pytest.raises(InputError, match="routed alike"):
        sequence_map(alike)
    with pytest.raises(InputError, match="'x' everywhere"):
        clusters(alike, "topic")
    two = full_trace(
        tmp_path / "u.duckdb", (np.arange(8) % 2)[:, None, None], n_experts=2, seq=range(8), sequences=rows
    )
    assert np.isfinite(sequence_map(two)[["x", "y"]].to_numpy()).all()
    assert clusters(two, n_resamples=5)["ami"].iloc[0] == pytest.approx(1)
