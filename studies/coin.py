"""A reward that is pure noise: whatever drifts under it is the clip's own doing."""

import random


def coin(completions, **columns):
    """1 or 0 for each answer, whatever it says; from Python's generator, which a checkpoint keeps."""
    return [float(random.random() < 0.5) for _ in completions]
