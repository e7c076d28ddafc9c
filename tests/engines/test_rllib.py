"""RLlib: PPO on CartPole with a local Ray and two env runners."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("ray.rllib", reason="RLlib is not installed: see docs/engines.md")
pytestmark = [
    pytest.mark.usefixtures("local_ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of ray and gymnasium
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # sockets that Ray leaves to the garbage collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

from ray.rllib.algorithms.ppo import PPOConfig  # noqa: E402

from bandpo.engines.rllib import BandPPOTorchLearner  # noqa: E402


def config(**options: Any) -> PPOConfig:
    return (
        PPOConfig()
        .environment("CartPole-v1")
        .env_runners(num_env_runners=2, num_envs_per_env_runner=4)
        .learners(num_learners=0, learner_config_dict=options)
        .training(
            learner_class=BandPPOTorchLearner, train_batch_size=1024, minibatch_size=256, num_epochs=6, lr=1e-3,
            use_kl_loss=False, vf_clip_param=1e4,
        )
        .debugging(seed=0, log_level="ERROR")
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"clip": "band", "clip_args": {"divergence": "kl", "delta": 0.05}, "clip_metrics": "full"},
        {"clip": "dgpo", "clip_args": {"region": {"clip": "band", "delta": 0.05}}},
    ],
    ids=lambda options: options["clip"],
)
def test_ppo_learns_with_two_env_runners(options: dict[str, Any]) -> None:
    algo = config(**options).build_algo()
    returns, kept = [], []
    for _ in range(10):
        result = algo.train()
        returns.append(result["env_runners"]["episode_return_mean"])
        kept.append(result["learners"]["default_policy"]["clip/gradient_kept"])
    algo.stop()
    assert returns[0] < 40 and max(returns) > 100
    assert min(kept) < 0.999
    found = [key for key in result["learners"]["default_policy"] if key.startswith("clip/")]
    assert "clip/kl_mean" in found and (len(found) > 200) == ("clip_metrics" in options)


@pytest.mark.parametrize(
    ("options", "clip_param", "message"),
    [
        ({}, 0.2, "clip_param=0.2: must be left out"),
        ({"clip": "bnad"}, 0.3, "did you mean 'band'"),
        ({"clip_arg": 1}, 0.3, "'clip_arg' is unknown"),
        ({"delta": 2.0}, 0.3, "'delta' is an argument of the clip; write clip_args={'delta': ...}"),
        ({"divergence": "tv"}, 0.3, "'divergence' is an argument of the clip"),
        ({"eps_high": 0.3, "clip": "fixed"}, 0.3, "'eps_high' is an argument of the clip"),
        ({"dual_clip": 3}, 0.3, "'dual_clip' is unknown; must be left out"),
        ({"clip": "gspo"}, 0.3, "clip='gspo': looks at whole sequences, and RLlib's minibatches have single actions"),
        ({"clip_metrics": "all"}, 0.3, "clip_metrics='all': must be one of brief, full, none"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], clip_param: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**options).training(clip_param=clip_param).env_runners(num_env_runners=0).build_algo()


def test_a_density_is_refused_unless_the_clip_uses_no_probability() -> None:
    for clip in ("band", "sapo"):
        algo = config(clip=clip).environment("Pendulum-v1").env_runners(num_env_runners=0)
        algo = algo.training(train_batch_size=64, minibatch_size=64, num_epochs=1).build_algo()
        if clip == "band":
            with pytest.raises(ValueError, match="a density is no probability"):
                algo.train()
        else:
            assert algo.train()["learners"]["default_policy"]["clip/gradient_kept"] > 0
        algo.stop()


def test_nested_actions_are_discrete_where_every_part_is() -> None:
    import torch

    from bandpo.engines.rllib import _is_discrete

    whole, real = torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    assert _is_discrete(whole) and _is_discrete({"a": whole, "b": (whole, whole)})
    assert not _is_discrete(real) and not _is_discrete({"a": whole, "b": (whole, real)})
