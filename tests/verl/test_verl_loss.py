"""The verl engine's loss against verl's own losses, its metrics over micro-batches and ranks, and what it refuses."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from hydra.errors import InstantiationException
from loss_support import AGGREGATIONS, OFF, actor, make_batch, run, share, through_hydra
from omegaconf import OmegaConf
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.metric import Metric, reduce_metrics
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import bandpo
import bandpo.engines.verl as engine
from bandpo import Band, Fixed, InputError, Sides, doctor
from bandpo.engines._adapter import shares
from bandpo.engines.verl import LOSS_MODE, METRICS, TARGET, BandLossConfig, check_seam

Tensor = torch.Tensor


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_gradient_is_that_of_verls_dppo(divergence, aggregation, weighted):
    """DPPO masks what Band clips; verl has it as a loss of its own. The values differ, the gradients may not."""
    batch, delta = make_batch(), {"tv": 0.07, "kl": 0.05}[divergence]
    more = {"loss_agg_mode": aggregation, "rollout_is_weights": torch.rand(64, 32).double() + 0.5 if weighted else None}
    clip = BandLossConfig(clip_args={"divergence": divergence, "delta": delta})
    _, got, metrics = run(LOSS_MODE, actor(clip), batch, **more)
    dppo = actor(clip_ratio=delta, clip_ratio_low=delta, clip_ratio_high=delta, clip_ratio_c=OFF)
    _, want, theirs = run(f"dppo_{divergence}", dppo, batch, **more)
    assert (got - want).abs().max() < 1e-12 * want.abs().max()
    # DPPO also counts tokens whose advantage is 0; there are none here.
    assert metrics["actor/pg_clipfrac"] == theirs["actor/pg_clipfrac"] > 0.1
    assert share(metrics) == pytest.approx(theirs["actor/pg_clipfrac"], rel=1e-6)
    assert metrics["actor/clip/tokens_sum"] == batch["response_mask"].sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_fixed_clip_is_verls_own(aggregation, weighted):
    batch = make_batch()
    more = {"loss_agg_mode": aggregation, "rollout_is_weights": torch.rand(64, 32).double() + 0.5 if weighted else None}
    clip = BandLossConfig(clip="fixed", clip_args={"eps_low": 0.25, "eps_high": 0.5}, dual_clip=3)
    loss, grad, metrics = run(LOSS_MODE, actor(clip), batch, **more)
    vanilla = actor(clip_ratio_low=0.25, clip_ratio_high=0.5, clip_ratio_c=3.0)
    want_loss, want_grad, want = run("vanilla", vanilla, batch, **more)
    torch.testing.assert_close(loss, want_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-12, atol=1e-16)
    assert {key: metrics[key] for key in want} == pytest.approx(want, rel=1e-12)
    assert want["actor/pg_clipfrac_lower"] > 0
    both = want["actor/pg_clipfrac"] + want["actor/pg_clipfrac_lower"]  # verl counts the dual clip apart
    assert share(metrics) == pytest.approx(both, rel=1e-6)


def test_entropy_kl_and_weights_are_added_as_verl_does():
    """verl's whole actor loss, from the model's output to the scalar, with the same clip by either way."""
    torch.manual_seed(0)
    rows, prompt, width = 6, 3, 8
    lengths = torch.randint(2, width + 1, (rows,))
    mask = (torch.arange(width) < lengths[:, None]).long()
    old = -3 * torch.rand(rows, width)
    tensors = {
        "prompts": torch.ones(rows, prompt).long(), "responses": torch.ones(rows, width).long(), "response_mask": mask,
        "attention_mask": torch.cat([torch.ones(rows, prompt).long(), mask], 1), "old_log_probs": old,
        "advantages": torch.randn(rows, width), "ref_log_prob": old - 0.3,
        "rollout_is_weights": torch.rand(rows, width),
    }  # fmt: skip
    data = tensordict_utils.get_tensordict(
        tensors, {"dp_size": 2, "batch_num_tokens": 100, "global_batch_size": 20, "max_response_len": width}
    )
    count = int(lengths.sum()) + rows * prompt
    change, entropy = 0.6 * torch.randn(count), torch.rand(count)
    results = []
    clip = BandLossConfig(clip="fixed", clip_args={"eps_low": 0.25, "eps_high": 0.5}, dual_clip=3)
    terms = {"use_kl_loss": True, "kl_loss_coef": 0.1, "entropy_coeff": 0.01, "loss_agg_mode": "seq-mean-token-sum"}
    for config in (actor(clip, **terms), actor(clip_ratio_low=0.25, clip_ratio_high=0.5, **terms)):
        logps = (change - 1.5).requires_grad_()
        loss, metrics = ppo_loss(config, {"log_probs": logps, "entropy": entropy.clone()}, data)
        loss.backward()
        parts = [float(metrics[key].aggregate()) for key in ("actor/pg_loss", "actor/entropy_loss", "kl_loss")]
        results.append((loss.detach(), logps.grad, parts))
    (loss, grad, parts), (want_loss, want_grad, want_parts) = results
    torch.testing.assert_close((loss, grad), (want_loss, want_grad), rtol=1e-6, atol=1e-7)
    assert parts == pytest.approx(want_parts, rel=1e-6) and all(abs(part) > 1e-3 for part in parts)


def test_verls_dual_clip_does_not_cut_into_the_band():
    """Ratio 4 at p = 0.01 is inside the band; verl's default clip_ratio_c = 3 would take its gradient."""
    p = torch.tensor([[0.01]]).log()
    batch = {
        "old_log_prob": p,
        "log_prob": p + 1.386,
        "advantages": -torch.ones(1, 1),
        "response_mask": torch.ones(1, 1),
    }
    for dual_clip, kept in ((None, True), (3, False)):
        _, grad, metrics = run(LOSS_MODE, actor(BandLossConfig(dual_clip=dual_clip)), batch)
        assert bool(grad.abs().sum() > 0) is kept
        assert metrics["actor/clip/zero_grad_above_sum"] == (0 if kept else 1)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_padding_is_inert_whatever_it_holds(aggregation):
    batch, weights = make_batch(8, 16), torch.rand(8, 16).double() + 0.5
    mask, more = batch["response_mask"], {"loss_agg_mode": aggregation}
    clean = run(LOSS_MODE, actor(BandLossConfig()), batch, rollout_is_weights=weights, **more)
    for bad in (float("nan"), float("inf"), -float("inf")):
        dirty = {key: x if x is mask else x.masked_fill(~mask, bad) for key, x in batch.items()}
        got = run(LOSS_MODE, actor(BandLossConfig()), dirty, rollout_is_weights=weights.masked_fill(~mask, bad), **more)
        assert got[2] == clean[2] and torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])
        assert got[1][~mask].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_and_impossible_tokens_stay_finite(dtype):
    old = torch.tensor([[-1e-9, 0.0, -80.0, -3e4, -0.5, -5.0]], dtype=dtype)
    batch = {"old_log_prob": old, "log_prob": old - 0.5, "response_mask": torch.ones(1, 6)}
    for sign in (1.0, -1.0):
        for clip in ("band", "sapo", "dppo_kl", "gspo"):
            loss, grad, metrics = run(
                LOSS_MODE, actor(BandLossConfig(clip=clip)), batch | {"advantages": torch.full((1, 6), sign)}
            )
            assert loss.isfinite() and grad.isfinite().all() and metrics["actor/clip/tokens_sum"] == 6


