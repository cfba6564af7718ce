"""Which experts, and which routers' choices, a prediction depends on: patching between two runs, through nnsight.

    pair = Pair("The capital of France is", "The capital of Spain is", answers=(" Paris", " Madrid"))
    frame = patch(model, [pair])                 # a row a layer and expert; `workbench.patch_effects` sums it up

Two prompts of equal length, the source and the target, and two tokens that could follow: d is the logit of the first
minus that of the second at the last position. A patch changes the target run at one place to what the source run has
there, and its **effect** is d of the patched target run minus d of the plain one, computed by running it: activation
patching, or causal mediation (Vig et al. 2020; Meng et al. 2022). What can be patched:

- **an expert's contribution**: gate weight × the expert's output, as it enters the sum over the selected experts. It is
  0 where the expert isn't selected, so that patching one that only the source run selects adds it, and patching one
  that only the target run selects takes it away; no other expert's weight changes.
- **a router's choice**: the layer's experts get the source run's ids and weights for the target run's hidden states.

Both are patched at all positions at once, or at one position at a time.

**Attribution patching** (Nanda 2023; Syed et al. 2023) estimates all effects from one gradient: the gradient of d by
what the experts of a layer return in the target run, times the change that the patch makes there, summed over
positions. It is exact as far as the rest of the model is linear.

**recovered** is the effect as a share of d in the source run minus d in the target run: 1 makes the target run answer
like the source run.

nnsight gets a copy of the model's modules that shares the weights, since it leaves its marks on what it wraps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from workbench.contributions import contributions, filler
from workbench.errors import InputError, RunError
from workbench.forward import predicts_next, reads_twice
from workbench.hooked import INTERVENED, RECORDED
from workbench.models import Model
from workbench.prompt_pairs import Pair, encoded
from workbench.remote import check_key, check_on_hub, expert_paths, wrapped

if TYPE_CHECKING:
    import pandas as pd

What = Literal["experts", "routers"]
WHAT: tuple[What, ...] = ("experts", "routers")
"""What can be patched."""
COLUMNS = (
    "pair", "layer", "expert", "position", "n_source", "n_target", "n_changed", "effect", "estimate", "recovered",
    "source", "target",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Place:
    """What is patched in a layer, and where a trace finds its experts: no module in it, so that it can be sent.

    first  position of the first token that differs: before it the runs are the same, up to rounding
    """

    index: int
    path: str
    n_experts: int
    filler: int | None
    what: What
    first: int


@dataclass(frozen=True, slots=True, eq=False)
class _Plain:
    """Both undisturbed runs, and what the gradient says of every patch. C patches a layer: its experts, or 1.

    difference  (2,) float64: d of source and target
    ids         layer -> (2, S, k)
    estimate    layer -> (C, S) float64, by position
    changed     layer -> (C, S) bool: where the patch changes anything at all
    """

    difference: np.ndarray
    ids: dict[int, np.ndarray]
    estimate: dict[int, np.ndarray]
    changed: dict[int, np.ndarray]


def check(model: Model) -> None:
    """InputError if nnsight isn't there, or contributions of this model's experts can't be patched."""
    try:
        import nnsight  # noqa: F401
    except ImportError:
        raise InputError("patching takes the package nnsight: pip install 'moe-workbench[causal]'.") from None
    for layer in model.layers:
        if layer.family.layout != "standard":
            raise InputError(
                f"experts of {model.family} can't be patched: their ids and weights don't reach them as arguments "
                f"(layout {layer.family.layout!r}). Families whose layout is 'standard' can: see `workbench models "
                "--json`."
            )
    if reads_twice(model) or not predicts_next(model):
        raise InputError(f"{model.family} doesn't predict the next token of a text, so a patch has no logits to move.")
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer, so prompts can't become tokens: give one to load().")
    if model.module in INTERVENED or RECORDED.get(model.module):
        raise InputError("patch() runs a copy of the model: leave the block of intervene() or of the Recorder first.")


