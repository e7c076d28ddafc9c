"""What a clip is: its gradient coefficient c(p, r, A), one number per token.

The gradient of nearly every policy-gradient method of LLM reinforcement learning is c * grad log pi. Without a clip
c = r A. A clip that is no more than a set of allowed ratios is a `Region`; PPO's rule then takes the gradient from a
token outside of it that A pushes further out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from bandpo._input import InputError
from bandpo.operator.band import Bounds
from bandpo.operator.divergence import Divergence
from bandpo.operator.family import get_divergence
from bandpo.operator.tokens import Tokens, above

MOST = 20.0  # |log r| up to which a host that multiplies r by `advantages` gets c


class Clip(ABC):
    """A clip: what multiplies grad log pi of each token.

    Attributes:
        name: in the registry.
        paper: arXiv id of its source, or "".
        looks_at: "token"; "sequence" where c depends on the other tokens of the sequence; "batch" where it depends on
            the whole tensor given, in a host a micro-batch.
        opposes: whether c may have the sign against A.
        needs: which of the optional tensors of `Tokens` it looks at.
        uses_p: whether c depends on the token's probability, and so needs one: a density will not do.
        as_bounds: whether it is two bounds a token that follow from log p alone, with which a host can clamp.
    """

    name: ClassVar[str] = "mine"
    paper: ClassVar[str] = ""
    looks_at: ClassVar[str] = "token"
    opposes: ClassVar[bool] = False
    needs: ClassVar[tuple[str, ...]] = ()
    uses_p: ClassVar[bool] = True
    as_bounds: ClassVar[bool] = False

    @property
    def boundary(self) -> Region | None:
        """The region that statistics call inside; None for a clip that has none."""
        return None

    def at(self, progress: float) -> Clip:
        """Return the clip at this share of training, from 0 to 1: itself, unless it has a schedule."""
        return self

    @abstractmethod
    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return c, the factor of grad log pi in the gradient of the objective that is maximised.

        Args:
            tokens: all that there is to look at; never written to.

        Returns:
            Tensor of the tokens' shape, in the dtype of `tokens.log_r`; 0 in padding.
        """

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return c / r: handed to a host as advantages, its own r A' has the gradient c, for |log r| <= 20.

        Args:
            tokens: as in `coefficient`.

        Returns:
            Tensor of the tokens' shape; 0 in padding.
        """
        return self.coefficient(tokens) * torch.exp(-tokens.log_r.clamp(-MOST, MOST))

    def objective(self, tokens: Tokens) -> Tensor:
        """Return the value of the objective per token, where it has one whose gradient is c.

        Args:
            tokens: as in `coefficient`.

        Returns:
            Tensor of the tokens' shape; 0 in padding.

        Raises:
            InputError: the clip is no hard gate, and so defines a gradient only.
        """
        raise InputError(
            f"exact_value=True: clip {self.name!r} defines a gradient, and no objective; drop it (the loss is then "
            "-r A, detached, with the right gradient)"
        )


class Region(Clip):
    """A set of allowed ratios for each token; by itself a clip with PPO's hard gate."""

    as_bounds: ClassVar[bool] = True

    @abstractmethod
    def bounds(self, log_p: Tensor) -> Bounds:
        """Return the least and the greatest ratio allowed for each token.

        Args:
            log_p: natural-log probabilities under the old policy, any shape.

        Returns:
            `Bounds` of the same shape, detached, finite, float32 (float64 for float64).
        """

    def side(self, tokens: Tokens) -> Tensor:
        """Return on which side of the region each token is; override it where there is a test cheaper than a root.

        Args:
            tokens: as in `coefficient`.

        Returns:
            Float tensor of the tokens' shape: 1 above, -1 below, 0 inside.
        """
        bounds = self.limits(tokens)
        return above(tokens.log_r, bounds.log_high) - above(bounds.log_low, tokens.log_r)

    def limits(self, tokens: Tokens) -> Bounds:
        """Return `bounds` of these tokens; override it where they depend on more than p.

        Args:
            tokens: as in `coefficient`.

        Returns:
            `Bounds` of the tokens' shape.
        """
        return self.bounds(tokens.log_p)

    @property
    def boundary(self) -> Region | None:
        """Itself."""
        return self

    @property
    def measure(self) -> Divergence:
        """The divergence in which statistics say how far tokens went; kl unless the region has its own."""
        return get_divergence("kl")

    @property
    def splits(self) -> bool:
        """Whether `side` can be asked of any part of the tokens alone."""
        return self.looks_at == "token"

    def uncapped(self) -> Region:
        """Return the region without its ratio ceiling; itself where it has none."""
        return self

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return r A, and 0 where the token is outside and A pushes it further out."""
        return hard(tokens, self.side(tokens))

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return A, and 0 where the token is outside and A pushes it further out."""
        return shut(tokens.advantages, tokens, self.side(tokens))

    def objective(self, tokens: Tokens) -> Tensor:
        """Return min(r A, clip(r) A); for this value the bounds are solved."""
        bounds = self.limits(tokens)
        clipped = torch.exp(torch.minimum(torch.maximum(tokens.log_r, bounds.log_low), bounds.log_high))
        return torch.minimum(tokens.weighted, clipped * tokens.advantages)


def take_after(clip: Clip, *parts: Clip) -> None:
    """Give a clip that is made of others what holds for any of them: what they look at, what they need."""
    kinds = [part.looks_at for part in parts]
    widest = "batch" if "batch" in kinds else "sequence" if "sequence" in kinds else "token"
    needs = tuple(dict.fromkeys(name for part in parts for name in part.needs))
    found = {"looks_at": widest, "needs": needs, "uses_p": any(part.uses_p for part in parts)}
    if isinstance(clip, Region):
        found["as_bounds"] = all(part.as_bounds for part in parts)
    clip.__dict__.update(found)


def shut(x: Tensor, tokens: Tokens, side: Tensor) -> Tensor:
    """Return `x`, and 0 where the token is outside (`side`) and A pushes it further out."""
    return torch.addcmul(x, x, above(side * tokens.advantages, 0.0), value=-1.0)  # so that 0 is never -0


def hard(tokens: Tokens, side: Tensor) -> Tensor:
    """Return PPO's coefficient: r A, and 0 outside and outward.

    c = r A,  or 0 where (A > 0 and above) or (A < 0 and below)

    Args:
        tokens: as in `Clip.coefficient`.
        side: 1 above the region, -1 below, 0 inside.

    Returns:
        Tensor of the tokens' shape.

    Source: arXiv 1707.06347.
    """
    return shut(tokens.weighted, tokens, side)
