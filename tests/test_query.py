"""What SQL may ask, what it gets, and what is refused."""

import pickle

import numpy as np
import pandas as pd
import pytest
from routed import random_trace

from workbench import charts, query, schema
from workbench.columns import COLUMNS, TABLES, columns
from workbench.errors import InputError
from workbench.tracefile import Trace


@pytest.fixture(scope="module")
def trace(tmp_path_factory) -> Trace:
    return random_trace(tmp_path_factory.mktemp("query") / "t.duckdb").trace


QUESTIONS = (
    "SELECT 1",
    "  select lang, count(*) from sequences group by 1 ;",
    "FROM tokens",
    "VALUES (1), (2)",
    "WITH a AS (SELECT 1 AS b) SELECT b FROM a",
    "DESCRIBE tokens",
    "SHOW TABLES",
    "SUMMARIZE tokens",
    "PIVOT tokens ON phase USING count(*) GROUP BY seq",
    "EXPLAIN SELECT 1",
    "explain analyze\n SELECT count(*) FROM routing",
    "PRAGMA table_info('tokens')",
    "-- a comment\nSELECT 1 -- another",
    "EXPLAIN/**/SELECT 1",
    "EXPLAIN (FORMAT json) SELECT 1",
    "EXPLAIN ((SELECT 1))",
    "EXPLAIN PIVOT tokens ON phase USING count(*)",
    "(PIVOT tokens ON phase USING count(*)) LIMIT 1; -- done",
    "WITH a AS (PIVOT tokens ON phase USING count(*)) SELECT 1 AS copy",
    "SELECT (copy), ' AS (COPY ' AS \"AS\" FROM (SELECT 1 AS copy)",
    "WITH delete AS (SELECT 1 AS insert) SELECT count(insert) OVER w FROM delete WINDOW w AS (ORDER BY insert)",
    "WITH\u00a0a AS (SELECT '\u00e9' AS b) SELECT b FROM a -- \u00e9",
)


@pytest.mark.parametrize("sql", QUESTIONS)
def test_questions_are_answered(trace, sql):
    answer = query.ask(trace.path, sql)
    assert len(answer) and answer.attrs["complete"] and answer.attrs["seconds"] >= 0


