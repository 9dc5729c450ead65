"""Packed weights of a mixture of experts: only the experts that tokens were routed to are read.

Such a weight has shape ``(experts, k, n)``. Where code takes ``weight[expert]``, that is a view, and nothing is left to
do. Two other ways are common: a product of groups of tokens with one expert each, and ``weight[experts_of_tokens]``,
which repeats an expert for each of its tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from pylomin.lazy.tensor import RULES, OffloadedTensor, aten
from pylomin.lazy.tiles import Product, multiply


def is_packed(tensor: object) -> bool:
    """Whether ``tensor`` is offloaded, not in memory now, and can be used one matrix at a time."""
    if not isinstance(tensor, OffloadedTensor) or tensor.dim() != 3 or not tensor.numel():
        return False
    return tensor.weight.tensor is None and tensor.weight.keeps_order


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
            products.append(Product(tokens[first:last], packed[expert], out[first:last]))
        first = last
    if products:
        multiply(products)
    return out


class GatheredTensor(torch.Tensor):
    """``table[rows]``, or its transpose, that is not read yet: a matrix of a packed weight for each token.

    A batched product reads each of the matrices once, and no more than a tile at one time. Any other operation reads
    all, as indexing a tensor in memory would have done.
    """

    table: OffloadedTensor  # (experts, k, n)
    rows: torch.Tensor  # (tokens,); in range
    transposed: bool  # each matrix
    writes: int  # to the weight, before this was made
    values: torch.Tensor | None

    @staticmethod
    def __new__(cls, table: OffloadedTensor, rows: torch.Tensor, transposed: bool = False) -> GatheredTensor:
        _, k, n = table.shape
        tensor: GatheredTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            (len(rows), n, k) if transposed else (len(rows), k, n),
            strides=(k * n, 1, n) if transposed else (k * n, n, 1),
            dtype=table.dtype,
            device=table.device,
            storage_size=0,
        )
        tensor.table, tensor.rows, tensor.transposed = table, rows, transposed
        tensor.writes, tensor.values = table.weight.writes, None
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0]
        if func is aten.bmm.default and (product := _gathered_bmm(*args)) is not NotImplemented:
            return product
        if isinstance(first, GatheredTensor) and first.values is None:
            if func in (aten.detach.default, aten.alias.default):
                return first.again(transposed=first.transposed)
            if func is aten.transpose.int and {dim % 3 for dim in args[1:]} == {1, 2}:
                return first.again(transposed=not first.transposed)
        args, kwargs = tree_map_only(GatheredTensor, GatheredTensor.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def again(self, *, transposed: bool) -> GatheredTensor:
        other = GatheredTensor(self.table, self.rows, transposed)
        other.writes = self.writes
        return other

    def materialize(self) -> torch.Tensor:
        """The values, which writes to this tensor go to."""
        if self.values is None:
            self.check_unwritten()
            values = self.table.index_select(0, self.rows)
            self.values = values.mT if self.transposed else values
        return self.values

    def check_unwritten(self) -> None:
        weight = self.table.weight
        if weight.writes != self.writes:
            raise RuntimeError(
                f"matrices of weight '{weight.name}' were chosen, and the weight was modified by an in-place operation "
                "before they were used. Run backward, or copy them, before writing to it."
            )


def _gathered_bmm(left: torch.Tensor, right: torch.Tensor) -> Any:
    is_right = isinstance(right, GatheredTensor)
    gathered, other = (right, left) if is_right else (left, right.mT)
    if not isinstance(gathered, GatheredTensor) or isinstance(other, GatheredTensor):
        return NotImplemented
    if gathered.values is not None or not is_packed(gathered.table):
        return NotImplemented
    gathered.check_unwritten()
    # Token by token: other (m, k) @ matrix (k, n)
    matrices = gathered.table.transpose(1, 2) if gathered.transposed == is_right else gathered.table  # type: ignore[assignment]
    _, k, n = matrices.shape
    tokens, m = other.shape[:2]
    if other.dim() != 3 or other.shape[2] != k or tokens != len(gathered.rows) or other.dtype != gathered.dtype:
        return NotImplemented
    order = torch.argsort(gathered.rows, stable=True)
    experts, counts = torch.unique_consecutive(gathered.rows[order], return_counts=True)
    ordered = other[order].reshape(tokens * m, k)
    results = ordered.new_empty(tokens * m, n)
    products: list[Product] = []
    first = 0
    for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
        last = first + count * m
        products.append(Product(ordered[first:last], matrices[expert], results[first:last]))
        first = last
    if products and m:
        multiply(products)
    out = torch.empty(tokens, m, n, dtype=other.dtype, device=other.device)
    out[order] = results.view(tokens, m, n)
    return out if is_right else out.mT.contiguous()


if hasattr(aten, "_grouped_mm"):  # since torch 2.8
    RULES[aten._grouped_mm.default] = _grouped_mm
