"""What the command line prints: tables and nested facts, as text that a terminal can't be attacked by, or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def show(table: pd.DataFrame, as_json: bool) -> None:
    """A table as JSON or as text."""
    if as_json:
        print(escaped(table.to_json(orient="records", indent=2, force_ascii=False, date_format="iso")))
    else:
        print_table(table)


def print_table(table: pd.DataFrame, rows: int = 60) -> None:
    """The first rows, unwrapped; control characters from a corpus can't reach the terminal."""
    shown = table.head(rows).map(lambda cell: cell if isinstance(cell, int | float) else plain(str(cell)))
    shown.columns = [plain(str(name)) for name in shown.columns]
    print(shown.to_string(index=False, float_format=lambda number: f"{number:.4g}"))
    if len(table) > rows:
        print(f"… {len(table) - rows:,} more rows: write them with --out, or print all with --json")


def plain(text: str) -> str:
    """Text in which only printable characters are left as they are."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def escaped(text: str) -> str:
    """JSON that says the same, in which only printable characters and line ends are left as they are."""
    return "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)


def paragraphs(text: str) -> str:
    """Text in which only printable characters, line ends and tabs are left as they are."""
    return "".join(c if c in "\n\t" else plain(c) for c in text)


def listing(facts: dict, indent: str = "") -> str:
    """Nested facts as indented lines."""
    lines = []
    for name, value in facts.items():
        title = plain(name.replace("_", " "))
        if isinstance(value, dict):
            lines += [f"{indent}{title}", listing(value, indent + "  ")]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{indent}{title}")
            lines += [listing(one, indent + "  ") + "\n" for one in value]
        else:
            text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
            lines.append(f"{indent}{title:<20} {plain(text)}")
    return "\n".join(lines)
