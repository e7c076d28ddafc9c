"""A recipe: a YAML file of TRL's own keys plus a few of ours, checked in full before any model is loaded.

Reading the file and finding it costs nothing; the keys are then checked by the parser that TRL and transformers use
for their own command lines, against the dataclasses themselves, so the recipe never lags behind the installed TRL.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_origin, get_type_hints

import yaml

from bandpo._input import InputError, nearest

if TYPE_CHECKING:
    from bandpo.engines.trl import BandGRPOConfig

FLAGS = ("out", "resume", "compare", "warmup", "smoke", "json")
INSTEAD = {
    "output_dir": "name the folder with --out",
    "resume_from_checkpoint": "continue a run with --resume",
    "model_init_kwargs": "the model is loaded for you; name it with the key 'model'",
    "fsdp": "bandpo train holds a whole model in each process; use BandGRPOTrainer in a script of your own",
    "deepspeed": "bandpo train holds a whole model in each process; use BandGRPOTrainer in a script of your own",
}
# What bandpo sets where the recipe says nothing; all the other defaults are TRL's.
DEFAULTS: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "save_total_limit": 2}


@dataclass
class RecipeKeys:
    """The keys that are bandpo's own; every other key is a field of BandGRPOConfig or one of TRL's LoRA fields.

    Args:
        task: name of the task, as `get_task` takes it.
        model: "bandpo/tiny-addition", "smollm2-135m-instruct", a folder or a Hub name.
        task_args: the task's own settings.
        eval_prompts: held-out prompts in an evaluation.
        eval_samples: completions for each of them.
        eval_every: optimiser steps between held-out evaluations; 0: only before and after.
        threads: CPU threads of PyTorch; 0: its own choice.
        verl: settings of `bandpo verl` and verl's own keys; `bandpo train` has no use for them.
    """

    task: str
    model: str
    task_args: dict | str = field(default_factory=dict)
    eval_prompts: int = 128
    eval_samples: int = 4
    eval_every: int = 0
    threads: int = 0
    verl: dict | str = field(default_factory=dict)


@dataclass(frozen=True)
class RecipeFile:
    """A recipe as it stands in its file: its name and its keys, not checked yet."""

    name: str
    keys: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Args:
        name: the recipe's name, which also names the default output folder.
        values: every key that is set, by the file, the command line or bandpo's defaults.
        overrides: the command line's part, as it was given.
    """

    name: str
    values: dict[str, Any]
    overrides: tuple[str, ...] = ()

    @cached_property
    def keys(self) -> RecipeKeys:
        """The keys that are bandpo's own, with their defaults."""
        names = {f.name for f in dataclasses.fields(RecipeKeys)}
        return RecipeKeys(**{key: value for key, value in self.values.items() if key in names})

    @property
    def task_args(self) -> dict[str, Any]:
        """The task's own settings."""
        return dict(self.values.get("task_args") or {})

    @cached_property
    def lora(self) -> dict[str, Any]:
        """The LoRA keys that are set, as TRL's ModelConfig takes them."""
        return {key: value for key, value in self.values.items() if key in _lora_fields()}

    def config(self, output_dir: str | Path) -> BandGRPOConfig:
        """TRL's configuration of this run.

        Args:
            output_dir: where the checkpoints go.

        Returns:
            The configuration.

        Raises:
            InputError: TRL or the clip refuses a value.
        """
        from bandpo.engines.trl import BandGRPOConfig

        ours = {f.name for f in dataclasses.fields(RecipeKeys)} | set(_lora_fields())
        keys = {key: value for key, value in self.values.items() if key not in ours}
        try:
            return BandGRPOConfig(output_dir=str(output_dir), **keys)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"recipe {self.name}: {' '.join(str(error).split())}") from error

    def dump(self) -> str:
        """The recipe as YAML; `load_recipe` reads it back."""
        return yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML as version 1.2 reads it (1e-4 is a number, `no` is a word), and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in rules if tag != _BOOL]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, source: str) -> Any:
    """Read YAML.

    Args:
        text: the YAML.
        source: what it is, for the message.

    Returns:
        What it says.

    Raises:
        InputError: it is not YAML; names the line.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        what = " ".join(str(getattr(error, "problem", error)).split())
        raise InputError(f"{source}: not valid YAML:{where} {what}; mend it") from None


def recipe_names() -> list[str]:
    """The names of the recipes that come with bandpo."""
    return sorted(Path(str(f)).stem for f in (files("bandpo") / "recipes").iterdir() if str(f).endswith(".yaml"))


def read_recipe(name_or_path: str) -> RecipeFile:
    """Find a recipe and read its file; light: neither torch nor TRL is used.

    Args:
        name_or_path: a recipe's name, or a YAML file.

    Returns:
        The recipe's keys, not checked yet.

    Raises:
        InputError: no such recipe or file, not YAML, not a mapping.
    """
    path = Path(name_or_path)
    if name_or_path in recipe_names():
        name, text = name_or_path, (files("bandpo") / "recipes" / f"{name_or_path}.yaml").read_text("utf-8")
    elif path.is_file():
        try:
            name, text = path.stem, path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"recipe {name_or_path}: cannot be read as text ({error}); give a YAML file") from None
    else:
        names = recipe_names()
        hint = nearest(name_or_path, names) or nearest(path.stem, names)
        raise InputError(
            f"no recipe {name_or_path!r}{hint}: give the path of a YAML file that exists, or a name: {', '.join(names)}"
        )
    keys = read_yaml(text, f"recipe {name_or_path}")
    if not isinstance(keys, dict) or not keys:
        raise InputError(f"recipe {name_or_path}: must be a YAML mapping of keys to values, such as 'task: addition'")
    return RecipeFile(name, keys)


def merge(values: dict[str, Any], given: dict[str, Any], nested: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a recipe's keys with those of the command line put over them.

    Args:
        values: the recipe's.
        given: the command line's; another clip or task drops the arguments of the recipe's own.
        nested: the command line's keys within a mapping, such as clip_args.delta, by mapping.
    """
    for chooser, args in (("clip", "clip_args"), ("task", "task_args")):
        if chooser in given and given[chooser] != values.get(chooser):
            values = {key: value for key, value in values.items() if key != args}
    values = {**DEFAULTS, **values, **given}
    return values | {key: {**(values.get(key) or {}), **inner} for key, inner in nested.items()}


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, lay the command line over it, and check every key.

    Args:
        name_or_path: a recipe's name, or a YAML file.
        overrides: "--key", "value" or "--key=value", as on the command line; "--clip_args.delta" reaches inside a
            mapping. Naming another clip or task drops the file's clip_args or task_args, which belong to its own.

    Returns:
        The checked recipe.

    Raises:
        InputError: a recipe, key or value that cannot be used.
    """
    return resolve(read_recipe(name_or_path), overrides)


def resolve(recipe: RecipeFile, overrides: Sequence[str] = ()) -> Recipe:
    """Check a recipe that has been read; the arguments are those of `load_recipe`.

    Args:
        recipe: from `read_recipe`.
        overrides: the command line's keys.

    Returns:
        The checked recipe.

    Raises:
        InputError: a key or value that cannot be used.
    """
    parser = _Parser()
    values = parser.from_file(recipe)
    given, nested = parser.from_command_line(overrides)
    values = merge(values, given, nested)
    for key, value in _by_device(values).items():
        values.setdefault(key, value)
    resolved = Recipe(recipe.name, values, tuple(overrides))
    _check(resolved)
    return resolved


def _by_device(values: dict[str, Any]) -> dict[str, bool]:
    """TRL would take bfloat16 and pinned memory everywhere; take them only where there is a GPU that has them."""
    import torch

    on_gpu = torch.cuda.is_available() and not values.get("use_cpu", False)
    bf16 = on_gpu and not values.get("fp16", False) and torch.cuda.is_bf16_supported()
    return {"bf16": bf16, "dataloader_pin_memory": on_gpu}


def _lora_fields() -> dict[str, dataclasses.Field[Any]]:
    """TRL's own LoRA keys; the rest of its ModelConfig is about loading, which `load_model` does."""
    from trl import ModelConfig

    wanted = ("use_peft", "use_rslora", "use_dora")
    return {f.name: f for f in dataclasses.fields(ModelConfig) if f.name in wanted or f.name.startswith("lora_")}


