"""STUDY.yaml: what is asked, what is run, and how it will be judged; written down before anything runs."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from bandpo._input import InputError, nearest
from bandpo.lab.reading import MOST_BYTES, read_yaml
from bandpo.lab.recipe import mapping, maybe, real, shown, truth, whole
from bandpo.lab.study.outcomes import OUTCOMES

TEXTS = ("question", "hypotheses", "analysis", "design")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+]{0,59}")
MOST_SEEDS, MOST_RUNS = 10_000, 10_000
OWN = ("question", "arms", "seeds")  # of a setting; its other keys are the recipe's
ONE_SETTING = "main"


def prose(value: Any) -> str:
    """A text that people read."""
    if not isinstance(value, str) or len(value) > 20_000 or "\0" in value:
        raise ValueError("must be text")
    return value.strip()


def as_seeds(value: Any) -> list[int]:
    """Seeds: a list of them, or "100-119"."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*(\d{1,10})\s*-\s*(\d{1,10})\s*", value)):
        first, last = int(match[1]), int(match[2])
        value = list(range(first, last + 1)) if 0 <= last - first < MOST_SEEDS else None
    given = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(given, list) or not 0 < len(given) <= MOST_SEEDS:
        raise ValueError("must be a list of seeds, such as [0, 1, 2], or a range, such as 100-119")
    found = [whole(0, 2**32 - 1, x) for x in given]
    if twice := {x for x in found if found.count(x) > 1} if len(set(found)) < len(found) else None:
        raise ValueError(f"has seed {min(twice)} twice; give each once")
    return found


def arm_keys(value: Any, field: ValidationInfo) -> dict[str, dict[str, Any]]:
    """Arms: a name for each, and the recipe's keys that make it; a word alone is a clip."""
    given = mapping(value, field)
    made = {name: {"clip": keys} if isinstance(keys, str) else keys for name, keys in given.items()}
    return _named(made, "arm", "none: {clip: none}")


def setting_keys(value: Any, field: ValidationInfo) -> dict[str, dict[str, Any]]:
    """Settings: a name for each, and the recipe's keys that make it."""
    return _named(mapping(value, field), "setting", "stale: {staleness: 6}")


def _named(given: dict[str, Any], what: str, example: str) -> dict[str, dict[str, Any]]:
    if not given:
        raise ValueError(f"must be a mapping with at least one {what}, as in '{example}'")
    for name, keys in given.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"{what} {shown(name)} must be letters, digits, '_', '.' and '+', at most 60 of them")
        if not isinstance(keys, dict) or not all(isinstance(key, str) for key in keys):
            raise ValueError(f"{what} {name} must be a mapping of the recipe's keys, as in '{example}'")
        if "seed" in keys:
            raise ValueError(f"{what} {name} sets seed, which the study sets; give 'seeds'")
    lower = [name.lower() for name in given]
    if twice := next((name for name in given if lower.count(name.lower()) > 1), None):
        raise ValueError(f"has two {what}s of one name, {twice!r}, but for capitals; rename one")
    return given


def as_outcome(value: Any) -> str:
    """The name of something that is measured."""
    if value not in OUTCOMES:
        raise ValueError(f"{shown(value)} is no outcome{nearest(value, OUTCOMES)}; there are {', '.join(OUTCOMES)}")
    return str(value)


def as_outcomes(value: Any) -> list[str]:
    """Outcomes, the primary one first."""
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not given:
        raise ValueError("must be a list of outcomes, the primary one first")
    found = [as_outcome(x) for x in given]
    if len(set(found)) < len(found):
        raise ValueError("has an outcome twice; give each once")
    return found


def as_margins(value: Any) -> dict[str, float]:
    """The largest difference that does not matter, by outcome."""
    if not isinstance(value, dict):
        raise ValueError("must be a mapping of outcomes to numbers, as in {auc_reward: 0.01}")
    return {as_outcome(key): real(0, 10**9, "(", x) for key, x in value.items()}


