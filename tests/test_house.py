"""The rules of the tree: what may import what, what must stay light, what the documentation may claim."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RANK = {"workbench_kernels": 0, "workbench": 1, "workbench_probes": 2}
HOME = {"kernels": 0, "workbench": 1, "probes": 2, "app": 3, "notebooks": 3}
TORCH_FREE = ["workbench", "workbench.cli", "workbench.tracefile", "workbench.store", "workbench.validate"]
TORCH_FREE += [
    "workbench.export",
    "workbench.corpus",
    "workbench.tokenization",
    "workbench.analysis",
    "workbench.report",
    "workbench.finding",
    "workbench.recipe",
    "workbench.background",
    "workbench.slicing",
    "workbench_probes",
]
COMPUTING = {"duckdb", "numba", "scipy", "sklearn", "torch", "transformers"}
"""Libraries that a page has no business with: what computes is in the library, where scripts and tests can use it."""


def imported(file: Path) -> set[str]:
    """Top-level packages that a source file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found


def test_imports_point_one_way():
    wrong = []
    for folder, rank in HOME.items():
        for file in (ROOT / folder).rglob("*.py"):
            allowed = 2 if file.parent == ROOT / "workbench" / "commands" else rank
            wrong += [
                f"{file.relative_to(ROOT)} imports {name}" for name in imported(file) if RANK.get(name, 0) > allowed
            ]
    assert not wrong


def test_pages_hold_widgets_only():
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / "app").rglob("*.py")
        for name in imported(file) & COMPUTING
    ]
    assert not wrong


def test_folders_beside_the_library_are_not_packages():
    clash = [
        name
        for name in ("kernels", "probes", "app", "data", "notebooks", "tests")
        if (ROOT / name / "__init__.py").exists()
    ]
    assert not clash


@pytest.mark.parametrize("module", TORCH_FREE)
def test_import_loads_no_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_help_loads_neither_torch_nor_pandas():
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom workbench.cli import app\n"
        "result = CliRunner().invoke(app, ['--help'])\n"
        "assert result.exit_code == 0 and 'trace' in result.output\n"
        "sys.exit(bool({'torch', 'pandas', 'transformers', 'duckdb'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_command_in_the_readme_exists():
    from workbench.cli import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    used = set(re.findall(r"^\s*(?:\.venv/bin/)?workbench (\w+)", (ROOT / "README.md").read_text(), flags=re.M))
    assert used and used <= names


def test_public_names_resolve():
    import workbench

    for name in workbench.__all__:
        assert getattr(workbench, name) is not None
    assert callable(workbench.trace) and callable(workbench.load)
