"""DeferredTensor: a tensor of a checkpoint that has not been read, and what becomes of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pylomin.store.base import ReadRequest, WeightStore
from pylomin.store.selection import Selection
from pylomin.store.sliced import Part as Slice
from pylomin.store.sliced import sliced
from pylomin.store.tensor_bytes import byte_view
from pylomin.store.virtual import Part, VirtualStore, VirtualWeight

aten = torch.ops.aten

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Stored:
    """Values that lie in a store, in row-major order. The tensor may have another floating-point dtype than these."""

    part: Part
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Computed:
    """Values that an operator makes, each time anew."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int  # which of the tensors that the operator returns

    def evaluate(self) -> torch.Tensor:
        leaves, _ = tree_flatten(evaluated_call(self.func, self.args, self.kwargs))
        values: torch.Tensor = leaves[self.output]
        return values


class DeferredTensor(torch.Tensor):
    """A tensor on the CPU that has shape, stride and dtype, and a note of where its values come from.

    Views, casts and concatenations of stored bytes are stored bytes again. Any other operator is noted, and runs when
    values are needed. Where a result is needed at once (``torch.equal``), the arguments are read for as long as it
    takes. Writing reads the values into memory, where they stay; views see it.
    """

    origin: Stored | Computed
    base: DeferredTensor  # the tensor that this is a view of; itself if it is none
    written: torch.Tensor | None  # of a base: the values, once they were written to

    @staticmethod
    def __new__(
        cls, origin: Stored | Computed, like: torch.Tensor, base: DeferredTensor | None = None
    ) -> DeferredTensor:
        """``like`` gives shape, stride, offset and dtype; it may be on the meta device."""
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            tensor: DeferredTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                like.size(),
                strides=like.stride(),
                storage_offset=like.storage_offset(),
                dtype=like.dtype,
                device=_CPU,
                requires_grad=False,
            )
        tensor.origin = origin
        tensor.base = tensor if base is None else base
        tensor.written = None
        return tensor

    @staticmethod
    def of(store: WeightStore, name: str) -> DeferredTensor:
        """A whole weight of a store."""
        info = store.info(name)
        like = torch.empty(info.shape, dtype=info.dtype, device="meta")
        return DeferredTensor(Stored(Part(store, name, 0, info.nbytes), info.dtype), like)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})

    def evaluate(self) -> torch.Tensor:
        """An ordinary tensor with its values; of one that was written to, that memory."""
        written = self.base.written
        if written is not None:
            return written.as_strided(self.size(), self.stride(), self.storage_offset())
        if isinstance(self.origin, Computed):
            return self.origin.evaluate()
        part, dtype = self.origin.part, self.origin.dtype
        tensor = torch.empty(self.size(), dtype=dtype)
        part.store.read([ReadRequest(part.name, part.offset_bytes, byte_view(tensor))])
        return tensor.to(self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DeferredTensor(size={tuple(self.shape)}, dtype={self.dtype})"


def evaluated_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``func`` with the values of its deferred arguments."""
    leaves, spec = tree_flatten((args, kwargs))
    known: dict[int, torch.Tensor] = {}
    for leaf in leaves:
        if isinstance(leaf, DeferredTensor) and id(leaf) not in known:
            known[id(leaf)] = leaf.evaluate()
    args, kwargs = tree_unflatten([known.get(id(leaf), leaf) for leaf in leaves], spec)
    return func(*args, **kwargs)


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose(*args, **kwargs)  # in inference mode these arrive whole
    if func._schema.is_mutable:
        return _run_writing(func, args, kwargs)
    leaves, spec = tree_flatten((args, kwargs))
    leaves = [leaf.evaluate() if _is_written(leaf) else leaf for leaf in leaves]
    args, kwargs = tree_unflatten(leaves, spec)
    if not any(isinstance(leaf, DeferredTensor) for leaf in leaves):
        return func(*args, **kwargs)
    if func.overloadpacket in _FACTORIES:
        return func(_shape_only(args[0]), *args[1:], **(kwargs | {"device": kwargs.get("device") or "cpu"}))
    elsewhere = kwargs.get("device") not in (None, _CPU)
    if elsewhere or torch.Tag.nondeterministic_seeded in func.tags:
        return evaluated_call(func, args, kwargs)
    try:
        args_only, kwargs_only = tree_map(_shape_only, (args, {k: v for k, v in kwargs.items() if k != "device"}))
        shapes = func(*args_only, **kwargs_only)
    except (NotImplementedError, RuntimeError):  # its result depends on values
        return evaluated_call(func, args, kwargs)
    outputs, spec = tree_flatten(shapes)
    base = args[0].base if func.is_view else None
    made = [
        DeferredTensor(_stored(func, args, output) or Computed(func, args, kwargs, index), output, base)
        if isinstance(output, torch.Tensor)
        else output
        for index, output in enumerate(outputs)
    ]
    return tree_unflatten(made, spec)


_FACTORIES = frozenset(  # which read no values
    (
        aten.empty_like,
        aten.zeros_like,
        aten.ones_like,
        aten.full_like,
        aten.rand_like,
        aten.randn_like,
        aten.new_empty,
        aten.new_zeros,
        aten.new_ones,
        aten.new_full,
    )
)


def _is_written(value: Any) -> bool:
    return isinstance(value, DeferredTensor) and value.base.written is not None


def _run_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator that writes to its first argument, which is in memory from then on."""
    target = args[0]
    if isinstance(target, DeferredTensor) and target.base.written is None:
        target.base.written = target.base.evaluate()
    evaluated_call(func, args, kwargs)
    return target


def _shape_only(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    offset = int(value.storage_offset())
    meta = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    if not offset:
        return meta
    span = 1 + sum((size - 1) * step for size, step in zip(value.size(), value.stride(), strict=True))
    return meta.new_empty(offset + max(span, 0)).as_strided(value.size(), value.stride(), offset)


def _stored(func: Any, args: tuple[Any, ...], output: torch.Tensor) -> Stored | None:
    """Where the bytes of an output lie already; None if they have to be computed."""
    if not output.is_contiguous():
        return None
    if func in (aten.cat.default, aten.stack.default):
        dim = args[1] if len(args) > 1 else 0
        return _joined(args[0], math.prod(output.shape[: dim % output.dim()]), output)
    source = args[0]
    if not isinstance(source, DeferredTensor):
        return None
    if func in (aten.clone.default, aten._to_copy.default, aten._unsafe_view.default):
        origin = source.origin if isinstance(source.origin, Stored) else _sliced(source)
        if origin is None:
            return None
        # One cast is left to whoever reads; a second one would skip the rounding of the first.
        is_first = source.dtype == origin.dtype
        castable = source.dtype.is_floating_point and output.dtype.is_floating_point
        return origin if output.dtype == source.dtype or (is_first and castable) else None
    if not isinstance(source.origin, Stored):
        return None
    if not func.is_view or output.dtype != source.dtype or output.is_conj() or output.is_neg():
        return None
    part, itemsize = source.origin.part, source.origin.dtype.itemsize
    # A view without elements may lie behind the end of what it is a view of.
    skipped = int(output.storage_offset() - source.storage_offset()) if output.numel() else 0
    offset_bytes = part.offset_bytes + skipped * itemsize
    return Stored(Part(part.store, part.name, offset_bytes, output.numel() * itemsize), source.origin.dtype)


def _sliced(view: DeferredTensor) -> Stored | None:
    """The bytes of a slice along any dimensions of a stored tensor, if ``view`` is one; they need not be one run."""
    base, origin = view.base, view.base.origin
    if not isinstance(origin, Stored) or view.dtype != base.dtype or not base.is_contiguous() or not view.numel():
        return None
    if view.dim() != base.dim() or view.stride() != base.stride():
        return None
    rest, intervals = int(view.storage_offset() - base.storage_offset()), []
    for size, whole, step in zip(view.shape, base.shape, base.stride(), strict=True):
        first, rest = divmod(rest, step)
        if first + size > whole:
            return None
        intervals.append(((first, first + size),))
    part = origin.part
    store, name = part.store, part.name
    if part.offset_bytes or store.info(name).shape != tuple(base.shape):
        store = VirtualStore({name: VirtualWeight(origin.dtype, tuple(base.shape), (part,))})
    cut = sliced(store, {name: Slice(name, Selection(tuple(base.shape), tuple(intervals)))})
    return Stored(Part(cut, name, 0, cut.info(name).nbytes), origin.dtype)


def _joined(tensors: Sequence[Any], blocks: int, output: torch.Tensor) -> Stored | None:
    """The bytes of ``tensors``, which are concatenated or stacked behind dimensions of ``blocks`` elements."""
    deferred = [tensor for tensor in tensors if isinstance(tensor, DeferredTensor)]
    sources = [t.origin if isinstance(t.origin, Stored) else _sliced(t) for t in deferred]
    stored = [values for values in sources if values is not None]
    alike = len({tensor.dtype for tensor in tensors}) == len({values.dtype for values in stored}) == 1
    if len(stored) < len(tensors) or not alike or not output.numel():
        return None
    dtype = stored[0].dtype
    weight = VirtualWeight(dtype, tuple(output.shape), tuple(values.part for values in stored), blocks)
    name = f"{stored[0].part.name} and {len(stored) - 1} more"
    return Stored(Part(VirtualStore({name: weight}), name, 0, weight.info.nbytes), dtype)
