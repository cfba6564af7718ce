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
import sys
import time
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
