"""A task as the parquet files that verl reads, and what a model's configuration lacks for verl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from bandpo.lab.tasks import Task


def write_data(task: Task, folder: Path, *, seed: int, eval_prompts: int) -> None:
    """Write a task's training problems, drawn with that seed, and held-out ones: train.parquet and val.parquet."""
    from bandpo.lab.models.quiet import without_noise

    folder.mkdir(parents=True, exist_ok=True)
    with without_noise():
        for split, data in (("train", task.train_dataset(seed)), ("val", task.eval_dataset(eval_prompts))):
            _rows(data, task.name, split).to_parquet(folder / f"{split}.parquet")


def _rows(data: Dataset, source: str, split: str) -> Dataset:
    """The columns that verl's data set and reward manager look for; the task's own travel as JSON."""
    from datasets import Dataset

    rows = []
    for index, row in enumerate(data):
        prompt = row["prompt"]
        columns = json.dumps({key: value for key, value in row.items() if key not in ("prompt", "answer")})
        rows.append(
            {
                "data_source": source,
                "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
                "ability": source,
                "reward_model": {"style": "rule", "ground_truth": row["answer"]},
                "extra_info": {"index": index, "split": split, "question": row["question"], "columns": columns},
            }
        )
    return Dataset.from_list(rows)


def model_config(source: str) -> dict[str, Any]:
    """Return what verl misses in a model's configuration: it goes by names that GPT-2 and its kind do not use.

    None of a model of the Hub, whose configuration is not here.
    """
    folder = Path(source)
    if not folder.is_absolute() or not folder.is_dir():
        return {}
    try:
        config = json.loads((folder / "config.json").read_bytes())
        names = config.get("architectures") or [""]
        found: dict[str, Any] = {}
        if "LMHead" in names[0]:  # verl tells a language model by "ForCausalLM" in its name
            found["architectures"] = [names[0].replace("LMHeadModel", "ForCausalLM")]
        if "n_head" in config and "num_key_value_heads" not in config:
            found["num_key_value_heads"] = config["n_head"]
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise InputError(f"model={source!r}: holds no model (config.json: {error}); give a folder with one") from None
    return found
