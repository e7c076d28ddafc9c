"""What the benchmarks share: paired timing, the machine in words, results on disk."""

from __future__ import annotations

import functools
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def paired(sides: dict[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Return the fastest time of each side in seconds, the sides taken in turn so that drift hits all alike."""
    best = dict.fromkeys(sides, float("inf"))
    for i in range(warmup + rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def ratios(own: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Return quartiles of the paired ratios others / own, and the median's 95 % interval by order statistics."""
    found = sorted(b / a for a, b in zip(own, others, strict=True))
    n = len(found)
    low = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)))  # the binomial distribution, as the normal one
    places = dict(zip(("quartile_1", "median", "quartile_3"), statistics.quantiles(found, n=4), strict=True))
    return places | {"median_low": found[low], "median_high": found[n - 1 - low]}


class Spent:
    """Adds up the processor time that functions take where they are called, in the middle of everything else."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on(self, owner: Any, *names: str) -> None:
        """Time these functions of a module or class from now on; one that calls another counts twice."""
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **named: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **named)
            finally:
                self.seconds += time.process_time() - start

        return run


def machine() -> dict[str, Any]:
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cards": cards,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def commit() -> str:
    """The commit that is checked out, in short; empty where git knows of none."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def heading(title: str) -> list[str]:
    """The first lines of a page of results: its title, and what made it."""
    about = machine()
    made = f"`python {' '.join(sys.argv)}` at commit {commit()}, torch {about['torch']}, {about['cpu']}"
    return [f"# {title}", "", f"Written by {made}.", ""]


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Write the rows with the command, the commit and the machine beside them, and print them."""
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
