"""Errors for bad input: one line that names the argument, the value, what is allowed and the way out."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


class InputError(ValueError):
    """What the user gave cannot be used; the message alone is enough to mend it."""


def nearest(name: object, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice closest to `name`, or ``""``.

    Args:
        name: what the user wrote.
        choices: what is allowed.

    Returns:
        A clause to append to an error message.
    """
    match = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def check_number(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """Return `value` as a float if it is a finite Python number in the range, else raise.

    Args:
        name: the argument's name, for the message.
        value: what the user gave.
        low: least value allowed.
        high: greatest value allowed.
        open_low: whether `low` itself is forbidden.

    Returns:
        The value as a float.

    Raises:
        InputError: not a number, NaN, infinite or out of the range.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    finite = number and -math.inf < value < math.inf  # type: ignore[operator]  # isfinite would break a compiled graph
    if finite and low <= value <= high and not (open_low and value == low):  # type: ignore[operator]
        return float(value)  # type: ignore[arg-type]
    above = f"greater than {low:g}" if open_low else f"of at least {low:g}"
    below = "" if high == math.inf else f" and at most {high:g}"
    raise InputError(f"{name}={value!r}: must be a finite number {above}{below}; give a value in that range")


def check_keywords(what: str, function: Callable[..., object], given: dict[str, Any]) -> None:
    """Raise for a keyword in `given` that `function` does not take.

    Args:
        what: what is being made, for the message.
        function: the callable that will get the keywords.
        given: the keywords.

    Raises:
        InputError: a keyword is unknown; names the nearest one.
    """
    allowed = [name for name in inspect.signature(function).parameters if name != "self"]
    for key in given:
        if key not in allowed:
            takes = ", ".join(allowed) if allowed else "no argument"
            raise InputError(f"{what} has no argument {key!r}{nearest(key, allowed)}; it takes {takes}")


def check_tensor(name: str, x: object, like: Tensor | None = None) -> None:
    """Raise InputError unless `x` is a floating tensor (of the shape and device of `like`)."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} is {kind}: must be a floating-point tensor of natural logarithms; convert it first")
    if like is not None and (x.shape != like.shape or x.device != like.device):
        raise InputError(
            f"{name} has shape {tuple(x.shape)} on {x.device}: must match logps, {tuple(like.shape)} on {like.device}"
        )
