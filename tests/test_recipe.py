"""Recipes: what can be written, and that all that cannot is one line with a way out, before any model is loaded."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bandpo import InputError, cli
from bandpo.lab.reading import RecipeFile, read_recipe, recipe_names
from bandpo.lab.recipe import Recipe, load
from bandpo.lab.run import checkpoints
from bandpo.lab.run.folder import RunFolder, check_space
from bandpo.lab.run.records import Step
from bandpo.lab.trl.config import rollout_steps, to_lora, to_trl

LEAST = "task: addition\nmodel: bandpo/tiny-addition\nuse_cpu: true\nper_device_train_batch_size: 8\nsave_steps: 1\n"


def load_recipe(name: str, words: Sequence[str] = ()) -> Recipe:
    """A recipe with everything checked that can be checked without a model."""
    recipe = load(name, words)
    to_trl(recipe, "there")
    to_lora(recipe)
    recipe.make_task()
    return recipe


def write(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_a_recipe_is_read_with_trls_types_and_the_command_line_wins(tmp_path: Path) -> None:
    text = "eval_strategy: no\nshuffle_dataset: false\nlearning_rate: 1e-4\nclip: band\n"
    recipe = write(tmp_path, LEAST + text + "clip_args: {delta: 0.1, divergence: tv}\n")
    values = load_recipe(recipe).values
    assert values["learning_rate"] == 1e-4 and values["clip_args"] == {"delta": 0.1, "divergence": "tv"}
    assert values["eval_strategy"] == "no" and to_trl(load(recipe), "there").eval_strategy == "no"
    words = "--learning-rate=2e-4 --clip_args.delta 3e-2 --task_args.digits=2 --log_completions --loss_type bnpo"
    values = load_recipe(recipe, words.split()).values
    assert values["learning_rate"] == 2e-4 and values["clip_args"] == {"delta": 0.03, "divergence": "tv"}
    assert values["task_args"] == {"digits": 2} and values["log_completions"] is True
    config = to_trl(load(recipe, words.split()), "there")
    assert config.log_completions is True and config.shuffle_dataset is False
    assert config.learning_rate == 2e-4 and config.loss_type == "bnpo" and config.clip_args["delta"] == 0.03


def test_another_clip_or_task_on_the_command_line_drops_the_old_ones_arguments() -> None:
    values = load_recipe("demo", ["--clip", "fixed"]).values
    assert "clip_args" not in values
    values = load_recipe("demo", ["--clip", "fixed", "--clip_args", "{eps_high: 0.28}"]).values
    assert values["clip_args"] == {"eps_high": 0.28}
    assert load_recipe("demo", ["--clip", "band"]).values["clip_args"] == load_recipe("demo").values["clip_args"]


@pytest.mark.parametrize("name", recipe_names())
def test_the_recipes_that_ship_are_good_and_their_resolved_form_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert load_recipe(write(tmp_path, recipe.dump())).values == recipe.values
    # Every ratio would be 1, and no clip could act, if a rollout fed a single update.
    assert rollout_steps(to_trl(recipe, "there")) > 1
    if name == "demo":  # it must not need a GPU, a network, or half precision
        assert recipe.values["use_cpu"] is True and recipe.values["bf16"] is False


Schedule = namedtuple("Schedule", "steps_per_generation num_iterations gradient_accumulation_steps")


@given(st.builds(Schedule, *[st.integers(1, 12)] * 3))
def test_checkpoints_are_exact_only_where_the_next_micro_batch_makes_a_rollout(schedule: Schedule) -> None:
    every = rollout_steps(schedule)
    life = schedule.steps_per_generation * schedule.num_iterations  # micro-batches, counted as TRL does
    for step in range(1, 40):
        generates = (step * schedule.gradient_accumulation_steps) % life == 0
        assert (step % every == 0) == generates


BAD_WORDS = {
    "--learning_rat 1": "--learning_rat: unknown key (did you mean 'learning_rate'?)",
    "--resum": "--resum: unknown key (did you mean 'resume'?)",
    "--learning_rate abc": "--learning_rate='abc': must be a number, above 0",
    "--learning_rate": "--learning_rate: needs a value",
    "--max_steps=1.5": "--max_steps=1.5: must be a whole number",
    "--lr_scheduler_type cosin": "(did you mean 'cosine'?)",
    "--learning_rate.x 1": "learning_rate takes one value, not a mapping",
    "--clip bnd": "(did you mean 'band'?)",
    "--clip_args.dela 0.1": "(did you mean 'delta'?)",
    "--clip_args.delta 0": "delta",
    "--clip_args.delta nan": "delta",
    "--clip_args.divergence kll": "(did you mean 'kl'?)",
    "--clip_args.delta": "needs a value",
    "--clip_args 0.1": "must be a mapping",
    "--task additoin": "(did you mean 'addition'?)",
    "--task_args.digit 3": "(did you mean 'digits'?)",
    "--loss_type sapo": "loss_type='sapo'",
    "--num_generations 7": "must be divisible by num_generations (7)",
    "--save_steps 100": "set save_steps to 96 or 112",
    "--save_steps 3": "set save_steps to 16",
    "--save_steps 0.5": "whole number",
    "--logging_steps 7": "set save_steps to 112 or 224",
    "--save_total_limit 1": "at least 2",
    "--staleness -1": "--staleness=-1: must be a whole number, at least 0",
    "--staleness 1.5": "--staleness=1.5: must be a whole number, at least 0",
    "--staleness 1 --steps_per_generation 1": "TRL keeps no old log-probabilities",
    "--save_only_model": "could not be resumed",
    "--eval_strategy steps": "eval_every",
    "--eval_prompts 0": "eval_prompts=0",
    "--output_dir x": "--out",
    "--smoke.max_steps 3": "--smoke cannot be set here: its sizes stand in the recipe",
    "--resume_from_checkpoint x": "--resume",
    "--deepspeed x.json": "BandGRPOTrainer",
    "stray": "'stray' belongs to no key",
}


@pytest.mark.parametrize("words", BAD_WORDS)
def test_a_bad_key_on_the_command_line_is_one_line_that_says_what_is_allowed(words: str) -> None:
    with pytest.raises(InputError) as error:
        load_recipe("demo", words.split())
    assert BAD_WORDS[words] in str(error.value) and "\n" not in str(error.value)


BAD_FILES = {
    "": "must be a YAML mapping",
    "- task": "must be a YAML mapping",
    "task: [addition": "line 1, column 16",
    "task: \0": "not valid YAML",
    LEAST + "task: addition": "key 'task' twice",
    LEAST + "max_step: 3": "max_step: unknown key (did you mean 'max_steps'?)",
    LEAST + "3: 3": "3: unknown key",
    LEAST + "learning_rate: fast": "learning_rate='fast': must be a number",
    LEAST + "learning_rate: {a: 1}": "learning_rate={'a': 1}: must be a number",
    LEAST + "learning_rate: null": "learning_rate=None: must be a number",
    LEAST + "clip_args: 0.05": "must be a mapping",
    LEAST + "max_completion_length: null": "max_completion_length=None: must be a whole number",
    LEAST.replace("task", "# task"): "the key 'task' is missing",
    LEAST.replace("model", "# model"): "the key 'model' is missing",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_recipe_file_is_one_line_that_says_where(text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        load_recipe(write(tmp_path, text))
    assert BAD_FILES[text] in str(error.value) and "mine" in str(error.value)
    assert "\n" not in str(error.value)


def test_trls_own_keys_may_stand_at_the_top_or_under_trl(tmp_path: Path) -> None:
    for text in ("min_p: 0.1\n", "trl: {min_p: 0.1}\n"):
        recipe = load_recipe(write(tmp_path, LEAST + text), ["--trl.repetition_penalty", "1.1"])
        config = to_trl(recipe, "there")
        assert (config.min_p, config.repetition_penalty) == (0.1, 1.1)
    both = load(RecipeFile("both", {"task": "addition", "model": "x", "trl": {"min_p": 0.1}}), ["--trl.min_p=0.2"])
    assert to_trl(both, "there").min_p == 0.2


def test_the_fingerprint_is_that_of_what_trains_and_not_of_how_long() -> None:
    first = load("demo").fingerprint("trl")
    assert load("demo", ["--max_steps", "64"]).fingerprint("trl") == first
    for words in (["--seed", "1"], ["--clip", "none"], ["--clip_args.delta", "0.06"], ["--min_p", "0.1"]):
        assert load("demo", words).fingerprint("trl") != first
    assert load("demo").fingerprint("trl warmup") != first


def test_a_recipe_that_is_not_there_names_the_nearest_one(tmp_path: Path) -> None:
    for name in ("dmeo", str(tmp_path / "demos.yaml")):
        with pytest.raises(InputError, match=r"did you mean 'demo'\?"):
            read_recipe(name)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError, match="cannot be read as text"):
        read_recipe(str(tmp_path / "bytes.yaml"))


def test_the_folder_must_be_writable_and_the_disk_large_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(tmp_path / "new" / "run").claimed():
        assert (tmp_path / "new" / "run").is_dir()
    assert not (tmp_path / "new").exists()  # where nothing is written, nothing is left
    (tmp_path / "file").touch()
    for place in ("file", "file/run", "/proc/bandpo/run", "x" * 300, "a\0b"):
        with pytest.raises(InputError, match="cannot be written"), RunFolder(tmp_path / place).claimed():
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    usage = namedtuple("usage", "total used free")(100, 95, 5_000_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    check_space(tmp_path / "new", 5_000_000)
    with pytest.raises(InputError, match="needs 6 MB of disk and 5 MB are free"):
        check_space(tmp_path / "new", 6_000_000)


def test_bad_input_exits_2_with_one_line_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bandpo.lab.trl.run.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "project" / "model").mkdir(parents=True)  # not a run of ours: neither to be written over nor resumed
    RunFolder(tmp_path / "old").create("task: addition", status="done")
    for line in (
        "demo --learning_rat 1",
        "dmeo",
        "demo --out old",
        "demo --out project",
        "demo --out project --resume",
        "demo --out project --requeue",
        "demo --out new/run --resume",
        "demo --resume",
        "demo --task x",
        "--resume",
        "demo --out old/run.json",
        "demo --out new/run --clip bnd",
    ):
        assert cli.main(["train", *line.split()]) == 2
        out, err = capsys.readouterr()
        assert len(err.splitlines()) == 1 and "Traceback" not in out + err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "project"]
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["model"]


def test_help_and_the_first_checks_wait_for_no_framework() -> None:
    code = (
        "import sys, bandpo.cli, bandpo.lab.reading as r, bandpo.lab.run.folder\n"
        "assert r.read_recipe('demo').keys['task'] == 'addition'\n"
        "assert bandpo.cli.main(['train', 'dmeo']) == 2\n"
        "assert not {'trl', 'transformers', 'datasets', 'accelerate'} & set(sys.modules)\n"
        "bandpo.cli.main(['train', '--help'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "bandpo train demo --learning_rate" in done.stdout


def test_records_and_tokens_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    import numpy as np

    folder = RunFolder(tmp_path / "run")
    folder.create(yaml.safe_dump({"task": "addition"}), status="running")
    for step in range(1, 41):
        folder.add(Step(step=step))
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "st')  # cut short by a kill
    arrays = {name: np.arange(40.0) for name in ("logps", "old_logps", "advantages")}
    folder.write_tokens({**arrays, "step": np.arange(1, 41)})
    for step, whole in ((16, True), (32, True), (48, False)):
        checkpoint = folder.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text(str(step))
        if whole:
            checkpoints.seal(checkpoint, "run", step)

    def find(before: int | None = None) -> checkpoints.Found:
        return checkpoints.find(
            folder.checkpoints, "checkpoint-", "run", before=before, complete=lambda path: False, sealed=True
        )

    found = find()
    assert (found.path, found.number) == (folder.checkpoints / "checkpoint-32", 32)
    assert find(before=32).number == 16 and find(before=16).path is None
    said: list[str] = []
    found.clear(said.append)
    folder.rewind(32, said.append)
    assert [record.step for record in folder.records()] == list(range(1, 33)) and said == []
    assert folder.tokens()["logps"].tolist() == list(range(32))
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["checkpoint-16", "checkpoint-32"]


def test_without_out_each_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    from bandpo.cli._run import default_out

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    assert default_out("demo", resume=True) == default_out("demo", resume=False) == Path("runs/demo")
    for name in ("demo", "demo-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    assert default_out("demo", resume=False) == Path("runs/demo-3")
    assert default_out("demo", resume=True) == Path("runs/demo-2")
