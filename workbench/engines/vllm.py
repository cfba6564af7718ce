"""Traces by vLLM, which returns the ids of the experts that a token was routed to: for models that need several GPUs.

    trace("Qwen/Qwen3-30B-A3B", "my-texts.jsonl", "t.duckdb", tensor_parallel=4)

vLLM lives in an environment of its own (`make vllm-env`) and runs in processes of its own: `vllm_processes`. This
one reads and tokenises the corpus as `workbench.capture` does, without loading the model, hands out chunks of texts and
writes the answers as they come: memory stays flat, and a chunk is committed whole.

Recorded are ids only: vLLM returns no weights and no logits. It samples at least one token after a text and has no
routing for the last one it sampled, since the model never reads that; one token more than asked is sampled and left
out, as `workbench.forward` does. So the tokens of a trace are those of the transformers engine, each with its routing.
"""

import json
import os
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Several
from pathlib import Path
from typing import Any

import numpy as np

from workbench import corpus as corpora
from workbench.capture import prepare
from workbench.engines import vllm_answers
from workbench.engines.vllm_processes import Processes, running
from workbench.errors import InputError
from workbench.forward import reads_twice
from workbench.job import n_tokens, progress_bar, token_ids, untold
from workbench.models import Model, outline
from workbench.store import Writer, check_target
from workbench.tokenization import LongTexts, Sequence, batches, token_texts
from workbench.tracefile import Trace

PYTHON = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
"""Where `make vllm-env` puts vLLM."""

CHUNK_TOKENS = 32_768
"""Padded tokens that a process is handed at once: enough to keep vLLM's batches full, little enough for memory."""
AHEAD = 2
"""Chunks that each process has been handed, so that it needn't wait."""

