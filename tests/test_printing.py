"""What is printed: nothing that a terminal obeys, and JSON that still says the same."""

import json

import pandas as pd

from workbench.printing import listing, show

HOSTILE = "\x1b[31m\x7f\x9b1m\u202eé\n\U000e0041"


def harmless(text: str) -> bool:
    return all(c.isprintable() or c == "\n" for c in text)


def test_names_of_columns_are_printed_as_text(capsys):
    show(pd.DataFrame({HOSTILE: [1], "é": [HOSTILE]}), as_json=False)
    printed = capsys.readouterr().out
    assert harmless(printed) and printed.count("\n") == 2 and "\\x1b[31m" in printed and "é" in printed


def test_json_is_harmless_readable_and_the_same(capsys):
    show(pd.DataFrame({HOSTILE: [HOSTILE]}), as_json=True)
    printed = capsys.readouterr().out
    assert harmless(printed) and "é" in printed
    assert json.loads(printed) == [{HOSTILE: HOSTILE}]


def test_names_of_facts_are_printed_as_text():
    printed = listing({"corpus": {HOSTILE: [HOSTILE], "max_length": 5}})
    assert harmless(printed) and printed.count("\n") == 2 and "max length" in printed
