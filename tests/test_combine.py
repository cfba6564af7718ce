"""Traces put together and taken apart: nothing lost, nothing doubled, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import blocks
import duckdb
import numpy as np
import pandas as pd
import pytest
from blocks import RUN, rows_of, write_file, write_folder
from commandline import Command, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workbench import combine, extract, parts, schema
from workbench.combine import merge
from workbench.errors import InputError, RunError
from workbench.extract import INDEX, drawing_order, sample, split
from workbench.tracefile import Trace
from workbench.validate import validate

GROUPS = [range(0, 5), range(5, 9), range(9, 30)]
OTHER = RUN | {"run": "other", "recipe": None}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """Two runs, of 30 and of 9 sequences."""
    path = tmp_path_factory.mktemp("combine") / "two.duckdb"
    write_file(path, GROUPS)
    write_file(path, GROUPS[:2], run=OTHER, mode="append")
    return path


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- merge


def test_a_file_through_parts_and_back_is_the_same(file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(combine, "PART_TOKEN_LAYERS", 100)
    merged = merge([file], f"{tmp_path}/parts/")
    assert merged.run == Trace(file).run
    assert len(list((tmp_path / "parts" / "sequences").iterdir())) > 6
    assert rows_of(tmp_path / "parts", times=True) == rows_of(file, times=True)
    merge([tmp_path / "parts"], tmp_path / "back.duckdb")
    assert rows_of(tmp_path / "back.duckdb", times=True) == rows_of(file, times=True)
    assert validate(tmp_path / "parts").empty and validate(tmp_path / "back.duckdb").empty
    merge([file], f"memory://{tmp_path.name}/parts")
    assert rows_of(f"memory://{tmp_path.name}/parts", times=True) == rows_of(file, times=True)


def test_shards_of_one_run_become_the_run(file: Path, tmp_path: Path):
    write_file(tmp_path / "a.duckdb", GROUPS[:1])
    write_folder(tmp_path / "b", GROUPS[1:])
    write_file(tmp_path / "c.duckdb", GROUPS[:2], run=OTHER)
    merged = merge([tmp_path / name for name in ("a.duckdb", "b", "c.duckdb")], tmp_path / "all.duckdb")
    assert rows_of(merged.path) == rows_of(file) and validate(merged.path).empty
    runs = merged.runs().set_index("run")
    assert runs.loc["made", "started"] == Trace(tmp_path / "a.duckdb", "made").started
    assert runs.loc["made", "finished"] == Trace(tmp_path / "b").runs()["finished"].item()


def test_numbers_that_clash(tmp_path: Path):
    write_file(tmp_path / "a.duckdb", [[3, 4, 5]])
    write_file(tmp_path / "b.duckdb", [[1, 2, 5]])
    both = [tmp_path / "a.duckdb", tmp_path / "b.duckdb"]
    with pytest.raises(InputError, match="a.duckdb and .*b.duckdb both have sequence 5 of run 'made'.*--renumber"):
        merge(both, tmp_path / "all.duckdb")
    assert left_over(tmp_path) == [".a.duckdb.lock", ".b.duckdb.lock", "a.duckdb", "b.duckdb"]
    for out in (f"{tmp_path}/all.duckdb", f"{tmp_path}/parts/"):
        merged = merge(both, out, renumber=True)
        assert merged.sequence_ids.tolist() == [3, 4, 5, 6, 7, 10]
        assert [row["row"] for row in _metadata(merged)] == [3, 4, 5, 1, 2, 5]
        second = Trace(both[1])
        np.testing.assert_array_equal(merged.only([6, 7, 10]).experts(2), second.experts(2))
        np.testing.assert_array_equal(merged.only([6, 7, 10]).tokens()["nll"], second.tokens()["nll"])
        np.testing.assert_array_equal(merged.only([6, 7, 10]).profiles(0), second.profiles(0))
        assert validate(merged.path).empty


def _metadata(trace: Trace) -> list[dict]:
    return trace.sequences()[["row"]].to_dict("records")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": "x"}, "the model of run 'made' is 'x', in a trace before it 'm'"),
        ({"recipe": None}, "the recipe of run 'made' is None"),
        ({"recorded": ["ids"]}, "the recorded of run"),
        ({"dtype": "int8"}, "the dtype of run"),
    ],
)
def test_runs_that_differ_are_no_parts_of_one(tmp_path: Path, change: dict, said: str):
    write_folder(tmp_path / "a", GROUPS[:1])
    parts.begin(tmp_path / "b", RUN | change, blocks.LAYERS)
    with pytest.raises(InputError, match=said):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all.duckdb")
    assert left_over(tmp_path) == ["a", "b"]


def test_layers_that_differ(tmp_path: Path):
    write_folder(tmp_path / "a", GROUPS[:1])
    parts.begin(tmp_path / "b", RUN, blocks.LAYERS[:2])
    with pytest.raises(InputError, match="other MoE layers"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all.duckdb")


def test_a_part_that_is_not_finished(tmp_path: Path):
    write_folder(tmp_path / "a", GROUPS[:1])
    write_folder(tmp_path / "b", GROUPS[1:2], run=RUN | {"corpus": {"names": ["c"], "tokens": 3}})
    parts.finish(tmp_path / "b", "made", "interrupted")
    row = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "all.duckdb").runs().iloc[0]
    assert row["status"] == "interrupted" and pd.isna(row["finished"])
    assert row["corpus"] == {"names": ["c"], "merged": [{"names": ["c"]}, {"names": ["c"], "tokens": 3}]}


def test_merging_what_was_merged(tmp_path: Path):
    """`merged` stays one flat list."""
    for number in range(3):
        write_folder(tmp_path / f"{number}", [[number]], run=RUN | {"corpus": {"names": ["c"], "shard": number}})
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "01.duckdb")
    row = merge([tmp_path / "01.duckdb", tmp_path / "2"], tmp_path / "all.duckdb").runs().iloc[0]
    assert [one["shard"] for one in row["corpus"]["merged"]] == [0, 1, 2] and row["corpus"]["names"] == ["c"]


def test_runs_that_count(tmp_path: Path):
    """They are copied whole, as one part; parts of one can't be added up, split or sampled."""
    path = tmp_path / "counts.duckdb"
    _counting(path)
    merge([path], f"{tmp_path}/parts/")
    merge([tmp_path / "parts"], tmp_path / "back.duckdb")
    assert rows_of(path, times=True) == rows_of(tmp_path / "parts", times=True)
    assert rows_of(path, times=True) == rows_of(tmp_path / "back.duckdb", times=True)
    with pytest.raises(InputError, match="counts can't be added up"):
        merge([path, tmp_path / "parts"], tmp_path / "twice.duckdb")
    with pytest.raises(InputError, match="counts, and its counts of pairs can't be taken apart"):
        split(path, tmp_path / "split", n_parts=2)
    with pytest.raises(InputError, match="counts, and its counts of pairs"):
        sample(path, tmp_path / "some.duckdb", sequences=1)


