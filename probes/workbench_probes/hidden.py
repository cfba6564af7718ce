"""Hidden states of a trace's own tokens: the model runs over them again, and what each MoE block is given is kept.

The trace holds no hidden states, so the model that was traced has to be there. Whether it is the same one is checked:
what its routers choose is compared with what the trace recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from workbench.errors import InputError
from workbench.forward import pad_id, reads_twice
from workbench.models import Model, load
from workbench.recorder import Recorder
from workbench.routing import NO_EXPERT
from workbench.tokenization import plan
from workbench.tracefile import Trace
from workbench_probes.features import known_ids

SAME = 0.9
"""At least this share of the recorded choices must come out again; other precisions and batch sizes change a few."""


def hidden_states(
    trace: Trace,
    row: np.ndarray,
    unit: str,
    layers: Sequence[int],
    *,
    model: Model | str | None = None,
    batch_tokens: int = 4096,
) -> dict[int, np.ndarray]:
    """Layer -> float32 (n, hidden size): what the layer's MoE block reads at each row, means over a sequence's tokens.

    row    int64 (n,): places among the trace's tokens (unit "token") or sequences, ascending
    model  what was traced, or its name; None: the name that the trace has

    InputError if there is no such model, it routes other than the trace says, it reads texts twice (encoder–decoder),
    or the trace doesn't know its token ids.
    """
    ids = known_ids(trace)
    loaded = model if isinstance(model, Model) else load(model or traced_model(trace))
    if reads_twice(loaded):
        raise InputError(f"{loaded.name} has an encoder and a decoder; hidden states are read of decoders only.")
    if len(loaded.layers) != trace.n_layers:
        raise InputError(
            f"{loaded.name} has {len(loaded.layers)} MoE layers, run {trace.run!r} has {trace.n_layers}: name the "
            "model that was traced."
        )
    owner = trace.sequence_index()
    wanted = np.unique(owner[row]) if unit == "token" else row
    starts = np.searchsorted(owner, np.arange(trace.n_sequences + 1))
    lengths = np.diff(starts)[wanted]
    recorded = {layer: trace.experts(layer) for layer in layers}
    result: dict[int, np.ndarray] = {}
    same = total = 0
    filled = np.flatnonzero(lengths)
    for batch in plan(lengths[filled].tolist(), batch_tokens):
        members = filled[batch]
        texts = wanted[members]
        tokens = np.concatenate([np.arange(int(starts[text]), int(starts[text + 1])) for text in texts])
        read, chosen = _read(loaded, [ids[starts[text] : starts[text + 1]] for text in texts], layers)
        for layer in layers:
            ours, theirs = np.sort(chosen[layer]), np.sort(recorded[layer][tokens])
            same += (ours[:, :, None] == theirs[:, None, :])[ours != NO_EXPERT].any(axis=-1).sum()
            total += (theirs != NO_EXPERT).sum()
            if layer not in result:
                result[layer] = np.zeros((len(row), read[layer].shape[1]), np.float32)
            if unit == "token":
                at = np.searchsorted(row, tokens).clip(max=len(row) - 1)
                kept = row[at] == tokens
                result[layer][at[kept]] = read[layer][kept]
            else:
                edges = np.append(0, np.cumsum(lengths[members])[:-1])
                sums = np.add.reduceat(read[layer], edges, axis=0)
                result[layer][members] = sums / lengths[members][:, None]
    if same < SAME * total:
        raise InputError(
            f"{loaded.name} chooses only {same / total:.0%} of the experts that run {trace.run!r} recorded: give the "
            "model that was traced, without the recipe that steered it."
        )
    return result


def traced_model(trace: Trace) -> str:
    """Name of the model that the run says it is of; InputError where it says none."""
    runs = trace.runs()
    name = runs.loc[runs["run"] == trace.run, "model"].iloc[0]
    if not isinstance(name, str) or not name:
        raise InputError(
            f"run {trace.run!r} doesn't say which model it is of: name one (--model) to read hidden states."
        )
    return name


def _read(
    model: Model, texts: list[np.ndarray], layers: Sequence[int]
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """What the blocks were given, float32 (T, hidden), and chose, uint16 (T, k), for the T tokens of some texts."""
    longest = max(map(len, texts))
    padded = np.full((len(texts), longest), pad_id(model), np.int64)
    there = np.arange(longest) < np.array([len(text) for text in texts])[:, None]
    padded[there] = np.concatenate(texts)
    ids, kept = torch.from_numpy(padded).to(model.device), torch.from_numpy(there).to(model.device)
    states: dict[int, np.ndarray] = {}

    def hook(layer: int) -> Any:
        def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            flat = given.detach().reshape(*ids.shape, -1)
            states[layer] = flat[kept].float().cpu().numpy()

        return keep

    handles = [model.layers[layer].block.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer in layers]
    try:
        with Recorder(model, ("ids",)) as recorder, torch.inference_mode():
            model.module(input_ids=ids, attention_mask=kept.long(), use_cache=False)
        (observed,) = recorder.take()
    finally:
        for handle in handles:
            handle.remove()
    chosen = {layer: observed[layer].experts[kept].cpu().numpy().astype(np.uint16) for layer in layers}
    return states, chosen
