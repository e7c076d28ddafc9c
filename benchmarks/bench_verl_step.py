"""verl's actor update with other clips against the same update with verl's own, taken in turn on one model.

It is verl's `TrainingWorker.train_mini_batch`, called as its trainer does, without Ray: one rank, FSDP2, four updates
of one rollout, each forward, loss, metrics, backward, gradient clipping and optimizer. Target for Band: <= 1.02; the
others (all metrics, a clip that goes as advantages, verl's own loss measured) are only measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {
    "VERL_USE_EXTERNAL_MODULES": "bandpo.engines.verl_cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": "lo",
}  # fmt: skip
warnings.simplefilter("ignore")

import hydra  # noqa: E402
import torch  # noqa: E402
import verl.trainer  # noqa: E402
from common import Spent, ratios, write  # noqa: E402
from tensordict import TensorDict  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: E402
from verl.utils import tensordict_utils  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.workers.config import TrainingWorkerConfig  # noqa: E402
from verl.workers.engine_workers import TrainingWorker  # noqa: E402
from verl.workers.utils.losses import ppo_loss  # noqa: E402
from verl.workers.utils.padding import left_right_2_no_padding  # noqa: E402

from bandpo.engines import verl as engine  # noqa: E402

# name: width, layers, vocabulary, responses in a micro-batch (= an update), tokens in a prompt and in a response
SIZES = {"tiny": (64, 2, 64, 32, 8, 8), "small": (256, 4, 1024, 16, 16, 48), "medium": (512, 6, 4096, 8, 32, 128)}
UPDATES = 4
ACTOR = "actor_rollout_ref.actor"
EXACT = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"
SETTINGS = [
    f"{ACTOR}.strategy=fsdp2", f"{ACTOR}.fsdp_config.strategy=fsdp2", f"{ACTOR}.fsdp_config.dtype=float32",
    f"+{ACTOR}.fsdp_config.mixed_precision={EXACT}", f"{ACTOR}.fsdp_config.use_torch_compile=false",
    f"{ACTOR}.use_torch_compile=false", f"{ACTOR}.optim.lr=1e-5", "actor_rollout_ref.rollout.n=1",
    "actor_rollout_ref.model.use_remove_padding=false", "actor_rollout_ref.model.enable_gradient_checkpointing=false",
    "+actor_rollout_ref.model.override_config.attn_implementation=sdpa", f"{ACTOR}.optim.total_training_steps=100000",
]  # fmt: skip
LOSS = f"{ACTOR}.policy_loss"
OURS = [f"{LOSS}._target_=bandpo.engines.verl.BandLossConfig", f"{LOSS}.loss_mode=bandpo"]
ARMS = {
    "verl": [],
    "band": OURS,
    "band, all metrics": [*OURS, f"+{LOSS}.clip_metrics=full"],
    "sapo": [*OURS, f"+{LOSS}.clip=sapo"],
    "host": [*OURS, f"+{LOSS}.clip=host"],
}


def configuration(model: Path, batch: int, more: list[str]) -> Any:
    sizes = [f"{ACTOR}.ppo_mini_batch_size={batch}", f"{ACTOR}.ppo_micro_batch_size_per_gpu={batch}"]
    with hydra.initialize_config_dir(str(Path(verl.trainer.__file__).parent / "config"), version_base=None):
        words = [f"actor_rollout_ref.model.path={model}", *SETTINGS, *sizes, *more]
        return hydra.compose("ppo_trainer", words).actor_rollout_ref


def make_model(size: tuple[int, ...], folder: Path) -> None:
    width, layers, vocabulary, *_ = size
    words = {f"<{i}>": i for i in range(vocabulary - 2)} | {"<|endoftext|>": vocabulary - 2, "<unk>": vocabulary - 1}
    end = "<|endoftext|>"
    Qwen2Tokenizer(vocab=words, merges=[], unk_token="<unk>", eos_token=end, pad_token=end).save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512, eos_token_id=vocabulary - 2,
        bos_token_id=None, pad_token_id=vocabulary - 2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def make_rollout(size: tuple[int, ...]) -> TensorDict:
    """A rollout of UPDATES micro-batches, its old log-probabilities up to 0.2 off the model's uniform ones."""
    _, _, vocabulary, batch, prompt, width = size
    rows = UPDATES * batch
    ids = torch.randint(0, vocabulary - 2, (rows, prompt + width))
    mask = torch.ones_like(ids)
    lengths = torch.randint(width // 2, width + 1, (rows,))
    mask[:, prompt:] = torch.arange(width) < lengths[:, None]
    old = -torch.log(torch.tensor(float(vocabulary))) + 0.4 * torch.rand(rows, width) - 0.2
    tensors = {
        "prompts": ids[:, :prompt], "responses": ids[:, prompt:], "input_ids": ids, "attention_mask": mask,
        "position_ids": mask.cumsum(-1) - 1, "response_mask": mask[:, prompt:], "old_log_probs": old,
        "advantages": torch.randn(rows, 1).expand(rows, width).contiguous(),
    }  # fmt: skip
    data = left_right_2_no_padding(tensordict_utils.get_tensordict(tensors, {}))
    tensordict_utils.assign_non_tensor(
        data, calculate_entropy=False, distillation_use_topk=False, distillation_only=False, global_batch_size=batch,
        mini_batch_size=batch, epochs=1, seed=0, dataloader_kwargs={"shuffle": False}, compute_loss=True,
        temperature=1.0,
    )  # fmt: skip
    return data


def make_worker(config: Any, actor: Any) -> TrainingWorker:
    actor.model_config = omega_conf_to_dataclass(config.model)
    engine = actor.engine
    engine.use_dynamic_bsz, engine.micro_batch_size_per_gpu = False, config.actor.ppo_micro_batch_size_per_gpu
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model", model_config=actor.model_config, engine_config=engine,
            optimizer_config=actor.optim, checkpoint_config=actor.checkpoint,
        )
    )  # fmt: skip
    worker.reset()
    return worker