def _counting(path: Path) -> None:
    from workbench import corpus
    from workbench.capture import trace

    rows = [{"text": f"text number {number}", "lang": "en"} for number in range(6)]
    trace("demo", corpus.from_rows(rows, "texts"), path, counts_by="seq", progress=False)


def test_an_older_format_is_read(file: Path, tmp_path: Path):
    old = tmp_path / "old.duckdb"
    merge([file], old)
    with duckdb.connect(str(old)) as con:
        con.execute("DROP TABLE loads; DROP TABLE pairs; DROP VIEW selections")
        con.execute("ALTER TABLE routing DROP COLUMN shift; ALTER TABLE routing DROP COLUMN lookahead")
        con.execute("ALTER TABLE tokens DROP COLUMN predicted; UPDATE format SET version = 1")
    for out in (f"{tmp_path}/new.duckdb", f"{tmp_path}/parts/"):
        merge([old], out)
        assert rows_of(out, times=True) == rows_of(file, times=True)
    assert sample(old, tmp_path / "few.duckdb", sequences=4).n_sequences == 4


def test_merge_refuses(file: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="nothing to merge"):
        merge([], tmp_path / "x.duckdb")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="full"):
            merge([file], tmp_path / "full", overwrite=overwrite)
    with pytest.raises(InputError, match="no such file"):
        merge([file, tmp_path / "nothing.duckdb"], tmp_path / "x.duckdb")
    with pytest.raises(InputError, match="exists"):
        merge([file], file)
    (tmp_path / "bad").mkdir()
    with pytest.raises(InputError, match="no format.parquet"):
        merge([tmp_path / "bad"], tmp_path / "x.duckdb")
    assert left_over(tmp_path) == ["bad", "full"] and (tmp_path / "full" / "thesis.tex").exists()


