"""Query: SQL over the file, the tables beside it, and the answer as table and chart."""

from typing import Any

import pandas as pd
import streamlit as st

from workbench import charts, columns, query
from workbench.background import Asked, Workers
from workbench.errors import InputError
from workbench_app import messages, panel, poll, view

LONGEST_LINK = 4_000
"""Characters of a query that a link can hold."""
AT_ONCE = 0.3
"""Seconds to wait for an answer before its progress is shown."""
STYLE = "<style>.st-key-query_editor textarea { font-family: var(--st-code-font, monospace); }</style>"
CHART = ("query_kind", *(f"query_{kind}_{axis}" for kind in charts.KINDS for axis in ("x", "y", "colour")))
"""Keys of what a chart shows."""


@st.cache_resource(show_spinner=False)
def worker() -> Workers:
    """A process of its own for the queries of all sessions: analyses don't keep them waiting, and it can be ended."""
    found = Workers(1)
    found.warm()
    return found


@st.cache_data(max_entries=8, show_spinner=False)
def described(path: str) -> pd.DataFrame:
    """`workbench.columns.columns`."""
    return columns.columns(path)


def tables() -> None:
    """The tables of the file with their columns."""
    st.subheader("Tables", anchor=False)
    found = described(str(view.file()))
    for table, rows in found.groupby("table", sort=False):
        with st.expander(f"`{table}`", icon=":material/table:"):
            st.caption(columns.TABLES[str(table)])
            shown = rows[["column", "type", "meaning"]]
            lines = ["| " + " | ".join(map(messages.text, row)) + " |" for row in shown.itertuples(index=False)]
            st.markdown("\n".join(["| column | type | meaning |", "|---|---|---|", *lines]))


def run(sql: str) -> None:
    """Ask a query anew: it stands in the editor, and in the link if that can hold it."""
    asked = st.session_state.get("query_asked", ("", 0))
    st.session_state["query_editor"] = sql
    st.session_state["query_asked"] = (sql, asked[1] + 1)
    if sql != asked[0]:
        for key in CHART:  # they name columns of another table
            st.session_state.pop(key, None)


def typed() -> None:
    """Ask what stands in the editor."""
    run(st.session_state["query_editor"])


def restore() -> None:
    """The query of the link, or the one that was asked before another page was looked at."""
    sql, _ = st.session_state.setdefault("query_asked", (st.query_params.get("query_sql", ""), 0))
    st.session_state.setdefault("query_editor", sql or next(iter(query.examples(view.run()).values())))
    if sql and len(sql) <= LONGEST_LINK:
        st.query_params["query_sql"] = sql
    else:
        st.query_params.pop("query_sql", None)


def editor() -> None:
    """The query."""
    st.html(STYLE)
    with st.form("query-form", border=False):
        st.text_area(
            "SQL", key="query_editor", height=190, placeholder="SELECT lang, count(*) FROM sequences GROUP BY lang",
            help="DuckDB's SQL over all runs of the file, read-only. Ctrl+Enter runs it.",
        )  # fmt: skip
        with st.container(horizontal=True, vertical_alignment="center"):
            st.form_submit_button(
                "Run", on_click=typed, type="primary", icon=":material/play_arrow:", help="Ctrl+Enter"
            )
            st.caption("The sidebar's choice of run and texts doesn't count here: the query says which rows it means.")


def examples() -> None:
    """What can be asked; a click asks it."""
    st.subheader("Examples", anchor=False)
    with st.container(gap="xxsmall"):
        for number, (title, sql) in enumerate(query.examples(view.run()).items()):
            st.button(
                title,
                key=f"query_example_{number}",
                on_click=run,
                args=(sql,),
                type="tertiary",
                icon=":material/play_arrow:",
            )


def result() -> None:
    """The answer to the last query that was run."""
    sql, times = st.session_state["query_asked"]
    if not sql.strip():
        st.info("Write a query and run it, or click an example.", icon=":material/database:")
        return
    if len(sql) > LONGEST_LINK:
        st.caption(f"This query is longer than {LONGEST_LINK:,} characters: a link to this view won't hold it.")
    query.check(sql)
    # A file that has grown, or has other runs, is asked again.
    known = view.runs().values()
    size, started = sum(one["tokens"] for one in known), " ".join(str(one["started"]) for one in known)
    asked = Asked("query", (("sql", sql), ("times", times)), str(view.file()), n_tokens=size, started=started)
    answer = worker().known(asked)
    poll.done("query-result")
    if answer is not None and answer.cancelled:
        st.info("Cancelled. Run it again, or ask for less.", icon=":material/cancel:")
        return
    if answer is None:
        answer = worker().ask(asked)
        answer.wait(AT_ONCE)
    if not answer.done:
        with poll.waiting("query-result", lambda: answer.done):
            st.progress(min(0.95, answer.seconds / 60), f"{answer.seconds:.0f} s: the query runs", width="stretch")
            st.button("Cancel", key="query_cancel", icon=":material/close:", on_click=answer.cancel)
        return
    show(answer.table())


def show(frame: pd.DataFrame) -> None:
    """The table, and a chart of it."""
    if not frame.attrs["complete"]:
        st.warning(
            f"The answer has more rows; these are its first {len(frame):,}. Aggregate in SQL, or write the whole table "
            "with `workbench export`.",
            icon=":material/content_cut:",
        )
    as_table, as_chart = st.tabs(["Table", "Chart"], key="query_tab", bind="query-params", on_change="rerun")
    with as_table:
        st.caption(f"Answered in {frame.attrs['seconds']:.2f} s")
        panel.table(frame, "query", height=min(420, 36 * len(frame) + 40))
    if as_chart.open:
        with as_chart:
            chart(frame)


def chart(frame: pd.DataFrame) -> None:
    """The chart that was chosen, at first one that suits the table."""
    frame = frame.set_axis(list(map(str, frame.columns)), axis=1)
    names = list(frame.columns)
    with st.container(horizontal=True):
        kind = choice("Chart", list(charts.KINDS), charts.suggestion(frame)[0], "query_kind")
        _, x, y, colour = charts.suggestion(frame, kind)
        x = choice("x", names, x, f"query_{kind}_x")
        y = None if kind == "histogram" else choice("y", names, y, f"query_{kind}_y")
        colour = choice("colour", [None, *names], colour, f"query_{kind}_colour")
    panel.figure(charts.draw(frame, kind, x, y, colour), "query-chart")


def choice(label: str, options: list, default: Any, key: str) -> Any:
    """One of some options, in the link; the default where what the link says is none of them."""
    at = options.index(default) if default in options else 0
    return st.selectbox(
        label, options, at, key=key, bind="query-params", format_func=lambda one: "–" if one is None else str(one)
    )


def guarded() -> None:
    """The result; errors as messages, with the place that DuckDB points at."""
    with messages.guarded():
        try:
            result()
        except InputError as error:
            said, _, place = str(error).partition("\n")
            st.error(messages.text(said), icon=":material/error:")
            if place:
                st.code(place, None, wrap_lines=True)


view.need_trace()
restore()
st.title("Query", anchor=False)
left, right = st.columns([5, 3], gap="large")
with left:
    editor()
    st.fragment(guarded, key="query-result")()
with right:
    tables()
    examples()
