"""`workbench rewire` and `workbench remix`: what they print, write and refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from commandline import Command, refused

from workbench.capture import trace
from workbench.commands.learn import _print_learned
from workbench.corpus import from_rows
from workbench.generation import generate, prompt_ids
from workbench.models import Model, load
from workbench.recipe import read_recipe
from workbench.remixing import reference, remix
from workbench.rewiring import Rewired, rewire
from workbench.rewiring import generate as rewired
from workbench.tracefile import Trace

PROMPT = "no one shall be held in"


@pytest.fixture(scope="module")
def demo() -> Model:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    return load("demo")


@pytest.fixture(scope="module")
def run(demo: Model, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    texts = ["no one shall be held in slavery", "the right to life", "liberty and security of person", "in servitude"]
    rows = [{"text": text, "good": number < 3} for number, text in enumerate(texts)]
    out = tmp_path_factory.mktemp("learn") / "reference.duckdb"
    return trace(demo, from_rows(rows), out, record=["logits"], progress=False)


def succeeded(workbench: Command, *words: object) -> str:
    result = workbench(*map(str, words))
    assert result.code == 0, result.err
    return result.out


def test_rewire_writes_the_learned_deltas(demo: Model, tmp_path: Path, workbench: Command):
    out = tmp_path / "r.json"
    printed = succeeded(workbench, "rewire", PROMPT, "--out", out, "--layers", "0,2-3", "--steps", 2)
    recipe, found = read_recipe(out), rewire(demo, prompt_ids(demo, PROMPT, False, 1), layers=[0, 2, 3], steps=2)
    assert recipe.interventions == found.deltas
    assert recipe.model["name"] == "demo" and recipe.source["method"] == "rewiring"
    assert recipe.source["prompt"] == PROMPT and tuple(recipe.source["losses"]) == found.losses
    assert f"learned from {found.n_context} tokens, layers 0, 2, 3: loss {found.losses[0]:.4f} →" in printed
    assert f"{out}: Delta in layers 0, 2, 3" in printed
    assert generate(demo, PROMPT, out, max_tokens=2).touched


def test_rewire_continues_the_prompt_on_schedule(demo: Model, tmp_path: Path, workbench: Command):
    out = tmp_path / "r.json"
    printed = succeeded(
        workbench, "rewire", PROMPT, "--out", out, "--layers", 1, "--steps", 1, "--generate", 5, "--every", 3
    )
    ids = prompt_ids(demo, PROMPT, False, 5)
    stretches = list(rewired(demo, ids, max_new_tokens=5, every=3, layers=[1], steps=1))
    assert printed.count("learned from") == len(stretches) == 2
    new = [token for one in stretches for token in one.token_ids]
    assert demo.tokenizer.decode(new).strip() in printed
    assert read_recipe(out).interventions == stretches[-1].rewired.deltas
    assert read_recipe(out).source["generated"] == len(new)


@pytest.mark.parametrize("method", ["kernel", "gradient"])
def test_remix_writes_the_pathway(demo: Model, run: Trace, tmp_path: Path, workbench: Command, method: str):
    out = tmp_path / "r.json"
    options = ("--success", "good", "--method", method, "--steps", 1, "--neighbours", 2, "--layers", "4-5")
    printed = succeeded(workbench, "remix", PROMPT, "--reference", run.path, "--out", out, *options)
    known = reference(demo, run, success="good", layers=[4, 5])
    ids = prompt_ids(demo, PROMPT, False, 1)
    found = remix(demo, ids, known, method=method, n_neighbours=2, steps=1)  # type: ignore[arg-type]
    recipe = read_recipe(out)
    assert recipe.interventions == found.interventions
    assert recipe.source["neighbours"] == found.neighbours["seq"].tolist() and recipe.source["alpha"] == found.alpha
    assert recipe.source["n_reference"] == 3 and recipe.source["method"] == f"remixing ({method})"
    said = f"alpha {found.alpha:g}" if method == "kernel" else "loss of the neighbours"
    assert said in printed and f"{out}: Remix in layers 4, 5" in printed
    assert generate(demo, PROMPT, out, max_tokens=2).touched


def test_rewire_says_that_the_loss_rose(capsys: pytest.CaptureFixture):
    for losses, warned in (((1.0, 1.5), True), ((1.0, 2.0, 0.9), False)):
        _print_learned(Rewired((), losses, (0,), (), 3))
        assert capsys.readouterr().err.startswith("warning: the loss rose") == warned


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rewire", PROMPT, "--out", "r.txt"], "can't tell the format from '.txt'; expected .json"),
        (["rewire", PROMPT, "--out", "r.json", "--layers", "last"], "--layers 'last': expected numbers and ranges"),
        (["rewire", PROMPT, "--out", "r.json", "--layers", "9"], "layer 9: demo has layers 0 to 5"),
        (["rewire", PROMPT, "--out", "r.json", "--generate", "-1"], "--generate -1: expected a number of tokens"),
        (["rewire", "demo", "a", "b", "--out", "r.json"], "put the prompt in quotes"),
        (["rewire", " ", "--out", "r.json"], "the prompt is ' '; expected some text."),
        (["rewire", "x", "--out", "r.json"], "the prompt is one token; expected at least 2 tokens"),
        (["rewire", PROMPT, "--out", "r.json", "--steps", "0"], "--steps 0: expected 1 or more"),
        (["rewire", "demo", "--out", "r.json"], "'demo' is a model, and there is no prompt"),
        (["remix", PROMPT, "--out", "r.json", "--reference", "none.duckdb"], "none.duckdb"),
        (["remix", PROMPT, "--out", "r.json", "--reference", "RUN", "--success", "1e-9"], "no text of run"),
        (["remix", PROMPT, "--out", "r.json", "--reference", "RUN", "--neighbours", "9"], "9 neighbours need"),
        (["remix", PROMPT, "--out", "r.json", "--reference", "RUN", "--alpha", "2"], "alpha is 2.0; expected"),
    ],
)  # fmt: skip
def test_bad_requests_are_named(
    run: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workbench: Command, words: list[str], message: str
):
    monkeypatch.chdir(tmp_path)
    refused(workbench(*(str(run.path) if word == "RUN" else word for word in words)), message)
    assert not (tmp_path / "r.json").exists()
