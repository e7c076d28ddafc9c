"""Held-out evaluation: answers sampled from a model, graded, with an interval that knows what hangs together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import beta
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from bandpo._input import InputError, check_number
from bandpo.lab import stats
from bandpo.lab.answers import Answers
from bandpo.lab.grading import grade

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bandpo.lab.tasks import Task


@dataclass
class Evaluation:
    """What sampling on held-out prompts gave.

    Attributes:
        accuracy: mean score of the completions: the share of right ones, for tasks without degrees.
        low: lower end of its 95 % interval, see `accuracy_interval`.
        high: upper end.
        entropy: mean entropy of the sampling distribution over the tokens written, nats.
        n: number of completions.
        samples: one completion of each of the first prompts: prompt, completion, answer, correct.
        pass_at_k: share of the prompts with at least one fully right completion.
        length: mean number of tokens.
        failed: completions that could not be graded, and scored 0.
        answers: all of them.
    """

    accuracy: float
    low: float
    high: float
    entropy: float
    n: int
    samples: list[dict[str, Any]] = field(default_factory=list)
    pass_at_k: float = 0.0
    length: float = 0.0
    failed: int = 0
    answers: Answers | None = field(default=None, compare=False, repr=False)


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
    progress: Callable[[float], None] | None = None,
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
        progress: told the share that is done, 0 to 1.

    Returns:
        Mean score with its interval, entropy, and all answers.

    Raises:
        InputError: a number is out of range, or the prompts do not fit the model.
    """
    answers = sample_answers(
        model, tokenizer, task, prompts=prompts, k=k, max_new_tokens=max_new_tokens, temperature=temperature,
        seed=seed, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    samples = [
        {
            "prompt": row["question"],
            "completion": answers.texts[i][0],
            "answer": row["answer"],
            "correct": bool(answers.correct[i, 0]),
        }
        for i, row in enumerate(answers.rows[:keep])
    ]
    low, high = score_interval(answers.scores)
    return Evaluation(
        accuracy=float(answers.scores.mean()),
        low=low,
        high=high,
        entropy=float(answers.entropies.sum() / max(answers.lengths.sum(), 1)),
        n=answers.scores.size,
        samples=samples,
        pass_at_k=float(answers.correct.any(1).mean()),
        length=float(answers.lengths.mean()),
        failed=answers.failed.total(),
        answers=answers,
    )


def sample_answers(
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
    progress: Callable[[float], None] | None = None,
) -> Answers:
    """Sample answers to held-out problems and grade them; see `evaluate`.

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
        progress: told the share that is done, 0 to 1.

    Returns:
        All answers.

    Raises:
        InputError: a number is out of range, or the prompts do not fit the model.
    """
    for name, value in {"prompts": prompts, "k": k, "max_new_tokens": max_new_tokens, "batch_size": batch_size}.items():
        check_number(name, value, 1)
    check_number("temperature", temperature, 0, open_low=True)
    if tokenizer.pad_token_id is None:
        raise InputError("tokenizer: has no padding token; set tokenizer.pad_token = tokenizer.eos_token")
    rows = [dict(row) for row in task.eval_dataset(prompts)]
    ids = [_token_ids(row["prompt"], tokenizer) for row in rows]
    _check_room(model, max(map(len, ids)), max_new_tokens)
    jobs = [i for i in range(len(rows)) for _ in range(k)]
    written: list[_Written] = []
    with _left_alone(model, seed), torch.inference_mode():
        for start in range(0, len(jobs), batch_size):
            batch = [ids[i] for i in jobs[start : start + batch_size]]
            written += _sample(model, tokenizer, batch, max_new_tokens, temperature)
            if progress:
                progress(len(written) / len(jobs))
    grades = grade(task, [w.text for w in written], [rows[i] for i in jobs])

    def shaped(values: list[Any]) -> list[list[Any]]:
        return [values[i : i + k] for i in range(0, len(values), k)]

    return Answers(
        facts={"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed},
        rows=[{"question": row["question"], "answer": row["answer"]} for row in rows],
        texts=shaped([w.text for w in written]),
        finals=shaped([_final_answer(task, w.text) for w in written]),
        scores=np.array(shaped([g.score for g in grades])),
        whys=shaped([g.why for g in grades]),
        entropies=np.array(shaped([w.nats for w in written])),
        lengths=np.array(shaped([w.tokens for w in written])),
        ended=np.array(shaped([w.ended for w in written])),
    )


def _final_answer(task: Task, text: str) -> str:
    """What a completion answers; one that a task of one's own cannot read has no vote, and is counted."""
    try:
        return str(task.final_answer(text))
    except Exception as error:
        task.failures[f"final_answer: {type(error).__name__}"] += 1
        return ""


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: those of the model's generation config, and the tokenizer's; as TRL trains.

    Args:
        model: the model.
        tokenizer: its tokenizer.

    Returns:
        Token ids, each once.
    """
    config = getattr(model, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    found = [given] if isinstance(given, int) else list(given or [])
    return [token for token in dict.fromkeys([*found, tokenizer.eos_token_id]) if token is not None]


def score_interval(scores: np.ndarray) -> tuple[float, float]:
    """A 95 % interval for the mean score of samples of prompts.

    Args:
        scores: shape (prompts, samples).

    Returns:
        The ends: `accuracy_interval` for scores from 0 to 1, else Student's interval over the prompts' means.
    """
    if ((scores >= 0) & (scores <= 1)).all():
        return accuracy_interval(scores)
    found = stats.mean_interval(scores.mean(1))
    return found.low, found.high


def accuracy_interval(correct: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Interval for the mean of shares, whose rows (samples of one prompt) are not independent.

    Clopper and Pearson's exact interval at the effective number of samples n* = m(1-m) / var(mean), where var(mean) is
    taken over the prompts' own means. With one sample a prompt it is the exact binomial interval; when all answers are
    right, or all are wrong, n* is the number of prompts.

    Args:
        correct: 0 or 1, or between, shape (prompts, samples).
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


@dataclass
class _Written:
    """A completion: its text, the sum of its tokens' entropies, their number, and whether it ended by itself."""

    text: str
    nats: float
    tokens: int
    ended: bool


def _sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    max_new_tokens: int,
    temperature: float,
) -> list[_Written]:
    """Completions of the prompts."""
    inputs = tokenizer.pad({"input_ids": prompt_ids}, padding_side="left", return_tensors="pt").to(model.device)
    tempered, ends = _TemperedEntropy(temperature), end_ids(model, tokenizer)
    # Whatever sampling habits the model's own generation config has are switched off: this is the policy itself.
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends or None,
    )  # fmt: skip
    output = model.generate(**inputs, generation_config=config, logits_processor=LogitsProcessorList([tempered]))
    written = output[:, inputs["input_ids"].shape[1] :]
    ended = torch.isin(written, torch.tensor(ends, dtype=torch.long, device=written.device)).int()
    mask = (ended.cumsum(1) - ended) == 0  # up to and with the first end token
    nats = (torch.stack(tempered.entropies, dim=1) * mask).double().sum(1).tolist()
    tokens, over = mask.sum(1).tolist(), ended.any(1).tolist()
    texts = tokenizer.batch_decode(
        [row[:count] for row, count in zip(written.tolist(), tokens, strict=True)], skip_special_tokens=True
    )
    return [_Written(*row) for row in zip(texts, nats, tokens, over, strict=True)]


def _check_room(model: PreTrainedModel, prompt: int, new: int) -> None:
    room = getattr(model.config, "max_position_embeddings", None)
    if isinstance(room, int) and prompt + new > room:
        raise InputError(
            f"max_new_tokens={new}: the longest prompt has {prompt} tokens and the model has room for {room} in all; "
            "give fewer, or a model with more room"
        )


def _token_ids(prompt: str | list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt's tokens, as TRL makes them when it trains on it."""
    if isinstance(prompt, str):
        return list(tokenizer(text=prompt)["input_ids"])
    if tokenizer.chat_template is None:
        raise InputError(
            "the task asks in chat messages, and the tokenizer has no chat template; set task_args.chat false"
        )
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
