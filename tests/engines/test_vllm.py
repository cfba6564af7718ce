"""Traces by vLLM: the real one where `make vllm-env` has been run, and one that a test writes, which answers at once.

The double is a package `vllm` on the other process's path, with the parts of it that `vllm_worker` uses. It answers
with ids that follow from the token (`chosen`), so that a test knows what a trace has to hold.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import process
import psutil
import pyarrow as pa
import pytest
from commandline import Command, refused

from workbench.analysis.agreement import agreement
from workbench.capture import trace as by_transformers
from workbench.engines import vllm, vllm_answers, vllm_processes
from workbench.errors import InputError, RunError
from workbench.models import load, outline
from workbench.tokenization import Sequence
from workbench.tracefile import Trace

SMALL = {"max_length": 256, "long_texts": "split", "progress": False}

FAKE = """
import json, os, signal, sys, time
from pathlib import Path
import numpy as np
HERE = Path(__file__).parent
HOW = json.loads((HERE / "how.json").read_text())
__version__ = "0.30.0"
class SamplingParams:
    def __init__(self, **said):
        vars(self).update(said)
class Output:
    pass
class LLM:
    def __init__(self, enable_return_routed_experts, model, max_model_len, **said):
        assert enable_return_routed_experts is True
        if HOW.get("loading"):
            exec(HOW["loading"])
        (HERE / ("asked" + os.environ.get("VLLM_DP_RANK", "") + ".json")).write_text(json.dumps(
            {"model": model, "max_model_len": max_model_len, **said}))
        config = json.loads((Path(model) / "config.json").read_text())
        self.shape = config["num_hidden_layers"], config["num_experts_per_tok"]
        self.n_experts, self.longest, self.calls = config["num_experts"], max_model_len, 0
        self.llm_engine = Output()
        self.llm_engine.model_config = Output()
        self.llm_engine.model_config.dtype = "torch.bfloat16" if said["dtype"] == "auto" else "torch." + said["dtype"]
        self.llm_engine.model_config.quantization = said.get("quantization")
    def collective_rpc(self, method):
        assert method == "tied"
        return [HOW.get("tied", True)]
    def generate(self, prompts, sampling, use_tqdm):
        self.calls += 1
        outputs = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            assert len(ids) + sampling.max_tokens <= self.longest
            sampled = []
            while len(sampled) < sampling.max_tokens and not set(sampled) & set(sampling.stop_token_ids):
                sampled.append((sum(ids) + 7 * len(sampled)) % 40)
            read = np.array([*ids, *sampled[:-1]])
            layers, k = self.shape
            experts = (read[:, None, None] + np.arange(layers)[:, None] + 2 * np.arange(k)) % self.n_experts
            answer = Output()
            answer.token_ids, answer.routed_experts = sampled, experts.astype(np.uint8)
            exec(HOW.get("answering", ""))
            wrapped = Output()
            wrapped.outputs = [answer]
            outputs.append(wrapped)
        return outputs
