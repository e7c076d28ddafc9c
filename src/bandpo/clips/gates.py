"""Gates: what happens to a token outside its region, where that is not PPO's rule (`hard`, in `base`).

A gate takes any region, so that each of these methods exists over a Band as well as over the fixed interval that it was
published with.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from bandpo._input import InputError
from bandpo.clips.base import Clip, Region, take_after
from bandpo.clips.regions import Fixed, check_region
from bandpo.operator.tokens import Tokens


@dataclass(frozen=True)
class Gate(Clip):
    """A clip whose c follows from the side on which a token is outside a region.

    Args:
        eps_low: margin of the fixed interval below, in [0, 1].
        eps_high: margin of the fixed interval above, >= 0.
        region: any region instead of that interval, or None.

    Raises:
        InputError: a margin out of its range, a region that is none, or both a region and margins.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    region: Region | None = None

    def __post_init__(self) -> None:
        if self.region is None:
            object.__setattr__(self, "region", Fixed(self.eps_low, self.eps_high))
        else:
            self._check_region()
        take_after(self, self.boundary)

    def _check_region(self) -> None:
        check_region("region", self.region)
        for field in dataclasses.fields(self):
            if field.name in ("eps_low", "eps_high") and getattr(self, field.name) != field.default:
                raise InputError(
                    f"{field.name}={getattr(self, field.name)!r} with region={self.region!r}: must be left out, the "
                    "region has the bounds"
                )

    @abstractmethod
    def gate(self, tokens: Tokens, side: Tensor, region: Region) -> Tensor:
        """Return c from the side of the region.

        Args:
            tokens: as in `coefficient`.
            side: 1 above the region, -1 below, 0 inside.
            region: the region.

        Returns:
            Tensor of the tokens' shape.
        """

    @property
    def boundary(self) -> Region:
        """The region, which is always there once the gate is made."""
        assert self.region is not None
        return self.region

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return the gate's c over the region."""
        return self.gate(tokens, self.boundary.side(tokens), self.boundary)
