"""Remixing: the routing of a prompt's last token moved towards that of similar texts which a model did well on.

    known = reference(model, trace)                            # a trace with logits
    remixed = remix(model, token_ids, known)
    with workbench.intervene(model, remixed.interventions): ...

C3PO ("C3PO: Critical-Layer, Core-Expert, Collaborative Pathway Optimization for Test-Time Expert Re-Mixing", Li et al.
2025, arXiv 2504.07964, section 3). A pathway omega is the router probabilities (layers, E) of one token. For a prompt x
with the pathway omega of its last token, and its nearest neighbours x_i among the texts of a reference:

    surrogate  L(w) = sum of K(x_i, x) · loss of what followed x_i, with w as pathway of its last token / sum of K
    kernel     omega_new = alpha · omega + (1 - alpha) · mean,  mean = sum of K(x_i, x) · omega_i / sum of K
               (equations 4 to 6), alpha being the one with the lowest surrogate, or a given number
    gradient   omega_new: steps down the surrogate from omega (equations 1 and 3, "neighbourhood gradient descent")

    K(x_i, x) = exp(-d² / 2 sigma²),  d the distance of their embeddings

Only the last 5 layers and in each the 20 experts with the highest probability at the prompt (all, where there are
fewer) are changed; the others keep their probability, and the whole is normalised.

**A text of the reference** is a prompt and what followed it: where the run tells a prompt from what comes after, the
last token of the prompt and all tokens after it; else the last but one token and the last. A text succeeded where its
mean nll is low, or where a column of its metadata says so.

**What is whose.** Layers, experts, 3 neighbours, the Gaussian kernel and 10 steps are the paper's. Adam, with a
learning rate that falls from 0.01 to 0.00001 along a cosine, is that of its authors' code for R2-T2, their method
before this one. Their code for C3PO has the kernel mean only, with alpha 0, all experts, and cosine similarity for K.
Made here: sigma is the median distance to the neighbours, since none is stated; a reference text that is the prompt
itself is left out; and the embedding, for which the paper has a language model of its own, whose output may be given:

    hidden   the model's last hidden state at the last token of the prompt, scaled to length 1; the default
    profile  the mean of the router probabilities over the tokens up to that one, all layers joined: no text of the
             reference has to be read again
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from workbench import learning
from workbench.errors import InputError
from workbench.intervening import intervene
from workbench.interventions import Remix
from workbench.models import Model
from workbench.recipe import Recipe, check_model, of_trace
from workbench.recorder import Recorder
from workbench.schema import UNKNOWN_TOKEN
from workbench.scores import log_probabilities
from workbench.tracefile import Trace

LAYERS = 5
EXPERTS = 20
NEIGHBOURS = 3
STEPS = 10
ALPHAS = tuple(tenth / 10 for tenth in range(11))
"""What alpha is chosen from."""
EMBEDDINGS = ("hidden", "profile")
RATES = (1e-2, 1e-5)
"""First and last learning rate, in the unit of probabilities."""
_LEAST = 1e-6  # of a probability while it is learned: one of 0 would have no gradient


@dataclass(frozen=True, eq=False)
class Reference:
    """Texts that a model did well on, and how it routed the last token of their prompts.

    seq         int (n,): which texts of the run
    token_ids   n arrays of ids, prompt and what followed
    position    int (n,): of the last token of the prompt
    pathways    layer -> float32 (n, E): router probabilities of that token
    embeddings  float32 (n, d): by which neighbours are found
    embedding   "hidden", "profile", or "given": what they are
    source      file, run and rule of success, for a recipe
    """

    seq: np.ndarray
    token_ids: tuple[np.ndarray, ...]
    position: np.ndarray
    pathways: dict[int, np.ndarray]
    embeddings: np.ndarray
    embedding: str
    source: dict[str, object]


@dataclass(frozen=True, eq=False)
class Remixed:
    """Edits for a prompt, and where they are from.

    interventions  one Remix a layer (alpha=0: the target is the whole pathway), for the last token of the prompt
    neighbours     one row a neighbour, nearest first: seq, distance, weight (K over the sum of K)
    alpha          of the kernel mean; None for the gradient
    losses         surrogate in nats. Gradient: before the first step, then after each. Kernel: at each of ALPHAS, ()
                   where alpha was given
    """

    interventions: tuple[Remix, ...]
    neighbours: pd.DataFrame
    alpha: float | None
    losses: tuple[float, ...]


def reference(
    model: Model,
    trace: Trace,
    *,
    success: float | str | Sequence[bool] | None = None,
    layers: Sequence[int] | None = None,
    embeddings: Literal["hidden", "profile"] | np.ndarray = "hidden",
) -> Reference:
    """The texts of a run that went well.

    trace       a run of the same model with logits
    success     highest mean nll of a text, in nats a token; or the name of a column of `Trace.sequences()` that holds
                true and false; or bool (n_sequences,); None: a mean nll of at most the median of the run
    layers      which to remix; None: the last 5 that have router scores
    embeddings  float (n_sequences, d), rows as in `Trace.sequences()`; or "hidden" or "profile", as the module says

    InputError if the run is of another model, has no logits, no token ids or no nll where that is asked for, or if no
    text went well.
    """
    try:
        check_model(Recipe((), of_trace(trace)), model)
    except InputError as error:
        raise InputError(f"{trace.path}: run {trace.run!r} is no reference for {model.name}: {error}") from error
    chosen = default_layers(model) if layers is None else learning.some_layers(model, layers)
    texts, tokens = trace.sequences(), trace.tokens()
    as_profile = isinstance(embeddings, str) and embeddings == "profile"
    given = None if isinstance(embeddings, str) else _given(embeddings, len(texts))
    if given is None and embeddings not in EMBEDDINGS:
        raise InputError(f"embeddings is {embeddings!r}; expected {', '.join(EMBEDDINGS)}, or an array.")
    well, rule = _succeeded(trace, texts, tokens, success)
    lengths = texts["n_tokens"].to_numpy(np.int64)
    prompt = texts["n_prompt"].to_numpy(np.int64)
    position = np.where((prompt < lengths) & (prompt > 0), prompt, lengths - 1) - 1
    kept = np.flatnonzero(well & (position >= 0))
    if not len(kept):
        raise InputError(f"{trace.path}: no text of run {trace.run!r} has two tokens and {rule}.")
    starts = np.cumsum(lengths) - lengths
    ids = tokens["token_id"].to_numpy()
    if (ids == UNKNOWN_TOKEN).any():
        raise InputError(f"{trace.path}: run {trace.run!r} has unknown token ids, so its texts can't be read again.")
    token_ids = tuple(ids[starts[row] : starts[row] + lengths[row]] for row in kept)
    # Of each layer that is needed: the pathway at one token, and the mean over the tokens up to it.
    within = np.concatenate([np.arange(starts[row], starts[row] + position[row] + 1) for row in kept])
    firsts = np.cumsum(position[kept] + 1) - position[kept] - 1
    pathways, profile = {}, []
    for layer in learning.scored(model):
        if layer.index in chosen or as_profile:
            logits = torch.from_numpy(trace.logits(layer.index)[within])
            probabilities = log_probabilities(logits, layer.scoring).exp().numpy()
        if layer.index in chosen:
            pathways[layer.index] = probabilities[firsts + position[kept]]
        if as_profile:
            profile.append(np.add.reduceat(probabilities, firsts, axis=0) / (position[kept, None] + 1))
    if as_profile:
        found = np.concatenate(profile, axis=1)
    elif given is None:
        found = np.stack([_hidden(model, one[: at + 1]) for one, at in zip(token_ids, position[kept], strict=True)])
    else:
        found = given[kept]
    return Reference(
        seq=texts["seq"].to_numpy()[kept],
        token_ids=token_ids,
        position=position[kept],
        pathways=pathways,
        embeddings=found,
        embedding="given" if given is not None else "profile" if as_profile else "hidden",
        source={"trace": str(trace.path), "run": trace.run, "success": rule},
    )


@torch.inference_mode(False)
def remix(
    model: Model,
    token_ids: Sequence[int] | np.ndarray | Tensor,
    known: Reference,
    *,
    method: Literal["kernel", "gradient"] = "kernel",
    alpha: float | None = None,
    n_neighbours: int = NEIGHBOURS,
    n_experts: int = EXPERTS,
    bandwidth: float | None = None,
    steps: int = STEPS,
    embedding: np.ndarray | None = None,
) -> Remixed:
    """A pathway for the last token of a prompt.

    token_ids     (n,) whole numbers: the prompt
    alpha         in [0, 1], how much of the router's own pathway the kernel mean leaves; None: the best of ALPHAS
    n_neighbours  how many texts of the reference to learn from, the nearest
    n_experts     core experts of a layer
    bandwidth     sigma of the kernel, > 0, in the unit of the embeddings' distance; None: the median of the neighbours'
    steps         of the gradient
    embedding     (d,) of the prompt, where the reference was given embeddings

    The interventions hold for this prompt alone: they act at position n - 1 and put a whole pathway there.
    InputError for a prompt, an embedding or numbers that can't be, or a reference with fewer texts than neighbours.
    """
    _check(method, alpha, n_neighbours, n_experts, bandwidth, steps)
    ids = learning.as_ids(model, token_ids, "the prompt", least=1)
    own, profile = _pathway(model, ids)
    found = _neighbours(
        known, ids[0].cpu().numpy(), _embedding(model, known, ids[0], embedding, profile), n_neighbours, bandwidth
    )
    rows, weights = found.index.to_numpy(), found["weight"].to_numpy()
    core = {layer: own[layer].topk(min(n_experts, len(own[layer]))).indices for layer in known.pathways}
    at_prompt = {layer: own[layer][core[layer]] for layer in core}

    def whole(values: dict[int, Tensor]) -> dict[int, Tensor]:
        """Pathways with these values at the core experts."""
        return {layer: own[layer].scatter(0, core[layer], values[layer]) for layer in core}

    def surrogate(values: dict[int, Tensor]) -> Tensor:
        return _surrogate(model, known, rows, weights, whole(values))

    if method == "gradient":
        values, losses = _descend(model, at_prompt, surrogate, steps)
    else:
        mean = {}
        for layer, places in core.items():
            all_experts = weights @ known.pathways[layer][rows].astype(np.float64)
            mean[layer] = torch.as_tensor(all_experts, dtype=torch.float32, device=ids.device)[places]

        def mixed(alpha: float) -> dict[int, Tensor]:
            return {layer: alpha * at_prompt[layer] + (1 - alpha) * mean[layer] for layer in core}

        losses = []
        if alpha is None:
            with torch.no_grad():
                losses = [float(surrogate(mixed(one))) for one in ALPHAS]
            # Of equal ones the one that changes least.
            alpha = max(zip(ALPHAS, losses, strict=True), key=lambda pair: (-pair[1], pair[0]))[0]
        values = mixed(alpha)
    last = f"position={ids.shape[1] - 1}"
    targets = {layer: (target / target.sum()).tolist() for layer, target in whole(values).items()}
    return Remixed(
        interventions=tuple(Remix(layer=layer, target=targets[layer], alpha=0.0, scope=last) for layer in targets),
        neighbours=found.reset_index(drop=True),
        alpha=alpha if method == "kernel" else None,
        losses=tuple(losses),
    )


def default_layers(model: Model) -> list[int]:
    """The last 5 layers of the decoder whose router has scores."""
    return [layer.index for layer in learning.scored(model) if layer.stack == "decoder"][-LAYERS:]


def _succeeded(
    trace: Trace, texts: pd.DataFrame, tokens: pd.DataFrame, success: float | str | Sequence[bool] | None
) -> tuple[np.ndarray, str]:
    """bool (n_sequences,), and the rule in words that go on "a text has …"."""
    if isinstance(success, str):
        if success not in texts:
            raise InputError(f"success is {success!r}; the texts have no such column, but {', '.join(texts.columns)}.")
        values = texts[success]
        if not values.dropna().isin([True, False]).all():
            raise InputError(f"success: column {success!r} holds {values.dropna().iloc[0]!r}; expected true and false.")
        return values.eq(True).fillna(False).to_numpy(bool), f"true in column {success!r}"
    if success is not None and not isinstance(success, int | float):
        flags = np.asarray(success)
        if flags.shape != (len(texts),) or flags.dtype != bool:
            raise InputError(f"success has shape {flags.shape} of {flags.dtype}; expected {len(texts)} true or false.")
        return flags, "been named as successful"
    nll = tokens.groupby("seq", sort=True)["nll"].mean().reindex(texts["seq"]).to_numpy()
    if np.isnan(nll).all():
        raise InputError(
            f"{trace.path}: run {trace.run!r} has no nll to tell success by; give the name of a column that says it."
        )
    highest = float(np.nanmedian(nll) if success is None else success)
    return nll <= highest, f"a mean nll of at most {highest:.4g} nats (the lowest is {np.nanmin(nll):.4g})"


def _given(embeddings: np.ndarray, n: int) -> np.ndarray:
    found = np.asarray(embeddings)
    if found.ndim != 2 or len(found) != n or not np.isfinite(found).all():
        raise InputError(f"embeddings have shape {found.shape}; expected ({n}, d) finite numbers, a row a text.")
    return found.astype(np.float32)


def _embedding(
    model: Model, known: Reference, ids: Tensor, embedding: np.ndarray | None, profile: np.ndarray
) -> np.ndarray:
    """That of the prompt, made as the reference's."""
    if known.embedding != "given":
        if embedding is not None:
            raise InputError("embedding: the reference has none like it; give reference() the embeddings of its texts.")
        return profile if known.embedding == "profile" else _hidden(model, ids.cpu().numpy())
    found = None if embedding is None else np.asarray(embedding, dtype=np.float32)
    if found is None or found.shape != known.embeddings.shape[1:]:
        shape = "none" if found is None else str(found.shape)
        raise InputError(f"embedding: {shape}; expected ({known.embeddings.shape[1]},), made as the reference's.")
    return found


