"""All families: real architectures in miniature, with random weights and nothing downloaded."""

from __future__ import annotations

from .audio import AUDIO
from .decoders import DECODERS
from .encoders import ENCODERS
from .family import Family
from .moe import MOE
from .multimodal import MULTIMODAL
from .seq2seq import SEQ2SEQ
from .state_space import STATE_SPACE
from .vision import VISION

FAMILIES: tuple[Family, ...] = (
    *ENCODERS,
    *DECODERS,
    *SEQ2SEQ,
    *MOE,
    *STATE_SPACE,
    *VISION,
    *AUDIO,
    *MULTIMODAL,
)
BY_NAME = {family.name: family for family in FAMILIES}
assert len(BY_NAME) == len(FAMILIES), "two families of one name"
