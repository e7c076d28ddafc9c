"""Studies: what they ask, the runs they make however often they are killed, and what the seeds say."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats as scipy_stats

from bandpo._input import InputError
from bandpo.cli import main
from bandpo.lab.study import records
from bandpo.lab.study.analysis import analyse, values_of
from bandpo.lab.study.file import Study, parse, read_study
from bandpo.lab.study.folder import StudyFolder
from bandpo.lab.study.matrix import plan
from bandpo.lab.study.outcomes import OUTCOMES
from bandpo.lab.study.records import Records, RunRecord
from bandpo.lab.study.short import short_study
from bandpo.lab.study.whole import emit

RECIPE = {
    "task": "addition", "model": "bandpo/tiny-addition", "num_generations": 4, "per_device_train_batch_size": 8,
    "steps_per_generation": 4, "max_completion_length": 5, "max_steps": 40, "learning_rate": 1e-3, "loss_type": "dapo",
    "lr_scheduler_type": "constant", "save_steps": 8, "eval_prompts": 16, "eval_samples": 2, "eval_every": 20,
    "use_cpu": True, "threads": 1, "bf16": False, "activation_checkpointing": False,
}  # fmt: skip
STUDY = {
    "question": "Does <b>it</b> run?",
    "recipe": RECIPE,
    "arms": {"none": "none", "tight": {"clip": "fixed", "clip_args": {"eps_low": 0.02, "eps_high": 0.02}}},
    "seeds": "4-6",
    "settings": {"main": {}, "broken": {"arms": ["none"], "seeds": [4]}},
    "outcomes": ["auc_reward", "late_accuracy", "entropy", "gradient_kept"],
    "contrasts": [{"arm": "tight", "against": "none", "setting": "main"}],
    "margin": {"auc_reward": 0.2},
    "warmup": {"models": 2, "steps": 60},
}
REWARDS = """
def ones(completions, **columns):
    return [completion.count("1") / 4 for completion in completions]

def boom(completions, **columns):
    raise RuntimeError("the reward is broken")
