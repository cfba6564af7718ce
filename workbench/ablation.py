"""What a model loses without one expert: its loss on texts with an expert's contribution dropped, as fast as can be.

    for drop in ablate(model, texts, layers, renormalise=False):
        drop.layer, drop.expert, drop.change      # float64 (n_texts,): nats, summed over each text

An expert is dropped after the selection: its gate weight is set to 0 on the way into the experts, so that no other
expert takes its place. The weights of the model are never touched.

Three things make it fast, and none of them changes a result:
- A text that never uses an expert in that layer isn't run: nothing changes.
- The network before the layer isn't run: its decoder layers return what they returned in the plain pass.
- One forward pass drops a different expert in each of its rows; and logits are computed only from the place on where
  the text first uses the expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workbench import tokenization
from workbench.errors import InputError
from workbench.forward import pad_id, padded, predicts_next, reads_twice
from workbench.layers import Layer
from workbench.models import Model
from workbench.recorder import Recorder

LOSS_ROWS = 1024
"""Logits turned into losses at once, so that no second copy of all of them is made."""


@dataclass(frozen=True, slots=True, eq=False)
class Drop:
    """One batch of texts without one expert. Places are those of the texts given to `ablate`.

    change       float64 (n,): the loss without the expert minus the plain loss, nats, summed over a text's predictions
    change_used  float64 (n,): the same over the predictions made at tokens that used the expert
    n_used       int64 (n,): how many tokens of the text used it; n_used_predicting: those with a next token to predict
    """

    layer: int
    expert: int
    places: np.ndarray
    change: np.ndarray
    change_used: np.ndarray
    n_used: np.ndarray
    n_used_predicting: np.ndarray


@dataclass(slots=True, eq=False)
class _Plain:
    """A batch as the model reads it undisturbed: B texts, S places, padding on the right."""

    ids: Tensor  # (B, S)
    mask: Tensor  # (B, S)
    nll: Tensor  # (B, S) float64: of the token after each place; 0 at the last place of a text and in padding
    predicting: Tensor  # (B, S) bool: whether a token follows
    used: dict[int, Tensor]  # layer -> (B, S, k) ids, -1 for none and in padding
    outputs: dict[nn.Module, Any]  # what the decoder layer before each of the layers returned


def check(model: Model) -> None:
    """InputError if experts of this model can't be dropped, or its loss isn't known."""
    for layer in model.layers:
        if layer.family.layout != "standard":
            raise InputError(
                f"experts of {model.family} can't be dropped: their gate weights don't reach them as an argument. "
                "Families whose layout is `standard` can: see `workbench models`."
            )
    if reads_twice(model) or not predicts_next(model):
        raise InputError(f"{model.family} doesn't predict the next token of a text, so dropping has no loss to change.")


def ablate(
    model: Model,
    texts: Sequence[tokenization.Sequence],
    layers: Sequence[Layer],
    *,
    experts: Sequence[int] | None = None,
    renormalise: bool = False,
    batch_tokens: int = 4096,
    done: Callable[[float], None] = lambda share: None,
) -> tuple[np.ndarray, np.ndarray, Iterator[Drop]]:
    """The plain loss, and the change of it with each expert dropped.

    texts         sequences of tokens; each has at most `batch_tokens`, or a batch of its own
    layers        where to drop; experts: which (None: all of each layer)
    renormalise   scale the other weights of a token so that their sum stays what it was
    done          called with the share of the work that has been done

    Returns the plain loss of each text in nats, summed (float64, n_texts), its number of predictions (int64), both
    filled in while the third is consumed: an iterator of Drops, for every expert that a text of the batch uses.
    """
    check(model)
    loss, predictions = np.zeros(len(texts)), np.zeros(len(texts), np.int64)

    def drops() -> Iterator[Drop]:
        groups = tokenization.plan([len(text.token_ids) for text in texts], batch_tokens)
        total, finished = sum(len(text.token_ids) for text in texts), 0
        restart: bool | None = None
        with torch.inference_mode():
            for places in groups:
                batch = [texts[place] for place in places]
                plain = _plain(model, batch, layers)
                loss[places] = plain.nll.sum(1).cpu().numpy()
                predictions[places] = plain.predicting.sum(1).cpu().numpy()
                if restart is None:
                    restart = _can_restart(model, plain, layers[-1])
                for number, layer in enumerate(layers):
                    chosen = range(layer.n_experts) if experts is None else experts
                    before = _before(layer) if restart else None
                    yield from _without(
                        model, plain, layer, chosen, np.array(places), before, renormalise, batch_tokens
                    )
                    share = sum(len(text.token_ids) for text in batch) / total
                    done(finished + share * (number + 1) / len(layers))
                finished += share

    return loss, predictions, drops()


def _plain(model: Model, batch: list[tokenization.Sequence], layers: Sequence[Layer]) -> _Plain:
    """The undisturbed pass, with what is needed to continue it from any of the layers."""
    ids, mask = padded(batch, pad_id(model), "right", model.device)
    predicting = mask.bool()
    predicting[:, :-1] &= mask[:, 1:].bool()
    predicting[:, -1] = False
    outputs: dict[nn.Module, Any] = {}
    with ExitStack() as hooks, Recorder(model) as recorder:
        for before in {_before(layer)[-1] for layer in layers if _before(layer)}:
            handle = before.register_forward_hook(lambda module, _args, out: outputs.update({module: out}))
            hooks.callback(handle.remove)
        nll = _nll(model, ids, mask, predicting)
    (seen,) = recorder.take()
    none = ~mask.bool().unsqueeze(-1)
    used = {layer.index: seen[layer.index].experts.masked_fill(none, -1) for layer in layers}
    return _Plain(ids, mask, nll, predicting, used, outputs)


def _nll(model: Model, ids: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """float64 (B, S): nats of the token after each wanted place (bool), 0 elsewhere."""
    module: Any = model.module
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    places = wanted.flatten().nonzero().squeeze(1)

    def only_wanted(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].reshape(-1, args[0].shape[-1])[places].unsqueeze(0), *args[1:])

    handle = None if head is None else head.register_forward_pre_hook(only_wanted)
    try:
        logits = module(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    logits = logits.flatten(0, 1)
    if len(logits) != len(places):  # the head wasn't called as a module
        logits = logits[places]
    following = torch.cat([ids[:, 1:], ids[:, :1]], 1).flatten()[places]
    losses = [
        cross_entropy(logits[start : start + LOSS_ROWS].float(), following[start : start + LOSS_ROWS], reduction="none")
        for start in range(0, len(places), LOSS_ROWS)
    ]
    nll = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    if losses:
        nll.view(-1)[places] = torch.cat(losses).double()
    return nll


def _without(
    model: Model,
    plain: _Plain,
    layer: Layer,
    experts: Sequence[int],
    places: np.ndarray,
    before: list[nn.Module] | None,
    renormalise: bool,
    batch_tokens: int,
) -> Iterator[Drop]:
    """Every expert of a layer that a text of the batch uses, dropped."""
    used = plain.used[layer.index]
    length = used.shape[1]
    jobs = torch.zeros(layer.n_experts, len(used), dtype=torch.bool, device=used.device)  # expert, text
    for expert in experts:
        jobs[expert] = (used == expert).flatten(1).any(1)
    which, rows = jobs.nonzero(as_tuple=True)
    tokens_used = (used[rows] == which[:, None, None]).any(-1)  # (n, S)
    change = np.zeros((len(rows), 2))
    step = max(1, batch_tokens // length)
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        row, at = rows[part], tokens_used[part]
        reached = at.cumsum(1) > 0  # nothing changes before the first use
        wanted = reached & plain.predicting[row]
        with ExitStack() as held:
            held.enter_context(_dropping(layer, which[part], length, renormalise))
            if before:
                held.enter_context(_returning(before, _rows(plain.outputs[before[-1]], row, len(used))))
            nll = _nll(model, plain.ids[row], plain.mask[row], wanted)
        apart = torch.where(wanted, nll - plain.nll[row], 0.0)
        change[part] = torch.stack([apart.sum(1), (apart * at).sum(1)], 1).cpu().numpy()
    n_used = tokens_used.sum(1).cpu().numpy()
    n_predicting = (tokens_used & plain.predicting[rows]).sum(1).cpu().numpy()
    owner, text = which.cpu().numpy(), places[rows.cpu().numpy()]
    for expert in np.unique(owner).tolist():
        mine = owner == expert
        yield Drop(layer.index, expert, text[mine], change[mine, 0], change[mine, 1], n_used[mine], n_predicting[mine])


@contextmanager
def _dropping(layer: Layer, experts: Tensor, length: int, renormalise: bool) -> Iterator[None]:
    """In row i of a batch (rows × length tokens), expert `experts[i]` of the layer has weight 0."""
    of_token = experts.repeat_interleave(length)

    def drop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        names = list(kwargs)
        given = [*args, *kwargs.values()]
        ids, weights = given[1], given[2]
        gone = ids == of_token.reshape(-1, *(1,) * (ids.dim() - 1)).expand(ids.shape[0], *ids.shape[1:])
        left = weights.masked_fill(gone, 0)
        if renormalise:
            total = left.sum(-1, keepdim=True)
            scaled = left * (weights.sum(-1, keepdim=True) / torch.where(total > 0, total, 1))
            left = torch.where(gone.any(-1, keepdim=True), scaled, left)
        given[2] = left
        return tuple(given[: len(args)]), dict(zip(names, given[len(args) :], strict=True))

    handle = layer.experts.register_forward_pre_hook(drop, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# -- starting in the middle --------------------------------------------------------------------------------------------


def _before(layer: Layer) -> list[nn.Module]:
    """The decoder layers that run before the one the layer is in."""
    stacks = [list(part) for part in layer.owner.children() if isinstance(part, nn.ModuleList)]
    stack = next((stack for stack in stacks if any(part is layer.around for part in stack)), [])
    return stack[: next((place for place, part in enumerate(stack) if part is layer.around), 0)]


@contextmanager
def _returning(modules: Sequence[nn.Module], out: Any) -> Iterator[None]:
    """Calling any of the modules returns `out` at once."""
    try:
        for module in modules:
            module.forward = lambda *_args, **_kwargs: out
        yield
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def _rows(out: Any, rows: Tensor, n_rows: int) -> Any:
    """Some rows of what a decoder layer returned."""
    if isinstance(out, Tensor):
        return out[rows] if out.dim() and out.shape[0] == n_rows else out
    if isinstance(out, tuple | list):
        return type(out)(_rows(part, rows, n_rows) for part in out)
    return out


def _can_restart(model: Model, plain: _Plain, layer: Layer) -> bool:
    """Whether a pass that starts at the layer gives the plain loss: not in models whose layers share more than that."""
    before = _before(layer)
    if not before:
        return False
    rows = torch.arange(len(plain.ids), device=plain.ids.device)
    try:
        with _returning(before, _rows(plain.outputs[before[-1]], rows, len(rows))):
            nll = _nll(model, plain.ids, plain.mask, plain.predicting)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return False
    return torch.equal(nll, plain.nll)
