"""Names of columns, runs and models that are Markdown or options of a command: every page shows them as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
import routed
from pages import opened, said
from streamlit.testing.v1 import AppTest

from workbench_app import panel, view

NAME = "![x](https://evil.example/x.png)"
RUN = f"first {NAME}"
MODEL = "--trust-remote-code"


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Two runs whose texts have a column of that name, which the names of a run, a type and a column have, too."""
    path = tmp_path_factory.mktemp("names") / "t.duckdb"
    random = np.random.default_rng(0)
    seq = np.repeat(np.arange(8), 6)
    experts = np.stack([[random.permutation(6)[:2] for _ in range(2)] for _ in seq])
    sequences = pd.DataFrame({"lang": ["en", "de"] * 4, NAME: list("aabbccdd")})
    for run, mode in ((RUN, "new"), ("second", "append")):
        routed.full_trace(
            path, experts, n_experts=6, seq=seq, sequences=sequences, token_ids=seq % 5, model=MODEL, run=run,
            mode=mode, weights=random.random(experts.shape).astype(np.float32), vocabulary=dict(enumerate("abcde")),
        )  # fmt: skip
    with duckdb.connect(path) as con:
        con.execute(f'ALTER TABLE runs ADD COLUMN "a` {NAME} `" STRUCT("{NAME}" INTEGER)')
    return path


def markdown(page: AppTest) -> Iterator[str]:
    """All that Streamlit reads as Markdown: text, and labels and helps of widgets."""
    for kind in (page.title, page.subheader, page.warning, page.info, page.error, page.caption, page.markdown):
        yield from (str(one.value) for one in kind)
    for block in (page.main, page.sidebar):
        for one in block:
            for proto in (one.proto, getattr(one.proto, "expandable", None)):
                yield from (str(getattr(proto, field, "")) for field in ("label", "help"))


def inert(page: AppTest) -> str:
    """The text of a page that has the name, and not as an image or a link."""
    shown = "\n".join(markdown(page))
    assert not re.findall(r".*(?<!\\)\]\(.*", shown)
    assert "evil" in shown.casefold()
    return shown.replace("\\", "")


@pytest.mark.parametrize(
    ("name", "query", "words"),
    [
        ("tokens", {"tokens_column": NAME}, f"{NAME} **a**"),
        ("experts", {"experts_metric": "Lift for a group", "experts_by": NAME}, NAME),
        ("experts", {"experts_more": "Other groups", "experts_column": NAME}, f"By {NAME}"),
        ("query", {}, f"| a` {NAME} ` | STRUCT("),
        ("compare", {"run": "second"}, f"Download agreement-{RUN.replace('/', '-')}.csv"),
        ("specialisation", {"specialisation_by": NAME}, f"depend on the {NAME} of"),
        ("specialisation", {"specialisation_by": NAME, "specialisation_tab": "Groups"}, f"Which {NAME}s are"),
        (
            "specialisation",
            {"specialisation_by": "lang", "specialisation_within_lang": f"within each {NAME}"},
            f"preferences, labels shuffled within each {NAME}",
        ),
        ("specialisation", {"specialisation_by": NAME, "specialisation_tab": "Load"}, f"Balance by {NAME}"),
        (
            "compare",
            {"run": "second", "compare_tab": "Languages and domains", "compare_by": NAME},
            f"Agreement by {NAME}",
        ),
    ],
)  # fmt: skip
def test_names_are_shown_as_they_are(name: str, query: dict[str, str], words: str, monkeypatch, path: Path):
    assert words in inert(opened(monkeypatch, path, name, **query))


def test_a_filter_is_code(monkeypatch, path: Path):
    page = opened(monkeypatch, path, "tokens", where=f"lang!=x\n\n{NAME}")
    assert not [one for one in page.caption if "\n" in one.value]
    page = opened(monkeypatch, path, "tokens", where="lang=de")
    assert "`lang=de`" in said(page)


def test_a_model_is_no_option(monkeypatch, path: Path):
    page = opened(monkeypatch, path, "compare", run="second", compare_other="a run of another file …")
    assert "workbench trace MODEL --corpus" in page.code[0].value and MODEL not in page.code[0].value


def test_a_model_is_no_option_of_an_analysis(monkeypatch):
    monkeypatch.setattr(view, "model_name", lambda: MODEL)
    assert panel.command("similarity", {}) == "workbench analyze similarity MODEL --out similarity.csv"


@pytest.mark.parametrize("corpus", [5, [1], {"names": 5}, {"names": {"a": 1}}])
def test_a_run_whose_texts_are_not_told_can_be_compared(corpus: Any, monkeypatch, path: Path, tmp_path: Path):
    other = tmp_path / "t.duckdb"
    other.write_bytes(path.read_bytes())
    with duckdb.connect(other) as con:
        con.execute("UPDATE runs SET model = 'demo', corpus = ?", [json.dumps(corpus)])
    page = opened(monkeypatch, other, "compare", compare_other="a run of another file …")
    assert "workbench trace demo --corpus … " in page.code[0].value.replace("'", "")


@pytest.mark.parametrize("corpus", [[1], {"tokens": NAME}, {"tokens": [5]}, {"tokens": -1}])
def test_a_run_that_is_written_says_nothing_odd(corpus: Any, monkeypatch, path: Path, tmp_path: Path):
    other = tmp_path / "t.duckdb"
    other.write_bytes(path.read_bytes())
    with duckdb.connect(other) as con:
        con.execute("UPDATE runs SET status = 'running', finished = NULL, corpus = ?", [json.dumps(corpus)])
    page = opened(monkeypatch, other, "tokens")
    assert "Being written: 48 tokens" in said(page)
