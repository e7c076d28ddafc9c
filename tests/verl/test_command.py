"""`bandpo verl` with verl: hydra and verl's configuration take its words, and the demo trains two workers."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from verl.utils.config import omega_conf_to_dataclass
from verl_support import PATIENCE

from bandpo import Band, Fixed, Sides, get_clip
from bandpo.engines.verl import BandLossConfig, clip_of
from bandpo.lab.reading import RecipeFile, read_recipe, read_yaml
from bandpo.lab.recipe import load
from bandpo.lab.verl.config import ACTOR, LOSSES, OWNED, REPLACED, literal, own, to_verl
from bandpo.lab.verl.failure import known_keys
from bandpo.lab.verl.run import check_engine, check_keys, make_place
from bandpo.loss.stats import BUCKETS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "verl.md").read_text("utf-8")

SHORT = ["--max_steps", "16", "--save_steps", "8", "--eval_every", "8", "--eval_prompts", "8"]  # two rollouts


def composed(words: list[str]) -> Any:
    """verl's configuration with these overrides, as its own program makes it."""
    from hydra import compose, initialize_config_module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with initialize_config_module("verl.trainer.config", version_base=None):
            return compose("ppo_trainer", [word for word in words if not word.startswith("hydra.")])


@pytest.mark.parametrize(
    "value", [None, True, 3, 1e-5, "a b", 'say "x"', "C:\\", "{{ m }}", "true", "", [1, "a,b"], {"a": [1]}]
)
def test_hydra_reads_what_was_meant(value: object) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_override(f"a={literal(value)}").value()
    plain = getattr(parsed, "text", parsed)
    assert [getattr(x, "text", x) for x in plain] == value if isinstance(value, list) else plain == value


def test_verl_takes_every_word_and_checks_them(tmp_path: Path) -> None:
    recipe = load("verl-demo", ["--beta", "0.01", "--num_iterations", "2"], backend="verl")
    check_engine(recipe)
    place = make_place(recipe, tmp_path, plain=True, make=False)
    config = composed(to_verl(recipe, place))
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert dict(actor.policy_loss.clip_args) == {"divergence": "kl", "delta": 0.05, "cap": 10.0}
    assert config.actor_rollout_ref.model.custom_chat_template.count("{{") == 1 and rollout.n == 16
    assert config.data.train_batch_size * rollout.n == 2 * 16 * 8 and actor.ppo_mini_batch_size * rollout.n == 32
    assert actor.use_kl_loss and actor.ppo_epochs == 2

    loss = omega_conf_to_dataclass(actor.policy_loss)
    assert type(loss) is BandLossConfig and loss.made.delta == 0.05 and loss.clip_metrics == "full"


def test_recipes_of_other_clips_reach_the_loss(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "class Half:\n    def coefficient(self, tokens):\n        return tokens.weighted / 2\n"
    )
    high, low = {"clip": "band", "delta": 0.1}, {"clip": "fixed", "eps_low": 0.3}
    for keys, want in (
        ({"clip": "sides", "clip_args": {"high": high, "low": low}}, Sides(Band(delta=0.1), Fixed(0.3))),
        ({"clip": "sapo", "clip_args": {"tau_neg": 2.0}, "clip_metrics": "none"}, get_clip("sapo", tau_neg=2.0)),
        ({"clip": f"{tmp_path}/mine.py:Half", "clip_args": {}}, None),
        ({"clip": "host", "clip_args": {}, "verl": {f"{ACTOR}.clip_ratio_high": 0.28}}, None),
    ):
        recipe = load(RecipeFile("mine", read_recipe("verl-demo").keys | keys), backend="verl")
        actor = omega_conf_to_dataclass(
            composed(to_verl(recipe, make_place(recipe, tmp_path, plain=True, make=False))).actor_rollout_ref.actor
        )
        loss = actor.policy_loss
        assert loss.clip == keys["clip"] and (want is None or loss.made == want)
        assert loss.clip_metrics == keys.get("clip_metrics", "full") and loss.keeps_host == (keys["clip"] == "host")
    assert clip_of(actor) == get_clip("dual_clip", eps_high=0.28, cap=3.0) and loss.made is None


