"""What a run was made with: versions, commit, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from bandpo.doctor import installed_version

PACKAGES = ("bandpo", "torch", "trl", "transformers", "accelerate", "datasets", "peft", "verl", "ray")


def versions() -> dict[str, str]:
    """Return the versions that a run depends on."""
    packages = {name: found for name in PACKAGES if (found := installed_version(name))}
    return {"python": platform.python_version(), **packages}


def commit() -> str | None:
    """Return the commit of bandpo's own checkout, "-dirty" when it has changes; None when it is no checkout."""
    here = str(Path(__file__).parent)
    words = (["ls-files", "--error-unmatch", "__init__.py"], ["describe", "--always", "--dirty", "--abbrev=40"])
    try:
        for more in words:
            done = subprocess.run(["git", "-C", here, *more], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def machine() -> dict[str, Any]:
    """Return what the run runs on."""
    import torch

    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each version or device that is another one than when the run was started."""
    return [
        f"{name} was {before[name]} and is {now[name]}: the run may not go on exactly as it would have"
        for name in before
        if name in now and now[name] != before[name]
    ]
