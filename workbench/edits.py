"""What interventions do to the tensors of one router, stage by stage; see `workbench.interventions` for the stages.

A `Plan` is what the interventions say about one layer. `Choosing` carries out its first two stages while the router's
own code runs: it changes what the router's linear layer returns and what its top-k sees and returns, and leaves the
rest to the family. `weigh` is the third stage.

Shapes: T tokens of a pass (batch times sequence, padding included), E experts, k selected. A scope is a bool (T,), or
None for all tokens; `where` gives it by the text of the scope.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from workbench.interventions import (
    Ablate,
    Bias,
    Delta,
    Forbid,
    Force,
    Intervention,
    Remix,
    Replay,
    Scale,
    SetTopK,
    TopP,
)
from workbench.layers import Layer
from workbench.replay import Recorded
from workbench.scores import log_probabilities
from workbench.weights import normalises

Where = Callable[[str], Tensor | None]
"""Text of a scope -> bool (T,), or None for all tokens of the pass."""
Recordings = Callable[[Replay], Recorded]
"""A replay -> what it has for the tokens of the pass at the layer."""

SUNK = 1e4
"""How far below the smallest logit that of an ablated expert is put: exp(-1e4) is 0 in every precision."""
SUNK_SOFTPLUS = 60.0
"""The same for sqrt-softplus scores, whose gradient is NaN where the score underflows."""
_LOGIT_ORDER = (Remix, Delta, Bias)


@dataclass(frozen=True, eq=False)
class Plan:
    """The interventions on one layer, those of each stage in the order in which they act.

    top_k  most experts that a token can have under them; classes: width of the router's logits, E or more
    """

    layer: Layer
    classes: int
    logits: tuple[Intervention, ...]
    choice: tuple[Ablate | Force | Forbid, ...]
    counts: tuple[SetTopK, ...]
    top_p: tuple[TopP, ...]
    replay: Replay | None
    weights: tuple[Scale | Ablate, ...]
    top_k: int

    @property
    def selects(self) -> bool:
        """Whether the family's selection is changed itself."""
        return bool(self.choice or self.counts or self.top_p or self.replay)

    @property
    def uniform(self) -> SetTopK | None:
        """What every token's number of experts is set to, if it is the same for all: then the family normalises."""
        last = self.counts[-1] if self.counts else None
        return last if last is not None and last.scope == "all" and not self.top_p else None

    @property
    def cuts(self) -> bool:
        """Whether tokens differ in how many of the selected experts they keep."""
        return bool(self.top_p) or (bool(self.counts) and self.uniform is None)

    @property
    def zeroes(self) -> bool:
        """Whether a weight may be set to 0: the token then has no such expert."""
        return self.cuts or self.replay is not None or any(_zeroes(edit) for edit in self.weights)


def _zeroes(edit: Scale | Ablate) -> bool:
    return isinstance(edit, Ablate) or edit.factor == 0


def plan(layer: Layer, edits: Sequence[Intervention]) -> Plan:
    """The stages of a layer from the interventions on it, in the order of their list."""
    on_logits = [edit for edit in edits if isinstance(edit, (Remix, Delta, Bias, Forbid)) or _level(edit) == "logits"]
    on_logits.sort(key=lambda edit: _LOGIT_ORDER.index(type(edit)) if type(edit) in _LOGIT_ORDER else 3)
    counts = tuple(edit for edit in edits if isinstance(edit, SetTopK))
    top_p = tuple(edit for edit in edits if isinstance(edit, TopP))
    plain = all(edit.scope != "all" for edit in counts)  # some tokens keep the model's k
    most = max([edit.k for edit in counts] + [layer.top_k] * plain)
    for edit in top_p:
        most = max(most if edit.scope != "all" else 0, edit.at_most or (most if counts else selectable(layer)))
    return Plan(
        layer=layer,
        classes=_classes(layer),
        logits=tuple(on_logits),
        choice=tuple(
            edit
            for edit in edits
            if isinstance(edit, Force | Forbid) or (isinstance(edit, Ablate) and edit.level != "output")
        ),
        counts=counts,
        top_p=top_p,
        replay=next((edit for edit in reversed(edits) if isinstance(edit, Replay)), None),
        weights=tuple(
            edit for edit in edits if isinstance(edit, Scale) or (isinstance(edit, Ablate) and edit.level == "output")
        ),
        top_k=most,
    )


def _level(edit: Intervention) -> str | None:
    return edit.level if isinstance(edit, (Ablate, Force)) else None


def selectable(layer: Layer) -> int:
    """How many experts a token can select at most: those of the groups that it may choose."""
    if "groups" not in layer.gating:
        return layer.n_experts
    router: Any = layer.router
    return layer.n_experts // router.num_group * router.topk_group


