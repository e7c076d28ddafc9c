"""Radii as a user gives them: numbers, tensors, pairs; checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bandpo._input import InputError, check_number

Delta = float | Tensor | tuple[float | Tensor, float | Tensor]
RADII = (1e-8, 1e4)  # the radii that are solved for; nothing that trains is near either end


def check_delta(delta: Delta) -> tuple[float | Tensor, float | Tensor]:
    """Return (delta_low, delta_high), checked where they are Python numbers."""
    sides: list[Any] = [*delta] if isinstance(delta, (tuple, list)) and len(delta) == 2 else [delta, delta]
    for side in sides:
        if not isinstance(side, Tensor):
            check_number("delta", side, *RADII)
    return sides[0], sides[1]


def check_radii(old_logps: Tensor, delta: Delta) -> None:
    """Raise InputError for values of tensors that `band` cannot take; waits for the device."""
    for side in check_delta(delta):
        if not isinstance(side, Tensor):
            continue
        bad = side[~((side >= RADII[0]) & (side <= RADII[1]))]
        if len(bad):
            raise InputError(
                f"delta holds {len(bad)} values such as {float(bad[0]):g}: each must be from {RADII[0]:g} to "
                f"{RADII[1]:g}; mend them, or mask those tokens and give any such radius there"
            )
    if not bool((old_logps <= 0).all()):
        raise InputError(
            "old_logps holds NaN or values above 0: must be logarithms of probabilities; set padding to 0 first"
        )


def check_cap(cap: object) -> float | None:
    """Return `cap`, a finite ratio of at least 1, or None."""
    return None if cap is None else check_number("cap", cap, 1.0)


def delta_like(delta: float | Tensor, x: Tensor, wide: bool = False) -> Tensor:
    """Return `delta` as a tensor on the device of `x`, without a host synchronisation.

    In the dtype of `x`, or if `wide` as it is: a tensor in its own dtype, a number in float64.
    """
    if isinstance(delta, Tensor):
        return delta.to(x.device) if wide else delta.to(x)
    dtype = torch.float64 if wide and x.device.type != "mps" else x.dtype
    return torch.full((), delta, dtype=dtype, device=x.device)
