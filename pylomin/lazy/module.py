"""LazyModule: leaf modules whose weights are resident for the length of their forward."""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from pylomin.lazy.autograd import saving_pointers
from pylomin.lazy.compiling import Untraced, is_tracing, not_compiled
from pylomin.lazy.distributed import is_distributed, local_of, with_local
from pylomin.lazy.full_device import computed, module_refusal
from pylomin.lazy.fused import fused_linear
from pylomin.lazy.rnn import LazyRNN
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.residency.weight import Weight

is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled  # quick, as it is in every forward


class LazyModule(nn.Module):
    """Mixed into a module's own class by :func:`make_lazy`; never instantiated.

    While a forward holds the module's weights, reading the attribute gives the resident parameter. ``_parameters``
    itself is never touched, so what others put there (``functional_call``, a new parameter) wins, and there is nothing
    to put back when a forward raises.
    """

    finds_parameters: bool  # the module's own class leaves it to nn.Module to find parameters

    def __getattr__(self, name: str) -> Any:
        # What nn.Module looks for first, too; a class may answer for its parameters itself.
        value = self.__dict__["_parameters"].get(name) if type(self).finds_parameters else None
        if value is None:
            value = super().__getattr__(name)
        if type(value) is not OffloadedTensor:
            return _resident_shard(value) if is_distributed(value) else value
        weight = value.weight
        tensor = weight.tensor
        if tensor is None or not weight.holds or not value.is_whole:
            return value
        if value.trainable and _is_trained(tensor):
            return weight.trainable_twin() if weight.twin is None else weight.twin
        return tensor

    def __copy__(self) -> nn.Module:
        return self._rebuilt(lambda state: state)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        return self._rebuilt(lambda state: copy.deepcopy(state, memo), memo)

    def _rebuilt(
        self, copied: Callable[[dict[str, Any]], dict[str, Any]], memo: dict[int, Any] | None = None
    ) -> nn.Module:
        """The copy protocol of ``copyreg``, for this class instead of the one that pickles."""
        clone: nn.Module = type(self).__new__(type(self))
        if memo is not None:
            memo[id(self)] = clone
        clone.__setstate__(copied(self.__getstate__()))
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the module that it was, with its weights in memory."""
        original = original_class(type(self))
        if original.__reduce_ex__ is not object.__reduce_ex__ or original.__reduce__ is not object.__reduce__:
            return super().__reduce_ex__(protocol)
        rebuild = copyreg._reconstructor  # type: ignore[attr-defined]  # so that who unpickles needs no pylomin
        return (rebuild, (original, object, None), self.__getstate__())

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Hides the hook of the module's own class, which knows nothing of subclasses made by others."""


def _is_trained(tensor: torch.Tensor) -> bool:
    """Whether a trainable parameter is handed out as one that requires grad though nothing is recorded.

    Kernels are chosen by it. But a trace would record it as a constant, which cannot require grad; and of what requires
    grad, autocast would keep what it casts.
    """
    if torch.is_grad_enabled() or is_tracing():
        return False
    if not is_any_autocast_enabled():
        return True
    return not torch.is_autocast_enabled(tensor.device.type) or tensor.dtype is not torch.float32


def _resident_shard(value: Any) -> Any:
    """A DTensor whose local shard is resident, around that; any other as it is."""
    local = value._local_tensor
    if type(local) is not OffloadedTensor or not local.is_whole:
        return value
    tensor = local.weight.tensor
    if tensor is None or not local.weight.holds:
        return value
    shard = with_local(tensor.detach(), value)
    return shard.requires_grad_() if local.trainable and _is_trained(tensor) else shard