def test_a_damaged_part_leaves_nothing_behind(file: Path, tmp_path: Path):
    merge([file], f"{tmp_path}/parts/")
    broken = next((tmp_path / "parts" / "routing").iterdir())
    broken.write_bytes(b"nothing")
    with pytest.raises((InputError, RunError), match=broken.name):
        merge([tmp_path / "parts"], tmp_path / "x.duckdb")
    with pytest.raises((InputError, RunError), match=broken.name):
        merge([tmp_path / "parts"], f"{tmp_path}/again/")
    assert left_over(tmp_path) == ["parts"]


def test_an_old_trace_behind_a_url_stays_when_the_new_one_is_refused(file: Path, tmp_path: Path, monkeypatch):
    url = f"memory://{tmp_path.name}/out"
    merge([file], url)
    before = rows_of(url)
    with pytest.raises(InputError, match="no such file"):
        merge([file, tmp_path / "nothing.duckdb"], url, overwrite=True)
    with pytest.raises(InputError, match="to be read and to be replaced"):
        merge([url], url, overwrite=True)
    assert rows_of(url) == before

    def full(*_: object) -> None:
        raise RunError("disk full")

    with monkeypatch.context() as patched, pytest.raises(RunError, match="disk full"):
        patched.setattr(parts, "write_header", full)
        merge([file], url, overwrite=True)
    merge([file], url)  # nothing is left that would have to be overwritten
    assert rows_of(url) == before


def test_only_a_trace_is_replaced(file: Path, tmp_path: Path):
    out = tmp_path / "out"
    merge([file], f"{out}/")
    write_file(out / "mine.duckdb", GROUPS[:1])
    for source in (file, out / "mine.duckdb"):
        with pytest.raises(InputError, match="mine.duckdb, too, which would be lost"):
            merge([source], out, overwrite=True)
    assert Trace(out / "mine.duckdb").n_sequences == 5
    (out / "mine.duckdb").unlink()
    merge([out], out, overwrite=True)
    assert rows_of(out) == rows_of(file)


