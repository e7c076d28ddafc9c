"""torchrl's losses under our clips: its margins, masks, normalisation, several heads, densities, and refusals."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torchrl", reason="torchrl is not installed: see docs/engines.md")
pytestmark = pytest.mark.filterwarnings("ignore")  # of torchrl and tensordict

import torch  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from tensordict.nn import (  # noqa: E402
    CompositeDistribution,
    TensorDictModule,
    TensorDictSequential,
    set_composite_lp_aggregate,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type  # noqa: E402
from torchrl.modules import ProbabilisticActor, TanhNormal  # noqa: E402
from torchrl.objectives import ClipPPOLoss  # noqa: E402

import bandpo  # noqa: E402
from bandpo.engines.torchrl import BandClipPPOLoss, BandGRPOLoss  # noqa: E402

Tensor = torch.Tensor
PLAIN: dict[str, Any] = {"critic_coeff": 0.0, "entropy_bonus": False, "device": "cpu"}


@torch.no_grad()
def act(actor: Any, batch: Any) -> Any:
    with set_exploration_type(ExplorationType.RANDOM):
        return actor(batch)


def discrete(n: int = 64) -> tuple[Any, Any]:
    """An actor with three actions, and what it did in n states some time ago."""
    torch.manual_seed(0)
    net = TensorDictModule(torch.nn.Linear(3, 3), ["obs"], ["logits"])
    actor = ProbabilisticActor(
        net, ["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )
    batch = act(actor, TensorDict({"obs": torch.randn(n, 3), "advantage": torch.randn(n, 1)}, [n]))
    batch["action_log_prob"] = (batch["action_log_prob"] + 0.5 * torch.randn(n)).clamp(max=-0.01)
    return actor, batch


def make(actor: Any, **options: Any) -> Any:
    return BandClipPPOLoss(actor, None, **(PLAIN | options))


def gradient(actor: Any, value: Tensor) -> Tensor:
    grads = torch.autograd.grad(value, list(actor.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in grads])


def objective(actor: Any, batch: Any, clip: Any, advantages: Tensor, weight: float | Tensor = 1.0) -> Tensor:
    """-c log pi of each action, with c by the clip itself."""
    new = actor.get_dist(batch).log_prob(batch["action"])
    c = bandpo.get_clip(clip).coefficient(bandpo.Tokens(new, batch["action_log_prob"], advantages))
    return -(weight * c * new)


def check(actor: Any, out: Any, want: Tensor) -> None:
    got = gradient(actor, out["loss_objective"])
    torch.testing.assert_close(got, gradient(actor, want), rtol=1e-4, atol=1e-6)
    assert got.abs().max() > 1e-3


# -------------------------------------------------------------------------------- margins that torchrl's users anneal


@pytest.mark.parametrize("clip_args", [{"eps_low": 0.2, "eps_high": 0.2}, {"eps_low": 0.2, "eps_high": 0.28}])
def test_fixed_margins_are_torchrls_buffers_and_can_be_annealed(clip_args: dict[str, float]) -> None:
    actor, batch = discrete()
    pair = clip_args["eps_high"] != 0.2
    own = ClipPPOLoss(actor, None, clip_epsilon=(0.2, 0.28) if pair else 0.2, **PLAIN)
    ours = make(actor, clip="fixed", clip_args=clip_args)
    names = ["clip_epsilon_low", "clip_epsilon_high"] if pair else ["clip_epsilon"]
    assert list(own.state_dict()) == list(ours.state_dict()) and set(names) <= set(ours.state_dict())
    shares = []
    for margin in (None, 0.1, 0.05):
        for loss in (own, ours):
            for name in names if margin else ():
                if margin == 0.1:
                    getattr(loss, name).copy_(torch.tensor(margin))
                else:
                    setattr(loss, name, margin)
        one, other = own(batch), ours(batch)
        for key in ("loss_objective", "clip_fraction"):
            torch.testing.assert_close(other[key], one[key])
        torch.testing.assert_close(gradient(actor, other["loss_objective"]), gradient(actor, one["loss_objective"]))
        shares.append(float(ours.clip_metrics()["clip/zero_grad"]))
        now = ours.clip.eps_low, ours.clip.eps_high
        assert now == pytest.approx((margin, margin) if margin else tuple(clip_args.values()))
    assert shares[0] < shares[1] < shares[2], "the metrics follow the margins"
    with pytest.raises(AttributeError, match=f"this loss has {', '.join(names)}, because of its clip Fixed"):
        setattr(ours, "clip_epsilon" if pair else "clip_epsilon_low", torch.tensor(0.1))


def test_a_fixed_clip_without_a_lower_bound() -> None:
    actor, batch = discrete()
    loss = make(actor, clip="fixed", clip_args={"eps_low": 1.0, "eps_high": 0.2})
    assert (float(loss.clip_epsilon_low), float(loss.clip_epsilon_high)) == (1.0, pytest.approx(0.2))
    check(actor, loss(batch), objective(actor, batch, bandpo.Fixed(1.0, 0.2), batch["advantage"][:, 0]).mean())


@pytest.mark.parametrize("clip", ["band", "sapo", "none", "sides"])
def test_other_clips_have_no_margins_and_say_so(clip: str) -> None:
    actor, _ = discrete()
    ppo = make(actor, clip=clip)
    grpo = BandGRPOLoss(torch.nn.Linear(1, 1), clip=clip)
    for loss, name in ((ppo, "clip_epsilon"), (grpo, "clip_epsilon_low"), (grpo, "clip_epsilon_high")):
        assert not hasattr(loss, name) and not [key for key in loss.state_dict() if "epsilon" in key]
        for use in (lambda: getattr(loss, name).copy_(0.1), lambda: setattr(loss, name, 0.1)):  # noqa: B023
            with pytest.raises(AttributeError) as caught:
                use()
            assert str(caught.value).startswith(f"{name}: clip={clip!r} has no margins of torchrl's; give clip='fixed'")
            assert "\n" not in str(caught.value)


def test_a_bands_radius_is_annealed_as_a_tensor() -> None:
    actor, batch = discrete()
    radius = torch.tensor(0.05)
    loss = make(actor, clip_args={"delta": radius})
    loss(batch)
    wide = loss.clip_metrics()["clip/zero_grad"]
    radius.fill_(0.005)
    check(actor, loss(batch), objective(actor, batch, bandpo.Band(delta=0.005), batch["advantage"][:, 0]).mean())
    assert loss.clip_metrics()["clip/zero_grad"] > wide


def test_margins_of_grpo_are_annealed_too() -> None:
    loss = BandGRPOLoss(torch.nn.Linear(1, 1), clip="clip_higher")
    assert loss.clip.eps_high == pytest.approx(0.28) and type(loss.clip) is type(bandpo.get_clip("clip_higher"))
    loss.clip_epsilon_high.copy_(torch.tensor(0.1))
    torch.testing.assert_close(loss._clip_bounds, (torch.tensor(-0.2).log1p(), torch.tensor(0.1).log1p()))
    assert loss.clip.eps_high == pytest.approx(0.1)


# ----------------------------------------------------------------------- what torchrl does around the clip is kept


@pytest.mark.parametrize("clip", ["band", "sapo", "dgpo", "dual_clip"])
def test_advantages_are_normalised_before_the_clip(clip: str) -> None:
    actor, batch = discrete()
    loss = make(actor, clip=clip, normalize_advantage=True)
    before = batch.clone()
    out = loss(batch)
    assert all(torch.equal(batch[key], before[key]) for key in before.keys()), "the batch stays as it is"
    advantages = batch["advantage"][:, 0]
    advantages = (advantages - advantages.mean()) / advantages.std()
    check(actor, out, objective(actor, batch, clip, advantages).mean())


@pytest.mark.parametrize("clip", ["band", "sapo", "cispo"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torchrls_masks_and_reductions_hold(clip: str, reduction: str) -> None:
    actor, batch = discrete()
    mask = torch.rand(64) < 0.6
    batch["shifted_valid"] = mask[:, None]
    loss = make(actor, clip=clip, reduction=reduction)
    out = loss(batch)
    each = torch.where(mask, objective(actor, batch, clip, batch["advantage"][:, 0]), 0.0)
    want = each.sum() / mask.sum() if reduction == "mean" else each.sum()
    out["loss_objective"] = out["loss_objective"].sum()
    check(actor, out, want)
    kept = batch[mask]
    new = actor.get_dist(kept).log_prob(kept["action"])
    stats = bandpo.clip_stats(new, kept["action_log_prob"], kept["advantage"][:, 0], clip=clip).metrics("clip/")
    for name, value in loss.clip_metrics().items():
        torch.testing.assert_close(value, stats[name])
    if clip != "band":
        torch.testing.assert_close(out["clip_fraction"], stats["clip/zero_grad"])


@pytest.mark.parametrize("clip", ["band", "sapo", "cispo"])
def test_a_proximal_policy_and_its_weights(clip: str) -> None:
    """With delay_actor torchrl divides by another policy than the one that acted, and weighs by the two."""
    actor, batch = discrete()
    loss = make(actor, clip=clip, delay_actor=True)
    out = loss(batch)
    with torch.no_grad():
        proximal = actor.get_dist(batch).log_prob(batch["action"])  # not trained yet: equal to the current one
    weight = torch.exp(proximal - batch["action_log_prob"])
    batch["action_log_prob"] = proximal
    check(actor, out, objective(actor, batch, clip, batch["advantage"][:, 0], weight).mean())


def test_the_value_function_sees_neither_c_nor_r() -> None:
    actor, batch = discrete()
    critic = TensorDictModule(torch.nn.Linear(3, 1), ["obs"], ["state_value"])
    batch["value_target"] = torch.randn(64, 1)
    own = ClipPPOLoss(actor, critic, device="cpu")(batch)
    ours = BandClipPPOLoss(actor, critic, device="cpu", clip="sapo")(batch)
    for key in ("loss_critic", "loss_entropy", "entropy", "kl_approx", "ESS", "max_ratio", "mean_ratio"):
        torch.testing.assert_close(ours[key], own[key])


def test_keyword_calls_reach_the_clip() -> None:
    actor, batch = discrete()
    loss = make(actor, clip="sapo")
    loss.select_out_keys("loss_objective", "clip_fraction")
    loss.in_keys = ["obs", "action", "action_log_prob", "advantage"]
    value, share = loss(**{key: batch[key] for key in loss.in_keys})
    want = loss(batch)
    torch.testing.assert_close((value, share), (want["loss_objective"], want["clip_fraction"]))


def test_a_loss_that_goes_round_the_clip_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    actor, batch = discrete()
    loss = make(actor, clip="sapo")
    monkeypatch.setattr(ClipPPOLoss, "forward", lambda self, td: TensorDict({"loss_objective": torch.zeros(())}))
    with pytest.raises(ValueError, match="its PPO loss went round the clip; must be torchrl>=0.14.1"):
        loss(batch)


# ------------------------------------------------------------------------------------------- densities, several heads


def continuous(kind: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    net = TensorDictModule(torch.nn.Linear(2, 2), ["x"], ["loc"])
    wide = TensorDictModule(lambda loc: (loc, torch.ones_like(loc)), ["loc"], ["loc", "scale"])
    actor = ProbabilisticActor(
        TensorDictSequential(net, wide), ["loc", "scale"], distribution_class=kind, return_log_prob=True
    )
    batch = act(actor, TensorDict({"x": torch.randn(16, 2), "advantage": torch.randn(16, 1)}, [16]))
    batch["action_log_prob"] = batch["action_log_prob"] + 0.3
    return actor, batch


def independent(loc: Tensor, scale: Tensor) -> Any:
    return torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)


@pytest.mark.parametrize("kind", [TanhNormal, independent])
@pytest.mark.parametrize("clip", ["fixed", "clip_higher", "none", "sapo", "cispo", "dgpo", "dual_clip"])
def test_clips_that_use_no_probability_take_densities(kind: Any, clip: str) -> None:
    """TanhNormal raises a TypeError when it is asked for its support."""
    actor, batch = continuous(kind)
    loss = make(actor, clip=clip)
    check(actor, loss(batch), objective(actor, batch, clip, batch["advantage"][:, 0]).mean())


@pytest.mark.parametrize("kind", [TanhNormal, independent])
@pytest.mark.parametrize("clip", ["band", "dppo_tv", "sides"])
def test_the_others_refuse_a_density(kind: Any, clip: str) -> None:
    actor, batch = continuous(kind)
    with pytest.raises(ValueError, match=f"a density is no probability, and clip '{clip}' needs one.*clip='fixed'"):
        make(actor, clip=clip)(batch)


HEADS = {"a": torch.distributions.Categorical, "b": torch.distributions.Categorical}


def heads(kinds: dict[str, Any]) -> tuple[Any, Any]:
    """An actor with an action of one or two parts, and what it did in eight states."""
    torch.manual_seed(0)
    names = list(kinds)
    split = TensorDictModule(
        lambda h: tuple(h * (-1) ** i for i in range(len(names))), ["h"], [("params", name, "logits") for name in names]
    )
    actor = ProbabilisticActor(
        TensorDictSequential(TensorDictModule(torch.nn.Linear(3, 3), ["obs"], ["h"]), split),
        in_keys=["params"],
        out_keys=names,
        distribution_class=CompositeDistribution,
        distribution_kwargs={"distribution_map": kinds},
        return_log_prob=True,
    )
    batch = act(actor, TensorDict({"obs": torch.randn(8, 3), "advantage": torch.randn(8, 1)}, [8]))
    for name in [key for key in batch.keys() if key.endswith("log_prob")]:
        batch[name] = batch[name] - 0.2 * torch.rand(8)
    return actor, batch


@pytest.mark.parametrize("aggregate", [True, False])
@pytest.mark.parametrize("kinds", [HEADS, {"a": HEADS["a"]}])
@pytest.mark.parametrize("clip", ["fixed", "band", "sapo"])
def test_the_heads_of_an_action_are_one_action(aggregate: bool, kinds: dict[str, Any], clip: str) -> None:
    """torchrl sums the log-probabilities of the heads: the clip's p and r are those of the whole action."""
    with set_composite_lp_aggregate(aggregate):
        actor, batch = heads(kinds)
        keys: dict[str, Any] = {"action": list(kinds)}
        if not aggregate:
            keys["sample_log_prob"] = [f"{name}_log_prob" for name in kinds]
        loss = make(actor, clip=clip)
        own = ClipPPOLoss(actor, None, **PLAIN)
        for each in (loss, own):
            each.set_keys(**keys)
        out = loss(batch)
        if clip == "fixed":
            torch.testing.assert_close(out["loss_objective"], own(batch)["loss_objective"])
    parts = ["sample_log_prob"] if aggregate else keys["sample_log_prob"]
    made = actor.module[0](batch.select("obs"))
    new = sum(kind(logits=made["params", name, "logits"]).log_prob(batch[name]) for name, kind in kinds.items())
    old = sum(batch[key] for key in parts)
    c = bandpo.get_clip(clip).coefficient(bandpo.Tokens(new, old, batch["advantage"][:, 0]))
    check(actor, out, -(c * new).mean())


