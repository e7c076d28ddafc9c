"""Every kind of clip through verl: by its own formula, and equal to verl's own where verl has it; and `host`."""

from __future__ import annotations

import dataclasses
import pickle
import sys
from typing import Any

import pytest
import torch
from loss_support import AGGREGATIONS, actor, make_batch, run, share
from verl.trainer.ppo import core_algos
from verl.utils.metric import reduce_metrics
from verl.workers.config.actor import PolicyLossConfig

import bandpo
from bandpo import Fixed, InputError, Tokens, get_clip
from bandpo.clips.dual_clip import Dual, DualClip
from bandpo.engines.verl import LOSS_MODE, METRICS, BandLossConfig, clip_of

Tensor = torch.Tensor


class Half:
    """A user's clip: nothing is known of it but c."""

    def coefficient(self, tokens):
        return tokens.weighted / 2 * (tokens.rise < 1)


class Needy(Half):
    needs = ("rollout_logps", "entropies")


KINDS: list[tuple[Any, dict[str, Any] | None, float | None]] = [
    ("sapo", None, None),
    ("sapo", None, 1.2),
    ("cispo", None, None),
    ("dppo_tv", {"delta": 0.07}, None),
    ("dppo_kl", None, None),
    ("gspo", {"eps_low": 0.02, "eps_high": 0.02}, None),
    ("dgpo", None, None),
    ("dgpo", {"region": {"clip": "band", "divergence": "tv"}}, None),
    ("dual_clip", {"cap": 1.5}, None),
    (Half(), None, None),
    (Half(), None, 1.2),
]


def weights(batch: dict[str, Tensor]) -> Tensor:
    return torch.rand(batch["log_prob"].shape, generator=torch.Generator().manual_seed(1)).double() + 0.5


def by_formula(
    clip: Any, config: Any, batch: dict[str, Tensor], aggregation: str, each: Tensor
) -> tuple[Tensor, Tensor]:
    """c of each token, and its negative under verl's normaliser."""
    t = Tokens(*(batch[key] for key in ("log_prob", "old_log_prob", "advantages", "response_mask")))
    c = clip.coefficient(t)
    logps = batch["log_prob"].clone().requires_grad_()
    core_algos.agg_loss(-c * each * logps, batch["response_mask"], aggregation, **config.global_batch_info).backward()
    return c, logps.grad


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(("clip", "clip_args", "dual_clip"), KINDS)
def test_the_gradient_is_the_coefficient(clip, clip_args, dual_clip, aggregation):
    batch, made = make_batch(16, 24), get_clip(clip, **(clip_args or {}))
    made = made if dual_clip is None else Dual(made, dual_clip)
    config = actor(BandLossConfig(clip=clip, clip_args=clip_args, dual_clip=dual_clip))
    for each in (None, weights(batch)):
        _, got, metrics = run(LOSS_MODE, config, batch, loss_agg_mode=aggregation, rollout_is_weights=each)
        c, want = by_formula(made, config, batch, aggregation, torch.ones(16, 24) if each is None else each)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
    token = batch["response_mask"]
    shut = float((c[token] == 0).float().mean())
    assert metrics["actor/pg_clipfrac"] == pytest.approx(shut) == share(metrics), "the share without a gradient"
    assert "actor/pg_clipfrac_lower" not in metrics and metrics["actor/ppo_kl"] != 0
    assert shut > 0.01 or made.name in ("sapo", "cispo", "dgpo")


@pytest.mark.parametrize("clip", bandpo.list_clips())
def test_every_clip_of_the_registry_goes_in_or_is_refused(clip):
    made = get_clip(clip)
    if made.needs:
        with pytest.raises(InputError, match=f"clip='{clip}': needs .*, which verl does not hand over"):
            BandLossConfig(clip=clip)
        return
    batch, config = make_batch(16, 24), actor(BandLossConfig(clip=clip))
    _, got, metrics = run(LOSS_MODE, config, batch, loss_agg_mode="seq-mean-token-sum")
    c, want = by_formula(made, config, batch, "seq-mean-token-sum", torch.ones(16, 24))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-15)
    shut = float((c[batch["response_mask"]] == 0).float().mean())
    assert metrics["actor/pg_clipfrac"] == pytest.approx(shut, abs=1e-6) == share(metrics)
    _, again, metrics = run(LOSS_MODE, actor(BandLossConfig(clip=clip, clip_metrics="none")), batch)
    assert metrics["actor/pg_clipfrac"] == pytest.approx(shut, abs=1e-6) and len(metrics) <= 3