class Contrast(BaseModel):
    """A comparison that the study is run for.

    Args:
        arm: the arm.
        against: the one it is compared with.
        setting: where; None for every setting.
        outcome: by what; None for the study's first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    arm: str
    against: str
    setting: str | None = None
    outcome: Annotated[str | None, BeforeValidator(partial(maybe, as_outcome))] = None


def as_contrasts(value: Any) -> list[Any]:
    """Contrasts; a pair is short for {arm, against}."""
    if not isinstance(value, list):
        raise ValueError("must be a list, as in [{arm: band, against: fixed}]")
    return [{"arm": x[0], "against": x[1]} if isinstance(x, list) and len(x) == 2 else x for x in value]


class WarmUp(BaseModel):
    """Models of the tiny architecture, made before the runs and shared by the arms.

    Args:
        models: how many; seed s starts from model s mod models. None for one for each seed.
        steps: updates of each; None for what the task says.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    models: Annotated[int | None, BeforeValidator(partial(maybe, partial(whole, 1, MOST_SEEDS)))] = None
    steps: Annotated[int | None, BeforeValidator(partial(maybe, partial(whole, 1, 10**6)))] = None


def as_warmup(value: Any) -> Any:
    """Whether and how models are made first; true for one for each seed."""
    if value is True:
        return {}
    if value is None or value is False:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be true, false, or a mapping, as in {models: 3, steps: 600}")
    return value


class Study(BaseModel):
    """A study, checked.

    Args:
        recipe: a recipe's name, a YAML file (looked for beside the study's own), or a mapping of keys.
        arms: the recipe's keys that make each arm.
        seeds: one run each for every arm and setting.
        settings: the recipe's keys that make each setting; beside them arms, seeds and question of its own.
        outcomes: what is measured, the primary one first.
        reference: the arm that others are compared with; None for the first.
        contrasts: the comparisons that the study is run for; their p values are adjusted together.
        margin: the largest difference that does not matter, by outcome.
        level: of intervals.
        found_above: a training reward; outcome `found` says whether a run got above it.
        warmup: models that are made first; None to start from the recipe's.
        keep_models: whether the trained models are kept.
        question: what is asked.
        hypotheses: what is expected.
        analysis: how it is judged.
        design: how its size was chosen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    recipe: Any
    arms: Annotated[dict[str, dict[str, Any]], BeforeValidator(arm_keys)]
    seeds: Annotated[list[int], BeforeValidator(as_seeds)] = [0]
    settings: Annotated[dict[str, dict[str, Any]], BeforeValidator(setting_keys)] = {ONE_SETTING: {}}
    outcomes: Annotated[list[str], BeforeValidator(as_outcomes)] = ["auc_reward", "accuracy", "pass_at_k", "entropy"]
    reference: str | None = None
    contrasts: Annotated[list[Contrast], BeforeValidator(as_contrasts)] = []
    margin: Annotated[dict[str, float], BeforeValidator(as_margins)] = {}
    level: Annotated[float, BeforeValidator(partial(real, 0.5, 1, "()"))] = 0.95
    found_above: Annotated[float | None, BeforeValidator(partial(maybe, partial(real, -1e9, 1e9, "")))] = None
    warmup: Annotated[WarmUp | None, BeforeValidator(as_warmup)] = None
    keep_models: Annotated[bool, BeforeValidator(truth)] = False
    question: Annotated[str, BeforeValidator(prose)] = ""
    hypotheses: Annotated[str, BeforeValidator(prose)] = ""
    analysis: Annotated[str, BeforeValidator(prose)] = ""
    design: Annotated[str, BeforeValidator(prose)] = ""

    _text: str = PrivateAttr("")
    _name: str = PrivateAttr("study")
    _place: Path = PrivateAttr(Path())

    @property
    def name(self) -> str:
        """The file's name."""
        return self._name

    @property
    def text(self) -> str:
        """The file as it stands."""
        return self._text

    @property
    def place(self) -> Path:
        """The folder that the file lies in."""
        return self._place

    def arms_of(self, setting: str) -> list[str]:
        """The arms of a setting, in the study's order."""
        own = self.settings[setting].get("arms")
        return [arm for arm in self.arms if own is None or arm in own]

    def seeds_of(self, setting: str) -> list[int]:
        """The seeds of a setting."""
        return list(self.settings[setting].get("seeds") or self.seeds)

    def keys_of(self, setting: str) -> dict[str, Any]:
        """The recipe's keys that make a setting."""
        return {key: value for key, value in self.settings[setting].items() if key not in OWN}

    def reference_of(self, setting: str) -> str:
        """The arm that the others of a setting are compared with."""
        there = self.arms_of(setting)
        return self.reference if self.reference in there else there[0]

    def contrasts_of(self, setting: str) -> list[Contrast]:
        """The contrasts that a setting has."""
        return [
            c for c in self.contrasts if c.setting in (None, setting) and {c.arm, c.against} <= {*self.arms_of(setting)}
        ]

    @model_validator(mode="after")
    def _fits(self) -> Study:
        for name, keys in self.settings.items():
            for arm in _list_of_words(keys.get("arms", []), f"setting {name}: arms"):
                _known(arm, self.arms, f"setting {name}: arm")
            if "seeds" in keys:
                self.settings[name]["seeds"] = as_seeds(keys["seeds"])
            prose(keys.get("question", ""))
        if self.reference is not None:
            _known(self.reference, self.arms, "reference")
        for c in self.contrasts:
            _known(c.arm, self.arms, "contrasts: arm")
            _known(c.against, self.arms, "contrasts: arm")
            _known(c.setting or next(iter(self.settings)), self.settings, "contrasts: setting")
            if c.arm == c.against:
                raise ValueError(f"contrasts: {c.arm} is compared with itself; name two arms")
            if not any(c in self.contrasts_of(s) for s in ([c.setting] if c.setting else self.settings)):
                raise ValueError(f"contrasts: no setting has both {c.arm} and {c.against}; add them to its arms")
        if "found" in self.outcomes and self.found_above is None:
            raise ValueError("outcomes: found needs to know what counts; give found_above: a training reward")
        if sum(len(self.arms_of(s)) * len(self.seeds_of(s)) for s in self.settings) > MOST_RUNS:
            raise ValueError(f"it has more than {MOST_RUNS:,} runs; give fewer seeds")
        return self


