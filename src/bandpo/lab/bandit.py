"""A softmax over K actions, or a short chain of them, trained under any clip: hundreds of seeds in one tensor program.

Each seed is a run of its own: its logits, its samples, its optimiser's state; nothing is shared but the arithmetic. The
gradient of the mean of c log pi over the samples is written out, so that there is nothing to differentiate:
G = mean_i c_i (e_{a_i} - pi).
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bandpo.analysis.audit import whole_divergence
from bandpo.clips.base import Clip
from bandpo.lab.bandit_config import Setting
from bandpo.loss.stats import ClipStats, count
from bandpo.operator.tokens import Tokens

SMALL = 0.01  # an action that starts below this probability belongs to the tail
CACHED = 100_000  # numbers in a tensor of as many seeds as are computed at a time: what a core's cache holds
COUNTED = 4  # every so many rollouts, statistics by bucket are taken
STD = 1e-4  # added to a group's standard deviation, as TRL does
ADAM_EPS = 1e-8

Tell = Callable[[float], None]


@dataclass
class Trace:
    """What a simulation recorded, by seed and rollout; means over the positions of a chain.

    Args:
        entropy: in nats, before the first rollout and after each, (seeds, rollouts + 1).
        good: probability that a whole sequence is good, likewise; 0 where nothing is.
        tail: mass of the actions that started below .01, likewise.
        kl: KL(before || after) of each rollout's updates, in nats, (seeds, rollouts).
        tv: total variation of the same.
        kl_old: KL(old || after), old being the policy that made the rollout; kl without staleness.
        zero: sampled tokens with A and without a gradient, summed over updates.
        active: sampled tokens with A not 0, summed over updates.
        kept: sum of max(0, c sgn A) over updates.
        free: sum of |r A| over updates.
        stats: what the clip did at the last update of every fourth rollout, all seeds together.
    """

    entropy: Tensor
    good: Tensor
    tail: Tensor
    kl: Tensor
    tv: Tensor
    kl_old: Tensor
    zero: Tensor
    active: Tensor
    kept: Tensor
    free: Tensor
    stats: ClipStats

    @classmethod
    def join(cls, parts: list[Trace]) -> Trace:
        """Return the traces of several lots of seeds as one."""
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in COLUMNS}
        return cls(**joined, stats=add([part.stats for part in parts]))


COLUMNS = tuple(f.name for f in fields(Trace) if f.name != "stats")


def add(parts: list[ClipStats]) -> ClipStats:
    """Return the sum of some statistics."""
    return functools.reduce(ClipStats.__add__, parts)


def start_logps(setting: Setting) -> Tensor:
    """Return the log-probabilities with which every state starts: good actions, the decent one, the rest; (K,)."""
    firsts: list[float] = []
    if setting.reward != "noise":
        firsts = [setting.good_p] * setting.good + ([setting.decent_p] if setting.decent_p > 0 else [])
    rest = torch.arange(1, setting.actions - len(firsts) + 1, dtype=torch.float64)
    rest = 1 / rest if setting.start == "rank" else torch.ones_like(rest)
    p = torch.cat([torch.tensor(firsts, dtype=torch.float64), rest * (1 - math.fsum(firsts)) / rest.sum()])
    return p.log()


def action_rewards(setting: Setting) -> Tensor:
    """Return what each action pays, (K,) float64; 0 for all where the reward is noise."""
    pays = torch.zeros(setting.actions, dtype=torch.float64)
    if setting.reward != "noise":
        pays[: setting.good] = 1.0
        if setting.decent_p > 0:
            pays[setting.good] = setting.decent_reward
    return pays


@torch.no_grad()
def simulate(setting: Setting, clip: Clip, watch: Watch | None = None, tell: Tell | None = None) -> Trace:
    """Train every seed of a setting under a clip.

    A seed draws the same uniform numbers whatever the clip and whatever the other seeds: arms differ by their policies
    alone. Clips that look at sequences get each sequence as one, clips that look at the batch one seed's minibatch at a
    time, in a loop.

    Args:
        setting: the setting; its own arms are not looked at.
        clip: the clip.
        watch: called before every update, for a lot of seeds at a time, with its number in the rollout, from 0, the
            seeds' log-probabilities, (seeds, L, K), and the samples that it takes.
        tell: called with the share that is done.

    Returns:
        `Trace`.

    Raises:
        InputError: the clip refuses the tokens.
    """
    widest = max(setting.actions, setting.samples // setting.minibatches) * setting.positions
    size = max(1, CACHED // widest)
    seeds = range(setting.first_seed, setting.first_seed + setting.seeds)
    lots = [seeds[i : i + size] for i in range(0, len(seeds), size)]
    parts = []
    for i, lot in enumerate(lots):
        parts.append(_Runs(setting, clip, lot, watch).train())
        if tell is not None:
            tell((i + 1) / len(lots))
    return Trace.join(parts)


@dataclass(frozen=True)
class Rollout:
    """Samples and all that a clip may look at; the samples are the last dimension.

    Args:
        actions: (seeds, L, samples).
        old: their log-probabilities under the policy that made them, likewise.
        advantages: likewise.
        rewards: likewise.
        log_old: the whole old policy, (seeds, L, K).
    """

    actions: Tensor
    old: Tensor
    advantages: Tensor
    rewards: Tensor
    log_old: Tensor

    def part(self, start: int, end: int) -> Rollout:
        """Return the samples from `start` to `end`."""
        actions, old, advantages, rewards = (
            x[..., start:end] for x in (self.actions, self.old, self.advantages, self.rewards)
        )
        return Rollout(actions, old, advantages, rewards, self.log_old)


Watch = Callable[[int, Tensor, Rollout], None]


def look(clip: Clip, batch: Rollout, log_pi: Tensor) -> Iterator[Tokens]:
    """Yield the tokens of a batch as a clip must see them: at once, as sequences, or seed by seed.

    Args:
        clip: the clip.
        batch: the samples.
        log_pi: the policy in training, (seeds, L, K).

    Yields:
        Tokens, of shape (seeds, L, samples), (seeds * samples, L), or (samples, L) for each seed.
    """
    given = {"logps": log_pi.gather(2, batch.actions), "old_logps": batch.old, "advantages": batch.advantages}
    given |= {name: _needed(name, batch, log_pi) for name in clip.needs}
    if clip.looks_at == "token":
        yield Tokens(**given)
    elif clip.looks_at == "sequence":
        yield Tokens(**{name: x.transpose(1, 2).flatten(0, 1) for name, x in given.items()})
    else:
        for s in range(log_pi.shape[0]):
            yield Tokens(**{name: x[s].T for name, x in given.items()})


def _needed(name: str, batch: Rollout, log_pi: Tensor) -> Tensor:
    """Return one of the optional tensors: the bandit knows them all."""
    if name == "rollout_logps":
        return batch.old
    if name == "rewards":
        return batch.rewards
    by_state = entropy(batch.log_old) if name == "entropies" else whole_divergence(log_pi, batch.log_old)
    return by_state.to(batch.old)[..., None].expand_as(batch.old)


def _unlook(clip: Clip, found: list[Tensor], shape: torch.Size) -> Tensor:
    """Return what came of `look`, one value a token, in the shape of the samples."""
    if clip.looks_at == "token":
        return found[0]
    seeds, length, samples = shape
    return torch.stack(found).view(seeds, samples, length).transpose(1, 2)


def entropy(log_pi: Tensor) -> Tensor:
    """Return the entropy in nats over the last dimension."""
    return -(log_pi.exp() * log_pi).sum(-1)


class Optimizer:
    """SGD, or Adam, whose state is a number for each logit, so that one of them serves all seeds; it ascends.

    Args:
        kind: "adam" or "sgd".
        lr: learning rate.
        betas: Adam's.
    """

    def __init__(self, kind: str, lr: float, betas: tuple[float, float]) -> None:
        self.kind, self.lr, self.betas, self.steps = kind, lr, betas, 0

    def step(self, x: Tensor, gradient: Tensor) -> None:
        """Move `x` along the gradient, in place."""
        if self.kind == "sgd":
            x.add_(gradient, alpha=self.lr)
            return
        if self.steps == 0:
            self.mean, self.square = torch.zeros_like(x), torch.zeros_like(x)
        self.steps += 1
        first, second = self.betas
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        width = self.square.sqrt().div_(math.sqrt(1 - second**self.steps)).add_(ADAM_EPS)
        x.addcdiv_(self.mean, width, value=self.lr / (1 - first**self.steps))


class _Runs:
    """The runs of a lot of seeds."""

    def __init__(self, setting: Setting, clip: Clip, seeds: range, watch: Watch | None) -> None:
        self.setting, self.clip, self.watch = setting, clip, watch
        self.dtype = getattr(torch, setting.dtype)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        start = start_logps(setting)
        self.logits = start.to(self.dtype).repeat(len(seeds), setting.positions, 1)
        self.tail = (start < math.log(SMALL)).to(self.dtype)
        self.pays = action_rewards(setting)
        self.optimizer = Optimizer(setting.optimizer, setting.lr, setting.betas)

    def train(self) -> Trace:
        """Run all rollouts."""
        setting, log_pi = self.setting, self.logits.log_softmax(-1)
        policies = deque([log_pi], maxlen=setting.staleness + 1)
        states, moves, work = [self._state(log_pi)], [], []
        stats: list[ClipStats] = []
        for i in range(setting.rollouts):
            clip = self.clip.at(i / max(setting.rollouts - 1, 1))
            rollout = self._sample(policies[0])
            done = self._updates(clip, rollout, stats if i % COUNTED == 0 else None)
            before, log_pi = log_pi, self.logits.log_softmax(-1)
            policies.append(log_pi)
            states.append(self._state(log_pi))
            moves.append(torch.stack([*_moved(before, log_pi), _moved(rollout.log_old, log_pi)[0]], -1))
            work.append(done)
        columns = [x for part in (states, moves, work) for x in torch.stack(part, 1).double().unbind(-1)]
        return Trace(**dict(zip(COLUMNS, columns, strict=True)), stats=add(stats))

    def _state(self, log_pi: Tensor) -> Tensor:
        """Entropy, probability of a good sequence, mass of the tail: (seeds, 3)."""
        pi = log_pi.exp()
        good = self.setting.good if self.setting.reward != "noise" else 0
        whole = pi[..., :good].sum(-1).prod(-1)
        return torch.stack([entropy(log_pi).mean(-1), whole, (pi @ self.tail).mean(-1)], -1)

    def _sample(self, log_old: Tensor) -> Rollout:
        """Draw a rollout from a policy: by inverse distribution function, so that equal policies draw equal actions."""
        setting, (seeds, length, actions) = self.setting, log_old.shape
        drawn = [torch.rand(length + 1, setting.samples, generator=g, dtype=torch.float64) for g in self.generators]
        uniform = torch.stack(drawn)
        sums = log_old.double().exp().cumsum(-1)
        last = sums[..., -1:].clone()  # 1 but for rounding
        taken = torch.searchsorted(sums, uniform[:, :length] * last, right=True).clamp_(max=actions - 1)
        if setting.reward == "noise":
            rewards = (uniform[:, length] >= 0.5).double()
        else:
            rewards = self.pays[taken].amin(1)
        advantages = standardise(rewards, setting.group or setting.samples).to(self.dtype)
        shape = (seeds, length, setting.samples)
        advantages, rewards = (x.to(self.dtype)[:, None].expand(shape).contiguous() for x in (advantages, rewards))
        return Rollout(taken, log_old.gather(2, taken), advantages, rewards, log_old)

    def _updates(self, clip: Clip, rollout: Rollout, stats: list[ClipStats] | None) -> Tensor:
        """Make a rollout's updates; return sums of what the clip did, (seeds, 4), and append its statistics."""
        setting, size = self.setting, self.setting.samples // self.setting.minibatches
        done = torch.zeros(len(self.generators), 4, dtype=torch.float64)
        parts = [rollout.part(i, i + size) for i in range(0, setting.samples, size)]
        signs = [torch.sign(part.advantages) for part in parts]
        for step in range(setting.updates):
            batch, log_pi = parts[step % len(parts)], self.logits.log_softmax(-1)
            views = list(look(clip, batch, log_pi))
            c = [clip.coefficient(tokens) for tokens in views]
            if self.watch is not None:
                self.watch(step, log_pi, batch)
            taken = _unlook(clip, c, batch.actions.shape)
            free = _unlook(clip, [tokens.weighted for tokens in views], taken.shape)
            done += _did(taken, free, signs[step % len(parts)])
            self.optimizer.step(self.logits, gradient(taken, batch.actions, log_pi))
        if stats is not None:
            stats += [count(clip, tokens, x) for tokens, x in zip(views, c, strict=True)]
        return done


