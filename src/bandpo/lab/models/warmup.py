"""Make a checkpoint of the tiny model: supervised learning of a small task on partly wrong demonstrations.

    python -m bandpo.lab.models.warmup --out DIR --steps 600 --seed 0        the embedded one, of three-digit addition
    python -m bandpo.lab.models.warmup --out DIR --task countdown

Wrong demonstrations have one wrong digit. They leave the model unsure, so that sampling finds right and wrong answers
to most problems: what reinforcement learning needs to start from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress as Bar
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from bandpo._input import InputError, check_number
from bandpo.lab.evaluate import evaluate
from bandpo.lab.models import Progress
from bandpo.lab.models.quiet import without_noise
from bandpo.lab.models.tiny import CHARACTERS, character_tokenizer, tiny_model
from bandpo.lab.tasks import SmallTask, get_task
from bandpo.lab.tasks.addition import Addition

BATCH = 256
LEARNING_RATE = 2e-3
RAMP = 50  # updates until the learning rate is reached
IGNORED = -100  # label of a token that is not learnt


def warm_up(
    out: Path,
    *,
    steps: int | None = None,
    seed: int = 0,
    task: SmallTask | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train the tiny model from scratch and save it; the same seed gives the same weights on the same machine.

    Args:
        out: folder for model, tokenizer and warmup.json.
        steps: updates of 256 demonstrations each; None for as many as the task says.
        seed: of weights and demonstrations.
        task: what is learnt; None for addition.
        progress: told how far it is; None for silence.

    Returns:
        What warmup.json holds: command, seed, steps, first and last loss, sampled held-out accuracy.

    Raises:
        InputError: `steps` is no positive number, or `out` cannot be written.
    """
    task = task or Addition()
    steps = task.warmup_steps if steps is None else steps
    check_number("steps", steps, 1)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={str(out)!r}: cannot be made a folder ({error.strerror}); give another path") from error
    characters = CHARACTERS if set(task.alphabet) <= set(CHARACTERS) else task.alphabet
    tokenizer = character_tokenizer(characters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny_model(characters)
    losses = _teach(model, tokenizer, task, steps, seed, progress or (lambda what, share: None))
    prompts = 512 if task.name == Addition.name else min(128, task.eval_size or 128)  # small tasks have few problems
    result = evaluate(model, tokenizer, task, prompts=prompts, k=8, max_new_tokens=task.answer_tokens)
    with without_noise():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {
        "command": f"python -m bandpo.lab.models.warmup --out DIR --steps {steps} --seed {seed}{_named(task)}",
        "steps": steps,
        "seed": seed,
        "loss_first": losses[0],
        "loss_last": sum(losses[-20:]) / len(losses[-20:]),
        "accuracy": result.accuracy,
        "entropy": result.entropy,
    }
    (out / "warmup.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _teach(
    model: Any, tokenizer: PreTrainedTokenizerFast, task: SmallTask, steps: int, seed: int, report: Progress
) -> list[float]:
    """Train on demonstrations; returns the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / RAMP))
    rng, losses = Random(f"demonstrations {seed}"), list[float]()
    for step in range(steps):
        input_ids, labels = demonstrations(task, rng, BATCH, tokenizer)
        logits = model(input_ids=input_ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        losses.append(float(loss.detach()))
        report("warm-up", (step + 1) / steps)
    return losses


def _named(task: SmallTask) -> str:
    return "" if task.name == Addition.name else f" --task {task.name}"


def demonstrations(
    task: SmallTask, rng: Random, size: int, tokenizer: PreTrainedTokenizerFast | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of training problems with answers, of which the task's share is right.

    Args:
        task: a small task.
        rng: the source of randomness.
        size: how many.
        tokenizer: a token a character; None for the embedded model's.

    Returns:
        Token ids and labels, shape (size, tokens); the prompt carries no label.
    """
    tokenizer = tokenizer or character_tokenizer()
    ids, rows = tokenizer.get_vocab(), []
    for _ in range(size):
        question, answer = task.demonstration(rng)
        rows.append(torch.tensor([ids[c] for c in question + answer] + [tokenizer.eos_token_id]))
    input_ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = pad_sequence(rows, batch_first=True, padding_value=IGNORED)
    labels[:, : task.prompt_length] = IGNORED
    return input_ids, labels


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr with the time left, as the `progress` of `warm_up` and `load_model`.

    Yields:
        The function to hand over as `progress`.
    """
    with Bar(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, share: bar.update(task, description=what, completed=share)


def main(argv: list[str] | None = None) -> int:
    """The command line, see the module's own text; returns the exit code: 0 done, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m bandpo.lab.models.warmup", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, help="updates (default: the task's own number; addition has 600)")
    parser.add_argument("--task", default="addition", help="a small task of the lab (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and demonstrations (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        task = get_task(options.task)
        if not isinstance(task, SmallTask):
            raise InputError(f"--task {options.task}: the tiny model learns small tasks; give addition or countdown")
        with progress_bar() as progress:
            facts = warm_up(options.out, steps=options.steps, seed=options.seed, task=task, progress=progress)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
