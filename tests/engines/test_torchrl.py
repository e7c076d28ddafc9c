"""torchrl: whole PPO runs learn, and every minibatch of one equals a loss written by hand."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torchrl", reason="torchrl is not installed: see docs/engines.md")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torchrl and tensordict
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning:(torchrl|tensordict|gymnasium)"),
]

import torch  # noqa: E402
from torchrl.objectives import ClipPPOLoss  # noqa: E402
from torchrl_support import PPO  # noqa: E402

from bandpo.engines.torchrl import BandClipPPOLoss, BandGRPOLoss  # noqa: E402


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


BAND: dict[str, Any] = {"clip_args": {"divergence": "kl", "delta": 0.05}}
RUNS: list[tuple[str, float, float, dict[str, Any]]] = [
    ("CartPole-v1", 40.0, 100.0, BAND),
    ("CartPole-v1", 40.0, 100.0, {"clip": "sapo", "normalize_advantage": True}),
    ("catch", -0.3, 0.4, BAND),
]


@pytest.mark.parametrize(("env", "at_first", "at_last", "options"), RUNS)
def test_ppo_learns(env: str, at_first: float, at_last: float, options: dict[str, Any]) -> None:
    ppo = PPO(BandClipPPOLoss, env, lr=3e-3, **options)
    kept = []
    for _ in range(16):
        ppo.iterate()
        kept.append(float(ppo.loss.clip_metrics()["clip/gradient_kept"]))
    ppo.close()
    assert mean(ppo.returns[:40]) < at_first and mean(ppo.returns[-40:]) > at_last
    assert sum(kept) < 15.9, "the clip never acted"


def test_every_minibatch_equals_the_loss_written_by_hand() -> None:
    errors, shares = [], []

    def look(ppo: PPO, x: Any, out: Any) -> None:
        weights = list(ppo.actor.parameters())
        logps = ppo.actor.get_dist(x).log_prob(x["action"])
        p, advantages = x["action_log_prob"].double().exp(), x["advantage"].squeeze(-1)
        low, high = (1 - 0.05 / p).clamp(min=0), torch.minimum(1 + 0.05 / p, 1 / p)  # TV, delta 0.05
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


def high(loss: Any) -> torch.Tensor:
    """The upper bounds of the last batch."""
    return loss._bounds[1].squeeze(-1).exp()


def test_nothing_of_a_batch_stays_in_the_checkpoint() -> None:
    ppo, plain, fresh = PPO(BandClipPPOLoss, steps=32), PPO(ClipPPOLoss), PPO(BandClipPPOLoss, seed=1)
    ppo.iterate()
    state, theirs = ppo.loss.state_dict(), plain.loss.state_dict()
    assert {k: v.shape for k, v in theirs.items() if k != "clip_epsilon"} == {k: v.shape for k, v in state.items()}
    for kept, other in ((state, fresh), (theirs, fresh)):  # torchrl's own checkpoint too
        other.loss.load_state_dict(kept)
        after = other.loss.state_dict()
        assert all(torch.equal(value, kept[key]) for key, value in after.items())
    fixed = PPO(BandClipPPOLoss, clip="fixed", clip_args={"eps_low": 0.3, "eps_high": 0.3})
    assert list(fixed.loss.state_dict()) == list(theirs)
    fixed.loss.load_state_dict(theirs)  # with its margin, as in torchrl
    assert fixed.loss.clip.eps_low == fixed.loss.clip.eps_high == pytest.approx(0.2)
    plain.loss.load_state_dict(fixed.loss.state_dict())
    for run in (ppo, plain, fresh, fixed):
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
    torch.testing.assert_close(high(ppo.loss), torch.minimum(1 + 0.05 / p, 1 / p))
    ppo.close()


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")  # torchrl's own call
def test_grpo_learns_with_a_language_model() -> None:
    """torchrl's wrapper round a tiny Qwen2 samples and is trained; the reward is the digits of four."""
    trl_support = pytest.importorskip("trl_support", reason="trl is not installed: see docs/trl.md")
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
