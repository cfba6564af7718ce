"""Counts of SGLang's expert distribution recorder, which KTransformers takes as activation statistics: .pt files.

Source: sgl-project/sglang, python/sglang/srt/eplb/expert_distribution.py (`_StatAccumulator.dump`), commit 02295fe. A
server with --expert-distribution-recorder-mode stat, asked for /dump_expert_distribution_record, writes

    {"rank": 0, "logical_count": int32 (steps, layers, E), "average_utilization_rate_over_window": float or None}

how often the tokens of each forward pass chose each expert, in the layers of the model (those of dense layers are 0).
The file becomes a run that counts (`workbench.counts`), with a sequence a step that saw a token. Who was chosen
together isn't known, so it has no pairs. Consecutive steps go into one block, since they work on the same requests;
intervals rest on blocks.

Only tensors are loaded (torch's `weights_only`), nothing else that a pickle could hold.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.counts import Counts, Loads
from workbench.errors import InputError
from workbench.importers.documents import first_line
from workbench.importers.writing import layer_row, routers
from workbench.schema import COUNTS
from workbench.store import Writer

MOST_BLOCKS = 64
STEPS = 256
"""Steps that are written at once."""


def write(
    path: Path,
    files: Sequence[Path],
    facts: dict[str, Any],
    top_k: int,
    n_experts: int | None,
    n_layers: int | None,
    dense: Sequence[int],
) -> None:
    """Write the counts of files as the run `facts` of a new file. InputError if they aren't what a recorder wrote."""
    steps, tables = zip(*(counted(one) for one in files), strict=True)
    _, layers, size = tables[0].shape
    wanted = (n_layers or layers, n_experts or size)
    for one, table in zip(files, tables, strict=True):
        if table.shape[1:] != wanted:
            raise InputError(
                f"{one}: {table.shape[1]} layers of {table.shape[2]} experts; expected {wanted[0]} of {wanted[1]}."
            )
    if top_k > size:
        raise InputError(f"--top-k is {top_k}; the layers have {size} experts.")
    kept = routers(str(files[0]), list(range(layers)), dense)
    for one, table in zip(files, tables, strict=True):
        for layer in set(range(layers)) - set(kept):
            if table[:, layer].any():
                raise InputError(f"{one}: layer {layer} has counts: take it out of --dense-layers.")
    settings = {"blocks": n_blocks(sum(map(len, tables))), "group": ["source"], "pairs": False}
    header = {**facts, "recorded": [COUNTS], "corpus": facts["corpus"] | settings}
    with Writer(path, header, [layer_row(layer, size, top_k) for layer in kept]) as writer:
        for part in parts(files, steps, tables, kept, top_k):
            writer.append(part)


def counted(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of one file the numbers of the steps that saw tokens, int64 (steps,), and their counts, integers (steps, layers,
    E). InputError if it isn't one."""
    import torch

    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: can't be read: {error.strerror or error}.") from None
    except Exception as error:  # torch raises whatever its reader of archives and pickles meets
        raise InputError(f"{path}: not a whole .pt file of tensors: {first_line(error)}") from None
    if isinstance(held, dict) and "records" in held:
        raise InputError(f"{path}: records of single passes. Record with --expert-distribution-recorder-mode stat.")
    table = held.get("logical_count") if isinstance(held, dict) else held
    if not isinstance(table, torch.Tensor) or table.ndim != 3 or table.is_floating_point() or table.is_complex():
        raise InputError(f"{path}: no logical_count of whole numbers (steps, layers, experts).")
    if table.layout != torch.strided or table.untyped_storage().nbytes() < table.numel() * table.element_size():
        raise InputError(f"{path}: logical_count of shape {tuple(table.shape)} is more than the file holds.")
    counts = table.numpy()
    if not counts.size or counts.min() < 0:
        raise InputError(f"{path}: logical_count of shape {counts.shape} holds nothing, or numbers below 0.")
    steps = np.flatnonzero(counts.any(axis=(1, 2)))
    if not len(steps):
        raise InputError(f"{path}: every step of logical_count is 0: nothing was recorded before it was written.")
    return steps, counts[steps]


def tokens(path: Path, steps: np.ndarray, counts: np.ndarray, layers: Sequence[int], top_k: int) -> np.ndarray:
    """int64 (steps,): tokens that each step saw, so that each router gave each of them `top_k` experts.

    InputError naming the step and the layer if that can't be.
    """
    kept = counts[:, list(layers)].astype(np.int64)
    sums = kept.sum(axis=2)
    found = sums[:, 0] // top_k
    for at, number in enumerate(layers):
        if not sums[:, at].any():
            raise InputError(
                f"{path}: layer {number} is all zeros. Either nothing was recorded there, or it is a dense layer "
                f"without a router: then name it, --dense-layers {number}"
            )
    if (bad := sums != found[:, None] * top_k).any():
        step, at = np.argwhere(bad)[0]
        raise InputError(
            f"{path}: step {steps[step]}, layer {layers[at]} has {sums[step, at]:,} choices; layer {layers[0]} has "
            f"{sums[step, 0]:,}: not {top_k} for each token. Check --top-k."
        )
    if (bad := kept.max(axis=2) > found[:, None]).any():
        step, at = np.argwhere(bad)[0]
        raise InputError(
            f"{path}: step {steps[step]}, layer {layers[at]}: an expert was chosen {kept[step, at].max():,} times by "
            f"{found[step]:,} tokens. Check --top-k."
        )
    return found


def parts(
    files: Sequence[Path],
    steps: Sequence[np.ndarray],
    tables: Sequence[np.ndarray],
    layers: Sequence[int],
    top_k: int,
) -> Iterator[Counts]:
    """What is to be written, some steps at a time."""
    n_tokens = [tokens(*one, layers, top_k) for one in zip(files, steps, tables, strict=True)]
    total = sum(map(len, tables))
    seq = 0
    for path, numbers, table, n in zip(files, steps, tables, n_tokens, strict=True):
        for start in range(0, len(table), STEPS):
            part, held = table[start : start + STEPS].astype(np.int64), n[start : start + STEPS]
            ids = np.arange(seq, seq + len(part), dtype=np.int32)
            sizes = np.zeros((len(part), top_k + 1), np.int64)
            sizes[:, top_k] = held
            yield Counts(
                sequences=[
                    {
                        "seq": int(one),
                        "n_prompt": 0,
                        "n_tokens": int(tokens),
                        "source": path.name,
                        "metadata": {"step": int(numbers[start + place])},
                    }
                    for place, (one, tokens) in enumerate(zip(ids, held, strict=True))
                ],
                loads=Loads(
                    seq=ids,
                    phase=np.full(len(part), -1, np.int8),
                    block=(ids.astype(np.int64) * n_blocks(total) // total).astype(np.uint16),
                    counts=[part[:, layer] for layer in layers],
                    tokens=[sizes for _ in layers],
                ),
                pairs={},
                grouped=False,
            )
            seq += len(part)


def n_blocks(steps: int) -> int:
    """Blocks that so many steps are put into."""
    return min(steps, MOST_BLOCKS)