def _list_of_words(value: Any, what: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(x, str) for x in value):
        raise ValueError(f"{what} must be a list of names, such as [none, band]")
    return value


def _known(name: str, names: dict[str, Any], what: str) -> None:
    if name not in names:
        raise ValueError(f"{what} {shown(name)} is not there{nearest(name, names)}; there are {', '.join(names)}")


def read_study(path: Path) -> Study:
    """Read a study's file.

    Args:
        path: the file.

    Returns:
        The study; its recipes are checked by `plan`.

    Raises:
        InputError: it cannot be read or used.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(f"study {str(path)[:200]!r}: there is no such file; give a YAML file") from None
    except (OSError, ValueError) as error:  # bytes that are no text, a NUL in the path
        why = getattr(error, "strerror", None) or error
        raise InputError(f"study {str(path)[:200]!r}: cannot be read as text ({why}); give a YAML file") from None
    return parse(text, path.stem, path.parent)


def parse(text: str, name: str = "study", place: Path | None = None) -> Study:
    """Read a study from its text.

    Args:
        text: YAML.
        name: what to call it.
        place: the folder in which the recipe's file is looked for.

    Returns:
        The study.

    Raises:
        InputError: it cannot be used.
    """
    keys = read_yaml(text, f"study {name}")
    if not isinstance(keys, dict) or not keys:
        raise InputError(f"study {name}: must be a YAML mapping with recipe and arms; see `bandpo study --help`")
    for key in keys:
        if key not in Study.model_fields:
            raise InputError(f"study {name}: unknown key {shown(key)}{nearest(key, Study.model_fields)}")
    try:
        study = Study.model_validate(keys)
    except ValidationError as error:
        raise InputError(f"study {name}: {_why(error)}") from None
    study._text, study._name, study._place = text, name, place or Path()
    return study


def _why(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"the key {place!r} is missing; add it, as in '{place}: ...'"
    if first["type"] == "extra_forbidden":
        return f"{place}: unknown key"
    why = first.get("ctx", {}).get("error") or f"must be {first['msg']}"
    if not place:
        return str(why)
    value = "" if isinstance(first["input"], (dict, list)) else f"={shown(first['input'])}"
    return f"{place}{value}: {why}"
