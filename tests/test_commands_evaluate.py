"""`workbench evaluate`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import checkpoint
import pandas as pd
import pytest
import torch
import transformers
from commandline import Command, refused

from workbench.interventions import Ablate
from workbench.models import load
from workbench.recipe import Recipe, of_model, write_recipe


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model: a checkpoint; texts.jsonl: a corpus; recipe.json: an ablation found on `texts`; task.yaml: of lm-eval."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = tmp_path_factory.mktemp("evaluate")
    checkpoint.folder(path / "model")
    checkpoint.corpus(path / "texts.jsonl", n=12)
    model = load(path / "model")
    recipe = Recipe((Ablate(layer=1, experts=[2, 3]),), of_model(model), {"corpus": {"names": ["texts", "udhr"]}})
    write_recipe(recipe, path / "recipe.json")
    rows = [{"start": f"{number} ", "choices": ["a", "b"], "answer": number % 2} for number in range(6)]
    (path / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (path / "task.yaml").write_text(
        "task: ab\ndataset_path: json\ndataset_kwargs: {data_files: {test: items.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{start}}'\ndoc_to_choice: '{{choices}}'\n"
        "doc_to_target: '{{answer}}'\nmetric_list: [{metric: acc}]\n"
    )
    return path


def evaluating(folder: Path, *more: object) -> list[object]:
    return ["evaluate", folder / "model", "--corpus", folder / "texts.jsonl", *more]


def test_evaluate(workbench: Command, folder: Path, tmp_path: Path):
    out, drawn = tmp_path / "t.parquet", tmp_path / "f.html"
    result = workbench(
        *evaluating(folder, "--recipe", folder / "recipe.json", "--by", "lang", "--controls", 2, "--resamples", 50),
        "--out", out, "--figure", drawn,
    )  # fmt: skip
    assert result.code == 0, result
    lines = result.out.splitlines()
    assert lines[0].split()[:6] == ["group", "plain", "steered", "−", "plain", "interval"]
    assert "of 2 draws cost as much" in result.out and "Steering changes the loss of ja" in result.out
    table = pd.read_parquet(out)
    assert set(table["condition"]) == {"plain", "steered", "random", "random 0", "random 1"}
    assert drawn.read_text().startswith("<!doctype html>")
    refused(workbench(*evaluating(folder, "--recipe", folder / "recipe.json", "--out", out)), "exists")


def test_edits_by_options_without_control(workbench: Command, folder: Path):
    result = workbench(*evaluating(folder, "--ablate", "1:2,3", "--control", "none", "--max-tokens", 60))
    assert result.code == 0 and "There is no control" in result.out
    assert "word part" in result.out and "random" not in result.out.splitlines()[0]
    as_json = workbench(*evaluating(folder, "--ablate", "1:2,3", "--control", "none", "--max-tokens", 60, "--json"))
    assert {row["measure"] for row in json.loads(as_json.out)} == {"nll", "kl", "overlap"}


def test_texts_that_the_experts_were_found_on(workbench: Command, folder: Path):
    from workbench.commands.evaluate import _found_on
    from workbench.recipe import read_recipe

    recipe = read_recipe(folder / "recipe.json")
    assert _found_on(recipe, ["udhr", "domains"]) == ["udhr"] and _found_on(recipe, ["demo"]) == ["demo"]
    assert _found_on(recipe, ["domains"]) == [] and _found_on(Recipe(recipe.interventions), ["udhr"]) == []
    sampled = Recipe(recipe.interventions, {}, {"corpus": {"names": ["demo"]}})
    assert _found_on(sampled, ["domains", "mine.jsonl"]) == ["domains"]
    assert _found_on(Recipe(recipe.interventions, {}, {"corpus": "free text"}), ["udhr"]) == []
    short = ("--control", "none", "--max-tokens", 60)
    result = workbench(*evaluating(folder, "--recipe", folder / "recipe.json", *short))
    assert "The experts were found on texts too" in result.out


def test_tasks(workbench: Command, folder: Path, tmp_path: Path):
    arguments = ["evaluate", folder / "model", "--tasks", folder / "task.yaml", "--ablate", "0:1"]
    out = tmp_path / "t.csv"
    result = workbench(*arguments, "--controls", 1, "--limit", 4, "--out", out, "--figure", tmp_path / "f.html")
    assert result.code == 0, result
    assert result.out.splitlines()[0].split()[:3] == ["condition", "task", "metric"]
    assert "ab, acc: " in result.out and "on 4 items" in result.out
    assert pd.read_csv(out)["condition"].tolist() == ["plain", "steered", "random", "random 0"]


def test_bad_input(workbench: Command, folder: Path, tmp_path: Path):
    refused(workbench(*evaluating(folder)), "nothing to evaluate", "--recipe FILE")
    refused(workbench(*evaluating(folder, "--recipe", tmp_path / "none.json")), "none.json")
    refused(workbench(*evaluating(folder, "--ablate", "1")), "--ablate '1'")
    refused(workbench(*evaluating(folder, "--ablate", "9:1")), "9")
    refused(workbench(*evaluating(folder, "--ablate", "1:2", "--by", "colour")), "no 'colour'")
    refused(workbench(*evaluating(folder, "--ablate", "1:2", "--column", "text")), "--column 'text'")
    refused(workbench(*evaluating(folder, "--contrast")), "Contrast is for decoding")
    refused(workbench(*evaluating(folder, "--ablate", "1:2", "--tasks", folder / "task.yaml")), "--corpus and --tasks")
    refused(workbench(*evaluating(folder, "--ablate", "1:2", "--controls", -1)), "n_random is -1")
    refused(workbench(*evaluating(folder, "--ablate", "1:2", "--seed", -1)), "seed is -1; expected 0 or more.")
    refused(workbench(*evaluating(folder, "--ablate", "1:2", "--resamples", -1)), "n_resamples is -1; expected 0")
    refused(workbench(*evaluating(folder, "--ablate", "1:2", "--limit", 3)), "--limit is for --tasks")
    refused(workbench(*evaluating(folder, "--ablate", "1:2", "--out", tmp_path / "t.xls")), "t.xls")
    refused(workbench("evaluate", folder / "model", "--tasks", tmp_path / "t.yaml", "--ablate", "1:2"), "no such file")
    refused(workbench("evaluate", folder / "model", "--corpus", "nowhere", "--ablate", "1:2"), "nowhere")
    untouched = workbench(*evaluating(folder, "--ablate", "1:2", "--scope", "position=250", "--control", "none"))
    assert untouched.code == 1 and "touched nothing" in untouched.err
    assert not list(tmp_path.iterdir())
