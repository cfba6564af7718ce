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
    norms          L2 norm of each selected expert's output before the gate weight. Fused experts know it; else standard
                   layouts compute the selected experts a second time, on the side: about twice the experts' cost
    shift          max(0, 1 - cos(x, x + r)), how far the routed experts turn the residual stream; see `residual`
    lookahead      ids that the next layer's router chooses when it is given this layer's router input; see `lookahead`
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from workbench import lookahead, residual
from workbench.contributions import contributions, filler
from workbench.errors import InputError, RunError
from workbench.fused_experts import gives_norms, listen
from workbench.hooked import FUSED, INTERVENED, RECORDED
from workbench.layers import Layer
from workbench.models import Model
from workbench.observation import Observation, Seen, chosen, observation, unsort
from workbench.scores import LOG_SCORES, Selection, entropy, log_probabilities, margin

FIELDS = ("weights", "entropy", "margin", "logits", "norms", "probabilities")
"""What can be recorded of every family, besides ids."""
OF_MOST_FAMILIES = ("shift", "lookahead")
"""What can be recorded of most: see `workbench.residual.NO_SHIFT` and `workbench.lookahead.NO_LOOKAHEAD`."""


class Recorder:
    """Context manager that records the routers of `model`. Nothing is hooked outside the `with`.

    record: any of FIELDS and OF_MOST_FAMILIES; ids are always recorded. Recorders can be nested, like other context
    managers. Something that edits routing has to be entered before the recorder, which then sees the edited routing.

    InputError for a field that doesn't exist or that the model's family can't give, or a scoring function whose
    probabilities aren't known.
    """

    def __init__(self, model: Model, record: Collection[str] = ("weights",)) -> None:
        unknown = sorted(set(record) - {"ids", "experts", *FIELDS, *OF_MOST_FAMILIES})
        if unknown:
            names = ", ".join(("ids", *FIELDS, *OF_MOST_FAMILIES))
            raise InputError(f"can't record {', '.join(unknown)}: choose from {names}.")
        self._module = model.module
        self._layers = self._own = model.layers
        self._zeroed: Collection[int] = ()  # layers where interventions say that weight 0 means no expert
        self._record = frozenset(record)
        if self._record & {"entropy", "probabilities"}:
            for layer in self._layers:
                if layer.scoring not in LOG_SCORES and layer.scoring != "hash":
                    raise InputError(
                        f"layer {layer.name} scores experts by {layer.scoring!r}, whose probabilities aren't known: "
                        "record without entropy and probabilities."
                    )
        for layer in self._layers:
            if "shift" in self._record:
                residual.check(layer)
            if "lookahead" in self._record:
                lookahead.check(layer)
        self._handles: list[RemovableHandle] = []
        self._restore: list[Callable[[], None]] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything recorded since the last take, for instance after a forward pass that failed."""
        self._passes: list[dict[int, Seen]] = []
        self._last = len(self._layers)  # index of the layer seen last; the first layer to come opens a pass
        self._shapes: dict[int, tuple[int, int]] = {}
        self._extras: dict[str, Tensor] = {}

    def __enter__(self) -> Recorder:
        edited = INTERVENED.get(self._module)
        self._layers = self._own if edited is None else edited.layers
        self._zeroed = () if edited is None else edited.zeroed
        RECORDED[self._module] = RECORDED.get(self._module, 0) + 1
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
        RECORDED[self._module] -= 1
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
            taken.append(
                [observation(layers[i], seen[i], self._record, zeroed=i in self._zeroed) for i in sorted(seen)]
            )
        return taken

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _hook(self, layer: Layer) -> None:
        """Register what this layer's layout needs."""
        fused = FUSED.get(layer.router)
        if fused is not None and self._record & {"entropy", "margin"}:
            fused.wanted += 1
            self._restore.append(lambda: setattr(fused, "wanted", fused.wanted - 1))
        keep = self._handles.append
        layout = layer.family.layout
        if self._record & {"logits", "entropy", "probabilities"}:
            source = layer.family.logits
            place = layer.router.get_submodule(source) if isinstance(source, str) else layer.router
            keep(place.register_forward_hook(lambda _m, _a, out: self._logits(layer, out)))
        if "margin" in self._record or layout == "product keys":
            self._watch(layer)
        if layout == "standard" and "norms" in self._record:
            self._restore.append(listen(layer.experts, lambda norms: self._add(layer, "norms", norms)))
        if layout in ("standard", "one-hot"):
            keep(
                layer.experts.register_forward_pre_hook(
                    lambda _m, args, kwargs: self._consumed(layer, args, kwargs), with_kwargs=True
                )
            )
        elif layout == "dense":
            keep(layer.router.register_forward_hook(lambda _m, _a, out: self._close(layer, chosen(layer, out))))
            if "norms" in self._record:
                keep(layer.experts.register_forward_hook(lambda _m, _a, out: self._dense_norms(layer, out)))
        elif layout == "sorted":
            keep(layer.router.register_forward_hook(lambda _m, _a, out: self._close(layer, chosen(layer, out))))
            if "norms" in self._record:
                last = layer.block.get_submodule("output_linear")
                keep(last.register_forward_hook(lambda _m, _a, out: self._sorted_norms(layer, out)))
        elif layout == "product keys":
            rows = layer.block.get_submodule("down_embed")
            keep(rows.register_forward_pre_hook(lambda _m, args: self._product_ids(args[0])))
            keep(layer.block.register_forward_hook(lambda _m, args, _out: self._product(layer, args[0])))
        if "shift" in self._record:
            self._handles += residual.hook(layer, lambda shift: self._add(layer, "shift", shift))
        after = lookahead.following(self._layers, layer)
        if "lookahead" in self._record and after is not None:
            self._handles += lookahead.hook(layer, after, lambda ids: self._add(layer, "lookahead", ids))

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
        self._passes[-1][layer.index] = Seen(shape, selection, self._extras)
        self._extras = {}

    def _add(self, layer: Layer, name: str, value: Tensor) -> None:
        """File what comes after the layer's selection was known."""
        self._passes[-1][layer.index].extras[name] = value

    def _consumed(self, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, ids, weights = (*args, *kwargs.values())[:3]  # the families name these differently
        if "norms" in self._record and not gives_norms(layer.experts):
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
        routed = _fused(layer)
        if "entropy" in self._record and routed is not None:
            self._extras["entropy"] = routed.entropy.detach()
        if not self._record & ({"probabilities"} if routed is not None else {"entropy", "probabilities"}):
            return
        log_p = log_probabilities(z, layer.scoring)
        if "entropy" in self._record and routed is None:
            self._extras["entropy"] = entropy(log_p)
        if "probabilities" in self._record:
            self._extras["probabilities"] = log_p[:, : layer.n_experts].exp()

    def _dense_norms(self, layer: Layer, out: Any) -> None:
        seen = self._passes[-1][layer.index]
        by_expert = out.detach().float().view(layer.n_experts, -1, out.shape[-1]).norm(dim=-1)  # (E, T)
        seen.extras["norms"] = by_expert.t().gather(-1, seen.selection[0].clamp_min(0))

    def _sorted_norms(self, layer: Layer, out: Any) -> None:
        seen = self._passes[-1][layer.index]
        seen.extras["norms"] = unsort(seen.selection[0], out.detach().float().norm(dim=-1)).view(-1, layer.top_k)

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
            routed = _fused(layer)
            if "margin" in self._record and routed is not None:
                self._extras["margin"] = routed.margin.detach()
            elif "margin" in self._record and layer.scoring != "hash":
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


def _fused(layer: Layer) -> Any:
    """The `Routed` of the router's last call, where that was fused code."""
    fused = FUSED.get(layer.router)
    return None if fused is None else fused.routed


def _norms(layer: Layer, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Norms (T, k) of the selected experts' outputs: the family's own experts run again, one expert a row, weight 1."""
    hidden = hidden.detach().reshape(-1, hidden.shape[-1])
    if layer.family.layout == "one-hot":
        with torch.no_grad():
            out = layer.experts.forward(hidden, ids, torch.ones_like(weights))
        return out.float().norm(dim=-1, keepdim=True)
    ids = ids.reshape(-1, ids.shape[-1])
    ones = torch.ones(ids.shape, dtype=weights.dtype, device=weights.device)
    return contributions(layer.experts.forward, hidden, ids, ones, filler(layer)).float().norm(dim=-1)
