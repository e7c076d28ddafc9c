"""The clips by name. To add one: its file (or its class in `regions`), one row here, one formula in tests/truth."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bandpo._input import InputError, as_arguments, check_keywords, is_import_path, load_object, nearest
from bandpo.clips.anchored import ANCHORS as ANCHORS
from bandpo.clips.anchored import anchored as anchored
from bandpo.clips.archer import Archer
from bandpo.clips.aspo import Aspo
from bandpo.clips.atr import Atr
from bandpo.clips.band_sequence import BandSequence
from bandpo.clips.bapo import Bapo
from bandpo.clips.base import Clip as Clip
from bandpo.clips.base import Region as Region
from bandpo.clips.ce_gppo import CeGppo
from bandpo.clips.cispo import Cispo
from bandpo.clips.combined import Capped, Intersection, Sides, Union
from bandpo.clips.covariance import ClipCov, KlCov
from bandpo.clips.cppo import Cppo
from bandpo.clips.dcpo import Dcpo
from bandpo.clips.dgpo import Dgpo
from bandpo.clips.dppo import DppoKL, DppoTopK, DppoTV
from bandpo.clips.dro import Dro
from bandpo.clips.drpo import Drpo
from bandpo.clips.dual_clip import DualClip
from bandpo.clips.foreign import Foreign
from bandpo.clips.gates import Gate as Gate
from bandpo.clips.gmpo import Gmpo
from bandpo.clips.gspo import Gspo
from bandpo.clips.icepop import Icepop
from bandpo.clips.ipo import Ipo
from bandpo.clips.m2po import M2po
from bandpo.clips.maspo import Maspo
from bandpo.clips.opsm import Opsm
from bandpo.clips.pg_is import PgIs
from bandpo.clips.regions import Band, ClipHigher, Fixed, NoClip
from bandpo.clips.ripo import Ripo
from bandpo.clips.sapo import Sapo
from bandpo.clips.schedule import Scheduled, has_schedule
from bandpo.clips.spo import Spo
from bandpo.clips.topr import Topr
from bandpo.clips.trgppo import Trgppo
from bandpo.clips.trm import Trm
from bandpo.clips.truly_ppo import TrPpo, TrulyPpo
from bandpo.clips.up_grpo import UpGrpo
from bandpo.clips.vespo import Vespo
from bandpo.operator.tokens import Tokens

CLIPS: dict[str, type[Clip]] = {
    "none": NoClip,
    "fixed": Fixed,
    "clip_higher": ClipHigher,
    "dual_clip": DualClip,
    "band": Band,
    "sides": Sides,
    "dppo_tv": DppoTV,
    "dppo_kl": DppoKL,
    "cispo": Cispo,
    "sapo": Sapo,
    "dgpo": Dgpo,
    "gspo": Gspo,
    "trgppo": Trgppo,
    "dcpo": Dcpo,
    "atr": Atr,
    "ripo": Ripo,
    "archer": Archer,
    "union": Union,
    "intersection": Intersection,
    "capped": Capped,
    "bapo": Bapo,
    "dppo_topk": DppoTopK,
    "ipo": Ipo,
    "icepop": Icepop,
    "tr_ppo": TrPpo,
    "band_sequence": BandSequence,
    "trm": Trm,
    "opsm": Opsm,
    "cppo": Cppo,
    "m2po": M2po,
    "maspo": Maspo,
    "ce_gppo": CeGppo,
    "aspo": Aspo,
    "drpo": Drpo,
    "spo": Spo,
    "truly_ppo": TrulyPpo,
    "pg_is": PgIs,
    "topr": Topr,
    "dro": Dro,
    "kl_cov": KlCov,
    "clip_cov": ClipCov,
    "gmpo": Gmpo,
    "vespo": Vespo,
    "up_grpo": UpGrpo,
}
# a method whose published values changed: its name, the date or the source of the values, and these
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "ipo@2026-03": ("ipo", {"eps": 0.2}),
    "ipo@2026-08": ("ipo", {"eps": 0.1}),
    "ipo@2026-09": ("ipo", {"eps": 0.3}),
    "icepop@2026-09": ("icepop", {"floor": 0.2, "cap": 5.0}),
    "icepop@verl": ("icepop", {"floor": 0.5, "cap": 5.0}),
}
FORMS = ("ratio", "logp")


def list_clips() -> list[str]:
    """Return the names of all clips, as `get_clip` takes them.

    Returns:
        Names in the registry's order.
    """
    return list(CLIPS)


def get_clip(clip: object, **clip_args: Any) -> Clip:
    """Return the clip of that name, made with those arguments; a clip is returned as it is.

    Args:
        clip: a name (hyphens count as underscores; "ipo@2026-03" for the values of a date, see `PRESETS`), an import
            path of a class, a function that makes one, or an object ("path/to/file.py:name", "package.module:name";
            this runs the file), a clip, or any object with `coefficient(tokens)`.
        **clip_args: the arguments of the clip's class. Where it takes another clip, a name or a mapping will do:
            ``low={"clip": "fixed", "eps_low": 0.2}``. Where it takes a number, a schedule will do:
            ``delta={"start": 0.2, "end": 0.02, "shape": "linear"}`` ("cosine", "geometric"); see `Clip.at`.

    Returns:
        The clip.

    Raises:
        InputError: an unknown name or argument (the nearest one is named), or a value out of its range.
    """
    if isinstance(clip, str):
        return _make(clip, clip_args)
    if clip_args:
        raise InputError(
            f"clip_args={clip_args!r} with a clip that is made already: give them to {type(clip).__name__}()"
        )
    return _as_clip(clip)


def _make(clip: str, clip_args: Mapping[str, Any]) -> Clip:
    name, values = PRESETS.get(clip, (clip.replace("-", "_"), {}))
    if name in CLIPS:
        kind: Any = CLIPS[name]
    elif is_import_path(clip):
        kind = load_object(clip, "clip")
        if not callable(kind):
            return get_clip(kind, **clip_args)
    else:
        names = (*CLIPS, *PRESETS)
        raise InputError(
            f"clip={clip!r}: must be one of {', '.join(names)}{nearest(name, names)}, an import path "
            "(path/to/file.py:name), or a clip of your own"
        )
    check_keywords(f"clip {clip!r}", kind, clip_args)
    args, make = {**values, **clip_args}, partial(_made, kind)
    return Scheduled(make, args) if has_schedule(args) else make(**args)


def _made(kind: Any, /, **args: Any) -> Clip:
    return _as_clip(kind(**{key: _nested(key, value, kind) for key, value in args.items()}))


def _nested(key: str, value: Any, kind: Any) -> Any:
    """Make the clip that an argument names, where the argument takes one: `high`, `low`, `region`."""
    if "Region" not in str(inspect.signature(kind).parameters[key].annotation):
        return value
    if isinstance(value, Mapping):
        if "clip" not in value:
            raise InputError(f"{key}={dict(value)!r}: must name its clip, as in {{'clip': 'band', 'delta': 0.05}}")
        inner = {name: one for name, one in value.items() if name != "clip"}
        return get_clip(value["clip"], **as_arguments(inner))
    return get_clip(value) if isinstance(value, str) else value


def _as_clip(clip: object) -> Clip:
    if isinstance(clip, Clip):
        return clip
    if not callable(getattr(clip, "coefficient", None)) or isinstance(clip, type):
        raise InputError(
            f"clip={clip!r}: must be a name, as in clip='band', a clip, as in bandpo.Band(), or an object with "
            "coefficient(tokens)"
        )
    return Foreign(clip)


@torch.no_grad()
def clip_advantages(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip: object = "band",
    clip_args: Mapping[str, Any] | None = None,
    form: str = "ratio",
    anchor: str = "old",
    rollout_logps: Tensor | None = None,
    entropies: Tensor | None = None,
    rewards: Tensor | None = None,
    state_divergence: Tensor | None = None,
) -> Tensor:
    """Return the advantages with which a loop that multiplies a ratio by an advantage has this clip.

    The loop's own -r A' then has the gradient c(p, r, A) for |log r| <= 20. Call it after the forward pass of every
    micro-batch: once a rollout, where every ratio is 1, is no clip. The loop must not clamp the ratio nor whiten the
    advantages afterwards.

    Args:
        logps: natural-log probabilities of the taken actions under the policy in training, (batch, token) or any shape;
            may require gradients, none flow through the result.
        old_logps: the same under the policy that the ratio divides by, same shape.
        advantages: per token, or per sequence (batch,) or (batch, 1).
        mask: 1 for tokens, 0 for padding, same shape, or None.
        clip: a name, a clip, or any object with `coefficient(tokens)`; see `get_clip`.
        clip_args: the clip's arguments, where it is a name.
        form: "ratio" for c / r, in loops whose loss is -r A; "logp" for c itself, in loops whose loss is -A log pi.
        anchor: which old policy the clip measures from; see `anchored`.
        rollout_logps: as in `Tokens`.
        entropies: as in `Tokens`.
        rewards: as in `Tokens`.
        state_divergence: as in `Tokens`.

    Returns:
        Tensor of the shape of `logps`, detached, 0 in padding; in the wider dtype of `logps` and `advantages`.

    Raises:
        InputError: the same tensor for both log-probabilities, shapes or dtypes that do not fit, a bad clip or form.
    """
    if logps is old_logps:
        raise InputError(
            "old_logps is the same tensor as logps: every ratio is 1 and no clip can act; give the log-probabilities "
            "of the rollout's policy, and call this after the forward pass of every micro-batch, not once a rollout"
        )
    if form not in FORMS:
        raise InputError(f"form={form!r}: must be one of {', '.join(FORMS)}{nearest(form, FORMS)}")
    chosen = anchored(get_clip(clip, **as_arguments(clip_args)), anchor)
    tokens = Tokens(logps, old_logps, advantages, mask, rollout_logps, entropies, rewards, state_divergence)
    result = chosen.advantages(tokens) if form == "ratio" else chosen.coefficient(tokens)
    dtype = torch.promote_types(logps.dtype, advantages.dtype)
    most = torch.finfo(dtype).max  # float16 ends at 65504, and 0 times infinity would be NaN
    return result.clamp(-most, most).to(dtype)
