"""What every adapter needs: the clip from the user's words, its margins, a check that the host's seam is in place."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bandpo import ClipStats, Fixed, NoClip, Region, get_clip
from bandpo._checks import InputError


def make_clip(clip: str | Region, clip_args: Mapping[str, Any] | None) -> Region:
    """Return the clip that `clip` and `clip_args` name.

    Args:
        clip: a name, as `bandpo.get_clip` takes it, or a clip.
        clip_args: the arguments of the clip's class, or None for its own defaults.

    Returns:
        The clip.

    Raises:
        InputError: the clip does not exist or does not take these arguments.
    """
    if not isinstance(clip, str | Region):
        raise InputError(f"clip={clip!r}: must be a name or a clip, e.g. 'band' or bandpo.Band(delta=0.05)")
    if not isinstance(clip_args, Mapping | None):
        raise InputError(f"clip_args={clip_args!r}: must be a dict; write clip_args={{'delta': 0.05}}")
    return get_clip(clip, **(clip_args or {}))


def refuse_density(clip: Region, what: str) -> None:
    """Raise for actions that are not discrete, unless the clip is the same for every probability.

    Args:
        clip: any clip.
        what: what the host has, for the message.

    Raises:
        InputError: the clip needs probabilities.
    """
    if not isinstance(clip, Fixed | NoClip):
        raise InputError(
            f"{what}: a density is no probability, and clip {clip.name!r} needs one; use discrete actions, or "
            "clip='fixed'"
        )


def margins(clip: Region, old_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Return a clip's bounds as the two margins of a host that clamps a ratio to [1 - eps_low, 1 + eps_high].

    Args:
        clip: any clip.
        old_logps: log-probabilities in the ratio's denominator, any shape; NaN is padding.

    Returns:
        (eps_low, eps_high), detached float32 of the tokens' shape: 0 <= eps_low <= 1, 0 <= eps_high, all finite.
    """
    return clip.bounds(old_logps.detach()).margins()


def check_source(engine: str, version: str, tested: str, place: Any, parts: tuple[str, ...]) -> None:
    """Raise unless the source of `place` holds every one of `parts`, the text that the adapter relies on.

    Args:
        engine: the engine's name, for the message.
        version: the version installed.
        tested: how to get a version that is tested, e.g. ``pip install 'torchrl==0.14.1'``.
        place: the engine's function, class or module.
        parts: pieces of its source.

    Raises:
        InputError: a part is missing.
    """
    source = inspect.getsource(place)
    for part in parts:
        if part not in source:
            raise InputError(
                f"{engine}=={version}: its {place.__name__} no longer holds `{part}`, where the clip goes; "
                f"use a version that bandpo is tested with: {tested}"
            )


def as_floats(stats: ClipStats, prefix: str) -> dict[str, float]:
    """Return the metrics over all tokens, without those by bucket, in one move to the host."""
    metrics = {name: value for name, value in stats.metrics(prefix).items() if "/" not in name.removeprefix(prefix)}
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


class View:
    """A host's configuration with a few values replaced; the host's own object stays as it is."""

    def __init__(self, base: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)
