"""Whether values can be what they are said to be: natural logarithms of probabilities, and finite numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bandpo._input import InputError
from bandpo.analysis.tails import Tails
from bandpo.analysis.text import many

ROUNDING = 0.01  # a log-probability above 0 by no more than this is a rounded 0
TOO_MANY = 0.01  # the share of values above 0 from which they are something else,
ODD = 10  # where they are this many, or most
LOGS = ("logps", "old_logps", "rollout_logps")
SIZES = {"entropies": 0.01, "state_divergence": 1e-4}  # never below 0 by more than rounding does
HUGE = 1e30  # an advantage beyond this overflows float32 with its ratio
BASES = {"in bits": 1 / math.log(2), "to base 10": 1 / math.log(10)}
UNSURE = -0.05  # log-probabilities above this hardly tell their base
NEAR = 0.08  # how far a median quotient may be from that of a wrong base
FEW, FEWEST = 100, 1000  # tokens from which medians and means are compared


class Sanity:
    """What is odd about a stream of tokens; what cannot be used is left out, and counted.

    Attributes:
        left_out: tokens that were left out.
    """

    def __init__(self) -> None:
        self.left_out = 0
        self._certain, self._rows = 0, 0  # of arrays without a mask: cells at the ends of rows that look like padding
        self._odd: dict[str, tuple[int, str]] = {}  # what: how many, and where the first one is
        self._quotients: dict[str, Tails] = {}  # of each log-probability and the old one
        self._sums = torch.zeros(10, dtype=torch.float64, device="cpu")

    def clean(self, values: dict[str, Tensor], mask: Tensor, start: int = 0) -> Tensor:
        """Return the mask without the tokens that cannot be used.

        Args:
            values: by name, of the mask's shape, `logits` with one dimension more.
            mask: bool.
            start: how many sequences (or tokens, where there are none) came before.

        Returns:
            Bool tensor of the mask's shape.

        Raises:
            InputError: log-probabilities that must be something else.
        """
        kept = mask
        for name, x in values.items():
            kept = kept & ~self._note(f"{name} is NaN or infinite", mask & ~_finite(name, x, mask), start)
            if name == "advantages":
                size = x.abs()
                kept = kept & ~self._note(f"{name} is beyond 1e30", mask & (size > HUGE) & (size < math.inf), start)
            if name in SIZES:
                kept = kept & ~self._note(f"{name} is below 0", mask & (x < -SIZES[name]) & (x > -math.inf), start)
            if name in LOGS:
                above = mask & torch.isfinite(x) & (x > ROUNDING)
                count, tokens = int(above.sum()), int(mask.sum())
                if count > TOO_MANY * tokens and (count >= ODD or 2 * count > tokens):
                    raise InputError(_not_logs(name, x[mask & torch.isfinite(x)], above, start))
                kept = kept & ~self._note(f"{name} is above 0", above, start)
        self.left_out += int(mask.sum()) - int(kept.sum())
        return kept

    def unmasked(self, logps: Tensor, old_logps: Tensor) -> None:
        """Count what looks like padding in (batch, token) tensors that came without a mask."""
        nothing = (logps == 0) & (old_logps == 0)
        self._certain += int(nothing.flip(-1).cumprod(-1).sum())
        self._rows += len(logps)

    def _note(self, what: str, found: Tensor, start: int) -> Tensor:
        count = int(found.sum())
        if count:
            before, where = self._odd.get(what, (0, _place(found, start)))
            self._odd[what] = before + count, where
        return found

    def look(self, logps: Tensor, old_logps: Tensor, entropies: Tensor | None, rollout: Tensor | None) -> None:
        """Gather what tells whether the logarithms are natural; of used tokens alone, each of shape (tokens,)."""
        for name, x in (("logps", logps), ("rollout_logps", rollout)):
            if x is not None:
                far = old_logps < UNSURE
                self._quotients.setdefault(name, Tails()).add((x[far] / old_logps[far]).abs())  # 0 has a sign
        log_r = (logps - old_logps).double().clamp(-20.0, 20.0)
        columns = [torch.ones_like(log_r), *(y for b in (1.0, math.log(2)) for y in _moments(torch.exp(b * log_r)))]
        if entropies is not None:
            surprise, h = -old_logps.double(), entropies.double()
            columns += [torch.ones_like(h), surprise, h, *_moments(surprise - h)[1:]]
        for i, x in enumerate(columns):
            self._sums[i] += float(x.sum())

    def remarks(self) -> list[str]:
        """Return a sentence for each oddity."""
        said = [
            f"{what} for {many(n, 'token')}, the first at {where}; left out" for what, (n, where) in self._odd.items()
        ]
        if self._certain > 2 * self._rows:  # an end token or two may well be certain
            said.append(
                f"no mask was given, and {many(self._certain, 'token')} at the ends of sequences have "
                "log-probabilities of exactly 0, as padding has, and count; if they are padding, give a mask or lengths"
            )
        for name, quotients in self._quotients.items():
            middle = quotients.quantile(0.5)
            for base, b in BASES.items() if int(quotients.counts.sum()) >= FEW else ():
                for wrong, quotient in ((name, b), ("old_logps", 1 / b)):
                    if abs(middle / quotient - 1) < NEAR:
                        said.append(
                            f"{name} / old_logps is {middle:.3g} in the median: implausible, {wrong} looks to be "
                            f"{base} ({quotient:.4g}); all must be natural logarithms"
                        )
        return said + self._means()

    def _means(self) -> list[str]:
        """Compare means with what they are for natural logarithms: E[r] = 1, E[-log p] = E[H]."""
        n, r, r2, s, s2, m, surprise, h, d2 = (float(x) for x in self._sums[:9])
        said = []
        if n >= FEWEST:
            r, s = r / n, s / n
            error = math.sqrt(max(r2 / n - r * r, 0.0) / n), math.sqrt(max(s2 / n - s * s, 0.0) / n)
            if r - 1 > 5 * error[0] and abs(s - 1) < 2 * error[1]:
                said.append(
                    f"the mean ratio is {r:.4g}, where natural logarithms have 1, and {s:.4g} if they are read as "
                    "base 2: implausible, the log-probabilities may be in bits; multiply them by 0.6931"
                )
        if m >= FEWEST:
            surprise, h = surprise / m, h / m
            error_h = math.sqrt(max(d2 / m - (surprise - h) ** 2, 0.0) / m)
            apart = abs(surprise - h) > 5 * error_h and min(surprise, h) > 0
            for name, quotient in (("old_logps", surprise / h), ("entropies", h / surprise)) if apart else ():
                if abs(quotient * math.log(2) - 1) < 2 * NEAR:
                    said.append(
                        f"the mean of -old_logps is {surprise:.4g} and that of entropies {h:.4g}, alike where "
                        f"tokens are sampled at the temperature of both: {name} may be in bits (multiply by 0.6931), "
                        "or the tokens were sampled at another temperature, or from the likeliest alone"
                    )
        return said


def _finite(name: str, x: Tensor, mask: Tensor) -> Tensor:
    """Say for which tokens a value is a number; a logit may be -inf, as one that is never sampled is, but not all."""
    if name != "logits":
        return torch.isfinite(x)
    return torch.isfinite(x.amax(-1)) if x.shape[-1] else torch.zeros_like(mask)


def check_mask(name: str, mask: Tensor, start: int = 0) -> None:
    """Raise InputError for a mask of anything but 0 and 1: NaN, a weight or a label is no answer to yes or no."""
    if mask.dtype == torch.bool:
        return
    odd = (mask != 0) & (mask != 1)
    if bool(odd.any()):
        raise InputError(
            f"{name} holds {int(odd.sum()):,} values other than 0 and 1, the first, {float(mask[odd][0]):g}, at "
            f"{_place(odd, start)}: must be 1 for tokens and 0 for padding; mend it"
        )


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, x * x


def _place(found: Tensor, start: int) -> str:
    """Say where the first one is."""
    place = int(found.flatten().to(torch.int8).argmax())
    if found.dim() < 2:
        return f"token {start + place}"
    return f"sequence {start + place // found.shape[-1]}, token {place % found.shape[-1]}"


def _not_logs(name: str, x: Tensor, above: Tensor, start: int) -> str:
    """Say what values that are no log-probabilities look like."""
    count = int(above.sum())
    if bool((x >= 0).all()):
        small = bool((x <= 1).all())
        guess, way = ("probabilities", "give their natural logarithms") if small else ("-log p", "change the sign, -x")
    else:
        guess, way = "logits", "give torch.log_softmax(logits, -1) of the taken tokens"
    return (
        f"{name} holds {count:,} of {len(x):,} values above 0, the first at {_place(above, start)}: must be natural "
        f"logarithms of probabilities, and these look like {guess}; {way}"
    )
