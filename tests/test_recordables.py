"""Shift, lookahead and predictions: against computations by hand, family by family, and through the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint
import duckdb
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from recorded import TRACED, run
from routed import full_trace
from torch import nn

from workbench import connection, lookahead, residual, schema
from workbench.arrays import from_arrays
from workbench.capture import trace
from workbench.corpus import from_rows
from workbench.errors import InputError, RunError
from workbench.export import export
from workbench.families import FAMILIES
from workbench.recorder import FIELDS, OF_MOST_FAMILIES, Recorder
from workbench.routing import NO_EXPERT
from workbench.tracefile import Trace
from workbench.validate import validate

torch.set_num_threads(1)

SHIFTED = [name for name in TRACED if name not in residual.NO_SHIFT]
LOOKING = [name for name in TRACED if name not in lookahead.NO_LOOKAHEAD]
# What multiplies the experts' output on its way into the residual stream, where the configuration can say so.
GAINS: dict[str, dict[str, Any]] = {
    name: {"residual_multiplier": 0.22}
    for name in ("granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared")
}
GAINS["minimax_m3_vl"] = {"routed_scaling_factor": 1.7}
GAINS["deepseek_v3"] = {"routed_scaling_factor": 2.5}


# -- shift -------------------------------------------------------------------------------------------------------------


def test_which_families_give_what() -> None:
    assert set(residual.NO_SHIFT) <= set(FAMILIES) and len(SHIFTED) == 52
    assert set(lookahead.NO_LOOKAHEAD) == {"doge"}


def layer_runs(made: Any, index: int, change: float = 0.0) -> dict[str, torch.Tensor]:
    """A forward pass in which something random was added to what the experts of a layer return: before and after.

    Gives the output of the decoder layer, the input of the block, what the experts returned, and what was added to it.
    """
    layer = made.layers[index]
    seen: dict[str, torch.Tensor] = {}

    def experts_ran(_m: nn.Module, _a: Any, out: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) * out.std() * change
        seen["experts"], seen["noise"] = out, noise
        return out + noise

    def around_ran(_m: nn.Module, _a: Any, out: Any) -> None:
        seen["out"] = out if isinstance(out, torch.Tensor) else out[0]

    handles = [
        layer.experts.register_forward_hook(experts_ran),
        layer.around.register_forward_hook(around_ran),
    ]
    with torch.inference_mode():
        made.module(**tiny.inputs(made.module))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", SHIFTED)
def test_what_the_experts_return_is_added_times_the_gain(family: str) -> None:
    """The definition rests on it: the layer's output changes by gain times what is added to the experts' output."""
    made = tiny.model(family, **GAINS.get(family, {}))
    for layer in made.layers:
        plain, changed = layer_runs(made, layer.index), layer_runs(made, layer.index, change=0.2)
        noise = changed["noise"]
        if layer.family.layout == "dense":
            noise = noise.view(layer.n_experts, -1, noise.shape[-1]).sum(0)
        expected = (noise * residual.gain(layer)).reshape(plain["out"].shape)
        torch.testing.assert_close(changed["out"] - plain["out"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", SHIFTED)
def test_the_norm_before_the_block_reads_the_residual_stream(family: str) -> None:
    """With the experts' output, the shared experts' and the attention's taken away, a layer returns x."""
    made = tiny.model(family)
    for layer in made.layers:
        xs: list[torch.Tensor] = []
        outs: list[torch.Tensor] = []
        handles = residual.hook(layer, lambda _shift: None)
        original = residual.turn

        def keep(x: torch.Tensor, added: torch.Tensor, xs: list = xs, original: Any = original) -> torch.Tensor:
            xs.append(x)
            return original(x, added)

        residual.turn = keep
        dense = [
            child.register_forward_hook(lambda _m, _a, out: out * 0)
            for name, child in layer.around.named_modules()
            if name and ("shared_expert" in name.split(".")[-1] or name.split(".")[-1] == "shared_mlp")
        ]
        parallel = family == "cohere2_moe"  # the attention reads the same x, and adds to it too
        if parallel:
            zero = layer.around.self_attn.register_forward_hook(lambda _m, _a, out: (out[0] * 0, *out[1:]))
            dense.append(zero)
        handles += dense
        handles.append(layer.experts.register_forward_hook(lambda _m, _a, out: out * 0))
        handles.append(
            layer.around.register_forward_hook(
                lambda _m, _a, out, outs=outs: outs.append(out if isinstance(out, torch.Tensor) else out[0])
            )
        )
        try:
            with torch.inference_mode():
                made.module(**tiny.inputs(made.module))
        finally:
            residual.turn = original
            for handle in handles:
                handle.remove()
        torch.testing.assert_close(outs[0].reshape(xs[0].shape), xs[0], rtol=1e-4, atol=1e-4)