def test_a_link_to_a_folder_stays_a_link(file: Path, tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    merge([file], tmp_path / "link")
    assert left_over(tmp_path) == ["link", "real"] and (tmp_path / "link").is_symlink()
    assert rows_of(tmp_path / "real") == rows_of(file)


def test_the_log_of_a_replaced_file_goes_with_it(file: Path, tmp_path: Path):
    """DuckDB would replay what a writer that died had left there."""
    out = tmp_path / "out.duckdb"
    for write in (lambda: merge([file], out, overwrite=True), lambda: sample(file, out, sequences=3, overwrite=True)):
        write()
        (tmp_path / "out.duckdb.wal").write_bytes(b"of another file")
        write()
        assert left_over(tmp_path) == ["out.duckdb"] and validate(out).empty


def test_texts_of_tokens_that_clash(tmp_path: Path):
    one, other = tmp_path / "one.duckdb", tmp_path / "other.duckdb"
    write_file(one, GROUPS[:1])
    write_file(other, GROUPS[1:2])

    def rename(text: str) -> None:
        with duckdb.connect(str(other)) as con:
            con.execute("UPDATE vocabulary SET text = ? WHERE token_id = 3", [text])

    rename("else")
    for out in ("out.duckdb", "out/"):
        with pytest.raises(InputError, match="token id 3 is 'else' in one trace and 't3' in another"):
            merge([one, other], f"{tmp_path}/{out}")
    rename("")  # nobody knew it there
    for out in ("out.duckdb", "out/"):
        merged = merge([other, one], f"{tmp_path}/{out}")
        assert merged.vocabulary().set_index("token_id")["text"].to_dict() == blocks.VOCABULARY
        assert validate(merged.path).empty


def test_a_place_that_can_not_be_written_to(file: Path):
    with pytest.raises(RunError, match="could not be written"):
        merge([file], "/proc/x.duckdb")


def test_a_url_is_no_place_for_a_file(file: Path, workbench: Command, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in (
        ("split", file, "--by", "lang"), ("sample", file, "--sequences", 3), ("export", file, "--table", "runs"),
        ("export", file, "--format", "hf"), ("report", file),
    ):  # fmt: skip
        refused(workbench(*command, "--out", "s3://bucket/there.parquet"), "/there.parquet is a URL", "give a path")
    assert not left_over(tmp_path)


# --- split


def test_a_run_without_sequences_is_in_the_first_file(tmp_path: Path):
    whole = tmp_path / "whole.duckdb"
    write_file(whole, GROUPS[:1])
    write_file(whole, [], run=RUN | {"run": "empty"}, mode="append")
    for name, options in (("by", {"by": "lang"}), ("parts", {"n_parts": 2})):
        found = split(whole, tmp_path / name, **options)
        files = [tmp_path / name / file for file in found["file"]]
        assert set(Trace(files[0]).runs()["run"]) == {"made", "empty"} and set(Trace(files[1]).runs()["run"]) == {
            "made"
        }
        assert rows_of(merge(files, tmp_path / f"{name}.duckdb").path) == rows_of(whole)
    with pytest.raises(InputError, match="no sequence"):
        split(whole, tmp_path / "none", run="empty", n_parts=1)


def test_what_is_split_is_not_in_the_folder_that_is_replaced(file: Path, tmp_path: Path):
    out = tmp_path / "out"
    split(file, out, n_parts=2)
    with pytest.raises(InputError, match="which is to be written"):
        split(out / "1.duckdb", out, n_parts=2, overwrite=True)
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="thesis.tex, too"):
        split(file, out, n_parts=3, overwrite=True)
    with pytest.raises(InputError, match="no name of its own"):
        split(file, ".", n_parts=3, overwrite=True)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(how=st.one_of(st.sampled_from(["lang", "row", "segment_id"]), st.integers(1, 9)))
def test_merging_what_was_split_gives_the_trace(file: Path, tmp_path_factory, how: str | int):
    folder = tmp_path_factory.mktemp("split")
    options = {"by": how} if isinstance(how, str) else {"n_parts": how}
    if how in ("row", "segment_id"):  # a file a sequence: of the small run only
        options["run"] = "other"
    found = split(file, folder / "out", **options)
    assert found["sequences"].sum() == (9 if "run" in options else 39)
    whole = file
    if "run" in options:
        whole = folder / "other.duckdb"
        write_file(whole, GROUPS[:2], run=OTHER)
    merged = merge([folder / "out" / name for name in found["file"]], folder / "back.duckdb")
    assert rows_of(merged.path) == rows_of(whole)
    index = json.loads((folder / "out" / INDEX).read_text())
    assert [one["file"] for one in index["files"]] == found["file"].tolist()


def test_split_by_a_column(file: Path, tmp_path: Path):
    found = split(file, tmp_path / "out", by="lang")
    assert found["file"].tolist() == ["de.duckdb", "en.duckdb", "none.duckdb"]
    for row in found.to_dict("records"):
        piece = Trace(tmp_path / "out" / row["file"], "made")
        langs = piece.sequences()["lang"]
        assert langs.isna().all() if row["file"] == "none.duckdb" else set(langs) == {row["value"]}
        assert validate(piece.path).empty


def test_split_into_parts_is_even(file: Path, tmp_path: Path):
    found = split(file, tmp_path / "out", n_parts=4, run="made")
    assert found["sequences"].tolist() == [8, 8, 7, 7] and found["value"].tolist() == [1, 2, 3, 4]
    assert Trace(tmp_path / "out" / "2.duckdb").sequence_ids.tolist() == list(range(8, 16))


def test_names_of_files_are_harmless():
    taken: set[str] = set()
    for value in ("../../etc/passwd", "a/b", "a b", "A_B", "", "...", None, "none", "数据", "x" * 300):
        name = extract._file_name(value, taken)
        assert Path(name).name == name and not name.startswith(".") and len(name) < 100
        assert name.casefold() not in {one.casefold() for one in taken}
        taken.add(name)


def test_split_refuses(file: Path, tmp_path: Path, monkeypatch):
    for options, said in [
        ({}, "one of the two"),
        ({"by": "lang", "n_parts": 2}, "one of the two"),
        ({"by": "height"}, "no 'height'; they have"),
        ({"n_parts": 0}, "n_parts is 0; expected 1 to 30"),
        ({"n_parts": 10}, "n_parts is 10; expected 1 to 9, the sequences of run 'other'"),
        ({"n_parts": 2, "run": "third"}, "no run 'third'"),
    ]:
        with pytest.raises(InputError, match=said):
            split(file, tmp_path / "out", **options)
    monkeypatch.setattr(extract, "MOST_FILES", 2)
    with pytest.raises(InputError, match="lang makes 3 files; expected at most 2"):
        split(file, tmp_path / "out", by="lang")
    assert left_over(tmp_path) == []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=INDEX):
        split(file, tmp_path / "out", n_parts=2, overwrite=True)


