"""The expected gradient of a clip as a finite sum, and what it does to entropy; a simulation beside it.

A step of SGD along G moves the entropy H of a softmax by  dH = lr <dH/dlogits, G>  to first order, with
dH/dlogits_b = -pi_b (log pi_b + H).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bandpo._input import InputError
from bandpo.analysis.audit import whole_divergence
from bandpo.clips import get_clip, list_clips
from bandpo.clips.base import Clip
from bandpo.lab.bandit import Rollout, entropy, look, simulate
from bandpo.lab.bandit_config import Setting
from bandpo.operator.tokens import Tokens

COIN = (1.0, -1.0)  # the standardised advantages of a fair coin
PAID = (1.0, 0.0)  # the rewards that go with them
STEP = 1e-4  # learning rate of the simulated steps: so small that what is of second order is far below the interval
SEEDS, UPDATES = 128, 4  # at most so many seeds, and updates of each, give the states at which clips are compared
SAMPLES, REPETITIONS = 64, 16  # of the simulation beside the sum
DRAWN = 20_261_114  # seed of its draws, which all clips share
DRIFTS = "needs reward 'noise', positions 1 and at least 2 updates"
LOT = 96  # states at a time, which a core's cache holds


@dataclass(frozen=True)
class Drift:
    """What a clip's expected gradient does, by state.

    Args:
        gradient: of the expected objective by the logits, (..., K).
        entropy: first-order change of the entropy by a step of SGD along it, by unit of learning rate, in nats, (...).
        moved: total variation that steps along single samples move on average, by unit of learning rate, (...): what
            the clip lets through, before opposite samples cancel.
    """

    gradient: Tensor
    entropy: Tensor
    moved: Tensor


@torch.no_grad()
def entropy_drift(
    clip: object,
    log_pi_old: Tensor,
    log_pi: Tensor,
    advantages: Tensor,
    shares: Tensor | None = None,
    rewards: Tensor | None = None,
) -> Drift:
    """Return the exact expected gradient of a clip at given policies, and how it moves entropy.

    w_a = sum_A share(a, A) c(pi_old(a), pi(a) / pi_old(a), A),  G = sum_a w_a (e_a - pi) = w - (sum w) pi,
    dH = lr <dH/dlogits, G> = -lr sum_b pi_b (log pi_b + H) (w_b - (sum w) pi_b)

    Args:
        clip: a clip or its name. One that looks at sequences is given sequences of one token.
        log_pi_old: log-probabilities of all actions under the policy that the ratio divides by, (..., K).
        log_pi: the same under the policy in training, likewise.
        advantages: values that A may take: (M,) for every action, (K, M) by action, or (..., K, M); (K, 1) where A
            follows from the action.
        shares: how often each action comes with each advantage, in a shape that broadcasts with (..., K, M); None for
            samples of the old policy whose advantages are equally likely, whatever the action.
        rewards: the rewards that go with the advantages, likewise, for clips that need them.

    Returns:
        `Drift`, in float64.

    Raises:
        InputError: shapes that do not fit, shares that do not sum to 1, a clip that looks at the batch, whose gradient
            is no sum over actions.

    Source: the derivation stands above; for what clips do to entropy arXiv 2509.26114.
    """
    chosen = get_clip(clip)
    if chosen.looks_at == "batch":
        raise InputError(
            f"clip {chosen.name!r} looks at the whole batch: its expected gradient is no sum over actions; simulate it"
        )
    if log_pi.shape != log_pi_old.shape or log_pi.dim() < 1 or advantages.dim() < 1:
        raise InputError(
            f"log_pi_old has shape {tuple(log_pi_old.shape)}, log_pi {tuple(log_pi.shape)}, advantages "
            f"{tuple(advantages.shape)}: must be (..., K), the same, and (M,), (K, M) or (..., K, M)"
        )
    log_p, log_q = log_pi_old.double(), log_pi.double()
    shape = (*log_p.shape, advantages.shape[-1])
    each = {"advantages": _spread("advantages", advantages, shape)}
    if rewards is not None:
        each["rewards"] = _spread("rewards", rewards, shape)
    c = _coefficient(chosen, log_p, log_q, each)
    share = _shares(shares, log_p, shape)
    return _drift((share * c).sum(-1), (share * c.abs()).sum(-1), log_q, single_moves(log_q.exp()))


def _drift(w: Tensor, size: Tensor, log_q: Tensor, moves: Tensor) -> Drift:
    """What comes of the sums over A of share times c, and of share times |c|."""
    g = w - w.sum(-1, keepdim=True) * log_q.exp()
    return Drift(g, (entropy_gradient(log_q) * g).sum(-1), (size * moves).sum(-1))


def entropy_gradient(log_pi: Tensor) -> Tensor:
    """Return dH/dlogits = -pi (log pi + H), of the shape of `log_pi`."""
    return -log_pi.exp() * (log_pi + entropy(log_pi)[..., None])


def single_moves(pi: Tensor) -> Tensor:
    """Return the total variation by unit of c and learning rate of a step along e_a - pi, for each a: (..., K).

    The step moves pi_b by pi_b (1[a = b] - pi_b - pi_a + sum pi^2).
    """
    centre = pi.square().sum(-1, keepdim=True)
    rest = (centre - pi)[..., None, :] - pi[..., :, None]  # of b, the last, by a
    others = (pi[..., None, :] * rest.abs()).sum(-1)
    own = pi * ((1 + centre - 2 * pi).abs() - (centre - 2 * pi).abs())  # the term of b = a, put right
    return (others + own) / 2


def _spread(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    try:
        return x.double().expand(shape)
    except RuntimeError:
        raise InputError(
            f"{name} has shape {tuple(x.shape)}: must broadcast to (..., K, M), here {shape}; give (M,) or (K, M)"
        ) from None


def _shares(shares: Tensor | None, log_p: Tensor, shape: tuple[int, ...]) -> Tensor:
    if shares is None:
        return (log_p.exp() / shape[-1])[..., None].expand(shape)
    spread = _spread("shares", shares, shape)
    if not bool(((spread.sum((-2, -1)) - 1).abs() < 1e-6).all()) or not bool((spread >= 0).all()):
        raise InputError("shares must be at least 0 and sum to 1 over actions and advantages; divide them by their sum")
    return spread


def _coefficient(clip: Clip, log_p: Tensor, log_q: Tensor, each: dict[str, Tensor]) -> Tensor:
    """Return c of every action and advantage, (..., K, M)."""
    shape = each["advantages"].shape
    given = {"logps": log_q[..., None].expand(shape), "old_logps": log_p[..., None].expand(shape), **each}
    return _of_tokens(clip, given | {name: x.expand(shape) for name, x in _known(clip, log_p, log_q).items()})


def _of_tokens(clip: Clip, given: Mapping[str, Tensor]) -> Tensor:
    if clip.looks_at == "sequence":
        return clip.coefficient(Tokens(**{name: x[..., None] for name, x in given.items()}))[..., 0]
    return clip.coefficient(Tokens(**given))


def _known(clip: Clip, log_p: Tensor, log_q: Tensor) -> dict[str, Tensor]:
    """Return what the clip needs and follows from the policies, (..., 1 or K, 1)."""
    found = {}
    if "rollout_logps" in clip.needs:
        found["rollout_logps"] = log_p[..., None]
    if "entropies" in clip.needs:
        found["entropies"] = entropy(log_p)[..., None, None]
    if "state_divergence" in clip.needs:
        flat = whole_divergence(log_q.reshape(-1, log_q.shape[-1]), log_p.reshape(-1, log_p.shape[-1]))
        found["state_divergence"] = flat.view(log_p.shape[:-1])[..., None, None]
    return found


# ---------------------------------------------------------------- under noise: the sum and a simulation, side by side


@dataclass(frozen=True)
class States:
    """Policies at which clips are compared, and samples, which all clips share; float64.

    Args:
        log_old: the policy that samples, (K,), the same at every state.
        log_pi: the policies in training, (states, K), update by update, and seed by seed within each.
        moves: `single_moves` of them.
        seeds: how many seeds they come from.
        own: how often each action came with each advantage in the samples that moved the policy, (states, K, 2).
        own_advantages: what these advantages were, (states, 1, 2).
        batches: the same samples one by one, a state's as a seed's.
        actions: fresh samples, (repetitions, states, samples).
        heads: whether their coin fell on 1, likewise.
    """

    log_old: Tensor
    log_pi: Tensor
    moves: Tensor
    seeds: int
    own: Tensor
    own_advantages: Tensor
    batches: Rollout
    actions: Tensor
    heads: Tensor

    def lots(self) -> list[slice]:
        """Return the states in parts that a cache holds."""
        return [slice(i, i + LOT) for i in range(0, len(self.log_pi), LOT)]


def has_drift(setting: Setting) -> bool:
    """Return whether the clips of a setting can be compared by the drift of entropy: one state, its reward noise."""
    return setting.reward == "noise" and setting.positions == 1 and setting.updates > 1


def noise_states(setting: Setting, samples: int = SAMPLES, repetitions: int = REPETITIONS) -> States:
    """Return policies on the way through a setting's first rollout without a clip, with samples.

    Of each seed, 128 at most, the policies before the last update and before three earlier ones, evenly spread.

    Args:
        setting: one state, its reward noise, at least 2 updates.
        samples: fresh ones at each state in each repetition.
        repetitions: independent ones.

    Returns:
        `States`.

    Raises:
        InputError: another kind of setting.
    """
    if not has_drift(setting):
        given = f"{setting.reward!r}, {setting.positions} and {setting.updates}"
        raise InputError(f"setting {setting.name!r}: {DRIFTS}, not {given}")
    first = dataclasses.replace(setting, seeds=min(setting.seeds, SEEDS), rollouts=1, dtype="float64")
    seen: list[list[tuple[Tensor, ...]]] = [[] for _ in range(setting.updates)]
    simulate(first, get_clip("none"), lambda update, log_pi, batch: seen[update].append(_seen(log_pi, batch)))
    step = max(1, setting.updates // UPDATES)
    parts = [part for lots in seen[:0:-step][:UPDATES] for part in lots]
    log_pi, own, advantages, *batches = (torch.cat(x) for x in zip(*parts, strict=True))
    generator = torch.Generator().manual_seed(DRAWN)
    shape = (repetitions, len(log_pi), samples)
    old = batches[-1][0, 0]
    uniform, sums = torch.rand(shape, generator=generator, dtype=torch.float64), old.exp().cumsum(0)
    actions = torch.searchsorted(sums, uniform * sums[-1], right=True).clamp_(max=setting.actions - 1)
    heads = torch.rand(shape, generator=generator) < 0.5
    moves = torch.cat([single_moves(x.exp()) for x in log_pi.split(LOT)])
    return States(old, log_pi, moves, first.seeds, own, advantages, Rollout(*batches), actions, heads)


def _seen(log_pi: Tensor, batch: Rollout) -> tuple[Tensor, ...]:
    """Return log pi, the shares of (action, coin), the coin's advantages and the batch of one update, by seed."""
    actions, advantages, heads = batch.actions[:, 0], batch.advantages[:, 0], batch.rewards[:, 0]
    each = torch.full_like(heads, 1 / heads.shape[1])
    own = torch.zeros(*log_pi[:, 0].shape, 2, dtype=torch.float64).flatten(1)
    own = own.scatter_add_(1, 2 * actions + (heads == 0).long(), each).view(*log_pi[:, 0].shape, 2)
    values = torch.stack([advantages.clamp(min=0).amax(1), advantages.clamp(max=0).amin(1)], -1)
    each_of_batch = (batch.actions, batch.old, batch.advantages, batch.rewards, batch.log_old)
    return log_pi[:, 0].clone(), own, values[:, None], *each_of_batch


