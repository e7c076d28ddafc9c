"""A log of tokens that is named on the command line."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path

from bandpo._input import InputError, nearest

EXAMPLE = "example"  # the log that ships with the package


def log_path(file: str) -> Path:
    """Return where a log is.

    Args:
        file: a file, a folder of a run, or `EXAMPLE`.

    Returns:
        A path to what is there.

    Raises:
        InputError: there is no such file.
    """
    path = Path(file)
    there = os.path.exists(path)  # unlike Path's own, it raises for no name
    if file == EXAMPLE and not there:
        return Path(str(importlib.resources.files("bandpo") / "examples" / "tokens.npz"))
    if not there:
        beside = os.listdir(path.parent) if os.access(path.parent, os.R_OK) and os.path.isdir(path.parent) else []
        raise InputError(
            f"{file}: no such file{nearest(path.name, [*beside, EXAMPLE])}; give a log of tokens, or try: bandpo "
            f"explain {EXAMPLE}"
        )
    return path
