"""BandPO: trust regions projected into ratio bounds that know each token's probability (arXiv 2603.04918)."""

from bandpo import radii as radii
from bandpo import testing as testing
from bandpo._checks import InputError as InputError
from bandpo.aggregation import aggregate as aggregate
from bandpo.bounds import Bounds as Bounds
from bandpo.bounds import band as band
from bandpo.bounds import band_eps as band_eps
from bandpo.bounds import binary_divergence as binary_divergence
from bandpo.bounds import implied_delta as implied_delta
from bandpo.bounds import in_band as in_band
from bandpo.certificate import Certificate as Certificate
from bandpo.certificate import certify as certify
from bandpo.clips import Band as Band
from bandpo.clips import Fixed as Fixed
from bandpo.clips import NoClip as NoClip
from bandpo.clips import Region as Region
from bandpo.clips import Sides as Sides
from bandpo.clips import get_clip as get_clip
from bandpo.diagnostics import ClipStats as ClipStats
from bandpo.divergences import Divergence as Divergence
from bandpo.family import get_divergence as get_divergence
from bandpo.loss import LossOutput as LossOutput
from bandpo.loss import clip_stats as clip_stats
from bandpo.loss import policy_loss as policy_loss
from bandpo.radii import match_delta as match_delta
from bandpo.whole import Audit as Audit
from bandpo.whole import audit as audit
from bandpo.whole import top_k_divergence as top_k_divergence
from bandpo.whole import whole_divergence as whole_divergence

__version__ = "0.1.0"
__all__ = [
    "Audit",
    "Band",
    "Bounds",
    "Certificate",
    "ClipStats",
    "Divergence",
    "Fixed",
    "InputError",
    "LossOutput",
    "NoClip",
    "Region",
    "Sides",
    "aggregate",
    "audit",
    "band",
    "band_eps",
    "binary_divergence",
    "certify",
    "clip_stats",
    "get_clip",
    "get_divergence",
    "implied_delta",
    "in_band",
    "match_delta",
    "policy_loss",
    "top_k_divergence",
    "whole_divergence",
]
