"""Matrix products with a large offloaded weight, tile by tile: no more than a tile of it is in memory.

A tile is a run of lines of the weight, as they lie in the store. In ``x @ weight.t()``, as in a linear, lines are
columns of the result, and each tile is multiplied into its place there. In ``x @ weight`` (the gradient of a linear; a
layer that keeps its weight as (in, out)) lines are summed over, and each tile adds to the whole result. Reading such a
weight by columns instead would mean many small reads, each of a whole page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pylomin.lazy.tensor import RULES, OffloadedTensor, aten, run_loaded
from pylomin.residency.tiling import lines_of, lines_per_tile, tiles_of, times_to_fit

HALF_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Product:
    """``out = left @ matrix``, or ``beta * addend + alpha * left @ matrix``."""

    left: torch.Tensor  # (m, k), or (batch, m, k)
    matrix: OffloadedTensor  # (k, n)
    out: torch.Tensor  # (m, n), or (batch, m, n); not initialised
    addend: torch.Tensor | None = None  # like out
    beta: Any = 1
    alpha: Any = 1
    sums: torch.Tensor | None = None  # of the tiles so far, in a precision that does not round them

    def add(self, tile: torch.Tensor, first: int, last: int) -> None:
        """``tile`` has the lines ``[first, last)`` of the matrix. Tiles come in order."""
        if line_dim(self.matrix) == 1:
            addend = None if self.addend is None else self.addend[..., first:last]
            self._multiply(self.left, tile, self.out[..., first:last], addend)
            return
        left, is_last = self.left[..., first:last], last == self.matrix.shape[0]
        if self.out.dtype in HALF_DTYPES and not (first == 0 and is_last):
            self._add_half(left, tile, is_last)
        elif first == 0:
            self._multiply(left, tile, self.out, self.addend)
        elif left.dim() == 2:
            self.out.addmm_(left, tile, alpha=self.alpha)
        else:
            self.out.baddbmm_(left, tile.expand(len(left), -1, -1), alpha=self.alpha)

    def _multiply(self, left: torch.Tensor, tile: torch.Tensor, out: torch.Tensor, addend: torch.Tensor | None) -> None:
        # With `out`, kernels write into the slice of a larger result; they make no copy of it.
        if left.dim() == 3:
            tile = tile.expand(len(left), -1, -1)
        if addend is None:
            (torch.mm if left.dim() == 2 else torch.bmm)(left, tile, out=out)
        else:
            add = torch.addmm if left.dim() == 2 else torch.baddbmm
            add(addend, left, tile, beta=self.beta, alpha=self.alpha, out=out)

    def _add_half(self, left: torch.Tensor, tile: torch.Tensor, is_last: bool) -> None:
        if self.sums is None:
            self.sums = torch.zeros_like(self.out, dtype=torch.float32)
        self.sums += left @ tile
        if is_last:
            self.sums *= self.alpha
            if self.addend is not None and self.beta:
                self.sums += self.beta * self.addend
            self.out.copy_(self.sums)


def line_dim(matrix: torch.Tensor) -> int:
    """The dimension along which the lines of a matrix follow each other in memory."""
    rows, columns = matrix.shape
    return 1 if rows == 1 or (columns > 1 and matrix.stride(1) > matrix.stride(0)) else 0


def lines_of_tile(matrix: OffloadedTensor) -> int | None:
    """Lines of one tile of ``matrix``, a view of a weight; None where it is loaded whole."""
    weight, dim = matrix.weight, line_dim(matrix)
    step = matrix.stride(dim)
    if step < _line_numel(matrix):
        return None  # lines overlap
    wanted = None
    if weight.tile_rows is not None:
        wanted = max(1, weight.tile_rows * lines_of(weight.layout)[1] // step)
    budget, times = weight.residency.memory_budget, times_to_fit(weight)
    return lines_per_tile(matrix.shape[dim], step * weight.element_bytes, wanted, budget, times=times)


def _line_numel(matrix: torch.Tensor) -> int:
    """Elements from the first to the last of one line."""
    across = 1 - line_dim(matrix)
    return (matrix.shape[across] - 1) * matrix.stride(across) + 1


def multiply(products: Iterable[Product]) -> None:
    """Compute the products (one at least), all with views of one weight, in one stream of tiles."""
    tiles = [(product, *tile) for product in products for tile in _tiles(product.matrix)]
    weight = tiles[0][0].matrix.weight
    stream = weight.residency.stream_runs(weight, [run for *_, run in tiles])
    for product, first, last, _ in tiles:
        values = next(stream)
        size = list(product.matrix.shape)
        size[line_dim(product.matrix)] = last - first
        values = values.as_strided(size, product.matrix.stride(), values.storage_offset())
        product.add(values, first, last)
        del values  # its memory is needed for the next


def _tiles(matrix: OffloadedTensor) -> Iterator[tuple[int, int, tuple[int, int]]]:
    """First line, last (exclusive), and the run of elements of the weight that they lie in."""
    dim = line_dim(matrix)
    count, step = matrix.shape[dim], matrix.stride(dim)
    start, extent = int(matrix.storage_offset()), _line_numel(matrix)
    for first, last in tiles_of(count, lines_of_tile(matrix), matrix.weight.tile_rows):
        yield first, last, (start + first * step, start + (last - 1) * step + extent)


def product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``mm``, ``bmm``, ``mv``, and those that add: one operand is a large view of an offloaded weight."""
    *addends, left, right = args
    is_right = isinstance(right, OffloadedTensor)
    if is_right == isinstance(left, OffloadedTensor):
        return NotImplemented
    operand, other = (right, left) if is_right else (left, right)
    matrices = _matrices_to_tile(operand)
    if matrices is None:
        return NotImplemented
    if left.shape[-1] != right.shape[-2:][0] or left.shape[:-2] != right.shape[:-2] or left.dtype != right.dtype:
        # The kernel raises its own error before it reads a value; memory that is never touched costs nothing.
        func(*(_untouched(arg) if isinstance(arg, OffloadedTensor) else arg for arg in args), **kwargs)
        return NotImplemented
    shape = (*left.shape[:-1], *right.shape[left.dim() - 1 :])

    def compute(other: torch.Tensor, *addends: torch.Tensor) -> torch.Tensor:
        out = torch.empty(shape, dtype=operand.dtype, device=operand.device)
        terms = [other, out, *(addend.expand(shape) for addend in addends)]
        if other.dim() == 1:
            terms = [term.unsqueeze(-1) for term in terms]
        if not is_right:  # (matrix @ other).mT = other.mT @ matrix.mT
            terms = [term.mT for term in terms]
        if out.numel():
            multiply(_products(terms, matrices if is_right else [transposed(matrix) for matrix in matrices], kwargs))
        return out

    return run_loaded(compute, (other, *addends), {})


