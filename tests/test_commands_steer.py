"""The commands that steer, and runs that are traced under a recipe: what they print, refuse and write."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import process
import pytest
import torch
import transformers
from commandline import Command, refused

from workbench.analysis.agreement import agreement
from workbench.capture import trace
from workbench.commands.edits import recipe_of
from workbench.errors import InputError, RunError
from workbench.generation import compare, generate
from workbench.interventions import Ablate, Bias, Contrast, Forbid, Force, Replay, Scale, SetTopK, TopP
from workbench.models import Model, load
from workbench.recipe import Recipe, from_json, of_model, to_json, write_recipe
from workbench.routing import NO_EXPERT
from workbench.spelling import ALPHABET
from workbench.tracefile import Trace
from workbench.validate import validate


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """model: a checkpoint; texts.jsonl: a corpus."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    path = tmp_path_factory.mktemp("steer")
    checkpoint.folder(path / "model")
    checkpoint.corpus(path / "texts.jsonl", n=15)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load(folder / "model")


def written(path: Path, *interventions: Any, **known: Any) -> Path:
    write_recipe(Recipe(interventions, **known), path)
    return path


# options that make interventions


def test_options_become_interventions_in_the_documented_order(tmp_path: Path):
    file = written(tmp_path / "r.json", Ablate(layer=1, experts=[2]), source={"method": "by hand"})
    found = recipe_of(
        file,
        contrast=True,
        scale=["1:4=64", "*:5=0"],
        top_p=0.5,
        top_k=3,
        force=["2-4,7:1"],
        forbid=["0:6-8"],
        ablate=["*:1,3", " 2 : 0 "],
        bias=["5:1,2=-0.5"],
        scope="phase=prompt",
    )
    scope = {"scope": "phase=prompt"}
    assert found is not None and found.source == {"method": "by hand"}
    assert found.interventions == (
        Ablate(layer=1, experts=[2]),
        Bias(layer=5, experts=[1, 2], strength=-0.5, **scope),
        Ablate(experts=[1, 3], **scope),
        Ablate(layer=2, experts=[0], **scope),
        Forbid(layer=0, experts=[6, 7, 8], **scope),
        Force(layer=[2, 3, 4, 7], experts=[1], **scope),
        SetTopK(k=3, **scope),
        TopP(p=0.5, **scope),
        Scale(layer=1, experts=[4], factor=64.0, **scope),
        Scale(experts=[5], factor=0.0, **scope),
        Contrast(),
    )
    assert recipe_of(None) is None
    assert recipe_of(file) == Recipe((Ablate(layer=1, experts=[2]),), source={"method": "by hand"})


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ablate": ["3"]}, "--ablate '3': expected LAYER:EXPERTS, as in `--ablate 3:5,7`"),
        ({"ablate": [":5"]}, "LAYER is a number, a range 2-5, several 1,4, or * for all"),
        ({"ablate": ["3:"]}, "--ablate '3:'"),
        ({"ablate": ["3:*"]}, "and so are EXPERTS but for *"),
        ({"ablate": ["5-2:1"]}, "--ablate '5-2:1'"),
        ({"ablate": ["-1:1"]}, "--ablate '-1:1'"),
        ({"force": ["3:a"]}, "--force '3:a'"),
        ({"forbid": ["3:1.5"]}, "--forbid '3:1.5'"),
        ({"forbid": ["3:1,1"]}, "experts has 1 twice"),
        ({"bias": ["3:1"]}, "--bias '3:1': expected LAYER:EXPERTS=NUMBER, as in `--bias 3:5,7=0.5`"),
        ({"bias": ["3:1=much"]}, "expected LAYER:EXPERTS=NUMBER"),
        ({"bias": ["3:1=nan"]}, "Bias: strength is nan"),
        ({"scale": ["3=2"]}, "--scale '3=2': expected LAYER:EXPERTS"),
        ({"scale": ["3:1=-2"]}, "Scale: factor is -2.0; expected 0 or more"),
        ({"top_k": 0}, "SetTopK: k is 0"),
        ({"top_p": 1.5}, "TopP: p is 1.5"),
        ({"scope": "phase=prompt"}, "--scope 'phase=prompt' says where edits by options act; add one"),
        ({"scope": "phase=prompt", "contrast": True}, "add one, such as --ablate 3:5"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(InputError) as error:
        recipe_of(None, **options)
    assert message in str(error.value)


# generate


def test_generate(workbench: Command, folder: Path, model: Model):
    result = workbench("generate", folder / "model", "ab cd", "--max-tokens", 12)
    expected = generate(model, "ab cd", max_tokens=12)
    assert result.code == 0 and result.err == ""
    assert result.out.isprintable() or set(result.out) - {"\n", "\t"} <= {c for c in result.out if c.isprintable()}
    steered = workbench("generate", folder / "model", "ab cd", "--max-tokens", 12, "--force", "*:2", "--json")
    facts = json.loads(steered.out)
    edit = Force(experts=[2])
    there = generate(model, "ab cd", edit, max_tokens=12)
    assert [token["token_id"] for token in facts["steered"]["tokens"]] == [step.token_id for step in there.steps]
    assert facts["steered"]["text"] == there.text and facts["steered"]["touched"] == list(there.touched)
    assert from_json(facts["recipe"]).interventions == (edit,) and facts["differences"] == {"steered": None}
    plain = json.loads(workbench("generate", folder / "model", "ab cd", "--max-tokens", 12, "--json").out)
    assert plain["plain"]["text"] == expected.text and plain["recipe"] is None


def test_the_default_model(workbench: Command):
    result = workbench("generate", "The treaty was signed", "--max-tokens", 4)
    assert result.code == 0 and result.out == generate("demo", "The treaty was signed", max_tokens=4).text + "\n"


def test_hostile_tokens_cannot_reach_the_terminal(workbench: Command, folder: Path, model: Model, monkeypatch):
    """Forced to write an escape sequence, a carriage return and bytes that are no character."""
    wanted = iter([27, 91, 51, 49, 109, 13, 0xC2, 0x9B, 0xFF, 65, 10] * 2)
    vocabulary = model.tokenizer.get_vocab()
    ids = {byte: vocabulary[entry] for entry, byte in ALPHABET.items()}
    from workbench import models

    loaded = load(folder / "model")
    monkeypatch.setattr(models, "load", lambda *_, **__: loaded)
    given: Any = loaded.module
    original = given.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        out.logits[:, -1, ids[next(wanted)]] += 1e4
        return out

    monkeypatch.setattr(given, "forward", forward)
    result = workbench("generate", folder / "model", "ab", "--max-tokens", 11)
    assert result.out == "\\x1b[31m\\r\\x9b\ufffdA\n\n"
    result = workbench("generate", folder / "model", "ab", "--max-tokens", 1, "--compare", "--bias", "0:1=1")
    assert "\x1b" not in result.out and "\\x1b" in result.out


def test_compare(workbench: Command):
    edit = Ablate(layer=range(6), experts=range(12))
    found = compare("demo", "The treaty was signed", edit, control=3, max_tokens=12)
    options = ("--ablate", "0-5:0-11", "--max-tokens", 12, "--seed", 3, "--control", "random")
    facts = json.loads(workbench("generate", "demo", "The treaty was signed", *options, "--json").out)
    for name in ("plain", "steered", "control"):
        assert facts[name]["text"] == found[name].text
    at = facts["differences"]["steered"]["at"]
    plain, steered = (facts[name]["tokens"] for name in ("plain", "steered"))
    assert (
        plain[:at] == pytest.approx(plain[:at])
        if at == 0
        else [t["token_id"] for t in plain[:at]] == [t["token_id"] for t in steered[:at]]
    )
    assert facts["differences"]["steered"] == {"at": at, "plain": plain[at]["token"], "token": steered[at]["token"]}
    assert plain[at]["token_id"] != steered[at]["token_id"]
    text = workbench("generate", "The treaty was signed", *options).out
    assert text.startswith("plain\n") and "\nsteered\n" in text and "\ncontrol\n" in text
    assert f"steered: from token {at} on (counted from 0), where " in text
    assert text.count("[[") >= 2 and "".join(step.text for step in found["steered"].steps[:at]) + "[[" in text


def test_compare_where_nothing_differs(workbench: Command, folder: Path):
    result = workbench(
        "generate", folder / "model", "ab", "--bias", "0:1=0", "--compare", "--max-tokens", 3, "--temperature", 1
    )
    assert result.code == 0 and "steered: the same tokens as plain" in result.out and "[[" not in result.out


def test_a_recipe_of_the_model(workbench: Command, folder: Path, model: Model, tmp_path: Path):
    edit = SetTopK(k=1)
    file = written(tmp_path / "mine.json", edit, model=of_model(model))
    options = ("--recipe", file, "--ablate", "0:1", "--max-tokens", 5, "--json")
    facts = json.loads(workbench("generate", folder / "model", "ab", *options).out)
    assert from_json(facts["recipe"]).interventions == (edit, Ablate(layer=0, experts=[1]))
    refused(
        workbench("generate", "demo", "ab", "--recipe", file), "the recipe is for", "model (olmoe, 3 layers", "top-3"
    )


def test_generate_refuses(workbench: Command, folder: Path, tmp_path: Path):
    model = folder / "model"
    broken = tmp_path / "broken.json"
    broken.write_text('{"format": "moe-workbench recipe", "version": 9}')
    refused(workbench("generate", "the", "cat", "sat"), "found 3 words", "in quotes")
    refused(workbench("generate", model, ""), "the prompt is ''")
    refused(workbench("generate", "demo-early"), "'demo-early' is a model, and there is no prompt")
    refused(workbench("generate", model, "x", "--seed", -1), "seed is -1; expected 0 or more.")
    refused(workbench("generate", model, "x", "--ablate", "0:1", "--control", "random", "--seed", -1), "seed is -1")
    refused(workbench("generate", model, "x", "--device", "foo"), "device 'foo' can't be used: Expected one of cpu")
    refused(workbench("generate", model, "x", "--compare"), "nothing to compare with", "--recipe")
    refused(workbench("generate", model, "x", "--control", "random"), "nothing to compare with")
    refused(
        workbench("generate", "no/such/model", "x", "--ablate", "1"), "--ablate '1'"
    )  # before the model is looked for
    refused(workbench("generate", model, "x", "--ablate", "7:1"), "layer 7", "0 to 2")
    refused(workbench("generate", model, "x", "--ablate", "0:8"), "8")
    refused(workbench("generate", model, "x", "--force", "0:0-3"), "4", "3")
    refused(workbench("generate", model, "x", "--top-k", 9), "9", "8")
    refused(workbench("generate", model, "x", "--top-k", 2, "--control", "random"), "no control of random experts")
    refused(workbench("generate", model, "x", "--ablate", "0:1", "--scope", "colour=red"), "colour")
    refused(workbench("generate", model, "x", "--recipe", tmp_path / "none.json"), "none.json: can't be read")
    refused(
        workbench("generate", model, "x", "--recipe", broken), "version is 9; this version of the workbench reads 1"
    )
    refused(workbench("generate", model, "x", "--max-tokens", 0), "max_tokens is 0")
    refused(workbench("generate", model, "x", "--temperature", -1), "temperature is -1")
    refused(workbench("generate", folder / "texts.jsonl", "x"), "is a file")
    nothing = workbench("generate", model, "x", "--ablate", "0:1", "--scope", "position=200+")
    assert nothing.code == 1 and "touched nothing" in nothing.err
    assert workbench("generate", model, "hello", "--chat", "--max-tokens", 1).code == 0


def test_generate_interrupted(workbench: Command, folder: Path, monkeypatch):
    from workbench import generation

    def interrupt(*_: Any, on_step: Any, **__: Any) -> None:
        on_step(generation.Step(1, "so far", "so far", 0.5))
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "generate", interrupt)
    result = workbench("generate", folder / "model", "x")
    assert (result.code, result.out, result.err) == (130, "so far\n", "")


