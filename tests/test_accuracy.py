"""Accuracy on tasks through lm-eval, against likelihoods by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import shutil
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import pytest
import tiny
import torch

from workbench.accuracy import accuracy, figure, findings, summary
from workbench.conditions import conditions
from workbench.corpus import read
from workbench.errors import InputError, RunError
from workbench.intervening import intervene
from workbench.interventions import Ablate, Contrast, Force, Scale, SetTopK
from workbench.models import Model

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: items.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
GENERATES = """
task: said
dataset_path: json
dataset_kwargs: {data_files: items.jsonl}
test_split: train
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {max_gen_toks: 3, until: ["."], do_sample: false}
metric_list: [{metric: exact_match}]
"""
STEERING = Ablate(layer=1, experts=[2, 3])
N = 20


@cache
def model() -> Model:
    torch.set_num_threads(1)
    return checkpoint.olmoe()


def items() -> list[dict[str, Any]]:
    dice = random.Random(1)
    made = []
    for number in range(N):
        choices = ["".join(dice.choices("abcdefgh ", k=dice.randrange(2, 7))) + str(place) for place in range(4)]
        made.append({"start": f"item {number} is ", "choices": choices, "answer": dice.randrange(4)})
    return made


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A multiple-choice task; beside it `said.yaml`, which generates text, and their data."""
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items())), encoding="utf-8")
    (tmp_path / "said.yaml").write_text(GENERATES)
    path = tmp_path / "task.yaml"
    path.write_text(TASK.format(name="letters"))
    return path


def right(edits: Any) -> np.ndarray:
    """Whether the true choice of each item is the likeliest, one forward pass a choice."""
    found = []
    for item in items():
        likelihoods = []
        for choice in item["choices"]:
            start, whole = (model().tokenizer(text)["input_ids"] for text in (item["start"], item["start"] + choice))
            with intervene(model(), edits) if edits else nullcontext(), torch.inference_mode():
                logits = model().module(torch.tensor([whole])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(logits[at - 1, whole[at]]) for at in range(len(start), len(whole))))
        found.append(float(likelihoods.index(max(likelihoods)) == item["answer"]))
    return np.array(found)


def test_accuracy_against_likelihoods_by_hand(task: Path):
    frame = accuracy(model(), task, STEERING, n_random=2, n_resamples=500)
    assert frame["condition"].tolist() == ["plain", "steered", "random", "random 0", "random 1"]
    assert set(zip(frame["task"], frame["metric"], frame["filter"], frame["n_items"], strict=True)) == {
        ("letters", "acc", "none", N)
    }
    runs = conditions(model(), STEERING, 2, 0)
    by_hand = {name: right(edits) for name, edits in runs.items()}
    rows: Any = frame.set_index("condition")
    for name, found in by_hand.items():
        share = found.mean()
        assert rows.loc[name, "value"] == pytest.approx(share)
        assert rows.loc[name, "stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (N - 1)))
        assert rows.loc[name, "delta"] == pytest.approx(share - by_hand["plain"].mean())
    random_mean = (by_hand["random 0"] + by_hand["random 1"]) / 2
    steered = rows.loc["steered"]
    assert rows.loc["random", "value"] == pytest.approx(random_mean.mean()) and np.isnan(rows.loc["random", "stderr"])
    assert steered["versus_random"] == pytest.approx((by_hand["steered"] - random_mean).mean())
    worse = sum(by_hand[f"random {seed}"].mean() <= by_hand["steered"].mean() for seed in (0, 1))
    assert steered["n_random_worse"] == worse and steered["n_random"] == 2
    dice = np.random.default_rng(3)
    drawn = dice.integers(N, size=(2000, N))
    for column, apart in (
        ("delta", by_hand["steered"] - by_hand["plain"]),
        ("versus_random", by_hand["steered"] - random_mean),
    ):
        low, high = np.percentile(apart[drawn].mean(1), [2.5, 97.5])
        assert (steered[f"{column}_low"], steered[f"{column}_high"]) == pytest.approx((low, high), abs=0.06)
    assert rows["versus_random"].notna().sum() == 1


def test_the_identity_changes_nothing(task: Path):
    frame = accuracy(model(), [task], Scale(layer=1, experts=[0, 1, 2, 3, 4, 5, 6, 7], factor=1.0), n_random=1)
    assert frame["value"].nunique() == 1
    assert (frame[["delta", "delta_low", "delta_high"]] == 0).all(axis=None)


def test_several_tasks_and_limit(task: Path):
    (task.parent / "two.yaml").write_text(TASK.format(name="two"))
    frame = accuracy(model(), [task, task.parent / "two.yaml"], SetTopK(k=2), limit=6)
    assert frame["task"].tolist() == ["letters", "letters", "two", "two"] and (frame["n_items"] == 6).all()
    assert (frame["n_random"] == 0).all() and frame["versus_random"].isna().all()
    first, second = (frame[frame["task"] == name]["value"].tolist() for name in ("letters", "two"))
    assert first == second
    assert findings(frame)[-1].startswith("There is no control")


def test_generated_text_may_be_contrasted(task: Path):
    said = task.parent / "said.yaml"
    frame = accuracy(model(), said, Contrast(), limit=3)
    assert frame["metric"].unique().tolist() == ["exact_match"] and frame["n_items"].eq(3).all()
    with pytest.raises(InputError, match="Contrast is for decoding.*likelihood of an answer"):
        accuracy(model(), [said, task], Contrast(), limit=3)


def test_nothing_is_left_behind(task: Path):
    import huggingface_hub

    before = huggingface_hub.constants.HF_HUB_OFFLINE, model().tokenizer.pad_token_id
    weights = {name: value.clone() for name, value in model().module.state_dict().items()}
    state = torch.get_rng_state()
    accuracy(model(), task, STEERING, n_random=0, limit=2)
    assert (huggingface_hub.constants.HF_HUB_OFFLINE, model().tokenizer.pad_token_id) == before
    assert all(torch.equal(value, weights[name]) for name, value in model().module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    with intervene(model(), STEERING):
        model().module(torch.tensor([[5, 6, 7]]))


def test_summary_findings_and_figure(task: Path):
    frame = accuracy(model(), task, STEERING, n_random=2, n_resamples=100)
    assert summary(frame)["condition"].tolist() == ["plain", "steered", "random"]
    (sentence,) = findings(frame)
    assert f"on {N} items" in sentence and "of 2 draws are no better" in sentence
    drawn = figure(frame)
    assert [list(each.y) for each in drawn.data] == [["random 1", "random 0", "random", "steered", "plain"]]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such file"),
        ("task: [", "not a task of lm-eval"),
        ("- a\n- b\n", "not a task of lm-eval"),
        ("dataset_path: json\n", "no key `task`"),
        ("group: g\ntask: [a, b]\n", "a group of tasks"),
        ("task: t\ndataset_path: allenai/ai2_arc\n", "'allenai/ai2_arc', which isn't local"),
        ("task: t\ndataset_path: json\n", "data_files is None"),
        ("task: t\ndataset_path: json\ndataset_kwargs: {data_files: 'https://x.org/a.jsonl'}\n", "local files"),
        ("task: t\ndataset_path: json\ndataset_kwargs: {data_files: none.jsonl}\n", "none.jsonl isn't there"),
        ("task: t\nprocess_docs: !function more.f\n", "runs Python code"),
        ("include: gone.yaml\ntask: t\n", "not a task of lm-eval"),
    ],
)
def test_bad_tasks(task: Path, text: str | None, message: str):
    path = task.parent / "bad.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        accuracy(model(), path, STEERING)


