"""What lets an unmodified verl train on a CPU: a platform, a rollout on transformers, and three replacements in verl.

For trying recipes out and for tests; on a GPU nothing here is loaded. It is loaded in every process, Ray's workers
included, by verl's own setting VERL_USE_EXTERNAL_MODULES=bandpo.engines.verl_cpu, and the rollout is chosen by
``actor_rollout_ref.rollout.name=transformers_cpu``. Written for verl 0.9.1.
"""

from __future__ import annotations

import asyncio
import functools
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Both are read after this module is imported. verl registers its engines for cuda and npu only, and offers this way in.
os.environ.setdefault("VERL_PLATFORM", "cpu")
os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")

import verl.utils.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

# Why: verl asks for the backend "cpu:gloo,<device>:<backend>", in which the CPU would stand twice. It comes before
# everything that imports the function by name.
verl.utils.distributed.initialize_global_process_group_ray = functools.partial(
    verl.utils.distributed.initialize_global_process_group_ray, backend="cpu:gloo"
)

import ray  # noqa: E402
import verl.utils.fsdp_utils  # noqa: E402
import verl.utils.model  # noqa: E402
from verl.workers.rollout.base import _ROLLOUT_REGISTRY, BaseRollout  # noqa: E402
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput  # noqa: E402

ROLLOUT = "transformers_cpu"
_MOST_PROMPTS = 64  # generated together


def _device_module() -> types.ModuleType:
    """Return torch.cpu with the names of torch.cuda that verl calls; they do nothing."""
    module = types.ModuleType("torch_cpu")
    vars(module).update({name: getattr(torch.cpu, name) for name in dir(torch.cpu) if not name.startswith("__")})
    nothing = ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_per_process_memory_fraction")
    for name in (*nothing, "manual_seed", "manual_seed_all"):
        setattr(module, name, lambda *args, **named: None)
    for name in ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"):
        setattr(module, name, lambda *args: 0)
    vars(module).update(
        mem_get_info=lambda *args: (0, 1),
        get_device_name=lambda *args: "cpu",
        is_available=lambda: False,
        get_rng_state=lambda *args: torch.get_rng_state(),
        set_rng_state=lambda state, *args: torch.set_rng_state(state),
    )
    return module


