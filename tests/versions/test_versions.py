"""What the package says of versions is what the table carries; the forge runs what the Makefile runs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import packages
import pytest
import run
import yaml

from bandpo import doctor
from bandpo.engines import _hosts

ROOT = Path(__file__).parents[2]
SEEN = run.read()
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TRIED = {**_hosts.TRIED, **{host.package: host.tried for host in _hosts.HOSTS.values() if host.tried}}


def number(version: str) -> tuple[int, ...]:
    return _hosts._numbers(version)


def seen_versions(package: str, worked: bool) -> set[str]:
    """The versions of the rows that worked, or did not; a row with several engines is judged engine by engine."""
    found = set()
    for seen in SEEN.values():
        version = {run.name_of(pin): pin.partition("==")[2] for pin in seen["pins"]}.get(package)
        version = seen["packages"].get(package, version)
        group = seen["tests"].get(package)
        good = run.works(group) if group else run.verdict(seen) == "works"
        if version and good == worked:
            found.add(version)
    return found


def suite_versions(package: str) -> set[str]:
    """The versions that `make test` and `make test-verl` themselves run on."""
    here = _hosts.installed_version(package)
    pinned = re.findall(rf"^VERL \?=.*\b{package}==(\S+)", MAKEFILE, re.M)
    return {*pinned, *([here.partition("+")[0]] if here else [])}


def test_the_page_is_what_was_seen_and_every_row_is_dated() -> None:
    page = ROOT / "docs/versions.md"  # there is none before the first row
    assert (page.read_text("utf-8") if page.exists() else "") == (run.as_page(list(SEEN.values())) if SEEN else "")
    rows = {row["name"]: row for row in run.SPEC["row"]}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", seen["date"]) for seen in SEEN.values())
    for name, seen in SEEN.items():
        assert seen["pins"] == rows[name]["pins"] and seen["python"] == rows[name]["python"], f"{name}: try it again"


@pytest.mark.parametrize("package", TRIED)
def test_the_versions_tried_are_rows_that_worked(package: str) -> None:
    oldest, newest = TRIED[package]
    good, bad = seen_versions(package, True) | suite_versions(package), seen_versions(package, False)
    assert {oldest, newest} <= good
    assert min(map(number, good)) == number(oldest) and max(map(number, good)) == number(newest)
    if package not in _hosts.TRIED:  # under torch or transformers a row may fail for another package's sake
        assert not [v for v in bad - good if number(oldest) <= number(v) <= number(newest)]


@pytest.mark.parametrize("package", [package for package in TRIED if package != "torch"])
def test_no_lower_bound_shuts_out_what_worked(package: str) -> None:
    extras = run.PROJECT["optional-dependencies"]
    (bound,) = {lower(r) for extra in extras.values() for r in extra if run.name_of(r) == package}
    assert bound <= number(TRIED[package][0])
    if package not in _hosts.TRIED:
        assert not [v for v in seen_versions(package, False) - seen_versions(package, True) if number(v) >= bound]


def lower(requirement: str) -> tuple[int, ...]:
    return number(requirement.partition(">=")[2])


def test_python_and_torch_are_those_of_the_rows() -> None:
    said = [c.rpartition(" ")[2] for c in run.PROJECT["classifiers"] if "Python :: 3." in c]
    assert (said[0], said[-1]) == _hosts.TRIED_PYTHON and run.PROJECT["requires-python"] == f">={said[0]}"
    assert {seen["python"] for seen in SEEN.values() if run.verdict(seen) == "works"} <= set(said)
    matrix = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text("utf-8"))["jobs"]["test"]["strategy"]
    assert matrix["matrix"]["python"] == said
    (torch,) = run.PROJECT["dependencies"]
    assert lower(torch) <= number(_hosts.TRIED["torch"][0])


def group(**fields: Any) -> dict[str, Any]:
    return {"passed": 3, "failed": 0, "skipped": 0, "seconds": 1, "first": ""} | fields


def record(**fields: Any) -> dict[str, Any]:
    seen = {"name": "x", "date": "2026-11-26", "python": "3.11", "pins": ["torch==2.13.0"], "packages": {}}
    return seen | {"refused": "", "install": "", "tests": {"core": group()}} | fields


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "works"),
        ({"tests": {"trl": group(failed=1, first="E")}}, "**fails**: trl: `E`"),
        ({"tests": {"trl": group(passed=0, skipped=3)}}, "**fails**: trl: `no test ran`"),
        ({"install": "no such version", "tests": {}}, "**cannot be installed**: no such version"),
        ({"refused": "too old", "tests": {"trl": group(failed=1, first="is too old")}}, "refused, as it should be"),
        ({"refused": "too old", "tests": {"trl": group(failed=1, first="another")}}, "**fails**: trl: `another`"),
    ],
)
def test_a_failure_is_shown_as_one(fields: dict[str, Any], said: str) -> None:
    assert run.verdict(record(**fields)).startswith(said)
    assert run.works_as_meant(record(**fields)) == ("**" not in said)


def test_an_extra_asks_for_its_packages_beside_the_pins() -> None:
    asked = run.requirements(["train"], ["torch==2.6", "trl==1.10.0", "ray[rllib]==2.60.0"])
    names = [run.name_of(requirement) for requirement in asked]
    assert {"transformers", "scipy"} <= set(names) and "trl" not in names and "bandpo" not in names


def test_a_version_outside_those_tried_is_said_and_fits_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for found, word in {"1.9.2": "older", "1.10": None, "1.16.0.post1": None, "1.17.0.dev0": "newer"}.items():
        line = _hosts.untried("trl", found, ("1.10.0", "1.16.0"))
        assert line == (f"trl {found} is {word} than those tried (1.10.0 to 1.16.0)" if word else None)
    assert _hosts.untried("Python", "3.13.9", ("3.11", "3.13")) is None
    monkeypatch.setattr(doctor, "HOSTS", {})
    monkeypatch.setattr(doctor, "TRIED", {"torch": ("99.0", "99.1")})
    text = doctor.as_text(doctor.examine())
    assert re.search(r"^note: torch \S+ is older than those tried \(99.0 to 99.1\)$", text, re.M)


@pytest.mark.parametrize("name", packages.TRIES)
def test_what_is_tried_of_an_extra_is_documented(name: str) -> None:
    one = packages.TRIES[name]
    assert packages.documented(one) and one.extra in {"", *run.PROJECT["optional-dependencies"]}


def test_the_forge_runs_the_makefile_and_pre_commit_what_make_check_runs() -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.M))
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text("utf-8"))["jobs"].values():
            for words in (step["run"].split() for step in job["steps"] if "run" in step):
                assert words[0] == "test" or (words[0] == "make" and set(words[1:]) <= targets), (path, words)
    block = re.search(r"^check:.*\n((?:\t.*\n)+)", MAKEFILE, re.M)
    assert block is not None
    lines = [line.strip().replace("$(BIN)", ".venv/bin").replace("$(VENV)", ".venv") for line in block[1].splitlines()]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]
    assert [re.sub(r" (\.|\.github/\S+)$", "", line) for line in lines] == [hook["entry"] for hook in hooks]


def test_the_changelog_has_the_version_with_its_date() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    version = re.search(r'^__version__ = "(.+)"$', (ROOT / "src/bandpo/__init__.py").read_text("utf-8"), re.M)
    assert version is not None
    sections = re.findall(r"^## (.+)$", text, re.M)
    assert sections[0] == "Unreleased" and re.fullmatch(rf"{re.escape(version[1])} - \d{{4}}-\d\d-\d\d", sections[1])
    assert tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dynamic"] == ["version"]


def test_the_lock_file_is_of_these_requirements_and_of_the_public_index() -> None:
    text = (ROOT / "uv.lock").read_text("utf-8")
    assert set(re.findall(r"https?://([^/\"]+)", text)) == {"pypi.org", "files.pythonhosted.org"}
    (locked,) = (entry for entry in tomllib.loads(text)["package"] if entry["name"] == "bandpo")
    have, want = set(), set()
    for entry in locked["metadata"]["requires-dist"]:
        extra = re.search(r"extra == '(\w+)'", entry.get("marker", ""))
        have |= {(extra and extra[1], entry["name"], part) for part in entry.get("specifier", "").split(",")}
    for extra in [None, *run.PROJECT["optional-dependencies"]]:
        for asked in run.requirements([extra], []) if extra else run.PROJECT["dependencies"]:
            bounds = re.sub(r"^[\w.-]+(\[.*\])?", "", asked.partition(";")[0].strip())
            want |= {(extra, run.name_of(asked), part) for part in bounds.split(",")}
    assert {(extra, name.lower(), part) for extra, name, part in have} == want, "make lock"
