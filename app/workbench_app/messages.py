"""Text from data in messages and Markdown, and errors as messages."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import streamlit as st

from workbench.errors import InputError, RunError
from workbench.printing import plain


def text(value: Any) -> str:
    """Text from data, shown by Markdown as it is: no markup, no links, no icons, no formulas, on one line."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~$:&=^\"'])", r"\\\1", plain(str(value)))


@contextmanager
def guarded() -> Iterator[None]:
    """An InputError or RunError in it becomes a message; what came before it on the page stays."""
    try:
        yield
    except InputError as error:
        st.warning(text(error), icon=":material/info:")
    except RunError as error:
        st.error(text(error), icon=":material/error:")
