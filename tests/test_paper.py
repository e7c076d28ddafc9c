"""The paper's own runs: recipes say what was published, their smokes run, and the page's commands do what they say."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lab_support import quick_pages, train

from bandpo import Band, Fixed, cli, get_clip
from bandpo._input import InputError
from bandpo.cli import _run
from bandpo.lab.models import UNTRAINED, source_of
from bandpo.lab.models.load import load_model
from bandpo.lab.reading import RecipeFile, read_recipe
from bandpo.lab.recipe import Recipe, load
from bandpo.lab.smoke import shrink
from bandpo.lab.trl.config import to_trl
from bandpo.lab.verl.config import Place, schedule, to_verl
from bandpo.lab.verl.reward import compute_score

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))
PAGE = (ROOT / "docs" / "paper.md").read_text("utf-8")
MODELS = {
    "Qwen/Qwen2.5-3B-Instruct": ("Qwen2ForCausalLM", "bandpo/random-qwen2"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": ("Qwen2ForCausalLM", "bandpo/random-qwen2"),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": ("Qwen2ForCausalLM", "bandpo/random-qwen2"),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": ("LlamaForCausalLM", "bandpo/random-llama"),
}
GPUS = 8


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("BANDPO_CACHE", str(tmp_path_factory.getbasetemp() / "models"))
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: name == "vllm" or there(name, *rest))


def commands() -> list[list[str]]:
    """The words after "bandpo" of every command on the page."""
    blocks = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.M | re.S)).replace("\\\n", " ")
    lines = [re.sub(r"^torchrun --nproc_per_node 8 -m ", "", line) for line in blocks.splitlines()]
    assert all(line.startswith("bandpo ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


def arm(engine: str, clip: str) -> Recipe:
    """The recipe of the page's command for an arm."""
    (words,) = (w for w in commands() if w[0] == engine and f"--clip {clip} " in shlex.join(w))
    args = cli._parse(words)
    return load(_run.read(args, "trl" if engine == "train" else "verl")[0], args.overrides, backend=_engine(engine))


def _engine(command: str) -> str:
    return "trl" if command == "train" else "verl"


# ---------------------------------------------------------------- what was published


def test_there_is_one_recipe_a_model_and_they_differ_in_nothing_else() -> None:
    files = [read_recipe(str(path)) for path in FILES]
    assert {file.keys["model"]: file.smoke["model"] for file in files} == {m: small for m, (_, small) in MODELS.items()}
    for part in ("keys", "smoke"):
        without = [{**getattr(file, part), "model": None} for file in files]
        assert all(one == without[0] for one in without)
    for path in FILES:
        text = path.read_text("utf-8")
        assert f"recipes/paper/{path.name}" in text and f"`{path.name}`" in PAGE and "NOT RUN" in text
        keys = [line for line in text[: text.index("smoke:")].splitlines() if re.match(r" *[\w+.]+: +[^ #]", line)]
        assert [line for line in keys if "# [p]" not in line and "# [o]" not in line] == [], "of whom is this value?"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_trl_is_given_the_published_values(path: Path, tmp_path: Path) -> None:
    config = to_trl(load(str(path)), tmp_path)
    step = GPUS * config.per_device_train_batch_size * config.gradient_accumulation_steps
    rollout = GPUS * config.per_device_train_batch_size * config.steps_per_generation
    assert (config.num_generations, rollout, step) == (16, 256 * 16, 64 * 16)
    assert config.max_steps * step == 1020 * rollout and config.num_iterations == 1
    assert (config.clip, get_clip(config.clip, **config.clip_args)) == ("band", Band("kl", 0.05, cap=10.0))
    assert (config.loss_type, config.beta, config.scale_rewards, config.delta) == ("grpo", 0.001, "group", 10.0)
    assert (config.learning_rate, config.lr_scheduler_type, config.get_warmup_steps(4080)) == (1e-6, "constant", 0)
    assert (config.weight_decay, config.max_grad_norm, config.entropy_coef) == (0.01, 1.0, 0.0)
    assert (config.temperature, config.top_p, config.top_k, config.max_completion_length) == (1.0, 1.0, 0, 4096)
    assert config.vllm_max_model_length == 1024 + 4096 and config.use_vllm and config.vllm_mode == "colocate"


