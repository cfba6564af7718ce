"""What vLLM answers, as the block of a trace, once it is known to be what these routers can have chosen."""

import numpy as np
import pyarrow as pa

from workbench.engines.vllm_processes import plain
from workbench.errors import RunError
from workbench.forward import sequence_rows, token_arrays
from workbench.models import Model
from workbench.routing import Routing
from workbench.schema import PHASES
from workbench.store import Block
from workbench.tokenization import Sequence


def block(batch: list[Sequence], answer: bytes, model: Model, places: list[int], generate: int) -> Block:
    """A chunk of texts with their routing. RunError if the answer isn't what vLLM returns of this model."""
    tokens, experts = [], []
    for sequence, (sampled, ids) in zip(batch, _rows(answer, len(batch)), strict=True):
        n_prompt, where = len(sequence.token_ids), f"vLLM's answer for text {sequence.seq}"
        if not 1 <= len(sampled) <= generate + 1 or len(ids) != n_prompt + len(sampled) - 1:
            raise RunError(
                f"{where}: {len(sampled)} sampled tokens, and routing of {len(ids)}; expected 1 to {generate + 1}, and "
                f"routing of all but the last and of the {n_prompt} of the text. Is prefix caching on?"
            )
        tokens.append(np.concatenate([sequence.token_ids, sampled[:-1]]).astype(np.int32))
        experts.append(_checked(where, ids, model, places))
    lengths = [len(one) for one in tokens]
    joined = np.concatenate(experts)
    if joined.shape[2] == 1 and len(joined) > 1 and not joined.any():
        raise RunError("vLLM's answer has expert 0 for all tokens in all layers: it recorded nothing")
    rows = sequence_rows(batch, lengths)
    phase = np.full(sum(lengths), PHASES.index("generated"), np.uint8)
    for one, start in zip(batch, np.cumsum([0, *lengths[:-1]]), strict=True):
        phase[start : start + len(one.phase)] = one.phase
    return Block(
        sequences=rows,
        tokens=token_arrays(rows, np.concatenate(tokens), phase),
        routing=[Routing(experts=joined[:, layer]) for layer in range(len(places))],
    )


def _rows(answer: bytes, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Sampled token ids (s,) and ids of experts (tokens, layers, k) of each of n texts; RunError if they aren't."""
    try:
        table = pa.ipc.open_file(answer).read_all()
        table.validate(full=True)
        sampled, shapes = (table[name].to_pylist() for name in ("sampled", "shape"))
        flat = [np.asarray(one.values) for one in table["experts"]]
        if any(size < 0 for shape in shapes for size in shape):
            raise ValueError("a shape with a size below 0")
        found = [
            (np.array(tokens, np.int32), ids.reshape(shape))
            for tokens, shape, ids in zip(sampled, shapes, flat, strict=True)
        ]
        if len(found) != n or any(ids.ndim != 3 or ids.dtype.kind not in "iu" for _, ids in found):
            raise ValueError(f"{len(found)} texts of {n}, or arrays that aren't whole numbers (tokens, layers, k)")
    except (pa.ArrowException, LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise RunError(f"vLLM's answer can't be read: {plain(error)}. Continue with --resume.") from None  # type: ignore[arg-type]
    return found


def _checked(where: str, ids: np.ndarray, model: Model, places: list[int]) -> np.ndarray:
    """Ids of experts uint16 (tokens, routers, k) if they are what these routers can have chosen; else RunError."""
    k = max(layer.top_k for layer in model.layers)
    if ids.shape[1] <= max(places) or ids.shape[2] != k:
        raise RunError(
            f"{where}: {ids.shape[1]} layers of top-{ids.shape[2]}; the configuration of {model.name} has routers "
            f"up to layer {max(places)}, of top-{k}"
        )
    if np.delete(ids, places, axis=1).any():
        raise RunError(f"{where}: it has routing in a layer that has no router in the configuration of {model.name}")
    chosen = ids[:, places].astype(np.int64)
    ordered = np.sort(chosen, axis=2)
    limits = np.array([layer.n_experts for layer in model.layers])
    bad = (ordered[..., 0] < 0) | (ordered[..., -1] >= limits) | (ordered[..., 1:] == ordered[..., :-1]).any(2)
    if bad.any():
        token, layer = (int(at[0]) for at in bad.nonzero())
        raise RunError(
            f"{where}: token {token}, layer {layer} has the experts {chosen[token, layer].tolist()}; expected {k} "
            f"different ones of {limits[layer]}"
        )
    return chosen.astype(np.uint16)
