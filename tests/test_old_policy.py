"""Which old policy a clip measures from, the importance correction, and schedules: against plain formulas."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from truth.coefficients import FORMULAS, T

import bandpo
from bandpo.clips import ANCHORS
from bandpo.testing import check_clip

Q, OLD, ROLLOUT = (
    [[0.12, 0.6, 0.2, 0.05], [0.9, 0.01, 0.3, 0.4]],
    [[0.02, 0.5, 0.31, 0.2], [0.6, 0.2, 0.31, 0.1]],
    [[0.05, 0.5, 0.1, 0.3], [0.85, 0.02, 0.9, 0.02]],
)
A = [1.0, -2.0]
LOGPS, OLD_LOGPS, ROLLOUT_LOGPS = (torch.tensor(x, dtype=torch.float64).log() for x in (Q, OLD, ROLLOUT))
ADVANTAGES, MASK = torch.tensor(A, dtype=torch.float64), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def gradient(**options) -> torch.Tensor:
    x = LOGPS.clone().requires_grad_()
    rollout = torch.where(MASK.bool(), ROLLOUT_LOGPS, torch.nan)
    out = bandpo.policy_loss(x, OLD_LOGPS, ADVANTAGES, MASK, aggregation="sum", rollout_logps=rollout, **options)
    (found,) = torch.autograd.grad(out.loss, x)
    return -found


def written(clip: str, anchor: str) -> torch.Tensor:
    """c(p, q / p, A) / (q / p) times the weight, p and weight by the anchor's table."""
    rows = []
    for i, row in enumerate(Q):
        rows.append([])
        for j, q in enumerate(row):
            p, divisor = {
                "old": (OLD[i][j], OLD[i][j]),
                "p": (ROLLOUT[i][j], OLD[i][j]),
                "r": (OLD[i][j], ROLLOUT[i][j]),
                "both": (ROLLOUT[i][j], ROLLOUT[i][j]),
            }[anchor]
            c = FORMULAS[clip](T(p, q / p, A[i])) / (q / p) * (q / divisor)
            rows[-1].append(c if MASK[i, j] else 0.0)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("clip", ["band", "fixed", "cispo", "sapo", "drpo", "union"])
@pytest.mark.parametrize("anchor", ANCHORS)
def test_the_anchor_is_its_table(clip, anchor):
    want = written(clip, anchor)
    torch.testing.assert_close(gradient(clip=clip, anchor=anchor), want, rtol=1e-9, atol=1e-12)
    options = {"clip": clip, "anchor": anchor, "rollout_logps": ROLLOUT_LOGPS}
    got = bandpo.clip_advantages(LOGPS, OLD_LOGPS, ADVANTAGES, MASK, **options)
    torch.testing.assert_close(got * (LOGPS - OLD_LOGPS).exp(), want, rtol=1e-9, atol=1e-12)
    stats = bandpo.clip_stats(LOGPS, OLD_LOGPS, ADVANTAGES, MASK, **options).metrics()
    assert stats["zero_grad"] == pytest.approx(float((want[MASK.bool()] == 0).double().mean()))
    if anchor in ("p", "both") and clip == "band":
        moved = bandpo.clip_stats(LOGPS, ROLLOUT_LOGPS, ADVANTAGES, MASK, clip=clip).metrics()
        assert all(stats[f"outside_{side}"] == moved[f"outside_{side}"] for side in ("below", "above"))
    check_clip(bandpo.clips.anchored(bandpo.get_clip(clip), anchor))


def test_the_anchors_differ_here():
    assert len({str(written("band", anchor)) for anchor in ANCHORS}) == 4


