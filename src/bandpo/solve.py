"""The roots of g_f = delta for every token: by a formula, one by one, or through a table.

No branch on values, no host synchronisation, no state.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from bandpo.divergences import Divergence, by_tail
from bandpo.side import Side, evaluations
from bandpo.table import NODES, Table, table_bounds

PIECE = 1 << 19  # bytes of log_p at a time on a CPU: more leave its caches, fewer cost more calls
Bounds = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def log_bounds(divergence: Divergence, log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the roots of g_f(p, r) = delta on both sides of r = 1, as log-ratios.

    Args:
        divergence: which f.
        log_p: log-probabilities in nats, <= 0 and finite, any shape.
        delta_low: radius for the lower bound, broadcasts with `log_p`.
        delta_high: radius for the upper bound, broadcasts with `log_p`; the same tensor where it is the same radius.

    Returns:
        (log_low, log_high) in the dtype of `log_p`; -inf and -log_p or more where the region reaches the simplex's end.

    Source: arXiv 2603.04918, section 3.
    """
    # f itself loses digits near 1, and a lower bound that nears ratio 0 hangs on the last digits of delta: float32 has
    # none to spare. Apple's GPUs have nothing wider.
    wide = log_p.dtype if divergence.narrow or log_p.device.type == "mps" else torch.float64
    low = delta_low.to(wide)
    deltas = low, low if delta_high is delta_low else delta_high.to(wide)
    bounds = divergence.bounds or _solver(divergence, log_p, *deltas)
    found = [
        [x.to(log_p.dtype) for x in bounds(piece[0].to(wide), *piece[1:])] for piece in _pieces(wide, log_p, *deltas)
    ]
    sides = zip(*found, strict=True)
    low, high = (torch.cat(side).view(log_p.shape) if len(side) > 1 else side[0] for side in sides)
    return low, high


def _solver(divergence: Divergence, log_p: Tensor, delta_low: Tensor, delta_high: Tensor) -> Bounds:
    """Return the `bounds` of a divergence that has none, good for the dtype of `log_p`."""
    if _pays(log_p, delta_low, delta_high) and divergence.shape.smooth:
        low = Table(divergence, delta_low)
        high = low if delta_high is delta_low else Table(divergence, delta_high)
        return lambda log_p, *_: table_bounds(divergence, log_p, low, high)
    steps = evaluations(divergence, wide=log_p.dtype == torch.float64)

    def tail(shrink: Tensor, grow: Tensor, delta: Tensor) -> Tensor:
        return Side(divergence, shrink, grow, delta).fall(steps).mul_(shrink)

    return by_tail(tail, divergence.shape)


def _pays(log_p: Tensor, *deltas: Tensor) -> bool:
    """Return whether a table costs less than it saves, and has the digits."""
    one_radius = all(delta.numel() == 1 and delta.dtype == torch.float64 for delta in deltas)
    many = log_p.dtype != torch.float64 and log_p.numel() >= 4 * NODES
    return many and one_radius and not torch.compiler.is_compiling()


def _pieces(dtype: torch.dtype, log_p: Tensor, low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    size = PIECE // dtype.itemsize
    if torch.compiler.is_compiling() or log_p.device.type != "cpu" or log_p.numel() <= size:
        yield log_p, low, high
        return
    parts = [_split(x, log_p, size) for x in (log_p, low)]
    parts.append(parts[1] if high is low else _split(high, log_p, size))
    yield from zip(*parts, strict=False)  # a radius of one element repeats without end


def _split(x: Tensor, like: Tensor, size: int) -> Iterable[Tensor]:
    return itertools.repeat(x) if x.numel() == 1 < like.numel() else torch.split(x.expand(like.shape).flatten(), size)
