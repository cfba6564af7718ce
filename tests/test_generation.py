"""Generation against transformers' own, its texts against whole decodings, and what interventions do to it."""

from __future__ import annotations

from typing import Any

import checkpoint
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from workbench.contrast_decoding import contrasted
from workbench.errors import InputError, RunError
from workbench.generation import Generated, Step, _Writing, compare, first_difference, generate
from workbench.hooked import INTERVENED
from workbench.intervening import intervene
from workbench.interventions import Ablate, Bias, Contrast, Force, RandomExperts, SetTopK, TopP
from workbench.models import Model, load
from workbench.recipe import Recipe, write_recipe
from workbench.recorder import Recorder

PROMPT = "The treaty was signed"


@pytest.fixture(scope="module")
def demo() -> Model:
    torch.set_num_threads(1)
    return load("demo")


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return checkpoint.olmoe()


def ids_of(found: Generated) -> list[int]:
    return [step.token_id for step in found.steps]


def own(model: Model, ids: Any, n: int, **options: Any) -> list[int]:
    """What transformers' generate gives by itself."""
    given = torch.tensor([list(ids)])
    module: Any = model.module
    with torch.inference_mode():
        out = module.generate(input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=n, **options)
    return out[0, len(ids) :].tolist()


def logits(model: Model, ids: Any) -> torch.Tensor:
    """Next-token logits, float (vocabulary,), in one pass without a cache."""
    with torch.inference_mode():
        return model.module(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, -1]


# tokens


def test_greedy_is_what_transformers_generates(demo: Model):
    found = generate(demo, PROMPT, max_tokens=12)
    assert list(found.prompt) == demo.tokenizer(PROMPT)["input_ids"]
    assert ids_of(found) == own(demo, found.prompt, 12, do_sample=False) and found.ended == "length"
    assert found.text == demo.tokenizer.decode(ids_of(found)) and found.touched == ()
    assert ids_of(generate("demo", PROMPT, max_tokens=12)) == ids_of(found)


def test_drawn_tokens(demo: Model):
    def drawn(seed: int, temperature: float = 1.0) -> list[int]:
        return ids_of(generate(demo, PROMPT, max_tokens=10, temperature=temperature, seed=seed))

    state = torch.random.get_rng_state()
    first = drawn(3)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert drawn(3) == first and drawn(4) != first
    assert drawn(3, temperature=1e-4) == ids_of(generate(demo, PROMPT, max_tokens=10))
    z = logits(demo, demo.tokenizer(PROMPT)["input_ids"]).float()
    torch.manual_seed(3)
    assert drawn(3, temperature=1.7)[0] == int(torch.multinomial((z / 1.7).softmax(-1), 1))


def test_probabilities(demo: Model):
    for edits in (None, Bias(layer=2, experts=[1, 4], strength=2.0)):
        for temperature in (0.0, 0.7):
            found = generate(demo, PROMPT, edits, max_tokens=4, candidates=5, temperature=temperature)
            for at, step in enumerate(found.steps):
                read = [*found.prompt, *ids_of(found)[:at]]
                if edits is None:
                    p = logits(demo, read).float().softmax(-1)
                else:
                    with intervene(demo, edits):
                        p = logits(demo, read).float().softmax(-1)
                best = p.topk(5)
                assert step.probability == pytest.approx(float(p[step.token_id]), abs=1e-5)
                assert [each.token_id for each in step.candidates] == best.indices.tolist()
                assert [each.probability for each in step.candidates] == pytest.approx(best.values.tolist(), abs=1e-5)
                assert step.candidates[0].token == demo.tokenizer.decode([best.indices[0].item()])
    assert generate(demo, PROMPT, max_tokens=1).steps[0].candidates == ()
    many = generate(demo, PROMPT, max_tokens=1, candidates=10**6).steps[0].candidates
    assert sum(each.probability for each in many) == pytest.approx(1, abs=1e-3)


