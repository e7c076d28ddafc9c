"""Train by a recipe with TRL: evaluate, train, evaluate again; a resumed run skips what it has already."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import PrinterCallback
from transformers.trainer_callback import ProgressCallback

from bandpo._input import InputError
from bandpo.engines.trl import BandGRPOConfig, BandGRPOTrainer, NonFiniteError
from bandpo.lab.evaluate import evaluate
from bandpo.lab.models import TINY
from bandpo.lab.models.load import is_adapter, load_model
from bandpo.lab.models.quiet import without_noise
from bandpo.lab.models.warmup import warm_up
from bandpo.lab.recipe import Recipe
from bandpo.lab.run import checkpoints
from bandpo.lab.run.folder import check_space
from bandpo.lab.run.records import Sample, Score, put_aside
from bandpo.lab.run.session import Session
from bandpo.lab.trl.callbacks import Recorder, Sealer
from bandpo.lab.trl.config import check_optimizer, to_lora, to_trl
from bandpo.lab.trl.peers import peers_watched
from bandpo.lab.trl.staleness import StaleGRPOTrainer

ARMS = ("none", "fixed")


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes, under torchrun or alone."""
    return os.environ.get("RANK", "0") == "0"


def run(session: Session) -> dict[str, Any]:
    """Train by a recipe, and by those of the arms that it is compared with.

    Args:
        session: the run.

    Returns:
        The fields of the "done" event; none in processes other than the first.

    Raises:
        InputError: the folder, the recipe or the model cannot be used.
        NonFiniteError: the run met a NaN or an infinity; checkpoints already written are good.
    """
    recipe, shown = session.recipe, session.display
    to_trl(recipe, session.folder.checkpoints)  # all that can be wrong without a model is found here
    to_lora(recipe)
    task = recipe.make_task()
    recipe.make_rewards(task)
    if session.warmup and recipe.model != TINY:
        raise InputError(f"--warmup: makes {TINY} anew, but the model is {recipe.model!r}; drop one of the two")
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    sessions = [session, *_arms(session)]
    with shown, without_noise(), peers_watched():
        if session.warmup and is_main_process() and not session.folder.warmup.is_dir():
            _make_warmup(session)
        for one in sessions:
            try:
                _train(one, task, runs=len(sessions) if one is session else 1)
            except NonFiniteError as error:
                if one is session:
                    raise
                shown.note(f"arm {one.arm} stopped, the others go on: {error}")
        return session.finish() if is_main_process() else {}


def _arms(session: Session) -> list[Session]:
    """The trainings that --compare adds: the same recipe with another clip."""
    arms = [arm for arm in ARMS if session.compare and arm != session.recipe.clip]
    return [session.for_arm(arm, _with_clip(session.recipe, arm)) for arm in arms]


def _with_clip(recipe: Recipe, clip: str) -> Recipe:
    plain = {key: value for key, value in recipe.values.items() if key != "clip_args"}
    made = Recipe.model_validate({**plain, "clip": clip})
    made._name = recipe.name
    return made


def _make_warmup(session: Session) -> None:
    """Make the warm-up checkpoint."""
    target = session.folder.warmup
    partial = target.with_name("warmup.partial")
    facts = warm_up(partial, progress=session.display.progress)
    partial.replace(target)
    session.display.note(f"warm-up: held-out accuracy {facts['accuracy']:.3f}, in {target}")


def _train(session: Session, task: Any, runs: int) -> None:
    """Do what is left of one training."""
    recipe, folder = session.recipe, session.folder
    if _from_main(session.is_done):
        return
    trained = _from_main(lambda: _model_is_whole(session))
    args = to_trl(recipe, folder.checkpoints)
    found = _from_main(lambda: _go_on_from(session, args.max_steps))
    source = (
        str(folder.path.parents[1] / "warmup" if session.arm else folder.warmup) if session.warmup else recipe.model
    )
    model, tokenizer = load_model(
        str(folder.model) if trained else source, trust_remote_code=recipe.trust_remote_code,
        progress=session.display.progress,
    )  # fmt: skip
    trainer = None if trained else _trainer(session, args, model, tokenizer, task)
    model = trainer.model if trainer else model.to(args.device)
    evaluator = _Evaluator(session, args, model, tokenizer, task)
    if is_main_process():
        if trainer:
            check_space(folder.path, runs * _bytes_needed(trainer))
        session.begin(seed=args.seed)
    with session.status_kept() if is_main_process() else nullcontext(), peers_watched():
        evaluator.before()
        if trainer:
            _fit(session, trainer, evaluator, found)
        evaluator.after()