OWN: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    # verl's margins are radii here, and what it calls dual clip caps the weight: at 3 unless told otherwise
    ("dppo_tv", {"delta": 0.07, "cap": 3.0}, {"clip_ratio_low": 0.07, "clip_ratio_high": 0.07}),
    (
        "dppo_tv",
        {"delta": (0.04, 0.1), "cap": 1.5},
        {"clip_ratio_low": 0.04, "clip_ratio_high": 0.1, "clip_ratio_c": 1.5},
    ),
    ("dppo_kl", {"delta": (0.02, 0.05)}, {"clip_ratio_low": 0.02, "clip_ratio_high": 0.05, "clip_ratio_c": 20.0}),
    ("cispo", {"eps_low": 0.2, "eps_high": 0.3}, {"clip_ratio_high": 0.3}),
    ("cispo", {"eps_low": 1.0, "eps_high": 4.0}, {"clip_ratio_low": 10.0, "clip_ratio_high": 4.0}),
    ("gspo", {"eps_low": 0.02, "eps_high": 0.03}, {"clip_ratio_low": 0.02, "clip_ratio_high": 0.03}),
    ("sapo", {}, {}),
    ("sapo", {"tau_pos": 2.0, "tau_neg": 3.0}, {"tau_pos": 2.0, "tau_neg": 3.0}),
    ("dro", {"beta": 0.3}, {"dro_beta": 0.3}),
    ("kl_cov", {"fraction": 0.02, "beta": 0.5}, {"kl_cov_ratio": 0.02, "ppo_kl_coef": 0.5}),
    ("geo_mean", {"eps_low": 0.2, "eps_high": 0.3}, {"clip_ratio_high": 0.3}),
]
FIXED_AVERAGE = ("sapo", "geo_mean")  # in verl these average by seq-mean-token-mean, whatever is asked for


@pytest.mark.parametrize(("mode", "clip_args", "settings"), OWN)
def test_the_gradient_is_that_of_verls_own_loss(mode, clip_args, settings):
    clip, names = {"geo_mean": "gmpo"}.get(mode, mode), {f.name for f in dataclasses.fields(PolicyLossConfig)}
    loss = PolicyLossConfig(loss_mode=mode, **{key: x for key, x in settings.items() if key in names})
    own = actor(loss, **{key: x for key, x in settings.items() if key not in names})
    assert clip_of(own) == get_clip(clip, **clip_args)
    batch, ours = make_batch(), actor(BandLossConfig(clip=clip, clip_args=clip_args))
    for config in (own, ours) if mode == "geo_mean" else ():  # verl's divides by the rows that it is given
        config.global_batch_info.update(dp_size=1, global_batch_size=len(batch["log_prob"]))
    for aggregation in ["seq-mean-token-mean"] if mode in FIXED_AVERAGE else AGGREGATIONS:
        each = None if mode == "geo_mean" else weights(batch)  # it takes the mean of the weights' logarithms
        more = {"loss_agg_mode": aggregation, "rollout_is_weights": each}
        _, got, metrics = run(LOSS_MODE, ours, batch, **more)
        _, want, theirs = run(mode, own, batch, **more)
        assert (got - want).abs().max() < 1e-6 * want.abs().max()  # verl's dppo_kl adds 1e-8 to 1 - p
        if mode in ("dppo_tv", "dppo_kl", "gspo"):  # the others lose no gradient, or verl counts something else
            assert metrics["actor/pg_clipfrac"] == pytest.approx(theirs["actor/pg_clipfrac"]) and share(metrics) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", ["cispo", "dppo_tv", "dgpo", Half()])
def test_ratios_past_e_20_keep_their_coefficient(clip, dtype):
    """There verl clamps, so it is handed nearer old log-probabilities, after c was computed from the true ones."""
    batch, config = make_batch(4, 16), actor(BandLossConfig(clip=clip))
    far = torch.where(torch.arange(16) % 3 == 0, 30.0, torch.where(torch.arange(16) % 3 == 1, 20.5, 0.0))
    for sign in (1, -1):
        moved = {key: x.to(dtype) if x.is_floating_point() else x for key, x in batch.items()}
        moved["old_log_prob" if sign > 0 else "log_prob"] = moved["log_prob"] - far.to(dtype)
        _, got, metrics = run(LOSS_MODE, config, moved)
        _, want = by_formula(get_clip(clip), config, moved, "token-mean", torch.ones(4, 16))
        torch.testing.assert_close(got, want, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
        assert all(torch.isfinite(torch.tensor(x)) for x in metrics.values())


@pytest.mark.parametrize("clip", ["sapo", "gspo", "dppo_kl"])
def test_padding_is_inert_whatever_it_holds(clip):
    batch, each = make_batch(8, 16), weights(make_batch(8, 16))
    mask, config = batch["response_mask"], actor(BandLossConfig(clip=clip))
    clean = run(LOSS_MODE, config, batch, rollout_is_weights=each)
    for bad in (float("nan"), float("inf"), -float("inf")):
        dirty = {key: x if x is mask else x.masked_fill(~mask, bad) for key, x in batch.items()}
        got = run(LOSS_MODE, config, dirty, rollout_is_weights=each.masked_fill(~mask, bad))
        assert got[2] == clean[2] and torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])


# ---------------------------------------------------------------- verl's own loss, kept

