"""Palette, escaping and saving of figures."""

import json
import shutil

import numpy as np
import plotly.graph_objects as go
import pytest

from workbench import figures
from workbench.errors import InputError, RunError

HOSTILE = '<a href="javascript:alert(1)">x</a><script>alert(1)</script>'


def test_languages_and_domains_can_be_told_apart():
    assert len({figures.style(name)[:2] for name in figures.LANGUAGES}) == len(figures.LANGUAGES) == 33
    assert len({figures.style(name)[:2] for name in figures.DOMAINS}) == len(figures.DOMAINS)
    assert figures.style("klingon") == figures.style("klingon")
    assert figures.ordered(["zz", "de", "code-c", "en", "aa"]) == ["en", "de", "code-c", "aa", "zz"]


def test_text_from_data_is_shown_as_it_is():
    assert figures.plain("<b>&") == "&lt;b&gt;&amp;"
    assert figures.plain("a\x1b[31m\nb") == "a�[31m�b"
    figure = figures.panels([figures.plain(HOSTILE)])
    figures.line(figure, [0, 1], [1, 2], [0, 1], [2, 3], name=HOSTILE)
    text = json.dumps(figure.to_dict(), default=list)
    assert "<script" not in text and "<a " not in text


def test_intervals_and_gaps():
    figure = figures.panels(["a", "b"], columns=2, tight=True)
    figures.line(figure, [0, 1, 2], [1, float("nan"), 3], [0, float("nan"), 2], [2, float("nan"), 4], name="x", panel=1)
    band, line = figure.data
    assert list(band.x) == [0, 2, 2, 0] and list(band.y) == [2, 4, 2, 0] and band.xaxis == line.xaxis == "x2"
    figures.line(figure, [0], [1], [float("nan")], [float("nan")], name="no interval")
    assert len(figure.data) == 3


@pytest.fixture
def figure() -> go.Figure:
    made = figures.panels(["panel"])
    figures.line(made, [0, 1], [1, 2], name="x")
    return made


def test_html_is_self_contained(figure, tmp_path):
    figures.save(figure, tmp_path / "f.html")
    text = (tmp_path / "f.html").read_text()
    assert "<script src=" not in text and "plotly.js v" in text and "sendChartToCloud" in text
    assert [path.name for path in tmp_path.iterdir()] == ["f.html"]


@pytest.mark.parametrize("ending, start", [("svg", b"<svg"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_images(figure, tmp_path, ending, start):
    try:
        figures.find_browser()
    except InputError:
        pytest.skip("no Chrome or Chromium here")
    pytest.importorskip("kaleido")
    figures.save(figure, tmp_path / f"f.{ending}")
    assert (tmp_path / f"f.{ending}").read_bytes().startswith(start)


def test_no_browser(figure, tmp_path, monkeypatch):
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="install one.*BROWSER_PATH"):
        figures.save(figure, tmp_path / "f.png")
    monkeypatch.setenv("BROWSER_PATH", "/nowhere/chrome")
    with pytest.raises(InputError, match="BROWSER_PATH is '/nowhere/chrome'"):
        figures.save(figure, tmp_path / "f.png")
    assert not list(tmp_path.iterdir())


def test_bad_targets(figure, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"'.gif'.*\.html"):
        figures.save(figure, tmp_path / "f.gif")
    (tmp_path / "f.html").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        figures.save(figure, tmp_path / "f.html")
    with pytest.raises(InputError, match="not a folder"):
        figures.save(figure, tmp_path / "none" / "f.html")

    def full(*_, **__):
        raise OSError(28, "No space left")

    monkeypatch.setattr(figures.Path, "write_text", full)
    with pytest.raises(RunError, match="No space left"):
        figures.save(figure, tmp_path / "f.html", overwrite=True)
    assert (tmp_path / "f.html").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


PAGE = "#12171d"
"""The dark page (app/workbench_app/theme.toml)."""


def test_on_a_dark_page_everything_can_be_read():
    assert contrast(figures.DARK[figures.INK], PAGE) > 7 and contrast(figures.DARK[figures.MUTED], PAGE) > 4.5
    for colour in figures.COLOURS:
        assert contrast(figures.DARK.get(colour, colour), PAGE) > 3, colour


def test_dark_copies_leave_the_figure_as_it_was():
    figure = figures.panels(["a", "b"], columns=2)
    figures.line(figure, [0, 1], [1, 2], [0, 1], [2, 3], name="x")
    figure.add_trace(figures.ratios(np.ones((1, 2)), [0, 1], ["a"], hover="", details=np.ones((1, 2)), panel=1))
    figures.ratio_scale(figure, "times")
    before = figure.to_json()
    dark = figures.on_dark(figure)
    assert figure.to_json() == before
    text = dark.to_json()
    assert figures.INK not in text and figures.GRID not in text and '"white"' not in text
    band, line, heatmap = dark.data
    assert line.line.color == figures.DARK["#0072B2"]
    red, green, blue = (int(figures.DARK["#0072B2"][at : at + 2], 16) for at in (1, 3, 5))
    assert band.fillcolor == f"rgba({red},{green},{blue},0.18)"
    scale = [colour for _, colour in dark.layout.coloraxis.colorscale]
    assert scale == figures.DIVERGING_DARK
    np.testing.assert_array_equal(heatmap.z, figure.data[2].z)
    middle = luminance(scale[len(scale) // 2])
    assert all(luminance(colour) > middle for at, colour in enumerate(scale) if at != len(scale) // 2)


def test_dark_scales_run_from_dark_to_light():
    order = [luminance(colour) for colour in figures.SEQUENTIAL_DARK]
    assert order == sorted(order) and len(figures.SEQUENTIAL_DARK) == len(figures.SEQUENTIAL)
    assert len(figures.DIVERGING_DARK) == len(figures.DIVERGING)