def test_a_recipe_without_loss_type_and_clip_gets_the_defaults_of_both(tmp_path: Path) -> None:
    file = read_recipe("verl-demo")
    keys = {key: value for key, value in file.keys.items() if key not in ("loss_type", "clip", "clip_args")}
    recipe = load(RecipeFile("bare", keys), backend="verl")
    config = composed(to_verl(recipe, make_place(recipe, tmp_path, plain=True, make=False)))
    assert config.actor_rollout_ref.actor.loss_agg_mode == LOSSES["dapo"]
    assert omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss).made == Band()


def test_verl_takes_the_example_with_a_critic(tmp_path: Path) -> None:
    recipe = load(str(ROOT / "examples" / "rlhf_verl.yaml"), backend="verl")
    check_engine(recipe)
    config = composed(to_verl(recipe, make_place(recipe, tmp_path, plain=True, make=False)))
    assert config.algorithm.adv_estimator == "gae" and config.critic.strategy == config.critic.fsdp.strategy == "fsdp2"
    assert config.critic.model.path == config.actor_rollout_ref.model.path
    assert omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss).made == Band("kl", 0.05)
    omega_conf_to_dataclass(config.critic)


def test_the_pages_three_words_put_the_clip_in() -> None:
    (block,) = re.findall(r"^```text\n(actor_rollout_ref.*?)^```$", PAGE, re.M | re.S)
    words = shlex.split(block)
    assert len(words) == 3
    loss = omega_conf_to_dataclass(composed(words).actor_rollout_ref.actor.policy_loss)
    assert type(loss) is BandLossConfig and loss.made == Band("kl", 0.05, cap=10.0)


def test_the_pages_settings_are_keys_that_verl_has(tmp_path: Path) -> None:
    blocks = [text for text in re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.M | re.S) if "kind: RayJob" not in text]
    assert len(blocks) == 2
    for text in blocks:
        recipe = load(RecipeFile("page", read_recipe("demo").keys | read_yaml(text, "page")), backend="verl")
        place = make_place(recipe, tmp_path, plain=True, make=False)
        check_keys([key for key, _ in own(recipe)])
        assert composed(to_verl(recipe, place)).actor_rollout_ref.actor.use_dynamic_bsz is True


def test_the_keys_that_are_the_recipes_own_exist() -> None:
    known = known_keys()
    added = {"clip", "clip_args", "clip_metrics"}  # by bandpo's configuration of the loss
    assert len(known) > 500 and set(known) < set(known_keys(every_engine=True))
    assert [key for key in OWNED | REPLACED if key not in known and key.split(".")[-1] not in added] == []


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bandpo", "verl", *words], capture_output=True, text=True, timeout=PATIENCE,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def test_the_demo_trains_two_workers_and_leaves_a_report(tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run("verl-demo", *SHORT, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr + (out / "verl.log").read_text()[-3000:]
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [e["event"] for e in events if e["event"] != "note"] == [
        "start",
        "eval",
        "step",
        "eval",
        "step",
        "eval",
        "summary",
        "done",
    ]
    # Two workers, each with bandpo's loss.
    log = (out / "verl.log").read_text()
    assert (
        len(
            {
                line.split("pid=")[1].split(")")[0]
                for line in log.splitlines()
                if "bandpo: policy loss 'bandpo' in use" in line
            }
        )
        == 2
    )
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if r["event"] == "step"]
    assert [(r["step"], r["rollout"]) for r in steps] == [(8, 1), (16, 2)]
    for record in steps:
        # verl's own count of tokens that the bounds stopped, made from other sums.
        assert record["clipped"] == pytest.approx(record["actor/pg_clipfrac"], abs=2e-3)
        assert sum(record[f"clip/share/{bucket}"] for bucket in BUCKETS) == pytest.approx(1)
        assert all(math.isfinite(record[key]) for key in ("reward", "entropy", "loss", "grad_norm", "seconds"))
        assert record["training/rollout_probs_diff_max"] < 1e-5, "what generates has the weights that train"
    info = json.loads((out / "run.json").read_text())
    assert info["status"] == "done" and info["workers"] == 2 and info["versions"]["verl"]
    assert info["before"]["n"] == info["after"]["n"] == 8 * 4
    assert len(json.loads((out / "samples.json").read_text())) == 8
    assert "verl, 2 workers" in (out / "report.html").read_text("utf-8")

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(out / "model").num_parameters() > 100_000
    again = run(str(out / "recipe.yaml"), "--out", str(out), "--resume")
    assert again.returncode == 0 and "done already" in again.stdout, again.stderr