def patch(
    model: Model,
    pairs: Sequence[Pair],
    *,
    what: What = "experts",
    layers: Sequence[int] | None = None,
    each_position: bool = False,
    exact: bool = True,
    batch_tokens: int = 4096,
    remote: bool | str = False,
) -> pd.DataFrame:
    """The effect of every patch, and its estimate.

    what           "experts": each expert's contribution; "routers": each router's choice
    layers         which (None: all)
    each_position  one patch a position, instead of one patch at all of them
    exact          run the patches; without, there is only the estimate
    batch_tokens   of one forward pass, which makes a patch in each of its rows; at least three rows fit
    remote         handed to nnsight: True runs on NDIF, "local" here but by way of what would be sent there

    Columns, a row a patch:

    pair, layer, expert      from 0; expert is missing for routers
    position                 in the prompts, from 0; missing when all are patched at once
    n_source, n_target       positions at which that run selects the expert (for routers: all)
    n_changed                positions at which the patch changes what the layer's experts return
    effect, estimate         change of d in logits; effect is NaN without `exact`
    recovered                effect / (source - target), NaN where these are equal
    source, target           d of the plain runs, the same in all rows of a pair

    Experts that neither run selects have a row with effect 0, unless each_position: then a row means that one of the
    runs selects the expert there. A patch that changes nothing is not run: its effect is 0.

    Runs on NDIF need an API key, a model of the Hub, and of the local model no weights but its modules: it may be on
    the meta device.

    Everything is computed in the model's dtype, and logits between 4 and 8 have steps of 1/32 in bfloat16: load the
    model in float32 where small effects matter.

    InputError if the model or nnsight can't, prompts differ in length, an answer isn't exactly one token, a layer
    doesn't exist. RunError if a run gives NaN.
    """
    import pandas as pd

    check(model)
    if what not in WHAT:
        raise InputError(f"what is {what!r}; expected 'experts' or 'routers'.")
    if remote and remote != "local":
        check_key()
        check_on_hub(model)
    chosen = _layers(model, layers)
    prompts = [encoded(pair, model) for pair in pairs]
    if not prompts:
        raise InputError("no pair of prompts; expected at least one.")
    traced = wrapped(model)
    paths = expert_paths(model)
    parts = []
    for number, (source_ids, target_ids, answers) in enumerate(prompts):
        differs = [a != b for a, b in zip(source_ids, target_ids, strict=True)]
        first = differs.index(True) if any(differs) else len(differs)
        places = [
            _Place(layer.index, paths[layer.index], layer.n_experts, filler(layer), what, first)
            for layer in model.layers
            if layer.index in chosen
        ]
        ids = torch.tensor([source_ids, target_ids], device=model.device)
        plain = _plain(traced, places, ids, answers, remote)
        rows = pd.DataFrame(_rows(plain, places, each_position))
        rows["effect"] = np.nan
        if exact:
            rows["effect"] = 0.0
            run = np.flatnonzero(rows["n_changed"])
            jobs = rows.loc[run, ["layer", "expert", "position"]].to_numpy()
            rows.loc[run, "effect"] = _exact(traced, places, ids, answers, jobs, batch_tokens, remote)
        source, target = plain.difference
        rows["recovered"] = rows["effect"] / (source - target if source != target else np.nan)
        parts.append(rows.assign(pair=number, source=source, target=target))
    frame = pd.concat(parts, ignore_index=True)[list(COLUMNS)]
    missing = {name: frame[name].astype("Int64").where(frame[name] >= 0) for name in ("expert", "position")}
    return frame.assign(**missing)


# -- what is asked for -------------------------------------------------------------------------------------------------


def _layers(model: Model, layers: Sequence[int] | None) -> set[int]:
    there = range(len(model.layers))
    if layers is not None and not len(layers):
        raise InputError("layers is empty; expected at least one, or None for all.")
    wrong = [layer for layer in layers or () if layer not in there]
    if wrong:
        raise InputError(f"layer {wrong[0]}: {model.name} has the layers 0 to {len(model.layers) - 1}.")
    return set(there if layers is None else layers)


