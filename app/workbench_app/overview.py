"""Overview: the runs of the file, the model, the texts, how even the load is, and whether anything is wrong."""

from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

from workbench import contents as made_of
from workbench import report, runs, validate
from workbench.background import Answer, Asked
from workbench.errors import InputError, RunError
from workbench.questions import Question
from workbench_app import messages, panel, poll, view

AT_ONCE = 4_000_000
"""Rows of routing that are checked without being asked; more take over ten seconds of every core."""
AS_TIME = st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm")


def head() -> None:
    """What the run is, and its size; a run that is being written is counted again and again."""
    known = view.runs()[view.run()]
    sizes = [
        ("Tokens", f"{known['tokens']:,}"),
        ("Texts", f"{known['sequences']:,}"),
        ("Languages", f"{known['languages']:,}"),
        ("Domains", f"{known['domains']:,}"),
        ("MoE layers", f"{known['layers']:,}"),
        ("Experts a layer", "/".join(map(str, known["experts"] or []))),
        ("Chosen a token", "/".join(map(str, known["top_k"] or []))),
    ]
    for column, (name, value) in zip(st.columns(len(sizes)), sizes, strict=True):
        column.metric(name, value)
    poll.done("overview-head")
    if known["status"] == "running":
        with poll.waiting("overview-head", lambda: False):
            st.caption("The run is being written: the numbers grow.")


def file_runs() -> None:
    """Every run of the file; a click opens one."""
    known = view.runs()
    st.subheader("Runs in this file", anchor=False)
    frame = runs.table(known.values())
    names = list(frame["run"])

    def choose() -> None:
        rows = st.session_state["overview_runs"]["selection"]["rows"]
        if rows:
            st.session_state["run"] = names[rows[0]]

    picking: dict[str, Any] = {"on_select": choose, "selection_mode": "single-row", "key": "overview_runs"}
    panel.table(
        frame,
        f"{view.whole().path.stem}-runs",
        column_config={
            "tokens": st.column_config.NumberColumn(format="localized"),
            "texts": st.column_config.NumberColumn(format="localized"),
            "recipe": st.column_config.TextColumn(width="medium"),
            "started": AS_TIME,
            "finished": AS_TIME,
        },
        **(picking if len(frame) > 1 else {}),
    )
    if len(frame) > 1:
        st.caption("Select a row to look at that run on all pages.")


def model_card() -> None:
    """The model as the run names it; its parameters where the checkpoint is on this machine."""
    trace, known = view.whole(), view.runs()[view.run()]
    st.subheader("Model", anchor=False)
    layers = trace.layers
    rows = [
        ("model", known["model"]),
        ("revision", known["revision"]),
        ("family", known["family"]),
        ("MoE layers", trace.n_layers),
        ("stacks", _values(layers["stack"])),
        ("experts a layer", _values(layers["n_experts"])),
        ("chosen a token", _values(layers["top_k"])),
        ("shared experts", _values(layers["n_shared"])),
        ("gating", _values(layers["gating"])),
    ]
    ask = partial(parameters, str(known["model"]), known["revision"])
    described, why = ask() if known["model"] else (None, "")
    if described is not None:
        total, active = int(described["parameters"]), int(described["active_parameters"])
        rows += [
            ("parameters", f"{total:,}"),
            ("active a token", f"{active:,} ({active / total:.0%})"),
            ("in routed experts", f"{int(described['expert_parameters']):,}"),
        ]
    facts(rows)
    poll.done("overview-model")
    if why is None:
        with poll.waiting("overview-model", lambda: ask()[1] is not None):
            st.caption("Counting parameters …")
    elif why:
        st.caption(messages.text(why))
    if described is not None and described["caveat"]:
        st.info(messages.text(described["caveat"]), icon=":material/info:")
    with st.expander("Every layer", icon=":material/layers:"):
        panel.table(layers, "layers")


def parameters(model: str, revision: str | None) -> tuple[dict[Any, Any] | None, str | None]:
    """What `workbench.models.describe` says of a checkpoint on this machine, or why there is nothing; None: not yet."""
    arguments = (("revision", revision),) if revision else ()
    answer = view.workers().ask(Asked("describe", arguments, model=model))
    if not answer.wait(0):
        return None, None
    try:
        return answer.table().to_dict("records")[0], ""
    except (InputError, RunError):
        return None, "The checkpoint isn't on this machine, so its parameters aren't counted here."


def recording() -> None:
    """What was recorded, with what, and how to cite it."""
    trace, known = view.whole(), view.runs()[view.run()]
    st.subheader("Run", anchor=False)
    corpus, versions = runs.corpus_of(known), runs.versions_of(known)
    settings = {name: value for name, value in corpus.items() if name not in ("names", "fingerprint", "tokens")}
    facts(
        [
            ("run", trace.run),
            ("status", known["status"]),
            ("recipe", runs.in_words(known["recipe"])),
            ("recorded", ", ".join(sorted(trace.recorded))),
            ("number format", known["dtype"]),
            ("corpora", ", ".join(runs.strings(corpus.get("names")))),
            ("fingerprint", str(corpus.get("fingerprint") or "")[:16]),
            ("settings", ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)),
            ("versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
            ("started", report.moment(known["started"])),
            ("finished", report.moment(known["finished"])),
            ("file", str(trace.path)),
        ]
    )
    with st.expander("How to cite this run", icon=":material/format_quote:"):
        st.code(runs.citation(trace.path.name, known), None, wrap_lines=True)


