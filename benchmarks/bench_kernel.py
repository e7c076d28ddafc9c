"""The fused kernel on a GPU: forward, backward and metrics of the loss, against the bandwidth of a copy in one run.

python benchmarks/bench_kernel.py [--rounds 30] [--smallest 12] [--largest 26] [--no-compile]

Each step is timed twice: on the device (events, cold cache, launches queued behind other work) and by the wall clock.
The bytes that a step must move: logps, old_logps, advantages and the mask in, the coefficient out; then the coefficient
in and the gradient out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from bench_core import ppo_loss, step
from common import write
from torch import Tensor

import bandpo

Sides = dict[str, Callable[[], object]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CLIPS = {name: bandpo.Band(name) for name in ("kl", "tv", "chi2", "neyman", "hellinger")}


def batch(tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    old = 3 * torch.log(torch.rand(tokens, device=device).clamp(min=1e-6))
    logps = (old + 0.2 * torch.randn(tokens, device=device)).clamp(max=-1e-3)
    floats = (x.to(dtype) for x in (logps, old, torch.randn(tokens, device=device)))
    return *floats, torch.rand(tokens, device=device) > 0.1


def fused(mode: str, logps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    os.environ["BANDPO_KERNEL"] = mode
    return step(lambda x: bandpo.policy_loss(x, *args, **kwargs).loss, logps)


def steps(data: tuple[Tensor, ...], compiled: bool) -> Sides:
    """Return the steps to compare, kl in every form and the other divergences in the fused one."""
    logps, *rest = data
    sides: Sides = {"ppo eager": lambda: step(lambda x: ppo_loss(x, *rest), logps)}
    for name, clip in CLIPS.items():
        sides[f"{name} fused"] = lambda clip=clip: fused("triton", logps, *rest, clip=clip)
    sides["kl fused, no metrics"] = lambda: fused("triton", logps, *rest, metrics=False)
    sides["kl eager"] = lambda: fused("eager", logps, *rest)
    if compiled:
        torch._dynamo.reset()

        def loss(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            out = bandpo.policy_loss(x, *rest)
            return out.loss, out.metrics

        kl, ppo = torch.compile(loss), torch.compile(lambda x: ppo_loss(x, *rest))
        sides["kl compiled"] = lambda: step(lambda x: kl(x)[0], logps)
        sides["ppo compiled"] = lambda: step(ppo, logps)
    return sides


def copies(gib: float = 1.0) -> tuple[Sides, int]:
    source = torch.zeros(int(gib * 2**28), device="cuda")
    target = torch.empty_like(source)
    return {"copy": lambda: target.copy_(source)}, 2 * 4 * source.numel()


def timed(sides: Sides, rounds: int, warmup: int = 5) -> dict[str, tuple[float, float]]:
    """Return the fastest seconds of each side on the device and by the wall clock, the sides taken in turn."""
    flush = torch.empty(2**28, dtype=torch.int8, device="cuda")  # more than any card's L2
    best = dict.fromkeys(sides, (float("inf"), float("inf")))
    for i in range(warmup + rounds):
        for name, run in sides.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            device = start.elapsed_time(end) / 1e3
            begin = time.perf_counter()
            run()
            torch.cuda.synchronize()
            if i >= warmup:
                best[name] = min(best[name][0], device), min(best[name][1], time.perf_counter() - begin)
    return best


def difference(data: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return how far the fused gradient is from the eager one on this card."""
    got, want = fused("triton", *data, aggregation="sum"), fused("eager", *data, aggregation="sum")
    return {
        "what": "kl fused against kl eager",
        "tokens": got.numel(),
        "gradient_max_difference": float((got.float() - want.float()).abs().max()),
        "tokens_shut_by_one_only": int(((got == 0) != (want == 0)).sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--smallest", type=int, default=12, help="log2 of the fewest tokens")
    parser.add_argument("--largest", type=int, default=26, help="log2 of the most tokens")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_kernel: no CUDA device here, and Triton's interpreter says nothing about speed; run on a GPU")
    sides, copied = copies()
    bandwidth = copied / timed(sides, args.rounds)["copy"][0]
    table: list[dict[str, Any]] = [{"what": "copy", "gb_per_s": bandwidth / 1e9}]
    for kind, dtype in DTYPES.items():
        table.append(difference(batch(1 << min(22, args.largest), dtype, "cuda")))
        for power in range(args.smallest, args.largest + 1, 2):
            data = batch(1 << power, dtype, "cuda")
            compiled = not args.no_compile and kind == "float32"
            moved = (sum(x.element_size() for x in (*data, data[0])) + 8) << power
            times = timed(steps(data, compiled), args.rounds)
            for name, (device, wall) in times.items():
                row = {"what": name, "dtype": kind, "tokens": 1 << power, "device_us": device * 1e6}
                row |= {"wall_us": wall * 1e6, "ratio_to_ppo": device / times["ppo eager"][0]}
                row["share_of_copy_bandwidth"] = moved / device / bandwidth
                table.append(row)
    card = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    write(f"kernel-{card}", table)


if __name__ == "__main__":
    main()