MARGINS = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3}
KEPT: list[tuple[str, dict[str, Any], Any]] = [
    ("vanilla", MARGINS, DualClip(0.1, 0.3, cap=3.0)),
    ("vanilla", {"clip_ratio_low": 2.0, "clip_ratio_c": 1e10}, Fixed(1.0, 0.2)),
    ("dppo_tv", MARGINS, get_clip("dppo_tv", delta=(0.1, 0.3), cap=3.0)),
    ("dppo_kl", {"clip_ratio_low": 2.0}, get_clip("dppo_kl", delta=(2.0, 0.2), cap=3.0)),
    ("gspo", MARGINS, get_clip("gspo", eps_low=0.1, eps_high=0.3)),
    ("sapo", {"tau_pos": 2.0}, get_clip("sapo", tau_pos=2.0)),
    ("cispo", MARGINS, get_clip("cispo", eps_low=0.1, eps_high=0.3)),
    ("dppo_tv", {"clip_ratio_low": 0.0}, None),
    ("geo_mean", MARGINS, get_clip("gmpo", eps_low=0.1, eps_high=0.3)),
    ("dro", {}, get_clip("dro", beta=0.5)),
    ("clip_cov", {}, get_clip("clip_cov")),
    ("kl_cov", {}, get_clip("kl_cov", beta=0.1)),
    ("gpg", {}, None),
]


@pytest.mark.parametrize(("mode", "settings", "clip"), KEPT)
def test_host_is_verls_own_loss_and_only_measured(mode, settings, clip):
    batch, more = make_batch(), {"dro_beta": 0.5}
    ours = actor(BandLossConfig(clip="host", host_loss_mode=mode, **more), **settings)
    theirs = actor(PolicyLossConfig(loss_mode=mode, **more), **settings)
    more = {"loss_agg_mode": "seq-mean-token-sum", "rollout_is_weights": weights(batch)}
    results = []
    for name, config in ((mode, theirs), (LOSS_MODE, ours)):
        torch.manual_seed(0)  # clip_cov draws tokens
        results.append(run(name, config, batch, **more))
    (want_loss, want_grad, own), (loss, grad, metrics) = results
    assert torch.equal(loss, want_loss) and torch.equal(grad, want_grad)
    assert {key: x for key, x in metrics.items() if not key.startswith(METRICS)} == own
    assert clip_of(ours) == clip == clip_of(theirs) and (clip is None) == (len(metrics) == len(own))
    if clip is not None:
        token = batch["response_mask"]
        assert share(metrics) == pytest.approx(float((grad[token] == 0).float().mean()), rel=1e-6)


# ---------------------------------------------------------------- metrics and objects


@pytest.mark.parametrize("clip", ["band", "sapo", "host"])
@pytest.mark.parametrize(("how_much", "keys"), [("none", 0), ("brief", 9), ("full", 216)])
def test_how_much_is_logged(clip, how_much, keys):
    _, _, metrics = run(LOSS_MODE, actor(BandLossConfig(clip=clip, clip_metrics=how_much)), make_batch(8, 8))
    found = {key: [x, 0.0] for key, x in metrics.items() if key.startswith(METRICS)}
    assert len(found) == keys
    # verl takes the greatest or the least over the updates for a name that holds "max" or "min"
    assert reduce_metrics(dict(found)) == pytest.approx({key: x / 2 for key, (x, _) in found.items()})


def test_clips_and_divergences_of_ones_own_survive_the_way_to_a_worker(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import bandpo\n\nclass Half:\n    def coefficient(self, tokens):\n        return tokens.weighted / 2\n\n"
        "def square(u):\n    return (u - 1) ** 2\n\nmine = bandpo.Divergence('mine', square)\n"
    )
    batch = make_batch(4, 4)
    own = {"clip_args": {"divergence": f"{file}:mine", "delta": 0.1}}
    for fields in ({"clip": f"{file}:Half"}, own, {"clip": Half()}, {"clip": bandpo.Sides()}):
        sent = pickle.dumps(BandLossConfig(**fields))
        for name in [name for name in sys.modules if name.startswith("bandpo_user_mine")]:
            del sys.modules[name]  # another process has not imported the file
        _, got, _ = run(LOSS_MODE, actor(pickle.loads(sent)), batch)
        _, want, _ = run(LOSS_MODE, actor(BandLossConfig(**fields)), batch)
        assert torch.equal(got, want) and got.abs().sum() > 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"clip_args": {"divergence": bandpo.Divergence("x", lambda u: (u - 1) ** 2)}},
            ["cannot be saved", "file.py:name"],
        ),
        ({"clip": type("Local", (Half,), {})()}, ["cannot be saved", "importable"]),
        ({"clip": Needy()}, ["needs rollout_logps, entropies", "verl does not hand over"]),
    ],
)
def test_objects_that_cannot_go_or_need_more_are_refused_at_once(fields, words):
    with pytest.raises(InputError) as caught:
        BandLossConfig(**fields)
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)
