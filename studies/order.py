"""A reward for form alone: a calculation of three digits that stand in falling order, whatever its value."""

import re

FORM = re.compile(r"(\d)[-+*](\d)[-+*](\d)")


def falling(completions, **columns):
    """1 for each answer such as "7*5+3", whose digits do not rise; 0 for all else."""
    found = [FORM.fullmatch(text.strip()) for text in completions]
    return [float(m is not None and m[1] >= m[2] >= m[3]) for m in found]