class _Parser:
    """TRL's parser over the dataclasses, in which an error is one line and only what was given is set."""

    def __init__(self) -> None:
        from transformers import HfArgumentParser
        from trl import ModelConfig

        from bandpo.engines.trl import BandGRPOConfig

        class Parser(HfArgumentParser):
            def error(self, message: str) -> NoReturn:
                message = re.sub(r"^argument (--[^/:]+)\S*:", r"\1:", message)
                if choice := re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message):
                    message += nearest(choice[1], re.findall(r"[^\s,']+", choice[2]))
                raise InputError(message)

        lora = dataclasses.make_dataclass(
            "LoraKeys", [(f.name, f.type, _copy(f)) for f in _lora_fields().values()], frozen=True
        )
        self.parser = Parser([BandGRPOConfig, RecipeKeys, lora], allow_abbrev=False, add_help=False)
        self.hints: dict[str, Any] = {
            **{key: get_type_hints(ModelConfig)[key] for key in _lora_fields()},
            **get_type_hints(BandGRPOConfig),
            **get_type_hints(RecipeKeys),
        }
        self.actions = {action.dest: action for action in self.parser._actions if action.option_strings}
        for action in self.parser._actions:
            action.default, action.required = argparse.SUPPRESS, False
        self.names = [key for key in self.actions if key not in INSTEAD]

    def from_file(self, recipe: RecipeFile) -> dict[str, Any]:
        """The file's keys, each parsed as its field says."""
        values = {}
        for key, value in recipe.keys.items():
            where = f"recipe {recipe.name}: {key}"
            self._known(str(key), f"recipe {recipe.name}: ", self.names)
            hint = self.hints[key]
            if value is None or isinstance(value, (dict, list)):
                kind = type(None) if value is None else type(value)
                if not _accepts(hint, kind):
                    raise InputError(f"{where}={value!r}: this key takes {_describe(hint)}")
                values[key] = value
            else:
                values.update(self._parse([f"--{key}={value}"], f"recipe {recipe.name}: "))
        return values

    def from_command_line(self, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """The command line's keys, and apart from them those that reach inside a mapping."""
        plain: list[str] = []
        nested: dict[str, dict[str, Any]] = {}
        rest = list(overrides)
        while rest:
            word = rest.pop(0)
            key, equals, value = word.removeprefix("--").partition("=")
            if not word.startswith("--") or "." not in key:
                if word.startswith("--"):
                    self._known(key, "--", [*self.names, *FLAGS])
                plain.append(word)
                continue
            outer, inner = key.split(".", 1)
            self._known(outer, "--", self.names)
            if not _accepts(self.hints[outer.replace("-", "_")], dict):
                raise InputError(f"--{key}: {outer} takes {_describe(self.hints[outer])}, not a mapping")
            if not equals and not rest:
                raise InputError(f"--{key}: needs a value, as in --{key} 0.02")
            nested.setdefault(outer, {})[inner] = read_yaml(value if equals else rest.pop(0), f"--{key}")
        return self._parse(plain, ""), nested

    def _known(self, key: str, before: str, choices: list[str]) -> None:
        name = key.replace("-", "_")
        if name in INSTEAD:
            raise InputError(f"{before}{key} cannot be set here: {INSTEAD[name]}")
        if name not in choices and not (name.startswith("no_") and name[3:] in choices):
            raise InputError(
                f"{before}{key}: unknown key{nearest(name, choices)}; keys are the fields of TRL's GRPOConfig, its "
                f"LoRA fields, and clip, clip_args, {', '.join(f.name for f in dataclasses.fields(RecipeKeys))}"
            )

    def _parse(self, words: list[str], before: str) -> dict[str, Any]:
        try:
            namespace, unknown = self.parser.parse_known_args(words)
        except InputError as error:
            raise InputError(f"{before}{error}") from None
        if unknown:
            raise InputError(f"{before}{' '.join(unknown)!r} belongs to no key; write --key value or --key=value")
        values = vars(namespace)
        for key, value in values.items():
            if isinstance(value, str) and _accepts(self.hints[key], dict) and value.lstrip().startswith("{"):
                values[key] = read_yaml(value, f"{before}{key}")
        return values


def _copy(source: dataclasses.Field[Any]) -> Any:
    """A fresh field with the default and the help of another."""
    default = {"default": source.default} if source.default is not dataclasses.MISSING else {}
    factory = {"default_factory": source.default_factory} if not default else {}
    return field(**default, **factory, metadata=source.metadata)  # type: ignore[call-overload]


def _accepts(hint: Any, kind: type) -> bool:
    """Whether a type hint allows values of a kind: dict, list or NoneType."""
    parts = [hint, *get_args(hint)] if get_origin(hint) not in (list, dict) else [hint]
    return any(part is kind or get_origin(part) is kind for part in parts)


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _check(recipe: Recipe) -> None:
    """Everything that can be said about a recipe without a model."""
    from bandpo.train.tasks import get_task

    for key in ("task", "model"):
        if not recipe.values.get(key):
            raise InputError(f"recipe {recipe.name}: the key {key!r} is missing; add it, as in '{key}: ...'")
    for key in ("task_args", "clip_args", "verl"):
        if not isinstance(recipe.values.get(key) or {}, dict):
            raise InputError(f"{key}={recipe.values[key]!r}: must be a mapping, as in --{key}.name value")
    keys = recipe.keys
    for name, least in (("eval_prompts", 1), ("eval_samples", 1), ("eval_every", 0), ("threads", 0)):
        if getattr(keys, name) < least:
            raise InputError(f"{name}={getattr(keys, name)}: must be at least {least}")
    get_task(keys.task, **recipe.task_args)
    config = recipe.config("checkpoints")
    if config.max_completion_length is None:
        raise InputError("max_completion_length: give a number of tokens, so that an evaluation ends")
    _check_resumable(config)


def _check_resumable(config: BandGRPOConfig) -> None:
    """A checkpoint must hold all there is to know: it falls between rollouts, and all metrics are logged."""
    if config.eval_strategy != "no":
        raise InputError(f"eval_strategy={config.eval_strategy.value!r}: held-out evaluation is set by eval_every")
    if config.save_strategy != "steps" or config.save_only_model:
        raise InputError("save_strategy must be 'steps' and save_only_model false, or a run could not be resumed")
    if config.save_total_limit is not None and config.save_total_limit < 2:
        raise InputError("save_total_limit: must be at least 2, as a kill while saving spoils the newest checkpoint")
    for key in ("save_steps", "logging_steps"):
        if getattr(config, key) != int(getattr(config, key)) or getattr(config, key) < 1:
            raise InputError(f"{key}={getattr(config, key)}: give a whole number of optimiser steps, at least 1")
    rollout = rollout_steps(config)
    every = math.lcm(rollout, int(config.logging_steps))
    save = int(config.save_steps)
    if save % every:
        low = save // every * every
        fit = f"{low} or {low + every}" if low else f"{every}"
        raise InputError(
            f"save_steps={save}: a checkpoint inside a rollout or between two log lines cannot be resumed exactly; "
            f"a multiple of {every} can: set save_steps to {fit}"
        )


def rollout_steps(config: BandGRPOConfig) -> int:
    """Optimiser steps after which the rollouts are used up and a checkpoint is exact.

    Args:
        config: TRL's configuration.

    Returns:
        Steps from one such point to the next.
    """
    micro = config.steps_per_generation * config.num_iterations
    return micro // math.gcd(micro, config.gradient_accumulation_steps)
