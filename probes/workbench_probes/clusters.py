"""Do texts fall into groups by routing, without labels, and are they the languages or domains?

Sequences are clustered by the square roots of their features: Euclidean distance between square roots of shares is
Hellinger's distance between the shares. Layer by layer, then all layers side by side:

- `kmeans`: k-means, the best of 4 starts; `agglomerative`: Ward's method.
- **ami**: mutual information of cluster and label, adjusted for chance (Vinh, Epps & Bailey 2010): 1 when they are the
  same partition, 0 in expectation when they have nothing to do with each other (it may be negative).

The interval covers 95% of bootstrap resamples of texts (translations and pieces together) with the clusters as they
are, shifted by the resampling bias: it says how sure the agreement is, not how stable the clusters are.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from plotly.graph_objects import Figure
from scipy import sparse
from sklearn.cluster import AgglomerativeClustering, KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_mutual_info_score

from workbench import figures
from workbench.analysis.resampling import draws, text_interval
from workbench.errors import InputError, not_negative
from workbench.tracefile import Trace
from workbench_probes.features import Matrix, check
from workbench_probes.groups import text_groups
from workbench_probes.targets import OF_TOKENS, Target, target
from workbench_probes.task import check_seed, matrices

METHODS = ("kmeans", "agglomerative")


def clusters(
    trace: Trace,
    by: str = "lang",
    *,
    features: Sequence[str] = ("choices",),
    layers: Sequence[int] | None = None,
    method: str = "kmeans",
    n_clusters: int | None = None,
    max_rows: int | None = 5000,
    n_resamples: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Cluster sequences by routing, and compare the clusters with a label.

    by          a column of the sequences
    features    choices, weights, probabilities or tokens
    method      "kmeans" or "agglomerative"
    n_clusters  None: as many as the label has values
    max_rows    so many labelled sequences, drawn at random; None: all
    n_resamples of texts, for the interval

    Returns one row a set of features × layer (missing: all together): by, features, layer, method, n_clusters (found:
    k-means has no more than there are different rows), ami, low, high (NaN for a single text), n_labels, n_sequences,
    n_groups (texts). InputError for one label, or fewer sequences than clusters.
    """
    check_seed(seed)
    not_negative(n_resamples=n_resamples)
    if method not in METHODS:
        raise InputError(f"method is {method!r}; expected one of {', '.join(METHODS)}.")
    found = labelled(trace, by, max_rows, seed)
    wanted = len(found.labels) if n_clusters is None else n_clusters
    if not 2 <= wanted <= len(found.row):
        raise InputError(
            f"{wanted} clusters of {len(found.row)} sequences; expected 2 or more, and no more than those."
        )
    without_hidden(features)
    check(trace, features, layers, "sequence")
    text = np.unique(text_groups(trace)[found.row], return_inverse=True)[1]
    n_texts = int(text.max()) + 1
    table = []
    for name, layer, matrix in matrices(trace, found, features, layers):
        place = assign(matrix, wanted, method, seed)
        ami = adjusted_mutual_info_score(found.value, place)
        resampled = [
            adjusted_mutual_info_score(np.repeat(found.value, times), np.repeat(place, times))
            for drawn in draws(n_texts, n_resamples, seed)
            for times in drawn.astype(np.int64)[:, text]
        ]
        low, high = text_interval(np.array(resampled), n_texts, np.array(ami))
        n_found = len(np.unique(place))
        table.append(
            {
                "by": by, "features": name, "layer": layer, "method": method, "n_clusters": n_found, "ami": ami,
                "low": float(low), "high": float(np.minimum(high, 1.0)), "n_labels": len(found.labels),
                "n_sequences": len(found.row), "n_groups": n_texts,
            }
        )  # fmt: skip
    return pd.DataFrame(table).astype({"layer": "Int64"})


def without_hidden(features: Sequence[str]) -> None:
    """InputError for hidden states, whose square roots mean nothing."""
    if "hidden" in features:
        raise InputError("hidden states are no shares of anything; choose choices, weights, probabilities or tokens.")


def labelled(trace: Trace, by: str, max_rows: int | None, seed: int) -> Target:
    """The sequences that have a label, at most `max_rows` of them; InputError for numbers and for a single label."""
    if trace.counted:
        raise trace.only_counts("rows of single tokens to cluster")
    if max_rows is not None and max_rows < 2:
        raise InputError(f"max_rows is {max_rows}; expected at least 2, or None for all.")
    if by in ("token class", *OF_TOKENS) and by not in trace.sequences():
        raise InputError(
            f"{by!r} is a property of tokens; clusters and maps are of sequences: choose a column such as lang."
        )
    found = target(trace, by, unit="sequence")
    if found.numeric:
        raise InputError(f"{by!r} is a number; compare clusters with a column of labels, such as lang or domain.")
    if max_rows is not None and len(found.row) > max_rows:
        found = found.only(np.sort(np.random.default_rng(seed).choice(len(found.row), max_rows, replace=False)))
    if len(found.labels) < 2:
        raise InputError(f"{by!r} is {found.labels[0]!r} everywhere; clusters need two labels to be compared with.")
    return found


def assign(matrix: Matrix, n_clusters: int, method: str, seed: int) -> np.ndarray:
    """Cluster of each row, int (n,). K-means finds no more clusters than there are different rows."""
    starts: Any = 4  # the stubs know only "auto"
    if method == "kmeans":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer different rows than clusters
            return KMeans(n_clusters, n_init=starts, random_state=seed).fit_predict(rooted(matrix))
    return AgglomerativeClustering(n_clusters).fit_predict(dense(rooted(matrix)))


def rooted(matrix: Matrix) -> Any:
    """Square roots, of the same shape: distances become Hellinger's (times √2)."""
    given: Any = matrix
    return np.sqrt(given) if isinstance(matrix, np.ndarray) else given.sqrt()


def dense(matrix: Any) -> np.ndarray:
    """The matrix as an array."""
    return matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)


def figure(frame: pd.DataFrame) -> Figure:
    """Agreement of clusters and label by layer; all layers together as the last place."""
    result = figures.panels([""], height=280, legend=True)
    names = [*map(str, sorted(frame["layer"].dropna().unique())), *(["all"] if frame["layer"].isna().any() else [])]
    for name, part in frame.groupby("features", sort=False):
        x = ["all" if pd.isna(layer) else str(layer) for layer in part["layer"]]
        result.add_scatter(
            x=x, y=part["ami"], name=str(name), mode="markers+lines", line={"dash": "dot", "width": 1},
            error_y={"type": "data", "array": part["high"] - part["ami"], "arrayminus": part["ami"] - part["low"]},
            hovertemplate="%{x}: %{y:.3f}<extra></extra>",
        )  # fmt: skip
    noun = figures.noun(frame["by"].iloc[0])
    result.update_xaxes(title="layer", type="category", categoryorder="array", categoryarray=names)
    result.update_yaxes(title=f"AMI of cluster and {figures.plain(noun)}", rangemode="tozero")
    return result


def findings(frame: pd.DataFrame) -> list[str]:
    """Where clusters agree best with the label, in a sentence."""
    top = frame.iloc[int(frame["ami"].argmax())]
    where = " in all layers together" if pd.isna(top["layer"]) else f" in layer {top['layer']}"
    where = "" if top["features"] == "tokens" else where
    return [
        f"Clusters of {top['n_sequences']} sequences by {top['features']} agree best with {figures.noun(top['by'])}"
        f"{where}: AMI {top['ami']:.2f} [{top['low']:.2f}, {top['high']:.2f}] (1 the same, 0 chance)."
    ]
