"""`bandpo eval`: sample answers to held-out problems from one model or several, and compare them."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bandpo._input import InputError
from bandpo.cli._parser import finish, refuse

if TYPE_CHECKING:
    from bandpo.lab.answers import Answers
    from bandpo.lab.tasks import Task

STORED = ".jsonl.gz"
MOST = 1_000_000
PROMPTS = 128  # held-out problems where a task has as many as one wants
EPILOG = """\
measures, each with a 95 % bootstrap interval over prompts:
  mean@k    mean score of k samples
  pass@j    chance that one of j samples is right (unbiased), for j = 1, 2, 4, ... k
  maj@k     whether the most frequent answer is right
  entropy   of the sampling distribution, nats per token;  length: tokens;  ended: share that ended by itself

With several models each is compared with the first, paired by prompt; p is adjusted by Holm for their number.
All samples are kept in OUT, a .jsonl.gz for each model; such a file can stand for its model later.

examples:
  bandpo eval bandpo/tiny-addition --task addition --k 32
  bandpo eval bandpo/tiny-addition runs/demo --task addition --k 32 --out evals/demo
  bandpo eval Qwen/Qwen2.5-Math-1.5B --task jsonl --task_args.test math500.jsonl --k 8 --max_new_tokens 2048
  bandpo eval evals/demo/*.jsonl.gz --task addition --json
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "eval",
        help="sample answers to held-out problems from models, and compare them",
        description="Sample k answers to each held-out problem of a task from one model or several, grade them,\n"
        "and compare the models.",
        usage="bandpo eval MODEL [MODEL ...] --task NAME [--task_args.KEY VALUE ...] [options]",
        epilog=EPILOG,
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="bandpo/tiny-addition, a folder (a model, a LoRA adapter, or a run, whose final model it is), a Hub name, "
        "or a .jsonl.gz of an earlier evaluation",
    )
    parser.add_argument(
        "--task", required=True, help="as in a recipe: addition, jsonl, reasoning-gym:NAME, a file.py:Class"
    )
    parser.add_argument("--k", type=int, default=32, help="samples of each problem (default: %(default)s)")
    parser.add_argument("--prompts", type=int, help=f"held-out problems (default: all, or {PROMPTS} of very many)")
    parser.add_argument("--max_new_tokens", type=int, help="longest answer (default: what the task needs)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling and bootstrap (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=256, help="samples at a time (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: a GPU where there is one)")
    parser.add_argument("--trust_remote_code", action="store_true", help="let code that comes with a model run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for all samples (default: evals/TASK)")
    parser.add_argument("--overwrite", action="store_true", help="write over samples that are there")
    parser.set_defaults(overrides=[])
    finish(parser, _eval)


def _eval(args: argparse.Namespace) -> None:
    from bandpo.lab.answers import read_answers, write_answers
    from bandpo.lab.page import visible
    from bandpo.lab.run.records import write_whole
    from bandpo.lab.tasks.check import check_grader

    _check(args)
    stored = {name: read_answers(Path(name)) for name in args.models if name.endswith(STORED)}
    for name, found in stored.items():
        theirs = str(found.facts.get("task") or args.task)
        if _same_task(theirs) != _same_task(args.task):
            raise InputError(f"{name}: holds samples of task {theirs!r}, and --task is {args.task!r}; name theirs")
    task, sampled = _task(args), [name for name in args.models if name not in stored]
    out = args.out or Path("evals") / _slug(task.name)
    places = {name: _place(name) for name in sampled}
    files = _files(sampled, out, args.overwrite)
    if sampled:
        check_grader(task)
    answers = {}
    for name in args.models:
        answers[name] = stored.get(name) or _sample(args, name, places[name], task)
        if name in files:
            write_answers(answers[name], files[name])
    result = _result(args, list(answers.values()), files)
    if sampled:
        write_whole(out / "summary.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result) if args.json else visible(_table(result, out if sampled else None)))


def _same_task(name: str) -> str:
    """What stays of a task's name: one of one's own may lie elsewhere by now, and `chain-sum` is `chain_sum`."""
    return Path(name).name.replace("-", "_")


def _check(args: argparse.Namespace) -> None:
    import torch

    from bandpo._input import check_number

    for name in ("k", "prompts", "max_new_tokens", "batch_size"):
        if (value := getattr(args, name)) is not None and not 1 <= value <= MOST:
            raise InputError(f"--{name} {value}: must be a whole number from 1 to {MOST}")
    check_number("--temperature", args.temperature, 1e-6)
    check_number("--seed", args.seed, 0, 2**32 - 1)
    for name in args.models:
        if args.models.count(name) > 1:
            raise InputError(f"MODEL {name!r}: is given twice; name each once")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"--device {args.device}: not there ({str(error).splitlines()[0]}); use cpu, or cuda"
        ) from None


def _task(args: argparse.Namespace) -> Task:
    """The task; what no option took must be its arguments."""
    from bandpo.lab.reading import read_words
    from bandpo.lab.tasks import get_task

    words = read_words(args.overrides, typed=(), flags=(), hydra=False)
    if other := [*words.plain, *(name for name in words.nested if name != "task_args")]:
        refuse(args.parser, f"--{other[0]}")
    args.task_args = words.nested.get("task_args", {})
    task = get_task(args.task, **args.task_args)
    args.prompts = args.prompts or task.eval_size or PROMPTS
    args.max_new_tokens = args.max_new_tokens or task.answer_tokens
    return task


def _sample(args: argparse.Namespace, name: str, place: str, task: Task) -> Answers:
    """Answers from a model."""
    from bandpo.lab.evaluate import sample_answers
    from bandpo.lab.models.load import load_model
    from bandpo.lab.models.quiet import without_noise

    with _progress(args.json) as progress, without_noise():
        model, tokenizer = load_model(place, trust_remote_code=args.trust_remote_code, progress=progress)
        answers = sample_answers(
            model.to(args.device), tokenizer, task, prompts=args.prompts, k=args.k, max_new_tokens=args.max_new_tokens,
            temperature=args.temperature, seed=args.seed, batch_size=args.batch_size,
            progress=lambda share: progress(f"{name}: {args.prompts} prompts x {args.k}", share),
        )  # fmt: skip
    answers.facts |= {"model": name, "task": args.task, "task_args": args.task_args, "device": args.device}
    return answers


def _files(names: list[str], out: Path, overwrite: bool) -> dict[str, Path]:
    """Where each model's samples go; that they can be written is known before any is made."""
    files = {name: out / f"{_slug(name)}{STORED}" for name in names}
    try:
        parent = next(path for path in (out, *out.absolute().parents) if path.exists())
        if "\0" in str(out) or not parent.is_dir() or not os.access(parent, os.W_OK):
            raise OSError(f"{parent} is no folder that can be written to")
        there = [str(file) for file in files.values() if file.exists()]
    except OSError as error:
        raise InputError(f"--out {str(out)[:200]!r}: {error.strerror or error}; give another folder") from None
    if there and not overwrite:
        raise InputError(f"{there[0]}: is there already; give another --out, or --overwrite")
    for file in files.values():
        if len(same := [name for name in files if files[name] == file]) > 1:
            raise InputError(f"MODEL {same[0]!r} and {same[1]!r}: both would be written to {file}; evaluate them apart")
    return files


def _place(name: str) -> str:
    """What to load: of a run's folder, the final model."""
    folder = Path(name)
    try:
        if not (folder / "run.json").is_file():
            return name
    except (OSError, ValueError):  # no name that a file can have
        raise InputError(f"MODEL {name[:200]!r}: cannot be the name of a model or a folder; mend it") from None
    if not (folder / "model").is_dir():
        raise InputError(
            f"MODEL {name!r}: is a run with no final model; train to the end, or name one of its checkpoints"
        )
    return str(folder / "model")


class _progress:
    """A bar on a terminal, and silence elsewhere."""

    def __init__(self, silent: bool) -> None:
        self.silent = silent or not sys.stderr.isatty()

    def __enter__(self) -> Callable[[str, float], None]:
        if self.silent:
            return lambda what, share: None
        from rich.console import Console
        from rich.markup import escape
        from rich.progress import Progress

        from bandpo.lab.page import visible

        self.bar = Progress(console=Console(stderr=True), transient=True)
        self.bar.start()
        row = self.bar.add_task("", total=1.0)
        return lambda what, share: self.bar.update(row, description=escape(visible(what)), completed=share)

    def __exit__(self, *error: object) -> None:
        if not self.silent:
            self.bar.stop()


def _result(args: argparse.Namespace, answers: list[Answers], files: dict[str, Path]) -> dict[str, Any]:
    """What --json prints and summary.json holds."""
    from bandpo.lab.answers import compare

    models = [
        {
            **{key: found.facts.get(key) for key in ("model", "task", "task_args", "seed", "temperature")},
            "prompts": len(found.rows),
            "k": found.k,
            "measures": {name: interval.to_dict() for name, interval in found.summary(seed=args.seed).items()},
            "not_graded": dict(found.failed),
            "file": files[found.facts["model"]].name if found.facts.get("model") in files else None,
        }
        for found in answers
    ]
    differences = [
        {
            "model": c.model,
            "against": c.against,
            "measures": {name: {**d.to_dict(), "holm": c.holm[name]} for name, d in c.differences.items()},
        }
        for c in compare(answers, seed=args.seed)
    ]
    return {"models": models, "differences": differences}


def _table(result: dict[str, Any], out: Path | None) -> str:
    """What people read."""
    models = result["models"]
    names = [f"{chr(ord('A') + i)}" if len(models) > 1 else "" for i in range(len(models))]
    lines = [f"{models[0]['task']}: {models[0]['prompts']} prompts, {models[0]['k']} samples of each", ""]
    lines += [f"{name}  {model['model']}".strip() for name, model in zip(names, models, strict=True)] + [""]
    if len(models) > 1:
        lines.append(f"{'':10}" + "".join(f"{name:>28}" for name in names))
    for measure in models[0]["measures"]:
        cells = (_cell(model["measures"][measure]) for model in models)
        lines.append(f"{measure:10}" + "".join(f"{cell:>28}" for cell in cells))
    if result["differences"]:
        lines += ["", "minus A, paired by prompt, with p adjusted by Holm", ""]
        lines.append(f"{'':10}" + "".join(f"{name:>38}" for name in names[1:]))
        for measure in models[0]["measures"]:
            pairs = (d["measures"][measure] for d in result["differences"])
            lines.append(f"{measure:10}" + "".join(f"{_difference(pair):>38}" for pair in pairs))
    for name, model in zip(names, models, strict=True):
        if model["not_graded"]:
            why = ", ".join(f"{kind} {count}" for kind, count in model["not_graded"].items())
            lines += ["", f"{name} answers that could not be graded score 0: {why}".strip()]
    if out:
        lines += ["", f"all samples: {out}"]
    return "\n".join(line.rstrip() for line in lines)


def _cell(interval: dict[str, Any]) -> str:
    ends = "" if interval["low"] is None else f" [{interval['low']:.3f}, {interval['high']:.3f}]"
    return f"{interval['estimate']:.3f}{ends}"


def _difference(pair: dict[str, Any]) -> str:
    if pair["boot_low"] is None:
        return f"{pair['mean']:+.3f}"
    p = "<.001" if pair["holm"] < 0.001 else f"{pair['holm']:.3f}".lstrip("0")
    return f"{pair['mean']:+.3f} [{pair['boot_low']:+.3f}, {pair['boot_high']:+.3f}] p {p}"


def _slug(name: str) -> str:
    """A name as a file's name."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[-100:] or "model"