def by_hand(x: torch.Tensor, routed: torch.Tensor) -> np.ndarray:
    """max(0, 1 - cos(x, x + r)) in float64."""
    a, b = x.double().numpy(), (x + routed).double().numpy()
    cosine = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.maximum(0, 1 - cosine)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "qwen2_moe", "granitemoeshared"])
def test_shift_by_hand(family: str) -> None:
    """x from the source of these families: what enters `post_attention_layernorm`; r expert by expert."""
    made = tiny.model(family, **GAINS.get(family, {}))
    streams: list[torch.Tensor] = []
    inner: list[torch.Tensor] = []
    handles = []
    for layer in made.layers:
        norm = layer.around.post_attention_layernorm
        handles.append(norm.register_forward_pre_hook(lambda _m, args: streams.append(args[0])))
        handles.append(layer.experts.register_forward_pre_hook(lambda _m, args: inner.append(args[0])))
    _, observed = run(made, ["weights", "shift"])
    for handle in handles:
        handle.remove()
    # A dense first layer has such a norm too, but isn't hooked: only layers with routers are.
    for layer, seen, x, hidden in zip(made.layers, observed, streams, inner, strict=True):
        m: Any = layer.experts
        ids, weights = seen.experts.flatten(0, 1), seen.weights.flatten(0, 1)
        routed = torch.zeros_like(hidden)
        with torch.inference_mode():
            for t, row in enumerate(ids.tolist()):
                for r, e in enumerate(row):
                    gate, up = (m.gate_up_proj[e] @ hidden[t]).chunk(2)
                    routed[t] += weights[t, r] * (m.down_proj[e] @ (nn.functional.silu(gate) * up))
        factor = 0.22 if family == "granitemoeshared" else 1.0
        expected = by_hand(x.flatten(0, 1), routed * factor)
        assert np.allclose(seen.shift.flatten().numpy(), expected, atol=2e-6)
        assert (expected > 1e-4).any()


@pytest.mark.parametrize("family", sorted(set(residual.NO_SHIFT)))
def test_shift_is_refused_with_the_reason(family: str) -> None:
    with pytest.raises(InputError, match=f"shift can't be recorded for {family}: .*Record without shift"):
        Recorder(tiny.model(family), ["shift"])


def test_a_latent_space_is_refused() -> None:
    made = tiny.model("nemotron_h", moe_latent_size=16)
    with pytest.raises(InputError, match="latent space"):
        Recorder(made, ["shift"])


def test_a_norm_that_does_not_feed_the_block() -> None:
    made = tiny.model("olmoe")
    handle = made.layers[1].block.register_forward_pre_hook(lambda _m, args: (args[0] * 2,))
    with pytest.raises(RunError, match="no norm feeds the block of model.layers.1.mlp.gate"):
        run(made, ["shift"])
    handle.remove()


def test_a_failed_pass_leaves_nothing_behind() -> None:
    made = tiny.model("olmoe")
    inputs = tiny.inputs(made.module)
    _, expected = run(made, OF_MOST_FAMILIES, **inputs)
    with torch.inference_mode(), Recorder(made, OF_MOST_FAMILIES) as recorder:
        for place in (made.layers[1].router, made.layers[1].experts, made.layers[1].around.self_attn):
            handle = place.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                made.module(**inputs)
            handle.remove()
            recorder.clear()
        made.module(**inputs)
        (observed,) = recorder.take()
    for one, other in zip(expected, observed, strict=True):
        assert torch.equal(one.shift, other.shift)
        assert one.lookahead is other.lookahead is None or torch.equal(one.lookahead, other.lookahead)


