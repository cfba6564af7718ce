"""`trace` end to end: what stands in the file against plain forward passes, generation, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import pytest
import torch

from workbench import tokenization
from workbench.capture import trace
from workbench.corpus import from_rows
from workbench.errors import InputError, RunError
from workbench.models import Model, load
from workbench.routing import NO_EXPERT
from workbench.schema import RECORDABLE
from workbench.tracefile import Trace


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return checkpoint.olmoe()


@pytest.fixture(scope="module")
def texts():
    return from_rows(checkpoint.rows(), "texts")


@pytest.fixture(scope="module")
def few():
    """The first of the texts."""
    return from_rows(checkpoint.rows()[:8], "texts")


@pytest.fixture(scope="module")
def whole(model: Model, texts, tmp_path_factory) -> Trace:
    """Every text, everything recorded, batches of several lengths."""
    out = tmp_path_factory.mktemp("whole") / "whole.duckdb"
    return trace(model, texts, out, record=RECORDABLE, batch_tokens=400, progress=False)


def by_hand(model: Model, token_ids: np.ndarray) -> dict[str, Any]:
    """One sequence alone through the model: router outputs caught by hooks of this test, NLL in float64."""
    caught: list[Any] = []
    hooks = [layer.router.register_forward_hook(lambda _m, _a, out: caught.append(out)) for layer in model.layers]
    with torch.inference_mode():
        logits = model.module(input_ids=torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0].double()
    for hook in hooks:
        hook.remove()
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    nll = -log_p[torch.arange(len(token_ids) - 1), torch.from_numpy(token_ids[1:].astype(np.int64))]
    return {
        "logits": [out[0].float().numpy() for out in caught],  # OLMoE's router gives logits, weights, ids
        "weights": [out[1].float().numpy() for out in caught],
        "experts": [out[2].numpy() for out in caught],
        "nll": np.concatenate([[np.nan], nll.numpy()]),
    }


def by_sequence(found: Trace) -> list[np.ndarray]:
    """Places of each sequence's tokens in the arrays of tokens."""
    return [np.flatnonzero(found.sequence_index() == row) for row in range(found.n_sequences)]


def assert_same_tables(one: Trace, other: Trace) -> None:
    """Every table of two runs, but for the names of the runs and the times."""
    for table in ("layers", "sequences", "tokens", "vocabulary", "routing", "profiles"):
        rows = [
            each.sql(f"SELECT * EXCLUDE (run) FROM {table} WHERE run = '{each.run}' ORDER BY ALL").to_json()
            for each in (one, other)
        ]
        assert rows[0] == rows[1], table


# What is recorded.


