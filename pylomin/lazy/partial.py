"""Operators that need only some rows of an offloaded weight, or only its shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pylomin.lazy import tiles
from pylomin.lazy.experts import GatheredTensor
from pylomin.lazy.tensor import RULES, OffloadedTensor, aten, run_loaded
from pylomin.residency.weight import Layout

INDEX_DTYPES = (torch.int64, torch.int32)
BATCH_BYTES = 4 << 20  # 4 MiB; rows of a lookup that are in memory at one time


def rows_at(table: OffloadedTensor, indices: torch.Tensor, *, batch_rows: int | None = None) -> torch.Tensor:
    """``table[indices]``, reading those rows only, each once, at most ``batch_rows`` at a time.

    ``table`` has shape ``(rows, ...)``, ``indices`` any shape with values in ``[0, rows)``; the result has shape
    ``(*indices.shape, ...)``.
    """
    row_shape = table.shape[1:]
    wanted = indices.reshape(-1).to(device="cpu", dtype=torch.int64)
    rows, inverse = torch.unique(wanted, return_inverse=True)
    if batch_rows is None:
        batch_rows = max(1, _batch_bytes(table) // max(1, _row_bytes(table)))
    if len(rows) <= batch_rows:
        out = _read_rows(table, rows).index_select(0, inverse.to(table.device))
    else:
        out = torch.empty(len(wanted), *row_shape, dtype=table.dtype, device=table.device)
        order = torch.argsort(inverse)
        # Positions in the output, grouped by the row that they need, in the order of rows.
        ends = torch.cumsum(torch.bincount(inverse, minlength=len(rows)), 0)
        for first in range(0, len(rows), batch_rows):
            last = min(first + batch_rows, len(rows))
            begin = int(ends[first - 1]) if first else 0
            positions = order[begin : int(ends[last - 1])]
            values = _read_rows(table, rows[first:last])
            local = (inverse[positions] - first).to(table.device)
            out.index_copy_(0, positions.to(table.device), values.index_select(0, local))
    return out.view(*indices.shape, *row_shape)


def has_packed_rows(table: OffloadedTensor) -> bool:
    """Each row is one run of elements in the store, and not in memory now; nor should all of them be.

    Of a quantised table that never should, but its packed bytes.
    """
    if table.dim() == 0 or table.numel() == 0 or table.weight.tensor is not None or not table.weight.keeps_order:
        return False
    if table.chunk_rows is None and table.weight.residency.keeps_all and not table.weight.parts:
        return False
    return table.is_contiguous()


def _batch_bytes(table: OffloadedTensor) -> int:
    budget = table.weight.residency.memory_budget
    return BATCH_BYTES if budget is None else min(BATCH_BYTES, budget // 4)


def _row_bytes(table: OffloadedTensor) -> int:
    return table.nbytes // table.shape[0]


def _read_rows(table: OffloadedTensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows (sorted, unique), in that order. Neighbours are read together."""
    row_numel = table.numel() // table.shape[0]
    offset = int(table.storage_offset())
    runs: list[tuple[int, int]] = []
    for first, last in _runs(rows.tolist()):
        runs.append((offset + first * row_numel, offset + last * row_numel))
    values = table.weight.residency.load_runs(table.weight, runs)
    return values.view(len(rows), *table.shape[1:])


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """``[3, 4, 5, 9]`` as ``[(3, 6), (9, 10)]``."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


def _in_range(indices: torch.Tensor, rows: int) -> bool:
    if indices.dtype not in INDEX_DTYPES:
        return False  # the operator itself says what it thinks of others
    return not indices.numel() or (int(indices.min()) >= 0 and int(indices.max()) < rows)


def _embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    table, indices = args[:2]
    if not isinstance(table, OffloadedTensor) or not has_packed_rows(table) or table.dim() != 2:
        return NotImplemented
    if indices.dtype not in INDEX_DTYPES:
        return NotImplemented
    indices = indices.cpu()  # which rows to read has to be known here; one copy, if they are on a device
    if not _in_range(indices, table.shape[0]):
        # The kernel raises its own error before it reads a value; memory that is never touched costs nothing.
        func(torch.empty_strided(table.size(), table.stride(), dtype=table.dtype), indices)
        raise IndexError(f"index out of range in embedding '{table.weight.name}' of {table.shape[0]} rows")
    return rows_at(table, indices, batch_rows=table.chunk_rows)


def _index_select(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    table, dim, indices = args
    if indices.dim() > 1:
        return NotImplemented
    if not isinstance(table, OffloadedTensor) or not has_packed_rows(table) or dim % table.dim() != 0:
        return NotImplemented
    indices = indices.cpu()
    return rows_at(table, indices) if _in_range(indices, table.shape[0]) else NotImplemented


def _index(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    table, indices = args
    if not isinstance(table, OffloadedTensor) or not has_packed_rows(table):
        return NotImplemented
    if len(indices) != 1 or isinstance(indices[0], OffloadedTensor):
        return NotImplemented
    rows = indices[0]
    if rows.dtype == torch.bool:
        if rows.dim() != 1 or len(rows) != table.shape[0]:
            return NotImplemented
        rows = rows.nonzero().reshape(-1)
    elif rows.dtype == torch.uint8:
        return NotImplemented
    rows = torch.where(rows < 0, rows + table.shape[0], rows)
    if not _in_range(rows, table.shape[0]):
        return NotImplemented
    if table.dim() == 3 and rows.dim() == 1 and len(rows) * _row_bytes(table) > _batch_bytes(table):
        return GatheredTensor.of(table, rows)
    return rows_at(table, rows)


def _embedding_bag(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    table, indices = args[:2]
    if not isinstance(table, OffloadedTensor) or not has_packed_rows(table) or table.dim() != 2:
        return NotImplemented
    if not indices.numel() or not _in_range(indices, table.shape[0]):
        return NotImplemented
    rows, inverse = torch.unique(indices, return_inverse=True)
    if len(rows) * _row_bytes(table) > BATCH_BYTES:
        return NotImplemented
    names = [argument.name for argument in func._schema.arguments]
    bound = dict(zip(names, args, strict=False)) | kwargs
    bound["weight"] = _read_rows(table, rows.cpu())
    bound["indices"] = inverse.to(indices.dtype)
    padding_idx = bound.get("padding_idx", -1)
    if padding_idx >= 0:
        found = (rows == padding_idx).nonzero()
        bound["padding_idx"] = int(found[0]) if len(found) else -1
    return func(**bound)


def _embedding_renorm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Writes only if a row is longer than allowed, which after the first time is rare."""
    table, indices = args[:2]
    if not isinstance(table, OffloadedTensor) or not has_packed_rows(table):
        return NotImplemented
    if not indices.numel() or not _in_range(indices, table.shape[0]):
        return NotImplemented
    rows = torch.unique(indices)
    before = _read_rows(table, rows.cpu())
    after = func(before.clone(), torch.arange(len(rows), device=before.device), *args[2:], **kwargs)
    return table if torch.equal(before, after) else NotImplemented


