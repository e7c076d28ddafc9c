"""The engines are imported here once, where their own warnings at import are no error of ours."""

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator

import pytest

os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("TINKER_API_KEY", "tml-no-key")
ENGINES = ("torchrl.collectors", "torchrl.envs", "torchrl.objectives.llm", "ray.rllib.algorithms.ppo", "tinker")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in (*ENGINES, "stable_baselines3", "skyrl.backends.skyrl_train.utils.ppo_utils"):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)

logging.getLogger("torchrl").setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray on this machine alone, once for all tests."""
    import ray

    env = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": env})
        yield
        ray.shutdown()