def test_shares_are_right_over_unequal_micro_batches_ranks_and_updates():
    """Two updates of three micro-batches on two ranks, joined by verl's own code."""
    args = {"divergence": "tv", "delta": 0.05}
    clip, parts, logged = BandLossConfig(clip_args=args, clip_metrics="full"), [], {}
    for _ in range(2):
        ranks: list[dict[str, Metric]] = []
        for rank in range(2):
            joined: dict[str, Metric] = {}
            for micro in range(3):
                parts.append(make_batch(2 + 3 * micro + rank, 5 + 7 * micro, seed=len(parts)))
                _, _, metrics = run(LOSS_MODE, actor(clip), parts[-1])
                for key, value in Metric.from_dict(metrics, aggregation="mean").items():
                    joined.setdefault(key, value.init_list()).append(value)
            ranks.append(joined)
        for key in ranks[0]:
            logged.setdefault(key, []).append(Metric.aggregate_dp([rank[key] for rank in ranks]))
    logged = reduce_metrics(logged)
    old, new, adv, mask = (torch.cat([b[key].flatten() for b in parts]) for key in parts[0])
    p, q = old.exp(), new.exp()
    found = shares({key.removeprefix(METRICS): value for key, value in logged.items()})
    for name, taken in (("above", (q - p > 0.05) & (adv > 0)), ("below", (p - q > 0.05) & (adv < 0))):
        for place, inside in (
            ("", p > 0),
            ("/p0.1-0.5", (p > 0.1) & (p <= 0.5)),
            ("/neg/p0.9-1", (adv < 0) & (p > 0.9)),
        ):
            want = (taken & inside & mask).sum() / (inside & mask).sum()
            assert found[f"zero_grad_{name}{place}"] == pytest.approx(float(want), rel=1e-5)
            assert want > 0.02 or (name, place) == ("above", "/neg/p0.9-1")
    # and all the rest as of one large batch, but the maxima, which no average holds
    stats = bandpo.clip_stats(new, old, adv, mask, clip=Band(**args)).metrics()
    stats = {name: float(x) for name, x in stats.items() if "_max" not in name}
    assert found == pytest.approx(stats, rel=1e-5, abs=1e-7)