# trace --recipe


def test_before_and_after_are_two_runs_of_one_file(workbench: Command, folder: Path, model: Model, tmp_path: Path):
    out = tmp_path / "t.duckdb"
    edits = (Ablate(layer=1, experts=[0, 5]), SetTopK(layer=2, k=5), Ablate(layer=0, experts=[3], level="output"))
    file = written(tmp_path / "no-five.json", *edits, model=of_model(model), source={"method": "by hand"})
    command = ("trace", folder / "model", "--corpus", folder / "texts.jsonl", "--out", out)
    record = ("--record", "ids,weights,entropy,margin,logits,norms,profiles,shift,predictions")
    assert workbench(*command, *record).code == 0
    result = workbench(*command, *record, "--append", "--recipe", file)
    assert result.code == 0, result
    assert validate(out).empty
    before, after = Trace(out, "model.texts"), Trace(out, "model.texts.no-five")
    assert before.layers["top_k"].tolist() == [3, 3, 3] and after.layers["top_k"].tolist() == [3, 3, 5]
    assert after.runs().set_index("run")["recipe"].tolist() == [
        None,
        to_json(Recipe(edits, of_model(model), {"method": "by hand"})),
    ]
    assert np.isin(before.experts(1), [0, 5]).any() and not np.isin(after.experts(1), [0, 5]).any()
    assert (after.experts(2) != NO_EXPERT).all() and after.experts(2).shape[1] == 5
    assert not (after.experts(0) == 3).any() and (before.experts(0) == 3).any()
    moved = (
        agreement(before, other=after.run).query("measure == 'overlap' and group == 'all'").set_index("layer")["value"]
    )
    assert moved[0] < 1 and moved[1] < 1
    assert (before.tokens()["token_id"] == after.tokens()["token_id"]).all()
    shown = workbench("info", out).out
    assert (
        "Ablate(layer=1, experts=[0, 5]); SetTopK(layer=2, k=5); Ablate(layer=0, experts=[3], level='output')" in shown
    )
    assert json.loads(workbench("info", out, "--json").out)["runs"][1]["recipe"]["source"] == {"method": "by hand"}
    refused(workbench(*command, *record, "--append", "--recipe", file), "already has a run 'model.texts.no-five'")


