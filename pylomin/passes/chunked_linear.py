"""``chunked_linear``: a large linear multiplies tile by tile, a tile or two of its weight in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pylomin.errors import PassError
from pylomin.io.sizes import format_bytes, parse_bytes
from pylomin.lazy.distributed import local_of
from pylomin.lazy.module import is_linear
from pylomin.lazy.offload import residencies_of
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.passes.lazy_loading import offload_modules
from pylomin.passes.selection import ModuleT, check_model, named_or_given


def chunked_linear(
    model: ModuleT,
    *,
    target_module_name: str | None = None,
    target_modules: Iterable[nn.Module] | None = None,
    chunk_size: int | str = "4MiB",
) -> ModuleT:
    """Multiply by large linear weights a tile at a time: one tile is in use, and at most one more on its way.

    Outputs are those of the plain layer within rounding: torch rounds products of another shape differently. Module
    class and state-dict names are unchanged. A linear that is still in memory is offloaded first, with what is tied to
    it. Under a memory budget, linears that do not fit in it twice are tiled also without this pass.

    Args:
        model: changed in place and returned.
        target_module_name: the name of one ``nn.Linear`` (or of one ``Conv1D`` of transformers), such as
            ``"lm_head"``.
        target_modules: linears, instead of a name. Default: all whose weight is larger than a tile.
        chunk_size: size of a tile: bytes as a string, or rows of the weight as an int (output features of an
            ``nn.Linear``, input features of a ``Conv1D``). A second call changes it. A memory budget may make tiles
            smaller.

    Raises:
        PassError: an argument is wrong, or a target is no linear. The model is unchanged.
        ScratchError: the weights could not be written.

    >>> model = chunked_linear(nn.Sequential(nn.Linear(8, 100)), target_module_name="0", chunk_size=16)
    """
    check_model(model)
    if isinstance(chunk_size, str):
        chunk_bytes = parse_bytes(chunk_size, what="chunk_size")
    elif isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise PassError(
            f"chunk_size is {chunk_size!r}; expected a number of rows, at least 1, or bytes such as '4MiB'."
        )

    def rows_of(module: nn.Module) -> int:
        row_bytes = weight_of(module).nbytes // max(1, len(weight_of(module)))
        return chunk_size if isinstance(chunk_size, int) else max(1, chunk_bytes // max(1, row_bytes))

    if target_module_name is None and target_modules is None:
        linears = [module for module in model.modules() if is_linear(module)]
        if not linears:
            raise PassError(f"{type(model).__name__} has no linears with a weight of their own.")
        targets = [module for module in linears if len(weight_of(module)) > rows_of(module)]
    else:
        targets = _targets(model, target_module_name, target_modules)
    offload_modules(model, targets)
    for module in targets:
        parameter = weight_of(module)
        assert isinstance(parameter, OffloadedTensor)
        parameter.weight.allow_tiles(rows_of(module))
    for residency in residencies_of(model):
        residency.set_budget(residency.memory_budget)
    return model


def weight_of(module: nn.Module) -> torch.Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return local_of(weight)


def _targets(model: nn.Module, name: str | None, modules: Iterable[nn.Module] | None) -> list[nn.Module]:
    choices = f"Linears of this model: {_linears(model)}."
    found = named_or_given(model, name, modules, choices=choices)
    for module in found:
        if not is_linear(module):
            raise PassError(f"{type(module).__name__} is no nn.Linear with a weight of its own. {choices}")
    return found


def _linears(model: nn.Module) -> str:
    """The largest; a model may have hundreds."""
    found = [(weight_of(module).nbytes, name) for name, module in model.named_modules() if is_linear(module)]
    largest = sorted(found, reverse=True)[:8]
    listed = ", ".join(f"'{name}' ({format_bytes(nbytes)})" for nbytes, name in largest)
    return (listed + (", ..." if len(found) > len(largest) else "")) or "none"
