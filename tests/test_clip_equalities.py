"""What one clip is to another: equal ones, special cases, and the equations that bounds solve."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import pytest
import scipy.special
import torch
from truth.coefficients import g

import bandpo

LOG_P = -torch.logspace(-6, 1.2, 200, dtype=torch.float64)
KL, TV, FIXED = bandpo.Band("kl", 0.05), bandpo.Band("tv", 0.05), bandpo.Fixed(0.2, 0.28)
get = bandpo.get_clip


def tokens(rows: int = 40, columns: int = 30, **optional: Any) -> bandpo.Tokens:
    """Random tokens: rare and likely ones, sequences that have moved little and far."""
    draw = torch.Generator().manual_seed(3)
    u, z, a = torch.rand(3, rows, columns, generator=draw, dtype=torch.float64)
    old = torch.log(u**3)
    log_r = (2 * z - 1) * torch.logspace(-4, 0.5, rows, dtype=torch.float64)[:, None]
    return bandpo.Tokens(torch.minimum(old + log_r, old / 20), old, 4 * a - 2, **optional)


def ends(region: Any) -> tuple[torch.Tensor, torch.Tensor]:
    bounds = region.bounds(LOG_P)
    return bounds.log_low, bounds.log_high


def same_bounds(region: Any, other: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(ends(region), ends(other), strict=True))


def close(clip: bandpo.Clip, other: bandpo.Clip, t: bandpo.Tokens | None = None) -> None:
    t = tokens() if t is None else t
    torch.testing.assert_close(clip.coefficient(t), other.coefficient(t), rtol=1e-12, atol=0)


@pytest.mark.parametrize("delta", [1e-3, 0.05, (0.2, 0.01)])
def test_trgppo_is_band_with_kl(delta: Any) -> None:
    trgppo, band = get("trgppo", delta=delta), bandpo.Band("kl", delta)
    assert same_bounds(trgppo, band)
    close(trgppo, band)
    close(get("tr_ppo", delta=0.05), KL)


def test_ripo_is_band_with_chi2_without_the_factor() -> None:
    ripo = get("ripo", delta=0.02, floor=0.0, cap=None).bounds(LOG_P)
    low, high = ends(bandpo.Band("chi2", 0.02 / -torch.expm1(LOG_P)))
    inside = ripo.log_high + LOG_P < 0  # Band stays in the simplex
    assert inside[-50:].all() and not inside[:50].any()
    torch.testing.assert_close(ripo.low, low.exp(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ripo.high[inside], high.exp()[inside], rtol=1e-9, atol=0)
    cut = get("ripo", delta=0.02).bounds(LOG_P)
    torch.testing.assert_close(cut.low, ripo.low.clamp(min=0.5))
    torch.testing.assert_close(cut.high, ripo.high.clamp(max=10.0))


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("name", "eps"), [("drpo", 0.2), ("drpo", 0.05), ("spo", 0.2), ("spo", 0.5)])
def test_soft_twins_vanish_at_the_bound_and_restore_beyond(name: str, eps: float, sign: float) -> None:
    p, A = 0.4, 3.0 * sign
    bound = 1 + sign * eps / (p if name == "drpo" else 1.0)
    r = torch.tensor([1.0, 0.9 * bound + 0.1, bound, 1.1 * bound - 0.1, 2 - bound], dtype=torch.float64)
    old = torch.full_like(r, p).log()
    c = get(name, eps=eps).coefficient(bandpo.Tokens(old + r.log(), old, torch.full_like(r, A)))
    assert c[0] == A and abs(c[2]) < 1e-14
    assert (c[[1, 3, 4]].sign() == sign * torch.tensor([1.0, -1.0, 1.0])).all()


def test_dcpos_bounds_solve_one_term_of_chi2() -> None:
    eps_low, eps_high = 0.16, 0.2
    bounds = get("dcpo", eps_low=eps_low, eps_high=eps_high, cap=None).bounds(LOG_P)
    for p, low, high in zip(LOG_P.exp().tolist(), bounds.low.tolist(), bounds.high.tolist(), strict=True):
        if p * (1 + eps_high) > 1:
            assert high * p > 1  # out of the simplex
        if p > 4 * eps_low:
            assert p * low * (1 - low) == pytest.approx(eps_low)
        else:
            assert low == pytest.approx(0.5)
        assert p * high * (high - 1) == pytest.approx(eps_high)
        p, r = mpmath.mpf(p), mpmath.mpf(high)
        taken, others = p * r * (r - 1), (1 - p * r) * ((1 - p * r) / (1 - p) - 1)
        assert mpmath.almosteq(taken + others, p * (r - 1) ** 2 / (1 - p), 1e-9)  # binary chi2(new, old)
        assert mpmath.almosteq(taken, eps_high, 1e-9)


@pytest.mark.parametrize("delta", [1e-3, 0.05, 1.0])
def test_atrs_bounds_are_lamberts(delta: float) -> None:
    bounds = get("atr", delta=delta).bounds(LOG_P[:3])
    at = -mpmath.exp(-1 - mpmath.mpf(delta))
    for got, branch in ((bounds.low, 0), (bounds.high, -1)):
        want = float(-mpmath.lambertw(at, branch).real)
        assert want == pytest.approx(-scipy.special.lambertw(float(at), branch).real)
        torch.testing.assert_close(got, torch.full_like(got, want), rtol=1e-12, atol=0)


@pytest.mark.parametrize("first", [KL, TV], ids=["kl", "tv"])
def test_union_and_intersection(first: bandpo.Region) -> None:
    union, both = get("union", first=first, second=FIXED), get("intersection", first=first, second=FIXED)
    (low, high), (fixed_low, fixed_high) = ends(first), ends(FIXED)
    (wide_low, wide_high), (narrow_low, narrow_high) = ends(union), ends(both)
    assert torch.equal(wide_low, torch.minimum(low, fixed_low))  # the authors' "relax"
    assert torch.equal(wide_high, torch.maximum(high, fixed_high))
    assert torch.equal(narrow_low, torch.maximum(low, fixed_low))
    assert torch.equal(narrow_high, torch.minimum(high, fixed_high))
    t = tokens()
    one, other = first.side(t) != 0, FIXED.side(t) != 0
    assert (one & ~other).any() and (other & ~one).any() and not (one | other).all()
    assert torch.equal(union.side(t) != 0, one & other) and torch.equal(both.side(t) != 0, one | other)
    close(get("union", first=first, second=first), first)
    close(get("intersection", first=first, second=first), first)


def test_capped_band_is_band_with_a_cap() -> None:
    capped, band = get("capped", region=KL, cap=1.5), bandpo.Band("kl", 0.05, cap=1.5)
    assert same_bounds(capped, band)
    close(capped, band)


@pytest.mark.parametrize("divergence", ["kl", "tv", "chi2", "js"])
def test_band_sequence_keeps_what_stays_within(divergence: str) -> None:
    t, delta = tokens(), 0.03
    most = torch.tensor(
        [
            max(g(divergence, p, r) for p, r in zip(*row, strict=True))
            for row in zip(t.p.tolist(), t.ratio.tolist(), strict=True)
        ]
    )
    kept = get("band_sequence", divergence=divergence, delta=delta).coefficient(t) != 0
    assert torch.equal(kept, (most <= delta)[:, None].expand_as(kept)) and kept.any() and not kept.all()


@pytest.mark.parametrize("name", [x for x in bandpo.list_clips() if x != "clip_cov"])
def test_on_policy_every_clip_is_the_plain_gradient(name: str) -> None:
    t = tokens()
    some = {"entropies": -t.log_p, "rewards": t.advantages, "state_divergence": torch.zeros_like(t.log_p)}
    at_rest = bandpo.Tokens(t.log_p, t.log_p.clone(), t.advantages, **some)
    torch.testing.assert_close(get(name).coefficient(at_rest), t.advantages)


ATR = get("atr", delta=0.1).bounds(LOG_P[0])
SPECIAL = {
    "archer with one margin": (get("archer", eps=0.2, eps_uncertain=0.2), bandpo.Fixed(0.2, 0.2)),
    "bapo with one interval": (get("bapo", eps_low=(0.2, 0.2), eps_high=(0.28, 0.28)), FIXED),
    "ce_gppo without weights": (get("ce_gppo", region=KL, beta_low=0.0, beta_high=0.0, cap=None), KL),
    "ce_gppo without weights, capped": (get("ce_gppo", beta_low=0.0, beta_high=0.0), get("dual_clip")),
    "cppo": (get("cppo", delta=0.1), get("dppo_tv", delta=0.1)),
    "dppo_topk over two outcomes": (get("dppo_topk"), get("dppo_kl")),
    "drpo with a large eps": (get("drpo", eps=1e15), get("none")),
    "gmpo": (get("gmpo"), bandpo.Fixed(1 - math.exp(-0.4), math.expm1(0.4))),
    "gspo": (get("gspo", eps_low=0.2, eps_high=0.28), FIXED),
    "ipo, wide": (get("ipo", eps=1.0), get("none")),
    "m2po with a large budget": (get("m2po", budget=1e6), get("none")),
    "maspo, wide": (get("maspo", sigma=1e9), get("none")),
    "opsm with a large radius": (get("opsm", delta=1e3), get("none")),
    "pg_is": (get("pg_is"), get("none")),
    "sides of one region": (get("sides", high=KL, low=KL), KL),
    "trm": (get("trm", delta=0.1), get("icepop", floor=float(ATR.low), cap=float(ATR.high))),
    "vespo without its rate": (get("vespo", k_pos=1.0, lam_pos=1e-15, k_neg=1.0, lam_neg=1e-15), get("none")),
}


@pytest.mark.parametrize("how", SPECIAL)
def test_special_cases_where_each_sequence_has_one_token(how: str) -> None:
    t = tokens()
    flat = [x.reshape(-1, 1) for x in (t.log_q, t.log_p, t.advantages)]
    close(
        *SPECIAL[how],
        bandpo.Tokens(*flat, entropies=-flat[1], state_divergence=bandpo.binary_divergence(flat[0], flat[1], "kl")),
    )
