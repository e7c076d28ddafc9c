"""docs/evidence.md says what the records say, and its headline figures are computed a second time."""

from __future__ import annotations

import gzip
import json
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/evidence.md").read_text("utf-8")
FILL = runpy.run_path(str(ROOT / "docs/fill_evidence.py"))
STUDIES = FILL["studies"]()


def raw(name: str) -> dict[str, Any]:
    """A study's records, without our reader."""
    with gzip.open(ROOT / "studies/results" / name / "records.json.gz") as file:
        found: dict[str, Any] = json.load(file)
    return found


def test_the_tables_are_those_of_the_records() -> None:
    assert FILL["filled"](PAGE) == PAGE, "python docs/fill_evidence.py writes them"
    assert json.loads((ROOT / "docs/data/measured.json").read_text("utf-8")) == FILL["measured"](), "likewise"


@pytest.mark.parametrize("name", STUDIES)
def test_the_runs_are_those_that_were_written_down(name: str) -> None:
    found = raw(name)
    later = found.get("amendments", [])
    assert all(one["after"] == 0 for one in later), "its file was changed after a run had ended"
    study = yaml.safe_load(later[-1]["text"] if later else found["text"])
    assert study == yaml.safe_load((ROOT / "studies" / f"{name}.yaml").read_text("utf-8"))
    first, last = map(int, study["seeds"].split("-"))
    ran = {(run["arm"], run["seed"]) for run in found["runs"]}
    assert ran == {(arm, seed) for arm in study["arms"] for seed in range(first, last + 1)}


def outcome(run: dict[str, Any], name: str) -> float:
    """The primary outcomes of the page, computed from a run's curves and evaluations."""
    scores = [one["accuracy"] for one in run["evals"] if one["step"]]  # the evaluation before training left out
    if name in ("accuracy", "late_accuracy"):
        return float(np.mean(scores[-1 if name == "accuracy" else -3 :]))
    curve = {"auc_reward": "reward", "last_entropy": "entropy"}[name]
    values = run["curves"][curve]
    return float(np.mean(values[-10:] if name == "last_entropy" else values))


@pytest.mark.parametrize("name", [x for x in STUDIES if yaml.safe_load(raw(x)["text"]).get("contrasts")])
def test_contrasts_are_paired_t_tests(name: str) -> None:
    found = raw(name)
    study = yaml.safe_load(found["text"])
    primary = study["outcomes"][0]
    by = {(run["arm"], run["seed"]): outcome(run, primary) for run in found["runs"]}
    seeds = sorted({seed for _, seed in by})
    block = PAGE.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
    for one in study["contrasts"]:
        arm, against = one.values() if isinstance(one, dict) else one
        x = np.array([by[arm, s] - by[against, s] for s in seeds])
        low, high = stats.t.interval(study.get("level", 0.95), len(x) - 1, x.mean(), stats.sem(x))
        row = re.search(rf"^\| `{arm}` − `{against}` \|.*\| (\S+) \[(\S+), (\S+)\] \|.*$", block, flags=re.MULTILINE)
        assert row, (arm, against)
        assert [float(g) for g in row.groups()] == pytest.approx([x.mean(), low, high], abs=6e-5)
