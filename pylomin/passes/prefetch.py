"""``prefetch``: the next layer loads while this one computes."""

from __future__ import annotations

import os

from pylomin.errors import PassError
from pylomin.lazy.offload import residencies_of, want_prefetch
from pylomin.passes.memory_budget import set_memory_budget
from pylomin.passes.planning import adoption
from pylomin.passes.selection import ModuleT, check_model
from pylomin.residency.plan import Plan


def prefetch(
    model: ModuleT,
    *,
    depth: int | None = None,
    readers: int | None = None,
    memory_budget: int | str | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
) -> ModuleT:
    """Read weights in the background before they are used, in the order recorded so far.

    The first forward has no order to go by and loads on demand, unless there is a plan of an earlier run. A wrong
    prediction costs a read, never a wrong result, and never the budget: what is needed now goes before what may be
    needed next. Where weights are mapped (see ``reading_mode`` of :func:`pylomin.lazy_loading`), there is nothing to
    wait for, and nothing is read ahead.

    Args:
        model: changed in place and returned. If nothing of it is offloaded yet, the pass takes effect when
            ``lazy_loading`` is applied to it.
        depth: how many groups to read ahead; small ones, which are read faster than a thread wakes, do not count.
            Default: 1, or under a memory budget as many as its window holds. A second call changes it.
        readers: how many threads, at one time, read what goes from files to a device such as ``"cuda"``. Default:
            unchanged; one, at first.
        memory_budget: a new budget, as in :func:`pylomin.lazy_loading`. Default: unchanged.
        plan: of an earlier run of the same model: a :class:`Plan`, or the file that ``pylomin.plan_of(model).save``
            wrote. What stays is decided anew, for the present budget.

    Raises:
        PassError: ``depth`` or ``readers`` is out of range, or there is nothing yet that ``memory_budget`` or ``plan``
            could apply to.
        PlanError: the plan was made for another model. The model is unchanged.
        BudgetError: ``memory_budget`` is too small, as in :func:`pylomin.lazy_loading`. The model is unchanged.
    """
    check_model(model)
    for name, count in (("depth", depth), ("readers", readers)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise PassError(f"{name} is {count!r}; expected an int of at least 1.")
    residencies = residencies_of(model)
    if not residencies:
        if memory_budget is not None or plan is not None:
            raise PassError(
                "nothing in this model is offloaded yet, so there is no budget to set and nothing to plan for. Pass "
                "memory_budget to lazy_loading, or apply prefetch after it."
            )
        want_prefetch(model, depth, readers)
    adopt = None if plan is None else adoption(model, plan)
    if memory_budget is not None:
        set_memory_budget(model, memory_budget)
    for residency in residencies:
        residency.set_depth(depth)
        if readers is not None:
            residency.set_readers(readers)
    if adopt is not None:
        adopt()
    return model