def _products(
    terms: Sequence[torch.Tensor], matrices: Sequence[OffloadedTensor], factors: dict[str, Any]
) -> Iterator[Product]:
    """One of the whole batch with one matrix, or one for each of its members."""
    for index, matrix in enumerate(matrices):
        left, out, *addends = terms if len(matrices) == 1 else [term[index] for term in terms]
        yield Product(left, matrix, out, *addends, **factors)


def transposed(tensor: OffloadedTensor) -> OffloadedTensor:
    """The last two dimensions, swapped."""
    return tensor.transpose(-2, -1)  # type: ignore[return-value]


def matrix_of(tensor: OffloadedTensor, index: int) -> OffloadedTensor:
    """One matrix of a packed weight."""
    return tensor.select(0, index)  # type: ignore[return-value]


def _untouched(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _matrices_to_tile(operand: OffloadedTensor) -> list[OffloadedTensor] | None:
    """The matrices of one operand, one for each member of the batch or one for all; None if it loads whole."""
    if not loads_runs(operand):
        return None
    if operand.dim() == 3 and (operand.stride(0) == 0 or len(operand) == 1):
        operand = matrix_of(operand, 0)
    if operand.dim() == 2:
        return None if lines_of_tile(operand) is None else [operand]
    if operand.dim() != 3:
        return None
    weight = operand.weight
    matrix_bytes = operand.numel() // len(operand) * weight.element_bytes
    if lines_per_tile(len(operand), matrix_bytes, None, weight.residency.memory_budget) is None:
        return None
    return [matrix_of(operand, index) for index in range(len(operand))]


def loads_runs(tensor: OffloadedTensor) -> bool:
    """Whether parts of ``tensor`` can be read on their own, and are not in memory already."""
    return tensor.weight.tensor is None and tensor.weight.keeps_order and tensor.numel() > 0


TILED = (aten.mm, aten.mv, aten.addmm, aten.addmv, aten.baddbmm)  # and bmm, in `partial`
RULES.update({packet.default: product for packet in TILED})
