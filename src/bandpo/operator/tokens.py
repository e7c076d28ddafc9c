"""Tokens: how far each one moved between two policies, and everything else that a clip may look at.

Nothing that is handed out is ever written to. All is computed in log space, so that it exists for every probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from bandpo._input import InputError, as_mask, check_tensor, per_token

LARGE = 3e38  # stands for infinity where inf * 0 would make a NaN; float32 can hold it
TINY = 1.2e-38  # stands for 0 under a division
MOST_LOG_RATIO = 80.0  # r = e^80 is far past any use, and products with it stay finite
PADDING = -1.0  # the log-probability that stands in padding, under both policies: it has not moved

T = TypeVar("T")


class cached(Generic[T]):  # noqa: N801  # reads as a decorator
    """A property that is computed once. functools' takes a lock, which torch.compile cannot enter."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, owner: Any, kind: type | None = None) -> T:
        if owner is None:
            return self  # type: ignore[return-value]
        value = self.function(owner)
        owner.__dict__[self.function.__name__] = value
        return value


def working_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which `x` is computed: float64 for float64, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def certain(x: Tensor) -> float:
    """Return what stands for 1 - p where log p is 0: a softmax in the dtype of `x` rounds to 1 below 16 times this."""
    return torch.finfo(x.dtype).eps / 32


def above(x: Tensor, limit: float | Tensor) -> Tensor:
    """Return 1.0 where x > limit, else 0.0, in the dtype of `x`: on a CPU several times as fast as a bool tensor."""
    return torch.gt(x, limit, out=torch.empty_like(x))


def expm1(x: Tensor) -> Tensor:
    """Return e^x - 1 with all its digits, for x <= 88; Inductor's code for a CPU would compute exp(x) - 1."""
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return torch.tanh(x / 2) * (torch.exp(x) + 1)
    return torch.expm1(x)


class Outcome:
    """The mass of one outcome under both policies: its old and new probability p and q, q - p, and log(q / p)."""

    def __init__(self, p: Tensor, q: Tensor, moved: Tensor, log_r: Tensor) -> None:
        self.p, self.q, self.moved, self.log_r = p, q, moved, log_r


class Move:
    """How far each token moved: from probability p to q = r p.

    Args:
        logps: natural-log probabilities of the taken actions under the new policy, any shape.
        old_logps: the same under the old policy, same shape.
        mask: bool, False in padding, or None. Padding has not moved, whatever it holds, NaN too.

    Attributes:
        log_p: log p, at least -3e38, in float32 (float64 for float64); -1 in padding.
        log_q: log q, likewise, but -inf where it is.
        log_r: log(q / p), from -3e38 to 3e38, 0 in padding.
    """

    def __init__(self, logps: Tensor, old_logps: Tensor, mask: Tensor | None = None) -> None:
        dtype = working_dtype(logps)
        new, old = logps.detach().to(dtype), old_logps.detach().to(dtype)
        if mask is not None:
            new, old = torch.where(mask, new, PADDING), torch.where(mask, old, PADDING)
        self.log_p, self.log_q = old.clamp(min=-LARGE), new  # -inf - -inf would be NaN
        self.log_r = (self.log_q - self.log_p).clamp_(-LARGE, LARGE)

    @property
    def ratio(self) -> Tensor:
        """The ratio r = q / p, at most e^80."""
        return self.log_r.clamp(max=MOST_LOG_RATIO).exp_()

    @cached
    def rise(self) -> Tensor:
        """The ratio less 1, exact near r = 1."""
        return expm1(self.log_r.clamp(max=MOST_LOG_RATIO))

    @cached
    def p(self) -> Tensor:
        """The old probability."""
        return torch.exp(self.log_p)

    @cached
    def q(self) -> Tensor:
        """The new probability."""
        return torch.exp(self.log_q)

    @cached
    def moved(self) -> Tensor:
        """The change q - p with all its digits."""
        return Taken(self).moved

    @cached
    def rest(self) -> Tensor:
        """The others' old probability 1 - p, with all its digits near p = 1, at least `certain`."""
        return Others(self, self.log_r).p

    def outcomes(self) -> tuple[Taken, Others]:
        """Return the taken action, and all others merged into one outcome; made anew, as they hold much memory."""
        taken = Taken(self)
        return taken, Others(self, taken.moved)