def test_turn() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    added = torch.tensor([[0.0, 0.0], [-1.0, 1.0], [-2.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [3.0, 4.0]])
    assert torch.equal(residual.turn(x, added), torch.tensor([0.0, 1.0, 2.0, 1.0, 1.0, 0.0]))
    tiny_angle = residual.turn(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1e-5]]))
    assert float(tiny_angle) == pytest.approx(0.5e-10, rel=1e-3)  # 1 - cos in float32 would be 0


# -- lookahead ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LOOKING)
def test_lookahead_is_what_the_next_router_says(family: str) -> None:
    """The next block run by hand on its own input with the hidden states of this layer's router put in."""
    made = tiny.model(family)
    given: dict[int, torch.Tensor] = {}
    caught: dict[int, Any] = {}

    def remember(layer: Any) -> Any:
        def pre(_m: nn.Module, args: Any, kwargs: Any) -> None:
            given[layer.index] = args[0]
            caught[layer.index] = (args, kwargs)

        return layer.router.register_forward_pre_hook(pre, with_kwargs=True)

    inputs = tiny.inputs(made.module)
    with torch.inference_mode():
        plain = made.module(**inputs)[0]
    handles = [remember(layer) for layer in made.layers]
    out, observed = run(made, ["weights", "lookahead", *FIELDS], **inputs)
    for handle in handles:
        handle.remove()
    assert torch.equal(plain, out)
    for layer, seen in zip(made.layers, observed, strict=True):
        after = lookahead.following(made.layers, layer)
        if after is None:
            assert seen.lookahead is None
            continue
        args, kwargs = caught[after.index]
        with torch.inference_mode():
            expected = lookahead.choice(after, after.router.forward(given[layer.index], *args[1:], **kwargs))
            own = lookahead.choice(after, after.router.forward(*args, **kwargs))
        assert torch.equal(seen.lookahead.flatten(0, 1), expected)
        assert seen.lookahead.shape[-1] == after.top_k
        assert torch.equal(own, observed[after.index].experts.flatten(0, 1))  # given its own input, what it chose


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "deepseek_v3"])
def test_lookahead_by_hand(family: str) -> None:
    """From the weights of the next router: softmax or sigmoid with bias and groups, then top-k."""
    made = tiny.model(family)
    given: list[torch.Tensor] = []
    handles = [layer.router.register_forward_pre_hook(lambda _m, args: given.append(args[0])) for layer in made.layers]
    _, observed = run(made, ["lookahead"])
    for handle in handles:
        handle.remove()
    differs = False
    for layer, after in zip(made.layers[:-1], made.layers[1:], strict=True):
        router: Any = after.router
        with torch.inference_mode():
            z = given[layer.index].flatten(0, -2) @ router.weight.T
            scores = z
            if family == "deepseek_v3":
                scores = z.sigmoid() + router.e_score_correction_bias
                groups = scores.view(len(z), 2, -1)
                best = groups.topk(2, -1).values.sum(-1).argmax(-1)
                scores = torch.where(torch.arange(2)[None, :, None] == best[:, None, None], groups, 0.0).flatten(1)
        expected = scores.topk(after.top_k, -1).indices.sort(-1).values
        found = observed[layer.index].lookahead.flatten(0, 1)
        assert torch.equal(found.sort(-1).values, expected)
        differs |= not torch.equal(found, observed[after.index].experts.flatten(0, 1))
    assert differs