def test_configuration_from_verls_command_line():
    made = through_hydra(clip_args={"divergence": "tv", "delta": [0.02, 0.1]}, dual_clip=10, ppo_kl_coef=0.2)
    assert made.made == Band("tv", [0.02, 0.1]) and made.get("dual_clip") == 10 and made["ppo_kl_coef"] == 0.2
    assert through_hydra().made == Band()
    sides = {"high": {"_target_": "bandpo.Band", "delta": 0.1}, "low": {"_target_": "bandpo.Fixed"}}
    made = pickle.loads(pickle.dumps(through_hydra(clip="sides", clip_args=sides)))
    assert made.made == Sides(high=Band(delta=0.1), low=Fixed())
    nested = {"high": {"clip": "band", "delta": [0.05, 0.1]}, "low": {"clip": "fixed", "eps_low": 0.3}}
    assert through_hydra(clip="sides", clip_args=nested).made == Sides(Band(delta=[0.05, 0.1]), Fixed(0.3))
    assert BandLossConfig(clip="sides", clip_args=OmegaConf.create(nested)).made == Sides(
        Band(delta=[0.05, 0.1]), Fixed(0.3)
    )
    assert through_hydra(clip={"_target_": "bandpo.Fixed", "eps_high": 0.3}).made == Fixed(eps_high=0.3)
    assert omega_conf_to_dataclass(OmegaConf.create({"clip_args": {"delta": 0.1}}), BandLossConfig).made == Band(
        delta=0.1
    )


REFUSALS = [
    ({"loss_mode": "vanilla"}, ["loss_mode='vanilla'", "policy_loss.loss_mode=bandpo"]),
    ({"loss_mode": "gspo"}, ["loss_mode='gspo'", "goes round the clip"]),
    ({"loss_mode": "bypass_mode"}, ["loss_mode='bypass_mode'", "goes round the clip"]),
    ({"loss_mode": "bandppo"}, ["did you mean 'bandpo'"]),
    ({"clip": "bend"}, ["clip='bend'", "did you mean 'band'"]),
    ({"clip": 3}, ["clip=3", "must be a name"]),
    ({"clip_args": {"delt": 0.1}}, ["'delt'", "did you mean 'delta'"]),
    ({"clip_args": {"delta": 0.0}}, ["delta=0", "at least 1e-08"]),
    ({"clip_args": {"divergence": "kll"}}, ["kll", "did you mean 'kl'"]),
    ({"clip_args": "delta"}, ["clip_args='delta'", "dict"]),
    ({"clip": "dgpo", "clip_args": {"region": {"clip": "bend"}}}, ["clip='bend'", "did you mean 'band'"]),
    ({"clip": "sides", "clip_args": {"low": "sapo"}}, ["low=Sapo", "must be a region"]),
    ({"dual_clip": 1.0}, ["dual_clip=1.0", "greater than 1"]),
    ({"clip_metrics": "breif"}, ["clip_metrics='breif'", "did you mean 'brief'"]),
    ({"host_loss_mode": "sapo"}, ["host_loss_mode='sapo' with clip='band'", "clip='host'"]),
    ({"clip": "host", "host_loss_mode": "spao"}, ["host_loss_mode='spao'", "did you mean 'sapo'"]),
    ({"clip": "host", "host_loss_mode": "bandpo"}, ["host_loss_mode='bandpo'", "vanilla, "]),
    (
        {"clip": "host", "clip_args": {"delta": 0.1}},
        ["clip_args={'delta': 0.1} with clip='host'", "verl's own settings"],
    ),
    ({"clip": "host", "dual_clip": 3.0}, ["dual_clip=3.0 with clip='host'", "clip_ratio_c"]),
]


