"""Bad input to the core: one line that names the argument, the value, what is allowed and the way out."""

import math
import pickle

import pytest
import torch

import bandpo

X = torch.full((2, 3), -1.0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bandpo.band(X, delta=0), "delta=0"),
        (lambda: bandpo.band(X, delta=-0.1), "delta=-0.1"),
        (lambda: bandpo.band(X, delta=math.nan), "delta=nan"),
        (lambda: bandpo.band(X, delta=(0.1, 0.0)), "delta=0.0"),
        (lambda: bandpo.band(X, delta="0.1"), "delta='0.1'"),
        (
            lambda: bandpo.band(X, delta=1e-9),
            "delta=1e-09: must be a finite number of at least 1e-08 and at most 10000",
        ),
        (lambda: bandpo.band(X, delta=1e20), "delta=1e+20"),
        (lambda: bandpo.band(X, divergence="kll"), "did you mean 'kl'"),
        (lambda: bandpo.band(X, divergence="ch2"), "did you mean 'chi2'"),
        (lambda: bandpo.band(X, cap=0.5), "cap=0.5"),
        (lambda: bandpo.band(torch.zeros(3, dtype=torch.long)), "old_logps is a torch.int64 tensor"),
        (lambda: bandpo.band([-1.0]), "old_logps is list"),
        (lambda: bandpo.in_band(X, X[0]), "old_logps has shape (3,)"),
        (lambda: bandpo.Band(delta=0), "delta=0"),
        (lambda: bandpo.Band(cap=math.inf), "cap=inf"),
        (lambda: bandpo.Fixed(eps_low=1.5), "eps_low=1.5"),
        (lambda: bandpo.Fixed(eps_high=-1), "eps_high=-1"),
        (lambda: bandpo.Sides(high=bandpo.Band(), low=0.2), "low=0.2"),
        (lambda: bandpo.get_clip("bnd"), "did you mean 'band'"),
        (lambda: bandpo.get_clip("ATR"), "did you mean 'atr'"),
        (lambda: bandpo.get_clip("band", dleta=0.1), "did you mean 'delta'"),
        (lambda: bandpo.get_clip("fixed", delta=0.1), "it takes eps_low, eps_high"),
        (lambda: bandpo.get_clip(bandpo.Band(), delta=0.1), "made already"),
        (lambda: bandpo.Divergence("mine", f=2.0), "f=2.0"),
        (lambda: bandpo.Divergence("mine", f=lambda u: torch.log(u)), "not convex at u ="),
        (lambda: bandpo.Divergence("mine", f=lambda u: u), "f(1) = 1: must be 0"),
        (
            lambda: bandpo.Divergence("mine", f=lambda u: (u - 1) ** 2 * torch.log(2 - u).abs()),
            "is nan: must be finite",
        ),
        (lambda: bandpo.Divergence("mine", f=lambda u: u.sum() - len(u)), "must be elementwise"),
        (lambda: bandpo.Divergence("mine", f=lambda u: math.log(u)), "f must be made of torch operations"),
        (
            lambda: bandpo.band(X, torch.tensor([0.1, -0.1, math.nan]), validate=True),
            "delta holds 2 values such as -0.1",
        ),
        (lambda: bandpo.band(-X, validate=True), "old_logps holds NaN or values above 0"),
        (lambda: bandpo.policy_loss(X, X, X, aggregation="token_mean"), "did you mean 'token-mean'"),
        (lambda: bandpo.policy_loss(X, X, X, clip="bnd"), "did you mean 'band'"),
        (lambda: bandpo.get_divergence("nowhere/mine.py:f"), "no such file"),
        (lambda: bandpo.policy_loss(X, X, X, dual_clip=1.0), "dual_clip=1.0"),
        (lambda: bandpo.policy_loss(X, X, X, X[0]), "mask is torch.float32, shape (3,)"),
        (lambda: bandpo.policy_loss(X, X, X[:, :2]), "advantages has shape (2, 2)"),
        (lambda: bandpo.policy_loss(X, X[:1], X), "old_logps has shape (1, 3)"),
        (
            lambda: bandpo.policy_loss(X[0], X[0], X[0], aggregation="seq-mean-token-mean"),
            "needs logps of shape (batch, token)",
        ),
        (lambda: bandpo.policy_loss(X, X, X, aggregation="none", normalizer=3.0), "normalizer=3.0"),
        (lambda: bandpo.policy_loss(X, X, X, normalizer=0), "normalizer=0"),
        (lambda: bandpo.policy_loss(X, X, X, X * 3, validate=True), "mask holds values other than 0 and 1"),
        (lambda: bandpo.policy_loss(X, X, X * math.nan, validate=True), "advantages holds 6 values that are NaN"),
        (lambda: bandpo.policy_loss(-X, X, X, validate=True), "logps holds values above 0"),
    ],
)
def test_one_line_that_says_it(call, words):
    with pytest.raises(bandpo.InputError) as caught:
        call()
    message = str(caught.value)
    assert words in message and "\n" not in message and isinstance(caught.value, ValueError)


