"""Record what a model's routers do while it runs: hooks that a context manager owns and always removes.

    with Recorder(model, {"weights", "entropy"}) as recorder:
        model.module(**inputs)
        for layers in recorder.take():          # one list a forward pass
            layers[3].experts                   # int64 (B, S, k)

Ids and weights are those that the experts consumed: read from the arguments of the family's own experts module (or
the nearest place that says it exactly), never computed again from logits. The model's output is bit-identical with
any option on, and no hook keeps more than references to ids and weights until `take`, so that these two cost next to
nothing. Wrap the forward in `torch.inference_mode()` unless you need gradients; what is recorded is detached.

What the options mean, with z the logits, s the scores and E experts:

    weights        the gate weights as the experts consumed them (scaled families: scaled)
    logits         z, as they enter the router's scoring function
    probabilities  p: softmax(z) for softmax routers, also for those that take the softmax after the selection;
                   s / sum(s) for sigmoid and sqrt-softplus routers. A selection bias is left out. NaN in hash layers
    entropy        -sum(p ln p) in nats, from p over all experts; NaN in hash layers
    margin         k-th minus (k+1)-th score as the family's own last top-k saw them: with selection bias and group
                   mask; NaN where nothing was left to choose from (k = E, or all else masked) and in hash layers
    norms          L2 norm of each selected expert's output before the gate weight. Standard layouts compute the
                   selected experts a second time, on the side: about twice the experts' cost
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workbench.errors import InputError, RunError
from workbench.layers import Layer
from workbench.models import Model
from workbench.scores import LOG_SCORES, Selection, entropy, log_probabilities, margin

FIELDS = ("weights", "entropy", "margin", "logits", "norms", "probabilities")


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """One router in one forward pass: batch B, sequence S (padding included), k experts a token, E experts in all.

    experts        int64   (B, S, k)  ids in the router's own rank order; -1 where there is no expert
    weights        float32 (B, S, k)  0 where there is no expert
    entropy        float32 (B, S)     nats
    margin         float32 (B, S)
    logits         float32 (B, S, E)
    norms          float32 (B, S, k)  0 where there is no expert
    probabilities  float32 (B, S, E)
    """

    experts: Tensor
    weights: Tensor | None = None
    entropy: Tensor | None = None
    margin: Tensor | None = None
    logits: Tensor | None = None
    norms: Tensor | None = None
    probabilities: Tensor | None = None


@dataclass(slots=True)
class _Seen:
    """What the hooks of one layer kept of one pass. `selection` is as the family has it; `take` decodes it."""

    shape: tuple[int, int]
    selection: tuple[Any, ...]
    extras: dict[str, Tensor]


class Recorder:
    """Context manager that records the routers of `model`. Nothing is hooked outside the `with`.

    record: any of FIELDS; ids are always recorded. Recorders can be nested, like other context managers. Something
    that edits routing has to be entered before the recorder, which then sees the edited routing.

    InputError for a field that doesn't exist, or a scoring function whose probabilities aren't known.
    """

    def __init__(self, model: Model, record: Collection[str] = ("weights",)) -> None:
        unknown = sorted(set(record) - set(FIELDS) - {"ids", "experts"})
        if unknown:
            raise InputError(f"can't record {', '.join(unknown)}: choose from ids, {', '.join(FIELDS)}.")
        self._layers = model.layers
        self._record = frozenset(record)
        if self._record & {"entropy", "probabilities"}:
            for layer in self._layers:
                if layer.scoring not in LOG_SCORES and layer.scoring != "hash":
                    raise InputError(
                        f"layer {layer.name} scores experts by {layer.scoring!r}, whose probabilities aren't known: "
                        "record without entropy and probabilities."
                    )
        self._handles: list[RemovableHandle] = []
        self._restore: list[Callable[[], None]] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything recorded since the last take, for instance after a forward pass that failed."""
        self._passes: list[dict[int, _Seen]] = []
        self._last = len(self._layers)  # index of the layer seen last; the first layer to come opens a pass
        self._shapes: dict[int, tuple[int, int]] = {}
        self._extras: dict[str, Tensor] = {}

    def __enter__(self) -> Recorder:
        try:
            owners = {id(layer.owner): layer.owner for layer in self._layers}
            for owner in owners.values():
                self._handles.append(owner.register_forward_pre_hook(self._begin, with_kwargs=True))
            for layer in self._layers:
                self._hook(layer)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._restore:
            self._restore.pop()()

    def take(self) -> list[list[Observation]]:
        """The forward passes since the last take, oldest first, each a list with one Observation a layer.

        In encoder–decoder models a pass that ran only one of the stacks (generation encodes once) has only the
        Observations of that stack's layers, in order; `Layer.stack` says which are whose.

        RunError if no layer, or only some layers of a stack, saw anything, if a token's k ids repeat, if all weights
        of a layer are 0, or if a layer routed only a subset of the tokens. What was recorded is gone then, too.
        """
        passes, layers = self._passes, self._layers
        self.clear()
        if not passes:
            raise RunError(
                "no router was seen: the model wasn't run inside the recorder, or something bypasses its modules "
                "(fused kernels, compiled or quantised experts). Load the model without them."
            )
        taken = []
        for seen in passes:
            stacks = {layers[index].stack for index in seen}
            missed = [layer.name for layer in layers if layer.stack in stacks and layer.index not in seen]
            if missed:
                raise RunError(
                    f"{len(missed)} of {len(layers)} routers saw nothing in a forward pass, the first of them "
                    f"{missed[0]}: the pass ended early, or something bypasses these modules."
                )
            taken.append([_observation(layers[index], seen[index], self._record) for index in sorted(seen)])
        return taken

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _hook(self, layer: Layer) -> None:
        """Register what this layer's layout needs."""
        keep = self._handles.append
        layout = layer.family.layout
        if self._record & {"logits", "entropy", "probabilities"}:
            source = layer.family.logits
            place = layer.router.get_submodule(source) if isinstance(source, str) else layer.router
            keep(place.register_forward_hook(lambda _m, _a, out: self._logits(layer, out)))
        if "margin" in self._record or layout == "product keys":
            self._watch(layer)
        if layout in ("standard", "one-hot"):
            keep(
                layer.experts.register_forward_pre_hook(
                    lambda _m, args, kwargs: self._consumed(layer, args, kwargs), with_kwargs=True
                )
            )
        elif layout == "dense":
            keep(layer.router.register_forward_hook(lambda _m, _a, out: self._dense(layer, out[0])))
            if "norms" in self._record:
                keep(layer.experts.register_forward_hook(lambda _m, _a, out: self._dense_norms(layer, out)))
        elif layout == "sorted":
            keep(layer.router.register_forward_hook(lambda _m, _a, out: self._close(layer, (out[0], out[2], out[3]))))
            if "norms" in self._record:
                last = layer.block.get_submodule("output_linear")
                keep(last.register_forward_hook(lambda _m, _a, out: self._sorted_norms(layer, out)))
        elif layout == "product keys":
            rows = layer.block.get_submodule("down_embed")
            keep(rows.register_forward_pre_hook(lambda _m, args: self._product_ids(args[0])))
            keep(layer.block.register_forward_hook(lambda _m, args, _out: self._product(layer, args[0])))

    def _begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A stack starts: its inputs say what batch and sequence are."""
        candidates = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("hidden_states"), *args)
        first = next((x for x in candidates if isinstance(x, Tensor) and x.dim() >= 2), None)
        if first is not None:
            self._shapes[id(_module)] = (first.shape[0], first.shape[1])

    def _close(self, layer: Layer, selection: tuple[Any, ...]) -> None:
        """The layer's selection is known: file it, with the extras gathered on the way, in the current pass."""
        if layer.index <= self._last:  # routers run in order, so one that doesn't follow the last begins a new pass
            self._passes.append({})
        self._last = layer.index
        shape = self._shapes.get(id(layer.owner), (1, -1))
        self._passes[-1][layer.index] = _Seen(shape, selection, self._extras)
        self._extras = {}

    def _consumed(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, ids, weights = (*args, *kwargs.values())[:3]  # the families name these differently
        if "norms" in self._record:
            self._extras["norms"] = _norms(layer, hidden, ids, weights)
        self._close(layer, (ids.detach(), weights.detach()))

    def _logits(self, layer: Layer, out: Any) -> None:
        position = layer.family.logits
        z = out[position] if isinstance(position, int) and isinstance(out, tuple) else out
        z = z.detach().float()
        if layer.family.layout == "product keys":  # an expert's logit is the sum of those of its two keys
            z = z.reshape(2, -1, z.shape[-1] // 2)
            z = (z[0].unsqueeze(-1) + z[1].unsqueeze(-2)).flatten(-2)
        z = z.reshape(-1, z.shape[-1])
        if "logits" in self._record:
            self._extras["logits"] = z[:, : layer.n_experts]
        if not self._record & {"entropy", "probabilities"}:
            return
        log_p = log_probabilities(z, layer.scoring)
        if "entropy" in self._record:
            self._extras["entropy"] = entropy(log_p)
        if "probabilities" in self._record:
            self._extras["probabilities"] = log_p[:, : layer.n_experts].exp()

    def _dense(self, layer: Layer, scores: Tensor) -> None:
        # Every score that isn't 0 is a selected expert's, and no other expert contributes.
        weights, ids = scores.detach().topk(layer.top_k, dim=-1)
        self._close(layer, (ids.masked_fill(weights == 0, -1), weights))

    def _dense_norms(self, layer: Layer, out: Any) -> None:
        seen = self._passes[-1][layer.index]
        by_expert = out.detach().float().view(layer.n_experts, -1, out.shape[-1]).norm(dim=-1)  # (E, T)
        seen.extras["norms"] = by_expert.t().gather(-1, seen.selection[0].clamp_min(0))

    def _sorted_norms(self, layer: Layer, out: Any) -> None:
        seen = self._passes[-1][layer.index]
        seen.extras["norms"] = _unsort(seen.selection[0], out.detach().float().norm(dim=-1)).view(-1, layer.top_k)

    def _product_ids(self, ids: Tensor) -> None:
        self._extras["ids"] = ids.detach()

    def _product(self, layer: Layer, hidden: Tensor) -> None:
        ids, weights = self._extras.pop("ids"), self._extras.pop("weights")
        if "norms" in self._record:  # the expert's output is act(down · x) up
            block: Any = layer.block
            inner = (block.down_embed.weight[ids] @ hidden.reshape(len(ids), -1, 1)).squeeze(-1)
            norms = block.act_fn(inner).abs() * block.up_embed.weight[ids].norm(dim=-1)
            self._extras["norms"] = norms.detach().float()
        self._close(layer, (ids, weights))

    def _watch(self, layer: Layer) -> None:
        """Run the selector inside a mode that sees its functions' arguments; outside of it nothing is slower."""
        module, method = layer.selector
        original = getattr(module, method)
        had_own = method in vars(module)

        def watched(*args: Any, **kwargs: Any) -> Any:
            with Selection(layer.family.selects) as selection:
                out = original(*args, **kwargs)
            if "margin" in self._record and layer.scoring != "hash":
                if selection.scores is None:
                    raise RunError(
                        f"{layer.name} selected experts without a {layer.family.selects} that can be seen: the margin "
                        "can't be recorded with fused kernels."
                    )
                self._extras["margin"] = margin(selection.scores.detach(), selection.k)
            if layer.family.layout == "product keys" and selection.weights is not None:
                self._extras["weights"] = selection.weights.detach()
            return out

        def restore() -> None:
            with suppress(AttributeError):
                delattr(module, method)
            if had_own:
                setattr(module, method, original)

        setattr(module, method, watched)
        self._restore.append(restore)


def _norms(layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Norms (T, k) of the selected experts' outputs: the family's own experts run again, one expert a row, weight 1.

    `forward` and not the module itself is called: hooks must not see this second run.
    """
    hidden = hidden.detach().reshape(-1, hidden.shape[-1])
    with torch.no_grad():
        if layer.family.layout == "one-hot":
            out = layer.experts.forward(hidden, ids, torch.ones_like(weights))
            return out.float().norm(dim=-1, keepdim=True)
        ids = ids.reshape(-1, ids.shape[-1])
        rows = hidden.repeat_interleave(ids.shape[-1], dim=0)
        ones = torch.ones(len(rows), 1, dtype=weights.dtype, device=weights.device)
        ids_of_rows, weights_of_rows = ids.reshape(-1, 1), ones
        if layer.family.two_ranks:
            ids_of_rows = torch.cat([ids_of_rows, torch.full_like(ids_of_rows, layer.n_experts - 1)], -1)
            weights_of_rows = torch.cat([ones, torch.zeros_like(ones)], -1)
        out = layer.experts.forward(rows, ids_of_rows, weights_of_rows)
        return out.reshape(len(rows), -1).float().norm(dim=-1).view(ids.shape)


def _unsort(order: Tensor, values: Tensor) -> Tensor:
    """Undo values = original[order]."""
    return torch.empty_like(values).scatter_(0, order, values)


def _decode(layer: Layer, selection: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Ids and weights, both (T, k), from what the layout's hook kept."""
    if layer.family.layout == "sorted":
        order, weights, sizes = selection
        experts = torch.arange(len(sizes), device=order.device)
        ids = experts.repeat_interleave(torch.tensor(sizes, device=order.device))
        return _unsort(order, ids).view(-1, layer.top_k), _unsort(order, weights.detach()).view(-1, layer.top_k)
    ids, weights = selection
    if layer.family.layout == "one-hot":
        mask = ids.reshape(-1, layer.n_experts)
        best = mask.max(-1)
        return best.indices.masked_fill(best.values == 0, -1).unsqueeze(-1), weights.reshape(-1, 1)
    return ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])


def _observation(layer: Layer, seen: _Seen, record: frozenset[str]) -> Observation:
    """Decode and check what one layer saw in one pass."""
    ids, weights = _decode(layer, seen.selection)
    batch, length = seen.shape
    if length >= 0 and len(ids) != batch * length:
        raise RunError(
            f"{layer.name} routed {len(ids)} of {batch * length} tokens (batch {batch} × length {length}): only some "
            "of the input goes through it, as when images have experts of their own. Trace text without images."
        )
    if layer.family.skips:
        ids = ids.masked_fill(weights == 0, -1)
    none = ids < 0
    if layer.top_k > 1:
        ranked = ids.sort(-1).values
        if bool(((ranked[:, 1:] == ranked[:, :-1]) & (ranked[:, 1:] >= 0)).any()):
            raise RunError(f"{layer.name} gave a token the same expert twice: the record can't be what the router did.")
    if len(ids) and not bool(none.all()) and not bool(weights.any()):
        raise RunError(f"{layer.name} gave every expert the weight 0: the record can't be what the router did.")
    extras = dict(seen.extras)
    if "weights" in record:
        extras["weights"] = weights.float().masked_fill(none, 0.0)
    if "norms" in extras:
        extras["norms"] = extras["norms"].masked_fill(none, 0.0)
    shaped = {name: x.reshape(batch, length, *x.shape[1:]) for name, x in extras.items()}
    if "margin" in record and "margin" not in shaped:  # hash layers
        shaped["margin"] = torch.full((batch, length), torch.nan, device=ids.device)
    return Observation(experts=ids.long().reshape(batch, length, -1), **shaped)