@pytest.mark.parametrize(("fields", "words"), REFUSALS)
def test_bad_configuration_is_one_line_there_and_through_hydra(fields, words):
    with pytest.raises(InputError) as caught:
        BandLossConfig(**fields)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
    with pytest.raises(InstantiationException) as wrapped:
        through_hydra(**fields)
    assert str(caught.value).replace("'", "")[:60] in str(wrapped.value).replace("'", "").replace("\\", "")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"policy_loss": PolicyLossConfig(loss_mode=LOSS_MODE)}, ["with PolicyLossConfig", f"_target_={TARGET}"]),
        ({"clip_ratio_high": 0.28}, ["actor.clip_ratio_high=0.28", "left out", "clip=fixed"]),
        ({"clip_ratio": 0.1}, ["actor.clip_ratio=0.1"]),
        ({"clip_ratio_c": 10.0}, ["actor.clip_ratio_c=10.0", "policy_loss.dual_clip"]),
        ({"tau_pos": 2.0}, ["actor.tau_pos=2.0", "clip=sapo", "clip=host"]),
    ],
)
def test_settings_without_effect_are_refused(config, words):
    with pytest.raises(InputError) as caught:
        run(LOSS_MODE, actor(**({"policy_loss": BandLossConfig()} | config)), make_batch(2, 3))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


def test_unknown_keywords_are_not_swallowed():
    with pytest.raises(TypeError, match="brand_new"):
        run(LOSS_MODE, actor(BandLossConfig()), make_batch(2, 3), brand_new=1)


class MovesToHost(TorchDispatchMode):
    """Counts what would wait for a GPU: values read on the host, and shapes that depend on values."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2")
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        picked = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        self.count += picked or name in self.NAMES
        return func(*args, **(kwargs or {}))


class WholeTensors(TorchFunctionMode):
    """Counts the moves of whole tensors, which on a CPU call no operator."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in ("tolist", "cpu", "numpy")
        return func(*args, **(kwargs or {}))


def moves(config: Any, mode: str, batch: dict[str, Tensor]) -> int:
    with MovesToHost() as values, WholeTensors() as whole:
        core_algos.get_policy_loss_fn(mode)(**batch, loss_agg_mode="token-mean", config=config)
    return values.count + whole.count


@pytest.mark.parametrize(
    ("clip", "more"),
    [
        ({}, 1), ({"clip_args": {"divergence": "js"}}, 1), ({"clip": "fixed"}, 1), ({"dual_clip": 10}, 1),
        ({"clip_metrics": "full"}, 1), ({"clip_metrics": "none"}, 0), ({"clip": "sapo"}, 1), ({"clip": "host"}, 1),
    ],
)  # fmt: skip
def test_one_move_to_the_host_more_than_verls_own_loss(clip, more):
    batch = make_batch(4, 8)
    assert 1 <= moves(actor(), "vanilla", batch) == moves(actor(BandLossConfig(**clip)), LOSS_MODE, batch) - more