def test_routing_in_a_steered_trace_is_that_of_a_steered_pass(model: Model, folder: Path, tmp_path: Path):
    """Batched and padded, against each text alone, token by token."""
    from workbench.intervening import intervene
    from workbench.recorder import Recorder

    edits = [Bias(layer=0, experts=[1], strength=1.0, scope="position=0-3"), Forbid(experts=[2], scope="token~[a-e]")]
    found = trace(model, folder / "texts.jsonl", tmp_path / "t.duckdb", recipe=edits, progress=False)
    assert found.run.endswith(".steered")
    ids, seqs = found.tokens()["token_id"].to_numpy(), found.sequence_index()
    for seq in range(found.n_sequences):
        with torch.inference_mode(), intervene(model, edits, idle=True), Recorder(model) as recorder:
            model.module(input_ids=torch.tensor(ids[seqs == seq][None]), use_cache=False)
        (alone,) = recorder.take()
        for layer in range(3):
            assert (alone[layer].experts[0].numpy() == found.experts(layer)[seqs == seq]).all()


def test_generated_tokens_of_a_steered_run(model: Model, folder: Path, tmp_path: Path):
    options = {"generate": 4, "max_tokens": 300, "progress": False}
    for phase, other in (("prompt", "generated"), ("generated", "prompt")):
        out = tmp_path / f"{phase}.duckdb"
        edit = Ablate(experts=[0, 1, 2], scope=f"phase={phase}")
        found = trace(model, folder / "texts.jsonl", out, recipe=edit, **options)
        phases = found.tokens()["phase"].to_numpy()
        assert set(phases) == {"prompt", "generated"} and validate(out).empty
        gone = np.isin(found.experts(1), [0, 1, 2]).any(1)
        assert not gone[phases == phase].any() and gone[phases == other].any()
    text = trace(model, folder / "texts.jsonl", tmp_path / "c.duckdb", recipe=Contrast(), **options)
    assert validate(tmp_path / "c.duckdb").empty and text.layers["top_k"].tolist() == [3, 3, 3]
    with pytest.raises(InputError, match="--generate"):
        trace(model, folder / "texts.jsonl", tmp_path / "d.duckdb", recipe=[Contrast()], progress=False)
    late = Ablate(experts=[1], scope="position=3+ & phase=generated")
    with pytest.raises(InputError, match="scope='position=3. & phase=generated'.* trace with --generate"):
        trace(model, folder / "texts.jsonl", tmp_path / "d.duckdb", recipe=late, progress=False)
    assert not (tmp_path / "d.duckdb").exists()


