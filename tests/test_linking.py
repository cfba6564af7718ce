"""Clicked points find their rows: every analysis's figure over a real trace, and single points whose row is known."""

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from routed import full_trace

from workbench import analysis, figures, linking
from workbench.tracefile import Trace

ARGUMENTS = {
    "placement": {"time_limit": 1.0},
    "contrast": {"group": "lang=de", "versus": "lang=en"},
    "task_experts": {"task": "domain=code-python"},
    "vocabulary": {"most": 200},
}
MODELS = ("similarity", "gate_regression", "expert_map", "permutation", "sensitivity")
SEVERAL = ("partners", "straggler", "vocabulary", "similarity", "permutation", "bandwidth", "balance")
"""Figures with points that stand for many rows: means over layers, medians of experts."""
NO_ROW = ("even routing", "everything resident", "no cache", "LRU cache alone")
"""Lines that stand for no row."""


@pytest.fixture(scope="module")
def trace(demo_trace) -> Trace:
    return Trace(demo_trace)


@pytest.fixture(scope="module")
def model():
    from workbench.models import load

    return load("demo")


@pytest.fixture(scope="module")
def normed(tmp_path_factory) -> Trace:
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((60, 2, 6)), axis=-1)[..., :3]
    sequences = pd.DataFrame({"lang": ["en", "de"] * 3})
    return full_trace(
        tmp_path_factory.mktemp("normed") / "t.duckdb", experts, n_experts=6, seq=np.repeat(np.arange(6), 10),
        sequences=sequences, weights=random.random(experts.shape), norms=random.random(experts.shape),
    )  # fmt: skip


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> Trace:
    path = tmp_path_factory.mktemp("two") / "t.duckdb"
    random = np.random.default_rng(1)
    for run in ("one", "two"):
        found = full_trace(
            path, np.argsort(random.random((90, 3, 8)), axis=-1)[..., :2], n_experts=8, seq=np.repeat(np.arange(6), 15),
            sequences=pd.DataFrame({"lang": ["en", "de", "fr"] * 2}), token_ids=np.arange(90) % 5, run=run,
            mode="append" if path.exists() else "new",
        )  # fmt: skip
    return Trace(path, "one") if found else found


def ask(name: str, trace: Trace, **more) -> tuple[pd.DataFrame, go.Figure]:
    function, draw = analysis.find(name)
    options = {option: 20 for option in ("n_resamples", "n_permutations") if option in (function.__kwdefaults__ or {})}
    frame = function(trace, **options | ARGUMENTS.get(name, {}) | more)
    return frame, draw(frame)


def points(figure: go.Figure, most: int = 6):
    """Some points of each trace that can be clicked."""
    random = np.random.default_rng(0)
    for number, trace in enumerate(figure.data):
        if isinstance(trace, go.Scatter) and trace.hoverinfo != "skip" and len(trace.x):
            for at in random.choice(len(trace.x), min(most, len(trace.x)), replace=False):
                yield number, int(at)


def holders(frame: pd.DataFrame, numbers: list[float]) -> set[int]:
    """Rows that hold all of the numbers, by looking at each of them."""
    columns = frame.select_dtypes("number").astype(float).to_numpy()
    found = set()
    for at, row in enumerate(columns):
        if all(any(abs(value - number) <= 1e-9 * max(1, abs(number)) for value in row) for number in numbers):
            found.add(at)
    return found


def check(name: str, frame: pd.DataFrame, figure: go.Figure) -> None:
    """The rows with a point's numbers are among those found, and mostly few others are."""
    frame = frame.reset_index(drop=True)
    shown = linking.clickable(figure)
    n_found = []
    for number, at in points(shown):
        trace = shown.data[number]
        got = linking.rows(frame, shown, {"curve_number": number, "point_index": at})
        values = [value for _, value in linking.said(trace, at) if not isinstance(value, str)]
        numbers = [float(value) for value in values if linking.number(value) is not None]
        unlike = [value for value in numbers if value != int(value)]
        known = holders(frame, unlike) if len(unlike) > 1 else set()
        if known:
            assert known & set(got.index), (name, trace.name, list(linking.said(trace, at)))
        if trace.name not in NO_ROW and not str(trace.name).startswith("OLMoE") and len(unlike):
            assert len(got), (name, trace.name, list(linking.said(trace, at)))
            n_found.append(len(got))
    assert n_found, name  # or nothing was checked
    if name not in SEVERAL:
        assert np.mean(np.array(n_found) > 3) < 0.35, (name, n_found)


