"""Radii that match: so that clips of different kinds can be compared."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bandpo._input import InputError, check_number, check_tensor
from bandpo.clips.base import Region
from bandpo.operator.band import Bounds, band, binary_divergence
from bandpo.operator.divergence import Divergence
from bandpo.operator.radius import RADII, check_cap


@torch.no_grad()
def match_delta(
    target: float | Region,
    old_logps: Tensor,
    logps: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    divergence: str | Divergence = "kl",
    cap: float | None = None,
) -> float:
    """Return the radius that puts a given share of the tokens outside, or reaches as far as another clip.

    A share: g_f(p, r) > delta for round(share n) of the n tokens, by a quantile of g_f; no iteration. Tokens of one
    value, such as completions that begin alike have, are not parted: then it is the number nearest to that.
    A clip: mean over tokens of p (high - low), the width of what the clip leaves to the token's new probability within
    [0, 1], is the same under the band; by bisection of log delta, to a relative 1e-6.

    Args:
        target: the share of tokens outside the band, in (0, 1), or a clip.
        old_logps: natural-log probabilities under the old policy, any shape.
        logps: the same under the new policy, same shape; needed for a share, unused for a clip.
        mask: 1 for tokens, 0 for padding, same shape, or None.
        divergence: a name or a `Divergence`, whose radius is wanted.
        cap: greatest ratio of the band that is matched to a clip, >= 1, or None.

    Returns:
        The radius, a Python number: this waits for the device.

    Raises:
        InputError: no radius does it: fewer tokens than the share resolves, ties that leave no number within
            half of the wanted one, a clip that confines nothing or everything; or arguments that do not fit.

    Source: the method page, for why radii of different divergences do not compare.
    """
    check_tensor("old_logps", old_logps)
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != old_logps.shape):
        raise InputError(f"mask={mask!r}: must be a tensor of the shape of old_logps, {tuple(old_logps.shape)}")
    chosen = slice(None) if mask is None else mask != 0
    old = old_logps[chosen].flatten()
    if old.numel() == 0:
        raise InputError("old_logps has no token where mask is 1: give at least one")
    if isinstance(target, Region) and target.as_bounds:
        return _match_reach(target, old, divergence, check_cap(cap))
    share = check_number("target", target, 0.0, 1.0, open_low=True)
    if logps is None:
        raise InputError(f"logps=None with target={target}: a share of tokens outside needs the new policy's logps")
    check_tensor("logps", logps, like=old_logps)
    return _match_share(share, binary_divergence(logps[chosen].flatten(), old, divergence))


def _match_share(share: float, reached: Tensor) -> float:
    count = reached.numel()
    outside = round(share * count)
    if not 0 < outside < count:
        raise InputError(
            f"target={share:g} of {count} tokens is {outside}: needs one outside and one inside; give more tokens"
        )
    if not bool((reached >= 0).all()):
        raise InputError("logps or old_logps holds NaN: mask those tokens")
    values, counts = reached.double().unique(return_counts=True)  # type: ignore[no-untyped-call]  # sorted
    beyond = count - counts.cumsum(0)  # how many tokens exceed each value
    edge = int((beyond - outside).abs().argmin())
    nearest = int(beyond[edge])
    if not 0.5 * outside <= nearest <= 1.5 * outside:
        tied = int(counts.max())
        raise InputError(
            f"target={share:g}: {tied} of {count} tokens are tied, and no radius leaves {outside} outside, "
            f"{nearest} at the nearest; give another share, or logps of a policy that has moved"
        )
    inside, first = float(values[edge]), float(values[edge + 1])
    if first > RADII[1]:  # any radius above `inside` does it
        return min(2 * inside, RADII[1]) if inside > 0 else 1.0
    return max(math.sqrt(inside * first), RADII[0]) if inside > 0 else max(first / 2, RADII[0])


def _match_reach(clip: Region, old: Tensor, divergence: str | Divergence, cap: float | None) -> float:
    old = old.double() if old.device.type != "mps" else old.float()
    wanted = _reach(clip.bounds(old), old)

    def reach(log_delta: float) -> float:
        return _reach(band(old, min(max(math.exp(log_delta), RADII[0]), RADII[1]), divergence, cap), old)

    low, high = (math.log(radius) for radius in RADII)
    least, greatest = reach(low), reach(high)
    if not least < wanted < greatest * (1 - 1e-9):
        raise InputError(
            f"target={clip!r} leaves a mean width of {wanted:.6g} in probability: a band has between {least:.3g} and "
            f"{greatest:.6g} on these tokens; give a clip that confines them, or other tokens"
        )
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if reach(middle) < wanted else (low, middle)
    return math.exp((low + high) / 2)


def _reach(bounds: Bounds, old: Tensor) -> float:
    """Return the mean over tokens of p (high - low), with high at most 1/p."""
    log_high = torch.minimum(bounds.log_high, -old)
    rise, fall = torch.expm1(log_high), -torch.expm1(bounds.log_low)  # keep their digits where p is near 1
    return float((old.exp() * (rise + fall)).mean())
