"""Train by a recipe: evaluate, train, evaluate again, report; a resumed run skips what it has already."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback
from trl import ModelConfig, get_peft_config

from bandpo._input import InputError
from bandpo.engines.trl import BandGRPOConfig, BandGRPOTrainer, NonFiniteError
from bandpo.train.callbacks import Recorder
from bandpo.train.display import Display
from bandpo.train.evaluate import Evaluation, evaluate
from bandpo.train.folder import RunFolder, check_folder, check_space, commit, machine, versions, write_whole
from bandpo.train.models import TINY, load_model
from bandpo.train.noise import without_noise
from bandpo.train.recipe import Recipe
from bandpo.train.report import write_report
from bandpo.train.tasks import get_task
from bandpo.train.warmup import warm_up

ARMS = ("none", "fixed")


@dataclass
class Job:
    """One training: the run itself, or an arm that it is compared with.

    Args:
        recipe: the checked recipe.
        folder: where it goes.
        arm: the arm's name; empty for the run itself.
        source: the model to start from.
        command: the command to repeat the run.
        display: where to show it.
        runs: trainings to come, this one included; for the disk.
    """

    recipe: Recipe
    folder: RunFolder
    arm: str
    source: str
    command: str
    display: Display
    runs: int


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes, under torchrun or alone."""
    return os.environ.get("RANK", "0") == "0"


def run(
    recipe: Recipe,
    *,
    out: Path,
    resume: bool = False,
    compare: bool = False,
    warmup: bool = False,
    command: str = "",
    display: Display | None = None,
) -> dict[str, Any]:
    """Train by a recipe.

    Args:
        recipe: from `load_recipe`.
        out: the run's folder.
        resume: whether to go on with the run that is there.
        compare: whether to train without a clip and with the fixed one as well.
        warmup: whether to make the warm-up checkpoint first.
        command: the command to repeat the run, for the report.
        display: where to show progress; None for nowhere.

    Returns:
        The fields of the "done" event.

    Raises:
        InputError: the folder, the recipe or the model cannot be used.
        NonFiniteError: the run met a NaN or an infinity; checkpoints already written are good.
    """
    shown = display if display and is_main_process() else Display()
    if recipe.keys.threads:
        torch.set_num_threads(recipe.keys.threads)
    folder = RunFolder(out)
    if is_main_process():
        check_folder(out, resume=resume)
        folder.check_same(recipe.values)
    if warmup and recipe.keys.model != TINY:
        raise InputError(f"--warmup: makes {TINY} anew, but the model is {recipe.keys.model!r}; drop one of the two")
    jobs = _jobs(recipe, folder, compare, str(folder.warmup) if warmup else recipe.keys.model, command, shown)
    with shown, without_noise():
        if warmup:
            _make_warmup(jobs[0])
        for job in jobs:
            try:
                _train(job)
            except NonFiniteError as error:
                if not job.arm:
                    raise
                shown.note(f"arm {job.arm} stopped, the others go on: {error}")
        return _finish(folder, shown) if is_main_process() else {}


def _jobs(recipe: Recipe, folder: RunFolder, compare: bool, source: str, command: str, display: Display) -> list[Job]:
    jobs = [Job(recipe, folder, "", source, command, display, 1)]
    for arm in ARMS if compare else ():
        if arm != recipe.values.get("clip"):
            plain = {key: value for key, value in recipe.values.items() if key != "clip_args"}
            arm_recipe = dataclasses.replace(recipe, values={**plain, "clip": arm})
            jobs.append(Job(arm_recipe, RunFolder(folder.arms / arm), arm, source, command, display, 1))
    jobs[0].runs = len(jobs)
    return jobs


def _make_warmup(job: Job) -> None:
    """Make the warm-up checkpoint, unless a run that is resumed has it."""
    target = job.folder.warmup
    if is_main_process() and not target.exists():
        partial = target.with_name("warmup.partial")
        facts = warm_up(partial, progress=job.display.progress)
        partial.replace(target)
        job.display.note(f"warm-up: held-out accuracy {facts['accuracy']:.3f}, in {target}")


