"""Weights as torchao's int8: what is rounded and what isn't, how far the model moves, and a quiet terminal."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint
import pytest
import tiny
import torch

from workbench import experts
from workbench.capture import trace
from workbench.errors import InputError
from workbench.models import load
from workbench.quantization import quantise, quietly, rounded
from workbench.recorder import Recorder

torch.set_num_threads(1)


def test_rounded_is_int8_by_row() -> None:
    pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(0)
    for shape in ((5, 7), (3, 63, 1000), (4, 1, 2)):
        matrix = torch.randn(shape, generator=generator) * torch.arange(1, shape[-2] + 1)[:, None]
        found = rounded(matrix)
        assert found.shape == matrix.shape and found.dtype == matrix.dtype and not torch.equal(found, matrix)
        for row, was in zip(found.reshape(-1, shape[-1]), matrix.reshape(-1, shape[-1]), strict=True):
            step = float(was.abs().max()) / 127.5
            assert len(row.unique()) <= 256
            levels = row / step
            assert (levels - levels.round()).abs().max() < 1e-2 and levels.abs().max() < 128.1
            assert (row - was).abs().max() <= step * 1.01
    assert rounded(torch.randn(4, 8).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "family", ["olmoe", "gpt_oss", "deepseek_v3", "gemma4", "dbrx", "llama4", "switch_transformers"]
)
def test_what_is_rounded(family: str) -> None:
    pytest.importorskip("torchao")
    made = tiny.model(family)
    before = {name: tensor.clone() for name, tensor in made.module.state_dict().items()}
    views = [] if family == "switch_transformers" else [experts.read(layer) for layer in made.layers]
    were = [{name: matrix.clone() for name, matrix in _matrices(weights).items()} for weights in views]
    quantise(made.module, made.layers)
    for weights, were_here in zip(views, were, strict=True):
        for name, matrix in _matrices(weights).items():
            torch.testing.assert_close(matrix, rounded(were_here[name]))
            assert not torch.equal(matrix, were_here[name])
    routers = {f"{layer.name}.{name}" for layer in made.layers for name in layer.router.state_dict()}
    changed = {name for name, tensor in made.module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert not changed & routers
    kept = ("norm", "embed", "lm_head", "bias")
    assert not [name for name in changed if any(word in name.split(".", 4)[-1] for word in kept) and "attn" not in name]
    assert any("attn" in name or "attention" in name.lower() for name in changed)
    assert any("expert" in name for name in changed)


def _matrices(weights: Any) -> dict[str, torch.Tensor]:
    named = {"gate": weights.gate, "up": weights.up, "down": weights.down}
    return {name: matrix for name, matrix in named.items() if matrix is not None}


def test_demo_in_int8_is_near_float32(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchao")
    full, int8 = load("demo", dtype="float32"), load("demo", dtype="int8:float32")
    assert (full.dtype, int8.dtype) == ("float32", "int8:float32")
    text = "The quick brown fox jumps over the lazy dog, and the committee adopts the resolution without a vote. " * 3
    ids = torch.tensor([full.tokenizer(text)["input_ids"]])
    seen = []
    for model in (full, int8):
        with torch.inference_mode(), Recorder(model) as recorder:
            logits = model.module(input_ids=ids).logits
        seen.append((logits, [layer.experts for layer in recorder.take()[0]]))
    (a, routed), (b, routed_int8) = seen
    apart = float((a - b).norm() / a.norm())
    same = [
        float((x.unsqueeze(-1) == y.unsqueeze(-2)).any(-1).float().mean())
        for x, y in zip(routed, routed_int8, strict=True)
    ]
    with capsys.disabled():
        print(f"\nint8 demo: logits {apart:.2%} apart, the same experts {[round(share, 3) for share in same]} by layer")
    assert 1e-4 < apart < 0.1
    assert all(0.8 < share <= 1 for share in same) and min(same) < 1


def test_int8_computes_in_the_checkpoints_dtype(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    folder = checkpoint.folder(tmp_path)
    loaded = load(folder, dtype="int8")
    assert loaded.dtype == "int8:float32" and next(loaded.module.parameters()).dtype == torch.float32
    assert load(folder, dtype="int8:bfloat16").dtype == "int8:bfloat16"
    found = trace(loaded, checkpoint.corpus(tmp_path / "c.jsonl", 4), tmp_path / "t.duckdb", progress=False)
    assert found.runs().loc[0, "dtype"] == "int8:float32"


def test_wrong_names(tmp_path: Path) -> None:
    for wrong in ("int8:int8", "int4:float32", "int8:", ":float32:", "int16"):
        with pytest.raises(InputError, match=f"dtype '{wrong}': expected 'auto', 'float32'"):
            load(tmp_path, dtype=wrong)


def test_a_module_in_memory_is_not_changed() -> None:
    with pytest.raises(InputError, match="dtype 'int8': a module in memory is used as it is"):
        load(tiny.module("olmoe"), dtype="int8")


def test_without_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint.folder(tmp_path)
    load(folder)  # transformers itself imports torchao where it is installed
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(InputError, match=r"'int8' takes the package torchao: pip install 'moe-workbench\[quantized\]'"):
        load(folder, dtype="int8")


def test_experts_that_cannot_be_read() -> None:
    pytest.importorskip("torchao")
    made = tiny.model("jetmoe")
    before = {name: tensor.clone() for name, tensor in made.module.state_dict().items()}
    with pytest.raises(InputError, match="jetmoe"):
        quantise(made.module, made.layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.module.state_dict().items())


def test_only_the_noise_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    enumeration = "<enum 'A'> is an Enum subclass and is now natively supported by torch.compile"
    noise = ("torchao", "Failed to load /x/_C_mxfp8.so: no"), ("torch.utils._pytree", enumeration)
    other = ("torchao", "your torch is too old"), ("torch.utils._pytree", "cannot register a type twice")
    with quietly():
        for name, message in (*noise, *other):
            logging.getLogger(name).warning(message)
    assert [record.getMessage() for record in caplog.records] == [message for _, message in other]
    with pytest.raises(ZeroDivisionError), quietly():
        raise ZeroDivisionError
    assert not logging.getLogger("torchao").filters and not logging.getLogger("torch.utils._pytree").filters


def test_a_command_says_nothing_of_torchao() -> None:
    pytest.importorskip("torchao")
    done = subprocess.run(
        [sys.executable, "-m", "workbench", "models", "demo"], capture_output=True, text=True, check=True
    )
    assert "torchao" not in done.stderr and "_pytree" not in done.stderr, done.stderr
