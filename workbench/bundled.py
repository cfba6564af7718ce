"""Where the data that ships with the workbench lies: the demonstration model and the corpora."""

from pathlib import Path

MODELS = {"demo": "models/demo", "demo-early": "models/demo-early"}
"""Name of a bundled model -> where it lies."""

CONTEXT = {"demo": 256, "demo-early": 256}
"""Tokens of a context in the training of the bundled models. They have more positions, but their loss rises beyond."""

_PACKAGE = Path(__file__).resolve().parent


def path(relative: str) -> Path:
    """The bundled file or folder `relative`, such as "models/demo" or "corpora/udhr".

    A wheel carries the data inside the package; in a checkout it lies in `data/` beside it.
    """
    root = _PACKAGE / "bundled_data"
    return (root if root.is_dir() else _PACKAGE.parent / "data") / relative