def _bmm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``matmul`` of a batch and a matrix folds the batch, or not, by ``requires_grad``, and rounds accordingly.

    It asks also when gradients are off. It did not fold here; if the plain parameter would have made it, start over.
    """
    tiled = tiles.product(func, args, kwargs)
    if tiled is not NotImplemented:
        return tiled
    left, right = args
    matrix = right if isinstance(right, OffloadedTensor) else left
    if torch.is_grad_enabled() or not matrix.trainable or matrix.stride(0) != 0:
        return NotImplemented
    if isinstance(left, OffloadedTensor) and isinstance(right, OffloadedTensor):
        return NotImplemented

    def matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.matmul(left, right.detach().requires_grad_())

    def matmul_transposed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.matmul(left.detach().requires_grad_(), right)

    if matrix is right:
        return run_loaded(matmul, (left, right.select(0, 0)), {})
    return run_loaded(matmul_transposed, (left.select(0, 0), right), {})


def _to_copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``.to(dtype)``, ``.half()``, ``.to(device)``: an offloaded weight again, converted when it is loaded."""
    tensor = args[0]
    if not isinstance(tensor, OffloadedTensor) or not tensor.is_whole or kwargs.get("pin_memory"):
        return NotImplemented
    if kwargs.get("layout") not in (None, torch.strided):
        return NotImplemented
    options = {"dtype": kwargs.get("dtype"), "memory_format": kwargs.get("memory_format")}
    shape = func(_like(tensor, "meta"), **options)
    device = torch.device(kwargs.get("device") or tensor.device)
    if device.type == "meta":
        return shape
    device = torch.empty(0, device=device).device  # with its index; raises if there is no such device
    layout = Layout(shape.dtype, tuple(shape.shape), tuple(shape.stride()), device)
    return OffloadedTensor(tensor.weight.convert(layout))


def _like(tensor: OffloadedTensor, device: torch.device | str) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)


def _shape_only(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Factories such as ``zeros_like`` read nothing of their argument but its metadata."""
    if not isinstance(args[0], OffloadedTensor):
        return NotImplemented
    kwargs = {"device": args[0].device} | {k: v for k, v in kwargs.items() if v is not None}
    return func(_like(args[0], "meta"), *args[1:], **kwargs)


def _not_pinned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return False


RULES.update(
    {
        aten.embedding.default: _embedding,
        aten.index_select.default: _index_select,
        aten.index.Tensor: _index,
        aten._embedding_bag.default: _embedding_bag,
        aten._embedding_bag_forward_only.default: _embedding_bag,
        aten.embedding_renorm_.default: _embedding_renorm,
        aten.bmm.default: _bmm,
        aten._to_copy.default: _to_copy,
        aten.is_pinned.default: _not_pinned,
        aten.empty_like.default: _shape_only,
        aten.zeros_like.default: _shape_only,
        aten.ones_like.default: _shape_only,
        aten.full_like.default: _shape_only,
        aten.rand_like.default: _shape_only,
        aten.randn_like.default: _shape_only,
        aten.new_empty.default: _shape_only,
        aten.new_empty_strided.default: _shape_only,
        aten.new_zeros.default: _shape_only,
        aten.new_ones.default: _shape_only,
        aten.new_full.default: _shape_only,
    }
)
