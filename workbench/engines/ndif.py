"""Traces of a few texts by NDIF, which runs large models of the Hub for others: through nnsight's `remote=True`.

    trace("Qwen/Qwen3-30B-A3B", corpus.from_rows([{"text": "All human beings are born free."}], "mine"), "t.duckdb")

For spot checks on a model that fits nowhere here. One request a text, one forward pass: ids and weights as the experts
consumed them, and each token's nll. NDIF shares its machines among all who ask, so that a corpus is refused.

Needs an API key (NDIF_API_KEY), a network, and a model that NDIF is running. The model's modules are made here without
weights, to find its routers.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence as Several
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workbench import corpus as corpora
from workbench.capture import prepare
from workbench.errors import InputError, RunError
from workbench.forward import predicts_next, reads_twice, sequence_rows, token_arrays
from workbench.job import progress_bar, token_ids
from workbench.models import Model, load, outline
from workbench.remote import check_key, check_on_hub, check_revision, expert_paths, wrapped
from workbench.routing import Routing
from workbench.store import Block, Writer, check_target
from workbench.tokenization import LongTexts, Sequence, token_texts
from workbench.tracefile import Trace

MOST_TEXTS = 16


def trace(
    model: Model | str | Path,
    corpus: str | Path | corpora.Corpus | Several[str | Path | corpora.Corpus],
    out: str | Path,
    *,
    record: Several[str] | None = None,
    counts_by: Several[str] | None = None,
    recipe: Any = None,
    run: str | None = None,
    mode: str = "new",
    max_tokens: int | None = None,
    max_length: int | None = None,
    long_texts: LongTexts = "refuse",
    generate: int = 0,
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    remote: bool | str = True,
    progress: bool = True,
) -> Trace:
    """Record the routing of at most MOST_TEXTS texts into the file `out`; see `workbench.capture.trace`.

    record  of ids and weights; counts_by, recipe, generate, a dtype and a revision are refused: NDIF runs the model as
            it has it
    remote  handed to nnsight: True runs on NDIF, "local" here but by way of what would be sent there, False here

    InputError if the request can't be met, there is no key, no network, or NDIF isn't running the model; RunError if a
    request fails. What was written until then stays, and `mode="resume"` continues.
    """
    check_target(out, mode)
    elsewhere = remote not in (False, "local")
    others = sorted({*(record or ())} - {"ids", "weights"})
    asked = {"counts_by": counts_by, "recipe": recipe, "generate": generate or None, **dict.fromkeys(others, 1)}
    if unmet := [name for name, value in asked.items() if value is not None]:
        raise InputError(f"NDIF gives the ids and weights of a text as it is: leave out {', '.join(unmet)}.")
    if elsewhere and dtype != "auto":
        raise InputError(f"dtype {dtype!r}: NDIF runs a model in the dtype that it has it in. Leave out --dtype.")
    if elsewhere:
        check_revision(revision)
    try:
        import nnsight  # noqa: F401
    except ImportError:
        raise InputError("NDIF is reached through the package nnsight: pip install 'moe-workbench[causal]'.") from None
    if elsewhere:
        check_key()
        _check_running(model.name if isinstance(model, Model) else str(model))
    if not isinstance(model, Model):
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = outline(model, **options) if elsewhere else load(model, dtype=dtype, **options)
    if elsewhere:
        check_on_hub(model)
    if model.layers[0].family.layout != "standard" or reads_twice(model) or not predicts_next(model):
        raise InputError(f"{model.family}: NDIF can trace decoders whose experts are given ids and weights.")
    job = prepare(
        model, corpus, record=record or ("ids", "weights"), run=run, max_tokens=max_tokens, max_length=max_length,
        long_texts=long_texts, experts="model", engine="ndif", bars=progress,
    )  # fmt: skip
    n_texts = job.header["corpus"]["sequences"]
    if n_texts > MOST_TEXTS:
        raise InputError(
            f"the corpus has {n_texts:,} texts; expected at most {MOST_TEXTS}, since each is a request to machines "
            "that many share. Choose some, as with --max-tokens, or use --engine vllm on machines of your own."
        )
    header = job.header | ({"revision": None} if elsewhere else {})  # NDIF's is not told
    traced, paths = wrapped(model), expert_paths(model)
    with Writer(out, header, job.layers, mode=mode) as writer, progress_bar(job, progress) as bar:
        for sequence in job.texts():
            if sequence.seq not in writer.finished_sequences:
                block = _block(traced, paths, sequence, remote)
                writer.add_vocabulary(token_texts(model.tokenizer, sorted(token_ids(block))))
                writer.append(block)
            bar.update(len(sequence.token_ids))
    return Trace(out, run=job.header["run"])


def _check_running(name: str) -> None:
    """InputError if NDIF can't be reached, or isn't running the model."""
    import nnsight

    with contextlib.redirect_stderr(io.StringIO()):  # it says there that NDIF is down
        found: Any = nnsight.status(raw=True)
    if not found:
        raise InputError("NDIF can't be reached: is there a network? Try again later, or use --engine hf.")
    running = {one.get("repo_id") for one in found.get("deployments", {}).values()}
    if name not in running:
        raise InputError(
            f"NDIF isn't running {name!r}; of the Hub it runs {', '.join(sorted(map(str, running))) or 'nothing'}."
        )


def _block(traced: Any, paths: list[str], sequence: Sequence, remote: bool | str) -> Block:
    """One text through the model. RunError says what nnsight says."""
    import nnsight

    ids = torch.from_numpy(sequence.token_ids.astype(np.int64))[None]
    try:
        with torch.inference_mode(), traced.trace(input_ids=ids, use_cache=False, remote=remote):
            seen = []
            for path in paths:
                args, kwargs = traced.get(path).inputs
                seen.append((*args, *kwargs.values())[1:3])
            logits = traced.output.logits[0]
            nll = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[0, 1:].to(logits.device), reduction="none")
            found = nnsight.save((seen, nll))
        seen, nll = found
    except Exception as error:  # whatever it is that happens elsewhere
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"text {sequence.seq} failed: {why}. Try again later, with --resume.") from error
    n = len(sequence.token_ids)
    rows = sequence_rows([sequence], [n])
    known = np.append(np.float32(np.nan), nll.cpu().numpy())
    return Block(
        sequences=rows,
        tokens=token_arrays(rows, sequence.token_ids, sequence.phase, known),
        routing=[
            Routing(
                experts=experts.reshape(n, -1).cpu().numpy().astype(np.uint16),
                weights=weights.reshape(n, -1).float().cpu().numpy(),
            )
            for experts, weights in seen
        ],
    )