def test_lookahead_stays_in_its_stack() -> None:
    sparse = {"num_layers": 4, "num_decoder_layers": 4, "num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4}
    made = tiny.model("switch_transformers", **sparse)
    _, observed = run(made, ["lookahead"])
    stacks = [layer.stack for layer in made.layers]
    last = {len(stacks) - 1 - stacks[::-1].index(stack) for stack in ("encoder", "decoder")}
    assert stacks.count("encoder") > 1 and stacks.count("decoder") > 1
    assert {place for place, seen in enumerate(observed) if seen.lookahead is None} == last
    assert observed[0].lookahead.shape == (2, 9, 1) and observed[-2].lookahead.shape == (2, 5, 1)


def test_lookahead_is_refused_with_the_reason() -> None:
    with pytest.raises(InputError, match="lookahead can't be recorded for doge: .* Record without lookahead"):
        Recorder(tiny.model("doge"), ["lookahead"])


# -- nothing else changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in SHIFTED if name in LOOKING])
def test_recording_them_changes_nothing(family: str) -> None:
    made = tiny.model(family)
    inputs = tiny.inputs(made.module)
    with torch.inference_mode():
        plain = made.module(**inputs)[0]
    _, without = run(made, FIELDS, **inputs)
    recorded, observed = run(made, (*FIELDS, *OF_MOST_FAMILIES), **inputs)
    assert torch.equal(plain, recorded)
    for one, other in zip(without, observed, strict=True):
        for name in ("experts", *FIELDS):
            assert torch.equal(getattr(one, name).nan_to_num(-7), getattr(other, name).nan_to_num(-7)), name
        assert other.shift.dtype == torch.float32 and other.shift.shape == other.experts.shape[:2]
        assert ((other.shift >= 0) & (other.shift <= 2.0001)).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.module.modules())


# -- through the file --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return checkpoint.olmoe()


@pytest.fixture(scope="module")
def texts() -> Any:
    return from_rows(checkpoint.rows()[:10], "texts")


@pytest.fixture(scope="module")
def whole(model: Any, texts: Any, tmp_path_factory: Any) -> Trace:
    out = tmp_path_factory.mktemp("whole") / "whole.duckdb"
    return trace(model, texts, out, record=schema.RECORDABLE, batch_tokens=200, progress=False)


def test_the_file_holds_what_each_text_alone_gives(model: Any, whole: Trace) -> None:
    token_ids = whole.tokens()["token_id"].to_numpy()
    index = whole.sequence_index()
    predictions = whole.predictions()
    shifts = [whole.shift(layer) for layer in range(3)]
    looks = [whole.lookahead(layer) for layer in range(2)]
    assert predictions.dtype == np.int32 and shifts[0].dtype == np.float32 and looks[0].dtype == np.uint16
    assert {"predictions", "shift", "lookahead"} <= whole.recorded
    for row in range(whole.n_sequences):
        at = np.flatnonzero(index == row)
        ids = torch.from_numpy(token_ids[at].astype(np.int64))[None]
        with torch.inference_mode():
            logits = model.module(input_ids=ids).logits[0]
        _, observed = run(model, OF_MOST_FAMILIES, input_ids=ids)
        assert np.array_equal(predictions[at], logits.argmax(-1).numpy())
        for layer in range(3):
            assert np.allclose(shifts[layer][at], observed[layer].shift[0].numpy(), atol=1e-5)
        for layer in range(2):
            assert np.array_equal(looks[layer][at], observed[layer].lookahead[0].numpy())
    assert set(predictions.tolist()) <= set(whole.vocabulary()["token_id"])
    assert validate(whole.path).empty


def test_predictions_of_generated_tokens(model: Any, texts: Any, tmp_path: Path) -> None:
    found = trace(
        model, texts, tmp_path / "t.duckdb", record=["predictions"], generate=4, batch_tokens=150, progress=False
    )
    tokens, predicted, index = found.tokens(), found.predictions(), found.sequence_index()
    n_prompt = found.sequences()["n_prompt"].to_numpy()[index]
    pos = tokens["pos"].to_numpy()
    assert (predicted[pos < n_prompt - 1] == -1).all() and (predicted[pos >= n_prompt - 1] >= 0).all()
    following = np.append(tokens["token_id"].to_numpy()[1:], -1)
    generated_next = np.append(pos[1:] > 0, False) & (pos >= n_prompt - 1)
    assert generated_next.sum() > 10
    assert np.array_equal(predicted[generated_next], following[generated_next])
    for row in range(found.n_sequences):  # what was generated last isn't fed back, but its prediction is known
        at = np.flatnonzero(index == row)
        ids = torch.from_numpy(tokens["token_id"].to_numpy()[at].astype(np.int64))[None]
        with torch.inference_mode():
            expected = model.module(input_ids=ids).logits[0].argmax(-1).numpy()
        known = predicted[at] >= 0
        assert np.array_equal(predicted[at][known], expected[known])
    assert validate(found.path).empty


