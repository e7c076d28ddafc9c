"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "bandpo"
ORDER = [
    "_checks",
    "arithmetic",
    "move",
    "shape",
    "divergences",
    "family",
    "side",
    "table",
    "solve",
    "bounds",
    "certificate",
    "clips",
    "radii",
    "gate",
    "diagnostics",
    "whole",
    "aggregation",
    "kernels",
    "loss",
    "testing",
]
CORE = {name: next(p for p in (SOURCE / f"{name}.py", SOURCE / name / "__init__.py") if p.exists()) for name in ORDER}
FILES = sorted(SOURCE.rglob("*.py"))


def test_the_core_loads_torch_and_the_standard_library_only():
    code = (
        "import sys, torch; before = set(sys.modules); import bandpo; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'bandpo', 'torch'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ORDER)
def test_data_flows_one_way(name):
    tree = ast.parse(CORE[name].read_text())
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bandpo"):
            imported |= {node.module.split(".")[1]} if "." in node.module else {alias.name for alias in node.names}
    assert imported <= set(ORDER[: ORDER.index(name) + 1]), f"{name}.py imports from its right"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    limit = 250 if path in CORE.values() else 450
    assert len(text.splitlines()) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno + 1 <= 40, f"{node.name} is too long"


@pytest.mark.parametrize("name", ORDER)
def test_no_host_synchronisation_in_the_core(name):
    text = CORE[name].read_text()
    for call in (".item()", ".tolist()", ".cpu()", ".numpy()", "nonzero("):
        assert call not in text
    assert "global " not in text
