"""Traces of MoE-PolicyLang: Parquet or JSON lines.

Source: the PyPI package moe-policylang 1.15.0, moe_policylang/integrations/trace_recorder.py (`TraceRecording`). A row
is a token at a router, prompt by prompt:

    Parquet                            JSON lines
    prompt_id, token_idx, layer_idx    p, t, l
    selected_experts                   e        top k of the router's softmax
    router_scores                      s        their probabilities
    router_softmax, router_logits      sm, lg_l of all E experts, optional
    token_id, phase                    ti, ph   optional; phase is prefill or decode
    language_tag, domain_tag           lg, dm   optional, of the prompt
    token_loss                         tl       optional: nats
    kv_shard_id                        kv       not taken over

JSON lines begin with a header: model_name, num_layers, num_experts, top_k. Parquet has none, so that the model's name
must be given, and the number of experts where no softmax or logits were recorded.

router_scores become the weights: probabilities before any normalisation to 1 over the chosen, which a model may do.
router_softmax isn't taken over; logits are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workbench.errors import InputError
from workbench.importers.documents import lines
from workbench.importers.text import Text, integers, token_ids

_SHORT = {
    "p": "prompt_id", "t": "token_idx", "l": "layer_idx", "e": "selected_experts", "s": "router_scores",
    "sm": "router_softmax", "lg_l": "router_logits", "ti": "token_id", "ph": "phase", "lg": "language_tag",
    "dm": "domain_tag", "tl": "token_loss",
}  # fmt: skip
_NEEDED = ("prompt_id", "token_idx", "layer_idx", "selected_experts")
_WIDE = ("router_softmax", "router_logits")
BATCH_ROWS = 16_384

Rows = dict[str, list[Any]]


def texts(files: Sequence[Path]) -> Iterator[Text]:
    """One text a prompt. InputError for rows that aren't as described."""
    for path in files:
        facts: dict[str, Any] = {}
        batches = _parquet(path) if path.suffix == ".parquet" else _json(path, facts)
        seen: set[int] = set()
        for prompt, rows in _prompts(path, batches):
            if prompt in seen:
                raise InputError(
                    f"{path}: the rows of prompt {prompt} don't follow each other. Sort them by prompt_id."
                )
            seen.add(prompt)
            yield _text(f"{path}: prompt {prompt}", rows, facts, path.name)


def _json(path: Path, facts: dict[str, Any]) -> Iterator[Rows]:
    rows: Rows = {}
    n = 0
    for place, (where, line) in enumerate(lines(path)):
        if place == 0:
            if "num_experts" not in line:
                raise InputError(f"{where}: no num_experts; expected the header of a MoE-PolicyLang trace.")
            facts |= line
            continue
        if missing := [short for short in ("t", "l", "e") if short not in line]:
            raise InputError(f"{where}: no {', '.join(missing)}; expected t, l and e in each line.")
        row = {"prompt_id": 0} | {_SHORT[key]: value for key, value in line.items() if key in _SHORT}
        if rows and set(rows) != set(row):
            yield rows
            rows, n = {}, 0
        for name, value in row.items():
            rows.setdefault(name, []).append(value)
        n += 1
        if n == BATCH_ROWS:
            yield rows
            rows, n = {}, 0
    if rows:
        yield rows


def _parquet(path: Path) -> Iterator[Rows]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name in _SHORT.values()]
            if missing := [name for name in _NEEDED if name not in names]:
                raise InputError(f"{path}: no column {', '.join(missing)}; expected a MoE-PolicyLang trace.")
            for batch in file.iter_batches(BATCH_ROWS, columns=names):
                yield {name: batch[name].to_pylist() for name in names}
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{path}: not a whole Parquet file: {str(error).splitlines()[0]}") from None


def _prompts(path: Path, batches: Iterator[Rows]) -> Iterator[tuple[int, Rows]]:
    """The rows of one prompt after the other. A column that only some rows have is filled with None."""
    held: Rows = {}
    for rows in batches:
        n, known = len(rows["prompt_id"]), len(held.get("prompt_id", ()))
        held = {name: held.get(name, [None] * known) + rows.get(name, [None] * n) for name in {**held, **rows}}
        prompt = integers(str(path), "prompt_id", held["prompt_id"], 1)
        ends = np.flatnonzero(np.diff(prompt)) + 1
        for start, end in zip([0, *ends], ends, strict=False):
            yield int(prompt[start]), {name: values[start:end] for name, values in held.items()}
        held = {name: values[ends[-1] if len(ends) else 0 :] for name, values in held.items()}
    if held:
        yield int(integers(str(path), "prompt_id", held["prompt_id"], 1)[0]), held


