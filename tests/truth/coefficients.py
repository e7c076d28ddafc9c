"""The gradient coefficient c of every clip of the registry, as its paper writes it: one token, Python floats.

`FORMULAS[name](t, **args)` is c of a token `t`; the arguments and their defaults are those of the registry. Bounds of a
region come from bisection.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple


class T(NamedTuple):
    """A token: old probability, ratio, advantage; what some clips look at besides; and where it stands."""

    p: float
    r: float
    A: float
    entropy: float = 0.0
    reward: float = 0.0
    state_divergence: float = 0.0
    row: tuple[T, ...] = ()  # the tokens of its sequence, itself among them, without padding
    place: int = 0  # its place in `row`
    batch: tuple[tuple[T, ...], ...] = ()  # the rows of its batch

    @property
    def q(self) -> float:
        """The new probability."""
        return self.p * self.r


def sign(x: float) -> float:
    return (x > 0) - (x < 0)


def cut(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def mean(xs: Any) -> float:
    xs = list(xs)
    return math.fsum(xs) / len(xs)


F: dict[str, Callable[[float], float]] = {
    "kl": lambda u: u - 1 - math.log(u) if u > 0 else math.inf,
    "tv": lambda u: abs(u - 1) / 2,
    "chi2": lambda u: (u - 1) ** 2,
    "js": lambda u: (u * math.log(u) if u > 0 else 0.0) - (1 + u) * math.log((1 + u) / 2),
}
k3 = F["kl"]


def g(divergence: str, p: float, r: float) -> float:
    """The divergence between Bernoulli(p) and Bernoulli(r p)."""
    f = F[divergence]
    return p * f(r) + (1 - p) * f(max((1 - r * p) / (1 - p), 0.0))


def kl(t: T) -> float:
    """Binary KL(old || new)."""
    return t.p * math.log(t.p / t.q) + (1 - t.p) * math.log((1 - t.p) / (1 - t.q))


def outward(t: T) -> bool:
    return (t.r - 1) * t.A > 0


def capped_weight(t: T, cap: float | None) -> float:
    return min(t.r, math.inf if cap is None else cap) * t.A


# Regions: 1 above, -1 below, 0 inside.


def no_bound(t: T) -> int:
    return 0


def fixed(t: T, eps_low: float = 0.2, eps_high: float = 0.2) -> int:
    return 1 if t.r > 1 + eps_high else -1 if t.r < 1 - eps_low else 0


def clip_higher(t: T, eps_low: float = 0.2, eps_high: float = 0.28) -> int:
    return fixed(t, eps_low, eps_high)


def beyond(t: T, divergence: str, delta: Any) -> int:
    low, high = delta if isinstance(delta, tuple) else (delta, delta)
    return sign(t.r - 1) if g(divergence, t.p, t.r) > (high if t.r > 1 else low) else 0


def band(t: T, divergence: str = "kl", delta: Any = 0.05, cap: float | None = None) -> int:
    return 1 if cap is not None and t.r > cap else beyond(t, divergence, delta)


def sides(t: T, high: Any = "band", low: Any = "fixed") -> int:
    return max(side_of(t, high), 0) + min(side_of(t, low), 0)


def trgppo(t: T, delta: Any = 0.001) -> int:
    return beyond(t, "kl", delta)


def dcpo(t: T, eps_low: float = 0.2, eps_high: float = 0.28, cap: float | None = 10.0) -> int:
    if cap is not None and t.r > cap:
        return 1
    if t.r > 1:
        return 1 if t.q * (t.r - 1) > eps_high else 0
    return -1 if t.r < 1 / 2 or t.q * (1 - t.r) > eps_low else 0  # q (1 - r) is greatest at r = 1/2


def atr(t: T, delta: float = 0.05) -> int:
    return sign(t.r - 1) if k3(t.r) > delta else 0


def ripo(t: T, delta: float = 0.02, floor: float = 0.5, cap: float | None = 10.0) -> int:
    if t.r < floor or (cap is not None and t.r > cap):
        return sign(t.r - 1)
    return sign(t.r - 1) if t.p * (t.r - 1) ** 2 > delta else 0


def archer(t: T, eps: float = 0.2, eps_uncertain: float = 0.4, quantile: float = 0.8) -> int:
    entropies = sorted(x.entropy for x in t.row)
    at = quantile * (len(entropies) - 1)
    below, above = entropies[math.floor(at)], entropies[math.ceil(at)]
    margin = eps_uncertain if t.entropy > below + (at % 1) * (above - below) else eps
    return fixed(t, margin, margin)


def union(t: T, first: Any = "band", second: Any = "fixed") -> int:
    one, other = side_of(t, first), side_of(t, second)
    return one if one == other else 0


def intersection(t: T, first: Any = "band", second: Any = "fixed") -> int:
    return side_of(t, first) or side_of(t, second)


def capped(t: T, region: Any = "band", cap: float = 10.0) -> int:
    return 1 if t.r > cap else side_of(t, region)


@functools.cache
def bapo_margins(batch: Any, lows: Any, highs: Any, share: float, step: float) -> tuple[float, float]:
    def steps(first: float, last: float) -> list[float]:
        n = math.ceil(round(abs(last - first) / step, 9))
        return [first + sign(last - first) * step * i for i in range(n)] + [last]

    for low, high in [(x, highs[0]) for x in steps(*lows)] + [(lows[1], x) for x in steps(*highs)]:
        gains = sum(min(t.r, 1 + high) * t.A for row in batch for t in row if t.A > 0)
        losses = sum(max(t.r, 1 - low) * -t.A for row in batch for t in row if t.A < 0)
        if gains >= share * (gains + losses):
            break
    return low, high


def bapo(t: T, eps_low: Any = (0.4, 0.2), eps_high: Any = (0.2, 1.0), share: float = 0.5, step: float = 0.05) -> int:
    return fixed(t, *bapo_margins(t.batch, eps_low, eps_high, share, step))


REGIONS: dict[str, Callable[..., int]] = {"none": no_bound}
REGIONS |= {f.__name__: f for f in (fixed, clip_higher, band, sides, trgppo, dcpo, atr, ripo, archer)}
REGIONS |= {f.__name__: f for f in (union, intersection, capped, bapo)}


def side_of(t: T, region: dict[str, Any] | str) -> int:
    """The side of a region as a recipe names it."""
    if isinstance(region, str):
        return REGIONS[region](t)
    args = dict(region)
    return REGIONS[args.pop("clip")](t, **args)


def bound(t: T, side: int, region: dict[str, Any]) -> float:
    """The bound of a region on one side, by bisection on `side_of`."""
    inside, out = 1.0, (1 / t.p if side > 0 else 0.0)
    if side > 0 and side_of(t._replace(r=out), region) == 0:
        out = 1e3
    for _ in range(100):
        middle = (inside + out) / 2
        inside, out = (middle, out) if side_of(t._replace(r=middle), region) == 0 else (inside, middle)
    return inside


def hard(t: T, side: int) -> float:
    return 0.0 if side * t.A > 0 else t.r * t.A


def gate(region: Callable[..., int]) -> Callable[..., float]:
    """A region as a clip."""

    @functools.wraps(region)
    def c(t: T, *args: Any, **kwargs: Any) -> float:
        return hard(t, region(t, *args, **kwargs))

    return c


# Gates around a region.


def interval(eps_low: float, eps_high: float, region: Any) -> dict[str, Any]:
    return region or {"clip": "fixed", "eps_low": eps_low, "eps_high": eps_high}


def dual_clip(t: T, eps_low: float = 0.2, eps_high: float = 0.2, region: Any = None, cap: float = 3.0) -> float:
    return 0.0 if t.A < 0 and t.r > cap else hard(t, side_of(t, interval(eps_low, eps_high, region)))


def dgpo(
    t: T, eps_low: float = 0.2, eps_high: float = 0.2, region: Any = None, n: float = 1.0, m: float = 2.0
) -> float:
    where = interval(eps_low, eps_high, region)
    side = side_of(t, where)
    if side < 0 and t.A < 0:
        return t.r * (t.r / bound(t, -1, where)) ** n * t.A
    if side > 0 and t.A > 0:
        return t.r * (bound(t, 1, where) / t.r) ** (1 / m) * t.A
    return t.r * t.A


def ce_gppo(
    t: T,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    region: Any = None,
    beta_low: float = 0.75,
    beta_high: float = 1.0,
    cap: float | None = 3.0,
) -> float:
    where = interval(eps_low, eps_high, region)
    side = side_of(t, where)
    if cap is not None and t.A < 0 and t.r > cap:
        return 0.0
    if side < 0 and t.A < 0:
        return beta_low * bound(t, -1, where) * t.A
    if side > 0 and t.A > 0:
        return beta_high * bound(t, 1, where) * t.A
    return t.r * t.A


def aspo(t: T, eps_low: float = 0.2, eps_high: float = 0.2, region: Any = None, cap: float = 3.0) -> float:
    if side_of(t, interval(eps_low, eps_high, region)) * t.A > 0:
        return 0.0
    return min(1 / t.r if t.A > 0 else t.r, cap) * t.A


# Masks.


def dppo_tv(t: T, delta: Any = 0.15, cap: float | None = 20.0) -> float:
    low, high = delta if isinstance(delta, tuple) else (delta, delta)
    masked = (t.A > 0 and t.q - t.p > high) or (t.A < 0 and t.q - t.p < -low)
    return 0.0 if masked else capped_weight(t, cap)


def dppo_kl(t: T, delta: Any = 0.05, cap: float | None = 20.0) -> float:
    low, high = delta if isinstance(delta, tuple) else (delta, delta)
    return 0.0 if outward(t) and kl(t) > (high if t.r > 1 else low) else capped_weight(t, cap)


def dppo_topk(t: T, delta: float = 0.05, cap: float | None = 20.0) -> float:
    return 0.0 if outward(t) and t.state_divergence > delta else capped_weight(t, cap)


def ipo(t: T, eps: float = 0.3) -> float:
    return 0.0 if abs(t.q - t.p) > eps else t.r * t.A


def icepop(t: T, floor: float = 0.2, cap: float = 5.0) -> float:
    return t.r * t.A if floor <= t.r <= cap else 0.0


def tr_ppo(t: T, delta: float = 0.035) -> float:
    return 0.0 if kl(t) > delta and t.r * t.A > t.A else t.r * t.A


def band_sequence(t: T, divergence: str = "kl", delta: Any = 0.05) -> float:
    return 0.0 if any(beyond(x, divergence, delta) for x in t.row) else t.r * t.A


def trm(t: T, delta: float = 0.05) -> float:
    return 0.0 if max(k3(x.r) for x in t.row) > delta else t.r * t.A


def opsm(t: T, delta: float = 0.5) -> float:
    return 0.0 if t.A < 0 and mean(-math.log(x.r) for x in t.row) > delta else t.r * t.A


def cppo(t: T, delta: float = 0.15, w_min: float = 0.8, budget: float = 0.02, cap: float | None = 20.0) -> float:
    n = len(t.row)
    w = [1 - (1 - w_min) * i / max(n - 1, 1) for i in range(n)]
    z = [w[i] * abs(x.q - x.p) for i, x in enumerate(t.row)]
    room = min(delta, delta + budget * sum(w[: t.place]) - sum(z[: t.place]))
    return 0.0 if outward(t) and z[t.place] > room else capped_weight(t, cap)


@functools.cache
def m2po_least_dropped(batch: Any, budget: float) -> float:
    """The least (log r)^2 that is dropped."""
    tokens = [t for row in batch for t in row]
    left = math.fsum(math.log(t.r) ** 2 for t in tokens)
    least = math.inf
    for square in sorted((math.log(t.r) ** 2 for t in tokens if outward(t)), reverse=True):
        if left <= budget * len(tokens):
            break
        left, least = left - square, square
    return least


def m2po(t: T, budget: float = 0.04) -> float:
    return 0.0 if outward(t) and math.log(t.r) ** 2 >= m2po_least_dropped(t.batch, budget) else t.r * t.A


# Weights.


def cispo(t: T, eps_low: float | None = None, eps_high: float = 0.28) -> float:
    return cut(t.r, 0.0 if eps_low is None else 1 - eps_low, 1 + eps_high) * t.A


def sapo(t: T, tau_pos: float = 1.0, tau_neg: float = 1.05) -> float:
    s = 1 / (1 + math.exp(-(tau_pos if t.A > 0 else tau_neg) * (t.r - 1)))
    return 4 * s * (1 - s) * t.r * t.A


def maspo(t: T, sigma: float = 1.0, alpha: float = 0.3, beta: float = 0.03) -> float:
    risk = 1 + beta * t.A if t.A > 0 else 1 / (1 + beta * abs(t.A))
    s = cut(sigma / t.p**alpha, sigma, 10.0) * cut(risk, 0.1, 10.0)
    return (math.exp(-((t.r - 1) ** 2) / (2 * s * s)) if outward(t) else 1.0) * t.r * t.A


def drpo(t: T, eps: float = 12.5) -> float:
    return t.r * t.A * (1 - sign(t.A) * (t.q - t.p) / eps)


def spo(t: T, eps: float = 0.2) -> float:
    return t.r * t.A * (1 - sign(t.A) * (t.r - 1) / eps)


def truly_ppo(t: T, delta: float = 0.03, slope: float = 5.0) -> float:
    pull = slope * (t.q - t.p) / (1 - t.q)  # q d KL / d q
    return t.r * t.A - (pull if outward(t) and kl(t) > delta else 0.0)


def pg_is(t: T, alpha: float = 0.0) -> float:
    return (1 - alpha) * t.r * t.A


def topr(t: T, floor: float = 0.0, cap: float = 1.0) -> float:
    return t.A if t.reward > 0 else cut(t.r, floor, cap) * t.A


def up_grpo(t: T, eps_low: float = 0.2, cap: float = 3.0) -> float:
    if t.A > 0:
        return t.A
    return t.r * t.A if 1 - eps_low <= t.r <= cap else 0.0


def dro(t: T, beta: float = 0.1) -> float:
    return t.A - beta * math.log(t.r)


@functools.cache
def means(batch: Any) -> tuple[float, float]:
    tokens = [t for row in batch for t in row]
    return mean(t.A for t in tokens), mean(math.log(t.q) for t in tokens)


def covariance(t: T) -> float:
    mean_A, mean_log_q = means(t.batch)
    return (t.A - mean_A) * (math.log(t.q) - mean_log_q)


@functools.cache
def covariances(batch: Any) -> list[float]:
    return sorted((covariance(t._replace(batch=batch)) for row in batch for t in row), reverse=True)


def chosen(t: T, fraction: float) -> int:
    """How many tokens a fraction of the batch is."""
    return max(1, int(fraction * sum(map(len, t.batch))))


def kl_cov(t: T, fraction: float = 2e-4, beta: float = 1.0) -> float:
    top = covariances(t.batch)[: chosen(t, fraction)]
    return t.r * t.A - (beta * sign(math.log(t.r)) if covariance(t) >= top[-1] else 0.0)


def clip_cov(
    t: T,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    region: Any = None,
    fraction: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
) -> float:
    """c of the tokens that are not among those dropped, at most `chosen`, all with low < `covariance` < high."""
    return hard(t, side_of(t, interval(eps_low, eps_high, region)))


# Ratios of sequences.


def gspo(t: T, eps_low: float = 3e-4, eps_high: float = 4e-4) -> float:
    s = math.exp(mean(math.log(x.r) for x in t.row))
    return hard(t._replace(r=s), fixed(t._replace(r=s), eps_low, eps_high))


def gmpo(t: T, eps_low: float = 0.4, eps_high: float = 0.4) -> float:
    s = math.exp(mean(min(math.log(x.r), eps_high) if x.A > 0 else max(math.log(x.r), -eps_low) for x in t.row))
    return 0.0 if (math.log(t.r) > eps_high if t.A > 0 else math.log(t.r) < -eps_low) else s * t.A


def vespo(t: T, k_pos: float = 2.0, lam_pos: float = 3.0, k_neg: float = 3.0, lam_neg: float = 2.0) -> float:
    k, lam = (k_pos, lam_pos) if t.A >= 0 else (k_neg, lam_neg)
    log_W = cut(math.fsum(math.log(x.r) for x in t.row), math.log(1e-8), 20.0)
    return math.exp(k * log_W + lam * (1 - math.exp(log_W))) * t.A


FORMULAS: dict[str, Callable[..., float]] = {name: gate(region) for name, region in REGIONS.items()}
FORMULAS |= {f.__name__: f for f in (dual_clip, dgpo, ce_gppo, aspo)}
FORMULAS |= {f.__name__: f for f in (dppo_tv, dppo_kl, dppo_topk, ipo, icepop, tr_ppo)}
FORMULAS |= {f.__name__: f for f in (band_sequence, trm, opsm, cppo, m2po)}
FORMULAS |= {f.__name__: f for f in (cispo, sapo, maspo, drpo, spo, truly_ppo, pg_is, topr, up_grpo, dro)}
FORMULAS |= {f.__name__: f for f in (kl_cov, clip_cov, gspo, gmpo, vespo)}

KL = {"clip": "band", "divergence": "kl", "delta": 0.02}
TV = {"clip": "band", "divergence": "tv", "delta": 0.05}
ARCHER = {"clip": "archer", "eps": 0.1, "eps_uncertain": 0.6, "quantile": 0.5}
BAPO = {"clip": "bapo", "eps_low": (0.6, 0.3), "eps_high": (0.3, 1.5), "share": 0.3, "step": 0.2}
# arguments other than the defaults, under which each formula is compared as well
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "fixed": [{"eps_low": 0.1, "eps_high": 0.4}],
    "clip_higher": [{"eps_high": 0.5}],
    "dual_clip": [{"cap": 1.5}, {"region": KL}, {"eps_low": 0.5, "eps_high": 0.1}],
    "band": [
        {"divergence": "tv"},
        {"divergence": "chi2", "delta": 0.1, "cap": 3.0},
        {"divergence": "js", "delta": (0.01, 0.1)},
        {"delta": 0.01, "cap": 10.0},
    ],
    "sides": [
        {"high": {"clip": "fixed", "eps_high": 0.4}, "low": KL},
        {"high": KL, "low": KL},
        {"high": ARCHER, "low": "dcpo"},
    ],
    "dppo_tv": [{"delta": (0.05, 0.2)}, {"delta": 0.02, "cap": None}, {"cap": 1.5}],
    "dppo_kl": [{"delta": 0.01, "cap": 2.0}, {"delta": (0.2, 0.01), "cap": None}],
    "cispo": [{"eps_low": 0.2, "eps_high": 4.0}],
    "sapo": [{"tau_pos": 3.0, "tau_neg": 0.5}],
    "dgpo": [
        {"n": 2.0, "m": 1.0},
        {"region": KL},
        {"eps_low": 0.3, "eps_high": 0.1},
        {"region": {"clip": "union", "first": "ripo", "second": ARCHER}},
    ],
    "gspo": [{"eps_low": 0.05, "eps_high": 0.1}],
    "trgppo": [{"delta": 0.05}, {"delta": (0.1, 0.001)}],
    "dcpo": [{"eps_low": 0.16, "eps_high": 0.2}, {"eps_low": 0.02, "eps_high": 0.05, "cap": None}, {"cap": 1.1}],
    "atr": [{"delta": 0.3}, {"delta": 1e-3}],
    "ripo": [{"delta": 0.1, "floor": 0.0, "cap": None}, {"floor": 0.9, "cap": 1.2}],
    "archer": [{"eps": 0.3, "eps_uncertain": 0.05, "quantile": 0.37}],
    "union": [{"first": TV, "second": KL}, {"first": "ripo", "second": ARCHER}],
    "intersection": [{"first": TV, "second": KL}, {"first": "dcpo", "second": ARCHER}],
    "capped": [{"cap": 1.1}, {"region": "dcpo", "cap": 2.0}, {"region": BAPO, "cap": 1.4}],
    "bapo": [
        {"share": 0.05},
        {"eps_low": (0.9, 0.1), "eps_high": (0.1, 3.0), "share": 0.25, "step": 0.15},
        {"eps_low": (0.4, 0.1), "eps_high": (0.0, 12.0), "share": 0.35, "step": 0.5},
    ],
    "dppo_topk": [{"delta": 0.02, "cap": 2.0}, {"delta": 0.07, "cap": None}],
    "ipo": [{"eps": 0.1}],
    "icepop": [{"floor": 0.5}, {"floor": 0.0, "cap": 1.2}],
    "tr_ppo": [{"delta": 1e-3}],
    "band_sequence": [
        {"divergence": "chi2", "delta": 0.1},
        {"delta": (1.0, 0.3)},
        {"divergence": "tv", "delta": (0.2, 0.02)},
    ],
    "trm": [{"delta": 0.02}, {"delta": 3.0}],
    "opsm": [{"delta": 0.01}],
    "cppo": [
        {"delta": 0.05, "w_min": 0.2, "budget": 0.0},
        {"delta": 0.1, "w_min": 0.0, "budget": 9.0},
        {"delta": 0.3, "budget": 0.1, "cap": None},
        {"cap": 1.2},
    ],
    "m2po": [{"budget": 1.5}, {"budget": 1.0}, {"budget": 100.0}],
    "maspo": [{"alpha": 0.5, "beta": 0.3}, {"sigma": 0.3, "alpha": 0.0, "beta": 8.0}],
    "ce_gppo": [
        {"beta_low": 0.5, "beta_high": 0.25},
        {"region": KL, "cap": None},
        {"region": ARCHER, "cap": 1.3},
        {"eps_low": 0.1, "eps_high": 0.4},
    ],
    "aspo": [{"region": ARCHER, "cap": 1.4}, {"region": KL}, {"eps_low": 0.3, "eps_high": 0.5, "cap": 10.0}],
    "drpo": [{"eps": 0.05}],
    "spo": [{"eps": 12.5}],
    "truly_ppo": [{"delta": 8e-4, "slope": 20.0}],
    "pg_is": [{"alpha": 0.1}],
    "topr": [{"floor": 0.5, "cap": 2.0}],
    "up_grpo": [{"eps_low": 0.5, "cap": 1.5}, {"eps_low": 0.0}, {"eps_low": 1.0, "cap": 20.0}],
    "dro": [{"beta": 2.0}],
    "kl_cov": [{"fraction": 0.3, "beta": 0.1}, {"fraction": 1.0}],
    "clip_cov": [
        {"fraction": 0.02, "eps_low": 0.1, "eps_high": 0.4},
        {"fraction": 0.1, "region": KL},
        {"fraction": 1.0, "low": -2.0, "high": 0.5, "region": BAPO},
    ],
    "gmpo": [{"eps_low": 0.2, "eps_high": 1.0}, {"eps_low": 0.005, "eps_high": 0.01}],
    "vespo": [{"k_pos": 0.5, "lam_pos": 0.2, "k_neg": 0.0, "lam_neg": 0.5}],
}
