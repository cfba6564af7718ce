"""What pages show: tables, figures and definitions, each with what one does with it, and whole analyses."""

import inspect
import re
import shlex
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_type_hints

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

from workbench import analysis as analyses
from workbench import figures, linking, report
from workbench.analysis.counting import MOST_GROUPS
from workbench.analysis.matching import other_run
from workbench.background import Answer, Asked
from workbench.errors import InputError
from workbench.export import save_table
from workbench.questions import Question
from workbench_app import messages, poll, view

MOST_ROWS = 5_000
"""Rows of a table that the page shows; all can be downloaded."""
BEGINNING = {"describe": "asking the model how large it is"}
"""What is said of a question that has no layer yet, if not that it starts."""
AT_ONCE = 0.1
"""Seconds to wait for an answer before its progress is shown."""


def table(frame: pd.DataFrame, name: str, **options: Any) -> Any:
    """A table and the buttons that download the whole of it as CSV and Parquet.

    name     of the file, and of the widgets: unique on the page
    options  further arguments of st.dataframe (column_config, height, on_select with its key, …)

    Returns what st.dataframe returns.
    """
    with st.container(key=f"table-{name}", gap="small"):
        # Unlike other numbers these have any number of zeros behind the point.
        tiny = {name: st.column_config.NumberColumn(format="%.3g") for name in ("p", "q") if name in frame}
        options["column_config"] = tiny | (options.get("column_config") or {})
        shown = st.dataframe(frame.head(MOST_ROWS), hide_index=True, **options)
        with st.container(horizontal=True, vertical_alignment="center", gap="small"):
            rows = f"{len(frame):,} row{'s' * (len(frame) != 1)}"
            more = f", the first {MOST_ROWS:,} shown" if len(frame) > MOST_ROWS else ""
            st.caption(rows + more, width="stretch")
            table_downloads(frame, name)
    return shown


def table_downloads(frame: pd.DataFrame, name: str) -> None:
    """The buttons that download a table as CSV or Parquet."""
    for ending, mime in ((".csv", "text/csv"), (".parquet", "application/vnd.apache.parquet")):
        download(ending, partial(_table_file, frame, ending), f"{name}{ending}", mime)


def figure(drawn: go.Figure, name: str, *, on_select: Any = "ignore", clickable: go.Figure | None = None) -> Any:
    """A figure in the colours of the page's theme, and a menu that downloads it as SVG, PNG or HTML.

    name       of the file, and of the widgets: unique on the page
    on_select  "rerun": return what was clicked, as st.plotly_chart does
    clickable  what `workbench.linking.clickable` made of it, to be shown in its place
    """
    with st.container(key=f"figure-{name}", gap="small"):
        dark, shown = st.context.theme.type == "dark", clickable or drawn
        selected = st.plotly_chart(
            figures.on_dark(shown) if dark else shown,
            theme=None,
            config=figures.CONFIG,
            key=f"plot-{name}",
            on_select=on_select,
            selection_mode="points",
        )
        figure_downloads(drawn, name)
    return selected


def figure_downloads(drawn: go.Figure | Callable[[], go.Figure], name: str) -> None:
    """The buttons that download a figure, or what draws it, as SVG, PNG or HTML."""
    with st.container(horizontal=True, horizontal_alignment="right", gap="small"):
        for ending, mime in ((".svg", "image/svg+xml"), (".png", "image/png"), (".html", "text/html")):
            download(ending, partial(_figure_file, drawn, ending), f"{name}{ending}", mime)


def download(ending: str, make: Callable[[], bytes], file_name: str, mime: str) -> None:
    """A small button; the file is made when it is clicked."""
    label = ending.removeprefix(".").upper()
    st.download_button(
        label, make, file_name, mime, key=f"download-{file_name}", type="tertiary", icon=":material/download:",
        on_click="ignore", help=f"Download {messages.text(file_name)}",
    )  # fmt: skip


def definition(text: str, label: str = "Definition") -> None:
    """How the numbers are defined, one click away: the docstring of what computes them."""
    with st.popover(label, icon=":material/menu_book:", type="tertiary"):
        st.html(f"<div style='max-width: 46rem'>{report.definition(text)}</div>")