def _text(where: str, rows: Rows, facts: dict[str, Any], source: str) -> Text:
    token, layer = (integers(where, name, rows[name], 1) for name in ("token_idx", "layer_idx"))
    experts = integers(where, "selected_experts", rows["selected_experts"], 2)
    numbers = np.unique(layer)
    n, n_layers = len(token) // len(numbers), len(numbers)
    order = np.lexsort((layer, token))
    whole = np.array_equal(token[order], np.repeat(np.arange(n), n_layers))
    if numbers[0] < 0 or not whole or not np.array_equal(layer[order], np.tile(numbers, n)):
        raise InputError(
            f"{where}: {len(token)} rows aren't one for each of {n} tokens, from 0 on, at each of {n_layers} layers. "
            "Is the file cut short?"
        )

    def wide(name: str, width: int | None = None) -> np.ndarray | None:
        """float32 (n, L, width) of a column of lists; None where it wasn't recorded."""
        values = rows.get(name)
        if values is None or any(value is None for value in values):
            return None
        try:
            array = np.asarray(values, np.float32)
        except (ValueError, TypeError, OverflowError):
            array = np.zeros(0)
        if array.ndim != 2 or width not in (None, array.shape[-1]):
            expected = f"{width} numbers" if width else "as many numbers"
            raise InputError(f"{where}: {name} is not a list of {expected} in each row.")
        return array[order].reshape(n, n_layers, -1)

    def of_token(name: str) -> list[Any] | None:
        """The value of each token, as its first layer has it; None where no row has one."""
        values = rows.get(name)
        if values is None or all(value is None for value in values):
            return None
        return [values[place] for place in order[::n_layers]]

    def label(name: str) -> str | None:
        values = {str(value) for value in rows.get(name, ()) if value is not None}
        return values.pop() if len(values) == 1 else None

    logits, softmax = (wide(name) for name in ("router_logits", "router_softmax"))
    given = facts.get("num_experts")
    if given is None and (logits is not None or softmax is not None):
        given = (softmax if logits is None else logits).shape[2]  # type: ignore[union-attr]
    if given is not None and (isinstance(given, bool) or not isinstance(given, int) or given < 1):
        raise InputError(f"{where}: num_experts is {given!r}; expected a whole number from 1 on.")
    for key, found in {"top_k": experts.shape[1], "num_layers": max(int(numbers[-1]) + 1, n_layers)}.items():
        said = facts.get(key)  # layers without a router count, too, so there may be more
        if isinstance(said, int) and (found > said or key == "top_k" and found != said):
            raise InputError(f"{where}: the header says {key} {said}, the rows have {found}.")
    ids, phase = of_token("token_id"), of_token("phase")
    name = facts.get("model_name")
    if phase is not None and (
        any(one not in ("prefill", "decode") for one in phase) or phase != sorted(phase, reverse=True)
    ):
        raise InputError(f"{where}: phase is {phase[:8]} …; expected prefill, then decode.")
    return Text(
        where,
        experts[order].reshape(n, n_layers, -1),
        weights=wide("router_scores", experts.shape[1]),
        logits=logits,
        token_ids=None if ids is None else token_ids(where, [-1 if one is None else one for one in ids], n),
        nll=_losses(where, of_token("token_loss")),
        fields={
            "source": source,
            "lang": label("language_tag"),
            "domain": label("domain_tag"),
            "n_prompt": None if phase is None else phase.count("prefill"),
        },
        model=name if isinstance(name, str) and name else None,
        n_experts=given,
        layers=numbers.tolist(),
    )


def _losses(where: str, values: list[Any] | None) -> np.ndarray | None:
    if values is None:
        return None
    if not all(isinstance(value, float | int | None) for value in values):
        raise InputError(f"{where}: token_loss is not a number of nats in each row.")
    return np.array([np.nan if value is None else value for value in values], float)
