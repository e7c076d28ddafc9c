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

    def flat(self) -> tuple[Tensor, ...]:
        return tuple(x.flatten() for x in (self.new(), self.old, self.advantages, self.mask))

    def rows(self) -> list[tuple[Tensor, ...]]:
        return list(zip(self.new(), self.old, self.advantages, self.mask, strict=True))


@dataclasses.dataclass
class Case:
    """How to call one engine; `own` is None where the engine cannot be installed."""

    ours: Callable[..., tuple[Tensor, dict[str, Any]]]
    own: Callable[[Tokens, float, float], Tensor] | None
    margins: tuple[float, float] = (0.2, 0.28)
    padded: bool = True
    takes_logps: bool = False  # the engine hands the loss log-probabilities of the policy in training, padding too


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

    def run(x: Tokens, kind: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        net = TensorDictModule(torch.nn.Identity(), in_keys=["obs"], out_keys=["logits"])
        actor = ProbabilisticActor(
            net, in_keys=["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
        )
        loss = kind(actor, None, critic_coeff=0.0, entropy_bonus=False, device="cpu", **options)
        loss.set_keys(sample_log_prob="sample_log_prob")
        data = {"obs": x.logits.flatten(0, 1), "action": x.actions.flatten(), "sample_log_prob": x.old.flatten()}
        out = loss(TensorDict(data | {"advantage": x.advantages.flatten()[:, None]}, [x.old.numel()]))
        assert not [name for name in loss.state_dict() if "epsilon" not in name and "coef" not in name]
        return out["loss_objective"], loss.clip_metrics() if kind is BandClipPPOLoss else {}

    return Case(
        lambda x, clip, args: run(x, BandClipPPOLoss, clip=clip, clip_args=args),
        lambda x, low, high: run(x, ClipPPOLoss, clip_epsilon=(low, high))[0],
        padded=False,
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

    def run(x: Tokens, kind: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
        loss = kind(Actor(), entropy_bonus=False, masking_strategy="generic", device="cpu", **options)
        data = {"logits": x.logits, "mask": x.mask.bool(), ("tokens", "full"): x.actions, ("log_probs", "full"): x.old}
        out = loss(TensorDict(data | {"advantage": x.advantages[..., None]}, x.old.shape[:1]))
        return out.loss_objective, loss.clip_metrics() if kind is BandGRPOLoss else {}

    return Case(
        lambda x, clip, args: run(x, BandGRPOLoss, clip=clip, clip_args=args),
        lambda x, low, high: run(x, GRPOLoss, clip_epsilon=(low, high))[0],
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

    def run(x: Tokens, kind: Any, clip_param: Any, clip: Any = None, args: Any = None) -> tuple[Tensor, dict[str, Any]]:
        config = PPOConfig().training(clip_param=clip_param, use_kl_loss=False, use_critic=False, entropy_coeff=0.0)
        learner = object.__new__(kind)
        if clip is not None:
            from bandpo.engines._margins import make_clip

            learner.clip = make_clip(clip, args)
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
        lambda x, clip, args: run(x, BandPPOTorchLearner, 0.3, clip, args),
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
        return loss(x.new(), x.old, x.advantages, config=config, loss_mask=x.mask, rollout_logprobs=None)

    return Case(
        lambda x, clip, args: run(x, BandAlgorithmConfig(clip=clip, clip_args=args)),
        lambda x, low, high: run(x, AlgorithmConfig(eps_clip_low=low, eps_clip_high=high))[0],
        takes_logps=True,
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

    def ours(x: Tokens, clip: Any, args: Any) -> tuple[Tensor, dict[str, Any]]:
        outs = [
            band_loss(LossInputs(new, old, None, adv, mask.bool(), None), clip=clip, clip_args=args)
            for new, old, adv, mask in x.rows()
        ]
        return sum(o.loss for o in outs), outs[0].metrics  # type: ignore[return-value]

    return Case(ours, written_sum, takes_logps=True)


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

    def ours(x: Tokens, clip: Any, args: Any) -> tuple[Tensor, dict[str, Any]]:
        data = [_datum(sdk, *row) for row in x.rows()]
        outputs = [
            {"logprobs": sdk.TensorData(data=new.tolist(), dtype="float32", shape=[len(new)])} for new in x.new()
        ]
        forward = ForwardBackwardOutput(loss_fn_output_type="x", loss_fn_outputs=outputs, metrics={})
        sent = sdk.TrainingClient._compute_custom_loss(data, band_loss(clip, args), forward)
        # the service computes sum(-logprobs * weights) with the weights that the client sends
        weights = torch.stack([d.loss_fn_inputs["weights"].to_torch() for d in sent.data])
        linear = -(x.new() * weights.detach()).sum()
        return linear - linear.detach() + sent.loss_sum, sent.metrics

    return Case(ours, written_sum)


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

    return Case(lambda x, clip, args: call_slime(x, band_loss, clip=clip, clip_args=args), own, padded=False)


def call_slime(x: Tokens, function: Any, **options: Any) -> tuple[Tensor, dict[str, Any]]:
    defaults = {"advantage_estimator": "grpo", "use_rollout_logprobs": False, "eps_clip": 0.2, "eps_clip_high": 0.2}
    keep = x.mask.bool()  # slime's lists hold the tokens of the responses only
    batch = {"log_probs": [r[m] for r, m in zip(x.old, keep, strict=True)]}
    batch |= {"advantages": [r[m] for r, m in zip(x.advantages, keep, strict=True)]}
    return function(types.SimpleNamespace(**(defaults | options)), batch, x.new()[keep], torch.sum)


def _record_slime() -> None:
    """slime's policy loss by its inputs and outputs: it has no package, and the whole of it needs Megatron."""

    def policy_loss_function(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Any) -> Any:
        old_log_probs, log_probs = torch.cat(batch["log_probs"]), logits
        ppo_kl = old_log_probs - log_probs
        advantages = torch.cat(batch["advantages"])
        pg_loss, clipped = compute_policy_loss(ppo_kl, advantages, args.eps_clip, args.eps_clip_high)
        return sum_of_sample_mean(pg_loss), {"pg_clipfrac": sum_of_sample_mean(clipped).detach()}

    def compute_policy_loss(ppo_kl: Tensor, advantages: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
        ratio = (-ppo_kl).exp()
        clipped = -ratio.clamp(1 - low, 1 + high) * advantages
        return torch.maximum(-ratio * advantages, clipped), torch.gt(clipped, -ratio * advantages).float()

    _module("slime.backends.megatron_utils.loss", policy_loss_function=policy_loss_function)


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
