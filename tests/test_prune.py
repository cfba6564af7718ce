"""Pruned and merged checkpoints: loaded plainly, they compute what the model computes without the dropped experts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from workbench.errors import InputError, RunError
from workbench.families import FAMILIES
from workbench.models import load
from workbench.prune import at_random, best, prune, read_scores
from workbench.subset import groups, resized, subset, top_k

REFUSED = {
    "deepseek_v4": "hash layers",
    "doge": "product keys",
    "ernie4_5_vl_moe": "share one count",
    "jetmoe": "attention has experts",
    "longcat_flash": "zero-computation",
    "switch_transformers": "modules of their own",
    "zaya": "no expert",
}
PRUNED = [name for name, family in FAMILIES.items() if not family.refused and name not in REFUSED]
KEPT = np.array([1, 3, 4, 6])  # two of each group of four


class Masked(TorchFunctionMode):
    """Takes experts out of everything that a router selects from: -inf in its logits and in what top-k sees."""

    def __init__(self, dropped: Sequence[int], n_experts: int) -> None:
        super().__init__()
        self.dropped, self.n_experts = list(dropped), n_experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, arguments = getattr(func, "__name__", ""), list(args)
        if name == "topk":
            flat = arguments[0].flatten(-2) if arguments[0].dim() == 3 else arguments[0]
            if flat.shape[-1] == self.n_experts:
                flat = flat.clone()
                flat[..., self.dropped] = -torch.inf
                arguments[0] = flat.view(arguments[0].shape)
        out = func(*arguments, **(kwargs or {}))
        if name == "linear" and out.shape[-1] >= self.n_experts:
            out = out.clone()
            out[..., self.dropped] = -torch.inf
        return out


@contextmanager
def without(model: Any, dropped: Sequence[int]) -> Iterator[None]:
    """The model with experts masked out by hand, in every layer."""
    originals = []
    for layer in model.layers:
        module, method = layer.selector
        original = getattr(module, method)

        def masked(*args: Any, original: Any = original, n: int = layer.n_experts, **kwargs: Any) -> Any:
            with Masked(dropped, n):
                return original(*args, **kwargs)

        originals.append((module, method))
        setattr(module, method, masked)
        if method == "route_tokens_to_experts":  # the logits are made outside of it
            handle = layer.router.register_forward_hook(lambda _m, _a, out: _hidden(out, dropped))
            originals.append((handle, ""))
    try:
        yield
    finally:
        for module, method in originals:
            delattr(module, method) if method else module.remove()


def _hidden(logits: Any, dropped: Sequence[int]) -> Any:
    if not isinstance(logits, torch.Tensor):
        return None
    logits = logits.clone()
    logits[..., list(dropped)] = -torch.inf
    return logits


def outputs(module: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.set_num_threads(1)
    with torch.inference_mode():
        return module(**inputs)[0]


def scores_for(model: Any, kept: np.ndarray = KEPT) -> pd.DataFrame:
    rows = [
        {"layer": layer.index, "expert": expert, "score": float(expert in kept)}
        for layer in model.layers
        for expert in range(layer.n_experts)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("family", PRUNED)
def test_pruned_computes_what_is_left(family: str, tmp_path: Path):
    """From disk: no key missing or left over, and the same outputs as the model with the others masked out."""
    model = tiny.model(family)
    table = prune(model, scores_for(model), 4, tmp_path / "out")
    assert table["kept"].sum() == 4 * len(model.layers)
    cls: Any = type(model.module)
    loaded, gaps = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not gaps["missing_keys"] and not gaps["unexpected_keys"] and not gaps["mismatched_keys"]
    again = load(loaded)
    k = top_k(model, 4)
    assert {(layer.n_experts, layer.top_k) for layer in again.layers} == {(4, k)}
    inputs = tiny.inputs(model.module)
    set_k(model, k)
    whole = outputs(model.module, inputs)
    with without(model, [0, 2, 5, 7]):
        expected = outputs(model.module, inputs)
    assert expected.isfinite().all() and not torch.allclose(expected, whole, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(outputs(loaded.eval(), inputs), expected, rtol=1e-4, atol=1e-4)


def set_k(model: Any, k: int) -> None:
    """Another top-k for the model by hand, for routers whose groups leave fewer experts."""
    for layer in model.layers:
        if layer.top_k != k:
            layer.router.top_k = k


def test_all_experts_are_the_model_bit_for_bit(tmp_path: Path):
    model = checkpoint.olmoe()
    table = prune(model, scores_for(model), 8, tmp_path / "out")
    assert table["kept"].all() and (table["became"] == table["expert"]).all()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = model.module.state_dict()
    assert loaded.state_dict().keys() == original.keys()
    assert all(torch.equal(tensor, original[name]) for name, tensor in loaded.state_dict().items())
    inputs = tiny.inputs(model.module)
    assert torch.equal(outputs(loaded.eval(), inputs), outputs(model.module, inputs))


@pytest.mark.parametrize("keep", [1, 2])
def test_fewer_experts_than_a_token_has(keep: int, tmp_path: Path):
    """top_k falls to what is left."""
    model = checkpoint.olmoe()
    kept = np.arange(keep) + 3
    prune(model, scores_for(model, kept), keep, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert {(layer.n_experts, layer.top_k) for layer in loaded.layers} == {(keep, keep)}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_experts_per_tok"] == keep
    inputs = tiny.inputs(model.module)
    set_k(model, keep)
    with without(model, np.setdiff1d(np.arange(8), kept).tolist()):
        expected = outputs(model.module, inputs)
    torch.testing.assert_close(outputs(loaded.module, inputs), expected, rtol=1e-4, atol=1e-5)


def test_folder_holds_all_that_a_checkpoint_needs(tmp_path: Path):
    model = checkpoint.olmoe()
    table = scores_for(model)
    table.to_csv(tmp_path / "scores.csv", index=False)
    prune(str(checkpoint.folder(tmp_path / "model")), tmp_path / "scores.csv", 4, tmp_path / "out")
    assert list(AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"]) == list(
        model.tokenizer("ab")["input_ids"]
    )
    note = json.loads((tmp_path / "out" / "experts.json").read_text())
    assert note["experts"] == [[1, 3, 4, 6]] * 3 and note["score"] == "score"
    assert note["made_by"] == "workbench prune" and note["model"].endswith("model")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "scores.csv", "out"}
    weights = [path for path in (tmp_path / "out").iterdir() if path.suffix in (".safetensors", ".bin", ".pt")]
    assert [path.name for path in weights] == ["model.safetensors"]


def test_dtype_stays(tmp_path: Path):
    model = tiny.model("olmoe")
    model.module.bfloat16()
    prune(model, scores_for(model), 4, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_the_given_model_is_not_changed(tmp_path: Path):
    model = tiny.model("olmoe")
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    config = model.module.config.to_dict()
    prune(model, scores_for(model), 2, tmp_path / "out")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.module.state_dict().items())
    assert model.module.config.to_dict() == config


def test_best_against_sorting():
    model = tiny.model("olmoe")
    scores = np.random.default_rng(0).integers(0, 4, (3, 8)).astype(float)  # with ties
    for keep in range(1, 9):
        for layer, ids in enumerate(best(model, scores, keep)):
            by_hand = sorted(range(8), key=lambda e: (-scores[layer, e], e))[:keep]
            assert ids.tolist() == sorted(by_hand)


def test_best_of_each_group():
    """deepseek_v3 has two groups of four: the best two of each stay, though three of one are better."""
    model = tiny.model("deepseek_v3")
    assert groups(model.layers[0]) == (2, 1)
    scores = np.array([[9.0, 8, 7, 0, 1, 2, 3, 4]] * 2)
    assert [ids.tolist() for ids in best(model, scores, 4)] == [[0, 1, 6, 7]] * 2
    assert top_k(model, 4) == 2  # one of two groups, two experts in each
    for keep in (1, 2, 3, 5, 7):
        with pytest.raises(InputError, match="2 equal groups.*at least 2.*give one of 4, 6, 8"):
            best(model, scores, keep)


def test_random_choices():
    model = tiny.model("olmoe")
    first, again, other = (at_random(model, 4, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(len(set(ids.tolist())) == 4 for ids in first)
    counts = np.bincount(np.concatenate([ids for seed in range(200) for ids in at_random(model, 4, seed)]))
    assert counts.min() > 250 and counts.max() < 350  # 300 expected


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused(family: str, tmp_path: Path):
    model = tiny.model(family)
    with pytest.raises(InputError, match=f"can't be taken apart.*{REFUSED[family]}"):
        prune(model, scores_for(model), 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sparsemixer_needs_two(tmp_path: Path):
    model = tiny.model("phimoe")
    with pytest.raises(InputError, match="select a second expert"):
        prune(model, scores_for(model), 1, tmp_path / "out")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.drop(columns="score"), "no column 'score'; it has layer, expert"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "several rows for layer 0, expert 0"),
        (lambda t: t.iloc[1:], "no finite score for expert 0 of layer 0"),
        (lambda t: t.assign(score=np.where(t["expert"] == 2, np.nan, 1.0)), "no finite score for expert 2 of layer 0"),
        (lambda t: t.assign(score=np.inf), "no finite score"),
        (lambda t: t.assign(score="high"), "isn't a number"),
        (lambda t: t.assign(layer=t["layer"] + 1), "expert 0 of layer 3; .* has 3 layers of 8 experts"),
        (lambda t: t.assign(expert=t["expert"] - 1), "expert -1 of layer 0"),
    ],
)
def test_tables_that_do_not_fit(change: Any, message: str):
    model = tiny.model("olmoe")
    with pytest.raises(InputError, match=message):
        read_scores(change(scores_for(model)), model, "score")


def test_tables_as_files(tmp_path: Path):
    model = tiny.model("olmoe")
    table = scores_for(model).sample(frac=1, random_state=0)
    table.to_csv(tmp_path / "t.csv", index=False)
    table.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    table.to_parquet(tmp_path / "t.parquet")
    for name in ("t.csv", "t.tsv", "t.parquet"):
        assert np.array_equal(read_scores(tmp_path / name, model, "score")[2].nonzero()[0], KEPT)
    for name, message in (("none.csv", "no such file"), ("t.xlsx", "expected a table as .csv")):
        with pytest.raises(InputError, match=message):
            read_scores(tmp_path / name, model, "score")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(InputError, match="can't be read as a table"):
        read_scores(tmp_path / "empty.csv", model, "score")


@pytest.mark.parametrize("keep", [0, -1, 9])
def test_impossible_numbers(keep: int, tmp_path: Path):
    model = tiny.model("olmoe")
    with pytest.raises(InputError, match=f"keep is {keep}; .* has 8 experts a layer: give 1 to 8"):
        prune(model, scores_for(model), keep, tmp_path / "out")


def test_existing_folders(tmp_path: Path):
    model = tiny.model("olmoe")
    scores = scores_for(model)
    prune(model, scores, 4, tmp_path / "out")
    with pytest.raises(InputError, match="exists; choose another name, or replace it with --overwrite"):
        prune(model, scores, 2, tmp_path / "out")
    prune(model, scores, 2, tmp_path / "out", overwrite=True)
    assert load(tmp_path / "out").layers[0].n_experts == 2
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(InputError, match="no config.json"):
        prune(model, scores, 4, tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    with pytest.raises(InputError, match="is the model itself"):
        prune(load(tmp_path / "out"), scores_for(load(tmp_path / "out")), 2, tmp_path / "out", overwrite=True)
    with pytest.raises(InputError, match="create it first"):
        prune(model, scores, 4, tmp_path / "no" / "such" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        prune(model, scores, 4, tmp_path / "file", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "notes", "file"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_half_written_stays(overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny.model("olmoe")
    if overwrite:
        prune(model, scores_for(model), 4, tmp_path / "out")

    def full(self: Any, folder: Path, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model.module), "save_pretrained", full)
    with pytest.raises(RunError, match="No space left.*Nothing was left behind"):
        prune(model, scores_for(model), 2, tmp_path / "out", overwrite=overwrite)
    assert {path.name for path in tmp_path.iterdir()} == ({"out"} if overwrite else set())
    if overwrite:
        assert load(tmp_path / "out").layers[0].n_experts == 4


def test_a_checkpoint_that_does_not_load_as_meant_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny.model("olmoe")
    save = type(model.module).save_pretrained

    def wrong(self: Any, folder: Path, **options: Any) -> None:
        changed = {name: tensor + 1 if "norm" in name else tensor for name, tensor in self.state_dict().items()}
        save(self, folder, state_dict=changed, **options)

    monkeypatch.setattr(type(model.module), "save_pretrained", wrong)
    with pytest.raises(RunError, match="doesn't load as it was meant"):
        prune(model, scores_for(model), 4, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# -- subset ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "dbrx", "gemma4", "ernie4_5_moe", "inkling"])
def test_permuted_copies_compute_the_same(family: str):
    model = tiny.model(family)
    random = np.random.default_rng(1)
    inside = [random.permutation(4), 4 + random.permutation(4)]  # groups may trade places, experts stay in theirs
    orders = [np.concatenate(inside[::-1]) for _ in model.layers]
    permuted = subset(model, orders)
    inputs = tiny.inputs(model.module)
    expected = outputs(model.module, inputs)
    torch.testing.assert_close(outputs(permuted.module, inputs), expected, rtol=1e-4, atol=1e-5)
    parameter = next(name for name, _ in model.module.named_parameters() if name.endswith(("down_proj", "w2")))
    assert not torch.equal(permuted.module.get_parameter(parameter), model.module.get_parameter(parameter))


@pytest.mark.parametrize(
    "chosen, message",
    [
        ([[0, 1]] * 2, "chosen names 2 layers; .* has 3"),
        ([[0, 1], [0, 1], [1, 1]], r"chosen\[2\] is \[1, 1\]; expected distinct"),
        ([[0, 1], [0, 1], [0, 1, 2]], "2 experts in layer 0 and 3 in 2"),
        ([[0, 8]] * 3, "has experts 0 to 7"),
        ([[-1, 0]] * 3, "has experts 0 to 7"),
        ([[]] * 3, "expected distinct ids|keep is 0"),
    ],
)
def test_impossible_subsets(chosen: Any, message: str):
    with pytest.raises(InputError, match=message):
        subset(tiny.model("olmoe"), [np.array(ids) for ids in chosen])


@pytest.mark.parametrize("ids", [[0, 1, 2, 4, 5, 6, 7, 3], [0, 4, 1, 5, 2, 6, 3, 7], [0, 1, 2, 4]])
def test_groups_are_not_torn(ids: list[int]):
    model = tiny.model("deepseek_v3")
    with pytest.raises(InputError, match="2 groups of consecutive experts"):
        subset(model, [np.array(ids)] * len(model.layers))


def test_layers_of_different_sizes_are_refused():
    model = tiny.model("olmoe")
    uneven = replace(model, layers=(model.layers[0], *(replace(layer, n_experts=4) for layer in model.layers[1:])))
    with pytest.raises(InputError, match="have 4, 8 experts, and a configuration has one count"):
        subset(uneven, [np.array([0, 1])] * 3)


def test_configurations_name_the_new_numbers():
    model = tiny.model("dbrx")
    config = resized(model, 4, 2)
    assert (config.ffn_config.moe_num_experts, config.ffn_config.moe_top_k) == (4, 2)
    assert model.module.config.ffn_config.moe_num_experts == 8
