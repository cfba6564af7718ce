"""Train the demonstration model: a small OLMoE on multilingual and multi-domain text, on a CPU.

    python data/train_demo.py --data train.jsonl.xz --work WORK --minutes 85

The data are rows of JSON, `{text, lang, domain, source, segment_id, …}`; rows of one document follow each other. The
schedule is a budget of wall-clock minutes, so it ends in time on a shared machine; the same command resumes after a
kill. It leaves `demo/` and `demo-early/` (taken after `--early` of the budget) under `--out`: safetensors in bfloat16,
tokenizer, and `training.json`: settings, loss curve, held-out losses, and what the routers did on held-out text.
"""

import hashlib
import json
import lzma
import math
import os
import time
from collections import defaultdict
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
from transformers.models.olmoe.modeling_olmoe import OlmoeDecoderLayer, OlmoeExperts, apply_rotary_pos_emb

EOS, PAD, ROLES = "<|endoftext|>", "<|padding|>", ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# Data


def document(row: dict) -> str:
    """The document a row is from: its id without the part that counts rows."""
    key = row["segment_id"]
    return key.split("#")[0] if "#" in key else key.split("||")[0] if "||" in key else ".".join(key.split(".")[:3])


def render(rows: list[dict]) -> str:
    """One training text. Every second dialogue is written with role markers, so that their embeddings are trained."""
    if rows[0]["domain"] != "dialogue":
        return "\n".join(row["text"] for row in rows) + EOS
    plain = [row["text"] for row in rows]
    marked = ["".join(ROLES[1 + i % 2] + turn for i, turn in enumerate(text.split("\n"))) for text in plain]
    return "".join((marked[i] if i % 2 else plain[i]) + EOS for i in range(len(rows)))


def read_groups(path: Path) -> dict[tuple[str, str, str], dict[str, list[str]]]:
    """Texts by (lang, domain, source) and split. Held out: 1% of the bytes of each group, at least 4 kB, by hash.

    Some groups are six novels, others thousands of one-line entries, so what is drawn is a passage: up to eight
    consecutive rows of one document. Groups of less than 16 kB are trained on whole.
    """
    passages = defaultdict(list)
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        rows = map(json.loads, lines)
        for (*group, name), members in groupby(rows, key=lambda r: (r["lang"], r["domain"], r["source"], document(r))):
            members = list(members)
            for i in range(0, len(members), 8):
                passages[tuple(group)].append(
                    (hashlib.sha256(f"{name}:{i}".encode()).digest(), render(members[i : i + 8]))
                )
    groups = {}
    for group, members in passages.items():
        total = sum(len(text.encode()) for _, text in members)
        wanted, reserved, chosen = max(0.01 * total, 4096) if total >= 16384 else 0, 0, set()
        for key, text in sorted(members, key=lambda member: (member[0], len(member[1].encode()))):
            if reserved >= wanted:
                break
            chosen.add(key)
            reserved += len(text.encode())
        groups[group] = {
            split: [text for key, text in members if (key in chosen) == (split == "heldout")]
            for split in ("train", "heldout")
        }
    return groups


def train_tokenizer(groups: dict, vocabulary: int, sample_bytes: int = 24_000_000) -> PreTrainedTokenizerFast:
    """Byte-level BPE. Languages share the sample by size**0.4, and groups within a language by size**0.5."""
    size = {group: sum(len(text) for text in split["train"]) for group, split in groups.items()}
    languages, roots = defaultdict(int), defaultdict(float)
    for (lang, *_), n in size.items():
        languages[lang] += n
        roots[lang] += n**0.5
    unit = sample_bytes / sum(n**0.4 for n in languages.values())
    sample = []
    for group, split in groups.items():
        budget = unit * languages[group[0]] ** 0.4 * size[group] ** 0.5 / roots[group[0]]
        keep = min(1.0, budget / size[group])
        sample += [t for i, t in enumerate(split["train"]) if math.floor((i + 1) * keep) > math.floor(i * keep)]
    for special in [EOS, *ROLES]:
        sample = [text.replace(special, "") for text in sample]
    bpe = Tokenizer(models.BPE())
    split_digits = pre_tokenizers.Digits(individual_digits=True)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split_digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        sample,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[EOS, PAD, *ROLES], initial_alphabet=alphabet, show_progress=False
        ),
    )
    names = {"bos_token": EOS, "eos_token": EOS, "unk_token": EOS, "pad_token": PAD, "extra_special_tokens": ROLES}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=1024, **names)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack(texts: list[str], tokenizer: PreTrainedTokenizerFast, context: int) -> np.ndarray:
    """(n, context + 1) uint16: the texts of one group end to end, cut into contexts; only the last one is padded.

    No context mixes languages, domains or sources. Neighbours share one token, a target and then an input.
    """
    if not texts:
        return np.empty((0, context + 1), dtype=np.uint16)
    ids = [i for encoded in tokenizer(texts, verbose=False)["input_ids"] for i in encoded]
    flat = np.full(math.ceil((len(ids) - 1) / context) * context + 1, tokenizer.pad_token_id, dtype=np.uint16)
    flat[: len(ids)] = ids
    return np.lib.stride_tricks.sliding_window_view(flat, context + 1)[::context].copy()