def test_a_density_among_the_heads_is_one() -> None:
    from bandpo.engines.torchrl import _is_discrete

    parts = {"a": {"logits": torch.zeros(2, 3)}, "b": {"loc": torch.zeros(2), "scale": torch.ones(2)}}
    kinds = {"a": HEADS["a"], "b": torch.distributions.Normal}
    assert not _is_discrete(CompositeDistribution(TensorDict(parts, [2]), distribution_map=kinds))
    del parts["b"]
    assert _is_discrete(CompositeDistribution(TensorDict(parts, [2]), distribution_map={"a": kinds["a"]}))


def test_log_probabilities_that_are_not_one_for_each_action_are_refused() -> None:
    actor, batch = continuous(torch.distributions.Normal)  # one for each of two coordinates
    batch["action_log_prob"] = batch["action_log_prob"].sum(-1, keepdim=True)
    with pytest.raises(
        ValueError, match=r"sample_log_prob has shape \(16, 1\) and the actor's \(16, 2\): both must be"
    ):
        make(actor, clip="none")(batch)
    actor, batch = discrete()
    batch["advantage"] = batch["advantage"][:, 0]
    with pytest.raises(ValueError, match=r"advantage has shape \(64,\): must be one for each ratio, \(64, 1\)"):
        make(actor, clip="sapo")(batch)
    batch["advantage"] = torch.randn(64, 2)  # two objectives: torchrl gives each a gain, and so two bounds do
    assert torch.isfinite(make(actor, clip="band")(batch)["loss_objective"])
    with pytest.raises(ValueError, match=r"advantage has shape \(64, 2\): must be one for each ratio, \(64, 1\)"):
        make(actor, clip="sapo")(batch)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_options_that_would_go_round_the_clip_are_refused() -> None:
    actor, _ = discrete()
    for kind in (BandClipPPOLoss, BandGRPOLoss):
        with pytest.raises(ValueError, match="clip_epsilon: must be left out, clip sets the bounds.*eps_low"):
            kind(actor, clip_epsilon=0.2)
    for clip in ("band", "clip_higher"):
        with pytest.raises(ValueError, match="clip_value=True: would take clip_epsilon, one number, .*give a number"):
            BandClipPPOLoss(actor, clip=clip, clip_value=True)
    assert float(BandClipPPOLoss(actor, clip="fixed", clip_value=True).clip_value) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="max_importance_ratio=5.0 with clip='sapo': must be left out, it caps"):
        BandClipPPOLoss(actor, clip="sapo", max_importance_ratio=5.0)
    BandClipPPOLoss(actor, clip="band", max_importance_ratio=5.0)
    with pytest.raises(ValueError, match="kl_mask_threshold=0.1 with clip='gspo': must be left out, it acts on single"):
        BandGRPOLoss(actor, clip="gspo", kl_mask_threshold=0.1)
    loss = make(actor)
    with pytest.raises(ValueError, match="call the loss first"):
        loss.clip_metrics()
    with pytest.raises(ValueError, match="clip_metrics='all': must be one of brief, full, none"):
        loss.clip_metrics(how_much="all")
