"""What a clip did to a batch, on one axis for every clip: sums that add up over batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bandpo._input import InputError, nearest
from bandpo.clips.base import Clip, Region
from bandpo.operator.family import get_divergence
from bandpo.operator.tokens import TINY, Tokens, above

EDGES = (0.01, 0.1, 0.5, 0.9)
BUCKETS = tuple(f"p{low:g}-{high:g}" for low, high in zip((0.0, *EDGES), (*EDGES, 1.0), strict=True))
SIGNS = ("neg", "zero", "pos")  # of the advantage
COUNTS = ("tokens", "outside_below", "outside_above", "capped", "zero_grad_below", "zero_grad_above")
GRADIENTS = ("gradient_kept", "gradient_opposed", "gradient_free")
MEASURES = ("kl", "tv", "divergence")
FIELDS = (*COUNTS, *GRADIENTS, *MEASURES)
BRIEF = (
    "outside_below", "outside_above", "capped", "zero_grad_below", "zero_grad_above", "zero_grad",
    "gradient_kept", "gradient_opposed", "kl_mean",
)  # fmt: skip
MOST_RATIO = math.exp(20.0)  # no gradient counts for more than e^20 |A|
MOST_REACHED = 1e29  # nor a divergence for more than this, so that sums stay finite
_NAMES = (*COUNTS[1:], "zero_grad", *GRADIENTS[:2], *(f"{m}_{x}" for x in ("mean", "max") for m in MEASURES), "share")
_ROWS = tuple(f"{sign}{bucket}" for sign in ("", "/pos", "/neg") for bucket in ("", *(f"/{b}" for b in BUCKETS)))
_PLACES = {f"{name}{row}": i for i, (row, name) in enumerate((r, n) for r in _ROWS for n in _NAMES)}  # of all metrics
PIECE, LARGE_PIECE = 1 << 14, 1 << 22  # tokens counted at a time on a CPU, and elsewhere: little memory, exact sums


@dataclass(frozen=True)
class ClipStats:
    """Sums over tokens by sign of the advantage and bucket of old probability.

    Add two to join batches; to join ranks, sum `sums` and take the maximum of `maxima`. Counts stay exact, so the order
    makes no difference.

    Args:
        sums: shape (3 signs, buckets, fields), float64 (float32 where there is none): counts of tokens, outside_below,
            outside_above (of the region, its cap apart), capped (past the cap alone), zero_grad_below, zero_grad_above
            (c = 0 with r < 1, r > 1, where A is not 0); sums of max(0, c sgn A), max(0, -c sgn A) and |r A|, with no
            ratio above e^20; sums of the divergence reached in kl, tv and the clip's own measure.
        maxima: shape (3 signs, buckets, 3): the largest kl, tv and own divergence reached.
    """

    sums: Tensor
    maxima: Tensor

    def __add__(self, other: ClipStats) -> ClipStats:
        return ClipStats(self.sums + other.sums, torch.maximum(self.maxima, other.maxima))

    def metrics(self, prefix: str = "", only: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Return the shares, as tensors of no dimension; 0 where there is no token, and all kept where every A is 0.

        Args:
            prefix: put before each name.
            only: the names wanted, as `BRIEF`, or one; all when None.

        Returns:
            outside_below, outside_above, capped, zero_grad_below, zero_grad_above, zero_grad (shares of the tokens);
            gradient_kept, gradient_opposed (shares of sum |r A|); kl_mean, kl_max, tv_mean, tv_max, divergence_mean,
            divergence_max (reached, the last pair in the clip's own measure). The same by bucket as NAME/BUCKET, with
            share/BUCKET; and for A > 0 and A < 0 alone as NAME/pos, NAME/pos/BUCKET, NAME/neg, NAME/neg/BUCKET.

        Raises:
            InputError: `only` names what there is not.
        """
        only = [name for name in _PLACES if name != "share"] if only is None else only  # the share of all is 1
        wanted = [only] if isinstance(only, str) else list(only)
        for name in set(wanted) - _PLACES.keys():
            raise InputError(f"only={name!r}: is no metric{nearest(name, _PLACES)}; must be one, or None for all")
        rows = torch.stack([self.sums.sum(0), self.sums[2], self.sums[0]])  # all signs, A > 0, A < 0
        rows = torch.cat([rows.sum(1, keepdim=True), rows], 1)
        most = torch.stack([self.maxima.amax(0), self.maxima[2], self.maxima[0]])
        most = torch.cat([most.amax(1, keepdim=True), most], 1).to(rows.dtype)
        n, counts, kept, opposed, free, reached = torch.split(rows, [1, len(COUNTS) - 1, 1, 1, 1, len(MEASURES)], -1)
        tokens, opposed = n.clamp(min=1.0), opposed / free.clamp(min=TINY)
        shares, kept = counts / tokens, torch.where(free == 0, n.clamp(max=1.0), kept / free)
        zero = shares[..., -2:].sum(-1, keepdim=True)
        found = torch.cat([shares, zero, kept, opposed, reached / tokens, most, n / tokens[0, 0]], -1).float().flatten()
        return {prefix + name: found[_PLACES[name]] for name in wanted}


