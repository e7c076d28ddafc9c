"""Held-out accuracy of sampled answers, with an interval that knows that samples of one prompt hang together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import beta
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from bandpo._input import InputError, check_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bandpo.train.tasks import Task


@dataclass
class Evaluation:
    """What sampling on held-out prompts gave.

    Attributes:
        accuracy: share of right completions.
        low: lower end of its 95 % interval, see `accuracy_interval`.
        high: upper end.
        entropy: mean entropy of the sampling distribution over the tokens written, nats.
        n: number of completions.
        samples: one completion of each of the first prompts: prompt, completion, answer, correct.
    """

    accuracy: float
    low: float
    high: float
    entropy: float
    n: int
    samples: list[dict[str, Any]] = field(default_factory=list)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    prompts: int,
    k: int,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 512,
    keep: int = 24,
) -> Evaluation:
    """Sample `k` answers to each of `prompts` held-out problems and grade them.

    The global random state and the model's train/eval state are as before when it returns.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a padding token.
        task: gives problems and grades answers.
        prompts: number of held-out problems.
        k: samples of each.
        max_new_tokens: longest answer, tokens.
        temperature: of the sampling; above 0.
        seed: of the sampling.
        batch_size: completions sampled at a time.
        keep: number of problems of which one sample is kept.

    Returns:
        Accuracy with its interval, entropy, samples.

    Raises:
        InputError: a number is out of range.
    """
    for name, value in {"prompts": prompts, "k": k, "max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        check_number(name, value, 1)
    check_number("temperature", temperature, 0, open_low=True)
    if tokenizer.pad_token_id is None:
        raise InputError("tokenizer: has no padding token; set tokenizer.pad_token = tokenizer.eos_token")
    rows = task.eval_dataset(prompts)
    prompt_ids = [ids for row in rows for ids in [_token_ids(row["prompt"], tokenizer)] * k]
    completions: list[str] = []
    entropy_sum = tokens = 0.0
    with _left_alone(model, seed), torch.inference_mode():
        for start in range(0, len(prompt_ids), batch_size):
            batch = prompt_ids[start : start + batch_size]
            written, nats, count = _sample(model, tokenizer, batch, max_new_tokens, temperature)
            completions += written
            entropy_sum, tokens = entropy_sum + nats, tokens + count
    graded = [
        task.correct(text, rows[i // k]["answer"], rows[i // k]["question"]) for i, text in enumerate(completions)
    ]
    correct = np.array(graded, dtype=float).reshape(len(rows), k)
    samples = [
        {
            "prompt": rows[i]["question"],
            "completion": completions[i * k],
            "answer": rows[i]["answer"],
            "correct": bool(correct[i, 0]),
        }
        for i in range(min(keep, len(rows)))
    ]
    low, high = accuracy_interval(correct)
    return Evaluation(float(correct.mean()), low, high, entropy_sum / max(tokens, 1.0), correct.size, samples)


def accuracy_interval(correct: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Interval for the mean of `correct`, whose rows (samples of one prompt) are not independent.

    Clopper and Pearson's exact interval at the effective number of samples n* = m(1-m) / var(mean), where var(mean) is
    taken over the prompts' own means. With one sample a prompt it is the exact binomial interval; when all answers are
    right, or all are wrong, n* is the number of prompts.

    Args:
        correct: 0 or 1, shape (prompts, samples).
        level: probability that the interval holds the truth.

    Returns:
        Lower and upper end, in [0, 1].

    Source: Korn & Graubard, Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data (1998), without their correction of the degrees of freedom.
    """
    prompts, mean = len(correct), float(correct.mean())
    variance = float(correct.mean(axis=1).var()) / prompts
    n = min(mean * (1 - mean) / variance, correct.size) if variance > 0 else prompts
    hits, tail = mean * n, (1 - level) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if mean > 0 else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if mean < 1 else 1.0
    return low, high


class _TemperedEntropy(LogitsProcessor):
    """Divides logits by the temperature and keeps each step's entropy: one pass, and no logits are stored."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.entropies: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        tempered = scores.float() / self.temperature
        logps = tempered.log_softmax(-1)
        self.entropies.append(-(logps.exp() * logps).nan_to_num(0.0).sum(-1))
        return tempered  # type: ignore[return-value]


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    max_new_tokens: int,
    temperature: float,
) -> tuple[list[str], float, float]:
    """Completions of the prompts, and the sum of their tokens' entropies with the number of these tokens."""
    inputs = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt").to(model.device)
    tempered = _TemperedEntropy(temperature)
    # Whatever sampling habits the model's own generation config has are switched off: this is the policy itself.
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    output = model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([tempered]))
    written = output[:, inputs["input_ids"].shape[1] :]
    ended = (written == tokenizer.eos_token_id).int()
    mask = (ended.cumsum(1) - ended) == 0  # up to and with the first end token
    nats = float((torch.stack(tempered.entropies, dim=1) * mask).sum())
    return tokenizer.batch_decode(written, skip_special_tokens=True), nats, float(mask.sum())


def _token_ids(prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt's tokens, as TRL makes them when it trains on it."""
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])


@contextmanager
def _left_alone(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Seeds the sampling for the block, in eval mode; puts random state and mode back after it."""
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        model.eval()
        try:
            yield
        finally:
            model.train(training)
