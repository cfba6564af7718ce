"""What is predicted: columns, classes of tokens, positions, losses; and the control labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from routed import full_trace

from workbench.errors import InputError
from workbench.tracefile import Trace
from workbench_probes.controls import control_values
from workbench_probes.keywords import KEYWORDS, is_keyword
from workbench_probes.targets import KEYWORD, Target, next_loss, quantile_classes, target

WORDS = {0: " for", 1: "ing", 2: " 12", 3: "==", 4: "\n", 5: " house", 6: "<0x0A>"}


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    rows = pd.DataFrame({"lang": ["de", None, "en"], "domain": ["code-c", "fiction", None], "score": [1.5, 2.5, 1.5]})
    seq = np.repeat([0, 1, 2], [4, 3, 2])
    ids = [0, 1, 2, 3, 0, 4, 5, 6, 0]
    nll = [np.nan, 1, 2, 3, np.nan, 4, 5, np.nan, 7]
    experts = np.zeros((9, 1, 1), int)
    return full_trace(
        tmp_path / "t.duckdb", experts, n_experts=2, seq=seq, sequences=rows, token_ids=ids, nll=nll, vocabulary=WORDS
    )


def named(found: Target) -> list[str]:
    return [found.labels[at] for at in found.value]


def test_columns(trace: Trace):
    of_sequences = target(trace, "lang")
    assert (of_sequences.unit, of_sequences.row.tolist(), named(of_sequences)) == ("sequence", [0, 2], ["de", "en"])
    of_tokens = target(trace, "lang", unit="token")
    assert of_tokens.row.tolist() == [0, 1, 2, 3, 7, 8] and named(of_tokens) == ["de"] * 4 + ["en"] * 2
    assert named(target(trace, "score")) == ["1.5", "2.5", "1.5"]  # few different numbers are labels


def test_classes_of_tokens(trace: Trace):
    found = target(trace, "token_class")
    assert found.unit == "token"
    assert named(found) == [
        KEYWORD, "word part", "digit", "punctuation", "word start", "whitespace", "word start", "byte", "word start",
    ]  # fmt: skip
    assert named(target(trace, "token class")) == named(found)


def test_keywords():
    assert all(is_keyword(f" {word}", f"code-{language}") for language, words in KEYWORDS.items() for word in words)
    assert not is_keyword("for", None) and not is_keyword("for", "c") and not is_keyword("for", "code-cobol")


def test_positions(trace: Trace):
    found = target(trace, "position")
    assert named(found) == ["0", "1–3", "1–3", "1–3", "0", "1–3", "1–3", "0", "1–3"]


def test_the_loss_is_that_of_the_next_token(trace: Trace):
    np.testing.assert_array_equal(next_loss(trace), [1, 2, 3, np.nan, 4, 5, np.nan, 7, np.nan])
    found = target(trace, "loss")
    assert found.numeric and found.row.tolist() == [0, 1, 2, 4, 5, 7] and found.value.tolist() == [1, 2, 3, 4, 5, 7]
    assert target(trace, "loss", unit="sequence").value.tolist() == [2, 4.5, 7]
    halves = target(trace, "loss", classes=2)
    assert named(halves) == ["≤ 3.5"] * 3 + ["> 3.5"] * 3


@given(st.lists(st.integers(0, 50), min_size=12, max_size=40, unique=True), st.integers(2, 4))
def test_quantile_classes_keep_the_order_and_are_even(values: list[int], classes: int):
    given_values = np.array(values, float)
    found = quantile_classes(Target("x", "token", np.arange(len(values)), given_values, []), classes)
    assert (np.diff(found.value[np.argsort(given_values)]) >= 0).all()
    sizes = np.bincount(found.value, minlength=classes)
    assert len(found.labels) == classes and sizes.max() - sizes.min() <= 1 + (len(values) % classes > 0)


def test_names_of_quantile_classes_differ():
    times = 1_700_000_000.0 + 7 * np.arange(40)
    found = quantile_classes(Target("time", "sequence", np.arange(40), times, []), 4)
    assert len(set(found.labels)) == 4 and found.labels[0] == "≤ 1.70000007e+09"
    near = 1 + np.arange(8) * 2.0**-52
    assert len(set(quantile_classes(Target("x", "sequence", np.arange(8), near, []), 4).labels)) == 4


def test_only_the_whole_name_is_token_class(tmp_path: Path):
    rows = pd.DataFrame({"my token class": ["x", "y"]})
    made = full_trace(tmp_path / "t.duckdb", np.zeros((2, 1, 1), int), n_experts=1, seq=[0, 1], sequences=rows)
    assert named(target(made, "my token class")) == ["x", "y"]


def test_what_cant_be_predicted(trace: Trace, tmp_path: Path):
    for wanted, options, said in [
        ("topic", {}, "no 'topic'.*token_class and loss"),
        ("position", {"unit": "sequence"}, "property of tokens"),
        ("lang", {"unit": "word"}, "expected one of token, sequence"),
        ("lang", {"classes": 3}, "has classes already"),
        ("loss", {"classes": 1}, "classes is 1"),
    ]:
        with pytest.raises(InputError, match=said):
            target(trace, wanted, **options)
    with pytest.raises(InputError, match="too many equal values"):
        quantile_classes(Target("x", "token", np.arange(4), np.ones(4), []), 2)
    bare = full_trace(
        tmp_path / "bare.duckdb", np.zeros((2, 1, 1), int), n_experts=1, seq=[0, 0], sequences=pd.DataFrame([{}]),
        vocabulary={}, token_ids=[-1, -1],
    )  # fmt: skip
    with pytest.raises(InputError, match="no vocabulary"):
        target(bare, "token_class")
    with pytest.raises(InputError, match="no token of this trace has a known 'loss'"):
        target(bare, "loss")


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40), st.integers(0, 9))
def test_a_kind_has_one_control_label_from_those_there_are(rows: list[tuple[int, int]], seed: int):
    kind, value = (np.array(column) for column in zip(*rows, strict=True))
    control = control_values(value, kind, seed)
    assert set(control) <= set(value) and len(control) == len(value)
    assert all(len(set(control[kind == one])) == 1 for one in kind)
    assert (control == control_values(value, kind, seed)).all()


def test_control_labels_are_as_frequent_as_the_labels_and_know_nothing_of_them():
    value = np.repeat([0, 1], [3000, 1000])
    control = control_values(value, np.arange(4000), 1)
    assert abs(control.mean() - 0.25) < 0.03
    assert abs(np.corrcoef(value, control)[0, 1]) < 0.05
