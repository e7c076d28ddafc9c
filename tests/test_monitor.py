"""`bandpo.Monitor`: the numbers of `ClipStats`, nothing else; and the host's logger carries them."""

from __future__ import annotations

import json
import sqlite3
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

import bandpo
from bandpo._input import InputError


def batch(seed: int, rows: int = 6) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, 20, generator=random)
    return {
        "logps": old * (1 + 0.3 * torch.randn(rows, 20, generator=random)).clamp(min=0.1),
        "old_logps": old,
        "advantages": torch.randn(rows, generator=random),
        "mask": torch.rand(rows, 20, generator=random) < 0.8,
    }


def whole(*batches: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {k: torch.cat([x[k] for x in batches]) for k in batches[0]}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], prefix: str = "clip/") -> None:
    assert list(a) == [prefix + name for name in b]
    torch.testing.assert_close(torch.stack(list(a.values())), torch.stack(list(b.values())))


def test_micro_batches_give_the_statistics_of_the_whole() -> None:
    monitor = bandpo.Monitor("dppo_kl", {"delta": 0.02})
    for seed in range(3):
        x = batch(seed)
        before = {k: v.clone() for k, v in x.items()}
        x["logps"].requires_grad_()
        assert monitor.update(**x) is None  # type: ignore[func-returns-value]
        assert all(torch.equal(x[k], v) for k, v in before.items())
    clip = bandpo.get_clip("dppo_kl", delta=0.02)
    want = bandpo.clip_stats(**whole(*map(batch, range(3))), clip=clip).metrics()
    assert want["zero_grad"] > 0.05
    same(monitor.compute(), want)
    assert list(monitor.compute("x/", only=["zero_grad", "kl_mean"])) == ["x/zero_grad", "x/kl_mean"]
    monitor.reset()
    assert float(monitor.sums.sum()) == float(monitor.maxima.sum()) == 0 and monitor.compute() == {}
    monitor.update(**batch(7))
    same(monitor.compute(), bandpo.clip_stats(**batch(7), clip=clip).metrics())


def test_no_token_is_no_number() -> None:
    monitor = bandpo.Monitor()
    assert monitor.compute() == {} == monitor.compute(only=["gradient_kept"])
    monitor.merge(bandpo.Monitor())
    assert monitor.compute() == {}
    other = bandpo.Monitor()
    other.update(**batch(0))
    monitor.sums.add_(other.sums)  # as all_reduce does where another rank had tokens
    monitor.maxima.add_(other.maxima)
    same(monitor.compute(), bandpo.clip_stats(**batch(0)).metrics())


def test_a_batch_of_no_size_is_none_and_a_metric_misspelt_is_named() -> None:
    monitor = bandpo.Monitor()
    for shape in ((0, 5), (3, 0), (0,)):
        monitor.update(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape))
    assert monitor.compute() == {}
    with pytest.raises(ValueError, match="is no metric"):
        monitor.compute(only=["kept"])
    monitor.update(**batch(0))
    assert list(monitor.compute(only="zero_grad")) == ["clip/zero_grad"]
    for found in (monitor.compute, bandpo.ClipStats(monitor.sums, monitor.maxima).metrics):
        with pytest.raises(ValueError, match="is no metric .did you mean 'zero_grad'"):
            found(only=["zero_grads"])


def test_monitors_merge() -> None:
    one, other, neither = (bandpo.Monitor() for _ in range(3))
    one.update(**batch(0))
    other.update(**batch(1))
    one.merge(other)
    one.merge(neither)
    neither.merge(other)
    neither.update(**batch(0))
    want = bandpo.clip_stats(**whole(batch(0), batch(1))).metrics()
    same(one.compute(), want)
    same(neither.compute(), want)
    wider = bandpo.Monitor(clip_args={"delta": 0.5})
    for stranger, says in (
        (bandpo.Monitor("fixed"), "measures Fixed"),
        (wider, "delta=0.5"),
        ("x", "a bandpo.Monitor"),
    ):
        with pytest.raises(InputError, match=says):
            one.merge(stranger)  # type: ignore[arg-type]


def test_a_clip_keeps_all_of_the_gradient_where_there_is_none() -> None:
    monitor, tokens = bandpo.Monitor("fixed"), batch(0)
    monitor.update(**tokens | {"advantages": torch.zeros(6)})
    found = monitor.compute("")
    assert found["gradient_kept"] == 1 and found["zero_grad"] == found["gradient_opposed"] == 0
    monitor.update(**tokens)
    assert monitor.compute("")["gradient_kept"] == bandpo.clip_stats(**tokens, clip="fixed").metrics()["gradient_kept"]


