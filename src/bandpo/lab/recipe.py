"""The recipe: the keys that the backends share, each value checked, before any model is loaded.

A key goes one way: file and command line -> `load` -> `Recipe` -> `to_trl` or `to_verl`, which stand with their
backends -> the engine. Keys have TRL's names. A key that is TRL's alone may stand at the top too, as people copy it; it
is TRL's to check, and verl refuses it.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, PrivateAttr, ValidationError, ValidationInfo

from bandpo._input import InputError, as_arguments, nearest
from bandpo.clips import get_clip
from bandpo.engines._adapter import HOST
from bandpo.lab.reading import RecipeFile, Words, read_recipe, read_words

if TYPE_CHECKING:
    from bandpo.lab.rewards import Reward
    from bandpo.lab.tasks import Task

FLAGS = ("out", "resume", "requeue", "compare", "warmup", "smoke", "json", "print", "prepare")
MOST = 2**31 - 1
# Say it this way instead; "verl" and "trl": with that backend only.
_OWN_SCRIPT = "this command holds a whole model in each process; use BandGRPOTrainer in a script of your own"
_FIXED = "the clip sets the bounds; give clip: fixed and clip_args"
INSTEAD: dict[str, dict[str, str]] = {
    "both": {
        "smoke": "its sizes stand in the recipe; beside --smoke give a key itself, as in --smoke --max_steps 4",
        "output_dir": "name the folder with --out",
        "resume_from_checkpoint": "continue a run with --resume",
        "model_init_kwargs": "the model is loaded for you; name it with the key 'model'",
        "model_name_or_path": "name it with the key 'model'",
        **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "parallelism_config"), _OWN_SCRIPT),
        **{
            key: f"it is an argument of the clip; give clip_args.{key}"
            for key in ("divergence", "eps_low", "eps_high", "cap")
        },
    },
    "trl": {"delta": "for the clip's radius give clip_args.delta; TRL's own, a cap of the ratio, is trl.delta"},
    "verl": {
        "num_train_epochs": "give max_steps",
        "generation_batch_size": "give steps_per_generation",
        "epsilon": _FIXED,
        "epsilon_high": _FIXED,
        "delta": "for the clip's radius give clip_args.delta; verl caps ratios with a dual clip, "
        "actor_rollout_ref.actor.policy_loss.dual_clip",
        "use_liger_kernel": "set actor_rollout_ref.model.use_liger under 'verl:'",
        "fp16": "set +actor_rollout_ref.actor.fsdp_config.mixed_precision under 'verl:'",
    },
}
SECRET = re.compile(
    r"(?i)(hub|hf|auth|access|api|bearer|secret)_?(token|key)s?$|(password|passwd|secret|credentials?)$"
)


# ---------------------------------------------------------------- what a value may be


def whole(least: int, most: int, value: Any) -> int:
    """A whole number in a range."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        top = "" if most == MOST else f" and at most {most}"
        raise ValueError(f"must be a whole number, at least {least}{top}")
    return value


def real(low: float, high: float, open_ends: str, value: Any) -> float:
    """A finite number in a range; ``open_ends`` holds "(" where `low` itself is outside, ")" where `high` is."""
    try:
        number = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    inside = low <= number <= high and not ("(" in open_ends and number == low or ")" in open_ends and number == high)
    if not inside or not math.isfinite(number):
        ends = "finite" if low == -math.inf else f"above {low:g}" if "(" in open_ends else f"at least {low:g}"
        ends += "" if high == math.inf else f" and {'below' if ')' in open_ends else 'at most'} {high:g}"
        raise ValueError(f"must be a number, {ends}")
    return number


def text(value: Any) -> str:
    """A word or a line that a file name, a page and a terminal can hold."""
    if isinstance(value, (bool, int, float)):
        value = json.dumps(value)
    if not isinstance(value, str) or not value or len(value) > 1000 or not value.isprintable():
        raise ValueError("must be text without line breaks or control characters")
    return value


def texts(value: Any) -> list[str] | None:
    """Words: a list of them, or one with commas."""
    if value is None:
        return None
    given = value.split(",") if isinstance(value, str) else value
    if not isinstance(given, list) or not given:
        raise ValueError("must be a list of words, such as [one, two]")
    return [text(x.strip() if isinstance(x, str) else x) for x in given]