def test_candidates_of_ones_choice(demo: Model):
    seen: list[torch.Tensor] = []

    def rarest(p: torch.Tensor) -> torch.Tensor:
        seen.append(p)
        return p.argsort()[:3]

    edit = Bias(layer=2, experts=[1, 4], strength=2.0)
    found = generate(demo, PROMPT, edit, max_tokens=3, candidates=rarest)
    assert len(seen) == 3 and all(p.dtype == torch.float32 and float(p.sum()) == pytest.approx(1) for p in seen)
    for step, p in zip(found.steps, seen, strict=True):
        assert step.probability == float(p[step.token_id])
        assert [each.token_id for each in step.candidates] == p.argsort()[:3].tolist()
        assert [each.probability for each in step.candidates] == p.sort().values[:3].tolist()


def test_drawing_uses_no_random_numbers_of_the_process(demo: Model):
    """So that two generations in two threads don't disturb each other."""
    expected = generate(demo, PROMPT, max_tokens=6, temperature=1.0, seed=3)

    def draw(_step: Step) -> None:
        torch.rand(5)

    assert generate(demo, PROMPT, max_tokens=6, temperature=1.0, seed=3, on_step=draw) == expected


def test_routing(demo: Model):
    found = generate(demo, PROMPT, max_tokens=4, record={"weights", "entropy"})
    read = torch.tensor([[*found.prompt, *ids_of(found)[:-1]]])
    with torch.inference_mode(), Recorder(demo, {"weights", "entropy"}) as recorder:
        demo.module(input_ids=read, use_cache=False)
    (whole,) = recorder.take()
    n = len(found.prompt)
    for layer in demo.layers:
        seen = [step.routing[layer.index] for step in found.steps if step.routing]
        assert [each.experts.shape for each in seen] == [(n, layer.top_k)] + [(1, layer.top_k)] * 3
        together = torch.tensor([row for each in seen for row in each.experts.tolist()])
        assert torch.equal(together, whole[layer.index].experts[0])
        assert all(each.weights is not None and each.entropy is not None and each.logits is None for each in seen)
    assert generate(demo, PROMPT, max_tokens=1).steps[0].routing is None


# text


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=12), st.text(max_size=8))
def test_characters_appear_when_their_last_byte_has_come(before: str, text: str):
    tokenizer = checkpoint.tokenizer()
    prompt = tokenizer("x" + before)["input_ids"]
    ids = tokenizer(text)["input_ids"] if text else []
    writing = _Writing(tokenizer, prompt)
    pieces = [writing.add(each) for each in ids]
    expected = [piece for character in text for piece in (*[""] * (len(character.encode()) - 1), character)]
    if "\ufffd" not in text:  # which is taken for a broken byte until the next one comes
        assert pieces == expected
    assert "".join(pieces) + writing.rest() == text


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, checkpoint.VOCABULARY - 1), max_size=40))
def test_any_tokens_at_all_add_up_to_their_text(ids: list[int]):
    tokenizer = checkpoint.tokenizer()
    prompt = tokenizer("naïve")["input_ids"]
    writing = _Writing(tokenizer, prompt)
    text = "".join([*map(writing.add, ids), writing.rest()])
    assert text == tokenizer.decode([*prompt, *ids], clean_up_tokenization_spaces=False)[len("naïve") :]
    assert writing.rest() == ""


