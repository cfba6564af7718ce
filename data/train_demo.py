"""Train the demonstration model: a small OLMoE on multilingual and multi-domain text, on a CPU.

    python data/train_demo.py --data train.jsonl.xz --work DIR --out data/models --minutes 75

The data are rows of JSON, `{text, lang, domain, source, segment_id, …}`, rows of one document following each other.
The schedule is a budget of wall-clock minutes, so it ends in time on a shared machine; the same command resumes after a
kill. It leaves `demo/` (final) and `demo-early/` (after `--early` of the budget) under `--out`: safetensors in bfloat16,
tokenizer, and `training.json` with the settings, the loss curve, held-out losses and what the routers did.
"""

import hashlib
import json
import lzma
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast
from transformers.models.olmoe.modeling_olmoe import OlmoeDecoderLayer, apply_rotary_pos_emb

EOS, PAD, ROLES = "<|endoftext|>", "<|padding|>", ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ---------------------------------------------------------------------------------------------------------- data


def document(row: dict) -> str:
    """The document a row is from: its id without the part that counts rows."""
    key = row["segment_id"]
    return key.split("#")[0] if "#" in key else key.split("||")[0] if "||" in key else ".".join(key.split(".")[:3])


def render(document_rows: list[dict]) -> str:
    """One training text. Every second dialogue is written with role markers, so that their embeddings are trained."""
    first = document_rows[0]
    if first["domain"] != "dialogue":
        return "\n".join(row["text"] for row in document_rows) + EOS
    texts = []
    for i, row in enumerate(document_rows):
        turns = row["text"].split("\n")
        marked = "".join(ROLES[1 + t % 2] + turn for t, turn in enumerate(turns))
        texts.append((marked if i % 2 else row["text"]) + EOS)
    return "".join(texts)


def read_groups(path: Path) -> dict[tuple[str, str, str], dict[str, list[str]]]:
    """Texts by (lang, domain, source) and split. Held out: 1% of the bytes of each group, at least 4 kB, by hash.

    Some groups are six novels, others thousands of one-line entries, so what is drawn is a passage: up to eight
    consecutive rows of one document. Groups of less than 16 kB are trained on whole.
    """
    passages: dict[tuple, list[tuple[bytes, int, str]]] = {}
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        for (*group, name), members in groupby(rows, key=lambda r: (r["lang"], r["domain"], r["source"], document(r))):
            members = list(members)
            for i in range(0, len(members), 8):
                text = render(members[i : i + 8])
                key = hashlib.sha256(f"{name}:{i}".encode()).digest()
                passages.setdefault(tuple(group), []).append((key, len(text.encode()), text))
    groups = {}
    for group, members in passages.items():
        total = sum(size for _, size, _ in members)
        wanted = max(0.01 * total, 4096) if total >= 16384 else 0
        chosen, reserved = set(), 0
        for key, size, _ in sorted(members):
            if reserved >= wanted:
                break
            chosen.add(key)
            reserved += size
        groups[group] = {
            "train": [text for key, _, text in members if key not in chosen],
            "heldout": [text for key, _, text in members if key in chosen],
        }
    return groups