def lazy_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` that holds its weights around ``forward``; one, for as long as it is used."""
    made = (subclass for subclass in cls.__subclasses__() if subclass.__dict__.get("lazy_of") is cls)
    return next(made, None) or _make_class(cls)


def _make_class(cls: type[nn.Module]) -> type[nn.Module]:
    may_fuse = cls.forward is nn.Linear.forward

    @not_compiled
    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        group = whole_weights(self)
        if not group:
            return cls.forward(self, *args, **kwargs)
        if may_fuse and group[0].parts and not is_tracing():
            fused = fused_linear(self, group, args, kwargs)
            if fused is not None:
                return fused
        weights = group
        for weight in group:
            if weight.tiled and not is_tracing():
                weights = [weight for weight in group if not weight.tiled]
                break
        residency = group[0].residency
        hold = residency.hold(weights, group)
        if is_tracing():
            with Untraced(hold):
                return cls.forward(self, *args, **kwargs)
        with hold:
            if residency.carriers:
                run = functools.partial(computing, self, group, args, kwargs)
                return computed(run, group[0], functools.partial(module_refusal, self, cls))
            return computing(self, group, args, kwargs)

    def computing(self: nn.Module, group: list[Weight], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return cls.forward(self, *args, **kwargs)
        with saving_pointers(group):
            return cls.forward(self, *args, **kwargs)

    mixins = (LazyRNN, LazyModule) if issubclass(cls, nn.RNNBase) else (LazyModule,)
    taken = {n: getattr(cls, n) for n in ("__copy__", "__deepcopy__") if hasattr(cls, n)}  # the user's own
    namespace = taken | {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__, "lazy_of": cls}
    namespace["finds_parameters"] = cls.__getattr__ is nn.Module.__getattr__
    lazy: type[nn.Module] = type(cls)(f"Lazy{cls.__name__}", (*mixins, cls), namespace)  # type: ignore[misc]
    return lazy


def whole_weights(module: nn.Module) -> list[Weight]:
    """The whole offloaded weights that the module owns now, each once.

    Where another model's weight was put into the module, that one loads at the operation that uses it.
    """
    weights: list[Weight] = []
    parameters: Iterable[torch.Tensor | None] = module._parameters.values()
    for parameter in parameters:
        if parameter is not None and type(parameter) is not OffloadedTensor:
            parameter = local_of(parameter)
        if isinstance(parameter, OffloadedTensor) and parameter.is_whole:
            weight = parameter.weight
            if weight not in weights and (not weights or weight.residency is weights[0].residency):
                weights.append(weight)
    return weights


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a lazy class was made from; any other class itself."""
    original: type[nn.Module] = cls.__dict__.get("lazy_of", cls)
    return original


def holds_weights(module: nn.Module) -> bool:
    """Whether the weights of ``module`` should be resident for the length of its forward.

    Not those of a module with children, whose forward takes as long as theirs, and not those of which a forward needs
    some rows. They load at the operation that uses them.
    """
    own = [parameter for parameter in module._parameters.values() if parameter is not None]
    if not own or module._modules or isinstance(module, (nn.ParameterList, nn.ParameterDict)):
        return False
    return type(module).forward is not nn.Module.forward and not any(loads_rows(module, p.dim()) for p in own)


def loads_rows(module: nn.Module, dim: int) -> bool:
    """Whether a forward of ``module`` needs rows of its weights of ``dim`` dimensions, rather than all.

    So it is with tables, and with the packed weights of experts: three dimensions, in a class that is not torch's.
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return True
    return dim >= 3 and not type(module).__module__.startswith("torch.nn.")


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear with a weight of its own: ``nn.Linear``, or what transformers calls ``Conv1D``."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        return False
    # A Conv1D keeps its weight as (in, out).
    return isinstance(module, nn.Linear) or tuple(weight.shape) == (
        getattr(module, "nx", None),
        getattr(module, "nf", None),
    )


def loads_tiles(module: nn.Module) -> bool:
    """Whether a forward of ``module`` does nothing with its ``weight`` but multiply by it, so that tiles are enough."""
    cls = original_class(type(module))
    return is_linear(module) and (not isinstance(module, nn.Linear) or cls.forward is nn.Linear.forward)
