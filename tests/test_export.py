"""Exports hold what the trace holds, whole or not at all, and no spreadsheet runs them."""

import csv
import json
import re

import duckdb
import numpy as np
import pandas as pd
import pytest

from workbench.arrays import from_arrays
from workbench.errors import InputError, RunError
from workbench.export import export, save_table
from workbench.schema import TABLES
from workbench.store import Writer

NASTY = ["=1+1", "+x", "-x", "@SUM(A1)", "\tx", "\rx", "plain", "'quoted", 'say "hi", ok', "two\nlines"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Two runs of ten sequences; text that a spreadsheet would run in metadata, columns and vocabulary."""
    path = tmp_path_factory.mktemp("export") / "t'race.duckdb"
    random = np.random.default_rng(0)
    experts = np.argsort(random.random((20, 2, 8)), axis=2)[:, :, :3]
    experts[4, 1, 1:] = -1
    experts[5, 0] = -1
    sequences = pd.DataFrame({"lang": NASTY, "note": NASTY})
    from_arrays(
        path,
        experts,
        random.random(experts.shape),
        n_experts=8,
        seq=np.repeat(np.arange(10), 2),
        sequences=sequences,
        token_ids=np.arange(20) % 10,
        vocabulary=dict(enumerate(NASTY)),
    )
    layers = [{"name": "moe", "n_experts": 4, "top_k": 1}]
    with Writer(path, {"run": "empty"}, layers, mode="append"):
        pass
    return path


@pytest.mark.parametrize("table", TABLES)
def test_parquet_equals_the_table(path, tmp_path, table):
    out = tmp_path / "out.parquet"
    rows = export(path, table, out, run="arrays")
    with duckdb.connect(str(path), read_only=True) as con:
        order = "ORDER BY ALL"
        expected = con.sql(f"SELECT * FROM {table} WHERE run = 'arrays' {order}").fetchall()
    assert rows == len(expected) and (rows or table in ("profiles", "loads", "pairs"))
    with duckdb.connect() as con:
        assert con.sql(f"SELECT * FROM '{out}' {order}").fetchall() == expected


@pytest.mark.parametrize("table", TABLES)
def test_csv_is_harmless(path, tmp_path, table):
    out = tmp_path / "out.csv"
    rows = export(path, table, out)
    with out.open(newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == rows
    text = [cell for row in read for name, cell in row.items() if name in ("lang", "text", "metadata", "run")]
    assert not [cell for cell in text if cell[:1] in "=+-@\t\r\n" and cell]
    if table == "vocabulary":
        assert [row["text"] for row in read] == [f"'{t}" if t[0] in "=+-@\t\r" else t for t in NASTY]
    if table == "routing":
        assert json.loads(read[0]["experts"]) and len(json.loads(read[0]["weights"])) == 3
        assert [] in [json.loads(row["experts"]) for row in read]


def test_unnested(path, tmp_path):
    rows = export(path, "routing", tmp_path / "a.parquet", unnest=True)
    frame = pd.read_parquet(tmp_path / "a.parquet")
    assert rows == len(frame) == 20 * 2 * 3 - 2 - 3
    export(path, "selections", tmp_path / "b.parquet", run="arrays")
    other = pd.read_parquet(tmp_path / "b.parquet")
    for column in ("seq", "pos", "layer", "rank", "expert", "weight"):
        np.testing.assert_array_equal(frame[column], other[column])


def test_refusals(path, tmp_path):
    out = tmp_path / "out.csv"
    out.write_text("mine")
    for arguments, message in [
        (dict(table="tokens", out=out), "exists; .* --overwrite"),
        (dict(table="nothing", out=tmp_path / "a.csv"), "no table 'nothing'.*selections"),
        (dict(table="tokens", out=tmp_path / "a.xlsx"), r"expected .csv, .parquet"),
        (dict(table="tokens", out=tmp_path / "no" / "a.csv"), "is not a folder"),
        (dict(table="tokens", out=tmp_path / "a.csv", unnest=True), "only `routing` can be unnested"),
        (dict(table="tokens", out=tmp_path / "a.csv", run="typo"), "no run 'typo'.*arrays"),
    ]:
        with pytest.raises(InputError, match=message):
            export(path, **arguments)
    assert out.read_text() == "mine"
    export(path, "tokens", out, overwrite=True)
    assert len(pd.read_csv(out)) == 20
    assert [p.name for p in tmp_path.iterdir()] == ["out.csv"]


def test_nothing_half_written(path, tmp_path, monkeypatch):
    """A query that fails midway leaves neither the file nor a temporary one."""
    monkeypatch.setattr("workbench.export._csv_cell", lambda name, kind: f"error('broken')::VARCHAR AS {name}")
    with pytest.raises(RunError, match="broken"):
        export(path, "tokens", tmp_path / "out.csv")
    assert list(tmp_path.iterdir()) == []


def test_save_table(tmp_path):
    frame = pd.DataFrame({"=name": NASTY, "share_%": np.linspace(-1, 1, 10)})
    for suffix in ("csv", "parquet", "tex"):
        save_table(frame, tmp_path / f"t.{suffix}")
        with pytest.raises(InputError, match="exists"):
            save_table(frame, tmp_path / f"t.{suffix}")
    read = pd.read_csv(tmp_path / "t.csv")
    assert read.columns[0] == "'=name"
    assert read.iloc[0].tolist() == ["'=1+1", -1]
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t.parquet"), frame)
    tex = (tmp_path / "t.tex").read_text()
    assert r"\toprule" in tex and r"share\_\%" in tex and r"\label{tab:t}" in tex
    with pytest.raises(InputError, match="expected .csv"):
        save_table(frame, tmp_path / "t.xlsx")


HOSTILE = [
    r"\\input{/etc/passwd}",
    "100% _a_ & b # $x$ ^~",
    "<script>",
    "中文 naïve",
    "--- ?` ``''",
    "[x] *",
    "two\nlines",
    "\x00",
]


def test_tex_shows_text_as_it_is(tmp_path):
    frame = pd.DataFrame({"token_%": HOSTILE, "n&": range(len(HOSTILE))})
    save_table(frame, tmp_path / "my table_1.tex")
    lines = (tmp_path / "my table_1.tex").read_text().splitlines()
    assert r"\caption{my table\_1}" in lines and r"\label{tab:my-table_1}" in lines
    rows = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(rows) == len(HOSTILE) and r"token\_\% & n\& \\" in lines
    assert all(row.isprintable() and row.endswith(f" & {at} \\\\") for at, row in enumerate(rows))
    known = {"textbackslash", "textasciicircum", "textasciitilde", "textless", "textgreater", "textasciigrave"}
    for row in rows:
        assert set(re.findall(r"\\([a-zA-Z]+)", row.removesuffix(r" \\"))) <= {*known, "textquotesingle"}
        plain = re.sub(r"\\[a-zA-Z]+|\\[{}$&#%_]", "", row.removesuffix(r" \\"))
        assert plain.count("&") == 1 and not set(plain) & set("\\$#%_^~<>`'") and plain.count("{") == plain.count("}")
        assert "--" not in plain and not re.search(r"(^|[^{])\[", plain)  # no ligature, no optional argument
    assert rows[0].startswith(r"\textbackslash{}\textbackslash{}input\{/etc/passwd\}")
    assert rows[3].startswith(r"\textless{}U+4E2D\textgreater{}\textless{}U+6587\textgreater{} naïve")


def test_tex_intervals_and_numbers(tmp_path):
    frame = pd.DataFrame(
        {
            "layer": pd.array([0, None], dtype="Int64"), "value": [0.123456, -2.0], "low": [-0.1, np.nan],
            "high": [0.25, np.nan], "gap_low": [1, 2], "gap_high": [3, 4], "p": [1e-6, np.inf], "worth": [True, False],
            "allow": [1, 2], "lift_low": ["a", "b"],
        }
    )  # fmt: skip
    save_table(frame, tmp_path / "t.tex")
    lines = (tmp_path / "t.tex").read_text().splitlines()
    start = lines.index(r"\toprule")
    assert lines[start - 1] == r"\begin{tabular}{rrrrrlrl}"
    assert lines[start + 1] == r"layer & value & interval & gap\_interval & p & worth & allow & lift\_low \\"
    assert lines[start + 3] == r"0 & 0.1235 & $-0.1$--0.25 & 1--3 & $1 \times 10^{-6}$ & yes & 1 & a \\"
    assert lines[start + 4] == r"-- & $-2$ & -- & 2--4 & $\infty$ & no & 2 & b \\"
    save_table(frame[:0], tmp_path / "empty.tex")
    assert r"\bottomrule" in (tmp_path / "empty.tex").read_text()
