"""A page of analyses: a tab a topic, and only what the open one asks is computed."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import pandas as pd
import streamlit as st

from workbench import figures
from workbench.questions import Question
from workbench_app import messages, panel, view


class Topic(NamedTuple):
    """A tab: its title, what it asks in a sentence, and its analyses.

    key     tells its panels apart from those of the same analyses elsewhere, and from those about another column
    fixed   options that the page has widgets for
    begin   shows the page's own widgets of this tab, and returns analyses that depend on them
    """

    title: str
    lead: str
    questions: Sequence[Question] = ()
    key: str = ""
    fixed: Collection[str] = ()
    begin: Callable[[], Sequence[Question]] | None = None


def show(page: str, topics: Sequence[Topic]) -> None:
    """The topics as tabs; which one is open is in the URL."""
    tabs = st.tabs([topic.title for topic in topics], key=f"{page}_tab", bind="query-params")
    for tab, topic in zip(tabs, topics, strict=True):
        if tab.open:
            with tab:
                st.caption(topic.lead)
                questions = list(topic.questions)
                with messages.guarded():
                    questions += topic.begin() if topic.begin else []
                for at, question in enumerate(questions):
                    if at:
                        st.divider()
                    panel.analysis(question, key=topic.key, fixed=topic.fixed)


def sequences() -> pd.DataFrame:
    """The texts of the run with their metadata."""
    found = view.whole()
    return _sequences(view.version(found))


@st.cache_data(max_entries=4, show_spinner=False)
def _sequences(version: view.Version) -> pd.DataFrame:
    return view.whole().sequences()


def values(column: str) -> list[str]:
    """Values of a column of the texts, in the order of all figures; none where there is no such column."""
    table = sequences()
    return figures.ordered(table[column].dropna().astype(str).unique()) if column in table else []