def analysis(question: Question, *, key: str = "", fixed: Collection[str] = ()) -> None:
    """One analysis: its options, its answer as findings, figure and table, how it is defined, and how to get it again.

    question   from workbench.questions, or made for the page; its arguments are the defaults of the options, its
               heading is Markdown
    key        told apart from another panel of the same analysis on the page
    fixed      options that aren't offered, because the page has a widget for them
    """
    name = "-".join(part for part in (question.name, key) if part)
    st.fragment(_panel, key=name)(question, name, fixed)


def _panel(question: Question, name: str, fixed: Collection[str]) -> None:
    with st.container(key=f"panel-{name}"):
        with st.container(horizontal=True, vertical_alignment="center"):
            st.subheader(question.heading or analyses.question(question.name), anchor=False, width="stretch")
            arguments = None
            with messages.guarded():
                arguments = options(question, name, fixed)
            definition(analyses.file(question.name).__doc__ or "")
        with messages.guarded():
            if arguments is not None:
                answered(asking(question.name, arguments), question, name)


def asking(name: str, arguments: dict[str, Any]) -> Asked:
    """A question about what the sidebar means. InputError where that has no tokens."""
    pairs = tuple(sorted(arguments.items()))
    if analyses.subject(analyses.find(name)[0]) == "model":
        return Asked(name, pairs, model=str(view.model_name()))
    found = view.whole()
    if not view.trace().n_tokens:
        raise InputError(
            "the texts that are looked at have no tokens: loosen the filter in the sidebar, or wait until some are "
            "traced."
        )
    path, run, n_tokens, started = view.version(found)
    if "other" in arguments:  # a run that may grow or be replaced, too
        other = view.version(other_run(found, arguments["other"]))
        started = f"{started}, the other {other[3]}, {other[2]} tokens"
    return Asked(name, pairs, path, run, n_tokens, view.where(), view.tokens(), started=started)


def answered(asked: Asked, question: Question, name: str) -> None:
    """The answer with all that belongs to it, or how far it is."""
    answer = finished(asked, name)
    if answer is not None:
        show(answer, question, name)


def finished(asked: Asked, name: str, *, stays: bool = False) -> Answer | None:
    """The answer where it is there; else None, and how far it is with a button that cancels is shown.

    name   of its widgets, unique on the page
    stays  it was asked for by a click, and is answered even if nobody waits
    """
    workers = view.workers()
    answer = workers.known(asked)
    poll.done(name)
    if answer is not None and answer.cancelled:
        st.info("Cancelled.", icon=":material/cancel:")
        if not st.button("Start again", key=f"again-{name}"):
            return None
        answer = None
    if answer is None:
        answer = workers.ask(asked, view.whole().n_layers)
        answer.wait(AT_ONCE)
    if answer.done and not answer.cancelled:  # another session may just have left the question
        return answer
    done, layers = answer.progress
    with poll.waiting(name, lambda: answer.done, None if stays else asked):
        text = f"layer {done} of {layers}" if layers and done else BEGINNING.get(asked.name, "starting")
        st.progress(done / layers if layers else 0.0, f"{answer.seconds:.0f} s: {text}", width="stretch")
        st.button("Cancel", key=f"cancel-{name}", icon=":material/close:", on_click=answer.cancel)
    return None


def show(answer: Answer, question: Question, name: str) -> None:
    """Findings, figure, table and command of an answer that is there."""
    frame = answer.table()
    findings = analyses.file(question.name).findings(frame)
    st.markdown("\n".join(f"- {messages.text(finding)}" for finding in findings))
    drawn, clickable = _drawn(answer.asked, answer)
    clicked = figure(drawn, name, on_select="rerun", clickable=clickable)
    if points := clicked["selection"]["points"]:
        linked(linking.rows(frame, clickable, points[0]), name)
    else:
        st.caption("Click a point to see its rows of the table.")
    choice = messages.text(question.choice.lstrip(",") or " the rows worth a look")
    picked = question.pick is not None and st.toggle(f"Only{choice}", True, key=f"picked-{name}")
    table(question.pick(frame) if picked and question.pick else frame, name)
    with st.expander("The same on the command line", icon=":material/terminal:"):
        st.code(command(question.name, dict(answer.asked.arguments)), "sh", wrap_lines=True)


def linked(rows: pd.DataFrame, name: str) -> None:
    """The rows that a clicked point means."""
    if rows.empty:
        st.caption("What you clicked stands for no single row of the table.")
        return
    with st.container(border=True, key=f"clicked-{name}"):
        st.markdown(f"**What you clicked:** {len(rows):,} row{'s' * (len(rows) != 1)} of the table")
        table(rows, f"{name}-clicked")