def test_models_that_predict_no_next_token(tmp_path: Path, texts: Any) -> None:
    made = checkpoint.model("switch_transformers", decoder_start_token_id=0)
    with pytest.raises(InputError, match="switch_transformers doesn't predict the next token"):
        trace(made, texts, tmp_path / "t.duckdb", record=["predictions"], progress=False)
    assert not list(tmp_path.iterdir())


def test_a_refusal_comes_before_anything_is_written(tmp_path: Path, texts: Any) -> None:
    made = checkpoint.model("flex_olmo")
    with pytest.raises(InputError, match="shift can't be recorded for flex_olmo"):
        trace(made, texts, tmp_path / "t.duckdb", record=["shift"], progress=False)
    assert not list(tmp_path.iterdir())


def test_asking_for_what_was_not_recorded(model: Any, texts: Any, whole: Trace, tmp_path: Path) -> None:
    plain = trace(model, texts, tmp_path / "t.duckdb", progress=False)
    with pytest.raises(InputError, match="shift was not recorded .* trace again with --record ids,weights,shift"):
        plain.shift(0)
    with pytest.raises(InputError, match="lookahead was not recorded"):
        plain.lookahead(0)
    with pytest.raises(InputError, match="predictions were not recorded"):
        plain.predictions()
    with pytest.raises(InputError, match="layer 2 .* is the last of its stack"):
        whole.lookahead(2)
    with pytest.raises(InputError, match="layer 3: run .* has layers 0 to 2"):
        whole.lookahead(3)


def routed(path: Path, **changes: Any) -> Trace:
    random = np.random.default_rng(0)
    n = 12
    experts = [np.argsort(random.random((n, 5)), axis=1)[:, :k] for k in (2, 3)]
    look = np.argsort(random.random((n, 5)), axis=1)[:, :3]
    look[4, 1:] = -1
    given = {
        "shift": random.random((2, n)) * 2,
        "lookahead": [look],
        "predictions": np.where(np.arange(n) == 3, -1, random.integers(0, 9, n)),
        "norms": [random.random(ids.shape) for ids in experts],
    }
    rows = pd.DataFrame({"lang": ["en", "de", None]})
    return full_trace(path, experts, n_experts=5, seq=[0] * 5 + [2] * 7, sequences=rows, **(given | changes))