OWN = {
    "model", "tokenizer", "revision", "dtype", "trust_remote_code", "max_model_len", "tensor_parallel_size",
    "data_parallel_size", "skip_tokenizer_init", "enable_return_routed_experts", "disable_log_stats",
}  # fmt: skip
"""Engine arguments that follow from what `trace` is given."""
ROOM = {"gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "max_num_seqs", "max_num_batched_tokens"}
"""Engine arguments that a run may be resumed with other values of: after it ran out of memory."""


def trace(
    model: str | Path,
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
    python: str | Path | None = None,
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    engine_args: Mapping[str, Any] | None = None,
    progress: bool | Callable[[int, int], None] = True,
) -> Trace:
    """Record the ids of the experts of every token of `corpus` into the file `out`; see `workbench.capture.trace`.

    model            "demo", "demo-early", a folder or a Hub id; its configuration says what its routers are
    record           nothing but ids can be; counts_by and recipe are refused
    dtype            "auto" is vLLM's choice: of a float32 checkpoint it makes 16 bits. The run's column `dtype` says
    python           interpreter of an environment with vLLM; default: WORKBENCH_VLLM_PYTHON, else what `make vllm-env`
                     made
    tensor_parallel  GPUs that each layer is split over
    data_parallel    processes that share out the texts, and the experts among them; each has `tensor_parallel` GPUs
    engine_args      further arguments of vLLM's engine, as {"gpu_memory_utilization": 0.8}

    Raises InputError if the request can't be met, RunError if the run breaks off, with what vLLM said; whole sequences
    committed until then stay in the file and `mode="resume"` continues.
    """
    check_target(out, mode)  # before anything slow
    given = dict(engine_args or {})
    interpreter = _interpreter(python)
    if counts_by is not None or recipe is not None:
        raise InputError(
            "vLLM runs the model as it is, and its routing is recorded token by token: leave out counts_by, recipes "
            "and replays, or take --engine hf"
        )
    _check(record, dtype, tensor_parallel, data_parallel, given)
    found = outline(model, revision=revision, trust_remote_code=trust_remote_code)
    places = _places(found)
    job = prepare(
        found, corpus, record=["ids"], run=run, max_tokens=max_tokens, max_length=max_length, long_texts=long_texts,
        batch_tokens=CHUNK_TOKENS, generate=generate, experts="model", engine="vllm", bars=progress is True,
    )  # fmt: skip
    request = _request(found, job.longest, generate, dtype, trust_remote_code, tensor_parallel)
    request["engine"] |= given
    told = progress if callable(progress) else untold
    named: set[int] = set()
    n_done = 0
    with (
        tempfile.TemporaryDirectory(prefix="workbench-vllm-") as folder,
        running(interpreter, Path(folder), data_parallel) as processes,
    ):
        header = _header(job.header, processes.begin(request), given)
        with Writer(out, header, job.layers, mode=mode) as writer, progress_bar(job, progress is True) as bar:
            told(0, job.n_tokens)
            for batch, answer in _answers(processes, job.texts(), writer.finished_sequences):
                if answer is not None:
                    block = vllm_answers.block(batch, answer, found, places, generate)
                    new = token_ids(block) - named
                    writer.add_vocabulary(token_texts(found.tokenizer, sorted(new)))
                    writer.append(block)
                    named.update(new)
                n_done += n_tokens(batch, generate)
                bar.update(n_tokens(batch, generate))
                told(n_done, job.n_tokens)
        processes.end()
    return Trace(out, run=job.header["run"])


def _answers(
    processes: Processes, texts: Iterator[Sequence], done: set[int]
) -> Iterator[tuple[list[Sequence], bytes | None]]:
    """Each chunk of texts with its answer, in order; None for what is done already."""
    pending: deque[tuple[int, list[Sequence]]] = deque()
    for number, batch in enumerate(batches(texts, CHUNK_TOKENS)):
        if done.issuperset(sequence.seq for sequence in batch):
            yield batch, None
            continue
        processes.ask(number, batch)
        pending.append((number, batch))
        if len(pending) > AHEAD * len(processes.started):
            number, batch = pending.popleft()
            yield batch, processes.answer(number)
    for number, batch in pending:
        yield batch, processes.answer(number)


def arguments(texts: Several[str]) -> dict[str, Any]:
    """Engine arguments from NAME=VALUE each, the value as in JSON, else as text. InputError for what isn't."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not name.isidentifier():
            raise InputError(f"--engine-arg {text!r}: expected NAME=VALUE, as in gpu_memory_utilization=0.8")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


# -- what is asked for -------------------------------------------------------------------------------------------------


def _interpreter(python: str | Path | None) -> str:
    asked = python or os.environ.get("WORKBENCH_VLLM_PYTHON")
    found = shutil.which(asked or PYTHON)
    if found is None:
        where = f"{asked}: no such Python interpreter." if asked else f"there is no environment with vLLM at {PYTHON}."
        raise InputError(
            f"{where} `make vllm-env` makes one for CPUs; with GPUs, install vLLM and pyarrow in an environment of "
            "their own and name its interpreter: --vllm-python PATH, or WORKBENCH_VLLM_PYTHON."
        )
    return os.path.abspath(found)


def _check(
    record: Several[str] | None, dtype: str, tensor_parallel: int, data_parallel: int, given: dict[str, Any]
) -> None:
    others = sorted({*(record or ())} - {"ids"})
    if others:
        raise InputError(
            f"vLLM returns the ids of the chosen experts and nothing else: {', '.join(others)} can't be recorded. "
            "Leave out --record, or take --engine hf."
        )
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(
            f"dtype {dtype!r}: vLLM computes in auto, float32, bfloat16 or float16; what it quantises it is told by "
            "--engine-arg quantization=…"
        )
    for name, number in {"--tensor-parallel": tensor_parallel, "--data-parallel": data_parallel}.items():
        if number < 1:
            raise InputError(f"{name} is {number}; expected at least 1.")
    own = sorted(set(given) & OWN)
    if own:
        raise InputError(f"--engine-arg {own[0]}=…: the workbench sets it; use its own options instead.")


def _places(model: Model) -> list[int]:
    """Each router's row in what vLLM returns: the number of the block that it is in, as its name has it."""
    if reads_twice(model):
        raise InputError(f"{model.family} has an encoder; vLLM returns the routing of decoders only. Use --engine hf.")
    found = [re.search(r"\.(\d+)\.", layer.name) for layer in model.layers]
    places = [int(match[1]) for match in found if match is not None]
    if len(set(places)) != len(model.layers):
        raise InputError(f"{model.family} has several routers in a block; vLLM returns one row for each block.")
    return places


def _request(
    model: Model, longest: int, generate: int, dtype: str, trust_remote_code: bool, tensor_parallel: int
) -> dict[str, Any]:
    """What `vllm_worker` is asked first."""
    module: Any = model.module
    ends = module.generation_config.eos_token_id
    return {
        "engine": {
            "model": module.config.name_or_path,
            "revision": model.revision,
            "dtype": dtype,
            "trust_remote_code": trust_remote_code,
            "max_model_len": longest + generate + 1,
            "tensor_parallel_size": tensor_parallel,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        },
        "sampling": {
            "temperature": 0,
            "max_tokens": generate + 1,
            "ignore_eos": True,  # the tokens that end a text are those of the transformers engine
            "stop_token_ids": [] if ends is None else np.atleast_1d(ends).tolist(),
            "repetition_penalty": module.generation_config.repetition_penalty or 1.0,
            "detokenize": False,
        },
        "tied": generate > 0 and bool(getattr(module.config, "tie_word_embeddings", False)),
    }


def _header(header: dict[str, Any], facts: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the table `runs` says, with what only vLLM knows."""
    kept = {name: value for name, value in given.items() if name not in ROOM}
    dtype = str(facts["dtype"]).removeprefix("torch.")
    return header | {
        "dtype": f"{facts['quantization']}:{dtype}" if facts["quantization"] else dtype,
        "corpus": header["corpus"] | ({"engine_args": kept} if kept else {}),
        "versions": header["versions"] | {"vllm": facts["vllm"], "torch of vllm": facts["torch"]},
    }
