"""Statistics of experiments: intervals, paired differences, equivalence, and the robust summaries of several seeds.

Scores come as arrays. Where there are seeds and tasks (or settings), rows are seeds and columns are tasks. Whatever
draws at random takes a seed and gives the same result each time.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from bandpo._input import InputError, check_number

Array = np.ndarray[Any, np.dtype[np.float64]]
Statistic = Callable[..., Any]


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval; the ends are NaN where there is none, as with one value.

    Args:
        estimate: the statistic of all values.
        low: lower end.
        high: upper end.
        n: number of independent values.
    """

    estimate: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Its fields, for JSON: an end that does not exist is None."""
        return _plain(self)


@dataclass(frozen=True)
class Paired:
    """A difference a - b of paired values.

    Args:
        mean: of the differences.
        low: lower end of its t interval.
        high: upper end.
        boot_low: lower end of its bootstrap interval.
        boot_high: upper end.
        p: of the two-sided paired t test.
        n: number of pairs.
    """

    mean: float
    low: float
    high: float
    boot_low: float
    boot_high: float
    p: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Its fields, for JSON: what does not exist is None."""
        return _plain(self)


@dataclass(frozen=True)
class Equivalence:
    """Whether paired values differ by less than a margin.

    Args:
        mean: of the differences a - b.
        low: lower end of the interval that has to lie within the margin.
        high: upper end.
        p: the larger one of the two one-sided tests.
        margin: the largest difference that does not matter.
        equivalent: whether the interval lies within the margin; the same as p below 1 - level.
    """

    mean: float
    low: float
    high: float
    p: float
    margin: float
    equivalent: bool

    def to_dict(self) -> dict[str, float | int | None]:
        """Its fields, for JSON: what does not exist is None."""
        return _plain(self)


def _plain(result: Any) -> dict[str, float | int | None]:
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(result).items()}


