"""IPO of prime-rl: tokens whose probability has moved too far are dropped, whichever way they go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Region
from bandpo.clips.masks import Mask
from bandpo.clips.regions import Band
from bandpo.operator.tokens import Tokens, above


@dataclass(frozen=True)
class Ipo(Mask):
    """A mask by total variation for both signs of A and both directions.

    c = r A,  or 0 where |q - p| > eps

    Args:
        eps: how far a probability may move, in (0, 1].

    Raises:
        InputError: a margin out of its range.

    Source: prime-rl's default loss. Versions: "ipo@2026-03" has eps .2, "ipo@2026-08" .1, "ipo@2026-09" (the default
    here) .3; the older ones also had a term kl_tau (log r)^2, of weight 1e-3 in August, which belongs to the loss.
    There p is the rollout engine's.
    """

    name: ClassVar[str] = "ipo"
    paper: ClassVar[str] = "prime-rl"
    eps: float = 0.3

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 0.0, 1.0, open_low=True)

    @property
    def boundary(self) -> Region:
        """Band with tv."""
        return Band("tv", max(self.eps, 1e-8))

    def kept(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return `x`, and 0 where a token is dropped."""
        return torch.addcmul(x, x, above(tokens.moved.abs(), self.eps), value=-1.0)
