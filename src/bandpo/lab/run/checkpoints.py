"""Which checkpoint a run goes on from: the newest that is whole and its own.

A checkpoint is sealed once it is complete: a file in it holds a `Seal`.
"""

from __future__ import annotations

import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel

from bandpo._input import InputError
from bandpo.lab.run.records import put_aside, write_whole

SEAL = "bandpo.json"
Sums = dict[str, tuple[int, int]]
"""Size and checksum of every file of a folder, by its name; a checksum of 0 is not looked at."""


class Seal(BaseModel):
    """Whose a checkpoint is: the run's fingerprint, the step or rollout, and what its files are."""

    run: str
    number: int
    files: Sums


@dataclass
class Found:
    """What there is to go on from.

    Attributes:
        path: the checkpoint; None for the start.
        number: its step, or its rollout.
        unusable: newer ones that cannot be used, and why.
        torn: folders that a kill left incomplete.
    """

    path: Path | None = None
    number: int = 0
    unusable: dict[Path, str] = field(default_factory=dict)
    torn: list[Path] = field(default_factory=list)

    def check(self, where: Path) -> None:
        """Raise InputError where there are checkpoints and none can be used: to start over is a person's decision."""
        if self.unusable and self.path is None:
            listed = "; ".join(f"{path.name}: {why}" for path, why in self.unusable.items())
            raise InputError(
                f"--resume: no checkpoint in {where} can be used ({listed}); mend them, or start anew with another "
                "--out"
            )

    def clear(self, say: Callable[[str], None]) -> None:
        """Take what cannot be used out of the way, and say so."""
        for path, why in self.unusable.items():
            instead = self.path.name if self.path else "the start"
            say(f"{path.name} cannot be used, {why}: going on from {instead}; it is now {put_aside(path).name}")
        for path in self.torn:
            shutil.rmtree(path, ignore_errors=True)


def sums(folder: Path, *, checksum: bool = True) -> Sums:
    """Return size and checksum of every file below a folder but its seal."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SEAL)
    return {str(p.relative_to(folder)): (p.stat().st_size, _checksum(p) if checksum else 0) for p in files}


def seal(folder: Path, run: str, number: int, *, checksum: bool = True) -> None:
    """Write the seal of a complete checkpoint of a run; without checksums the sizes of large files have to do."""
    made = Seal(run=run, number=number, files=sums(folder, checksum=checksum))
    write_whole(folder / SEAL, made.model_dump_json(indent=1))


def find(
    folder: Path, prefix: str, run: str, *, before: int | None, complete: Callable[[Path], bool], sealed: bool
) -> Found:
    """Find the newest checkpoint that is whole and belongs to a run; newer ones are looked at, older ones are not.

    Args:
        folder: where checkpoints lie, as ``prefix`` and a number.
        prefix: what their names begin with.
        run: the run's fingerprint.
        before: only checkpoints before this number; None for all.
        complete: whether a folder without a seal looks like a checkpoint at all; else a kill tore it.
        sealed: whether one without a seal is refused; else it is taken as it is.
    """
    found, numbered = Found(), {}
    for path in folder.glob(f"{prefix}*"):
        if (match := re.fullmatch(re.escape(prefix) + r"(\d{1,9})", path.name)) and path.is_dir():
            numbered[int(match[1])] = path
    for number, path in sorted(numbered.items(), reverse=True):
        if before is not None and number >= before:
            continue
        if not (path / SEAL).exists() and not complete(path):
            found.torn.append(path)
        elif why := _fault(path, run, number, sealed):
            found.unusable[path] = why
        else:
            found.path, found.number = path, number
            break
    return found


def changed(folder: Path, files: Sums) -> str | None:
    """Return what is wrong with a folder's files, against what `sums` said of them; None where nothing is."""
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or (checksum and _checksum(path) != checksum):
            return f"{name} is damaged"
    return None


def _fault(path: Path, run: str, number: int, sealed: bool) -> str | None:
    try:
        said = Seal.model_validate_json((path / SEAL).read_bytes())
    except FileNotFoundError:
        return f"it has no {SEAL}, so it is not this run's or not complete" if sealed else None
    except (OSError, ValueError):  # a ValidationError is a ValueError
        return f"its {SEAL} is damaged"
    if said.run != run:
        return "it belongs to another run"
    if said.number != number or not said.files:
        return f"its {SEAL} is that of another checkpoint"
    return changed(path, said.files)


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            found = zlib.crc32(part, found)
    return found
