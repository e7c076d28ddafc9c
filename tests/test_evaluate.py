"""Evaluation: sampling is the policy itself, intervals are honest, answers are kept whole, `bandpo eval` compares."""

import gzip
import json
import re
import shlex
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, ttest_rel

from bandpo._input import InputError
from bandpo.cli import main
from bandpo.cli.eval import _progress, _same_task
from bandpo.lab.answers import compare, read_answers, write_answers
from bandpo.lab.evaluate import accuracy_interval, end_ids, evaluate, score_interval
from bandpo.lab.models.load import load_model
from bandpo.lab.tasks import get_task

TINY = "bandpo/tiny-addition"


@pytest.fixture(scope="module")
def tiny():
    return load_model(TINY)


@pytest.fixture(scope="module")
def sharper(tiny, tmp_path_factory):
    """A folder with the tiny model, surer of itself."""
    folder = tmp_path_factory.mktemp("sharper")
    model, tokenizer = load_model(TINY)
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(1.5)  # before a linear layer: all logits times 1.5, but for the bias
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


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


def test_every_end_token_of_the_generation_config_ends_an_answer():
    """As in TRL's training; what comes after it is neither read nor counted."""
    model, tokenizer = load_model(TINY)
    five = tokenizer.get_vocab()["5"]
    model.generation_config.eos_token_id = [five, tokenizer.eos_token_id]
    assert end_ids(model, tokenizer) == [five, tokenizer.eos_token_id]
    found = evaluate(model, tokenizer, get_task("addition"), prompts=32, k=4, max_new_tokens=5).answers
    texts = np.array(found.texts)
    with_five = np.char.find(texts, "5") >= 0
    assert 10 < with_five.sum() < 128 and found.ended[with_five].all()
    assert all(text.index("5") == len(text) - 1 for text in texts[with_five])
    assert (found.lengths[with_five] == np.char.str_len(texts)[with_five]).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"prompts": 0}, "prompts"),
        ({"max_new_tokens": 30}, "max_new_tokens=30: the longest prompt has 8 tokens and the model has room for 32"),
        ({"task": "jsonl"}, "no chat template; set task_args.chat false"),
    ],
)
def test_evaluate_refuses_what_cannot_be_meant(tiny, change, said, tmp_path):
    (tmp_path / "chat.jsonl").write_text('{"prompt": "1+1=", "answer": 2}')
    args = {"test": str(tmp_path / "chat.jsonl")} if change.pop("task", "") else {}
    task = get_task("jsonl" if args else "addition", **args)
    with pytest.raises(InputError, match=said):
        evaluate(*tiny, task, **({"prompts": 1, "k": 1, "max_new_tokens": 5} | change))


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
    low, high = score_interval(np.array([[-1.0, 0.0], [2.0, 1.0], [0.5, 0.5]]))  # no shares: Student's
    assert low < -0.5 < 1.5 < high


def test_pass_and_majority_by_hand(tiny):
    answers = replace(
        evaluate(*tiny, get_task("addition"), prompts=3, k=4, max_new_tokens=5).answers,
        scores=np.array([[1, 0, 0, 0.3], [0, 0, 0, 0], [1, 1, 0, 1]]),
        finals=[["a", "b", "b", "a"], ["a", "", "", ""], ["x", "x", "y", "x"]],
    )
    found = answers.per_prompt()
    assert found["mean@4"] == pytest.approx([0.325, 0, 0.75])
    assert found["maj@4"] == pytest.approx([0.25, 0, 1])  # a tie of a (one of two right) and b; then the only vote
    pairs = [np.mean([any(p) for p in combinations(row >= 1, 2)]) for row in answers.scores]
    assert found["pass@2"] == pytest.approx(pairs) and set(found) >= {"pass@1", "pass@4", "entropy", "length", "ended"}
    summary = answers.summary(resamples=200)
    assert summary["pass@4"].estimate == pytest.approx(2 / 3) and summary["pass@4"].n == 3
    assert summary["ended"].low < 1 == summary["ended"].estimate  # all of them, and yet the interval has a width


def test_an_answer_that_a_task_of_ones_own_cannot_read_has_no_vote(tiny):
    class Unreadable(type(get_task("addition"))):
        def final_answer(self, completion):
            return {}[completion]

    task = Unreadable()
    answers = evaluate(*tiny, task, prompts=2, k=3, max_new_tokens=5).answers
    assert answers.finals == [[""] * 3] * 2 and answers.per_prompt()["maj@3"].tolist() == [0, 0]
    assert task.failures == {"final_answer: KeyError": 6}