def mean_interval(values: ArrayLike, level: float = 0.95) -> Interval:
    """The mean, and Student's t interval for it.

    Args:
        values: independent values, shape (n,), such as one score per seed.
        level: probability that the interval holds the true mean.

    Returns:
        The interval; without ends for one value.

    Raises:
        InputError: no value, or one that is not finite.

    Source: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    x = _values(values)
    return Interval(float(x.mean()), *_t_ends(x, level), n=len(x))


def _t_ends(x: Array, level: float) -> tuple[float, float]:
    if len(x) < 2:
        return math.nan, math.nan
    reach = float(stats.t.ppf((1 + _level(level)) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return float(x.mean()) - reach, float(x.mean()) + reach


def bootstrap(
    values: ArrayLike, statistic: Statistic = np.mean, *, level: float = 0.95, resamples: int = 5000, seed: int = 0
) -> Interval:
    """A statistic, and its bootstrap interval over rows, bias-corrected and accelerated (BCa).

    With values that are all the same the interval has no width: take `wilson` for shares.

    Args:
        values: one row per independent unit, such as one value per prompt, shape (n,).
        statistic: takes the values and `axis`, like numpy's functions.
        level: probability that the interval holds the truth.
        resamples: number of resamples.
        seed: of the resampling.

    Returns:
        The interval; without ends for one value.

    Raises:
        InputError: no value, or one that is not finite.

    Source: Efron, Better bootstrap confidence intervals, JASA 82 (1987); scipy.stats.bootstrap.
    """
    x, level = _values(values), _level(level)
    estimate = float(statistic(x, axis=-1))
    if len(x) < 2 or _same(x):
        end = estimate if len(x) > 1 else math.nan
        return Interval(estimate, end, end, len(x))
    batch = max(1, 2_000_000 // len(x))
    rng = np.random.default_rng(seed)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # looked at below
        found = stats.bootstrap((x,), statistic, confidence_level=level, n_resamples=resamples, batch=batch, rng=rng)
    low, high = map(float, found.confidence_interval)
    if math.isnan(low) or math.isnan(high):  # BCa has no answer for some values, such as the median of many equal ones
        low, high = _percentiles(found.bootstrap_distribution, level)
    return Interval(estimate, low, high, len(x))


def _same(x: Array) -> bool:
    """Whether values are all the same, but for rounding."""
    return bool(np.ptp(x) <= 1e-12 * np.abs(x).max())


def paired(a: ArrayLike, b: ArrayLike, *, level: float = 0.95, resamples: int = 5000, seed: int = 0) -> Paired:
    """The mean difference a - b of values that belong together, such as two arms on the same seeds.

    Args:
        a: values of one arm, shape (n,).
        b: values of the other, in the same order.
        level: of both intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        Mean, t interval, bootstrap interval and the paired t test; without intervals for one pair.

    Raises:
        InputError: of different length, no value, or one that is not finite.

    Source: Student (1908); Efron (1987).
    """
    d = _differences(a, b)
    low, high = _t_ends(d, level)
    boot = bootstrap(d, level=level, resamples=resamples, seed=seed)
    return Paired(float(d.mean()), low, high, boot.low, boot.high, _t_p(d, 0.0, "two-sided"), len(d))


def _t_p(d: Array, centre: float, alternative: str) -> float:
    """The p of a t test on differences; all the same: they are on one side, on the other, or at the centre."""
    if len(d) < 2:
        return math.nan
    gap = float(d.mean()) - centre
    if _same(d):
        beyond = {"two-sided": gap != 0, "greater": gap > 0, "less": gap < 0}[alternative]
        return 0.0 if beyond else 1.0
    return float(stats.ttest_1samp(d, centre, alternative=alternative).pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p values for several comparisons, so that all claims hold together.

    Args:
        p: one per comparison.

    Returns:
        The adjusted ones, in the same order: below .05 means significant at .05 over all of them.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scand. J. Statist. 6 (1979).
    """
    values = np.asarray(p, dtype=float)
    order = np.argsort(values)
    scaled = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty(len(values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(x) for x in adjusted]


def tost(a: ArrayLike, b: ArrayLike, margin: float, *, level: float = 0.95) -> Equivalence:
    """Whether paired values are equivalent: two one-sided t tests against a margin that was set beforehand.

    Args:
        a: values of one arm, shape (n,).
        b: values of the other, in the same order.
        margin: the largest difference that does not matter, in the values' unit.
        level: 1 - the error rate of each test; the interval has level 2 * level - 1 (90 % for .95), as it must.

    Returns:
        The verdict; never equivalent with one pair.

    Raises:
        InputError: a margin that is not positive, or values as in `paired`.

    Source: Schuirmann, A comparison of the two one-sided tests procedure and the power approach, J. Pharmacokin.
    Biopharm. 15 (1987).
    """
    check_number("margin", margin, 0, open_low=True)
    d = _differences(a, b)
    p = max(_t_p(d, -margin, "greater"), _t_p(d, margin, "less")) if len(d) > 1 else math.nan
    low, high = _t_ends(d, 2 * _level(level) - 1)
    return Equivalence(float(d.mean()), low, high, p, margin, bool(p < 1 - level))


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """A share of independent trials, and an interval that has a width even at 0 and at 1.

    Args:
        successes: trials that succeeded.
        n: trials.
        level: probability that the interval holds the truth.

    Returns:
        The share with its interval.

    Raises:
        InputError: no trial, or more successes than trials.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).
    """
    if not 0 <= successes <= n or n < 1:
        raise InputError(f"wilson: got {successes!r} of {n!r}; give 0 to n successes of n >= 1 trials")
    found = stats.binomtest(int(successes), int(n)).proportion_ci(_level(level), method="wilson")
    return Interval(successes / n, float(found.low), float(found.high), n)


def pass_at_k(correct: ArrayLike, n: int, k: int) -> Array:
    """The probability that at least one of k samples is right, from n >= k samples of a prompt; unbiased.

    Args:
        correct: right samples among the n, one number per prompt.
        n: samples of each prompt.
        k: samples that one may try.

    Returns:
        1 - C(n - c, k) / C(n, k) for each prompt.

    Raises:
        InputError: k is not from 1 to n.

    Source: Chen et al., Evaluating large language models trained on code, arXiv:2107.03374, equation 1.
    """
    if not 1 <= k <= n:
        raise InputError(f"pass_at_k: k={k!r} of n={n!r} samples; give 1 to {n}")
    c = np.asarray(correct, dtype=float)[..., None]
    steps = np.arange(k)  # the product of (n - c - i) / (n - i), which is 0 once a factor is
    return 1 - np.prod(np.clip(n - c - steps, 0, None) / (n - steps), axis=-1)


def iqm(scores: ArrayLike, axis: int | None = None) -> Any:
    """The interquartile mean: the mean of the middle half of all runs.

    Args:
        scores: of runs, shape (seeds,) or (seeds, tasks).
        axis: over which; None for all values together.

    Returns:
        The mean without the lowest and the highest quarter.

    Source: Agarwal et al., Deep reinforcement learning at the edge of the statistical precipice, arXiv:2108.13264.
    """
    return stats.trim_mean(np.asarray(scores, dtype=float), 0.25, axis=axis)


def stratified_bootstrap(
    scores: ArrayLike,
    statistic: Callable[[Array], Any] = iqm,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A statistic of runs on several tasks, with a percentile interval; seeds are resampled within each task.

    Args:
        scores: shape (seeds, tasks), or (seeds,) for one task.
        statistic: takes scores of that shape.
        level: probability that the interval holds the truth.
        resamples: number of resamples.
        seed: of the resampling.

    Returns:
        The interval; without ends for one seed.

    Raises:
        InputError: no value, or one that is not finite.

    Source: Agarwal et al., arXiv:2108.13264, section 4.
    """
    x = _matrix(scores)
    estimate = float(statistic(x))
    if len(x) < 2:
        return Interval(estimate, math.nan, math.nan, len(x))
    rng = np.random.default_rng(seed)
    found = [statistic(_resampled(x, rng)) for _ in range(resamples)]
    return Interval(estimate, *_percentiles(found, level), n=len(x))


def probability_of_improvement(
    a: ArrayLike, b: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The probability that a run of one arm beats a run of the other on the same task; ties count half.

    Args:
        a: scores of one arm, shape (seeds, tasks) or (seeds,).
        b: scores of the other, on the same tasks; may have another number of seeds.
        level: of the interval.
        resamples: of the stratified bootstrap over seeds.
        seed: of the bootstrap.

    Returns:
        Mean over tasks of P(a > b) + P(a = b) / 2; .5 is no difference. Without ends for one seed.

    Raises:
        InputError: different numbers of tasks, no value, or one that is not finite.

    Source: Agarwal et al., arXiv:2108.13264, section 4; Mann & Whitney, Ann. Math. Statist. 18 (1947).
    """
    x, y = _matrix(a), _matrix(b)
    if x.shape[1] != y.shape[1]:
        raise InputError(f"scores of {x.shape[1]} and of {y.shape[1]} tasks: both arms need the same tasks")
    rng = np.random.default_rng(seed)
    n = min(len(x), len(y))
    if n < 2:
        return Interval(_superiority(x, y), math.nan, math.nan, n)
    found = [_superiority(_resampled(x, rng), _resampled(y, rng)) for _ in range(resamples)]
    return Interval(_superiority(x, y), *_percentiles(found, level), n=n)


def _superiority(x: Array, y: Array) -> float:
    wins = (x[:, None] > y[None]).mean(axis=(0, 1))
    ties = (x[:, None] == y[None]).mean(axis=(0, 1))
    return float((wins + ties / 2).mean())


def performance_profile(
    scores: ArrayLike, thresholds: ArrayLike, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> list[Interval]:
    """The share of runs above each threshold, with pointwise intervals.

    Args:
        scores: shape (seeds, tasks) or (seeds,).
        thresholds: scores to be above of.
        level: of each interval.
        resamples: of the stratified bootstrap over seeds.
        seed: of the bootstrap.

    Returns:
        One interval per threshold; without ends for one seed.

    Raises:
        InputError: no value, or one that is not finite.

    Source: Agarwal et al., arXiv:2108.13264, section 4; Dolan & More, Math. Program. 91 (2002).
    """
    x, limits = _matrix(scores), _values(thresholds)
    shares = (x[..., None] > limits).mean(axis=(0, 1))
    if len(x) < 2:
        return [Interval(float(share), math.nan, math.nan, len(x)) for share in shares]
    rng = np.random.default_rng(seed)
    found = np.array([(_resampled(x, rng)[..., None] > limits).mean(axis=(0, 1)) for _ in range(resamples)])
    return [Interval(float(s), *_percentiles(found[:, i], level), n=len(x)) for i, s in enumerate(shares)]


def _resampled(x: Array, rng: np.random.Generator) -> Array:
    """As many seeds, drawn with replacement for each task apart."""
    return np.take_along_axis(x, np.asarray(rng.integers(len(x), size=x.shape)), axis=0)


def _percentiles(found: ArrayLike, level: float) -> tuple[float, float]:
    tail = 50 * (1 - _level(level))
    low, high = np.percentile(np.asarray(found, dtype=float), [tail, 100 - tail])
    return float(low), float(high)


def _level(level: float) -> float:
    if not 0 < check_number("level", level, 0, 1, open_low=True) < 1:
        raise InputError(f"level={level!r}: must be below 1, such as .95")
    return level


def _values(values: ArrayLike) -> Array:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or not len(x) or not np.isfinite(x).all():
        raise InputError(f"values of shape {x.shape}: must be one finite number or more, in one dimension")
    return x


def _matrix(scores: ArrayLike) -> Array:
    x = np.asarray(scores, dtype=float)
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or not x.size or not np.isfinite(x).all():
        raise InputError(f"scores of shape {x.shape}: must be finite numbers, seeds in rows and tasks in columns")
    return x


def _differences(a: ArrayLike, b: ArrayLike) -> Array:
    x, y = _values(a), _values(b)
    if len(x) != len(y):
        raise InputError(f"{len(x)} and {len(y)} values: paired values come in equal number, in the same order")
    return x - y
