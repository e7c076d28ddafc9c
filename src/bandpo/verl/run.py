"""Run verl by a recipe: check what is installed, write the data, start verl, follow it, and write the report."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bandpo._input import InputError
from bandpo.doctor import installed_version
from bandpo.engines._adapter import HOST
from bandpo.train.display import Display
from bandpo.train.folder import RunFolder, commit, machine, versions, write_whole
from bandpo.verl.collect import Collector, OtherLossError
from bandpo.verl.data import make_task, model_config, model_source, write_data
from bandpo.verl.failure import explain, known_keys, no_such_key
from bandpo.verl.recipe import ROLLOUT, VerlRecipe, bare, schedule
from bandpo.verl.translate import Place, environment, overrides

INSTALL = "pip install \"bandpo[verl]\", in an environment of its own: TRL's transformers is newer than verl's"
POLL = 0.5  # seconds
LOG_READ = 20_000_000  # bytes of the log in which a failure's reason is looked for
PATIENCE = 20.0  # seconds that verl and Ray get to end by themselves
MERGED_UP_TO = 4_000_000_000  # bytes of weights; larger ones are merged by hand, on a machine with the memory


class Stopped(RuntimeError):  # noqa: N818 - what it says is the reason, which need not be an error
    """The run stopped early; checkpoints already written are good.

    Args:
        reason: one line.
        resumable: whether there is a checkpoint to go on from.
    """

    def __init__(self, reason: str, *, resumable: bool = False) -> None:
        super().__init__(reason)
        self.resumable = resumable


def run(recipe: VerlRecipe, *, out: Path, resume: bool, command: str, display: Display) -> dict[str, Any]:
    """Train by a recipe with verl.

    Args:
        recipe: from `check_recipe`.
        out: the run's folder, absolute.
        resume: whether to go on with the run that is there.
        command: the command to repeat the run, for the report.
        display: where to show progress.

    Returns:
        The fields of the "done" event.

    Raises:
        InputError: the folder or the installation cannot be used.
        Stopped: verl ended early; the message says why.
    """
    folder, plan = RunFolder(out), schedule(recipe)
    info = folder.info() if resume else {}
    if resume and not info:
        display.note(f"{out}: no run there yet, so --resume starts one")
    folder.check_same(recipe.values)
    if info.get("status") != "done":
        check_engine(recipe)
        task, plain = make_task(recipe)
        write_data(task, out / "data", seed=recipe.get("seed") or 0, eval_prompts=recipe.get("eval_prompts"))
        checkpoint, start = last_checkpoint(folder.checkpoints, plan.rollouts)
        first = not (checkpoint and info.get("before"))
        place = make_place(recipe, out, plain=plain, make=True, resume_from=checkpoint, evaluate_first=first)
        folder.create(_dump(recipe), **{"before": None, "after": None, **_facts(recipe, command), **_kept(info)})
        folder.rewind(start * plan.updates)
        samples = recipe.get("eval_prompts") * recipe.get("eval_samples")
        # Without these metrics, or with verl's own loss, nothing in verl's log tells its losses apart.
        measured = recipe.get("clip_metrics") != "none" and recipe.get("clip") != HOST
        collector = Collector(folder, plan, display, log=place.log, start=start, samples=samples, measured=measured)
        with display, _status_kept(folder):
            _start_event(recipe, folder, display, start * plan.updates)
            _train(recipe, place, folder, collector, display)
            _end(recipe, folder, collector, display)
    else:
        display.note(f"{out}: the run is done already; only the report is made again")
    return _finish(folder, display)


def make_place(recipe: VerlRecipe, out: Path, *, plain: bool, make: bool, **start: Any) -> Place:
    """Say where a run lies.

    Args:
        recipe: from `check_recipe`.
        out: the run's folder, absolute.
        plain: whether the task's prompts are plain text.
        make: whether to make a model that is not there yet.
        **start: resume_from and evaluate_first of `Place`.

    Returns:
        The place.

    Raises:
        InputError: the model cannot be had.
    """
    source = model_source(recipe.get("model"), make=make)
    number = 1
    while (log := out / "verl" / f"metrics-{number}.jsonl").exists():  # verl empties the file it is given
        number += 1
    address = recipe.ours["ray_address"] or os.environ.get("RAY_ADDRESS")
    found = model_config(source)
    return Place(out=out, model=source, plain=plain, log=log, model_config=found, address=address, **start)


def check_engine(recipe: VerlRecipe) -> None:
    """Check what can be checked before verl takes half a minute to find it out.

    Args:
        recipe: from `check_recipe`.

    Raises:
        InputError: verl or what it needs is missing, there are too few GPUs, or no Ray cluster answers.
    """
    found = installed_version("verl")
    if found is None:
        raise InputError(f"verl is not installed; {INSTALL}")
    if not re.match(r"0\.9\.", found):
        raise InputError(f"verl=={found}: must be 0.9, whose keys this command writes; pip install 'verl>=0.9.1,<0.10'")
    own = {**dict(recipe.own), **{bare(w): w.partition("=")[2] for w in recipe.ours["overrides"]}}
    if installed_version("TransferQueue") is None and own.get("trainer.use_v1") not in (False, "false", "False"):
        raise InputError(f"TransferQueue is not installed, which verl's trainer needs; {INSTALL}")
    check_keys([*(key for key, _ in recipe.own), *recipe.ours["overrides"]])
    address = recipe.ours["ray_address"] or os.environ.get("RAY_ADDRESS")
    if address:
        check_address(address)
    elif not recipe.get("use_cpu"):
        engine = str(own.get(f"{ROLLOUT}.name", "vllm"))
        if installed_version(engine) is None:
            raise InputError(
                f"{ROLLOUT}.name={engine}: {engine} is not installed; install it, name another engine, or set use_cpu"
            )
        import torch

        wanted, there = recipe.ours["workers"] * recipe.ours["nodes"], torch.cuda.device_count()
        if there < wanted:
            raise InputError(
                f"verl.workers x verl.nodes={wanted}: this machine has {there} GPUs and no ray_address is given; "
                "ask for fewer, give the address of a cluster, or set use_cpu"
            )


def check_keys(words: list[str]) -> None:
    """Check that the installed verl's configuration has the keys that a user sets without a "+".

    Args:
        words: overrides, or keys alone.

    Raises:
        InputError: a key is not there; names the nearest one.
    """
    groups = [key for key in map(bare, words) if "." not in key or "@" in key]
    known = known_keys(every_engine=bool(groups))
    below = ("hydra.", *(f"{group.partition('@')[2] or group}." for group in groups))  # a group brings keys of its own
    for key in (bare(word) for word in words if known and not word.startswith("+")):
        if key not in known and key not in groups and not key.startswith(below):
            raise InputError(f"{key}: {no_such_key(key, known)}")


def check_address(address: str) -> None:
    """Check that something listens where the Ray cluster should be.

    Args:
        address: as Ray takes it; "auto" and "local" are left to Ray.

    Raises:
        InputError: nothing answers.
    """
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d+)", address)
    if not found:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"verl.ray_address={address!r}: nothing answers there ({error}); start a cluster with ray start, mend the "
            "address (RAY_ADDRESS counts too), or leave it out to start Ray here"
        ) from None


def last_checkpoint(folder: Path, rollouts: int) -> tuple[Path | None, int]:
    """Return the newest complete checkpoint of a run that is not done, and its rollout.

    Args:
        folder: where verl puts them.
        rollouts: of the whole run; a checkpoint of the very last leaves verl nothing to do, so the one before counts.

    Returns:
        The checkpoint's folder and its rollout, (None, 0) when there is none.
    """
    # verl writes data.pt last, and leaves it there when it removes the weights of an old checkpoint.
    parts = ("data.pt", "actor/fsdp_config.json")
    found = [path for path in folder.glob("global_step_*") if all((path / part).exists() for part in parts)]
    steps = [(int(path.name.removeprefix("global_step_")), path) for path in found]
    whole = [pair for pair in steps if pair[0] < rollouts]
    step, path = max(whole, default=(0, None))
    return path, step


# ---------------------------------------------------------------- the run itself


def _train(recipe: VerlRecipe, place: Place, folder: RunFolder, collector: Collector, display: Display) -> None:
    """Start verl and follow it to its end."""
    place.log.parent.mkdir(parents=True, exist_ok=True)
    printed = folder.path / "verl.log"
    words = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(recipe, place)]
    display.note(f"starting Ray and verl, about a minute; what they print goes to {printed}")
    display.progress("starting Ray and verl", 0.0)
    with printed.open("ab") as log, _terminated_as_interrupted():
        begin = log.tell()
        variables = os.environ | environment(recipe, place)
        # A session of its own: Ctrl-C comes here, and `_stop` then ends verl in good order.
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=variables, start_new_session=True)
        try:
            while process.poll() is None:
                time.sleep(POLL)
                collector.poll()
        except OtherLossError as error:
            raise Stopped(str(error)) from None
        except KeyboardInterrupt:
            _stop(process)
            collector.poll(last=True)  # what it did meanwhile belongs to its checkpoints
            raise
        finally:
            _stop(process)
    collector.poll(last=True)
    if process.returncode or collector.rollout < collector.plan.rollouts:
        kept, rollout = last_checkpoint(folder.checkpoints, collector.plan.rollouts)
        step = rollout * collector.plan.updates
        saved = f"; the checkpoint of step {step} is good" if kept else ""
        reason = explain(_tail(printed, begin))
        told = f"verl ended with exit code {process.returncode}: {reason}; its log is {printed}{saved}"
        raise Stopped(told, resumable=kept is not None)


def _tail(path: Path, begin: int) -> str:
    """What was printed since `begin`, of a very long log the end."""
    with path.open("rb") as file:
        file.seek(max(begin, path.stat().st_size - LOG_READ))
        return file.read().decode("utf-8", "replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End verl and the Ray that it started, gently first; nothing when it has ended."""
    if process.poll() is None:
        process.terminate()  # Ray then takes its own processes down
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Take SIGTERM, with which schedulers end a job, as an interruption: verl is then ended as well."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _status_kept(folder: RunFolder) -> Iterator[None]:
    """Leaves in run.json how the run ended, when it does not end well."""
    try:
        yield
    except BaseException as error:
        status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        folder.update(status=status, error=str(error) or type(error).__name__)
        raise