def numbers(value: Any) -> list[float] | None:
    """Finite numbers: a list of them, or text with commas."""
    if value is None:
        return None
    given = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [real(-math.inf, math.inf, "", x) for x in given]


def truth(value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def maybe(kind: Any, value: Any) -> Any:
    """A value of that kind, or null."""
    return None if value is None else kind(value)


def mapping(value: Any, field: ValidationInfo) -> dict[str, Any]:
    """A mapping with words as keys."""
    found = {} if value is None else value
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise ValueError(f"must be a mapping, as in --{field.field_name}.name value")
    return found


def _scale(value: Any) -> str:
    return {True: "group", False: "none"}[value] if isinstance(value, bool) else text(value)


Text = Annotated[str, BeforeValidator(text)]
Name = Annotated[str | None, BeforeValidator(text)]
Names = Annotated[list[str] | None, BeforeValidator(texts)]
Numbers = Annotated[list[float] | None, BeforeValidator(numbers)]
Keys = Annotated[dict[str, Any], BeforeValidator(mapping)]
Flag = Annotated[bool | None, BeforeValidator(truth)]
Perhaps = Annotated[bool | None, BeforeValidator(partial(maybe, truth))]
Count = Annotated[int | None, BeforeValidator(partial(whole, 1, MOST))]
Some = Annotated[int, BeforeValidator(partial(whole, 1, MOST))]
Positive = Annotated[float | None, BeforeValidator(partial(real, 0, math.inf, "("))]
NotNegative = Annotated[float | None, BeforeValidator(partial(real, 0, math.inf, ""))]
Share = Annotated[float | None, BeforeValidator(partial(real, 0, 1, "("))]
Beta = Annotated[float | None, BeforeValidator(partial(real, 0, 1, ")"))]


class Recipe(BaseModel):
    """A checked recipe. Keys that are None are not set: the engine's own default holds.

    Args:
        task: what is asked and how answers are graded, as `get_task` takes it.
        task_args: the task's own settings.
        model: "bandpo/tiny-addition", "smollm2-135m-instruct", a folder or a Hub name.
        reward_funcs: what is rewarded, as `reward_functions` takes it; None for the task's own score.
        reward_weights: the weight of each; None for 1 each.
        eval_prompts: held-out prompts in an evaluation.
        eval_samples: completions for each of them.
        eval_every: optimiser steps between held-out evaluations; 0: only before and after.
        threads: CPU threads of PyTorch; 0: its own choice.
        staleness: rollouts between making and training, as in asynchronous training; `bandpo train` only.
        trl: TRL's own keys, which `bandpo verl` does not read.
        verl: workers, nodes, ray_address, and verl's own keys with dots, which `bandpo train` does not read.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    task: Text
    model: Text
    task_args: Keys = {}
    trust_remote_code: Annotated[bool, BeforeValidator(truth)] = False
    reward_funcs: Names = None
    reward_weights: Numbers = None
    clip: Text = "band"
    clip_args: Keys = {}
    clip_metrics: Name = None

    num_generations: Count = None
    per_device_train_batch_size: Count = None
    steps_per_generation: Count = None
    gradient_accumulation_steps: Count = None
    num_iterations: Count = None
    staleness: Annotated[int, BeforeValidator(partial(whole, 0, 1000))] = 0
    max_completion_length: Count = None
    temperature: Positive = None
    top_p: Share = None
    top_k: Annotated[int | None, BeforeValidator(partial(whole, 0, MOST))] = None

    max_steps: Count = None
    learning_rate: Positive = None
    lr_scheduler_type: Name = None
    warmup_steps: NotNegative = None
    weight_decay: NotNegative = None
    max_grad_norm: NotNegative = None
    adam_beta1: Beta = None
    adam_beta2: Beta = None
    loss_type: Name = None
    scale_rewards: Annotated[str | None, BeforeValidator(_scale)] = None
    beta: NotNegative = None
    use_peft: Flag = None
    lora_r: Count = None
    lora_alpha: Count = None
    lora_target_modules: Names = None

    seed: Annotated[int | None, BeforeValidator(partial(whole, 0, 2**32 - 1))] = None
    use_cpu: Flag = None
    bf16: Perhaps = None
    gradient_checkpointing: Flag = None
    activation_checkpointing: Perhaps = None
    threads: Annotated[int, BeforeValidator(partial(whole, 0, 1024))] = 0
    use_vllm: Flag = None
    vllm_tensor_parallel_size: Count = None
    vllm_gpu_memory_utilization: Share = None

    eval_prompts: Some = 128
    eval_samples: Some = 4
    eval_every: Annotated[int, BeforeValidator(partial(whole, 0, MOST))] = 0
    per_device_eval_batch_size: Count = None
    save_steps: Count = None
    # at least 2, as a kill while saving spoils the newest checkpoint
    save_total_limit: Annotated[int | None, BeforeValidator(partial(maybe, partial(whole, 2, MOST)))] = 2
    report_to: Names = None
    run_name: Name = None

    trl: Keys = {}
    verl: Keys = {}

    _name: str = PrivateAttr("recipe")
    _typed: frozenset[str] = PrivateAttr(frozenset())

    @property
    def name(self) -> str:
        """The recipe's name, which also names the default output folder."""
        return self._name

    @property
    def others(self) -> dict[str, Any]:
        """Keys at the top that both backends do not share: TRL's own, or nobody's."""
        return dict(self.model_extra or {})

    @property
    def values(self) -> dict[str, Any]:
        """Every key that is set, by the file, the command line or a default."""
        return {k: v for k, v in self.model_dump().items() if v not in (None, {}) or k in self.model_fields_set}

    def where(self, key: str) -> str:
        """Where a key was given, for a message."""
        return _where(self._typed, self._name, key)

    def dump(self) -> str:
        """The recipe as YAML; `load` reads it back."""
        return yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True)

    def fingerprint(self, start: str) -> str:
        """What tells this run's checkpoints from another's: all keys but its length, and what it starts from."""
        kept = {key: value for key, value in self.values.items() if key != "max_steps"}
        return f"{zlib.crc32(json.dumps([start, kept], sort_keys=True, default=str).encode()):08x}"

    def make_task(self) -> Task:
        """The task, whose right answers pass its own grader; runs the user's code where `task` is an import path."""
        from bandpo.lab.tasks import get_task
        from bandpo.lab.tasks.check import check_grader

        task = get_task(self.task, **self.task_args)
        check_grader(task)
        return task

    def make_rewards(self, task: Task) -> tuple[list[Reward | str], list[float]]:
        """What is rewarded, and each reward's weight; runs the user's code where a name is an import path."""
        from bandpo.lab.rewards import reward_functions, reward_weights

        weights = reward_weights(self.reward_funcs, self.reward_weights)
        return reward_functions(task, self.reward_funcs), weights


