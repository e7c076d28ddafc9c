"""What every adapter needs: the clip from the user's words, the two ways in which a host gets it, and refusals.

A hard gate goes as two margins, where the host clamps a ratio. Every other clip goes as advantages c / r, with the
host's own clip opened wide: the host's own r A' then has the gradient c.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeGuard

import torch
from torch import Tensor

from bandpo import Band, Clip, ClipStats, Fixed, Region, Tokens, get_clip
from bandpo._input import InputError, as_arguments, nearest
from bandpo.clips import anchored
from bandpo.clips.anchored import Anchored
from bandpo.clips.base import MOST
from bandpo.loss.stats import BRIEF, BUCKETS, FIELDS, SIGNS, count

CLIP = Band.name  # the clip of every adapter whose user names none
HOW_MUCH = ("brief", "full", "none")  # of the metrics is logged
HOST = "host"  # the clip that leaves the host's own alone and only measures

# Nine sums, enough for all of BRIEF but `capped`.
_BRIEF_SUMS = tuple(f"{field}_sum" for field in FIELDS if field not in ("capped", "tv", "divergence"))
_PLACES = [f"{sign}{bucket}" for sign in ("", "/pos", "/neg") for bucket in ("", *(f"/{b}" for b in BUCKETS))]
_SUMS = [f"{field}_sum{place}" for place in _PLACES for field in FIELDS]
_SCALE = 2.0**20  # ClipStats takes counts: below one token, which an average may be, it would no longer divide


def make_clip(
    clip: object, clip_args: Mapping[str, Any] | None, anchor: str = "old", *, scheduled: bool = False
) -> Clip:
    """Return the clip that `clip` and `clip_args` name.

    Args:
        clip: a name, as `bandpo.get_clip` takes it, a clip, or any object with `coefficient(tokens)`.
        clip_args: the arguments of the clip's class, or None for its own defaults.
        anchor: which old policy it measures from; see `bandpo.clips.anchored`.
        scheduled: whether the adapter knows how far training is, and calls `Clip.at`.

    Returns:
        The clip.

    Raises:
        InputError: the clip does not exist or does not take these arguments, or has a schedule where none can act.
    """
    made = anchored(get_clip(clip, **as_arguments(clip_args)), anchor)
    if made.at(0.0) is not made and not scheduled:
        raise InputError(
            f"clip_args={dict(clip_args or {})!r}: has a schedule, and this host does not say how far training is; "
            "give a number, or make the clip of each step yourself with clip.at(step / steps)"
        )
    return made


def check_kept(clip: object, clip_args: Mapping[str, Any] | None) -> None:
    """Raise for a clip that a checkpoint of the host's configuration could not hold.

    Args:
        clip: as in `make_clip`.
        clip_args: as in `make_clip`.

    Raises:
        InputError: it cannot be pickled; says how to name it instead.
    """
    try:
        pickle.dumps((clip, clip_args))
    except Exception as error:
        given = f"clip={clip!r}" if not isinstance(clip, str) else f"clip_args={dict(clip_args or {})!r}"
        raise InputError(
            f"{given}: cannot be saved with a checkpoint ({error}); must be importable: put it into a file and give "
            "its import path, as in 'path/to/file.py:name'"
        ) from None


def refuse_density(clip: Clip, what: str) -> None:
    """Raise for actions that are not discrete, unless the clip is the same for every probability.

    Args:
        clip: any clip.
        what: what the host has, for the message.

    Raises:
        InputError: the clip needs probabilities.
    """
    if clip.uses_p:
        raise InputError(
            f"{what}: a density is no probability, and clip {clip.name!r} needs one; use discrete actions, or "
            "clip='fixed'"
        )


def refuse_sequences(clip: Clip, what: str) -> None:
    """Raise for a clip that looks at whole sequences, in a host that has none.

    Args:
        clip: any clip.
        what: what the host has instead, for the message.

    Raises:
        InputError: the clip needs sequences.
    """
    if clip.looks_at == "sequence":
        raise InputError(
            f"clip={clip.name!r}: looks at whole sequences, and {what}; must be a clip of single tokens, such as "
            "clip='band'"
        )


def refuse_needs(clip: Clip, has: Iterable[str], what: str) -> None:
    """Raise for a clip that needs what the host does not have.

    Args:
        clip: any clip.
        has: which of the optional tensors of `bandpo.Tokens` the host has.
        what: the host, for the message.

    Raises:
        InputError: a tensor is missing; says which.
    """
    missing = [name for name in clip.needs if name not in set(has)]
    if isinstance(clip, Anchored) and missing == ["rollout_logps"] and missing[0] not in clip.clip.needs:
        raise InputError(
            f"clip_anchor={clip.anchor!r}: needs rollout_logps, which {what} does not hand over; must be 'old', the "
            "default"
        )
    if missing:
        raise InputError(
            f"clip={clip.name!r}: needs {', '.join(missing)}, which {what} does not hand over; must be a clip without, "
            "such as clip='band', or a loop of your own with bandpo.policy_loss"
        )


def by_margins(clip: Clip | None) -> TypeGuard[Region]:
    """Return whether a clip goes as two margins per token; any other goes as advantages (`shape`)."""
    return isinstance(clip, Region) and clip.as_bounds


def margins(clip: Region, old_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Return a region's bounds as the two margins of a host that clamps a ratio to [1 - eps_low, 1 + eps_high].

    Args:
        clip: any region.
        old_logps: log-probabilities in the ratio's denominator, any shape; NaN is padding.

    Returns:
        (eps_low, eps_high), detached float32 of the tokens' shape: 0 <= eps_low <= 1, 0 <= eps_high, all finite.
    """
    return clip.bounds(old_logps.detach()).margins()