def test_replay(workbench: Command, folder: Path, tmp_path: Path):
    out = tmp_path / "t.duckdb"
    command = ("trace", folder / "model", "--corpus", folder / "texts.jsonl", "--out", out)
    assert workbench(*command, "--run", "one").code == 0
    assert workbench(*command, "--append", "--dtype", "bfloat16", "--run", "own").code == 0
    replayed = workbench(*command, "--append", "--dtype", "bfloat16", "--run", "two", "--replay", f"{out}:one")
    assert replayed.code == 0, replayed
    one, two, own = (Trace(out, name) for name in ("one", "two", "own"))
    assert all((np.sort(one.experts(layer)) == np.sort(two.experts(layer))).all() for layer in range(3))
    assert any((np.sort(one.experts(layer)) != np.sort(own.experts(layer))).any() for layer in range(3))
    assert from_json(two.runs().set_index("run").loc["two", "recipe"]).interventions == (
        Replay(trace=str(out), run="one"),
    )
    last = workbench(*command, "--append", "--run", "three", "--replay", out)
    assert last.code == 0
    assert Trace(out, "three").runs().set_index("run").loc["three", "recipe"]["interventions"][0]["run"] == "two"
    other = tmp_path / "u.duckdb"
    fresh = ("trace", folder / "model", "--corpus", folder / "texts.jsonl", "--out", other)
    refused(workbench(*fresh, "--replay", f"{out}:nine"), "no run 'nine'")
    refused(workbench(*fresh, "--replay", tmp_path / "none.duckdb"), "no such file")
    refused(workbench(*fresh, "--replay", out, "--recipe", tmp_path / "r.json"), "exclude each other")
    assert not other.exists()


