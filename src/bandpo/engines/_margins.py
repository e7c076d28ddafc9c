"""What every adapter needs: the clip from the user's words, its margins and metrics, refusals of what goes round it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from bandpo import Band, Fixed, NoClip, Region, get_clip
from bandpo._checks import InputError

CLIP = Band.name  # the clip of every adapter whose user names none


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


def refuse_replaced(config: Any, defaults: Mapping[str, Any], clip: str | Region) -> None:
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
        if name.startswith("clip") and name not in ("clip", "clip_args", *known):
            raise InputError(f"{place}: {name!r} is unknown; the clip takes 'clip' and 'clip_args'")


def overall(metrics: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the metrics over all tokens, without those by bucket.

    Args:
        metrics: what `bandpo.ClipStats.metrics()` or `bandpo.policy_loss` returns.
        prefix: put before each name.

    Returns:
        Name to tensor of no dimension.
    """
    return {prefix + name: value for name, value in metrics.items() if "/" not in name}


def as_floats(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Return metrics as floats, in one move to the host."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


class View:
    """A host's configuration with a few values replaced; the host's own object stays as it is."""

    def __init__(self, base: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_base"], name)
