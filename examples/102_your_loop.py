# %% [markdown]
# # 102: Your own loop
#
# Any loop that multiplies a ratio by an advantage takes any clip of the registry in one line, `clip_advantages`, after
# the forward pass of every micro-batch. This lesson has such a loop in thirty lines: a policy over 16 symbols answers
# one question with 6 of them and is rewarded for each even one. It needs torch alone and takes a second.

# %%
import torch

import bandpo


def rollout(logits, answers=64, length=6):
    """Sample answers; return symbols, their log-probabilities, and one advantage for each answer."""
    logps = logits.log_softmax(-1)
    symbols = torch.multinomial(logps.exp(), answers * length, replacement=True).view(answers, length)
    rewards = (symbols % 2 == 0).double().mean(1)
    return symbols, logps[symbols], (rewards - rewards.mean()) / (rewards.std() + 1e-4)


def train(loss_of, rollouts=10, updates=4):
    """The loop. Each rollout feeds several updates, or else every ratio is 1 and no clip can act."""
    torch.manual_seed(0)
    logits = torch.randn(16, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(rollouts):
        with torch.no_grad():
            symbols, old_logps, advantages = rollout(logits)
        for _ in range(updates):
            loss = loss_of(logits.log_softmax(-1)[symbols], old_logps, advantages)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return logits.detach().softmax(-1)[::2].sum().item()  # the probability of an even symbol


# %% [markdown]
# ## A clip in one line
#
# The loop's own loss is `-(ratio * advantages).mean()`, without a clamp. The advantages become c / r, where c is the
# clip's coefficient, so that the product has the clip's gradient.


# %%
def with_clip_advantages(logps, old_logps, advantages):
    shaped = bandpo.clip_advantages(logps, old_logps, advantages, clip="band", clip_args={"delta": 0.02})
    ratio = torch.exp(logps - old_logps)
    return -(ratio * shaped).mean()


by_advantages = train(with_clip_advantages)
print(f"an even symbol has probability {by_advantages:.4f}")

# %% [markdown]
# ```text
# an even symbol has probability 0.9999
# ```
#
# ## Or the whole loss
#
# `policy_loss` is the same gradient, with masks, averages and metrics that you then need not write.

# %%
shares = []


def with_policy_loss(logps, old_logps, advantages):
    out = bandpo.policy_loss(logps, old_logps, advantages, clip=bandpo.Band(delta=0.02))
    shares.append(out.metrics["zero_grad"].item())
    return out.loss


by_policy_loss = train(with_policy_loss)
print(f"an even symbol has probability {by_policy_loss:.4f}")
print("tokens without gradient, by update of a rollout:", [f"{sum(shares[i::4]) / 10:.1%}" for i in range(4)])

# %% [markdown]
# ```text
# an even symbol has probability 0.9999
# tokens without gradient, by update of a rollout: ['0.0%', '0.0%', '3.9%', '12.0%']
# ```
#
# The first update of each rollout clips nothing: there the policy is still the one that sampled. This is why a loop
# with one update a rollout has no use for a clip, and why `clip_advantages` must be called again in every update.

# %% [markdown]
# ## Other clips
#
# A name is all that changes. `bandpo.list_clips()` has them all, and the page [Clips](../clips.md) says what each is.
# Two rollouts of training with each, from the same seed:

# %%
for clip in ("none", "clip_higher", "band", "dppo_tv", "cispo", "sapo"):

    def loss_of(logps, old_logps, advantages, clip=clip):
        return bandpo.policy_loss(logps, old_logps, advantages, clip=clip).loss

    print(f"{clip:<12} {train(loss_of, rollouts=2):.3f}")

# %% [markdown]
# ```text
# none         0.974
# clip_higher  0.780
# band         0.960
# dppo_tv      0.962
# cispo        0.973
# sapo         0.973
# ```
#
# One seed of a toy problem says nothing about which is better; [Which clip?](../which-clip.md) says what is known.
# Next: [103](103_trl.md), the same in TRL.
