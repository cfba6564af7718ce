"""The recorder against oracles of its own, on a tiny model of every family."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from workbench.errors import InputError, RunError
from workbench.families import FAMILIES
from workbench.layers import Layer
from workbench.models import Model
from workbench.recorder import FIELDS, Recorder

TRACED = [name for name, family in FAMILIES.items() if not family.refused]
STANDARD = [name for name in TRACED if FAMILIES[name].layout == "standard"]
# Another token of the batch can change where a token goes, so nothing that compares batches holds.
BATCH_DEPENDENT = {"doge"}


@cache
def model(family: str) -> Any:
    torch.set_num_threads(1)
    return tiny.model(family)


def run(made: Model, record: Any = ("weights",), **inputs: Any) -> tuple[Any, list[Any]]:
    """The model's first output (logits or hidden states) and one pass' observations."""
    with torch.inference_mode(), Recorder(made, record) as recorder:
        out = made.module(**(inputs or tiny.inputs(made.module)))[0]
    (observed,) = recorder.take()
    return out, observed


def hooks(module: nn.Module) -> int:
    """Hooks on any submodule, and forward methods replaced on an instance."""
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + sum(callable(v) for v in vars(m).values())
        for m in module.modules()
    )


# -- every family ------------------------------------------------------------------------------------------------------


def test_every_family_has_a_tiny_model() -> None:
    assert set(tiny.FAMILIES) == set(FAMILIES)
    assert len(TRACED) == 71
    assert {name for name, family in FAMILIES.items() if family.refused} == {"nllb_moe"}


@pytest.mark.parametrize("family", TRACED)
def test_recording_changes_nothing(family: str) -> None:
    made = model(family)
    inputs = tiny.inputs(made.module)
    before = hooks(made.module)
    with torch.inference_mode():
        plain = made.module(**inputs)[0]
    recorded, observed = run(made, FIELDS, **inputs)
    assert torch.equal(plain, recorded)
    assert hooks(made.module) == before
    assert len(observed) == len(made.layers)


@pytest.mark.parametrize("family", TRACED)
def test_observations_keep_their_promises(family: str) -> None:
    made = model(family)
    inputs = tiny.inputs(made.module)
    _, observed = run(made, FIELDS, **inputs)
    for layer, seen in zip(made.layers, observed, strict=True):
        ids = inputs["decoder_input_ids" if layer.stack == "decoder" and len(inputs) > 1 else "input_ids"]
        b, s = ids.shape
        k, e = layer.top_k, layer.n_experts
        assert seen.experts.shape == seen.weights.shape == seen.norms.shape == (b, s, k)
        assert seen.entropy.shape == seen.margin.shape == (b, s)
        assert seen.logits.shape == seen.probabilities.shape == (b, s, e)
        assert seen.experts.dtype == torch.int64
        for name in FIELDS:
            assert getattr(seen, name).dtype == torch.float32, name
        assert int(seen.experts.min()) >= -1 and int(seen.experts.max()) < e
        assert all(len(set(row)) == k for row in seen.experts.reshape(-1, k).tolist())
        none = seen.experts < 0
        assert (seen.weights >= 0).all() and (seen.weights[none] == 0).all() and (seen.norms[none] == 0).all()
        assert (seen.weights[~none] > 0).all() and (seen.norms[~none] > 0).all()
        assert seen.logits.isfinite().all()
        if layer.scoring == "hash":
            assert seen.entropy.isnan().all() and seen.margin.isnan().all() and seen.probabilities.isnan().all()
            continue
        assert (seen.entropy >= 0).all() and (seen.entropy <= np.log(e + 1) + 1e-5).all()
        assert (seen.margin >= 0).all()
        total = seen.probabilities.sum(-1)
        assert (total <= 1 + 1e-5).all() and (family == "zaya" or (total >= 1 - 1e-5).all())
        named = {"softmax, top-k, renormalised", "top-k, softmax", "sigmoid + bias, top-k, renormalised"}
        if layer.gating in named and layer.family.caveat == "":
            torch.testing.assert_close(seen.weights.sum(-1), torch.ones(b, s))


@pytest.mark.parametrize("family", TRACED)
def test_bfloat16(family: str) -> None:
    made = tiny.model(family)
    half = Model(**{name: getattr(made, name) for name in Model.__dataclass_fields__} | {"dtype": "bfloat16"})
    half.module.to(dtype=torch.bfloat16)
    if family == "inkling2":  # keeps its routers in float32, as its checkpoints are loaded
        for layer in half.layers:
            layer.router.float()
    inputs = tiny.inputs(half.module)
    with torch.inference_mode():
        plain = half.module(**inputs)[0]
    recorded, observed = run(half, FIELDS, **inputs)
    assert torch.equal(plain, recorded)
    for seen in observed:
        assert seen.weights.dtype == seen.entropy.dtype == torch.float32


# -- ids and weights ---------------------------------------------------------------------------------------------------


def oracle(layer: Layer, out: Any, args: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights (T, k) from what the router returned, by a way of its own for each layout."""
    if layer.family.layout == "standard" and isinstance(out, tuple):
        return out[2].reshape(-1, layer.top_k), out[1].reshape(-1, layer.top_k)
    if layer.family.layout == "standard":  # dbrx returns logits only
        weights, ids = out.softmax(-1).topk(layer.top_k, dim=-1)
        return ids, weights / weights.sum(-1, keepdim=True)
    if layer.family.layout == "dense":
        weights, ids = out[1].topk(layer.top_k, dim=-1)
        return ids, weights.sigmoid()
    if layer.family.layout == "sorted":
        z, ids = out[4].topk(layer.top_k, dim=-1)
        return ids, z.softmax(-1)
    if layer.family.layout == "one-hot":
        p = out[2].softmax(-1).reshape(-1, layer.n_experts)
        return p.argmax(-1, keepdim=True), p.max(-1, keepdim=True).values
    keys = out.view(2, -1, out.shape[-1] // 2)
    z = (keys[0][:, :, None] + keys[1][:, None, :]).flatten(1)
    best, ids = z.topk(layer.top_k, dim=-1)
    return ids, best.softmax(-1)


@pytest.mark.parametrize("family", TRACED)
def test_ids_and_weights_are_the_models_own(family: str) -> None:
    made = model(family)
    returned: list[Any] = []
    handles = [
        layer.router.register_forward_hook(lambda _m, args, out: returned.append((out, args))) for layer in made.layers
    ]
    try:
        _, observed = run(made)
    finally:
        for handle in handles:
            handle.remove()
    for layer, seen, (out, args) in zip(made.layers, observed, returned, strict=True):
        ids, weights = oracle(layer, out, args)
        if layer.family.skips:
            ids = ids.masked_fill(weights == 0, -1)
        assert torch.equal(seen.experts.flatten(0, 1), ids)
        torch.testing.assert_close(seen.weights.flatten(0, 1), weights.float())


@pytest.mark.parametrize("experts", [2, 64, 300])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "llama4"])
@pytest.mark.parametrize("k", ["one", "two", "all"])
def test_expert_counts(family: str, experts: int, k: str) -> None:
    top_k = {"one": 1, "two": 2, "all": experts}[k]
    changes: dict[str, Any] = {"num_experts": experts, "num_experts_per_tok": top_k, "num_hidden_layers": 2}
    if family == "deepseek_v3":  # its groups' scores are sums of two experts' at least
        changes |= {"n_group": 1, "topk_group": 1}
    made = tiny.model(family, **changes)
    _, observed = run(made, FIELDS, **tiny.inputs(made.module, 1, 5))
    for layer, seen in zip(made.layers, observed, strict=True):
        assert (layer.n_experts, layer.top_k) == (experts, top_k)
        assert seen.experts.shape == (1, 5, top_k)
        assert seen.margin.isnan().all() == (top_k == experts)
        if top_k == experts:
            assert torch.equal(seen.experts.sort(-1).values, torch.arange(experts).expand(1, 5, experts))


