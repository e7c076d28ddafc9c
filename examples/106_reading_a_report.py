# %% [markdown]
# # 106: Reading a report
#
# A run leaves a folder: `report.html` for people, and the records that it was made from. This lesson makes a short run
# and reads its records in the order in which one should ask. It needs the extra `trl` and takes half a minute.

# %%
import json
from pathlib import Path
from tempfile import mkdtemp

from bandpo.cli import main

folder = Path(mkdtemp(), "run")
short = ["--max_steps", "64", "--eval_every", "32", "--save_steps", "32", "--eval_prompts", "32"]
main(["train", "demo", *short, "--out", str(folder)])
records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
records = [record for record in records if record["event"] == "step"]

# %% [markdown]
# ## 1. Did held-out accuracy rise?
#
# By more than its interval? The interval covers the draw of problems and completions. It does not cover the seed:
# another may land elsewhere, so one run shows what happened, not what is better.

# %%
run = json.loads((folder / "run.json").read_text())
for when in ("before", "after"):
    found = run[when]
    print(f"{when:<6}  held-out accuracy {found['accuracy']:.3f} [{found['low']:.2f}, {found['high']:.2f}]")

# %% [markdown]
# ## 2. Did the reward rise with it, and did entropy survive?
#
# A reward that rises alone means something other than the task. Entropy near zero: the model explores no more.

# %%
for rollout in range(1, records[-1]["rollout"] + 1):
    steps = [record for record in records if record["rollout"] == rollout]
    rewards = [record["reward"] for record in steps if "reward" in record]  # known once a rollout
    entropy, clipped = (sum(record[name] for record in steps) / len(steps) for name in ("entropy", "clipped"))
    print(f"rollout {rollout}  reward {rewards[0]:.2f}  entropy {entropy:.2f}  without gradient {clipped:.1%}")

# %% [markdown]
# ## 3. Did the clip act, and on which tokens?
#
# A share of 0 throughout: it never did, and might as well not be there. By bucket of the old probability one sees where
# along the axis it acts; that is what Band changes.

# %%
last = records[-1]
for name in last:
    if name.startswith("clip/zero_grad/p0"):
        bucket = name.rpartition("/")[2]
        print(f"{bucket:<9} {last['clip/share/' + bucket]:6.1%} of tokens, of them without gradient {last[name]:.1%}")

# %% [markdown]
# ## 4. What would another clip have done?
#
# The run keeps a sample of its tokens. `bandpo explain FOLDER` asks each clip of the registry about them.

# %%
main(["explain", str(folder)])

# %% [markdown]
# `report.html` in the folder has all of this in pictures, and at its end the command, the resolved recipe, the versions
# and the machine. Several runs on one page: `bandpo report runs/a runs/b --out report.html`. The
# [quickstart](../quickstart.md) says what each part of the page means, [several seeds](../study.md) how to come to a
# conclusion, and [Explain](../explain.md) reads logs that did not come from bandpo.
