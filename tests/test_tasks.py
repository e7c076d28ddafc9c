"""Tasks: every right answer passes its own grader, junk does not, held-out problems never turn up in training."""

import itertools
import json
import re
from random import Random

import pytest

from bandpo._input import InputError
from bandpo.lab.grading import grade
from bandpo.lab.tasks import check_task, get_task, list_tasks
from bandpo.lab.tasks.small import arithmetic

GYM = [f"reasoning-gym:{name}" for name in ("basic_arithmetic", "letter_counting", "spell_backward", "leg_counting")]
SEVEN = "State the final answer to the following arithmetic problem: 4 + 3 ="


@pytest.mark.parametrize("name", ["addition", "chain_sum", *GYM])
def test_every_task_checks_itself(name):
    task = get_task(name, train_size=300)
    train, held_out = task.train_dataset(seed=1), task.eval_dataset(16)
    assert len(train) == 300 and len(held_out) == len(set(held_out["question"])) == 16
    assert not set(train["question"]) & set(held_out["question"])
    assert train["prompt"] == task.train_dataset(seed=1)["prompt"] != task.train_dataset(seed=2)["prompt"]
    assert held_out["prompt"] == get_task(name).eval_dataset(16)["prompt"]
    for row in [*held_out, *train.select(range(16))]:
        assert task.correct(row["answer"], row["answer"], row["question"])
        for junk in ("", "banana", row["answer"] + "5", "<answer></answer>"):
            assert not task.correct(junk, row["answer"], row["question"])


def test_a_gym_task_with_many_right_answers_takes_them_all():
    task = get_task("reasoning-gym:countdown", train_size=4, min_numbers=2, max_numbers=2, min_target=1)
    for row in task.train_dataset(seed=0):
        assert task.correct(f"( {row['answer']} )", row["answer"], row["question"])
        assert not task.correct("1 + 1", row["answer"], row["question"])


def test_addition_is_right_and_splits_mirror_images_together():
    task = get_task("addition", digits=1, train_size=2000)
    train, held_out = task.train_dataset(seed=0), task.eval_dataset(3)
    pairs = [{frozenset(q.strip("=").split("+")) for q in data["question"]} for data in (train, held_out)]
    assert not pairs[0] & pairs[1]
    assert len(pairs[0]) > 40  # nearly all of the 55 unordered pairs but the held-out ones
    assert all(int(row["answer"]) == sum(map(int, row["question"].strip("=").split("+"))) for row in train)
    assert {len(answer) for answer in train["answer"]} == {2}


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("7", True),
        ("The answer is 7.", True),
        ("4 + 3 = **7**", True),
        ("$\\boxed{7}$", True),
        ("7.0", True),
        ("First 4, then <answer>7</answer> for sure, not 8", True),
        ("<answer>8</answer> 7", False),
        ("4 + 3", False),  # the question said again is no answer
        (SEVEN, False),
        ("17", False),
        ("-7", False),
        ("7 or 8", False),
        ("9^9^9^9", False),
    ],
)
def test_chain_sum_reads_the_last_number(completion, right):
    assert get_task("chain_sum").correct(completion, "7", SEVEN) is right


def test_reward_takes_text_and_chat_messages_as_trl_hands_them_over():
    task = get_task("chain_sum")
    chats = [[{"role": "assistant", "content": text}] for text in ("It is 7", "8")]
    assert task.reward(chats, answer=["7", "7"], question=[SEVEN] * 2, prompts=[[], []], trainer_state=None) == [
        1.0,
        0.0,
    ]
    assert get_task("addition").reward(["0007", "7"], answer=["0007", "0007"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "task_args", "said"),
    [
        ("adition", {}, "task='adition'.*'addition'"),
        ("addition", {"digit": 3}, "'digit'.*'digits'"),
        ("addition", {"digits": 0}, "digits.*0.*1 to 6"),
        ("addition", {"train_size": 0}, "train_size"),
        ("chain_sum", {"min_term": 2}, "'min_term'.*'min_terms'"),
        ("chain_sum", {"min_terms": 3}, "max_terms must be >= min_terms"),
        ("reasoning-gym:chain_summ", {}, "'chain_summ'.*'chain_sum'"),
        ("reasoning-gym:chain_sum", {"min_term": 2}, "'min_term'.*'min_terms'"),
        ("reasoning-gym:chain_sum", {"seed": 2}, "seed"),
        ("reasoning-gym:chain_sum", {"train_siz": 2}, "'train_siz'.*'train_size'"),
        ("reasoning-gym:chain_sum", {"dataset": "x"}, "no argument 'dataset'"),
    ],
)
def test_bad_task_settings_are_named(name, task_args, said):
    with pytest.raises(InputError, match=said) as error:
        get_task(name, **task_args)
    assert "\n" not in str(error.value)


