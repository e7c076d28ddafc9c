"""Try bandpo with other versions: each row of rows.toml in an environment of its own; writes docs/versions.md.

python tests/versions/run.py                   # every row whose Python is here: an hour or two, many downloads
python tests/versions/run.py trl-oldest ...    # these alone; the others keep what was seen before
python tests/versions/run.py --page            # write the page again and try nothing

The exit code is 1 where a row does worse than it did.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SPEC = tomllib.loads((Path(__file__).parent / "rows.toml").read_text("utf-8"))
SEEN, PAGE = ROOT / "docs/data/versions.json", ROOT / "docs/versions.md"
SHOWN = ("torch", "trl", "transformers", "verl", "torchrl", "ray", "tinker", "skyrl")
SECONDS = 3600  # for one group of tests; a busy machine is no failure
Row = dict[str, Any]


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower()


def requirements(extras: list[str], pins: list[str]) -> list[str]:
    """What the extras ask for beside the pins, with the extras that they name themselves."""
    found: list[str] = []
    for extra in extras:
        for requirement in PROJECT["optional-dependencies"][extra]:
            if match := re.fullmatch(r"bandpo\[(.+)\]", requirement):
                found += requirements(match[1].split(","), pins)
            elif name_of(requirement) not in map(name_of, pins):
                found.append(requirement)
    return list(dict.fromkeys(found))


def find_python(version: str) -> str | None:
    """An interpreter of that version that can make environments."""
    places = [sys.executable, f"python{version}", *map(str, Path.home().glob(f".pyenv/versions/{version}*/bin/python"))]
    ask = f"import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '{version}')"
    for place in places:
        try:
            if subprocess.run([place, "-c", ask], capture_output=True).returncode == 0:
                return place
        except OSError:
            continue
    return None


def make_environment(python: str, folder: Path, steps: list[list[str]]) -> Path:
    """Make an environment, by uv where it is there, and install step by step; a RuntimeError says what failed."""
    own = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    uv = shutil.which("uv")
    make = [uv, "venv", "--quiet", "--python", python] if uv else [python, "-m", "venv"]
    installer = [uv, "pip", "install", "--python", own] if uv else [own, "-m", "pip", "install"]
    subprocess.run([*make, folder], check=True)
    for words in steps:
        done = subprocess.run([*installer, "--quiet", *words], capture_output=True, text=True)
        if done.returncode:
            said = [line.strip(" \u2570\u2500\u25b6\u00d7") for line in done.stderr.splitlines()]
            raise RuntimeError(next((x for x in said if x.startswith(("ERROR", "Because"))), " ".join(said)[:300]))
    return own


def install(row: Row, python: str, folder: Path) -> Path:
    torch, *_ = row["pins"]  # first and alone: the installer then takes the build that this platform offers
    rest = [*row["pins"], *row.get("needs", []), *requirements(row["extras"], row["pins"]), "pytest>=8.3"]
    return make_environment(python, folder, [[torch], rest, ["--no-deps", "-e", str(ROOT)]])


def versions(python: Path) -> dict[str, str]:
    ask = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    found = json.loads(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout)
    return {name: found[name].partition("+")[0] for name in SHOWN if name in found}


def try_tests(python: Path, words: list[str], folder: Path) -> dict[str, Any]:
    """Run one group; warnings are no errors here, since each version has its own."""
    report, begin = folder / "report.xml", time.monotonic()
    report.unlink(missing_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    options = ["-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={report}"]
    try:
        done = subprocess.run(
            [python, "-m", "pytest", *options, *words], cwd=ROOT, env=env, capture_output=True, text=True,
            timeout=SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"passed": 0, "failed": 1, "skipped": 0, "seconds": SECONDS, "first": f"more than {SECONDS} s"}
    seconds = round(time.monotonic() - begin)
    if not report.exists():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        return {"passed": 0, "failed": 1, "skipped": 0, "seconds": seconds, "first": "".join(last)[:300]}
    return read_report(report, seconds)


def read_report(report: Path, seconds: int) -> dict[str, Any]:
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [found for case in cases for found in (case.find("failure"), case.find("error")) if found is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(bad) - skipped,
        "failed": len(bad),
        "skipped": skipped,
        "seconds": seconds,
        "first": reason(bad[0]) if bad else "",
    }


def reason(failure: ElementTree.Element) -> str:
    """The first line of the error: of a module that cannot be imported, what stopped it."""
    lines = [line[2:].strip() for line in (failure.text or "").splitlines() if line.startswith("E  ")]
    return (lines or [failure.get("message") or "no reason given"])[0].replace("|", "/")[:300]


def attempt(row: Row) -> dict[str, Any] | None:
    """Try one row; None where its Python is not here."""
    python = find_python(row["python"])
    if python is None:
        print(f"{row['name']}: no Python {row['python']} here", flush=True)
        return None
    seen: dict[str, Any] = {"name": row["name"], "date": datetime.date.today().isoformat(), "pins": row["pins"]}
    with tempfile.TemporaryDirectory(prefix="bandpo-versions-") as folder:
        try:
            own, wrong = install(row, python, Path(folder) / "env"), ""
        except RuntimeError as error:
            own, wrong = Path(), str(error)
        seen |= {"python": row["python"], "refused": row.get("refused", ""), "install": wrong}
        seen["packages"] = {} if wrong else versions(own)
        groups = {} if wrong else {name: SPEC["tests"][name] for name in row["tests"]}
        seen["tests"] = {name: try_tests(own, words, Path(folder)) for name, words in groups.items()}
    print(f"{row['name']}: {verdict(seen)}", flush=True)
    return seen


def works(group: dict[str, Any]) -> bool:
    return bool(group["passed"] and not group["failed"])


def verdict(seen: dict[str, Any]) -> str:
    """One cell: `works`, `refused` as it should be, or the first thing that fails."""
    if seen["install"]:
        return f"**cannot be installed**: {seen['install']}"
    if all(works(group) for group in seen["tests"].values()):
        return "works"
    firsts = {name: group["first"] or "no test ran" for name, group in seen["tests"].items() if not works(group)}
    if seen["refused"] and all(seen["refused"] in first for first in firsts.values()):
        return f"refused, as it should be: `{seen['refused']}`"
    return "**fails**: " + "; ".join(f"{name}: `{first}`" for name, first in firsts.items())


def works_as_meant(seen: dict[str, Any]) -> bool:
    return not verdict(seen).startswith("**")


HEAD = """# Versions that were tried