@pytest.mark.parametrize("k", [1, tiny.EXPERTS])
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "ernie4_5_moe", "lfm2_moe", "minimax_m2", "granitemoe", "beam", "jetmoe"]
)
def test_one_expert_and_all_experts(family: str, k: int) -> None:
    changes = {"n_group": 1, "topk_group": 1} if family == "beam" else {}
    made = tiny.model(family, num_experts_per_tok=k, **changes)
    _, observed = run(made, FIELDS)
    for layer, seen in zip(made.layers, observed, strict=True):
        assert layer.top_k == k == seen.experts.shape[-1]
        assert seen.margin.isnan().all() == (k == tiny.EXPERTS)


def test_switch_drops_beyond_capacity() -> None:
    made = tiny.model("switch_transformers", expert_capacity=1)
    _, observed = run(made, FIELDS)
    assert any((seen.experts < 0).any() for seen in observed)
    for seen in observed:
        for row in seen.experts.squeeze(-1).tolist():
            kept = [expert for expert in row if expert >= 0]
            assert len(kept) == len(set(kept)) > 0
        dropped = seen.experts < 0
        assert (seen.weights[dropped] == 0).all() and (seen.norms[dropped] == 0).all()


def test_zaya_skips() -> None:
    made = tiny.model("zaya")
    for layer in made.layers:
        layer.router.balancing_biases[-1] = 0.2
    _, observed = run(made, FIELDS)
    skipped = torch.stack([seen.experts < 0 for seen in observed])
    assert 0 < skipped.sum() < skipped.numel()


