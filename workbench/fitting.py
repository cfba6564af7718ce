"""Which interventions fit a model: every request that it can't meet is refused here, before anything is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from workbench import scope
from workbench.edits import selectable
from workbench.errors import InputError
from workbench.interventions import (
    Ablate,
    AnyIntervention,
    Contrast,
    Delta,
    Forbid,
    Force,
    Intervention,
    OnExperts,
    RandomExperts,
    Remix,
    Replay,
    SetTopK,
    TopP,
)
from workbench.layers import Layer, family_of
from workbench.models import Model
from workbench.weights import uncut

NO_INTERVENTION: dict[str, str] = {
    "product keys": "one module makes its logits, selects and runs its experts, with nothing in between to edit",
}
"""Layout -> why it can't be intervened on."""
TRANSFORMED: dict[str, str] = {
    "laguna": "its router caps its logits after its linear layer, so probabilities don't follow from what is edited",
    "muse_spark": "its router multiplies its logits after its linear layer, so probabilities don't follow from them",
}
"""Family -> why Remix and TopP, which work on router probabilities, aren't possible."""
Placed = tuple[Intervention, int]
"""An edit of one layer, and the place in the list of the intervention that it comes from."""


def per_layer(model: Model, interventions: Sequence[AnyIntervention]) -> dict[int, list[Placed]]:
    """Layer -> its edits in the order of the list; controls have their experts drawn.

    InputError if an intervention doesn't fit the model, or several together don't.
    """
    for layer in model.layers:
        if layer.family.layout in NO_INTERVENTION:
            raise InputError(
                f"{model.family} can't be intervened on: {NO_INTERVENTION[layer.family.layout]}. It can be traced; "
                "every other family of `workbench models` can be intervened on."
            )
    if sum(isinstance(one, Contrast) for one in interventions) > 1:
        raise InputError("there is more than one Contrast: logits can be contrasted with one weak pass only.")
    found: dict[int, list[Placed]] = {}
    for place, one in enumerate(interventions):
        if isinstance(one, Contrast):
            per_layer(model, one.weak)
            continue
        edit = one.edit if isinstance(one, RandomExperts) else one
        scope.check(edit.scope, model.tokenizer)
        for layer in _layers(model, edit):
            _check_edit(layer, edit)
            mine = replace(edit, layer=layer.index)
            mine = permuted(mine, layer, one.seed) if isinstance(one, RandomExperts) else mine
            found.setdefault(layer.index, []).append((mine, place))
    for index, edits in found.items():
        _check_together(model.layers[index], [edit for edit, _ in edits])
    return dict(sorted(found.items()))


def permutation(layer: Layer, seed: int) -> np.ndarray:
    """int64 (E,): the expert that stands for each expert of a layer in the control of this seed."""
    return np.random.default_rng([seed, layer.index]).permutation(layer.n_experts)


def permuted(edit: Intervention, layer: Layer, seed: int) -> Intervention:
    """The edit with each expert of the layer replaced by the one that stands for it."""
    stands = permutation(layer, seed)
    if isinstance(edit, OnExperts):
        return replace(edit, experts=tuple(int(stands[expert]) for expert in edit.experts))
    back = np.argsort(stands).tolist()
    name = "values" if isinstance(edit, Delta) else "target"
    vector: Any = getattr(edit, name)
    moved = vector[back] if hasattr(vector, "requires_grad") else tuple(vector[expert] for expert in back)
    return replace(edit, **{name: moved})


def _layers(model: Model, edit: Intervention) -> Iterator[Layer]:
    n_layers = len(model.layers)
    asked = range(n_layers) if edit.layer is None else [edit.layer] if isinstance(edit.layer, int) else edit.layer
    for index in asked:
        if not 0 <= index < n_layers:
            raise InputError(f"{_name(edit)}: there is no layer {index}; {model.name} has layers 0 to {n_layers - 1}.")
        yield model.layers[index]