Each row is one environment: made empty, filled with these versions, tried and removed. The tests are those of the loss
and its gradient and of the place where the clip goes into each engine; warnings are no errors here. `make versions`
tries all rows again, `python tests/versions/run.py NAME` one of them, and both write this page.

| row | date | Python | torch | with | tests | result |
|---|---|---|---|---|---|---|
"""
TAIL = """
Besides, `make test` and `make test-verl` run on the versions that the Makefile names. No bound in `pyproject.toml`
shuts out a version that worked, and a newer one is not shut out: each adapter looks at its engine's source as it is set
up, and refuses an engine whose clip has moved. The exception is verl, since `bandpo verl` writes the keys of one minor.
`bandpo doctor` says which of the versions installed are older or newer than those.
"""


def as_page(records: list[dict[str, Any]]) -> str:
    lines = []
    for seen in records:
        packages = {**{name_of(pin): pin.partition("==")[2] for pin in seen["pins"]}, **seen["packages"]}
        others = ", ".join(f"{name} {packages[name]}" for name in SHOWN[1:] if name in packages)
        tests = ", ".join(
            f"{name} {group['passed']}" + (f" of {group['passed'] + group['failed']}" if group["failed"] else "")
            for name, group in seen["tests"].items()
        )
        cells = (seen["name"], seen["date"], seen["python"], packages["torch"], others, tests or "none", verdict(seen))
        lines.append("| " + " | ".join(cells) + " |\n")
    return HEAD + "".join(lines) + TAIL


def read() -> dict[str, dict[str, Any]]:
    """What was seen so far, by row."""
    return {seen["name"]: seen for seen in json.loads(SEEN.read_text("utf-8"))} if SEEN.exists() else {}


def main(words: list[str]) -> int:
    rows = {row["name"]: row for row in SPEC["row"]}
    unknown = [word for word in words if word not in rows and word != "--page"]
    if unknown:
        print(f"{unknown[0]!r}: must be one of {', '.join(rows)}", file=sys.stderr)
        return 2
    worse = False
    for name in [] if "--page" in words else words or rows:
        seen = attempt(rows[name])
        before, records = read(), read() | ({name: seen} if seen else {})
        worse |= name in before and works_as_meant(before[name]) and not works_as_meant(records[name])
        ordered = [records[known] for known in rows if known in records]
        SEEN.write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
    PAGE.write_text(as_page(list(read().values())), "utf-8")
    return int(worse)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