"""


def chosen(token_ids: np.ndarray, layer: int, k: int, n_experts: int) -> np.ndarray:
    """What the double answers: (n,) -> (n, k)."""
    return (token_ids[:, None] + layer + 2 * np.arange(k)) % n_experts


class Double:
    """The package that stands for vLLM. `behave` writes Python that it runs in the other process."""

    def __init__(self, folder: Path):
        self.folder = folder / "vllm"
        (self.folder / "engine").mkdir(parents=True)
        (self.folder / "platforms").mkdir()
        (self.folder / "__init__.py").write_text(FAKE)
        (self.folder / "engine" / "__init__.py").write_text("")
        (self.folder / "platforms" / "__init__.py").write_text(
            "class current_platform:\n    is_cpu = staticmethod(lambda: True)\n"
        )
        self.knows(*vllm.OWN, *vllm.ROOM, "quantization", "enforce_eager", "seed")
        self.behave()

    def knows(self, *names: str) -> None:
        fields = "".join(f"    {name}: int = 0\n" for name in dict.fromkeys(names))
        (self.folder / "engine" / "arg_utils.py").write_text(
            f"from dataclasses import dataclass\n@dataclass\nclass EngineArgs:\n{fields}"
        )

    def behave(self, loading: str = "", answering: str = "", tied: bool = True) -> None:
        how = {"loading": loading, "answering": answering, "tied": tied}
        (self.folder / "how.json").write_text(json.dumps(how))

    def asked(self, rank: str = "") -> dict[str, Any]:
        return json.loads((self.folder / f"asked{rank}.json").read_text())


@pytest.fixture
def double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Double:
    made = Double(tmp_path / "elsewhere")
    monkeypatch.setenv("PYTHONPATH", str(made.folder.parent))
    monkeypatch.setenv("WORKBENCH_VLLM_PYTHON", sys.executable)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoint.folder(tmp_path / "model")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return checkpoint.corpus(tmp_path / "texts.jsonl")


def left(folder: Path) -> list[str]:
    """What the engine left among temporary files."""
    return [path.name for path in folder.iterdir() if path.name.startswith("workbench-vllm-")]


# -- what a trace holds ------------------------------------------------------------------------------------------------


def test_texts_and_tokens_are_those_of_the_transformers_engine(
    double: Double, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "CHUNK_TOKENS", 200)
    made = vllm.trace(model, corpus, tmp_path / "t.duckdb", dtype="float32", **SMALL)
    other = by_transformers(load(model), corpus, tmp_path / "h.duckdb", **SMALL)
    for table in ("sequences", "tokens", "layers", "vocabulary"):
        query = f"select * exclude (run{', nll' if table == 'tokens' else ''}) from {table} order by all"
        assert made.sql(query).equals(other.sql(query)), table
    rows = made.sql("select layer, token_id, experts from routing join tokens using (run, seq, pos)")
    assert len(rows) == 3 * made.n_tokens
    for layer, found in rows.groupby("layer"):
        expected = chosen(found["token_id"].to_numpy(), int(layer), k=3, n_experts=8)
        assert np.array_equal(np.stack(found["experts"].to_list()), expected)
    (run,) = made.sql("select * from runs").to_dict("records")
    assert run["engine"] == "vllm" and run["dtype"] == "float32" and list(run["recorded"]) == ["ids"]
    assert json.loads(run["versions"])["vllm"] == "0.30.0" and run["status"] == "finished"
    assert made.sql("select count(nll) as n from tokens")["n"].tolist() == [0]
    assert left(tmp_path) == []


def test_a_generated_token_has_routing_and_the_last_sampled_is_left_out(
    double: Double, model: Path, corpus: Path, tmp_path: Path
) -> None:
    made = vllm.trace(model, corpus, tmp_path / "t.duckdb", generate=5, max_length=100, progress=False)
    rows = made.sql("select *, n_tokens - n_prompt as said from sequences order by seq")
    prompts = made.sql(
        "select seq, list(token_id order by pos) as ids from tokens where phase <> 'generated' group by seq"
    )
    totals = {row.seq: sum(row.ids) for row in prompts.itertuples()}
    for row in rows.itertuples():
        sampled = [(totals[row.seq] + 7 * step) % 40 for step in range(6)]  # one more than asked
        expected = sampled[: sampled.index(checkpoint.END)] if checkpoint.END in sampled[:5] else sampled[:5]
        found = made.sql(
            f"select token_id from tokens where seq = {row.seq} and phase = 'generated' order by pos"
        )["token_id"].tolist()  # fmt: skip
        assert found == expected and row.said == len(expected)
    assert set(rows["said"]) > {5}  # some texts end before
    assert made.sql("select count(*) as n from routing where len(experts) <> 3")["n"].tolist() == [0]
    assert double.asked()["max_model_len"] == int(rows["n_prompt"].max()) + 6


def test_what_vllm_is_asked_for(double: Double, model: Path, corpus: Path, tmp_path: Path) -> None:
    given = {"gpu_memory_utilization": 0.5, "quantization": "fp8", "enforce_eager": False}
    made = vllm.trace(
        model, corpus, tmp_path / "t.duckdb", tensor_parallel=2, dtype="auto", engine_args=given, progress=False
    )
    asked = double.asked()
    assert asked["model"] == str(model) and asked["tensor_parallel_size"] == 2 and asked["skip_tokenizer_init"] is True
    assert {name: asked[name] for name in given} == given
    (run,) = made.sql("select * from runs").to_dict("records")
    assert run["dtype"] == "fp8:bfloat16"
    assert json.loads(run["corpus"])["engine_args"] == {"quantization": "fp8", "enforce_eager": False}


def test_data_parallel_ranks_share_the_chunks(
    double: Double, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "CHUNK_TOKENS", 100)
    double.behave(answering="(HERE / f\"rank{os.environ['VLLM_DP_RANK']}-{self.calls}\").touch()")
    made = vllm.trace(model, corpus, tmp_path / "t.duckdb", data_parallel=2, **SMALL)
    alone = by_transformers(load(model), corpus, tmp_path / "h.duckdb", **SMALL)
    assert (made.n_tokens, made.n_sequences) == (alone.n_tokens, alone.n_sequences)
    calls = [len(list(double.folder.glob(f"rank{rank}-*"))) for rank in (0, 1)]
    assert min(calls) >= 2 and abs(calls[0] - calls[1]) <= 1
    assert double.asked("0")["model"] == double.asked("1")["model"]


def test_progress_is_told(double: Double, model: Path, corpus: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    made = vllm.trace(model, corpus, tmp_path / "t.duckdb", progress=lambda done, total: told.append((done, total)))
    assert told[0] == (0, made.n_tokens) and told[-1] == (made.n_tokens, made.n_tokens)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answering", "message"),
    [
        ("answer.routed_experts = answer.routed_experts[:-1]", "routing of"),
        ("answer.routed_experts = answer.routed_experts[:, :-1]", "2 layers of top-3; the configuration"),
        ("answer.routed_experts = answer.routed_experts[:, :, :2]", "3 layers of top-2; the configuration"),
        ("answer.routed_experts = answer.routed_experts[:, 0]", "can't be read"),
        ("answer.routed_experts = answer.routed_experts * 0", r"has the experts \[0, 0, 0\]; expected 3 differ"),
        ("answer.routed_experts[:, 1, 0] = answer.routed_experts[:, 1, 1]", "layer 1 has the experts"),
        ("answer.routed_experts[0, 2, 0] = 8", "token 0, layer 2 has the experts .* of 8"),
        ("answer.routed_experts = answer.routed_experts.astype(int) - 8", r"has the experts \[-"),
        ("answer.routed_experts = answer.routed_experts.astype(float)", "can't be read"),
        ("answer.routed_experts = np.pad(answer.routed_experts, ((0, 0), (0, 1), (0, 0)), constant_values=1)",
         "in a layer that has no router"),
        ("answer.token_ids = []", "0 sampled tokens"),
        ("answer.token_ids = [5, 5, 5]", "3 sampled tokens"),
    ],
)  # fmt: skip
def test_hostile_answers(
    double: Double, model: Path, corpus: Path, tmp_path: Path, answering: str, message: str
) -> None:
    double.behave(answering=answering)
    with pytest.raises(RunError, match=message):
        vllm.trace(model, corpus, tmp_path / "t.duckdb", progress=False)
    assert Trace(tmp_path / "t.duckdb").n_tokens == 0


def test_bytes_that_are_no_answer(model: Path) -> None:
    def answer(**columns: Any) -> bytes:
        good = {"sampled": [[1]], "shape": [[1, 3, 3]], "experts": [[0, 1, 2] * 3]} | columns
        table = pa.table({name: values for name, values in good.items() if values is not None})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    found = outline(model)
    one = np.array([7], np.int32), np.array([1], np.uint8)
    batch = [Sequence(0, *one, None, None, None, None, {}, "")]
    good = answer()
    assert vllm_answers.block(batch, good, found, [0, 1, 2], 0).routing[2].experts.tolist() == [[0, 1, 2]]
    bad = [b"", b"no", good[:-9], good[: len(good) // 2], answer(shape=[[-1, 3, 3]]), answer(shape=None),
           answer(shape=[[3, 3]]), answer(shape=[[1, 3, 4]]), answer(shape=[None]),
           answer(experts=[None]), answer(experts=[["a"] * 9]), answer(sampled=[[2**40]]), answer(sampled=[None]),
           answer(sampled=[[1], [1]], shape=[[1, 3, 3]] * 2, experts=[[0, 1, 2] * 3] * 2)]  # fmt: skip
    for one in bad:
        with pytest.raises(RunError):
            vllm_answers.block(batch, one, found, [0, 1, 2], 0)


def test_a_crash_keeps_whole_chunks_and_resume_goes_on(
    double: Double, model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "CHUNK_TOKENS", 100)
    out = tmp_path / "t.duckdb"
    double.behave(answering="if self.calls > 4: raise MemoryError('no room \\x1b[31m for it')")
    with pytest.raises(RunError, match=r"vLLM ended with code 1: MemoryError: no room  \[31m for it") as broken:
        vllm.trace(model, corpus, out, **SMALL)
    assert "--engine-arg gpu_memory_utilization" in str(broken.value) and "\x1b" not in str(broken.value)
    assert "Traceback" in Path(str(broken.value).split("is in ")[1].split(". Continue")[0]).read_text()
    kept = Trace(out)
    assert 0 < kept.n_sequences < 24 and kept.sql("select status from runs")["status"].tolist() == ["failed"]
    double.behave(answering='(HERE / f"again-{self.calls}").touch()')
    more = {"gpu_memory_utilization": 0.5}
    finished = vllm.trace(model, corpus, out, mode="resume", engine_args=more, **SMALL)
    whole = vllm.trace(model, corpus, tmp_path / "whole.duckdb", **SMALL)
    for table in ("sequences", "tokens", "routing"):
        query = f"select * exclude (run) from {table} order by all"
        assert finished.sql(query).equals(whole.sql(query))
    with pytest.raises(InputError, match="can't be resumed: its corpus"):
        vllm.trace(model, corpus, out, mode="resume", engine_args={"seed": 3}, **SMALL)


def test_a_killed_process(double: Double, model: Path, corpus: Path, tmp_path: Path) -> None:
    double.behave(answering="os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RunError, match=r"killed by signal 9 \(SIGKILL\).*memory ran out"):
        vllm.trace(model, corpus, tmp_path / "t.duckdb", progress=False)


def test_a_model_that_does_not_load(double: Double, model: Path, corpus: Path, tmp_path: Path) -> None:
    double.behave(loading="raise ValueError('The number of required GPUs exceeds the total number of available GPUs')")
    with pytest.raises(RunError, match="ended with code 1: ValueError: The number of required GPUs"):
        vllm.trace(model, corpus, tmp_path / "t.duckdb", progress=False)
    assert not (tmp_path / "t.duckdb").exists()


def test_the_first_error_of_a_log_and_the_last() -> None:
    log = """INFO 11-22 16:38:17 [core.py:1] Error: no
