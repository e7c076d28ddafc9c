"""Sampled answers to held-out problems: what they say about a model, and the file that keeps all of them."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bandpo._input import InputError
from bandpo.lab import stats
from bandpo.lab.stats import Interval, Paired

FORMAT = "bandpo answers 1"


@dataclass
class Answers:
    """Answers to each of several problems, graded; arrays have the shape (prompts, samples).

    Args:
        facts: what was evaluated and how: model, task, task_args, k, seed, temperature, max_new_tokens.
        rows: question and answer of each problem.
        texts: the completions of each problem.
        finals: what each of them answers, as maj@k counts it.
        scores: what each is worth.
        whys: why an answer could not be graded; "" for those that were.
        entropies: sum over a completion's tokens of the sampling distribution's entropy, nats.
        lengths: tokens of each completion, with the one that ends it.
        ended: whether it ended by itself.
    """

    facts: dict[str, Any]
    rows: list[dict[str, Any]]
    texts: list[list[str]]
    finals: list[list[str]]
    scores: np.ndarray
    whys: list[list[str]]
    entropies: np.ndarray
    lengths: np.ndarray
    ended: np.ndarray

    @property
    def k(self) -> int:
        """Samples of each problem."""
        return int(self.scores.shape[1])

    @cached_property
    def correct(self) -> np.ndarray:
        """Which answers are fully right."""
        return self.scores >= 1

    @cached_property
    def failed(self) -> Counter[str]:
        """Answers that could not be graded, by reason."""
        return Counter(why.partition(":")[0] for row in self.whys for why in row if why)

    def per_prompt(self) -> dict[str, np.ndarray]:
        """Each measure, one number per problem, shape (prompts,).

        Returns:
            mean@k (mean score), pass@1, 2, 4, ... k (unbiased), maj@k (the most frequent answer's share of right ones;
            ties count in proportion), entropy (nats per token), length (tokens), ended (share).
        """
        k, right = self.k, self.correct.sum(1)
        powers = sorted({min(2**i, k) for i in range(k.bit_length() + 1)})
        found = {f"mean@{k}": self.scores.mean(1)}
        found |= {f"pass@{j}": stats.pass_at_k(right, k, j) for j in powers}
        found[f"maj@{k}"] = np.array([_majority(f, c) for f, c in zip(self.finals, self.correct, strict=True)])
        tokens = self.lengths.sum(1)
        found["entropy"] = self.entropies.sum(1) / np.maximum(tokens, 1)
        return found | {"length": self.lengths.mean(1), "ended": self.ended.mean(1)}

    def summary(self, *, level: float = 0.95, resamples: int = 5000, seed: int = 0) -> dict[str, Interval]:
        """Each measure over all problems, with a bootstrap interval over problems.

        A share that is 0 or 1 for every problem has Wilson's interval for that many problems.

        Args:
            level: of the intervals.
            resamples: of the bootstrap.
            seed: of the bootstrap.

        Returns:
            The measures of `per_prompt`.
        """
        found = {}
        for name, values in self.per_prompt().items():
            if name not in ("entropy", "length") and np.ptp(values) == 0 and values[0] in (0, 1):
                found[name] = stats.wilson(int(values.sum()), len(values), level)
            else:
                found[name] = stats.bootstrap(values, level=level, resamples=resamples, seed=seed)
        return found


def _majority(finals: list[str], correct: np.ndarray) -> float:
    """Whether the most frequent answer is right; samples without an answer have no vote."""
    votes: dict[str, list[bool]] = defaultdict(list)
    for final, right in zip(finals, correct, strict=True):
        if final:
            votes[final].append(bool(right))
    most = max(map(len, votes.values()), default=0)
    return float(np.mean([np.mean(v) for v in votes.values() if len(v) == most])) if most else 0.0


@dataclass
class Comparison:
    """A model against another on the same problems.

    Args:
        model: the model's name.
        against: the other's.
        differences: model less other, for each measure.
        holm: p of each measure, adjusted for the number of models that are compared.
    """

    model: str
    against: str
    differences: dict[str, Paired]
    holm: dict[str, float] = field(default_factory=dict)


def compare(answers: list[Answers], *, level: float = 0.95, resamples: int = 5000, seed: int = 0) -> list[Comparison]:
    """Every model against the first, paired by problem.

    Args:
        answers: two or more, to the same problems.
        level: of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        One comparison for each model but the first.

    Raises:
        InputError: they answer other problems, or a different number of times.
    """
    base = answers[0]
    first, found = base.per_prompt(), []
    for other in answers[1:]:
        if [r["question"] for r in other.rows] != [r["question"] for r in base.rows] or other.k != base.k:
            raise InputError(
                f"{other.facts['model']!r} and {base.facts['model']!r} answered other problems, or not the same number "
                "of times: evaluate both with the same task, prompts and k"
            )
        pairs = {
            name: stats.paired(values, first[name], level=level, resamples=resamples, seed=seed)
            for name, values in other.per_prompt().items()
        }
        found.append(Comparison(other.facts["model"], base.facts["model"], pairs))
    for name in first:
        adjusted = stats.holm([c.differences[name].p for c in found])
        for comparison, p in zip(found, adjusted, strict=True):
            comparison.holm[name] = p
    return found


def write_answers(answers: Answers, path: Path) -> None:
    """Write all samples, compressed: a line of facts, then a line of JSON for each problem; whole or not at all.

    Args:
        answers: what to write.
        path: a name that ends in .jsonl.gz.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    lines = [{"format": FORMAT, **answers.facts, "prompts": len(answers.rows), "k": answers.k}]
    for i, row in enumerate(answers.rows):
        columns = {
            "completions": answers.texts[i],
            "finals": answers.finals[i],
            "scores": answers.scores[i].tolist(),
            "whys": answers.whys[i],
            "entropies": [round(x, 6) for x in answers.entropies[i].tolist()],
            "lengths": answers.lengths[i].tolist(),
            "ended": answers.ended[i].tolist(),
        }
        lines.append({"question": row["question"], "answer": row["answer"], **columns})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(partial, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(
            f"out={str(path)!r}: cannot be written ({error.strerror or error}); give another folder"
        ) from None


def read_answers(path: Path) -> Answers:
    """Read a file of `write_answers`.

    Args:
        path: the file.

    Returns:
        The answers.

    Raises:
        InputError: it is not there, or not such a file.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            head, *lines = map(json.loads, file)
        if head.pop("format") != FORMAT or len(lines) != head.pop("prompts") or not head.pop("k"):
            raise ValueError("it is of another form, or not whole")
        columns = {name: [line[name] for line in lines] for name in lines[0]}
        arrays = {name: np.array(columns[name]) for name in ("scores", "entropies", "lengths", "ended")}
        if any(x.shape != arrays["scores"].shape or x.ndim != 2 or x.dtype.kind not in "biuf" for x in arrays.values()):
            raise ValueError("its columns are of different length, or no numbers")
        if not isinstance(head["model"], str):
            raise ValueError("it names no model")
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        what = " ".join(str(error).split())[:120]
        raise InputError(f"{str(path)!r}: holds no answers of bandpo eval ({what}); evaluate again") from None
    rows = [{"question": q, "answer": a} for q, a in zip(columns["question"], columns["answer"], strict=True)]
    return Answers(
        facts=head, rows=rows, texts=columns["completions"], finals=columns["finals"], scores=arrays["scores"],
        whys=columns["whys"], entropies=arrays["entropies"], lengths=arrays["lengths"], ended=arrays["ended"],
    )  # fmt: skip
