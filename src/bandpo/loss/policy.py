"""The policy loss under any clip: its gradient is the clip's coefficient, exactly; its metrics stay on the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bandpo._input import check_number, check_values, per_token
from bandpo.clips import get_clip
from bandpo.clips.anchored import anchored
from bandpo.clips.base import Clip
from bandpo.clips.dual_clip import Dual
from bandpo.clips.foreign import check_coefficient
from bandpo.loss.aggregation import Aggregation, aggregate, check_aggregation
from bandpo.loss.fused import choose, fused_loss
from bandpo.loss.importance import check_importance, importance_weight
from bandpo.loss.stats import ClipStats, count
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class LossOutput:
    """What `policy_loss` returns.

    Args:
        loss: to call backward() on: a scalar, or one value per token with aggregation "none".
        metrics: name to tensor of no dimension; nothing has moved to the host.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class _Attach(torch.autograd.Function):
    """Give per-token values a gradient that is known already: one tensor is saved for backward."""

    @staticmethod
    def forward(ctx: Any, logps: Tensor, value: Tensor, coefficient: Tensor) -> Tensor:
        ctx.save_for_backward(coefficient)
        ctx.dtype = logps.dtype
        return value.view_as(value)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[misc]  # a second derivative is an error, not 0
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (coefficient,) = ctx.saved_tensors
        return (grads[0] * coefficient).to(ctx.dtype), None, None


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: object = "band",
    dual_clip: float | None = None,
    aggregation: Aggregation = "token-mean",
    normalizer: float | Tensor | None = None,
    metrics: bool = True,
    exact_value: bool = False,
    anchor: str = "old",
    importance_sampling_mode: str | None = None,
    importance_sampling_cap: float = 2.0,
    rollout_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    rewards: Tensor | None = None,
    state_divergence: Tensor | None = None,
    validate: bool = False,
) -> LossOutput:
    """Return the policy-gradient loss under any clip.

    loss = aggregate(-r A), detached, with the gradient -c(p, r, A) / norm per token. For a hard gate such as `Band`
    c = r A, and 0 where the token is outside its region and A pushes it further out.

    A second derivative does not exist, and asking for one is an error; `torch.func` and vmap do not go through it.

    Args:
        logps: natural-log probabilities of the taken actions under the policy in training, (batch, token) or any shape.
        old_logps: the same under the policy that the ratio divides by, same shape; no gradient flows into it.
        advantages: per token, or per sequence (batch,) or (batch, 1).
        mask: 1 for tokens, 0 for padding, same shape, any integer, bool or floating type; or None. Padding may hold
            anything, NaN too.
        clip: a clip, a name, or any object with `coefficient(tokens)`; see `get_clip`. Under `torch.compile` give a
            clip that was made outside.
        dual_clip: with A < 0, no gradient above this ratio: > 1, or None.
        aggregation: "token-mean", "seq-mean-token-mean", "seq-mean-token-sum" (means over the sequences that have
            tokens), "sum", "none" (per token), or a callable (per_token, mask) -> scalar.
        normalizer: a constant instead of the number of tokens or sequences that the mean divides by; divides a "sum".
        metrics: whether to count what the clip did (`ClipStats.metrics`).
        exact_value: the loss's value is that of min(r A, clip(r) A), for which the bounds are solved; hard gates only.
            The gradient is the same.
        anchor: which old policy the clip measures from: "old", or "p", "r", "both" for `rollout_logps`; see
            `bandpo.clips.anchored`.
        importance_sampling_mode: weigh each token by old / rollout: None, "token_truncate", "token_mask",
            "sequence_truncate" or "sequence_mask". Leave it None in a host that does so itself.
        importance_sampling_cap: greatest such weight, > 0.
        rollout_logps: as in `Tokens`.
        entropies: as in `Tokens`.
        rewards: as in `Tokens`.
        state_divergence: as in `Tokens`.
        validate: check the tensors' values too, at the price of a host synchronisation.

    Returns:
        `LossOutput`.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, an unknown aggregation, an argument out of its range, a
            clip that lacks what it needs or whose coefficient has the wrong shape.

    Source: arXiv 1707.06347 (PPO), 2603.04918 (Band), 1912.09729 (dual clip).
    """
    chosen = _chosen(clip, dual_clip, anchor)
    check_aggregation(aggregation, normalizer, logps)
    check_importance(importance_sampling_mode, importance_sampling_cap, anchor)
    optional = {"rollout_logps": rollout_logps, "entropies": entropies, "rewards": rewards}
    optional |= {"state_divergence": state_divergence}
    tokens = Tokens(logps, old_logps, advantages, mask, **optional)
    if validate:
        check_values(logps, old_logps, per_token(advantages, logps), mask)
    given = {"logps": logps, "old_logps": old_logps, "advantages": advantages, "mask": mask}
    rule = choose(chosen, given, exact_value=exact_value, importance_sampling_mode=importance_sampling_mode, **optional)
    if rule is not None:
        each = per_token(advantages, logps)
        loss, stats = fused_loss(rule, logps, old_logps, each, tokens.mask, aggregation, normalizer, metrics)
        return LossOutput(loss, {} if stats is None else stats.metrics())
    with torch.no_grad():
        c = chosen.coefficient(tokens)
        check_coefficient(chosen.name, c, tokens)
        value = -(chosen.objective(tokens) if exact_value else tokens.weighted)
        if importance_sampling_mode is not None:
            weight = importance_weight(tokens, importance_sampling_mode, importance_sampling_cap)
            c, value = c * weight, value * weight
    each = _Attach.apply(logps, value, 0.0 - c)  # type: ignore[no-untyped-call]  # not -c: a shut gate is 0, not -0
    loss = aggregate(each, tokens.mask, aggregation, normalizer)
    return LossOutput(loss, count(chosen, tokens, c).metrics() if metrics else {})


@torch.no_grad()
def clip_stats(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: object = "band",
    dual_clip: float | None = None,
    anchor: str = "old",
    rollout_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    rewards: Tensor | None = None,
    state_divergence: Tensor | None = None,
) -> ClipStats:
    """Return what a clip does to these tokens, as sums by sign of the advantage and bucket of old probability.

    Args:
        logps: as in `policy_loss`.
        old_logps: as in `policy_loss`.
        advantages: as in `policy_loss`.
        mask: as in `policy_loss`.
        clip: as in `policy_loss`.
        dual_clip: as in `policy_loss`.
        anchor: as in `policy_loss`.
        rollout_logps: as in `Tokens`.
        entropies: as in `Tokens`.
        rewards: as in `Tokens`.
        state_divergence: as in `Tokens`.

    Returns:
        `ClipStats`: add them over batches, sum and max their fields over ranks, then call `.metrics()`.

    Raises:
        InputError: as `policy_loss`.
    """
    chosen = _chosen(clip, dual_clip, anchor)
    tokens = Tokens(logps, old_logps, advantages, mask, rollout_logps, entropies, rewards, state_divergence)
    return count(chosen, tokens, chosen.coefficient(tokens))


def _chosen(clip: object, dual_clip: float | None, anchor: str = "old") -> Clip:
    chosen = anchored(get_clip(clip), anchor)
    if dual_clip is None:
        return chosen
    return Dual(chosen, check_number("dual_clip", dual_clip, 1.0, open_low=True))