ATTACKS = (
    "DELETE FROM tokens",
    "DROP TABLE tokens",
    "UPDATE runs SET run = 'x'",
    "INSERT INTO tokens VALUES (1)",
    "CREATE TABLE t (a INTEGER)",
    "CREATE TEMP TABLE t AS SELECT 1",
    "CREATE MACRO f(a) AS a",
    "ALTER TABLE tokens ADD COLUMN a INTEGER",
    "TRUNCATE tokens",
    "VACUUM",
    "CHECKPOINT",
    "BEGIN",
    "PREPARE a AS SELECT 1",
    "COPY tokens TO '{out}'",
    "COPY (SELECT 1) TO '/dev/stdout'",
    "COPY tokens FROM '{secret}'",
    "EXPLAIN ANALYZE COPY tokens TO '{out}'",
    "COPY (PIVOT sequences ON lang USING count(*)) TO '{out}'",
    "EXPLAIN ANALYZE COPY (PIVOT sequences ON lang USING count(*)) TO '{out}'",
    "WITH x AS (COPY (SELECT 1) TO '{out}') SELECT 1",
    "WITH x AS (COPY (PIVOT sequences ON lang USING count(*)) TO '{out}') SELECT 1",
    "WITH x AS MATERIALIZED (DELETE FROM tokens RETURNING *) SELECT 1",
    "CREATE TABLE t AS PIVOT sequences ON lang",
    "EXPLAIN/**/DELETE FROM tokens",
    "EXPLAIN (ANALYZE) COPY tokens TO '{out}'",
    "EXPORT DATABASE '{out}'",
    "IMPORT DATABASE '{out}'",
    "ATTACH '{out}' AS other",
    "DETACH t",
    "USE other",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "SET lock_configuration = false",
    "RESET enable_external_access",
    "SET VARIABLE a = 1",
    "PRAGMA enable_profiling",
    "PRAGMA profile_output = '{out}'",
    "PRAGMA temp_directory = '{out}'",
    "CALL enable_logging(storage_path = '{out}')",
    "SELECT * FROM '{secret}'",
    "FROM '{secret}'",
    "SELECT * FROM read_csv('{secret}')",
    "SELECT * FROM read_csv_auto('{secret}')",
    "SELECT * FROM read_text('{secret}')",
    "SELECT * FROM read_blob('{secret}')",
    "SELECT * FROM read_json('{secret}')",
    "SELECT * FROM read_parquet('{secret}')",
    "SELECT * FROM parquet_metadata('{secret}')",
    "SELECT * FROM sniff_csv('{secret}')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM 'https://example.org/x.csv'",
    "SELECT * FROM query('SELECT * FROM read_text(''{secret}'')')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT * FROM read_text(''{secret}'')'))",
    "SELECT getenv('HOME')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM frame",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE tokens",
    "SET enable_external_access = true; SELECT * FROM read_text('{secret}')",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(trace, tmp_path, attack):
    """Nothing is read from elsewhere, written or changed, and one is told so in a line or two."""
    secret, out = tmp_path / "secret.csv", tmp_path / "out"
    secret.write_text("a,b\nhush,2\n")
    frame = pd.DataFrame({"a": ["hush"]})  # a name that a query might reach
    before = trace.path.read_bytes()
    with pytest.raises(InputError) as refused:
        query.ask(trace.path, attack.format(secret=secret, out=out, folder=tmp_path))
    assert len(frame) and str(refused.value) and "hush" not in str(refused.value)
    assert trace.path.read_bytes() == before and list(tmp_path.iterdir()) == [secret]


@pytest.mark.parametrize("sql", ["SELECT 1; SELECT 2", "CREATE TEMP TABLE t AS SELECT 1", "BEGIN", "SET threads = 1"])
def test_a_trace_takes_questions_only(trace, sql):
    with pytest.raises(InputError, match="only questions can be asked|expected one query"):
        trace.sql(sql)


def test_messages_say_what_to_do(trace):
    def said(sql: str) -> str:
        with pytest.raises(InputError) as refused:
            query.ask(trace.path, sql)
        return str(refused.value)

    assert "empty" in said("") and "empty" in said("-- only a comment")
    assert said("DROP TABLE tokens").startswith("DROP is refused: only questions")
    assert said("COPY (PIVOT sequences ON lang) TO 'x'").startswith("COPY is refused: only questions")
    assert said("FROM query('SELECT 1')") == "The function query is refused: write the query itself."
    assert "2 statements" in said("SELECT 1; SELECT 2")
    assert "no files and no network" in said("SELECT * FROM 'x.csv'")
    assert "(a, b)" in said("SELECT $a, $b")
    assert "syntax error" in said("SELEC 1")
    wrong = said("SELECT nope\nFROM tokens")
    assert "nope" in wrong and "^" in wrong.splitlines()[-1] and "\n\n" not in wrong
    assert "100" in said("SELECT error('100')")


def test_the_answer_is_what_the_trace_says(trace):
    answer = query.ask(
        trace.path, "SELECT lang, sum(n_tokens)::INTEGER AS n FROM sequences GROUP BY lang ORDER BY lang"
    )
    expected = trace.sequences().groupby("lang", dropna=False)["n_tokens"].sum()
    assert dict(zip(answer["lang"].dropna(), answer["n"], strict=False)) == expected[expected.index.notna()].to_dict()
    lists = query.ask(trace.path, "SELECT experts FROM routing WHERE layer = 0 ORDER BY seq, pos")
    held = [[one for one in row if one != 65535] for row in trace.experts(0).tolist()]
    assert lists["experts"].tolist() == held and isinstance(lists["experts"][0], list)


def test_long_answers_end_with_the_limit(trace):
    sql = "SELECT range AS n FROM range(100000)"
    whole = query.ask(trace.path, sql)
    assert len(whole) == 100_000 and whole.attrs["complete"]
    assert query.ask(trace.path, sql, most_rows=100_000).attrs["complete"]
    part = query.ask(trace.path, sql, most_rows=25_000)
    assert part["n"].tolist() == list(range(25_000)) and not part.attrs["complete"]
    assert not query.ask(trace.path, sql, most_bytes=1000).attrs["complete"]
    nothing = query.ask(trace.path, "SELECT 1 AS one WHERE false")
    assert list(nothing) == ["one"] and not len(nothing) and nothing.attrs["complete"]
    assert pickle.loads(pickle.dumps(part)).attrs["complete"] is False  # as it comes from another process


def test_names_of_columns_are_told_apart(trace):
    assert query.ask(trace.path, "SELECT 1 AS a, 2 AS a").columns.is_unique


def test_memory_is_limited(trace):
    with pytest.raises(InputError, match="more memory"):
        query.ask(trace.path, "SELECT list(range) FROM range(20000000)", memory="60MB")


def test_time_is_limited(trace):
    with pytest.raises(InputError, match="longer than 0.2 s"):
        query.ask(trace.path, "SELECT count(*) FROM range(1000000000) WHERE range * range % 7 = 9", seconds=0.2)


def test_examples_have_an_answer_and_a_chart(trace):
    for title, sql in query.examples(trace.run).items():
        answer = query.ask(trace.path, sql)
        assert len(answer) or "margin" in sql or "text" in sql, title  # not recorded in this trace
        if len(answer):
            assert charts.draw(answer, *charts.suggestion(answer)).data, title
    assert len(query.ask(trace.path, query.examples("it's; DROP TABLE tokens")["Loss by position"])) == 0


def test_every_column_has_a_meaning(trace):
    found = columns(trace.path)
    assert list(dict.fromkeys(found["table"])) == list(schema.TABLES) == list(TABLES) == list(COLUMNS)
    for table, rows in found.groupby("table"):
        assert rows["column"].tolist() == list(COLUMNS[str(table)])
    assert found["meaning"].str.len().min() > 5
    assert found.set_index(["table", "column"])["type"]["routing", "experts"] == "USMALLINT[]"


# --- charts


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {"lang": ["en", "de", "en", "de"], "layer": [0, 0, 1, 1], "n": [1.0, 2.0, np.nan, 4.0], "ok": [True] * 4}
    )


