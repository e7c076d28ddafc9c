"""VESPO: the whole sequence's ratio, weighed by a gamma density that is 1 at 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.base import Clip
from bandpo.operator.sequences import lengths, sequence_mean
from bandpo.operator.tokens import Tokens

LEAST = math.log(1e-8)  # of log W, as in the authors' code


@dataclass(frozen=True)
class Vespo(Clip):
    """A weight of the sequence's ratio that rises to 1 and falls again.

    c = W^k exp(lam (1 - W)) A,  W = prod_t r_t

    Args:
        k_pos: power where A >= 0, >= 0.
        lam_pos: rate where A >= 0, > 0.
        k_neg: power where A < 0, >= 0.
        lam_neg: rate where A < 0, > 0.

    Raises:
        InputError: a value out of its range; later, tokens that are no (batch, token).

    Source: arXiv 2602.10693; values of the authors' code and of TRL (a docstring there says 2, 1.5, 4, 2.5). log W is
    cut to [log 1e-8, 20], as there.
    """

    name: ClassVar[str] = "vespo"
    paper: ClassVar[str] = "2602.10693"
    looks_at: ClassVar[str] = "sequence"
    uses_p: ClassVar[bool] = False
    k_pos: float = 2.0
    lam_pos: float = 3.0
    k_neg: float = 3.0
    lam_neg: float = 2.0

    def __post_init__(self) -> None:
        for name in ("k_pos", "k_neg"):
            check_number(name, getattr(self, name), 0.0)
        for name in ("lam_pos", "lam_neg"):
            check_number(name, getattr(self, name), 0.0, open_low=True)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return the weight times A, the same weight for each token of a sequence and sign of A."""
        total = sequence_mean(tokens.log_r.clamp(-20.0, 20.0), tokens) * lengths(tokens)
        log_w = total.clamp(LEAST, 20.0)
        positive = tokens.advantages >= 0
        k, lam = (
            torch.where(positive, log_w.new_tensor(a), log_w.new_tensor(b))
            for a, b in ((self.k_pos, self.k_neg), (self.lam_pos, self.lam_neg))
        )
        return torch.exp(lam + k * log_w - lam * torch.exp(log_w)) * tokens.advantages