def prepare(data: Path, work: Path, vocabulary: int, context: int) -> tuple[PreTrainedTokenizerFast, list[dict]]:
    """The tokenizer and the packed groups, made once and kept in `work`."""
    if not (work / "tokenizer").exists():
        train_tokenizer(read_groups(data), vocabulary).save_pretrained(work / "tokenizer")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    cache, part, rng = work / f"packed-{context}.npz", work / "packed.part.npz", np.random.default_rng(0)
    if not cache.exists():
        arrays = {}
        for group, split in read_groups(data).items():
            train = pack(split["train"], tokenizer, context)
            arrays["|".join([*group, "train"])] = train[rng.permutation(len(train))]
            arrays["|".join([*group, "heldout"])] = pack(split["heldout"], tokenizer, context)
            heldout_bytes = sum(len(text.replace(EOS, "").encode()) for text in split["heldout"])
            arrays["|".join([*group, "bytes"])] = np.array(heldout_bytes)
        np.savez(part, **arrays)
        os.replace(part, cache)
    with np.load(cache, allow_pickle=False) as arrays:
        groups = []
        for name in sorted({name.rsplit("|", 1)[0] for name in arrays.files}):
            labels = dict(zip(("lang", "domain", "source"), name.split("|"), strict=True))
            groups.append(labels | {key: arrays[f"{name}|{key}"] for key in ("train", "heldout", "bytes")})
    return tokenizer, groups


def draw(groups: list[dict], split: str, cursors: torch.Tensor, batch: int, generator: torch.Generator) -> torch.Tensor:
    """(batch, context + 1): (lang, domain) pairs drawn by size**0.5, each group read in order, again when exhausted."""
    pair_sizes: dict[tuple, int] = defaultdict(int)
    for group in groups:
        pair_sizes[group["lang"], group["domain"]] += len(group[split])
    roots = [max(1, pair_sizes[group["lang"], group["domain"]]) ** 0.5 for group in groups]
    weights = torch.tensor([len(group[split]) / root for group, root in zip(groups, roots, strict=True)])
    rows = []
    for g in torch.multinomial(weights, batch, replacement=True, generator=generator).tolist():
        rows.append(groups[g][split][int(cursors[g]) % len(groups[g][split])])
        cursors[g] += 1
    return torch.from_numpy(np.stack(rows).astype(np.int64))


# Model: the parameters are those of OlmoeForCausalLM; the forward pass is written out because the stock one spends most
# of its time, on a CPU, outside large products. Products are bfloat16; weights, router, norms and residual float32.


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
        slices = [t.split(ctx.sizes) for t in (x, grad, grad_x)]
        for w, grad_w, xs, grads, grad_xs in zip(weight, grad_weight, *slices, strict=True):
            torch.mm(grads, w, out=grad_xs)
            torch.mm(grads.T, xs, out=grad_w)
        return grad_x, grad_weight, None


class Dispatch(torch.autograd.Function):
    """Copy tokens (T, H) to expert slots (slots, H). `token` (slots,) is T for an empty slot; `slot` is (T, k)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, token: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        ctx.slot = slot
        return F.pad(x, (0, 0, 0, 1))[token]

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
        return F.pad(grad, (0, 0, 0, 1))[ctx.token], None, None


@torch.compile(dynamic=True)
def gated(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gate, up = h.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * weight[:, None]).bfloat16()


def run_experts(experts: OlmoeExperts, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
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
    """ids (B, L) -> hidden states (B*L, H), and a layer: router probabilities (B*L, E), chosen experts (B*L, k)."""
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
    """Mean loss over tokens with `keep` 1, and losses a token, in chunks: the logits of a batch never exist at once."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, keep: torch.Tensor):
        head, scale, losses = weight.bfloat16(), keep / keep.sum(), []
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for h, t, s, grad_h in zip(*(x.split(512) for x in (hidden, targets, scale, grad_hidden)), strict=True):
            h = h.bfloat16()
            loss, grad = softmax_loss(h @ head.T, t, s)
            losses.append(loss)
            if ctx.needs_input_grad[0]:
                grad_h.copy_(grad @ head)
                grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        losses = torch.cat(losses)
        ctx.mark_non_differentiable(losses)
        return (losses * scale).sum(), losses

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None


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
    copy.to(torch.bfloat16).save_pretrained(part)
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
            p.grad = sum(grads) / len(grads)
        loss, aux, now = (sum(values) / len(results) for values in list(zip(*results, strict=True))[1:])
        load.lerp_(now, 0.05)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        list(pool.map(lambda opt: opt.step(), opts))
        state["step"] += 1
        state["tokens"] += int((rows[:, 1:] != tokenizer.pad_token_id).sum())
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
