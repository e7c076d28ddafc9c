"""Train by a recipe with verl: check what is installed, write the data, start verl, follow it."""

from __future__ import annotations

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

from bandpo._input import InputError
from bandpo.doctor import installed_version
from bandpo.engines._adapter import HOST
from bandpo.lab.models import source_of
from bandpo.lab.recipe import Recipe, bare
from bandpo.lab.rewards import one_reward
from bandpo.lab.run import checkpoints
from bandpo.lab.run.session import Session, Stopped
from bandpo.lab.tasks import Task
from bandpo.lab.verl.collect import Collector, OtherLossError
from bandpo.lab.verl.config import ROLLOUT, Place, environment, ours, own, ray_address, schedule, to_verl
from bandpo.lab.verl.data import model_config, write_data
from bandpo.lab.verl.failure import explain, known_keys, no_such_key

INSTALL = 'pip install ".[verl]" in a checkout, in an environment of its own: verl takes no transformers past 5.10'
POLL = 0.5  # seconds
LOG_READ = 20_000_000  # bytes of the log in which a failure's reason is looked for
PATIENCE = 20.0  # seconds that verl and Ray get to end by themselves
MERGED_UP_TO = 4_000_000_000  # bytes of weights; larger ones are merged by hand, on a machine with the memory


def run(session: Session) -> dict[str, Any]:
    """Train by a recipe with verl.

    Args:
        session: the run; its folder's path is absolute.

    Returns:
        The fields of the "done" event.

    Raises:
        InputError: the folder or the installation cannot be used.
        Stopped: verl ended early; the message says why.
    """
    recipe, folder, display = session.recipe, session.folder, session.display
    plan = schedule(recipe)
    if not session.is_done():
        check_engine(recipe)
        plain = prepare(recipe, folder.path)
        found = last_checkpoint(session)
        found.check(folder.path)
        first = not (found.path and folder.facts.before)
        place = make_place(recipe, folder.path, plain=plain, resume_from=found.path, evaluate_first=first)
        session.begin(seed=recipe.seed or 0, workers=plan.workers)
        found.clear(display.note)
        folder.rewind(found.number * plan.updates, display.note)
        # Without these metrics, or with verl's own loss, nothing in verl's log tells its losses apart.
        measured = recipe.clip_metrics != "none" and recipe.clip != HOST
        collector = Collector(session, plan, log=place.log, start=found.number, measured=measured)
        with display, session.status_kept():
            session.started(
                steps=plan.rollouts * plan.updates, rollouts=plan.rollouts, from_step=found.number * plan.updates
            )
            if plan.updates == 1:
                display.note(
                    "each rollout feeds one optimiser step, so every ratio is 1 and no clip can act; give "
                    "steps_per_generation=4 for 4 updates a rollout, or num_iterations=2"
                )
            _train(session, place, collector)
            folder.write_samples(collector.samples_before_and_after())
            _save_model(session, plan.rollouts)
            folder.update(seconds=round(collector.seconds, 3), status="done")
    return session.finish()


def prepare(recipe: Recipe, out: Path) -> bool:
    """Write the task as verl reads it; returns whether its prompts are plain text."""
    task = recipe.make_task()
    one_reward(*recipe.make_rewards(task))
    write_data(task, out / "data", seed=recipe.seed or 0, eval_prompts=recipe.eval_prompts)
    return is_plain(task)


def is_plain(task: Task) -> bool:
    """Return whether a task's prompts are plain text and not chat messages."""
    return isinstance(task.eval_dataset(1)[0]["prompt"], str)


def make_place(recipe: Recipe, out: Path, *, plain: bool, make: bool = True, **start: Any) -> Place:
    """Say where a run lies.

    Args:
        recipe: a checked recipe.
        out: the run's folder, absolute.
        plain: whether the task's prompts are plain text.
        make: whether to make a model that is not there yet.
        **start: resume_from and evaluate_first of `Place`.
    """
    source = source_of(recipe.model, make=make)
    number = 1
    while (log := out / "verl" / f"metrics-{number}.jsonl").exists():  # verl empties the file it is given
        number += 1
    return Place(
        out=out, model=source, plain=plain, log=log, model_config=model_config(source), address=ray_address(recipe),
        **start,
    )  # fmt: skip


def last_checkpoint(session: Session) -> checkpoints.Found:
    """Return the newest good checkpoint of a run; one of the very last rollout leaves verl nothing to do."""
    plan = schedule(session.recipe)
    return checkpoints.find(
        session.folder.checkpoints, "global_step_", session.fingerprint, before=plan.rollouts,
        complete=is_complete, sealed=False,
    )  # fmt: skip


def is_complete(checkpoint: Path) -> bool:
    """Whether verl has written all of a checkpoint: data.pt last, which it leaves when it removes old weights."""
    return all((checkpoint / part).exists() for part in ("data.pt", "actor/fsdp_config.json"))


# ---------------------------------------------------------------- what can be found out before verl takes half a minute


