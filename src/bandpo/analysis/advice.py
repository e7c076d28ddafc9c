"""What to make of an explanation: up to five sentences, each with its number and the page that says more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from bandpo.analysis.text import nearly, percent

MOST = 5
FEW = 20  # tokens of which a share says something
PAGE = "docs/explain.md#"
Advice = tuple[str, float, str]  # text, number, section


def advise(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the most pressing advice first.

    Args:
        found: the fields of an `Explanation`.

    Returns:
        A list of dicts: text, number, page.
    """
    rules: tuple[Callable[[dict[str, Any]], Iterator[Advice]], ...] = (
        _idle, _rollout, _collapse, _taken, _rare, _entropy, _simplex, _calm,
    )  # fmt: skip
    said: list[Advice] = []
    for rule in rules:
        if rule is not _calm or not said:
            said += rule(found)
    return [{"text": text, "number": number, "page": PAGE + section} for text, number, section in said[:MOST]]


def _idle(found: dict[str, Any]) -> Iterator[Advice]:
    idle, tokens = found["idle"], found["counts"]["tokens"]
    if idle["why"] == "no_advantage":
        yield (
            f"The advantage of all {tokens:,} tokens is 0, so that none has a gradient under any clip: rewards are "
            "equal within every group; make the problems harder or easier, or the groups larger.",
            0.0,
            "is-the-clip-idle",
        )
    elif idle["why"] == "one_update":
        yield (
            f"The ratio of all {tokens:,} tokens is exactly 1, so that no clip can act: each rollout feeds one update, "
            "or old_logps were computed with the weights in training; make several updates a rollout (TRL: "
            "steps_per_generation above gradient_accumulation_steps; verl: ppo_mini_batch_size below "
            "train_batch_size).",
            1.0,
            "is-the-clip-idle",
        )
    elif idle["why"] == "not_reached":
        far, anchor = found["equivalent"]["fixed"], found["clip"]["anchor"]
        eps = 0.0 if far is None else far["value"]
        measured = "" if anchor == "old" else f" from old_logps, where this clip measures by anchor={anchor}"
        yield (
            f"No token went far enough for this clip: in the direction of its advantage none moved its ratio by more "
            f"than {eps:.3g}{measured}; another clip of this width changes nothing here, and what the run does has "
            "other causes.",
            eps,
            "is-the-clip-idle",
        )
    elif idle["why"] is None and idle["ratio_one_uncertain"] >= 0.1 and found["clip"]["anchor"] == "old":
        yield (
            f"{percent(idle['ratio_one_uncertain'])} of the tokens with p < 0.999 have a ratio of exactly 1, as the "
            "first update of a rollout has: shares over all tokens understate what the clip does in later updates.",
            idle["ratio_one_uncertain"],
            "is-the-clip-idle",
        )


def _rollout(found: dict[str, Any]) -> Iterator[Advice]:
    gap = found["rollout"]
    if gap is None:
        return
    moved = found["divergence"]["kl"]["mean"]
    anchor = "anchor; " if found["clip"]["anchor"] == "old" else ""
    if gap["equal"] == 1:
        yield (
            "rollout_logps equal old_logps for every token: one was copied from the other, and the gap between engine "
            "and trainer is not known.",
            1.0,
            "which-old-policy",
        )
    elif gap["k3"] > 0.01 or gap["effective_sample_size"] < 0.9 or (gap["k3"] > moved and gap["k3"] > 1e-4):
        yield (
            f"Rollout engine and trainer disagree by k3 {gap['k3']:.3g} nats, while the update itself moved kl by "
            f"{moved:.3g} (beyond 2x: {percent(gap['beyond_2x'])} of the tokens; effective sample size "
            f"{gap['effective_sample_size']:.2f}): fix that first, or correct for it "
            f"({anchor}TRL: vllm_importance_sampling_correction).",
            gap["k3"],
            "which-old-policy",
        )


def _collapse(found: dict[str, Any]) -> Iterator[Advice]:
    surprise = found["counts"]["surprise"]
    if surprise < 0.1:
        yield (
            f"The mean of -log p is {surprise:.3g} nats, an estimate of the entropy: the policy hardly explores any "
            "more, and a clip acts on sampled tokens alone.",
            surprise,
            "entropy",
        )