# --- sample


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(1, 30), seed=st.integers(0, 5), by=st.sampled_from([None, "lang"]))
def test_a_sample_is_part_of_the_trace(file: Path, tmp_path_factory, n: int, seed: int, by: str | None):
    folder = tmp_path_factory.mktemp("sample")
    drawn = sample(file, folder / "a.duckdb", sequences=n, by=by, seed=seed, run="made")
    assert drawn.n_sequences == n == len(set(drawn.sequence_ids.tolist()))
    whole = Trace(file, "made").only(drawn.sequence_ids)
    np.testing.assert_array_equal(drawn.experts(1), whole.experts(1))
    np.testing.assert_array_equal(drawn.weights(1), whole.weights(1))
    np.testing.assert_array_equal(drawn.profiles(1), whole.profiles(1))
    pd.testing.assert_frame_equal(drawn.tokens(), whole.tokens())
    pd.testing.assert_frame_equal(drawn.sequences(), whole.sequences())
    assert validate(drawn.path).empty
    if n < 30:
        more = sample(file, folder / "b.duckdb", sequences=n + 1, by=by, seed=seed, run="made")
        assert set(drawn.sequence_ids) < set(more.sequence_ids)
    note = drawn.runs().iloc[0]["corpus"]["sample"]
    assert note == {"sequences": n, "of": 30, "by": by, "seed": seed}


