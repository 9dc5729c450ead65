"""``quantize_inputs``: linears that run from int8 may round their inputs to 8 bits."""

from __future__ import annotations

from pylomin.errors import PassError
from pylomin.lazy.offload import residencies_of
from pylomin.passes.selection import ModuleT, check_model


def quantize_inputs(model: ModuleT, enabled: bool = True) -> ModuleT:
    """Let linears that run from ``"int8-row"`` weights round their inputs to 8 bits, which takes half of the time.

    Also called W8A8, or dynamic activation quantisation: each row of input is written in steps of a 127th of its
    largest magnitude, and multiplied by the codes in int32. That costs accuracy: a relative RMS error of about 0.9 %
    for inputs that are normally distributed (the codes have 0.8 %), and more where a few are much larger than the
    others, as in large language models (Dettmers et al. 2022, "LLM.int8()"). Compare outputs of your model before you
    rely on it.

    It applies to ``nn.Linear`` with at most 32 rows of input, where the processor has instructions for products of int8
    and no gradient is needed. All else is computed as without it.

    Args:
        model: changed in place and returned.
        enabled: False: multiply as exactly as float32 again.

    Raises:
        PassError: nothing of the model is offloaded.

    >>> from torch import nn
    >>> from pylomin.passes.lazy_loading import lazy_loading
    >>> model = quantize_inputs(lazy_loading(nn.Linear(4, 2)))
    """
    check_model(model)
    residencies = residencies_of(model)
    if not residencies:
        raise PassError("nothing of this model is offloaded yet; apply quantize_inputs to what pylomin.load returns.")
    for residency in residencies:
        residency.quantizes_inputs = enabled
    return model