WARNING 11-22 16:38:17 [base.py:370] ValueError: harmless
(EngineCore pid=12) ERROR 11-22 16:38:17 [core.py:9] Traceback (most recent call last):
(EngineCore pid=12) ERROR 11-22 16:38:17 [core.py:9] torch.OutOfMemoryError: CUDA out of memory.
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above.
"""
    said = vllm_processes._last_words(log)
    assert said == (
        "torch.OutOfMemoryError: CUDA out of memory. … RuntimeError: Engine core initialization failed. See root cause "
        "above."
    )
    assert vllm_processes._last_words("a\n\nb\nc\nd\n") == "b … c … d." and "nothing" in vllm_processes._last_words("")


GRANDCHILD = """
import subprocess
stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", stubborn])
(HERE / "started.partial").write_text(f"{os.getpid()} {child.pid} {os.getcwd()}")
(HERE / "started.partial").rename(HERE / "started")
time.sleep(600)
"""


def lives(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped doesn't."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_the_workbench(
    double: Double, model: Path, corpus: Path, tmp_path: Path, sign: signal.Signals
) -> None:
    double.behave(answering=GRANDCHILD)
    python, log, started = tmp_path / "python", tmp_path / "log", double.folder / "started"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={double.folder.parent} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    asked = ("trace", model, "--corpus", corpus, "--engine", "vllm", "--vllm-python", python)
    workbench = process.start(*asked, "--out", tmp_path / "t.duckdb", log=log)
    process.wait_for(started, workbench)
    *pids, folder = started.read_text().split()
    assert all(lives(int(pid)) for pid in pids) and Path(folder).exists() and workbench.pid
    os.kill(workbench.pid, sign)
    code = process.finish(workbench)
    patience = time.monotonic() + 20
    while any(lives(int(pid)) for pid in pids) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(lives(int(pid)) for pid in pids) and not Path(folder).exists()
    if sign == signal.SIGINT:
        assert code == 130 and "--resume finishes it" in log.read_text()


def test_a_vllm_that_cannot_generate(double: Double, model: Path, corpus: Path, tmp_path: Path) -> None:
    tied = checkpoint.folder(tmp_path / "tied", tie_word_embeddings=True)
    double.behave(tied=False)
    with pytest.raises(InputError, match="an output layer without weights, so that it can't generate"):
        vllm.trace(tied, corpus, tmp_path / "t.duckdb", generate=2, max_length=99, progress=False)
    assert vllm.trace(tied, corpus, tmp_path / "t.duckdb", progress=False).n_sequences == 24
    assert vllm.trace(model, corpus, tmp_path / "u.duckdb", generate=2, max_length=99, progress=False).n_sequences == 24


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_refused_on_the_command_line(
    workbench: Command, double: Double, model: Path, corpus: Path, tmp_path: Path
) -> None:
    def asked(*options: object) -> Any:
        return workbench("trace", model, "--corpus", corpus, "--out", tmp_path / "t.duckdb", "--engine", *options)

    recipe = tmp_path / "r.json"
    recipe.write_text('{"format": 1, "interventions": [{"kind": "Ablate", "layer": 0, "experts": [1]}]}')
    refused(asked("vllm", "--record", "ids,weights"), "weights can't be recorded", "--engine hf")
    refused(asked("vllm", "--counts-by", "lang"), "counts_by")
    refused(asked("vllm", "--experts", "fused"), "--experts is about transformers")
    refused(asked("vllm", "--dtype", "int8"), "quantization=")
    refused(asked("vllm", "--tensor-parallel", 0), "--tensor-parallel")
    refused(asked("vllm", "--engine-arg", "max_model_len=5"), "the workbench sets it")
    refused(asked("vllm", "--engine-arg", "nonsense"), "expected NAME=VALUE")
    refused(asked("vllm", "--engine-arg", "wings=2"), "knows no engine argument wings")
    refused(asked("hf", "--tensor-parallel", 2), "about --engine vllm")
    refused(asked("vllm", "--vllm-python", "/no/python"), "/no/python: no such", "make vllm-env", "--vllm-python")
    double.knows("model", "dtype")
    refused(asked("vllm"), "doesn't know enable_return_routed_experts")
    assert not (tmp_path / "t.duckdb").exists()


@pytest.mark.parametrize("sleeper", ["0", "1"])
def test_a_refusal_of_one_rank_does_not_wait_for_the_others(
    double: Double, model: Path, corpus: Path, tmp_path: Path, sleeper: str
) -> None:
    double.behave(loading="time.sleep(600)")
    arguments = double.folder / "engine" / "arg_utils.py"
    lazily = f"import os, time\nif os.environ['VLLM_DP_RANK'] == '{sleeper}': time.sleep(600)\n"
    arguments.write_text(lazily + arguments.read_text())
    with pytest.raises(InputError, match="knows no engine argument wings"):
        vllm.trace(model, corpus, tmp_path / "t.duckdb", data_parallel=2, engine_args={"wings": 2}, progress=False)


def test_without_an_environment(model: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORKBENCH_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(vllm, "PYTHON", tmp_path / "none")
    with pytest.raises(InputError, match="no environment with vLLM at .*`make vllm-env` makes one"):
        vllm.trace(model, corpus, tmp_path / "t.duckdb")
    empty = tmp_path / "python"
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # no site-packages
    empty.chmod(0o755)
    with pytest.raises(InputError, match="has no vllm and no pyarrow"):
        vllm.trace(model, corpus, tmp_path / "t.duckdb", python=empty)
    for content in ("", "#!/no/such/python\n"):
        empty.write_text(content)
        with pytest.raises(InputError, match=r"python can't be run \(.*\): name a Python interpreter"):
            vllm.trace(model, corpus, tmp_path / "t.duckdb", python=empty)


def test_families_that_vllm_has_no_rows_for() -> None:
    import tiny

    with pytest.raises(InputError, match="encoder"):
        vllm._places(tiny.model("switch_transformers"))
    with pytest.raises(InputError, match="several routers in a block"):
        vllm._places(tiny.model("jetmoe"))
    assert vllm._places(tiny.model("glm4_moe")) == [1, 2]  # a dense layer comes first
    assert vllm._places(tiny.model("nemotron_h")) == [1, 3]


def test_engine_arguments() -> None:
    given = ["gpu_memory_utilization=0.8", "--enable-expert-parallel=true", "quantization=fp8", 'hf_overrides={"a": 1}']
    assert vllm.arguments(given) == {
        "gpu_memory_utilization": 0.8,
        "enable_expert_parallel": True,
        "quantization": "fp8",
        "hf_overrides": {"a": 1},
    }


# -- the real one ------------------------------------------------------------------------------------------------------

REAL = Path(os.environ.get("WORKBENCH_VLLM_PYTHON") or vllm.PYTHON)
needs_vllm = pytest.mark.skipif(not REAL.exists(), reason="there is no environment with vLLM: make vllm-env")


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_VLLM_PYTHON", str(REAL))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # tests run beside each other
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def both(model: str | Path, corpus: str | Path, out: Path, dtype: str, **asked: Any) -> dict[str, float]:
    """A trace by vLLM and one by transformers, and how far they agree over all layers."""
    asked = {"max_length": 64, "long_texts": "cut", "progress": False} | asked
    mine = vllm.trace(model, corpus, out, run="vllm", dtype=dtype, **asked)
    other = by_transformers(load(model, dtype=dtype), corpus, out, run="hf", mode="append", **asked)
    query = "select seq, pos, token_id, phase from tokens order by all"
    assert mine.sql(query).equals(other.sql(query))
    frame = agreement(mine, other=other, n_resamples=0)
    frame = frame[frame["layer"].isna()]
    return dict(zip(frame["measure"], frame["value"], strict=True))


@pytest.mark.slow
@needs_vllm
def test_real_the_demonstration_model_in_both_precisions(real: None, tmp_path: Path) -> None:
    found = both("demo", "udhr", tmp_path / "a.duckdb", "float32", max_tokens=3000)
    assert found["exact_match"] > 0.999
    found = both("demo", "udhr", tmp_path / "b.duckdb", "bfloat16", max_tokens=3000)
    assert found["overlap"] > 0.98


@pytest.mark.slow
@needs_vllm
def test_real_generated_tokens(real: None, tmp_path: Path) -> None:
    """Of a copy that ties nothing: vLLM's OLMoE leaves a tied output layer without weights, and that is noticed."""
    asked = {"generate": 16, "max_tokens": 1500, "max_length": 64, "long_texts": "cut"}
    with pytest.raises(InputError, match="an output layer without weights, so that it can't generate"):
        vllm.trace("demo", "udhr", tmp_path / "t.duckdb", progress=False, **asked)
    made = load("demo", dtype="float32")
    module: Any = made.module
    module.config.tie_word_embeddings = False
    module.lm_head.weight = type(module.lm_head.weight)(module.lm_head.weight.detach().clone())
    module.save_pretrained(tmp_path / "untied")
    made.tokenizer.save_pretrained(tmp_path / "untied")
    found = both(tmp_path / "untied", "udhr", tmp_path / "t.duckdb", "float32", **asked)
    assert found["exact_match"] > 0.999
    assert Trace(tmp_path / "t.duckdb", "vllm").sql("select * from tokens where phase = 'generated'").size


