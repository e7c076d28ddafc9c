"""The house rules that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "bandpo"
CORE = [SOURCE / "_input.py"]
CORE += [path for part in ("operator", "clips", "loss", "analysis") for path in sorted((SOURCE / part).rglob("*.py"))]
SPINE = [SOURCE / f"operator/{name}.py" for name in ("tokens", "divergence", "family", "band")]
SPINE += [SOURCE / f"clips/{name}.py" for name in ("base", "regions", "gates")]
SPINE += [SOURCE / f"loss/{name}.py" for name in ("policy", "aggregation", "stats")]
FILES = sorted(SOURCE.rglob("*.py"))


def test_the_core_loads_torch_and_the_standard_library_only():
    code = (
        "import sys, torch; before = set(sys.modules); import bandpo; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'bandpo', 'torch'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_data_flows_one_way():
    """The contracts of pyproject.toml: who may import whom."""
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def code_lines(path):
    """Lines of code: neither blank, nor comment, nor docstring."""
    text = path.read_text()
    lines = {i for i, line in enumerate(text.splitlines(), 1) if line.strip() and not line.strip().startswith("#")}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_the_spine_is_read_in_twenty_minutes():
    assert sum(code_lines(path) for path in SPINE) <= 800


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    limit = 250 if path in CORE and path.parent.name != "fused" else 450
    assert len(text.splitlines()) <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno + 1 <= 40, f"{node.name} is too long"


@pytest.mark.parametrize("path", CORE, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_host_synchronisation_in_the_core(path):
    text = path.read_text()
    for call in (".item()", ".tolist()", ".cpu()", ".numpy()", "nonzero("):
        assert call not in text
    assert "global " not in text
