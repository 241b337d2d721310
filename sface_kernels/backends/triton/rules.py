"""How the screen decides, derived from the hyper-parameters and D. Imports no Triton."""

from __future__ import annotations

import math
from typing import NamedTuple

from ...types import HyperParameters

CANDIDATE_SHARE = 1 / 1024  # the cheap form of what is no candidate is accurate to here


class Rules(NamedTuple):
    """How the screen decides; derived from the hyper-parameters and D."""

    screens: bool  # False: every pair may be active, there is nothing to screen for
    threshold: float  # candidates have at least this screened cosine
    cheap: bool  # inter_weight_below is accurate for everything that is no candidate


def make_rules(hp: HyperParameters, features: int) -> Rules:
    """The threshold on the screened cosine that misses no active pair (docs/math.md §3)."""
    share = min(hp.filter_eps, CANDIDATE_SHARE)
    if share <= 0:
        return Rules(False, -2.0, False)
    angle = hp.b + math.log((1 - share) / share) / hp.k_inter
    # rounding a unit row to fp16 moves it by at most 2⁻¹¹ of its length and half a subnormal step per feature
    moved = 2.0**-11 + 2.0**-25 * math.sqrt(features)
    # fp32 sums that tensor cores may truncate, and the fp32 norms on both sides
    bound = 2 * moved + moved * moved + 4e-6 + features * 2.0**-22
    threshold = math.cos(max(angle, 0.0)) - bound if angle < math.pi else -2.0
    far_exponent = hp.k_inter * (math.acos(-0.5) - hp.b) / math.log(2)
    return Rules(threshold > -1, threshold, threshold + 2 * bound <= 0.26 and far_exponent > 60)