"""


# ---------------------------------------------------------------- a study, killed and gone on with


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study of 2 arms x 3 seeds and a run that fails, killed in its second run, gone on with, and killed no more."""
    place = tmp_path_factory.mktemp("study")
    (place / "mine.py").write_text(REWARDS)
    settings = STUDY["settings"]
    rewards = {
        name: {"reward_funcs": [f"{place / 'mine.py'}:{f}"]} for name, f in (("main", "ones"), ("broken", "boom"))
    }
    study = {**STUDY, "settings": {name: keys | rewards[name] for name, keys in settings.items()}}
    (place / "s.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    command = [sys.executable, "-m", "bandpo", "study", str(place / "s.yaml"), "--out", str(place / "out"), "--json"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place)
    before = _events(first, until=lambda e: e["event"] == "run" and e["status"] == "done")
    _until_it_trains(place / "out" / "runs", but=before[-1]["name"])
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    stamp = {path: path.stat().st_mtime_ns for path in (place / "out" / "runs").glob("*/run.json")}
    second = subprocess.run(command, capture_output=True, text=True, cwd=place)
    after = [json.loads(line) for line in second.stdout.splitlines()]
    return {"place": place, "out": place / "out", "before": before, "after": after, "run": second, "stamp": stamp}


def _events(process, until):
    seen = []
    for line in process.stdout:
        seen.append(json.loads(line))
        if until(seen[-1]):
            return seen
    raise AssertionError(process.stderr.read())


def _until_it_trains(runs, but):
    end = time.monotonic() + 120
    while not any(path.stat().st_size for path in runs.glob("*/metrics.jsonl") if path.parent.name != but):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_study_goes_on_and_one_failed_run_stops_nothing(whole):
    made = {e["name"] for e in whole["before"] if e["event"] == "run" and e["status"] == "done"}
    again = {e["name"]: e for e in whole["after"] if e["event"] == "run"}
    assert len(made) == 1 and not made & set(again) and len(again) == 6
    assert [name for name, e in again.items() if e["status"] != "done"] == ["none-broken-4"]
    assert "the reward is broken" in again["none-broken-4"]["error"]
    assert whole["run"].returncode == 1 and "none-broken-4 did not end well" in whole["run"].stderr
    kept = whole["out"] / "runs" / made.pop() / "run.json"
    assert whole["stamp"][kept] == kept.stat().st_mtime_ns
    found = records.read(whole["out"])
    assert sorted(run.status for run in found.runs) == ["done"] * 6 + ["failed"]
    assert all(len(run.curves["reward"]) == 10 for run in found.runs if run.status == "done")


def test_arms_of_a_seed_start_from_one_model(whole):
    models = sorted(path.name for path in (whole["out"] / "warmup").iterdir() if path.is_dir())
    assert len(models) == 2 and models[0].endswith("-0") and models[1].endswith("-1")
    starts = {}
    for run in records.read(whole["out"]).runs:
        if run.status == "done":
            starts.setdefault(run.seed, set()).add(json.dumps(run.evals[0]))
    assert all(len(x) == 1 for x in starts.values()) and starts[4] != starts[5]


def test_a_run_is_what_bandpo_train_makes(whole, tmp_path):
    """The forked process of a study, killed or not, trains bit for bit as the command it stands for."""
    name = "tight-main-5"
    facts = json.loads((whole["out"] / "runs" / name / "run.json").read_text())
    recipe = whole["out"] / "recipes" / f"{name}.yaml"
    assert facts["command"] == f"bandpo train {recipe} --out {whole['out']}/runs/{name}"
    assert main(["train", str(recipe), "--out", str(tmp_path / name)]) == 0
    one, other = ((p / name / "metrics.jsonl").read_text() for p in (tmp_path, whole["out"] / "runs"))
    assert one.count("\n") == 11 and _without_time(one) == _without_time(other)
    # so a study takes what its emitted commands have made
    folder = StudyFolder(tmp_path / "elsewhere")
    run = next(run for run in plan(read_study(whole["place"] / "s.yaml"), folder.path) if run.name == name)
    assert not folder.ended_elsewhere(run)
    shutil.copytree(tmp_path / name, folder.runs / name)
    assert folder.ended_elsewhere(run)
    kept = next(r for r in records.read(whole["out"]).runs if r.key == (run.arm, run.setting, run.seed))
    assert folder.collect(run).model_copy(update={"seconds": kept.seconds}) == kept


def _without_time(text):
    return re.sub(r'"seconds": [0-9.]+, ', "", text)


def test_every_figure_comes_from_the_records_alone(whole, tmp_path, capsys):
    shutil.copy(whole["out"] / records.FILE, tmp_path)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    last = whole["after"][-1]
    assert last["event"] == "done" and {k: told[k] for k in ("settings", "contrasts")} == {
        k: last[k] for k in ("settings", "contrasts")
    }
    assert last["failed"].keys() == {"none-broken-4"}
    page = (tmp_path / "page.html").read_text()
    assert "Does &lt;b&gt;it&lt;/b&gt; run?" in page and "broken, none: 1 failed of 1 runs" in page
    assert page.index("Does &lt;b&gt;") < page.index("What it was run for") < page.index("Curves")


def test_the_figures_are_scipys(whole):
    raw = json.loads(gzip.decompress((whole["out"] / records.FILE).read_bytes()))
    rewards = {
        arm: [np.mean(run["curves"]["reward"]) for run in sorted(raw["runs"], key=lambda r: r["seed"])
              if (run["arm"], run["setting"]) == (arm, "main")]
        for arm in ("none", "tight")
    }  # fmt: skip
    contrast = whole["after"][-1]["contrasts"][0]
    d = np.subtract(rewards["tight"], rewards["none"])
    test = scipy_stats.ttest_rel(rewards["tight"], rewards["none"])
    interval = test.confidence_interval(0.95)
    assert contrast["n"] == 3 and contrast["mean"] == pytest.approx(d.mean(), abs=1e-9)
    assert [contrast["low"], contrast["high"]] == pytest.approx([interval.low, interval.high], abs=1e-9)
    assert contrast["p"] == contrast["holm"] == pytest.approx(test.pvalue, abs=1e-9)
    sides = [
        scipy_stats.ttest_1samp(d, -0.2, alternative="greater"),
        scipy_stats.ttest_1samp(d, 0.2, alternative="less"),
    ]
    assert contrast["equivalence"]["p"] == pytest.approx(max(x.pvalue for x in sides), abs=1e-9)
    arm = whole["after"][-1]["settings"]["main"]["arms"]["tight"]["outcomes"]["auc_reward"]
    reach = scipy_stats.t.ppf(0.975, 2) * scipy_stats.sem(rewards["tight"])
    assert arm["estimate"] == pytest.approx(np.mean(rewards["tight"]), abs=1e-9)
    assert arm["high"] - arm["estimate"] == pytest.approx(reach, abs=1e-9)
    assert arm["iqm"]["estimate"] == pytest.approx(scipy_stats.trim_mean(rewards["tight"], 0.25), abs=1e-9)


def test_what_is_asked_later_is_said_and_what_was_run_is_not_made_anew(whole, tmp_path, monkeypatch):
    """Another text is an amendment; another recipe for a run that is there is refused; foreign folders stay."""
    out = tmp_path / "out"
    shutil.copytree(whole["out"], out)
    (out / "runs" / "mine").mkdir()
    text = (whole["place"] / "s.yaml").read_text()
    words = ["study", str(tmp_path / "s.yaml"), "--out", str(out)]
    (tmp_path / "s.yaml").write_text(text.replace("0.02", "0.03"))
    with pytest.raises(InputError, match=r"run tight-main-\d would have clip_args=.*0.03.* but was made with .*0.02"):
        _emitted(words)
    (tmp_path / "s.yaml").write_text(text.replace("Does", "Did"))
    assert [line.split()[2].rpartition("/")[2] for line in _emitted(words)] == ["none-broken-4.yaml"]
    found = records.read(out)
    assert found.text == text and [x.after for x in found.amendments] == [7]
    assert StudyFolder(out).foreign(_plan(words)) == ["mine"] and (out / "runs" / "mine").is_dir()


def _plan(words):
    return plan(read_study(Path(words[1])), Path(words[3]))


def _emitted(words):
    study, folder = read_study(Path(words[1])), StudyFolder(Path(words[3]))
    return emit(study, folder, _plan(words), check=False)


def test_the_page_of_the_docs_says_what_is(whole, tmp_path, monkeypatch, capsys):
    """Its study can be planned, its keys and outcomes are all there are, and its lines of Python run."""
    text = (Path(__file__).parents[1] / "docs" / "study.md").read_text("utf-8")
    study = parse(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1], "stale")
    runs = plan(study, tmp_path)
    assert len(runs) == 2 * 5 + 4 * 10 and runs[0].recipe.max_steps == 1280
    rows = [set(re.findall(r"`(\w+)`", line.split("|")[1])) for line in text.splitlines() if line.startswith("| `")]
    assert set(Study.model_fields) | set(OUTCOMES) <= set().union(*rows)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "stale").symlink_to(whole["out"])
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    *lines, mean = capsys.readouterr().out.splitlines()
    assert len(lines) == 7 and float(mean) == whole["after"][-1]["contrasts"][0]["mean"]


