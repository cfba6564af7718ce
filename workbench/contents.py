"""What a run is made of: its texts and tokens by language, domain or source.

**texts** counts the sequences of the run: a text that was too long for the model counts once for each of its pieces.
**tokens** are all positions the routers saw, those of a chat's template and generated ones included.
**share** is the label's part of all tokens of the run. Texts without the label are the row "–".
"""

import os

import pandas as pd
import plotly.graph_objects as go

from workbench import connection, figures
from workbench.errors import InputError

COLUMNS = {"lang": "language", "domain": "domain", "source": "source"}
"""Columns that texts are counted by, and their nouns."""
UNLABELLED = "–"


def contents(path: str | os.PathLike, run: str, by: str) -> pd.DataFrame:
    """One row a label of the column `by`, of COLUMNS: the column itself, texts, tokens, share in [0, 1].

    Labels are in the order of all figures, texts without one last. Counted as the file is now, so that a run that is
    being written grows. InputError for another column and for what isn't a readable trace.
    """
    if by not in COLUMNS:
        raise InputError(f"texts are counted by {', '.join(COLUMNS)}, not by {by!r}.")
    with connection.reading(path) as con:
        found = con.execute(
            f"SELECT {by}, count(*) AS texts, sum(n_tokens)::BIGINT AS tokens FROM sequences "
            f"WHERE run = ? GROUP BY {by}",
            [run],
        ).df()
    known = figures.ordered(found[by].dropna())
    found[by] = found[by].astype(object).where(found[by].notna(), UNLABELLED)
    order = {label: at for at, label in enumerate([*known, UNLABELLED])}
    found = found.sort_values(by, key=lambda labels: labels.map(order), ignore_index=True)
    return found.assign(share=found["tokens"] / max(1, int(found["tokens"].sum())))


def figure(frame: pd.DataFrame) -> go.Figure:
    """A bar a label, in its colour, as long as its tokens."""
    by = str(frame.columns[0])
    names = [figures.plain(label) for label in frame[by]]
    colours = [figures.NULL.colour if label == UNLABELLED else figures.style(label).colour for label in frame[by]]
    result = figures.panels([""], height=max(120, min(560, 24 * len(frame))) if len(frame) <= 12 else 260)
    across = len(frame) <= 12
    bars = {"x": frame["tokens"], "y": names} if across else {"x": names, "y": frame["tokens"]}
    result.add_bar(
        **bars,
        orientation="h" if across else "v",
        marker={"color": colours},
        customdata=frame[["texts", "tokens", "share"]].to_numpy(),
        hovertemplate=f"{'%{y}' if across else '%{x}'}<br>%{{customdata[1]:,}} tokens (%{{customdata[2]:.1%}})<br>"
        "%{customdata[0]:,} texts<extra></extra>",
    )
    if across:
        result.update_yaxes(type="category", autorange="reversed", showgrid=False)
        result.update_xaxes(title="tokens", rangemode="tozero")
    else:
        result.update_xaxes(type="category", showgrid=False, tickangle=-45)
        result.update_yaxes(title="tokens", rangemode="tozero")
    result.update_layout(bargap=0.25)
    return result
