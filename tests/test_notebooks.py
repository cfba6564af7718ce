"""The notebooks: what is stored is of one complete run, and a run today gives the same tables."""

import base64
import importlib.util
import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 180
"""For a whole notebook."""
LARGEST = 1_500_000
RELATIVE, ABSOLUTE = 0.05, 0.02
"""How far numbers may be from the stored ones: on another processor a few nearly tied experts are others."""
OF_A_MACHINE = re.compile(r"(?<![\w.])/(?:tmp|home|root|work|usr|var|opt|Users)\b|\b[A-Z]:\\")


def execute_script():
    """`notebooks/execute.py`, which isn't in a package."""
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks" / "execute.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in code(notebook) for output in cell.outputs]


class Cells(HTMLParser):
    """The texts of a table's cells."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = False

    def handle_starttag(self, tag, attrs) -> None:
        if tag in ("td", "th"):
            self.inside = True
            self.found.append("")

    def handle_endtag(self, tag) -> None:
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data) -> None:
        if self.inside:
            self.found[-1] += data


def tables(notebook: NotebookNode) -> dict[str, list[str]]:
    """The cells of each table that doesn't vary from machine to machine, by the code that made it."""
    found = {}
    for cell in code(notebook):
        for output in cell.outputs:
            page = output.get("data", {}).get("text/html", "")
            if "<table" in page and "varies" not in cell.metadata.get("tags", []):
                parser = Cells()
                parser.feed(page)
                found[cell.source] = parser.found
    return found


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def unlike(stored: list[str], fresh: list[str]) -> list[str]:
    """The cells of two tables that differ, by more than the tolerance if they are numbers."""
    if len(stored) != len(fresh):
        return [f"{len(stored)} cells, now {len(fresh)}"]
    close = {"rel": RELATIVE, "abs": ABSOLUTE, "nan_ok": True}
    return [
        f"{a}, now {b}"
        for a, b in zip(stored, fresh, strict=True)
        if a != b and (number(a) is None or number(b) is None or number(b) != pytest.approx(number(a), **close))
    ]


def test_there_are_seven():
    assert [path.name[0] for path in NOTEBOOKS] == list("1234567")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_run_is_complete(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    assert kinds <= {"text/plain", "text/html", "image/png"} and "image/png" in kinds
    assert path.stat().st_size < LARGEST
    assert read(path) == execute_script().normalised(read(path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_asks_first_and_ends_with_your_model(path: Path):
    first, *_, last = read(path).cells
    assert re.match(rf"# {path.name[0]}\. .+\n\n\*\*[^*]+\?\*\*", first.source)
    headings = [re.findall(r"^## .+", cell.source, re.M) for cell in read(path).cells if cell.cell_type == "markdown"]
    assert sum(headings, [])[-1] == "## On your model" and "## On your model" in last.source
    assert re.search("OLMoE-1B-7B", last.source) and re.search("Qwen3-30B-A3B", last.source)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_says_nothing_of_a_machine(path: Path):
    notebook = read(path)
    texts = [cell.source for cell in notebook.cells]
    for output in outputs(notebook):
        texts += [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
    assert not [found for text in texts for found in OF_A_MACHINE.findall(text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_gives_the_stored_tables(path: Path):
    stored = read(path)
    fresh = execute_script().execute(stored, seconds=SECONDS)
    assert not [output.text for output in outputs(fresh) if output.get("name") == "stderr"]
    assert tables(stored) and tables(fresh).keys() == tables(stored).keys()
    differences = {source: unlike(cells, tables(fresh)[source]) for source, cells in tables(stored).items()}
    assert not {source: found for source, found in differences.items() if found}


def test_figures_are_stored_as_images():
    import plotly.graph_objects as go

    script = execute_script()
    figure = go.Figure(go.Scatter(x=[0, 1], y=[1, 0])).to_plotly_json()
    output = nbformat.v4.new_output("display_data", {script.FIGURE: figure})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("figure", outputs=[output])])
    (shown,) = script.drawn(notebook).cells[0].outputs
    assert base64.b64decode(shown.data["image/png"]).startswith(b"\x89PNG") and list(shown.data) == ["image/png"]


def test_cells_that_fail_and_that_take_too_long_are_errors():
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    def of(source: str) -> NotebookNode:
        return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])

    script = execute_script()
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        script.execute(of("1 / 0"))
    with pytest.raises(CellTimeoutError):
        script.execute(of("import time; time.sleep(60)"), seconds=1)


def test_tables_are_compared_cell_by_cell():
    assert unlike(["", "de", "0.250", "100"], ["", "de", "0.251", "101"]) == []
    assert unlike(["de", "0.250"], ["en", "0.350"]) == ["de, now en", "0.250, now 0.350"]
    assert unlike(["1"], ["1", "2"]) and unlike(["0.5"], [""]) and not unlike(["nan"], ["nan"])
