"""What is said where a device cannot do what is needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pylomin.errors import BudgetError, TraceError
from pylomin.io.sizes import format_bytes
from pylomin.residency.places import Places
from pylomin.residency.weight import Weight

SPARE_SHARE = 8  # of free memory that is not counted on: it may be in pieces
HOPELESS = "No memory_budget is small enough: use smaller inputs, or free memory of the device."


class DeviceMemoryError(BudgetError, torch.OutOfMemoryError):
    """A device has no memory left, for weights that the budget has room for or for what is computed with them.

    It is also torch's own error, for code that expects that.
    """


def device_is_full(
    weights: Sequence[Weight], places: Places, used_bytes: int, memory_budget: int | None
) -> DeviceMemoryError:
    """``weights`` found no memory on their device, though ``memory_budget`` has room for them."""
    name = max(weights, key=lambda weight: weight.nbytes).name
    needed_bytes = places.peak_bytes
    device, carrier = next(iter(places.carriers.items()))
    free_bytes = carrier.device.free_bytes()
    would_fit = used_bytes + free_bytes - free_bytes // SPARE_SHARE
    if would_fit >= used_bytes + needed_bytes:
        advice = f"Use a memory_budget of at most {would_fit} ({format_bytes(would_fit)}): pylomin.set_memory_budget."
    else:
        advice = HOPELESS
    given = "not given" if memory_budget is None else f"{memory_budget} ({format_bytes(memory_budget)})"
    return DeviceMemoryError(
        f"{device} has no memory left for weight '{name}', which needs {format_bytes(needed_bytes)}. Weights have "
        f"{format_bytes(used_bytes)} of it, {format_bytes(free_bytes)} are free, and memory_budget is {given}. {advice}"
    )


def computing_found_none(
    weight: Weight, cause: BaseException, *, budgets: tuple[int | None, int | None], refusal: str | None
) -> DeviceMemoryError:
    """What is computed with ``weight`` found no memory on its device.

    Args:
        cause: what torch said.
        budgets: before and after room was made.
        refusal: why it was not computed once more; None: it was, in vain.
    """
    before, after = budgets
    said = (str(cause).splitlines() or [type(cause).__name__])[0]
    done = "was computed once more, in vain" if refusal is None else f"was not computed once more, for {refusal}"
    if after is None or before is None or after >= before:
        advice = "Run it again, or use smaller inputs." if refusal is not None else HOPELESS
    else:
        advice = (
            f"memory_budget is {after} ({format_bytes(after)}) now, and was {before}: run it again, or begin with that "
            f"budget: pylomin.set_memory_budget(model, {after})."
        )
    return DeviceMemoryError(
        f"{weight.layout.device} has no memory left for what is computed with weight '{weight.name}': {said} "
        f"All weights that were not in use have left. It {done}. {advice}"
    )


def capture_error() -> TraceError:
    """A CUDA graph is captured."""
    return TraceError(
        "a CUDA graph is being captured, and the loading of offloaded weights cannot be part of it: its replays would "
        "read memory that others use by then. Run the model without capturing (torch.compile without "
        "mode='reduce-overhead'), or undo offloading first: pylomin.restore(model)."
    )
