"""The figures and tables on the pages docs/metrics/*.md: runs each `workbench analyze` command written there.

    make demo && python docs/examples.py demo.duckdb [METRIC …]

Writes docs/metrics/NAME.txt (the first rows of the table, then what a report says of it) and NAME.webp for every
metric, or for those named. Commands that need another trace than demo.duckdb have the one that makes it on their page.
"""

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image

from workbench import analysis
from workbench.figures import image
from workbench.models import load
from workbench.printing import print_table
from workbench.tracefile import Trace

PAGES = Path(__file__).parent / "metrics"
ROWS = 8
WIDTH = 1000
"""Pixels of a figure."""


def commands(page: Path) -> list[list[str]]:
    """The `workbench` commands of a page, as lists of words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("workbench ")]


def after(words: list[str], option: str) -> list[str]:
    """The values of an option that may be given several times."""
    return [words[place + 1] for place, word in enumerate(words) if word == option]


def table(name: str, words: list[str]) -> Any:
    """What `workbench analyze NAME FILE …` computes."""
    ask, _ = analysis.find(name)
    options = dict(text.split("=", 1) for text in after(words, "--set"))
    if "--by" in words:
        options["by"] = after(words, "--by")[-1]
    file = words[3]
    subject = load(file) if analysis.subject(ask) == "model" else Trace(file, next(iter(after(words, "--run")), None))
    return ask(subject, **analysis.arguments(ask, options))


def write(name: str, words: list[str]) -> None:
    """Write the two files of one metric."""
    frame = table(name, words)
    text = io.StringIO()
    with redirect_stdout(text):
        print_table(frame.head(ROWS))
    rows = text.getvalue() + (f"… {len(frame) - ROWS:,} more rows\n" if len(frame) > ROWS else "")
    found = "".join(f"- {sentence}\n" for sentence in analysis.file(name).findings(frame))
    (PAGES / f"{name}.txt").write_text(f"{rows}\n{found}", encoding="utf-8")
    with Image.open(io.BytesIO(image(analysis.find(name)[1](frame), "png"))) as drawn:
        height = round(drawn.height * WIDTH / drawn.width)
        drawn.convert("RGB").resize((WIDTH, height)).save(PAGES / f"{name}.webp", quality=82)


def main(trace: Path, wanted: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(trace.absolute(), Path(folder) / "demo.duckdb")
        os.chdir(folder)
        for page in sorted(PAGES.glob("*.md")):
            asked = [words for words in commands(page) if words[1] == "analyze"]
            asked = [words for words in asked if not wanted or words[2] in wanted]
            for words in commands(page) if asked else []:
                if words[1] == "trace":
                    subprocess.run([sys.executable, "-m", *words], check=True)
                elif words in asked:
                    print(shlex.join(words), flush=True)
                    write(words[2], words)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
