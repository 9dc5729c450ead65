"""``set_memory_budget``: another budget for a model that is offloaded already."""

from __future__ import annotations

from pylomin.errors import PassError
from pylomin.io.sizes import parse_bytes
from pylomin.lazy.offload import check_budget, offloaded_footprints, residencies_of
from pylomin.passes.selection import ModuleT, check_model


def set_memory_budget(model: ModuleT, memory_budget: int | str | None) -> ModuleT:
    """Change the memory budget of a live model, also while other threads run it.

    What is idle and no longer fits leaves now; what is in use leaves when it is released. From the next use on, the
    plan is that for the new budget.

    Args:
        model: changed in place and returned.
        memory_budget: as in :func:`pylomin.lazy_loading`; None: no budget, weights leave as soon as they were used.

    Raises:
        PassError: nothing of the model is offloaded.
        BudgetError: the budget is smaller than the largest group of weights used together. The model is unchanged.

    >>> from torch import nn
    >>> from pylomin.passes.lazy_loading import lazy_loading
    >>> model = set_memory_budget(lazy_loading(nn.Linear(4, 2)), "1MiB")
    """
    check_model(model)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    residencies = residencies_of(model)
    if not residencies:
        raise PassError("nothing of this model is offloaded yet; pass memory_budget to pylomin.lazy_loading.")
    check_budget(offloaded_footprints(model), budget)
    for residency in residencies:
        residency.set_budget(budget)
    return model
