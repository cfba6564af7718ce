"""Top-k tables of moe-lrc, the code of the paper on local routing consistency (arXiv:2505.16056): safetensors.

Source: ljcleo/moe-lrc, src/40_topk.py, src/02_merge.py and src/10_calculate.py, commit 7b3ca46.

- output/topk/MODEL_LL.safetensors, one file a router: a tensor a data set, int8 (samples, length, k), ids in falling
  order of the router's scores
- data/merged/MODEL.safetensors, optional: the token ids, a tensor a data set, int64 (samples, length)
- output/pred/MODEL.safetensors, optional: the likeliest next tokens, the same shape; told by its folder `pred`

Each sample is a text; its data set becomes the domain. int8 ends at 127: files of models with more than 128 experts
are refused, since 12_rank.py has cut their ranks. Logits (output/merged) and ranks (output/rank) are refused too.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.importers.text import Text, integers, token_ids

SAMPLES = 16
"""Samples that are read from all layers at once."""

_LAYER = re.compile(r"(.+)_(\d+)$")


def texts(files: Sequence[Path]) -> Iterator[Text]:
    """One text a sample, data set by data set. InputError for files that don't belong together."""
    numbers, models = {}, set()
    others: dict[str, Path] = {}
    for path in files:
        if found := _LAYER.match(path.stem):
            models.add(found[1])
            if numbers.setdefault(int(found[2]), path) != path:
                raise InputError(f"{path}: layer {int(found[2])} is also {numbers[int(found[2])]}.")
        elif others.setdefault("predictions" if path.parent.name == "pred" else "tokens", path) != path:
            raise InputError(f"{path}: a second file without a layer's number; expected one of token ids.")
    if len(models) != 1:
        raise InputError(
            "expected files NAME_00.safetensors, NAME_01.safetensors, … of one model; found "
            f"{', '.join(sorted(models)) or 'none'}."
        )
    (model,) = models
    with ExitStack() as opened:
        layers = {number: _open(opened, path) for number, path in sorted(numbers.items())}
        sides = {name: _open(opened, path) for name, path in others.items()}
        names = dict.fromkeys(name for file in layers.values() for name in file.keys())  # noqa: SIM118  # not a dict
        for name in names:
            yield from _data_set(name, model, layers, numbers, sides, others)


def _open(opened: ExitStack, path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return opened.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file: {error}") from None


def _slice(file: Any, path: Path, name: str, ndim: int) -> Any:
    if name not in file.keys():  # noqa: SIM118
        raise InputError(f"{path}: no data set {name!r}; expected the same as in the other files.")
    found = file.get_slice(name)
    kind = found.get_dtype()
    if kind in ("BF16", "F32", "F16"):
        raise InputError(f"{path}: {name} is {kind}, router logits. Make ids of them with 40_topk.py: output/topk.")
    if not kind.startswith(("I", "U")) or len(found.get_shape()) != ndim:
        raise InputError(
            f"{path}: {name} is {kind} of shape {found.get_shape()}; expected integers, {ndim} dimensions."
        )
    return found


def _data_set(
    name: str,
    model: str,
    files: dict[int, Any],
    paths: dict[int, Path],
    sides: dict[str, Any],
    side_paths: dict[str, Path],
) -> Iterator[Text]:
    tables = {number: _slice(file, paths[number], name, 3) for number, file in files.items()}
    given = {side: _slice(file, side_paths[side], name, 2) for side, file in sides.items()}
    (first, table), *rest = tables.items()
    n, length, k = shape = table.get_shape()
    for number, other in rest:
        if other.get_shape() != shape:
            raise InputError(f"{paths[number]}: {name} has shape {other.get_shape()}; {paths[first]} has {shape}.")
    for side, other in given.items():
        if other.get_shape() != [n, length]:
            raise InputError(f"{side_paths[side]}: {name} has shape {other.get_shape()}; expected {[n, length]}.")
    for start in range(0, n, SAMPLES):
        end = min(start + SAMPLES, n)
        ids = np.stack([table[start:end] for table in tables.values()], axis=2)
        where = f"{paths[first]}[{name}]"
        if k > 1 and length and ids.size and (np.sort(ids[0, 0, 0]) == np.arange(k)).all():
            _refuse_ranks(where, ids)
        beside = {side: other[start:end] for side, other in given.items()}
        for row, experts in enumerate(ids):
            place = f"{where}, sample {start + row}"
            yield Text(
                place,
                integers(place, "the table", experts, 3),
                token_ids=token_ids(place, beside["tokens"][row], length) if "tokens" in beside else None,
                predictions=token_ids(place, beside["predictions"][row], length) if "predictions" in beside else None,
                fields={"domain": name},
                model=model,
                layers=list(files),
            )


def _refuse_ranks(where: str, ids: np.ndarray) -> None:
    """Ranks are a permutation of 0, 1, … for every token; so many chosen experts never are."""
    if (np.sort(ids, axis=-1) == np.arange(ids.shape[-1])).all() and ids.shape[1] > 1:
        raise InputError(f"{where}: ranks of all experts, not ids. Make ids of them with 40_topk.py: output/topk.")
