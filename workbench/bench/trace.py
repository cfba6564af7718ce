"""What recording costs: the same batches through the same model, recorded in five ways, as ratios in one run.

Every way runs the forward pass and the loss of each token; what differs is only what is kept:

    forward       nothing
    workbench     ids and weights of every router, into a DuckDB file
    torch.save    full router logits of every layer, a file a layer and batch
    nnsight       an nnsight trace that saves every router's output
    json lines    ids of every token as JSON lines

The ways alternate within a round and their ids are compared before any figure is printed. Peak memory is that of
processes of their own, which trace 100 thousand and 1 million tokens.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

from workbench.capture import _block, _next_token_nll
from workbench.models import Model, load
from workbench.recorder import Recorder
from workbench.store import Writer
from workbench.tokenization import Sequence
from workbench.tracefile import Trace

WAYS = ("forward", "workbench", "torch.save", "nnsight", "json lines")


def run(quick: bool = False) -> dict:
    """Measure the demonstration model and a mid-size one; prints a table, returns every figure."""
    demo = load("demo", dtype="float32")
    mid = load(_mid_size(quick), tokenizer=demo.tokenizer)
    rounds, n = (1, 2) if quick else (3, 12)
    result = {
        "date": date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "demo": _compare(demo, rounds, n),
        "mid-size": _compare(mid, rounds, n),
        "memory": _memory(*((2_000, 6_000) if quick else (100_000, 1_000_000))),
    }
    for name in ("demo", "mid-size"):
        print(
            f"{name}: {result[name]['tokens']:,} tokens, time over the forward pass alone (lowest to highest of {rounds} rounds)"
        )
        for way in WAYS:
            ratio = result[name]["ratio"][way]
            print(f"  {way:<12} {ratio['median']:.3f}   ({ratio['lowest']:.3f} to {ratio['highest']:.3f})")
    memory = result["memory"]
    print(
        f"peak memory after {memory['tokens'][1]:,} tokens over that after {memory['tokens'][0]:,}: {memory['ratio']:.3f}"
    )
    return result


def _mid_size(quick: bool) -> OlmoeForCausalLM:
    """Hidden 512, 8 layers, 64 experts, top-8, random weights."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2} if quick else {}
    defaults = {"hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 8}
    config = OlmoeConfig(
        vocab_size=8192,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts=64,
        num_experts_per_tok=8,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=0,
        **(defaults | size),
    )
    return OlmoeForCausalLM(config).eval()


def _compare(model: Model, rounds: int, n_batches: int) -> dict:
    """Time each way over the same batches of 8 × 256 random tokens, after checking that they saw the same ids."""
    generator = torch.Generator().manual_seed(0)
    shape = (8, min(256, model.max_length or 256))
    batches = [torch.randint(4, 8000, shape, generator=generator) for _ in range(n_batches)]
    ways: dict[str, Callable] = {
        "forward": _forward,
        "workbench": _workbench,
        "torch.save": _torch_save,
        "nnsight": _nnsight(model),
        "json lines": _json_lines,
    }
    seen: dict[str, np.ndarray] = {}
    for name, way in ways.items():  # warm up, and compare
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            seen[name] = way(model, batches[:1], Path(folder), True)
    for name in WAYS[2:]:
        if not np.array_equal(seen["workbench"], seen[name]):
            raise AssertionError(f"{name} saw other ids than the workbench on {model.name}: nothing was measured")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        order = list(ways.items())
        for name, way in order[turn % len(order) :] + order[: turn % len(order)]:
            with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
                start = time.perf_counter()
                way(model, batches, Path(folder), False)
                seconds[name].append(time.perf_counter() - start)
    ratios = {
        name: [one / base for one, base in zip(times, seconds["forward"], strict=True)]
        for name, times in seconds.items()
    }
    return {
        "tokens": n_batches * shape[0] * shape[1],
        "tokens_per_second": n_batches * shape[0] * shape[1] / median(seconds["forward"]),
        "seconds": seconds,
        "ratio": {
            name: {"median": median(values), "lowest": min(values), "highest": max(values)}
            for name, values in ratios.items()
        },
    }


def _step(model: Model, ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    return _next_token_nll(model.module(input_ids=ids, attention_mask=mask, use_cache=False).logits, ids)


def _forward(model: Model, batches: list[torch.Tensor], folder: Path, check: bool) -> np.ndarray:
    for ids in batches:
        _step(model, ids)
    return np.empty(0)


def _workbench(model: Model, batches: list[torch.Tensor], folder: Path, check: bool) -> np.ndarray:
    header = {"run": "bench", "model": model.name, "recorded": ["ids", "weights"]}
    layers = [
        {"layer": one.index, "name": one.name, "n_experts": one.n_experts, "top_k": one.top_k} for one in model.layers
    ]
    with (
        Writer(folder / "bench.duckdb", header, layers, mode="new") as writer,
        Recorder(model, {"weights"}) as recorder,
    ):
        for number, ids in enumerate(batches):
            nll = _step(model, ids)
            (observed,) = recorder.take()
            kept = torch.ones_like(ids, dtype=torch.bool)
            rows = [
                Sequence(
                    seq=number * len(ids) + row,
                    token_ids=ids[row].numpy().astype(np.int32),
                    phase=np.ones(ids.shape[1], dtype=np.uint8),
                    sha256="0" * 64,
                )
                for row in range(len(ids))
            ]
            phase = np.ones(ids.numel(), dtype=np.uint8)
            writer.append(_block(rows, observed, kept, ids, phase, nll[kept].numpy(), [0] * len(ids)))
    if not check:
        return np.empty(0)
    trace = Trace(folder / "bench.duckdb")
    return np.sort(np.stack([trace.experts(layer) for layer in range(trace.n_layers)]), axis=-1)


def _torch_save(model: Model, batches: list[torch.Tensor], folder: Path, check: bool) -> np.ndarray:
    kept: dict[int, torch.Tensor] = {}

    def keep(layer: int):
        return lambda module, args, output: kept.__setitem__(layer, output[0])

    hooks = [layer.router.register_forward_hook(keep(layer.index)) for layer in model.layers]
    try:
        for number, ids in enumerate(batches):
            _step(model, ids)
            for layer, logits in kept.items():
                torch.save(logits.clone(), folder / f"{number}.{layer}.pt")
    finally:
        for hook in hooks:
            hook.remove()
    if not check:
        return np.empty(0)
    chosen = [kept[layer.index].topk(layer.top_k, dim=-1).indices for layer in model.layers]
    return np.sort(torch.stack(chosen).numpy().astype(np.uint16), axis=-1)


def _nnsight(model: Model) -> Callable:
    import nnsight

    wrapped = nnsight.TransformersModel(model.module, tokenizer=model.tokenizer, task="text-generation")

    def way(model: Model, batches: list[torch.Tensor], folder: Path, check: bool) -> np.ndarray:
        saved = []
        for ids in batches:
            with wrapped.trace(ids):
                saved = [block.mlp.gate.output.save() for block in wrapped.model.layers]
                logits = wrapped.lm_head.output.save()
            _next_token_nll(logits, ids)
        return np.sort(torch.stack([output[2] for output in saved]).numpy().astype(np.uint16), axis=-1)

    return way


def _json_lines(model: Model, batches: list[torch.Tensor], folder: Path, check: bool) -> np.ndarray:
    last: list[torch.Tensor] = []
    with Recorder(model, set()) as recorder, (folder / "ids.jsonl").open("w") as file:
        for ids in batches:
            _step(model, ids)
            (observed,) = recorder.take()
            last = [layer.experts.flatten(0, 1) for layer in observed]
            for token in torch.stack(last, dim=1).tolist():
                file.write(json.dumps(token) + "\n")
    return np.sort(torch.stack(last).numpy().astype(np.uint16), axis=-1)


_MEMORY = """
import resource, sys, torch, workbench
from transformers import OlmoeConfig, OlmoeForCausalLM
tokenizer = workbench.load("demo").tokenizer
torch.manual_seed(0)
config = OlmoeConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_experts=16, num_experts_per_tok=4, max_position_embeddings=512, pad_token_id=0, eos_token_id=0)
model = workbench.load(OlmoeForCausalLM(config).eval(), tokenizer=tokenizer)
trace = workbench.trace(model, "all", sys.argv[1], max_tokens=int(sys.argv[2]), long_texts="split", progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def _memory(few: int, many: int) -> dict:
    """Peak resident bytes of processes that trace `few` and `many` tokens with a tiny model."""
    peaks = []
    for tokens in (few, many):
        with tempfile.TemporaryDirectory() as folder:
            arguments = [sys.executable, "-c", _MEMORY, f"{folder}/trace.duckdb", str(tokens)]
            done = subprocess.run(arguments, capture_output=True, text=True, check=True)
            peaks.append(int(done.stdout.split()[-1]))
    return {"tokens": [few, many], "peak_bytes": peaks, "ratio": peaks[1] / peaks[0]}
