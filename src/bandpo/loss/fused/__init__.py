"""When the fused kernel computes the policy loss, and how; Triton is imported when a call needs it, never before.

The kernel covers `Band` with kl, tv, chi2, neyman and hellinger and with radii that are Python numbers, `Fixed` and
`NoClip`, with or without a dual clip, on tensors of float32, bfloat16 and float16. The eager path computes everything
else, and everything under `torch.compile`. The kernel is off unless the environment's BANDPO_KERNEL is "triton", which
insists on it; "auto" takes it on CUDA wherever it covers the call.
"""

from __future__ import annotations

import math
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bandpo._input import InputError, nearest
from bandpo.clips.base import Clip
from bandpo.clips.dual_clip import Dual
from bandpo.clips.regions import Band, Fixed, NoClip
from bandpo.loss.aggregation import Aggregation, aggregate
from bandpo.loss.stats import ClipStats
from bandpo.operator.family import FAMILY
from bandpo.operator.radius import check_delta

VARIABLE = "BANDPO_KERNEL"
MODES = ("eager", "auto", "triton")  # the first is the default
DIVERGENCES = ("kl", "tv", "chi2", "neyman", "hellinger")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_TOKENS = 2**31 - 2**16  # the kernel counts in 32 bits


class Rule(NamedTuple):
    """A clip as the kernel takes it.

    Args:
        divergence: the one that the kernel computes.
        fixed: whether `low` and `high` are margins of the ratio; otherwise they are radii of the divergence.
        low: limit below.
        high: limit above.
        log_cap: log of the greatest ratio allowed, inf for none.
        log_dual: log of the dual clip, inf for none.
    """

    divergence: str
    fixed: bool
    low: float
    high: float
    log_cap: float
    log_dual: float


def choose(clip: Clip, tensors: dict[str, Tensor | None], **others: Any) -> Rule | None:
    """Return what the kernel needs to know of the clip if it is to compute this call, None if the eager path is.

    Args:
        clip: the clip.
        tensors: logps, old_logps, advantages and mask by name, checked.
        **others: every other argument of the call that is not for the aggregation; the kernel knows none of them, so
            that one which is set means the eager path.

    Returns:
        `Rule` or None.

    Raises:
        InputError: BANDPO_KERNEL holds no known value, or insists on the kernel where it cannot run.
    """
    if torch.compiler.is_compiling():
        return None
    mode, logps = os.environ.get(VARIABLE, MODES[0]), tensors["logps"]
    assert logps is not None
    if mode not in MODES:
        raise InputError(f"{VARIABLE}={mode!r}: must be one of {', '.join(MODES)}{nearest(mode, MODES)}")
    if mode == "eager" or (mode == "auto" and not logps.is_cuda) or not logps.numel():
        return None
    rule = _rule(clip)
    for name, value in others.items():
        if value is not None and value is not False:
            rule = f"it does not know {name}"
    for name, x in tensors.items():
        rule = _cannot_read(name, x) or rule
    if logps.numel() > MOST_TOKENS:
        rule = f"{logps.numel()} tokens are more than {MOST_TOKENS}"
    policy = _policy()
    if policy is None:
        rule = "Triton does not import"
    elif not logps.is_cuda and not policy.INTERPRETED:
        rule = f"on a {logps.device.type} it needs TRITON_INTERPRET=1 in the environment before Triton is imported"
    if isinstance(rule, Rule):
        return rule
    if mode == "triton":
        raise InputError(f"{VARIABLE}='triton': the kernel cannot compute this call: {rule}; set {VARIABLE}=auto")
    return None


def fused_loss(
    rule: Rule,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    aggregation: Aggregation,
    normalizer: float | Tensor | None,
    stats: bool,
) -> tuple[Tensor, ClipStats | None]:
    """Return the loss and, if wanted, what the clip did.

    Args:
        rule: from `choose`.
        logps: as in `policy_loss`, checked.
        old_logps: as in `policy_loss`, checked.
        advantages: as in `policy_loss`, checked.
        mask: bool, or None.
        aggregation: as in `policy_loss`.
        normalizer: as in `policy_loss`.
        stats: whether to count.

    Returns:
        (loss, `ClipStats` or None).
    """
    policy = _policy()
    assert policy is not None  # `choose` made sure
    per_token = aggregation not in ("token-mean", "sum")
    if not torch.is_grad_enabled():
        logps = logps.detach()  # then no coefficient is written
    value, sums = policy.FusedLoss.apply(logps, old_logps, advantages, mask, rule, per_token, stats)
    counted = policy.as_stats(sums) if stats else None
    if per_token:
        return aggregate(value, mask, aggregation, normalizer), counted
    if aggregation == "token-mean" and normalizer is None:
        normalizer = logps.numel() if mask is None else sums[policy.TOKENS].float().clamp(min=1)
    return value if normalizer is None else value / normalizer, counted


def _rule(clip: Clip) -> Rule | str:
    """Return the rule, or why there is none."""
    log_dual = math.inf
    if isinstance(clip, Dual):
        log_dual, clip = math.log(clip.cap), clip.clip
    if type(clip) is NoClip:
        return Rule("kl", True, math.inf, math.inf, math.inf, log_dual)
    if isinstance(clip, Fixed):
        return Rule("kl", True, float(clip.eps_low), float(clip.eps_high), math.inf, log_dual)
    if type(clip) is not Band:
        return f"it covers Band, Fixed and NoClip, not {type(clip).__name__}"
    name = clip.measure.name
    if name not in DIVERGENCES or clip.measure is not FAMILY[name]:
        return f"it covers the divergences {', '.join(DIVERGENCES)} of the family, not this {name!r}"
    low, high = check_delta(clip.delta)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return "delta is a tensor"
    return Rule(name, False, float(low), float(high), math.inf if clip.cap is None else math.log(clip.cap), log_dual)


def _cannot_read(name: str, x: Tensor | None) -> str:
    if x is None or (name == "mask" and type(x) is Tensor):
        return ""
    if type(x) not in (Tensor, torch.nn.Parameter):  # a subclass need not have its numbers in one place
        return f"{name} is a {type(x).__name__}"
    return "" if x.dtype in DTYPES else f"{name} has dtype {x.dtype}"


def _policy() -> ModuleType | None:
    try:
        import triton  # noqa: F401
    except ImportError:  # not made for this platform: the eager path computes the same
        return None
    from bandpo.loss.fused import policy

    return policy
