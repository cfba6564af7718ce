"""Run a model's routers by fused code: `with fused_routing(model): …`.

A covered router keeps its own linear layer; what follows it is `workbench_kernels.route`, which gives ids, weights,
entropy and margin at once. What the router returns is what the family's code returns: the same ids (but for exact ties
on a GPU, see there) and weights that agree to the precision of their dtype. A `Recorder` takes entropy and margin from
it, and interventions that choose experts go through its arguments. Where an intervention says more than these can
(numbers of experts, replays, several scopes), that layer is routed by the family's own code and hooks, as every layer
of a family that isn't covered is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workbench.edits import Plan, Where, edit_logits
from workbench.errors import InputError
from workbench.hooked import FUSED, INTERVENED, RECORDED
from workbench.intervening import replaced
from workbench.interventions import Force
from workbench.layers import Layer, family_of
from workbench.models import Model
from workbench_kernels.route import Gating, Routed, route

Backend = Literal["auto", "torch", "triton"]


@dataclass(frozen=True)
class Rule:
    """How one family's router is run by fused code.

    gating      from the router
    linear      of router and hidden states (T, H): what its linear layer returns, (T, E)
    after       of router and that: the logits that it returns
    correction  where the layer has its correction bias, of any shape with E elements; None: it has none
    hidden      whether weights are in the dtype of the hidden states, whatever that of the logits is
    """

    gating: Callable[[Any], Gating]
    linear: Callable[[Any, Tensor], Tensor]
    after: Callable[[Any, Tensor], Tensor] = lambda _, z: z
    correction: Callable[[Any], Tensor | None] = lambda _: None
    hidden: bool = False


def gating_of(layer: Layer) -> tuple[Gating, Tensor | None] | None:
    """The gating of a layer's router and its correction bias (E,), if it has one; None where it isn't covered."""
    rule = RULES.get(family_of(layer.router))
    if rule is None or layer.scoring not in ("softmax", "sigmoid", "sqrt-softplus"):
        return None
    return rule.gating(layer.router), _correction(rule, layer)


def _correction(rule: Rule, layer: Layer) -> Tensor | None:
    found = rule.correction(layer)
    return None if found is None else found.flatten()


@contextmanager
def fused_routing(model: Model, backend: Backend = "auto") -> Iterator[tuple[Layer, ...]]:
    """Route by fused code inside the block; yields the layers that are. `backend` is that of `route`.

    A router whose `forward` was replaced already (by what offloads weights, say) is left as it is.
    This has to be entered before recorders of the model and before `intervene`, and only once: InputError otherwise.
    """
    module = model.module
    if module in INTERVENED or RECORDED.get(module):
        raise InputError("the model is being recorded or intervened on already: enter fused_routing first.")
    if any(layer.router in FUSED for layer in model.layers):
        raise InputError("the model is being routed by fused code already.")
    covered = tuple(
        layer for layer in model.layers if gating_of(layer) is not None and "forward" not in vars(layer.router)
    )
    with ExitStack() as held:
        for layer in covered:
            fused = Fused(layer, backend)
            FUSED[layer.router] = fused
            held.callback(FUSED.pop, layer.router, None)
            held.enter_context(replaced(layer.router, "forward", fused.forward))
        yield covered


class Fused:
    """Fused code that runs in the place of one router's own.

    routed  what it did when the router ran last; None where the family's own code ran
    wanted  how many recorders want entropy or margin, which torch leaves out otherwise
    """

    def __init__(self, layer: Layer, backend: Backend) -> None:
        found = gating_of(layer)
        assert found is not None
        self._layer, self._gating = layer, found[0]
        self._backend: Backend = backend
        self._rule = RULES[family_of(layer.router)]
        self._own: Callable[..., Any] = layer.router.forward
        self.routed: Routed | None = None
        self.wanted = 0

    def forward(self, _own: Callable[..., Any], hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """What the router returns; further arguments are the correction bias, which is known."""
        return self._route(hidden_states, None, lambda _: None)

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """The family's code, for what fused code can't do."""
        self.routed = None
        return self._own(*args, **kwargs)

    def edited(self, plan: Plan, where: Where, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """`forward` under the first two stages of a plan that it `takes`."""
        return self._route(hidden_states, plan, where)

    def takes(self, plan: Plan) -> bool:
        """Whether the arguments of `route` say all that the plan does to the selection."""
        if plan.counts or plan.top_p or plan.replay is not None or len({edit.scope for edit in plan.choice}) > 1:
            return False
        # These families also take the weights of experts outside of their groups for 0.
        return not (plan.choice and self._gating.groups > 1 and self._gating.group_best == 1)

    def _route(self, hidden: Tensor, plan: Plan | None, where: Where) -> tuple[Tensor, ...]:
        layer, rule, router = self._layer, self._rule, self._layer.router
        z = rule.linear(router, hidden.reshape(-1, hidden.shape[-1]))
        edits: dict[str, Any] = {}
        if plan is not None and plan.logits:
            z = edit_logits(plan, z, where)  # in torch: edited logits are returned, and recorded
        if plan is not None and plan.choice:
            edits = _choice(plan, z.device) | {"rows": where(plan.choice[0].scope)}
        logits = rule.after(router, z)
        self.routed = route(
            logits,
            layer.top_k,
            self._gating,
            correction=_correction(rule, layer),
            statistics=self.wanted > 0,
            backend=self._backend,
            **edits,
        )
        weights = self.routed.weights.to(hidden.dtype) if rule.hidden else self.routed.weights
        return logits, weights, self.routed.experts


def _choice(plan: Plan, device: Any) -> dict[str, Any]:
    """Which experts must be selected and which can't be, bool (E); of two that contradict each other the later wins."""
    forced = torch.zeros(plan.layer.n_experts, dtype=torch.bool, device=device)
    masked = torch.zeros_like(forced)
    for edit in plan.choice:
        experts = list(edit.experts)
        forced[experts], masked[experts] = isinstance(edit, Force), not isinstance(edit, Force)
    return {"forced": forced, "masked": masked}