def _train(job: Job) -> None:
    """Do what is left of one training."""
    info = _from_main(job.folder.info())
    if info.get("status") == "done":
        job.display.note(f"{job.folder.path}: the run is done already; only the report is made again")
        return
    installed = versions()
    for package, before in info.get("versions", {}).items():
        now = installed.get(package, before)
        if now != before:
            job.display.note(f"{package} was {before} and is {now}: the run may not go on exactly as it would have")
    trained = _from_main(job.folder.model.is_dir())
    args = job.recipe.config(job.folder.checkpoints)
    model, tokenizer = load_model(str(job.folder.model) if trained else job.source, progress=job.display.progress)
    task = get_task(job.recipe.keys.task, **job.recipe.task_args)
    trainer = None if trained else _trainer(job.recipe, args, model, tokenizer, task)
    model = trainer.model if trainer else model.to(args.device)
    evaluator = _Evaluator(job, args, model, tokenizer, task)
    if is_main_process():
        if trainer:
            check_space(job.folder.path, job.runs * _bytes_needed(trainer))
        job.folder.create(job.recipe.dump(), **{"before": None, "after": None, **_facts(job, args), **_kept(info)})
    with _status_kept(job.folder):
        if not info.get("before"):
            evaluator.before()
        if trainer:
            _fit(job, trainer, evaluator)
        evaluator.after()