def _go_on_from(session: Session, max_steps: int) -> checkpoints.Found:
    """The newest good checkpoint; nothing is changed yet."""
    found = checkpoints.find(
        session.folder.checkpoints, "checkpoint-", session.fingerprint, sealed=True,
        # The trainer does nothing sensible with a checkpoint of its very last step: take the one before.
        before=max_steps if max_steps > 0 else None, complete=lambda path: (path / "trainer_state.json").exists(),
    )  # fmt: skip
    found.check(session.folder.path)
    return found


def _model_is_whole(session: Session) -> bool:
    """Whether the model has been trained already, and only the last evaluation is missing."""
    folder, facts = session.folder, session.folder.facts
    if session.extended or not facts.before or not facts.trained or not folder.model.is_dir():
        return False
    if why := checkpoints.changed(folder.model, facts.trained):
        session.display.note(f"{folder.model} cannot be used, {why}: it is made again from the last checkpoint")
    return not why


def _trainer(session: Session, args: BandGRPOConfig, model: Any, tokenizer: Any, task: Any) -> BandGRPOTrainer:
    """TRL's trainer with our line instead of its bars; what it cannot use is found before any evaluation is spent."""
    recipe = session.recipe
    lora = to_lora(recipe)
    if is_adapter(model) and any(key.startswith("lora_") for key in recipe.values):
        raise InputError(f"model={recipe.model!r}: is a LoRA adapter, trained on as it is; leave the lora_ keys out")
    try:
        trainer = StaleGRPOTrainer(
            model, recipe.make_rewards(task)[0], args,
            train_dataset=_enough(session, args, task.train_dataset(args.seed)), processing_class=tokenizer,
            peft_config=None if is_adapter(model) else lora, staleness=recipe.staleness,
        )  # fmt: skip
    except InputError:
        raise
    except Exception as error:  # TRL, transformers, peft and accelerate each have errors of their own
        why = " ".join(str(error).split())[:400]
        raise InputError(f"recipe {recipe.name}: TRL cannot train so, {type(error).__name__}: {why}") from error
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(
            "FSDP or DeepSpeed is on, but this command holds a whole model; use BandGRPOTrainer in a script"
        )
    if not any(p.requires_grad for p in trainer.model.parameters()):
        raise InputError(f"model={recipe.model!r}: none of its weights would be trained; give another model")
    _check_room(recipe, trainer, task)
    check_optimizer(trainer)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Sealer(session.fingerprint, is_main_process()))
    return trainer


def _enough(session: Session, args: BandGRPOConfig, data: Any) -> Any:
    """Training problems, repeated where a rollout takes more than there are: TRL would make no step at all."""
    need, there = args.generation_batch_size // args.num_generations, len(data)
    if there >= need:
        return data
    if not there:
        raise InputError(f"task {session.recipe.task!r}: has no training problems; give it some with task_args")
    session.display.note(f"{there} training problems, and a rollout takes {need}: they are repeated")
    return data.select([i % there for i in range(need)])


def _check_room(recipe: Recipe, trainer: BandGRPOTrainer, task: Any) -> None:
    """Prompt and answer must fit into the positions that the model has."""
    room = getattr(trainer.model.config, "max_position_embeddings", None)
    answer = trainer.args.max_completion_length
    if not isinstance(room, int):
        return
    rows = task.eval_dataset(min(recipe.eval_prompts, 16))
    tokenize = trainer.processing_class
    longest = max(
        len(tokenize(text=row["prompt"])["input_ids"]) if isinstance(row["prompt"], str) else 0 for row in rows
    )
    if longest + answer > room:
        raise InputError(
            f"max_completion_length={answer}: with prompts of {longest} tokens more than the {room} positions of "
            f"{recipe.model!r}; give at most {room - longest}"
        )


