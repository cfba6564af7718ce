"""`workbench probe`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from commandline import Command, refused
from planted import KNOWS, planted

from workbench.tracefile import Trace
from workbench_probes import probe


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    return planted(tmp_path_factory.mktemp("probe") / "t.duckdb", n_texts=10, length=4)


def test_probe(workbench: Command, trace: Trace, tmp_path: Path):
    out, figure = tmp_path / "scores.csv", tmp_path / "scores.html"
    asked = ("probe", trace.path, "--target", "lang", "--layers", "0-1", "--controls", 2)
    result = workbench(*asked, "--out", out, "--figure", figure)
    assert (result.code, result.err) == (0, "")
    assert "tell the language of a sequence with a balanced accuracy of" in result.out and figure.stat().st_size > 1000
    written = pd.read_csv(out).astype({"layer": "Int64"})
    expected = probe(trace, "lang", layers=[0, 1], controls=2)
    pd.testing.assert_frame_equal(written, expected, check_dtype=False)
    refused(workbench(*asked, "--out", out), f"{out} exists")
    tuned = ("--features", "choices", "--strength", "0.1,1", "--permutations", 3, "--controls", 0, "--json")
    rows = json.loads(workbench(*asked[:-2], *tuned).out)
    assert {row["strength"] for row in rows} <= {0.1, 1} and {row["n_permutations"] for row in rows} == {3}
    shown = json.loads(workbench(*asked, "--features", "weights", "--unit", "token", "--rows", 0, "--json").out)
    assert {row["features"] for row in shown} == {"weights"} and shown[0]["n_rows"] == 80


@pytest.mark.parametrize(
    ("option", "column"),
    [("--learning-curve", "fraction"), ("--coefficients", "coefficient"), ("--clusters", "ami"), ("--map", "x")],
)
def test_other_questions(workbench: Command, trace: Trace, tmp_path: Path, option: str, column: str):
    asked = ("probe", trace.path, "--target", "lang", option, "--features", "choices", "--layers", KNOWS)
    result = workbench(*asked, "--figure", tmp_path / "f.html", "--out", tmp_path / "t.parquet")
    assert (result.code, result.err) == (0, "") and (tmp_path / "f.html").exists()
    assert column in pd.read_parquet(tmp_path / "t.parquet")
    assert column in json.loads(workbench(*asked, "--json").out)[0]


def test_what_is_refused(workbench: Command, trace: Trace, tmp_path: Path):
    asked = ("probe", trace.path, "--target")
    refused(workbench(*asked, "mood"), "no 'mood'", "token_class")
    refused(workbench(*asked, "lang", "--map", "--clusters"), "ask one")
    refused(workbench(*asked, "lang", "--layers", "x"), "--layers 'x'")
    refused(workbench(*asked, "lang", "--features", ","), "--features ','")
    refused(workbench(*asked, "lang", "--features", "choices,tokens", "--map"), "one set of features")
    refused(workbench(*asked, "lang", "--method", "tsne"), "--method has no part in probes alone")
    refused(workbench(*asked, "lang", "--method", "tsne", "--clusters"), "method is 'tsne'")
    refused(workbench(*asked, "lang", "--group", "source", "--map"), "--group has no part in --map")
    refused(
        workbench(*asked, "lang", "--controls", 2, "--learning-curve"), "--controls has no part in --learning-curve"
    )
    refused(workbench(*asked, "lang", "--strength", "1,x"), "--strength '1,x'", "0.1,1,10")
    refused(workbench(*asked, "lang", "--strength", "0"), "strength is")
    refused(workbench(*asked, "lang", "--out", tmp_path / "t.xlsx"), ".csv, .parquet, .tex")
    refused(workbench(*asked, "lang", "--folds", 11), "10 texts", "fewer folds")