SHARED = frozenset(Recipe.model_fields)
# Keys of ours alone, which no engine has.
OURS = (
    *("task", "task_args", "model", "reward_funcs", "staleness", "eval_prompts", "eval_samples", "eval_every"),
    *("threads", "trl", "verl"),
)
_TEXT = {name for name, f in Recipe.model_fields.items() if f.annotation in (str, str | None)} - {"scale_rewards"}
_TRUTH = {name for name, f in Recipe.model_fields.items() if f.annotation in (bool, bool | None)}


# ---------------------------------------------------------------- from file and command line


def load(source: str | RecipeFile, words: Sequence[str] = (), *, backend: str = "trl") -> Recipe:
    """Read a recipe, lay the command line over it, and check what both backends share.

    Args:
        source: a recipe's name, a YAML file, or what `read_recipe` gave.
        words: ``--key value`` or ``--key=value``, ``--clip_args.delta value`` inside a mapping; with verl also
            ``key=value``, verl's own. Naming another clip or task drops the file's arguments of its own.
        backend: "trl" or "verl".

    Returns:
        The recipe; what only its backend can check is checked by `to_trl` or `to_verl`.

    Raises:
        InputError: a key or value that cannot be used.
    """
    file = read_recipe(source) if isinstance(source, str) else source
    given = read_words(words, typed=SHARED - _TEXT, flags=_TRUTH, hydra=backend == "verl")
    typed = frozenset({*given.plain, *given.nested})
    values, where = _laid_over(file.keys, given), partial(_where, typed, file.name)
    for key in values:
        if hint := INSTEAD["both"].get(key) or INSTEAD[backend].get(key):
            raise InputError(f"{where(key)} cannot be set here: {hint}")
    for name, place in _names(values):
        if SECRET.search(name):
            raise InputError(
                f"{where(place)}: {name} is a secret, and a recipe and a command line are kept with the run; set it in "
                "the environment (HF_TOKEN, WANDB_API_KEY, ...), or log in with hf auth login"
            )
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise _one_line(error, where, file.name) from None
    recipe._name, recipe._typed = file.name, typed
    return recipe