def _fit(session: Session, trainer: BandGRPOTrainer, evaluator: _Evaluator, found: checkpoints.Found) -> None:
    """Train from the last checkpoint, or from the start, and save the model."""
    if is_main_process():
        found.clear(session.display.note)
        session.folder.rewind(found.number, session.display.note)
        recorder = Recorder(session, trainer.args, evaluate=evaluator.during)
        trainer.add_callback(recorder)
        trainer.token_callback = recorder.tokens
    try:
        trainer.train(resume_from_checkpoint=str(found.path) if found.path else None)
    finally:
        if is_main_process():
            recorder.save_tokens()
    _save_model(session, trainer)


def _save_model(session: Session, trainer: BandGRPOTrainer) -> None:
    folder = session.folder
    partial = folder.path / "model.partial"
    trainer.save_model(str(partial))
    trainer.create_model_card(model_name=session.recipe.name)
    if is_main_process():
        shutil.copy(folder.checkpoints / "README.md", partial)
        files = checkpoints.sums(partial)
        if folder.model.is_dir() and not folder.model.is_symlink():
            shutil.rmtree(folder.model)
        elif os.path.lexists(folder.model):
            put_aside(folder.model)
        partial.replace(folder.model)
        folder.update(trained=files)


class _Evaluator:
    """Held-out evaluations of one training, by the main process; the others wait at the next step's exchange."""

    def __init__(self, session: Session, args: BandGRPOConfig, model: Any, tokenizer: Any, task: Any) -> None:
        self.session, self.args, self.model, self.tokenizer, self.task = session, args, model, tokenizer, task

    def _evaluate(self, step: int, when: str) -> list[dict[str, Any]]:
        """Evaluate, record what was found, and return some of the samples."""
        args, recipe = self.args, self.session.recipe
        self.session.display.progress(f"evaluating on {recipe.eval_prompts} held-out prompts", 0.0)
        found = evaluate(
            self.model, self.tokenizer, self.task, prompts=recipe.eval_prompts, k=recipe.eval_samples,
            max_new_tokens=args.max_completion_length, temperature=args.temperature, seed=args.seed,
            batch_size=args.per_device_eval_batch_size,
        )  # fmt: skip
        score = Score(**{name: getattr(found, name) for name in Score.model_fields})
        self.session.evaluated(step, score, when=when)
        return found.samples

    def before(self) -> None:
        """Evaluate what the training starts from, unless that has been done."""
        if is_main_process() and not self.session.folder.facts.before:
            self.session.folder.write_samples(
                [
                    Sample(prompt=s["prompt"], answer=s["answer"], before=s["completion"], correct_before=s["correct"])
                    for s in self._evaluate(0, "before")
                ]
            )

    def during(self, step: int) -> None:
        """Evaluate after that many optimiser steps, and record it."""
        self._evaluate(step, "during")

    def after(self) -> None:
        """Evaluate what the training ended with; the run is then done."""
        if is_main_process():
            folder, last = self.session.folder, self.session.last_step()
            found = self._evaluate(last.step if last else 0, "after")
            before = {repr(sample.prompt): sample for sample in folder.samples()}
            merged = [
                before.get(repr(s["prompt"]), Sample(prompt=s["prompt"], answer=s["answer"])).model_copy(
                    update={"after": s["completion"], "correct_after": s["correct"]}
                )
                for s in found
            ]
            folder.write_samples(merged)
            folder.update(seconds=last.seconds if last else 0.0, status="done")


def _bytes_needed(trainer: BandGRPOTrainer) -> int:
    """Disk that the run will take: the model, and checkpoints with two moments for each trained weight."""
    weights = list(trainer.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in weights if p.requires_grad)
    saved = trained if is_adapter(trainer.model) else sum(p.numel() * p.element_size() for p in weights)
    args = trainer.args
    steps = args.max_steps if args.max_steps > 0 else 10 * args.save_steps
    held = steps // args.save_steps + 1
    if args.save_total_limit is not None:
        held = min(held, args.save_total_limit + 1)  # one more while it is being written
    return saved + int(held * (saved + 2 * trained)) + 20_000_000


def _from_main(value: Any) -> Any:
    """What a function returns in the main process, on every process."""
    holder = [value() if is_main_process() else None]
    broadcast_object_list(holder)
    return holder[0]
