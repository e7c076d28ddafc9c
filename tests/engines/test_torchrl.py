"""torchrl: whole PPO runs learn, and every minibatch of one equals a loss written by hand."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torchrl", reason="torchrl is not installed: pip install 'bandpo[engines]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torchrl and tensordict
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:(torchrl|tensordict|gymnasium)"),
]

import torch  # noqa: E402
from tensordict.nn import TensorDictModule  # noqa: E402
from torchrl.modules import ProbabilisticActor  # noqa: E402
from torchrl.objectives import ClipPPOLoss  # noqa: E402
from torchrl_support import PPO  # noqa: E402

from bandpo.engines.torchrl import BandClipPPOLoss, BandGRPOLoss  # noqa: E402


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(("env", "at_first", "at_last"), [("CartPole-v1", 40.0, 100.0), ("catch", -0.3, 0.4)])
def test_ppo_learns(env: str, at_first: float, at_last: float) -> None:
    ppo = PPO(BandClipPPOLoss, env, lr=3e-3, clip_args={"divergence": "kl", "delta": 0.05})
    clipped = 0.0
    for _ in range(16):
        ppo.iterate()
        clipped += float(ppo.loss.clip_metrics()["clip/zero_grad"])
    ppo.close()
    assert mean(ppo.returns[:40]) < at_first and mean(ppo.returns[-40:]) > at_last
    assert clipped > 0.1, "the clip never acted"


def test_every_minibatch_equals_the_loss_written_by_hand() -> None:
    errors, shares = [], []

    def look(ppo: PPO, x: Any, out: Any) -> None:
        weights = list(ppo.actor.parameters())
        logps = ppo.actor.get_dist(x).log_prob(x["action"])
        p, advantages = x["action_log_prob"].double().exp(), x["advantage"].squeeze(-1)
        low, high = (1 - 0.05 / p).clamp(min=0), torch.minimum(1 + 0.05 / p, 1 / p).clamp(max=10)  # TV, delta 0.05
        ratio = (logps - x["action_log_prob"]).exp()
        inside = torch.maximum(torch.minimum(ratio, high.float()), low.float())
        want = -torch.minimum(ratio * advantages, inside * advantages).mean()
        got = out["loss_objective"]
        expected = torch.autograd.grad(want, weights)
        pairs = zip(torch.autograd.grad(got, ppo_weights(ppo), retain_graph=True), expected, strict=True)
        errors.append(max(float((a - b).abs().max()) for a, b in pairs) + abs(float((got - want).detach())))
        shares.append(float((inside != ratio).float().mean()))
        assert float(out["clip_fraction"]) == pytest.approx(shares[-1], abs=0.01)

    ppo = PPO(BandClipPPOLoss, clip_args={"divergence": "tv", "delta": 0.05}, lr=5e-3)
    for _ in range(3):
        ppo.iterate(look)
    ppo.close()
    assert len(errors) == 48 and max(errors) < 2e-6 and max(shares) > 0.1


def ppo_weights(ppo: PPO) -> list[Any]:
    return [p for p in ppo.loss.actor_network_params.values(True, True) if isinstance(p, torch.Tensor)]


def test_nothing_of_a_batch_stays_in_the_checkpoint() -> None:
    ppo, plain, fresh = PPO(BandClipPPOLoss, steps=32), PPO(ClipPPOLoss), PPO(BandClipPPOLoss, seed=1)
    ppo.iterate()
    state = ppo.loss.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in plain.loss.state_dict().items()}
    for other in (fresh, plain):  # either loss takes it
        other.loss.load_state_dict(state)
        after = other.loss.state_dict()
        assert all(torch.equal(after[key], value) for key, value in state.items())
    for run in (ppo, plain, fresh):
        run.close()


def test_a_proximal_policy_is_the_ratios_denominator() -> None:
    """With delay_actor torchrl divides by another policy than the one that acted: the bounds belong to it."""
    ppo = PPO(BandClipPPOLoss, steps=32, delay_actor=True, clip_args={"divergence": "tv", "delta": 0.05})
    rollout = next(ppo.data)
    ppo.advantage(rollout)
    rollout = rollout.reshape(-1)
    rollout["action_log_prob"] = rollout["action_log_prob"] - 0.5  # the actor of long ago
    ppo.loss(rollout)
    p = ppo.actor.get_dist(rollout).log_prob(rollout["action"]).exp()  # not trained yet: equal to the proximal one
    torch.testing.assert_close(ppo.loss._bounds.high, torch.minimum(1 + 0.05 / p, 1 / p).clamp(max=10))
    ppo.close()


def test_options_that_would_go_round_the_clip_are_refused() -> None:
    net = TensorDictModule(torch.nn.Linear(2, 2), ["x"], ["loc"])
    wide = TensorDictModule(lambda loc: (loc, torch.ones_like(loc)), ["loc"], ["loc", "scale"])
    from tensordict import TensorDict
    from tensordict.nn import TensorDictSequential

    gauss = torch.distributions.Normal
    actor = ProbabilisticActor(
        TensorDictSequential(net, wide), ["loc", "scale"], distribution_class=gauss, return_log_prob=True
    )
    with pytest.raises(ValueError, match="clip_epsilon: must be left out"):
        BandClipPPOLoss(actor, clip_epsilon=0.2)
    with pytest.raises(ValueError, match="clip_epsilon: must be left out"):
        BandGRPOLoss(actor, clip_epsilon=0.2)
    with pytest.raises(ValueError, match="clip_value=True: would take clip_epsilon; give a number"):
        BandClipPPOLoss(actor, clip_value=True)
    batch = TensorDict({"x": torch.ones(3, 2), "action": torch.zeros(3, 2), "advantage": torch.ones(3, 1)}, [3])
    batch["action_log_prob"] = torch.zeros(3, 2)
    loss = BandClipPPOLoss(actor, critic_coeff=0.0)
    with pytest.raises(ValueError, match="a density is no probability"):
        loss(batch)
    with pytest.raises(ValueError, match="call the loss first"):
        loss.clip_metrics()


def two_heads() -> tuple[Any, Any]:
    """An actor with two discrete actions, and what it did in five states."""
    from tensordict import TensorDict
    from tensordict.nn import CompositeDistribution, TensorDictSequential

    kind = torch.distributions.Categorical
    split = TensorDictModule(lambda h: (h, -h), ["h"], [("params", "a", "logits"), ("params", "b", "logits")])
    actor = ProbabilisticActor(
        TensorDictSequential(TensorDictModule(torch.nn.Linear(3, 3), ["obs"], ["h"]), split),
        in_keys=["params"],
        out_keys=["a", "b"],
        distribution_class=CompositeDistribution,
        distribution_kwargs={"distribution_map": {"a": kind, "b": kind}},
        return_log_prob=True,
    )
    batch = actor(TensorDict({"obs": torch.randn(5, 3), "advantage": torch.ones(5, 1)}, [5])).detach()
    return actor, batch


def test_several_heads_are_refused_unless_they_make_one_action() -> None:
    from tensordict.nn import set_composite_lp_aggregate

    with set_composite_lp_aggregate(False):
        actor, batch = two_heads()
        with pytest.raises(ValueError, match=r"several entries.*set_composite_lp_aggregate\(True\)"):
            BandClipPPOLoss(actor, critic_coeff=0.0, entropy_bonus=False)(batch)
    with set_composite_lp_aggregate(True):
        actor, batch = two_heads()
        loss = BandClipPPOLoss(actor, critic_coeff=0.0, entropy_bonus=False, clip_args={"divergence": "tv"})
        loss.set_keys(action=["a", "b"])
        loss(batch)
        p = (batch["a_log_prob"] + batch["b_log_prob"]).exp()
        torch.testing.assert_close(loss._bounds.high, torch.minimum(1 + 0.05 / p, 1 / p).clamp(max=10))


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")  # torchrl's own call
def test_grpo_learns_with_a_language_model() -> None:
    """torchrl's wrapper round a tiny Qwen2 samples and is trained; the reward is the digits of four."""
    trl_support = pytest.importorskip("trl_support", reason="trl is not installed: pip install 'bandpo[train]'")
    from tensordict import TensorDict
    from torchrl.modules.llm import Text, TransformersWrapper

    model, tokenizer = trl_support.make_model(), trl_support.make_tokenizer()
    torch.manual_seed(0)
    common: dict[str, Any] = {"tokenizer": tokenizer, "return_log_probs": True, "pad_output": True}
    sampling = {"max_new_tokens": 4, "do_sample": True, "temperature": 1.5}
    sampler = TransformersWrapper(model, input_mode="text", generate=True, generate_kwargs=sampling, **common)
    policy = TransformersWrapper(model, input_mode="tokens", generate=False, **common)
    loss = BandGRPOLoss(policy, masking_strategy="rlhf", entropy_bonus=False, clip_args={"delta": 0.02})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    prompts = [f"{a}+{b}=" for a in (217, 384) for b in (111, 502) for _ in range(8)]
    rewards, clipped = [], []
    for _ in range(9):
        with torch.no_grad():
            out = sampler(TensorDict({"text": Text(prompt=prompts, batch_size=(32,))}, [32]))
        reward = torch.tensor([sum(c.isdigit() for c in text) / 4 for text in out["text"].response]).view(4, 8)
        advantages = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        full, answer = out["tokens"].full, out["tokens"].response != tokenizer.pad_token_id
        data = TensorDict({("tokens", "full"): full, ("masks", "all_attention_mask"): full != 0}, [32])
        data["masks", "all_assistant_mask"] = torch.nn.functional.pad(answer, (full.size(1) - answer.size(1), 0))
        with torch.no_grad():
            data["log_probs", "full"] = policy(data.copy())["log_probs"].full
        data["advantage"] = advantages.view(32, 1, 1).expand(32, full.size(1), 1)
        for _ in range(4):
            optimizer.zero_grad()
            loss(data).loss_objective.backward()
            optimizer.step()
        rewards.append(float(reward.mean()))
        clipped.append(float(loss.clip_metrics()["clip/zero_grad"]))
    assert rewards[0] < 0.5 and mean(rewards[-2:]) > 0.7 and max(clipped) > 0.05
