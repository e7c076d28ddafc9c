"""What a recipe rewards: the task's score, TRL's functions, one's own, weighted; the same to TRL and to verl."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bandpo import InputError, cli
from bandpo.lab.recipe import load
from bandpo.lab.rewards import one_reward
from bandpo.lab.verl.reward import compute_score

MINE = """
def short(completions, **columns):
    return [-float(len(text)) for text in completions]

async def sometimes(completions, answer, **columns):
    return [None if text == gold else 2.0 for text, gold in zip(completions, answer)]

def few(completions, **columns):
    return [1.0]

NUMBER = 3
"""
PROMPT = {"answer": ["0601", "0601"], "question": ["217+384", "217+384"]}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


def test_rewards_are_summed_with_their_weights(mine: Path) -> None:
    names = f"task,{mine}:short,{mine}:sometimes"
    recipe = load("demo", ["--reward_funcs", names, "--reward_weights", "1,0.5,0.25"])
    total = one_reward(*recipe.make_rewards(recipe.make_task()))
    assert total(completions=["0601", "x"], **PROMPT) == [1 - 2 + 0, 0 - 0.5 + 0.5]
    alone = load("demo").make_rewards(load("demo").make_task())
    assert alone[1] == [1.0] and one_reward(*alone)(completions=["0601", "x"], **PROMPT) == [1.0, 0.0]


def test_verl_is_rewarded_alike_and_evaluated_by_the_task(mine: Path) -> None:
    found = compute_score(
        "addition", "0601", "0601", {"question": "217+384"}, task="addition", task_args="{}",
        rewards=json.dumps([["task", f"{mine}:short"], [1, 0.5]]),
    )  # fmt: skip
    assert (found["score"], found["acc"]) == (1 - 2, 1.0)
    assert compute_score("addition", "0601", "0601", {}, task="addition", task_args="{}")["score"] == 1.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--reward_funcs tsk", "(did you mean 'task'?)"),
        ("--reward_funcs {mine}:shrt", "(did you mean 'short'?)"),
        ("--reward_funcs {mine}:NUMBER", "must be a function"),
        ("--reward_funcs nowhere.py:f", "cannot be imported"),
        ("--reward_weights 1,2", "must be 1 finite numbers"),
        ("--reward_funcs task,task --reward_weights 1", "must be 2 finite numbers"),
        ("--reward_weights 1,x", "reward_weights='1,x': must be a number, finite"),
        ("--reward_weights nan", "must be a number, finite"),
    ],
)
def test_what_is_no_reward_is_one_line_before_a_model_is_loaded(
    words: str,
    said: str,
    mine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("bandpo.lab.trl.run.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    out = tmp_path / "run"
    assert cli.main(["train", "demo", *words.format(mine=mine).split(), "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert said in error and not out.exists()


def test_what_one_function_cannot_do_is_said(mine: Path) -> None:
    with pytest.raises(InputError, match="is a reward model"):
        one_reward(["org/judge"], [1.0])
    recipe = load("demo", ["--reward_funcs", f"{mine}:few"])
    with pytest.raises(InputError, match="few gives 1 rewards for 2 completions"):
        one_reward(*recipe.make_rewards(recipe.make_task()))(completions=["a", "b"], **PROMPT)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_demo_trains_on_a_strangers_reward(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--reward_funcs",
        f"task,{mine}:short",
        "--reward_weights",
        "1,0.5",
        "--max_steps",
        "32",
        "--eval_every",
        "0",
    ]
    more = ["--eval_prompts", "8", "--save_steps", "32", "--json", "--out", str(tmp_path / "run")]
    assert cli.main(["train", "demo", *words, *more]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = steps[0]
    assert first["reward"] == pytest.approx(first["rewards/reward/mean"] + 0.5 * first["rewards/short/mean"], abs=1e-6)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["after"]["accuracy"] <= 1
