"""Does a long run stay as it is? Memory, open files, threads, the run's folder and a step's time, over 2,000 steps.

The run is `bandpo train demo` in this process, with the two newest checkpoints kept. Of each number: how much it grows
over the steps after the first quarter, as a share of its mean, with a 95 % interval of the slope through the means of
ten blocks, because single steps are not independent. It is flat where the upper end is not above what is allowed. Where
anything grows, the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from common import write
from scipy import stats

from bandpo import cli

BLOCKS, WARM = 10, 0.25
# Of the mean, over the run. What is counted may not grow at all; memory and time are measured, and their interval has a
# width of its own; the folder gets the report's tokens, up to 20,000 of them.
ALLOWED = {"memory": 0.05, "descriptors": 0.0, "threads": 0.0, "files": 0.0, "bytes": 0.1, "seconds": 0.2}
LOG = "metrics.jsonl"  # a line a step is what it is for


def look(folder: Path) -> dict[str, float]:
    """Return what this process and the run's folder hold now; Linux alone tells it, in /proc."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    log = sum(size for path, size in files.items() if path.name == LOG)
    return {
        "memory": 1024.0 * int(status["VmRSS"].split()[0]),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(status["Threads"]),
        "files": len(files),
        "bytes": sum(files.values()) - log,
    }


class Watch:
    """Stands for stdout: looks whenever as many steps have been shown.

    Args:
        folder: the run's.
        every: optimiser steps between two looks, whole rollouts.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.seen: list[dict[str, float]] = []
        self._before = time.process_time()

    def write(self, text: str) -> None:
        """Take an event of the run as a line of JSON."""
        event = json.loads(text) if text.strip() else {}
        if event.get("event") == "step" and event["step"] % self.every == 0:
            now = time.process_time()
            seconds = (now - self._before) / self.every
            self.seen.append({"step": event["step"], **look(self.folder), "seconds": seconds})
            self._before = time.process_time()  # to look takes time of its own

    def flush(self) -> None:
        """Nothing waits here."""


def soak(steps: int, every: int, out: Path, words: str = "") -> list[dict[str, float]]:
    """Train for so many steps, and return what was seen every so many."""
    watch = Watch(out, every)
    command = ["train", "demo", "--json", "--max_steps", str(steps), "--save_total_limit", "2", *words.split()]
    with redirect_stdout(watch):  # type: ignore[type-var]
        code = cli.main([*command, "--out", str(out)])
    if code != 0 or len(watch.seen) < 2 * BLOCKS:
        raise SystemExit(f"the run ended with {code}, seen {len(watch.seen)} times: must be {2 * BLOCKS} or more")
    return watch.seen


def growth(seen: list[dict[str, float]], name: str) -> tuple[list[float], float, float]:
    """Return the means of the blocks, the growth over the run as a share of their mean, and half its interval."""
    late = seen[math.ceil(len(seen) * WARM) :]
    size = len(late) / BLOCKS
    blocks = [late[round(i * size) : round((i + 1) * size)] for i in range(BLOCKS)]
    x, y = ([statistics.fmean(row[key] for row in block) for block in blocks] for key in ("step", name))
    if min(y) == max(y):
        return y, 0.0, 0.0
    line, share = stats.linregress(x, y), seen[-1]["step"] / statistics.fmean(y)
    return y, float(line.slope * share), float(stats.t.ppf(0.975, BLOCKS - 2) * line.stderr * share)


def judge(seen: list[dict[str, float]]) -> list[dict[str, Any]]:
    """Return a row for each number: what it was, how much it grew, and whether that is flat."""
    rows = []
    for name, most in ALLOWED.items():
        means, grown, half = growth(seen, name)
        row: dict[str, Any] = {"what": name, "flat": grown + half <= most, "grown": grown, "allowed": most}
        rows.append(row | {"low": grown - half, "high": grown + half, "steps": seen[-1]["step"], "means": means})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=16, help="optimiser steps between two looks: whole rollouts")
    args = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = judge(soak(args.steps, args.every, Path(folder) / "run"))
    write("soak", rows)
    sys.exit(0 if all(row["flat"] for row in rows) else 1)


if __name__ == "__main__":
    main()
