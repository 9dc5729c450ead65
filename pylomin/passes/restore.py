"""``restore``: back to an ordinary model in memory."""

from __future__ import annotations

from torch import nn

from pylomin.errors import PassError
from pylomin.lazy.module import LazyModule, original_class
from pylomin.lazy.offload import offloaded_slots, residencies_of
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.passes.selection import ModuleT, check_model


def restore(model: ModuleT) -> ModuleT:
    """Undo all passes: weights in memory again, modules of their own classes, ties kept, ``requires_grad`` as it was.

    Args:
        model: changed in place and returned. All of its weights must fit in memory.

    Raises:
        PassError: no pass was applied to the model.
        StoreReadError: a weight cannot be read. The model is unchanged.
    """
    check_model(model)
    slots = offloaded_slots(model)
    swapped = [module for module in model.modules() if isinstance(module, LazyModule)]
    if not slots and not swapped:
        raise PassError("there is nothing to restore: no pass was applied to this model.")
    residencies = residencies_of(model)
    ordinary: dict[OffloadedTensor, nn.Parameter] = {}
    for _, offloaded in slots:
        if offloaded not in ordinary:
            ordinary[offloaded] = offloaded.to_parameter()
    for slot, offloaded in slots:
        slot.module._parameters[slot.name] = ordinary[offloaded]
    for module in swapped:
        cls = type(module)
        if original_class(cls) is not cls:
            object.__setattr__(module, "__class__", original_class(cls))
        else:  # somebody made a subclass of the lazy class for this module, as parametrize does
            cls.__bases__ = tuple(original_class(base) for base in cls.__bases__)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
    for residency in residencies:
        residency.set_depth(0)
    return model
