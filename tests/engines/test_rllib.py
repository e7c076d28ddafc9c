"""RLlib: PPO on CartPole with a local Ray and two env runners."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("ray.rllib", reason="RLlib is not installed: pip install 'bandpo[engines]'")
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


def test_ppo_learns_with_two_env_runners() -> None:
    algo = config(clip="band", clip_args={"divergence": "kl", "delta": 0.05}).build_algo()
    returns, clipped = [], []
    for _ in range(10):
        result = algo.train()
        returns.append(result["env_runners"]["episode_return_mean"])
        clipped.append(result["learners"]["default_policy"]["clip/zero_grad"])
    algo.stop()
    assert returns[0] < 40 and max(returns) > 100
    assert max(clipped) > 0 and "clip/divergence_mean" in result["learners"]["default_policy"]


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
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], clip_param: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**options).training(clip_param=clip_param).env_runners(num_env_runners=0).build_algo()


def test_continuous_actions_are_refused() -> None:
    algo = config().environment("Pendulum-v1").env_runners(num_env_runners=0).training(minibatch_size=64).build_algo()
    with pytest.raises(ValueError, match="a density is no probability"):
        algo.train()
    algo.stop()
