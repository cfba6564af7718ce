"""The page Query in a browser."""

from urllib.parse import parse_qs, urlencode, urlsplit

import pandas as pd
import pytest
from browser import download, finished, screenshot, serving, settled, visit

from workbench.tracefile import Trace

FOREVER = "SELECT count(*) FROM range(100000000) a, range(100000) b WHERE a.range * b.range % 7 = 3"


@pytest.fixture(scope="module")
def server(demo_trace):
    with serving(demo_trace, "--model", "demo") as one:
        yield one


def ask(page, sql: str) -> None:
    field = page.get_by_role("textbox", name="SQL")
    field.fill(sql)
    field.press("Control+Enter")
    finished(page)


def said(page) -> str:
    return "\n".join(page.get_by_test_id("stAlert").all_inner_texts())


def test_an_example_as_table_chart_link_and_file(browse, server, demo_trace, tmp_path):
    page = browse(server, "/query")
    page.get_by_role("button", name="Load of every expert").click()
    finished(page)
    trace = Trace(demo_trace)
    expected = trace.sql("SELECT layer, expert, count(*) AS tokens FROM selections GROUP BY ALL ORDER BY ALL")
    for ending, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        button = page.locator(".st-key-table-query button", has_text=ending.upper()).first
        found = read(download(page, button.click, tmp_path))
        pd.testing.assert_frame_equal(found, expected, check_dtype=False)
    page.get_by_role("tab", name="Chart").click()
    settled(page)
    assert page.locator(".js-plotly-plot .heatmaplayer").count() == 1
    page.locator(".st-key-query_kind").get_by_role("combobox").click()
    page.get_by_role("option", name="dots").click()
    settled(page)
    screenshot(page, "query", tmp_path)
    other = browse(server, page.url.removeprefix(server.url), scheme="dark", width=1920)
    finished(other)
    assert other.locator(".js-plotly-plot .scatterlayer").count() == 1
    assert "unnest(experts)" in other.get_by_role("textbox", name="SQL").input_value()
    screenshot(other, "query-dark", tmp_path)
    visit(page, "Compare")
    visit(page, "Query")
    finished(page)
    assert "query_sql" in page.url and page.get_by_test_id("stDataFrame").or_(page.locator(".js-plotly-plot")).count()


def test_errors_and_refusals_are_messages(browse, server):
    page = browse(server, "/query")
    ask(page, "SELECT nope\nFROM tokens")
    assert 'Referenced column "nope"' in said(page)
    assert "^^^^" in page.get_by_test_id("stCode").inner_text()
    for sql, why in (
        ("COPY tokens TO '/tmp/never.csv'", "COPY is refused"),
        ("SELECT * FROM read_csv('/etc/passwd')", "no files and no network"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("", "Write a query"),
    ):
        ask(page, sql)
        assert why in said(page), sql
    ask(page, "SELECT '<script>alert(1)</script>' AS \"<b>x</b>\", '\u202eright' AS \"=1+1\"")
    assert page.get_by_test_id("stDataFrame").count() == 1 and said(page) == ""


def test_a_slow_query_can_be_cancelled(browse, server):
    page = browse(server, "/query")
    field = page.get_by_role("textbox", name="SQL")
    field.fill(FOREVER)
    page.get_by_test_id("stFormSubmitButton").get_by_role("button").last.click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("Cancelled.").wait_for()
    ask(page, "SELECT 42 AS answer")
    assert page.get_by_test_id("stDataFrame").count() == 1


def test_long_answers_and_long_queries_say_so(browse, server):
    page = browse(server, "/query?" + urlencode({"query_sql": "SELECT range FROM range(2000000)"}))
    finished(page)
    assert "first 1,000,000" in said(page)
    sql = "SELECT 1 AS one -- " + "x" * 5000
    ask(page, sql)
    page.get_by_text("a link to this view won't hold it").wait_for()
    assert "query_sql" not in parse_qs(urlsplit(page.url).query)