@pytest.mark.parametrize(
    "name", [name for name in analysis.NAMES if name not in (*MODELS, "norm_rank", "loss_correlation")]
)
def test_every_figure(name: str, trace: Trace, two_runs: Trace):
    looks_at = two_runs if name in ("agreement", "expert_changes", "token_changes") else trace
    check(name, *ask(name, looks_at))


@pytest.mark.parametrize("name", MODELS[:3])
def test_every_figure_of_a_model(name: str, model):
    function, draw = analysis.find(name)
    frame = function(model)
    check(name, frame, draw(frame))


def test_norm_rank(normed: Trace):
    check("norm_rank", *ask("norm_rank", normed))
    check("norm_rank", *ask("norm_rank", normed, by="lang"))


@pytest.mark.parametrize("name", ["balance", "consistency", "uncertainty", "load", "agreement"])
def test_figures_by_group(name: str, trace: Trace, two_runs: Trace):
    check(name, *ask(name, two_runs if name == "agreement" else trace, by="lang"))


def test_loss_correlation(tmp_path):
    random = np.random.default_rng(0)
    rows = [
        {"lang": lang, "segment_id": f"s{text}"} for text in range(6) for lang in ("en", "de", "fr", "es", "it", "ja")
    ]
    seq = np.repeat(np.arange(len(rows)), 8)
    spoken = full_trace(
        tmp_path / "t.duckdb", np.argsort(random.random((len(seq), 3, 5)), axis=-1)[..., :2], n_experts=5, seq=seq,
        sequences=pd.DataFrame(rows), nll=random.random(len(seq)),
    )  # fmt: skip
    check("loss_correlation", *ask("loss_correlation", spoken))


def cell(figure: go.Figure, x: object, y: object, panel: str = "") -> dict:
    """The point at these places of a heatmap's marks, in the panel of this title."""
    for number, trace in enumerate(figure.data):
        if trace.meta == linking.CELL and linking.panel_title(figure, trace) == panel:
            for at, place in enumerate(zip(trace.x, trace.y, strict=True)):
                if tuple(map(str, place)) == (str(x), str(y)):
                    return {"curve_number": number, "point_index": at}
    raise AssertionError(f"there is no cell {x}, {y} in {panel!r}")


def test_a_specialist(trace: Trace):
    frame, drawn = ask("specialization", trace, by="lang")
    shown = linking.clickable(drawn)
    for layer, expert, group in ((0, 0, "de"), (5, 31, "zh-CN"), (2, 17, "en")):
        (row,) = linking.rows(frame, shown, cell(shown, f"expert {expert}", group, f"layer {layer}")).to_dict("records")
        assert (row["layer"], row["expert"], row["group"]) == (layer, expert, group)


def test_a_pair_and_its_other_way_round(trace: Trace):
    frame, drawn = ask("coactivation", trace)
    shown = linking.clickable(drawn)
    for expert, other in ((3, 9), (9, 3)):
        (row,) = linking.rows(frame, shown, cell(shown, other, expert, "layer 1")).to_dict("records")
        assert (row["layer"], row["expert"], row["other"]) == (1, expert, other)


def test_a_transition(trace: Trace):
    frame, drawn = ask("affinity", trace)
    shown = linking.clickable(drawn)
    (row,) = linking.rows(frame, shown, cell(shown, 4, 21, "layer 2 to 3")).to_dict("records")
    assert (row["layer"], row["expert"], row["next_layer"], row["next_expert"]) == (2, 21, 3, 4)


