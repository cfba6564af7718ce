"""Contexts of tokens as a concordance: a line a token, what stands before and after it, firing tokens marked."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit.components.v2 as components

from workbench.reading import visible

here = Path(__file__).parent
_component = components.component(
    "workbench_context_lines",
    html='<div class="contexts" role="list"></div>',
    css=(here / "context_lines.css").read_text(encoding="utf-8"),
    js=(here / "context_lines.js").read_text(encoding="utf-8"),
)


def context_lines(
    found: pd.DataFrame, excerpts: Sequence[list[dict[str, Any]]], *, key: str, on_open: Callable[[], None]
) -> None:
    """Show contexts.

    found, excerpts  of workbench.expert_contexts
    on_open          called when the user opens one: st.session_state[key]["open"] is [seq, pos]
    """
    lines = []
    for row, parts in zip(found.to_dict("records"), excerpts, strict=True):
        tags = [str(row[name]) for name in ("lang", "domain") if isinstance(row[name], str)]
        lines.append(
            {
                "seq": int(row["seq"]),
                "pos": int(row["pos"]),
                "weight": float(row["weight"]) if pd.notna(row["weight"]) else None,
                "rank": int(row["rank"]) + 1,
                "tags": tags,
                "source": row["source"] if isinstance(row["source"], str) else None,
                "parts": [[_one_line(part["text"]), part["weight"], part["fires"], part["here"]] for part in parts],
            }
        )
    _component(key=key, data={"lines": lines}, on_open_change=on_open)


def _one_line(text: str) -> str:
    return visible(text).replace("\n", "").replace("\t", " ")
