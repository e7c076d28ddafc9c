"""What `explain` returns: numbers under stable names, and a text."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from bandpo.analysis.text import as_text
from bandpo.clips.base import Clip

KEPT = ("sample", "chosen")  # objects, which no program reads as JSON


@dataclass(frozen=True)
class Explanation:
    """What a clip does to given tokens; print it, or take `to_dict()`.

    Shares are from 0 to 1; None stands for what is not known, or has no tokens.

    Args:
        counts: tokens, sequences, padding, left_out; shares of A positive, negative, zero; surprise, the mean of
            -log p in nats; rare, how many tokens have p < 0.1 and A > 0.
        clip: the clip in use: name, is (with its arguments), looks_at, paper; anchor, from which it alone is measured,
            everything else being from old_logps; beyond_simplex, the share of tokens whose upper bound lies past
            probability 1, for clips of fixed bounds.
        idle: whether it does nothing, and why: "one_update" (every ratio is exactly 1), "no_advantage" (every A is 0),
            "not_reached" (no token went far enough), "no_clip"; ratio_one, ratio_one_uncertain (of tokens with
            p < 0.999), ratio_beyond_2x (shares), largest_log_ratio.
        effect: a row for each sign of A (all, positive, negative) and bucket of p (all, and five): tokens, share,
            outside_below, outside_above, capped, zero_grad_below, zero_grad_above, zero_grad, gradient_kept,
            gradient_opposed, kl_mean, kl_max, as `ClipStats` has them.
        divergence: the binary kl, tv and chi2 that tokens reached: mean, p99, max.
        sequence: kl_mean and kl_max over sequences of sum (r - 1 - log r), an unbiased estimate of KL(old || new) of
            the whole sequence; minus_log_ratio_mean, the same by sum -log r. None for (token,) tensors.
        equivalent: by "zero_gradient" (as many tokens without gradient as under the clip), or where it shuts out none
            "gradient_kept" (as much of sum |r A|), "other" (it took none, and changed it otherwise, as no bound of the
            ratio does), or None (it took nothing: any wider one does that too); and for
            band_kl, band_tv, band_chi2, dppo_kl, dppo_tv (radii) and fixed (eps on both sides) the value and the share
            that it takes; None where none takes as much.
        clips: what each clip of the registry would have done, with its published defaults: clip, looks_at, missing,
            zero_grad, zero_grad_rare (of tokens with p < 0.1 and A > 0), gradient_kept, gradient_opposed, entropy.
        rollout: the gap to the engine that sampled; see `bandpo.analysis.gap.Gap.as_dict`. None where it is not known.
        entropy: dH to first order, mean over the tokens in nats for a step of eta = 1, by form: logit_step (a plain
            gradient step on the logits) and natural_gradient (an estimate); None where neither can be had.
        remarks: what is odd about the values.
        advice: up to five: text, number, page.
        sample: up to 20,000 of the tokens: log_p, log_r, advantages, zero (1 where c = 0).
        chosen: the clip in use.
    """

    counts: dict[str, Any]
    clip: dict[str, Any]
    idle: dict[str, Any]
    effect: list[dict[str, Any]]
    divergence: dict[str, dict[str, float]]
    sequence: dict[str, float] | None
    equivalent: dict[str, Any]
    clips: list[dict[str, Any]]
    rollout: dict[str, Any] | None
    entropy: dict[str, Any] | None
    remarks: list[str]
    advice: list[dict[str, Any]]
    sample: dict[str, Tensor] = field(repr=False)
    chosen: Clip = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but `sample` and `chosen`, as JSON can hold it.

        Returns:
            A dict of the fields' names.
        """
        return {f.name: copy.deepcopy(getattr(self, f.name)) for f in fields(self) if f.name not in KEPT}

    def __str__(self) -> str:
        return as_text(self.to_dict())
