"""Computations that find no memory on a device: weights make room, and what changes nothing else is run once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from pylomin.residency.device_errors import DeviceMemoryError, computing_found_none
from pylomin.residency.weight import Weight

ResultT = TypeVar("ResultT")


def computed(run: Callable[[], ResultT], weight: Weight, refusal: Callable[[], str | None]) -> ResultT:
    """What ``run`` returns, which computes with ``weight`` on a device.

    Args:
        refusal: asked when there was no memory: why it must not run once more, or None.

    Raises:
        DeviceMemoryError: there was none again, or ``refusal`` had a reason. What was idle has left.
    """
    try:
        return run()
    except DeviceMemoryError:
        raise
    except torch.OutOfMemoryError as error:
        full = error.with_traceback(None)  # its frames have what was computed so far
    return computed_again(run, weight, full, refusal())


def computed_again(run: Callable[[], ResultT], weight: Weight, full: BaseException, refusal: str | None) -> ResultT:
    """Make room, and run for the second time, unless there is a ``refusal``; see :func:`computed`."""
    residency = weight.residency
    before = residency.memory_budget
    residency.make_room_for_computing()
    if refusal is None:
        try:
            return run()
        except DeviceMemoryError:
            raise
        except torch.OutOfMemoryError as error:
            full = error.with_traceback(None)
    raise computing_found_none(weight, full, budgets=(before, residency.memory_budget), refusal=refusal) from full


def module_refusal(module: nn.Module, cls: type[nn.Module]) -> str | None:
    """Why a forward of ``module`` that stopped in the middle must not run again; None where it may.

    It may where it only computes: in classes of torch without children, unless they are in a mode in which they update
    buffers or draw random numbers, and as long as nobody counts what is computed.

    Args:
        cls: its own class.
    """
    if not (cls.__module__.startswith("torch.nn.") or _is_transposed_linear(module)):
        return f"the forward of {cls.__qualname__} may have changed something before it stopped"
    if module.training and getattr(module, "track_running_stats", False):
        return f"{cls.__qualname__} updates its statistics while it trains"
    if module.training and isinstance(module, nn.RNNBase) and module.dropout:
        return f"{cls.__qualname__} draws random numbers while it trains"
    if torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False):
        return "hooks have seen the tensors that it saved for backward"
    if torch._C._len_torch_dispatch_stack():
        return "a mode has seen its operations"
    return None


def _is_transposed_linear(module: nn.Module) -> bool:
    """``Conv1D`` of transformers, which multiplies and adds."""
    weight = module._parameters.get("weight")
    return weight is not None and tuple(weight.shape) == (getattr(module, "nx", None), getattr(module, "nf", None))


def operator_refusal(func: Any, writes: bool) -> str | None:
    """Why an operator that stopped must not run again; None where it may."""
    if writes:
        return f"{func} writes to a tensor"
    if torch.Tag.nondeterministic_seeded in func.tags:
        return f"{func} draws random numbers"
    return None