def test_a_foreign_divergence_is_shown_its_wrapper():
    with pytest.raises(bandpo.InputError, match="a function is no bandpo.Divergence") as caught:
        bandpo.band(X, divergence=lambda u: (u - 1) ** 2)
    names = {"bandpo": bandpo}
    own = eval(str(caught.value).split("f(1) = 0: ")[1], names | {"f": lambda u: (u - 1) ** 2})
    assert torch.allclose(bandpo.band(X, 0.1, own).log_low, bandpo.band(X, 0.1, "chi2").log_low)


def test_misspelt_keywords_of_functions_are_python_errors():
    with pytest.raises(TypeError, match="dleta"):
        bandpo.band(X, dleta=0.1)


@pytest.mark.parametrize("given", [{"clip": "fixed"}, {1: 2}, "delta", ["delta"]])
def test_arguments_of_a_clip_are_a_dict_of_names(given):
    logps, old = torch.tensor([[-1.0]]), torch.tensor([[-1.1]])
    with pytest.raises(bandpo._input.InputError, match="clip_args="):
        bandpo.clip_advantages(logps, old, torch.ones(1), clip="band", clip_args=given)


def test_a_schedules_shape_is_a_name_and_its_clip_can_be_pickled():
    with pytest.raises(bandpo._input.InputError, match="shape"):
        bandpo.get_clip("band", delta={"start": 0.2, "end": 0.02, "shape": []})
    clip = pickle.loads(pickle.dumps(bandpo.get_clip("band", delta={"start": 0.2, "end": 0.02})))
    assert clip.at(1.0) == bandpo.Band(delta=0.02)


@pytest.mark.parametrize("clip", [name for name in bandpo.list_clips() if name not in ("topr", "dppo_topk")])
def test_no_tokens_and_half_precision_give_finite_numbers(clip):
    none = torch.zeros(3, 0)
    assert bandpo.clip_advantages(none, none.clone(), none, clip=clip, entropies=none).shape == (3, 0)
    far = torch.tensor([[-13.0, -14.0]]).half(), torch.tensor([[-0.5, -0.1]]).half()
    given = bandpo.clip_advantages(*far, torch.tensor([[1.0, -1.0]]).half(), clip=clip, entropies=torch.ones(1, 2))
    assert torch.isfinite(given).all()


def test_the_mean_of_no_tokens_is_0_and_aggregate_checks_its_arguments():
    none = torch.zeros(3, 0)
    assert bandpo.policy_loss(none, none.clone(), none).loss == 0
    for wrong in ({"aggregation": "mean"}, {"normalizer": -2}):
        with pytest.raises(bandpo._input.InputError):
            bandpo.aggregate(torch.ones(2, 3), None, **wrong)


def test_a_token_that_was_not_sampled_by_the_engine_has_ratio_1_to_it():
    logps, old = torch.tensor([[-1.0, -1.1]]), torch.tensor([[-1.1, -1.2]])
    for how in ({"anchor": "both"}, {"importance_sampling_mode": "token_truncate"}):
        unknown, same = (
            bandpo.policy_loss(logps, old, torch.ones(1, 2), rollout_logps=x, **how).loss
            for x in (torch.tensor([[math.nan, -2.0]]), torch.tensor([[-1.1, -2.0]]))
        )
        assert unknown == same and math.isfinite(unknown)


@pytest.mark.parametrize("clip", ["sapo", "gspo", "cispo", "dppo_tv"])
def test_a_token_that_became_impossible_makes_no_nan_in_a_host(clip):
    from bandpo.engines._adapter import shape

    logps = torch.tensor([[-math.inf, -1.0]])
    found = shape(bandpo.get_clip(clip), logps, torch.tensor([[-1.0, -1.2]]), torch.ones(1, 2), torch.ones(1, 2))
    assert torch.isfinite(torch.exp(logps - found.old_logps) * found.advantages).all()