def _check_edit(layer: Layer, edit: Intervention) -> None:
    """What one edit asks of one layer."""
    where = f"{_name(edit)} at layer {layer.index}"
    if isinstance(edit, OnExperts):
        beyond = [expert for expert in edit.experts if not 0 <= expert < layer.n_experts]
        if beyond:
            raise InputError(f"{where}: there is no expert {beyond[0]}; it has experts 0 to {layer.n_experts - 1}.")
    if isinstance(edit, Delta | Remix):
        vector = edit.values if isinstance(edit, Delta) else edit.target
        if len(vector) != layer.n_experts:
            raise InputError(
                f"{where}: the vector has {len(vector)} numbers; expected {layer.n_experts}, one an expert."
            )
    if isinstance(edit, Remix) and layer.scoring == "hash":
        raise InputError(f"{where}: a hash layer has no probabilities to remix; its experts follow from the token id.")
    if isinstance(edit, Remix | TopP) and family_of(layer.router) in TRANSFORMED:
        raise InputError(f"{where}: {TRANSFORMED[family_of(layer.router)]}. Use Bias, Delta or SetTopK.")
    if isinstance(edit, SetTopK | TopP):
        why = _fixed_k(layer)
        if why:
            raise InputError(f"{where}: the number of experts can't be changed there: {why}.")
        if layer.family.two_ranks and isinstance(edit, SetTopK) and edit.k == 1:
            raise InputError(f"{where}: k is 1, but this family's experts need at least 2 a token.")
        most = selectable(layer)
        asked = edit.first - 1 + edit.k if isinstance(edit, SetTopK) else edit.at_most or 1
        if asked > most:
            raise InputError(f"{where}: rank {asked} is asked for, but a token can select from {most} experts.")


def _fixed_k(layer: Layer) -> str:
    """Why the number of experts of a token can't be changed; empty where it can."""
    if layer.scoring == "hash":
        return "the token id selects them"
    if layer.family.layout in ("sorted", "one-hot"):
        return "the family sorts tokens by expert for its own k"
    if layer.family.selects != "topk":
        return "the family selects one after the other"
    return "a token has one expert or skips the layer" if layer.family.skips else ""


def _check_together(layer: Layer, edits: Sequence[Intervention]) -> None:
    """What the edits of a layer ask of it together."""
    counts = [edit for edit in edits if isinstance(edit, SetTopK | TopP)]
    scoped = [edit for edit in counts if edit.scope != "all" or isinstance(edit, TopP)]
    if scoped and uncut(layer):
        raise InputError(
            f"{_name(scoped[0])} at layer {layer.index}: this family {uncut(layer)}, so tokens can't differ in their "
            "number of experts; SetTopK for all tokens is possible."
        )
    forced_late = [edit for edit in edits if isinstance(edit, Force) and edit.level == "selection"]
    if scoped and forced_late and layer.family.layout == "dense":
        raise InputError(
            f"layer {layer.index}: this family's selection has no ranks, so {_name(scoped[0])} might cut an expert "
            'that is forced with level="selection"; use level="logits".'
        )
    lost = {
        expert
        for edit in edits
        if isinstance(edit, Ablate) and edit.level == "logits"
        for late in forced_late
        if not scope.apart(edit.scope, late.scope)
        for expert in set(edit.experts) & set(late.experts)
    }
    if lost:
        raise InputError(
            f'layer {layer.index}: expert {min(lost)} is ablated and forced with level="selection", so it would be '
            'selected with weight 0; force it with level="logits", or don\'t ablate it.'
        )
    replays = [edit for edit in edits if isinstance(edit, Replay)]
    if replays and (counts or len(replays) > 1):
        other = counts[0] if counts else replays[1]
        raise InputError(
            f"layer {layer.index} has a Replay and a {_name(other)}: a replay alone says which experts run."
        )
    k = min([layer.top_k, *(edit.k for edit in counts if isinstance(edit, SetTopK))])
    forced = [edit for edit in edits if isinstance(edit, Force)]
    for text in {edit.scope for edit in forced}:
        together = {expert for edit in forced if not scope.apart(edit.scope, text) for expert in edit.experts}
        if len(together) > k:
            raise InputError(
                f"{len(together)} experts are forced at layer {layer.index} ({_listed(together)}), but a token has "
                f"{k}: force fewer, or raise k there with SetTopK."
            )
    gone = [edit for edit in edits if isinstance(edit, Forbid) or (isinstance(edit, Ablate) and edit.level != "output")]
    k = max([layer.top_k, *(edit.first - 1 + edit.k for edit in counts if isinstance(edit, SetTopK))])
    for text in {edit.scope for edit in gone}:
        together = {expert for edit in gone if not scope.apart(edit.scope, text) for expert in edit.experts}
        left = layer.n_experts - len(together)
        if together and left <= k:
            raise InputError(
                f"{len(together)} of {layer.n_experts} experts are taken away at layer {layer.index}, which leaves "
                f"{left} where a token has {k}, and so nothing to choose: take away "
                f'{max(layer.n_experts - k - 1, 0)} at most, or use level="output".'
            )


def _name(edit: object) -> str:
    return type(edit).__name__


def _listed(experts: set[int]) -> str:
    return ", ".join(map(str, sorted(experts)))
