"""BandPO and every ratio clip of LLM reinforcement learning: a clip is its gradient coefficient c(p, r, A)."""

from bandpo import testing as testing
from bandpo._input import InputError as InputError
from bandpo.analysis.audit import Audit as Audit
from bandpo.analysis.audit import audit as audit
from bandpo.analysis.audit import top_k_divergence as top_k_divergence
from bandpo.analysis.audit import whole_divergence as whole_divergence
from bandpo.analysis.explain import explain as explain
from bandpo.analysis.explanation import Explanation as Explanation
from bandpo.analysis.match import match_delta as match_delta
from bandpo.analysis.monitor import Monitor as Monitor
from bandpo.clips import clip_advantages as clip_advantages
from bandpo.clips import get_clip as get_clip
from bandpo.clips import list_clips as list_clips
from bandpo.clips.base import Clip as Clip
from bandpo.clips.base import Region as Region
from bandpo.clips.combined import Sides as Sides
from bandpo.clips.gates import Gate as Gate
from bandpo.clips.regions import Band as Band
from bandpo.clips.regions import Fixed as Fixed
from bandpo.clips.regions import NoClip as NoClip
from bandpo.loss.aggregation import aggregate as aggregate
from bandpo.loss.policy import LossOutput as LossOutput
from bandpo.loss.policy import clip_stats as clip_stats
from bandpo.loss.policy import policy_loss as policy_loss
from bandpo.loss.stats import ClipStats as ClipStats
from bandpo.operator.band import Bounds as Bounds
from bandpo.operator.band import band as band
from bandpo.operator.band import band_eps as band_eps
from bandpo.operator.band import binary_divergence as binary_divergence
from bandpo.operator.band import implied_delta as implied_delta
from bandpo.operator.band import in_band as in_band
from bandpo.operator.certificate import Certificate as Certificate
from bandpo.operator.certificate import certify as certify
from bandpo.operator.divergence import Divergence as Divergence
from bandpo.operator.family import get_divergence as get_divergence
from bandpo.operator.tokens import Tokens as Tokens

__version__ = "0.1.0"
__all__ = [
    "Audit",
    "Band",
    "Bounds",
    "Certificate",
    "Clip",
    "ClipStats",
    "Divergence",
    "Explanation",
    "Fixed",
    "Gate",
    "InputError",
    "LossOutput",
    "Monitor",
    "NoClip",
    "Region",
    "Sides",
    "Tokens",
    "aggregate",
    "audit",
    "band",
    "band_eps",
    "binary_divergence",
    "certify",
    "clip_advantages",
    "clip_stats",
    "explain",
    "get_clip",
    "get_divergence",
    "implied_delta",
    "in_band",
    "list_clips",
    "match_delta",
    "policy_loss",
    "top_k_divergence",
    "whole_divergence",
]