# -- the runs ----------------------------------------------------------------------------------------------------------


def _inputs(traced: Any, ids: Tensor) -> dict[str, Any]:
    """What the model is given: no cache, and logits of the last position only where it has such an option."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(traced._module.forward).parameters else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False, **last}


def _plain(traced: Any, places: list[_Place], ids: Tensor, answers: tuple[int, int], remote: bool | str) -> _Plain:
    """Both runs in one pass, with the gradient of the target's d by what each layer's experts return."""
    import nnsight

    with torch.inference_mode(False), torch.enable_grad(), traced.trace(**_inputs(traced, ids), remote=remote):
        given, added = [], []
        for place in places:
            experts = traced.get(place.path)
            given.append(_given(experts.inputs, 2))
            out = experts.output
            # A leaf to differentiate by, whether or not the weights ask for gradients.
            added.append(torch.zeros_like(out, requires_grad=True))
            experts.output = out + added[-1]
        logits = traced.output.logits[:, -1].double()
        difference = logits[:, answers[0]] - logits[:, answers[1]]
        gradients = torch.autograd.grad(difference[1], added)
        seen = [
            (one[1], *_estimates(traced.get(place.path), one, gradient, place))
            for place, one, gradient in zip(places, given, gradients, strict=True)
        ]
        found = nnsight.save((difference.detach(), seen))
    difference, seen = found
    if not bool(torch.isfinite(difference).all()):
        raise RunError("the logits of the answers are NaN or infinite in a plain run: nothing can be said of patches.")
    index = [place.index for place in places]
    chosen, estimates, changed = ([part.cpu().numpy() for part in parts] for parts in zip(*seen, strict=True))
    return _Plain(
        difference.cpu().numpy(),
        dict(zip(index, chosen, strict=True)),
        dict(zip(index, estimates, strict=True)),
        dict(zip(index, changed, strict=True)),
    )


def _exact(
    traced: Any,
    places: list[_Place],
    ids: Tensor,
    answers: tuple[int, int],
    jobs: np.ndarray,
    batch_tokens: int,
    remote: bool | str,
) -> np.ndarray:
    """Effects of jobs (n, 3): layer, expert, position, -1 for no expert and for all positions.

    Rows of a pass: the source, the target, and the target again for each patch. What the source has at a place is
    taken from its own row on the way.
    """
    import nnsight

    effects = []
    step = max(1, batch_tokens // ids.shape[1] - 2)
    for start in range(0, len(jobs), step):
        part = [(row, *job) for row, job in enumerate(jobs[start : start + step].tolist(), start=2)]
        rows = torch.cat([ids[:1], ids[1:].expand(len(part) + 1, -1)])
        touched = [place for place in places if any(layer == place.index for _, layer, _, _ in part)]
        with torch.inference_mode(), traced.trace(**_inputs(traced, rows), remote=remote):
            for place in touched:
                experts = traced.get(place.path)
                given = _given(experts.inputs, len(rows))
                mine = [(row, expert, position) for row, layer, expert, position in part if layer == place.index]
                experts.output = _patched(experts, given, experts.output, mine, place)
            logits = traced.output.logits[:, -1].double()
            difference = nnsight.save(logits[:, answers[0]] - logits[:, answers[1]])
        effects.append((difference[2:] - difference[1]).cpu().numpy())
    found = np.concatenate(effects) if effects else np.zeros(0)
    if not np.isfinite(found).all():
        raise RunError("a patched run gave logits that are NaN or infinite.")
    return found


# -- inside a trace: what follows is sent along when it runs elsewhere -------------------------------------------------


def _given(inputs: tuple[tuple[Any, ...], dict[str, Any]], n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights (2, S, ·) that the experts are given in the first two rows: source and target."""
    args, kwargs = inputs
    hidden, ids, weights = (
        tensor.detach().reshape(n_rows, -1, tensor.shape[-1])[:2] for tensor in (*args, *kwargs.values())[:3]
    )
    return hidden, ids, weights


