# %% [markdown]
# # 101: The operator
#
# How far may the probability of one token move in an update? PPO answers with a ratio, between 0.8 and 1.2 whatever the
# token. Band answers with a distance: the new probability q may be anywhere that is at most `delta` away from the old
# one, p. This lesson computes those bounds. It needs torch alone.

# %%
import torch

import bandpo

p = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.95], dtype=torch.float64)  # old probabilities of six tokens
bounds = bandpo.band(p.log(), 0.05, "kl")  # of the ratio q / p: within them KL(p, q) <= 0.05
low, high = bounds.low, bounds.high

print("old p    Band: lowest, highest q    PPO 0.2: lowest, highest q")
for one, a, b in zip(p.tolist(), (p * low).tolist(), (p * high).tolist(), strict=True):
    print(f"{one:<8} {a:12.4f} {b:8.4f} {0.8 * one:19.4f} {1.2 * one:8.4f}")

# %% [markdown]
# ```text
# old p    Band: lowest, highest q    PPO 0.2: lowest, highest q
# 0.001          0.0000   0.0535              0.0008   0.0012
# 0.01           0.0000   0.0781              0.0080   0.0120
# 0.1            0.0313   0.2201              0.0800   0.1200
# 0.5            0.3458   0.6542              0.4000   0.6000
# 0.9            0.7799   0.9687              0.7200   1.0800
# 0.95           0.8509   0.9919              0.7600   1.1400
# ```
#
# Two things to see. A rare token may rise to many times its probability, where PPO stops it at 1.2 times. And a likely
# token has a bound that it can reach: 1.08 and 1.14 are no probabilities.

# %% [markdown]
# ## The bound is where the distance is used up
#
# `binary_divergence` is the distance itself: between "this token or any other" under the old policy and under the new
# one. At both bounds it is `delta`.

# %%
for bound in (low, high):
    reached = bandpo.binary_divergence((p * bound).log(), p.log(), "kl")
    print([round(x, 6) for x in reached.tolist()])

# %% [markdown]
# ```text
# [0.05, 0.05, 0.05, 0.05, 0.05, 0.05]
# [0.05, 0.05, 0.05, 0.05, 0.05, 0.05]
# ```
#
# ## Other distances, and a ceiling
#
# The same `delta` means another thing under another divergence, so compare radii by what they leave, not by their
# numbers: `match_delta` finds the radius that leaves as much room as another clip does, over the tokens that you have.

# %%
for divergence in ("kl", "tv", "chi2", "hellinger"):
    delta = bandpo.match_delta(bandpo.Fixed(0.2, 0.2), p.log(), divergence=divergence)
    top = bandpo.band(p.log(), delta, divergence).high
    print(f"{divergence:<10} delta {delta:.4f}, highest ratio at p = 0.01: {top[1]:.2f}")

# %% [markdown]
# ```text
# kl         delta 0.0325, highest ratio at p = 0.01: 5.90
# tv         delta 0.0782, highest ratio at p = 0.01: 8.82
# chi2       delta 0.0761, highest ratio at p = 0.01: 3.75
# hellinger  delta 0.0173, highest ratio at p = 0.01: 5.27
# ```
#
# A rare token's bound can be large. `cap` puts a ceiling on the ratio; the paper's runs used 10.

# %%
print([round(x, 2) for x in bandpo.band(p.log(), 0.05, "kl").high.tolist()])
print([round(x, 2) for x in bandpo.band(p.log(), 0.05, "kl", cap=10.0).high.tolist()])

# %% [markdown]
# ```text
# [53.55, 7.81, 2.2, 1.31, 1.08, 1.04]
# [10.0, 7.81, 2.2, 1.31, 1.08, 1.04]
# ```
#
# Next: [102](102_your_loop.md), the bounds in a training loop. The page [The operator](../operator.md) has the proofs,
# and what the distance of one token says about the whole distribution.