def test_more_held_out_problems_than_there_are():
    with pytest.raises(InputError, match="eval prompts: got 500"):
        get_task("chain_sum").eval_dataset(500)
    with pytest.raises(InputError, match="eval prompts: got 99"):
        get_task("addition", digits=1).eval_dataset(99)


SMALL = [
    ("addition", {}),
    ("countdown", {"numbers": 3}),
    ("countdown", {"numbers": 4}),
    ("exploration", {}),
    ("reverse_text", {}),
]


@pytest.mark.parametrize(("name", "task_args"), SMALL)
def test_small_tasks_check_themselves_and_demonstrate_what_they_say(name, task_args):
    task = get_task(name, train_size=200, **task_args)
    check_task(task)
    rng, scores = Random(0), []
    for _ in range(600):
        question, answer = task.demonstration(rng)
        assert len(question) == task.prompt_length and len(answer) <= task.answer_length
        assert set(question + answer) <= set(task.alphabet)
        scores.append(task.score(answer, {"question": question, "answer": ""}) if name != "addition" else 0)
    if name in ("countdown", "exploration"):  # graded by value, not by text
        assert sum(score > 0 for score in scores) / 600 == pytest.approx(task.correct_share, abs=0.06)


def test_arithmetic_is_pythons_on_digits_and_nothing_else():
    for a, b, c in itertools.product("09", "3", "27"):
        for one, two in itertools.product("+-*", repeat=2):
            text = f"{a}{one}{b}{two}{c}"
            assert arithmetic(text) == eval(text), text
    for text in (
        "",
        "12",
        "1+",
        "+1",
        "1**2",
        "1/2",
        "(1)",
        "1 + 2",
        "1+2\n",
        "\u0661+1",
        "1+" * 50 + "1",
        "9**9**9**9",
    ):
        assert arithmetic(text) is None, text


@pytest.mark.parametrize(
    ("question", "completion", "score"),
    [
        ("357|22=", "3*5+7", 1),
        ("357|22=", "7+5*3", 1),
        ("357|22=", "3*5+7=22", 0),
        ("357|22=", "3+5+7", 0),  # another value
        ("357|22=", "9+6+7", 0),  # other digits
        ("357|22=", "5*3+7+0", 0),
        ("3571|22=", "3*5+7", 0),  # one digit is left
        ("22=", "9+6+7", 0.3),
        ("22=", "4*5+2", 1),
        ("22=", "2*9+4*1", 1),
        ("22=", "4*5+3", 0),
        ("22=", "22", 0),
    ],
)
def test_countdown_and_exploration_take_every_right_answer(question, completion, score):
    task = get_task("countdown", numbers=len(question) - 4) if "|" in question else get_task("exploration")
    assert task.reward([completion], [""], question=[question]) == [score]


def rows(file, *problems):
    file.write_text("".join(json.dumps(row) + "\n" for row in problems))
    return str(file)


def test_jsonl_reads_the_forms_that_data_sets_have(tmp_path):
    gsm8k = [
        {"question": f"{n} + 1?", "answer": f"It is <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1:,}"}
        for n in range(995, 1010)
    ]
    task = get_task("jsonl", train=rows(tmp_path / "gsm8k.jsonl", *gsm8k), grader="number")
    check_task(task)
    test = task.eval_dataset(task.eval_size)
    assert 0 < task.eval_size < 8 and not set(test["question"]) & set(task.train_dataset(0)["question"])
    row = dict(test[0])
    right = int(row["answer"].replace(",", ""))
    assert task.reward([f"So {right}.", f"${right:,}.00", f"{right} + 1", f"{right + 1}"], [row["answer"]] * 4) == [
        1,
        1,
        0,
        0,
    ]

    problems = rows(
        tmp_path / "math.jsonl",
        {"problem": "Half?", "answer": "\\frac{1}{2}", "difficulty": 2.0},
        {"problem": "All?", "answer": 142.0},
    )
    task = get_task(
        "jsonl",
        test=problems,
        train=rows(tmp_path / "t.jsonl", {"problem": "Half?", "answer": "1"}, {"problem": "Z?", "answer": 1}),
    )
    check_task(task)  # "Half?" is held out, and so not trained on
    assert task.train_dataset(0)["question"] == ["Z?"] and task.eval_dataset(2)["answer"] == ["\\frac{1}{2}", "142"]
    prompt = task.eval_dataset(1)["prompt"][0]
    assert prompt == [{"role": "user", "content": "Half?\nPut the final answer in \\boxed{}."}]
    texts = [
        "so \\boxed{0.5}",
        "It is $\\frac{2}{4}$.",
        "\\boxed{1} no, \\boxed{\\frac12}",
        "\\boxed{2}",
        "\\boxed{9^{9^{9^9}}}",
        "",
    ]
    task.time_limit = 1.0
    assert task.reward(texts, ["\\frac{1}{2}"] * 6) == [1, 1, 1, 0, 0, 0] and task.failures.total() <= 1

    (tmp_path / "a.csv").write_text("q,a\n1+1,2\n")
    (tmp_path / "a.json").write_text('[{"q": "1+1", "a": "2"}]')
    for name in ("a.csv", "a.json"):
        task = get_task("jsonl", test=str(tmp_path / name), prompt="q", answer="a", grader="exact", chat=False)
        assert dict(task.eval_dataset(1)[0]) == {"prompt": "1+1", "question": "1+1", "answer": "2"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a", "anser": "b"}', "line 1: has no field 'answer' (did you mean 'anser'?)"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "", "answer": "b"}', "line 2: the prompt is ''"),
        ('{"prompt": "a", "answer": null}', "the answer is None"),
        ('{"prompt": "a", "answer": "####"}', "the answer is '####'"),
        ("[1]", "must be an object"),
        ('{"prompt": "a"', "line 1 is no JSON"),
        ("[" * 100000, "line 1 is no JSON"),
        ("", "holds no row"),
        ("\xff", "cannot be read"),
    ],
)
def test_a_file_that_is_no_task_is_named_with_its_line(text, said, tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=re.escape(said)) as error:
        get_task("jsonl", test=str(tmp_path / "bad.jsonl"))
    assert "bad.jsonl" in str(error.value) and "\n" not in str(error.value)


