"""What came of the arms of a bandit: outcomes with 95 % intervals over seeds, and differences by seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bandpo._input import InputError
from bandpo.lab.bandit import Trace, simulate
from bandpo.lab.bandit_config import Setting, Study
from bandpo.lab.bandit_exact import drift_table, has_drift
from bandpo.loss.stats import BUCKETS

HALF = 0.5  # mass that the good actions must hold to count as found
FIRST = 5  # rollouts in which a clip's step is measured, before anything has settled
Tell = Callable[[str, str, float], None]


def need_scipy() -> None:
    """Raise an InputError with the pip line when scipy is not installed."""
    try:
        import scipy  # noqa: F401
    except ImportError:
        raise InputError("bandit needs scipy, which is not installed: pip install scipy") from None


def run_study(study: Study, tell: Tell | None = None) -> dict[str, Any]:
    """Run all arms of all settings.

    Args:
        study: what to run.
        tell: called with a setting's name, an arm's (or "drift") and the share of it that is done.

    Returns:
        The study's texts, and ``settings``: for each name its ``question``, ``facts``, ``reference``, ``arms`` (name to
        `outcomes`, with ``clip``, ``clip_args`` and ``group``), ``contrasts`` (`compare`, with ``arm`` and ``against``,
        and intervals that hold for all of the setting's together) and ``drift`` (`drift_table`, under noise in one
        state, else empty).

    Raises:
        InputError: a clip refuses what it is given.
    """
    need_scipy()
    return {**study.texts, "settings": {name: _run(setting, tell) for name, setting in study.settings.items()}}


def _run(setting: Setting, tell: Tell | None) -> dict[str, Any]:
    def telling(what: str) -> Callable[[float], None] | None:
        return None if tell is None else lambda share: tell(setting.name, what, share)

    traces = {arm.name: simulate(setting, arm.clip, tell=telling(arm.name)) for arm in setting.arms}
    reference = traces[setting.reference]
    arms = {
        arm.name: {**arm.spec, "group": arm.group, **outcomes(setting, traces[arm.name], reference)}
        for arm in setting.arms
    }
    level = 1 - 0.05 / max(1, len(setting.contrasts))
    contrasts = [
        {"arm": one, "against": other, **compare(setting, traces[one], traces[other], level)}
        for one, other in setting.contrasts
    ]
    drift = drift_table(setting, telling("drift")) if has_drift(setting) else []
    found = {"question": setting.question, "facts": setting.facts(), "reference": setting.reference}
    return without_nan({**found, "arms": arms, "contrasts": contrasts, "drift": drift})


def outcomes(setting: Setting, trace: Trace, reference: Trace) -> dict[str, Any]:
    """Return an arm's outcomes; each mean is {"value", "low", "high"} over seeds.

    Args:
        setting: its setting.
        trace: the arm's.
        reference: that of the arm with which it is compared, seed by seed.

    Returns:
        entropy_start (a number), entropy_end, tail_start (a number), tail_end, kl and tv (of a rollout's updates),
        kl_old (from the policy that made the rollout), kl_first (kl in the first five rollouts), zero_gradient,
        gradient_kept (shares over all updates), entropy_per_tv (entropy gained by unit of total variation of the
        rollouts), curves (entropy and, where something is good, found, by rollout), buckets (by old probability, at
        the last update of every fourth rollout); less_reference (`compare`; empty for the reference itself); where
        something is good also found (Wilson's interval) and median (rollouts until then, with an interval by order
        statistics; NaN beyond the run).
    """
    end, change = trace.entropy[:, -1], trace.entropy[:, -1] - trace.entropy[:, 0]
    found: dict[str, Any] = {
        "entropy_start": float(trace.entropy[:, 0].mean()),
        "entropy_end": mean(end),
        "tail_start": float(trace.tail[:, 0].mean()),
        "tail_end": mean(trace.tail[:, -1]),
        "kl": mean(trace.kl.mean(1)),
        "tv": mean(trace.tv.mean(1)),
        "kl_old": mean(trace.kl_old.mean(1)),
        "kl_first": mean(trace.kl[:, :FIRST].mean(1)),
        "zero_gradient": mean(_share(trace.zero, trace.active)),
        "gradient_kept": mean(_share(trace.kept, trace.free)),
        "entropy_per_tv": mean(change / trace.tv.sum(1).clamp(min=1e-12)),
        "curves": {"entropy": curve(trace.entropy)},
        "buckets": _buckets(trace),
        "less_reference": {} if trace is reference else compare(setting, trace, reference),
    }
    if setting.reward != "noise":
        times = first_times(trace.good)
        found |= {"found": wilson(times < math.inf), "median": median(times)}
        reached = [times <= rollout for rollout in range(setting.rollouts + 1)]
        found["curves"]["found"] = {key: [wilson(x)[key] for x in reached] for key in ("value", "low", "high")}
    return found


def compare(setting: Setting, one: Trace, other: Trace, level: float = 0.95) -> dict[str, Any]:
    """Return what one arm has more than another, seed by seed.

    Args:
        setting: theirs.
        one: the arm.
        other: that is subtracted.
        level: of the intervals.

    Returns:
        entropy_end, tail_end, gradient_kept, and found where something is good, each {"value", "low", "high"}.
    """
    kept = _share(one.kept, one.free) - _share(other.kept, other.free)
    found = {
        "entropy_end": mean(one.entropy[:, -1] - other.entropy[:, -1], level),
        "tail_end": mean(one.tail[:, -1] - other.tail[:, -1], level),
        "gradient_kept": mean(kept, level),
    }
    if setting.reward != "noise":
        hits = [(first_times(trace.good) < math.inf).double() for trace in (one, other)]
        found["found"] = mean(hits[0] - hits[1], level)
    return found


def first_times(good: Tensor) -> Tensor:
    """Return after how many rollouts the good actions first held more than half, (seeds,); infinity where never."""
    above = good > HALF
    return torch.where(above.any(1), above.double().argmax(1).double(), math.inf)


def mean(x: Tensor, level: float = 0.95) -> dict[str, float]:
    """Return the mean with its t interval, {"value", "low", "high"}; NaN ends for a single seed.

    Args:
        x: a number a seed; NaN where a seed has none, which is left out.
        level: of the interval.
    """
    from scipy.stats import t

    kept = x[~x.isnan()].double()
    n = len(kept)
    value = float(kept.mean()) if n else math.nan
    half = float(t.ppf((1 + level) / 2, n - 1)) * float(kept.std()) / math.sqrt(n) if n > 1 else math.nan
    return {"value": value, "low": value - half, "high": value + half}


def wilson(hit: Tensor) -> dict[str, float]:
    """Return a share with Wilson's 95 % interval, its count and the seeds."""
    from scipy.stats import norm

    n, k, z = len(hit), int(hit.sum()), float(norm.ppf(0.975))
    share, width = k / n, z * z / n
    middle = (share + width / 2) / (1 + width)
    half = z * math.sqrt(share * (1 - share) / n + width / (4 * n)) / (1 + width)
    low, high = (0.0 if k == 0 else middle - half), (1.0 if k == n else middle + half)
    return {"value": share, "low": low, "high": high, "count": k, "seeds": n}


def median(times: Tensor) -> dict[str, float]:
    """Return the median over all seeds, with a 95 % interval by order statistics; NaN for what the run does not reach.

    Args:
        times: a number a seed; infinity where it was never reached.
    """
    from scipy.stats import binom

    ordered = times.sort().values.tolist()
    n = len(ordered)
    low = int(binom.ppf(0.025, n, 0.5))  # at most 2.5 % of the time are fewer seeds below the median
    ends = (ordered[max(low - 1, 0)], ordered[min(n - low, n - 1)])
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    value, first, last = (x if x < math.inf else math.nan for x in (middle, *ends))
    return {"value": value, "low": first, "high": last}


def curve(x: Tensor) -> dict[str, list[float]]:
    """Return means over seeds by rollout, with 95 % t intervals.

    Args:
        x: (seeds, rollouts + 1).
    """
    points = [mean(column) for column in x.T]
    return {key: [point[key] for point in points] for key in ("value", "low", "high")}


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """Return a share by seed over all rollouts; NaN where there is no whole."""
    return part.sum(1) / whole.sum(1)


def _buckets(trace: Trace) -> dict[str, dict[str, float]]:
    """Return, by bucket of old probability, the share of the tokens, what is kept of the gradient, and the zeros."""
    metrics = trace.stats.metrics()
    active = trace.stats.sums[::2].sum(0)[:, 0]  # tokens with an advantage, by bucket
    return {
        bucket: {
            "share": float(metrics[f"share/{bucket}"]),
            "gradient_kept": float(metrics[f"gradient_kept/{bucket}"]) if active[i] else math.nan,
            "zero_gradient": float(metrics[f"zero_grad/{bucket}"]) if active[i] else math.nan,
        }
        for i, bucket in enumerate(BUCKETS)
    }


def without_nan(x: Any) -> Any:
    """Return the same with None where a number is none, for JSON."""
    if isinstance(x, dict):
        return {key: without_nan(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [without_nan(value) for value in x]
    if isinstance(x, (float, np.floating)):
        return float(x) if math.isfinite(x) else None
    return x
