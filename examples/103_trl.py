# %% [markdown]
# # 103: TRL
#
# Two names change in a GRPO script of TRL's: `GRPOConfig` becomes `BandGRPOConfig`, `GRPOTrainer` becomes
# `BandGRPOTrainer`. Everything else stays TRL's. The model of this lesson ships with bandpo (about 100,000 parameters,
# it adds numbers) and the reward is the share of even digits, so it needs no network and no GPU, and takes ten
# seconds. It needs the extra `trl`.

# %%
from tempfile import mkdtemp

from datasets import Dataset
from transformers import PrinterCallback

from bandpo.engines.trl import BandGRPOConfig, BandGRPOTrainer
from bandpo.lab.models.load import load_model

model, tokenizer = load_model("bandpo/tiny-addition")
prompts = Dataset.from_dict({"prompt": [f"{a}+{b}=" for a in range(100, 1000, 90) for b in range(100, 1000, 60)]})


def even_digits(completions, **columns):
    """Reward each completion by its share of even digits."""
    return [sum(c in "02468" for c in text) / 4 for text in completions]


# %% [markdown]
# ## The clip and the schedule
#
# `clip` and `clip_args` choose the clip. The schedule decides whether it can act at all: with TRL's defaults each
# rollout feeds one update, every ratio is 1, and no clip does anything. Here a rollout of 4 x 64 completions feeds four
# updates of 64.

# %%
config = BandGRPOConfig(
    mkdtemp(),
    clip="band",
    clip_args={"divergence": "kl", "delta": 0.05},
    num_generations=8,
    per_device_train_batch_size=64,
    steps_per_generation=4,  # four updates a rollout, because gradient_accumulation_steps is 1
    gradient_accumulation_steps=1,
    max_completion_length=4,
    learning_rate=5e-4,
    max_steps=24,
    logging_steps=4,
    seed=0,
    use_cpu=True,
    bf16=False,
    activation_checkpointing=False,  # with an older transformers: gradient_checkpointing
    report_to="none",
    save_strategy="no",
    disable_tqdm=True,
)
trainer = BandGRPOTrainer(model, even_digits, config, train_dataset=prompts, processing_class=tokenizer)
trainer.remove_callback(PrinterCallback)  # the log is read below instead
trainer.train()

# %% [markdown]
# ## What the clip did
#
# It stands in TRL's own log, beside the reward. `clip/zero_grad` is the share of tokens that the clip left without
# gradient, `clip/gradient_kept` how much of the gradient's size is left, `clip/kl_mean` how far the tokens have moved.

# %%
for entry in trainer.state.log_history:
    if "loss" in entry:
        print(
            f"step {entry['step']:>2}  reward {entry['reward']:.2f}  without gradient {entry['clip/zero_grad']:.1%}  "
            f"gradient kept {entry['clip/gradient_kept']:.1%}  KL {entry['clip/kl_mean']:.4f}"
        )

# %% [markdown]
# The reward rises, and the clip takes some tokens in each rollout. Were `clip/zero_grad` 0 throughout, the clip never
# acted: raise the updates per rollout, or lower `delta`. The [TRL guide](../trl.md) has the rest: other clips, loss
# types, vLLM, several processes, what is refused and why.
# Next: [104](104_own_task.md), a task of your own.