@torch.no_grad()
def simulated_drift(clip: Clip, states: States) -> tuple[Tensor, Tensor]:
    """Return the change of entropy and the total variation of sampled SGD steps, both by unit of learning rate.

    At each state, from each repetition's fresh samples with the coin's advantages, one step; the entropy is that of the
    new policy less that of the old, and nothing is linear but the limit.

    Args:
        clip: the clip, which looks at no batch.
        states: where.

    Returns:
        Means over the states, each (repetitions,).
    """
    changes, moved = torch.zeros(2, len(states.actions), dtype=torch.float64)
    for lot in states.lots():
        log_pi, moves = states.log_pi[lot], states.moves[lot]
        q, log_old = log_pi.exp(), states.log_old.expand_as(log_pi)
        known, before = _known(clip, log_old, log_pi), entropy(log_pi)
        for i, (actions, heads) in enumerate(zip(states.actions[:, lot], states.heads[:, lot], strict=True)):
            given = {"logps": log_pi.gather(1, actions), "old_logps": log_old.gather(1, actions)}
            given |= {"advantages": torch.where(heads, *COIN).double(), "rewards": heads.double()}
            c = _of_tokens(clip, given | {name: _at(x, actions) for name, x in known.items()})
            taken = torch.zeros_like(q).scatter_add_(1, actions, c / c.shape[1])
            after = (log_pi + STEP * (taken - q * taken.sum(1, keepdim=True))).log_softmax(-1)
            changes[i] += (entropy(after) - before).sum() / STEP
            moved[i] += (c.abs() * moves.gather(1, actions)).mean(1).sum()
    return changes / len(states.log_pi), moved / len(states.log_pi)