def test_a_sample_of_tokens_ends_with_the_sequence_that_reaches_them(file: Path, tmp_path: Path):
    total = Trace(file, "made").n_tokens
    for wanted in (1, total // 2, total):
        drawn = sample(file, tmp_path / f"{wanted}.duckdb", tokens=wanted, run="made")
        one_less = sample(file, tmp_path / "b.duckdb", sequences=drawn.n_sequences, run="made", overwrite=True)
        assert set(one_less.sequence_ids) == set(drawn.sequence_ids)
        assert wanted <= drawn.n_tokens < wanted + 10
    assert drawn.n_tokens == total


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    seed=st.integers(0, 3),
    share=st.floats(0, 1, exclude_min=True),
)
def test_groups_are_drawn_in_proportion(sizes: list[int], seed: int, share: float):
    """Against Sainte-Laguë's method as it is taught: each seat to the largest n / (2 seats + 1)."""
    group = np.repeat(np.arange(len(sizes)), sizes)
    order = drawing_order(group, seed)
    assert sorted(order) == list(range(len(group)))
    n = max(1, int(share * len(group)))
    had = np.bincount(group[order[:n]], minlength=len(sizes))
    seats = np.zeros(len(sizes), int)
    for _ in range(n):
        seats[np.argmax(np.array(sizes) / (2 * seats + 1))] += 1
    # Ties may fall otherwise, but the quotients that were served are the same.
    served = sorted(size / (2 * i + 1) for size, k in zip(sizes, seats, strict=True) for i in range(k))
    assert served == pytest.approx(
        sorted(size / (2 * i + 1) for size, k in zip(sizes, had, strict=True) for i in range(k))
    )


def test_every_sequence_is_as_likely():
    counts = np.zeros(6)
    for seed in range(600):
        counts[drawing_order(np.zeros(6, int), seed)[:2]] += 1
    assert abs(counts - 200).max() < 60  # 5 standard deviations


def test_sample_refuses(file: Path, tmp_path: Path):
    out = tmp_path / "x.duckdb"
    for options, said in [
        ({}, "one of the two"),
        ({"sequences": 1, "tokens": 1}, "one of the two"),
        ({"sequences": 31}, "sequences is 31; expected 1 to 30, which run 'made' has"),
        ({"sequences": 0}, "sequences is 0"),
        ({"tokens": 10**6}, "tokens is 1000000; expected 1 to"),
        ({"sequences": 1, "seed": -1}, "seed is -1"),
        ({"sequences": 1, "by": "height"}, "no 'height'"),
        ({"sequences": 1, "run": "third"}, "no run 'third'"),
    ]:
        with pytest.raises(InputError, match=said):
            sample(file, out, **({"run": "made"} | options))
    assert left_over(tmp_path) == []


# --- commands


def test_commands(file: Path, tmp_path: Path, workbench: Command):
    result = workbench("merge", file, "--out", f"{tmp_path}/parts/")
    assert result.code == 0 and "2 runs" in result.out, result
    refused(workbench("merge", file, "--out", f"{tmp_path}/parts/"), "exists", "--overwrite")
    refused(workbench("merge", file, tmp_path / "parts", "--out", tmp_path / "x.duckdb"), "--renumber")
    assert workbench("merge", file, tmp_path / "parts", "--out", tmp_path / "x.duckdb", "--renumber").code == 0
    assert Trace(tmp_path / "x.duckdb", "made").n_sequences == 60
    result = workbench("split", tmp_path / "parts", "--by", "lang", "--out", tmp_path / "split", "--json")
    assert [one["file"] for one in json.loads(result.out)] == ["de.duckdb", "en.duckdb", "none.duckdb"]
    refused(workbench("split", file, "--out", tmp_path / "s"), "--by and --parts")
    result = workbench("sample", tmp_path / "parts", "--sequences", 5, "--run", "made", "--out", tmp_path / "s.duckdb")
    assert result.code == 0 and "5 texts" in result.out
    refused(workbench("sample", file, "--out", tmp_path / "s2.duckdb"), "--sequences and --tokens")
    refused(workbench("sample", file, "--sequences", 99, "--run", "made", "--out", tmp_path / "s2.duckdb"), "1 to 30")
    assert schema.columns()
