"""Run a model over corpora and record its routing: model + corpus -> Trace.

The forward pass runs on the main thread, the file is written on another. Batches are planned from the lengths of the
sequences alone and a batch is committed whole, so a resumed run repeats exactly the batches that are missing.
"""

import platform
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Several
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from workbench import corpus as corpora
from workbench.errors import InputError, RunError
from workbench.models import Model, load
from workbench.recorder import Observation, Recorder
from workbench.routing import Routing
from workbench.schema import PHASES, RECORDABLE
from workbench.store import Block, Writer, check_target
from workbench.tokenization import LongTexts, Sequence, batches, sequences, survey
from workbench.tracefile import Trace


def trace(
    model: Model | str,
    corpus: str | Path | corpora.Corpus | Several[str | Path | corpora.Corpus],
    out: str | Path,
    *,
    record: Iterable[str] = ("ids", "weights"),
    run: str | None = None,
    mode: str = "new",
    max_tokens: int | None = None,
    max_length: int | None = None,
    long_texts: LongTexts = "refuse",
    batch_tokens: int = 4096,
    generate: int = 0,
    progress: bool = True,
) -> Trace:
    """Record the routing of every token of `corpus` under `model` into the file `out`.

    model         what `workbench.load` returns, or a name for it
    corpus        bundled names, paths or `workbench.corpus.read(…)` results; several are traced one after the other
    record        any of `workbench.schema.RECORDABLE`; ids are always recorded, and profiles are each sequence's mean
                  router probabilities
    run           name of the run inside the file; by default the model's and the corpora's
    mode          "new" (refuse an existing file), "overwrite", "append" (one more run) or "resume" (finish a run)
    max_tokens    stop after the sequence that reaches this many tokens
    max_length    longest sequence in tokens; by default what the model allows
    long_texts    "refuse", "split" into consecutive sequences, or "cut" what exceeds max_length
    batch_tokens  padded tokens a forward pass, at most (a longer single sequence still gets a batch of its own)
    generate      greedy tokens to generate after each sequence, routed and recorded as phase "generated"

    Raises InputError before anything is written if the request can't be met, RunError if the run breaks off; whole
    sequences committed until then stay in the file and `mode="resume"` continues.
    """
    check_target(out, mode)  # before anything slow
    record = _recordable(record)
    sources = _read(corpus)
    model = model if isinstance(model, Model) else load(model)
    _check(model, max_tokens, batch_tokens, generate)
    limit = _max_length(model, max_length, generate)

    def texts() -> Iterator[Sequence]:
        found = sequences(
            sources, model.tokenizer, max_length=limit, long_texts=long_texts, generation_prompt=generate > 0
        )
        found = _embeddable(found, model)
        return found if max_tokens is None else _until(found, max_tokens)

    plan = survey(tqdm(texts(), desc="reading", unit=" texts", disable=None if progress else True, leave=False))
    names = [source.name for source in sources]
    run = run or f"{Path(model.name).name}.{'+'.join(Path(name).name for name in names)}"
    request = {
        "names": names,
        "fingerprint": plan.fingerprint,
        "sequences": plan.n_sequences,
        "tokens": plan.n_tokens,
        "max_length": limit,
        "long_texts": long_texts,
        "batch_tokens": batch_tokens,
        "generate": generate,
    }
    with Writer(out, header(model, run, record, request), layer_rows(model), mode=mode) as writer:
        done = writer.finished_sequences
        bar = tqdm(
            total=plan.n_tokens + generate * plan.n_sequences,
            desc=f"tracing {Path(model.name).name}",
            unit=" tokens",
            unit_scale=True,
            disable=None if progress else True,
        )
        with bar, Recorder(model, _observed(record)) as recorder, torch.inference_mode():
            named: set[int] = set()
            for batch in batches(texts(), batch_tokens):
                if not done.issuperset(sequence.seq for sequence in batch):
                    block = run_batch(model, recorder, batch, generate)
                    new = set(np.unique(block.tokens["token_id"]).tolist()) - named
                    writer.add_vocabulary(_texts_of(model.tokenizer, sorted(new)))
                    writer.append(block)
                    named |= new
                bar.update(sum(len(sequence.token_ids) + generate for sequence in batch))
    return Trace(out, run=run)


