"""Tasks: every right answer passes its own grader, junk does not, held-out problems never turn up in training."""

import pytest

from bandpo._input import InputError
from bandpo.train.tasks import get_task

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
    ],
)
def test_bad_task_settings_are_named(name, task_args, said):
    with pytest.raises(InputError, match=said) as error:
        get_task(name, **task_args)
    assert "\n" not in str(error.value)


def test_more_held_out_problems_than_there_are():
    with pytest.raises(InputError, match="eval prompts: got 500"):
        get_task("chain_sum").eval_dataset(500)
    with pytest.raises(InputError, match="eval prompts: got 10"):
        get_task("addition", digits=1).eval_dataset(10)
