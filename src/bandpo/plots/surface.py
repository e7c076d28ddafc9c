"""What a clip does over all old probabilities and ratios: c / A as an array, and facts read off it.

A clip that looks at more than its token is drawn in a slice: something definite is assumed of the rest, and said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bandpo.clips.base import Clip, Region
from bandpo.operator.band import Bounds, binary_divergence
from bandpo.operator.tokens import Tokens

LOW_P, MOST_R = 1e-4, 20.0  # the axes: p from LOW_P to 1, r from 1 / MOST_R to MOST_R
SIZE = 97  # of the array each way; odd, so that r = 1 is one of the ratios
COARSE = 31  # of it where every cell is a batch of its own, and only shares of the area are asked for
BLIND_P = 1e-6  # stands for any p where c does not depend on it; no ratio drawn takes it past 1
RARE, MOVED = (0.001, 0.01, 0.1, 0.5, 0.9), (0.5, 2.0, 5.0)


@dataclass(frozen=True)
class Slice:
    """What is assumed of everything but the token that is drawn.

    Args:
        title: in a few words, "" where nothing need be.
        text: in a sentence, "" where nothing need be.
        beside: p, r and A of the other tokens of its sequence, which is a batch of its own.
        last: whether the token comes after them, not before.
        flat: whether c does not depend on p in this slice; asked of clips that look at a batch, each cell of which
            is costly.
        own: value of an optional tensor at the token.
        others: the same at the others.
    """

    title: str = ""
    text: str = ""
    beside: tuple[tuple[float, float, float], ...] = ()
    last: bool = False
    flat: bool = False
    own: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, float] = field(default_factory=dict)


def _entropy(title: str, own: float, others: float) -> Slice:
    text = f"The token has an entropy of {own:g} nats, the nine others of its response {others:g}."
    return Slice(title, text, ((0.5, 1.0, 1.0),) * 9, own={"entropies": own}, others={"entropies": others})


def _mix(title: str, gains: int, losses: int) -> Slice:
    text = f"The rest of the batch is {gains} tokens with A > 0 and {losses} with A < 0, all at r = 1."
    return Slice(title, text, ((0.5, 1.0, 1.0),) * gains + ((0.5, 1.0, -1.0),) * losses, flat=True)


_FEW = (
    Slice("1 token of 1000", "The 999 other tokens of its sequence stay at r = 1.", ((0.5, 1.0, 1.0),) * 999),
    Slice("all moved alike", "Every token of its sequence has the same r."),
)
_ALIKE = (Slice("all moved alike", "Every token of its sequence has the same p and r."),)
SLICES: dict[str, tuple[Slice, ...]] = {
    "gspo": _FEW,
    "gmpo": _FEW,
    "opsm": _ALIKE,
    "vespo": (Slice("no other moved", "The other tokens of its sequence stay at r = 1, however many they are."),),
    "trm": (Slice("no other too far", "No other token of its sequence is past the radius."),),
    "band_sequence": (Slice("no other too far", "No other token of its sequence is past the radius."),),
    "cppo": (
        Slice("first token", "It is the first token of its sequence."),
        Slice(
            "drifted prefix",
            "It is the last of eleven tokens; each of the ten before it has moved by .06 in probability.",
            ((0.5, 1.12, 1.0),) * 10,
            last=True,
        ),
    ),
    "archer": (_entropy("low entropy", 0.0, 1.0), _entropy("high entropy", 2.0, 1.0)),
    "bapo": (_mix("mostly gains", 80, 20), _mix("mostly losses", 20, 80)),
    "m2po": (Slice("all moved alike", "Every token of the batch has the same r, and the same sign of A.", flat=True),),
    "kl_cov": (
        Slice("a chosen token", "The token is among those of the largest covariance; A is 1 or -1.", flat=True),
    ),
    "clip_cov": (
        Slice(
            "where it may be chosen",
            "The rest of the batch is nine tokens of p = .5 and A = 0 at r = 1, and A is 1 or -1; of all tokens within "
            "the range of covariance only a small share is dropped, here the one that is drawn.",
            ((0.5, 1.0, 0.0),) * 9,
        ),
    ),
    "topr": (
        Slice("reward > 0", "The reward is positive.", own={"rewards": 1.0}),
        Slice("reward <= 0", "The reward is not positive.", own={"rewards": 0.0}),
    ),
    "dppo_topk": (
        Slice("others stay", "The others keep their odds, so that the state's KL is the binary one, its least value."),
    ),
    "maspo": (Slice("", "A is 1 or -1."),),
    "dro": (Slice("", "A is 1 or -1."),),
    "truly_ppo": (Slice("", "A is 1 or -1."),),
}
_ALONE = {"sequence": "It is the only token of its sequence.", "batch": "It is the only token of the batch."}


def slices(clip: Clip) -> tuple[Slice, ...]:
    """Return the slices in which a clip is drawn; one for each row of its picture.

    Args:
        clip: any clip.

    Returns:
        At least one slice; those of a clip that is not in `SLICES` assume that its token is alone.
    """
    return SLICES.get(clip.name) or (Slice("alone" if clip.looks_at in _ALONE else "", _ALONE.get(clip.looks_at, "")),)


def is_flat(clip: Clip, piece: Slice) -> bool:
    """Return whether c is the same for every p in the slice.

    Args:
        clip: any clip.
        piece: one of its slices.

    Returns:
        Whether it is.
    """
    return piece.flat or (clip.looks_at != "batch" and not clip.uses_p)


def axes(size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities and the log-ratios of the array: the middles of `size` cells each.

    Args:
        size: how many.

    Returns:
        Two float64 tensors of shape (size,).
    """
    middle = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return math.log(LOW_P) * (1 - middle), math.log(MOST_R) * (2 * middle - 1)


