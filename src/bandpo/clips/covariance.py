"""KL-Cov and Clip-Cov: the few tokens whose advantage and log-probability vary together are held or dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip, Region, hard
from bandpo.clips.gates import Gate
from bandpo.operator.tokens import Tokens, above


@dataclass(frozen=True)
class KlCov(Clip):
    """The share of the batch's tokens with the largest covariance is pulled back.

    c = r A,  or r A - beta sgn(log r) for the top fraction by (A - mean A) (log q - mean log q)

    Args:
        fraction: of the batch's tokens, in (0, 1]; at least one token.
        beta: the pull, > 0.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2505.22617; verl's values, which are those of the authors' 32B scripts (7B: 2e-3; the configuration
    class of the paper's code has beta .1). In a host the batch is a micro-batch.
    """

    name: ClassVar[str] = "kl_cov"
    paper: ClassVar[str] = "2505.22617"
    looks_at: ClassVar[str] = "batch"
    opposes: ClassVar[bool] = True
    uses_p: ClassVar[bool] = False
    fraction: float = 2e-4
    beta: float = 1.0

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, 0.0, 1.0, open_low=True)
        check_number("beta", self.beta, 0.0, open_low=True)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return r A, with the pull on the chosen tokens."""
        chosen = _top(covariance(tokens), self.fraction, tokens.mask)
        return tokens.weighted - self.beta * tokens.log_r.sign() * chosen


@dataclass(frozen=True)
class ClipCov(Gate):
    """PPO's clip that also drops a few of the tokens whose covariance lies in a range.

    c = r A,  or 0 outside and outward,  or 0 for a fraction of the tokens with  low < covariance < high,
    where  covariance = (A - mean A) (log q - mean log q)

    Tokens whose gate is shut anyway are not among those. Which of the rest is random in the original; here a hash of
    their log-probabilities decides, so that the same tokens give the same gradient.

    Args:
        eps_low: margin of the fixed interval below, in [0, 1].
        eps_high: margin of the fixed interval above, >= 0.
        region: any region instead of that interval, or None.
        fraction: of the batch's tokens, in (0, 1]; at least one token.
        low: least covariance of a token that may be dropped.
        high: greatest.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2505.22617; values of verl's configuration. In a host the batch is a micro-batch.
    """

    name: ClassVar[str] = "clip_cov"
    paper: ClassVar[str] = "2505.22617"
    looks_at: ClassVar[str] = "batch"
    fraction: float = 2e-4
    low: float = 1.0
    high: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "looks_at", "batch")
        check_number("fraction", self.fraction, 0.0, 1.0, open_low=True)
        check_number("high", self.high, check_number("low", self.low, -1e30))

    def gate(self, tokens: Tokens, side: Tensor, region: Region) -> Tensor:
        """Return the hard gate's c, or 0 for the chosen tokens."""
        c, together = hard(tokens, side), covariance(tokens)
        fits = above(together, self.low) * above(-together, -self.high) * (1 - above(side * tokens.advantages, 0.0))
        dice = (torch.sin(tokens.log_q.clamp(min=-1e4) * 12.9898 + tokens.log_p * 78.233) * 43758.5453).frac().abs()
        return c - c * _top((dice + 1) * fits, self.fraction, tokens.mask) * fits


def covariance(tokens: Tokens) -> Tensor:
    """Return (A - mean A) (log q - mean log q) of each token over the whole batch, 0 in padding.

    Args:
        tokens: as in `Clip.coefficient`.

    Returns:
        Tensor of the tokens' shape.
    """
    log_q = tokens.log_q.clamp(min=-1e6)
    if tokens.mask is None:
        return (tokens.advantages - tokens.advantages.mean()) * (log_q - log_q.mean())
    weight = tokens.mask.to(log_q.dtype)
    count = weight.sum().clamp(min=1)
    means = [(x * weight).sum() / count for x in (tokens.advantages, log_q)]
    return (tokens.advantages - means[0]) * (log_q - means[1]) * weight


def _top(x: Tensor, fraction: float, mask: Tensor | None) -> Tensor:
    """Return 1 for the given fraction of the tokens, those of the largest `x`, at least one, else 0."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    x = torch.where(mask, x, -torch.inf)
    most = min(int(fraction * x.numel()) + 1, x.numel())  # no fewer, and known to the host, as topk needs it
    if not most:
        return x
    count = (fraction * mask.sum()).floor().long().clamp(min=1, max=most)  # stays on the device, rounded to float32
    least = x.flatten().topk(most).values.gather(0, count[None] - 1).squeeze(0)
    larger, equal = x > least, x == least  # of equal ones the first
    first = equal & (equal.flatten().cumsum(0).view_as(x) <= count - larger.sum())
    return (mask & (larger | first)).to(x.dtype)
