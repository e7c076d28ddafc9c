"""DPPO: tokens that have left a binary divergence outward are masked, the others have a truncated weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import MOST, Clip, Region, shut
from bandpo.clips.regions import Band
from bandpo.operator.radius import RADII, Delta, check_delta
from bandpo.operator.tokens import Tokens, above


@dataclass(frozen=True)
class DppoTV(Clip):
    """DPPO's mask by binary total variation. Its zero set is that of `Band` with the same divergence and radius.

    c = min(r, cap) A,  or 0 where A > 0 and q - p > delta, or A < 0 and p - q > delta

    Args:
        delta: radius in probability: a float, a tensor that broadcasts, or a pair (delta_low, delta_high).
        cap: ceiling of the weight r, >= 1, or None. Unlike a Band's it takes no gradient away.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2602.04879; radius and ceiling of verl's example and code. In verl the ceiling is `clip_ratio_c`,
    which the actor's configuration sets to 3 unless told otherwise. The authors take p from the rollout engine.
    """

    name: ClassVar[str] = "dppo_tv"
    paper: ClassVar[str] = "2602.04879"
    divergence: ClassVar[str] = "tv"
    delta: Delta = 0.15
    cap: float | None = 20.0

    def __post_init__(self) -> None:
        check_delta(self.delta)
        if self.cap is not None:
            check_number("cap", self.cap, 1.0)

    @property
    def boundary(self) -> Region:
        """The band of the same divergence and radius."""
        return Band(self.divergence, self.delta, cap=None)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return min(r, cap) A, or 0 where the mask is 0."""
        weight = tokens.ratio if self.cap is None else tokens.ratio.clamp(max=self.cap)
        return shut(weight * tokens.advantages, tokens, self.boundary.side(tokens))

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return min(r, cap) / r A, or 0 where the mask is 0."""
        kept = self.boundary.advantages(tokens)
        if self.cap is None:
            return kept
        return kept * torch.exp((math.log(self.cap) - tokens.log_r).clamp(-MOST, 0.0))


@dataclass(frozen=True)
class DppoKL(DppoTV):
    """DPPO's mask by binary KL(old || new). Its zero set is that of `Band` with the same divergence and radius.

    c = min(r, cap) A,  or 0 where p log(p/q) + (1-p) log((1-p)/(1-q)) > delta and A pushes q further out

    Args:
        delta: radius in nats: a float, a tensor that broadcasts, or a pair (delta_low, delta_high).
        cap: ceiling of the weight r, >= 1, or None. Unlike a Band's it takes no gradient away.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2602.04879; radius and ceiling of verl's example and code, as for `DppoTV`.
    """

    name: ClassVar[str] = "dppo_kl"
    divergence: ClassVar[str] = "kl"
    delta: Delta = 0.05


@dataclass(frozen=True)
class DppoTopK(Clip):
    """DPPO's mask by the divergence of the whole state, over the top k actions and the rest as one.

    c = min(r, cap) A,  or 0 where D_topk > delta and A pushes q further out

    Args:
        delta: radius, in nats for kl.
        cap: ceiling of the weight r, >= 1, or None.

    Raises:
        InputError: a value out of its range; later, tokens without `state_divergence`: give
            `bandpo.top_k_divergence(logits, old_logits, k, actions)`.

    Source: arXiv 2602.04879; the radius is that of its binary form with kl, the authors' for this one was not found.
    """

    name: ClassVar[str] = "dppo_topk"
    paper: ClassVar[str] = "2602.04879"
    needs: ClassVar[tuple[str, ...]] = ("state_divergence",)
    delta: float = 0.05
    cap: float | None = 20.0

    def __post_init__(self) -> None:
        check_number("delta", self.delta, *RADII)
        if self.cap is not None:
            check_number("cap", self.cap, 1.0)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return min(r, cap) A, or 0 where the mask is 0."""
        side = above(tokens.need("state_divergence", self.name), self.delta) * tokens.log_r.sign()
        weight = tokens.ratio if self.cap is None else tokens.ratio.clamp(max=self.cap)
        return shut(weight * tokens.advantages, tokens, side)