def coefficient(clip: Clip, piece: Slice, log_p: Tensor, log_r: Tensor, sign: float) -> Tensor:
    """Return c / A of tokens, each in the slice; NaN where q would be above 1.

    Args:
        clip: any clip.
        piece: the slice.
        log_p: float64, (n,).
        log_r: float64, (n,).
        sign: A, 1 or -1.

    Returns:
        Float64 tensor, (n,).
    """
    tokens = (
        [_join(clip, piece, log_p, log_r, sign)]
        if clip.looks_at != "batch"
        else [_join(clip, piece, log_p[i : i + 1], log_r[i : i + 1], sign) for i in range(len(log_p))]
    )
    c = torch.cat([clip.coefficient(t)[:, -1 if piece.last else 0] for t in tokens])
    return torch.where(log_p + log_r > 0, torch.nan, c / sign + 0.0)  # 0, not -0


def _join(clip: Clip, piece: Slice, log_p: Tensor, log_r: Tensor, sign: float) -> Tokens:
    """Each token beside the others of the slice, as a row."""
    n = len(log_p)

    def row(own: Tensor, others: list[float]) -> Tensor:
        rest = own.new_tensor(others).expand(n, -1)
        return torch.cat([rest, own[:, None]] if piece.last else [own[:, None], rest], -1)

    old = row(log_p, [math.log(p) for p, _, _ in piece.beside])
    new = row((log_p + log_r).clamp(max=0.0), [math.log(p * r) for p, r, _ in piece.beside])
    given = {
        name: row(torch.full_like(log_p, piece.own.get(name, 1.0)), [piece.others.get(name, 1.0)] * len(piece.beside))
        for name in ("entropies", "rewards")
        if name in clip.needs
    }
    return Tokens(
        new,
        old,
        row(torch.full_like(log_p, sign), [a for _, _, a in piece.beside]),
        rollout_logps=old,
        state_divergence=binary_divergence(new, old) if "state_divergence" in clip.needs else None,
        **given,
    )


def limits(region: Region, piece: Slice, log_p: Tensor) -> Bounds:
    """Return the bounds of tokens, each in the slice.

    Args:
        region: any region.
        piece: the slice.
        log_p: float64, (n,).

    Returns:
        `Bounds` of shape (n,).
    """
    one = region.looks_at == "batch"  # then all tokens of the batch have the same
    own = log_p[:1] if one else log_p
    tokens = _join(region, piece, own, torch.zeros_like(own), 1.0)
    bounds = region.limits(tokens)
    at = -1 if piece.last else 0
    return Bounds(bounds.log_low[:, at].expand_as(log_p), bounds.log_high[:, at].expand_as(log_p))


