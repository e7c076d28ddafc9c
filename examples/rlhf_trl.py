"""RLHF on a CPU in under two minutes: preferences, a reward model, and Band in TRL against that reward model.

The model that ships with bandpo adds numbers ("217+384=" -> "0601"). A judge who knows nothing of sums, but likes even
digits, compares pairs of its answers. TRL's RewardTrainer learns the judge's taste from those pairs; BandGRPOTrainer
then trains the model for the learned reward. Printed before and after, for prompts that were not trained on: the
learned reward, and the judge's own view of the answers, which tells whether the reward model was right.

    python examples/rlhf_trl.py
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForSequenceClassification, PrinterCallback
from transformers.utils import logging
from trl import RewardConfig, RewardTrainer

from bandpo.engines.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.lab.models.load import load_model
from bandpo.lab.tasks import get_task

QUIET: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": "none", "save_strategy": "no",
    "disable_tqdm": True, "logging_steps": 10, "seed": 0,
}  # fmt: skip


def even_digits(text: str) -> int:
    """The judge's taste, known to nobody but the judge."""
    return sum(c in "02468" for c in text)


@torch.no_grad()
def answer(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """One sampled answer a prompt."""
    given = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    out = model.generate(
        **given, max_new_tokens=4, do_sample=True, temperature=1.5, pad_token_id=tokenizer.pad_token_id
    )
    return tokenizer.batch_decode(out[:, given["input_ids"].size(1) :], skip_special_tokens=True)


def preferences(model: Any, tokenizer: Any, prompts: list[str]) -> Dataset:
    """Two answers to each prompt, the judge's choice first; pairs that the judge finds equal are left out."""
    rows = []
    for prompt, one, other in zip(prompts, *(answer(model, tokenizer, prompts) for _ in range(2)), strict=True):
        if even_digits(one) != even_digits(other):
            better, worse = sorted((one, other), key=even_digits, reverse=True)
            rows.append({"chosen_ids": tokenizer(prompt + better)["input_ids"]})
            rows[-1]["rejected_ids"] = tokenizer(prompt + worse)["input_ids"]
    return Dataset.from_list(rows)


def train_reward_model(model: Any, tokenizer: Any, pairs: Dataset, steps: int, folder: str) -> tuple[Any, float]:
    """A reward model on the language model's own trunk, and its share of right choices in the last step's log."""
    with tempfile.TemporaryDirectory() as trunk:
        model.save_pretrained(trunk)
        judge = AutoModelForSequenceClassification.from_pretrained(trunk, num_labels=1, dtype=torch.float32)
    judge.config.pad_token_id = tokenizer.pad_token_id
    args = RewardConfig(folder, max_steps=steps, per_device_train_batch_size=64, learning_rate=1e-3, **QUIET)
    trainer = RewardTrainer(judge, args, train_dataset=pairs, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return judge, [entry["accuracy"] for entry in trainer.state.log_history if "accuracy" in entry][-1]


@torch.no_grad()
def look(model: Any, judge: Any, tokenizer: Any, prompts: list[str]) -> tuple[float, float]:
    """Mean learned reward, and mean number of even digits, of one answer to each prompt."""
    answers = answer(model.eval(), tokenizer, prompts)
    texts = [p + a for p, a in zip(prompts, answers, strict=True)]
    scores = judge.eval()(**tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")).logits
    return float(scores.mean()), sum(map(even_digits, answers)) / len(answers)


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Run all of it; return what is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward-steps", type=int, default=60)
    parser.add_argument("--steps", type=int, default=80)
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    torch.manual_seed(0)
    task = get_task("addition")
    model, tokenizer = load_model("bandpo/tiny-addition")
    train, held_out = task.train_dataset(seed=0), list(task.eval_dataset(128)["prompt"])
    with tempfile.TemporaryDirectory() as folder:
        pairs = preferences(model, tokenizer, train["prompt"][:2048])
        judge, right = train_reward_model(model, tokenizer, pairs, options.reward_steps, folder)
        print(f"reward model: {len(pairs)} pairs, right in {right:.0%} of the last ones")
        reward_before, even_before = look(model, judge, tokenizer, held_out)
        args = BandGRPOConfig(
            folder, clip="band", clip_args={"divergence": "kl", "delta": 0.05}, num_generations=8,
            per_device_train_batch_size=64, steps_per_generation=4, max_completion_length=4, temperature=1.5,
            learning_rate=1e-3, max_steps=options.steps, **QUIET,
        )  # fmt: skip
        trainer = BandGRPOTrainer(
            model, judge, args, train, processing_class=tokenizer, reward_processing_classes=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        reward_after, even_after = look(model, judge, tokenizer, held_out)
    clipped = max(entry.get("clip/zero_grad", 0.0) for entry in trainer.state.log_history)
    print(f"learned reward: {reward_before:.2f} before, {reward_after:.2f} after")
    print(f"even digits of the four of an answer: {even_before:.2f} before, {even_after:.2f} after")
    print(f"tokens clipped: at most {clipped:.1%} in a step")
    return {
        "right": right, "reward_before": reward_before, "reward_after": reward_after, "even_before": even_before,
        "even_after": even_after, "clipped": clipped,
    }  # fmt: skip


if __name__ == "__main__":
    main()
