"""Band for whole sequences: one token that has left its band, and the sequence counts nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bandpo.clips.base import Region
from bandpo.clips.masks import Mask
from bandpo.clips.regions import Band
from bandpo.operator.divergence import Divergence
from bandpo.operator.radius import Delta
from bandpo.operator.sequences import sequence_max
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class BandSequence(Mask):
    """A mask of sequences by the divergence of their tokens.

    c = r A,  or 0 for every token of a sequence where g_f(p, r) > delta for any

    Args:
        divergence: a name or a `Divergence`.
        delta: divergence radius: a float, a tensor that broadcasts, or a pair (delta_low, delta_high).

    Raises:
        InputError: a value out of its range; later, tokens that are no (batch, token).

    Source: ours, after TRM (2512.23075): its rule with the binary divergence of BandPO (2603.04918).
    """

    name: ClassVar[str] = "band_sequence"
    paper: ClassVar[str] = "2603.04918"
    looks_at: ClassVar[str] = "sequence"
    divergence: str | Divergence = "kl"
    delta: Delta = 0.05

    def __post_init__(self) -> None:
        Band(self.divergence, self.delta)

    @property
    def boundary(self) -> Region:
        """The band that no token may leave."""
        return Band(self.divergence, self.delta)

    def kept(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return `x`, and 0 in the sequences that are dropped."""
        return x * (1 - sequence_max(self.boundary.side(tokens).abs(), tokens))
