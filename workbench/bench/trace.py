"""What recording costs: the same batches through the same model, recorded in five ways, as ratios in one run.

Every way runs the forward pass and the loss of each token; what differs is only what is kept:

    forward       nothing
    workbench     ids and weights of every router, into a DuckDB file, as `workbench trace` does
    torch.save    full router logits of every layer, a file a layer and batch
    nnsight       an nnsight trace that saves every router's output, in memory
    json lines    ids of every token as JSON lines

The ways take turns batch by batch, each on a copy of the model, so that what else the machine does falls on all of
them alike; no figure is printed unless all of them saw the same ids. `run` is the ratio of whole runs, opening,
committing and closing the file included; `batch` the median over batches, without these. Peak memory is that of
processes of their own, which trace 100 thousand and 1 million tokens.
"""

import copy
import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from workbench.bench import causal, steering
from workbench.bench.turns import Ids, Way, forward, ratio, show, step, take_turns
from workbench.capture import header, layer_rows
from workbench.forward import next_token_nll, run_batch
from workbench.models import Model, load
from workbench.recorder import Recorder
from workbench.store import Writer
from workbench.tokenization import Sequence
from workbench.tracefile import Trace


def run(quick: bool = False) -> dict[str, Any]:
    """Measure the demonstration model and a mid-size one; prints a table, returns every figure."""
    demo = load("demo", dtype="float32")
    mid = load(mid_size(quick), tokenizer=demo.tokenizer)
    rounds = 1 if quick else 3
    result = {
        "bench": "trace",
        "date": datetime.now(UTC).date().isoformat(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "demo": _compare(demo, rounds, *((2, 2, 64) if quick else (32, 8, 256))),
        "mid-size": _compare(mid, rounds, *((2, 2, 64) if quick else (8, 8, 256))),
        "steering": steering.steering(mid, rounds, *((2, 2, 64) if quick else (8, 8, 256))),
        "patching": causal.patching(demo, quick),
        "memory": memory(*((2_000, 6_000) if quick else (100_000, 1_000_000))),
    }
    for name in ("demo", "mid-size"):
        show(name, result[name])
    show("steering", result["steering"])
    causal.show(result["patching"])
    (few, many), ratio = result["memory"]["tokens"], result["memory"]["ratio"]
    print(f"peak memory after {many:,} tokens over that after {few:,}: {ratio:.3f}")
    return result


def mid_size(quick: bool) -> OlmoeForCausalLM:
    """Hidden 512, 8 layers, 64 experts, top-8, random weights."""
    size = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2} if quick else {}
    return _olmoe(
        **({"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 8} | size),
        vocab_size=8192,
        num_attention_heads=8,
        num_experts=64,
        num_experts_per_tok=8,
    )


def _olmoe(**sizes: Any) -> OlmoeForCausalLM:
    torch.manual_seed(0)
    config = OlmoeConfig(max_position_embeddings=512, pad_token_id=0, bos_token_id=None, eos_token_id=0, **sizes)
    return OlmoeForCausalLM(config).eval()


def _compare(model: Model, rounds: int, n_batches: int, batch: int, length: int) -> dict[str, Any]:
    """Time each way over the same `batch` × `length` random tokens, after checking that they see the same ids."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(4, 8000, (batch, length), generator=generator) for _ in range(n_batches)]

    def own() -> Model:
        return load(copy.deepcopy(model.module), tokenizer=model.tokenizer)

    ways: dict[str, Way] = {
        "forward": forward(own()),
        "workbench": _workbench(own()),
        "torch.save": _torch_save(own()),
        "json lines": _json_lines(own()),
    }
    try:
        ways["nnsight"] = _nnsight(own())
    except ImportError:
        print("nnsight is not installed: measured without it", file=sys.stderr)
    _, seen = take_turns(ways, batches[:1])  # warms up, too
    for name, ids in seen.items():
        if name != "forward" and not np.array_equal(seen["workbench"], ids):
            raise AssertionError(f"{name} saw other ids than the workbench on {model.name}: nothing was measured")
    seconds = [take_turns(ways, batches)[0] for _ in range(rounds)]
    tokens = n_batches * batch * length
    return {
        "tokens": tokens,
        "rounds": rounds,
        "tokens_per_second": round(tokens * rounds / sum(sum(one["forward"]) for one in seconds)),
        "ratio": {name: ratio(seconds, name) for name in ways},
    }


def _workbench(model: Model) -> Way:
    def way(batches: list[torch.Tensor], folder: Path) -> Generator[None, None, Ids]:
        out = folder / "bench.duckdb"
        run = header(model, "bench", ["ids", "weights"], {})
        with Writer(out, run, layer_rows(model)) as writer, Recorder(model, {"weights"}) as recorder:
            for number, ids in enumerate(batches):
                writer.append(run_batch(model, recorder, _sequences(number, ids)))
                yield

        def last() -> np.ndarray:
            trace = Trace(out)
            experts = np.stack([trace.experts(layer) for layer in range(trace.n_layers)])
            return np.sort(experts[:, -batches[-1].numel() :].astype(np.int64), axis=-1)

        return last

    return way


def _sequences(number: int, ids: torch.Tensor) -> list[Sequence]:
    """The rows of a batch as sequences; the first batch is number 0."""
    return [
        Sequence(
            seq=number * len(ids) + row,
            token_ids=tokens.astype(np.int32),
            phase=np.ones(len(tokens), dtype=np.uint8),
            lang=None,
            domain=None,
            source="bench",
            segment_id=None,
            metadata={},
            sha256="0" * 64,
        )
        for row, tokens in enumerate(ids.numpy())
    ]


def _torch_save(model: Model) -> Way:
    def way(batches: list[torch.Tensor], folder: Path) -> Generator[None, None, Ids]:
        kept: dict[int, torch.Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            return lambda _module, _args, output: kept.update({layer: output[0]})

        hooks = [layer.router.register_forward_hook(keep(layer.index)) for layer in model.layers]
        try:
            for number, ids in enumerate(batches):
                step(model, ids)
                for layer, logits in kept.items():
                    torch.save(logits, folder / f"{number}.{layer}.pt")
                yield
        finally:
            for hook in hooks:
                hook.remove()
        k = model.layers[0].top_k
        return lambda: _sorted([kept[layer.index].topk(k, dim=-1).indices for layer in model.layers])

    return way


def _json_lines(model: Model) -> Way:
    def way(batches: list[torch.Tensor], folder: Path) -> Generator[None, None, Ids]:
        last: list[torch.Tensor] = []
        with Recorder(model, set()) as recorder, (folder / "ids.jsonl").open("w") as file:
            for ids in batches:
                step(model, ids)
                (observed,) = recorder.take()
                last = [layer.experts.flatten(0, 1) for layer in observed]
                for token in torch.stack(last, dim=1).tolist():
                    file.write(json.dumps(token) + "\n")
                yield
        return lambda: _sorted(last)

    return way


def _nnsight(model: Model) -> Way:
    import nnsight

    wrapped = nnsight.TransformersModel(  # type: ignore[attr-defined]
        model.module, tokenizer=model.tokenizer, task="text-generation"
    )

    def way(batches: list[torch.Tensor], folder: Path) -> Generator[None, None, Ids]:
        saved: Any = []
        for ids in batches:
            with wrapped.trace(ids):
                saved = nnsight.save([block.mlp.gate.output for block in wrapped.model.layers])
                logits = wrapped.lm_head.output.save()
            next_token_nll(logits, ids)
            yield
        return lambda: _sorted([output[2] for output in saved])

    return way


def _sorted(experts: list[torch.Tensor]) -> np.ndarray:
    return np.sort(torch.stack(experts).numpy(), axis=-1)


# Not ru_maxrss: that begins with the peak of the process that started this one.
_MEMORY = """
import re, sys
from pathlib import Path
import workbench
from workbench.bench.trace import _olmoe
tokenizer = workbench.load("demo").tokenizer
sizes = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 8, "num_attention_heads": 2}
module = _olmoe(vocab_size=len(tokenizer), num_experts=16, num_experts_per_tok=4, **sizes)
model = workbench.load(module, tokenizer=tokenizer)
workbench.trace(model, "all", sys.argv[1], max_tokens=int(sys.argv[2]), long_texts="split", progress=False)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
"""


def memory(few: int, many: int) -> dict[str, Any]:
    """Peak resident bytes of processes that trace `few` and `many` tokens with a tiny model. Linux only.

    It has 8 routers, so that 100 thousand tokens are more than one transaction.
    """
    peaks = []
    for tokens in (few, many):
        with tempfile.TemporaryDirectory() as folder:
            arguments = [sys.executable, "-c", _MEMORY, f"{folder}/trace.duckdb", str(tokens)]
            done = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
            peaks.append(int(done.stdout.split()[-1]))
    return {"tokens": [few, many], "peak_bytes": peaks, "ratio": round(peaks[1] / peaks[0], 4)}
