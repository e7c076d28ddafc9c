"""Each engine as two functions of the same tokens: its own loss with two margins, and its loss through our adapter."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import bandpo

Tensor = torch.Tensor
NEVER = (0.9999999, 1e30)  # margins that no ratio leaves


@dataclasses.dataclass
class Tokens:
    """Six sequences of five tokens out of four; gradients are taken at `logits`."""

    logits: Tensor
    actions: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor

    def new(self) -> Tensor:
        return self.logits.log_softmax(-1).gather(-1, self.actions[..., None])[..., 0]

    def rows(self) -> list[tuple[Tensor, ...]]:
        return list(zip(self.new(), self.old, self.advantages, self.mask, strict=True))

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.sum(), self.logits, retain_graph=True)[0]

    def seen(self) -> bandpo.Tokens:
        """What a clip may look at; the sampler's log-probabilities are a little off."""
        return bandpo.Tokens(self.new(), self.old, self.advantages, self.mask, rollout_logps=self.old - 0.1)


def tokens(seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 5, 4, generator=generator) * 2
    actions = torch.randint(0, 4, (6, 5), generator=generator)
    old = (logits + torch.randn(6, 5, 4, generator=generator) * 1.2).log_softmax(-1)
    old = old.gather(-1, actions[..., None])[..., 0]
    advantages = torch.randn(6, 5, generator=generator)
    mask = (torch.arange(5) >= torch.tensor([0, 0, 1, 2, 0, 3])[:, None]).float()  # left padding suits all engines
    return Tokens(logits.requires_grad_(), actions, old, advantages, mask)


@dataclasses.dataclass
class Case:
    """How to call one engine.

    Args:
        ours: (tokens, clip, clip_args, clip_metrics="brief") -> loss and metrics through our adapter.
        own: (tokens, eps_low, eps_high) -> loss of the engine itself.
        margins: that the engine's own loss takes.
        padded: whether it has a mask where the clip goes.
        inert: whether its padding may hold anything.
        takes_logps: whether it hands the loss log-probabilities of the policy in training, padding too.
        whole: whether its loss is ours, `bandpo.policy_loss`.
        rows: whether the loss sees one sequence at a time.
        clipped: the name of the engine's own metric of what its clip did, if it has one.
    """

    ours: Callable[..., tuple[Tensor, dict[str, Any]]]
    own: Callable[[Tokens, float, float], Tensor]
    margins: tuple[float, float] = (0.2, 0.28)
    padded: bool = True
    inert: bool = True
    takes_logps: bool = False
    whole: bool = False
    rows: bool = False
    clipped: str = ""

    def fit(self, x: Tokens) -> Tokens:
        """The same tokens, without padding where the engine has no mask."""
        return x if self.padded else dataclasses.replace(x, mask=torch.ones_like(x.mask))

    def carries(self, x: Tokens, c: Tensor) -> Tensor:
        """The gradient of the engine's own loss whose coefficient is c, normalised in its own way: r = 1 and A = c."""
        return x.gradient(self.own(dataclasses.replace(x, old=x.new().detach(), advantages=c), *NEVER))


def needs(*packages: str, why: str = "") -> None:
    for name in packages:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed{why}")


