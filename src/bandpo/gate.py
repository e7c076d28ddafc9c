"""What happens to a token outside its region: PPO's rule, which takes the gradient from it when it moves outward.

PPO maximises min(r A, clip(r) A). Its gradient is c * grad log pi with c = r A, and c = 0 exactly when (A > 0 and the
token is above its bound) or (A < 0 and it is below). So the gradient needs no bound, only the side on which a token is
outside.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bandpo.clips import Region
from bandpo.move import Move, above, keep


class Gated(NamedTuple):
    """The loss of each token before aggregation.

    Args:
        value: -r A.
        coefficient: derivative of the loss by logps: -r A, or 0 where the gate is shut.
        state: -2 below without gradient, -1 below, 0 inside, 1 above, 2 above without gradient; only with
            `want_reached`.
        reached: the divergence of each token in the clip's measure; only with `want_reached`.
    """

    value: Tensor
    coefficient: Tensor
    state: Tensor
    reached: Tensor | None


@torch.no_grad()
def hard_gate(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip: Region,
    dual_clip: float | None = None,
    want_reached: bool = True,
) -> Gated:
    """Return value, gradient coefficient and state of each token under PPO's min.

    Args:
        logps: natural-log probabilities under the new policy, any shape.
        old_logps: the same under the old policy.
        advantages: of the same shape, or broadcasting to it.
        mask: 1 for tokens, 0 for padding (inert whatever it holds), or None.
        clip: the region.
        dual_clip: with A < 0, no gradient above this ratio; > 1, or None.
        want_reached: also return what the metrics need, the state and the divergence reached.

    Returns:
        `Gated`, every tensor of the tokens' shape.

    Source: arXiv 1707.06347 (PPO), 1912.09729 (dual clip), 2603.04918 (Band).
    """
    move = Move(logps, old_logps, mask)
    value = keep(advantages.to(move.rise.dtype).expand_as(logps), mask)
    dual = None
    if dual_clip is not None:
        dual = above(move.log_ratio, math.log(dual_clip)).mul_(above(-value, 0.0))
    value.addcmul_(value, move.rise).neg_()
    state, reached = clip.outside(move, want_reached)
    shut = torch.mul(state, value).lt_(0.0)  # outward: A > 0 above or A < 0 below
    if dual is not None:
        state.add_(dual).clamp_(max=1.0)
        torch.maximum(shut, dual, out=shut)
    if want_reached:
        state.addcmul_(state, shut)
    coefficient = torch.addcmul(value, value, shut, value=-1.0, out=shut)
    return Gated(value, coefficient, state, reached if want_reached else None)
