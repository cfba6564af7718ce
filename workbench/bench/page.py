"""Results inside of a page of documentation: what stands between `<!-- bench NAME -->` and `<!-- end NAME -->`."""

import re
from pathlib import Path

from workbench.errors import InputError


def section(name: str) -> re.Pattern[str]:
    """What a page has of the benchmark `name`, with both marks."""
    return re.compile(rf"(<!-- bench {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)


def check(page: Path, name: str) -> None:
    """InputError if the page has no place for the benchmark `name`."""
    if not page.is_file() or not section(name).search(page.read_text(encoding="utf-8")):
        raise InputError(f"{page} has no lines <!-- bench {name} --> and <!-- end {name} --> to write between.")


def put(page: Path, name: str, text: str) -> None:
    """Write the text there, in place of what was there before."""
    before = page.read_text(encoding="utf-8")
    page.write_text(section(name).sub(lambda found: f"{found[1]}{text}\n{found[2]}", before), encoding="utf-8")