def facts(rows: list[tuple[str, Any]]) -> None:
    """Names and values, those that are known; text from data stays as it is."""
    shown = [(name, value) for name, value in rows if report.present(value)]
    st.table(
        pd.DataFrame({"value": [str(value) for _, value in shown]}, index=[name for name, _ in shown]).map(
            messages.text
        ),
        border="horizontal",
        hide_header=True,
    )


def texts() -> None:
    """Texts and tokens by language, domain and source."""
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("Texts", anchor=False, width="stretch")
        panel.definition(made_of.__doc__ or "")
    by = st.segmented_control(
        "by",
        list(made_of.COLUMNS),
        default="lang",
        required=True,
        format_func=made_of.COLUMNS.__getitem__,
        key="overview_by",
        bind="query-params",
        label_visibility="collapsed",
    )
    frame = counted(view.version(view.whole()), by)
    if not len(frame):
        st.info("No text has been traced yet.", icon=":material/hourglass_empty:")
        return
    left, right = st.columns([3, 2])
    with left:
        panel.figure(made_of.figure(frame), f"texts-{by}")
    with right:
        panel.table(
            frame,
            f"texts-by-{by}",
            height=260,
            column_config={
                "tokens": st.column_config.NumberColumn(format="localized"),
                "share": st.column_config.NumberColumn(format="percent"),
            },
        )


@st.cache_data(max_entries=16, show_spinner=False)
def counted(version: view.Version, by: str) -> pd.DataFrame:
    """`workbench.contents.contents`."""
    return made_of.contents(version[0], version[1], by)


def problems() -> None:
    """What `workbench.validate` finds, in the background."""
    trace = view.whole()
    with st.container(horizontal=True, vertical_alignment="center"):
        st.subheader("Problems", anchor=False, width="stretch")
        panel.definition(validate.__doc__ or "", "What is checked")
    asked = Asked("validate", (), str(trace.path), trace.run, trace.n_tokens, started=str(trace.started))
    answer = view.workers().known(asked)
    poll.done("overview-problems")
    if answer is None or answer.cancelled:
        rows = 0 if trace.counted else trace.n_tokens * trace.n_layers
        if rows > AT_ONCE or answer is not None:
            st.caption(
                f"Every invariant of the file can be checked: {rows:,} rows of routing take about "
                f"{max(1, round(rows / 750_000)):,} seconds."
            )
            if not st.button("Check the trace", icon=":material/fact_check:", key="overview_check"):
                return
        answer = view.workers().ask(asked, len(validate.CHECKS))
        answer.wait(0.1)
    if not answer.done:
        checking(answer)
        return
    found = answer.table()
    if not len(found):
        st.success(f"None: all {len(validate.CHECKS)} checks passed.", icon=":material/verified:")
        return
    broken = int((found["severity"] == "error").sum())
    if broken:
        st.error(f"{broken} of the file's invariants are broken: numbers about this run can be wrong.")
    else:
        st.warning("Nothing is broken, but this may not be as meant.")
    panel.table(found, f"{trace.run}-problems")


def checking(answer: Answer) -> None:
    """Progress, and a button that cancels."""
    done, of = answer.progress
    with poll.waiting("overview-problems", lambda: answer.done):
        st.progress(done / of, f"{answer.seconds:.0f} s: check {done} of {of}", width="stretch")
        st.button("Cancel", key="overview_cancel", icon=":material/close:", on_click=answer.cancel)


def guarded(show: Any) -> None:
    """Errors as messages, in a fragment too."""
    with messages.guarded():
        show()


def _values(column: pd.Series) -> str:
    return " / ".join(dict.fromkeys(str(value) for value in column.dropna()))


view.need_trace()
name = view.runs()[view.run()]["model"] or view.run()
st.title(messages.text(report.model_name({"model": name}, view.whole())), anchor=False)
st.caption(messages.text(report.subtitle(view.whole())))
st.fragment(guarded, key="overview-head")(head)
if view.whole().n_tokens == 0:
    st.info("The run has no tokens yet: the page fills as texts are traced.", icon=":material/hourglass_empty:")
file_runs()
st.fragment(guarded, key="overview-problems")(problems)
left, right = st.columns(2, gap="large")
with left:
    st.fragment(guarded, key="overview-model")(model_card)
with right:
    recording()
st.fragment(guarded, key="overview-texts")(texts)
if view.whole().n_tokens:
    panel.analysis(Question("balance", {}, "Balance of each layer"))
    panel.analysis(Question("load", {}, "Every expert"))
