"""Routing traces of llama.cpp's `moe-trace` example: CSV.

Two of them exist, both for one prompt and its greedy continuation, which make one text:

- ggml-org/llama.cpp, pull request 28544 (examples/moe-trace/moe-trace.cpp), not merged: rows `layer,expert` without a
  header; k must be given
- its fork Cartaz/llama.cpp-vulkan-moe (commit 9149912, README.md beside it): the columns
  `phase,token,layer,rank,expert` with a header; phase is prefill or decode

Rows come a micro-batch after the other: layer by layer, in a layer token by token, each with its k experts in the
router's order. Layers are numbered as in the model, dense ones don't occur. No token ids and no weights.

Of a prompt llama.cpp computes in the last layer only the tokens whose logits are asked for, so there only the last
token of each micro-batch has rows: the others get no expert in that layer.

The pull request reads the ids of a micro-batch as if they lay side by side; they lie E apart, so that what it writes
for the second and further tokens are further ranks of the first (the fork's README.md says so too). Such prompts are
recognised, since no expert repeats in them, and refused. With `-ub 1` the pull request's rows are right.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from workbench.errors import InputError
from workbench.importers.text import NONE, Text

HEADER = ("phase", "token", "layer", "rank", "expert")
CHANCE = 1e-6
"""Prompts that would show no repeated expert with less than this chance, were choices uniform, are refused."""


def texts(files: Sequence[Path], top_k: int | None, n_experts: int) -> Iterator[Text]:
    """One text a file. InputError for rows that aren't as described."""
    for path in files:
        batches: list[np.ndarray] = []
        prompt, layers, k = 0, None, top_k
        several = 0  # tokens up to the last micro-batch of several
        for rows in _micro_batches(path):
            k = int(rows["rank"].max()) + 1 if "rank" in rows else k
            if k is None:
                raise InputError(f"{path}: `layer,expert` doesn't tell how many experts a token has: give --top-k.")
            if k < 1:
                raise InputError(f"{path}: the largest rank is {k - 1}; expected 0 to k - 1.")
            ids, found = _ids(path, rows, k, layers)
            layers = layers or found
            if found != layers:
                raise InputError(f"{path}: a micro-batch has the layers {found}; the first has {layers}.")
            _check_stride(path, ids, n_experts)
            batches.append(ids)
            prompt += len(ids) * bool("phase" in rows and rows["phase"][0] == "prefill")
            several = sum(map(len, batches)) if len(ids) > 1 else several
            headed = "phase" in rows
        if not batches:
            raise InputError(f"{path}: no rows; expected `layer,expert` or {','.join(HEADER)}.")
        experts = np.concatenate(batches)
        n_prompt = prompt if headed else several or len(experts)
        yield Text(str(path), experts, fields={"source": path.name, "n_prompt": n_prompt}, layers=layers)


def _micro_batches(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """The rows of one micro-batch after the other, by column: it ends where the layer falls."""
    held: dict[str, np.ndarray] = {}
    for rows in _rows(path):
        held = {name: np.concatenate([held[name], rows[name]]) for name in rows} if held else rows
        ends = np.flatnonzero(np.diff(held["layer"]) < 0) + 1
        for start, end in zip([0, *ends], ends, strict=False):
            yield {name: values[start:end] for name, values in held.items()}
        held = {name: values[ends[-1] if len(ends) else 0 :] for name, values in held.items()}
    if held and len(held["layer"]):
        yield held


def _rows(path: Path) -> Iterator[dict[str, np.ndarray]]:
    """The columns of the file, a few megabytes at a time."""
    import pyarrow as pa
    from pyarrow import csv

    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            begin = stream.read(64).split(b"\n")[0].strip().decode("utf-8", "replace")
        headed = begin[:1].isalpha()
        names = begin.split(",") if headed else ["layer", "expert"]
        if headed and names not in (list(HEADER), ["layer", "expert"]):
            raise InputError(f"{path}: the columns are {begin!r}; expected `layer,expert` or {','.join(HEADER)}.")
        kinds = {name: pa.string() if name == "phase" else pa.int64() for name in names}
        reading = csv.open_csv(
            path,
            read_options=csv.ReadOptions(column_names=names, skip_rows=int(headed), use_threads=False),
            convert_options=csv.ConvertOptions(column_types=kinds, null_values=[], strings_can_be_null=False),
        )
        with reading:
            for batch in reading:
                yield {name: batch[name].to_numpy(zero_copy_only=False) for name in names}
    except (pa.ArrowException, OSError, UnicodeError) as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else "it is empty"
        raise InputError(f"{path}: not a CSV file of moe-trace: {said}") from None


def _ids(path: Path, rows: dict[str, np.ndarray], k: int, layers: list[int] | None) -> tuple[np.ndarray, list[int]]:
    """Ids of a micro-batch, int64 (n, L, k), NONE where the last layer wasn't computed, and its layers."""
    numbers, sizes = np.unique(rows["layer"], return_counts=True)
    n = int(sizes[0]) // k
    last = int(sizes[-1]) // k
    whole = (sizes[:-1] == n * k).all() and sizes[-1] == last * k and 1 <= last <= n
    if not whole or numbers[0] < 0:
        raise InputError(
            f"{path}: a micro-batch has {sizes[:8].tolist()} rows in the layers {numbers[:8].tolist()} (the first "
            f"ones); expected {k} for each token, as many tokens in each layer. Check --top-k; is the file cut short?"
        )
    if "rank" in rows and not np.array_equal(rows["rank"], np.tile(np.arange(k), len(rows["rank"]) // k)):
        raise InputError(f"{path}: the ranks of a token aren't 0 to {k - 1}. Is the file cut short?")
    if (
        "phase" in rows
        and (rows["phase"] != rows["phase"][0]).any()
        or rows.get("phase", ["decode"])[0]
        not in (
            "prefill",
            "decode",
        )
    ):
        raise InputError(f"{path}: phase is {rows['phase'][0]!r}, or changes; expected prefill or decode.")
    ids = np.full((n, len(numbers), k), NONE, np.int64)
    ids[:, :-1] = rows["expert"][: n * k * (len(numbers) - 1)].reshape(len(numbers) - 1, n, k).swapaxes(0, 1)
    ids[n - last :, -1] = rows["expert"][n * k * (len(numbers) - 1) :].reshape(last, k)
    return ids, numbers.tolist()


def _check_stride(path: Path, ids: np.ndarray, n_experts: int) -> None:
    """Refuse a prompt in which no expert repeats, in any layer, where by chance some would."""
    n, n_layers, k = ids.shape
    shown = min(n, n_experts // k)
    if shown < 2 or (ids[:shown, :-1] == NONE).any():
        return
    full = ids[:shown, :-1] if (ids[0, -1] == NONE).any() else ids[:shown]
    layers = full.swapaxes(0, 1).reshape(full.shape[1], shown * k)
    every = math.log(math.comb(n_experts, k))
    chance = sum(math.log(math.comb(n_experts - i * k, k)) - every for i in range(shown))
    ordered = np.sort(layers, axis=1)
    if chance * len(layers) < math.log(CHANCE) and (ordered[:, 1:] != ordered[:, :-1]).all():
        raise InputError(
            f"{path}: in a micro-batch of {n} tokens the first {shown} share no expert in any of {len(layers)} layers: "
            "this moe-trace read the ids with a wrong stride, and wrote further ranks of the first token for others. "
            "Trace again with -ub 1, or with a moe-trace that heeds the stride."
        )
