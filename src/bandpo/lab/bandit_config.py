"""What `bandpo bandit` is asked: settings and their arms, every value checked before anything runs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bandpo._input import InputError, check_number, nearest
from bandpo.clips import get_clip
from bandpo.clips.base import Clip

REWARDS = ("rare", "several", "noise")
STARTS = ("uniform", "rank")
OPTIMIZERS = ("adam", "sgd")
DTYPES = ("float32", "float64")
TEXTS = ("question", "outcomes", "analysis")
VALUED = ("good", "good_p", "decent_p", "decent_reward")  # nothing is good where the reward is noise
BOUNDS = {
    "actions": (2, 100_000), "positions": (1, 64), "good": (1, 10_000), "seeds": (1, 100_000), "first_seed": (0, 2**31),
    "samples": (2, 100_000), "group": (2, 100_000), "rollouts": (1, 100_000), "updates": (1, 10_000),
    "minibatches": (1, 10_000), "staleness": (0, 1_000),
}  # fmt: skip
CHOICES = {"reward": REWARDS, "start": STARTS, "optimizer": OPTIMIZERS, "dtype": DTYPES}


@dataclass(frozen=True)
class Arm:
    """One clip of a setting.

    Args:
        name: in the setting.
        clip: the clip.
        spec: the clip's name and its arguments, as they were given.
        group: which arms share a panel of the page, or "".
    """

    name: str
    clip: Clip
    spec: Mapping[str, Any]
    group: str = ""


@dataclass(frozen=True)
class Setting:
    """A bandit, or a chain of them, how it is trained, and with which clips; made by `make_setting`.

    Args:
        name: in the study.
        reward: "rare": one good action pays 1, a decent one less, the rest 0; "several": several good ones; "noise": a
            fair coin that does not depend on the action. A chain is worth its worst position, and has one coin.
        arms: the clips.
        question: what the setting asks.
        actions: of each state.
        positions: states in a chain, each with a softmax of its own; 1: a bandit.
        start: how what is left is spread over the rest, or everything under noise: "uniform", or "rank", p ~ 1/rank.
        good: good actions in each state.
        good_p: probability with which each of them starts.
        decent_p: with which the decent one starts; 0: there is none.
        decent_reward: what it pays, in [0, 1].
        seeds: independent runs of each arm.
        first_seed: the first of them.
        samples: sequences in a rollout.
        group: samples that are standardised together; None: the rollout.
        rollouts: in a run.
        updates: optimiser steps in a rollout.
        minibatches: parts of a rollout, which the updates take in turn; 1: all of it in each update.
        staleness: how many rollouts ago the policy was that makes the rollout and that ratios divide by.
        optimizer: "adam" or "sgd", over the logits.
        lr: its learning rate.
        betas: Adam's.
        dtype: in which it is computed.
        reference: the arm with which the others are compared.
        contrasts: pairs of arms (one, against the other) that the study is about.
    """

    name: str
    reward: str
    arms: tuple[Arm, ...]
    question: str = ""
    actions: int = 200
    positions: int = 1
    start: str = "uniform"
    good: int = 1
    good_p: float = 0.001
    decent_p: float = 0.3
    decent_reward: float = 0.5
    seeds: int = 64
    first_seed: int = 0
    samples: int = 256
    group: int | None = None
    rollouts: int = 40
    updates: int = 16
    minibatches: int = 1
    staleness: int = 0
    optimizer: str = "adam"
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    dtype: str = "float32"
    reference: str = ""
    contrasts: tuple[tuple[str, str], ...] = ()

    def facts(self) -> dict[str, Any]:
        """Return the numbers of the setting by name, without arms and texts, those of no meaning left out."""
        skipped = {"name", "arms", "question", "reference", "contrasts", *(VALUED if self.reward == "noise" else ())}
        skipped |= {"betas"} if self.optimizer == "sgd" else set()
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skipped}


@dataclass(frozen=True)
class Study:
    """Settings, with what was written down before they ran.

    Args:
        settings: by name.
        question: what is asked.
        outcomes: what is measured.
        analysis: how it is judged.
    """

    settings: Mapping[str, Setting]
    question: str = ""
    outcomes: str = ""
    analysis: str = ""
    texts: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", {name: getattr(self, name) for name in TEXTS if getattr(self, name)})


_FIXED = {"fixed": {"clip": "fixed"}, "clip_higher": {"clip": "clip_higher"}}
BUILT_IN: dict[str, Any] = {
    "question": "Which clip lets a rare good action rise, and which way does it move entropy under random rewards?",
    "settings": {
        "rare": {
            "reward": "rare",
            "reference": "fixed",
            "rollouts": 30,
            "arms": {
                "none": {"clip": "none"},
                **_FIXED,
                "band_kl": {"clip": "band", "clip_args": {"divergence": "kl", "delta": 0.05}},
                "band_tv": {"clip": "band", "clip_args": {"divergence": "tv", "delta": 0.05}},
            },
        },
        "noise": {
            "reward": "noise",
            "start": "rank",
            "lr": 0.02,
            "rollouts": 30,
            "arms": {
                "none": {"clip": "none"},
                **_FIXED,
                "only_lower": {"clip": "fixed", "clip_args": {"eps_low": 0.2, "eps_high": 1e6}},
                "only_upper": {"clip": "fixed", "clip_args": {"eps_low": 1.0, "eps_high": 0.2}},
            },
        },
    },
}


def read_study(data: object, source: str = "the settings") -> Study:
    """Return a checked study.

    Args:
        data: a mapping of ``settings`` and, if wanted, the texts ``question``, ``outcomes``, ``analysis``, as it comes
            out of YAML.
        source: where it is from, for messages.

    Returns:
        The study.

    Raises:
        InputError: what is not as it must be; names the place and the nearest key.
    """
    given = _mapping(source, data)
    _keys(source, given, (*TEXTS, "settings"))
    settings = _mapping(f"{source}: settings", given.get("settings"))
    if not settings:
        raise InputError(f"{source}: settings is empty: must name at least one, as in settings: {{rare: ...}}")
    texts = {name: _text(f"{source}: {name}", given[name]) for name in TEXTS if name in given}
    return Study({str(name): make_setting(str(name), x, source) for name, x in settings.items()}, **texts)


def choose(study: Study, names: Iterable[str], seeds: int | None = None) -> Study:
    """Return the study with the settings named alone, all of them where none is, and with that many seeds.

    Args:
        study: the study.
        names: of settings.
        seeds: for every arm, or None for what each setting says.

    Returns:
        The study.

    Raises:
        InputError: an unknown name, a number of seeds that is none.
    """
    wanted = list(names) or list(study.settings)
    for name in wanted:
        if name not in study.settings:
            known = ", ".join(study.settings)
            raise InputError(f"--setting {name}: must be one of {known}{nearest(name, study.settings)}")
    if seeds is not None:
        _whole("--seeds", seeds, *BOUNDS["seeds"])
    kept = {name: study.settings[name] for name in wanted}
    if seeds is not None:
        kept = {name: dataclasses.replace(setting, seeds=seeds) for name, setting in kept.items()}
    return dataclasses.replace(study, settings=kept)


def make_setting(name: str, data: object, source: str = "the settings") -> Setting:
    """Return a checked setting.

    Args:
        name: of the setting.
        data: a mapping of its keys, the arguments of `Setting`, with arms as name -> {clip, clip_args, group}.
        source: where it is from, for messages.

    Returns:
        The setting.

    Raises:
        InputError: what is not as it must be; names the place and the nearest key.
    """
    where = f"{source}: {name}"
    given = dict(_mapping(where, data))
    _keys(where, given, [f.name for f in dataclasses.fields(Setting) if f.name != "name"])
    for key in ("reward", "arms"):
        if key not in given:
            raise InputError(f"{where} has no {key}: must have one; {_HOW[key]}")
    named = ("arms", "reference", "contrasts")
    values = {key: _value(f"{where}.{key}", key, x) for key, x in given.items() if key not in named}
    values["arms"] = _arms(where, given["arms"])
    names = [arm.name for arm in values["arms"]]
    values["reference"] = _arm(f"{where}.reference", given.get("reference", names[0]), names)
    values["contrasts"] = _contrasts(f"{where}.contrasts", given.get("contrasts", []), names)
    setting = Setting(name=name, **values)
    _together(where, setting, given)
    return setting


_HOW = {
    "reward": f"reward: {REWARDS[0]}, {REWARDS[1]} or {REWARDS[2]}",
    "arms": "arms: {none: {clip: none}, fixed: {clip: fixed, clip_args: {eps_high: 0.28}}}",
}


def _value(where: str, key: str, x: object) -> Any:
    """Check one value by itself."""
    if key in BOUNDS:
        return None if key == "group" and x is None else _whole(where, x, *BOUNDS[key])
    if key in CHOICES:
        if x not in CHOICES[key]:
            raise InputError(f"{where}={x!r}: must be one of {', '.join(CHOICES[key])}{nearest(x, CHOICES[key])}")
        return x
    if key == "betas":
        if not isinstance(x, (list, tuple)) or len(x) != 2:
            raise InputError(f"{where}={x!r}: must be two numbers in [0, 1), as in [0.9, 0.999]")
        return tuple(check_number(f"{where}[{i}]", beta, 0.0, 1 - 1e-9) for i, beta in enumerate(x))
    if key == "question":
        return _text(where, x)
    low, high = {"lr": (0.0, math.inf), "good_p": (0.0, 1.0)}.get(key, (0.0, 1.0))
    return check_number(where, x, low, high, open_low=key in ("lr", "good_p"))


def _together(where: str, setting: Setting, given: Mapping[str, Any]) -> None:
    """Check the values that must fit each other."""
    if setting.reward == "noise":
        for key in VALUED:
            if key in given:
                raise InputError(f"{where}.{key}: means nothing with reward 'noise', where no action is good; drop it")
    elif setting.reward == "rare" and setting.good != 1:
        raise InputError(f"{where}.good={setting.good}: must be 1 with reward 'rare'; take reward 'several'")
    elif setting.reward == "several" and setting.good == 1:
        raise InputError(f"{where}.good=1: must be at least 2 with reward 'several'; take reward 'rare'")
    else:
        taken = setting.good * setting.good_p + setting.decent_p
        if taken >= 1:
            raise InputError(f"{where}: good * good_p + decent_p is {taken:g}: must be below 1, to leave the rest some")
        least = setting.good + (setting.decent_p > 0) + 1
        if setting.actions < least:
            raise InputError(f"{where}.actions={setting.actions}: must be at least {least}: good, decent, and one more")
    for key, size in (("group", setting.group or setting.samples), ("minibatches", setting.minibatches)):
        if setting.samples % size:
            raise InputError(f"{where}.{key}={size}: must divide samples={setting.samples}; give one that does")
    if setting.updates % setting.minibatches:
        count = setting.minibatches
        raise InputError(f"{where}.updates={setting.updates}: must be a multiple of minibatches={count}")


def _arms(where: str, data: object) -> tuple[Arm, ...]:
    """Check the arms and make their clips."""
    given = _mapping(f"{where}.arms", data)
    if not given:
        raise InputError(f"{where}.arms is empty: must name at least one; {_HOW['arms']}")
    arms = []
    for name, x in given.items():
        place = f"{where}.arms.{name}"
        spec = _mapping(place, x)
        _keys(place, spec, ("clip", "clip_args", "group"))
        if not isinstance(spec.get("clip"), str):
            raise InputError(f"{place}.clip={spec.get('clip')!r}: must be a clip's name, as in clip: fixed")
        clip_args = _mapping(f"{place}.clip_args", spec.get("clip_args") or {})
        try:
            clip = get_clip(spec["clip"], **clip_args)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        made = {"clip": spec["clip"], "clip_args": dict(clip_args)}
        arms.append(Arm(str(name), clip, made, _text(f"{place}.group", spec.get("group", ""))))
    return tuple(arms)


def _contrasts(where: str, x: object, names: list[str]) -> tuple[tuple[str, str], ...]:
    """Check the pairs of arms."""
    if not isinstance(x, (list, tuple)) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in x):
        raise InputError(f"{where}={x!r}: must be a list of pairs of arms, as in [[band, fixed]]")
    pairs = tuple((_arm(where, one, names), _arm(where, other, names)) for one, other in x)
    for one, other in pairs:
        if one == other:
            raise InputError(f"{where}: {one!r} is compared with itself; name two arms")
    return pairs


def _arm(where: str, said: object, names: list[str]) -> str:
    if not isinstance(said, str) or said not in names:
        raise InputError(f"{where}={said!r}: must be one of the arms {', '.join(names)}{nearest(said, names)}")
    return said


def _mapping(where: str, x: object) -> Mapping[str, Any]:
    if not isinstance(x, Mapping):
        raise InputError(f"{where} is {type(x).__name__}: must be a mapping of names to values")
    return x


def _keys(where: str, given: Mapping[str, Any], allowed: Iterable[str]) -> None:
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            raise InputError(f"{where} has no key {key!r}{nearest(key, allowed)}; it takes {', '.join(allowed)}")


def _text(where: str, x: object) -> str:
    if not isinstance(x, str):
        raise InputError(f"{where}={x!r}: must be text; put it in quotes")
    return " ".join(x.split())


def _whole(where: str, x: object, low: int, high: int) -> int:
    if not isinstance(x, int) or isinstance(x, bool) or not low <= x <= high:
        raise InputError(f"{where}={x!r}: must be a whole number from {low} to {high}; give one in that range")
    return x
