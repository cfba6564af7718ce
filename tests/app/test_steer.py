"""The Steer page, run as a script: what its widgets do, what it says, what is in the link."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pages import begun, healthy
from streamlit.testing.v1 import AppTest

from workbench.generation import compare
from workbench.interventions import Ablate, Bias, Contrast, Delta, Force, Scale, SetTopK, TopP
from workbench.models import load
from workbench.recipe import from_json

PROMPT = "The treaty was signed"


@pytest.fixture
def page(monkeypatch) -> Iterator[AppTest]:
    """The page without a trace, with the bundled model."""
    monkeypatch.delenv("WORKBENCH_TRACE", raising=False)
    monkeypatch.setenv("WORKBENCH_MODEL", "demo")
    found = opened()
    yield found
    for one in found.session_state["steer_history"].values() if "steer_history" in found.session_state else ():
        one.stop()
        one.wait(30)


def opened(**query: str) -> AppTest:
    return healthy(begun("steer", **query).run())


def add(page: AppTest, kind: str, **values: Any) -> AppTest:
    """Build an edit by its widgets, and add it."""
    page.selectbox(key="steer_kind").set_value(kind).run()
    for name, value in values.items():
        if name in ("layers", "experts"):
            page.multiselect(key=f"steer_{name}").set_value(value)
        elif name == "scope":
            page.selectbox(key="steer_scope").set_value(value).run()
        elif name == "condition":
            what = page.selectbox(key="steer_scope").value
            page.text_input(key=f"steer_scope_{what}").set_value(value)
        elif name == "renormalise":
            page.toggle(key=f"steer_{kind}_{name}").set_value(value)
        elif isinstance(value, str):
            page.button_group(key=f"steer_{kind}_{name}").set_value(value).run()
        else:
            page.number_input(key=f"steer_{kind}_{name}").set_value(value)
    return healthy(page.button(key="steer_add").click().run())


def parameter(page: AppTest, name: str) -> str:
    """Of the URL."""
    value = page.query_params[name]
    return value if isinstance(value, str) else value[0]


def draft(page: AppTest) -> tuple[Any, ...]:
    return tuple(entry.intervention for entry in page.session_state["draft"])


def generate(page: AppTest, **settings: Any) -> AppTest:
    """Generate, and wait for it."""
    for name, value in settings.items():
        widget = page.toggle if isinstance(value, bool) else page.number_input
        widget(key=f"steer_{name}").set_value(value)
    healthy(page.button(key="steer_go").click().run())
    if "steer_history" in page.session_state:
        for one in page.session_state["steer_history"].values():
            assert one.wait(120)
    return healthy(page.run())


def last(page: AppTest) -> Any:
    return list(page.session_state["steer_history"].values())[-1]


def test_every_kind_is_built_by_its_widgets(page: AppTest):
    add(page, "Ablate", layers=[2, 1], experts=[5, 3])
    add(page, "Ablate", layers=[3], experts=[1], level="output", renormalise=True, scope="the prompt")
    add(page, "Force", layers=[], experts=[7], level="selection", margin=0.5, scope="generated tokens")
    add(page, "Bias", experts=[1, 2], strength=-0.5, unit="logits", scope="positions", condition="4-15")
    add(page, "Scale", experts=[4], factor=3.0, scope="a token", condition=' "the"')
    add(page, "SetTopK", layers=[0], k=2, first=3, scope="tokens by pattern", condition="[0-9]")
    add(page, "TopP", layers=[], p=0.4, at_most=3, scope="a condition", condition="phase=generated & text~<think>")
    add(page, "Contrast", alpha=0.2, beta=0.7, rank=3)
    assert draft(page) == (
        Ablate(layer=[1, 2], experts=[3, 5]),
        Ablate(layer=3, experts=[1], level="output", renormalise=True, scope="phase=prompt"),
        Force(experts=[7], level="selection", margin=0.5, scope="phase=generated"),
        Bias(experts=[1, 2], strength=-0.5, unit="logits", scope="position=4-15"),
        Scale(experts=[4], factor=3.0, scope='token=" \\"the\\""'),
        SetTopK(layer=0, k=2, first=3, scope="token~[0-9]"),
        TopP(p=0.4, at_most=3, scope="phase=generated & text~<think>"),
        Contrast(alpha=0.2, beta=0.7, weak=[SetTopK(k=1, first=3)]),
    )
    again = opened(steer_recipe=parameter(page, "steer_recipe"))
    assert draft(again) == draft(page)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"experts": []}, "no experts are chosen"),
        ({"experts": [1], "scope": "positions", "condition": "x"}, "position is"),
        ({"experts": [1], "scope": "positions"}, "is no condition"),
        ({"experts": [1], "scope": "tokens by pattern", "condition": "("}, "pattern"),
        ({"experts": [1], "scope": "a condition", "condition": "lang=de"}, "is no condition"),
    ],
)
def test_an_edit_that_cannot_be(page: AppTest, values: dict[str, Any], message: str):
    add(page, "Bias", **values)
    assert not draft(page) and message in page.warning[0].value.replace("\\", "")


def test_switching_off_removing_and_clearing(page: AppTest):
    for expert in (1, 2, 3):
        add(page, "Ablate", experts=[expert])
    numbers = [entry.number for entry in page.session_state["draft"]]
    page.toggle(key=f"steer_on_{numbers[0]}").set_value(False).run()
    link = json.loads(parameter(page, "steer_recipe"))
    assert link[0] == {"kind": "Ablate", "experts": [1], "on": False} and "on" not in link[1]
    assert [entry.on for entry in opened(steer_recipe=json.dumps(link)).session_state["draft"]] == [False, True, True]
    healthy(page.button(key=f"steer_remove_{numbers[1]}").click().run())
    assert draft(page) == (Ablate(experts=[1]), Ablate(experts=[3]))
    healthy(generate(page, max=2))
    assert last(page).recipe.interventions == (Ablate(experts=[3]),)
    healthy(page.button(key="steer_clear").click().run())
    assert not draft(page) and "steer_recipe" not in page.query_params


def test_texts_are_those_of_compare(page: AppTest):
    add(page, "Ablate", layers=[1, 2], experts=[1, 2, 3, 4, 5])
    settings = {"max_tokens": 6, "temperature": 0.8, "seed": 3}
    generate(page, max=6, temperature=0.8, seed=3, control=True)
    one = last(page)
    expected = compare(load("demo"), PROMPT, Ablate(layer=[1, 2], experts=[1, 2, 3, 4, 5]), control=3, **settings)
    assert {name: found.text for name, found in one.found.items()} == {
        name: found.text for name, found in expected.items()
    }
    said = [each.value for each in page.subheader]
    assert any(each.startswith("Next-token probabilities at token") for each in said)
    assert "Routing of the generated text" in said and not page.error and not page.warning
    assert "--recipe recipe.json --compare --control random" in page.code[0].value
    assert parameter(page, "steer_generated") == "1"


def test_the_model_is_loaded_once(page: AppTest, monkeypatch):
    generate(page, max=1)
    from workbench import models

    monkeypatch.setattr(models, "load", None)  # would fail now
    add(page, "Ablate", experts=[1])
    generate(page, max=2)
    add(page, "Bias", experts=[2])
    generate(page, max=2)
    assert last(page).found["steered"].touched and not page.error


def test_a_link_restores_and_generates(page: AppTest):
    page.text_area(key="steer_text").set_value("Once upon a time").run()
    add(page, "Force", layers=[2], experts=[9])
    generate(page, max=5, temperature=1.0, seed=7)
    page.session_state["steer_step"] = 2
    page.run()
    query = {name: parameter(page, name) for name in page.query_params}
    assert query["steer_prompt"] == "Once upon a time" and query["steer_step"] == "2"
    query |= {
        "steer_max": "5",
        "steer_temperature": "1.0",
        "steer_seed": "7",
    }  # as the browser has it
    other = opened(**query)
    assert last(other).wait(120)
    healthy(other.run())
    assert last(other).found["steered"].text == last(page).found["steered"].text
    assert last(other).prompt == "Once upon a time" and last(other).settings == last(page).settings
    assert "Next-token probabilities at token 2" in [each.value for each in other.subheader]


def test_a_link_to_another_model_does_not_load_it(page: AppTest):
    other = opened(steer_model="/no/such-model", steer_generated="1")
    assert "steer_history" not in other.session_state or not other.session_state["steer_history"]
    assert len(other.warning) == 1


HALF = r'[{"kind":"SetTopK","k":1,"scope":"token~\ud800"}]'


@pytest.mark.parametrize("link", ["[", "{}", "[1]", '[{"kind":"Nope"}]', '[{"kind":"Ablate"}]', "[]]", "<b>", HALF])
def test_a_link_with_a_broken_recipe(page: AppTest, link: str):
    other = opened(steer_recipe=link)
    assert len(other.warning) == 1 and not draft(other)


def test_a_recipe_too_long_for_the_link(page: AppTest):
    values = [{"kind": "Delta", "values": [0.1234567 * n for n in range(32)], "layer": layer} for layer in range(6)] * 3
    page.session_state["draft"] = []
    from workbench_app.draft import Entry

    page.session_state["draft"] = [
        Entry(at, Delta(values=one["values"], layer=one["layer"])) for at, one in enumerate(values)
    ]
    healthy(page.run())
    assert "steer_recipe" not in page.query_params
    assert any("too long for the link" in each.value for each in page.caption)


# errors


@pytest.mark.parametrize(
    "prompt, message",
    [("", "expected some text"), ("  \n", "expected some text"), ("word " * 40_000, "exceeds the 1,024")],
    ids=["empty", "blank", "long"],
)
def test_prompts_that_cannot_be_continued(page: AppTest, prompt: str, message: str):
    page.text_area(key="steer_text").set_value(prompt).run()
    generate(page, max=3)
    page.button(key="steer_go").click().run()
    assert message in page.warning[0].value.replace("\\", "") and not page.session_state["steer_history"]


def test_recipes_that_cannot_be_applied(page: AppTest):
    add(page, "Force", layers=[1], experts=[0, 1, 2, 3, 4])
    page.button(key="steer_go").click().run()
    assert "5 experts are forced at layer 1" in healthy(page).warning[0].value
    page.button(key="steer_clear").click().run()
    add(page, "TopP", p=0.4)
    page.toggle(key="steer_control").set_value(True)
    page.button(key="steer_go").click().run()
    assert "names experts" in healthy(page).warning[0].value


def test_a_recipe_that_touches_nothing(page: AppTest):
    add(page, "Ablate", experts=[1], scope="tokens by pattern", condition="zzzz")
    generate(page, max=3)
    assert "touched nothing" in page.error[0].value and len(last(page).found["plain"].steps) == 3


def test_a_model_that_there_is_not(page: AppTest):
    page.text_input(key="steer_model").set_value("/no/such/folder").run()
    assert "no such folder" in healthy(page).warning[0].value
    page.button(key="steer_go").click().run()
    assert "no such folder" in healthy(page).warning[-1].value


def test_hostile_text(page: AppTest):
    hostile = "<script>alert(1)</script> **[x](http://x)** \u202e\u200b $x$ 😀 :red[x]"
    page.text_area(key="steer_text").set_value(hostile).run()
    add(page, "Ablate", experts=[1], scope="a token", condition="<b>*x*")
    generate(page, max=2)
    page.text_area(key="steer_text").set_value("again").run()
    page.button(key="steer_clear").click().run()
    generate(page, max=2)
    assert "http" not in "".join(each.value for each in page.markdown)
    label = page.selectbox(key="steer_shown").options[-1]
    assert "\u202e" not in label and "\\u202e" in label


# stopping, history, files


def test_stop_keeps_what_was_written(page: AppTest):
    add(page, "Ablate", layers=[1], experts=[1, 2])
    page.number_input(key="steer_max").set_value(900)
    healthy(page.button(key="steer_go").click().run())
    assert page.button(key="steer_go").disabled and not page.button(key="steer_stop").disabled
    while not last(page).found["steered"].steps:
        assert last(page).running
    healthy(page.button(key="steer_stop").click().run())
    one = last(page)
    assert not one.running and one.found["steered"].ended == "stopped" and one.found["steered"].text
    assert len(one.found["plain"].steps) < 900 and not page.button(key="steer_go").disabled
    assert any("Next-token" in each.value for each in page.subheader)


def test_the_history(page: AppTest):
    for n in (2, 3):
        generate(page, max=n)
    assert [len(one.found["plain"].steps) for one in page.session_state["steer_history"].values()] == [2, 3]
    page.selectbox(key="steer_shown").set_value(1).run()
    assert len(healthy(page).selectbox(key="steer_shown").options) == 2
    from workbench_app.steered import KEPT

    for _ in range(KEPT):
        generate(page, max=1)
    assert len(page.session_state["steer_history"]) == KEPT and 1 not in page.session_state["steer_history"]


def upload(page: AppTest, name: str, content: bytes) -> AppTest:
    page.file_uploader[0].set_value((name, content, "application/json"))
    return healthy(page.run())


SAVED = {
    "recipe": None, "prompt": "x", "model": "demo", "max_tokens": 4, "temperature": 0.0, "seed": 0, "chat": False,
}  # fmt: skip


def test_opening_a_recipe(page: AppTest):
    file = {
        "format": "moe-workbench recipe", "version": 1,
        "interventions": [{"kind": "Delta", "layer": 1, "values": [0.5] * 32}, {"kind": "SetTopK", "k": 2}],
    }  # fmt: skip
    upload(page, "r.json", json.dumps(file).encode())
    assert draft(page) == from_json(file).interventions
    other = {**file, "model": {"name": "other", "family": "olmoe", "layers": [[8, 2]]}}
    for content, message in (
        (json.dumps(other).encode(), "the recipe is for other"),
        (b"\xff\xfe", "not JSON"),
        (b"{", "not JSON"),
        (rb'{"recipe": null, "prompt": "\ud800"}', "not JSON"),
        (json.dumps({**SAVED, "seed": 2**31}).encode(), "out of range"),
        (json.dumps({**SAVED, "max_tokens": float("inf")}).encode(), "has no usable"),
        (b"[]", "not a recipe"),
        (b'{"recipe": null, "prompt": "x"}', "has no usable"),
    ):
        upload(page, "bad.json", content)
        assert message in page.warning[0].value.replace("\\", "") and len(draft(page)) == 2
        page.run()
        assert not page.warning