def test_round_trip_of_layers_with_different_k(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    look = np.argsort(random.random((12, 5)), axis=1)[:, :3]
    look[7] = -1
    shift = random.random((2, 12)).astype(np.float32)
    predicted = random.integers(-1, 9, 12)
    found = routed(tmp_path / "t.duckdb", lookahead=[look], shift=shift, predictions=predicted)
    assert np.array_equal(found.lookahead(0), look.astype(np.uint16)) and found.lookahead(0)[7, 0] == NO_EXPERT
    assert np.array_equal(np.stack([found.shift(0), found.shift(1)]), shift)
    assert np.array_equal(found.predictions(), predicted)
    assert validate(found.path).empty
    rows = export(found.path, "routing", tmp_path / "r.parquet", unnest=True)
    assert rows == 12 * 5
    assert {"shift", "lookahead"} <= set(pd.read_parquet(_exported(found, tmp_path)).columns)


def test_predictions_of_arrays(tmp_path: Path) -> None:
    experts = np.array([[[0, 1]], [[2, 1]], [[3, 0]]])
    given = {"n_experts": 4, "token_ids": [5, 6, 7], "vocabulary": {5: "a", 6: "b", 7: "c", 8: "d"}}
    found = from_arrays(tmp_path / "t.duckdb", experts, predictions=[6, 8, -1], **given)
    assert found.predictions().tolist() == [6, 8, -1] and found.recorded == {"ids", "predictions"}
    assert validate(found.path).empty
    with pytest.raises(InputError, match=r"predictions is float64 of shape \(2,\); expected 3 integers"):
        from_arrays(tmp_path / "u.duckdb", experts, predictions=[1.0, 2.0], **given)
    assert not (tmp_path / "u.duckdb").exists()


def _exported(found: Trace, folder: Path) -> Path:
    export(found.path, "routing", folder / "whole.parquet")
    return folder / "whole.parquet"


@pytest.mark.parametrize(
    "statement, check, message",
    [
        ("UPDATE routing SET shift = -0.5 WHERE pos = 1 AND layer = 1", "shift", "shift is -0.5"),
        ("UPDATE routing SET shift = NULL WHERE pos = 1 AND layer = 1", "shift", "shift is null"),
        ("UPDATE routing SET shift = 2.5 WHERE pos = 1 AND layer = 1", "shift", "shift is 2.5"),
        ("UPDATE routing SET lookahead = NULL WHERE layer = 0", "lookahead", "lookahead is null; expected at most 3"),
        ("UPDATE routing SET lookahead = [1, 1] WHERE layer = 0", "lookahead", r"lookahead is \[1, 1\]"),
        ("UPDATE routing SET lookahead = [7] WHERE layer = 0", "lookahead", "distinct ids below 5"),
        ("UPDATE routing SET lookahead = [0, 1, 2, 3] WHERE layer = 0", "lookahead", "at most 3"),
        ("UPDATE routing SET lookahead = [1] WHERE layer = 1", "lookahead", "null in the last layer of a stack"),
        ("UPDATE tokens SET predicted = -2 WHERE pos = 1", "predicted", "predicted is -2"),
        ("UPDATE tokens SET predicted = NULL WHERE pos = 1", "predicted", "predicted is null"),
        ("UPDATE tokens SET predicted = 77 WHERE pos = 1", "predicted", "predicted is 77"),
    ],
)
def test_validate_sees(tmp_path: Path, statement: str, check: str, message: str) -> None:
    found = routed(tmp_path / "t.duckdb")
    assert validate(found.path).empty
    with duckdb.connect(str(found.path)) as con:
        con.execute(statement)
    problems = validate(found.path)
    assert problems["check"].tolist() == [check]
    assert pd.Series(problems.loc[0, "message"]).str.contains(message).all(), problems.loc[0, "message"]


def test_a_block_without_what_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="layer 0 came without lookahead"):
        routed(tmp_path / "a.duckdb", lookahead=[])
    with pytest.raises(RunError, match=r"layer 1: lookahead of shape \(12, 4\); expected 12 tokens, top-3"):
        routed(tmp_path / "b.duckdb", lookahead=[np.tile(np.arange(4), (12, 1))])
    with pytest.raises(RunError, match="expert id 9 of 5 experts"):
        routed(tmp_path / "c.duckdb", lookahead=[np.tile([9, 1, 2], (12, 1))])


# -- files of format 1 -------------------------------------------------------------------------------------------------

# What format 1 was, as `workbench` 0.1 wrote it.
FORMAT_1 = """
CREATE TYPE phase AS ENUM ('template', 'prompt', 'generated');
CREATE TABLE format (version INTEGER, written_by VARCHAR);
CREATE TABLE runs (
    run VARCHAR, model VARCHAR, revision VARCHAR, family VARCHAR, engine VARCHAR, dtype VARCHAR, recipe JSON,
    recorded VARCHAR[], corpus JSON, versions JSON, started TIMESTAMP, finished TIMESTAMP, status VARCHAR);
CREATE TABLE layers (
    run VARCHAR, layer USMALLINT, name VARCHAR, n_experts INTEGER, top_k INTEGER, n_shared INTEGER, gating VARCHAR,
    stack VARCHAR);
CREATE TABLE sequences (
    run VARCHAR, seq INTEGER, sha256 VARCHAR, n_prompt INTEGER, n_tokens INTEGER, lang VARCHAR, domain VARCHAR,
    source VARCHAR, segment_id VARCHAR, metadata JSON);
CREATE TABLE tokens (run VARCHAR, seq INTEGER, pos INTEGER, token_id INTEGER, phase phase, nll FLOAT);
CREATE TABLE vocabulary (run VARCHAR, token_id INTEGER, text VARCHAR);
CREATE TABLE routing (
    run VARCHAR, seq INTEGER, pos INTEGER, layer USMALLINT, scale FLOAT, experts USMALLINT[], weights USMALLINT[],
    entropy FLOAT, margin FLOAT, logits FLOAT[], norms FLOAT[]);
CREATE TABLE profiles (run VARCHAR, seq INTEGER, layer USMALLINT, probs FLOAT[]);
CREATE VIEW selections AS
    SELECT run, seq, pos, layer, unnest(range(len(experts)))::USMALLINT AS rank, unnest(experts) AS expert,
        unnest(weights)::FLOAT / 65535::FLOAT * scale AS weight
    FROM routing;
INSERT INTO format VALUES (1, 'duckdb');
"""