def _rank(rank: int, folder: str) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    monitor = bandpo.Monitor()
    monitor.update(**batch(rank, rows=4 + rank))
    dist.all_reduce(monitor.sums)
    dist.all_reduce(monitor.maxima, op=dist.ReduceOp.MAX)
    torch.save(monitor.compute(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_add_up_as_the_page_says(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "explain.md").read_text("utf-8")
    assert "dist.all_reduce(monitor.sums)" in page and "dist.all_reduce(monitor.maxima, op=dist.ReduceOp.MAX)" in page
    mp.start_processes(_rank, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    want = bandpo.clip_stats(**whole(batch(0, 4), batch(1, 5))).metrics()
    for rank in (0, 1):
        same(torch.load(tmp_path / f"{rank}.pt", weights_only=True), want)


class NoWaiting(TorchDispatchMode):
    """Fails where a value of a tensor is asked for, or a shape depends on one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "_to_copy_sync", "unique"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("clip", ["band", "fixed", "sapo", "gspo", "m2po", "kl_cov"])
def test_nothing_waits_for_the_device(clip: str) -> None:
    monitor = bandpo.Monitor(clip)
    with NoWaiting():
        for seed in range(2):
            monitor.update(**batch(seed))
        monitor.compute()
        monitor.reset()
        monitor.update(**batch(2))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        float(torch.ones(1).sum())


def test_schedules_anchors_and_refusals() -> None:
    monitor = bandpo.Monitor("fixed", {"eps_high": {"start": 0.9, "end": 0.1}, "eps_low": 0.2})
    monitor.update(**batch(0), progress=1.0)
    same(monitor.compute(), bandpo.clip_stats(**batch(0), clip=bandpo.Fixed(0.2, 0.1)).metrics())
    rollout = batch(0)["old_logps"] * 1.1
    anchored = bandpo.Monitor("band", anchor="both")
    anchored.update(**batch(0), rollout_logps=rollout)
    same(anchored.compute(), bandpo.clip_stats(**batch(0), anchor="both", rollout_logps=rollout).metrics())
    with pytest.raises(InputError, match="did you mean 'band'"):
        bandpo.Monitor("bnad")
    with pytest.raises(InputError, match="needs entropies"):
        bandpo.Monitor("archer").update(**batch(0))
    with pytest.raises(InputError, match="mask is"):
        monitor.update(**batch(0) | {"mask": torch.ones(2)})


# ---------------------------------------------------------------- a host's logger


def test_the_pages_subclass_of_trls_trainer_logs_them(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from trl_support import make_trainer

    page = (Path(__file__).parent.parent / "docs" / "explain.md").read_text("utf-8")
    code = next(x for x in page.split("``` {.python}\n") if "class Measured" in x).partition("```")[0]
    names: dict[str, Any] = {}
    exec(compile(code, "explain.md", "exec"), names)
    for name, several, updates in (
        ("many", True, {}),
        ("one", False, {"num_iterations": 1, "steps_per_generation": 2}),
    ):
        trainer = make_trainer(tmp_path / name, trainer=names["Measured"], max_steps=4, **updates)
        trainer.train()
        found = [entry for entry in trainer.state.log_history if "clip/zero_grad" in entry]
        assert len(found) == 4 and names["Measured"].monitor.compute() == {}
        for entry in found:
            assert entry["clip/zero_grad"] == pytest.approx(entry["clip_ratio/region_mean"], abs=0.05)
        assert any(entry["clip/zero_grad"] > 0 for entry in found) == several
        assert all(0 < entry["clip/gradient_kept"] <= 1 for entry in found)


def train(out: Path, **options: Any) -> list[dict[str, float]]:
    from trl_support import make_trainer

    trainer = make_trainer(out, clip="host", max_steps=4, **options)
    trainer.train()
    entries = [{k: v for k, v in entry.items() if k.startswith("clip/")} for entry in trainer.state.log_history]
    entries = [entry for entry in entries if entry]
    assert len(entries) == 4 and any(entry["clip/zero_grad"] > 0 for entry in entries)
    return entries


def test_they_ride_to_trackio_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    logged = train(tmp_path / "run", report_to="trackio", run_name="measured", project="bandpo")
    with sqlite3.connect(tmp_path / "trackio" / "bandpo.db") as file:
        rows = [json.loads(x) for (x,) in file.execute("select metrics from metrics order by id")]
    file.close()
    found = [{k.removeprefix("train/"): v for k, v in row.items() if k.startswith("train/clip/")} for row in rows]
    assert [row for row in found if row] == logged


def test_they_ride_to_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event = pytest.importorskip("tensorboardX.proto.event_pb2", reason="tensorboardX is not installed")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    logged = train(tmp_path / "run", report_to="tensorboard")
    found: dict[int, dict[str, float]] = {}
    for path in (tmp_path / "board").rglob("events*"):
        data, place = path.read_bytes(), 0
        while place < len(data):  # length, a checksum, the record, a checksum
            (length,) = struct.unpack_from("<Q", data, place)
            record = event.Event.FromString(data[place + 12 : place + 12 + length])
            for value in record.summary.value:
                if value.tag.startswith("train/clip/"):
                    found.setdefault(record.step, {})[value.tag.removeprefix("train/")] = value.simple_value
            place += 16 + length
    assert [pytest.approx(entry) for entry in logged] == [found[step] for step in sorted(found)]
