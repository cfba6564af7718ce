"""Docstrings as Markdown for mkdocstrings: columns of names and explanations become lists, examples code blocks."""

import re

import griffe

ENTRY = re.compile(r"^(?P<name>\S(?:\S| (?! ))*?) {2,}(?P<text>\S.*)$")


def markdown(text: str) -> str:
    """A docstring with every run of `name   explanation` lines as a list, and indented lines as code."""
    result: list[str] = []
    listed = False
    for line in text.splitlines():
        entry = ENTRY.match(line)
        if entry:
            result += [""] if not listed else []
            result.append(f"- `{entry['name']}`: {entry['text']}")
            listed = True
        elif listed and line.startswith("  "):
            result.append("  " + line.strip())
        else:
            result += [""] if listed else []
            listed = False
            result.append(line)
    return "\n".join(result)


class Columns(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