def test_longcat_zero_computation_experts_return_their_input() -> None:
    made = model("longcat_flash")
    given: list[torch.Tensor] = []
    handles = [layer.experts.register_forward_pre_hook(lambda _m, args: given.append(args[0])) for layer in made.layers]
    _, observed = run(made, FIELDS)
    for handle in handles:
        handle.remove()
    seen_some = False
    for seen, hidden in zip(observed, given, strict=True):
        zero = seen.experts >= tiny.EXPERTS
        seen_some |= bool(zero.any())
        expected = hidden.norm(dim=-1).view(*zero.shape[:2], 1).expand_as(seen.norms)
        torch.testing.assert_close(seen.norms[zero], expected[zero])
    assert seen_some


# -- entropy, margin, logits -------------------------------------------------------------------------------------------


def log_scores(layer: Layer, z: np.ndarray) -> np.ndarray:
    if layer.scoring == "softmax":
        return z
    if layer.scoring == "sigmoid":
        return -np.logaddexp(0, -z)
    return 0.5 * np.log(np.logaddexp(0, z))


def softmax(z: np.ndarray) -> np.ndarray:
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> np.ndarray:
    z = x.detach().double().reshape(-1, x.shape[-1]).numpy() @ weight.detach().double().numpy().T
    return z if bias is None else z + bias.detach().double().numpy()


