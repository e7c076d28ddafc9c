"""From which old policy a clip measures: the one that the ratio divides by, or the engine that sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bandpo._input import InputError, nearest
from bandpo.clips.base import Clip, Region, take_after
from bandpo.operator.band import Bounds
from bandpo.operator.tokens import Tokens

ANCHORS = ("old", "p", "r", "both")


def anchored(clip: Clip, anchor: str) -> Clip:
    """Return the clip, measured from another old policy.

    c = w c(p, q / p, A) / (q / p)

    "old": p and w = q / p by `old_logps`, the clip as it is. "p": p by `rollout_logps`, w = q / old. "r": p by
    `old_logps`, w = q / rollout. "both": p and w = q / p by `rollout_logps`.

    Args:
        clip: any clip.
        anchor: one of old, p, r, both.

    Returns:
        The clip itself for "old".

    Raises:
        InputError: another anchor; later, tokens without rollout_logps.

    Source: "both" is the trust region of arXiv 2602.04879 and of prime-rl, "r" the decoupled objective of arXiv
    2110.00641.
    """
    if anchor not in ANCHORS:
        raise InputError(f"anchor={anchor!r}: must be one of {', '.join(ANCHORS)}{nearest(anchor, ANCHORS)}")
    return clip if anchor == "old" else Anchored(clip, anchor)


def sampled_logps(tokens: Tokens, who: str) -> Tensor:
    """Return rollout_logps; old_logps where they are NaN, with which vLLM says that it has none: the ratio is 1."""
    rollout = tokens.need("rollout_logps", who)
    return torch.where(rollout.isnan(), tokens.log_p, rollout)


def _by_rollout(tokens: Tokens, clip: str) -> Tokens:
    """Return the same tokens with p and r by `rollout_logps`."""
    rollout = sampled_logps(tokens, clip)
    rest = (tokens.advantages, tokens.mask, rollout, tokens.entropies, tokens.rewards, tokens.state_divergence)
    return Tokens(tokens.log_q, rollout, *rest)


class Anchored(Clip):
    """A clip that looks at `rollout_logps` too; see `anchored`."""

    def __init__(self, clip: Clip, anchor: str) -> None:
        self.clip, self.anchor, self.opposes = clip, anchor, clip.opposes  # type: ignore[misc]
        take_after(self, clip)
        self.name = clip.name  # type: ignore[misc]
        self.needs = tuple(dict.fromkeys((*clip.needs, "rollout_logps")))  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"{self.clip!r} with anchor={self.anchor!r}"

    @property
    def boundary(self) -> Region | None:
        """The region of the clip, where it is measured."""
        inner = self.clip.boundary
        return inner if inner is None or self.anchor == "r" else _Moved(inner, self.clip.name)

    def at(self, progress: float) -> Clip:
        """Return the clip at this share of training, measured likewise."""
        clip = self.clip.at(progress)
        return self if clip is self.clip else Anchored(clip, self.anchor)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return c; see `anchored`."""
        rollout = _by_rollout(tokens, self.name)
        if self.anchor == "both":
            return self.clip.coefficient(rollout)
        gate, weight = (rollout, tokens) if self.anchor == "p" else (tokens, rollout)
        return self.clip.advantages(gate) * weight.ratio


class _Moved(Region):
    """A region that is measured from the engine that sampled."""

    as_bounds = False

    def __init__(self, region: Region, name: str) -> None:
        self.region = region
        take_after(self, region)
        self.__dict__.update(as_bounds=False, name=name)

    def bounds(self, log_p: Tensor) -> Bounds:
        """Return the bounds at these probabilities, which are the sampling engine's."""
        return self.region.bounds(log_p)

    def side(self, tokens: Tokens) -> Tensor:
        """Return on which side of the region the sampling engine's tokens are."""
        return self.region.side(_by_rollout(tokens, str(self.name)))

    @property
    def measure(self) -> Any:
        """The divergence of the region."""
        return self.region.measure

    @property
    def splits(self) -> bool:
        """False: pieces of tokens come without their rollout_logps."""
        return False

    def uncapped(self) -> Region:
        """Return the region without its ratio ceiling."""
        inner = self.region.uncapped()
        return self if inner is self.region else _Moved(inner, str(self.name))
