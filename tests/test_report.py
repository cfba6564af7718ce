"""The report: complete, offline, and safe to open whatever the data says."""

import base64
import hashlib
import io
import json
import re
import shlex
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pytest
from routed import choose, full_trace, random_trace, with_profiles

from workbench import figures
from workbench.errors import InputError
from workbench.questions import Question
from workbench.report import command, commands, definition, report, run_facts
from workbench.tracefile import Trace

HOSTILE = "</script><script>alert('lang')</script>"
LANGUAGES = ("en", "de", HOSTILE)
DOMAINS = ('"><img src=https://evil.example/x onerror=alert(1)>', "=HYPERLINK(1)")


class Page(HTMLParser):
    """What a browser would see: addresses, scripts, and the text outside them."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.policy = ""
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        known = dict(attrs)
        self.tags.append(tag)
        self.inside = tag if tag in ("script", "style") else ""
        self.addresses += [value for name in ("src", "href", "action", "data", "poster") if (value := known.get(name))]
        if tag == "meta" and known.get("http-equiv") == "Content-Security-Policy":
            self.policy = known["content"] or ""
        if tag == "script":
            self.scripts.append("")
        if identity := known.get("id"):
            self.ids.append(identity)
        assert not [name for name in known if name.startswith("on")]

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif not self.inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A report over a trace in which languages, domains, model, run and a token are attacks."""
    folder = tmp_path_factory.mktemp("report")
    random = np.random.default_rng(0)
    sequences = pd.DataFrame(
        [
            {"lang": lang, "segment_id": f"s{text}", "source": f"c{text % 2}", "domain": DOMAINS[text % 2]}
            for text in range(8)
            for lang in LANGUAGES
        ]
    )
    profiles = [random.dirichlet(np.ones(6), len(sequences)) for _ in range(3)]
    with_profiles(
        folder / "t.duckdb", profiles, sequences, random.integers(2, 9, len(sequences)), model="<b>model</b>",
        run="<i>run</i>", vocabulary={0: "<script>alert(2)</script>"},
    )  # fmt: skip
    return report(folder / "t.duckdb", folder / "r.html")


@pytest.fixture(scope="module")
def page(hostile) -> Page:
    return Page(hostile.read_text())


def test_nothing_is_loaded(page):
    assert all(address.startswith(("#", "data:text/csv")) for address in page.addresses)
    assert not {"link", "iframe", "object", "embed", "img", "form", "base"} & set(page.tags)
    assert page.policy.startswith("default-src 'none'") and "unsafe-eval" not in page.policy
    assert "unsafe-inline" not in page.policy.split("style-src")[0] and "http" not in page.policy


def test_only_our_scripts_may_run(page):
    data, plotly, draw = page.scripts
    for script in (plotly, draw):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in page.policy
    drawn = json.loads(data)["figures"]
    assert set(drawn) == {one for one in page.ids if one.startswith("plot-")} and len(drawn) == 22
    assert "<" not in data and "alert" not in plotly[:0] + draw


def test_hostile_text_is_shown_and_inert(page):
    for text in (HOSTILE, DOMAINS[0], "<b>model</b>", "<i>run</i>"):
        assert text in page.text
    labels = json.dumps(json.loads(page.scripts[0])["figures"])
    assert "<script" not in labels and "<img" not in labels and "&lt;script" in labels


def test_what_it_says(page):
    for words in ("What stands out", "nats of language", "Translations", "How these numbers are defined",
                  "3 MoE layers × 6 experts", "workbench report t.duckdb", "every invariant"):  # fmt: skip
        assert words in page.text, words
    sections = {"findings", "languages", "domains", "translations", "load", "run"}
    assert sections <= set(page.ids) and {f"#{name}" for name in sections} <= set(page.addresses)


def test_tables_can_be_downloaded_and_do_nothing_in_a_spreadsheet(page):
    links = [address for address in page.addresses if address.startswith("data:")]
    tables = [pd.read_csv(io.BytesIO(base64.b64decode(link.partition("base64,")[2]))) for link in links]
    assert len(tables) == 22 and all(len(table) for table in tables)
    groups = next(
        set(table["group"]) for table in tables if set(table.get("by", ())) == {"domain"} and "group" in table
    )
    assert not [group for group in groups if group.startswith("=")] and len(groups) == 2


def test_draws_in_a_browser_under_its_policy(hostile, tmp_path):
    try:
        browser = figures.find_browser()
    except InputError:
        pytest.skip("no Chrome or Chromium here")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = [
        browser,
        *flags,
        "--disable-sync",
        "--dump-dom",
        f"--user-data-dir={tmp_path}",
        "--virtual-time-budget=10000",
        hostile.as_uri(),
    ]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False).stdout
    assert drawn.count('class="main-svg"') >= 22
    assert not re.search(r"<script>alert|<img", drawn.replace("&lt;", ""))


