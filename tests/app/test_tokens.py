"""The Tokens page, run as a script: which text it shows, what its tokens are coloured by, what is in the link."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import routed
from pages import healthy, opened, said
from streamlit.testing.v1 import AppTest

from workbench import reading, text_search
from workbench.tracefile import Trace
from workbench_app import view

HOSTILE = {
    0: "<script>alert(1)</script>", 1: "مرحبا", 2: "\u202e", 3: "\u200b", 4: "😀", 5: "**b** [l](x) $x$", 6: "=1+1",
    7: "Ã", 8: "<0xE2>",
}  # fmt: skip


def sent(page: AppTest) -> dict[str, Any]:
    """What the component with the tokens got."""
    (found,) = [one for one in page.get("bidi_component") if one.proto.component_name == "workbench_token_text"]
    return json.loads(found.proto.json)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Two runs of texts that no page should believe, the second of other experts; one text was split in three."""
    path = tmp_path_factory.mktemp("hostile") / "hostile.duckdb"
    random = np.random.default_rng(0)
    ids = [*HOSTILE, *HOSTILE, 0, 1, 2, -1]
    seq = [0] * 9 + [1] * 3 + [2] * 3 + [3] * 3 + [5] * 4
    rows = pd.DataFrame(
        {"lang": ["ar", "en", "en", "en", "x", "x"], "domain": ["<b>bold</b>"] * 6, "note": list("aabbcc"),
         "split_row": [np.nan, 1, 1, 1, np.nan, np.nan]}
    ).astype({"split_row": object}).where(lambda frame: frame.notna(), None)  # fmt: skip
    for run, mode in (("first", "new"), ("second", "append")):
        experts = np.stack([[random.permutation(300)[:3] for _ in range(2)] for _ in seq])
        experts[4] = -1
        routed.full_trace(
            path, experts, n_experts=300, seq=seq, sequences=rows, token_ids=ids, vocabulary=HOSTILE, run=run,
            mode=mode, weights=np.where(experts < 0, 0, random.random(experts.shape)).astype(np.float32),
            entropy=random.random((2, len(seq))).astype(np.float32), nll=random.random(len(seq)),
        )  # fmt: skip
    return path


def test_shows_the_first_text_that_is_found(monkeypatch, demo_trace: Path):
    page = opened(monkeypatch, demo_trace, "tokens")
    text = reading.read(Trace(demo_trace), 0)
    got = sent(page)
    assert got["ids"] == text.token_ids.tolist() and got["pin"] is None and got["total"] == len(text)
    index = text_search.texts(Trace(demo_trace))
    page.text_input(key="tokens_search").set_value("freedom").run()
    _, seqs = text_search.search(index, "freedom")
    assert sent(page)["ids"] == reading.read(Trace(demo_trace), seqs[0]).token_ids.tolist()
    page.selectbox(key="tokens_lang").set_value("de").run()
    assert "No text meets the search" in said(healthy(page))
    page.text_input(key="tokens_search").set_value("und").run()
    _, seqs = text_search.search(index, "und", lang="de")
    assert sent(page)["ids"] == reading.read(Trace(demo_trace), seqs[0]).token_ids.tolist()
    page.button(key="tokens_Next").click().run()
    assert sent(healthy(page))["ids"] == reading.read(Trace(demo_trace), seqs[1]).token_ids.tolist()


def test_the_link_restores_the_view(monkeypatch, demo_trace: Path):
    query = {
        "tokens_seq": "3", "tokens_colour": "entropy", "tokens_layer": "2", "tokens_pin": "4", "tokens_numbers": "true",
        "tokens_detail": "Data of the text", "tokens_search": "e",
    }  # fmt: skip
    page = opened(monkeypatch, demo_trace, "tokens", **query)
    text = reading.read(Trace(demo_trace), 3)
    got = sent(page)
    assert got["ids"] == text.token_ids.tolist()
    assert (got["pin"], got["layer"]) == (4, 2) and "entropy" in got["title"]
    assert got["numbers"][1] == f"{text.entropy[2, 1]:.2g}"
    assert page.text_input(key="tokens_search").value == "e"
    table = page.dataframe[-1].value
    assert len(table) == len(text) and "expert_0" in table


