"""``chunked_embedding``: a large table is read by rows, a bounded number at a time."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pylomin.errors import PassError
from pylomin.io.sizes import format_bytes
from pylomin.lazy.distributed import local_of
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.passes.lazy_loading import offload_modules
from pylomin.passes.selection import ModuleT, check_model, named_or_given


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
    offload_modules(model, targets)
    for module in targets:
        table = local_of(module.weight)
        assert isinstance(table, OffloadedTensor)
        table.chunk_rows = chunk_size
    return model


def _targets(model: nn.Module, name: str | None, modules: Iterable[nn.Module] | None) -> list[nn.Embedding]:
    choices = f"Embeddings of this model: {_embeddings(model)}."
    targets: list[nn.Embedding] = []
    for module in named_or_given(model, name, modules, choices=choices):
        if not isinstance(module, nn.Embedding):
            raise PassError(f"{type(module).__name__} is no nn.Embedding. {choices}")
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
