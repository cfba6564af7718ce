"""The part of the vLLM engine that runs in vLLM's own environment: token ids in, ids of experts out.

`python vllm_worker.py FOLDER RANK`, with nothing of the workbench imported. What is asked comes as JSON, a line each,
on standard input:

1. {"engine": arguments of vllm.LLM, "sampling": arguments of vllm.SamplingParams, "tied": whether the output layer has
   to be the embedding}. The answer is FOLDER/RANK.ready: {"vllm", "torch", "dtype", "quantization"}, or
   {"refused": why}, and then the process ends.
2. A number, as often as wanted: FOLDER/NUMBER.asked, an Arrow file, has the token ids of texts in its column
   `token_ids`. The answer is FOLDER/NUMBER.answer, an Arrow file with a row a text: `sampled`, the sampled token ids;
   `shape`, of the array of ids of experts (tokens with routing, layers, k); `experts`, that array in C order.
3. null, when no more is wanted: the process ends. If standard input ends without it, whoever asked has died: the
   process removes the folder and kills its process group, whatever vLLM has started in it.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# ("vllm" is vLLM's: in this folder, where the file isn't run, there is another file of that name)

import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from queue import Queue


def main(folder: Path, rank: str) -> None:
    asked: Queue = Queue()
    threading.Thread(target=listen, args=(folder, asked), daemon=True).start()
    request = asked.get()
    ready = folder / f"{rank}.ready"
    why = refused(request["engine"])
    if why is not None:
        write(ready, json.dumps({"refused": why}).encode())
        return
    import vllm
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        request["engine"].setdefault("enforce_eager", True)  # compiling for a CPU takes longer than it saves
    if request["tied"]:
        request["engine"]["worker_extension_cls"] = f"{Path(__file__).stem}.Tied"
    llm = vllm.LLM(enable_return_routed_experts=True, **request["engine"])
    if request["tied"] and not all(llm.collective_rpc("tied")):
        why = "has a vLLM that gives this model an output layer without weights, so that it can't generate: trace "
        write(ready, json.dumps({"refused": why + "without --generate, or take --engine hf"}).encode())
        return
    sampling = vllm.SamplingParams(**request["sampling"])
    config = llm.llm_engine.model_config
    facts = {"vllm": vllm.__version__, "torch": version("torch"), "dtype": str(config.dtype)}
    write(ready, json.dumps({**facts, "quantization": config.quantization}).encode())
    finished = threading.Event()
    threading.Thread(target=watch, args=(finished,), daemon=True).start()
    while (number := asked.get()) is not None:
        answer(llm, sampling, folder, number)
    finished.set()


def listen(folder: Path, asked: Queue) -> None:
    """Hand on what is asked."""
    for line in sys.stdin:
        asked.put(json.loads(line))
        if line.strip() == "null":
            return
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(os.getpgrp(), signal.SIGKILL)


def watch(finished: threading.Event) -> None:
    """End this process if one that vLLM has started dies: vLLM itself can wait for it for ever."""
    children = [child.sentinel for child in multiprocessing.active_children()]
    if not children:
        return
    multiprocessing.connection.wait(children)
    time.sleep(2)  # vLLM may want to say why
    if not finished.is_set():
        print("ChildProcessError: a process that vLLM had started died", flush=True)
        os._exit(1)


def refused(engine: dict) -> "str | None":
    """Why this environment can't do it."""
    missing = [name for name in ("vllm", "pyarrow") if find_spec(name) is None]
    if missing:
        return f"has no {' and no '.join(missing)}: install it there, as in `make vllm-env`"
    from vllm.engine.arg_utils import EngineArgs

    known = {field.name for field in dataclasses.fields(EngineArgs)}
    if "enable_return_routed_experts" not in known:
        return "has a vLLM that doesn't know enable_return_routed_experts: install a newer one"
    unknown = sorted(set(engine) - known)
    if unknown:
        return f"has a vLLM that knows no engine argument {unknown[0]}: look it up in that version's documentation"
    return None


class Tied:
    """What vLLM's workers can be asked besides: some of its models never tie their output layer to the embedding."""

    def tied(self) -> bool:
        modules = list(self.model_runner.get_model().named_modules())
        heads = [module.weight for name, module in modules if name.endswith("lm_head")]
        embeddings = [module.weight for name, module in modules if name.endswith("embed_tokens")]
        if not heads or not embeddings:
            return True  # by other names, or on another worker
        return heads[0].shape != embeddings[0].shape or bool((heads[0] == embeddings[0]).all())


def answer(llm, sampling, folder: Path, number: int) -> None:
    import numpy as np
    import pyarrow as pa

    with pa.OSFile(str(folder / f"{number}.asked")) as file:
        texts = pa.ipc.open_file(file).read_all()["token_ids"].to_pylist()
    prompts = [{"prompt_token_ids": token_ids} for token_ids in texts]
    outputs = [output.outputs[0] for output in llm.generate(prompts, sampling, use_tqdm=False)]
    arrays = [np.asarray(output.routed_experts) for output in outputs]
    ends = np.cumsum([0, *(array.size for array in arrays)])
    table = pa.table(
        {
            "sampled": pa.array([list(output.token_ids) for output in outputs], pa.list_(pa.int32())),
            "shape": pa.array([list(array.shape) for array in arrays], pa.list_(pa.int32())),
            "experts": pa.LargeListArray.from_arrays(ends, np.concatenate([array.reshape(-1) for array in arrays])),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    write(folder / f"{number}.answer", sink.getvalue())


def write(path: Path, content) -> None:
    """A whole file or none."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


if __name__ == "__main__":  # vLLM's own processes import this file again
    main(Path(sys.argv[1]), sys.argv[2])
