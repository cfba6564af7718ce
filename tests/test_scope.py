"""Scopes: which tokens of a pass they mean, by hand, by text, and the same in one pass as step by step."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import scope
from workbench.errors import InputError
from workbench.models import load


@cache
def tokenizer() -> Any:
    return load("demo").tokenizer


def whole(ids: torch.Tensor, real: torch.Tensor | None = None, prompt: int | None = None) -> scope.Pass:
    """A pass over whole texts."""
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    return scope.Pass((ids.shape[0], ids.shape[1]), 0, ids.shape[1] if prompt is None else prompt, ids, ids, real)


def meant(text: str, now: scope.Pass) -> list[list[bool]]:
    found = scope.where(text, now, tokenizer())
    assert found is not None and found.dtype == torch.bool
    return found.view(now.shape).tolist()


def encoded(text: str) -> torch.Tensor:
    return torch.tensor([tokenizer()(text, add_special_tokens=False)["input_ids"]])


def test_all_is_no_mask() -> None:
    assert scope.where("all", whole(torch.zeros(2, 3, dtype=torch.int64)), None) is None


def test_positions_and_phases_count_without_padding_on_either_side() -> None:
    ids = torch.full((2, 4), 5)
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    now = whole(ids, left)
    assert meant("position=0", now) == [[False, False, True, False], [True, False, False, False]]
    assert meant("position=1+", now) == [[False, False, False, True], [False, True, True, True]]
    assert meant("position=0,3", now) == [[False, False, True, False], [True, False, False, True]]
    assert meant("position=1-2", whole(ids, left.flip(1))) == [[False, True, False, False], [False, True, True, False]]
    assert meant("phase=prompt", now) == left.tolist()
    generated = scope.Pass(
        (2, 1), 4, 4, ids[:, :1], ids[:, :1].expand(2, 5), torch.cat([left, torch.ones(2, 1).bool()], 1)
    )
    assert meant("phase=generated", generated) == [[True], [True]]
    assert meant("phase=prompt", generated) == [[False], [False]]
    assert meant("position=2", generated) == [[True], [False]]
    assert meant("phase=generated & position=2", generated) == [[True], [False]]
    assert meant("phase=generated", whole(ids, prompt=3)) == [[False, False, False, True]] * 2


def test_tokens_by_their_text() -> None:
    ids = encoded("the 12 cats and the 7 dogs")
    texts = [tokenizer().decode([token]) for token in ids[0].tolist()]
    assert meant('token=" the"', whole(ids))[0] == [text == " the" for text in texts]
    assert meant("token~[0-9]", whole(ids))[0] == [any(c.isdigit() for c in text) for text in texts]


def test_text_so_far_by_brute_force() -> None:
    text = "we <think> that 1 + 1 = 2 </think> is true"
    ids = encoded(text)
    texts = [tokenizer().decode([token]) for token in ids[0].tolist()]
    ends = [len("".join(texts[: place + 1])) for place in range(len(texts))]
    for pattern in ("<think>", "(?s)<think>.*", r"(?s)<think>(?!.*</think>).*", "[0-9] \\+", "t"):
        import re

        wanted = [
            any(begin < match.end() <= end for match in re.finditer(pattern, "".join(texts)[:end]))
            for begin, end in zip([0, *ends], ends, strict=False)
        ]
        assert meant(f"text~{pattern}", whole(ids))[0] == wanted, pattern
    assert any(meant("text~<think>", whole(ids))[0])


@settings(max_examples=40, deadline=None)
@given(
    st.text(alphabet="ab <>éß漢字😀٣\n", max_size=24),
    st.sampled_from(["(?s).+", "a", "(?s)<.*", "[漢😀]", "é|b", "token~.", "position=1-3", "phase=prompt"]),
    st.integers(0, 3),
)
def test_a_text_is_treated_alike_in_one_pass_and_step_by_step(text: str, pattern: str, padding: int) -> None:
    condition = pattern if "=" in pattern or pattern.startswith("token") else f"text~{pattern}"
    ids = encoded(text + "x")
    ids = torch.cat([torch.zeros(1, padding, dtype=ids.dtype), ids], 1)
    real = torch.ones_like(ids).bool()
    real[:, :padding] = False
    at_once = meant(condition, whole(ids, real))[0]
    steps = [
        meant(condition, scope.Pass((1, 1), end - 1, ids.shape[1], ids[:, end - 1 : end], ids[:, :end], real[:, :end]))[
            0
        ][0]
        for end in range(1, ids.shape[1] + 1)
    ]
    assert at_once == steps


def test_a_character_of_several_tokens_belongs_to_the_last_of_them() -> None:
    ids = encoded("😀")
    assert ids.shape[1] > 1
    assert meant("text~😀", whole(ids))[0] == [False] * (ids.shape[1] - 1) + [True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lang=de", "'lang=de' is no condition"),
        ("", "is no condition"),
        ("phase=template", "a running model knows prompt and generated"),
        ("phase~x", "write phase="),
        ("text=x", "write text~"),
        ("position=a", "expected a number"),
        ("position=3-", "expected a number"),
        ("token~(", "not a regular expression"),
        ("text~", "has no pattern"),
        ('token="a', "not a quoted value|is missing"),
    ],
)
def test_what_is_no_scope_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        scope.check(text, tokenizer())


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        ("all", "phase=prompt", False),
        ("phase=prompt", "phase=generated", True),
        ("phase=prompt", "position=3", False),
        ("position=0-3", "position=4+", True),
        ("position=0-4", "position=4+ & token~a", False),
        ("token~a", "token~b", False),
    ],
)
def test_scopes_are_apart_only_where_that_is_sure(one: str, other: str, apart: bool) -> None:
    assert scope.apart(one, other) == scope.apart(other, one) == apart


def test_scopes_of_generated_tokens_alone_are_known() -> None:
    assert scope.generated_only("phase=generated") and scope.generated_only("position=3+ & phase=generated")
    assert not any(map(scope.generated_only, ("all", "phase=prompt", "phase=prompt,generated", "position=3")))


def test_a_scope_about_text_needs_a_tokenizer_and_token_ids() -> None:
    with pytest.raises(InputError, match="has no tokenizer"):
        scope.check("phase=prompt & token~a", None)
    scope.check("phase=prompt", None)
    now = scope.Pass((1, 2), 0, 2, None, None, torch.ones(1, 2).bool())
    with pytest.raises(InputError, match="given embeddings"):
        scope.where("token~a", now, tokenizer())
