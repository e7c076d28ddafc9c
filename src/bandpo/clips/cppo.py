"""CPPO: DPPO's mask with a weight by position and a budget of the prefix: the first clip that looks at token order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip, Region
from bandpo.clips.regions import Band
from bandpo.operator.radius import RADII
from bandpo.operator.sequences import lengths
from bandpo.operator.tokens import Tokens, above


@dataclass(frozen=True)
class Cppo(Clip):
    """A mask by total variation that is stricter for early tokens, and after a prefix that has drifted.

    c = min(r, cap) A,  or 0 outward where z_t > min(delta, delta + budget W_{t-1} - S_{t-1}),  z_t = w_t |q - p|,
    w_t linear from 1 at the first token to w_min at the last, W and S the running sums of w and z

    Args:
        delta: radius in probability, of the first token.
        w_min: weight of the last token, in [0, 1].
        budget: drift per token that the prefix may have, >= 0; the authors' adaptive one is left out.
        cap: ceiling of the weight r, >= 1, or None.

    Raises:
        InputError: a value out of its range; later, tokens that are no (batch, token).

    Source: arXiv 2606.10968; values of the paper.
    """

    name: ClassVar[str] = "cppo"
    paper: ClassVar[str] = "2606.10968"
    looks_at: ClassVar[str] = "sequence"
    delta: float = 0.15
    w_min: float = 0.8
    budget: float = 0.02
    cap: float | None = 20.0

    def __post_init__(self) -> None:
        check_number("delta", self.delta, *RADII)
        check_number("w_min", self.w_min, 0.0, 1.0)
        check_number("budget", self.budget, 0.0)
        if self.cap is not None:
            check_number("cap", self.cap, 1.0)

    @property
    def boundary(self) -> Region:
        """Band with tv: the limit of a first token without a prefix."""
        return Band("tv", self.delta)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return min(r, cap) A, or 0 where the mask is 0."""
        present = torch.ones_like(tokens.log_r) if tokens.mask is None else tokens.mask.to(tokens.log_r.dtype)
        place = present.cumsum(-1) - 1  # of each token in its sequence
        last = (lengths(tokens) - 1).clamp(min=1)
        weight = (1 - (1 - self.w_min) * place / last) * present
        moved = weight * tokens.moved.abs()
        spent = self.budget * (weight.cumsum(-1) - weight) - (moved.cumsum(-1) - moved)
        outward = above(tokens.log_r.sign() * tokens.advantages, 0.0)
        dropped = above(moved - self.delta - spent.clamp(max=0.0), 0.0) * outward
        ratio = tokens.ratio if self.cap is None else tokens.ratio.clamp(max=self.cap)
        c = ratio * tokens.advantages
        return c - c * dropped