def as_format_1(found: Path, out: Path) -> Path:
    """The same trace as a file of format 1."""
    with duckdb.connect(str(out), config={"default_block_size": "131072"}) as con:
        con.execute(FORMAT_1)
        con.execute(f"ATTACH '{found}' AS newer (READ_ONLY)")
        for table in ("runs", "layers", "sequences", "tokens", "vocabulary", "routing", "profiles"):
            columns = ", ".join(row[0] for row in con.execute(f"DESCRIBE {table}").fetchall())
            con.execute(f"INSERT INTO {table} SELECT {columns} FROM newer.{table}")
        con.execute("DETACH newer")
    return out


OLD_RUN: dict[str, Any] = {
    "run": "one", "record": ["weights", "entropy", "norms"], "batch_tokens": 1, "progress": False,
}  # fmt: skip


@pytest.fixture
def old(model: Any, texts: Any, tmp_path: Path) -> Path:
    trace(model, texts, tmp_path / "new.duckdb", **OLD_RUN)
    return as_format_1(tmp_path / "new.duckdb", tmp_path / "old.duckdb")


def version(path: Path) -> int:
    with connection.reading(path) as con:
        return schema.version_of(con)


def test_a_file_of_format_1_is_read_as_it_is(old: Path, tmp_path: Path) -> None:
    before = old.read_bytes()
    new, found = Trace(tmp_path / "new.duckdb"), Trace(old)
    for layer in range(3):
        for name in ("experts", "weights", "entropy", "norms"):
            assert np.array_equal(getattr(found, name)(layer), getattr(new, name)(layer))
    assert found.tokens().equals(new.tokens())
    with pytest.raises(InputError, match="shift was not recorded in run 'one'"):
        found.shift(0)
    with pytest.raises(InputError, match="predictions were not recorded"):
        found.predictions()
    assert validate(old).empty
    rows = export(old, "routing", tmp_path / "r.parquet", unnest=True)
    assert rows == found.n_tokens * 9 and export(old, "routing", tmp_path / "w.csv") == found.n_tokens * 3
    assert old.read_bytes() == before and version(old) == 1


def test_a_file_of_format_1_is_migrated_when_a_run_is_added(old: Path, model: Any, texts: Any) -> None:
    second = trace(model, texts, old, run="two", mode="append", record=schema.RECORDABLE, progress=False)
    assert version(old) == schema.FORMAT and validate(old).empty
    first = Trace(old, "one")
    assert np.array_equal(first.experts(1), second.experts(1)) and np.allclose(
        first.norms(1), second.norms(1), atol=1e-4
    )
    assert second.shift(1).shape == (second.n_tokens,) and (second.predictions() >= 0).all()
    with pytest.raises(InputError, match="lookahead was not recorded in run 'one'"):
        first.lookahead(0)
    assert len(first.sql("SELECT * FROM selections WHERE run = 'one'")) == first.n_tokens * 9


def test_a_run_of_format_1_is_finished(old: Path, model: Any, texts: Any, tmp_path: Path) -> None:
    whole = Trace(tmp_path / "new.duckdb")
    with duckdb.connect(str(old)) as con:  # as if it had been interrupted after the first half
        for table in ("sequences", "tokens", "routing", "profiles"):
            con.execute(f"DELETE FROM {table} WHERE seq >= 5")
        con.execute("UPDATE runs SET status = 'interrupted', finished = NULL")
    assert Trace(old).n_sequences == 5
    done = trace(model, texts, old, mode="resume", **OLD_RUN)
    assert version(old) == schema.FORMAT and done.n_sequences == whole.n_sequences
    assert np.array_equal(done.experts(2), whole.experts(2))
    assert validate(old).empty


def test_a_newer_format_is_refused(old: Path) -> None:
    with duckdb.connect(str(old)) as con:
        con.execute("UPDATE format SET version = 4")
    with pytest.raises(InputError, match="has trace format 4; this workbench reads format 3. Update the workbench"):
        Trace(old)
