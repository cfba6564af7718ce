"""Train the demonstration model: a small OLMoE on multilingual and multi-domain text, on a CPU.

    python data/train_demo.py --data train.jsonl.xz --work WORK --minutes 85

The data are rows of JSON, `{text, lang, domain, source, segment_id, …}`; rows of one document follow each other. The
schedule is a budget of wall-clock minutes, so it ends in time on a shared machine; the same command resumes after a
kill. It leaves `demo/` and `demo-early/` (taken after `--early` of the budget) under `--out`: safetensors in bfloat16,
tokenizer, and `training.json`: settings, loss curve, held-out losses, and what the routers did on held-out text.
"""

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from demo_data import draw, prepare
from demo_forward import HeadLoss, forward
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

# Training


def gradients(model: OlmoeForCausalLM, rows: torch.Tensor, load: torch.Tensor, balance: float):
    """rows (n, L + 1), load (layers, E) -> gradients of the parameters, loss, balancing loss, the load of these rows.

    Balance is kept a layer at a time (the stock loss sums over layers first, which hides opposite imbalances), without
    padding, and against the running `load` of the last dozens of batches, so that one batch may well be uneven.
    """
    keep = (rows[:, 1:] != model.config.pad_token_id).flatten().float()
    hidden, probabilities, chosen = forward(model, rows[:, :-1])
    loss, _ = HeadLoss.apply(hidden, model.lm_head.weight, rows[:, 1:].flatten(), keep)
    k, (n_layers, n_experts) = model.config.num_experts_per_tok, load.shape
    mean = torch.stack([(p * keep[:, None]).sum(0) for p in probabilities]) / keep.sum()
    aux = n_experts * (load * mean).sum() / n_layers
    counts = [torch.zeros(n_experts).scatter_add(0, ids.flatten(), keep.repeat_interleave(k)) for ids in chosen]
    grads = torch.autograd.grad(loss + balance * aux, list(model.parameters()))
    return grads, loss.item(), aux.item(), torch.stack(counts) / (k * keep.sum())


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon/) over the last two dimensions, so that every expert has matrices
    of its own; torch.optim.Muon takes 2-D parameters only. A group's `rows` cuts fused gate_up parameters in two.
    Updates are scaled to the size of AdamW's (arXiv:2502.16982, section 2.2)."""

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95, weight_decay: float = 0.05):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                shape = (-1, group["rows"] or p.shape[-2], p.shape[-1])
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"]).view(shape)
                tall = shape[1] > shape[2]
                x = (x.mT if tall else x).bfloat16()
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):  # Newton-Schulz: all singular values towards 1
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = (x.mT if tall else x).float().reshape(p.shape)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x, alpha=-0.2 * group["lr"] * max(shape[1:]) ** 0.5)


