"""SAPO: a smooth gate, widest at r = 1 and closing on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip
from bandpo.operator.tokens import Tokens, above


@dataclass(frozen=True)
class Sapo(Clip):
    """A sigmoid instead of the hard gate; the same at every old probability.

    c = 4 s (1 - s) r A,  s = sigmoid(tau (r - 1)),  tau = tau_pos where A > 0, else tau_neg

    Args:
        tau_pos: steepness for positive advantages, > 0.
        tau_neg: steepness for the others, > 0.

    Raises:
        InputError: a steepness that is not positive.

    Source: arXiv 2511.20347; TRL, verl and ms-swift have the same defaults.
    """

    name: ClassVar[str] = "sapo"
    paper: ClassVar[str] = "2511.20347"
    uses_p: ClassVar[bool] = False
    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        check_number("tau_pos", self.tau_pos, 0.0, open_low=True)
        check_number("tau_neg", self.tau_neg, 0.0, open_low=True)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return 4 s (1 - s) r A."""
        return self.advantages(tokens) * tokens.ratio

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return 4 s (1 - s) A."""
        tau = self.tau_neg + (self.tau_pos - self.tau_neg) * above(tokens.advantages, 0.0)
        x = tau * tokens.rise
        return 4 * torch.sigmoid(x) * torch.sigmoid(-x) * tokens.advantages  # 1 - s would round to 0
