"""A whole PPO of torchrl, small: collector, GAE, critic, minibatches; what differs is the loss."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives.value import GAE


class Catch(gymnasium.Env):
    """An Atari-like game: a ball falls through 8 x 6 pixels, a paddle moves left or right; +1 caught, -1 missed."""

    ROWS, COLUMNS = 8, 6
    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1, ROWS, COLUMNS), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def _see(self) -> np.ndarray:
        screen = np.zeros((1, self.ROWS, self.COLUMNS), np.float32)
        screen[0, self.row, self.ball] = screen[0, -1, self.paddle] = 1
        return screen

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.row, self.paddle = 0, self.COLUMNS // 2
        self.ball = int(self.np_random.integers(self.COLUMNS))
        return self._see(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.row, self.paddle = self.row + 1, min(max(self.paddle + int(action) - 1, 0), self.COLUMNS - 1)
        done = self.row == self.ROWS - 1
        return self._see(), (1.0 if self.ball == self.paddle else -1.0) if done else 0.0, done, False, {}


def make_env(name: str, envs: int, seed: int) -> Any:
    make = Catch if name == "catch" else lambda: gymnasium.make(name)
    vector = gymnasium.vector.SyncVectorEnv([make] * envs, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
    env = GymWrapper(vector, categorical_action_encoding=True)
    env.set_seed(seed)
    return env


class PPO:
    """One call of `iterate` is a rollout and its updates."""

    def __init__(
        self, kind: Any, env: str = "CartPole-v1", seed: int = 0, envs: int = 8, steps: int = 128, epochs: int = 4,
        batch: int = 256, lr: float = 1e-3, width: int = 64, **options: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        self.env = make_env(env, envs, seed)
        shape, actions = self.env.observation_spec["observation"].shape[1:], int(self.env.action_spec.space.n)
        flat, depth = int(np.prod(shape)), len(shape)

        def net(out: int) -> torch.nn.Module:
            layers = [torch.nn.Linear(flat, width), torch.nn.Tanh(), torch.nn.Linear(width, out)]
            return torch.nn.Sequential(torch.nn.Flatten(-depth), *layers)

        self.actor = ProbabilisticActor(
            TensorDictModule(net(actions), ["observation"], ["logits"]),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
            spec=self.env.action_spec,
        )
        self.critic = ValueOperator(net(1), in_keys=["observation"])
        self.advantage = GAE(gamma=0.99, lmbda=0.95, value_network=self.critic, average_gae=True, device="cpu")
        self.loss = kind(self.actor, self.critic, critic_coeff=1.0, entropy_coeff=0.01, **options)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=lr)
        self.collector = Collector(self.env, self.actor, frames_per_batch=envs * steps, total_frames=-1)
        self.data, self.epochs, self.batch = iter(self.collector), epochs, batch
        self.returns: list[float] = []
        self.now = torch.zeros(envs)

    def iterate(self, look: Any = None) -> dict[str, float]:
        """Return what the last minibatch's loss reported; `look(self, minibatch, out)` sees each before its step."""
        rollout = next(self.data)
        with torch.no_grad():
            self.advantage(rollout)
        self._count(rollout)
        rollout = rollout.reshape(-1)
        for _ in range(self.epochs):
            for index in torch.randperm(len(rollout)).split(self.batch):
                minibatch = rollout[index]
                out = self.loss(minibatch)
                if look is not None:
                    look(self, minibatch, out)
                self.optimizer.zero_grad()
                sum(out[key] for key in ("loss_objective", "loss_critic", "loss_entropy")).backward()
                torch.nn.utils.clip_grad_norm_(self.loss.parameters(), 0.5)
                self.optimizer.step()
        return {key: float(value) for key, value in out.items() if value.numel() == 1}

    def _count(self, rollout: Any) -> None:
        for reward, done in zip(rollout["next", "reward"].unbind(1), rollout["next", "done"].unbind(1), strict=True):
            self.now += reward[:, 0]
            self.returns += self.now[done[:, 0]].tolist()
            self.now = torch.where(done[:, 0], 0.0, self.now)

    def close(self) -> None:
        self.collector.shutdown()
