# %% [markdown]
# # 104: A task of your own
#
# `bandpo train` takes a task as a file: problems to train on, problems that are held out, and how good an answer is.
# This file is such a task, and trains on it. Run it from the top folder of a checkout; it needs the extra `trl` and
# takes half a minute.

# %%
from random import Random

from bandpo.lab.tasks import Task, held_out, table


class Doubles(Task):
    """A number plus itself, with a part of the reward for each right digit."""

    answer_tokens = 5  # four digits and the end

    def __init__(self):
        rows = [{"prompt": f"{n}+{n}=", "question": f"{n}+{n}=", "answer": f"{2 * n:04}"} for n in range(100, 1000)]
        self.train = [row for row in rows if not held_out(row["question"])]
        self.test = [row for row in rows if held_out(row["question"])]  # always the same eighth
        self.eval_size = len(self.test)

    def train_dataset(self, seed):
        return table(Random(seed).sample(self.train, len(self.train)))

    def eval_dataset(self, n):
        return table(self.test[:n])

    def score(self, completion, row):
        right = [a == b for a, b in zip(completion.strip(), row["answer"], strict=False)]
        return sum(right) / max(len(row["answer"]), len(completion.strip()))


# %% [markdown]
# ## Look at it before you train
#
# `check_task` looks as a stranger would: problems are whole and the same every time, held-out ones are not trained on,
# right answers score 1, junk does not.

# %%
if __name__ == "__main__":
    from bandpo.lab.tasks import check_task, get_task

    task = get_task("examples/104_own_task.py:Doubles")
    check_task(task)
    print(task.train_dataset(seed=0)[0])

# %% [markdown]
# ## Train on it
#
# A recipe says the rest, here that of the demo; every key may be given on the command line. This is
#
# ```text
# bandpo train demo --task examples/104_own_task.py:Doubles --eval_prompts 64 --max_steps 32 --out FOLDER
# ```
#
# in Python. The answers are graded in a process of its own, with a time limit, where they can do no harm: what a model
# writes is data.

# %%
if __name__ == "__main__":
    from tempfile import mkdtemp

    from bandpo.cli import main

    folder = f"{mkdtemp()}/doubles"
    words = ["--task", "examples/104_own_task.py:Doubles", "--eval_prompts", "64", "--max_steps", "32"]
    main(["train", "demo", *words, "--out", folder])

# %% [markdown]
# The same file works for `bandpo eval` and `bandpo verl`. [Bring your own](../own.md) has rewards, clips and
# divergences of one's own, and tasks out of a file of problems without any code.
# Next: [105](105_verl.md), the same recipe in verl.