def _classes(layer: Layer) -> int:
    """Width of what the router's linear layer returns: shared experts and a skip may be scored beside the experts."""
    widths = (layer.n_experts, layer.n_experts + 1, layer.n_experts + layer.n_shared)
    rows = [p.shape[0] for p in layer.router.parameters() if p.dim() == 2 and p.shape[0] in widths]
    return max(rows, default=layer.n_experts)


# -- before the selection ----------------------------------------------------------------------------------------------


def edit_logits(plan: Plan, z: Tensor, where: Where) -> Tensor:
    """Router logits (…, classes) under the first stage; those of shared experts and skips stay."""
    shape, n_experts = z.shape, plan.layer.n_experts
    z = z.reshape(-1, shape[-1])
    routed, others = z[:, :n_experts].clone(), z[:, n_experts:]
    for edit in plan.logits:
        routed = _on_logits(plan.layer, edit, routed, where(edit.scope))
    return torch.cat([routed, others], -1).view(shape) if others.shape[-1] else routed.view(shape)


def _on_logits(layer: Layer, edit: Intervention, z: Tensor, scope: Tensor | None) -> Tensor:
    """(T, E) under one edit, z changed in place where that is simple."""
    if isinstance(edit, Remix):
        new = _remixed(layer, z, _tensor(edit.target, z), edit.alpha)
        return new if scope is None else torch.where(scope[:, None], new, z)
    if isinstance(edit, Delta):
        added = edit.strength * _tensor(edit.values, z).to(z.dtype)
        return z + (added if scope is None else torch.where(scope[:, None], added, 0))
    experts = list(edit.experts)  # type: ignore[attr-defined]
    if isinstance(edit, Bias):
        size = z.std(-1, keepdim=True, correction=0) if edit.unit == "std" else 1.0
        new = z[:, experts] + edit.strength * size
    elif isinstance(edit, Force):
        new = (z.max(-1, keepdim=True).values + edit.margin).expand(-1, len(experts))
    else:
        sunk = SUNK_SOFTPLUS if layer.scoring == "sqrt-softplus" else SUNK
        depth = edit.margin if isinstance(edit, Forbid) else sunk
        new = (z.min(-1, keepdim=True).values - depth).expand(-1, len(experts))
    z[:, experts] = new if scope is None else torch.where(scope[:, None], new, z[:, experts])
    return z


def _tensor(values: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32, device=like.device)


def _remixed(layer: Layer, z: Tensor, target: Tensor, alpha: float) -> Tensor:
    """Logits whose probabilities are alpha · p + (1 - alpha) · target.

    Their scores sum to what they did, or, since a sigmoid stays below 1, to as much of it as they can.
    """
    log_p = log_probabilities(z.float(), layer.scoring)
    mixed = alpha * log_p.exp() + (1 - alpha) * target / target.sum()
    mixed = mixed.clamp_min(torch.finfo(torch.float32).tiny)
    if layer.scoring == "softmax":
        new = mixed.log() + z.float().logsumexp(-1, keepdim=True)
    elif layer.scoring == "sigmoid":
        most = (1 - 1e-4) / mixed.max(-1, keepdim=True).values
        new = (mixed * z.float().sigmoid().sum(-1, keepdim=True).minimum(most)).logit()
    else:  # sqrt-softplus: the score squared is softplus(z)
        total = torch.nn.functional.softplus(z.float()).sqrt().sum(-1, keepdim=True)
        squared = (mixed * total).square()
        new = torch.where(squared > 20, squared, squared.expm1().clamp_min(1e-37).log())
    return new.to(z.dtype)


