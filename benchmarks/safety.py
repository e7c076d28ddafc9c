"""The promises of `band` for every token, kept on ten million random ones per divergence and dtype, garbage included.

python benchmarks/safety.py [--tokens 10000000]      # about ten minutes; writes benchmarks/results/safety.md
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from common import RESULTS, heading
from torch import Tensor

import bandpo

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from truth.bounds import NAMES  # noqa: E402

DELTAS = (1e-6, 0.05, 20.0)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GARBAGE = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 5.0, -1e30, -1e-45])
PROMISES = ("finite logs", "low <= 1 <= high", "high p <= 1", "wider with delta", "margins as a host takes them")
PIECE = 1 << 20


def tokens(count: int, dtype: torch.dtype) -> Tensor:
    """Log-probabilities between -1e4 and -1e-7, evenly over their logarithm, and garbage."""
    x = -torch.exp(torch.empty(count, dtype=torch.float64).uniform_(math.log(1e-7), math.log(1e4)))
    return torch.cat([x, GARBAGE]).to(dtype)


def broken(name: str, x: Tensor) -> list[int]:
    """Return how many tokens break each of `PROMISES`, over all of `DELTAS`."""
    counts, before = [0] * len(PROMISES), None
    for delta in DELTAS:
        bounds = bandpo.band(x, delta, name)
        low, high = bounds.log_low, bounds.log_high
        p = x.to(low.dtype).nan_to_num(nan=0.0).clamp(max=0.0)
        eps_low, eps_high = bandpo.band_eps(x, delta, name, cap=None)
        kept = [
            torch.isfinite(low) & torch.isfinite(high),
            (low <= 0) & (high >= 0),
            high <= -p,
            torch.ones_like(low, dtype=torch.bool) if before is None else (low <= before[0]) & (high >= before[1]),
            (eps_low >= 0) & (eps_low <= 1) & (eps_high >= 0) & torch.isfinite(eps_high),
        ]
        counts = [n + int((~good).sum()) for n, good in zip(counts, kept, strict=True)]
        before = low, high
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000)
    args = parser.parse_args()
    lines = [
        *heading("Safety of `band`"),
        f"Tokens that break a promise, of {args.tokens:,} random ones with log p from -1e4 to -1e-7 and, in every "
        f"{PIECE:,} of them, NaN, inf, -inf, 0, 5, -1e30 and -1e-45; summed over delta {', '.join(map(str, DELTAS))}.",
        "",
        "| divergence | dtype | " + " | ".join(PROMISES) + " |",
        "|---" * (len(PROMISES) + 2) + "|",
    ]
    torch.manual_seed(0)
    bad = 0
    for name in NAMES:
        for dtype in DTYPES:
            counts = [0] * len(PROMISES)
            for start in range(0, args.tokens, PIECE):
                piece = broken(name, tokens(min(PIECE, args.tokens - start), dtype))
                counts = [a + b for a, b in zip(counts, piece, strict=True)]
            bad += sum(counts)
            lines.append(f"| {name} | {str(dtype).removeprefix('torch.')} | " + " | ".join(map(str, counts)) + " |")
            print(lines[-1], flush=True)
    (RESULTS / "safety.md").write_text("\n".join(lines) + "\n")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
