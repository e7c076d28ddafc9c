"""The numbered scripts of examples/ as pages of the documentation and as notebooks.

    python docs/lessons.py notebooks

writes the notebooks. mkdocs calls `on_files`. The scripts are in jupytext's "percent" format: `# %%` begins a cell of
code, `# %% [markdown]` one of text, each of whose lines is a comment.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent / "examples"
LESSONS = sorted(EXAMPLES.glob("[0-9]*.py"))


def cells(script: str) -> list[tuple[str, str]]:
    """The cells of a script in the percent format: ("markdown" or "code", text) each."""
    parts = re.split(r"^# %%( \[markdown\])?\n", script, flags=re.M)[1:]
    found = []
    for mark, text in zip(parts[::2], parts[1::2], strict=True):
        prose = re.sub(r"^# ?", "", text, flags=re.M) if mark else text
        found.append(("markdown" if mark else "code", prose.strip("\n")))
    return found


def as_markdown(script: Path) -> str:
    """The page of a script."""
    found = cells(script.read_text("utf-8"))
    shown = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in found]
    title, _, rest = "\n\n".join(shown).partition("\n")
    opened = f"The script `examples/{script.name}`, as a [notebook]({script.stem}.ipynb)."
    return f"{title}\n\n{opened}\n{rest}\n"


def as_notebook(script: Path) -> str:
    """The notebook of a script, without outputs."""
    found: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells(script.read_text("utf-8"))):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text.splitlines(keepends=True)}
        found.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book = {"cells": found, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(book, indent=1) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and notebooks to what mkdocs builds."""
    from mkdocs.structure.files import File

    for script in LESSONS:
        for ending, made in ((".md", as_markdown), (".ipynb", as_notebook)):
            files.append(File.generated(config, f"examples/{script.stem}{ending}", content=made(script)))
    return files


def main(folder: str) -> None:
    """Write the notebooks into a folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for script in LESSONS:
        Path(folder, f"{script.stem}.ipynb").write_text(as_notebook(script), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