def header(model: Model, run: str, record: list[str], request: dict) -> dict:
    """What the table `runs` says of a run; `request` is the column `corpus`."""
    return {
        "run": run,
        "model": model.name,
        "revision": model.revision,
        "family": model.family,
        "engine": "hf",
        "dtype": model.dtype,
        "recipe": None,
        "recorded": record,
        "corpus": request,
        "versions": _versions(),
    }


def layer_rows(model: Model) -> list[dict]:
    """The table `layers`: one row a router, in the order of execution."""
    names = ("name", "n_experts", "top_k", "n_shared", "gating", "stack")
    return [{"layer": layer.index} | {name: getattr(layer, name) for name in names} for layer in model.layers]


def _recordable(record: Iterable[str]) -> list[str]:
    asked = {record} if isinstance(record, str) else set(record)
    unknown = asked - set(RECORDABLE)
    if unknown:
        raise InputError(f"can't record {', '.join(sorted(unknown))}: choose from {', '.join(RECORDABLE)}")
    return [name for name in RECORDABLE if name in asked or name == "ids"]


def _observed(record: Several[str]) -> set[str]:
    """What the recorder has to keep so that `record` can be written."""
    return {"probabilities" if name == "profiles" else name for name in record} - {"ids"}


def _check(model: Model, max_tokens: int | None, batch_tokens: int, generate: int) -> None:
    if model.tokenizer is None:
        raise InputError(f"model {model.name} has no tokenizer: load it with `workbench.load(…, tokenizer=…)`")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}: give at least 1, or leave it out to trace the whole corpus")
    if batch_tokens < 1:
        raise InputError(f"batch_tokens is {batch_tokens}: a forward pass needs at least 1 token")
    if generate < 0:
        raise InputError(f"generate is {generate}: give the number of tokens to generate, 0 for none")
    if generate and (_reads_twice(model) or not _predicts_next(model)):
        raise InputError(f"{model.family} can't continue a text: trace it without --generate")


def _max_length(model: Model, max_length: int | None, generate: int) -> int:
    """Longest sequence that still leaves room to generate."""
    longest = model.max_length
    if max_length is not None and max_length < 1:
        raise InputError(f"max_length is {max_length}: a sequence has at least 1 token")
    if longest is None:
        if max_length is None:
            raise InputError(f"model {model.name} states no longest sequence: give --max-length")
        return max_length
    if max_length is not None and max_length + generate > longest:
        raise InputError(
            f"max_length {max_length} and {generate} generated tokens exceed the {longest} positions of {model.name}"
        )
    if generate >= longest:
        raise InputError(f"generate is {generate}: {model.name} has {longest} positions in all")
    return max_length or longest - generate


def _read(corpus: str | Path | corpora.Corpus | Several[str | Path | corpora.Corpus]) -> list[corpora.Corpus]:
    several = [corpus] if isinstance(corpus, str | Path | corpora.Corpus) else list(corpus)
    if not several:
        raise InputError("no corpus: name at least one, such as `udhr` or a path")
    return [one if isinstance(one, corpora.Corpus) else corpora.read(one) for one in several]


def _embeddable(found: Iterable[Sequence], model: Model) -> Iterator[Sequence]:
    """The same sequences; InputError for a token id that the model has no embedding for."""
    n = model.module.get_input_embeddings().num_embeddings  # type: ignore[operator]
    for sequence in found:
        if sequence.token_ids.max() >= n:
            raise InputError(
                f"text {sequence.seq} has token id {sequence.token_ids.max()}, but {model.name} knows {n} tokens: "
                "load it with the tokenizer it was trained with"
            )
        yield sequence


def _until(found: Iterable[Sequence], max_tokens: int) -> Iterator[Sequence]:
    """Whole sequences until together they have `max_tokens` tokens."""
    total = 0
    for sequence in found:
        if total >= max_tokens:
            return
        total += len(sequence.token_ids)
        yield sequence


