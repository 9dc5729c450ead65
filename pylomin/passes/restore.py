"""``restore``: back to an ordinary model in memory, or some of its modules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pylomin.errors import PassError
from pylomin.lazy.distributed import distributed_parameter, is_distributed
from pylomin.lazy.module import LazyModule, original_class
from pylomin.lazy.offload import offloaded_slots, residencies_of
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.passes.selection import ModuleT, check_model, select_modules


def restore(model: ModuleT, *, target_modules: Iterable[nn.Module] | None = None) -> ModuleT:
    """Undo all passes: weights in memory again, modules of their own classes, ties kept, ``requires_grad`` as it was.

    Args:
        model: changed in place and returned. All weights that are restored must fit in memory; no budget counts them.
        target_modules: these modules themselves, not what is below them, and whoever shares a weight with them. The
            rest stays offloaded. For modules that are to be trained. Default: all.

    Raises:
        PassError: no pass was applied to the model, or to any of the ``target_modules``.
        StoreReadError: a weight cannot be read. The model is unchanged.
    """
    check_model(model)
    slots = every_slot = offloaded_slots(model)
    swapped = [module for module in model.modules() if isinstance(module, LazyModule)]
    if target_modules is not None:
        chosen = set(select_modules(model, target_modules=target_modules))
        weights = {offloaded.weight for slot, offloaded in slots if slot.module in chosen}
        slots = [(slot, offloaded) for slot, offloaded in slots if offloaded.weight in weights]
        left = {slot.module for slot, offloaded in every_slot if offloaded.weight not in weights}
        swapped = [module for module in swapped if module not in left and module in {s.module for s, _ in slots}]
        if not slots:
            raise PassError(
                "there is nothing to restore: none of target_modules has an offloaded weight of its own. Modules below "
                "them are not meant; name them, or restore(model, target_modules=block.modules())."
            )
    if not slots and not swapped:
        raise PassError("there is nothing to restore: no pass was applied to this model.")
    residencies = residencies_of(model)
    ordinary: dict[OffloadedTensor, nn.Parameter] = {}
    for slot, offloaded in slots:
        if offloaded not in ordinary:
            ordinary[offloaded] = _in_memory(slot.owned, offloaded)
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
    if len(slots) == len(every_slot):
        for residency in residencies:
            residency.set_depth(0)
    return model


def _in_memory(parameter: nn.Parameter, offloaded: OffloadedTensor) -> nn.Parameter:
    if not is_distributed(parameter):
        return offloaded.to_parameter()
    restored: nn.Parameter = distributed_parameter(offloaded.shared(), parameter, requires_grad=offloaded.trainable)
    restored.__dict__.update(parameter.__dict__)
    return restored
