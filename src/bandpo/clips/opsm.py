"""OPSM: bad sequences that the policy has moved away from count nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from bandpo._input import check_number
from bandpo.clips.masks import Mask
from bandpo.operator.radius import RADII
from bandpo.operator.sequences import sequence_mean
from bandpo.operator.tokens import Tokens, above


@dataclass(frozen=True)
class Opsm(Mask):
    """Off-policy sequence masking.

    c = r A,  or 0 where A < 0 and  mean_t(log p_t - log q_t) > delta

    Args:
        delta: radius in nats, of the sequence's mean.

    Raises:
        InputError: a radius out of its range; later, tokens that are no (batch, token).

    Source: arXiv 2512.02556 (DeepSeek-V3.2), which gives no number; .5 is the example of TRL's documentation. In TRL it
    is `off_policy_mask_threshold`, which works beside most clips.
    """

    name: ClassVar[str] = "opsm"
    paper: ClassVar[str] = "2512.02556"
    looks_at: ClassVar[str] = "sequence"
    uses_p: ClassVar[bool] = False
    delta: float = 0.5

    def __post_init__(self) -> None:
        check_number("delta", self.delta, *RADII)

    def kept(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return `x`, and 0 where a sequence is dropped."""
        drift = sequence_mean(-tokens.log_r.clamp(-1e6, 1e6), tokens)
        return x * (1 - above(drift, self.delta) * above(-tokens.advantages, 0.0))
