"""The expected gradient of a clip as a finite sum, and what it does to entropy; a simulation beside it.

A step of SGD along G moves the entropy H of a softmax by  dH = lr <dH/dlogits, G>  to first order, with
dH/dlogits_b = -pi_b (log pi_b + H).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bandpo._input import InputError
from bandpo.analysis.audit import whole_divergence
from bandpo.clips import get_clip
from bandpo.clips.base import Clip
from bandpo.lab.bandit import entropy, simulate
from bandpo.lab.bandit_config import Setting
from bandpo.operator.tokens import Tokens

COIN = (1.0, -1.0)  # the standardised advantages of a fair coin
COIN_REWARDS = (1.0, 0.0)
STEP = 1e-4  # learning rate of the simulated steps: so small that what is of second order is far below the interval
SAMPLES, REPETITIONS, SEEDS = 128, 16, 64  # of the simulation beside the sum
DRAWN = 20_261_114  # seed of its draws, which all clips share


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
    chances: Tensor | None = None,
    rewards: Tensor | None = None,
) -> Drift:
    """Return the exact expected gradient of a clip at given policies, and how it moves entropy.

    w_a = pi_old(a) E_A[c(pi_old(a), pi(a) / pi_old(a), A)],  G = sum_a w_a (e_a - pi) = w - (sum w) pi,
    dH = -lr sum_b pi_b (log pi_b + H) (w_b - (sum w) pi_b)

    Args:
        clip: a clip or its name. One that looks at sequences is given sequences of one token.
        log_pi_old: log-probabilities of all actions under the policy that samples, (..., K).
        log_pi: the same under the policy in training, likewise.
        advantages: values that A may take: (M,) for every action, (K, M) by action, or (..., K, M); (K, 1) where A
            follows from the action.
        chances: their probabilities, in a shape that broadcasts with it; equal where None.
        rewards: the rewards that go with them, likewise, for clips that need them.

    Returns:
        `Drift`, in float64.

    Raises:
        InputError: shapes that do not fit, chances that do not sum to 1, a clip that looks at the batch, whose gradient
            is no sum over actions.

    Source: the derivation stands above; as a result about clips arXiv 2509.26114.
    """
    chosen = get_clip(clip)
    if chosen.looks_at == "batch":
        raise InputError(
            f"clip {chosen.name!r} looks at the whole batch: its expected gradient is no sum over actions; simulate it"
        )
    if log_pi.shape != log_pi_old.shape or log_pi.dim() < 1:
        raise InputError(
            f"log_pi has shape {tuple(log_pi.shape)}, log_pi_old {tuple(log_pi_old.shape)}: both must be (..., K)"
        )
    log_p, log_q = log_pi_old.double(), log_pi.double()
    shape = (*log_p.shape, advantages.shape[-1] if advantages.dim() else 1)
    each = {"advantages": _spread("advantages", advantages, shape)}
    if rewards is not None:
        each["rewards"] = _spread("rewards", rewards, shape)
    chance = _chances(chances, shape)
    c = _coefficient(chosen, log_p, log_q, each)
    p, q = log_p.exp(), log_q.exp()
    w, size = p * (chance * c).sum(-1), p * (chance * c.abs()).sum(-1)
    g = w - w.sum(-1, keepdim=True) * q
    return Drift(g, (entropy_gradient(log_q) * g).sum(-1), (size * single_moves(q)).sum(-1))


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


def _chances(chances: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if chances is None:
        return torch.full(shape, 1 / shape[-1], dtype=torch.float64)
    spread = _spread("chances", chances, shape)
    if not bool(((spread.sum(-1) - 1).abs() < 1e-6).all()) or not bool((spread >= 0).all()):
        raise InputError("chances must be at least 0 and sum to 1 over their last dimension; divide them by their sum")
    return spread


def _coefficient(clip: Clip, log_p: Tensor, log_q: Tensor, each: dict[str, Tensor]) -> Tensor:
    """Return c of every action and advantage, (..., K, M)."""
    shape = each["advantages"].shape
    given = {"logps": log_q[..., None].expand(shape), "old_logps": log_p[..., None].expand(shape), **each}
    given |= {name: x.expand(shape) for name, x in _known(clip, log_p, log_q).items()}
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
    """Policies at which clips are compared, and samples drawn there, which all clips share.

    Args:
        log_old: the policy that samples, (states, K), float64.
        log_pi: the policy in training, likewise; the states of one seed follow each other.
        seeds: how many seeds they come from.
        actions: (repetitions, states, samples).
        heads: whether the coin fell on 1, likewise.
    """

    log_old: Tensor
    log_pi: Tensor
    seeds: int
    actions: Tensor
    heads: Tensor


def noise_states(setting: Setting, samples: int = SAMPLES, repetitions: int = REPETITIONS) -> States:
    """Return the policies that a setting without a clip has after each update of its first rollout, with draws.

    Args:
        setting: one state, its reward noise; of its seeds at most 64 are taken.
        samples: drawn at each state in each repetition.
        repetitions: independent ones.

    Returns:
        `States`.

    Raises:
        InputError: the setting is a chain, or its reward is no noise.
    """
    if setting.reward != "noise" or setting.positions != 1:
        raise InputError(
            f"setting {setting.name!r}: needs reward 'noise' and positions 1, not {setting.reward!r} and "
            f"{setting.positions}"
        )
    first = dataclasses.replace(setting, seeds=min(setting.seeds, SEEDS), rollouts=1, dtype="float64")
    seen: list[list[Tensor]] = [[] for _ in range(setting.updates)]
    simulate(first, get_clip("none"), lambda update, log_pi: seen[update - 1].append(log_pi[:, 0].clone()))
    log_pi = torch.stack([torch.cat(lots) for lots in seen], 1)  # (seeds, updates, K)
    log_old = _start(first).expand(log_pi.shape)
    flat_old, flat = log_old.flatten(0, 1).contiguous(), log_pi.flatten(0, 1)
    generator = torch.Generator().manual_seed(DRAWN)
    shape = (repetitions, flat.shape[0], samples)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    sums = flat_old[0].exp().cumsum(0)
    actions = torch.searchsorted(sums, uniform * sums[-1], right=True).clamp_(max=setting.actions - 1)
    return States(flat_old, flat, first.seeds, actions, torch.rand(shape, generator=generator) < 0.5)


def _start(setting: Setting) -> Tensor:
    from bandpo.lab.bandit import start_logps

    return start_logps(setting).log_softmax(-1)


@torch.no_grad()
def simulated_drift(clip: Clip, states: States) -> tuple[Tensor, Tensor]:
    """Return the change of entropy and the total variation of sampled SGD steps, both by unit of learning rate.

    At each state, from each repetition's samples with the coin's advantages, one step; the entropy is that of the new
    policy less that of the old, nothing of first order only.

    Args:
        clip: the clip; one that looks at the batch is refused, as in `entropy_drift`.
        states: where.

    Returns:
        Means over the states, each (repetitions,).
    """
    before, q = entropy(states.log_pi), states.log_pi.exp()
    moves, known = single_moves(q), _known(clip, states.log_old, states.log_pi)
    changes, moved = [], []
    for actions, heads in zip(states.actions, states.heads, strict=True):
        sign = torch.where(heads, *COIN).double()
        given = {"logps": states.log_pi.gather(1, actions), "old_logps": states.log_old.gather(1, actions)}
        given |= {"advantages": sign, "rewards": torch.where(heads, *COIN_REWARDS).double()}
        given |= {name: _at(x, actions) for name, x in known.items()}
        if clip.looks_at == "sequence":
            c = clip.coefficient(Tokens(**{name: x[..., None] for name, x in given.items()}))[..., 0]
        else:
            c = clip.coefficient(Tokens(**given))
        taken = torch.zeros_like(q).scatter_add_(1, actions, c / c.shape[1])
        after = states.log_pi + STEP * (taken - q * taken.sum(1, keepdim=True))
        changes.append((entropy(after.log_softmax(-1)) - before).mean() / STEP)
        moved.append((c.abs() * moves.gather(1, actions)).mean())
    return torch.stack(changes), torch.stack(moved)


def _at(x: Tensor, actions: Tensor) -> Tensor:
    """Pick a known value, (states, 1 or K, 1), for the actions."""
    wide = x[..., 0]
    return wide.gather(1, actions) if wide.shape[1] > 1 else wide.expand(actions.shape).contiguous()


def drift_row(clip: Clip, states: States) -> dict[str, float]:
    """Return a clip's drift of entropy by unit of total variation moved: the sum, and the simulation with its interval.

    The interval of the sum is over seeds, whose states differ; that of the simulation over repetitions at the same
    states: it must hold the sum, in 95 of 100 cases.

    Args:
        clip: the clip, which looks at no batch.
        states: where.

    Returns:
        exact, exact_low, exact_high, simulated, simulated_low, simulated_high; nats by unit of total variation.
    """
    coin, pays = torch.tensor(COIN, dtype=torch.float64), torch.tensor(COIN_REWARDS, dtype=torch.float64)
    drift = entropy_drift(clip, states.log_old, states.log_pi, coin, rewards=pays)
    by_seed = [x.view(states.seeds, -1).mean(1) for x in (drift.entropy, drift.moved)]
    exact, simulated = ratio(*by_seed), ratio(*simulated_drift(clip, states))
    names = ("", "_low", "_high")
    found = {f"exact{name}": x for name, x in zip(names, exact, strict=True)}
    return found | {f"simulated{name}": x for name, x in zip(names, simulated, strict=True)}


def ratio(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Return mean x / mean y with its 95 % interval (delta method, t); 0 where nothing moved, NaN for one value."""
    from scipy.stats import t

    n, below = len(x), float(y.mean())
    if below == 0:
        return 0.0, 0.0, 0.0
    value = float(x.mean()) / below
    if n < 2:
        return value, math.nan, math.nan
    half = float(t.ppf(0.975, n - 1)) * float((x - value * y).std()) / (math.sqrt(n) * below)
    return value, value - half, value + half