class Taken:
    """The taken action as an outcome; see `Outcome`. Its p and q may be 0 in any arithmetic, their logarithms not."""

    def __init__(self, move: Move) -> None:
        self.log_p, self.log_q, self.log_r = move.log_p, move.log_q, move.log_r

    @property
    def p(self) -> Tensor:
        """The old probability."""
        return torch.exp(self.log_p)

    @property
    def q(self) -> Tensor:
        """The new probability."""
        return torch.exp(self.log_q)

    @property
    def fall(self) -> Tensor:
        """e^-|log r| - 1: how far the smaller of p and q is below the larger."""
        return expm1(self.log_r.abs().neg_())

    @cached
    def moved(self) -> Tensor:
        """The change q - p: the larger of both times 1 - e^-|log r|, so that nothing overflows."""
        return torch.exp(torch.maximum(self.log_p, self.log_q)).mul_(self.fall).copysign_(self.log_r)


class Others:
    """All actions but the taken one, as one outcome of probability 1 - p and 1 - q; see `Outcome`."""

    def __init__(self, move: Move, moved: Tensor) -> None:
        self._log_q, self._moved, self._least = move.log_q, moved, certain(move.log_p)
        self.p = expm1(move.log_p).neg_().clamp_(min=self._least)

    @property
    def q(self) -> Tensor:
        """1 - q, at least `certain`."""
        return expm1(self._log_q.clamp(max=0.0)).neg_().clamp_(min=self._least)

    @property
    def moved(self) -> Tensor:
        """The change (1 - q) - (1 - p)."""
        return -self._moved

    @property
    def log_r(self) -> Tensor:
        """log((1 - q) / (1 - p)), which keeps its digits where q is near p; finite where q rounds to 1."""
        share = torch.maximum(self.moved, self._least - self.p).div_(self.p)
        return share.log1p_().clamp_(min=math.log(self._least))


class Tokens(Move):
    """What a clip may look at: log p, log r, A and the mask, and all that follows from them; never written to.

    Args:
        logps: natural-log probabilities of the taken actions under the policy in training, (batch, token) or any shape.
        old_logps: the same under the policy that the ratio divides by, same shape.
        advantages: per token, or per sequence (batch,) or (batch, 1).
        mask: 1 for tokens, 0 for padding, same shape, any integer, bool or floating type; or None. Padding is inert
            whatever it holds, NaN too: log r = 0, A = 0.
        rollout_logps: log-probabilities under the engine that sampled, same shape, for clips that need them; or None.
        entropies: of the old policy at each token in nats, same shape, for clips that need them; or None.
        rewards: of each sequence, (batch,), or per token, for clips that need their sign; or None.
        state_divergence: of the new policy from the old one at each state, over the top k actions or all
            (`bandpo.top_k_divergence`), same shape, for clips that need it; or None.

    Attributes:
        log_p: log p, as in `Move`; so are `log_q`, `log_r`, `ratio` (r), `rise` (r - 1), `p`, `q`, `moved` (q - p),
            `rest` (1 - p); `weighted` is r A, `advantages` A, 0 in padding, `mask` bool or None; all of one shape.

    Raises:
        InputError: shapes, dtypes or devices that do not fit.
    """

    def __init__(
        self,
        logps: Tensor,
        old_logps: Tensor,
        advantages: Tensor,
        mask: Tensor | None = None,
        rollout_logps: Tensor | None = None,
        entropies: Tensor | None = None,
        rewards: Tensor | None = None,
        state_divergence: Tensor | None = None,
    ) -> None:
        check_tensor("logps", logps)
        check_tensor("old_logps", old_logps, like=logps)
        token = as_mask(mask, logps)
        super().__init__(logps, old_logps, token)
        each = per_token(advantages, logps).detach().to(self.log_p.dtype).expand_as(logps)
        self.advantages, self.mask = each if token is None else torch.where(token, each, 0.0), token
        self.rollout_logps = self._optional("rollout_logps", rollout_logps, PADDING)
        self.entropies = self._optional("entropies", entropies)
        self.rewards = self._optional("rewards", None if rewards is None else per_token(rewards, logps, "rewards"))
        self.state_divergence = self._optional("state_divergence", state_divergence)
        self.__dict__["_frozen"] = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_frozen" in self.__dict__:
            raise AttributeError(f"Tokens.{name} cannot be set: a clip never changes what it is given")
        self.__dict__[name] = value

    @cached
    def weighted(self) -> Tensor:
        """R A: the coefficient without a clip."""
        return self.ratio * self.advantages

    def _optional(self, name: str, x: Tensor | None, padding: float = 0.0) -> Tensor | None:
        if x is None:
            return None
        if name != "rewards":
            check_tensor(name, x, like=self.log_p)
        x = x.detach().to(self.log_p.dtype).expand_as(self.log_p)
        return x if self.mask is None else torch.where(self.mask, x, padding)

    def need(self, name: str, clip: str) -> Tensor:
        """Return one of the optional tensors; raise InputError that names it where it was not given."""
        x: Tensor | None = getattr(self, name)
        if x is None:
            raise InputError(f"clip {clip!r} needs {name}: give {name}=..., or take a clip without, such as 'band'")
        return x
