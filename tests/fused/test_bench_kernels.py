"""The kernels' benchmark: what it counts without a GPU, and what it does on one, run on a CPU with a made-up clock."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import Command
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from workbench.bench import experts as cpu
from workbench_kernels import agreement, bench, resources, timing
from workbench_kernels.compiled import SHARED, launched
from workbench_kernels.route import Gating
from workbench_kernels.route_kernel import TILES
from workbench_kernels.shapes import SHAPES, SMALL_SHAPES, TOKENS, Shape, experts_module, inputs

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ["route", "route, recorded", "experts", "experts, norms", "load", "co-activation"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class Clock:
    """A timer that runs what it is given once, and says 2 ms."""

    def __init__(self) -> None:
        self.timed = 0

    def __call__(self, call: Callable[[], Any]) -> float:
        call()
        self.timed += 1
        return 2.0


def test_without_a_gpu_work_is_counted_and_nothing_is_claimed(capsys):
    result = bench.run(quick=True)
    out = capsys.readouterr().out
    assert bench.UNMEASURED in out and " ms" not in out and "faster" not in out
    assert all(re.search(rf"^\| {name} \| ", out, re.M) for name in SHAPES)
    assert result["measured"] is None and len(result["counted"]) == len(SHAPES) * len(TOKENS) * 5
    assert result["device"] and re.fullmatch(r"\d{4}-\d\d-\d\d", result["date"]) and result["versions"]["torch"]
    assert json.loads(json.dumps(result)) == result


def test_the_script_ends_with_json():
    done = subprocess.run([sys.executable, ROOT / "kernels" / "bench.py"], capture_output=True, text=True, check=True)
    *shown, last = done.stdout.splitlines()
    assert json.loads(last)["bench"] == "kernels" and any(bench.UNMEASURED in line for line in shown)


def test_the_command_measures_the_cpu_too(workbench: Command, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cpu, "SHAPES", {"decode B=1": (1, 1)})
    result = workbench("bench", "kernels", "--quick", "--out", tmp_path / "b.json")
    assert result.code == 0, result
    last = json.loads(result.out.strip().splitlines()[-1])
    assert last == json.loads((tmp_path / "b.json").read_text())
    assert set(last["cpu"]) == {"mid-size, float32", "mid-size, bfloat16"} and bench.UNMEASURED in result.out


def test_the_whole_report(capsys):
    """As on a GPU, but for the device, the clock, and who computes."""
    clock = Clock()
    result = bench.run(True, "cpu", clock, "torch")
    found = json.loads(json.dumps(result))["measured"]
    assert found["roof"] == {"bandwidth": 2 * 2**20 / 2e-3, "peak": 2 * 256**3 / 2e-3} and found["skipped"] == {}
    assert [row["kernel"] for row in found["times"]] == KERNELS * 4
    assert len(found["agreement"]) == len(found["times"])
    for row in found["times"]:
        assert row["ms"] == 2 and set(row["over"].values()) == {1.0} and row["best"] in row["sweep"]
        assert len(row["sweep"]) == (1 if "," in row["kernel"] else 4)
    [row] = [
        row for row in found["times"] if (row["kernel"], row["shape"], row["tokens"]) == ("experts", "softmax", 40)
    ]
    shape = SMALL_SHAPES["softmax"]
    work = timing.works(shape, inputs(shape, 40).ids)
    moved, products = (getattr(work["gate-up"] + work["down"], name) for name in ("moved", "products"))
    assert row["gb_per_s"] == pytest.approx(moved / 2e-3 / 1e9, rel=1e-3)
    assert row["tflop_per_s"] == pytest.approx(products / 2e-3 / 1e12, rel=1e-3)
    assert row["roof"] == pytest.approx(max(moved / 2**20 / 2, products / 256**3 / 2), rel=1e-3)
    assert "of the roof" in capsys.readouterr().out


def test_a_layer_that_does_not_fit_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(bench, "_fits", lambda shape, device: not shape.corrected)
    found = bench.run(True, "cpu", Clock(), "torch")["measured"]
    assert list(found["skipped"]) == ["groups"] and {row["shape"] for row in found["times"]} == {"softmax"}
    assert "groups: needs 0 GB of free memory; not measured." in capsys.readouterr().out


# -- the gate ----------------------------------------------------------------------------------------------------------


def broken_route(**wrong: Callable[[Any], Any]) -> Callable[..., Any]:
    own = agreement.route

    def run(*args: Any, **kwargs: Any) -> Any:
        routed = own(*args, **kwargs)
        if args[0].dtype == torch.float64:  # the reference
            return routed
        return replace(routed, **{name: change(getattr(routed, name)) for name, change in wrong.items()})

    return run


def broken_record(name: str, change: Callable[[Any], Any]) -> Callable[..., Any]:
    own = agreement.route

    def run(*args: Any, **kwargs: Any) -> Any:
        routed = own(*args, **kwargs)
        if record := kwargs.get("record"):
            buffer = getattr(record, name)
            buffer.copy_(change(buffer))
        return routed

    return run


def broken_experts(change: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    own = agreement.experts
    return lambda *args, **kwargs: change(*own(*args, **kwargs))


def poisoned(out: torch.Tensor) -> torch.Tensor:
    """One number of it NaN."""
    return out.index_fill(1, torch.tensor([0]), torch.nan)


BROKEN: dict[str, tuple[str, Callable[[], Callable[..., Any]], str]] = {
    "last choice": ("route", lambda: broken_route(experts=lambda x: (x + 1) % 12), "rank .* too low"),
    "expert twice": ("route", lambda: broken_route(experts=lambda x: x * 0), "an expert twice"),
    "no expert": ("route", lambda: broken_route(experts=lambda x: x - 100), "that there aren't"),
    "weights": ("route", lambda: broken_route(weights=lambda x: x * 1.02), "weights that differ"),
    "entropy": ("route", lambda: broken_route(entropy=lambda x: x + 1e-3), "entropy that differ"),
    "log-partition": ("route", lambda: broken_route(log_partition=lambda x: x * torch.nan), "log_partition"),
    "margin": ("route", lambda: broken_route(margin=lambda x: x + 1e-4), "margin"),
    "recorded ids": ("route", lambda: broken_record("experts", lambda x: x.flip(1)), "ids in the record"),
    "recorded weights": ("route", lambda: broken_record("weights", lambda x: x.int() // 2), "weights of the record"),
    "outputs": ("experts", lambda: broken_experts(lambda out, norms: (out * 1.1, norms)), "outputs that differ"),
    "a NaN": ("experts", lambda: broken_experts(lambda out, norms: (poisoned(out), norms)), "outputs that differ"),
    "norms": (
        "experts",
        lambda: broken_experts(lambda out, norms: (out, norms if norms is None else norms * 1.1)),
        "norms that differ",
    ),
    "counts": ("tally", lambda: lambda *a, own=agreement.tally, **k: own(*a, **k) + 1, "wrong counts of load"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_nothing_is_timed_if_anything_is_wrong(case: str, monkeypatch):
    name, broken, message = BROKEN[case]
    monkeypatch.setattr(agreement, name, broken())
    clock = Clock()
    with pytest.raises(AssertionError, match=rf"{message}.*Nothing was measured\."):
        bench.run(True, "cpu", clock, "torch")
    assert clock.timed == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_gate_for_every_dtype(dtype: torch.dtype):
    shape = SMALL_SHAPES["softmax"]
    given = inputs(shape, 40, dtype=dtype)
    found = agreement.check_experts(experts_module(shape, "cpu", dtype), given, "torch")
    assert 0 < found["error"] < agreement.ERROR[dtype] / 2


def test_large_layers_are_checked_one_expert_at_a_time():
    shape = SMALL_SHAPES["softmax"]
    given, module = inputs(shape, 7, dtype=torch.float64), experts_module(shape, "cpu", torch.float64)
    weights = agreement.read(module)
    out, norms = agreement.in_float64(weights, given.hidden, given.ids, given.gate)
    expected, sizes = agreement.reference(weights, given.hidden, given.ids, given.gate.double(), norms=True)
    assert torch.allclose(out, expected) and torch.allclose(norms, sizes)


def test_plain_and_fused_routing_choose_alike():
    for shape in SHAPES.values():
        assert agreement.check_route(shape, inputs(shape, 64), "torch")["same_as_plain"] > 0.9


def test_configurations_that_do_not_fit_are_left_out():
    no_room = timing.no_room()

    def run(config: Any) -> None:
        if config == "large":
            raise no_room(2, 1, "shared memory")

    def check(config: Any) -> dict[str, float]:
        run(config)
        return {}

    work = timing.works(SMALL_SHAPES["softmax"], inputs(SMALL_SHAPES["softmax"], 40).ids)["route"]
    case = timing.Case("route", work, ("small", "large"), run, check, {})
    assert timing.check(case) == {}
    found = timing.measure(case, timing.Roof(1e9, 1e9), Clock())
    assert found["sweep"] == {"small": 2.0, "large": None} and found["best"] == "small"
    with pytest.raises(no_room):
        timing.check(replace(case, configs=("large", "small")))


# -- docs/kernels.md ---------------------------------------------------------------------------------------------------


def test_the_documented_counts_are_what_is_counted():
    assert bench.table_of_counts(bench.counts()) in (ROOT / "docs" / "kernels.md").read_text()


def test_the_documented_resources_are_what_the_compiler_says():
    """Of one target; `python kernels/bench.py --compiled` does all of them."""
    found = resources.measured(["sm_90"])
    page = (ROOT / "docs" / "kernels.md").read_text()
    header, _, *rows = resources.table(found).splitlines()
    column = 1 + re.findall(r"^\| kernel \| (.*) \|$", page, re.M)[0].split(" | ").index("sm_90")
    documented = {
        cells[0]: cells[column]
        for cells in (line.strip("| ").split(" | ") for line in page.splitlines())
        if len(cells) == 5
    }
    assert header == "| kernel | sm_90 |"
    for row in rows:
        kernel, said = row.strip("| ").split(" | ")
        assert documented[kernel] == said
    for by_target in found.values():
        assert by_target["sm_90"].spills == 0 and by_target["sm_90"].shared <= SHARED["sm_90"]


def test_the_compilers_table_has_a_command(capsys, monkeypatch):
    load = resources.calls()["load"]
    monkeypatch.setattr(resources, "calls", lambda: {"load": load})
    bench.main(["--compiled"])
    header, _, row = capsys.readouterr().out.strip().splitlines()
    assert header == "| kernel | sm_80 | sm_90 | sm_100 | gfx942 |" and row in (ROOT / "docs/kernels.md").read_text()


def test_launches_are_launches_again_after_an_error():
    before = JITFunction.run, driver._active
    with pytest.raises(ZeroDivisionError):
        launched(lambda: 1 // 0, "sm_90")
    assert (JITFunction.run, driver._active) == before


def test_shapes_are_those_of_the_models():
    assert SHAPES["DeepSeek-V3"].weight_bytes(torch.bfloat16) == 256 * 3 * 7168 * 2048 * 2
    tiny = Shape(4, 2, 8, 4, Gating())
    assert [tuple(p.shape) for p in experts_module(tiny, "cpu", torch.float32).parameters()] == [(4, 8, 8), (4, 8, 4)]
    assert len(TILES) == 4
