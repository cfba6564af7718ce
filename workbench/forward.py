"""One batch of sequences through the model, as the block of a trace: padding removed, in NumPy."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from workbench.errors import RunError
from workbench.models import Model
from workbench.observation import Observation
from workbench.recorder import Recorder
from workbench.routing import Routing
from workbench.schema import PHASES, UNKNOWN_TOKEN
from workbench.store import Block
from workbench.tokenization import Sequence


@dataclass(frozen=True)
class Pass:
    """A batch of B sequences that went through the model, S positions with padding, n tokens without.

    observed   one Observation a layer
    kept       bool (B, S), on the model's device: where a token is
    ids        int64 (B, S)
    phase      uint8 (n,): codes into PHASES, in the order of `kept`
    nll        float32 (n,), None where it wasn't asked for
    predicted  int64 (B, S), None where it wasn't asked for
    generated  tokens that were generated after each sequence
    """

    batch: list[Sequence]
    observed: list[Observation]
    kept: torch.Tensor
    ids: torch.Tensor
    phase: np.ndarray
    nll: np.ndarray | None
    predicted: torch.Tensor | None
    generated: list[int]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, with those that were generated."""
        return [len(sequence.token_ids) + n for sequence, n in zip(self.batch, self.generated, strict=True)]

    def sequences(self) -> list[dict[str, Any]]:
        """The rows of the table `sequences`."""
        if self.kept.sum(1).tolist() != self.lengths:
            raise RunError("the attention mask lost tokens of a sequence")
        return sequence_rows(self.batch, self.lengths)