def _hidden(model: Model, token_ids: np.ndarray) -> np.ndarray:
    """float32 (d,) of length 1: what the model's head is given at the last token."""
    ids = learning.as_ids(model, token_ids, "a prompt", least=1)
    head = model.module.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise InputError(f"{model.family} has no head to read hidden states from: take the embedding `profile`.")
    seen = []
    handle = head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            model.module(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    state = seen[0].reshape(-1, seen[0].shape[-1])[-1].float()
    return (state / state.norm()).cpu().numpy()


def _pathway(model: Model, ids: Tensor) -> tuple[dict[int, Tensor], np.ndarray]:
    """Router probabilities at the last token, float32 (E,) by layer, and their mean over the tokens, layers joined."""
    with Recorder(model, ["probabilities"]) as recorder, torch.no_grad():
        model.module(input_ids=ids, use_cache=False)
    (seen,) = recorder.take()
    found, profile = {}, []
    for layer in learning.scored(model):
        probabilities = seen[layer.index].probabilities
        assert probabilities is not None
        found[layer.index] = probabilities[0, -1].float().clone()
        profile.append(probabilities[0].float().mean(0).cpu().numpy())
    return found, np.concatenate(profile)


def _neighbours(
    known: Reference, prompt: np.ndarray, embedding: np.ndarray, n: int, bandwidth: float | None
) -> pd.DataFrame:
    """The nearest texts but the prompt itself: seq, distance, weight; the index is the row in the reference."""
    itself = [
        np.array_equal(ids[: at + 1], prompt) for ids, at in zip(known.token_ids, known.position.tolist(), strict=True)
    ]
    distance = np.linalg.norm(known.embeddings.astype(np.float64) - embedding, axis=1)
    others = np.flatnonzero(~np.array(itself))
    if len(others) < n:
        raise InputError(
            f"the reference has {len(others)} successful texts besides the prompt; {n} neighbours need that many. "
            "Trace more texts, or make success easier."
        )
    rows = others[np.argsort(distance[others], kind="stable")[:n]]
    sigma = float(np.median(distance[rows])) if bandwidth is None else bandwidth
    # Taken from the nearest one's, which cancels in every mean, so that not all of them can underflow.
    exponent = (distance[rows] ** 2 - distance[rows[0]] ** 2) / (2 * sigma**2 or 1.0)
    kernel = np.exp(-exponent)
    columns = {"seq": known.seq[rows], "distance": distance[rows], "weight": kernel / kernel.sum()}
    return pd.DataFrame(columns, index=rows)


def _surrogate(
    model: Model, known: Reference, rows: np.ndarray, weights: np.ndarray, pathway: dict[int, Tensor]
) -> Tensor:
    """Kernel-weighted loss of what followed the neighbours, in nats a token."""
    total = torch.zeros((), device=model.device)
    for row, weight in zip(rows.tolist(), weights.tolist(), strict=True):
        at = int(known.position[row])
        ids = learning.as_ids(model, known.token_ids[row], f"text {known.seq[row]} of the reference")
        edits = [Remix(layer=layer, target=one, alpha=0.0, scope=f"position={at}") for layer, one in pathway.items()]
        with intervene(model, edits):
            total = total + weight * learning.loss(model, ids, first=at + 1)
    return total


def _descend(
    model: Model, start: dict[int, Tensor], surrogate: Callable[[dict[int, Tensor]], Tensor], steps: int
) -> tuple[dict[int, Tensor], list[float]]:
    """Values with a lower surrogate, and the surrogate before the first step and after each."""
    losses = []
    with learning.gradients(model):
        values = {layer: one.clone().requires_grad_() for layer, one in start.items()}
        learned = list(values.values())
        optimise = torch.optim.Adam(learned, lr=RATES[0])
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimise, T_max=max(steps, 1), eta_min=RATES[1])
        for step in range(steps + 1):
            with torch.set_grad_enabled(step < steps):
                loss = surrogate(values)
            losses.append(float(loss.detach()))
            if step < steps:
                learning.gradient(loss, learned)
                optimise.step()
                falling.step()
                with torch.no_grad():
                    for one in learned:
                        one.clamp_(min=_LEAST)
    return {layer: one.detach() for layer, one in values.items()}, losses


def _check(
    method: str, alpha: float | None, n_neighbours: int, n_experts: int, bandwidth: float | None, steps: int
) -> None:
    if method not in ("kernel", "gradient"):
        raise InputError(f"method is {method!r}; expected kernel, gradient.")
    if alpha is not None and (method != "kernel" or not 0 <= alpha <= 1):
        raise InputError(f"alpha is {alpha}; expected a number from 0 to 1, with the method kernel.")
    learning.whole(n_neighbours, "n_neighbours", 1)
    learning.whole(n_experts, "n_experts", 1)
    learning.whole(steps, "steps", 0)
    if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth > 0):
        raise InputError(f"bandwidth is {bandwidth}; expected a number above 0.")