@st.cache_resource(max_entries=64, show_spinner=False, hash_funcs={Asked: repr})
def _drawn(asked: Asked, _answer: Answer) -> tuple[go.Figure, go.Figure]:
    """The figure, and the same with points that can be clicked."""
    drawn = analyses.find(asked.name)[1](_answer.table())
    return drawn, linking.clickable(drawn)


def command(name: str, arguments: dict[str, Any]) -> str:
    """The command line that gives the table of all texts of the run."""
    given = [f"--set {shlex.quote(f'{key}={_written(value)}')}" for key, value in arguments.items()]
    ask = analyses.find(name)[0]
    if analyses.subject(ask) == "model":
        model = str(view.model_name())
        subject = ["MODEL" if model.startswith("-") else shlex.quote(model)]  # it would be taken for an option
    else:
        subject = [shlex.quote(str(view.file())), "--run", shlex.quote(view.run())]
    return " ".join(["workbench analyze", name, *subject, *given, "--out", f"{name}.csv"])


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def options(question: Question, name: str, fixed: Collection[str] = ()) -> dict[str, Any]:
    """What the user chose of the options of an analysis, those that differ from their defaults.

    InputError for text that makes no value. The options are the parameters of the function, explained by its docstring.
    """
    ask = analyses.find(question.name)[0]
    hints, explained = get_type_hints(ask), parameters(inspect.getdoc(ask) or "")
    chosen: dict[str, Any] = {}
    with st.popover("Options", icon=":material/tune:", type="tertiary"):
        for option, parameter in list(inspect.signature(ask).parameters.items())[1:]:
            default = question.arguments.get(option, parameter.default)
            value = default
            if option not in fixed:
                value = widget(option, hints[option], default, f"{name}.{option}", explained.get(option))
            if value != parameter.default:
                chosen[option] = value
    return chosen


def widget(option: str, hint: Any, default: Any, key: str, explained: str | None) -> Any:
    """The value of one option, by a widget that suits its type."""
    shared: dict[str, Any] = {"key": key, "help": explained, "bind": "query-params"}
    label = option.replace("_", " ")
    named = re.findall(r'"(\w+)"', explained or "") if (explained or "").startswith('"') else []
    if default in named:  # an option that is explained by its choices
        return st.selectbox(label, named, named.index(default), **shared)
    if option in ("by", "within"):
        columns = [*([None] if default is None or "None" in str(hint) else []), *groupings()]
        at = columns.index(default) if default in columns else 0
        return st.selectbox(label, columns, at, format_func=lambda column: "–" if column is None else column, **shared)
    if hint is bool:
        return st.toggle(label, default, **shared)
    text = st.text_input(label, "" if default in (None, inspect.Parameter.empty) else _written(default), **shared)
    return analyses.value(option, text, hint) if text.strip() else default


def groupings() -> list[str]:
    """Columns that texts or tokens can be grouped by."""
    found = view.whole()
    return _groupings(view.version(found))


@st.cache_data(max_entries=16, show_spinner=False)
def _groupings(version: view.Version) -> list[str]:
    sequences = view.whole().sequences()
    plain = [name for name in sequences.columns if name not in ("seq", "sha256", "n_prompt", "n_tokens", "segment_id")]
    few = [name for name in plain if 0 < sequences[name].dropna().astype(str).nunique() <= MOST_GROUPS]
    return list(dict.fromkeys([*few, "phase", "position"]))


def parameters(text: str) -> dict[str, str]:
    """What a docstring says of each parameter: lines such as `by, within  columns of the sequences`."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        begun = re.match(r"((?:\w+)(?:, \w+)*)\s{2,}(\S.*)", line)
        if begun:
            names = begun[1].split(", ")
            found |= dict.fromkeys(names, begun[2])
        elif names and line.startswith(" ") and line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        else:
            names = []
    return found


def _table_file(frame: pd.DataFrame, ending: str) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"table{ending}"
        save_table(frame, path)
        return path.read_bytes()


def _figure_file(drawn: go.Figure | Callable[[], go.Figure], ending: str) -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"figure{ending}"
        figures.save(drawn if isinstance(drawn, go.Figure) else drawn(), path)
        return path.read_bytes()