def _at(x: Tensor, actions: Tensor) -> Tensor:
    """Pick a known value, (states, 1 or K, 1), for the actions."""
    wide = x[..., 0]
    return wide.gather(1, actions) if wide.shape[1] > 1 else wide.expand(actions.shape).contiguous()


@torch.no_grad()
def exact_drift(clip: Clip, states: States) -> tuple[Tensor, bytes]:
    """Return the exact drift and total variation by seed, for fresh samples and for the policy's own: (4, seeds).

    Args:
        clip: the clip, which looks at no batch.
        states: where.

    Returns:
        These numbers, and a digest of c at every state, action and side of the coin.
    """
    found, digest = [], hashlib.sha256()
    for lot in states.lots():
        log_pi, own = states.log_pi[lot], states.own[lot]
        log_old, paid = states.log_old.expand_as(log_pi), torch.tensor(PAID, dtype=torch.float64)
        fresh = states.log_old.exp()[:, None] / 2
        rows = []
        for share, advantages in ((fresh, torch.tensor(COIN, dtype=torch.float64)), (own, states.own_advantages[lot])):
            each = {"advantages": advantages.expand(own.shape), "rewards": paid.expand(own.shape)}
            c = _coefficient(clip, log_old, log_pi, each)
            drift = _drift((share * c).sum(-1), (share * c.abs()).sum(-1), log_pi, states.moves[lot])
            rows += [drift.entropy, drift.moved]
            if share is fresh:
                digest.update(c.numpy().tobytes())
        found.append(torch.stack(rows))
    return torch.cat(found, 1).view(4, -1, states.seeds).mean(1), digest.digest()