@pytest.mark.parametrize(
    ("query", "said_"),
    [
        ({"tokens_seq": "99999"}, "has no sequence 99999"),
        ({"tokens_seq": "abc", "tokens_layer": "77", "tokens_colour": "<script>", "tokens_pin": "-4"}, ""),
        ({"tokens_pin": "100000", "tokens_part": "900", "tokens_only": "x"}, ""),
        ({"tokens_seq": "1e400", "tokens_pin": "inf", "tokens_part": "9" * 5000, "tokens_only": "²"}, ""),
        ({"tokens_from": "", "tokens_detail": "", "tokens_colour": ""}, ""),
    ],
)
def test_a_wrong_link_is_a_message_or_ignored(monkeypatch, demo_trace: Path, query: dict[str, str], said_: str):
    page = opened(monkeypatch, demo_trace, "tokens", **query)
    assert said_.replace(" ", "") in said(page).replace("\\", "").replace(" ", "")


def test_every_colouring(monkeypatch, hostile: Path):
    page = opened(monkeypatch, hostile, "tokens", run="first", tokens_seq="0")
    trace = Trace(hostile, "first")
    assert page.selectbox(key="tokens_colour").options == ["expert", "entropy", "nll", "agreement"]
    page.selectbox(key="tokens_layer").set_value("1").run()
    page.selectbox(key="tokens_rank").set_value(2).run()
    chosen = trace.experts(1)[:9, 2].tolist()
    assert sent(page)["experts_shown"] == [None if expert == 65535 else expert for expert in chosen]
    assert {expert for expert, *_ in sent(page)["legend"]["experts"]} == set(chosen) - {65535}
    assert sent(page)["legend"]["none"] == 1
    for colour in ("entropy", "nll", "agreement"):
        page.selectbox(key="tokens_colour").set_value(colour).run()
        got = sent(healthy(page))
        assert got["experts_shown"] is None and "low" in got["legend"]
    assert (got["legend"]["low"], got["legend"]["high"]) == ("0", "1")
    page.selectbox(key="tokens_colour").set_value("expert").run()
    assert sent(healthy(page))["experts_shown"] is not None


def test_hostile_tokens_are_sent_as_visible_text(monkeypatch, hostile: Path):
    got = sent(opened(monkeypatch, hostile, "tokens", run="first", tokens_seq="0"))
    assert got["texts"] == [
        "<script>alert(1)</script>", "مرحبا", "⟨U+202E⟩", "⟨U+200B⟩", "😀", "**b** [l](x) $x$", "=1+1", "Ã", "�",
    ]  # fmt: skip
    got = sent(opened(monkeypatch, hostile, "tokens", run="first", tokens_seq="5"))
    assert got["texts"][-1] == "⟨?⟩" and got["unknown"] == [3]


@pytest.mark.parametrize("pin", range(9))
@pytest.mark.parametrize("detail", ["Across layers", "Same token elsewhere"])
def test_a_pinned_token_opens_its_routing(monkeypatch, hostile: Path, pin: int, detail: str):
    page = opened(
        monkeypatch, hostile, "tokens", run="first", tokens_seq="0", tokens_pin=str(pin), tokens_detail=detail
    )
    table = page.dataframe[-1].value
    if detail == "Across layers":
        pd.testing.assert_frame_equal(table, reading.routing(reading.read(Trace(hostile, "first"), 0), pin))
        assert page.get("plotly_chart")
    else:
        ids = [*HOSTILE, *HOSTILE, 0, 1, 2, -1]
        assert len(table) == ids.count(pin) - 1
        assert table["shared"].between(0, 3).all()
    assert "<script>" not in said(page) and "**b**" not in said(page)


def test_pieces_of_a_text_are_shown_as_one(monkeypatch, hostile: Path):
    page = opened(monkeypatch, hostile, "tokens", run="first", tokens_seq="2")
    # full_trace gives every sequence a digest of its own: pieces share one, so here there are none
    assert len(sent(page)["texts"]) == 3
    monkeypatch.setattr(reading, "pieces_of", lambda trace, seq: [1, 2, 3])
    page = opened(monkeypatch, hostile, "tokens", run="second", tokens_seq="3", tokens_whole="true")
    got = sent(page)
    assert len(got["texts"]) == 9
    assert got["begins"] == [[0, "piece 1"], [3, "piece 2"], [6, "piece 3"]]


