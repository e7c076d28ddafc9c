"""Errors for bad input: one line that names the argument, the value, what is allowed and the way out."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class InputError(ValueError):
    """What the user gave cannot be used; the message alone is enough to mend it."""


def nearest(name: object, choices: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the choice closest to `name` in any case, or ``""``.

    Args:
        name: what the user wrote.
        choices: what is allowed.

    Returns:
        A clause to append to an error message.
    """
    names = {str(choice).lower(): choice for choice in choices}
    match = difflib.get_close_matches(str(name).lower(), names, n=1, cutoff=0.6)
    return f" (did you mean {names[match[0]]!r}?)" if match else ""


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


def check_keywords(what: str, function: Callable[..., object], given: Mapping[str, Any]) -> None:
    """Raise for a keyword in `given` that `function` does not take.

    Args:
        what: what is being made, for the message.
        function: the callable that will get the keywords.
        given: the keywords.

    Raises:
        InputError: a keyword is unknown; names the nearest one.
    """
    if not given:  # nor is a signature looked up, which no compiled graph takes on Python 3.13
        return
    allowed = [name for name in inspect.signature(function).parameters if name != "self"]
    for key in given:
        if key not in allowed:
            takes = ", ".join(allowed) if allowed else "no argument"
            raise InputError(f"{what} has no argument {key!r}{nearest(key, allowed)}; it takes {takes}")


LOGS = "a floating-point tensor of natural logarithms"


def check_tensor(name: str, x: object, like: Tensor | None = None, what: str = LOGS) -> None:
    """Raise unless `x` is a floating tensor, of the shape and device of `like`.

    Args:
        name: the argument's name, for the message.
        x: what the user gave.
        like: the tensor to match, or None.
        what: what it must be, for the message.

    Raises:
        InputError: it is not.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"{name} is {kind}: must be {what}; convert it first")
    if like is not None and (x.shape != like.shape or x.device != like.device):
        raise InputError(
            f"{name} has shape {tuple(x.shape)} on {x.device}: must match logps, {tuple(like.shape)} on {like.device}"
        )


def as_mask(mask: object, logps: Tensor) -> Tensor | None:
    """Return a mask of 0 and 1 of any type as bool, and None as it is.

    Args:
        mask: what the user gave.
        logps: the tensor whose shape and device it must have.

    Returns:
        Bool tensor or None.

    Raises:
        InputError: no tensor, or of another shape or device.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.shape != logps.shape or mask.device != logps.device or mask.is_complex():
        got = (
            f"{mask.dtype}, shape {tuple(mask.shape)} on {mask.device}"
            if isinstance(mask, Tensor)
            else type(mask).__name__
        )
        raise InputError(
            f"mask is {got}: must be a tensor of 0 and 1 like logps, {tuple(logps.shape)} on {logps.device}"
        )
    return mask if mask.dtype == torch.bool else mask != 0


def per_token(advantages: Tensor, logps: Tensor, name: str = "advantages") -> Tensor:
    """Return advantages, or what else may be per sequence, in a shape that broadcasts with `logps`.

    Args:
        advantages: per token, or per sequence (batch,) or (batch, 1).
        logps: the tensor of the tokens.
        name: the argument's name, for messages.

    Returns:
        The same of the tokens' shape, or with a last dimension of 1.

    Raises:
        InputError: not a float tensor, or of any other shape or device.
    """
    check_tensor(name, advantages, what="a floating-point tensor")
    if logps.dim() > 1 and advantages.shape == logps.shape[:-1]:
        advantages = advantages.unsqueeze(-1)
    if advantages.device != logps.device or advantages.shape not in (logps.shape, (*logps.shape[:-1], 1)):
        each = f" or per sequence {tuple(logps.shape[:-1])}" if logps.dim() > 1 else ""
        raise InputError(
            f"{name} has shape {tuple(advantages.shape)} on {advantages.device}: must be per token "
            f"{tuple(logps.shape)}{each}, on {logps.device}"
        )
    return advantages


def check_values(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor | None) -> None:
    """Raise for values that cannot be meant; waits for the device.

    Args:
        logps: as in `bandpo.policy_loss`.
        old_logps: as in `bandpo.policy_loss`.
        advantages: in a shape that broadcasts with `logps`.
        mask: as in `bandpo.policy_loss`.

    Raises:
        InputError: a mask of other values than 0 and 1, NaN or infinite values in tokens, log-probabilities above 0.
    """
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        raise InputError("mask holds values other than 0 and 1: give 1 for tokens and 0 for padding")
    for name, x in (("logps", logps), ("old_logps", old_logps), ("advantages", advantages.expand_as(logps))):
        kept = x if mask is None else torch.where(mask != 0, x, 0.0)
        bad = int((~torch.isfinite(kept)).sum())
        if bad:
            raise InputError(f"{name} holds {bad} values that are NaN or infinite where mask is 1: mask or mend them")
        if name != "advantages" and bool((kept > 0).any()):
            raise InputError(f"{name} holds values above 0 where mask is 1: must be logarithms of probabilities")


def is_import_path(text: str) -> bool:
    """Return whether a name is an import path: ``path/to/file.py:name`` or ``package.module:name``."""
    place, colon, name = text.rpartition(":")
    return bool(colon) and name.isidentifier() and (place.endswith(".py") or place.replace(".", "").isidentifier())


def load_object(path: str, argument: str) -> Any:
    """Import what an import path names; this runs the code of its file.

    Args:
        path: ``path/to/file.py:name`` or ``package.module:name``.
        argument: the argument's name, for messages.

    Returns:
        The object.

    Raises:
        InputError: there is no such file or module, it fails while it is imported, or it has no such name.
    """
    place, _, name = path.rpartition(":")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise InputError(
            f"{argument}={path!r}: {place} cannot be imported, {type(error).__name__}: {error}; must be "
            "path/to/file.py:name or package.module:name"
        ) from error
    if not hasattr(module, name):
        names = [x for x in vars(module) if not x.startswith("_")]
        raise InputError(f"{argument}={path!r}: {place} has no {name!r}{nearest(name, names)}")
    return getattr(module, name)


def _import_file(path: Path) -> ModuleType:
    """Import a file once, under a name of its own, so that what it defines can be pickled in this process."""
    file = path.resolve()
    name = f"bandpo_user_{file.stem}_{zlib.crc32(str(file).encode()):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def as_arguments(clip_args: object) -> dict[str, Any]:
    """Return the arguments of a clip as `get_clip` takes them, checked to be a mapping of names; {} for None."""
    if clip_args is None:
        return {}
    if not isinstance(clip_args, Mapping) or not all(isinstance(key, str) for key in clip_args):
        raise InputError(f"clip_args={clip_args!r}: must be a dict of names; write clip_args={{'delta': 0.05}}")
    if "clip" in clip_args:
        raise InputError(f"clip_args={dict(clip_args)!r}: 'clip' must be left out, it is named beside clip_args")
    return dict(clip_args)