def test_two_languages_in_both_halves_of_a_matrix(trace: Trace):
    frame, drawn = ask("language_distance", trace)
    shown = linking.clickable(drawn)
    for x, y in (("ar", "de"), ("de", "ar")):
        (row,) = linking.rows(frame, shown, cell(shown, x, y)).to_dict("records")
        assert {row["lang"], row["other"]} == {"ar", "de"} and pd.isna(row["layer"])


def test_a_cache(trace: Trace):
    frame, drawn = ask("cache", trace, policies=("lru", "belady"))
    shown = linking.clickable(drawn)
    for panel, layer in (("all layers", None), ("layer 2", 2)):
        number, line = next(
            (at, one) for at, one in enumerate(shown.data)
            if one.name == "lru" and linking.panel_title(shown, one) == panel
        )  # fmt: skip
        at = list(line.x).index(12)
        (row,) = linking.rows(frame, shown, {"curve_number": number, "point_index": at}).to_dict("records")
        assert (row["policy"], row["capacity"]) == ("lru", 12)
        assert pd.isna(row["layer"]) if layer is None else row["layer"] == layer


def test_a_window(trace: Trace):
    frame, drawn = ask("consistency", trace)
    shown = linking.clickable(drawn)
    number = next(at for at, one in enumerate(shown.data) if one.name == "16 tokens")
    (row,) = linking.rows(frame, shown, {"curve_number": number, "point_index": 3}).to_dict("records")
    assert (row["layer"], row["window"]) == (3, 16)


def test_what_means_no_row(trace: Trace):
    frame, drawn = ask("cache_speed", trace)
    assert linking.rows(frame, drawn, {"curve_number": 999, "point_index": 0}).empty
    assert linking.rows(frame.iloc[:0], drawn, {"curve_number": 0, "point_index": 0}).empty


def test_labels_are_compared_as_they_are_shown(tmp_path):
    """Markup, marks that aren't printable, and labels that are cut."""
    names = ["<b>bold</b>", "a & b", "x" * 40, "x" * 39 + "y", "zero\u200bwidth", "שלום"]
    frame = pd.DataFrame({"group": names, "value": np.arange(6) / 7})
    figure = figures.panels([""])
    shown = [figures.plain(name if len(name) < 25 else name[:23] + "…") for name in names]
    figures.dots(figure, frame["value"], shown, frame["value"], frame["value"])
    for at, name in enumerate(names):
        found = linking.rows(frame, figure, {"curve_number": 0, "point_index": at})
        assert found["group"].tolist() == [name]


def test_clickable_keeps_what_is_shown(trace: Trace):
    frame, drawn = ask("contrast", trace)
    before = drawn.to_json()
    shown = linking.clickable(drawn)
    assert drawn.to_json() == before
    heatmap, marks = shown.data[0], shown.data[-1]
    assert heatmap.hoverinfo == "skip" and marks.meta == linking.CELL
    assert len(marks.x) == np.isfinite(np.asarray(heatmap.z, float)).sum()
    # The colour's own value is said by the marks too, though they have none.
    assert "%{z" not in marks.hovertemplate
    at = 7
    last = np.asarray(marks.customdata)[at][-1]
    row, column = divmod(at, np.asarray(heatmap.z).shape[1])
    assert last == np.asarray(heatmap.z)[row, column]


def test_many_cells_get_no_rings():
    wide = go.Figure(go.Heatmap(z=np.zeros((60, 60)), x=list(range(60)), y=list(range(60))))
    assert linking.clickable(wide).data[1].marker.maxdisplayed == 1
    assert linking.clickable(go.Figure(go.Heatmap(z=[[1.0]], x=[0], y=[0]))).data[1].marker.maxdisplayed == 0


def test_a_cell_by_row_and_column(trace: Trace):
    """Plotly names a heatmap's own cells by a pair."""
    frame, drawn = ask("load", trace)
    (row,) = linking.rows(frame, drawn, {"curve_number": 0, "point_index": [4, 0]}).to_dict("records")
    assert row["layer"] == 4 and row["share"] == frame[frame["layer"] == 4]["share"].max()
