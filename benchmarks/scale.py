"""From four to 67 million tokens: is the time of a token the same, and how much memory does it take?

Each row has a process of its own, so that its peak of memory is its own, and one thread. The operator and the loss
(forward, statistics, backward) take all tokens in one call, and in calls of a million, as a loop with micro-batches
does; `bandpo explain` reads an .npz from disk. Processor time, because other programs on the machine stretch the
clock's. The exit code is 1 where a token of the longest takes more than twice as long as one of the shortest, where one
call and many differ in their sum, or where explain takes more than a gigabyte.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import write

import bandpo
from bandpo import cli

MICRO, COLUMNS = 1 << 20, 1024
# Programs beside it stretch processor time too, by up to 1.6; with 16 times the tokens n^1.5 would be 4 and n^2 16.
MOST_RATIO, MOST_BYTES, SAME = 2.0, 1e9, 1e-5
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tokens(count: int) -> Batch:
    """Return logps, old_logps and advantages of so many tokens, in rows of 1,024."""
    random = torch.Generator().manual_seed(0)
    old = torch.empty(count // COLUMNS, COLUMNS).exponential_(1.0, generator=random).neg_()
    new = torch.empty_like(old).normal_(0.0, 0.1, generator=random).add_(old).clamp_(max=0.0)
    return new, old, torch.randn(len(old), generator=random)


def operator(new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> float:
    """Solve the bounds of every token, and return the sum of the upper ones' logarithms."""
    return float(bandpo.band(old, 0.05).log_high.sum(dtype=torch.float64))


def loss(new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> float:
    """Take the policy loss with its statistics, and return the sum of its gradient's sizes."""
    new = new.detach().requires_grad_()
    bandpo.policy_loss(new, old, advantages, clip="band", aggregation="sum").loss.backward()
    assert new.grad is not None
    return float(new.grad.abs().sum(dtype=torch.float64))


WORK: dict[str, Callable[..., float]] = {"operator": operator, "loss": loss}


def in_pieces(what: str, batch: Batch, size: int) -> float:
    """Do it call by call, and return the sum over the calls."""
    return sum(WORK[what](*piece) for piece in zip(*(torch.split(x, size // COLUMNS) for x in batch), strict=True))


def explain(path: str) -> float:
    """Explain a log, and return how many tokens it had."""
    with redirect_stdout(StringIO()) as out:
        assert cli.main(["explain", path, "--json"]) == 0
    return float(json.loads(out.getvalue())["counts"]["tokens"])


def peak() -> float:
    """The most bytes that this process has held; Linux alone tells it."""
    return 1024.0 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def one(what: str, power: int, size: int) -> dict[str, Any]:
    """Measure one row in this process."""
    torch.set_num_threads(1)
    count, row = 1 << power, {"what": what, "tokens": 1 << power}
    with tempfile.TemporaryDirectory() as folder:
        if what == "explain":
            names, path = ("logps", "old_logps", "advantages"), str(Path(folder) / "log.npz")
            done = [sys.executable, __file__, "--write", path, "--powers", str(power)]
            subprocess.run(done, check=True)  # elsewhere, so that its memory is not counted
            start, before = time.process_time(), peak()
            found = explain(path)
            assert found == count, names
        else:
            batch = tokens(count)
            operator(*(x[:16] for x in batch))  # the first call of anything loads code
            start, before = time.process_time(), peak()
            found = in_pieces(what, batch, size or count)
            row["tokens_a_call"] = size or count
    seconds = time.process_time() - start
    return row | {"seconds": seconds, "nanoseconds_a_token": 1e9 * seconds / count, "sum": found,
                  "bytes_before": before, "bytes_at_most": peak()}  # fmt: skip


def faults(rows: list[dict[str, Any]], powers: list[int]) -> list[str]:
    """Say in a line each what is not as it should be."""
    said = []
    for which, group in itertools.groupby(rows, key=lambda row: (row["what"], row.get("tokens_a_call") == MICRO)):
        cost = [row["nanoseconds_a_token"] for row in group]
        if cost[-1] > MOST_RATIO * cost[0]:
            said.append(f"{which}: {cost[-1]:.4g} ns a token at 2^{powers[-1]}, {cost[0]:.4g} at 2^{powers[0]}")
    for what, power in itertools.product(WORK, powers):
        sums = [row["sum"] for row in rows if row["what"] == what and row["tokens"] == 1 << power]
        if abs(sums[0] - sums[1]) > SAME * abs(sums[0]):
            said.append(f"{what}: one call gives {sums[0]}, many {sums[1]}, of 2^{power} tokens")
    said += [f"explain took {row['bytes_at_most']:.3g} bytes" for row in rows
             if row["what"] == "explain" and row["bytes_at_most"] > MOST_BYTES]  # fmt: skip
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--powers", type=int, nargs="+", default=[22, 24, 26], help="of 2: numbers of tokens")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "SIZE"), help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    powers = sorted(args.powers)
    if args.write:
        names = ("logps", "old_logps", "advantages")
        arrays = {name: x.numpy() for name, x in zip(names, tokens(1 << powers[0]), strict=True)}
        np.savez(args.write, **arrays)  # type: ignore[arg-type]
        return
    if args.one:
        print(json.dumps(one(args.one[0], powers[0], int(args.one[1]))))
        return
    rows = []
    for what, size in (("operator", 0), ("operator", MICRO), ("loss", 0), ("loss", MICRO), ("explain", 0)):
        for power in powers:
            words = ["--one", what, str(size), "--powers", str(power)]
            done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout))
    said = faults(rows, powers)
    write("scale", rows)
    print(*said, sep="\n")
    sys.exit(1 if said else 0)


if __name__ == "__main__":
    main()