# ---------------------------------------------------------------- the plan


def test_the_plan_pairs_arms_and_emits_one_command_a_run(tmp_path):
    study = {k: v for k, v in STUDY.items() if k != "warmup"} | {
        "settings": {"a": {"learning_rate": 1e-4, "seeds": [9]}, "b": {"task_args": {"train_size": 64}}},
        "arms": {"none": {"clip": "none"}, "band": {"clip": "band", "learning_rate": 0.5}},
        "contrasts": [],
    }  # fmt: skip
    study["recipe"] = {**RECIPE, "clip": "fixed", "clip_args": {"eps_low": 0.1}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    study, folder, words = read_study(tmp_path / "s.yaml"), StudyFolder(tmp_path / "out"), ["--max_steps", "8"]
    lines = emit(study, folder, plan(study, folder.path, words), words, check=False)
    names = [line.split("/runs/")[1].split()[0] for line in lines]
    assert names == [f"{arm}-{s}-{n}" for s, n in (("a", 9), ("b", 4)) for arm in ("none", "band")] + [
        f"{arm}-b-{n}" for n in (5, 6) for arm in ("none", "band")
    ]
    assert all(re.fullmatch(r"bandpo train \S+\.yaml --out \S+ --requeue", line) for line in lines)
    keys = {name: yaml.safe_load((tmp_path / "out" / "recipes" / f"{name}.yaml").read_text()) for name in names}
    band = keys["band-a-9"]  # its own learning rate wins over the setting's; the recipe's clip_args went with its clip
    assert band["learning_rate"] == 0.5 and "clip_args" not in band and band["seed"] == 9 and band["max_steps"] == 8
    assert keys["none-a-9"]["learning_rate"] == 1e-4 and keys["none-b-4"]["learning_rate"] == 1e-3
    assert keys["none-b-4"]["task_args"] == {"train_size": 64} and keys["none-b-4"]["logging_steps"] == 4
    assert len(plan(study, folder.path, seeds=1)) == 4


def test_the_short_form_is_a_study_of_some_clips(tmp_path):
    study = short_study("demo", [0, 1, 2], ["none", "fixed", "band"])
    runs = {run.name: run.recipe for run in plan(study, tmp_path)}
    assert len(runs) == 9 and study.reference_of("main") == "none"
    assert runs["band-main-2"].clip_args["delta"] == 0.05 and runs["fixed-main-1"].clip_args == {}
    assert list(short_study("demo", [0]).arms) == ["none", "fixed", "band"]
    with pytest.raises(InputError, match="names a clip twice"):
        short_study("demo", [0], ["none", "none"])


def test_clips_to_compare_belong_to_several_seeds(capsys):
    assert main(["train", "demo", "--compare", "none,fixed"]) == 2
    assert "--seeds 0 1 2" in capsys.readouterr().err
    for words, said in ((["3.5"], "--seeds 3.5"), (["0-1", "--clip", "fixed"], "--clip with --seeds")):
        assert main(["train", "demo", "--seeds", *words]) == 2
        assert said in capsys.readouterr().err


BASE = "recipe: demo\narms: {none: none, band: {clip: band}}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: {a: none}", "the key 'recipe' is missing"),
        (BASE + "seedz: [1]", r"unknown key 'seedz' \(did you mean 'seeds'\?\)"),
        ("recipe: demo\narms: {none: none, none: fixed}", "key 'none' twice"),
        ("recipe: demo\narms: {none: none, None: fixed}", "two arms of one name"),
        ("recipe: demo\narms: {a-b: none}", "must be letters"),
        ("recipe: demo\narms: {}", "at least one arm"),
        ("recipe: demo\narms: {a: {seed: 3}}", "sets seed, which the study sets"),
        ("recipe: demo\narms: {a: {clip: bnd}}", "arm a, setting main: .*did you mean 'band'"),
        ("recipe: [1]\narms: {a: none}", "recipe: must be a recipe's name"),
        ("recipe: dmo\narms: {a: none}", "did you mean 'demo'"),
        (BASE + "seeds: [1, 1]", "has seed 1 twice"),
        (BASE + "seeds: 5-1", "or a range, such as 100-119"),
        (BASE + "seeds: [-1]", "must be a whole number"),
        (BASE + "outcomes: [acuracy]", "did you mean 'accuracy'"),
        (BASE + "outcomes: [found]", "give found_above"),
        (BASE + "recipe_: 1", "unknown key"),
        (BASE + "margin: {accuracy: 0}", "must be a number, above 0"),
        (BASE + "level: 1", "must be a number"),
        (BASE + "reference: bnd", "did you mean 'band'"),
        (BASE + "contrasts: [[band, band]]", "compared with itself"),
        (BASE + "contrasts: [{arm: band, against: none, seting: main}]", "seting.*unknown key"),
        (BASE + "settings: {a: {arms: [none]}}\ncontrasts: [[band, none]]", "no setting has both"),
        (BASE + "warmup: {models: 0}", "must be a whole number, at least 1"),
        (BASE + "seeds: 0-9999", "more than"),
        (BASE + "settings: {a: {eval_every: 0}}\noutcomes: [late_accuracy]", "late_accuracy needs evaluations"),
        ("- 1", "must be a YAML mapping"),
    ],
)
def test_a_study_that_cannot_be_meant_is_one_line(text, said, tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(text)
    assert main(["study", str(tmp_path / "s.yaml"), "--out", str(tmp_path / "out"), "--emit"]) == 2
    told = capsys.readouterr().err
    assert re.search(said, told) and told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folders_that_are_no_study_are_refused(tmp_path, capsys):
    (tmp_path / "s.yaml").write_text(BASE)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    for words, said in (
        (["--out", str(tmp_path / "out")], "thesis.tex"),
        (["--out", str(tmp_path / "new"), "--resume"], "no study in"),
        (["--out", str(tmp_path / "new"), "--jobs", "0"], "--jobs 0"),
        (["--out", str(tmp_path / "new"), "--sede", "0", "--emit"], "unknown key (did you mean 'seed'?)"),
    ):
        assert main(["study", str(tmp_path / "s.yaml"), *words]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / records.FILE).write_bytes(b"\x1f\x8b garbage")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "p.html")]) == 2
    assert "cannot be read as records" in capsys.readouterr().err