@pytest.mark.slow
@needs_vllm
def test_real_layers_behind_a_dense_one(real: None, tmp_path: Path) -> None:
    made = checkpoint.model("glm4_moe", hidden_size=64, head_dim=32, num_hidden_layers=4)
    assert [layer.name for layer in made.layers][0] == "model.layers.1.mlp.gate"
    module: Any = made.module
    module.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    texts = checkpoint.corpus(tmp_path / "texts.jsonl")
    assert both(tmp_path / "model", texts, tmp_path / "t.duckdb", "float32")["exact_match"] > 0.999


@pytest.mark.slow
@needs_vllm
def test_real_an_engine_that_is_killed(real: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "CHUNK_TOKENS", 500)
    out, asked = tmp_path / "t.duckdb", {"max_length": 64, "long_texts": "cut", "max_tokens": 3000}

    def kill(done: int, total: int) -> None:
        if done > total / 2:
            for one in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it is dead already
                    if "EngineCore" in "".join(one.cmdline()):
                        one.kill()

    with pytest.raises(RunError, match="vLLM ended with code 1: .*Continue with --resume"):
        vllm.trace("demo", "udhr", out, progress=kill, **asked)
    assert not [one for one in psutil.Process().children(recursive=True) if lives(one.pid)]
    kept = Trace(out).n_sequences
    made = vllm.trace("demo", "udhr", out, mode="resume", progress=False, **asked)
    assert 0 < kept < made.n_sequences and made.n_tokens >= 3000