def test_verls_batches_are_the_published_ones_on_one_node_and_on_two() -> None:
    for words in ([], ["--verl.nodes", "2", "--gradient_accumulation_steps", "32", "--steps_per_generation", "128"]):
        plan = schedule(load(str(FILES[0]), words, backend="verl"))
        assert (plan.prompts, plan.mini_batch, plan.updates, plan.rollouts) == (256, 64, 4, 1020)
    assert shlex.join(words) in [shlex.join(w) for c in commands() for w in [_without(c, "--verl.ray_address", *_ENDS)]]


_ENDS = ("--task_args.train", "--task_args.test", "--out")


def _without(words: list[str], *keys: str) -> list[str]:
    """The words of a command after its recipe, without some options."""
    pairs = zip(words[2::2], words[3::2], strict=False)
    return [word for key, value in pairs if key not in keys for word in (key, value)]


def test_the_rewards_have_the_advantages_of_plus_and_minus_one() -> None:
    recipe = load(str(FILES[0]))
    told = {"task": "jsonl", "task_args": json.dumps({"train": "recipes/paper/problems.jsonl"})}
    told["rewards"] = json.dumps([recipe.reward_funcs, recipe.reward_weights])
    scores = [compute_score("", f"\\boxed{{{x}}}", "5", {"question": "?"}, **told)["score"] for x in "5123456789abcdef"]
    ours = torch.tensor(scores, dtype=torch.float64)
    published = torch.tensor([1.0 if x == "5" else -1.0 for x in "5123456789abcdef"], dtype=torch.float64)
    assert torch.equal(ours - ours.mean(), published - published.mean()) and ours.max() == 2


def test_the_arms_are_the_published_baselines_and_no_clip(tmp_path: Path) -> None:
    want = {
        "fixed": Fixed(0.2, 0.2),
        "clip_higher": Fixed(0.2, 0.28),
        "dcpo": get_clip("dcpo", eps_low=0.16, eps_high=0.2),
    }
    for name, clip in {**want, "none": get_clip("none")}.items():
        trl = to_trl(arm("train", name), tmp_path)
        made = get_clip(trl.clip, **(trl.clip_args or {}))
        assert made == clip if name != "clip_higher" else (made.eps_low, made.eps_high) == (0.2, 0.28)
        assert trl.delta == (None if name == "none" else 10.0)
        verl = arm("verl", name)
        assert (verl.clip, verl.clip_args) == (trl.clip, trl.clip_args or {})
        capped = [word for word in words_of(verl, tmp_path) if "dual_clip" in word]
        assert capped == [
            f"+actor_rollout_ref.actor.policy_loss.dual_clip={'null' if name == 'none' else '10.0'}",
        ]


def words_of(recipe: Recipe, folder: Path) -> list[str]:
    return to_verl(recipe, Place(out=folder, model="m", plain=False, log=folder / "log", model_config={}))


# ---------------------------------------------------------------- smokes


