"""When the fused kernel computes the policy loss, and how; Triton is imported when a call needs it, never before.

The kernel covers `Band` with kl, tv, chi2, neyman and hellinger and with radii that are Python numbers, `Fixed` and
`NoClip`, on tensors of float32, bfloat16 and float16. The eager path computes everything else, and everything under
`torch.compile`. The environment's BANDPO_KERNEL chooses: "auto" takes the kernel on CUDA where it covers the call and
Triton imports, "eager" never does, "triton" insists on it.
"""

from __future__ import annotations

import math
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from bandpo._checks import InputError, nearest
from bandpo.aggregation import Aggregation, aggregate
from bandpo.bounds import check_delta
from bandpo.clips import Band, Fixed, NoClip, Region
from bandpo.diagnostics import BUCKETS, ClipStats
from bandpo.family import FAMILY

VARIABLE = "BANDPO_KERNEL"
MODES = ("auto", "eager", "triton")
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


def choose(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    clip: Region,
    dual_clip: float | None,
    exact_value: bool = False,
) -> Rule | None:
    """Return what the kernel needs to know of the clip if it is to compute this call, None if the eager path is.

    Args:
        logps: as in `policy_loss`, checked.
        old_logps: as in `policy_loss`, checked.
        advantages: as in `policy_loss`, checked and of a shape that broadcasts.
        mask: as in `policy_loss`, checked.
        clip: the region.
        dual_clip: as in `policy_loss`.
        exact_value: as in `policy_loss`.

    Returns:
        `Rule` or None.

    Raises:
        InputError: BANDPO_KERNEL holds no known value, or insists on the kernel where it cannot run.
    """
    if torch.compiler.is_compiling():
        return None
    mode = os.environ.get(VARIABLE, "auto")
    if mode not in MODES:
        raise InputError(f"{VARIABLE}={mode!r}: must be one of {', '.join(MODES)}{nearest(mode, MODES)}")
    if mode == "eager" or (mode == "auto" and not logps.is_cuda) or not logps.numel():
        return None
    rule = "exact_value needs the bounds" if exact_value else _rule(clip, dual_clip)
    for name, x in (("logps", logps), ("old_logps", old_logps), ("advantages", advantages), ("mask", mask)):
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
        logps: as in `choose`.
        old_logps: as in `choose`.
        advantages: as in `choose`.
        mask: as in `choose`.
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
    value, sums, maxima = policy.FusedLoss.apply(logps, old_logps, advantages, mask, rule, per_token, stats)
    counted = None
    if stats:
        counted = ClipStats(sums[policy.SUMS : policy.MAXIMA].view(len(BUCKETS), -1), maxima)
    if per_token:
        return aggregate(value, mask, aggregation, normalizer), counted
    if aggregation == "token-mean" and normalizer is None:
        normalizer = logps.numel() if mask is None else sums[policy.TOKENS].clamp(min=1)
    return value if normalizer is None else value / normalizer, counted


def _rule(clip: Region, dual_clip: float | None) -> Rule | str:
    """Return the rule, or why there is none."""
    log_dual = math.inf if dual_clip is None else math.log(dual_clip)
    if type(clip) is NoClip:
        return Rule("kl", True, math.inf, math.inf, math.inf, log_dual)
    if type(clip) is Fixed:
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
    from bandpo.kernels import policy

    return policy