@torch.no_grad()
def batch_drift(clip: Clip, states: States) -> tuple[Tensor, Tensor]:
    """Return the drift and total variation by seed that the samples give which moved the policy, each (seeds,).

    For clips that look at the whole batch, whose gradient for fresh samples is no sum over actions; for the others it
    is what `exact_drift` has for the policy's own samples.

    Args:
        clip: any clip.
        states: where; each state's samples are a batch, a sequence of one token each.
    """
    batch, log_pi = states.batches, states.log_pi
    c = torch.cat([clip.coefficient(tokens).reshape(-1) for tokens in look(clip, batch, log_pi[:, None])])
    actions = batch.actions[:, 0]
    each = c.view(actions.shape) / actions.shape[1]
    w, size = (torch.zeros_like(log_pi).scatter_add_(1, actions, x) for x in (each, each.abs()))
    drift = _drift(w, size, log_pi, states.moves)
    return drift.entropy.view(-1, states.seeds).mean(0), drift.moved.view(-1, states.seeds).mean(0)


def drift_table(setting: Setting, tell: Any = None) -> list[dict[str, Any]]:
    """Return the drift of entropy by unit of total variation moved, for the clips of the registry and of a setting.

    Clips that look at sequences get sequences of one token.

    Args:
        setting: as in `noise_states`.
        tell: called with the share that is done.

    Returns:
        A row a clip, by the first number: name, clip, clip_args, arm (whether it is one of the setting); exact, with
        exact_low and exact_high over seeds, for fresh samples; simulated, with simulated_low and simulated_high over
        repetitions at the same states, less the same steps without a clip, whose sum is 0: these intervals hold
        `exact` for all clips together in 95 of 100 tables; own, with own_low and own_high over seeds: the exact number
        for the samples that moved the policy, less that without a clip. All in nats by unit. Clips that look at the
        batch have the last alone, and NaN for the rest.
    """
    states = noise_states(setting)
    rows, clips = [], _clips(setting)
    level = 1 - 0.05 / sum(clip.looks_at != "batch" for _, clip, _, _ in clips)
    without, stepped = batch_drift(get_clip("none"), states)[0], simulated_drift(get_clip("none"), states)[0]
    steps: dict[bytes, tuple[Tensor, Tensor]] = {}  # by c: clips that do the same here are simulated once
    for i, (name, clip, spec, arm) in enumerate(clips):
        values = dict.fromkeys(("exact", "simulated"), (math.nan,) * 3)
        if clip.looks_at == "batch":
            own, own_moved = batch_drift(clip, states)
        else:
            (fresh, moved, own, own_moved), same = exact_drift(clip, states)
            if same not in steps:
                steps[same] = simulated_drift(clip, states)
            change, went = steps[same]
            values = {"exact": ratio(fresh, moved), "simulated": ratio(change - stepped, went, level)}
        values["own"] = ratio(own - without, own_moved)
        row: dict[str, Any] = {"name": name, **spec, "arm": arm}
        for key, (value, low, high) in values.items():
            row |= {key: value, f"{key}_low": low, f"{key}_high": high}
        rows.append(row)
        if tell is not None:
            tell((i + 1) / len(clips))
    return sorted(rows, key=lambda row: (math.isnan(row["exact"]), -row["exact"], -row["own"]))