def torchrl_ppo() -> Case:
    needs("torchrl")
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.modules import ProbabilisticActor
    from torchrl.objectives import ClipPPOLoss

    from bandpo.engines.torchrl import BandClipPPOLoss

    def run(x: Tokens, kind: Any, how_much: str, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        net = TensorDictModule(torch.nn.Identity(), in_keys=["obs"], out_keys=["logits"])
        actor = ProbabilisticActor(
            net, in_keys=["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
        )
        loss = kind(actor, None, critic_coeff=0.0, entropy_bonus=False, device="cpu", **options)
        loss.set_keys(sample_log_prob="sample_log_prob")
        data = {"obs": x.logits.flatten(0, 1), "action": x.actions.flatten(), "sample_log_prob": x.old.flatten()}
        out = loss(TensorDict(data | {"advantage": x.advantages.flatten()[:, None]}, [x.old.numel()]))
        metrics = {"clip_fraction": out["clip_fraction"]}
        return out["loss_objective"], metrics | (loss.clip_metrics(how_much=how_much) if how_much else {})

    return Case(
        lambda x, clip, args, how_much="brief": run(x, BandClipPPOLoss, how_much, clip=clip, clip_args=args),
        lambda x, low, high: run(x, ClipPPOLoss, "", clip_epsilon=(low, high))[0],
        padded=False,
        clipped="clip_fraction",
    )


def torchrl_grpo() -> Case:
    needs("torchrl")
    from tensordict import TensorDict
    from torchrl.modules.distributions import LLMMaskedCategorical
    from torchrl.objectives.llm import GRPOLoss

    from bandpo.engines.torchrl import BandGRPOLoss

    class Actor(torch.nn.Module):
        in_keys: list[str] = []

        def get_dist(self, td: Any, **_: Any) -> Any:
            return LLMMaskedCategorical(logits=td["logits"], mask=td["mask"])

    def run(x: Tokens, kind: Any, how_much: str, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        loss = kind(Actor(), entropy_bonus=False, masking_strategy="generic", device="cpu", **options)
        data = {"logits": x.logits, "mask": x.mask.bool(), ("tokens", "full"): x.actions, ("log_probs", "full"): x.old}
        out = loss(TensorDict(data | {"advantage": x.advantages[..., None]}, x.old.shape[:1]))
        metrics = {"clip_fraction": out.clip_fraction}
        return out.loss_objective, metrics | (loss.clip_metrics(how_much=how_much) if how_much else {})

    return Case(
        lambda x, clip, args, how_much="brief": run(x, BandGRPOLoss, how_much, clip=clip, clip_args=args),
        lambda x, low, high: run(x, GRPOLoss, "", clip_epsilon=(low, high))[0],
        clipped="clip_fraction",
    )


def rllib() -> Case:
    needs("ray", "gymnasium")
    from ray.rllib.algorithms.ppo.ppo import PPOConfig
    from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical
    from ray.rllib.evaluation.postprocessing import Postprocessing

    from bandpo.engines.rllib import BandPPOTorchLearner

    class Module:
        unwrapped = lambda self: self  # noqa: E731
        get_train_action_dist_cls = get_exploration_action_dist_cls = lambda self: TorchCategorical

    class Metrics(dict):
        def log_dict(self, values: dict[str, Any], **_: Any) -> None:
            self.update(values)

    def run(x: Tokens, kind: Any, clip_param: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        config = PPOConfig().training(clip_param=clip_param, use_kl_loss=False, use_critic=False, entropy_coeff=0.0)
        learner = object.__new__(kind)
        if options:
            learner._take_options(config.learners(learner_config_dict=options))
        learner._module, learner.metrics = {"default": Module()}, Metrics()
        scheduler = types.SimpleNamespace(get_current_value=lambda: 0.0)
        learner.entropy_coeff_schedulers_per_module = {"default": scheduler}
        flat = {"logits": x.logits.flatten(0, 1), "actions": x.actions.flatten(), "mask": x.mask.bool().flatten()}
        batch = {
            Columns.ACTIONS: flat["actions"], Columns.ACTION_LOGP: x.old.flatten(), Columns.LOSS_MASK: flat["mask"],
            Columns.ACTION_DIST_INPUTS: flat["logits"].detach(), Postprocessing.ADVANTAGES: x.advantages.flatten(),
            Postprocessing.VALUE_TARGETS: torch.zeros(x.old.numel()),
        }  # fmt: skip
        loss = learner.compute_loss_for_module(
            module_id="default", config=config, batch=batch, fwd_out={Columns.ACTION_DIST_INPUTS: flat["logits"]}
        )
        return loss, learner.metrics

    class Both:  # RLlib has one number for both sides
        def __init__(self, low: float, high: float) -> None:
            self.low, self.high = low, high

        def __rsub__(self, one: float) -> float:
            return one - self.low

        def __radd__(self, one: float) -> float:
            return one + self.high

    return Case(
        lambda x, clip, args, how_much="brief": run(
            x, BandPPOTorchLearner, 0.3, clip=clip, clip_args=args, clip_metrics=how_much
        ),
        lambda x, low, high: run(x, PPOTorchLearner, low if low == high else Both(low, high))[0],
        margins=(0.2, 0.2),
    )


def skyrl() -> Case:
    needs("skyrl", why=": it needs Python 3.12 and an older transformers; see docs/engines.md")
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
    from skyrl.train.config import AlgorithmConfig

    from bandpo.engines.skyrl import BandAlgorithmConfig

    def run(x: Tokens, config: Any) -> tuple[Tensor, dict[str, Any]]:
        loss = PolicyLossRegistry.get(config.policy_loss_type)
        return loss(x.new(), x.old, x.advantages, config=config, loss_mask=x.mask, rollout_logprobs=x.old - 0.1)

    return Case(
        lambda x, clip, args, how_much="brief": run(
            x, BandAlgorithmConfig(clip=clip, clip_args=args, clip_metrics=how_much)
        ),
        lambda x, low, high: run(x, AlgorithmConfig(eps_clip_low=low, eps_clip_high=high))[0],
        takes_logps=True,
        clipped="clip_ratio",
    )


def written_sum(x: Tokens, low: float, high: float) -> Tensor:
    """PPO's loss as it is written, summed: what prime-rl and tinker compute out of reach of a test."""
    tokens = x.mask.bool()
    ratio, advantages = (x.new() - x.old)[tokens].exp(), x.advantages[tokens]
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages).sum()


def prime_rl() -> Case:
    if "prime_rl" not in sys.modules and importlib.util.find_spec("prime_rl") is None:
        _record_prime_rl()
    from prime_rl.trainer.rl.loss import LossInputs

    from bandpo.engines.prime_rl import band_loss

    def ours(x: Tokens, clip: Any, args: Any, how_much: str = "brief") -> tuple[Tensor, dict[str, Any]]:
        outs = [
            band_loss(
                LossInputs(new, old, None, adv, mask.bool(), None), clip=clip, clip_args=args, clip_metrics=how_much
            )
            for new, old, adv, mask in x.rows()
        ]
        return sum(o.loss for o in outs), outs[0].metrics  # type: ignore[return-value]

    return Case(ours, written_sum, takes_logps=True, whole=True, rows=True)


def _record_prime_rl() -> None:
    """The two dataclasses of prime_rl.trainer.rl.loss, by their fields; it has no package to install."""

    @dataclasses.dataclass
    class LossInputs:
        trainer_logprobs: Tensor
        inference_logprobs: Tensor
        ref_logprobs: Tensor | None
        advantages: Tensor
        loss_mask: Tensor
        loss_weights: Tensor | None = None

    @dataclasses.dataclass
    class LossOutputs:
        loss: Tensor
        metrics: dict[str, Tensor]

    _module("prime_rl.trainer.rl.loss", LossInputs=LossInputs, LossOutputs=LossOutputs)


def tinker() -> Case:
    needs("tinker")
    import tinker as sdk
    from tinker.types import ForwardBackwardOutput

    from bandpo.engines.tinker import band_loss

    def ours(x: Tokens, clip: Any, args: Any, how_much: str = "brief") -> tuple[Tensor, dict[str, Any]]:
        data = [_datum(sdk, *row) for row in x.rows()]
        outputs = [
            {"logprobs": sdk.TensorData(data=new.tolist(), dtype="float32", shape=[len(new)])} for new in x.new()
        ]
        forward = ForwardBackwardOutput(loss_fn_output_type="x", loss_fn_outputs=outputs, metrics={})
        sent = sdk.TrainingClient._compute_custom_loss(data, band_loss(clip, args, None, how_much), forward)
        # the service computes sum(-logprobs * weights) with the weights that the client sends
        weights = torch.stack([d.loss_fn_inputs["weights"].to_torch() for d in sent.data])
        linear = -(x.new() * weights.detach()).sum()
        return linear - linear.detach() + sent.loss_sum, sent.metrics

    return Case(ours, written_sum, whole=True)


def _datum(sdk: Any, new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Any:
    inputs = {"target_tokens": torch.zeros(len(new), dtype=torch.int64), "logprobs": old, "advantages": advantages}
    inputs["mask"] = mask
    return sdk.Datum(
        model_input=sdk.ModelInput.from_ints([0] * len(new)),
        loss_fn_inputs={key: sdk.TensorData.from_torch(value.detach()) for key, value in inputs.items()},
    )


def slime() -> Case:
    if "slime" not in sys.modules and importlib.util.find_spec("slime") is None:
        _record_slime()
    from slime.backends.megatron_utils import loss as host

    from bandpo.engines.slime import band_loss

    def own(x: Tokens, low: float, high: float) -> Tensor:
        return call_slime(x, host.policy_loss_function, eps_clip=low, eps_clip_high=high)[0]

    def ours(x: Tokens, clip: Any, args: Any, how_much: str = "brief") -> tuple[Tensor, dict[str, Any]]:
        loss, metrics = call_slime(x, band_loss, clip=clip, clip_args=args, clip_metrics=how_much)
        return loss, {name: value / x.mask.sum() for name, value in metrics.items()}  # as slime does when it logs

    return Case(ours, own, inert=False, clipped="pg_clipfrac")


def slime_args(**options: Any) -> types.SimpleNamespace:
    defaults = {"advantage_estimator": "grpo", "eps_clip": 0.2, "eps_clip_high": 0.2, "eps_clip_c": None}
    return types.SimpleNamespace(**(defaults | {"use_rollout_logprobs": False, "use_tis": False} | options))


def call_slime(x: Tokens, function: Any, batch: dict[str, Any] | None = None, **options: Any) -> Any:
    """slime's lists hold the tokens of each answer, of which the loss mask may leave some out."""
    rows = {"log_probs": x.old, "rollout_log_probs": x.old - 0.1, "advantages": x.advantages, "loss_masks": x.mask}
    given = {name: list(row) for name, row in rows.items()} | (batch or {})
    return function(slime_args(**options), given, x.new().flatten(), lambda each: (each * x.mask.flatten()).sum())


def _record_slime() -> None:
    import slime_loss

    _module("slime.backends.megatron_utils")
    sys.modules["slime.backends.megatron_utils.loss"] = slime_loss
    sys.modules["slime.backends.megatron_utils"].loss = slime_loss  # type: ignore[attr-defined]


def _module(name: str, **content: Any) -> None:
    """Put a module of that name, with its packages, where import finds it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        path = ".".join(parts[:i])
        module = sys.modules.setdefault(path, types.ModuleType(path))
        module.__dict__.setdefault("__path__", [])
        if i > 1:
            setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
    vars(sys.modules[name]).update(content)


CASES = {f.__name__: f for f in (torchrl_ppo, torchrl_grpo, rllib, skyrl, prime_rl, tinker, slime)}
