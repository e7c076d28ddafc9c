"""The runs of a study: every arm in every setting with every seed, each with its checked recipe."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bandpo._input import InputError
from bandpo.lab.models import TINY
from bandpo.lab.reading import RecipeFile, read_recipe
from bandpo.lab.recipe import Recipe, check_clip, load
from bandpo.lab.study.file import Study

LATE_ONES = ("late_accuracy", "late_pass_at_k")
MERGED = ("trl", "task_args")  # of these an arm or a setting changes single keys; clip_args come with their clip


@dataclass(frozen=True)
class WarmModel:
    """A model that is made before the runs that start from it.

    Args:
        path: its folder.
        task: what it learns.
        task_args: the task's settings.
        steps: updates; None for what the task says.
        seed: of weights and demonstrations.
    """

    path: Path
    task: str
    task_args: dict[str, Any]
    steps: int | None
    seed: int


@dataclass(frozen=True)
class Planned:
    """A run of the study.

    Args:
        arm: the arm.
        setting: the setting.
        seed: the seed.
        recipe: its recipe.
        fingerprint: what tells it from a run of the same name with another recipe.
        warm: the model that it starts from; None for the recipe's own.
    """

    arm: str
    setting: str
    seed: int
    recipe: Recipe
    fingerprint: str
    warm: WarmModel | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.arm}-{self.setting}-{self.seed}"

    @property
    def rollouts(self) -> int:
        """How many rollouts it has; 0 where that is not known."""
        return math.ceil((self.recipe.max_steps or 0) / rollout_steps(self.recipe.values))


def plan(study: Study, out: Path, words: Sequence[str] = (), seeds: int | None = None) -> list[Planned]:
    """Return the runs of a study, all arms of a seed before the next seed.

    Args:
        study: the study.
        out: its folder.
        words: keys that win over the study's, as on a command line.
        seeds: only the first so many of each setting; None for all.

    Returns:
        The runs.

    Raises:
        InputError: a recipe cannot be used; names the arm and the setting.
    """
    base = _base(study)
    made = {
        (arm, setting): _recipe(base, study, arm, setting, words)
        for setting in study.settings
        for arm in study.arms_of(setting)
    }
    runs = [
        _planned(study, arm, setting, seed, made[arm, setting], out)
        for setting in study.settings
        for place, seed in enumerate(study.seeds_of(setting))
        if seeds is None or place < seeds
        for arm in study.arms_of(setting)
    ]
    place = {(s, x): i for s in study.settings for i, x in enumerate(study.seeds_of(s))}
    return sorted(runs, key=lambda run: place[run.setting, run.seed])


def _base(study: Study) -> dict[str, Any]:
    """The keys that all runs share."""
    if isinstance(study.recipe, dict):
        return dict(study.recipe)
    if not isinstance(study.recipe, str):
        raise InputError(f"study {study.name}: recipe: must be a recipe's name, a YAML file, or a mapping of keys")
    beside = study.place / study.recipe
    return read_recipe(str(beside) if beside.is_file() else study.recipe).keys


def _recipe(base: dict[str, Any], study: Study, arm: str, setting: str, words: Sequence[str]) -> Recipe:
    keys = _over(_over(base, study.keys_of(setting)), study.arms[arm])
    keys.setdefault("logging_steps", rollout_steps(keys))
    keys.pop("seed", None)
    try:
        recipe = load(RecipeFile(study.name, keys), words)
        check_clip(recipe)
    except InputError as error:
        raise InputError(f"arm {arm}, setting {setting}: {error}") from None
    if late := [name for name in study.outcomes if name in LATE_ONES and not recipe.eval_every]:
        raise InputError(f"setting {setting}: {late[0]} needs evaluations on the way; set eval_every: optimiser steps")
    return recipe


def _over(keys: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A recipe's keys with others over them; another clip or task brings its own arguments."""
    left = dict(keys)
    for chooser, args in (("clip", "clip_args"), ("task", "task_args")):
        if chooser in new and new[chooser] != left.get(chooser):
            left.pop(args, None)
    both = {k for k in MERGED if isinstance(left.get(k), dict) and isinstance(new.get(k), dict)}
    return {**left, **new, **{key: {**left[key], **new[key]} for key in both}}


def rollout_steps(keys: dict[str, Any]) -> int:
    """Return the optimiser steps that a rollout feeds."""

    def number(key: str, default: int) -> int:
        found = keys.get(key)
        return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else default

    accumulate = number("gradient_accumulation_steps", 1)
    micro = number("steps_per_generation", accumulate) * number("num_iterations", 1)
    return micro // math.gcd(micro, accumulate)


def _planned(study: Study, arm: str, setting: str, seed: int, recipe: Recipe, out: Path) -> Planned:
    values, warm = {**recipe.values, "seed": seed}, None
    if study.warmup:
        if recipe.model != TINY:
            raise InputError(
                f"study {study.name}: warmup makes models of {TINY!r}, but the recipe has {recipe.model!r}"
            )
        number = seed % study.warmup.models if study.warmup.models else seed
        what = json.dumps([recipe.task, recipe.task_args, study.warmup.steps], sort_keys=True, default=str)
        folder = (
            out / "warmup" / f"{''.join(c if c.isalnum() else '_' for c in recipe.task)[:40]}-{_sum(what)}-{number}"
        )
        warm = WarmModel(folder, recipe.task, recipe.task_args, study.warmup.steps, number)
        values["model"] = str(folder)
    mark = {key: value for key, value in values.items() if key != "model"}
    started = recipe.model if warm is None else f"warm {warm.steps} {warm.seed}"
    made = recipe.model_copy(update={"seed": seed, "model": values["model"]})
    made._name = f"{arm}-{setting}-{seed}"
    return Planned(arm, setting, seed, made, _sum(json.dumps([started, mark], sort_keys=True, default=str)), warm)


def _sum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
