"""The worst errors of `band` against 60-digit arithmetic, over the whole range of old probabilities and radii.

python benchmarks/accuracy.py        # about five minutes; writes benchmarks/results/accuracy.md
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import mpmath as mp
import torch
from common import RESULTS, heading

import bandpo

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from truth.bounds import NAMES, exact_bounds  # noqa: E402

# Numbers that bfloat16 holds exactly, so that one exact answer serves every dtype.
LOG_P = [-9984, -1000, -700, -200, -80, -40, -14, -7.5, -4.5, -3, -2, -1, -0.6875, -0.25, -0.09375]
LOG_P += [-(2.0**-7), -(2.0**-10), -(2.0**-13), -(2.0**-17), -(2.0**-23), -0.0]
DELTAS = [1e-6, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 20.0]
ROUNDED = torch.tensor(LOG_P, dtype=torch.bfloat16).tolist()
RANGES = {
    "-80 to -1e-7, delta >= 1e-4": lambda x, delta: -80 <= x <= -1e-7 and delta >= 1e-4,
    "-80 to -1e-7, delta 1e-6": lambda x, delta: -80 <= x <= -1e-7 and delta < 1e-4,
    "-1e4 to -80": lambda x, delta: x < -80,
}
GONE = -60.0  # a lower ratio below e^-60 is 0 for any use


class Worst(NamedTuple):
    error: float = 0.0
    log_p: float = math.nan
    delta: float = math.nan

    def __str__(self) -> str:
        return f"{self.error:.1e} at {self.log_p:g}, {self.delta:g}" if self.error else "0"


def worst(name: str, dtype: torch.dtype) -> dict[str, tuple[Worst, Worst]]:
    """For each range of LOG_P and DELTAS the worst relative errors of log_low and log_high."""
    found = {key: (Worst(), Worst()) for key in RANGES}
    for delta in DELTAS:
        bounds = bandpo.band(torch.tensor(LOG_P, dtype=dtype), delta, name)
        lows, highs = bounds.log_low.tolist(), bounds.log_high.tolist()
        for x, low, high in zip(ROUNDED, lows, highs, strict=True):
            if x == 0.0:
                assert high == 0.0, "p = 1 cannot rise"
                continue
            exact_low, exact_high = exact_bounds(name, x, delta)
            errors = [0.0, float(abs(high - exact_high) / exact_high)]
            if exact_low > GONE:
                errors[0] = float(abs((low - exact_low) / exact_low))
            else:
                assert low < GONE, (name, x, delta, low)
            for key, holds in RANGES.items():
                if holds(x, delta):
                    found[key] = tuple(max(w, Worst(e, x, delta)) for w, e in zip(found[key], errors, strict=True))
    return found


def main() -> None:
    lines = [
        *heading("Accuracy of `band`"),
        f"Largest relative error of `log_low` and `log_high` against {mp.mp.dps}-digit arithmetic, and the log p and "
        "delta where it is reached. Lower ratios below e^-60 are left out: they are 0 for any use, and it is only "
        f"checked that they come out below e^{GONE:g}. At log p = -0.0 the upper bound is exactly 0. bfloat16 "
        "input is computed in float32, so its errors are those of float32 at the rounded log p.",
        "",
        f"log p: {', '.join(f'{x:.4g}' for x in ROUNDED)}; delta: {', '.join(f'{x:g}' for x in DELTAS)}.",
    ]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        lines += ["", f"## {str(dtype).removeprefix('torch.')}", ""]
        heads = [f"{side}, log p {key}" for key in RANGES for side in ("log_low", "log_high")]
        lines += ["| divergence | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        for name in NAMES:
            cells = [str(w) for pair in worst(name, dtype).values() for w in pair]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
            print(str(dtype), lines[-1], flush=True)
    (RESULTS / "accuracy.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
