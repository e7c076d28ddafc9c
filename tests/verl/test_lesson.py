"""The lesson about verl, as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_verl_s_lesson_shows_one_gradient_twice() -> None:
    command = [sys.executable, "examples/105_verl.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (re.search(rf"^{label} +(\[.*\])$", done.stdout, flags=re.M) for label in ("gradient", "-c / tokens"))
    assert one and two and one[1] == two[1] == "[-0.375, 0.0, -0.227, 0.0]"
    assert "without gradient 2.0 of 4.0" in done.stdout and "-m verl.trainer.main_ppo" in done.stdout