def train_tokenizer(groups: dict, vocabulary: int, sample_bytes: int = 24_000_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Languages share the sample by bytes**0.4, and groups within a language by bytes**0.5."""
    size = {group: sum(len(text) for text in split["train"]) for group, split in groups.items()}
    languages: dict[str, float] = {}
    for (lang, *_), n in size.items():
        languages[lang] = languages.get(lang, 0) + n
    unit = sample_bytes / sum(n**0.4 for n in languages.values())
    sample = []
    for group, split in groups.items():
        within = sum(n**0.5 for other, n in size.items() if other[0] == group[0])
        budget = unit * languages[group[0]] ** 0.4 * size[group] ** 0.5 / within
        keep = min(1.0, budget / size[group])
        sample += [t for i, t in enumerate(split["train"]) if math.floor((i + 1) * keep) > math.floor(i * keep)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[EOS, PAD, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    for special in [EOS, *ROLES]:
        sample = [text.replace(special, "") for text in sample]
    bpe.train_from_iterator(sample, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, unk_token=EOS, pad_token=PAD,
        extra_special_tokens=ROLES, model_max_length=1024,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, context: int) -> np.ndarray:
    """(n, context + 1) uint16: passages end to end, cut into contexts; only the last one is padded. One group a call,
    so no context mixes languages, domains or sources."""
    if not texts:
        return np.empty((0, context + 1), dtype=np.uint16)
    ids = [i for encoded in tokenizer(texts, verbose=False)["input_ids"] for i in encoded]
    n = math.ceil((len(ids) - 1) / context)
    flat = np.full(n * context + 1, tokenizer.pad_token_id, dtype=np.uint16)
    flat[: len(ids)] = ids[: len(flat)]
    # Neighbours share one token: the last target of a context is the first input of the next.
    return np.lib.stride_tricks.sliding_window_view(flat, context + 1)[::context].copy()


def prepare(data: Path, work: Path, vocabulary: int, context: int) -> tuple[PreTrainedTokenizerFast, list[dict]]:
    """The tokenizer and the packed groups, made once and kept in `work`."""
    if not (work / "tokenizer").exists():
        train_tokenizer(read_groups(data), vocabulary).save_pretrained(work / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    cache = work / f"packed-{context}.npz"
    if not cache.exists():
        arrays, rng = {}, np.random.default_rng(0)
        for (lang, domain, source), split in read_groups(data).items():
            contexts = pack(split["train"], tokenizer, context)
            arrays[f"{lang}|{domain}|{source}|train"] = contexts[rng.permutation(len(contexts))]
            arrays[f"{lang}|{domain}|{source}|heldout"] = pack(split["heldout"], tokenizer, context)
            heldout_bytes = sum(len(text.replace(EOS, "").encode()) for text in split["heldout"])
            arrays[f"{lang}|{domain}|{source}|bytes"] = np.array(heldout_bytes)
        np.savez(cache.with_suffix(".part.npz"), **arrays)
        os.replace(cache.with_suffix(".part.npz"), cache)
    with np.load(cache, allow_pickle=False) as arrays:
        names = sorted({name.rsplit("|", 1)[0] for name in arrays.files})
        groups = [
            dict(zip(("lang", "domain", "source"), name.split("|"), strict=True))
            | {key: arrays[f"{name}|{key}"] for key in ("train", "heldout", "bytes")}
            for name in names
        ]
    return tokenizer, groups


def draw(groups: list[dict], split: str, cursors: torch.Tensor, batch: int, generator: torch.Generator) -> torch.Tensor:
    """(batch, context + 1): (lang, domain) pairs drawn by tokens**0.5, each group read in order, again when exhausted."""
    sizes = [len(group[split]) for group in groups]
    pairs = [(group["lang"], group["domain"]) for group in groups]
    pair_sizes = {pair: sum(n for n, p in zip(sizes, pairs, strict=True) if p == pair) for pair in pairs}
    weights = torch.tensor([n / max(1, pair_sizes[pair]) ** 0.5 for n, pair in zip(sizes, pairs, strict=True)])
    rows = []
    for g in torch.multinomial(weights, batch, replacement=True, generator=generator).tolist():
        rows.append(groups[g][split][int(cursors[g]) % sizes[g]])
        cursors[g] += 1
    return torch.from_numpy(np.stack(rows).astype(np.int64))


# --------------------------------------------------------------------------------------------------------- model
# The parameters are those of OlmoeForCausalLM; the forward pass is written out here because the stock one spends most
# of its time, on a CPU, outside large bfloat16 products. Master weights, router, norms and residual are float32.


class GroupedLinear(torch.autograd.Function):
    """x (slots, in) sorted by expert, weight (E, out, in) -> (slots, out); `sizes` are the slots of each expert."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        out = x.new_empty(len(x), weight.shape[1])
        for w, xs, outs in zip(weight, x.split(sizes), out.split(sizes), strict=True):
            torch.mm(xs, w.T, out=outs)
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        parts = zip(weight, x.split(ctx.sizes), grad.split(ctx.sizes), grad_x.split(ctx.sizes), grad_weight, strict=True)
        for w, xs, grads, grad_xs, grad_w in parts:
            torch.mm(grads, w, out=grad_xs)
            torch.mm(grads.T, xs, out=grad_w)
        return grad_x, grad_weight, None


class Dispatch(torch.autograd.Function):
    """Copy tokens (T, H) to expert slots (slots, H). `token[slot]` is T for an empty slot; `slot` is (T, k)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, token: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        ctx.slot = slot
        return torch.cat([x, x.new_zeros(1, x.shape[1])])[token]

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad[ctx.slot].sum(1), None, None


class Combine(torch.autograd.Function):
    """The transpose of `Dispatch`: sum over each token's k slots."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, token: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        ctx.token = token
        return x[slot].sum(1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return torch.cat([grad, grad.new_zeros(1, grad.shape[1])])[ctx.token], None, None


@torch.compile(dynamic=True)
def gated(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gate, up = h.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * weight[:, None]).bfloat16()


def run_experts(experts: torch.nn.Module, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x (T, H), ids (T, k), weights (T, k) -> (T, H)."""
    k, flat = ids.shape[1], ids.flatten()
    counts = flat.bincount(minlength=experts.num_experts)
    # Slots in multiples of 64: oneDNN compiles a kernel a shape, so free sizes would recompile forever.
    sizes = (counts + 63) // 64 * 64
    order = flat.argsort(stable=True)
    gaps = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)
    destination = torch.arange(len(flat)) + gaps.repeat_interleave(counts)
    slot = torch.empty_like(flat).scatter_(0, order, destination)
    token = torch.full((int(sizes.sum()),), len(x)).scatter_(0, destination, order // k)
    slot_weights = torch.zeros(len(token)).scatter(0, slot, weights.flatten())
    xs = Dispatch.apply(x.bfloat16(), token, slot.view(-1, k))
    h = GroupedLinear.apply(xs, experts.gate_up_proj.bfloat16(), sizes.tolist())
    y = GroupedLinear.apply(gated(h, slot_weights), experts.down_proj.bfloat16(), sizes.tolist())
    return Combine.apply(y, token, slot.view(-1, k)).float()


@torch.compile
def attend(layer: OlmoeDecoderLayer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor):
    """x (B, L, H) -> x after attention, the experts' input (B*L, H), and router probabilities (B*L, E)."""
    attention, (batch, length, _) = layer.self_attn, x.shape
    h = layer.input_layernorm(x).bfloat16()
    q = attention.q_norm(F.linear(h, attention.q_proj.weight.bfloat16()).float())
    k = attention.k_norm(F.linear(h, attention.k_proj.weight.bfloat16()).float())
    v = F.linear(h, attention.v_proj.weight.bfloat16())
    q, k, v = (t.view(batch, length, -1, attention.head_dim).transpose(1, 2) for t in (q, k, v))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    # Written out: at these sizes it beats the fused CPU kernel. No padding mask: only tails are padded.
    scores = (q.bfloat16() @ k.bfloat16().transpose(2, 3)).float() * attention.scaling + mask
    out = (scores.softmax(-1).bfloat16() @ v).transpose(1, 2).reshape(batch, length, -1)
    x = x + F.linear(out, attention.o_proj.weight.bfloat16()).float()
    h = layer.post_attention_layernorm(x).flatten(0, 1)
    return x, h, F.linear(h, layer.mlp.gate.weight).softmax(-1)


def forward(model: OlmoeForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """ids (B, L) -> final hidden states (B*L, H); a layer: router probabilities (B*L, E) and chosen experts (B*L, k)."""
    x = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    probabilities, chosen = [], []
    for layer in model.model.layers:
        x, h, p = attend(layer, x, cos, sin, mask)
        weights, experts = p.topk(model.config.num_experts_per_tok, dim=-1)
        x = x + run_experts(layer.mlp.experts, h, experts, weights).view_as(x)
        probabilities.append(p)
        chosen.append(experts)
    return model.model.norm(x).flatten(0, 1), probabilities, chosen


@torch.compile
def softmax_loss(logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy a token (unscaled), and the gradient of the scaled sum in the logits."""
    shifted = logits.float() - logits.float().amax(-1, keepdim=True)
    total = shifted.exp().sum(-1, keepdim=True)
    loss = total.log().squeeze(1) - shifted.gather(1, targets[:, None]).squeeze(1)
    hit = torch.arange(logits.shape[1]) == targets[:, None]
    return loss, ((shifted.exp() / total - hit.float()) * scale[:, None]).bfloat16()


class HeadLoss(torch.autograd.Function):
    """Losses a token of the output head, in chunks, so that the logits of a batch never exist at once. The gradient,
    of the mean over tokens with `keep` 1, is computed in the forward pass; the result is not to be weighted later."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, keep: torch.Tensor):
        head, scale, losses = weight.bfloat16(), keep / keep.sum(), []
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for h, t, s, g in zip(hidden.split(512), targets.split(512), scale.split(512), grad_hidden.split(512), strict=True):
            h = h.bfloat16()
            loss, grad = softmax_loss(h @ head.T, t, s)
            losses.append(loss)
            if ctx.needs_input_grad[0]:
                g.copy_(grad @ head)
                grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        losses = torch.cat(losses)
        ctx.mark_non_differentiable(losses)
        return (losses * scale).sum(), losses

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None


def gradients(model: OlmoeForCausalLM, rows: torch.Tensor, load: torch.Tensor, balance: float):
    """rows (n, L + 1), load (layers, E) -> gradients of the parameters, loss, balancing loss, this batch's load.

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
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(buffer, group["momentum"]).view(-1, group["rows"] or p.shape[-2], p.shape[-1])
                tall = x.shape[-2] > x.shape[-1]
                x = (x.mT if tall else x).bfloat16()
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):  # Newton-Schulz: all singular values towards 1
                    gram = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
                x = (x.mT if tall else x).float().reshape(p.shape)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x, alpha=-0.2 * group["lr"] * max(group["rows"] or p.shape[-2], p.shape[-1]) ** 0.5)


def optimizers(model: OlmoeForCausalLM, lr: float, muon_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention and experts, AdamW for embeddings, routers and norms (or all if muon_lr = 0)."""
    named = list(model.named_parameters())
    matrices = [(n, p) for n, p in named if muon_lr and ("proj" in n)]
    fused = [p for n, p in matrices if "gate_up" in n]
    plain = [p for n, p in matrices if "gate_up" not in n]
    rest = [p for n, p in named if not any(n == m for m, _ in matrices)]
    adamw = torch.optim.AdamW(
        [{"params": [p for p in rest if p.ndim > 1]}, {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}],
        lr=lr, betas=(0.9, 0.95), weight_decay=0.05, fused=True,
    )  # fmt: skip
    if not matrices:
        return [adamw]
    rows = model.config.intermediate_size
    # Two of about equal cost, which take their steps side by side.
    return [Muon([{"params": fused, "rows": rows}], muon_lr), Muon([{"params": plain, "rows": None}], muon_lr), adamw]


# ---------------------------------------------------------------------------------------------------- evaluation


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
    """Held-out losses by language and by domain, and how the routers spread their load and tell the two apart."""
    contexts = torch.from_numpy(np.concatenate([group["heldout"] for group in groups]).astype(np.int64))
    owner = np.repeat(np.arange(len(groups)), [len(group["heldout"]) for group in groups])
    parts = list(pool.map(lambda part: heldout_losses(model, part), contexts.split(64)))
    nats, tokens, counts = (torch.cat(x, dim=-2 if x[0].ndim == 3 else 0).double().numpy() for x in zip(*parts, strict=True))
    size = np.array([int(group["bytes"]) for group in groups])

    def losses(members: np.ndarray) -> dict:
        """`members` (n_groups,) selects groups."""
        inside = members[owner]
        total, n, n_bytes = nats[inside].sum(), tokens[inside].sum(), size[members].sum()
        return {"tokens": int(n), "nats_per_token": total / n, "bits_per_byte": total / math.log(2) / n_bytes}

    result: dict = {"all": losses(np.ones(len(groups), dtype=bool))}
    rng, labels = np.random.default_rng(0), {}
    for by in ("lang", "domain"):
        values = np.array([group[by] for group in groups])
        labels[by] = values[owner]
        result[f"by_{by}"] = {str(v): losses(values == v) for v in np.unique(labels[by])}
    result["layers"] = []
    for layer, layer_counts in enumerate(counts):
        load = layer_counts.sum(0) / layer_counts.sum()
        row = {
            "layer": layer,
            "load_entropy": float(-(load[load > 0] * np.log(load[load > 0])).sum() / math.log(len(load))),
            "dead_experts": int((load < 0.1 / len(load)).sum()),  # under a tenth of an equal share
            "max_load": float(load.max() * len(load)),
        }
        for by, label in labels.items():
            null = [mutual_information(layer_counts, rng.permutation(label)) for _ in range(20)]
            row[f"mi_{by}"] = mutual_information(layer_counts, label)
            row[f"mi_{by}_null_mean"], row[f"mi_{by}_null_max"] = float(np.mean(null)), max(null)
        result["layers"].append(row)
    for by, label in labels.items():
        share = np.array([tokens[label == v].sum() for v in np.unique(label)]) / tokens.sum()
        result[f"entropy_{by}"] = float(-(share * np.log(share)).sum())
    return result


def export(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path, training: dict) -> None:
    """A folder that `from_pretrained` loads; it appears under its name only when complete."""
    part = folder.with_name(folder.name + ".part")
    copy = OlmoeForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GenerationConfig(**special, pad_token_id=tokenizer.pad_token_id).save_pretrained(part)
    (part / "training.json").write_text(json.dumps(training, indent=1) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for file in part.iterdir():
        os.replace(file, folder / file.name)
    part.rmdir()


# ------------------------------------------------------------------------------------------------------ training


def main(
    data: Annotated[Path, typer.Option(help="Training rows, .jsonl.xz.")],
    work: Annotated[Path, typer.Option(help="Folder for the packed data, checkpoints and the log.")],
    out: Annotated[Path, typer.Option(help="Folder that gets demo/ and demo-early/.")] = Path("data/models"),
    minutes: Annotated[float, typer.Option(help="Wall-clock budget of training.")] = 75,
    early: Annotated[float, typer.Option(help="Share of the budget after which demo-early is taken.")] = 0.09,
    batch: Annotated[int, typer.Option(help="Contexts a step.")] = 16,
    context: Annotated[int, typer.Option(help="Tokens a context.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate of AdamW.")] = 2e-3,
    muon_lr: Annotated[float, typer.Option(help="Peak learning rate of Muon; 0: AdamW for everything.")] = 0.0,
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
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in locals().items() if k not in ("data", "work", "out")}
    # Threads each take a part of the batch: on a shared machine that wastes less than splitting every product.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    torch.manual_seed(seed)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer, groups = prepare(data, work, vocabulary, context)
    groups = [group for group in groups if len(group["train"])]
    config = OlmoeConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=expert_size, num_hidden_layers=layers,
        num_attention_heads=heads, num_experts=experts, num_experts_per_tok=top_k, router_aux_loss_coef=balance,
        max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = OlmoeForCausalLM(config)
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
        n_params = sum(p.numel() for p in params)
        done = {"step": at["step"], "tokens_seen": at["tokens"], "minutes": at["seconds"] / 60}
        options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())
        command = f"python data/train_demo.py --data {data.name} --work WORK {options}"
        return {"command": command, "settings": settings, "parameters": n_params, **done}

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
            p.grad = sum(grads) / len(grads)
        loss, aux = (sum(r[i] for r in results) / len(results) for i in (1, 2))
        load.lerp_(sum(r[3] for r in results) / len(results), 0.05)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        list(pool.map(lambda opt: opt.step(), opts))
        state["step"] += 1
        state["tokens"] += int((rows[:, 1:] != tokenizer.pad_token_id).sum())
        state["seconds"] = time.monotonic() - started
        if state["step"] % 25 == 0:
            entropy = torch.special.entr(load).sum(1) / math.log(experts)
            row = {k: state[k] for k in ("step", "tokens", "seconds")} | {"loss": float(loss), "aux": float(aux)}
            row |= {"load_entropy": entropy.tolist(), "dead_experts": (load < 0.1 / experts).sum(1).tolist()}
            if state["step"] % 250 == 0:
                nats, n, _ = heldout_losses(model, probe)
                row["heldout"] = float(nats.sum() / n.sum())
            state["curve"].append(row)
            (work / "log.json").write_text(json.dumps(state["curve"]))
            rate = state["tokens"] / state["seconds"]
            print(f"\r{progress:4.0%} step {state['step']} loss {row['loss']:.3f} {rate:.0f} tokens/s", end="", flush=True)
        if state["early"] is None and progress >= early:
            state["early"] = {k: state[k] for k in ("step", "tokens", "seconds")}
            export(model, tokenizer, out / "demo-early", describe(state["early"]))
        if time.monotonic() - saved_at > 180 or state["seconds"] >= minutes * 60:
            saved = {"model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts], "state": state}
            saved |= {"sampler": sampler.get_state(), "cursors": cursors, "load": load}
            torch.save(saved, checkpoint.with_suffix(".part"))
            os.replace(checkpoint.with_suffix(".part"), checkpoint)
            saved_at = time.monotonic()
    print()
    export(model, tokenizer, out / "demo", describe(state) | {"curve": state["curve"], "heldout": evaluate(model, groups, pool)})
    model.load_state_dict(OlmoeForCausalLM.from_pretrained(out / "demo-early", dtype=torch.float32).state_dict())
    curve = [row for row in state["curve"] if row["step"] <= state["early"]["step"]]
    training = describe(state["early"]) | {"curve": curve, "heldout": evaluate(model, groups, pool)}
    (out / "demo-early" / "training.json").write_text(json.dumps(training, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