@dataclass(frozen=True)
class Shaped:
    """What a host is given when a clip goes as advantages, and what the clip did, counted when it is asked for.

    Args:
        advantages: c / r, of the tokens' shape, 0 in padding.
        old_logps: as they were; where |log r| > 20 moved so that it is 20, and in padding so that r = 1.
        clip: the clip.
        tokens: what it looked at.
        coefficient: its c for them.
    """

    advantages: Tensor
    old_logps: Tensor
    clip: Clip
    tokens: Tokens
    coefficient: Tensor

    @property
    def stats(self) -> ClipStats:
        """What the clip did."""
        return count(self.clip, self.tokens, self.coefficient)

    @property
    def shut(self) -> Tensor:
        """1 where the clip takes the whole gradient of a token that has one, else 0."""
        return ((self.coefficient == 0) & (self.tokens.advantages != 0)).to(self.coefficient.dtype)

    @property
    def zero_grad(self) -> Tensor:
        """The share of `shut` tokens, for the place where a host has its own clip's share."""
        mask = self.tokens.mask
        return self.shut.mean() if mask is None else self.shut.sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def shape(
    clip: Clip,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    rollout_logps: Tensor | None = None,
    entropies: Tensor | None = None,
) -> Shaped:
    """Return a clip as advantages: a host that computes -r A' with them has the gradient c.

    Args:
        clip: any clip.
        logps: log-probabilities under the policy in training, (batch, token) or any shape.
        old_logps: those in the ratio's denominator, same shape.
        advantages: per token or per sequence.
        mask: 1 for tokens, 0 for padding, same shape, or None.
        rollout_logps: as in `bandpo.Tokens`.
        entropies: as in `bandpo.Tokens`.

    Returns:
        `Shaped`.
    """
    t = Tokens(logps, old_logps, advantages, mask, rollout_logps, entropies)
    c, new = clip.coefficient(t), logps.detach()
    there = new > -math.inf  # a token that has become impossible: r = 0, and so is its gradient, whatever old is
    near = t.log_r.abs() <= MOST if t.mask is None else (t.log_r.abs() <= MOST) & t.mask
    # a little nearer than 20, where verl's own clamp would take the gradient
    old = torch.where(near | ~there, old_logps.detach(), new - t.log_r.clamp(-MOST + 0.1, MOST - 0.1).to(new.dtype))
    far = c * torch.exp((old - new).to(c.dtype))
    far = torch.where(there if t.mask is None else t.mask & there, far, 0.0)
    return Shaped(torch.where(near, clip.advantages(t), far), old, clip, t, c)


def has_value(clip: Clip) -> bool:
    """Return whether the clip is the gradient of an objective whose value the loss can show (`exact_value`)."""
    return type(clip).objective is not Clip.objective


def refuse_replaced(config: Any, defaults: Mapping[str, Any], clip: object) -> None:
    """Raise for a setting of the host that the clip replaces, where the user has given it.

    Args:
        config: the host's configuration.
        defaults: the host's default by the setting's name.
        clip: the clip that the user asked for.

    Raises:
        InputError: a setting has another value than its default.
    """
    for name, default in defaults.items():
        if getattr(config, name) != default:
            raise InputError(
                f"{name}={getattr(config, name)!r}: must be left out, clip={clip!r} sets the bounds; for a fixed "
                "clip give clip='fixed' and clip_args={'eps_low': ..., 'eps_high': ...}"
            )


