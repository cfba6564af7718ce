"""`workbench find`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from commandline import Command, refused
from routed import choose, full_trace

from workbench import finding
from workbench.commands import find as command
from workbench.interventions import Ablate, Forbid, Force
from workbench.recipe import read_recipe
from workbench.tracefile import Trace

N_LAYERS, N_EXPERTS = 3, 8


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    """German prefers expert 3 of layer 1 and avoids expert 5 of layer 2."""
    random = np.random.default_rng(0)
    seq = np.repeat(np.arange(60), 12)
    logits = np.zeros((len(seq), N_LAYERS, N_EXPERTS))
    logits[seq % 2 == 0, 1, 3], logits[seq % 2 == 0, 2, 5] = 3, -4
    experts = np.stack([choose(random, logits[:, layer], 2) for layer in range(N_LAYERS)], axis=1)
    sequences = pd.DataFrame({"lang": ["de", "en"] * 30, "domain": list("aabb") * 15})
    path = tmp_path_factory.mktemp("find") / "t.duckdb"
    return full_trace(path, experts, n_experts=N_EXPERTS, seq=seq, sequences=sequences)


def test_find(workbench: Command, trace: Trace, tmp_path: Path):
    out, table = tmp_path / "my recipe.json", tmp_path / "all.csv"
    asked = ("--group", "lang=de", "--versus", "lang=en", "--top", 1, "--out", out)
    result = workbench("find", trace.path, *asked, "--table", table)
    assert (result.code, result.err) == (0, "")
    recipe = read_recipe(out)
    assert recipe == finding.find(trace, "risk_difference", group="lang=de", versus="lang=en", top=1)[1]
    assert recipe.interventions == (Ablate(layer=1, experts=[3]),)
    assert "group      1       3" in result.out and f"{out}: Ablate on 1 of 24 experts, in layers 1" in result.out
    assert f"workbench evaluate tiny --corpus OTHER-TEXTS --recipe '{out}'" in result.out
    assert f"workbench generate tiny 'PROMPT' --recipe '{out}' --compare" in result.out
    assert len(pd.read_csv(table)) == N_LAYERS * N_EXPERTS

    refused(workbench("find", trace.path, *asked), f"{out} exists")
    again = workbench("find", trace.path, *asked, "--overwrite", "--json", "--side", "both", "--edit", "force")
    assert again.code == 0 and [(row["layer"], row["expert"]) for row in json.loads(again.out)] == [(1, 3), (2, 5)]
    assert read_recipe(out).interventions == (Force(layer=1, experts=[3]), Forbid(layer=2, experts=[5]))


def test_every_option_arrives(workbench: Command, trace: Trace, tmp_path: Path):
    out = tmp_path / "r.json"
    options = ("--method", "rate_difference", "--group", "domain=a", "--versus", "domain=b", "--languages", "en, de")
    options += ("--by", "lang", "--layers", "0,1-2", "--top", 4, "--per-layer", 2, "--threshold", 0, "--fdr", 1)
    options += ("--side", "both", "--edit", "scale", "--strength", 2, "--scope", "phase=generated", "--seed", 3)
    result = workbench("find", trace.path, *options, "--permutations", 99, "--run", trace.run, "--out", out)
    assert (result.code, result.err) == (0, "")
    assert read_recipe(out).source["options"] == {
        "group": "domain=a", "versus": "domain=b", "score": None, "languages": ["en", "de"], "by": "lang",
        "layers": [0, 1, 2], "top": 4, "per_layer": 2, "threshold": 0, "fdr": 1, "side": "both", "edit": "scale",
        "level": None, "strength": 2, "scope": "phase=generated", "n_resamples": 1000, "n_permutations": 99, "seed": 3,
    }  # fmt: skip
    plain = ("--method", "importance", "--score", "frequency", "--top", 2, "--level", "output")
    assert workbench("find", trace.path, *plain, "--out", out, "--overwrite").code == 0
    assert all(isinstance(edit, Ablate) and edit.level == "output" for edit in read_recipe(out).interventions)


def test_refusals_leave_nothing_behind(workbench: Command, trace: Trace, tmp_path: Path):
    out = tmp_path / "r.json"
    for arguments, part in (
        (("--out", out, "--layers", "2-1"), "--layers '2-1': expected numbers and ranges"),
        (("--out", out, "--layers", "5"), "layer 5: run 'full' has layers 0 to 2"),
        (("--out", out, "--versus", "lang=xx"), "no sequence has lang 'xx'"),
        (("--out", out, "--seed", -1), "seed is -1; expected 0 or more."),
        (("--out", out, "--permutations", -1), "n_permutations is -1; expected 0 or more."),
        (("--out", tmp_path / "r.txt"), "expected .json"),
        (("--out", tmp_path / "no" / "r.json"), "is not a folder"),
        (("--out", out, "--table", tmp_path / "t.txt"), "expected .csv"),
    ):
        refused(workbench("find", trace.path, "--group", "lang=de", *arguments), part)
    assert workbench("find", trace.path, "--out", out, "--method", "magic").code == 2
    nothing = workbench("find", trace.path, "--group", "lang=de", "--out", out, "--threshold", 0.99)
    assert nothing.code == 1 and nothing.err.startswith("error: nothing found: ") and nothing.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_choices_are_those_of_the_library():
    pairs = ((finding.METHODS, command.Method), (finding.SIDES, command.Side), (finding.EDITS, command.Edit))
    for names, kinds in pairs:
        assert tuple(kind.value for kind in kinds) == names