@pytest.mark.parametrize(
    "change, message",
    [
        (("multiple_choice", "guessing"), "lm-eval can't use the task"),
        (("{{start}}", "{{beginning}}"), "lm-eval can't use the task.*beginning"),
        (("test_split: test", "test_split: dev"), "lm-eval can't use the task"),
        (("metric: acc", "metric: shininess"), "lm-eval can't use the task"),
    ],
)
def test_tasks_that_lm_eval_refuses(task: Path, change: tuple[str, str], message: str):
    task.write_text(task.read_text().replace(*change))
    with pytest.raises(InputError, match=message):
        accuracy(model(), task, STEERING)


def test_broken_data(task: Path):
    (task.parent / "items.jsonl").write_text('{"start": "a"\n{{')
    with pytest.raises(InputError, match="lm-eval can't use the task"):
        accuracy(model(), task, STEERING)


def test_python_functions_of_a_task(task: Path):
    (task.parent / "more.py").write_text("def few(docs):\n    return docs.select(range(2))\n")
    task.write_text(task.read_text() + "process_docs: !function more.few\n")
    frame = accuracy(model(), task, STEERING, n_random=0, trust_code=True)
    assert (frame["n_items"] == 2).all()


def test_bad_requests(task: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="no tasks"):
        accuracy(model(), [], STEERING)
    with pytest.raises(InputError, match="limit is 0"):
        accuracy(model(), task, STEERING, limit=0)
    with pytest.raises(InputError, match="n_random is -1"):
        accuracy(model(), task, STEERING, n_random=-1)
    with pytest.raises(InputError, match="another task is called 'letters'"):
        accuracy(model(), [task, shutil.copy(task, task.parent / "same.yaml")], STEERING)
    with pytest.raises(InputError, match="has no tokenizer"):
        accuracy(tiny.model("olmoe"), task, STEERING)
    with pytest.raises(RunError, match="touched nothing"):
        accuracy(model(), task, Force(layer=0, experts=[1], scope="position=200"), n_random=0, limit=1)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"lm-eval: pip install 'moe-workbench\[eval\]'"):
        accuracy(model(), task, STEERING)


def test_the_task_of_continuations(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("continuations", Path(__file__).parents[1] / "data/continuations.py")
    assert spec is not None and spec.loader is not None
    continuations = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(continuations)
    made = continuations.write("home-assistant", "de", tmp_path, 5, 0)
    rows = [json.loads(line) for line in (tmp_path / "home-assistant-de.jsonl").read_text().splitlines()]
    texts = {row.text for row in read("home-assistant") if row.lang == "de"}
    assert len(rows) == 5
    for row in rows:
        true = row["endings"][row["answer"]]
        assert len({len(ending) for ending in row["endings"]}) == 1 and len(set(row["endings"])) == 4
        assert any(str(text).startswith(f"{row['start']} {true}") for text in texts)
    assert accuracy(model(), made, STEERING, n_random=0)["n_items"].eq(5).all()
    with pytest.raises(SystemExit, match="too few texts in 'xx'"):
        continuations.write("home-assistant", "xx", tmp_path, 5, 0)