def _versions() -> dict[str, str]:
    packages = ("moe-workbench", "torch", "transformers", "duckdb")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _texts_of(tokenizer, token_ids: list[int]) -> dict[int, str]:
    """The text of each token id, special tokens included.

    A byte of a longer character decodes to U+FFFD; its vocabulary entry (`Ã`, `<0xE2>`) tells more, so that is kept.
    """
    decoded = [tokenizer.decode([token_id], clean_up_tokenization_spaces=False) for token_id in token_ids]
    entries = tokenizer.convert_ids_to_tokens(token_ids)
    return {
        token_id: (entry or "") if "\ufffd" in text else text
        for token_id, text, entry in zip(token_ids, decoded, entries, strict=True)
    }


def _padded(batch: list[Sequence], pad: int, side: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 (B, S), of sequences of different lengths."""
    longest = max(len(sequence.token_ids) for sequence in batch)
    ids = np.full((len(batch), longest), pad, dtype=np.int64)
    mask = np.zeros((len(batch), longest), dtype=np.int64)
    for row, sequence in enumerate(batch):
        n = len(sequence.token_ids)
        where = slice(longest - n, longest) if side == "left" else slice(0, n)
        ids[row, where], mask[row, where] = sequence.token_ids, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _pad_id(model: Model) -> int:
    tokenizer = model.tokenizer
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _reads_twice(model: Model) -> bool:
    return bool(getattr(getattr(model.module, "config", None), "is_encoder_decoder", False))


def run_batch(model: Model, recorder: Recorder, batch: list[Sequence], generate: int = 0) -> Block:
    """The batch through the model; RunError says at which text it broke off."""
    try:
        return _generated(model, recorder, batch, generate) if generate else _forward(model, recorder, batch)
    except RunError:
        raise
    except (RuntimeError, MemoryError) as error:
        size = f"{len(batch)} × {max(len(sequence.token_ids) for sequence in batch)} tokens"
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"the model failed on the batch of {size} that begins with text {batch[0].seq}: {why}. If memory ran out, "
            "trace with a smaller --batch-tokens"
        ) from error


def _forward(model: Model, recorder: Recorder, batch: list[Sequence]) -> Block:
    """One forward pass over whole sequences.

    An encoder–decoder model reads the text in the encoder and again, teacher-forced, in the decoder, so that a
    position means the same token in both stacks.
    """
    ids, mask = _padded(batch, _pad_id(model), "right", model.device)
    decoder = {"decoder_input_ids": ids, "decoder_attention_mask": mask} if _reads_twice(model) else {}
    logits = getattr(model.module(input_ids=ids, attention_mask=mask, use_cache=False, **decoder), "logits", None)
    (observed,) = recorder.take()
    kept = mask.bool()
    nll = np.full(int(kept.sum()), np.nan, dtype=np.float32)
    if logits is not None and logits.shape[:2] == ids.shape and _predicts_next(model):
        nll = next_token_nll(logits, ids)[kept].cpu().numpy()
    phase = np.concatenate([sequence.phase for sequence in batch])
    return _block(batch, observed, kept, ids, phase, nll, generated=[0] * len(batch))


def _predicts_next(model: Model) -> bool:
    """Whether the logits at a position are about the next token: not in classifiers and diffusion models."""
    return model.family not in ("diffusion_gemma",) and getattr(model.module, "can_generate", lambda: False)()


def next_token_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float32 (B, S): nats of each token given those before it, NaN for the first. A row at a time saves memory."""
    nll = torch.full(ids.shape, float("nan"), dtype=torch.float32, device=ids.device)
    for row in range(len(ids)):
        nll[row, 1:] = cross_entropy(logits[row, :-1].float(), ids[row, 1:], reduction="none")
    return nll


def _generated(model: Model, recorder: Recorder, batch: list[Sequence], n: int) -> Block:
    """Greedy generation with the KV cache, recorded step by step.

    The last sampled token is never fed back, so it has no routing: one token more than asked is generated and dropped.
    A sequence ends before its end-of-text token, which is fed back only if its batch goes on.
    """
    module: Any = model.module
    pad = _pad_id(model)
    ids, mask = _padded(batch, pad, "left", model.device)
    result = module.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=n + 1,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=True,
    )
    forwards = recorder.take()
    observed = [_joined([forward[layer] for forward in forwards]) for layer in range(len(model.layers))]
    steps = len(forwards) - 1  # fewer than n when every sequence ended
    new = result.sequences[:, ids.shape[1] : ids.shape[1] + steps]
    end = module.generation_config.eos_token_id
    ends = torch.isin(new, torch.as_tensor([] if end is None else end, device=new.device))
    going = ends.cumsum(1) == 0
    kept = torch.cat([mask.bool(), going], dim=1)
    token_ids = torch.cat([ids, new], dim=1)
    nll = torch.full(token_ids.shape, float("nan"), dtype=torch.float32, device=ids.device)
    for step in range(steps):
        nll[:, ids.shape[1] + step] = cross_entropy(result.logits[step].float(), new[:, step], reduction="none")
    lengths = going.sum(1).tolist()
    generated = PHASES.index("generated")
    phase = np.concatenate(
        [np.concatenate([s.phase, np.full(g, generated, np.uint8)]) for s, g in zip(batch, lengths, strict=True)]
    )
    return _block(batch, observed, kept, token_ids, phase, nll[kept].cpu().numpy(), generated=lengths)