@torch.no_grad()
def count(clip: Clip, tokens: Tokens, c: Tensor) -> ClipStats:
    """Return the sums over tokens of what a clip did.

    Args:
        clip: the clip; its region, where it has one, says what is outside.
        tokens: what it looked at.
        c: its coefficient for them.

    Returns:
        `ClipStats`.
    """
    region, bins = clip.boundary, len(SIGNS) * len(BUCKETS) + 1  # the last for padding
    sides = () if region is None or region.splits else _sides(region, tokens)
    wide = torch.float32 if c.device.type == "mps" else torch.float64
    sums = torch.zeros(len(FIELDS), bins, dtype=wide, device=c.device)
    maxima = torch.zeros(len(MEASURES), bins, dtype=c.dtype, device=c.device)
    for t, mask, c_piece, *side in _pieces(tokens, c, *sides):
        index = _bins(t, mask).flatten()
        rows = torch.stack(_columns(clip, t, c_piece, *(side or _sides(region, t)))).reshape(len(FIELDS), index.numel())
        sums += torch.zeros(len(FIELDS), bins, dtype=c.dtype, device=c.device).index_add(1, index, rows)
        reached = rows[-len(MEASURES) :]
        maxima = maxima.scatter_reduce(1, index.expand_as(reached), reached, "amax")
    # contiguous, because torch.distributed reduces memory, whatever the strides
    return ClipStats(*(x[:, :-1].T.contiguous().view(len(SIGNS), len(BUCKETS), -1) for x in (sums, maxima)))


def _sides(region: Region | None, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Return on which side of the region without its cap each token is, and 1 where it is past the cap alone."""
    if region is None:
        return (torch.zeros_like(tokens.log_r),) * 2
    side, uncapped = region.side(tokens), region.uncapped()
    inside = side if uncapped is region else uncapped.side(tokens)
    return inside, above(side - inside, 0.0)


def _bins(tokens: Tokens, mask: Tensor | None) -> Tensor:
    """Return the bin of each token, by the sign of its advantage and its old probability."""
    index = 5 * (torch.sign(tokens.advantages).nan_to_num() + 1)
    for edge in EDGES:
        index += above(tokens.log_p, math.log(edge))
    return (index if mask is None else torch.where(mask, index, len(SIGNS) * len(BUCKETS))).long()


def _columns(clip: Clip, t: Tokens, c: Tensor, side: Tensor, capped: Tensor) -> tuple[Tensor, ...]:
    """Return the `FIELDS` of each token."""
    sign, most, rising = torch.sign(t.advantages), MOST_RATIO * t.advantages.abs(), above(t.log_r, 0.0)
    shut, pushed = (c == 0) * sign.abs(), (c * sign).clamp_(-most, most)
    # far below any radius a sum over tokens needs no digits; rounding alone is below 0
    nats, own = get_divergence("kl"), get_divergence("kl") if clip.boundary is None else clip.boundary.measure
    both = t.outcomes()
    kl, tv = nats.of(both, digits=False).clamp_(0.0, MOST_REACHED), both[0].moved.abs().clamp_(max=MOST_REACHED)
    mine = kl if own is nats else own.of(both, digits=False).clamp_(0.0, MOST_REACHED)
    return (
        torch.ones_like(c), side.clamp(max=0.0).neg(), side.clamp(min=0.0), capped,
        shut * (1 - rising), shut * rising, pushed.clamp(min=0.0), pushed.clamp(max=0.0).neg_(),
        torch.minimum(t.weighted.abs(), most), kl, tv, mine,
    )  # fmt: skip


def _pieces(tokens: Tokens, *more: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield tokens, their mask and more tensors, in pieces small enough that their rows hold little memory."""
    size = PIECE if tokens.log_p.device.type == "cpu" else LARGE_PIECE
    if tokens.log_p.numel() <= size or torch.compiler.is_compiling():
        yield tokens, tokens.mask, *more
        return
    flat = [torch.split(x.flatten(), size) for x in (tokens.log_q, tokens.log_p, tokens.advantages, *more)]
    masks = [None] * len(flat[0]) if tokens.mask is None else torch.split(tokens.mask.flatten(), size)
    for mask, *piece in zip(masks, *flat, strict=True):
        yield Tokens(*piece[:3]), mask, *piece[3:]
