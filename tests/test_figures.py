"""Palette, escaping and saving of figures."""

import json
import shutil

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