# ---------------------------------------------------------------- what the seeds say


def _records(seeds=range(5), **arms):
    """Records of a made-up study: each arm's rewards by seed."""
    text = (
        "recipe: demo\narms: {" + ", ".join(f"{arm}: none" for arm in arms) + "}\nseeds: 0-4\noutcomes: [auc_reward]\n"
    )
    runs = [
        RunRecord(arm=arm, setting="main", seed=seed, status="done", curves={"reward": [x, x], "entropy": [1.0, 0.5]})
        for arm, values in arms.items()
        for seed, x in zip(seeds, values, strict=False)
    ]
    return Records(name="made", text=text, runs=runs)


def test_seeds_are_paired_by_number_and_p_values_adjusted_over_the_arms():
    a, b, c = [0.1, 0.2, 0.3, 0.4, 0.5], [0.2, 0.25, 0.45, 0.5, 0.55], [0.1, 0.3, 0.2, 0.5, 0.4]
    found = _records(a=a, b=b, c=c)
    found.runs.reverse()  # the order in which runs ended means nothing
    told = analyse(found)["settings"]["main"]["differences"]["auc_reward"]
    p = [scipy_stats.ttest_rel(x, a).pvalue for x in (b, c)]
    assert [told[arm]["p"] for arm in "bc"] == pytest.approx(p)
    assert [told[arm]["holm"] for arm in "bc"] == pytest.approx([2 * p[0], p[1]])  # p[0] is the smaller one
    wins = np.mean([[(x > y) + (x == y) / 2 for y in a] for x in b])
    assert told["b"]["improvement"]["estimate"] == pytest.approx(wins)


