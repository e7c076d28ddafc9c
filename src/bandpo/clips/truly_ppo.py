"""TR-PPO and Truly PPO: the trust region decides, and beyond it nothing, or a pull back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip, Region
from bandpo.clips.regions import Band
from bandpo.operator.radius import RADII
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class TrPpo(Clip):
    """The hard gate of a KL trust region, in its binary form.

    c = r A,  or 0 where binary KL(old, new) > delta and r A > A

    The original looks at the whole distribution's KL; the binary one is a lower bound of it, so this lets more through.
    Its zero set is that of `Band` with kl.

    Args:
        delta: radius in nats.

    Raises:
        InputError: a radius out of its range.

    Source: arXiv 1903.07940; the radius of the authors' code for MuJoCo (Atari: .001).
    """

    name: ClassVar[str] = "tr_ppo"
    paper: ClassVar[str] = "1903.07940"
    delta: float = 0.035

    def __post_init__(self) -> None:
        check_number("delta", self.delta, *RADII)

    @property
    def boundary(self) -> Region:
        """Band with kl."""
        return Band("kl", self.delta)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return r A, or 0 outside and outward."""
        return self.boundary.coefficient(tokens)

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return A, or 0 outside and outward."""
        return self.boundary.advantages(tokens)


@dataclass(frozen=True)
class TrulyPpo(Clip):
    """Beyond the trust region the KL itself joins the objective, and pulls back.

    c = r A,  or r A - slope (q - p) / (1 - q) outside and outward

    That term is the gradient of the binary KL(old, new); the original has the whole distribution's.

    Args:
        delta: radius in nats.
        slope: weight of the KL beyond it, > 0.

    Raises:
        InputError: a value out of its range.

    Source: arXiv 1903.07940; values of the authors' code for MuJoCo (Atari: .0008 and 20).
    """

    name: ClassVar[str] = "truly_ppo"
    paper: ClassVar[str] = "1903.07940"
    opposes: ClassVar[bool] = True
    delta: float = 0.03
    slope: float = 5.0

    def __post_init__(self) -> None:
        check_number("delta", self.delta, *RADII)
        check_number("slope", self.slope, 0.0, open_low=True)

    @property
    def boundary(self) -> Region:
        """Band with kl."""
        return Band("kl", self.delta)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return r A, with the pull outside and outward."""
        side = self.boundary.side(tokens)
        pull = self.slope * tokens.moved / tokens.outcomes()[1].q
        outward = side * tokens.advantages > 0
        return torch.where(outward, tokens.weighted - pull, tokens.weighted)
