"""A study's folder: what lies where, what it holds already, and whether that is this study's."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bandpo._input import InputError
from bandpo.lab.reading import read_yaml
from bandpo.lab.recipe import shown
from bandpo.lab.run import origin
from bandpo.lab.run.folder import RunFolder
from bandpo.lab.run.records import write_whole
from bandpo.lab.study import records
from bandpo.lab.study.file import Study
from bandpo.lab.study.matrix import Planned
from bandpo.lab.study.records import FILE, Amendment, Records, RunRecord

OURS = ("study.yaml", FILE, "recipes", "runs", "warmup", ".lock", "report.html")


class StudyFolder(RunFolder):
    """The layout of a study's output folder.

    Args:
        path: the folder; it need not exist yet.

    Attributes:
        runs: the runs' folders.
        recipes: the runs' recipes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.runs, self.recipes = path / "runs", path / "recipes"

    def has_run(self) -> bool:
        """Whether a study has been started here."""
        return (self.path / "study.yaml").exists() or (self.path / FILE).exists()

    def check(self) -> None:
        """Raise InputError where the folder holds something else."""
        there = sorted(x.name for x in self.path.iterdir()) if self.path.is_dir() else []
        if other := [name for name in there if name not in OURS and not name.startswith(".records")]:
            if not self.has_run():
                raise InputError(f"out={self.path}: holds {shown(other[0])}, so it is no study's; name an empty folder")

    def foreign(self, runs: Sequence[Planned]) -> list[str]:
        """Folders below runs/ that are none of these runs."""
        names = {run.name for run in runs}
        return (
            sorted(x.name for x in self.runs.iterdir() if x.is_dir() and x.name not in names)
            if self.runs.is_dir()
            else []
        )

    def open(self, study: Study, runs: Sequence[Planned], words: Sequence[str]) -> Records:
        """Return the records that are there, or new ones, with the study's file and all recipes written.

        Args:
            study: the study.
            runs: its runs.
            words: keys of the command line.

        Returns:
            The records.

        Raises:
            InputError: the folder holds runs made with other recipes.
        """
        found = records.read(self.path)
        if found is None:
            found = Records(name=study.name, text=study.text, words=list(words))
        self._check_same(found, runs)
        if study.text != found.newest:
            found.amendments.append(Amendment(text=study.text, after=len(found.runs)))
        if list(words) != found.words and not found.runs:
            found.words = list(words)
        found.origin = found.origin or {
            "versions": origin.versions(),
            "commit": origin.commit(),
            "machine": origin.machine(),
        }
        for run in runs:
            left = {
                k: v
                for k, v in run.recipe.values.items()
                if k not in ("seed", "model") or (k == "model" and not run.warm)
            }
            found.recipes.setdefault(f"{run.arm}-{run.setting}", left)
        for folder in (self.runs, self.recipes, self.path / "warmup"):
            folder.mkdir(parents=True, exist_ok=True)
        for run in runs:
            self._write_recipe(run)
        write_whole(self.path / "study.yaml", study.text)
        found.save(self.path)
        return found

    def _write_recipe(self, run: Planned) -> None:
        text = run.recipe.dump()
        path = self.recipe_of(run)
        if not path.exists() or path.read_text("utf-8") != text:
            write_whole(path, text)

    def _check_same(self, found: Records, runs: Sequence[Planned]) -> None:
        planned = {(run.arm, run.setting, run.seed): run for run in runs}
        for done in found.runs:
            run = planned.get(done.key)
            if run is None or done.fingerprint == run.fingerprint:
                continue
            old, new = found.recipes.get(f"{run.arm}-{run.setting}", {}), run.recipe.values
            differ = [k for k in {**old, **new} if old.get(k) != new.get(k) and k not in ("seed", "model")]
            key = f"{differ[0]}={shown(new.get(differ[0]))}" if differ else "another warm-up"
            was = f"{differ[0]}={shown(old.get(differ[0]))}" if differ else "another one"
            raise InputError(
                f"out={self.path}: run {run.name} would have {key}, but was made with {was}; set it back, name the arm "
                "or setting anew, or name another folder with --out"
            )

    def recipe_of(self, run: Planned) -> Path:
        """The file of a run's recipe."""
        return self.recipes / f"{run.name}.yaml"

    def command(self, run: Planned) -> str:
        """The command to make a run."""
        words = ["bandpo", "train", str(self.recipe_of(run)), "--out", str(self.runs / run.name)]
        return shlex.join(words)

    def collect(self, run: Planned, status: str = "done", error: str | None = None) -> RunRecord:
        """Return what a run that has ended left, and drop what nobody needs any more.

        Args:
            run: the run.
            status: how it ended, by its process.
            error: why.

        Returns:
            Its record.
        """
        found = records.from_folder(self.runs / run.name, run.arm, run.setting, run.seed, run.fingerprint)
        if status != "done":
            found = found.model_copy(update={"status": status, "error": error})
        return found

    def tidy(self, run: Planned, keep_model: bool) -> None:
        """Drop a finished run's checkpoints, and its model unless it is kept."""
        shutil.rmtree(self.runs / run.name / "checkpoints", ignore_errors=True)
        if not keep_model:
            shutil.rmtree(self.runs / run.name / "model", ignore_errors=True)

    def ended_elsewhere(self, run: Planned) -> bool:
        """Whether a run has been made here by its command, and by this recipe."""
        folder = RunFolder(self.runs / run.name)
        if not folder.has_run() or folder.facts.status != "done":
            return False
        stored = folder.stored_recipe() or {}
        return _plain(stored) == _plain(read_yaml(run.recipe.dump(), run.name))

    def progress_of(self, run: Planned) -> int:
        """How many rollouts a running run has recorded."""
        path = self.runs / run.name / "metrics.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - 20_000))
                lines = file.read().split(b"\n")[:-1]
        except OSError:
            return 0
        for line in reversed(lines):
            if b'"event": "step"' in line and (place := line.find(b'"rollout": ')) >= 0:
                return int(line[place + 11 :].split(b",")[0])
        return 0


def _plain(keys: dict[str, Any]) -> str:
    return yaml.safe_dump({k: v for k, v in keys.items() if k != "model"}, sort_keys=True)
