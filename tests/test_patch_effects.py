"""Means, correlations, figure and sentences over made-up effects."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr, spearmanr

from workbench import figures
from workbench.causal import COLUMNS
from workbench.patch_effects import correlation, figure, findings, mean_effects


def made(n_pairs: int = 3, n_layers: int = 2, n_experts: int = 4, seed: int = 0, **changes: Any) -> pd.DataFrame:
    """Effects of all experts; about one in four patches changes nothing."""
    random = np.random.default_rng(seed)
    keys = list(itertools.product(range(n_pairs), range(n_layers), range(n_experts)))
    frame = pd.DataFrame(keys, columns=["pair", "layer", "expert"])
    frame["position"] = pd.NA
    frame["n_changed"] = random.integers(0, 4, len(frame))
    frame["n_source"] = frame["n_changed"]
    frame["n_target"] = random.integers(0, 3, len(frame))
    changes_any = frame["n_changed"] > 0
    frame["effect"] = np.where(changes_any, random.normal(size=len(frame)), 0.0)
    frame["estimate"] = np.where(changes_any, frame["effect"] + 0.3 * random.normal(size=len(frame)), 0.0)
    frame["source"], frame["target"] = 2.0, -1.0
    frame["recovered"] = frame["effect"] / 3
    frame = frame.astype({"expert": "Int64", "position": "Int64"})
    return frame[list(COLUMNS)].assign(**changes)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), n_pairs=st.integers(1, 4))
def test_mean_effects(seed: int, n_pairs: int) -> None:
    frame = made(n_pairs, seed=seed)
    found = mean_effects(frame, n_resamples=50)
    assert len(found) == 8
    for row in found.to_dict("records"):
        part = frame[(frame["layer"] == row["layer"]) & (frame["expert"] == row["expert"])]
        assert row["effect"] == pytest.approx(part["effect"].mean())
        assert row["estimate"] == pytest.approx(part["estimate"].mean())
        assert row["n_changing"] == (part["n_changed"] > 0).sum() and row["n_pairs"] == n_pairs
        assert row["n_source"] == part["n_source"].sum() and row["n_target"] == part["n_target"].sum()
        ends = row["effect_low"], row["effect_high"]
        if n_pairs == 1:
            assert np.isnan(ends).all()
        else:
            tiny = 1e-5
            assert part["effect"].min() - tiny <= ends[0] <= ends[1] <= part["effect"].max() + tiny


def test_positions_are_summed_and_missing_rows_are_no_effect() -> None:
    frame = made(2, 1, 1)
    rows = [(0, 0, 0.5), (0, 3, 0.25), (1, 2, -0.25)]
    parts = [frame[frame["pair"] == pair].assign(position=at, effect=effect, n_changed=1) for pair, at, effect in rows]
    other = frame[frame["pair"] == 1].assign(position=1, effect=3.0, n_changed=1, expert=7)
    found = mean_effects(pd.concat([*parts, other], ignore_index=True), n_resamples=100).set_index("expert")
    assert found.loc[0, "effect"] == pytest.approx((0.75 - 0.25) / 2)
    assert found.loc[7, "effect"] == pytest.approx(1.5) and found.loc[7, "n_changing"] == 1
    assert found.loc[7, "effect_low"] == pytest.approx(0) and found.loc[7, "effect_high"] == pytest.approx(3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 100), n_pairs=st.integers(1, 3))
def test_correlation(seed: int, n_pairs: int) -> None:
    frame = made(n_pairs, seed=seed)
    found = correlation(frame, n_resamples=20)
    assert found["layer"].tolist()[:2] == [0, 1] and pd.isna(found["layer"].iloc[2])
    for row in found.to_dict("records"):
        part = frame[frame["n_changed"] > 0]
        part = part if pd.isna(row["layer"]) else part[part["layer"] == row["layer"]]
        assert row["n_patches"] == len(part) and row["n_pairs"] == n_pairs
        if len(part) < 3:
            assert np.isnan(row["pearson"]) and np.isnan(row["spearman"])
            continue
        assert row["pearson"] == pytest.approx(pearsonr(part["effect"], part["estimate"])[0])
        assert row["spearman"] == pytest.approx(spearmanr(part["effect"], part["estimate"])[0])
        assert np.isnan(row["pearson_low"]) if n_pairs == 1 else row["pearson_low"] <= row["pearson_high"]


def test_the_interval_of_a_correlation_is_that_of_resampled_pairs() -> None:
    """Two pairs, three distinct resamples: each pair alone, and both."""
    frame = made(2, 1, 8, n_changed=1)
    row = correlation(frame, n_resamples=400).to_dict("records")[-1]
    alone = [pearsonr(part["effect"], part["estimate"])[0] for _, part in frame.groupby("pair")]
    assert {round(row["pearson_low"], 9), round(row["pearson_high"], 9)} <= {
        round(value, 9) for value in (*alone, row["pearson"])
    }


def test_correlations_that_there_are_not() -> None:
    assert correlation(made(effect=1.0))[["pearson", "spearman"]].isna().all().all()
    assert correlation(made(n_changed=0))[["pearson", "spearman"]].isna().all().all()
    unknown = correlation(made(effect=np.nan))
    assert (unknown["n_patches"] == 0).all() and unknown["pearson"].isna().all()


def test_patches_that_change_nothing_do_not_count() -> None:
    frame = made()
    nothing = frame.assign(layer=frame["layer"], effect=0.0, estimate=0.0, n_changed=0, expert=frame["expert"] + 4)
    both = pd.concat([frame, nothing], ignore_index=True)
    pd.testing.assert_frame_equal(correlation(both), correlation(frame))


def drawn(frame: pd.DataFrame) -> Any:
    return figure(frame).data


def test_the_heatmap_has_every_expert() -> None:
    frame = made(1)
    frame = frame[frame["expert"] != 1]
    heat, diagonal, dots = drawn(frame)
    assert heat["z"].shape == (2, 4) and np.isnan(heat["z"][:, 1]).all()
    row = frame[(frame["layer"] == 1) & (frame["expert"] == 2)]
    assert heat["z"][1, 2] == pytest.approx(row["effect"].item())
    changing = frame[frame["n_changed"] > 0]
    assert np.allclose(dots["x"], changing["estimate"]) and np.allclose(dots["y"], changing["effect"])
    assert list(diagonal["x"]) == list(diagonal["y"])
    assert dots["text"][0].startswith("pair 0 · layer 0 · expert ") and "position" not in dots["text"][0]


def test_figures_of_routers_positions_and_estimates(tmp_path: Any) -> None:
    routers = made(2, 3, 1, expert=pd.array([pd.NA] * 6, dtype="Int64"))
    lines = [trace.name for trace in drawn(routers) if trace.name]
    assert lines == ["effect", "estimate"]
    positions = made(1, position=pd.array(range(8), dtype="Int64"))
    assert "position 3" in " ".join(drawn(positions)[2]["text"])
    (heat,) = drawn(made(1, effect=np.nan))
    assert np.allclose(heat["z"].ravel(), made(1)["estimate"])
    assert len(drawn(made(1, effect=0.0, estimate=0.0, n_changed=0))) == 3
    figures.save(figure(made()), tmp_path / "figure.html")
    assert (tmp_path / "figure.html").stat().st_size > 1000


def test_findings() -> None:
    frame = made(1, n_changed=1)
    frame.loc[5, ["effect", "estimate"]] = [-6.0, -5.0]
    first, largest, share, agreement = findings(frame)
    assert first == (
        "The first answer's logit is 2.00 ahead of the second's in the source run and 1.00 behind it in the target run."
    )
    assert "Of the 8 experts whose patch changes anything, expert 1 of layer 1 has the largest effect" in largest
    assert largest.endswith("-6.00 logits, -200% of what lies between the runs.")
    sizes = frame["effect"].abs()
    assert f"The 5 largest make up {sizes.nlargest(5).sum() / sizes.sum():.0%}" in share
    assert f"r = {pearsonr(frame['effect'], frame['estimate'])[0]:.2f} (Spearman's rho" in agreement
    assert agreement.endswith("over the 8 patches that change anything.")


def test_findings_of_several_pairs_have_intervals() -> None:
    first, largest, *_, agreement = findings(made(3))
    assert first.endswith("mean of 3 pairs.")
    assert "[" in largest and "[" in agreement


def test_findings_of_routers_and_estimates() -> None:
    routers = made(1, 3, 1, expert=pd.array([pd.NA] * 3, dtype="Int64"), n_changed=1)
    assert "routers whose patch changes anything, the router of layer" in findings(routers)[1]
    estimated = findings(made(1, effect=np.nan))
    assert "the largest estimated effect" in estimated[1] and not any("correlates" in one for one in estimated)


def test_findings_where_nothing_changes_or_the_runs_agree() -> None:
    assert findings(made(n_changed=0))[1] == "No patch changes anything: both runs route and compute alike."
    assert "what lies between" not in findings(made(1, source=1.0, target=1.0, n_changed=1))[1]
