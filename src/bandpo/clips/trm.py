"""TRM: one token that has moved too far, and the whole sequence counts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.masks import Mask
from bandpo.operator.radius import RADII
from bandpo.operator.sequences import sequence_max
from bandpo.operator.tokens import Tokens, above


@dataclass(frozen=True)
class Trm(Mask):
    """Trust-region masking of sequences, by the k3 estimate of each token's KL.

    c = r A,  or 0 for every token of a sequence where r - 1 - log r > delta for any

    Args:
        delta: radius in nats.

    Raises:
        InputError: a radius out of its range; later, tokens that are no (batch, token).

    Source: arXiv 2512.23075, of which only the abstract was read, in the form of verl's `seq_max_k3`; the radius is
    ours. Meant for the ratio of trainer to rollout engine.
    """

    name: ClassVar[str] = "trm"
    paper: ClassVar[str] = "2512.23075"
    looks_at: ClassVar[str] = "sequence"
    uses_p: ClassVar[bool] = False
    delta: float = 0.05

    def __post_init__(self) -> None:
        check_number("delta", self.delta, *RADII)

    def kept(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return `x`, and 0 in the sequences that are dropped."""
        return x * (1 - sequence_max(above(tokens.rise - tokens.log_r, self.delta), tokens))
