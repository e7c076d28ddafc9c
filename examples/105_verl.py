# %% [markdown]
# # 105: verl
#
# verl takes bandpo's loss through its own configuration, unchanged. This lesson calls the loss as verl's workers do,
# and prints the command that trains. It needs verl (`make test-verl` makes an environment that has it), and takes half
# a minute.
#
# In a launch script of your own three overrides put the clip in:
#
# ```text
# actor_rollout_ref.actor.policy_loss._target_=bandpo.engines.verl.BandLossConfig
# actor_rollout_ref.actor.policy_loss.loss_mode=bandpo
# "+actor_rollout_ref.actor.policy_loss.clip_args={divergence:kl,delta:0.05}"
# ```

# %%
import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

import bandpo
from bandpo.engines.verl import BandLossConfig

config = FSDPActorConfig(
    strategy="fsdp2",
    rollout_n=1,
    ppo_micro_batch_size_per_gpu=1,
    policy_loss=BandLossConfig(clip="band", clip_args={"divergence": "kl", "delta": 0.05}),
)

# %% [markdown]
# ## The loss, as a worker calls it
#
# Four tokens of one answer with a positive advantage. The second and the fourth have moved further than 0.05 allows.

# %%
old_logps = torch.tensor([[0.02, 0.30, 0.55, 0.84]]).log()
logps = torch.tensor([[0.03, 0.60, 0.50, 0.98]]).log().requires_grad_()
advantages, mask = torch.ones(1, 4), torch.ones(1, 4)

loss, metrics = get_policy_loss_fn("bandpo")(
    old_log_prob=old_logps,
    log_prob=logps,
    advantages=advantages,
    response_mask=mask,
    loss_agg_mode="token-mean",
    config=config,
    rollout_is_weights=None,
)
loss.backward()
print("gradient     ", [round(x, 3) for x in logps.grad[0].tolist()])
coefficient = bandpo.Band(delta=0.05).coefficient(bandpo.Tokens(logps.detach(), old_logps, advantages))
print("-c / tokens  ", [round(x, 3) + 0.0 for x in (-coefficient[0] / 4).tolist()])
print("without gradient", metrics["actor/clip/zero_grad_above_sum"], "of", metrics["actor/clip/tokens_sum"])

# %% [markdown]
# The gradient of verl's loss is the clip's coefficient, token by token. What the clip did goes into verl's log as sums,
# `actor/clip/NAME_sum`; a share is one divided by `actor/clip/tokens_sum`.
#
# ## Training
#
# `bandpo verl` takes the recipe that `bandpo train` takes. `--print` shows what verl is given; without it the demo
# trains two workers on a CPU, with Ray on this machine, in four to seven minutes.

# %%
from bandpo.cli import main  # noqa: E402

main(["verl", "verl-demo", "--print"])

# %% [markdown]
# `bandpo verl examples/rlhf_verl.yaml` trains with a critic and GAE instead of groups. The [verl guide](../verl.md) has
# several nodes, Slurm, what is refused, and what happens when a worker is lost.
# Next: [106](106_reading_a_report.md), what a run leaves behind.