def test_verl_finds_the_loss_by_its_entry_point():
    """verl loads plug-ins as it is imported, and says nothing where one fails."""
    code = (
        "import verl; from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY as found\n"
        "print(getattr(found.get('bandpo'), '__module__', None))"
    )
    for policy, module in (("auto", "bandpo.engines.verl"), ("none", "None")):
        environment = {**os.environ, "VERL_USE_EXTERNAL_PLUGINS": policy}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.split()[-1:] == [module], done.stderr


def test_says_once_that_it_is_in_use(capsys):
    config = actor(BandLossConfig(clip_args={"delta": 0.02}))
    for _ in range(2):
        run(LOSS_MODE, config, make_batch(2, 3))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "'bandpo' in use" in out and "delta=0.02" in out
    run(LOSS_MODE, actor(BandLossConfig(clip="host", host_loss_mode="gspo")), make_batch(2, 3))
    assert "verl's own 'gspo', measured as Gspo(eps_low=0.2, eps_high=0.2)" in capsys.readouterr().out


def test_seam_fits_and_a_moved_one_is_named(monkeypatch):
    check_seam()
    vanilla = core_algos.compute_policy_loss_vanilla
    found = next(e for e in doctor.examine()["engines"] if e["name"] == "verl")
    assert found["fits"] is True and found["note"] == ""
    assert not any(e["fits"] is False for e in doctor.examine()["engines"])  # Ray is here too, without RLlib

    def renamed(old_logps, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights):
        raise AssertionError

    monkeypatch.setattr(core_algos, "compute_policy_loss_vanilla", renamed)
    with pytest.raises(InputError, match=r"no longer takes old_log_prob.*verl==0\.9\.1"):
        check_seam()

    def scalar(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights):
        return -(advantages * (log_prob - old_log_prob).exp().clamp(0.8, 1.2)).mean(), {}

    monkeypatch.delattr(core_algos, "compute_policy_loss_vanilla")
    with pytest.raises(InputError, match=r"compute_policy_loss_vanilla.*verl==0\.9\.1"):
        check_seam()

    monkeypatch.setattr(core_algos, "compute_policy_loss_vanilla", scalar, raising=False)
    with pytest.raises(InputError, match=r"does not clamp with bounds per token.*verl==0\.9\.1"):
        check_seam()

    def blunt(advantages, **named):
        return vanilla(advantages=advantages.sign(), **named)

    blunt.__signature__ = inspect.signature(vanilla)
    with monkeypatch.context() as patch:
        patch.setattr(core_algos, "compute_policy_loss_vanilla", blunt, raising=False)
        with pytest.raises(InputError, match=r"does not weigh the ratio by advantages.*verl==0\.9\.1"):
            check_seam()
    vanilla = core_algos.compute_policy_loss_vanilla
    found = next(e for e in doctor.examine()["engines"] if e["name"] == "verl")
    assert found["fits"] is False and "does not clamp" in found["note"]

    def broken(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights):
        raise AttributeError("no_such_setting")

    monkeypatch.setattr(core_algos, "compute_policy_loss_vanilla", broken)
    with pytest.raises(InputError, match=r"failed a trial.*no_such_setting.*verl==0\.9\.1"):
        check_seam()


def test_it_is_verls_loss_that_is_called(monkeypatch):
    seen = {}

    def spy(config, **arguments):
        seen.update(config=config, **arguments)
        return vanilla(config=config, **arguments)

    vanilla = core_algos.compute_policy_loss_vanilla
    monkeypatch.setattr(engine.core_algos, "compute_policy_loss_vanilla", spy)
    config, batch = actor(BandLossConfig()), make_batch(2, 3)
    run(LOSS_MODE, config, batch)
    view = seen["config"]
    low, high = 1 - view.clip_ratio_low, 1 + view.clip_ratio_high
    bounds = Band().bounds(batch["old_log_prob"].where(batch["response_mask"], 0.0))
    torch.testing.assert_close((low, high), (bounds.low, bounds.high), rtol=1e-6, atol=1e-6, check_dtype=False)
    assert view.global_batch_info is config.global_batch_info and view.get("tau_pos") == config.tau_pos
    assert not low.requires_grad and view.get("no_such_setting", 5) == 5
