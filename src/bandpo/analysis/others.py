"""What every clip of the registry would have done to the same tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bandpo.clips import CLIPS, get_clip
from bandpo.clips.base import Clip
from bandpo.loss.stats import MOST_RATIO
from bandpo.operator.tokens import Tokens

RARE = 0.1  # tokens of a lower old probability are called rare
FIELDS = ("zero_grad", "zero_grad_rare", "kept", "opposed")


class Others:
    """Sums over tokens for each clip of the registry with its published defaults."""

    def __init__(self) -> None:
        self.clips = {name: get_clip(name) for name in CLIPS}
        self.sums = dict.fromkeys(CLIPS, torch.zeros(len(FIELDS) + 1, dtype=torch.float64, device="cpu"))
        self.missing: dict[str, str] = {}
        self.totals = torch.zeros(3, dtype=torch.float64, device="cpu")  # tokens, rare ones with A > 0, sum of |r A|
        self.entropy = False

    def add(self, tokens: Tokens, per_c: Tensor | None) -> None:
        """Count tokens.

        Args:
            tokens: all that clips may look at.
            per_c: dH for c = 1, of the tokens' shape, or None.
        """
        sign = torch.sign(tokens.advantages)
        most, live = MOST_RATIO * tokens.advantages.abs(), sign != 0
        rare = (sign > 0) & (tokens.log_p < math.log(RARE))
        n = tokens.log_p.numel() if tokens.mask is None else tokens.mask.sum()
        free = torch.minimum(tokens.weighted.abs(), most).sum()
        self.totals += torch.stack([torch.as_tensor(x, device="cpu").double() for x in (n, rare.sum(), free)])
        self.entropy |= per_c is not None
        for name, clip in self.clips.items():
            if lacks := missing(clip, tokens):
                self.missing[name] = lacks
                continue
            c = clip.coefficient(tokens)
            zero = (c == 0) & live
            pushed, opposed = c * sign, c.new_zeros(())
            if clip.opposes:
                opposed = torch.minimum((-pushed).clamp_(min=0.0), most).sum()
                pushed = pushed.clamp_(min=0.0)
            kept = torch.minimum(pushed, most).sum()
            dh = c.new_zeros(()) if per_c is None else torch.dot(c.flatten().double(), per_c.flatten().double())
            row = (zero.sum(), (zero & rare).sum(), kept, opposed, dh)
            self.sums[name] = self.sums[name] + torch.stack([x.double() for x in row])

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each clip, in the registry's order.

        Returns:
            clip (its name), looks_at, missing (what it needs and these tokens lack, or None); zero_grad (share of the
            tokens), zero_grad_rare (of those with p < 0.1 and A > 0), gradient_kept and gradient_opposed (shares of
            sum |r A|), entropy (mean dH, nats for a step of eta = 1); None for what is not known.
        """
        n, rare, free = (float(x) for x in self.totals)
        found = []
        for name, clip in self.clips.items():
            zero, zero_rare, kept, opposed, dh = (float(x) for x in self.sums[name])
            numbers = {
                "zero_grad": zero / n,
                "zero_grad_rare": zero_rare / rare if rare else None,
                "gradient_kept": kept / free if free else None,
                "gradient_opposed": opposed / free if free else None,
                "entropy": dh / n if self.entropy else None,
            }
            lacks = self.missing.get(name)
            numbers = dict.fromkeys(numbers) if lacks else numbers
            found.append({"clip": name, "looks_at": clip.looks_at, "missing": lacks, **numbers})
        return found


def missing(clip: Clip, tokens: Tokens) -> str | None:
    """Return what a clip needs and the tokens lack, or None."""
    lacks = [name for name in clip.needs if getattr(tokens, name) is None]
    if clip.looks_at == "sequence" and tokens.log_p.dim() < 2:
        lacks.append("sequences")
    return ", ".join(lacks) or None
