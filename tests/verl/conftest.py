"""Tests of the verl engine; they need verl, so they run in an environment of their own: make test-verl."""

import os
import warnings

os.environ.setdefault("HYDRA_FULL_ERROR", "0")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of verl's imports, not of ours
    import verl.workers.config  # noqa: F401
    import verl.workers.utils.losses  # noqa: F401