def sequence_rows(batch: list[Sequence], lengths: list[int]) -> list[dict[str, Any]]:
    """What a `Block` says of a batch, `lengths` being its sequences' tokens with those generated."""
    return [
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


def token_arrays(
    rows: list[dict[str, Any]], token_id: np.ndarray, phase: np.ndarray, nll: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What a `Block` says of the n tokens of the sequences `rows`: ids and phases (n,), nll None where unknown."""
    lengths = [row["n_tokens"] for row in rows]
    return {
        "seq": np.repeat(np.array([row["seq"] for row in rows], dtype=np.int32), lengths),
        "pos": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "token_id": token_id,
        "phase": phase,
        "nll": np.full(sum(lengths), np.nan, np.float32) if nll is None else nll,
    }


def run_batch(
    model: Model, recorder: Recorder, batch: list[Sequence], generate: int = 0, *, predict: bool = False
) -> Block:
    """The batch through the model, as the block of a trace; RunError says at which text it broke off.

    predict  add the model's own predictions to the tokens: `predicted`
    """
    return _block(run_pass(model, recorder, batch, generate, predict=predict))


def run_pass(
    model: Model,
    recorder: Recorder,
    batch: list[Sequence],
    generate: int = 0,
    *,
    predict: bool = False,
    losses: bool = True,
) -> Pass:
    """The batch through the model; RunError says at which text it broke off.

    predict  whether to keep the model's own predictions, losses whether to compute each token's nll
    """
    try:
        if generate:
            ran = _generated(model, recorder, batch, generate, predict, losses)
        else:
            ran = _forward(model, recorder, batch, predict, losses)
        _check(model, ran)
        return ran
    except RunError:
        raise
    except (RuntimeError, MemoryError) as error:
        size = f"{len(batch)} × {max(len(sequence.token_ids) for sequence in batch)} tokens"
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"the model failed on the batch of {size} that begins with text {batch[0].seq}: {why}. If memory ran out, "
            "trace with a smaller --batch-tokens, as a new run"
        ) from error


def _check(model: Model, ran: Pass) -> None:
    """RunError if a router gave a token a weight that is NaN or infinite: then its choice means nothing."""
    broken = torch.stack([seen.broken for seen in ran.observed if seen.broken is not None]) & ran.kept
    if not bool(broken.any()):
        return
    layer, row, column = broken.nonzero()[0].tolist()
    raise RunError(
        f"{model.layers[layer].name} gave a weight that is NaN or infinite, in text {ran.batch[row].seq} at position "
        f"{int(ran.kept[row, :column].sum())}: the model is broken, or {model.dtype} is too narrow for it. Trace with "
        "--dtype float32, or check the checkpoint"
    )


def padded(batch: list[Sequence], pad: int, side: str, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 (B, S), of sequences of different lengths."""
    longest = max(len(sequence.token_ids) for sequence in batch)
    ids = np.full((len(batch), longest), pad, dtype=np.int64)
    mask = np.zeros((len(batch), longest), dtype=np.int64)
    for row, sequence in enumerate(batch):
        n = len(sequence.token_ids)
        where = slice(longest - n, longest) if side == "left" else slice(0, n)
        ids[row, where], mask[row, where] = sequence.token_ids, 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def pad_id(model: Model) -> int:
    tokenizer = model.tokenizer
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def reads_twice(model: Model) -> bool:
    """Whether an encoder reads the text before the decoder does."""
    return bool(getattr(getattr(model.module, "config", None), "is_encoder_decoder", False))


def _forward(model: Model, recorder: Recorder, batch: list[Sequence], predict: bool, losses: bool) -> Pass:
    """One forward pass over whole sequences.

    An encoder–decoder model reads the text in the encoder and again, teacher-forced, in the decoder, so that a
    position means the same token in both stacks. Its nll is unknown: the decoder could copy what the encoder read.
    """
    ids, mask = padded(batch, pad_id(model), "right", model.device)
    decoder = {"decoder_input_ids": ids, "decoder_attention_mask": mask} if reads_twice(model) else {}
    logits = getattr(model.module(input_ids=ids, attention_mask=mask, use_cache=False, **decoder), "logits", None)
    (observed,) = recorder.take()
    kept = mask.bool()
    nll = np.full(int(kept.sum()), np.nan, dtype=np.float32) if losses else None
    if losses and logits is not None and logits.shape[:2] == ids.shape and predicts_next(model) and not decoder:
        nll = next_token_nll(logits, ids)[kept].cpu().numpy()
    predicted = logits.argmax(-1) if predict and logits is not None else None
    phase = np.concatenate([sequence.phase for sequence in batch])
    return Pass(batch, observed, kept, ids, phase, nll, predicted, generated=[0] * len(batch))


def predicts_next(model: Model) -> bool:
    """Whether the logits at a position are about the next token: not in classifiers and diffusion models."""
    return model.family not in ("diffusion_gemma",) and getattr(model.module, "can_generate", lambda: False)()


def next_token_nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float32 (B, S): nats of each token given those before it, NaN for the first. A row at a time saves memory."""
    nll = torch.full(ids.shape, float("nan"), dtype=torch.float32, device=ids.device)
    for row in range(len(ids)):
        nll[row, 1:] = cross_entropy(logits[row, :-1].float(), ids[row, 1:], reduction="none")
    return nll


def _generated(model: Model, recorder: Recorder, batch: list[Sequence], n: int, predict: bool, losses: bool) -> Pass:
    """Greedy generation with the KV cache, recorded step by step.

    Predictions are known from the last token of the prompt on: for those before, the model computes no logits.

    The last sampled token is never fed back, so it has no routing: one token more than asked is generated and dropped.
    A sequence ends before its end-of-text token, which is fed back only if its batch goes on.
    """
    module: Any = model.module
    pad = pad_id(model)
    ids, mask = padded(batch, pad, "left", model.device)
    result = module.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=n + 1,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        return_dict_in_generate=True,
        output_logits=predict or losses,
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
    nll = None
    if losses:
        nll = torch.full(token_ids.shape, float("nan"), dtype=torch.float32, device=ids.device)
        for step in range(steps):
            nll[:, ids.shape[1] + step] = cross_entropy(result.logits[step].float(), new[:, step], reduction="none")
        nll = nll[kept].cpu().numpy()
    predicted = None
    if predict:
        unknown = torch.full((len(batch), ids.shape[1] - 1), UNKNOWN_TOKEN, device=ids.device)
        predicted = torch.cat([unknown, *(logits.argmax(-1, keepdim=True) for logits in result.logits[: steps + 1])], 1)
    lengths = going.sum(1).tolist()
    generated = PHASES.index("generated")
    phase = np.concatenate(
        [np.concatenate([s.phase, np.full(g, generated, np.uint8)]) for s, g in zip(batch, lengths, strict=True)]
    )
    return Pass(batch, observed, kept, token_ids, phase, nll, predicted, generated=lengths)


def _joined(steps: list[Observation]) -> Observation:
    """The forward passes of one generation as one observation: (B, S + steps, …)."""
    fields = {
        name: torch.cat([getattr(step, name) for step in steps], dim=1)
        for name in Observation.__dataclass_fields__
        if getattr(steps[0], name) is not None
    }
    return Observation(**fields)


def _block(ran: Pass) -> Block:
    """Padding removed, as NumPy, with metadata."""
    rows, kept = ran.sequences(), ran.kept
    places = None if bool(kept.all()) else kept.flatten().nonzero().squeeze(1)
    tokens = token_arrays(rows, _rows(ran.ids, places).to(torch.int32).cpu().numpy(), ran.phase, ran.nll)
    if ran.predicted is not None:
        tokens["predicted"] = _rows(ran.predicted, places).to(torch.int32).cpu().numpy()
    return Block(
        sequences=rows,
        tokens=tokens,
        routing=[routing(layer, places) for layer in ran.observed],
        profiles=None if ran.observed[0].probabilities is None else [_profile(layer, kept) for layer in ran.observed],
    )


def routing(observed: Observation, places: torch.Tensor | None) -> Routing:
    """A layer's routing in NumPy, of the tokens at `places` of the flattened batch; None stands for all of them."""

    def rows(values: torch.Tensor | None) -> np.ndarray | None:
        return None if values is None else _rows(values, places).float().cpu().numpy()

    return Routing(
        experts=_ids(observed.experts, places),
        weights=rows(observed.weights),
        entropy=rows(observed.entropy),
        margin=rows(observed.margin),
        logits=rows(observed.logits),
        norms=rows(observed.norms),
        shift=rows(observed.shift),
        lookahead=None if observed.lookahead is None else _ids(observed.lookahead, places),
    )


def _ids(ids: torch.Tensor, places: torch.Tensor | None) -> np.ndarray:
    return _rows(ids, places).cpu().numpy().astype(np.uint16)  # -1 wraps to NO_EXPERT


def _rows(values: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    """(B, S, …) as (n, …): the tokens at `places` of the flattened batch; None stands for all of them, uncopied."""
    values = values.flatten(0, 1)
    return values if places is None else values.index_select(0, places)


def _profile(observed: Observation, kept: torch.Tensor) -> np.ndarray:
    """float32 (B, E): mean router probabilities over each sequence's own tokens."""
    assert observed.probabilities is not None
    weight = kept.float() / kept.sum(1, keepdim=True)
    return torch.einsum("bse,bs->be", observed.probabilities.float(), weight).cpu().numpy()