def test_series_have_every_row_once_in_the_colours_of_all_figures():
    from workbench import figures

    for kind in ("bars", "lines", "dots"):
        drawn = charts.draw(frame(), kind, "layer", "n", "lang")
        assert [one.name for one in drawn.data] == ["en", "de"]  # the order of all figures
        assert [list(one.x) for one in drawn.data] == [[0, 1], [0, 1]]
        assert list(drawn.data[1].y) == [2, 4] and drawn.data[0].marker.color == figures.style("en").colour
    assert drawn.layout.xaxis.title.text == "layer"


def test_heatmap_puts_every_number_into_its_cell():
    drawn = charts.draw(frame(), "heatmap", "layer", "lang", "n").data[0]
    assert list(drawn.x) == ["0", "1"] and list(drawn.y) == ["en", "de"]
    assert np.array_equal(np.array(drawn.z, float), [[1, np.nan], [2, 4]], equal_nan=True)


def test_histogram_counts_rows():
    numbers = charts.draw(frame(), "histogram", "n")
    assert sum(numbers.data[0].y) == 3  # one is missing
    labels = charts.draw(frame(), "histogram", "lang", colour="layer")
    assert [list(one.y) for one in labels.data] == [[1, 1], [1, 1]]
    one = charts.draw(pd.DataFrame({"a": [5]}), "histogram", "a")
    assert sum(one.data[0].y) == 1


def test_labels_from_data_stay_text():
    hostile = pd.DataFrame({"<b>x</b>": ["<script>alert(1)</script>", None], "n": [1, 2]})
    for kind in ("bars", "histogram", "lines"):
        drawn = charts.draw(hostile, kind, "<b>x</b>", "n").to_json()
        assert "<script>" not in drawn and "<b>" not in drawn and "u2013" in drawn


@pytest.mark.parametrize(
    "table, expected",
    [
        (frame(), ("lines", "layer", "n", "lang")),
        (frame().assign(lang="en"), ("dots", "layer", "n", None)),
        (frame()[["lang", "n"]], ("bars", "lang", "n", None)),
        (frame().iloc[:2][["layer", "n"]].assign(layer=[0, 1]), ("lines", "layer", "n", None)),
        (frame()[["lang", "layer", "n"]], ("lines", "layer", "n", "lang")),
        (pd.DataFrame({"layer": [0], "expert": [1], "n": [2]}), ("heatmap", "expert", "layer", "n")),
        (pd.DataFrame({"a": [0.5], "b": [1]}), ("dots", "b", "a", None)),
        (pd.DataFrame({"a": ["x"]}), ("histogram", "a", None, None)),
    ],
)
def test_a_chart_is_suggested(table, expected):
    found = charts.suggestion(table)
    assert found[0] == expected[0] and found == expected
    assert charts.draw(table, *found).data


@pytest.mark.parametrize(
    "arguments, why",
    [
        (("pie", "lang"), "no chart 'pie'"),
        (("bars", "nope", "n"), "no column 'nope'"),
        (("bars", "lang"), "take a vertical axis"),
        (("bars", "layer", "lang"), "isn't made of numbers"),
        (("heatmap", "layer", "lang"), "numbers for its colours"),
        (("heatmap", "ok", "lang", "n"), "aggregate"),
    ],
)
def test_what_a_chart_cannot_show_is_said(arguments, why):
    with pytest.raises(InputError, match=why):
        charts.draw(frame(), *arguments)


def test_charts_of_too_much_or_nothing():
    many = pd.DataFrame({"a": range(charts.MOST_POINTS + 1), "b": 1})
    with pytest.raises(InputError, match="too many"):
        charts.draw(many, "lines", "a", "b")
    assert charts.draw(many, "histogram", "a").data
    with pytest.raises(InputError, match="told apart"):
        charts.draw(many.head(100), "lines", "b", "b", "a")
    with pytest.raises(InputError, match="different values"):
        charts.draw(many.astype({"a": str}), "histogram", "a")
    with pytest.raises(InputError, match="no rows"):
        charts.draw(many.head(0), "lines", "a", "b")
    with pytest.raises(InputError, match="no columns"):
        charts.suggestion(pd.DataFrame())