class Choosing(TorchFunctionMode):
    """Active while a router runs: edits its logits where its linear layer returns them, and its own selection."""

    def __init__(self, plan: Plan, where: Where, recorded: Recordings) -> None:
        super().__init__()
        self._plan, self._where, self._recorded = plan, where, recorded
        self._groups = "groups" in plan.layer.gating
        hashed = plan.layer.scoring == "hash"
        selects = plan.layer.family.selects
        self._selecting = (
            {"gather"} if hashed else {selects, "max"} if self._groups or selects == "argmax" else {selects}
        )
        self._chosen = 0  # selecting calls seen: sparsemixer selects one expert after the other
        self._before_groups: Tensor | None = None  # scores (T, E) before those of other groups were masked
        self.logits: Tensor | None = None
        self.selected = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in self._selecting and self._plan.selects and isinstance(args[0] if args else None, Tensor):
            x, experts = args[0], self._plan.layer.n_experts
            if self._groups and x.dim() == 3 and x.shape[1] * x.shape[2] == experts:
                self._before_groups = x.reshape(-1, experts)
                return func(self._edited(x, finite=True), *args[1:], **kwargs)
            if x.shape[-1] in (experts, self._plan.classes) and not (self._groups and x.dim() == 3):
                self.selected = True
                return self._select(name, func, x, args[1:], kwargs)
        out = func(*args, **kwargs)
        if name == "linear" and self.logits is None and out.shape[-1] == self._plan.classes:
            self.logits = out = edit_logits(self._plan, out, self._where) if self._plan.logits else out
        return out

    def _select(self, name: str, func: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The family's selecting call with edited scores; it returns values of the scores as they were."""
        if name == "gather":
            ids = args[1] if len(args) > 1 else kwargs["index"]
            ids.copy_(self._rehashed(x, ids))  # in place: the router returns this tensor
            return func(x, *args, **kwargs)
        edited = self._edited(x, sequential=name == "max")
        if name == "topk":
            k = kwargs.pop("k") if "k" in kwargs else args[0]
            first, n = self.ranks(k)
            kwargs["sorted"] = kwargs.get("sorted", True) or n != k or first > 0 or self._plan.cuts
            if self._before_groups is not None and self._plan.choice:
                edited = self._filled(x, edited, first + n)
            ids = func(edited, first + n, *args[1:], **kwargs).indices[..., first:]
        else:
            ids = func(edited, *args, **kwargs)
            ids = ids if name == "argmax" else ids.indices
        wide = ids if ids.dim() == x.dim() else ids.unsqueeze(-1)
        wide = self._replayed(wide)
        self._chosen += 1
        ids, values = wide.view(ids.shape), x.gather(-1, wide).view(ids.shape)
        if name == "argmax":
            return ids
        return (torch.return_types.topk if name == "topk" else torch.return_types.max)((values, ids))

    def ranks(self, k: int) -> tuple[int, int]:
        """Ranks to select: how many to leave out, and how many then."""
        uniform = self._plan.uniform
        if uniform is not None:
            return uniform.first - 1, uniform.k
        if not self._plan.cuts:
            return 0, k
        reach = max([edit.first - 1 + edit.k for edit in self._plan.counts] + [self._plan.top_k, k])
        return 0, reach

    def _edited(self, x: Tensor, *, finite: bool = False, sequential: bool = False) -> Tensor:
        """Scores as the selection is to see them: (…, E), or (T, G, E/G) where groups are scored.

        finite      for scores of groups, which are summed: no infinities
        sequential  a score of -inf is an expert selected before, not one of a group that was left out
        """
        grouped = x.dim() == 3 and finite
        flat = x.reshape(-1, self._plan.layer.n_experts if grouped else x.shape[-1])
        big = torch.finfo(x.dtype).max / 16 if finite else torch.inf
        edited = flat.clone() if sequential else flat.clamp_min(torch.finfo(x.dtype).min / 8)
        for edit in self._plan.choice:
            experts, scope = list(edit.experts), self._where(edit.scope)
            new = torch.full_like(edited[:, experts], big if isinstance(edit, Force) else -big)
            if sequential:
                new = torch.where(flat[:, experts] == -torch.inf, -torch.inf, new)
            edited[:, experts] = new if scope is None else torch.where(scope[:, None], new, edited[:, experts])
        return edited.view(x.shape)

    def _filled(self, x: Tensor, edited: Tensor, k: int) -> Tensor:
        """Where the groups of a token have fewer than k experts left, the best of the other groups are the next."""
        before = self._before_groups
        assert before is not None
        outside = (x != before) & edited.isfinite()
        short = (~outside & (edited > -torch.inf)).sum(-1, keepdim=True) < k
        span = before.amax(-1, keepdim=True) - before.amin(-1, keepdim=True) + 1
        return torch.where(outside & short, before - 2 * span, edited)

    def _rehashed(self, scores: Tensor, ids: Tensor) -> Tensor:
        """What the token id selects, but for experts that can't be or must be: the best by score take their place."""
        kept = scores.float() + (scores.max() - scores.min() + 1) * torch.zeros_like(scores).scatter(-1, ids, 1.0)
        edited = self._edited(kept)
        missing = (edited == torch.inf).scatter(-1, ids, False).any(-1)
        wrong = missing | (edited.gather(-1, ids) == -torch.inf).any(-1)
        new = edited.topk(ids.shape[-1], dim=-1).indices.to(ids.dtype)
        return self._replayed(torch.where(wrong[..., None], new, ids))

    def _replayed(self, ids: Tensor) -> Tensor:
        """Recorded ids where there is a record, (…, k) or, in a selection of one after the other, (…, 1)."""
        replay = self._plan.replay
        if replay is None:
            return ids
        recorded = self._recorded(replay).experts
        if ids.shape[-1] != recorded.shape[-1]:
            recorded = recorded[:, self._chosen : self._chosen + 1]
        recorded = recorded.view(ids.shape).to(ids.dtype)
        known = recorded >= 0
        # A place without an expert gets one that isn't among the others, and a token without any those it would have
        # anyway; their weights become 0 later.
        wanted = torch.where(known, recorded, _spare(recorded, self._plan.layer.n_experts))
        return torch.where(known.any(-1, keepdim=True), wanted, ids)


def _spare(ids: Tensor, n_experts: int) -> Tensor:
    """(…, k): ids that a row doesn't have, different from each other, lowest first."""
    if bool((ids >= 0).all()):
        return ids
    taken = torch.zeros(*ids.shape[:-1], n_experts + 1, device=ids.device)
    taken = taken.scatter(-1, torch.where(ids < 0, n_experts, ids), 1.0)[..., :n_experts]
    return taken.argsort(dim=-1, stable=True)[..., : ids.shape[-1]].to(ids.dtype)


# -- after the selection -----------------------------------------------------------------------------------------------


def weigh(
    plan: Plan, ids: Tensor, weights: Tensor, logits: Tensor | None, where: Where, recorded: Recordings
) -> tuple[Tensor, Tensor]:
    """Ids and weights (T, k) as the experts are to consume them: cut, replayed, scaled."""
    if plan.cuts:
        ids, weights = _cut(plan, ids, weights, logits, where)
    if plan.replay is not None:
        record = recorded(plan.replay)
        new = weights.masked_fill(record.experts < 0, 0)
        if record.weights is not None:
            new = record.weights.to(weights.dtype)
        elif normalises(plan.layer):
            new = torch.where((record.experts < 0).any(-1, keepdim=True), _to_sum(new, weights), new)
        weights = torch.where(record.known[:, None], new, weights)
    for edit in plan.weights:
        scope = where(edit.scope)
        meant = among(ids, edit.experts)
        meant = meant if scope is None else meant & scope[:, None]
        factor = 0.0 if isinstance(edit, Ablate) else edit.factor
        new = torch.where(meant, weights * factor, weights)
        if isinstance(edit, Ablate) and edit.renormalise:
            new = torch.where(meant.any(-1, keepdim=True), _to_sum(new, weights), new)
        weights = new
    return ids, weights


def among(ids: Tensor, experts: Sequence[int]) -> Tensor:
    """bool, as ids: whether an id is one of the experts."""
    return torch.isin(ids, torch.tensor(list(experts), device=ids.device, dtype=ids.dtype))


def _to_sum(weights: Tensor, like: Tensor) -> Tensor:
    """Weights (T, k) scaled so that each row sums to what the row of `like` does; rows of zeros stay."""
    total = weights.sum(-1, keepdim=True)
    return weights * (like.sum(-1, keepdim=True) / torch.where(total == 0, 1, total))


def _cut(plan: Plan, ids: Tensor, weights: Tensor, logits: Tensor | None, where: Where) -> tuple[Tensor, Tensor]:
    """Each token keeps the ranks that it is to have; columns that nobody keeps are left out.

    SetTopK says which ranks; of these, TopP keeps as many as reach its probability.
    """
    layer, ranks = plan.layer, torch.arange(ids.shape[-1], device=ids.device)
    begin = torch.zeros(len(ids), 1, dtype=torch.int64, device=ids.device)
    end = begin + layer.top_k
    for edit in plan.counts:
        scope = where(edit.scope)
        inside = torch.ones_like(begin, dtype=torch.bool) if scope is None else scope[:, None]
        begin = torch.where(inside, edit.first - 1, begin)
        end = torch.where(inside, edit.first - 1 + edit.k, end)
    for edit in plan.top_p:
        assert logits is not None
        z = logits.reshape(len(ids), -1)[:, : layer.n_experts].float()
        p = log_probabilities(z, layer.scoring).exp()
        scope = where(edit.scope)
        limit = end - begin if plan.counts else torch.full_like(end, selectable(layer))
        limit = limit if edit.at_most is None else limit.clamp_max(edit.at_most)
        selected = p.gather(-1, ids).masked_fill((ranks < begin), 0)
        before = selected.cumsum(-1) - selected
        enough = ((before < edit.p) & (ranks >= begin)).sum(-1, keepdim=True)
        until = begin + torch.minimum(enough.clamp_min(1), limit)
        end = until if scope is None else torch.where(scope[:, None], until, end)
    kept = (ranks >= begin) & (ranks < end)
    new = torch.where(kept, weights, 0)
    if normalises(layer):
        # The sum of all that were selected, which a family that normalises gives to any k of them.
        new = torch.where(kept.all(-1, keepdim=True), weights, _to_sum(new, weights))
    used = kept.any(0)
    used[: 2 if layer.family.two_ranks else 1] = True
    return ids[:, used], new[:, used]