def _end(recipe: VerlRecipe, folder: RunFolder, collector: Collector, display: Display) -> None:
    write_whole(folder.samples, json.dumps(collector.samples_before_and_after(), indent=1))
    _save_model(folder, collector.plan.rollouts, display)
    folder.update(seconds=round(collector.seconds, 3), status="done")


def _save_model(folder: RunFolder, rollouts: int, display: Display) -> None:
    """Merge the last checkpoint's shards to a model; a large one is left to be merged by hand."""
    shards = folder.checkpoints / f"global_step_{rollouts}" / "actor"
    partial = folder.path / "model.partial"
    words = ["-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(shards), "--target_dir"]
    by_hand = " ".join(["python", *words, str(folder.model)])
    if sum(path.stat().st_size for path in shards.glob("model_*.pt")) > MERGED_UP_TO:
        display.note(f"the model is large; to merge its shards: {by_hand}")
        return
    display.progress("merging the model's shards", 0.0)
    done = subprocess.run([sys.executable, *words, str(partial)], capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        display.note(f"the shards could not be merged ({explain(done.stderr)}); try by hand: {by_hand}")
    else:
        shutil.rmtree(folder.model, ignore_errors=True)
        partial.replace(folder.model)


def _finish(folder: RunFolder, display: Display) -> dict[str, Any]:
    """Write the report, show the closing table, and return the "done" event's fields."""
    from bandpo.train.report import write_report

    display.progress("writing the report", 0.0)
    write_report([folder.path], folder.report)
    info = folder.info()
    shares = [record["clipped"] for record in folder.metrics() if "clipped" in record]
    clipped = sum(shares) / len(shares) if shares else None
    row = {key: info[key] for key in ("clip", "before", "after", "error")}
    display.emit({"event": "summary", "runs": [{**row, "clipped": clipped}], "report": str(folder.report)})
    done = {
        "event": "done",
        **{f"accuracy_{when}": (info[when] or {}).get("accuracy") for when in ("before", "after")},
        "clipped": clipped,
        "out": str(folder.path),
        "report": str(folder.report),
    }
    display.emit(done)
    return done


# ---------------------------------------------------------------- what the folder says


def _dump(recipe: VerlRecipe) -> str:
    return yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True)


def _facts(recipe: VerlRecipe, command: str) -> dict[str, Any]:
    return {
        "command": command,
        "engine": "verl",
        "workers": schedule(recipe).workers,
        "recipe": recipe.name,
        "overrides": list(recipe.words),
        "versions": versions(),
        "seed": recipe.get("seed") or 0,
        "machine": machine(),
        "commit": commit(),
        "clip": recipe.get("clip"),
        "clip_args": recipe.get("clip_args") or {},
        "task": recipe.get("task"),
        "model": recipe.get("model"),
        "status": "running",
        "error": None,
    }


def _kept(info: dict[str, Any]) -> dict[str, Any]:
    """What a resumed run keeps of its run.json."""
    return {key: info[key] for key in ("before", "command", "overrides") if key in info}


def _start_event(recipe: VerlRecipe, folder: RunFolder, display: Display, step: int) -> None:
    plan, facts = schedule(recipe), folder.info()
    named = {key: facts[key] for key in ("task", "model", "clip", "clip_args")}
    length = {"steps": plan.rollouts * plan.updates, "rollouts": plan.rollouts, "from_step": step}
    display.emit({"event": "start", **named, **length, "out": str(folder.path)})
    if plan.updates == 1:
        display.note(
            "each rollout feeds one optimiser step, so every ratio is 1 and no clip can act; give "
            "steps_per_generation=4 for 4 updates a rollout, or num_iterations=2"
        )