def _changes(
    experts: Any, given: tuple[Tensor, Tensor, Tensor], which: Sequence[int], place: _Place
) -> Iterator[Tensor]:
    """For each of some experts (or the router) what the patch adds to the target's sum over experts: (S, H)."""
    hidden, ids, weights = given
    same = torch.arange(hidden.shape[1], device=hidden.device).lt(place.first).unsqueeze(-1)
    if place.what == "routers":
        with torch.no_grad():
            source, target = (experts(hidden[1], ids[row], weights[row]) for row in (0, 1))
        yield (source - target).reshape(hidden.shape[1], -1).masked_fill(same, 0)
        return
    flat = [tensor.reshape(-1, tensor.shape[-1]) for tensor in given]
    terms = contributions(experts, flat[0], flat[1], flat[2], place.filler).view(*ids.shape, -1)  # (2, S, k, H)
    for expert in which:
        source, target = (terms * (ids == expert).unsqueeze(-1)).sum(2)
        yield (source - target).masked_fill(same, 0)


def _estimates(
    experts: Any, given: tuple[Tensor, Tensor, Tensor], gradient: Tensor, place: _Place
) -> tuple[Tensor, Tensor]:
    """Gradient times change, by position, for every patch of a layer, (C, S); and where there is a change at all."""
    gradient = gradient.reshape(2, given[0].shape[1], -1)[1].double()
    changes = list(_changes(experts, given, range(place.n_experts), place))
    estimates = torch.stack([(change.double() * gradient).sum(-1) for change in changes])
    return estimates, torch.stack([change.ne(0).any(-1) for change in changes])


def _patched(
    experts: Any,
    given: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    jobs: list[tuple[int, int, int]],
    place: _Place,
) -> Tensor:
    """What the experts return, with the changes of jobs (row, expert, position) added."""
    length = given[0].shape[1]
    rows = out.clone().reshape(-1, length, out.shape[-1])
    which = sorted({expert for _, expert, _ in jobs})
    for expert, change in zip(which, _changes(experts, given, which, place), strict=True):
        for row, wanted, position in jobs:
            if wanted == expert:
                where = slice(None) if position < 0 else slice(position, position + 1)
                rows[row, where] += change[where]
    return rows.reshape(out.shape)


# -- rows of the result ------------------------------------------------------------------------------------------------


def _rows(plain: _Plain, places: list[_Place], each_position: bool) -> dict[str, np.ndarray]:
    """All columns that the plain runs fill; expert and position are -1 where they are missing."""
    parts: list[dict[str, np.ndarray]] = []
    for place in places:
        ids, changed, estimate = plain.ids[place.index], plain.changed[place.index], plain.estimate[place.index]
        used = np.ones((2, *changed.shape), bool)  # (2, C, S): whether source and target select it there
        if place.what == "experts":
            used = (ids[:, None] == np.arange(place.n_experts)[:, None, None]).any(-1)
        if each_position:
            patch, position = np.nonzero(used.any(0))
            at = (patch, position)
            counts = used[0][at], used[1][at], changed[at], estimate[at]
        else:
            patch, position = np.arange(len(changed)), np.full(len(changed), -1)
            counts = used[0].sum(1), used[1].sum(1), changed.sum(1), estimate.sum(1)
        part = dict(zip(("n_source", "n_target", "n_changed", "estimate"), counts, strict=True))
        expert = patch if place.what == "experts" else np.full(len(patch), -1)
        parts.append({"layer": np.full(len(patch), place.index), "expert": expert, "position": position, **part})
    rows = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return {name: values if name == "estimate" else values.astype(np.int64) for name, values in rows.items()}
