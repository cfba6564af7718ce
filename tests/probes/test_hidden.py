"""Hidden states are what the blocks read, of the very tokens of the trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import main, planted

from workbench.arrays import from_arrays
from workbench.errors import InputError
from workbench.models import load
from workbench.tracefile import Trace
from workbench_probes import probe
from workbench_probes.hidden import hidden_states


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return load("demo", dtype="float32")  # so that padding and batches change nothing that is seen


def test_hidden_states_against_the_model_one_text_at_a_time(demo_trace: Path, model):
    trace = Trace(demo_trace)
    owner, ids = trace.sequence_index(), trace.tokens()["token_id"].to_numpy()
    row = np.sort(np.random.default_rng(0).choice(len(owner), 40, replace=False))
    found = hidden_states(trace, row, "token", [0, 4], model=model)
    means = hidden_states(trace, np.array([1, 7]), "sequence", [0, 4], model=model, batch_tokens=300)
    for layer in (0, 4):
        kept: list[torch.Tensor] = []
        block = model.layers[layer].block
        handle = block.register_forward_pre_hook(lambda _module, args, kept=kept: kept.append(args[0]))
        for place, token in enumerate(row[:6]):
            with torch.inference_mode():
                model.module(torch.from_numpy(ids[owner == owner[token]].astype(np.int64))[None])
            at = token - np.searchsorted(owner, owner[token])
            np.testing.assert_allclose(found[layer][place], kept[-1][0, at], atol=1e-3)
        with torch.inference_mode():
            model.module(torch.from_numpy(ids[owner == 7].astype(np.int64))[None])
        np.testing.assert_allclose(means[layer][1], kept[-1][0].mean(0), atol=1e-3)
        handle.remove()
        assert not block._forward_pre_hooks


def test_hidden_states_know_the_language(demo_trace: Path):
    rows = main(
        probe(Trace(demo_trace), "lang", features=["hidden", "choices"], layers=[1, 2], folds=3, drop_rare=True)
    )
    assert list(rows.index) == [(name, layer) for name in ("choices", "hidden") for layer in (-1, 1, 2)]
    for layer in (2, -1):
        assert rows.loc[("hidden", layer), "value"] > 0.8 > 0.5 > rows.loc[("hidden", layer), "control"]
    assert rows.loc[("hidden", -1), "n_columns"] == 2 * rows.loc[("hidden", 2), "n_columns"]


def test_another_model_is_refused(demo_trace: Path, tmp_path: Path, model):
    trace = Trace(demo_trace)
    with pytest.raises(InputError, match="demo-early chooses only .*of the experts"):
        hidden_states(trace, np.arange(9), "token", [1, 2], model="demo-early")
    with pytest.raises(InputError, match="6 MoE layers, run 'full' has 3"):
        hidden_states(planted(tmp_path / "t.duckdb", n_texts=2), np.arange(9), "token", [1], model=model)
    nameless = from_arrays(tmp_path / "u.duckdb", np.zeros((4, 1, 1), int), n_experts=1, token_ids=[0, 1, 2, 3])
    with pytest.raises(InputError, match="doesn't say which model it is of"):
        hidden_states(nameless, np.arange(2), "token", [0])
