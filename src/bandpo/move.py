"""How far tokens moved between two policies, and the arithmetic that keeps its digits and its speed.

On a CPU in eager mode a comparison that makes a bool tensor costs five times as much as one that makes a float, and
`torch.where` on a random mask thirty times as much. So the core masks with an integer AND and selects by products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bandpo.arithmetic import exp, expm1

LARGE = 3e38  # stands for infinity where inf * 0 would make a NaN; float32 can hold it
TINY = 1.2e-38  # stands for 0 under a division; smaller numbers are subnormal, a hundred times as slow on a CPU


class Move:
    """How far each token moved: from probability p to q = r p.

    `log_ratio` (log r) and `rise` (r - 1, exact near r = 1) are scratch: a divergence may overwrite them. The methods
    make a new tensor at each call: recomputing is cheaper than holding one more tensor in memory.

    Args:
        logps: log-probabilities of the taken actions under the new policy, any shape.
        old_logps: the same under the old policy, same shape.
        mask: 1 for tokens, 0 for padding, or None. Padding has not moved (r = 1), whatever it holds, NaN too. Its p is
            what it holds, and so may be NaN, and a divergence with it: that is above no radius, and no sum takes it.
    """

    def __init__(self, logps: Tensor, old_logps: Tensor, mask: Tensor | None = None) -> None:
        dtype = working_dtype(logps)
        self._inputs = logps.to(dtype), old_logps.to(dtype), mask
        log_p = self._inputs[1].clamp(min=-LARGE)  # -inf - -inf would be NaN
        log_ratio = torch.sub(self._inputs[0], log_p, out=None if torch.compiler.is_compiling() else log_p)
        # e^80 is far past any use, and products with it stay finite
        self.log_ratio = (log_ratio if mask is None else keep(log_ratio, mask)).clamp_(-LARGE, 80.0)
        del log_p, log_ratio
        self.rise = expm1(self.log_ratio)

    def again(self) -> Move:
        """Return the same move with fresh scratch."""
        return Move(*self._inputs)

    def raw_log_ratio(self) -> Tensor:
        """Return log r as the inputs have it: padding may hold anything."""
        return self._inputs[0] - self._inputs[1]

    def p(self) -> Tensor:
        """Return p."""
        return exp(self._inputs[1])

    def minus_rest(self) -> Tensor:
        """Return -(1 - p), with all its digits near p = 1, at most -`TINY`."""
        return expm1(self._inputs[1]).clamp_(max=-TINY)

    def rest(self) -> Tensor:
        """Return 1 - p, with all its digits near p = 1, at least `TINY`."""
        return self.minus_rest().neg_()


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which `x` is computed: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def keep(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return a copy of `x` with zeros where `mask` is 0, even where `x` holds NaN.

    By an integer AND, because `x * mask` keeps NaN.

    Args:
        x: float32 or float64 tensor, any shape.
        mask: 0 and 1, shape that `x` broadcasts to, or None to keep all.

    Returns:
        A new tensor of the mask's shape, or of the shape of `x` without a mask.
    """
    if mask is None:
        return x.clone()
    if torch.compiler.is_compiling():
        return torch.where(mask != 0, x, 0.0)  # compilers fuse this one, and not the AND
    bits = torch.int32 if x.dtype == torch.float32 else torch.int64
    return mask.to(bits).neg_().bitwise_and_(x.view(bits)).view(x.dtype)


def above(x: Tensor, limit: float | Tensor) -> Tensor:
    """Return 1.0 where x > limit, else 0.0: in the dtype of `x`, eight times as fast on a CPU as a bool tensor."""
    return torch.gt(x, limit, out=torch.empty_like(x))
