"""The pages with a trace that is a folder of parts."""

from __future__ import annotations

from pathlib import Path

import blocks
import pages
import pytest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("parts") / "parts"
    blocks.write_folder(out, [range(0, 6), range(6, 12)])
    return out


@pytest.mark.parametrize("name", ["overview", "tokens", "query"])
def test_a_page_of_a_folder(name: str, folder: Path, monkeypatch):
    page = pages.opened(monkeypatch, folder, name)
    assert not page.error and not page.warning, pages.said(page)


def test_its_checks_pass(folder: Path, monkeypatch):
    page = pages.opened(monkeypatch, folder, "overview")
    assert any("checks passed" in one.value for one in page.success)
