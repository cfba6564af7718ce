"""Recorded routing for a running model: which experts a trace has for each token of a pass."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workbench.errors import InputError, RunError
from workbench.interventions import Replay
from workbench.layers import Layer
from workbench.models import Model
from workbench.routing import NO_EXPERT
from workbench.scope import Pass
from workbench.tracefile import Trace
from workbench.weights import uncut

_KEY = 16
"""Token ids at the beginning of a text by which it is looked up."""


class Recorded(NamedTuple):
    """The record of T tokens at one layer.

    experts  int64 (T, k), -1 for none
    weights  float32 (T, k), where they are to be restored
    known    bool (T,): tokens in scope; padding and others have no record
    """

    experts: Tensor
    weights: Tensor | None
    known: Tensor


class Record:
    """The routing that a run recorded, by the token ids of its texts. One layer is read at a time, and kept.

    InputError if the run has other layers than the model, or doesn't know its token ids or, where they are to be
    replayed, weights.
    """

    def __init__(self, replay: Replay, model: Model) -> None:
        self._trace = trace = Trace(replay.trace, replay.run)
        recorded = trace.layers[["n_experts", "top_k"]].astype(int).to_numpy().tolist()
        here = [[layer.n_experts, layer.top_k] for layer in model.layers]
        if recorded != here:
            raise InputError(
                f"Replay: run {trace.run!r} has {len(recorded)} layers of (experts, k) {_sizes(recorded)}, "
                f"{model.name} has {len(here)} of {_sizes(here)}: only routing of the same shape can be replayed."
            )
        if replay.weights == "recorded" and "weights" not in trace.recorded:
            raise InputError(f'Replay: run {trace.run!r} has no weights: use weights="own", or trace with weights.')
        tokens = trace.tokens()
        self._ids = tokens["token_id"].to_numpy()
        if (self._ids < 0).any():
            raise InputError(f"Replay: run {trace.run!r} doesn't know its token ids, by which texts are found.")
        self._weights = replay.weights == "recorded"
        self._ends = np.cumsum(np.bincount(trace.sequence_index(), minlength=trace.n_sequences))
        self._starts = np.concatenate([[0], self._ends[:-1]])
        self._texts: dict[bytes, list[int]] = defaultdict(list)
        for text, start in enumerate(self._starts):
            self._texts[self._ids[start : min(start + _KEY, self._ends[text])].tobytes()].append(text)
        self._layers: dict[int, tuple[Tensor, Tensor | None]] = {}
        self._found: tuple[Pass, Tensor] | None = None

    def of(self, now: Pass, layer: Layer, within: Tensor | None) -> Recorded:
        """What is recorded for the tokens of a pass. RunError for a text that the run doesn't have."""
        if self._found is None or self._found[0] is not now:
            self._found = now, self._places(now, within)
        places = self._found[1]
        if layer.index not in self._layers:
            experts = self._trace.experts(layer.index).astype(np.int64)
            experts[experts == NO_EXPERT] = -1
            weights = torch.from_numpy(self._trace.weights(layer.index)) if self._weights else None
            self._layers[layer.index] = torch.from_numpy(experts), weights
        experts, weights = self._layers[layer.index]
        known, device = places >= 0, now.real.device
        if weights is None and uncut(layer) and bool((experts[places[known]] < 0).any()):
            raise RunError(
                f"Replay: at layer {layer.index} some tokens of run {self._trace.run!r} have fewer experts than "
                f'others, and this family {uncut(layer)}: replay weights="recorded".'
            )
        ids = torch.where(known[:, None], experts[places.clamp_min(0)], -1).to(device)
        return Recorded(ids, None if weights is None else weights[places.clamp_min(0)].to(device), known.to(device))

    def _places(self, now: Pass, within: Tensor | None) -> Tensor:
        """int64 (T,): row of the trace of each token, -1 for tokens out of scope and padding."""
        if now.ids is None:
            raise RunError("Replay finds texts by their token ids, but the model was given embeddings.")
        rows, new = now.shape
        real = now.real.cpu()
        wanted = real[:, now.past :].clone()
        if within is not None:
            wanted &= within.view(rows, new).cpu()
        places = torch.full((rows, new), -1, dtype=torch.int64)
        for row in range(rows):
            columns = wanted[row].nonzero().squeeze(1) + now.past
            if not len(columns):
                continue
            position = real[row].cumsum(0) - 1
            last = int(columns[-1])
            text = now.ids[row, : last + 1][now.real[row, : last + 1]].cpu().numpy()
            places[row, columns - now.past] = position[columns] + int(self._starts[self._text(text)])
        return places.flatten()

    def _text(self, ids: np.ndarray) -> int:
        """The recorded text that is, or else begins with, these token ids."""
        ids = ids.astype(self._ids.dtype)
        near = self._texts.get(ids[:_KEY].tobytes(), []) if len(ids) >= _KEY else range(len(self._starts))
        begins = None
        for text in near:
            start, end = self._starts[text], self._ends[text]
            if end - start >= len(ids) and np.array_equal(self._ids[start : start + len(ids)], ids):
                if end - start == len(ids):
                    return text
                begins = text if begins is None else begins
        if begins is None:
            raise RunError(
                f"Replay: run {self._trace.run!r} has no text that is or begins with the {len(ids)} tokens "
                f"{ids[:6].tolist()}…: replay on the texts that were traced, with the same tokenizer and --max-length; "
                "for what is generated after them, use scope phase=prompt."
            )
        return begins


def _sizes(layers: list[list[int]]) -> str:
    return ", ".join(f"({n}, {k})" for n, k in dict.fromkeys(map(tuple, layers)))
