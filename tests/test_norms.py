"""Norms of the experts' outputs against experts computed by hand, layout by layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from recorded import TRACED, model, run
from torch import nn

from workbench.families import FAMILIES

STANDARD = [name for name in TRACED if FAMILIES[name].layout == "standard"]


@pytest.mark.parametrize("family", STANDARD)
def test_norms_equal_a_run_of_the_experts_with_one_weight_left(family: str) -> None:
    """The experts' own sum over k with weights (0, …, 1, …, 0) is one expert's output."""
    made = model(family)
    outputs: list[list[torch.Tensor]] = []

    def each_rank(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden, ids, weights = (*args, *kwargs.values())[:3]
        ranks = [torch.zeros_like(weights).index_fill_(-1, torch.tensor([r]), 1.0) for r in range(ids.shape[-1])]
        outputs.append([module.forward(hidden, ids, one).reshape(ids.shape[0], -1) for one in ranks])

    handles = [layer.experts.register_forward_pre_hook(each_rank, with_kwargs=True) for layer in made.layers]
    _, observed = run(made, ["norms"])
    for handle in handles:
        handle.remove()
    for seen, ranks in zip(observed, outputs, strict=True):
        expected = torch.stack([out.float().norm(dim=-1) for out in ranks], dim=-1)
        expected = expected.masked_fill(seen.experts.flatten(0, 1) < 0, 0)
        torch.testing.assert_close(seen.norms.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


def silu_glu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (nn.functional.silu(gate) * up)


def gpt_oss_expert(m: Any, x: torch.Tensor, e: int) -> torch.Tensor:
    gate_up = x @ m.gate_up_proj[e] + m.gate_up_proj_bias[e]
    gate, up = gate_up[::2].clamp(max=m.limit), gate_up[1::2].clamp(-m.limit, m.limit)
    return ((up + 1) * gate * torch.sigmoid(gate * m.alpha)) @ m.down_proj[e] + m.down_proj_bias[e]


def dbrx_expert(m: Any, x: torch.Tensor, e: int) -> torch.Tensor:
    w1, v1, w2 = (w.view(m.num_experts, m.ffn_hidden_size, m.hidden_size)[e] for w in (m.mlp.w1, m.mlp.v1, m.mlp.w2))
    return (nn.functional.silu(w1 @ x) * (v1 @ x)) @ w2


# family -> one expert's output by hand
EXPERT: dict[str, Any] = {
    "olmoe": lambda m, x, e: silu_glu(x, m.gate_up_proj[e], m.down_proj[e]),
    "flex_olmo": lambda m, x, e: silu_glu(x, m.gate_up_proj[e], m.down_proj[e]),
    "aria": lambda m, x, e: silu_glu(x, m.gate_up_proj[e].T, m.down_proj[e].T),
    "gpt_oss": gpt_oss_expert,
    "nemotron_h": lambda m, x, e: m.down_proj[e] @ nn.functional.relu(m.up_proj[e] @ x) ** 2,
    "dbrx": dbrx_expert,
    "switch_transformers": lambda m, x, e: m[f"expert_{e}"](x[None])[0],
}


@pytest.mark.parametrize("family", list(EXPERT))
def test_norms_by_hand(family: str) -> None:
    made = model(family)
    given: list[torch.Tensor] = []
    handles = [layer.experts.register_forward_pre_hook(lambda _m, args: given.append(args[0])) for layer in made.layers]
    _, observed = run(made, ["norms"])
    for handle in handles:
        handle.remove()
    for layer, seen, hidden in zip(made.layers, observed, given, strict=True):
        ids = seen.experts.reshape(-1, layer.top_k)
        with torch.no_grad():
            norms = [
                [float(EXPERT[family](layer.experts, x, e).norm()) for e in row]
                for x, row in zip(hidden.reshape(len(ids), -1), ids.tolist(), strict=True)
            ]
        torch.testing.assert_close(seen.norms.reshape(ids.shape), torch.tensor(norms), rtol=1e-4, atol=1e-4)


def test_llama4_norms_are_of_the_output_for_the_scaled_input() -> None:
    made = model("llama4")
    given: list[torch.Tensor] = []
    handles = [layer.router.register_forward_pre_hook(lambda _m, args: given.append(args[0])) for layer in made.layers]
    _, observed = run(made, ["weights", "norms"])
    for handle in handles:
        handle.remove()
    for layer, seen, hidden in zip(made.layers, observed, given, strict=True):
        m: Any = layer.experts
        ids, weights = seen.experts.flatten(0, 1), seen.weights.flatten(0, 1)
        for t, x in enumerate(hidden):
            for r, e in enumerate(ids[t].tolist()):
                with torch.no_grad():
                    out = silu_glu(x * weights[t, r], m.gate_up_proj[e].T, m.down_proj[e].T)
                torch.testing.assert_close(seen.norms.flatten(0, 1)[t, r], out.norm(), rtol=1e-4, atol=1e-4)


def test_jetmoe_norms_of_mlp_and_attention_experts() -> None:
    made = model("jetmoe")
    given: dict[int, torch.Tensor] = {}
    handles = [
        layer.router.register_forward_pre_hook(lambda _m, args, i=layer.index: given.update({i: args[0]}))
        for layer in made.layers
    ]
    _, observed = run(made, ["norms"])
    for handle in handles:
        handle.remove()
    attention = [layer for layer in made.layers if "self_attention" in layer.name]
    assert [layer.index for layer in attention] == [0, 2, 4]
    for layer in made.layers:
        seen, block = observed[layer.index], layer.block
        assert (seen.norms > 0).all()
        if layer in attention:
            continue
        m: Any = block
        for t, x in enumerate(given[layer.index]):
            for r, e in enumerate(seen.experts.flatten(0, 1)[t].tolist()):
                with torch.no_grad():
                    out = silu_glu(x, m.input_linear.weight[e], m.output_linear.weight[e])
                torch.testing.assert_close(seen.norms.flatten(0, 1)[t, r], out.norm(), rtol=1e-4, atol=1e-4)


def test_doge_norms_by_hand() -> None:
    made = model("doge")
    given: list[torch.Tensor] = []
    handles = [layer.block.register_forward_pre_hook(lambda _m, args: given.append(args[0])) for layer in made.layers]
    _, observed = run(made, ["norms"])
    for handle in handles:
        handle.remove()
    for layer, seen, hidden in zip(made.layers, observed, given, strict=True):
        m: Any = layer.block
        for x, ids, norms in zip(
            hidden.flatten(0, 1), seen.experts.flatten(0, 1), seen.norms.flatten(0, 1), strict=True
        ):
            for e, norm in zip(ids.tolist(), norms, strict=True):
                with torch.no_grad():
                    out = m.act_fn(m.down_embed.weight[e] @ x) * m.up_embed.weight[e]
                torch.testing.assert_close(norm, out.norm(), rtol=1e-4, atol=1e-5)
