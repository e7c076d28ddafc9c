"""MASPO: a soft band: a Gaussian of the ratio whose width grows for rare tokens and for large advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Maspo(Clip):
    """Outward moves decay as a Gaussian of r - 1; the level sets are |r - 1| = k / p^alpha.

    c = exp(-(r-1)^2 / (2 s^2)) r A outward, r A inward;  s = clamp(sigma / p^alpha, sigma, 10) risk,  risk = 1 + beta A
    where A > 0, else 1 / (1 + beta |A|), within [.1, 10]

    Args:
        sigma: width at p = 1, > 0.
        alpha: power of p, >= 0.
        beta: how much the advantage's size widens (A > 0) or narrows, >= 0.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 2602.17550; values of the authors' code (for their 1.5B model alpha = .5).
    """

    name: ClassVar[str] = "maspo"
    paper: ClassVar[str] = "2602.17550"
    sigma: float = 1.0
    alpha: float = 0.3
    beta: float = 0.03

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, 0.0, open_low=True)
        check_number("alpha", self.alpha, 0.0)
        check_number("beta", self.beta, 0.0)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return r A times the Gaussian, where the move is outward."""
        return self.advantages(tokens) * tokens.ratio

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return A times the Gaussian, where the move is outward."""
        grown, size = 1 + self.beta * tokens.advantages.clamp(min=0.0), -tokens.advantages.clamp(max=0.0)
        risk = (grown / (1 + self.beta * size)).clamp(0.1, 10.0)
        width = self.sigma * torch.exp((-self.alpha * tokens.log_p).clamp(0.0, 60.0))
        z = tokens.rise / (width.clamp(self.sigma, max(10.0, self.sigma)) * risk)
        outward = tokens.rise * tokens.advantages > 0
        return tokens.advantages * torch.where(outward, torch.exp(-(z.clamp(max=1e15) ** 2) / 2), 1.0)