def _joined(steps: list[Observation]) -> Observation:
    """The forward passes of one generation as one observation: (B, S + steps, …)."""
    fields = {
        name: torch.cat([getattr(step, name) for step in steps], dim=1)
        for name in Observation.__dataclass_fields__
        if getattr(steps[0], name) is not None
    }
    return Observation(**fields)


def _block(
    batch: list[Sequence],
    observed: list[Observation],
    kept: torch.Tensor,
    ids: torch.Tensor,
    phase: np.ndarray,
    nll: np.ndarray,
    generated: list[int],
) -> Block:
    """Padding removed, as NumPy, with metadata. kept is bool (B, S); nll and phase are of its n tokens."""
    lengths = kept.sum(1).tolist()
    rows = [
        {
            "seq": sequence.seq,
            "sha256": sequence.sha256,
            "n_prompt": len(sequence.token_ids),
            "n_tokens": n,
            "lang": sequence.lang,
            "domain": sequence.domain,
            "source": sequence.source,
            "segment_id": sequence.segment_id,
            "metadata": sequence.metadata,
        }
        for sequence, n in zip(batch, lengths, strict=True)
    ]
    if any(n != len(s.token_ids) + g for s, n, g in zip(batch, lengths, generated, strict=True)):
        raise RunError("the attention mask lost tokens of a sequence")
    places = None if bool(kept.all()) else kept.flatten().nonzero().squeeze(1)
    tokens = {
        "seq": np.repeat(np.array([s.seq for s in batch], dtype=np.int32), lengths),
        "pos": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "token_id": _rows(ids, places).to(torch.int32).cpu().numpy(),
        "phase": phase,
        "nll": nll,
    }
    return Block(
        sequences=rows,
        tokens=tokens,
        routing=[_routing(layer, places) for layer in observed],
        profiles=None if observed[0].probabilities is None else [_profile(layer, kept) for layer in observed],
    )


def _routing(observed: Observation, places: torch.Tensor | None) -> Routing:
    def rows(values: torch.Tensor | None) -> np.ndarray | None:
        return None if values is None else _rows(values, places).float().cpu().numpy()

    return Routing(
        experts=_rows(observed.experts, places).cpu().numpy().astype(np.uint16),  # -1 wraps to NO_EXPERT
        weights=rows(observed.weights),
        entropy=rows(observed.entropy),
        margin=rows(observed.margin),
        logits=rows(observed.logits),
        norms=rows(observed.norms),
    )


def _rows(values: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """(B, S, …) as (n, …): the tokens at `places` of the flattened batch; None stands for all of them, uncopied."""
    values = values.flatten(0, 1)
    return values if places is None else values.index_select(0, places)


def _profile(observed: Observation, kept: torch.Tensor) -> np.ndarray:
    """float32 (B, E): mean router probabilities over each sequence's own tokens."""
    assert observed.probabilities is not None
    weight = kept.float() / kept.sum(1, keepdim=True)
    return torch.einsum("bse,bs->be", observed.probabilities.float(), weight).cpu().numpy()
