"""slime: its samples are sequences; its loss masks, dual clip, off-policy weights and metrics hold."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import CASES, Tokens, call_slime, slime_args, tokens

import bandpo

Tensor = torch.Tensor


@pytest.fixture(autouse=True)
def slime() -> None:
    CASES["slime"]()


def gradient(x: Tokens, c: Tensor) -> Tensor:
    return CASES["slime"]().carries(x, c)


def call(x: Tokens, batch: dict[str, Any] | None = None, **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    from bandpo.engines.slime import band_loss

    return call_slime(x, band_loss, batch, **options)


def cut(x: Tokens) -> dict[str, Any]:
    """The parts of the samples that one of two context-parallel ranks holds; the masks stay whole."""
    return {"loss_masks": [torch.cat([mask, mask]) for mask in x.mask]}


def test_samples_of_different_lengths_are_sequences() -> None:
    x = tokens(3)
    lengths = [5, 3, 4, 5, 1, 2]
    keep = torch.arange(5) < torch.tensor(lengths)[:, None]
    x.mask = keep.float() * torch.where(torch.arange(5) == 1, 0.0, 1.0)  # the second token is a tool's
    rows = {"log_probs": x.old, "rollout_log_probs": x.old, "advantages": x.advantages, "loss_masks": x.mask}
    batch = {name: [row[:n] for row, n in zip(value, lengths, strict=True)] for name, value in rows.items()}
    from bandpo.engines import slime

    args = slime_args(clip="gspo", clip_args={"eps_low": 0.05, "eps_high": 0.1})
    loss, metrics = slime.band_loss(args, batch, x.new()[keep], lambda each: (each * x.mask[keep]).sum())
    c = bandpo.get_clip("gspo", eps_low=0.05, eps_high=0.1).coefficient(x.seen())
    torch.testing.assert_close(x.gradient(loss), gradient(x, c), rtol=1e-5, atol=1e-6)
    share = float(((c == 0) & (x.mask > 0)).sum() / x.mask.sum())
    assert 0 < share < 1
    for name in ("pg_clipfrac", "clip/zero_grad"):
        assert float(metrics[name] / x.mask.sum()) == pytest.approx(share)


def test_clips_of_sequences_are_refused_where_a_rank_has_parts_of_them() -> None:
    x = tokens()
    with pytest.raises(
        ValueError, match=r"clip='gspo': looks at whole sequences, and slime's context parallelism cuts"
    ):
        call(x, cut(x), clip="gspo")
    loss, _ = call(x, cut(x), clip="sapo")
    torch.testing.assert_close(
        x.gradient(loss), gradient(x, bandpo.get_clip("sapo").coefficient(x.seen())), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("clip", ["band", "sapo"])
def test_slimes_dual_clip_holds_beside_any_clip(clip: str) -> None:
    x = tokens(7)
    loss, metrics = call(x, clip=clip, eps_clip_c=1.3)
    t = x.seen()
    c = bandpo.get_clip(clip).coefficient(t)
    beyond = (t.ratio > 1.3) & (t.advantages < 0)
    torch.testing.assert_close(x.gradient(loss), gradient(x, torch.where(beyond, 0.0, c)), rtol=1e-5, atol=1e-6)
    assert (c * beyond).abs().max() > 0.01 and metrics["clip/zero_grad"] > 0


def test_off_policy_weights_and_slimes_own_metrics_stay() -> None:
    x = tokens(8)
    x.old = x.old - torch.tensor([30.0, 0.0, 0.0, 0.0, 0.0])
    loss, metrics = call(x, clip="cispo", use_tis=True)
    c = bandpo.get_clip("cispo").coefficient(x.seen())
    torch.testing.assert_close(x.gradient(loss), gradient(x, c * torch.exp(torch.tensor(0.1))), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["ppo_kl"], ((x.old - x.new()) * x.mask).sum().detach())


def test_without_old_log_probabilities_every_ratio_is_1() -> None:
    x = tokens()
    loss, metrics = call(x, {"log_probs": []}, clip="sapo")
    torch.testing.assert_close(x.gradient(loss), gradient(x, x.advantages))
    assert not [name for name in metrics if name.startswith("clip/")]


class Sampled:
    needs = ("rollout_logps",)

    def coefficient(self, tokens: Any) -> Tensor:
        return tokens.weighted * torch.exp(tokens.rollout_logps)


def test_the_samplers_log_probabilities_are_handed_over_where_they_are() -> None:
    x = tokens()
    loss, _ = call(x, clip=Sampled())
    torch.testing.assert_close(x.gradient(loss), gradient(x, Sampled().coefficient(x.seen())), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="clip='Sampled': needs rollout_logps, which slime does not hand over"):
        call(x, {"rollout_log_probs": []}, clip=Sampled())
    with pytest.raises(ValueError, match="needs rollout_logps"):  # there is one set of old ones then
        call(x, clip=Sampled(), use_rollout_logprobs=True)


def test_a_loss_in_which_slimes_clip_is_not_reached_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from bandpo.engines import slime

    own = slime.host.policy_loss_function

    @functools.wraps(own)
    def wrapped(*args: Any) -> Any:
        return own(*args)

    monkeypatch.setattr(slime.host, "policy_loss_function", wrapped)
    with pytest.raises(ValueError, match="its policy loss went round the clip"):
        call(tokens(), clip="sapo")
    assert slime.host.compute_policy_loss is own.__globals__["compute_policy_loss"], "slime itself stays as it is"
