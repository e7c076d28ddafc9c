"""Wheel and sdist from a clean clone, with each extra in an empty environment: what is documented for it runs.

    python tests/versions/packages.py              # all of them: half an hour, every extra's packages
    python tests/versions/packages.py core trl     # these alone

Each command runs in an empty folder, away from the repository. What it must print is given beside it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from run import ROOT, make_environment

TORCH = os.environ.get("TORCH", "torch==2.13.0")  # first and alone, as in the Makefile


@dataclass(frozen=True)
class Try:
    """A documented command: the extra that it needs, the page it stands on, and a word of what it prints."""

    extra: str
    command: str
    page: str
    prints: str


TRIES = {
    "core": Try("", "bandpo match --eps 0.2", "docs/cli.md", "chi2"),
    "study": Try("study", "bandpo explain example", "README.md", "What the clip does"),
    "trl": Try("trl", "bandpo train demo", "README.md", "report.html"),
    "verl": Try("verl", "bandpo verl verl-demo --print", "docs/cli.md", "verl.trainer.main_ppo"),
    "torchrl": Try("torchrl", "<!-- run: torchrl -->", "docs/engines.md", "clipped "),
    "ray": Try("ray", "<!-- run: ray -->", "docs/engines.md", ""),
    "tinker": Try("tinker", "bandpo doctor", "docs/engines.md", "engine tinker"),
}


def documented(one: Try) -> str:
    """The command, or the block of Python behind the marker; an error where the page has it no more."""
    text = (ROOT / one.page).read_text("utf-8")
    if one.command not in text:
        raise LookupError(f"{one.page} has no {one.command!r} any more")
    if not one.command.startswith("<!--"):
        return one.command
    block = re.search(re.escape(one.command) + r"\n```python\n(.*?)^```$", text, re.M | re.S)
    assert block is not None, one.page
    return block[1]


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel and the source archive of what is committed."""
    subprocess.run(["git", "clone", "--quiet", ROOT, folder / "clone"], check=True)
    own = make_environment(sys.executable, folder / "build", [["build>=1.2"]])
    subprocess.run([own, "-m", "build", "--outdir", folder / "dist", folder / "clone"], check=True, capture_output=True)
    (wheel,), (archive,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    return wheel, archive


def attempt(one: Try, package: Path, folder: Path) -> str:
    """What the command said, with an error where it fails or says something else."""
    name = f"{package}[{one.extra}]" if one.extra else str(package)
    own = make_environment(sys.executable, folder / "env", [[TORCH], [TORCH, name]])
    away = folder / "away"
    away.mkdir()
    text = documented(one)
    (away / "block.py").write_text(text, "utf-8")
    words = ["python", "block.py"] if text != one.command else text.split()
    env = os.environ | {"PATH": f"{own.parent}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(words, cwd=away, env=env, capture_output=True, text=True)
    if done.returncode or one.prints not in done.stdout:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
    return done.stdout


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in TRIES]
    if unknown:
        print(f"{unknown[0]!r}: must be one of {', '.join(TRIES)}", file=sys.stderr)
        return 2
    failed = 0
    with tempfile.TemporaryDirectory(prefix="bandpo-packages-") as place:
        wheel, archive = build(Path(place))
        print(f"built {wheel.name} and {archive.name}", flush=True)
        for name in names or [*TRIES, "sdist"]:
            one, folder, begin = TRIES.get(name, TRIES["core"]), Path(place) / name, time.monotonic()
            folder.mkdir()
            try:
                attempt(one, archive if name == "sdist" else wheel, folder)
                said = "works"
            except (RuntimeError, LookupError) as error:
                failed, said = failed + 1, f"FAILS: {error}"
            print(f"{name}: {one.command}: {said}, {time.monotonic() - begin:.0f} s", flush=True)
            shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