def standardise(rewards: Tensor, group: int) -> Tensor:
    """Return (R - mean) / (std + 1e-4) within groups of that many samples in a row; 0 in a group of equal rewards."""
    grouped = rewards.unflatten(-1, (-1, group))
    centred = grouped - grouped.mean(-1, keepdim=True)
    equal = grouped.amax(-1, keepdim=True) == grouped.amin(-1, keepdim=True)  # where rounding would become an advantage
    return torch.where(equal, 0.0, centred / (grouped.std(-1, keepdim=True) + STD)).flatten(-2)


def gradient(c: Tensor, actions: Tensor, log_pi: Tensor) -> Tensor:
    """Return the gradient by the logits of the mean over tokens of c log pi: mean_i c_i (e_{a_i} - pi).

    Args:
        c: coefficients of the samples, (seeds, L, samples).
        actions: the samples, likewise.
        log_pi: the policy in training, (seeds, L, K).

    Returns:
        Tensor of the shape of `log_pi`.
    """
    tokens = c.shape[-2] * c.shape[-1]
    taken = torch.zeros_like(log_pi).scatter_add_(-1, actions, c / tokens)
    return taken - log_pi.exp() * taken.sum(-1, keepdim=True)


def _did(c: Tensor, weighted: Tensor, sign: Tensor) -> Tensor:
    """Return (seeds, 4): tokens without a gradient, with an advantage, gradient kept, gradient without a clip."""
    active = sign.abs()
    zero = torch.eq(c, 0.0, out=torch.empty_like(c)).mul_(active)  # a float at once: three times as fast as a bool
    kept = (c * sign).clamp_(min=0.0)
    return torch.stack([x.sum((1, 2)) for x in (zero, active, kept, weighted * sign)], -1).double()


def _moved(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) and the total variation of two policies, means over the positions."""
    p = log_p.exp()
    kl = (p * (log_p - log_q)).sum(-1).clamp(min=0.0)
    return kl.mean(-1), (log_q.exp() - p).abs().sum(-1).mean(-1) / 2