MINE = """
from bandpo.lab.tasks import Task, table

class Mine(Task):
    grading = "direct"
    eval_size = 2

    def __init__(self, train=("c", "d"), test=("a", "b"), drop="", paid="", junk="no junk"):
        self.rows = {"train": train, "test": test}
        self.drop, self.paid, self.junk, self.times = drop, paid, junk, 0

    def made(self, split):
        self.times += 1
        names = [x if x != "#" else str(self.times) for x in self.rows[split]]
        return table([{k: x for k in ("prompt", "question", "answer") if k != self.drop} for x in names])

    def train_dataset(self, seed):
        return self.made("train")

    def eval_dataset(self, n):
        return self.made("test")

    def score(self, completion, row):
        if completion == self.junk:
            return 1
        return self.paid or completion == row["answer"]

class Broken(Mine):
    def __init__(self):
        raise KeyError("x")
"""


@pytest.mark.parametrize(
    ("task_args", "said"),
    [
        ({"test": ["a"]}, "eval_dataset(2) gives 1 problems"),
        ({"test": ["a", "#"]}, "other problems the second time; draw them from a fixed seed"),
        ({"train": ["#"]}, "train_dataset(0) gives other problems the second time"),
        ({"train": ["a", "c"]}, "'a' is both trained on and held out"),
        ({"train": []}, "train_dataset gives no problem"),
        ({"drop": "answer"}, "no column 'answer'"),
        ({"paid": 0.5}, "the answer 'a' to 'a' scores 0.5; mend score()"),
        ({"paid": "much"}, "scores 0 (ValueError: could not convert string to float: 'much')"),
        ({"junk": "banana"}, "'banana' as an answer to 'a' scores 1"),
        ({"junk": "\x00"}, "as an answer to 'a' scores 1"),
    ],
)
def test_check_task_says_what_is_wrong_with_a_task_of_ones_own(task_args, said, tmp_path, caplog):
    (tmp_path / "mine.py").write_text(MINE)
    check_task(get_task(f"{tmp_path}/mine.py:Mine"))
    assert "mine.py:Mine': running its code" in caplog.text
    with pytest.raises(InputError, match=re.escape(said)):
        check_task(get_task(f"{tmp_path}/mine.py:Mine", **task_args))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine.py:Mne", "no 'Mne' (did you mean 'Mine'?)"),
        ("mine.py:table", "must be a subclass of bandpo.lab.tasks.Task"),
        ("mine.py:Broken", "cannot be made with task_args={}: KeyError: 'x'"),
        ("gone.py:Mine", "no such file"),
        ("mine.py", "not known"),
    ],
)
def test_a_task_that_cannot_be_had_is_one_line(name, said, tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    with pytest.raises(InputError, match=re.escape(said)) as error:
        get_task(f"{tmp_path}/{name}")
    assert "\n" not in str(error.value)


def test_every_task_that_ships_can_be_had_by_its_name(tmp_path):
    for name in list_tasks():
        args = {"test": rows(tmp_path / "x.jsonl", {"prompt": "a", "answer": "b"})} if name == "jsonl" else {}
        task = get_task(name.replace("_", "-"), **args)
        row = dict(task.eval_dataset(1)[0])
        assert [g.score for g in grade(task, [task.gold(row)], [row])] == [1.0], name
