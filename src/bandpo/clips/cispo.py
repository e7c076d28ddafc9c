"""CISPO: the ratio is clipped as a weight, and every token keeps a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import MOST, Clip
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Cispo(Clip):
    """Importance weights clipped to [1 - eps_low, 1 + eps_high]; a cap of the weight, no trust region.

    c = clip(r, 1 - eps_low, 1 + eps_high) A

    Args:
        eps_low: margin below, in [0, 1], or None for no lower clip, which is how it is published.
        eps_high: margin above, > -1: the weight's ceiling is 1 + eps_high. TRL's `epsilon_high` is that ceiling itself.

    Raises:
        InputError: a margin out of its range.

    Source: arXiv 2506.13585 (MiniMax-M1), which tunes eps_high and gives no number; 0.28 is Clip-Higher's, verl has
    0.2, ScaleRL (2510.13786) a ceiling of 5.
    """

    name: ClassVar[str] = "cispo"
    paper: ClassVar[str] = "2506.13585"
    uses_p: ClassVar[bool] = False
    eps_low: float | None = None
    eps_high: float = 0.28

    def __post_init__(self) -> None:
        if self.eps_low is not None:
            check_number("eps_low", self.eps_low, 0.0, 1.0)
        check_number("eps_high", self.eps_high, -1.0, open_low=True)

    def _log_weight(self, log_r: Tensor) -> Tensor:
        low = -math.inf if self.eps_low in (None, 1.0) else math.log1p(-self.eps_low)  # type: ignore[operator]
        return log_r.clamp(low, math.log1p(self.eps_high))

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return clip(r) A."""
        return torch.exp(self._log_weight(tokens.log_r)) * tokens.advantages

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return clip(r) / r A."""
        return torch.exp(self._log_weight(tokens.log_r) - tokens.log_r.clamp(-MOST, MOST)) * tokens.advantages
