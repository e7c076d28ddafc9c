"""Clips of the user's own that are no `Clip`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bandpo._input import InputError
from bandpo.clips.base import Clip
from bandpo.operator.tokens import Tokens


class Foreign(Clip):
    """A clip of the user's that is no `Clip`: any object with `coefficient(tokens)`; its first result is checked."""

    def __init__(self, clip: Any) -> None:
        self.clip = clip
        self.name = getattr(clip, "name", type(clip).__name__)  # type: ignore[misc]
        for name, unknown in (("looks_at", "token"), ("opposes", True), ("needs", ()), ("uses_p", True)):
            setattr(self, name, getattr(clip, name, unknown))
        self._checked = False

    def __repr__(self) -> str:
        return repr(self.clip)

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return the user's coefficient, 0 in padding."""
        c = self.clip.coefficient(tokens)
        check_coefficient(self.name, c, tokens)
        c = c.detach().to(tokens.log_r.dtype)
        c = c if tokens.mask is None else torch.where(tokens.mask, c, 0.0)
        if not self._checked and not torch.compiler.is_compiling():
            self._refuse_nan(c, tokens)
        return c

    def _refuse_nan(self, c: Tensor, tokens: Tokens) -> None:
        """Raise where finite tokens have a coefficient that is not; once, because it waits for the device."""
        bad = ~torch.isfinite(c) & torch.isfinite(tokens.log_r * tokens.advantages)
        if bool(bad.any()):
            where = f"p = {float(tokens.p[bad][0]):.3g}, r = {float(tokens.ratio[bad][0]):.3g}"
            raise InputError(
                f"clip {self.name!r}: coefficient(tokens) is {float(c[bad][0])} at {where}, "
                f"A = {float(tokens.advantages[bad][0]):.3g}: must be finite; guard what overflows or divides by 0"
            )
        self._checked = True


def check_coefficient(name: str, c: object, tokens: Tokens) -> None:
    """Raise InputError unless `c` is a float tensor of the tokens' shape."""
    if not isinstance(c, Tensor) or c.shape != tokens.log_r.shape or not c.is_floating_point():
        got = f"{c.dtype} of shape {tuple(c.shape)}" if isinstance(c, Tensor) else type(c).__name__
        raise InputError(
            f"clip {name!r}: coefficient(tokens) is {got}: must be a float tensor of the tokens' shape, "
            f"{tuple(tokens.log_r.shape)}"
        )
