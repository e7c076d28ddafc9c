"""A study without a file: one recipe, some seeds, some clips."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from bandpo._input import InputError
from bandpo.lab.reading import read_recipe
from bandpo.lab.study.file import Study, parse

CLIPS = ("none", "fixed")


def short_study(recipe: str, seeds: Sequence[int], clips: Sequence[str] = ()) -> Study:
    """Return the study of a recipe under several clips.

    Args:
        recipe: a recipe's name or a YAML file.
        seeds: one run of each clip for every one of them.
        clips: their names; the recipe's own keeps its arguments. None: the recipe's own, no clip and the fixed one.

    Returns:
        The study; the first clip is what the others are compared with.

    Raises:
        InputError: no such recipe, or a clip or a seed is given twice.
    """
    file = read_recipe(recipe)
    own = str(file.keys.get("clip", "band"))
    named = list(clips) or [*CLIPS, *([own] if own not in CLIPS else [])]
    if len(set(named)) < len(named):
        raise InputError(f"--compare {','.join(named)}: names a clip twice; give each once")
    keys = {"recipe": file.keys, "arms": {name: {"clip": name} for name in named}, "seeds": list(seeds)}
    return parse(yaml.safe_dump(keys, sort_keys=False), file.name)