# -- the families ------------------------------------------------------------------------------------------------------


def _linear(router: Any, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden, router.weight, getattr(router, "bias", None))


def _in_float32(router: Any, hidden: Tensor) -> Tensor:
    bias = getattr(router, "bias", None)
    return nn.functional.linear(hidden.float(), router.weight.float(), None if bias is None else bias.float())


def _in_dtype_of_weight(router: Any, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden.to(router.weight.dtype), router.weight)


def _hunyuan(router: Any, hidden: Tensor) -> Tensor:
    return router.wg(hidden.float() if router.wg.weight.dtype == torch.float32 else hidden)


def _longcat(router: Any, hidden: Tensor) -> Tensor:
    return nn.functional.linear(hidden.float(), router.classifier.weight.float())


def _to_float32(_router: Any, z: Tensor) -> Tensor:
    return z.float()


def _capped(router: Any, z: Tensor) -> Tensor:
    cap = router.router_logit_softcapping
    return torch.tanh(z.float() / cap) * cap if cap > 0 else z.float()


def _of_router(layer: Layer) -> Tensor:
    return layer.router.e_score_correction_bias  # type: ignore[return-value]


def _of_block(layer: Layer) -> Tensor | None:
    bias = getattr(layer.block, "expert_bias", None)
    return bias if bias is not None else getattr(layer.block, "e_score_correction_bias", None)


def _softmax(router: Any) -> Gating:
    return Gating(renormalise=router.norm_topk_prob)


def _sigmoid_in_groups(router: Any, outside: float = -torch.inf, ordered: bool = False) -> Gating:
    return Gating(
        "sigmoid",
        renormalise=router.norm_topk_prob,
        epsilon=1e-20,
        scale=getattr(router, "routed_scaling_factor", 1.0),  # beam scales what its experts return
        groups=router.num_group or 1,
        kept_groups=router.topk_group or 1,
        outside=outside,
        ordered=ordered,
    )


def _deepseek_v2(router: Any) -> Gating:
    grouped = router.topk_method != "greedy"
    return Gating(
        scale=router.routed_scaling_factor,
        groups=router.num_group if grouped else 1,
        kept_groups=router.topk_group if grouped else 1,
        group_best=1,
        outside=0.0,
        ordered=False,
    )


def _mistral(router: Any, rounded: bool) -> Gating:
    return Gating(
        renormalise=getattr(router, "norm_topk_prob", True),
        epsilon=1e-20,
        scale=router.routed_scaling_factor,
        groups=router.num_group,
        kept_groups=router.topk_group,
        outside=0.0,
        rounded=rounded,
        ordered=False,
    )


def _cohere2(router: Any) -> Gating:
    sigmoid = router.expert_selection_fn == "sigmoid"
    return Gating(router.expert_selection_fn, "logits", renormalise=sigmoid and router.norm_topk_prob)


def _deepseek_v4(router: Any, rounded: bool) -> Gating:
    return Gating(
        "sigmoid" if isinstance(router.score_fn, nn.Sigmoid) else "sqrt-softplus",
        renormalise=True,
        epsilon=1e-20,
        scale=router.routed_scaling_factor,
        rounded=rounded,
        ordered=False,
    )


def _lfm2(router: Any) -> Gating:
    scale = router.routed_scaling_factor
    return Gating("sigmoid", renormalise=router.norm_topk_prob, epsilon=1e-6, scale=scale, rounded=True)