def _trainer(recipe: Recipe, args: BandGRPOConfig, model: Any, tokenizer: Any, task: Any) -> BandGRPOTrainer:
    """TRL's trainer with our line in the place of its bars."""
    peft_config = get_peft_config(ModelConfig(**recipe.lora))
    trainer = BandGRPOTrainer(
        model,
        task.reward,
        args,
        train_dataset=task.train_dataset(args.seed),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(
            "FSDP or DeepSpeed is on, but bandpo train holds a whole model; use BandGRPOTrainer in a script"
        )
    return trainer


def _fit(job: Job, trainer: BandGRPOTrainer, evaluator: _Evaluator) -> None:
    """Train from the last checkpoint, or from the start, and save the model."""
    checkpoint = None
    if is_main_process():
        # The trainer does nothing sensible with a checkpoint of its very last step: take the one before.
        checkpoint, step = job.folder.last_checkpoint(trainer.args.max_steps if trainer.args.max_steps > 0 else None)
        job.folder.rewind(step)
    checkpoint = _from_main(checkpoint)
    if is_main_process():
        recorder = Recorder(
            job.folder,
            job.display,
            trainer.args,
            arm=job.arm,
            eval_every=job.recipe.keys.eval_every,
            evaluate=evaluator.during,
        )
        trainer.add_callback(recorder)
        trainer.token_callback = recorder.tokens
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        if is_main_process():
            recorder.save_tokens()
    _save_model(job, trainer)


def _save_model(job: Job, trainer: BandGRPOTrainer) -> None:
    partial = job.folder.path / "model.partial"
    trainer.save_model(str(partial))
    trainer.create_model_card(model_name=job.recipe.name)
    if is_main_process():
        shutil.copy(job.folder.checkpoints / "README.md", partial)
        partial.replace(job.folder.model)


class _Evaluator:
    """Held-out evaluations of one training, by the main process; the others wait at the next step's exchange."""

    def __init__(self, job: Job, args: BandGRPOConfig, model: Any, tokenizer: Any, task: Any) -> None:
        self.job, self.args, self.model, self.tokenizer, self.task = job, args, model, tokenizer, task

    def _evaluate(self) -> Evaluation:
        args, keys = self.args, self.job.recipe.keys
        self.job.display.progress(f"evaluating on {keys.eval_prompts} held-out prompts", 0.0)
        return evaluate(
            self.model,
            self.tokenizer,
            self.task,
            prompts=keys.eval_prompts,
            k=keys.eval_samples,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            seed=args.seed,
            batch_size=args.per_device_eval_batch_size,
        )

    def _show(self, step: int, result: Evaluation) -> dict[str, Any]:
        found = {key: getattr(result, key) for key in ("accuracy", "low", "high", "entropy", "n")}
        arm = {"arm": self.job.arm} if self.job.arm else {}
        self.job.display.emit({"event": "eval", **arm, "step": step, **found})
        return found

    def before(self) -> None:
        """Evaluate what the training starts from."""
        if is_main_process():
            result = self._evaluate()
            samples = [
                {**_only(s, "prompt", "answer"), "before": s["completion"], "correct_before": s["correct"]}
                for s in result.samples
            ]
            write_whole(self.job.folder.samples, json.dumps(samples, indent=1))
            self.job.folder.update(before=self._show(0, result))

    def during(self, step: int) -> None:
        """Evaluate in the middle, and record it.

        Args:
            step: optimiser steps made.
        """
        found = self._show(step, self._evaluate())
        self.job.folder.add_metrics({"event": "eval", "step": step, **found})

    def after(self) -> None:
        """Evaluate what the training ended with; the run is then done."""
        if is_main_process():
            result = self._evaluate()
            samples = json.loads(self.job.folder.samples.read_text())
            for sample, s in zip(samples, result.samples, strict=True):
                sample |= {"after": s["completion"], "correct_after": s["correct"]}
            write_whole(self.job.folder.samples, json.dumps(samples, indent=1))
            records = self.job.folder.metrics()
            last = max((r for r in records if r["event"] == "step"), key=lambda r: r["step"])
            self.job.folder.update(after=self._show(last["step"], result), seconds=last["seconds"], status="done")


def _finish(folder: RunFolder, display: Display) -> dict[str, Any]:
    """Write the report, show the closing table, and return the "done" event's fields."""
    runs = [folder, *(RunFolder(path) for path in sorted(folder.arms.glob("*")) if (path / "run.json").exists())]
    display.progress("writing the report", 0.0)
    write_report([r.path for r in runs], folder.report)
    rows = [{**_only(r.info(), "clip", "before", "after", "error"), "clipped": _clipped(r)} for r in runs]
    display.emit({"event": "summary", "runs": rows, "report": str(folder.report)})
    before, after = rows[0]["before"], rows[0]["after"]
    done = {
        "event": "done",
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "entropy_before": before["entropy"],
        "entropy_after": after["entropy"],
        "clipped": rows[0]["clipped"],
        "out": str(folder.path),
        "report": str(folder.report),
    }
    display.emit(done)
    return done


def _clipped(folder: RunFolder) -> float | None:
    """Mean share of tokens without a gradient over all updates; None for a loss that keeps every gradient."""
    shares = [record["clipped"] for record in folder.metrics() if "clipped" in record]
    return sum(shares) / len(shares) if shares else None


def _facts(job: Job, args: BandGRPOConfig) -> dict[str, Any]:
    """What run.json says from the start."""
    return {
        "command": job.command,
        "recipe": job.recipe.name,
        "overrides": list(job.recipe.overrides),
        "compare": job.runs > 1,
        "warmup": job.source == str(RunFolder(job.folder.path).warmup),
        "versions": versions(),
        "seed": args.seed,
        "machine": machine(),
        "commit": commit(),
        "clip": args.clip,
        "clip_args": args.clip_args or {},
        "task": job.recipe.keys.task,
        "model": job.recipe.keys.model,
        "status": "running",
        "error": None,
    }


def _kept(info: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run keeps of its run.json."""
    return _only(info, *(key for key in ("before", "command", "overrides") if key in info))


def _only(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: values[key] for key in keys}


@contextmanager
def _status_kept(folder: RunFolder) -> Iterator[None]:
    """Leaves in run.json how the run ended, when it does not end well."""
    try:
        yield
    except BaseException as error:
        if is_main_process():
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            folder.update(status=status, error=str(error) or type(error).__name__)
        raise


def _bytes_needed(trainer: BandGRPOTrainer) -> int:
    """Disk that the run will take: the model, and checkpoints with two moments for each trained weight."""
    weights = list(trainer.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in weights if p.requires_grad)
    saved = trained if hasattr(trainer.model, "peft_config") else sum(p.numel() * p.element_size() for p in weights)
    args = trainer.args
    steps = args.max_steps if args.max_steps > 0 else 10 * args.save_steps
    checkpoints = steps // args.save_steps + 1
    if args.save_total_limit is not None:
        checkpoints = min(checkpoints, args.save_total_limit + 1)  # one more while it is being written
    return saved + int(checkpoints * (saved + 2 * trained)) + 20_000_000


def _from_main(value: Any) -> Any:
    """The main process's value, on every process."""
    holder = [value]
    broadcast_object_list(holder)
    return holder[0]