@PlatformRegistry.register(platform="cpu")
class CPUPlatform(PlatformBase):
    """The CPU as one of verl's devices; Ray counts logical GPUs, of which none is touched."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return False  # never found by itself, only asked for

    def current_device(self) -> str:
        return "cpu"

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def _load_value_model(local_path: str, torch_dtype: Any, model_config: Any, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_pretrained(
        local_path,
        dtype=torch_dtype,
        config=model_config,
        attn_implementation="sdpa",
        trust_remote_code=trust_remote_code,
    )


# Why: verl loads a critic with attn_implementation="flash_attention_2", whatever the configuration says.
verl.utils.model.load_valuehead_model = _load_value_model
# Why: a reference model gets CPUOffloadPolicy(pin_memory=True); it is on the CPU already, and pinning needs a GPU.
verl.utils.fsdp_utils.CPUOffloadPolicy = lambda pin_memory=True: None


class Server:
    """A rollout server, as a Ray actor: tokens in, tokens out, requests that wait together are sampled together.

    Args:
        path: folder of the model and the tokenizer.
        response_length: most tokens in a response.
    """

    def __init__(self, path: str, response_length: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        self.end, self.pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.response_length = response_length
        self.waiting: list[tuple[list[int], dict[str, Any], asyncio.Future[TokenOutput]]] = []
        self.task: asyncio.Task[None] | None = None
        self.step: int | None = None

    async def update_weights(self, state: dict[str, torch.Tensor], global_steps: int | None) -> None:
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        if unexpected or any("lm_head" not in name for name in missing):  # a tied head is not sent
            raise ValueError(f"weights do not fit the rollout's model: missing {missing}, unexpected {unexpected}")
        self.model.tie_weights()
        self.step = global_steps

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        future: asyncio.Future[TokenOutput] = asyncio.get_running_loop().create_future()
        self.waiting.append((list(prompt_ids), dict(sampling_params), future))
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        await asyncio.sleep(0.02)  # lets the other requests of the batch come in
        while self.waiting:
            settings = self.waiting[0][1]
            batch = [request for request in self.waiting if request[1] == settings][:_MOST_PROMPTS]
            self.waiting = [request for request in self.waiting if not any(request is taken for taken in batch)]
            try:
                for (_, _, future), output in zip(batch, self._sample([b[0] for b in batch], settings), strict=True):
                    future.set_result(output)
            except Exception as error:  # goes to those who wait, not to the log of a background task
                for _, _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            await asyncio.sleep(0)

    @torch.inference_mode()
    def _sample(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[TokenOutput]:
        temperature, width = settings.get("temperature", 1.0), max(map(len, prompts))
        ids = torch.tensor([[self.pad] * (width - len(p)) + p for p in prompts])
        attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        most = settings.get("max_tokens") or settings.get("max_new_tokens") or self.response_length
        tokens: list[list[int]] = [[] for _ in prompts]
        logps: list[list[float]] = [[] for _ in prompts]
        cache, running = None, set(range(len(prompts)))
        for _ in range(min(most, self.response_length)):
            place = (attention.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = self.model(
                input_ids=ids, attention_mask=attention, position_ids=place, past_key_values=cache, use_cache=True
            )
            cache, logits = out.past_key_values, out.logits[:, -1].float()
            logp = torch.log_softmax(logits / (temperature if temperature > 0 else 1.0), -1)
            chosen = torch.multinomial(logp.exp(), 1) if temperature > 0 else logp.argmax(-1, keepdim=True)
            taken = logp.gather(-1, chosen)[:, 0].tolist()
            for i, token in enumerate(chosen[:, 0].tolist()):
                if i in running:
                    tokens[i].append(token)
                    logps[i].append(taken[i])
                    if token == self.end:
                        running.discard(i)
            if not running:
                break
            ids, attention = chosen, torch.cat([attention, torch.ones_like(chosen)], 1)
        extra = {"global_steps": self.step}
        return [
            TokenOutput(token_ids=t, log_probs=p, stop_reason="completed", num_preempted=0, extra_fields=dict(extra))
            for t, p in zip(tokens, logps, strict=True)
        ]

    async def idle(self, *args: Any, **named: Any) -> None:
        """Do nothing: what a server on a GPU does about memory, caches and profiles."""

    wake_up = sleep = abort_all_requests = resume_generation = start_profile = stop_profile = idle
    clear_kv_cache = release_kv_cache = resume_kv_cache = idle


def _server_name(replica: int) -> str:
    return f"{ROLLOUT}_server_{replica}"


class Replica(RolloutReplica):
    """Starts one `Server`."""

    async def launch_servers(self) -> None:
        options: dict[str, Any] = {"name": _server_name(self.replica_rank), "num_cpus": 0}
        actor = ray.remote(Server).options(**options, max_concurrency=self.max_concurrency)
        handle = actor.remote(self.model_config["path"], self.config.response_length)
        self.servers, self._server_handle = [handle], handle
        self._server_address = f"{ROLLOUT}-{self.replica_rank}"


class Adapter(BaseRollout):
    """Carries new weights from a training worker to its `Server`."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        size = config.tensor_model_parallel_size * config.data_parallel_size
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // size if replica_rank == -1 else replica_rank
        self.rollout_rank = rank % size

    async def resume(self, tags: list[str]) -> None:
        """Do nothing; there is no memory to take back."""

    async def release(self) -> None:
        """Do nothing; there is no memory to free."""

    @torch.no_grad()
    async def update_weights(
        self, weights: Any, global_steps: int | None = None, wire_format: str = "named_tensors", **_: Any
    ) -> None:
        if wire_format != "named_tensors":
            raise ValueError(f"wire_format={wire_format!r}: {ROLLOUT} takes 'named_tensors' only")
        # On every rank, though only one sends: the iterator gathers shards, which all ranks must take part in.
        state = {name: tensor.detach().cpu().float().clone() for name, tensor in weights}
        if self.rollout_rank == 0:
            await ray.get_actor(_server_name(self.replica_rank)).update_weights.remote(state, global_steps)


def quick_replay_buffer(**settings: Any) -> Any:
    """Return verl's replay buffer, made to look for finished rollouts at once instead of every 2 s.

    By trainer.v1.sampler.custom_sampler.path=pkg://bandpo.engines.verl_cpu and
    trainer.v1.sampler.custom_sampler.name=quick_replay_buffer.
    """
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer  # drags in the engines: too early at the top

    return ReplayBuffer(**settings, poll_interval=0.05)


def _replica() -> type[Replica]:
    return Replica


RolloutReplicaRegistry.register(ROLLOUT, _replica)
# Why: verl has no public way to name a rollout's worker side.
_ROLLOUT_REGISTRY[(ROLLOUT, "async")] = f"{__name__}.Adapter"
