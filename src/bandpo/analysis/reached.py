"""How far tokens went and what the clip took, as sums over a stream; and which other clips would take as much."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bandpo.analysis.others import RARE
from bandpo.analysis.tails import Tails
from bandpo.clips.anchored import Anchored
from bandpo.clips.base import Clip, Region
from bandpo.loss.stats import BUCKETS, COUNTS, FIELDS, MOST_RATIO, MOST_REACHED, ClipStats
from bandpo.operator.family import get_divergence
from bandpo.operator.radius import RADII
from bandpo.operator.tokens import MOST_LOG_RATIO, Move, Tokens

MEASURES = ("kl", "tv", "chi2")
NOTHING = 1e-4  # a share of the gradient that nobody can see
CERTAIN = 1e-3  # log p of a token that has no room to move
SAMPLE = 20_000  # tokens kept for a picture
EQUAL = {"band_kl": "kl", "band_tv": "tv", "band_chi2": "chi2", "dppo_kl": "kl", "dppo_tv": "tv", "fixed": "eps"}
SIGNS = {"all": None, "positive": 2, "negative": 0}  # the row of ClipStats


class Reached:
    """Sums over tokens; see `Explainer`."""

    def __init__(self) -> None:
        self.all = {name: Tails() for name in MEASURES}
        self.outward = {name: Tails() for name in (*MEASURES, "eps")}
        self.largest = {name: 0.0 for name in (*MEASURES, "log_ratio")}
        self.sums = dict.fromkeys(
            (*MEASURES, "still", "surprise", "beyond", "off_simplex", "taken", "free", "stuck", "rare"), 0.0
        )
        # of each part: how many sequences, sum and maximum of the estimate of KL, sum of -log r
        self.sequences: list[Tensor] = []
        self.stride, self.place = 1, 0
        self.kept: list[Tensor] = []

    def add(self, clip: Clip, t: Tokens, c: Tensor, mask: Tensor) -> None:
        """Count tokens.

        Args:
            clip: the clip in use.
            t: the tokens.
            c: its coefficient for them.
            mask: bool, of their shape.
        """
        # all at once, because a mask is turned into places anew for each tensor that it picks from
        log_q, log_p, advantages, c, weighted = torch.stack([t.log_q, t.log_p, t.advantages, c, t.weighted])[:, mask]
        move = Move(log_q, log_p)
        self._add_moves(move, advantages, weighted)
        size, log_r = move.log_r.abs(), move.log_r
        still, movable = size == 0, log_p < -CERTAIN  # nothing moves where p is 1
        self.largest["log_ratio"] = max(self.largest["log_ratio"], float(size.max()))
        self.sums["still"] += float(still.sum())
        self.sums["free"] += float(movable.sum())
        self.sums["stuck"] += float((movable & still).sum())
        self.sums["rare"] += float(((log_p < math.log(RARE)) & (advantages > 0)).sum())
        self.sums["beyond"] += float((size > math.log(2)).sum())
        self.sums["surprise"] += -float(log_p.clamp(min=-1e4).sum(dtype=torch.float64))
        self.sums["taken"] += float((c != weighted).sum())
        if isinstance(clip.boundary, Region) and clip.boundary.as_bounds and not clip.boundary.uses_p:
            self.sums["off_simplex"] += float((clip.boundary.bounds(log_p).log_high > -log_p).sum())
        if mask.dim() > 1:
            self._add_sequences(t, mask)
        self._sample(torch.stack([log_p, log_r, advantages, (c == 0).to(c.dtype)], -1))

    def _add_moves(self, move: Move, advantages: Tensor, weighted: Tensor) -> None:
        """Count how far tokens went: all of them, and those that went where their advantage pushes."""
        both = move.outcomes()
        found = [get_divergence(name).of(both).clamp_(0.0, MOST_REACHED) for name in MEASURES]
        for name, reached in zip(MEASURES, found, strict=True):
            self.all[name].add(reached)
            self.largest[name] = max(self.largest[name], float(reached.max()))
            self.sums[name] += float(reached.sum(dtype=torch.float64))
        weights = torch.minimum(weighted.abs(), MOST_RATIO * advantages.abs())
        *outward, weights = torch.stack([*found, move.rise.abs(), weights])[:, move.log_r * advantages > 0]
        for name, reached in zip(self.outward, outward, strict=True):
            self.outward[name].add(reached, weights)

    def _add_sequences(self, t: Tokens, mask: Tensor) -> None:
        log_r = t.log_r.double().clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO)
        k3, k1 = (torch.expm1(log_r) - log_r).sum(-1), -log_r.sum(-1)  # both 0 in padding
        there = mask.any(-1)
        k3 = k3[there]
        self.sequences.append(torch.stack([there.sum().double(), k3.sum(), k3.max(), k1[there].sum()]))

    def _sample(self, rows: Tensor) -> None:
        """Keep every n-th token, n doubled when they become too many."""
        self.kept.append(rows[(-self.place) % self.stride :: self.stride].clone())  # a view would hold all rows
        self.place += len(rows)
        while sum(len(x) for x in self.kept) > SAMPLE:
            self.stride, whole = 2 * self.stride, torch.cat(self.kept)
            self.kept = [whole[::2].clone()]

    def sample(self) -> dict[str, Tensor]:
        """Return up to 20,000 tokens, evenly spread: log_p, log_r, advantages and zero (1 where c = 0)."""
        names = ("log_p", "log_r", "advantages", "zero")
        return dict(zip(names, torch.cat(self.kept).unbind(-1), strict=True))

    def as_dict(self, clip: Clip, stats: ClipStats, tokens: int) -> dict[str, Any]:
        """Return the parts of an `Explanation` that these sums know."""
        effect = [_row(stats, sign, bucket) for sign in SIGNS for bucket in (None, *range(len(BUCKETS)))]
        whole = effect[0]
        rows = (("positive", 2), ("negative", 0), ("zero", 1))
        signs = {name: float(stats.sums[i, :, 0].sum()) / tokens for name, i in rows}
        sequences = torch.stack(self.sequences) if self.sequences else None
        n = None if sequences is None else int(sequences[:, 0].sum())
        counts = {"tokens": tokens, "sequences": n, **signs}
        counts |= {"surprise": self.sums["surprise"] / tokens, "rare": int(self.sums["rare"])}
        described: dict[str, Any] = {
            "name": clip.name,
            "is": repr(clip),
            "looks_at": clip.looks_at,
            "paper": clip.paper,
            "anchor": clip.anchor if isinstance(clip, Anchored) else "old",
        }
        described["beyond_simplex"] = self.sums["off_simplex"] / tokens
        return {
            "counts": counts,
            "clip": described,
            "idle": self._idle(clip, whole, counts, tokens),
            "effect": effect,
            "divergence": {m: self._reached(m, tokens) for m in MEASURES},
            "sequence": None if sequences is None or n is None else _sequence(sequences, n),
            "equivalent": self._equivalent(whole, stats),
        }

    def _idle(self, clip: Clip, whole: dict[str, Any], counts: dict[str, Any], tokens: int) -> dict[str, Any]:
        """Say whether the clip does nothing, and why."""
        why, kept, opposed = None, whole["gradient_kept"], whole["gradient_opposed"]  # None where every r A rounds to 0
        same = kept is not None and abs(kept - 1) < NOTHING and opposed < NOTHING and whole["zero_grad"] == 0
        if counts["zero"] == 1:
            why = "no_advantage"
        elif not same and self.sums["taken"] > 0:  # some clips act where every ratio is 1
            why = None
        elif self.sums["still"] == tokens and not isinstance(clip, Anchored):  # that one measures another ratio
            why = "one_update"
        else:
            why = "no_clip" if clip.name == "none" else "not_reached"
        return {
            "idle": why is not None,
            "why": why,
            "ratio_one": self.sums["still"] / tokens,
            "ratio_one_uncertain": self.sums["stuck"] / max(self.sums["free"], 1.0),
            "ratio_beyond_2x": self.sums["beyond"] / tokens,
            "largest_log_ratio": self.largest["log_ratio"],
        }

    def _reached(self, measure: str, tokens: int) -> dict[str, float]:
        largest = self.largest[measure]
        p99 = min(self.all[measure].quantile(0.99), largest)
        return {"mean": self.sums[measure] / tokens, "p99": p99, "max": largest}

    def _equivalent(self, whole: dict[str, Any], stats: ClipStats) -> dict[str, Any]:
        """Return the radii and the eps that take as much: as many tokens, or else as much of the gradient."""
        rows = stats.sums.sum((0, 1))
        tokens, free = float(rows[0]), float(rows[FIELDS.index("gradient_free")])
        shut, lost = whole["zero_grad"] * tokens, free - float(rows[FIELDS.index("gradient_kept")])
        changed = max(abs(lost), float(rows[FIELDS.index("gradient_opposed")])) > NOTHING * free
        by = "zero_gradient" if shut > 0 else "gradient_kept" if lost > NOTHING * free else "other" if changed else None
        if by == "zero_gradient":
            target, share = shut, whole["zero_grad"]
        else:
            target, share = (lost, lost / free) if by == "gradient_kept" else (0.0, 0.0)
        found: dict[str, Any] = {"by": by, "share": share}
        for name, measure in EQUAL.items():
            tail = self.outward[measure]
            sums = tail.weights if by == "gradient_kept" else tail.counts
            enough = float(sums.sum()) >= max(target / 1.02, 1e-30)  # else nothing has moved outward, or too little
            if by == "other" or not enough:
                found[name] = None
            elif by is None:  # anything wider than what was reached
                found[name] = {"value": max(tail.quantile(1.0) * (1 + 2**-10), RADII[0]), "share": 0.0}
            else:
                least = RADII[0] if measure != "eps" else 0.0
                value, taken = tail.threshold(target, weighted=by == "gradient_kept", least=least)
                found[name] = {"value": value, "share": taken / (free if by == "gradient_kept" else tokens)}
        return found


def _row(stats: ClipStats, sign: str, bucket: int | None) -> dict[str, Any]:
    """Return what happened to the tokens of one sign of A and one bucket of p; None for what has no tokens."""
    row, place = SIGNS[sign], slice(None) if bucket is None else slice(bucket, bucket + 1)
    sums, most = stats.sums[:, place].sum(1), stats.maxima[:, place].amax(1)
    sums, most = (sums.sum(0), most.amax(0)) if row is None else (sums[row], most[row])
    x = dict(zip(FIELDS, (float(y) for y in sums), strict=True))
    n, free = x["tokens"], x["gradient_free"]
    shares = {name: x[name] / n if n else None for name in COUNTS[1:]}
    shares["zero_grad"] = (x["zero_grad_below"] + x["zero_grad_above"]) / n if n else None
    kept = {name: x[name] / free if free else None for name in ("gradient_kept", "gradient_opposed")}
    kl = {"kl_mean": x["kl"] / n if n else None, "kl_max": float(most[0]) if n else None}
    where = {"sign": sign, "bucket": "all" if bucket is None else BUCKETS[bucket]}
    return {**where, "tokens": int(n), "share": n / max(float(stats.sums[..., 0].sum()), 1.0), **shares, **kept, **kl}


def _sequence(parts: Tensor, n: int) -> dict[str, float]:
    """Return KL(old || new) of whole sequences, estimated from their tokens: E[r - 1 - log r] is each state's."""
    return {
        "kl_mean": float(parts[:, 1].sum()) / n,
        "kl_max": float(parts[:, 2].max()),
        "minus_log_ratio_mean": float(parts[:, 3].sum()) / n,
    }
