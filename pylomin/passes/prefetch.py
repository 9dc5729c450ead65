"""``prefetch``: the next layer loads while this one computes."""

from __future__ import annotations

from pylomin.errors import PassError
from pylomin.lazy.offload import check_budget, offloaded_footprints, residencies_of, want_prefetch
from pylomin.passes.selection import ModuleT, check_model
from pylomin.residency.limits import parse_bytes


def prefetch(model: ModuleT, *, depth: int | None = None, memory_budget: int | str | None = None) -> ModuleT:
    """Read weights in the background before they are used, in the order recorded so far.

    The first forward has no order to go by and loads on demand. A wrong prediction costs a read, never a wrong result,
    and never the budget: what is needed now goes before what may be needed next.

    Args:
        model: changed in place and returned. If nothing of it is offloaded yet, the pass takes effect when
            ``lazy_loading`` is applied to it.
        depth: how many groups to read ahead; small ones, which are read faster than a thread wakes, do not count.
            Default: 1. A second call changes it.
        memory_budget: a new budget, as in :func:`pylomin.lazy_loading`. Default: unchanged.

    Raises:
        PassError: ``depth`` is out of range, or there is nothing yet that ``memory_budget`` could apply to.
        BudgetError: ``memory_budget`` is too small, as in :func:`pylomin.lazy_loading`. The model is unchanged.
    """
    check_model(model)
    depth = 1 if depth is None else depth
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise PassError(f"depth is {depth!r}; expected an int of at least 1.")
    residencies = residencies_of(model)
    if not residencies:
        if memory_budget is not None:
            raise PassError(
                "nothing in this model is offloaded yet, so there is no budget to set. Pass memory_budget to "
                "lazy_loading, or apply prefetch after it."
            )
        want_prefetch(model, depth)
    if memory_budget is not None:
        budget = parse_bytes(memory_budget)
        check_budget(offloaded_footprints(model), budget)
        for residency in residencies:
            residency.set_budget(budget)
    for residency in residencies:
        residency.set_depth(depth)
    return model
