"""Archer: a wider interval for the tokens at which the policy was undecided."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import InputError, check_number
from bandpo.clips.base import Region
from bandpo.operator.band import Bounds
from bandpo.operator.sequences import lengths
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Archer(Region):
    """PPO's interval with a margin by entropy: one for most tokens, another for a response's most uncertain ones.

    |r - 1| <= eps_uncertain where H is above the response's quantile of H, else |r - 1| <= eps

    Args:
        eps: margin on both sides for most tokens, in [0, 1].
        eps_uncertain: margin for the tokens of high entropy, in [0, 1].
        quantile: share of a response's tokens with the first margin, in (0, 1).

    Raises:
        InputError: a value out of its range; later, tokens without entropies.

    Source: arXiv 2507.15778; values of the authors' scripts, where a variable named for the high
    entropies holds the low ones. Its other KL weights by class are no part of the clip and are left out.
    """

    name: ClassVar[str] = "archer"
    paper: ClassVar[str] = "2507.15778"
    looks_at: ClassVar[str] = "sequence"
    needs: ClassVar[tuple[str, ...]] = ("entropies",)
    uses_p: ClassVar[bool] = False
    as_bounds: ClassVar[bool] = False
    eps: float = 0.2
    eps_uncertain: float = 0.4
    quantile: float = 0.8

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 0.0, 1.0)
        check_number("eps_uncertain", self.eps_uncertain, 0.0, 1.0)
        check_number("quantile", self.quantile, 0.0, 1.0, open_low=True)

    def bounds(self, log_p: Tensor) -> Bounds:
        """Raise: the bounds hang on entropies, not on log p."""
        raise InputError("clip 'archer' has no bounds by probability: they hang on entropies; use limits(tokens)")

    def limits(self, tokens: Tokens) -> Bounds:
        """Return the interval of each token by its entropy."""
        entropies = tokens.need("entropies", self.name)
        uncertain = entropies > self._threshold(entropies, tokens)
        least = -torch.finfo(entropies.dtype).max
        lows = [math.log1p(-eps) if eps < 1 else least for eps in (self.eps_uncertain, self.eps)]
        highs = [math.log1p(eps) for eps in (self.eps_uncertain, self.eps)]
        low, high = (entropies.new_tensor(ends)[(~uncertain).long()] for ends in (lows, highs))
        return Bounds(low, high)

    def _threshold(self, entropies: Tensor, tokens: Tokens) -> Tensor:
        """Return the quantile of each response's entropies, of its tokens alone, without waiting for the device."""
        ordered = (entropies if tokens.mask is None else torch.where(tokens.mask, entropies, torch.inf)).sort(-1).values
        count = lengths(tokens)
        place = (count - 1).clamp(min=0).to(entropies.dtype) * self.quantile
        below = place.floor()
        a = ordered.gather(-1, below.long())
        b = ordered.gather(-1, torch.minimum(below + 1, (count - 1).clamp(min=0)).long())
        return torch.where(count > 0, torch.lerp(a, b, place - below), 0.0)
