"""Runs that count, against traces of every token of the same texts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import checkpoint
import duckdb
import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import workbench as wb
from workbench import analysis, capture, columns, counts, counts_checks, schema, tally
from workbench.capture import trace
from workbench.cli import app
from workbench.corpus import from_rows
from workbench.errors import InputError, RunError
from workbench.export import export
from workbench.models import Model
from workbench.report import report
from workbench.routing import NO_EXPERT
from workbench.slicing import sample
from workbench.tracefile import FROM_COUNTS, Trace, info
from workbench.validate import validate

OPTIONS: dict[str, Any] = {"batch_tokens": 400, "progress": False}


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return checkpoint.olmoe()


@pytest.fixture(scope="module")
def texts():
    """Some in pieces and translations; more of them than there are blocks."""
    alone = [{**row, "segment_id": None} for row in checkpoint.rows(90, 30, seed=1)]
    return from_rows(checkpoint.rows() + alone, "texts")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("counts")


@pytest.fixture(scope="module")
def full(model: Model, texts, folder: Path) -> Trace:
    return trace(model, texts, folder / "full.duckdb", record=["ids"], **OPTIONS)


@pytest.fixture(scope="module")
def counted(model: Model, texts, folder: Path) -> Trace:
    return trace(model, texts, folder / "counted.duckdb", counts_by="seq", **OPTIONS)


@pytest.fixture(scope="module")
def grouped(model: Model, texts, folder: Path) -> Trace:
    group = ["lang", "domain"]
    return trace(model, texts, folder / "grouped.duckdb", counts_by=group, **OPTIONS)


def by_hand(found: Trace, layer: int, other: int) -> np.ndarray:
    """int64 (E + 1, E' + 1): pairs of all tokens of a trace of every token, any expert last."""
    n, m = (int(found.layers["n_experts"].iloc[at]) for at in (layer, other))
    table = np.zeros((n + 1, m + 1), np.int64)
    for left, right in zip(found.experts(layer), found.experts(other), strict=True):
        left, right = left[left != NO_EXPERT].tolist(), right[right != NO_EXPERT].tolist()
        if left and right:
            for i in [*left, n]:
                for j in [*right, m]:
                    table[i, j] += 1
    return table


def assert_same_counts(one: Trace, other: Trace) -> None:
    """The tables of two runs that count, but for the names of the runs, and the order in which groups were met."""
    for table, kept in (("sequences", "*"), ("pairs", "*"), ("loads", "* EXCLUDE (seq)")):
        rows = [
            each.sql(
                f"SELECT * EXCLUDE (run) FROM (SELECT {kept} FROM {table} WHERE run = '{each.run}') ORDER BY ALL"
            ).to_json()
            for each in (one, other)
        ]
        assert rows[0] == rows[1], table


# What the analyses say.

ASKED = [
    ("load", {}),
    ("load", {"by": "lang"}),
    ("load", {"by": "phase"}),
    ("balance", {"by": "domain"}),
    ("specialization", {"by": "lang"}),
    ("specialization", {"by": "domain", "within": "lang"}),
    ("mutual_information", {"by": "lang"}),
    ("group_similarity", {"by": "lang"}),
    ("coactivation", {}),
    ("coactivation", {"layers": (1,)}),
    ("partners", {}),
    ("affinity", {}),
]
FEW: dict[str, dict[str, Any]] = {name: {"n_resamples": 50} for name in FROM_COUNTS} | {
    "specialization": {"n_resamples": 50, "n_permutations": 50}
}


def asked(name: str, found: Trace, arguments: dict[str, Any]) -> pd.DataFrame:
    return getattr(analysis, name)(found, **FEW[name], **arguments)


@pytest.mark.parametrize(("name", "arguments"), ASKED)
def test_analyses_give_the_same_numbers_intervals_and_p(name: str, arguments, full: Trace, counted: Trace):
    pd.testing.assert_frame_equal(asked(name, counted, arguments), asked(name, full, arguments), rtol=1e-12)


def test_all_analyses_that_counts_can_answer_are_compared():
    assert {name for name, _ in ASKED} == set(FROM_COUNTS)


@pytest.mark.parametrize(("name", "arguments"), ASKED)
def test_groups_of_texts_give_the_same_numbers_with_intervals_over_blocks(name, arguments, full: Trace, grouped: Trace):
    if arguments.get("by") == "phase":
        with pytest.raises(InputError, match="counted texts by lang, domain, so nothing is known by 'phase'"):
            asked(name, grouped, arguments)
        return
    one, other = asked(name, grouped, arguments), asked(name, full, arguments)
    if name in ("coactivation", "partners", "affinity"):
        pd.testing.assert_frame_equal(one, other, rtol=1e-12)
        return
    over_texts = [column for column in one if column.endswith(("low", "high")) or column == "p" or column == "q"]
    over_texts += [column for column in one if column.startswith(("n_texts", "excess", "null"))]
    assert list(one) == list(other)
    pd.testing.assert_frame_equal(one.drop(columns=over_texts), other.drop(columns=over_texts), rtol=1e-12)
    if name == "load":
        known = one["low"].notna()
        assert known.all() and (one["low"] <= one["share"]).all() and (one["share"] <= one["high"]).all()
        assert (one["n_texts"] <= 64).all() and (one["n_texts"] < other["n_texts"]).all()


def test_only_what_a_run_is_grouped_by_is_known(grouped: Trace):
    with pytest.raises(
        InputError, match="nothing is known by 'source': trace again with --counts-by lang,domain,source"
    ):
        analysis.load(grouped, by="source")
    with pytest.raises(InputError, match="no counts of a part of its texts"):
        analysis.load(grouped.only([0, 1]))


SECOND = ("agreement", "expert_changes", "token_changes")
GIVEN = {
    "contrast": {"group": "lang=en", "versus": "lang=de"},
    "task_experts": {"task": "domain=news", "general": "domain=wiki"},
    "importance": {"scores": ["weighted_norm"]},
}


def test_every_other_analysis_says_what_was_recorded(counted: Trace):
    others = [name for name in analysis.NAMES if name not in FROM_COUNTS and name != "cache_speed"]
    others = [name for name in others if analysis.subject(analysis.find(name)[0]) == "trace"]
    assert len(others) > 20
    for name in others:
        arguments = {"other": counted.run} if name in SECOND else GIVEN.get(name, {})
        with pytest.raises(InputError, match="with --(counts-by. It answers .* again with --)?record ids"):
            analysis.find(name)[0](counted, **arguments)


def test_arrays_of_tokens_are_refused(counted: Trace):
    for ask in (
        counted.tokens, counted.sequence_index, counted.predictions,
        *(lambda name=name: getattr(counted, name)(0) for name in (
            "experts", "weights", "norms", "logits", "entropy", "margin", "shift", "lookahead", "profiles")),
    ):  # fmt: skip
        with pytest.raises(InputError, match="was traced with --counts-by"):
            ask()
    with pytest.raises(InputError, match="no pairs of experts of layers 0 and 2"):
        analysis.affinity(counted, gap=2)
    with pytest.raises(InputError, match="no tokens"):
        analysis.load(counted, by="position")


def test_a_part_of_the_texts_and_a_sample(full: Trace, counted: Trace):
    seqs = full.sequences()["seq"].to_numpy()[::3]
    one, other = analysis.load(counted.only(seqs), by="lang"), analysis.load(full.only(seqs), by="lang")
    pd.testing.assert_frame_equal(one, other, rtol=1e-12)
    with pytest.raises(InputError, match="no pairs of experts in a part of its texts"):
        analysis.coactivation(counted.only(seqs))
    assert sample(counted, 10) is counted


# What stands in the file.


def test_pairs_are_those_of_every_token(full: Trace, counted: Trace):
    for layer, other in ((0, 0), (2, 2), (0, 1), (1, 2)):
        assert np.array_equal(counts.pairs(counted, layer, other).sum(axis=0), by_hand(full, layer, other))
    for found in (full, counted):
        assert validate(found.path).empty


def test_the_tables_hold_no_token_and_are_much_smaller(full: Trace, counted: Trace, grouped: Trace):
    for table in ("tokens", "vocabulary", "routing", "profiles"):
        assert counted.sql(f"SELECT * FROM {table}").empty
    assert counted.recorded == {"counts"} and counted.n_tokens == full.n_tokens
    assert counted.sequences().equals(full.sequences())
    rows = [found.sql("SELECT count(*) AS n FROM loads")["n"][0] for found in (counted, grouped)]
    assert rows[0] == counted.n_layers * counted.n_sequences
    groups = full.sequences()[["lang", "domain"]].drop_duplicates()
    assert rows[1] <= grouped.n_layers * len(groups) * counts.n_blocks(grouped)


@pytest.mark.parametrize("family", ["deepseek_v3", "switch_transformers", "granitemoe", "longcat_flash"])
def test_families(family: str, tmp_path: Path):
    """Of two stacks, with dropped tokens, with experts that do nothing, of other layouts."""
    made = checkpoint.model(family)
    rows = from_rows(checkpoint.rows()[:10], "texts")
    full = trace(made, rows, tmp_path / "full.duckdb", record="ids", max_length=256, long_texts="cut", **OPTIONS)
    found = trace(made, rows, tmp_path / "c.duckdb", counts_by="seq", max_length=256, long_texts="cut", **OPTIONS)
    for layer in range(full.n_layers):
        for other in {layer, min(layer + 1, full.n_layers - 1)}:
            assert np.array_equal(counts.pairs(found, layer, other).sum(axis=0), by_hand(full, layer, other))
    for name in ("load", "coactivation", "affinity"):
        pd.testing.assert_frame_equal(asked(name, found, {}), asked(name, full, {}), rtol=1e-12)
    assert validate(found.path).empty


def test_generated_tokens_and_recipes(model: Model, tmp_path: Path):
    rows = from_rows(checkpoint.rows()[:9], "texts")
    recipes = [None, wb.Ablate(experts=[0, 1], scope="phase=generated", level="output"), wb.SetTopK(k=2)]
    for number, recipe in enumerate(recipes):
        options = OPTIONS | {"generate": 5, "recipe": recipe}
        full = trace(model, rows, tmp_path / f"full{number}.duckdb", record="ids", **options)
        found = trace(model, rows, tmp_path / f"counts{number}.duckdb", counts_by="seq", **options)
        for name, arguments in (("load", {"by": "phase"}), ("coactivation", {}), ("affinity", {})):
            pd.testing.assert_frame_equal(asked(name, found, arguments), asked(name, full, arguments), rtol=1e-12)
        assert set(found.sql("SELECT DISTINCT phase FROM loads")["phase"]) == {"prompt", "generated"}
        assert validate(found.path).empty


def test_very_many_experts_leave_fewer_blocks(model: Model, texts, counted: Trace, tmp_path: Path, monkeypatch):
    assert counts.n_blocks(counted) == 64
    monkeypatch.setattr(tally, "MOST_CELLS", 9 * 5 * (9 * 9))
    few = trace(model, texts, tmp_path / "few.duckdb", counts_by="seq", **OPTIONS)
    assert counts.n_blocks(few) == 9 and validate(few.path).empty
    names = ["layer", "expert", "other", "count", "probability", "expected", "lift", "n_tokens", "n_texts"]
    one, other = (analysis.coactivation(found, n_resamples=0)[names] for found in (few, counted))
    pd.testing.assert_frame_equal(one, other)


# Runs that break off.


@pytest.mark.parametrize("group", [pytest.param("seq", marks=pytest.mark.slow), "lang"])
def test_a_run_that_breaks_off_keeps_whole_texts_and_is_finished(
    group, model: Model, texts, tmp_path: Path, monkeypatch
):
    whole = trace(model, texts, tmp_path / "whole.duckdb", counts_by=group, **OPTIONS)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    out, options = tmp_path / "t.duckdb", OPTIONS | {"counts_by": group}
    with pytest.raises(KeyboardInterrupt):
        trace(model, texts, out, **(options | {"progress": stop}))
    kept = Trace(out)
    assert 0 < kept.n_sequences < whole.n_sequences  # what was counted, though SECONDS hadn't passed
    assert validate(out)["check"].tolist() == ["finished"]
    assert analysis.coactivation(kept, n_resamples=9)["n_tokens"].iloc[0] == kept.n_tokens
    with pytest.raises(InputError, match="its corpus is"):
        trace(model, texts, out, mode="resume", **(options | {"counts_by": "domain"}))

    def fail(*_: object) -> None:
        raise RunError("in the midst of counting")

    with monkeypatch.context() as patch:
        patch.setattr(tally.Tally, "_pair", fail)
        with pytest.raises(RunError, match="in the midst"):
            trace(model, texts, out, mode="resume", **options)
    assert Trace(out).n_sequences == kept.n_sequences
    monkeypatch.setattr(tally, "SECONDS", 0.0)  # a commit a batch
    done = trace(model, texts, out, mode="resume", **options)
    assert_same_counts(done, whole)
    assert validate(out).empty


def test_an_expert_that_does_not_exist_is_not_passed_over(model: Model, texts, tmp_path: Path, monkeypatch):
    rows = capture.layer_rows(model)
    monkeypatch.setattr(capture, "layer_rows", lambda *_: [row | {"n_experts": 5} for row in rows])
    with pytest.raises(RunError, match=r"layer 0 \(.*\) gave a token an expert beyond its 5"):
        trace(model, texts, tmp_path / "t.duckdb", counts_by="seq", **OPTIONS)


# Bad requests.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"record": ["counts", "weights"]}, "can't record counts beside tokens: count with --counts-by"),
        ({"record": ["ids"], "counts_by": ["lang"]}, "counts_by or record, not both"),
        ({"counts_by": ["language"]}, "no text has a 'language'"),
        ({"counts_by": ["seq", "lang"]}, "counts_by is 'seq,lang'; expected columns .* or just seq"),
        ({"counts_by": []}, "counts_by is ''; expected columns"),
        ({"record": ["odd"]}, "can't record odd: choose from ids, .*"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(options, message, model: Model, texts, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        trace(model, texts, tmp_path / "t.duckdb", **OPTIONS, **options)
    assert not list(tmp_path.iterdir())


def test_groups_that_are_no_groups_are_refused(model: Model, texts, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tally, "MOST_GROUPS", 3)
    with pytest.raises(InputError, match="more than 3 different values of difficulty, lang"):
        trace(model, texts, tmp_path / "t.duckdb", counts_by=["difficulty", "lang"], **OPTIONS)


# Files: older ones, several runs, and everything that opens one.


def test_a_file_of_format_2_is_read_and_migrated(full: Trace, model: Model, texts, tmp_path: Path):
    old = tmp_path / "old.duckdb"
    shutil.copy(full.path, old)
    with duckdb.connect(str(old)) as con:
        con.execute("DROP TABLE loads; DROP TABLE pairs; UPDATE format SET version = 2")
    assert validate(old).empty and np.array_equal(Trace(old).experts(1), full.experts(1))
    assert "loads" not in set(columns.columns(old)["table"])
    with pytest.raises(InputError, match="has trace format 2, which has no table 'pairs'"):
        export(old, "pairs", tmp_path / "p.csv")
    second = trace(model, texts, old, counts_by="seq", run="counted", mode="append", **OPTIONS)
    assert info(old)["format"] == schema.FORMAT and validate(old).empty
    assert np.array_equal(counts.pairs(second, 0, 1).sum(axis=0), by_hand(full, 0, 1))
    assert analysis.load(Trace(old, full.run), n_resamples=0).equals(analysis.load(full, n_resamples=0))


def test_what_opens_a_trace_opens_one_that_counts(counted: Trace, tmp_path: Path):
    (facts,) = info(counted.path)["runs"]
    assert facts["tokens"] == counted.n_tokens and facts["recorded"] == ["counts"]
    described = columns.columns(counted.path)
    assert (described["meaning"] != "").all() and {"loads", "pairs"} <= set(described["table"])
    for table in ("loads", "pairs", "routing", "selections"):
        for suffix in ("csv", "parquet"):
            rows = export(counted.path, table, tmp_path / f"{table}.{suffix}")
            assert (rows > 0) == (table in ("loads", "pairs"))
    page = report(counted, tmp_path / "report.html").read_text()
    assert "--counts-by" in page and "The busiest expert" in page
    run = CliRunner().invoke(app, ["info", str(counted.path)])
    assert run.exit_code == 0 and "counts" in run.output
    run = CliRunner().invoke(app, ["validate", str(counted.path)])
    assert run.exit_code == 0
    run = CliRunner().invoke(app, ["analyze", "cache", str(counted.path)])
    assert "was traced with --counts-by" in str(run.exception)


BREAKS = [
    # what is done, the check that finds it
    ("UPDATE runs SET recorded = ['ids']", "loads_where"),
    ("UPDATE loads SET layer = 7 WHERE layer = 1", "loads_where"),
    ("UPDATE loads SET seq = 999 WHERE layer = 1 AND seq = 3", "loads_where"),
    ("INSERT INTO loads SELECT * FROM loads WHERE layer = 1 AND seq = 3", "loads_unique"),
    ("UPDATE loads SET counts = counts[2:] WHERE layer = 1 AND seq = 3", "loads_sizes"),
    ("UPDATE loads SET tokens = [0, 0, 0, -1] WHERE layer = 1 AND seq = 3", "loads_sizes"),
    ("UPDATE loads SET counts = list_transform(counts, lambda n: n + 1) WHERE seq = 3", "loads_sum"),
    ("UPDATE loads SET tokens = list_transform(tokens, lambda n: 2 * n) WHERE seq = 3", "loads_tokens"),
    ("DELETE FROM loads WHERE seq = 3 AND layer = 1", "loads_tokens"),
    (
        "UPDATE loads SET counts = list_transform(counts, lambda n: 0), tokens = [list_sum(tokens), 0, 0, 0] "
        "WHERE layer = 1",
        "loads_empty",
    ),
    ("UPDATE pairs SET other = 2 WHERE layer = 0 AND other = 1", "pairs_where"),
    ("UPDATE pairs SET expert = 8 WHERE layer = 0 AND expert = 7", "pairs_where"),
    ("UPDATE pairs SET block = 900 WHERE block = 3", "pairs_where"),
    ("INSERT INTO pairs SELECT * FROM pairs WHERE layer = 1 AND expert IS NULL", "pairs_unique"),
    ("UPDATE pairs SET counts = counts[2:] WHERE layer = 1 AND expert = 3", "pairs_sizes"),
    ("UPDATE pairs SET tokens = 0 WHERE layer = 1 AND other = 2 AND expert = 3", "pairs_sizes"),
    ("UPDATE pairs SET tokens = tokens + 1 WHERE layer = 1 AND other = 1 AND expert = 3", "pairs_within"),
    ("DELETE FROM pairs WHERE layer = 1 AND other = 1 AND expert = 3", "pairs_within"),
    ("UPDATE pairs SET tokens = tokens + 1 WHERE layer = 1 AND other = 1 AND expert IS NULL", "pairs_any"),
]


@pytest.mark.parametrize(("change", "check"), BREAKS)
def test_what_is_broken_is_named(change: str, check: str, counted: Trace, tmp_path: Path):
    shutil.copy(counted.path, tmp_path / "t.duckdb")
    with duckdb.connect(str(tmp_path / "t.duckdb")) as con:
        con.execute(change)
    assert check in set(validate(tmp_path / "t.duckdb")["check"])


def test_every_check_is_broken_once():
    assert {name for name, _ in counts_checks.CHECKS} == {check for _, check in BREAKS}
