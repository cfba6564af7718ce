"""Specialisation: which experts prefer which languages, domains, token ids, or any other label of the texts."""

from collections.abc import Sequence

import streamlit as st

from workbench import figures, questions
from workbench.questions import Question
from workbench_app import messages, panel, view
from workbench_app.topics import Topic, sequences, show, values


def labelled() -> tuple[str, str | None]:
    """The column that texts are compared by, and the one inside whose values labels are shuffled, as chosen."""
    columns = panel.groupings()
    left, right, _ = st.columns([1, 1, 2])
    by = left.selectbox(
        "Compare by", columns, key="specialisation_by", bind="query-params",
        help="Any column of the texts, or phase and position of the tokens.",
    )  # fmt: skip
    table = sequences()
    strata = [column for column in columns if column != by and questions.varies(table, by, column)]
    usual = dict((one, within) for one, _, within in questions.LABELS).get(by)
    choices = [None, *strata]
    key = f"specialisation_within_{by}"
    within = right.selectbox(
        "Labels are shuffled", choices, choices.index(usual) if usual in strata else 0, key=key, bind="query-params",
        format_func=lambda column: "among all texts" if column is None else f"within each {figures.noun(column)}",
        help="What chance gives is found by shuffling labels. Within the values of another column, what that column "
        "explains isn't taken for specialisation: languages within a source, domains within a language.",
    )  # fmt: skip
    return by, within


def two_filters(by: str) -> Sequence[Question]:
    """Which texts against which others."""
    known = values(by)
    first = f"{by}={known[0]}" if known else ""
    left, right, _ = st.columns([1, 1, 2])
    group = left.text_input(
        "These texts", first, key=f"specialisation_group_{by}", bind="query-params",
        help="A filter: `lang=de`, `domain=code-python,code-c`, `source=udhr & lang~^zh`, `phase=generated`, "
        "`text~\\d`.",
    )  # fmt: skip
    versus = right.text_input(
        "against", key=f"specialisation_versus_{by}", bind="query-params", placeholder="all others",
        help="A filter as well; empty: all tokens that the first one doesn't mean.",
    )  # fmt: skip
    if not group.strip():
        st.info("Say which texts to contrast, for example `lang=de`.", icon=":material/filter_alt:")
        return []
    return [Question("contrast", {"group": group, "versus": versus or None}, "Which experts work more for them")]


def task() -> Sequence[Question]:
    """Which texts are the task."""
    table = sequences()
    known = table.groupby("domain")["lang"].nunique().to_dict() if {"domain", "lang"} <= set(table) else {}
    if max(known.values(), default=0) < 2:
        st.info(
            "Task experts take texts of one task in several languages: a corpus with `domain` and `lang`, such as "
            "`workbench trace MODEL --corpus demo`.",
            icon=":material/translate:",
        )
        return []
    left, right, _ = st.columns([1, 1, 2])
    chosen = left.text_input(
        "Task",
        f"domain={max(known, key=known.__getitem__)}",
        key="specialisation_task",
        bind="query-params",
        help="A filter: the texts of the task.",
    )
    general = right.text_input(
        "General texts", key="specialisation_general", bind="query-params", placeholder="all others",
        help="A filter: the texts to compare with.",
    )  # fmt: skip
    arguments = {"task": chosen or None, "general": general or None}
    return [Question("task_experts", arguments, "Experts of a task, in each language")]


view.need_trace()
st.title("Specialisation", anchor=False)
with messages.guarded():
    by, within = labelled()
    noun = messages.text(figures.noun(by))
    section = questions.labels(sequences(), by, noun, within or "")
    how_much, which, alike = section["questions"]
    show(
        "specialisation",
        [
            Topic(
                "Experts", section["lead"], [which, how_much], key=by, fixed=("by", "within")
            ),
            Topic(
                "Groups", f"Which values of {noun} share their experts?", [alike], key=by, fixed=("by",),
            ),
            Topic(
                "Load",
                f"How evenly is the work of each {noun} spread over the experts?",
                [
                    Question("balance", {"by": by}, f"Balance by {noun}"),
                    Question("load", {"by": by}, f"Every expert by {noun}", questions.busiest, ", the busiest experts"),
                ],
                key=by,
                fixed=("by",),
            ),
            Topic(
                "Two filters",
                "Any texts against any others: the experts that work more, or less, for them.",
                key=by,
                fixed=("group", "versus"),
                begin=lambda: two_filters(by),
            ),
            Topic(
                "Tasks",
                "Does a task keep its experts when the language changes?",
                key="tasks",
                fixed=("task", "general"),
                begin=task,
            ),
            Topic(
                "Token ids",
                "How much does the id of a token alone decide?",
                [
                    Question(
                        "vocabulary", {}, "How far the token id alone decides", questions.favourites,
                        ", the surest ids",
                    )
                ],
            ),
        ],
    )  # fmt: skip