def test_a_long_text_is_shown_in_parts(monkeypatch, tmp_path: Path):
    n = 4000
    routed.full_trace(
        tmp_path / "long.duckdb", np.zeros((n, 2, 1), int), n_experts=2, seq=[0] * n, sequences=pd.DataFrame([{}])
    )
    page = opened(monkeypatch, tmp_path / "long.duckdb", "tokens", tokens_pin="3999", tokens_part="3")
    got = sent(page)
    assert (got["start"], got["total"], got["pin"], len(got["texts"])) == (3000, n, 3999, 1000)
    page.number_input(key="tokens_pin").set_value(1600).run()
    assert sent(healthy(page))["start"] == 1500


def test_the_filter_of_the_sidebar_narrows_the_search(monkeypatch, hostile: Path):
    page = opened(monkeypatch, hostile, "tokens", run="first", where="note=b")
    assert page.dataframe[0].value["seq"].tolist() == [2, 3]
    page = opened(monkeypatch, hostile, "tokens", run="first", where="nonsense")
    assert page.warning


def test_any_column_narrows_the_search(monkeypatch, hostile: Path):
    page = opened(monkeypatch, hostile, "tokens", run="first", tokens_column="note", tokens_value="c")
    assert page.dataframe[0].value["seq"].tolist() == [4, 5]
    assert "no tokens" in said(page).lower()


def test_a_run_that_took_the_place_of_another(monkeypatch, tmp_path: Path):
    path = tmp_path / "t.duckdb"
    for ids in ([1, 2, 3], [4, 5, 6]):
        routed.full_trace(path, np.zeros((3, 1, 1), int), n_experts=1, seq=[0] * 3, token_ids=ids, mode="overwrite",
                          sequences=pd.DataFrame({"lang": ["x"]}), vocabulary={1: "a", 4: "b"})  # fmt: skip
        view._info.clear()  # it is looked at once a second
        assert sent(opened(monkeypatch, path, "tokens"))["ids"] == ids


def test_without_a_trace_a_text_can_be_typed(monkeypatch):
    page = opened(monkeypatch, None, "tokens")
    assert "No trace is open" in said(page) and "Press Trace" in said(page)
    page.text_area(key="tokens_typed").set_value("Alle <b>Menschen</b> sind frei\u200b.").run()
    page.button(key="tokens_go").click().run()
    got = sent(healthy(page))
    assert "".join(got["texts"]).startswith("Alle <b>Menschen</b> sind frei⟨U+200B⟩")
    assert got["predicted"] is not None
    assert "frei\u200b." in "".join(page.query_params["tokens_text"])
    page.text_area(key="tokens_typed").set_value("   ").run()
    assert "press Trace" in said(page)
    page.button(key="tokens_go").click().run()
    assert "no text to trace" in said(healthy(page)).replace("\\", "")


def test_a_typed_text_in_the_link_is_traced(monkeypatch, demo_trace: Path):
    page = opened(
        monkeypatch, demo_trace, "tokens", tokens_from="typed in", tokens_text="Born free.", tokens_length="3"
    )
    got = sent(page)
    assert "".join(got["texts"]) == "Born free." and len(got["begins"]) > 1


def test_a_long_typed_text_is_not_in_the_link(monkeypatch):
    page = opened(monkeypatch, None, "tokens")
    page.text_area(key="tokens_typed").set_value("free " * 300).run()
    assert "doesn't hold this text" in said(healthy(page)).replace("\\", "")
    assert "tokens_text" not in page.query_params


def test_a_model_that_fails_to_load_is_a_message(monkeypatch, tmp_path: Path):
    page = opened(monkeypatch, None, "tokens")
    monkeypatch.setenv("WORKBENCH_MODEL", str(tmp_path / "nowhere"))
    page.button(key="tokens_go").click().run()
    assert "no such folder" in said(healthy(page)).replace("\\", "")
    assert not page.get("progress") and not [one for one in page.button if one.key == "tokens_cancel"]
