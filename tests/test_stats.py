"""Statistics: against scipy and rliable, by hand, and by simulating how often an interval holds the truth."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from bandpo._input import InputError
from bandpo.lab import stats

RNG = np.random.default_rng(7)
A, B = RNG.normal(0.5, 0.2, 12), RNG.normal(0.4, 0.2, 12)


def test_t_intervals_and_paired_tests_are_scipys():
    own = stats.mean_interval(A, level=0.9)
    low, high = scipy_stats.ttest_1samp(A, 0).confidence_interval(0.9)
    assert (own.estimate, own.low, own.high, own.n) == pytest.approx((A.mean(), low, high, 12))
    own, theirs = stats.paired(A, B), scipy_stats.ttest_rel(A, B)
    low, high = theirs.confidence_interval(0.95)
    assert (own.mean, own.low, own.high, own.p) == pytest.approx((A.mean() - B.mean(), low, high, theirs.pvalue))
    boot = stats.bootstrap(A - B)
    assert (own.boot_low, own.boot_high) == (boot.low, boot.high)


def test_equivalence_is_two_one_sided_tests_and_the_narrower_interval():
    near = B + np.linspace(-0.02, 0.03, 12)
    for margin, same in ((0.02, True), (0.006, False)):
        own = stats.tost(near, B, margin)
        p = max(
            scipy_stats.ttest_rel(near + margin, B, alternative="greater").pvalue,
            scipy_stats.ttest_rel(near - margin, B, alternative="less").pvalue,
        )
        assert own.p == pytest.approx(p) and own.equivalent is same
        assert (-margin < own.low and own.high < margin) is same  # the 90 % interval says the same
    assert not stats.tost([0.1], [0.1], 0.5).equivalent


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.5]) == [1.0, 1.0]


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n, c, k in itertools.product((5, 6), range(6), (1, 2, 5)):
        samples = [1] * c + [0] * (n - c)
        subsets = [any(subset) for subset in itertools.combinations(samples, k)]
        assert stats.pass_at_k([c], n, k)[0] == pytest.approx(np.mean(subsets))
    assert stats.pass_at_k([0, 1, 4096], 4096, 2048) == pytest.approx([0, 0.5, 1])  # no overflow


def test_wilson_has_a_width_at_the_ends():
    by_hand = (1.96**2 / 20) / (1 + 1.96**2 / 20)
    assert (stats.wilson(0, 20).low, stats.wilson(0, 20).high) == pytest.approx((0, by_hand), abs=1e-4)
    assert stats.wilson(7, 20).estimate == 0.35


def test_robust_summaries_are_rliables():
    reason = "rliable is the oracle: pip install rliable 'arch<8' 'pandas<3'"
    metrics = pytest.importorskip("rliable.metrics", reason=reason)
    x, y = RNG.normal(0.5, 0.2, (9, 3)).round(1), RNG.normal(0.4, 0.2, (7, 3)).round(1)  # rounded: with ties
    assert stats.iqm(x) == pytest.approx(metrics.aggregate_iqm(x))
    assert stats.probability_of_improvement(x, y).estimate == pytest.approx(metrics.probability_of_improvement(x, y))
    library = pytest.importorskip("rliable.library", reason=reason, exc_type=ImportError)
    taus = np.linspace(0, 1, 5)
    (theirs,), (band,) = (list(d.values()) for d in library.create_performance_profile({"x": x}, taus, reps=2000))
    own = stats.performance_profile(x, taus)
    assert [i.estimate for i in own] == pytest.approx(theirs)
    assert np.array([[i.low for i in own], [i.high for i in own]]) == pytest.approx(band, abs=0.04)
    (_, theirs) = library.get_interval_estimates({"x": x}, lambda s: np.array([metrics.aggregate_iqm(s)]), reps=2000)
    own = stats.stratified_bootstrap(x, resamples=2000)
    assert (own.low, own.high) == pytest.approx(theirs["x"].ravel(), abs=0.015)


def test_robust_summaries_by_hand():
    assert stats.iqm([0, 1, 2, 3, 4, 5, 6, 100]) == 3.5
    assert stats.probability_of_improvement([[1, 1], [3, 1]], [[2, 1]]).estimate == pytest.approx((0.5 + 0.5) / 2)
    profile = stats.performance_profile([0.1, 0.5, 0.9, 0.9], [0, 0.5, 0.95])
    assert [round(i.estimate, 3) for i in profile] == [1, 0.5, 0]  # above 0.5, not at it
    assert all(i.low <= i.estimate <= i.high for i in profile)


def covered(draw, interval, truth, times):
    """The share of simulated experiments whose interval holds the truth."""
    found = [interval(draw(np.random.default_rng(i))) for i in range(times)]
    return np.mean([i.low <= truth <= i.high for i in found])


def test_intervals_hold_the_truth_as_often_as_they_say():
    normal = covered(lambda rng: rng.normal(0.3, 1, 5), stats.mean_interval, 0.3, 1500)
    assert 0.935 < normal < 0.965
    prompts = covered(  # mean@8 of 60 prompts, whose difficulty differs
        lambda rng: rng.binomial(8, rng.beta(0.5, 1.5, 60)) / 8,
        lambda x: stats.bootstrap(x, resamples=400),
        0.25,
        250,
    )
    assert 0.91 < prompts < 0.985
    seeds = covered(
        lambda rng: rng.normal(0, 1, (10, 3)), lambda x: stats.stratified_bootstrap(x, np.mean, resamples=200), 0, 250
    )
    assert 0.88 < seeds < 0.97
    shares = covered(lambda rng: rng.binomial(40, 0.1), lambda c: stats.wilson(int(c), 40), 0.1, 500)
    assert 0.92 < shares < 0.98


def test_one_value_has_no_interval_and_equal_ones_have_no_width():
    for found in (stats.mean_interval([0.4]), stats.bootstrap([0.4]), stats.stratified_bootstrap([0.4])):
        assert found.estimate == 0.4 and math.isnan(found.low) and found.to_dict()["high"] is None
    assert stats.paired([0.4], [0.1]).to_dict()["p"] is None
    assert stats.bootstrap([1] * 9 + [2], np.median).low == 1  # BCa has no answer here
    same = stats.paired([0.4, 0.5], [0.4, 0.5])
    assert (same.mean, same.low, same.boot_high, same.p) == (0, 0, 0, 1)
    assert stats.paired([0.5, 0.75, 0.4], [0.25, 0.5, 0.15]).p == 0  # .25 each, but for rounding


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: stats.paired([1, 2], [1]), "2 and 1 values"),
        (lambda: stats.mean_interval([]), "one finite number"),
        (lambda: stats.bootstrap([1, math.nan]), "one finite number"),
        (lambda: stats.tost([1, 2], [1, 2], 0), "margin=0"),
        (lambda: stats.mean_interval([1, 2], level=1), "level=1"),
        (lambda: stats.pass_at_k([1], 4, 5), "k=5"),
        (lambda: stats.wilson(3, 2), "3 of 2"),
        (lambda: stats.probability_of_improvement([[1, 2]], [[1]]), "2 and of 1 tasks"),
    ],
)
def test_bad_values_are_named(call, said):
    with pytest.raises(InputError, match=said):
        call()
