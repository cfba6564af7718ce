"""Expert weights in one form: what is computed from them is what each family's own experts compute."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from recorded import run
from torch.nn.functional import linear

from workbench.errors import InputError
from workbench.experts import neurons, numbers, read, reorder_neurons
from workbench.families import FAMILIES

REFUSED = ("doge", "jetmoe", "longcat_flash", "switch_transformers")
READ = [name for name, family in FAMILIES.items() if not family.refused and name not in REFUSED]


@cache
def model(family: str) -> Any:
    torch.set_num_threads(1)
    return tiny.model(family)


def activation(family: str, experts: Any, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """What lies between the matrices, written out family by family."""
    if gate is None:
        return experts.act_fn(up)
    if family in ("gpt_oss", "openai_privacy_filter", "minimax_m3_vl"):
        limit, alpha = (7.0, 1.702)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(gate * alpha)
    if family in ("hy_v4", "glm5_next", "deepseek_v4"):
        limit = experts.limit if family == "deepseek_v4" else experts.swiglu_limit
        return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    if family == "inkling2":
        return experts.act_fn(gate, up)
    act = experts.mlp.activation_fn if family == "dbrx" else experts.act_fn
    return act(gate) * up


def computed(family: str, layer: Any, hidden: torch.Tensor, expert: int) -> torch.Tensor:
    """An expert's output (T, H), from its matrices alone."""
    weights = read(layer)

    def bias(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values[expert]

    gate = None if weights.gate is None else linear(hidden, weights.gate[expert], bias(weights.gate_bias))
    up = linear(hidden, weights.up[expert], bias(weights.up_bias))
    out = linear(activation(family, layer.experts, gate, up), weights.down[expert], bias(weights.down_bias))
    return layer.experts.post_expert_norm(out) if family == "muse_spark" else out


def own(family: str, layer: Any, hidden: torch.Tensor, expert: int) -> torch.Tensor:
    """The same by the family's own experts."""
    if family == "llama4":
        every = hidden.repeat(layer.n_experts, 1)
        return layer.experts(every).view(layer.n_experts, *hidden.shape)[expert]
    ids = torch.full((len(hidden), 1), expert)
    out = layer.experts.forward(hidden, ids, torch.ones(len(hidden), 1))
    return out.reshape(hidden.shape)


@pytest.mark.parametrize("family", READ)
def test_experts_computed_from_their_matrices(family: str):
    layer = model(family).layers[-1]
    weights = read(layer)
    n_experts, n_neurons, width = weights.up.shape
    assert (n_experts, width) == (layer.n_experts, weights.down.shape[1]) and weights.n_neurons == n_neurons
    assert weights.router.shape[0] == n_experts
    hidden = torch.randn(5, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for expert in (0, n_experts - 1):
            expected = own(family, layer, hidden, expert)
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(computed(family, layer, hidden, expert), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", READ)
def test_router_rows_make_the_logits(family: str):
    """Doubling an expert's row changes the logit of this expert and no other."""
    made = tiny.model(family)
    before = run(made, ("logits",))[1][-1].logits
    read(made.layers[-1]).router[3] *= 2
    after = run(made, ("logits",))[1][-1].logits
    changed = (after != before).flatten(0, 1).any(0)
    assert changed.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h", "dbrx", "aria", "openai_privacy_filter"])
def test_reordered_neurons_compute_the_same(family: str):
    made = tiny.model(family)
    layer = made.layers[-1]
    weights = read(layer)
    hidden = torch.randn(4, weights.up.shape[2], generator=torch.Generator().manual_seed(1))
    before, first = own(family, layer, hidden, 2), neurons(weights, 2)
    order = np.random.default_rng(0).permutation(weights.n_neurons)
    reorder_neurons(weights, 2, order)
    assert np.array_equal(neurons(weights, 2), first[order]) and not np.array_equal(neurons(weights, 2), first)
    torch.testing.assert_close(own(family, layer, hidden, 2), before, rtol=1e-4, atol=1e-5)


def test_neurons_are_rows_and_columns():
    layer = model("olmoe").layers[0]
    fused = layer.experts.gate_up_proj.detach()
    down = layer.experts.down_proj.detach()
    found = neurons(read(layer), 4)
    assert found.shape == (48, 3 * 64) and found.dtype == np.float32
    for neuron in (0, 7, 47):
        expected = [fused[4, neuron], fused[4, 48 + neuron], down[4, :, neuron]]
        assert np.array_equal(found[neuron], torch.cat(expected).numpy())


def test_numbers_are_copies():
    tensor = torch.ones(2)
    numbers(tensor)[0] = 5
    assert tensor.tolist() == [1, 1]


@pytest.mark.parametrize("family", REFUSED)
def test_other_experts_are_refused(family: str):
    with pytest.raises(InputError, match=f"{family}.*can't be read as matrices"):
        read(model(family).layers[0])


def test_quantised_experts_are_refused():
    made = tiny.model("olmoe")
    layer = made.layers[0]
    del layer.experts.down_proj
    with pytest.raises(InputError, match="no fused"):
        read(layer)