def check_engine(recipe: Recipe) -> None:
    """Check verl, what it needs, the user's keys of its own, the GPUs, and the Ray cluster."""
    found = installed_version("verl")
    if found is None:
        raise InputError(f"verl is not installed; {INSTALL}")
    if not re.match(r"0\.9\.", found):
        raise InputError(f"verl=={found}: must be 0.9, whose keys this command writes; pip install 'verl>=0.9.1,<0.10'")
    words = ours(recipe)["overrides"]
    set_here = {**dict(own(recipe)), **{bare(word): word.partition("=")[2] for word in words}}
    if installed_version("TransferQueue") is None and set_here.get("trainer.use_v1") not in (False, "false", "False"):
        raise InputError(f"TransferQueue is not installed, which verl's trainer needs; {INSTALL}")
    check_keys([*(key for key, _ in own(recipe)), *words])
    if address := ray_address(recipe):
        check_address(address)
    elif not recipe.use_cpu:
        engine = str(set_here.get(f"{ROLLOUT}.name", "vllm"))
        if installed_version(engine) is None:
            raise InputError(
                f"{ROLLOUT}.name={engine}: {engine} is not installed; install it, name another engine, or set use_cpu"
            )
        import torch

        wanted, there = schedule(recipe).workers, torch.cuda.device_count()
        if there < wanted:
            raise InputError(
                f"verl.workers x verl.nodes={wanted}: this machine has {there} GPUs and no ray_address is given; "
                "ask for fewer, give the address of a cluster, or set use_cpu"
            )


def check_keys(words: list[str]) -> None:
    """Check that the installed verl's configuration has the keys that a user sets without a "+"."""
    groups = [key for key in map(bare, words) if "." not in key or "@" in key]
    known = known_keys(every_engine=bool(groups))
    below = ("hydra.", *(f"{group.partition('@')[2] or group}." for group in groups))  # a group brings keys of its own
    for key in (bare(word) for word in words if known and not word.startswith("+")):
        if key not in known and key not in groups and not key.startswith(below):
            raise InputError(f"{key}: {no_such_key(key, known)}")


def check_address(address: str) -> None:
    """Check that something listens where the Ray cluster should be; "auto" and "local" are left to Ray."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+?)\]?:(\d+)", address)
    if not found:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=5).close()
    except (OSError, OverflowError, ValueError) as error:
        raise InputError(
            f"verl.ray_address={address!r}: nothing answers there ({error}); start a cluster with ray start, mend the "
            "address (RAY_ADDRESS counts too), or leave it out to start Ray here"
        ) from None


# ---------------------------------------------------------------- the run itself


def _train(session: Session, place: Place, collector: Collector) -> None:
    """Start verl and follow it to its end."""
    folder, display = session.folder, session.display
    place.log.parent.mkdir(parents=True, exist_ok=True)
    printed = folder.path / "verl.log"
    words = [sys.executable, "-m", "verl.trainer.main_ppo", *to_verl(session.recipe, place)]
    display.note(f"starting Ray and verl, about a minute; what they print goes to {printed}")
    display.progress("starting Ray and verl", 0.0)
    # It holds the folder's lock too: should this process be killed, none takes the folder while verl writes there.
    lock = [] if folder.lock is None else [folder.lock]
    with printed.open("ab") as log, _terminated_as_interrupted():
        begin = log.tell()
        variables = os.environ | environment(session.recipe, place)
        # A session of its own: Ctrl-C comes here, and `_stop` then ends verl in good order.
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=variables,
            start_new_session=True, pass_fds=lock,
        )  # fmt: skip
        try:
            while process.poll() is None:
                time.sleep(POLL)
                collector.poll()
        except OtherLossError as error:
            raise Stopped(str(error), resumable=False) from None
        except KeyboardInterrupt:
            _stop(process)
            collector.poll(last=True)  # what it did meanwhile belongs to its checkpoints
            raise
        finally:
            _stop(process)
    collector.poll(last=True)
    if process.returncode or collector.rollout < collector.plan.rollouts:
        kept = last_checkpoint(session)
        saved = f"; the checkpoint of step {kept.number * collector.plan.updates} is good" if kept.path else ""
        reason = explain(_tail(printed, begin))
        told = f"verl ended with exit code {process.returncode}: {reason}; its log is {printed}{saved}"
        raise Stopped(told, resumable=kept.path is not None)


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


def _save_model(session: Session, rollouts: int) -> None:
    """Merge the last checkpoint's shards to a model; a large one is left to be merged by hand."""
    folder, display = session.folder, session.display
    shards = folder.checkpoints / f"global_step_{rollouts}" / "actor"
    partial = folder.path / "model.partial"
    words = ["-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(shards), "--target_dir"]
    by_hand = " ".join(["python", *words, str(folder.model)])
    if sum(path.stat().st_size for path in shards.glob("model_*.pt")) > MERGED_UP_TO:
        display.note(f"the model is large; to merge its shards: {by_hand}")
        return
    display.progress("merging the model's shards", 0.0)
    done = subprocess.run(
        [sys.executable, *words, str(partial)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        shutil.rmtree(partial, ignore_errors=True)
        display.note(f"the shards could not be merged ({explain(done.stderr)}); try by hand: {by_hand}")
    else:
        shutil.rmtree(folder.model, ignore_errors=True)
        partial.replace(folder.model)
