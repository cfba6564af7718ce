"""Values and colours of tokens: against the trace, WCAG contrast, and how well the palette can be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import routed

from workbench import colouring, reading
from workbench.colouring import EYES, N_COLOURS, STEPS
from workbench.errors import InputError


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> reading.Reading:
    random = np.random.default_rng(1)
    experts = [np.stack([random.permutation(300)[:k] for _ in range(20)]) for k in (2, 3)]
    experts[0][4] = -1
    numbers = random.random((2, 2, 20)).astype(np.float32)
    numbers[0, 0, 3], numbers[0, :, 5] = np.nan, np.nan
    trace = routed.full_trace(
        tmp_path_factory.mktemp("c") / "c.duckdb", experts, n_experts=300, seq=[0] * 20, sequences=pd.DataFrame([{}]),
        entropy=numbers[0], margin=numbers[1], nll=[np.nan, *random.random(19)],
    )  # fmt: skip
    return reading.read(trace, 0)


@pytest.mark.parametrize(("layer", "rank"), [(0, 0), (0, 1), (1, 2)])
def test_an_expert_is_the_one_of_its_layer_and_rank(text, layer: int, rank: int):
    values = colouring.by(text, "expert", layer=layer, rank=rank)
    chosen = text.experts[layer, :, rank].astype(float)
    np.testing.assert_array_equal(values, np.where(chosen == 65535, np.nan, chosen))


@pytest.mark.parametrize("name", ["entropy", "margin"])
def test_numbers_are_of_a_layer_or_the_mean_of_all(text, name: str):
    values = getattr(text, name)
    np.testing.assert_array_equal(colouring.by(text, name, layer=1), values[1])
    mean = colouring.by(text, name)
    for at in range(20):
        known = [one for one in values[:, at].tolist() if one == one]
        assert mean[at] == pytest.approx(np.mean(known)) if known else np.isnan(mean[at])
    np.testing.assert_array_equal(colouring.by(text, "nll"), text.nll)


def test_agreement_is_given(text):
    given = np.linspace(0, 1, 40, dtype=np.float32).reshape(2, 20)
    np.testing.assert_array_equal(colouring.by(text, "agreement", layer=1, agreement=given), given[1])
    np.testing.assert_allclose(colouring.by(text, "agreement", agreement=given), given.mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colouring": "mood"}, "can't be coloured by 'mood'; choose from expert"),
        ({"colouring": "entropy", "layer": 2}, "layer 2: run 'full' has layers 0 to 1"),
        ({"colouring": "expert"}, "give layer"),
        ({"colouring": "expert", "layer": 0, "rank": 2}, "layer 0 chooses 2 experts; expected 0 to 1"),
        ({"colouring": "agreement"}, "another run was not given"),
    ],
)
def test_refuses(text, arguments: dict, message: str):
    with pytest.raises(InputError, match=message):
        colouring.by(text, **arguments)


def test_only_what_is_known_is_available(text, tmp_path: Path):
    assert colouring.available(text) == ["expert", "entropy", "margin", "nll"]
    bare = reading.read(routed.random_trace(tmp_path / "ids.duckdb").trace, 0)
    assert colouring.available(bare) == ["expert"]
    with pytest.raises(InputError, match="didn't record it"):
        colouring.by(bare, "entropy", layer=0)


def test_an_expert_has_its_colour_whatever_the_text():
    shown = colouring.coloured(np.array([3, np.nan, 0, 299, 3], np.float32), "expert")
    assert shown.codes.tolist() == [3, -1, 0, 299 - N_COLOURS, 3] and shown.low is None
    assert len(shown.light.background) == len(shown.dark.background) == N_COLOURS


def test_a_scale_runs_from_low_to_high():
    values = np.array([*np.linspace(2, 4, 101), np.nan, 50, -50], np.float32)
    shown = colouring.coloured(values, "entropy")
    low, high = np.quantile(values[np.isfinite(values)].astype(float), [0.02, 0.98])
    assert (shown.low, shown.high) == pytest.approx((low, high)) and shown.below and shown.above
    for value, code in zip(values, shown.codes, strict=True):
        place = min(max((value - low) / (high - low), 0), 1) * (STEPS - 1)
        assert code == -1 if np.isnan(value) else abs(code - place) <= 0.51


def test_full_agreement_is_pale():
    shown = colouring.coloured(np.array([0, 1, np.nan], np.float32), "agreement")
    assert (shown.low, shown.high) == (0, 1)
    for palette, page in ((shown.light, "#ffffff"), (shown.dark, colouring.DARK_PAGE)):
        none, all_ = (palette.background[code] for code in shown.codes[:2])
        assert colouring.contrast(all_, page) < 1.2 < 4 < colouring.contrast(none, page)
    assert shown.codes[2] == -1


@pytest.mark.parametrize("values", [[], [np.nan], [2.0], [2.0, 2.0]])
def test_degenerate_scales(values: list[float]):
    shown = colouring.coloured(np.array(values, np.float32), "nll")
    assert shown.codes.tolist() == [-1 if np.isnan(value) else 0 for value in values]


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_on_every_colour(dark: bool):
    for palette in (colouring.palette(dark), colouring.scale(dark), colouring.scale(dark, backward=True)):
        for background, ink in zip(palette.background, palette.ink, strict=True):
            assert colouring.contrast(background, ink) >= 4.5


@pytest.mark.parametrize("dark", [False, True])
def test_experts_can_be_told_apart_by_every_eye(dark: bool):
    """Distances in OKLab, where about 0.02 is just noticeable side by side; the first experts are furthest apart."""
    rgb = np.array([colouring._rgb(one) for one in colouring.palette(dark).background])
    assert len(np.unique(rgb, axis=0)) == N_COLOURS
    for eye in EYES:
        lab = colouring._oklab(colouring._as_seen(rgb, eye))
        apart = np.linalg.norm(lab[:, None] - lab[None], axis=2) + np.eye(N_COLOURS)
        for n, least in ((8, 0.08), (16, 0.05), (32, 0.03), (64, 0.02)):
            assert apart[:n, :n].min() >= least


def test_a_smaller_palette_is_the_beginning_of_a_larger_one():
    assert colouring.palette(False, 12).background == colouring.palette(False).background[:12]


def test_contrast_is_that_of_wcag():
    assert colouring.contrast("#777777", "#ffffff") == pytest.approx(4.478, abs=1e-3)
    assert colouring.contrast("#123456", "#123456") == 1


def test_simulated_eyes_keep_white_and_merge_what_they_must():
    red, green = (np.array([colouring._rgb(colour)]) for colour in ("#c00000", "#4b7300"))
    apart = {
        eye: np.linalg.norm(np.subtract(*(colouring._oklab(colouring._as_seen(one, eye)) for one in (red, green))))
        for eye in EYES
    }
    assert apart["deuteranopia"] < 0.5 * apart["normal"]
    for eye in EYES:
        np.testing.assert_allclose(colouring._as_seen(np.ones((1, 3)), eye), 1, atol=1e-3)
