"""Make the embedded checkpoint: supervised learning of three-digit addition on partly wrong demonstrations.

    python -m bandpo.train.warmup --out DIR --steps 600 --seed 0

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

from bandpo._input import InputError, check_number
from bandpo.train.evaluate import evaluate
from bandpo.train.models import Progress, character_tokenizer, tiny_model
from bandpo.train.noise import without_noise
from bandpo.train.tasks import held_out
from bandpo.train.tasks.addition import Addition

BATCH = 256
LEARNING_RATE = 2e-3
RAMP = 50  # updates until the learning rate is reached
CORRECT_SHARE = 0.4
IGNORED = -100  # label of a token that is not learnt


def warm_up(out: Path, *, steps: int = 600, seed: int = 0, progress: Progress | None = None) -> dict[str, Any]:
    """Train the tiny model from scratch and save it; the same seed gives the same weights on the same machine.

    Args:
        out: folder for model, tokenizer and warmup.json.
        steps: updates of 256 demonstrations each.
        seed: of weights and demonstrations.
        progress: told how far it is; None for silence.

    Returns:
        What warmup.json holds: command, seed, steps, first and last loss, sampled held-out accuracy.

    Raises:
        InputError: `steps` is no positive number, or `out` cannot be written.
    """
    check_number("steps", steps, 1)
    report = progress or (lambda what, share: None)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={str(out)!r}: cannot be made a folder ({error.strerror}); give another path") from error
    tokenizer, task = character_tokenizer(), Addition()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / RAMP))
    rng, losses = Random(f"demonstrations {seed}"), []
    for step in range(steps):
        input_ids, labels = demonstrations(task, rng, BATCH)
        logits = model(input_ids=input_ids[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        losses.append(float(loss.detach()))
        report("warm-up", (step + 1) / steps)
    result = evaluate(model, tokenizer, task, prompts=512, k=8, max_new_tokens=5)
    with without_noise():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    facts = {
        "command": f"python -m bandpo.train.warmup --out DIR --steps {steps} --seed {seed}",
        "steps": steps,
        "seed": seed,
        "loss_first": losses[0],
        "loss_last": sum(losses[-20:]) / len(losses[-20:]),
        "accuracy": result.accuracy,
        "entropy": result.entropy,
    }
    (out / "warmup.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def demonstrations(task: Addition, rng: Random, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of training problems with answers, of which a fixed share is right and the rest has one wrong digit.

    Args:
        task: the addition task.
        rng: the source of randomness.
        size: how many.

    Returns:
        Token ids and labels, shape (size, tokens); the prompt carries no label.
    """
    tokenizer = character_tokenizer()
    ids, prompt_length = tokenizer.get_vocab(), 2 * task.digits + 2
    rows = []
    for _ in range(size):
        question, answer = task.problem(*task.draw(rng, keep=lambda key: not held_out(key)))
        if rng.random() >= CORRECT_SHARE:
            place = rng.randrange(len(answer))
            wrong = rng.choice([digit for digit in "0123456789" if digit != answer[place]])
            answer = answer[:place] + wrong + answer[place + 1 :]
        rows.append([ids[character] for character in question + answer] + [tokenizer.eos_token_id])
    input_ids = torch.tensor(rows)
    labels = input_ids.clone()
    labels[:, :prompt_length] = IGNORED
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
    """The command line; see the module's own text.

    Args:
        argv: arguments; None for those of the process.

    Returns:
        Exit code: 0 done, 2 for bad input.
    """
    parser = argparse.ArgumentParser(prog="python -m bandpo.train.warmup", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=600, help="updates (default: %(default)s, half a minute)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and demonstrations (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        with progress_bar() as progress:
            facts = warm_up(options.out, steps=options.steps, seed=options.seed, progress=progress)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
