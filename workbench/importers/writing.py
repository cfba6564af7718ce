"""Texts of a dump into the blocks of a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from workbench.arrays import BLOCK_TOKENS, phases, sequence_row
from workbench.errors import InputError
from workbench.importers.text import Text, check_top_1, checked
from workbench.importers.text import token_ids as ids_of
from workbench.routing import NO_EXPERT, Routing
from workbench.schema import UNKNOWN_TOKEN
from workbench.store import Writer
from workbench.transaction import Block

_OPTIONAL = ("weights", "logits", "predictions")


def write(
    path: Path,
    rows: Iterator[tuple[Text, dict[str, Any]]],
    first: Text,
    n_experts: int,
    facts: dict[str, Any],
    dense: Sequence[int],
    tokenizer: str | None,
) -> None:
    """Write texts with their columns as the run `facts` of a new file. InputError for the first that can't be.

    first  the first text: all others have its layers, its k and what it recorded
    dense  layers of the model that have no router
    """
    shape, numbers = first.experts.shape[1:], first.numbers
    kept = routers(first.where, numbers, dense)
    k = shape[1]
    if not 1 <= k <= n_experts:
        raise InputError(f"{first.where}: {k} experts a token of {n_experts}; expected 1 to {n_experts}.")
    recorded = [name for name in _OPTIONAL if getattr(first, name) is not None]
    names = _Names(tokenizer)
    seen, largest = np.zeros(len(kept), np.int64), np.zeros(len(kept), np.int64)
    header = {**facts, "recorded": ["ids", *recorded]}
    with Writer(path, header, [layer_row(numbers[layer], n_experts, k) for layer in kept]) as writer:
        gathered: list[tuple[dict[str, Any], Text, np.ndarray]] = []
        for seq, (text, row) in enumerate(rows):
            ids = checked(_alike(text, first, recorded, n_experts, row), n_experts, shape, dense)
            known = ids != NO_EXPERT
            seen += known.any(axis=2).sum(axis=0)
            largest = np.maximum(largest, np.where(known, ids, 0).max(axis=(0, 2)))
            token_ids = row.pop("token_ids", None)
            if token_ids is not None:
                text = _with_ids(text, token_ids)
            if "n_prompt" in row and row["n_prompt"] is not None and row["n_prompt"] > len(ids):
                raise InputError(f"{text.where}: n_prompt is {row['n_prompt']}; it has {len(ids)} tokens with routing.")
            gathered.append((sequence_row(seq, len(ids), row), text, ids))
            if sum(len(ids) for _, _, ids in gathered) >= BLOCK_TOKENS:
                writer.add_vocabulary(names.of(gathered))
                writer.append(_block(gathered, kept))
                gathered = []
        if gathered:
            writer.add_vocabulary(names.of(gathered))
            writer.append(_block(gathered, kept))
        writer.add_vocabulary(names.rest())
        if k == 1:
            check_top_1(seen.tolist(), largest.tolist(), [numbers[layer] for layer in kept])


def routers(where: str, numbers: list[int], dense: Sequence[int]) -> list[int]:
    """Places of the layers that have a router."""
    if unknown := sorted(set(dense) - set(numbers)):
        raise InputError(f"--dense-layers {unknown[0]}: {where} has the layers {numbers[0]} to {numbers[-1]}.")
    kept = [layer for layer, number in enumerate(numbers) if number not in dense]
    if not kept:
        raise InputError(f"{where}: --dense-layers leaves no layer with a router.")
    return kept


def layer_row(number: int, n_experts: int, top_k: int) -> dict[str, Any]:
    """The row of the table `layers` for a layer of the model."""
    return {"name": f"layers.{number}", "n_experts": n_experts, "top_k": top_k, "gating": None}


def _alike(text: Text, first: Text, recorded: list[str], n_experts: int, row: dict[str, Any]) -> Text:
    """The text, if it has what the first one has."""
    if text.model is not None and first.model is not None and text.model != first.model:
        raise InputError(
            f"{text.where}: of {text.model!r}; the first text is of {first.model!r}. Import one at a time."
        )
    if text.n_experts not in (None, n_experts) or text.layers != first.layers:
        raise InputError(f"{text.where}: other layers or experts than in the first text. Import one model at a time.")
    n, n_layers, k = text.experts.shape
    wanted = {"weights": (n, n_layers, k), "logits": (n, n_layers, n_experts), "predictions": (n,)}
    for name in recorded:
        found = getattr(text, name)
        if found is None or found.shape != wanted[name]:
            raise InputError(f"{text.where}: {name} are missing or of another shape; the first text has them.")
        if name == "weights" and not ((found >= 0) & (found < np.inf)).all():
            raise InputError(f"{text.where}: weights reach from {found.min()} to {found.max()}; expected numbers >= 0.")
        if name == "logits" and np.isnan(found).any():
            raise InputError(f"{text.where}: some logits are NaN.")
    if text.nll is not None and ((text.nll < 0) | np.isinf(text.nll)).any():
        raise InputError(f"{text.where}: losses below 0 or infinite; expected nats.")
    return text


def _with_ids(text: Text, given: Any) -> Text:
    """The text with the token ids of the table: as many as it has tokens, or one more, the last sampled one."""
    n = len(text.experts)
    if isinstance(given, str):
        raise InputError(f"{text.where}: token_ids of the table is text; expected a list, in .jsonl or .parquet.")
    given = list(given) if isinstance(given, list | tuple) else given
    cut = given[:n] if isinstance(given, list) and len(given) == n + 1 else given
    return replace(text, token_ids=ids_of(f"{text.where}: token_ids of the table", cut, n))


def _block(gathered: list[tuple[dict[str, Any], Text, np.ndarray]], kept: list[int]) -> Block:
    rows = [row for row, _, _ in gathered]
    texts = [text for _, text, _ in gathered]
    lengths = [row["n_tokens"] for row in rows]
    n = sum(lengths)

    def joined(name: str, unknown: float, kind: Any) -> np.ndarray:
        parts = [getattr(text, name) for text in texts]
        found = [np.full(m, unknown) if part is None else part for part, m in zip(parts, lengths, strict=True)]
        return np.concatenate(found).astype(kind)

    def of_layers(name: str) -> np.ndarray | None:
        if getattr(texts[0], name) is None:
            return None
        return np.concatenate([getattr(text, name)[:, kept] for text in texts]).astype(np.float32)

    tokens = {
        "seq": np.repeat([row["seq"] for row in rows], lengths).astype(np.int32),
        "pos": np.concatenate([np.arange(m, dtype=np.int32) for m in lengths]),
        "token_id": joined("token_ids", UNKNOWN_TOKEN, np.int32),
        "phase": np.concatenate([phases(row) for row in rows]),
        "nll": joined("nll", np.nan, np.float32),
    }
    if texts[0].predictions is not None:
        tokens["predicted"] = joined("predictions", UNKNOWN_TOKEN, np.int32)
    assert n == len(tokens["token_id"])
    ids = np.concatenate([ids for _, _, ids in gathered])
    weights, logits = of_layers("weights"), of_layers("logits")
    return Block(
        sequences=rows,
        tokens=tokens,
        routing=[
            Routing(
                np.ascontiguousarray(ids[:, layer]),
                None if weights is None else weights[:, layer],
                logits=None if logits is None else logits[:, layer],
            )
            for layer in range(len(kept))
        ],
    )


class _Names:
    """Texts of token ids, from the dump or from a tokenizer."""

    def __init__(self, tokenizer: str | None):
        self._tokenizer = None if tokenizer is None else _tokenizer(tokenizer)
        self._known: set[int] = set()
        self._seen: set[int] = set()

    def of(self, gathered: list[tuple[dict[str, Any], Text, np.ndarray]]) -> dict[int, str]:
        """The texts of ids that are new."""
        texts = [text for _, text, _ in gathered]
        if self._tokenizer is None:
            named = {i: word for text in texts for i, word in text.vocabulary.items()}
            self._known |= named.keys()
            self._seen |= {int(i) for text in texts if text.token_ids is not None for i in np.unique(text.token_ids)}
            return named
        from workbench.tokenization import token_texts

        arrays = [ids for text in texts for ids in (text.token_ids, text.predictions) if ids is not None]
        found = {int(i) for ids in arrays for i in np.unique(ids) if i >= 0} - self._known
        self._known |= found
        if found and max(found) >= len(self._tokenizer):
            raise InputError(
                f"token id {max(found)} is none of the tokenizer's {len(self._tokenizer):,}: give that of the model."
            )
        return token_texts(self._tokenizer, sorted(found))

    def rest(self) -> dict[int, str]:
        """Empty texts for the ids that never had one, in a dump that names some: a vocabulary has all ids or none."""
        return {i: "" for i in self._seen - self._known if i != UNKNOWN_TOKEN} if self._known else {}


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    from workbench import bundled

    source = bundled.path(bundled.MODELS[name]) if name in bundled.MODELS else name
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # transformers raises whatever its readers meet
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"no tokenizer {name!r}: {why} Give a folder or a Hub id.") from None