@pytest.mark.parametrize("name", ["qwen2.5-3b", "r1-llama-8b"])
def test_a_smoke_trains_the_same_algorithm(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with quick_pages():
        assert train(f"train recipes/paper/{name}.yaml --smoke --json", tmp_path / "run") == 0
    out = tmp_path / "run"
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (said,) = (e["text"] for e in events if e["event"] == "note" and e["text"].startswith("smoke"))
    file = read_recipe(f"recipes/paper/{name}.yaml")
    for key in file.smoke.keys() - {"task_args", "verl"}:
        assert f"{key} {file.smoke[key]!r} (" in said
    trained = yaml.safe_load((out / "recipe.yaml").read_text())
    assert {key: trained[key] for key in file.keys if key not in file.smoke} == {
        key: value for key, value in file.keys.items() if key not in file.smoke
    }
    steps = [e for e in events if e["event"] == "step"]
    assert [(s["step"], s["rollout"]) for s in steps][-1] == (8, 2) and max(s.get("reward", 0.0) for s in steps) > 0
    assert all(s["grad_norm"] >= 0 for s in steps) and max(s["grad_norm"] for s in steps) > 0
    model, _ = load_model(str(out / "model"))
    start, _ = load_model(MODELS[file.keys["model"]][1])
    assert type(model).__name__ == MODELS[file.keys["model"]][0]
    assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
    assert json.loads((out / "run.json").read_text())["status"] == "done"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_smoke_reaches_the_engines_configuration(path: Path, tmp_path: Path) -> None:
    small, _ = shrink(read_recipe(str(path)), "trl")
    config = to_trl(load(small), tmp_path)
    assert config.use_cpu and not config.use_vllm and config.generation_batch_size == 4 * 16
    assert (config.clip_args["cap"], config.loss_type, config.beta, config.delta) == (10.0, "grpo", 0.001, 10.0)
    recipe = load(shrink(read_recipe(str(path)), "verl")[0], backend="verl")
    plan, words = schedule(recipe), words_of(recipe, tmp_path)
    assert (plan.workers, plan.prompts, plan.mini_batch, plan.updates, plan.rollouts) == (1, 4, 1, 4, 2)
    assert "data.max_prompt_length=256" in words and "actor_rollout_ref.rollout.name=transformers_cpu" in words
    # Ray's workers, which read the problems to grade by, may run in other folders.
    assert any(f'\\"{ROOT}/recipes/paper/problems.jsonl\\"' in word for word in words)


def test_a_smoke_shrinks_sizes_only_and_needs_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="smoke.clip_args: a smoke changes sizes"):
        shrink(RecipeFile("mine", {}, {"clip_args": {"delta": 1.0}}), "trl")
    (tmp_path / "mine.yaml").write_text("task: addition\nsmoke: false\n")
    with pytest.raises(InputError, match="smoke=False: must be a mapping"):
        read_recipe(str(tmp_path / "mine.yaml"))
    for key, engine in (("task_args", "trl"), ("trl", "trl"), ("verl", "verl")):
        odd = shrink(RecipeFile("mine", {"task": "addition", "model": "m", key: "x"}, {key: {"a": 1}}), engine)[0]
        with pytest.raises(InputError, match=f"{key}='x': must be a mapping"):
            load(odd, backend=engine)
    small, said = shrink(read_recipe("verl-demo"), "verl")
    assert small.keys["max_steps"] == 8 and "max_steps 8 (128)" in said, "one rollout"
    assert shrink(read_recipe("verl-demo"), "trl")[0].keys["max_steps"] == 2
    recipe = load(small, backend="verl")
    assert schedule(recipe).rollouts == 1 and recipe.verl["workers"] == 2


@pytest.mark.parametrize("name", UNTRAINED)
def test_a_random_model_is_always_the_same_and_reads_what_it_writes(name: str, tmp_path: Path) -> None:
    model, tokenizer = load_model(name)
    assert model.config.model_type == UNTRAINED[name] and model.num_parameters() < 40_000
    from bandpo.lab.models.untrained import untrained_model

    assert torch.equal(untrained_model(UNTRAINED[name]).lm_head.weight, model.lm_head.weight)
    folder, other = Path(source_of(name)), tmp_path / "made"
    other.mkdir()
    assert folder.stat().st_mode == other.stat().st_mode, "those who share the cache may read it"
    text = "Ist $x$ \\boxed{7}\nor é?"
    assert tokenizer.decode(tokenizer(text=text)["input_ids"]) == text
    assert len(tokenizer(text="\\boxed{7}")["input_ids"]) == 1
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert asked == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


# ---------------------------------------------------------------- the page