def test_a_run_that_stopped_is_counted_and_averaged_nowhere():
    found = _records(a=[0.1, 0.2, 0.3], b=[0.2, 0.4])
    found.put(RunRecord(arm="b", setting="main", seed=2, status="stopped", error="nan", curves={"reward": [9.0]}))
    told = analyse(found)["settings"]["main"]
    assert told["arms"]["b"]["stopped"] == 1 and told["arms"]["b"]["outcomes"]["auc_reward"][
        "estimate"
    ] == pytest.approx(0.3)
    assert told["differences"]["auc_reward"]["b"]["seeds"] == [0, 1]
    assert values_of(found, parse(found.text), "b", "main", "auc_reward") == {0: 0.2, 1: 0.4}


def test_one_seed_gives_no_interval_and_says_why(tmp_path):
    from bandpo.lab.report.study import as_text, write_report

    told = write_report(_records(seeds=[3], a=[0.1], b=[0.2]), tmp_path / "p.html")
    one = told["settings"]["main"]["differences"]["auc_reward"]["b"]
    assert one["mean"] == pytest.approx(0.1) and one["low"] is None and one["p"] is None
    assert "One seed only" in (tmp_path / "p.html").read_text() and "One seed only" in as_text(told)
    json.dumps(told, allow_nan=False)


def test_equal_records_are_equal_bytes_and_survive_a_torn_copy(tmp_path):
    found = _records(a=[0.1, 0.2], b=[0.2, 0.4])
    found.save(tmp_path)
    data = (tmp_path / records.FILE).read_bytes()
    records.read(tmp_path).save(tmp_path)
    assert (tmp_path / records.FILE).read_bytes() == data
    (tmp_path / records.FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read as records"):
        records.read(tmp_path)