def check_clip(recipe: Recipe) -> None:
    """Raise InputError for a clip that cannot be made, before anything heavy is loaded; "host" is the trainer's own."""
    if recipe.clip != HOST:
        get_clip(recipe.clip, **as_arguments(recipe.clip_args))


def _where(typed: Collection[str], name: str, key: str) -> str:
    return f"--{key}" if key in typed else f"recipe {name}: {key}"


def refuse_unknown(recipe: Recipe, known: Sequence[str], also: str = "") -> None:
    """Raise for a key at the top that neither the recipe nor the engine has; `also` says what else may be written."""
    for key in recipe.others:
        if key not in known:
            choices = [*SHARED, *known, *(FLAGS if recipe.where(key).startswith("--") else ())]
            raise InputError(f"{recipe.where(key)}: unknown key{nearest(key, choices)}{also}")


def _laid_over(keys: dict[str, Any], given: Words) -> dict[str, Any]:
    """A recipe's keys with those of the command line over them."""
    values = dict(keys)
    if isinstance(values.get("verl"), dict):
        values["verl"] = dict(flat(values["verl"]))
    for chooser, args in (("clip", "clip_args"), ("task", "task_args")):
        if chooser in given.plain and given.plain[chooser] != values.get(chooser):
            values.pop(args, None)
    values |= given.plain
    for outer, inner in given.nested.items():
        if outer in SHARED - {"task_args", "clip_args", "trl", "verl"}:
            raise InputError(f"--{outer}.{min(inner)}: {outer} takes one value, not a mapping")
        if not isinstance(values.get(outer) or {}, dict):
            raise InputError(f"{outer}={shown(values[outer])}: must be a mapping, as in --{outer}.name value")
        values[outer] = _inside(values.get(outer), inner)
    if given.hydra:  # kept with the recipe, which is then whole; a key given again counts once
        own = values.setdefault("verl", {})
        words = own.get("overrides") or []
        own["overrides"] = list(
            {bare(w): w for w in [*(words if isinstance(words, list) else []), *given.hydra]}.values()
        )
    return values


def _inside(old: Any, new: dict[str, Any]) -> dict[str, Any]:
    """A mapping with another laid over it, however deep."""
    found = dict(old) if isinstance(old, dict) else {}
    for key, value in new.items():
        found[key] = _inside(found[key], value) if isinstance(value, dict) and key in found else value
    return found


def flat(keys: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield verl's own keys with dots; below a key that is added with "+" a mapping is a value."""
    for key, value in keys.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and value and not name.startswith("+"):
            yield from flat(value, f"{name}.")
        else:
            yield name, value


def bare(word: str) -> str:
    """Return the key of a hydra override, without its prefix and value."""
    return word.lstrip("+~").partition("=")[0]


def _names(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """Every name in a recipe, each with the key at the top below which it stands."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key), place or str(key)
            yield from _names(inner, place or str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _names(inner, place)
    elif isinstance(value, str) and place in ("verl", "trl"):
        yield from ((name, place) for name in re.findall(r"([\w.]+)['\"]?\s*[:=]", value))


def _one_line(error: ValidationError, where: Any, name: str) -> InputError:
    """What pydantic found, as this project says it."""
    first = error.errors()[0]
    key = str(first["loc"][0])
    if first["type"] == "missing":
        return InputError(f"recipe {name}: the key {key!r} is missing; add it, as in '{key}: ...'")
    why = first.get("ctx", {}).get("error") or f"must be {first['msg']}"
    if first["input"] is True and where(key).startswith("--"):
        return InputError(f"{where(key)}: needs a value; it {why}")
    return InputError(f"{where(key)}={shown(first['input'])}: {why}")


def multiples(of: int, near: int) -> str:
    """The multiples of a number next to another one, for a message."""
    low = near // of * of
    return f"{low} or {low + of}" if low else f"{of}"


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 120 else f"{text[:117]}..."
