"""Masks: clips that drop tokens or whole sequences by a rule of their own, and leave the others r A."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from bandpo.clips.base import Clip
from bandpo.operator.tokens import Tokens


class Mask(Clip):
    """A clip whose c is r A, or 0 where it drops a token."""

    @abstractmethod
    def kept(self, x: Tensor, tokens: Tokens) -> Tensor:
        """Return `x`, and 0 where a token is dropped.

        Args:
            x: of the tokens' shape.
            tokens: as in `coefficient`.

        Returns:
            Tensor of the tokens' shape.
        """

    def coefficient(self, tokens: Tokens) -> Tensor:
        """Return r A, or 0 where a token is dropped."""
        return self.kept(tokens.weighted, tokens)

    def advantages(self, tokens: Tokens) -> Tensor:
        """Return A, or 0 where a token is dropped."""
        return self.kept(tokens.advantages, tokens)