def gemma_input(router: Any, x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    x = x / (x.pow(2).mean(-1, keepdim=True) + router.eps).sqrt()
    return x * router.scale.double() * router.scalar_root_size


# family -> logits in float64 from the router's input
LOGITS: dict[str, Any] = {
    "olmoe": lambda r, x: linear(x, r.weight),
    "gpt_oss": lambda r, x: linear(x, r.weight, r.bias),
    "deepseek_v3": lambda r, x: linear(x, r.weight),
    "deepseek_v2": lambda r, x: linear(x, r.weight),
    "gemma4": lambda r, x: linear(gemma_input(r, x), r.proj.weight),
    "dbrx": lambda r, x: linear(x, r.layer.weight),
    "llama4": lambda r, x: linear(x, r.weight),
    "ernie4_5_moe": lambda r, x: linear(x, r.weight),
    "kolibri1": lambda r, x: linear(x, r.weight),
    "longcat_flash": lambda r, x: linear(x, r.classifier.weight),
    "muse_spark": lambda r, x: linear(x, r.weight) * r.output_multiplier,
    "laguna": lambda r, x: linear(x, r.weight),
    "inkling": lambda r, x: linear(x, r.weight)[:, : r.num_experts],
    "jetmoe": lambda r, x: linear(x, r.layer.weight),
    "phimoe": lambda r, x: linear(x, r.weight),
    "switch_transformers": lambda r, x: linear(x, r.classifier.weight),
    "afmoe": lambda r, x: linear(x, r.gate.weight),
    "hunyuan_v1_moe": lambda r, x: linear(x, r.wg.weight),
    "inkling2": lambda r, x: linear(x, r.weight),
    "mistral4": lambda r, x: linear(x, r.weight),
}


def grouped(scores: np.ndarray, router: Any, fill: float) -> np.ndarray:
    """Mask all but the best groups, a group's score being the sum of its two best."""
    groups = scores.reshape(len(scores), router.num_group, -1)
    rank = np.sort(groups, -1)[:, :, -2:].sum(-1)
    best = np.argsort(-rank, -1)[:, : router.topk_group]
    keep = np.zeros_like(rank, bool)
    np.put_along_axis(keep, best, True, -1)
    return np.where(keep[:, :, None], groups, fill).reshape(scores.shape)


def choice_scores(family: str, layer: Layer, z: np.ndarray, extra: tuple[Any, ...]) -> np.ndarray:
    """What the family's own top-k sees."""
    r: Any = layer.router
    s = np.exp(log_scores(layer, z))
    if family in ("olmoe", "dbrx", "deepseek_v2", "gemma4", "hunyuan_v1_moe", "switch_transformers"):
        return softmax(z)
    if family in ("gpt_oss", "llama4", "jetmoe", "phimoe"):
        return z
    if family == "deepseek_v3":
        return grouped(s + r.e_score_correction_bias.double().numpy(), r, -np.inf)
    if family == "mistral4":
        return grouped(softmax(z), r, 0.0)
    if family == "ernie4_5_moe":
        return softmax(z) + r.moe_statics.e_score_correction_bias.detach().double().numpy().reshape(1, -1)
    if family == "longcat_flash":
        return softmax(z) + r.e_score_correction_bias.double().numpy()
    if family == "kolibri1":
        return z + r.e_score_correction_bias.double().numpy()
    if family == "afmoe":
        return s + extra[0].detach().double().numpy()
    return s + r.e_score_correction_bias.detach().double().numpy()


@pytest.mark.parametrize("family", list(LOGITS))
def test_logits_entropy_and_margin_in_float64(family: str) -> None:
    made = model(family)
    given: list[tuple[Any, ...]] = []
    handles = [layer.router.register_forward_pre_hook(lambda _m, args: given.append(args)) for layer in made.layers]
    _, observed = run(made, FIELDS)
    for handle in handles:
        handle.remove()
    for layer, seen, (x, *extra) in zip(made.layers, observed, given, strict=True):
        z = LOGITS[family](layer.router, x)
        np.testing.assert_allclose(seen.logits.flatten(0, 1).numpy(), z, rtol=2e-4, atol=2e-4)
        p = softmax(log_scores(layer, z))
        np.testing.assert_allclose(seen.probabilities.flatten(0, 1).numpy(), p, atol=2e-4)
        np.testing.assert_allclose(seen.entropy.flatten().numpy(), -(p * np.log(p)).sum(-1), atol=1e-3)
        ranked = -np.sort(-choice_scores(family, layer, z, tuple(extra)), -1)
        gap = ranked[:, layer.top_k - 1] - ranked[:, layer.top_k]
        np.testing.assert_allclose(seen.margin.flatten().numpy(), gap, atol=1e-3)


def test_entropy_survives_scores_that_underflow() -> None:
    made = tiny.model("deepseek_v3")
    for layer in made.layers:
        layer.router.weight.data *= 1e4
    _, observed = run(made, ["entropy", "probabilities"])
    assert all(seen.entropy.isfinite().all() and seen.probabilities.isfinite().all() for seen in observed)


def test_deepseek_v4_scores_and_hash_layers() -> None:
    made = model("deepseek_v4")
        inputs = tiny.inputs(made.module)
    _, observed = run(made, FIELDS, **inputs)
    for layer, seen in zip(made.layers, observed, strict=True):
        if layer.scoring == "hash":
            table: Any = layer.router.tid2eid
            assert torch.equal(seen.experts, table[inputs["input_ids"]])
            continue
        z = seen.logits.double().numpy()
        s = np.sqrt(np.logaddexp(0, z))
        p = s / s.sum(-1, keepdims=True)
        np.testing.assert_allclose(seen.entropy.numpy(), -(p * np.log(p)).sum(-1), atol=1e-4)


# -- norms -------------------------------------------------------------------------------------------------------------


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


# -- padding, generation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", [name for name in TRACED if name not in BATCH_DEPENDENT])
def test_padding_leaves_real_tokens_routing(family: str, side: str) -> None:
    made = model(family)
    if made.module.config.is_encoder_decoder and side == "left":
        pytest.skip("encoders with relative positions are padded on the right")
    if family == "deepseek_v4" and side == "left":
        pytest.skip("it compresses its cache in windows that are counted from the padded start")
    full = tiny.inputs(made.module, 2, 12)["input_ids"]
    short = 8
    real = slice(12 - short, None) if side == "left" else slice(0, short)
    padded, mask = full.clone(), torch.ones_like(full)
    padded[1] = 0
    padded[1, real] = full[1, :short]
    mask[1] = 0
    mask[1, real] = 1
    inputs: dict[str, Any] = {"input_ids": padded, "attention_mask": mask}
    if "position_ids" in inspect.signature(made.module.forward).parameters and family not in ("glm4v_moe", "nllb_moe"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    if made.module.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = full[:, :5]
    alone: dict[str, Any] = {"input_ids": full[1:, :short]}
    if made.module.config.is_encoder_decoder:
        alone["decoder_input_ids"] = full[1:, :5]
    _, together = run(made, **inputs)
    _, single = run(made, **alone)
    for layer, batch, one in zip(made.layers, together, single, strict=True):
        where = slice(None) if layer.stack == "decoder" and made.module.config.is_encoder_decoder else real
        got, got_weights = batch.experts[1, where], batch.weights[1, where]
        same = (got.sort(-1).values == one.experts[0].sort(-1).values).all(-1)
        assert same.all(), f"{layer.name}: {int((~same).sum())} of {len(same)} tokens differ"
        torch.testing.assert_close(got_weights.sort(-1).values, one.weights[0].sort(-1).values, rtol=1e-3, atol=1e-4)


GENERATING = [
    name for name in TRACED if name not in BATCH_DEPENDENT and "generate" in dir(tiny._class_of(tiny.config(name)))
]


@pytest.mark.parametrize("family", GENERATING)
def test_generation_step_by_step_equals_one_forward(family: str) -> None:
    made = model(family)
    ids = tiny.inputs(made.module, 2, 7)["input_ids"]
    with torch.inference_mode(), Recorder(made) as recorder:
        out = made.module.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
        steps = recorder.take()
        inputs = {"input_ids": out[:, :-1]}
        if made.module.config.is_encoder_decoder:
            inputs = {"input_ids": ids, "decoder_input_ids": out[:, :-1]}
        made.module(**inputs)
        (full,) = recorder.take()
    assert len(steps) == 4
    decoders = [layer for layer in made.layers if layer.stack == "decoder"]
    for layer in decoders:
        parts = [step[layer.index if len(step) == len(made.layers) else decoders.index(layer)] for step in steps]
        assert [part.experts.shape[1] for part in parts][1:] == [1, 1, 1]
        assert torch.equal(
            torch.cat([part.experts for part in parts], 1).sort(-1).values, full[layer.index].experts.sort(-1).values
        )
        torch.testing.assert_close(
            torch.cat([part.weights for part in parts], 1).sort(-1).values,
            full[layer.index].weights.sort(-1).values,
            rtol=1e-3,
            atol=1e-4,
        )


# -- the context manager -----------------------------------------------------------------------------------------------


def test_hooks_are_removed_after_exceptions() -> None:
    made = tiny.model("olmoe")
    before = hooks(made.module)
    with pytest.raises(ZeroDivisionError), Recorder(made, FIELDS):
        assert hooks(made.module) > before
        raise ZeroDivisionError
    assert hooks(made.module) == before

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = made.layers[1].experts.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run(made, FIELDS)
    handle.remove()
    assert hooks(made.module) == before
    run(made, FIELDS)


def test_a_failed_forward_can_be_cleared_and_tried_again() -> None:
    made = tiny.model("olmoe")
    inputs = tiny.inputs(made.module)
    _, expected = run(made, FIELDS, **inputs)
    with torch.inference_mode(), Recorder(made, FIELDS) as recorder:
        handle = made.layers[1].router.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.module(**inputs)
        handle.remove()
        recorder.clear()
        made.module(**inputs)
        (observed,) = recorder.take()
    for a, b in zip(expected, observed, strict=True):
        assert torch.equal(a.experts, b.experts) and torch.equal(a.entropy, b.entropy)


def test_nested_recorders() -> None:
    made = model("dbrx")
    inputs = tiny.inputs(made.module)
    with torch.inference_mode(), Recorder(made, FIELDS) as outer:
        with Recorder(made, FIELDS) as inner:
            made.module(**inputs)
        made.module(**inputs)
    assert len(outer.take()) == 2 and len(inner.take()) == 1


def test_several_forwards_and_takes() -> None:
    made = model("qwen3_moe")
    with torch.inference_mode(), Recorder(made) as recorder:
        for length in (3, 5):
            made.module(**tiny.inputs(made.module, 1, length))
        first = recorder.take()
        made.module(**tiny.inputs(made.module, 2, 4))
        second = recorder.take()
    assert [step[0].experts.shape[:2] for step in first] == [(1, 3), (1, 5)]
    assert [step[0].experts.shape[:2] for step in second] == [(2, 4)]


def test_gradients_flow_and_records_are_detached() -> None:
    made = tiny.model("mixtral")
    with Recorder(made, FIELDS) as recorder:
        made.module(**tiny.inputs(made.module))[0].sum().backward()
    (observed,) = recorder.take()
    assert made.layers[0].router.weight.grad is not None
    assert not any(getattr(seen, name).requires_grad for seen in observed for name in ("experts", *FIELDS))


def test_only_what_was_asked_for() -> None:
    made = model("olmoe")
    _, observed = run(made, ())
    assert all(getattr(observed[0], name) is None for name in FIELDS)
    for name in FIELDS:
        _, observed = run(made, [name])
        assert [field for field in FIELDS if getattr(observed[0], field) is not None] == [name]


def test_edited_routing_is_what_is_recorded() -> None:
    made = model("olmoe")

    def halve(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return args[0], args[1], args[2] * 0.5

    _, plain = run(made)
    handle = made.layers[0].experts.register_forward_pre_hook(halve)
    _, edited = run(made)
    handle.remove()
    assert torch.equal(edited[0].weights, plain[0].weights * 0.5)


# -- what must not pass silently ---------------------------------------------------------------------------------------


def test_unknown_field() -> None:
    with pytest.raises(InputError, match="can't record colour: choose from ids, weights"):
        Recorder(model("olmoe"), ["colour"])


def test_nothing_seen() -> None:
    with Recorder(model("olmoe")) as recorder:
        pass
    with pytest.raises(RunError, match="no router was seen"):
        recorder.take()


def test_a_bypassed_layer() -> None:
    made = tiny.model("olmoe")
    experts: Any = made.layers[1].experts
    made.layers[1].block.forward = lambda x: x + experts.act_fn(x)
    with pytest.raises(RunError, match=r"1 of 3 routers saw nothing .* model.layers.1.mlp.gate"):
        run(made)


def test_repeated_ids() -> None:
    made = tiny.model("deepseek_v4")
    for layer in made.layers:
        if layer.scoring == "hash":
            layer.router.tid2eid.zero_()
    with pytest.raises(RunError, match="the same expert twice"):
        run(made)


def test_all_zero_weights() -> None:
    made = model("olmoe")
    handle = made.layers[0].experts.register_forward_pre_hook(lambda _m, a: (a[0], a[1], a[2] * 0))
    with pytest.raises(RunError, match="every expert the weight 0"):
        run(made)
    handle.remove()


def test_a_subset_of_tokens_is_refused() -> None:
    made = model("ernie4_5_vl_moe")
    inputs = tiny.inputs(made.module)
    image = torch.zeros_like(inputs["input_ids"])
    image[:, 2:5] = 1
    with pytest.raises(RunError, match=r"routed 12 of 18 tokens .* Trace text without images"):
        run(made, **inputs, moe_mm_token_type_ids=image)


def test_margin_without_a_visible_selection() -> None:
    made = tiny.model("olmoe")
    router: Any = made.layers[0].router

    def sorted_choice(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        z = nn.functional.linear(x.reshape(-1, x.shape[-1]), router.weight)
        p, ids = z.softmax(-1).sort(-1, descending=True)
        return z, p[:, : router.top_k], ids[:, : router.top_k]

    router.forward = sorted_choice
    run(made)
    with pytest.raises(RunError, match="without a topk that can be seen"):
        run(made, ["margin"])


def test_unknown_scoring_function() -> None:
    made = tiny.model("deepseek_v4", scoring_func="gelu")
    run(made)
    with pytest.raises(InputError, match="'gelu', whose probabilities aren't known"):
        Recorder(made, ["entropy"])
