"""Dumps of planted routing in the layouts that the tools document: one writer a format."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import save_file

N_EXPERTS, TOP_K, N_LAYERS = 16, 4, 3
LENGTHS = (7, 12, 5)


@dataclass(frozen=True)
class Planted:
    """Routing of some texts. ids: tokens that have routing; more_ids: with the last sampled one."""

    experts: list[np.ndarray]  # (n, L, k)
    ids: list[np.ndarray]
    predictions: list[np.ndarray]
    weights: list[np.ndarray]


def planted(
    lengths: tuple[int, ...] = LENGTHS, n_layers: int = N_LAYERS, k: int = TOP_K, n_experts: int = N_EXPERTS
) -> Planted:
    random = np.random.default_rng(1)
    experts = [np.argsort(random.random((n, n_layers, n_experts)), axis=2)[:, :, :k] for n in lengths]
    weights = [-np.sort(-random.random(ids.shape).astype(np.float32), axis=2) / k for ids in experts]
    words = [random.integers(0, 500, n) for n in lengths]
    return Planted(experts, words, [np.roll(ids, -1) for ids in words], weights)


def olmoe(folder: Path, data: Planted) -> list[Path]:
    path = folder / "c4_results.jsonl"
    rows = [
        {"input_ids": ids.tolist(), "predicted_token_ids": next_ids.tolist(), "exp_ids": e.transpose(0, 2, 1).tolist()}
        for e, ids, next_ids in zip(data.experts, data.ids, data.predictions, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [path]


def vllm_npz(folder: Path, data: Planted) -> list[Path]:
    path = folder / "requests.npz"
    np.savez(path, **{f"request{i}": e.astype(np.uint8) for i, e in enumerate(data.experts)})
    return [path]


def vllm_npy(folder: Path, data: Planted) -> list[Path]:
    paths = [folder / f"request{i}.npy" for i in range(len(data.experts))]
    for path, experts in zip(paths, data.experts, strict=True):
        np.save(path, experts.astype(np.uint16))
    return paths


def as_npy(array: np.ndarray) -> str:
    stream = io.BytesIO()
    np.save(stream, array)
    return base64.b64encode(stream.getvalue()).decode()


def vllm_response(experts: np.ndarray, ids: np.ndarray, n_prompt: int) -> dict[str, Any]:
    choice = {
        "index": 0, "text": "…", "prompt_token_ids": ids[:n_prompt].tolist(),
        "token_ids": [*ids[n_prompt:].tolist(), 499], "routed_experts": as_npy(experts.astype(np.uint8)),
    }  # fmt: skip
    usage = {"prompt_tokens": n_prompt, "completion_tokens": len(ids) - n_prompt + 1}
    return {"id": "cmpl-1", "object": "text_completion", "model": "tiny", "choices": [choice], "usage": usage}


def vllm_json(folder: Path, data: Planted) -> list[Path]:
    path = folder / "responses.jsonl"
    rows = [vllm_response(e, ids, 3) for e, ids in zip(data.experts, data.ids, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [path]


def sglang_response(experts: np.ndarray, ids: np.ndarray, n_prompt: int) -> dict[str, Any]:
    n_said = len(ids) - n_prompt + 1
    every = [*ids.tolist(), 499]
    rows = [[None if place == 0 else -0.5, i, f"w{i}"] for place, i in enumerate(every)]
    meta = {
        "id": "a", "prompt_tokens": n_prompt, "completion_tokens": n_said,
        "routed_experts": base64.b64encode(experts.astype("<i4").tobytes()).decode(),
        "input_token_logprobs": rows[:n_prompt], "output_token_logprobs": rows[n_prompt:],
    }  # fmt: skip
    return {"text": "…", "output_ids": every[n_prompt:], "meta_info": meta}


def sglang(folder: Path, data: Planted) -> list[Path]:
    path = folder / "generate.json"
    rows = [sglang_response(e, ids, 3) for e, ids in zip(data.experts, data.ids, strict=True)]
    path.write_text(json.dumps(rows))
    return [path]


def sglang_openai(folder: Path, data: Planted) -> list[Path]:
    path = folder / "chat.jsonl"
    with path.open("w") as file:
        for experts, ids in zip(data.experts, data.ids, strict=True):
            extra = {"routed_experts": base64.b64encode(experts.astype("<i4").tobytes()).decode()}
            usage = {"prompt_tokens": 3, "completion_tokens": len(ids) - 2}
            choice = {"index": 0, "message": {"role": "assistant", "content": "…"}, "sgl_ext": extra}
            file.write(json.dumps({"id": "b", "model": "tiny", "choices": [choice], "usage": usage}) + "\n")
    return [path]


def recorded_counts(data: Planted) -> np.ndarray:
    """int32 (steps, L, E): each text a step."""
    tables = [
        [np.bincount(e[:, layer].ravel(), minlength=N_EXPERTS) for layer in range(e.shape[1])] for e in data.experts
    ]
    return np.array(tables, np.int32)


def recorder(folder: Path, data: Planted) -> list[Path]:
    path = folder / "expert_distribution_recorder_1.pt"
    counts = np.concatenate(
        [recorded_counts(data), np.zeros((2, data.experts[0].shape[1], N_EXPERTS), np.int32)]
    )  # unused steps
    torch.save(
        {"rank": 0, "logical_count": torch.from_numpy(counts), "average_utilization_rate_over_window": None}, path
    )
    return [path]


def llama_cpp(folder: Path, data: Planted, *, header: bool = True, micro: int = 4, stride: bool = True) -> list[Path]:
    """The first text: a prompt in micro-batches of `micro` but for 2 tokens, which are decoded one by one.

    stride: heed it, as the fork does; else write what the pull request does
    """
    experts = data.experts[0]
    n, n_layers, k = experts.shape
    prompt = n - 2
    starts = [*range(0, prompt, micro), *range(prompt, n)]
    rows = []
    for start in starts:
        stop = min(start + micro, prompt) if start < prompt else start + 1
        for layer in range(n_layers):
            # in the last layer only the last token of a micro-batch is computed
            tokens = range(stop - 1, stop) if layer == n_layers - 1 else range(start, stop)
            ids = experts[list(tokens), layer]
            if not stride:
                first = ids[0]
                order = [*first, *(i for i in range(N_EXPERTS) if i not in first)]
                ids = np.resize(order, len(tokens) * k).reshape(-1, k)
            for place, chosen in enumerate(ids):
                for rank, expert in enumerate(chosen):
                    phase = "prefill" if start < prompt else "decode"
                    rows.append(f"{phase},{start + place},{layer},{rank},{expert}" if header else f"{layer},{expert}")
    path = folder / "moe_trace.csv"
    path.write_text("\n".join(["phase,token,layer,rank,expert", *rows] if header else rows) + "\n")
    return [path]


def policylang_rows(data: Planted) -> list[dict[str, Any]]:
    """Layers are 1, 2, …, as of a model whose first layer is dense; the prompt in one pass, then token by token."""
    rows = []
    for prompt, (experts, ids, weights) in enumerate(zip(data.experts, data.ids, data.weights, strict=True)):
        n = len(ids)
        for start, stop in [(0, 3), *((at, at + 1) for at in range(3, n))]:
            for layer in range(experts.shape[1]):
                for token in range(start, stop):
                    logits = np.full(N_EXPERTS, -9.0)
                    logits[experts[token, layer]] = np.arange(TOP_K, 0, -1)
                    rows.append(
                        {
                            "prompt_id": prompt, "token_idx": token, "layer_idx": layer + 1,
                            "selected_experts": experts[token, layer].tolist(),
                            "router_scores": weights[token, layer].tolist(), "router_logits": logits.tolist(),
                            "token_id": int(ids[token]), "phase": "prefill" if token < 3 else "decode",
                            "language_tag": ("en", "de", "en")[prompt], "domain_tag": "chat",
                            "token_loss": 0.5 * token if token else None,
                        }
                    )  # fmt: skip
    return rows


SHORT = {
    "prompt_id": "p", "token_idx": "t", "layer_idx": "l", "selected_experts": "e", "router_scores": "s",
    "router_logits": "lg_l", "token_id": "ti", "phase": "ph", "language_tag": "lg", "domain_tag": "dm",
    "token_loss": "tl",
}  # fmt: skip


def policylang_jsonl(folder: Path, data: Planted) -> list[Path]:
    path = folder / "trace.jsonl"
    rows = policylang_rows(data)
    header = {"model_name": "tiny", "num_layers": N_LAYERS + 1, "num_experts": N_EXPERTS, "top_k": TOP_K}
    lines = [header | {"num_entries": len(rows), "records_full_softmax": False}]
    lines += [{SHORT[name]: value for name, value in row.items() if value is not None} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [path]


def policylang_parquet(folder: Path, data: Planted) -> list[Path]:
    path = folder / "trace.parquet"
    rows = policylang_rows(data)
    kinds = {"selected_experts": pa.list_(pa.int32()), "token_loss": pa.float32(), "token_id": pa.int32()}
    kinds |= {name: pa.list_(pa.float32()) for name in ("router_scores", "router_logits")}
    columns = {name: pa.array([row[name] for row in rows], kinds.get(name)) for name in rows[0]}
    pq.write_table(pa.table(columns), path, compression="zstd")
    return [path]


def moe_lrc(folder: Path, data: Planted) -> list[Path]:
    """Two data sets of samples of equal length, the tokens beside them."""
    n = min(len(ids) for ids in data.ids)
    groups = {"c4": [0, 1], "github": [2]}
    stacked = {name: np.stack([data.experts[i][:n] for i in members]) for name, members in groups.items()}
    (folder / "topk").mkdir(exist_ok=True)
    (folder / "pred").mkdir(exist_ok=True)
    paths = []
    for layer in range(data.experts[0].shape[1]):
        paths.append(folder / "topk" / f"olmoe_{layer:02d}.safetensors")
        tables = {name: np.ascontiguousarray(table[:, :, layer]) for name, table in stacked.items()}
        save_file({name: table.astype(np.int8) for name, table in tables.items()}, paths[-1])
    for side, path in (
        (data.ids, folder / "olmoe.safetensors"),
        (data.predictions, folder / "pred" / "olmoe.safetensors"),
    ):
        save_file({name: np.stack([side[i][:n] for i in members]) for name, members in groups.items()}, path)
        paths.append(path)
    return paths