def test_the_file_holds_what_a_forward_pass_over_each_text_alone_does(model: Model, whole: Trace):
    tokens = whole.tokens()
    experts = [whole.experts(layer) for layer in range(whole.n_layers)]
    weights = [whole.weights(layer) for layer in range(whole.n_layers)]
    logits = [whole.logits(layer) for layer in range(whole.n_layers)]
    lengths = set()
    for at in by_sequence(whole):
        lengths.add(len(at))
        alone = by_hand(model, tokens["token_id"].to_numpy()[at])
        for layer in range(whole.n_layers):
            assert np.array_equal(experts[layer][at], alone["experts"][layer])
            assert np.allclose(weights[layer][at], alone["weights"][layer], atol=1e-5)
            assert np.allclose(logits[layer][at], alone["logits"][layer], atol=1e-4)
        assert np.allclose(tokens["nll"].to_numpy()[at], alone["nll"], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert len(lengths) > 5  # or nothing would have been padded


def test_entropy_margin_and_profiles_follow_from_the_logits(whole: Trace):
    index = whole.sequence_index()
    for layer in range(whole.n_layers):
        z = whole.logits(layer).astype(np.float64)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        assert np.allclose(whole.entropy(layer), -(p * np.log(p)).sum(axis=1), atol=1e-5)
        ranked = np.sort(p, axis=1)[:, ::-1]
        assert np.allclose(whole.margin(layer), ranked[:, 2] - ranked[:, 3], atol=1e-6)
        means = np.stack([p[index == row].mean(axis=0) for row in range(whole.n_sequences)])
        assert np.allclose(whole.profiles(layer), means, atol=1e-6)
        assert (whole.norms(layer) > 0).all()


def test_texts_and_metadata_are_kept(whole: Trace, model: Model):
    rows = checkpoint.rows()
    found = whole.sequences()
    for name in ("lang", "domain", "segment_id", "difficulty"):
        assert found[name].tolist() == [row[name] for row in rows]
    assert set(found["source"]) == {"texts"}
    tokens = whole.tokens()
    for row, at in zip(rows, by_sequence(whole), strict=True):
        assert model.tokenizer.decode(tokens["token_id"].to_numpy()[at]) == row["text"]
    assert set(tokens["phase"]) == {"prompt"}
    vocabulary = dict(whole.vocabulary()[["token_id", "text"]].to_numpy().tolist())
    assert set(vocabulary) == set(tokens["token_id"]) | set(whole.predictions())
    assert vocabulary[model.tokenizer.convert_tokens_to_ids("x")] == "x"
    assert "\ufffd" not in "".join(vocabulary.values())  # halves of characters keep the name of their byte


@pytest.mark.parametrize("option", [name for name in RECORDABLE if name != "ids"])
def test_each_thing_can_be_recorded_alone(option: str, model: Model, few, whole: Trace, tmp_path: Path):
    found = trace(model, few, tmp_path / "one.duckdb", record=option, batch_tokens=400, progress=False)
    assert found.recorded == {"ids", option}
    n = found.n_tokens
    assert np.array_equal(found.experts(0), whole.experts(0)[:n])
    rows = found.n_sequences if option == "profiles" else n
    layer = () if option == "predictions" else (1,)
    assert np.allclose(getattr(found, option)(*layer), getattr(whole, option)(*layer)[:rows], atol=1e-4)
    other = "margin" if option != "margin" else "entropy"
    with pytest.raises(InputError, match="not recorded"):
        getattr(found, other)(0)


def test_the_batch_plan_changes_nothing(model: Model, few, whole: Trace, tmp_path: Path):
    alone = trace(model, few, tmp_path / "alone.duckdb", record=RECORDABLE, batch_tokens=1, progress=False)
    columns = ["seq", "pos", "token_id"]
    assert alone.tokens()[columns].equals(whole.tokens()[columns][: alone.n_tokens])
    for layer in range(whole.n_layers):
        assert np.array_equal(alone.experts(layer), whole.experts(layer)[: alone.n_tokens])
        for name in ("weights", "entropy", "margin", "logits", "norms", "profiles"):
            one = getattr(alone, name)(layer)
            assert np.allclose(one, getattr(whole, name)(layer)[: len(one)], rtol=1e-4, atol=1e-4), name


def test_a_half_precision_model(texts, tmp_path: Path):
    module = checkpoint.olmoe().module.to(torch.bfloat16)
    found = trace(load(module, tokenizer=checkpoint.tokenizer()), texts, tmp_path / "t.duckdb", progress=False)
    assert found.runs()["dtype"].tolist() == ["bfloat16"]
    assert np.isfinite(found.weights(0)).all() and (found.weights(0).sum(axis=1) <= 1.001).all()


# Corpora, lengths, runs.


def test_several_corpora_and_runs_in_one_file(model: Model, tmp_path: Path):
    one, two = checkpoint.corpus(tmp_path / "one.jsonl", n=6), checkpoint.corpus(tmp_path / "two.jsonl", n=9, seed=1)
    out = tmp_path / "t.duckdb"
    both = trace(model, [one, str(two)], out, progress=False)
    assert both.run == "OlmoeForCausalLM.one+two"
    assert both.sequences()["source"].tolist() == ["one"] * 6 + ["two"] * 9
    named = trace(model, two, out, mode="append", run="second", progress=False)
    assert named.runs()["run"].tolist() == [both.run, "second"]
    assert named.n_sequences == 9 and both.n_sequences == 15
    last = both.n_tokens - named.n_tokens
    assert np.array_equal(both.experts(1)[last:], named.experts(1))
    with pytest.raises(InputError, match="already has a run 'second'"):
        trace(model, one, out, mode="append", run="second", progress=False)
    assert Trace(out).n_sequences == 9


def test_max_tokens_ends_after_the_text_that_reaches_it(model: Model, texts, whole: Trace, tmp_path: Path):
    five = sum(whole.sequences()["n_tokens"].tolist()[:5])
    found = trace(model, texts, tmp_path / "t.duckdb", max_tokens=five, progress=False)
    assert (found.n_sequences, found.n_tokens) == (5, five)
    found = trace(model, texts, tmp_path / "u.duckdb", max_tokens=five + 1, progress=False)
    assert found.n_sequences == 6


def test_long_texts(model: Model, tmp_path: Path):
    source = from_rows(["short", "a text of thirty characters!!!"])
    with pytest.raises(InputError, match="rows:2: the text has 30 tokens"):
        trace(model, source, tmp_path / "t.duckdb", max_length=12, progress=False)
    assert not (tmp_path / "t.duckdb").exists()
    split = trace(model, source, tmp_path / "s.duckdb", max_length=12, long_texts="split", progress=False)
    assert split.sequences()["n_tokens"].tolist() == [5, 12, 12, 6]
    assert split.sequences()["split_part"].tolist()[1:] == [0, 1, 2]
    assert np.isnan(split.tokens()["nll"]).sum() == 4  # the first token of each piece
    cut = trace(model, source, tmp_path / "c.duckdb", max_length=12, long_texts="cut", progress=False)
    assert cut.sequences()["n_tokens"].tolist() == [5, 12]
    assert np.array_equal(cut.experts(2), split.experts(2)[: cut.n_tokens])


def test_special_tokens_are_template(tmp_path: Path):
    made = checkpoint.olmoe()
    made = load(made.module, tokenizer=checkpoint.tokenizer(end_behind=True))
    found = trace(made, from_rows(["ab", "c"]), tmp_path / "t.duckdb", progress=False)
    assert found.tokens()["phase"].tolist() == ["prompt", "prompt", "template", "prompt", "template"]
    assert found.tokens()["token_id"].to_numpy()[[2, 4]].tolist() == [checkpoint.END] * 2
    assert found.vocabulary()["text"].tolist()[0] == "<end>"


def test_chats_have_template_and_prompt(model: Model, tmp_path: Path):
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    found = trace(model, from_rows([{"messages": chat}]), tmp_path / "t.duckdb", progress=False)
    tokens = found.tokens()
    assert tokens["token_id"].tolist()[0] == checkpoint.USER and tokens["token_id"].tolist()[3] == checkpoint.ASSISTANT
    assert tokens["phase"].tolist() == ["template", "prompt", "prompt", "template", "prompt", "prompt"]


# Generation.


def test_generation_is_the_models_own(model: Model, few, tmp_path: Path):
    """Left-padded batches: every text continues as it does alone, and routes as one forward over text and answer."""
    n = 5
    found = trace(model, few, tmp_path / "t.duckdb", generate=n, batch_tokens=400, record="logits", progress=False)
    tokens, sequences = found.tokens(), found.sequences()
    experts = [found.experts(layer) for layer in range(found.n_layers)]
    logits = [found.logits(layer) for layer in range(found.n_layers)]
    for seq, at in enumerate(by_sequence(found)):
        ids, phase = tokens["token_id"].to_numpy()[at], tokens["phase"].to_numpy()[at]
        prompt = ids[phase == "prompt"]
        with torch.inference_mode():
            answer = model.module.generate(  # type: ignore[operator]
                torch.from_numpy(prompt.astype(np.int64))[None],
                max_new_tokens=n,
                do_sample=False,
                pad_token_id=checkpoint.PAD,
            )[0, len(prompt) :].tolist()
        if checkpoint.END in answer:
            answer = answer[: answer.index(checkpoint.END)]
        assert ids[phase == "generated"].tolist() == answer
        assert (sequences["n_prompt"][seq], sequences["n_tokens"][seq]) == (len(prompt), len(ids))
        alone = by_hand(model, ids)
        for layer in range(found.n_layers):
            assert np.array_equal(experts[layer][at], alone["experts"][layer])
            assert np.allclose(logits[layer][at], alone["logits"][layer], atol=1e-3)
        nll = tokens["nll"].to_numpy()[at]
        assert np.isnan(nll[: len(prompt)]).all()
        assert np.allclose(nll[len(prompt) :], alone["nll"][len(prompt) :], rtol=1e-3, atol=1e-3)


def test_a_sequence_ends_before_its_end_of_text(few, tmp_path: Path):
    made = checkpoint.olmoe()
    first = trace(made, few, tmp_path / "t.duckdb", generate=8, batch_tokens=400, progress=False)
    tokens = first.tokens()
    said = tokens[tokens["phase"] == "generated"]
    end = int(np.bincount(said["token_id"].tolist()).argmax())  # what this model says most ends a text from now on
    made.module.generation_config.eos_token_id = [end, checkpoint.END]  # type: ignore[union-attr]
    found = trace(made, few, tmp_path / "e.duckdb", generate=8, batch_tokens=400, progress=False)
    after = found.tokens()
    lengths = []
    for seq in range(found.n_sequences):
        full = said[said["seq"] == seq]["token_id"].tolist()
        mine = after[(after["seq"] == seq) & (after["phase"] == "generated")]["token_id"].tolist()
        assert mine == (full[: full.index(end)] if end in full else full)
        lengths.append(len(mine))
    assert min(lengths) < 8 and len(set(lengths)) > 1
    sequences = found.sequences()
    assert (sequences["n_tokens"] - sequences["n_prompt"]).tolist() == lengths


def test_a_batch_that_ends_at_once(model: Model, tmp_path: Path):
    made = checkpoint.olmoe()
    made.module.generation_config.eos_token_id = list(range(checkpoint.VOCABULARY))  # type: ignore[union-attr]
    found = trace(made, from_rows(["abc", "d"]), tmp_path / "t.duckdb", generate=5, progress=False)
    assert found.sequences()["n_tokens"].tolist() == [3, 1]


def test_chats_get_the_header_of_the_answer(model: Model, tmp_path: Path):
    chat = [{"role": "user", "content": "Hi"}]
    found = trace(model, from_rows([{"messages": chat}]), tmp_path / "t.duckdb", generate=2, progress=False)
    tokens = found.tokens()
    assert tokens["phase"].tolist()[:4] == ["template", "prompt", "prompt", "template"]
    assert tokens["token_id"].tolist()[3] == checkpoint.ASSISTANT
    assert set(tokens["phase"].tolist()[4:]) <= {"generated"}


def test_generation_resumes(model: Model, few, tmp_path: Path):
    options: dict[str, Any] = {"generate": 3, "batch_tokens": 100, "progress": False, "run": "g"}
    full = trace(model, few, tmp_path / "full.duckdb", **options)
    with pytest.raises(RunError):
        interrupted(model, few, tmp_path / "part.duckdb", after=3, **options)
    assert 0 < Trace(tmp_path / "part.duckdb").n_sequences < full.n_sequences
    assert_same_tables(full, trace(model, few, tmp_path / "part.duckdb", mode="resume", **options))


# Other kinds of model.


def test_encoder_decoder(tmp_path: Path):
    """Both stacks see the text; a token dropped for lack of capacity has no expert."""
    made = checkpoint.model("switch_transformers", expert_capacity=4)
    found = trace(
        made, from_rows(["abcdefghijklmnop" * 2, "abc"]), tmp_path / "t.duckdb", max_length=64, progress=False
    )
    assert set(found.layers["stack"]) == {"encoder", "decoder"}
    dropped = 0
    for layer in range(found.n_layers):
        experts, weights = found.experts(layer), found.weights(layer)
        assert experts.shape == (35, 1)
        none = experts == NO_EXPERT
        assert (weights[none] == 0).all() and (weights[~none] > 0).all()
        for at in by_sequence(found):  # no expert takes more than its capacity of a text
            taken = experts[at]
            assert (np.bincount(taken[taken != NO_EXPERT], minlength=8) <= 4).all()
        dropped += int(none.sum())
    assert dropped > 0
    empty = found.sql("SELECT count(*) AS n FROM routing WHERE len(experts) = 0")
    assert empty["n"].tolist() == [dropped]
    with pytest.raises(InputError, match="can't continue a text"):
        trace(made, from_rows(["abc"]), tmp_path / "g.duckdb", max_length=64, generate=2, progress=False)


@pytest.mark.parametrize("family", ["diffusion_gemma", "openai_privacy_filter", "switch_transformers"])
def test_models_that_predict_no_next_token_have_no_nll(family: str, tmp_path: Path):
    made = checkpoint.model(family)
    found = trace(made, from_rows(["abcdef", "gh"]), tmp_path / "t.duckdb", progress=False)
    assert np.isnan(found.tokens()["nll"]).all()
    assert found.experts(0).shape[0] == 8


# What is refused, with nothing written.


@pytest.mark.parametrize(
    "options, message",
    [
        ({"record": ["ids", "gates"]}, "can't record gates: choose from ids, weights"),
        ({"max_tokens": 0}, "max_tokens is 0: give at least 1"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 257}, "max_length 257 .* exceed the 256 positions"),
        ({"max_length": 250, "generate": 10}, "max_length 250 and 10 generated tokens exceed the 256 positions"),
        ({"generate": 256}, "generate is 256: .* has 256 positions"),
        ({"generate": -1}, "generate is -1"),
        ({"long_texts": "drop"}, "'drop'; expected 'refuse', 'split' or 'cut'"),
        ({"mode": "replace"}, "'replace': expected one of new, overwrite"),
        ({"mode": "append"}, "does not exist"),
    ],
)
def test_requests_that_cannot_be_met(options: dict[str, Any], message: str, model: Model, texts, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        trace(model, texts, tmp_path / "t.duckdb", progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_models_and_corpora_that_do_not_fit(model: Model, texts, tmp_path: Path):
    out = tmp_path / "t.duckdb"
    for made, corpus, message in [
        (load(model.module), texts, "has no tokenizer"),
        (checkpoint.model("olmoe", vocab_size=100), texts, r"token id \d+, but OlmoeForCausalLM knows 100 tokens"),
        (model, [], "no corpus"),
        (model, "no-such-corpus", "neither a bundled corpus nor a file"),
        (model, from_rows([]), "empty"),
        (model, from_rows(["good", " "]), "rows:2: 'text' is only white space"),
        ("no/such/folder", texts, "no such folder"),
    ]:
        with pytest.raises(InputError, match=message):
            trace(made, corpus, out, progress=False)
        assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_refused_before_anything_slow(whole: Trace):
    before = whole.path.read_bytes()
    with pytest.raises(InputError, match="exists. Replace it with --overwrite"):
        trace("no/such/model", "no-such-corpus", whole.path)
    assert whole.path.read_bytes() == before


def test_a_model_that_fails_leaves_what_was_committed(model: Model, texts, tmp_path: Path):
    out = tmp_path / "t.duckdb"
    with pytest.raises(RunError, match=r"failed on the batch of .* begins with text \d+: out of order. If memory"):
        interrupted(model, texts, out, after=2, batch_tokens=200, progress=False)
    kept = Trace(out)
    assert kept.runs()["status"].tolist() == ["failed"]
    assert 0 < kept.n_sequences < 24
    assert kept.experts(0).shape[0] == kept.n_tokens
    assert not [hook for layer in model.layers for hook in layer.router._forward_hooks]


def interrupted(model: Model, texts, out: Path, after: int, **options: Any) -> None:
    """A run whose model fails once `after` batches are through."""
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise RuntimeError("out of order\nand more")

    # Prefills only: the steps of a generation come one token at a time.
    hook = model.module.register_forward_pre_hook(
        lambda _m, _a, inputs: fail() if inputs["input_ids"].shape[1] > 1 or not options.get("generate") else None,
        with_kwargs=True,
    )
    try:
        trace(model, texts, out, **options)
    finally:
        hook.remove()


def test_resuming_runs_only_the_batches_that_are_missing(model: Model, texts, tmp_path: Path, monkeypatch):
    options: dict[str, Any] = {"batch_tokens": 200, "progress": False, "record": RECORDABLE}
    full = trace(model, texts, tmp_path / "full.duckdb", **options)
    n = len(list(tokenization.batches(tokenization.sequences(texts, model.tokenizer, max_length=256), 200)))
    part = tmp_path / "part.duckdb"
    with pytest.raises(RunError):
        interrupted(model, texts, part, after=2, **options)
    runs = []
    hook = model.module.register_forward_pre_hook(lambda *_: runs.append(1))
    resumed = trace(model, texts, part, mode="resume", **options)
    again = trace(model, texts, part, mode="resume", **options)  # nothing is left to do
    hook.remove()
    assert len(runs) == n - 2
    assert_same_tables(full, resumed)
    assert_same_tables(full, again)
    assert again.runs()["status"].tolist() == ["finished"]


@pytest.mark.parametrize(
    "change",
    [{"record": "entropy"}, {"batch_tokens": 300}, {"max_length": 200}, {"max_tokens": 50}, {"generate": 1}],
)
def test_another_request_does_not_resume(change: dict, model: Model, texts, tmp_path: Path):
    out = tmp_path / "t.duckdb"
    trace(model, texts, out, batch_tokens=200, progress=False)
    with pytest.raises(InputError, match="can't be resumed"):
        trace(model, texts, out, **({"mode": "resume", "batch_tokens": 200, "progress": False} | change))
    assert Trace(out).n_sequences == 24


def test_progress_is_told_and_can_stop_a_run(model: Model, few, tmp_path: Path):
    class Stopped(BaseException):
        pass

    told = []
    out = tmp_path / "t.duckdb"
    whole = trace(model, few, out, batch_tokens=60, progress=lambda *at: told.append(at))
    assert told[0] == (0, whole.n_tokens) and told[-1] == (whole.n_tokens, whole.n_tokens) and len(told) > 3
    assert [done for done, _ in told] == sorted({done for done, _ in told})

    def stop(done: int, total: int) -> None:
        if done >= total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        trace(model, few, out, batch_tokens=60, mode="overwrite", progress=stop)
    assert 0 < Trace(out).n_tokens < whole.n_tokens
    resumed = trace(model, few, out, batch_tokens=60, mode="resume", progress=lambda *at: told.append(at))
    assert resumed.n_tokens == whole.n_tokens and told[-1] == (whole.n_tokens, whole.n_tokens)