def test_what_cannot_be_answered_is_said(tmp_path):
    routed = random_trace(tmp_path / "t.duckdb", languages=("en",), n_texts=4)
    path = report(routed.trace, tmp_path / "r.html")
    text = Page(path.read_text()).text
    assert text.count("Not shown:") >= 3 and "takes at least two values; this trace has only 'en'" in text
    with pytest.raises(InputError, match="exists"):
        report(routed.trace, path)
    before = path.stat().st_mtime_ns
    report(str(tmp_path / "t.duckdb"), path, overwrite=True)
    assert path.stat().st_mtime_ns > before and len(list(tmp_path.glob("*r*.html"))) == 1


def test_norms_and_a_second_run_are_used(tmp_path):
    random = np.random.default_rng(0)
    seq, sequences = np.repeat(np.arange(4), 6), pd.DataFrame({"lang": ["en", "de"] * 2})
    for run, mode in (("one", "new"), ("two", "append")):
        experts = np.stack([choose(random, np.zeros((24, 5)), 2) for _ in range(2)], axis=1)
        full_trace(
            tmp_path / "t.duckdb", experts, n_experts=5, seq=seq, sequences=sequences, token_ids=np.arange(24),
            weights=random.random(experts.shape), norms=random.random(experts.shape), run=run, mode=mode,
        )  # fmt: skip
    report(tmp_path / "t.duckdb", tmp_path / "r.html", run="one")
    page = Page((tmp_path / "r.html").read_text())
    assert {"plot-norm_rank", "plot-agreement", "agreement"} <= set(page.ids)
    assert "Does the other run of this file" in page.text


def test_definition():
    text = "First line\nwith `code`.\n\n- **a** = x < y\n- b\n  goes on\n\nEnd."
    expected = "<p>First line with <code>code</code>.</p>\n<ul><li><b>a</b> = x &lt; y</li><li>b goes on</li></ul>\n"
    assert definition(text) == expected + "<p>End.</p>"


@pytest.fixture
def plain_trace(tmp_path) -> Path:
    """Two texts, without languages or anything else to say of them."""
    random_trace(tmp_path / "p.duckdb", n_texts=1, languages=("en", "de"))
    return tmp_path / "p.duckdb"


def said(path: Path, **columns: object) -> tuple[dict[str, str], list[list[str]]]:
    """The facts of a run and the words of each of its command lines, where its columns hold these values."""
    with duckdb.connect(path) as con:
        for column, value in columns.items():
            con.execute(f"UPDATE runs SET {column} = ?", [json.dumps(value) if column in JSON else value])
    trace = Trace(path)
    facts = trace.runs().to_dict("records")[0]
    lines = commands(trace, facts, path.with_suffix(".html")).splitlines()
    return dict(run_facts(trace, facts, trace.sequences())), [shlex.split(line) for line in lines]


JSON = ("corpus", "versions")


@pytest.mark.parametrize(
    "corpus",
    [5, [1], "text", {"names": 5}, {"names": "demo"}, {"names": {"a": 1}}, {"experts": [1]}, {"experts": {"a": 1}}],
)
def test_odd_facts_of_a_corpus_are_left_out(plain_trace, corpus):
    facts, lines = said(plain_trace, model="demo", corpus=corpus, versions=corpus)
    assert not {"corpora", "experts"} & set(facts)
    assert [line[1] for line in lines] == ["report"]


@pytest.mark.parametrize("group", [5, "lang", {"a": 1}, [1, None], ["lang"]])
def test_commands_of_odd_facts(plain_trace, group):
    odd = {"names": [1, None, "a b"], "group": group, "max_length": [1], "generate": {"a": "b"}, "experts": "fused"}
    facts, (trace, _) = said(plain_trace, model="demo", corpus=odd, recorded=["counts"])
    assert facts["corpora"] == "1, None, a b" and facts["experts"] == "fused code"
    assert trace[:9] == ["workbench", "trace", "demo", "--corpus", "1", "--corpus", "None", "--corpus", "a b"]


def test_no_value_becomes_an_option_or_a_command(plain_trace):
    hostile = "--x; touch 'y' `z` $(w)"
    corpus = {"names": [hostile], "max_length": hostile, "long_texts": hostile, "generate": hostile}
    _, (traced, reported) = said(plain_trace, model="demo", dtype=hostile, corpus=corpus)
    for words in (traced, reported):
        # each is one word, and the value of the option before it
        assert all(words[at - 1] in OPTIONS for at, word in enumerate(words) if word == hostile)
    assert traced.count(hostile) == 5
    for model in ("--trust-remote-code", "-x", "-"):
        assert [line[1] for line in said(plain_trace, model=model, corpus=corpus)[1]] == ["report"]
    # a terminal obeys control characters that are pasted
    assert [line[1] for line in said(plain_trace, model="demo\x03\n", corpus=corpus)[1]] == ["report"]


OPTIONS = ("--corpus", "--dtype", "--max-length", "--long", "--generate")


def test_a_file_that_begins_with_a_dash_is_no_option(plain_trace):
    path = plain_trace.rename(plain_trace.with_name("--overwrite.duckdb"))
    _, (reported,) = said(path, model="demo")
    assert reported[2] == "./--overwrite.duckdb"
    line = command(Trace(path), Question("load"), "a b.csv")
    assert shlex.split(line)[3] == "./--overwrite.duckdb" and shlex.split(line)[-1] == "a b.csv"