def measure(name: str, rounds: int, arms: dict[str, list[str]]) -> dict[str, Any]:
    """Time `rounds` rollouts' updates with each loss, in an order that goes round from one to the next."""
    torch.manual_seed(0)
    size = SIZES[name]
    with tempfile.TemporaryDirectory() as folder:
        make_model(size, Path(folder))
        configs = {key: configuration(Path(folder), size[3], more) for key, more in arms.items()}
        actors = {key: omega_conf_to_dataclass(config.actor) for key, config in configs.items()}
        worker = make_worker(configs["verl"], actors["verl"])
    data, times, logged = make_rollout(size), {key: [] for key in actors}, {}
    spent, rest = Spent(), []  # by the measuring in the arm "host"
    spent.on(engine, "_measured")
    for i in range(rounds + 2):
        for key in [*arms][i % len(arms) :] + [*arms][: i % len(arms)]:
            worker.set_loss_fn(partial(ppo_loss, config=actors[key]))
            start, before = (time.process_time(), time.perf_counter()), spent.seconds
            output = worker.train_mini_batch(data=data.clone())
            if i >= 2:
                times[key].append((time.process_time() - start[0], time.perf_counter() - start[1]))
                rest += [times[key][-1][0] - (spent.seconds - before)] if key == "host" else []
            logged[key] = tensordict_utils.get(output, "metrics")
    assert all(("actor/clip/tokens_sum" in metrics) == (key != "verl") for key, metrics in logged.items())
    row: dict[str, Any] = {"what": f"verl actor update, {name}", "verl": verl.__version__}
    row |= dict(zip(("width", "layers", "vocabulary", "responses", "prompt", "tokens"), size, strict=True))
    row |= {"updates": UPDATES, "rounds": rounds}
    for i, clock in enumerate(("processor", "wall")):
        own = [x[i] for x in times["verl"]]
        row[f"{clock}_verl_seconds"] = statistics.median(own)
        for key in [key for key in arms if key != "verl"]:
            found = ratios(own, [x[i] for x in times[key]])
            row |= {f"{key}: {clock}_ratio_{place}": value for place, value in found.items()}
    if rest:
        found = ratios(rest, [x[0] for x in times["host"]])
        row |= {f"host: in_place_ratio_{place}": value for place, value in found.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=SIZES)
    parser.add_argument("--arms", nargs="+", default=[key for key in ARMS if key != "verl"], choices=ARMS)
    parser.add_argument("--name", default="verl_step", help="of the file in benchmarks/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    arms = {key: words for key, words in ARMS.items() if key in ("verl", *args.arms)}
    write(args.name, [measure(name, args.rounds, arms) for name in args.sizes])


if __name__ == "__main__":
    main()
