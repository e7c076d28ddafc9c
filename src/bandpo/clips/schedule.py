"""Schedules: an argument of a clip that changes over training, such as ``{"start": 0.2, "end": 0.02}``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from bandpo._input import InputError, check_number, nearest
from bandpo.clips.base import Clip, take_after
from bandpo.operator.tokens import Tokens

SHAPES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, x: start * (1 - x) + end * x,
    "cosine": lambda start, end, x: end + (start - end) * (1 + math.cos(math.pi * x)) / 2,
    "geometric": lambda start, end, x: start ** (1 - x) * end**x,
}
KEYS = ("start", "end", "shape")


class Scheduled(Clip):
    """A clip with schedules among its arguments; `at` makes the clip of one moment.

    Args:
        make: makes the clip from arguments.
        args: its arguments; a mapping with "start", "end" and maybe "shape" anywhere in them is a schedule.

    Raises:
        InputError: a schedule with a wrong key or shape, or a clip that does not take the values at either end.
    """

    def __init__(self, make: Callable[..., Clip], args: Mapping[str, Any]) -> None:
        self.make, self.args = make, dict(args)
        first, last = self.at(0.0), self.at(1.0)
        take_after(self, first, last)
        self.name, self.opposes, self.first = first.name, first.opposes, first  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"{self.first.name}({', '.join(f'{key}={value!r}' for key, value in self.args.items())})"

    def at(self, progress: float) -> Clip:
        """Return the clip at this share of training, from 0 to 1."""
        x = check_number("progress", progress, 0.0, 1.0)
        return self.make(**{key: _at(key, value, x) for key, value in self.args.items()})

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Raise: it depends on how far training is."""
        raise InputError(f"clip {self!r} changes over training: use clip.at(step / steps) at each step")


def has_schedule(value: Any) -> bool:
    """Return whether there is a schedule in the arguments of a clip."""
    if isinstance(value, Mapping):
        return bool({"start", "end"} & value.keys()) or any(has_schedule(x) for x in value.values())
    return isinstance(value, list | tuple) and any(has_schedule(x) for x in value)


def constant(clip: Clip) -> Clip:
    """Return the clip; raise InputError for one with a schedule, where nothing says how far training is."""
    if clip.at(0.0) is not clip:
        raise InputError(
            f"clip {clip!r} changes over training, and tokens do not say when they were trained on: must be that "
            f"of one moment; give its value there, such as --clip {clip.name} --clip_args.KEY VALUE"
        )
    return clip


def _at(key: str, value: Any, x: float) -> Any:
    if isinstance(value, Mapping):
        if {"start", "end"} & value.keys():
            return _value(key, value, x)
        return {name: _at(name, inner, x) for name, inner in value.items()}
    return tuple(_at(key, inner, x) for inner in value) if isinstance(value, list | tuple) else value


def _value(key: str, schedule: Mapping[str, Any], x: float) -> float:
    strays = [name for name in schedule if name not in KEYS]
    if strays or not {"start", "end"} <= schedule.keys():
        wrong = f", {strays[0]!r} is unknown{nearest(strays[0], KEYS)}" if strays else ""
        raise InputError(f"{key}={dict(schedule)!r}: a schedule has start, end and shape{wrong}")
    start, end = (check_number(f"{key}.{name}", schedule[name], 0.0) for name in ("start", "end"))
    shape = schedule.get("shape", "linear")
    if not isinstance(shape, str) or shape not in SHAPES:
        raise InputError(f"{key}.shape={shape!r}: must be one of {', '.join(SHAPES)}{nearest(shape, SHAPES)}")
    if shape == "geometric" and not (start > 0 and end > 0):
        raise InputError(f"{key}={dict(schedule)!r}: a geometric schedule needs start > 0 and end > 0")
    return SHAPES[shape](start, end, x)
