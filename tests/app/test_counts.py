"""The pages with a run that counts: what counts can say is shown, all else says what was recorded."""

from __future__ import annotations

from pathlib import Path

import checkpoint
import pages
import pytest

from workbench.capture import trace
from workbench.corpus import from_rows


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("counts") / "counts.duckdb"
    trace(checkpoint.olmoe(), from_rows(checkpoint.rows(), "texts"), out, counts_by="seq", progress=False)
    return out


def test_the_overview_shows_the_run_its_balance_and_no_problem(path: Path, monkeypatch):
    page = pages.opened(monkeypatch, path, "overview")
    text = pages.said(page)
    assert "Balance of each layer" in text and "Every expert" in text
    assert not page.error and not page.warning
    assert any("checks passed" in one.value for one in page.success)


def test_specialisation_is_shown(path: Path, monkeypatch):
    page = pages.opened(monkeypatch, path, "specialisation")
    assert not page.error and "record" not in "".join(one.value for one in page.warning)


def test_pairs_are_shown(path: Path, monkeypatch):
    text = pages.said(pages.opened(monkeypatch, path, "structure"))
    assert "The pair that stands out most" in text and "counts-by" not in text.replace("\\", "")


@pytest.mark.parametrize("name", ["tokens", "experts", "languages", "consistency"])
def test_every_other_page_says_what_was_recorded(name: str, path: Path, monkeypatch):
    text = pages.said(pages.opened(monkeypatch, path, name)).replace("\\", "")
    assert "it was traced with --counts-by. It answers load, balance" in text


def test_counts_can_be_queried(path: Path, monkeypatch):
    text = pages.said(pages.opened(monkeypatch, path, "query"))
    assert "tokens of one block of texts" in text