def _taken(found: dict[str, Any]) -> Iterator[Advice]:
    whole = found["effect"][0]
    kept, opposed = whole["gradient_kept"], whole["gradient_opposed"]
    if kept is not None and kept < 0.9:
        kl, anchor = found["equivalent"].get("band_kl"), found["clip"]["anchor"]
        band = f"; Band kl {kl['value']:.2g} takes {_alike(found['equivalent'])}" if kl and anchor == "old" else ""
        gap = "" if anchor == "old" else "close the gap between engine and trainer, "
        yield (
            f"The clip keeps {percent(kept)} of the gradient{band}: if that is not intended, {gap}make fewer updates a "
            "rollout or smaller ones, or widen it.",
            kept,
            "how-much-is-too-much",
        )
    if opposed is not None and opposed > 0.01:
        yield (
            f"{percent(opposed)} as much gradient as there is without a clip pushes against its advantage: this clip "
            "pulls tokens back.",
            opposed,
            "how-much-is-too-much",
        )


def _alike(same: dict[str, Any]) -> str:
    """Return what Band takes like the clip, in words."""
    return nearly(same, ["band_kl"]) + ("it from as many tokens" if same["by"] == "zero_gradient" else "as much")


def _rare(found: dict[str, Any]) -> Iterator[Advice]:
    rows = [row for row in found["effect"] if row["sign"] == "positive" and row["bucket"] != "all" and row["tokens"]]
    parts = [[row for row in rows if (row["bucket"] in ("p0-0.01", "p0.01-0.1")) == rare] for rare in (True, False)]
    tokens = [sum(row["tokens"] for row in part) for part in parts]
    if tokens[0] < FEW or not tokens[1]:
        return
    rare, other = (
        sum(row["zero_grad"] * row["tokens"] for row in part) / n for part, n in zip(parts, tokens, strict=True)
    )
    band = next((row for row in found["clips"] if row["clip"] == "band"), None)
    if rare > 0.01 and rare > 2 * other:
        than = ""
        if band and found["clip"]["name"] != "band":
            than = f"; Band kl 0.05 would take it from {percent(band['zero_grad_rare'])}"
        yield (
            f"Of the {tokens[0]:,} tokens with A > 0 and p < 0.1, {percent(rare)} have no gradient, against "
            f"{percent(other)} of the other ones with A > 0: the clip holds rare tokens down, however good they "
            f"are{than}.",
            rare,
            "rare-tokens",
        )


def _entropy(found: dict[str, Any]) -> Iterator[Advice]:
    forms = found["entropy"]
    if forms is not None:
        name, form = next((k, v) for k, v in forms.items() if v is not None)
        clip, free = form["clip"], form["no_clip"]
        if math.isfinite(clip) and clip != 0:
            says = "a step on the logits" if name == "logit_step" else "the natural-gradient estimate"
            by = "rises" if clip > 0 else "falls"
            positive = form["clip_positive"] * clip > form["clip_negative"] * clip
            yield (
                f"To first order the entropy {by}, by {abs(clip):.3g} nats a token for a step of 1 ({says}; "
                f"{free:+.3g} without a clip), most of it through the tokens with A {'>' if positive else '<'} 0.",
                clip,
                "entropy",
            )


def _simplex(found: dict[str, Any]) -> Iterator[Advice]:
    clip = found["clip"]
    if clip["beyond_simplex"] > 0.2 and not found["idle"]["idle"]:
        yield (
            f"For {percent(clip['beyond_simplex'])} of the tokens the upper bound lies past probability 1, so that "
            "nothing confines their rise.",
            clip["beyond_simplex"],
            "which-clip",
        )


def _calm(found: dict[str, Any]) -> Iterator[Advice]:
    kept = found["effect"][0]["gradient_kept"]
    if kept is not None:
        yield (
            f"Nothing stands out: the clip keeps {percent(kept)} of the gradient.",
            kept,
            "how-much-is-too-much",
        )
