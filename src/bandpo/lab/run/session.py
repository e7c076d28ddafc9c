"""One run, whichever engine trains it: opened or gone on with, its facts kept, its end shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from bandpo._input import InputError
from bandpo.lab.reading import RecipeFile
from bandpo.lab.recipe import Recipe, check_clip, load, shown
from bandpo.lab.run import origin
from bandpo.lab.run.display import Display
from bandpo.lab.run.folder import RunFolder
from bandpo.lab.run.records import Eval, Score, Step


class Stopped(RuntimeError):  # noqa: N818 - what it says is the reason, which need not be an error
    """The run stopped early, for a reason of one line; `resumable` says whether there is a checkpoint to go on from."""

    def __init__(self, reason: str, *, resumable: bool = True) -> None:
        super().__init__(reason)
        self.resumable = resumable


@dataclass(frozen=True)
class Session:
    """One training in one folder.

    Args:
        recipe: the checked recipe.
        folder: where it goes; owned by this process.
        display: where to show it.
        engine: "trl" or "verl".
        command: the command to repeat the run.
        words: the command line's keys, those of earlier parts of the run included.
        extended: whether it goes on to more steps than it was started for.
        compare: whether arms are trained that it is compared with.
        warmup: whether it makes its own warm-up checkpoint.
        arm: the arm's name; empty for the run itself.
    """

    recipe: Recipe
    folder: RunFolder
    display: Display
    engine: str
    command: str
    words: Sequence[str] = ()
    extended: bool = False
    compare: bool = False
    warmup: bool = False
    arm: str = ""

    @property
    def fingerprint(self) -> str:
        """What tells its checkpoints from those of another run."""
        return self.recipe.fingerprint(f"{self.engine} {'warmup' if self.warmup else ''}".strip())

    def for_arm(self, arm: str, recipe: Recipe) -> Session:
        """The session of a training that this one is compared with."""
        return replace(self, recipe=recipe, folder=RunFolder(self.folder.arms / arm), arm=arm)

    def is_done(self) -> bool:
        """Whether nothing is left to train; said, and what changed since the run was started is said too."""
        facts, note = self.folder.facts, self.display.note
        if facts.status == "done" and not self.extended:
            note(f"{self.folder.path}: the run is done already; only the report is made again")
            return True
        changed = origin.changes(facts.versions, origin.versions())
        gpu = {name: facts.machine[name] for name in ("gpu",) if name in facts.machine}
        for line in changed + origin.changes(gpu, origin.machine()):
            note(line)
        return False

    def begin(self, *, seed: int, workers: int | None = None) -> None:
        """Write the recipe and what is known from the start; the evaluation before training is kept."""
        facts, recipe = self.folder.facts, self.recipe
        if self.extended and facts.after and (last := self.last_step()):
            self.folder.add(Eval(step=last.step, **facts.after.model_dump()))
        self.folder.create(
            recipe.dump(), command=self.command, engine=self.engine, workers=workers, recipe=recipe.name,
            overrides=list(self.words), compare=self.compare, warmup=self.warmup, versions=origin.versions(),
            seed=seed, machine=origin.machine(), commit=origin.commit(), clip=recipe.clip, clip_args=recipe.clip_args,
            task=recipe.task, model=recipe.model, before=facts.before, after=None, status="running", error=None,
            trained=None if self.extended else facts.trained,
        )  # fmt: skip

    def last_step(self) -> Step | None:
        """The last optimiser step that is recorded."""
        return max((r for r in self.folder.records() if isinstance(r, Step)), key=lambda r: r.step, default=None)

    @contextmanager
    def status_kept(self) -> Iterator[None]:
        """Leave in run.json how the run ended, when it does not end well."""
        try:
            yield
        except BaseException as error:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.folder.update(status=status, error=" ".join(str(error).split()) or type(error).__name__)
            raise

    # ------------------------------------------------------------ while it trains

    @property
    def _arm(self) -> dict[str, str]:
        return {"arm": self.arm} if self.arm else {}

    def started(self, *, steps: int, rollouts: int, from_step: int) -> None:
        """Show what starts."""
        named = self.recipe.model_dump(include={"task", "model", "clip", "clip_args"})
        length = {"steps": steps, "rollouts": rollouts, "from_step": from_step, "out": str(self.folder.path)}
        self.display.emit({"event": "start", **self._arm, **named, **length})

    def stepped(self, record: Step, *, steps: int, rollouts: int, left: float) -> None:
        """Record a step and show it, with how much there is in all and how many seconds are left."""
        self.folder.add(record)
        whole = {"steps": steps, "rollouts": rollouts, "left": round(left, 1)}
        self.display.emit({**record.as_dict(), **self._arm, **whole})

    def evaluated(self, step: int, score: Score, *, when: str) -> None:
        """Record an evaluation and show it; `when` is "before", "during" or "after"."""
        record = Eval(step=step, **score.model_dump(exclude_none=True))
        if when == "during":
            self.folder.add(record)
        else:
            self.folder.update(**{when: score})
        self.display.emit({**record.as_dict(), **self._arm})

    def finish(self) -> dict[str, Any]:
        """Write the report, show the closing table, and return the "done" event."""
        from bandpo.lab.report.page import write_report

        folders = [self.folder, *(RunFolder(path.parent) for path in sorted(self.folder.arms.glob("*/run.json")))]
        self.display.progress("writing the report", 0.0)
        write_report([folder.path for folder in folders], self.folder.report)
        rows = [
            {**f.facts.model_dump(include={"clip", "before", "after", "error"}), "clipped": _clipped(f)}
            for f in folders
        ]
        self.display.emit({"event": "summary", "runs": rows, "report": str(self.folder.report)})
        scores = {when: rows[0][when] or {} for when in ("before", "after")}
        done = {
            "event": "done",
            **{f"{key}_{when}": scores[when].get(key) for key in ("accuracy", "entropy") for when in scores},
            "clipped": rows[0]["clipped"],
            "out": str(self.folder.path),
            "report": str(self.folder.report),
        }
        self.display.emit(done)
        return done


def open_session(
    file: RecipeFile,
    words: Sequence[str],
    folder: RunFolder,
    display: Display,
    *,
    engine: str,
    command: Callable[[Sequence[str]], str],
    resume: bool,
    start: bool = True,
    compare: bool = False,
    warmup: bool = False,
) -> Session:
    """Open a run, or the one that is there to go on with; nothing is written.

    Args:
        file: the recipe as it stands in its file.
        words: the command line's keys; those that the run was started with hold as well.
        folder: the run's folder.
        display: where to show it.
        engine: "trl" or "verl".
        command: gives the command to repeat a run of these keys.
        resume: whether to go on with the run that is there.
        start: whether a run is started where there is none.
        compare: whether to train arms that it is compared with.
        warmup: whether to make the warm-up checkpoint first.

    Returns:
        The session.

    Raises:
        InputError: the recipe or the folder cannot be used, or the recipe is not the run's.
    """
    there, out = folder.has_run(), folder.path
    if resume and not there and (folder.occupied() or not start):
        raise InputError(
            f"out={out}: there is no run to go on with; name its folder with --out, or start one without --resume"
        )
    if not resume and folder.occupied():
        raise InputError(
            f"out={out}: holds a run already; continue it with --resume, or name another folder with --out"
        )
    if not there:
        recipe = load(file, words, backend=engine)
        check_clip(recipe)
        return Session(recipe, folder, display, engine, command(words), words, compare=compare, warmup=warmup)
    facts, stored = folder.facts, folder.stored_recipe()
    known = [*facts.overrides, *words]
    if facts.recipe is None and stored is not None:  # run.json is lost, and with it the words of the command line
        file, known = RecipeFile(file.name, stored), list(words)
    recipe = load(file, known, backend=engine)
    extended = stored is not None and _check_same(
        recipe, load(RecipeFile(f"{out}/recipe.yaml", stored), backend=engine), out
    )
    if facts.engine not in (None, engine):
        raise InputError(f"out={out}: its run was trained by {facts.engine}; go on with that, or name another folder")
    if warmup and facts.recipe and not facts.warmup:
        raise InputError(f"--warmup: the run in {out} was started without it; leave it out, or name another folder")
    for line in folder.said:
        display.note(line)
    if extended or facts.recipe is None:
        repeat, words = command(known), known
    else:
        repeat, words = facts.command or command(known), facts.overrides
    return Session(
        recipe, folder, display, engine, repeat, words, extended=extended, compare=compare or facts.compare,
        warmup=warmup or facts.warmup,
    )  # fmt: skip


def _check_same(recipe: Recipe, before: Recipe, out: Any) -> bool:
    """Check that a recipe is the one that a run was started with; returns whether it asks for more steps."""
    old, new = before.values, recipe.values
    differ = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if differ == ["max_steps"] and (old.get("max_steps") or 0) < (new.get("max_steps") or 0):
        return True
    if differ:
        key = next((key for key in differ if key != "max_steps"), differ[0])
        more = "; of a run that goes on only max_steps may grow" if key == "max_steps" else ""
        raise InputError(
            f"--resume: {key}={shown(new.get(key))}, but the run in {out} was started with "
            f"{key}={shown(old.get(key))}; set it back, or start another run with --out{more}"
        )
    return False


def _clipped(folder: RunFolder) -> float | None:
    """Mean share of tokens without a gradient over all updates; None for a loss that keeps every gradient."""
    shares = [r.clipped for r in folder.records() if isinstance(r, Step) and r.clipped is not None]
    return sum(shares) / len(shares) if shares else None
