"""``chunked_embedding``: a large table is read by rows, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from torch import nn

from pylomin.errors import PassError
from pylomin.lazy.offload import find_ties, offload, residency_for, slots_of
from pylomin.lazy.sources import written_sources
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.passes.lazy_loading import check_parameter
from pylomin.passes.selection import ModuleT, check_model, select_modules
from pylomin.residency.limits import format_bytes


def chunked_embedding(
    model: ModuleT,
    *,
    target_module_name: str | None = None,
    target_modules: Iterable[nn.Module] | None = None,
    chunk_size: int = 2048,
) -> ModuleT:
    """Look up large embeddings with at most ``chunk_size`` rows of the table in memory.

    A lookup reads the rows that are asked for, each once, in the order in which they lie. Outputs, module class and
    state-dict names are unchanged. An embedding that is still in memory is offloaded first, with what is tied to it.

    Args:
        model: changed in place and returned.
        target_module_name: the name of one ``nn.Embedding``, such as ``"embeddings.word_embeddings"``.
        target_modules: embeddings, instead of a name.
        chunk_size: rows. A second call changes it.

    Raises:
        PassError: an argument is wrong, or a target is no embedding or uses ``max_norm``, which rewrites its rows at
            every lookup. The model is unchanged.
        ScratchError: the table could not be written.

    >>> model = chunked_embedding(nn.Sequential(nn.Embedding(100, 8)), target_module_name="0", chunk_size=16)
    """
    check_model(model)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise PassError(f"chunk_size is {chunk_size!r}; expected a number of rows, at least 1.")
    targets = _targets(model, target_module_name, target_modules)
    ties = [tie for tie in find_ties(slots_of(model)) if any(slot.module in targets for slot in tie.slots)]
    in_memory = [tie for tie in ties if not isinstance(tie.parameter, OffloadedTensor)]
    for tie in in_memory:
        check_parameter(tie)
    if in_memory:
        residency = residency_for(model)
        offload(model, in_memory, written_sources(in_memory, residency, None), residency)
    for module in targets:
        table = module.weight
        assert isinstance(table, OffloadedTensor)
        table.chunk_rows = chunk_size
    return model


def _targets(model: nn.Module, name: str | None, modules: Iterable[nn.Module] | None) -> list[nn.Embedding]:
    if (name is None) == (modules is None):
        raise PassError(
            f"give either target_module_name or target_modules. Embeddings of this model: {_embeddings(model)}."
        )
    if name is None:
        found = select_modules(model, target_modules=modules)
    else:
        try:
            found = [model.get_submodule(name)]
        except AttributeError:
            similar = get_close_matches(name, [n for n, _ in model.named_modules()], n=1)
            hint = f" (similar: '{similar[0]}')" if similar else ""
            raise PassError(
                f"the model has no module '{name}'{hint}. Embeddings of this model: {_embeddings(model)}."
            ) from None
    if not found:
        raise PassError(f"target_modules is empty. Embeddings of this model: {_embeddings(model)}.")
    targets: list[nn.Embedding] = []
    for module in found:
        if not isinstance(module, nn.Embedding):
            raise PassError(
                f"{type(module).__name__} is no nn.Embedding. Embeddings of this model: {_embeddings(model)}."
            )
        if module.max_norm is not None:
            raise PassError(
                f"{module} has max_norm, which rewrites the rows that are looked up; that cannot be done by chunks. "
                "Set module.max_norm = None if the weights are trained (they are within the norm then), or leave the "
                "module to lazy_loading."
            )
        targets.append(module)
    return targets


def _embeddings(model: nn.Module) -> str:
    found = [
        f"'{name}' ({format_bytes(module.weight.nbytes)})"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    return ", ".join(found) or "none"
