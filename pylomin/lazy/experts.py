"""Packed weights of a mixture of experts: only the experts that tokens were routed to are read.

Such a weight has shape ``(experts, k, n)``. Where code takes ``weight[expert]``, that is a view, and nothing is left to
do. Two other ways are common: a product of groups of tokens with one expert each, and ``weight[experts_of_tokens]``,
which repeats an expert for each of its tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from pylomin.lazy.tensor import RULES, OffloadedTensor, aten
from pylomin.lazy.tiles import Product, loads_runs, matrix_of, multiply, transposed


def is_packed(tensor: object) -> bool:
    """Whether ``tensor`` is offloaded, not in memory now, and can be used one matrix at a time."""
    return isinstance(tensor, OffloadedTensor) and tensor.dim() == 3 and loads_runs(tensor)


def _grouped_mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows ``[ends[i - 1], ends[i])`` of ``tokens`` are multiplied by ``packed[i]``."""
    tokens, packed, ends = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("offs")
    others = [*args[3:], *(value for name, value in kwargs.items() if name != "offs")]
    if not is_packed(packed) or ends is None or any(other is not None for other in others):
        return NotImplemented
    experts, k, n = packed.shape
    if tokens.dim() != 2 or tokens.shape[1] != k or tokens.dtype != packed.dtype or len(ends) != experts:
        return NotImplemented
    out = tokens.new_zeros(len(tokens), n)
    products: list[Product] = []
    first = 0
    for expert, last in enumerate(ends.tolist()):
        if last > first:
            products.append(Product(tokens[first:last], matrix_of(packed, expert), out[first:last]))
        first = last
    if products:
        multiply(products)
    return out


@dataclass(slots=True)
class Choice:
    """``table[rows]``; its values once somebody needs them."""

    table: OffloadedTensor  # (experts, k, n)
    rows: torch.Tensor  # (tokens,); in range
    writes: int  # to the weight, before this was made
    values: torch.Tensor | None = None

    @property
    def is_packed(self) -> bool:
        """Whether it can be used one matrix at a time."""
        self.check_unwritten()
        return self.values is None and is_packed(self.table)

    def load(self) -> torch.Tensor:
        if self.values is None:
            self.check_unwritten()
            self.values = self.table.index_select(0, self.rows)
        return self.values

    def check_unwritten(self) -> None:
        weight = self.table.weight
        if self.values is None and weight.writes != self.writes:
            raise RuntimeError(
                f"matrices of weight '{weight.name}' were chosen, but it was modified by an in-place operation before "
                "they were used. Run backward, or copy them, before writing to it."
            )


class GatheredTensor(torch.Tensor):
    """``table[rows]``, or its transpose, that is not read yet: a matrix of a packed weight for each token.

    A batched product reads each matrix once, and has no more than a tile in memory. Any other operation reads all, as
    indexing a tensor in memory does.
    """

    choice: Choice
    transposed: bool  # each matrix

    @staticmethod
    def __new__(cls, choice: Choice, transposed: bool = False) -> GatheredTensor:
        count, (_, k, n) = len(choice.rows), choice.table.shape
        tensor: GatheredTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            (count, n, k) if transposed else (count, k, n),
            strides=(k * n, 1, n) if transposed else (k * n, n, 1),
            dtype=choice.table.dtype,
            device=choice.table.device,
            storage_size=0,
        )
        torch._C._set_throw_on_mutable_data_ptr(tensor)  # an error, not a null pointer
        tensor.choice, tensor.transposed = choice, transposed
        return tensor

    @staticmethod
    def of(table: OffloadedTensor, rows: torch.Tensor) -> GatheredTensor:
        return GatheredTensor(Choice(table, rows, table.weight.writes))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.bmm.default and (product := _gathered_bmm(*args)) is not NotImplemented:
            return product
        if func in (aten.detach.default, aten.alias.default):
            return GatheredTensor(args[0].choice, args[0].transposed)
        if func is aten.transpose.int and sorted(dim + 3 * (dim < 0) for dim in args[1:]) == [1, 2]:
            return GatheredTensor(args[0].choice, not args[0].transposed)
        args, kwargs = tree_map_only(GatheredTensor, GatheredTensor.load, (args, kwargs or {}))
        return func(*args, **kwargs)

    def load(self) -> torch.Tensor:
        """The values. What is written to this tensor is written to them."""
        values = self.choice.load()
        return values.mT if self.transposed else values


def _gathered_bmm(left: torch.Tensor, right: torch.Tensor) -> Any:
    is_right = isinstance(right, GatheredTensor)
    gathered, other = (right, left) if is_right else (left, right.mT)
    if not isinstance(gathered, GatheredTensor) or isinstance(other, GatheredTensor):
        return NotImplemented
    choice = gathered.choice
    if not choice.is_packed:
        return NotImplemented
    # Token by token: other (m, k) @ matrix (k, n)
    matrices = transposed(choice.table) if gathered.transposed == is_right else choice.table
    _, k, n = matrices.shape
    tokens, m = other.shape[:2]
    if other.dim() != 3 or other.shape[2] != k or tokens != len(choice.rows) or other.dtype != gathered.dtype:
        return NotImplemented
    order = torch.argsort(choice.rows, stable=True)
    experts, counts = torch.unique_consecutive(choice.rows[order], return_counts=True)
    ordered = other[order].reshape(tokens * m, k)
    results = ordered.new_empty(tokens * m, n)
    products: list[Product] = []
    first = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        last = first + count * m
        products.append(Product(ordered[first:last], matrix_of(matrices, expert), results[first:last]))
        first = last
    if products and m:
        multiply(products)
    out = other.new_empty((tokens, m, n) if is_right else (tokens, n, m))
    (out if is_right else out.mT)[order] = results.view(tokens, m, n)
    return out


if hasattr(aten, "_grouped_mm"):  # since torch 2.8
    RULES[aten._grouped_mm.default] = _grouped_mm
