"""What an intervention costs: the same batches through the same model, plain and edited, as ratios in one run.

    forward   nothing edited
    logits    Bias on two experts of every layer: an edit of the router's logits
    ablate    Ablate of two experts of every layer, out of the logits and the selection
    weights   Scale of two experts of every layer: an edit of their gate weights
    by hand   the same as `logits`, written for this one family as a hook that computes the router's output again

Nothing is timed unless `logits` and `by hand` gave the same logits in the model's output. Edits change which experts
run, and so how evenly tokens fall on them: a part of every ratio is that.
"""

import copy
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from workbench.bench.turns import Ids, Way, forward, ratio, step, take_turns
from workbench.intervening import intervene
from workbench.interventions import Ablate, Bias, Intervention, Scale
from workbench.models import Model, load

EXPERTS, STRENGTH = (3, 11), 0.5


def steering(model: Model, rounds: int, n_batches: int, batch: int, length: int) -> dict[str, Any]:
    """Time each way over the same `batch` × `length` random tokens; model: of the family olmoe."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(4, 8000, (batch, length), generator=generator) for _ in range(n_batches)]

    def own() -> Model:
        return load(copy.deepcopy(model.module), tokenizer=model.tokenizer)

    bias = Bias(experts=EXPERTS, strength=STRENGTH)
    ways: dict[str, Way] = {
        "forward": forward(own()),
        "logits": _edited(own(), bias),
        "ablate": _edited(own(), Ablate(experts=EXPERTS)),
        "weights": _edited(own(), Scale(experts=EXPERTS, factor=2.0)),
        "by hand": _by_hand(own()),
    }
    _, seen = take_turns(ways, batches[:1])  # warms up, too
    if not np.allclose(seen["logits"], seen["by hand"], atol=1e-5):
        raise AssertionError("the edit and its form by hand gave other logits: nothing was measured")
    seconds = [take_turns(ways, batches)[0] for _ in range(rounds)]
    return {
        "tokens": n_batches * batch * length,
        "rounds": rounds,
        "layers": len(model.layers),
        "ratio": {name: ratio(seconds, name) for name in ways},
    }


def _edited(model: Model, edit: Intervention) -> Way:
    def way(batches: list[torch.Tensor], folder: Path) -> Generator[None, None, Ids]:
        with intervene(model, edit):
            for ids in batches:
                step(model, ids)
                yield
        return _outputs(model, batches[-1], lambda: intervene(model, edit))

    return way


def _by_hand(model: Model) -> Way:
    def edit(router: Any, args: tuple[Any, ...], _out: Any) -> Any:
        hidden = args[0].reshape(-1, args[0].shape[-1])
        logits = nn.functional.linear(hidden, router.weight)
        experts = list(EXPERTS)
        logits[:, experts] += STRENGTH * logits.std(-1, keepdim=True, correction=0)
        weights, ids = logits.softmax(-1, dtype=torch.float).topk(router.top_k, dim=-1)
        if router.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights.to(logits.dtype), ids

    @contextmanager
    def hooked() -> Iterator[None]:
        hooks = [layer.router.register_forward_hook(edit) for layer in model.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def way(batches: list[torch.Tensor], folder: Path) -> Generator[None, None, Ids]:
        with hooked():
            for ids in batches:
                step(model, ids)
                yield
        return _outputs(model, batches[-1], hooked)

    return way


def _outputs(model: Model, ids: torch.Tensor, edited: Callable[[], AbstractContextManager[Any]]) -> Ids:
    def last() -> np.ndarray:
        with torch.inference_mode(), edited():
            return model.module(input_ids=ids, use_cache=False).logits.numpy()

    return last
