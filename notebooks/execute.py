"""Run notebooks from their first cell and write them back, so that two runs differ only where results do.

    python notebooks/execute.py              # all of them
    python notebooks/execute.py 3_multilingual_routing

Plotly's figures come out of the kernel as data, which a static page can't show; they are stored as PNG images, drawn as
`workbench analyze --figure` draws them. Times of execution are left out, and cells are numbered instead of named at
random. Kernels are of this Python, whatever kernels Jupyter knows.
"""

import argparse
import base64
import copy
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbformat import NotebookNode
from plotly.graph_objects import Figure

from workbench.figures import image
from workbench.output import new_file

FOLDER = Path(__file__).resolve().parent
FIGURE, PNG = "application/vnd.plotly.v1+json", "image/png"
SETTINGS = {
    "PLOTLY_RENDERER": "plotly_mimetype",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # sums don't depend on how many cores there are, nor expert choices that are nearly tied
    "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's wish for a package, for bars that aren't shown
}
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


class ThisPython(AsyncKernelManager):
    """Kernels of the Python that runs this file."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(
            argv=[sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", "{connection_file}"]
        )


def notebooks() -> list[Path]:
    """The notebooks of this folder, in their order."""
    return sorted(FOLDER.glob("[0-9]*.ipynb"))


def execute(notebook: NotebookNode, seconds: int = 180) -> NotebookNode:
    """A copy of the notebook, run in a new kernel and an empty folder; figures are still data.

    Raises nbclient's CellExecutionError if a cell fails, CellTimeoutError if all cells take longer than `seconds`.
    """
    fresh = copy.deepcopy(notebook)
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            fresh,
            kernel_manager_class=ThisPython,
            kernel_name=KERNEL["name"],
            startup_timeout=120,
            timeout_func=lambda cell: max(1, int(end - time.monotonic())),
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        # what the notebook writes goes away with the folder, and nobody's IPython settings act on it
        client.execute(env=os.environ | SETTINGS | {"TMPDIR": folder, "IPYTHONDIR": folder})
    return normalised(fresh)


def normalised(notebook: NotebookNode) -> NotebookNode:
    """The same notebook without what changes from run to run or from machine to machine."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for number, cell in enumerate(notebook.cells):
        tags = cell.metadata.get("tags")
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
        cell.id = f"cell-{number}"
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = nbformat.from_dict({})
    return notebook


def drawn(notebook: NotebookNode) -> NotebookNode:
    """The same notebook with its figures as PNG images."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            figure = output.get("data", {}).pop(FIGURE, None)
            if figure is not None:
                figure.pop("config", None)
                output["data"] = {PNG: base64.b64encode(image(Figure(figure), "png")).decode()}
    return notebook


def main() -> None:
    parser = argparse.ArgumentParser(description="Run notebooks and store what comes out, in place.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="without .ipynb; all if none is given")
    names = parser.parse_args().names
    known = {path.stem: path for path in notebooks()}
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no notebook {', '.join(unknown)}; expected some of {', '.join(known)}.")
    for name in names or known:
        print(name, flush=True)
        notebook = nbformat.read(known[name], as_version=4)
        fresh = drawn(execute(notebook))
        with new_file(known[name], overwrite=True) as partial:
            nbformat.write(fresh, partial)


if __name__ == "__main__":
    main()