def test_answers_are_kept_whole_and_a_damaged_file_is_named(tiny, tmp_path):
    answers = evaluate(*tiny, get_task("addition"), prompts=5, k=3, max_new_tokens=5).answers
    answers.facts["model"], answers.texts[0][0], answers.whys[1][1] = "m", "\ud800\x00", "timeout: took more than 5 s"
    file = tmp_path / "a.jsonl.gz"
    write_answers(answers, file)
    back = read_answers(file)
    assert back.facts == answers.facts and back.rows == answers.rows and back.texts == answers.texts
    assert back.whys == answers.whys and back.failed == {"timeout": 1} and back.finals == answers.finals
    for name, values in answers.per_prompt().items():
        assert back.per_prompt()[name] == pytest.approx(values, abs=1e-6)
    whole = file.read_bytes()
    lines = gzip.decompress(whole).splitlines()
    damaged = [whole[:200], b"", b"x" * 99, gzip.compress(b"\n".join(lines[:-1])), gzip.compress(b"[1]\n{}")]
    damaged += [whole[:60] + b"\xff" * 9 + whole[69:], gzip.compress(lines[0] + b"\n" + b'{"scores": 1}\n' * 5)]
    for data in damaged:
        file.write_bytes(data)
        with pytest.raises(InputError, match="holds no answers"):
            read_answers(file)
    with pytest.raises(InputError, match="cannot be written"):
        write_answers(answers, file / "below" / "a.jsonl.gz")