@pytest.mark.parametrize("words", commands(), ids=shlex.join)
def test_every_command_of_the_page_is_understood_whole(words: list[str], tmp_path: Path) -> None:
    args = cli._parse(words)
    if words[0] == "eval":
        assert [args.k, args.max_new_tokens, args.task] == [32, 4096, "jsonl"]
        assert {w for w in args.overrides if w.startswith("--")} == {"--task_args.test"}
        return
    recipe = load(_run.read(args, _engine(words[0]))[0], args.overrides, backend=_engine(words[0]))
    assert to_trl(recipe, tmp_path) if words[0] == "train" else words_of(recipe, tmp_path)
    if args.smoke:
        assert len(recipe.make_task().train_dataset(0)) == 30 and recipe.make_task().eval_size == 2


def test_print_shows_verls_command(capsys: pytest.CaptureFixture[str]) -> None:
    data = "--task_args.train recipes/paper/problems.jsonl --task_args.test="
    assert cli.main(f"verl recipes/paper/r1-qwen-7b.yaml --print {data}".split()) == 0
    shown = capsys.readouterr().out
    assert "trainer.total_training_steps=1020" in shown and "actor_rollout_ref.rollout.name=vllm" in shown


def test_the_page_writes_the_data_in_the_form_that_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "open-r1/DAPO-Math-17k-Processed": [{"prompt": "Compute $1+1$.", "solution": "2", "ability": "MATH"}],
        "DigitalLearningGmbH/MATH-lighteval": [
            {"problem": f"At level {n}?", "level": f"Level {n}", "solution": "So \\boxed{\\frac{1}{2}}."}
            for n in range(1, 6)
        ],
        "HuggingFaceH4/aime_2024": [{"problem": "A?", "answer": "204"}],
        "math-ai/aime25": [{"problem": "B?", "answer": "70"}],
        "math-ai/amc23": [{"question": "C?", "answer": 27.0}],
    }
    monkeypatch.setattr("datasets.load_dataset", lambda name, *config, split: made[name])
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    exec(compile(code, "paper.md", "exec"), {})
    files = {path.stem: [json.loads(x) for x in path.read_text().splitlines()] for path in Path("data").iterdir()}
    assert {name: len(rows) for name, rows in files.items()} == {"train": 4, "aime24": 1, "aime25": 1, "amc23": 1}
    (shown,) = re.findall(r"^```json\n(.*?)^```$", PAGE, re.M | re.S)
    assert all(row.keys() == json.loads(shown).keys() for rows in files.values() for row in rows)
    recipe = load(str(FILES[0]))
    task = recipe.make_task()
    graded = {row["question"]: row for row in task.train_dataset(0)}
    assert graded.keys() == {"Compute $1+1$.", "At level 3?", "At level 4?", "At level 5?"}
    assert task.reward(completions=["It is \\boxed{0.5}."], answer=["\\frac{1}{2}"], question=["At level 3?"]) == [1.0]


def test_the_costs_are_the_arithmetic_that_they_say() -> None:
    hours = 1020 * 108 / 3600
    run = hours * GPUS
    table: dict[str, Any] = dict(re.findall(r"^\| ([a-z][^|]*?) \| ([\d,]+) \|$", PAGE, re.M))
    costs = [int(value.replace(",", "")) for value in table.values()]
    assert costs == [round(run), round(5 * run), round(20 * run), round(60 * run)] and round(hours) == 31
    assert all(f"about {round(run)} GPU hours" in path.read_text("utf-8") for path in FILES)
    rows = re.findall(r"^\| (\S+) \| ([\d.]+) billion \| (\d+) \| (\d+) \|$", PAGE, re.M)
    assert len(rows) == 4
    for name, weights, trl, verl in rows:
        assert (int(trl), int(verl)) == (round(float(weights) * 24), round(float(weights) * 20 / GPUS))
        (text,) = (p.read_text("utf-8") for p in FILES if f"/{name} " in p.read_text("utf-8"))
        assert (f"about {trl} GB" in text) == (int(trl) > 141)