def surface(clip: Clip, piece: Slice, sign: float, size: int = SIZE) -> Tensor:
    """Return c / A over the axes.

    Args:
        clip: any clip.
        piece: the slice, one of `slices(clip)`.
        sign: A, 1 or -1.
        size: of the array each way.

    Returns:
        Float64 tensor, (ratio, probability); NaN where q would be above 1.
    """
    log_p, log_r = axes(size)
    beyond = log_p + log_r[:, None] > 0
    if is_flat(clip, piece):  # one column will do
        column = coefficient(clip, piece, torch.full_like(log_r, math.log(BLIND_P)), log_r, sign)
        return torch.where(beyond, torch.nan, column[:, None])
    grid_p, grid_r = log_p.expand(size, size), log_r[:, None].expand(size, size)
    return coefficient(clip, piece, grid_p.flatten(), grid_r.flatten(), sign).view(size, size)


@dataclass(frozen=True)
class Facts:
    """What a picture shows, in numbers.

    Args:
        zero_above: share of the area above r = 1, within the simplex, in which c = 0.
        zero_below: the same below r = 1.
        against: share of the whole area, within the simplex, in which c has the sign against A.
        least: least c / A.
        most: greatest c / A.
        same: whether c / A is r everywhere, that is no clip at all.
    """

    zero_above: float
    zero_below: float
    against: float
    least: float
    most: float
    same: bool


def facts(array: Tensor) -> Facts:
    """Return the facts of an array of `surface`.

    Args:
        array: c / A.

    Returns:
        The facts.
    """
    log_r = axes(len(array))[1][:, None].expand_as(array)
    real = ~array.isnan()
    above, below = (float((array[real & side] == 0).double().mean()) for side in (log_r > 0, log_r < 0))
    inside = array[real]
    return Facts(
        above,
        below,
        float((inside < 0).double().mean()),
        float(inside.min()),
        float(inside.max()),
        bool(torch.allclose(inside, log_r[real].exp())),
    )


def reach(clip: Clip, piece: Slice, sign: float, probabilities: Sequence[float] = RARE) -> list[float | None]:
    """Return how far tokens may move outward before they have no gradient outward any more.

    Args:
        clip: any clip.
        piece: the slice.
        sign: A, 1 or -1.
        probabilities: the tokens' old probabilities.

    Returns:
        For each the ratio: the first one, going out from 1, past which c / A is 0 or below; None where there is none
        up to q = 1, or down to r = 1e-4, and where c / A only fades away.
    """
    if not is_flat(clip, piece):
        return [_edge(clip, piece, p, sign) for p in probabilities]
    edge = _edge(clip, piece, BLIND_P, sign)
    return [None if edge is None or edge * p >= 1 else edge for p in probabilities]


def _edge(clip: Clip, piece: Slice, p: float, sign: float) -> float | None:
    far = -math.log(p) * (1 - 1e-9) if sign > 0 else math.log(1e-4)

    def along(shares: Tensor) -> Tensor:
        return coefficient(clip, piece, torch.full_like(shares, math.log(p)), shares * far, sign)

    shares = torch.arange(1, 129, dtype=torch.float64) / 128
    c = torch.cat([torch.ones(1, dtype=torch.float64), along(shares)])  # on-policy first
    gone = c <= 0
    if not bool(gone.any()):
        return None
    first = int(gone.to(torch.int8).argmax())
    if 0 <= float(c[first]) and float(c[first - 1]) < 1e-6:  # too small for a float
        return None
    edge = _bisect(lambda x: float(along(shares.new_tensor([x]))) <= 0, (first - 1) / 128, first / 128)
    return math.exp(far * edge)


def _bisect(is_out: Callable[[float], bool], inside: float, out: float) -> float:
    for _ in range(32):
        middle = (inside + out) / 2
        inside, out = (inside, middle) if is_out(middle) else (middle, out)
    return inside