_NORMALISED_SIGMOID = partial(Gating, "sigmoid", renormalise=True)
_SOFTMAX_FLAG = Rule(_softmax, _linear)
_SIGMOID_GROUPS = Rule(_sigmoid_in_groups, _in_float32, correction=_of_router)
_DEEPSEEK_V2 = Rule(_deepseek_v2, _in_float32)
_TOPK_SOFTMAX = Rule(lambda _: Gating(select="logits"), _linear)
_GRANITE = Rule(lambda _: Gating(select="logits"), _linear, after=_to_float32, hidden=True)
_MIXTRAL = Rule(lambda _: Gating(renormalise=True, weights="float32"), _linear)
_QWEN_VL = Rule(lambda _: Gating(renormalise=True), _linear)
_ERNIE = Rule(
    lambda router: Gating(renormalise=True, at_least=router.norm_min),
    _in_float32,
    correction=lambda layer: layer.router.moe_statics.e_score_correction_bias,
    hidden=True,
)
_MINIMAX_M3 = Rule(
    lambda _: _NORMALISED_SIGMOID(weights="float32", ordered=False), _in_dtype_of_weight, correction=_of_router
)

RULES: dict[str, Rule] = {
    "afmoe": Rule(
        lambda router: _NORMALISED_SIGMOID(epsilon=1e-20, scale=router.route_scale),
        lambda router, hidden: router.gate(hidden),
        after=_to_float32,
        correction=_of_block,
    ),
    "aria": _TOPK_SOFTMAX,
    "axk2": Rule(partial(_sigmoid_in_groups, outside=0.0), _in_float32, correction=_of_router),
    "beam": Rule(partial(_sigmoid_in_groups, ordered=True), _in_float32, correction=_of_router),
    "cohere2_moe": Rule(_cohere2, _linear),
    "deepseek_v4": Rule(partial(_deepseek_v4, rounded=True), _linear, correction=_of_router),
    "ernie4_5_moe": _ERNIE,
    "ernie4_5_vl_moe": _ERNIE,
    "flint": Rule(lambda router: Gating("sigmoid", renormalise=router.norm_topk_prob), _in_float32),
    "gpt_oss": _TOPK_SOFTMAX,
    "hunyuan_v1_moe": Rule(lambda _: Gating(renormalise=True), _hunyuan),
    "hy_v3": Rule(
        lambda router: _NORMALISED_SIGMOID(epsilon=1e-20, scale=router.router_scaling_factor, ordered=False),
        _in_float32,
        correction=_of_block,
    ),
    "inkling2": Rule(partial(_deepseek_v4, rounded=False), _in_float32, correction=_of_router),
    "jamba": Rule(lambda _: Gating(), _linear),
    "kolibri1": Rule(
        lambda router: Gating("sigmoid", "logits", renormalise=router.norm_topk_prob),
        _in_float32,
        correction=_of_router,
    ),
    "laguna": Rule(lambda _: _NORMALISED_SIGMOID(), _linear, after=_capped, correction=_of_router, hidden=True),
    "lfm2_moe": Rule(_lfm2, _linear, correction=_of_block),
    "longcat_flash": Rule(
        lambda router: Gating(scale=router.routed_scaling_factor, ordered=False), _longcat, correction=_of_router
    ),
    "minimax": _MIXTRAL,
    "minimax_m2": Rule(_MINIMAX_M3.gating, _in_dtype_of_weight, correction=_of_block),
    "minimax_m3_vl": _MINIMAX_M3,
    "mistral4": Rule(partial(_mistral, rounded=True), _linear),
    "mistral_large4": Rule(partial(_mistral, rounded=False), _in_float32),
    "mixtral": _MIXTRAL,
    "muse_spark": Rule(
        lambda router: _NORMALISED_SIGMOID(
            epsilon=router.norm_topk_prob_eps, scale=router.routed_scaling_factor, ordered=False
        ),
        _in_float32,
        after=lambda router, z: z * router.output_multiplier,
        correction=_of_router,
    ),
    "openai_privacy_filter": Rule(lambda router: Gating(select="logits", scale=1 / router.top_k), _in_float32),
    "qwen3_5_moe": _QWEN_VL,
    "qwen3_vl_moe": _QWEN_VL,
    "step3p7": _MINIMAX_M3,
}
RULES |= dict.fromkeys(("deepseek_ocr2", "deepseek_v2", "unlimited_ocr"), _DEEPSEEK_V2)
RULES |= dict.fromkeys(("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared"), _GRANITE)
RULES |= dict.fromkeys(
    ("flex_olmo", "mellum", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe", "qwen4_exp"),
    _SOFTMAX_FLAG,
)
RULES |= dict.fromkeys(
    (
        "axk1", "bailing_hybrid", "deepseek_v3", "deepseek_v32", "dots1", "dots3_note", "exaone_moe", "glm4_moe",
        "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa", "hy_v4", "kimi_linear", "mimo_v2_flash", "nemotron_h",
        "solar_open",
    ),
    _SIGMOID_GROUPS,
)  # fmt: skip