def refuse_strays(place: str, given: Iterable[str], known: tuple[str, ...] = ()) -> None:
    """Raise for a name that is meant for the clip where only `clip` and `clip_args` are read.

    Args:
        place: where the names are, for the message.
        given: the names; what has nothing to do with a clip is left alone.
        known: names that begin with "clip" and are the host's own.

    Raises:
        InputError: an argument of a clip outside `clip_args`, or a misspelt name.
    """
    arguments = {f.name for kind in (Band, Fixed) for f in fields(kind)}
    for name in given:
        if name in arguments:
            raise InputError(f"{place}: {name!r} is an argument of the clip; write clip_args={{{name!r}: ...}}")
        if name == "dual_clip":
            raise InputError(f"{place}: 'dual_clip' is unknown; must be left out, this adapter has none")
        if name.startswith("clip") and name not in ("clip", "clip_args", "clip_metrics", *known):
            raise InputError(f"{place}: {name!r} is unknown; the clip takes 'clip', 'clip_args' and 'clip_metrics'")


def check_how_much(how_much: object) -> None:
    """Raise InputError unless `clip_metrics` is one of brief, full and none."""
    if how_much not in HOW_MUCH:
        raise InputError(
            f"clip_metrics={how_much!r}: must be one of {', '.join(HOW_MUCH)}{nearest(how_much, HOW_MUCH)}"
        )


def chosen_metrics(stats: ClipStats, how_much: str, prefix: str) -> dict[str, Tensor]:
    """Return what is logged of the statistics: under ten keys for "brief", all for "full", nothing for "none".

    Args:
        stats: what the clip did.
        how_much: brief, full or none.
        prefix: put before each name.

    Returns:
        Name to tensor of no dimension.
    """
    return {} if how_much == "none" else stats.metrics(prefix, BRIEF if how_much == "brief" else None)


def picked(metrics: Mapping[str, Tensor], how_much: str, prefix: str) -> dict[str, Tensor]:
    """Return what is logged of the metrics that a loss returned; as `chosen_metrics`.

    Args:
        metrics: of `bandpo.policy_loss`; may be empty for "none".
        how_much: brief, full or none.
        prefix: put before each name.

    Returns:
        Name to tensor of no dimension.
    """
    names: Iterable[str] = {"brief": BRIEF, "full": metrics, "none": ()}[how_much]
    return {prefix + name: metrics[name] for name in names}


def as_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Return metrics as floats, in one move to the host."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True)) if metrics else {}


def as_sums(stats: ClipStats) -> dict[str, float]:
    """Return all sums, as floats in one move to the host: for a host that averages a loss's metrics over micro-batches.

    An average of shares is no share, because micro-batches differ in tokens; averages of sums, divided, are.

    Args:
        stats: what the clip did.

    Returns:
        ``NAME_sum`` for each of `bandpo.loss.stats.FIELDS`, by bucket of old probability as ``NAME_sum/BUCKET``; and
        for A > 0 and A < 0 alone as ``NAME_sum/pos``, ``NAME_sum/pos/BUCKET``, ``NAME_sum/neg``, ...
    """
    rows = torch.stack([stats.sums.sum(0), stats.sums[2], stats.sums[0]])
    rows = torch.cat([rows.sum(1, keepdim=True), rows], 1)
    return dict(zip(_SUMS, rows.flatten().tolist(), strict=True))


def chosen_sums(sums: Mapping[str, float], how_much: str, prefix: str) -> dict[str, float]:
    """Return what is logged of the sums: nine for "brief", all for "full", nothing for "none".

    Args:
        sums: from `as_sums`.
        how_much: brief, full or none.
        prefix: put before each name.

    Returns:
        Name to float.
    """
    names = {"none": [], "brief": _BRIEF_SUMS, "full": _SUMS}[how_much]
    return {prefix + name: sums[name] for name in names}


def shares(sums: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that averages of logged sums stand for.

    Args:
        sums: as `chosen_sums` named them, without the prefix.

    Returns:
        The metrics of `ClipStats.metrics` but maxima, which no sum holds; NaN where a sum was not logged. By bucket and
        sign only where all sums are there.
    """
    full = f"tokens_sum/{BUCKETS[0]}" in sums
    cells = torch.full((len(SIGNS), len(BUCKETS), len(FIELDS)), torch.nan, dtype=torch.float64)
    if full:
        any_sign, cells[2], cells[0] = (
            torch.tensor(
                [[sums[f"{field}_sum{sign}/{bucket}"] for field in FIELDS] for bucket in BUCKETS], dtype=cells.dtype
            )
            for sign in ("", "/pos", "/neg")
        )
        cells[1] = any_sign - cells[2] - cells[0]
    else:
        cells.zero_()[0, 0] = torch.tensor([sums.get(f"{field}_sum", torch.nan) for field in FIELDS], dtype=cells.dtype)
    found = ClipStats(cells * _SCALE, torch.zeros(len(SIGNS), len(BUCKETS), 3)).metrics()
    return {name: float(x) for name, x in found.items() if "_max" not in name and (full or "/" not in name)}


class View:
    """A host's configuration with a few values replaced; the host's own object stays as it is."""

    def __init__(self, base: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)
