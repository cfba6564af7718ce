"""What the conditions of an evaluation do to each text: sums over its tokens, all conditions on the same batches.

The measures are defined in `workbench.evaluation`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm.auto import tqdm

from workbench.conditions import STEERED, Conditions, under
from workbench.errors import RunError
from workbench.forward import next_token_nll, pad_id
from workbench.intervening import Intervened
from workbench.losses import next_token_logits
from workbench.models import Model
from workbench.observation import Observation
from workbench.recorder import Recorder
from workbench.token_classes import CLASSES, token_classes
from workbench.tokenization import Sequence, batches

MEASURES = ("nll", "kl", "overlap")


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of each text under one condition, and how many tokens they are over.

    of_class  float64 (2, 3, n_texts, n_classes): sum and number of each of MEASURES, by class of token
    of_layer  float64 (2, n_layers, n_texts): sum and number of the overlap
    """

    of_class: np.ndarray
    of_layer: np.ndarray


def effects(model: Model, texts: list[Sequence], runs: Conditions, batch_tokens: int, progress: bool) -> list[Sums]:
    """All conditions over all texts, batch by batch, in the order of `runs`.

    RunError if the recipe touched nothing, or where a loss isn't a number.
    """
    ids = np.unique(np.concatenate([text.token_ids for text in texts]))
    known = np.zeros(max(int(ids[-1]), pad_id(model)) + 1, np.int64)
    known[ids] = token_classes(model.tokenizer, ids.tolist())
    class_of_id = torch.from_numpy(known).to(model.device)
    applied = {name: Intervened(model, edits) if edits else None for name, edits in runs.items()}
    found = [
        Sums(np.zeros((2, len(MEASURES), len(texts), len(CLASSES))), np.zeros((2, len(model.layers), len(texts))))
        for _ in runs
    ]
    n_tokens = len(runs) * sum(len(text.token_ids) for text in texts)
    bar = tqdm(total=n_tokens, desc="evaluating", unit=" tokens", unit_scale=True, disable=None if progress else True)
    with bar, torch.inference_mode():
        for batch in batches(texts, batch_tokens):
            plain: tuple[Tensor, list[Tensor]] | None = None
            places = [text.seq for text in batch]
            for name, sums in zip(runs, found, strict=True):
                with under(model, applied[name]), Recorder(model) as recorder:
                    logits, ids, mask = next_token_logits(model, batch)
                    (seen,) = recorder.take()
                experts = [_experts(layer) for layer in seen]
                plain = plain or (logits, experts)
                overlap = torch.stack([_overlap(*pair) for pair in zip(plain[1], experts, strict=True)])  # (L, B, S)
                used = overlap.isfinite() & mask
                overlap = overlap.where(used, 0)
                predicted = mask.clone()
                predicted[:, 0] = False
                lost, moved = next_token_nll(logits, ids), divergence(plain[0], logits)
                values = lost.where(predicted, 0), moved.where(predicted, 0), overlap.sum(0)
                numbers = predicted, predicted, used.sum(0)
                of_tokens = torch.stack([x.double() for x in (*values, *numbers)])
                sums.of_class[:, :, places] = _by_class(of_tokens, class_of_id[ids])
                if np.isnan(sums.of_class[0, 0, places]).any():
                    raise RunError(
                        f"{name}: the loss is not a number, since logits are NaN or infinite. Take a weaker edit, or "
                        "compute in float32."
                    )
                sums.of_layer[:, :, places] = torch.stack([overlap.sum(-1), used.sum(-1)]).cpu().numpy()
                bar.update(int(mask.sum()))
                del logits  # before the next condition's are made
    steered = applied[STEERED]
    if steered is not None:
        steered.check_touched()
    return found


def _experts(seen: Observation) -> Tensor:
    """int64 (B, S, k): the experts that contribute, -1 in the places of others."""
    assert seen.weights is not None
    return seen.experts.masked_fill(seen.weights == 0, -1)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """float64 (B, S): |S ∩ S'| / max(|S|, |S'|) of two choices (B, S, k) and (B, S, k'), NaN where both are empty."""
    both = ((a.unsqueeze(-1) == b.unsqueeze(-2)) & (a >= 0).unsqueeze(-1)).sum((-2, -1))
    return both.double() / torch.maximum((a >= 0).sum(-1), (b >= 0).sum(-1))


def divergence(plain: Tensor, other: Tensor) -> Tensor:
    """KL(plain ‖ other) in nats of the distributions that predict each token: logits (B, S, V) to float32 (B, S).

    0 for the first token, which nothing predicts. A token that is impossible in both adds nothing; one that is
    impossible in `other` alone makes it infinite. A row at a time saves memory.
    """
    kl = torch.zeros(plain.shape[:2], dtype=torch.float32, device=plain.device)
    for row in range(len(plain)):
        p, q = (log_softmax(logits[row, :-1].float(), dim=-1) for logits in (plain, other))
        kl[row, 1:] = torch.where(p == -torch.inf, 0, p.exp() * (p - q)).sum(-1).clamp_min(0)
    return kl


def _by_class(values: Tensor, classes: Tensor) -> np.ndarray:
    """Sums (6, B, S) by class of token (B, S): float64 (2, 3, B, n_classes)."""
    n_rows, n_classes = len(classes), len(CLASSES)
    cell = torch.arange(n_rows, device=classes.device).unsqueeze(-1) * n_classes + classes
    total = torch.zeros(len(values), n_rows * n_classes, dtype=torch.float64, device=values.device)
    total.index_add_(1, cell.flatten(), values.flatten(1))
    return total.view(2, len(MEASURES), n_rows, n_classes).cpu().numpy()