def run(capsys, *words):
    code = main(["eval", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def evaluated(sharper, tmp_path_factory):
    out = tmp_path_factory.mktemp("evals")
    words = [TINY, sharper, "--task", "addition", "--prompts", 48, "--k", 8, "--out", out]
    assert main(["eval", *map(str, words), "--json"]) == 0
    return out


def test_eval_compares_models_side_by_side(evaluated, sharper, capsys):
    code, out, _ = run(capsys, *sorted(evaluated.glob("*.jsonl.gz")), "--task", "addition", "--json")
    found = json.loads(out)
    assert code == 0 and [m["model"] for m in found["models"]] == [TINY, str(sharper)]
    base, other = (
        read_answers(evaluated / m["file"]) for m in json.loads((evaluated / "summary.json").read_text())["models"]
    )
    for model, answers in zip(found["models"], (base, other), strict=True):
        assert model["measures"]["mean@8"]["estimate"] == pytest.approx(answers.scores.mean())
        assert model["measures"]["pass@8"]["estimate"] == pytest.approx(answers.correct.any(1).mean())
        assert model["measures"]["mean@8"]["low"] < answers.scores.mean() < model["measures"]["mean@8"]["high"]
    difference = found["differences"][0]["measures"]["entropy"]
    by_hand = [a.per_prompt()["entropy"] for a in (other, base)]
    assert difference["mean"] == pytest.approx(np.mean(by_hand[0] - by_hand[1])) and difference["high"] < 0
    assert difference["p"] == pytest.approx(ttest_rel(*by_hand).pvalue)
    assert compare([base, base])[0].differences["mean@8"].p == 1


def test_eval_prints_a_table_and_writes_every_sample(evaluated, capsys):
    files = sorted(evaluated.glob("*.jsonl.gz"))
    assert len(files) == 2 and all(len(gzip.open(file).readlines()) == 49 for file in files)
    code, out, _ = run(capsys, *files, "--task", "addition")
    assert code == 0
    for word in ("mean@8", "pass@8", "maj@8", "entropy", "length", "48 prompts", TINY):
        assert word in out
    code, _, err = run(capsys, TINY, "--task", "addition", "--prompts", 4, "--k", 2, "--out", evaluated)
    assert code == 2 and "--overwrite" in err and err.count("\n") == 1
    code, _, err = run(capsys, *files, "--task", "reasoning-gym:chain_sum")
    assert code == 2 and "holds samples of task 'addition', and --task is" in err and err.count("\n") == 1
    for theirs, given in (("/a/my-task.py:Mine", "my-task.py:Mine"), ("chain-sum", "chain_sum")):
        assert _same_task(theirs) == _same_task(given) != _same_task("addition")


def test_a_models_name_is_no_markup_on_the_progress_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with _progress(silent=False) as progress:
        progress("m[/red]\x1b[2J", 0.5)
    err = capsys.readouterr().err
    assert "m[/red]⟨U+001B⟩" in err and "\x1b[2J" not in err


def test_eval_takes_a_lora_folder_and_a_run(tmp_path, tiny, capsys):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_model(TINY)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    adapter = tmp_path / "adapter"
    adapted.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    run_folder = tmp_path / "run"
    tiny[0].save_pretrained(run_folder / "model")
    tokenizer.save_pretrained(run_folder / "model")
    (run_folder / "run.json").write_text("{}")
    words = ["--task", "addition", "--prompts", 8, "--k", 2, "--out", tmp_path / "out", "--json"]
    code, out, err = run(capsys, TINY, adapter, run_folder, *words)
    assert code == 0, err
    texts = [read_answers(tmp_path / "out" / m["file"]).texts for m in json.loads(out)["models"]]
    assert texts[0] == texts[1] == texts[2]  # a fresh adapter changes nothing
    (run_folder / "model").rename(run_folder / "gone")
    code, _, err = run(capsys, run_folder, *words)
    assert code == 2 and "no final model" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", "addition"], "MODEL"),
        ([TINY], "--task"),
        ([TINY, "--task", "adition"], "did you mean 'addition'"),
        ([TINY, "--task", "addition", "--k", "0"], "--k 0"),
        ([TINY, "--task", "addition", "--temperature", "nan"], "temperature"),
        ([TINY, "--task", "addition", "--promts", "3"], "did you mean '--prompts'"),
        ([TINY, "--task", "addition", "--task_args.digit", "3"], "'digit'.*'digits'"),
        ([TINY, "--task", "exploration", "--prompts", "27"], "eval prompts: got 27.*26"),
        (["nobody/nothing", "--task", "addition"], "not there, or no network"),
        (["gone.jsonl.gz", "--task", "addition"], "holds no answers"),
        ([TINY, TINY, "--task", "addition"], "twice"),
        ([TINY, "--task", "addition", "--device", "cuda:9"], "device"),
        ([TINY, "--task", "addition", "--device", "meta"], "device meta: not there"),
        ([TINY, "--task", "addition", "--k", "9" * 20], "from 1 to 1000000"),
        ([TINY, "--task", "addition", "--seed", "-1"], "seed=-1"),
        (["x" * 5000, "--task", "addition"], "cannot be the name"),
        (["a/b", "a-b", "--task", "addition"], "both would be written to"),
    ],
)
def test_eval_names_what_is_wrong_in_a_line(words, said, capsys, tmp_path):
    code, _, err = run(capsys, *words, "--out", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and re.search(said, err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["file", "file/below", "a\0b", "x" * 300])
def test_where_samples_go_is_looked_at_before_any_is_made(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("bandpo.lab.evaluate.sample_answers", lambda *a, **k: pytest.fail("sampled"))
    code, _, err = run(capsys, TINY, "--task", "addition", "--out", out)
    assert code == 2 and err.count("\n") == 1 and "give another folder" in err, err


def test_a_task_whose_right_answers_do_not_pass_is_not_evaluated(tmp_path, capsys):
    (tmp_path / "wrong.py").write_text(
        "from bandpo.lab.tasks.addition import Addition\n"
        "class Wrong(Addition):\n    def score(self, completion, row):\n        return 0.5\n"
    )
    code, _, err = run(capsys, TINY, "--task", f"{tmp_path}/wrong.py:Wrong", "--out", tmp_path / "out")
    assert code == 2 and "scores 0.5" in err and "mend score()" in err and not (tmp_path / "out").exists()


def test_the_pages_commands_give_what_the_page_shows(sharper, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "eval.md").read_text("utf-8")
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", page, flags=re.M | re.S)[::-1])  # the first of each language
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sharper, "runs/demo/model")  # instead of the trained one: column B is another one's
    Path("runs/demo/run.json").write_text("{}")
    for line in re.findall(r"^bandpo .*", page, flags=re.M):
        assert main(shlex.split(line)[1:]) == 0
        if "--json" not in line:
            found = capsys.readouterr().out.splitlines()
            shown = blocks["text"].splitlines()
            assert [x.split()[:1] for x in found] == [x.split()[:1] for x in shown]
            figures = [[float(x) for x in re.findall(r"[\d.]+", line)[-6:-3]] for line in found[6:17]]
            same = [[float(x) for x in re.findall(r"[\d.]+", line)[-6:-3]] for line in shown[6:17]]
            assert len(figures) == 11 and np.array(figures) == pytest.approx(np.array(same), abs=0.03)
    exec(compile(blocks["python"], "eval.md", "exec"), {})
    assert "(128, 32)" in capsys.readouterr().out
