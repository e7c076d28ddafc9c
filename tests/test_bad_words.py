"""Bad command lines, recipes and folders: each one line and exit code 2, before a model is loaded; nothing is left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bandpo import cli

BAD_WORDS = """
--learning_rate -1
--learning_rate nan
--learning_rate inf
--learning_rate 1e999
--learning_rate [1]
--learning_rate {a: 1}
--learning-rate.x 3
--max_steps 0
--max_steps -5
--max_steps 1.5
--max_steps true
--max_steps 99999999999999999999
--num_train_epochs 0 --max_steps -1
--num_generations 0
--num_generations 1
--num_generations -4
--steps_per_generation 0
--gradient_accumulation_steps 0
--num_iterations 0
--per_device_train_batch_size -1
--per_device_eval_batch_size 0
--max_completion_length 0
--max_completion_length null
--temperature 0
--temperature -1
--top_p 5
--top_p 0
--top_k -7
--top_k 1.5
--min_p 3
--min_p -0.1
--repetition_penalty 0
--epsilon_high x
--beta -1
--clip_args {1: 2}
--clip_args hello --clip_args.delta 3
--clip_args [1]
--clip_args.delta -1
--clip_args.delta []
--clip_args.divergence 3
--clip_args.cap 0.5
--clip_args.nothing 1
--clip nothing.py:Clip
--clip 3
--clip_metrics all
--task 3
--task nothing.py:Task
--task os:getcwd
--task_args.digits 0
--task_args.digits x
--task_args [1]
--task reasoning-gym:nothing
--reward_funcs nothing
--reward_weights 1,2
--model ''
--report_to bogus
--use_vllm true
--fp16 true --bf16 false
--bf16 true --fp16 true
--threads 1000000000
--threads -1
--seed -1
--seed 99999999999
--seed x
--eval_prompts 0
--eval_samples -1
--eval_every -1
--eval_every 0.5
--save_steps 0
--save_steps 0.5
--save_steps 1e9999
--save_total_limit 0
--save_total_limit 1
--save_strategy no
--save_only_model
--logging_strategy no
--logging_strategy epoch
--logging_steps 0
--logging_steps -1
--eval_strategy steps
--lr_scheduler_type polynomia
--lr_scheduler_kwargs {a: 1} --lr_scheduler_type cosine_with_min_lr
--warmup_steps -1
--weight_decay -1
--max_grad_norm -1
--adam_beta1 1
--adam_beta2 2
--adam_epsilon 0
--loss_type nothing
--scale_rewards maybe
--optim nothing
--use_peft --lora_r 0
--use_peft --lora_alpha -1
--use_peft --lora_dropout 2
--use_peft --lora_task_type nothing
--generation_kwargs {nothing: 1}
--generation_kwargs {temperature: 2}
--generation_kwargs 3
--cache_implementation nothing
--staleness -1
--staleness x
--trl.nothing 1
--trl.learning_rate 1
--trl 3
--trl.min_p.x 1
--verl 3
--hub_token x
--hub_token=x
--push_to_hub true --hub_token x
--trl.hub_token x
--deepspeed x.json
--fsdp full_shard
--output_dir x
--local_rank 3
--model_init_kwargs {a: 1}
--delta 3
--cap 3
--divergence kl
--num_generations 7
--per_device_train_batch_size 0
--per_device_train_batch_size 2147483647
--dataloader_num_workers -1
--dataloader_num_workers 1000000000
--out ''
--no_such_key
--=3
-x
stray
--task.x 1
--max_steps 8 --max_steps
""".strip().splitlines()
YAML = {
    "list key": "? [a]: 1\n",
    "nested list": "a: " + "[" * 2000 + "]" * 2000,
    "nested map": "".join(" " * i + "a:\n" for i in range(200)),
    "large integer": "max_steps: " + "9" * 5000,
    "bomb": "a: &a [x, x]\nb: &b [*a, *a]\n" + "".join(
        f"{chr(c + 1)}: &{chr(c + 1)} [*{chr(c)}, *{chr(c)}, *{chr(c)}, *{chr(c)}]\n" for c in range(98, 115)
    ),
    "tag": "a: !!python/object/apply:os.getcwd []\n",
    "date": "max_steps: 2020-01-01\n",
    "not UTF-8": b"\xff\xfe\xff",
    "NUL": "a: \0\n",
    "tab": "a:\n\t- b\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "no mapping": "just words\n",
    "nothing": "",
    "surrogate": 'run_name: "\\ud800"\n',
    "escape": 'run_name: "\\e[31m"\n',
    "anchor loop": "a: &a [*a]\n",
    "merge": "<<: 3\n",
    "twice": "seed: 1\nseed: 2\n",
}  # fmt: skip
OUTS = ["a\0b", "file/a\nb", "x" * 300, "/proc/bandpo/run", "/dev/null", "file", "file/run", "\udcff" * 300]


@pytest.mark.parametrize("line", BAD_WORDS)
def test_a_bad_command_line_is_one_line_before_a_model_is_loaded(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(["demo", *shell(line)], tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("name", YAML)
def test_a_bad_recipe_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = YAML[name]
    least = b"task: addition\nmodel: bandpo/tiny-addition\nuse_cpu: true\n" * (name not in ("nothing", "no mapping"))
    (tmp_path / "mine.yaml").write_bytes(least + (text if isinstance(text, bytes) else text.encode()))
    refused([str(tmp_path / "mine.yaml")], tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("out", OUTS, ids=ascii)
def test_a_folder_that_cannot_be_is_one_line(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    refused(["demo", "--out", out], tmp_path, monkeypatch, capsys)


def shell(line: str) -> list[str]:
    """Words; a value in braces or brackets is one of them."""
    return [word.replace("''", "") for word in re.findall(r"\{.*?\}|\S+", line)]


def refused(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("bandpo.lab.trl.run.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    code = cli.main(["train", *words])
    errors = capsys.readouterr().err
    assert code == 2 and errors.count("\n") == 1, errors
    assert len(errors) < 2000 and "Traceback" not in errors and errors.rstrip("\n").isprintable()
    assert [path for path in sorted(folder.rglob("*")) if path not in before and path.name != "runs"] == []