def test_spaces_that_a_token_alone_would_lose():
    words = ["▁the", "▁cat", "s", "▁sat"]
    made = Tokenizer(models.BPE({"<unk>": 0} | {word: at for at, word in enumerate(words, 1)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    writing = _Writing(tokenizer, [1])
    assert [writing.add(each) for each in (2, 3, 4)] == [" cat", "s", " sat"]


def test_text_of_a_model_that_writes_broken_bytes(model: Model):
    for seed in range(3):
        found = generate(model, "abc", max_tokens=30, temperature=3.0, seed=seed)
        ids = ids_of(found)[: -1 if found.ended == "end" else None]
        assert found.text == "".join(step.text for step in found.steps)
        assert "abc" + found.text == model.tokenizer.decode([*found.prompt, *ids], clean_up_tokenization_spaces=False)


# how it ends


def test_ends(demo: Model, monkeypatch):
    whole = generate(demo, PROMPT, max_tokens=8)
    end = ids_of(whole)[4]
    at = ids_of(whole).index(end)
    for one_or_more in (end, [end, 1]):
        monkeypatch.setattr(demo.module.generation_config, "eos_token_id", one_or_more)
        found = generate(demo, PROMPT, max_tokens=8)
        assert found.ended == "end" and ids_of(found) == ids_of(whole)[: at + 1]
        assert found.steps[-1].text == "" and found.steps[-1].token
        assert found.text == demo.tokenizer.decode(ids_of(whole)[:at])
    monkeypatch.setattr(demo.module.generation_config, "eos_token_id", None)
    assert generate(demo, PROMPT, max_tokens=8).ended == "length"


def test_stopping(demo: Model):
    seen: list[Step] = []

    def stop(step: Step) -> bool:
        seen.append(step)
        return len(seen) == 3

    late = Ablate(layer=0, experts=[0], scope="position=200+")  # has touched nothing by then
    found = generate(demo, PROMPT, late, max_tokens=20, on_step=stop)
    assert found.ended == "stopped" and list(found.steps) == seen and len(seen) == 3 and found.touched == (0,)
    assert demo.module not in INTERVENED


def test_what_on_step_raises_is_passed_on_and_the_model_is_as_before(demo: Model):
    before = logits(demo, [5, 6, 7])

    def fail(_step: Step) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        generate(demo, PROMPT, Bias(experts=[1], strength=5.0), max_tokens=5, on_step=fail, record=("weights",))
    assert demo.module not in INTERVENED
    assert torch.equal(logits(demo, [5, 6, 7]), before)


def test_a_model_that_fails(demo: Model, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("not enough memory\nframe #0")

    monkeypatch.setattr(demo.module, "forward", fail)
    with pytest.raises(RunError, match="broke off after 0 tokens: not enough memory$"):
        generate(demo, PROMPT, max_tokens=3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_make_no_probabilities(value: float, model: Model):
    """After two tokens all logits, or for infinity a single one."""
    steps: list[Step] = []

    def spoil(_module: Any, _given: Any, out: Any) -> None:
        if len(steps) == 2:
            out.logits[..., slice(1) if value == torch.inf else slice(None)] = value

    handle = model.module.register_forward_hook(spoil)
    try:
        for temperature in (0.0, 1.0):
            steps.clear()
            with pytest.raises(RunError, match="the logits are NaN or infinite after 2 tokens: take a weaker edit"):
                generate(model, "ab", max_tokens=5, temperature=temperature, seed=3, on_step=steps.append)
    finally:
        handle.remove()


# interventions


@pytest.mark.parametrize(
    "edits",
    [
        Ablate(layer=range(1, 4), experts=[0, 1, 2, 3]),
        [Bias(experts=[3], strength=1.0), Force(layer=2, experts=[9], scope="phase=generated")],
        SetTopK(k=1),
        TopP(p=0.3),
        RandomExperts(edit=Ablate(layer=3, experts=[1, 2]), seed=4),
        Ablate(experts=[7], level="output", scope="phase=prompt"),
    ],
)
def test_steered_is_transformers_generate_inside_intervene(edits: Any, demo: Model):
    found = generate(demo, PROMPT, edits, max_tokens=8)
    with intervene(demo, edits) as applied:
        expected = own(demo, found.prompt, 8, do_sample=False)
    assert ids_of(found) == expected
    assert list(found.touched) == applied.touched and all(found.touched)
    assert ids_of(generate(demo, PROMPT, max_tokens=8)) == own(demo, found.prompt, 8, do_sample=False)


def test_scopes_of_phases(demo: Model):
    def experts(scope: str) -> list[set[int]]:
        edit = Ablate(layer=2, experts=range(16), scope=scope)
        found = generate(demo, PROMPT, edit, max_tokens=6, record=())
        return [set(step.routing[2].experts.flatten().tolist()) for step in found.steps if step.routing]

    lower = set(range(16))
    prompt, *generated = experts("phase=prompt")
    assert not prompt & lower and set.union(*generated) & lower
    prompt, *generated = experts("phase=generated")
    assert prompt & lower and not any(each & lower for each in generated)
    assert not any(each & lower for each in experts("all"))


def test_more_experts_are_in_the_record(demo: Model):
    found = generate(demo, PROMPT, SetTopK(layer=1, k=7), max_tokens=3, record=("weights",))
    assert [layer.experts.shape[1] for layer in found.steps[0].routing or ()] == [4, 7, 4, 4, 4, 4]


def test_contrast(demo: Model):
    found = generate(demo, PROMPT, Contrast(beta=0.7, alpha=0.05), max_tokens=3, candidates=2, record=("weights",))
    for at, step in enumerate(found.steps):
        read = [*found.prompt, *ids_of(found)[:at]]
        strong = logits(demo, read)
        with intervene(demo, SetTopK(k=1, first=2)):
            weak = logits(demo, read)
        z = contrasted(strong, weak, 0.05, 0.7).float()
        assert step.token_id == int(z.argmax())
        assert step.probability == pytest.approx(float(z.softmax(-1).max()), abs=1e-4)
        assert step.routing is not None and step.routing[0].experts.shape[1] == 4  # the strong pass's


def test_an_intervention_that_touches_nothing(demo: Model):
    with pytest.raises(RunError, match="touched nothing"):
        generate(demo, PROMPT, Ablate(experts=[1], scope="text~zzzz"), max_tokens=2)
    with pytest.raises(RunError, match="touched nothing"):  # the only token that comes is never read
        generate(demo, PROMPT, Ablate(experts=[1], scope="phase=generated"), max_tokens=1)


def test_a_recipe_and_its_file(demo: Model, tmp_path):
    edits = (Ablate(layer=range(6), experts=[0, 1, 2, 3]),)
    write_recipe(Recipe(edits), tmp_path / "r.json")
    expected = ids_of(generate(demo, PROMPT, edits, max_tokens=6))
    for given_as in (Recipe(edits), tmp_path / "r.json", str(tmp_path / "r.json"), edits[0], list(edits)):
        assert ids_of(generate(demo, PROMPT, given_as, max_tokens=6)) == expected
    other = {"name": "other", "family": "olmoe", "layers": [[32, 4]] * 6}
    with pytest.raises(InputError, match="the recipe is for other"):
        generate(demo, PROMPT, Recipe(edits, other), max_tokens=6)
    with pytest.raises(InputError, match="no interventions"):
        generate(demo, PROMPT, (), max_tokens=6)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "jamba", "granitemoehybrid", "qwen3_next", "llama4"])
def test_families(family: str):
    made = checkpoint.model(family)
    edit = Ablate(experts=[0], level="output") if made.layers[0].top_k == 1 else Ablate(experts=[0])
    plain = generate(made, "abcdef", max_tokens=5, record=())
    assert ids_of(plain) == own(made, plain.prompt, 5, do_sample=False)[: len(plain.steps)]
    found = generate(made, "abcdef", edit, max_tokens=5, record=())
    assert not any((layer.experts == 0).any() for step in found.steps for layer in step.routing or ())


# prompts


def test_chats(model: Model):
    tokenizer = model.tokenizer
    messages = [{"role": "user", "content": "hello"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(generate(model, "hello", chat=True, max_tokens=1).prompt) == expected
    assert list(generate(model, messages, max_tokens=1).prompt) == expected
    assert list(generate(model, "hello", max_tokens=1).prompt) == tokenizer("hello")["input_ids"]


def test_a_tokenizer_that_ends_every_text():
    made = load(checkpoint.olmoe().module, tokenizer=checkpoint.tokenizer(end_behind=True))
    assert made.tokenizer("ab")["input_ids"][-1] == checkpoint.END
    assert generate(made, "ab", max_tokens=1).prompt == tuple(made.tokenizer("ab")["input_ids"][:-1])


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ("", {}, "the prompt is ''; expected some text"),
        (" \n", {}, "expected some text"),
        ([], {}, "messages"),
        ("x" * 300, {}, "the prompt has 300 tokens, which with 64 more exceeds the 256 positions"),
        ("x" * 250, {"max_tokens": 7}, "250 tokens, which with 7 more exceeds the 256"),
        ("x", {"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
        ("x", {"temperature": -1}, "temperature is -1; expected 0"),
        ("x", {"temperature": float("nan")}, "temperature is nan"),
        ("x", {"candidates": -1}, "candidates is -1"),
        ("x", {"seed": -1}, "seed is -1; expected 0 or more."),
        ("x", {"record": ["planets"]}, "can't record planets"),
        ("x", {"interventions": Ablate(layer=9, experts=[1])}, "layer 9"),
        ("x", {"interventions": Ablate(experts=[8])}, "8"),
        ("x", {"interventions": "no-such-recipe.json"}, "no-such-recipe.json: can't be read"),
    ],
)
def test_bad_input(prompt: Any, options: dict[str, Any], message: str, model: Model):
    with pytest.raises(InputError, match=message.replace("(", r"\(")):
        generate(model, prompt, **options)
    assert model.module not in INTERVENED


def test_the_longest_prompt_there_is_room_for(model: Model):
    assert len(generate(model, "x" * 250, max_tokens=6).prompt) == 250


def test_models_that_cannot_continue_a_text():
    mute = load(tiny.module("olmoe"))
    with pytest.raises(InputError, match="has no tokenizer"):
        generate(mute, "x")
    with pytest.raises(InputError, match="switch_transformers can't continue a text"):
        generate(checkpoint.model("switch_transformers"), "x")
    small = load(tiny.module("olmoe", vocab_size=50), tokenizer=checkpoint.tokenizer())
    with pytest.raises(InputError, match="knows 50 tokens"):
        generate(small, "xyz", max_tokens=1)
    plain = checkpoint.olmoe()
    plain.tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        generate(plain, "x", chat=True)


# comparisons


def test_compare(demo: Model):
    edits = [Ablate(layer=3, experts=[1, 2, 3]), SetTopK(layer=0, k=3)]
    found = compare(demo, PROMPT, edits, control=5, max_tokens=5)
    assert list(found) == ["plain", "steered", "control"]
    drawn = [RandomExperts(edit=edits[0], seed=5), edits[1]]
    for name, each in {"plain": None, "steered": edits, "control": drawn}.items():
        assert found[name] == generate(demo, PROMPT, each, max_tokens=5)
    assert list(compare(demo, PROMPT, edits, max_tokens=1)) == ["plain", "steered"]
    with pytest.raises(InputError, match="names experts"):
        compare(demo, PROMPT, SetTopK(k=2), control=1)
    with pytest.raises(InputError, match="seed is -1; expected 0 or more"):
        compare(demo, PROMPT, edits, control=-1)


@pytest.mark.parametrize(
    "one, other, place",
    [([], [], None), ([1], [], 0), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1, 2, 3], 2), ([4], [5], 0)],
)
def test_first_difference(one: list[int], other: list[int], place: int | None):
    def made(ids: list[int]) -> Generated:
        return Generated((), tuple(Step(each, "t", "t", 0.5) for each in ids), "", "length")

    assert first_difference(made(one), made(other)) == first_difference(made(other), made(one)) == place