def optimizers(model: OlmoeForCausalLM, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and experts, AdamW for embeddings, routers and norms (all if muon_lr is 0)."""
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if muon_lr and "proj" in name}
    rest = [p for name, p in named.items() if name not in matrices]
    decay = [
        {"params": [p for p in rest if p.ndim > 1]},
        {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0},
    ]
    adamw = torch.optim.AdamW(decay, lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    if not matrices:
        return [adamw]
    fused = [p for name, p in matrices.items() if "gate_up" in name]
    plain = [p for name, p in matrices.items() if "gate_up" not in name]
    # Two Muons of about equal cost, which take their steps side by side.
    rows = model.config.intermediate_size
    return [Muon([{"params": fused, "rows": rows}], muon_lr), Muon([{"params": plain, "rows": None}], muon_lr), adamw]


# Evaluation and export


@torch.no_grad()
def heldout_losses(model: OlmoeForCausalLM, contexts: torch.Tensor, batch: int = 16):
    """contexts (n, L + 1) -> nats and tokens of each context (n,), and expert counts (layers, n, E)."""
    nats, tokens, counts = [], [], []
    for rows in contexts.split(batch):
        # Always the same shape: another one would be compiled anew.
        full = F.pad(rows, (0, 0, 0, batch - len(rows)), value=model.config.pad_token_id)
        targets, keep = full[:, 1:].flatten(), (full[:, 1:] != model.config.pad_token_id).flatten().float()
        hidden, _, chosen = forward(model, full[:, :-1])
        losses = HeadLoss.apply(hidden, model.lm_head.weight, targets, keep)[1]
        nats.append((losses * keep).view(batch, -1).sum(1)[: len(rows)])
        tokens.append(keep.view(batch, -1).sum(1)[: len(rows)])
        hot = [F.one_hot(c, model.config.num_experts).sum(1) * keep[:, None] for c in chosen]
        counts.append(torch.stack([h.view(batch, -1, h.shape[1]).sum(1) for h in hot])[:, : len(rows)])
    return torch.cat(nats), torch.cat(tokens), torch.cat(counts, dim=1)


def mutual_information(counts: np.ndarray, labels: np.ndarray) -> float:
    """counts (n, E) of each context's selections, labels (n,) -> nats between expert and label."""
    joint = np.stack([counts[labels == label].sum(0) for label in np.unique(labels)]) / counts.sum()
    independent = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    return float((joint[joint > 0] * np.log(joint[joint > 0] / independent[joint > 0])).sum())


def evaluate(model: OlmoeForCausalLM, groups: list[dict], pool: ThreadPoolExecutor) -> dict:
    """Held-out losses by language and by domain, and a layer: load, and mutual information of expert and label.

    Each selected expert of a token is one observation with the labels of its context; the null of the mutual
    information permutes the labels over contexts, 20 times.
    """
    contexts = torch.from_numpy(np.concatenate([group["heldout"] for group in groups]).astype(np.int64))
    owner = np.repeat(np.arange(len(groups)), [len(group["heldout"]) for group in groups])
    parts = zip(*pool.map(lambda part: heldout_losses(model, part), contexts.split(64)), strict=True)
    nats, tokens, counts = (torch.cat(x, dim=x[0].ndim // 2).double().numpy() for x in parts)
    size = np.array([int(group["bytes"]) for group in groups])

    def losses(members: np.ndarray) -> dict:
        """`members` (n_groups,) selects groups."""
        total, n = nats[members[owner]].sum(), tokens[members[owner]].sum()
        bits = total / math.log(2) / size[members].sum()
        return {"tokens": int(n), "nats_per_token": total / n, "bits_per_byte": bits}

    result: dict = {"all": losses(np.ones(len(groups), dtype=bool))}
    labels, rng = {}, np.random.default_rng(0)
    for by in ("lang", "domain"):
        values = np.array([group[by] for group in groups])
        labels[by] = values[owner]
        result[f"by_{by}"] = {str(v): losses(values == v) for v in np.unique(labels[by])}
        share = np.array([tokens[labels[by] == v].sum() for v in np.unique(labels[by])]) / tokens.sum()
        result[f"entropy_{by}"] = float(-(share * np.log(share)).sum())
    result["layers"] = []
    for layer, of_layer in enumerate(counts):
        load = of_layer.sum(0) / of_layer.sum()
        entropy = -(load[load > 0] * np.log(load[load > 0])).sum() / math.log(len(load))
        # Dead: less than a tenth of an equal share.
        row = {"layer": layer, "load_entropy": float(entropy), "dead_experts": int((load < 0.1 / len(load)).sum())}
        row["max_load"] = float(load.max() * len(load))
        for by, label in labels.items():
            null = [mutual_information(of_layer, rng.permutation(label)) for _ in range(20)]
            row[f"mi_{by}"] = mutual_information(of_layer, label)
            row[f"mi_{by}_null_mean"], row[f"mi_{by}_null_max"] = float(np.mean(null)), max(null)
        result["layers"].append(row)
    return result


def export(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, training: dict) -> None:
    """A folder that `from_pretrained` loads; every file appears under its name only when complete."""
    part = folder.with_name(folder.name + ".part")
    copy = OlmoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(part)
    tokenizer.save_pretrained(part)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    GenerationConfig(**special).save_pretrained(part)
    (part / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        file.chmod(0o644)  # safetensors writes 0600
        os.replace(file, folder / file.name)
    part.rmdir()


def main(
    data: Annotated[Path, typer.Option(help="Training rows, .jsonl.xz.")],
    work: Annotated[Path, typer.Option(help="Folder for the packed data, checkpoints and log.json.")],
    out: Annotated[Path, typer.Option(help="Folder that gets demo/ and demo-early/.")] = Path("data/models"),
    minutes: Annotated[float, typer.Option(help="Wall-clock budget of training.")] = 85,
    early: Annotated[float, typer.Option(help="Share of the budget after which demo-early is taken.")] = 0.09,
    batch: Annotated[int, typer.Option(help="Contexts a step.")] = 16,
    context: Annotated[int, typer.Option(help="Tokens a context.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 4e-3,
    muon_lr: Annotated[float, typer.Option(help="Peak learning rate of Muon; 0: AdamW for everything.")] = 8e-3,
    balance: Annotated[float, typer.Option(help="Load-balancing coefficient.")] = 0.05,
    hidden: int = 192,
    layers: int = 6,
    heads: int = 3,
    experts: int = 32,
    top_k: int = 4,
    expert_size: int = 64,
    vocabulary: int = 8192,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Train, or continue after a kill, and export."""
    settings = {name: value for name, value in locals().items() if name not in ("data", "work", "out")}
    # Threads each take a part of the batch: on a shared machine that waits less than splitting every product.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, groups = prepare(data, work, vocabulary, context)
    groups = [group for group in groups if len(group["train"])]
    sizes = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": expert_size}
    sizes |= {"num_hidden_layers": layers, "num_attention_heads": heads, "max_position_embeddings": 1024}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    router = {"num_experts": experts, "num_experts_per_tok": top_k, "router_aux_loss_coef": balance}
    model = OlmoeForCausalLM(OlmoeConfig(**sizes, **special, **router, tie_word_embeddings=True))
    params = list(model.parameters())
    opts = optimizers(model, lr, muon_lr)
    peaks = [opt.defaults["lr"] for opt in opts]
    sampler = torch.Generator().manual_seed(seed)
    # A fixed sample of held-out contexts, drawn as the training batches are, for the curve.
    probe = draw(groups, "heldout", torch.zeros(len(groups)), 128, torch.Generator().manual_seed(seed))
    state = {"step": 0, "tokens": 0, "seconds": 0.0, "early": None, "curve": []}
    cursors, load = torch.zeros(len(groups), dtype=torch.int64), torch.full((layers, experts), 1 / experts)
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for opt, opt_state in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(opt_state)
        sampler.set_state(saved["sampler"])
        cursors, load, state = saved["cursors"], saved["load"], saved["state"]

    def describe(at: dict) -> dict:
        """What training.json says of the model after `at`."""
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
        command = f"python data/train_demo.py --data {data.name} --work WORK {options}"
        done = {"step": at["step"], "tokens_seen": at["tokens"], "minutes": at["seconds"] / 60}
        return {"command": command, "settings": settings, "parameters": sum(p.numel() for p in params)} | done

    started, saved_at = time.monotonic() - state["seconds"], time.monotonic()
    while state["seconds"] < minutes * 60:
        progress = state["seconds"] / (minutes * 60)
        scale = min(1.0, (state["step"] + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
        for opt, peak in zip(opts, peaks, strict=True):
            for group in opt.param_groups:
                group["lr"] = peak * scale
        rows = draw(groups, "train", cursors, batch, sampler)
        results = list(pool.map(lambda part: gradients(model, part, load, balance), rows.chunk(threads)))
        for p, *grads in zip(params, *[grads for grads, *_ in results], strict=True):
            p.grad = torch.stack(grads).mean(0)
        _, losses, auxes, loads = zip(*results, strict=True)
        loss, aux = sum(losses) / len(results), sum(auxes) / len(results)
        load.lerp_(torch.stack(loads).mean(0), 0.05)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        list(pool.map(lambda opt: opt.step(), opts))
        state["step"] += 1
        state["tokens"] += int((rows[:, 1:] != model.config.pad_token_id).sum())
        state["seconds"] = time.monotonic() - started
        if state["step"] % 25 == 0:
            entropy = torch.special.entr(load).sum(1) / math.log(experts)
            row = {name: state[name] for name in ("step", "tokens", "seconds")} | {"loss": loss, "aux": aux}
            row |= {"load_entropy": entropy.tolist(), "dead_experts": (load < 0.1 / experts).sum(1).tolist()}
            if state["step"] % 250 == 0:
                nats, n, _ = heldout_losses(model, probe)
                row["heldout"] = float(nats.sum() / n.sum())
            state["curve"].append(row)
            (work / "log.json").write_text(json.dumps(state["curve"]))
            rate = state["tokens"] / state["seconds"]
            print(f"\r{progress:4.0%} step {state['step']} loss {loss:.3f} {rate:.0f} tokens/s", end="", flush=True)
        if state["early"] is None and progress >= early:
            state["early"] = {name: state[name] for name in ("step", "tokens", "seconds")}
            export(model, tokenizer, out / "demo-early", describe(state["early"]))
        if time.monotonic() - saved_at > 180 or state["seconds"] >= minutes * 60:
            saved = {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts], "state": state}
            saved |= {"sampler": sampler.get_state(), "cursors": cursors, "load": load}
            torch.save(saved, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            saved_at = time.monotonic()
    print()
    training = describe(state) | {"curve": state["curve"], "heldout": evaluate(model, groups, pool)}
    export(model, tokenizer, out / "demo", training)
    # What was shipped as the early model is what is measured.
    model.load_state_dict(OlmoeForCausalLM.from_pretrained(out / "demo-early", dtype=torch.float32).state_dict())
    curve = [row for row in state["curve"] if row["step"] <= state["early"]["step"]]
    training = describe(state["early"]) | {"curve": curve, "heldout": evaluate(model, groups, pool)}
    (out / "demo-early" / "training.json").write_text(json.dumps(training, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