def test_recipes_that_are_refused(workbench: Command, folder: Path, model: Model, tmp_path: Path):
    out = tmp_path / "t.duckdb"
    command = ("trace", folder / "model", "--corpus", folder / "texts.jsonl", "--out", out, "--recipe")
    other = written(tmp_path / "other.json", Ablate(experts=[1]), model=of_model(model) | {"name": "bigger"})
    deep = written(tmp_path / "deep.json", Ablate(layer=5, experts=[1]))
    late = written(tmp_path / "late.json", Contrast())
    misspelt = tmp_path / "misspelt.json"
    misspelt.write_text(deep.read_text().replace('"experts"', '"expert"'))
    refused(workbench(*command, other), "the recipe is for bigger", "expert numbers mean nothing")
    refused(workbench(*command, deep), "layer 5", "0 to 2")
    refused(workbench(*command, late), "Contrast", "--generate")
    refused(workbench("trace", "no/such/model", "--out", out, "--recipe", misspelt), "misspelt.json", "no key 'expert'")
    refused(workbench(*command, tmp_path / "none.json"), "none.json: can't be read")
    assert not out.exists()


def test_an_intervention_that_touches_nothing_fails_the_run(model: Model, folder: Path, tmp_path: Path):
    never = Ablate(experts=[1], scope="text~zzzz")
    with pytest.raises(RunError, match="touched nothing"):
        trace(model, folder / "texts.jsonl", tmp_path / "t.duckdb", recipe=never, run="x", progress=False)
    assert Trace(tmp_path / "t.duckdb", "x").runs()["status"].tolist() == ["failed"]


def test_resume(workbench: Command, folder: Path, model: Model, tmp_path: Path):
    """A run under a recipe that is killed in its third transaction equals one that wasn't, once it is finished.

    What is left of it has no token that the second edit is about: that was the first text, the shortest.
    """
    file = written(tmp_path / "r.json", Ablate(layer=1, experts=[0]), Bias(experts=[2], strength=1.0, scope="text~^x$"))
    changed = written(tmp_path / "s.json", Ablate(layer=1, experts=[4]))
    corpus = tmp_path / "c.jsonl"
    texts = ["x", *("abcdefghij" * (1 + number % 4) for number in range(20))]
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    out, log = tmp_path / "t.duckdb", tmp_path / "log"
    command = ("trace", folder / "model", "--corpus", corpus, "--out", out, "--run", "a", "--batch-tokens", 60)
    run = process.start(*command, "--recipe", file, log=log, commit_token_layers=300, dies="between tables")
    assert process.finish(run) == -signal.SIGKILL, log.read_text()
    kept = Trace(out, "a")
    assert 1 <= kept.n_sequences < len(texts) and kept.sequences()["n_tokens"].min() == 1
    refused(workbench(*command, "--resume"), "can't be resumed: it has another recipe")

    def again(path: Path, recipe: Path | None, mode: str) -> Trace:
        return trace(model, corpus, path, run="a", batch_tokens=60, recipe=recipe, mode=mode, progress=False)

    with pytest.raises(InputError, match="it has another recipe"):
        again(out, changed, "resume")
    one, whole = again(out, file, "resume"), again(tmp_path / "whole.duckdb", file, "new")
    assert one.runs()["status"].tolist() == ["finished"] and validate(out).empty
    assert all((one.experts(layer) == whole.experts(layer)).all() for layer in range(3))
    assert one.tokens().equals(whole.tokens())
    assert again(out, file, "resume").n_tokens == whole.n_tokens  # nothing was left to do
    again(tmp_path / "plain.duckdb", None, "new")
    with pytest.raises(InputError, match="it was begun without a recipe"):
        again(tmp_path / "plain.duckdb", file, "resume")


def test_info_of_another_tools_recipe(workbench: Command, folder: Path, model: Model, tmp_path: Path):
    import duckdb

    out = tmp_path / "t.duckdb"
    trace(model, folder / "texts.jsonl", out, max_tokens=30, progress=False)
    with duckdb.connect(str(out)) as con:
        con.execute("""UPDATE runs SET recipe = '{"tool": "theirs"}'""")
    assert "theirs" in workbench("info", out).out
