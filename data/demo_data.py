"""What the demonstration model is trained on: tokenizer, packed contexts, and the order they are drawn in."""

import hashlib
import json
import lzma
import math
import os
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

EOS, PAD, ROLES = "<|endoftext|>", "<|padding|>", ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


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