def _clips(setting: Setting) -> list[tuple[str, Clip, Mapping[str, Any], bool]]:
    """Return the clips of the registry, and the arms that are none of them, as (name, clip, spec, arm)."""
    own = {arm.name: arm for arm in setting.arms}
    found: list[tuple[str, Clip, Mapping[str, Any], bool]] = []
    for name in list_clips():
        clip = get_clip(name)
        same = [arm.name for arm in own.values() if arm.clip == clip]
        for arm in same:
            del own[arm]
        found.append((name, clip, {"clip": name, "clip_args": {}}, bool(same)))
    found += [(arm.name, arm.clip, dict(arm.spec), True) for arm in own.values()]
    return found


def ratio(x: Tensor, y: Tensor, level: float = 0.95) -> tuple[float, float, float]:
    """Return mean x / mean y with its interval (delta method, t); 0 where nothing moved, NaN ends for one value."""
    from scipy.stats import t

    n, below = len(x), float(y.mean())
    if below == 0:
        return 0.0, 0.0, 0.0
    value = float(x.mean()) / below
    if n < 2:
        return value, math.nan, math.nan
    half = float(t.ppf((1 + level) / 2, n - 1)) * float((x - value * y).std()) / (math.sqrt(n) * below)
    return value, value - half, value + half