@pytest.mark.parametrize("cap", [0.8, 2.0])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_correction(mode, cap):
    want = written("band", "old")
    for i in range(2):
        each = [OLD[i][j] / ROLLOUT[i][j] for j in range(4) if MASK[i, j]]
        weights = [math.prod(each)] * len(each) if mode.startswith("sequence") else each
        for j, w in enumerate(weights):
            want[i, j] *= min(w, cap) if mode.endswith("truncate") else w * (w <= cap)
    got = gradient(importance_sampling_mode=mode, importance_sampling_cap=cap)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_a_schedule_is_made_of_clips():
    clip = bandpo.get_clip("band", delta={"start": 0.2, "end": 0.02})
    assert clip.at(0) == bandpo.Band(delta=0.2) and clip.at(1) == bandpo.Band(delta=0.02)
    assert clip.at(0.25).delta == pytest.approx(0.155) and "delta={'start': 0.2" in repr(clip)
    halves = {"linear": 0.11, "cosine": 0.11, "geometric": 0.2 * math.sqrt(0.1)}
    for shape, half in halves.items():
        made = bandpo.get_clip("band", delta={"start": 0.2, "end": 0.02, "shape": shape})
        assert made.at(0.5).delta == pytest.approx(half) and made.at(1.0).delta == pytest.approx(0.02)
    assert bandpo.get_clip("band", delta={"start": 0.2, "end": 0.02, "shape": "cosine"}).at(0.25).delta > 0.155
    pair = bandpo.get_clip("band", delta=[{"start": 0.2, "end": 0.02}, 0.05])
    assert pair.at(1.0).delta == (0.02, 0.05)
    nested = bandpo.get_clip("sides", low={"clip": "fixed", "eps_low": {"start": 0.3, "end": 0.1}})
    assert nested.at(0.5).low.eps_low == pytest.approx(0.2) and nested.needs == ()
    assert bandpo.get_clip("cispo").at(0.5) == bandpo.get_clip("cispo")
    inside = bandpo.clips.anchored(clip, "both")
    assert inside.at(1.0).clip == bandpo.Band(delta=0.02) and bandpo.clips.anchored(clip, "old") is clip
    assert pickle.loads(pickle.dumps(inside.at(1.0))).clip == bandpo.Band(delta=0.02)


X = torch.full((2, 3), -1.0)
SCHEDULED = bandpo.get_clip("band", delta={"start": 0.2, "end": 0.02})
BAD = {
    "anchor": (lambda: bandpo.policy_loss(X, X + 0, X, anchor="bothe"), "did you mean 'both'"),
    "no rollout": (lambda: bandpo.policy_loss(X, X + 0, X, anchor="both"), "needs rollout_logps: give rollout_logps"),
    "mode": (lambda: gradient(importance_sampling_mode="token"), "did you mean 'token_mask'"),
    "mode and anchor": (lambda: gradient(importance_sampling_mode="token_mask", anchor="r"), "with anchor='r'"),
    "cap": (lambda: gradient(importance_sampling_mode="token_mask", importance_sampling_cap=0), "greater than 0"),
    "correction without": (
        lambda: bandpo.policy_loss(X, X + 0, X, importance_sampling_mode="token_mask"),
        "needs rollout_logps",
    ),
    "no sequences": (
        lambda: bandpo.policy_loss(
            X[0], X[0] + 0, X[0], importance_sampling_mode="sequence_mask", rollout_logps=X[0] + 0
        ),
        "needs (batch, token)",
    ),
    "half a schedule": (lambda: bandpo.get_clip("band", delta={"start": 0.2}), "has start, end and shape"),
    "a key": (lambda: bandpo.get_clip("band", delta={"start": 0.2, "end": 0.1, "shap": 1}), "did you mean 'shape'"),
    "a shape": (lambda: bandpo.get_clip("band", delta={"start": 0.2, "end": 0.1, "shape": "line"}), "'linear'"),
    "an end": (lambda: bandpo.get_clip("band", delta={"start": 0.2, "end": 0}), "delta=0.0: must be"),
    "from 0": (lambda: bandpo.get_clip("fixed", eps_low={"start": 0, "end": 0.1, "shape": "geometric"}), "start > 0"),
    "a word": (lambda: bandpo.get_clip("band", delta={"start": "a", "end": 0.1}), "delta.start='a'"),
    "no moment": (lambda: bandpo.policy_loss(X, X + 0, X, clip=SCHEDULED), "use clip.at(step / steps)"),
    "past the end": (lambda: SCHEDULED.at(1.5), "progress=1.5"),
}


@pytest.mark.parametrize("how", BAD)
def test_bad_input_is_one_line(how):
    call, words = BAD[how]
    with pytest.raises(bandpo.InputError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)
