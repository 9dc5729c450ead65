"""OffloadedTensor: a weight that is not in memory is still a tensor."""

from __future__ import annotations

import copy
import traceback
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from pylomin.errors import OffloadedWriteError, TraceError
from pylomin.lazy.compiling import is_tracing, not_compiled
from pylomin.lazy.full_device import computed_again, operator_refusal
from pylomin.lazy.storage import OffloadedStorage
from pylomin.residency.device_errors import DeviceMemoryError
from pylomin.residency.tiling import lines_per_tile
from pylomin.residency.weight import Weight

aten = torch.ops.aten

Rule = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
RULES: dict[Any, Rule] = {}
"""Operators that need not load what their arguments cover; a rule returns ``NotImplemented`` to decline."""


class OffloadedTensor(torch.Tensor):
    """A strided view of a :class:`Weight` whose bytes are in a store.

    Shape, stride, dtype and device are true and cost nothing. A view (``w[3]``, ``w.t()``, ``w.chunk(3)``) is another
    ``OffloadedTensor``; any other operation loads the bytes that its arguments cover, for as long as it runs. An
    operation that writes takes effect in the model's own scratch file, never in the store that the weight came from.
    """

    weight: Weight
    is_whole: bool  # it covers its weight as the weight is, so that the resident tensor can stand for it
    trainable: bool  # the parameter that it stands for, or is a view of, required grad
    pinned: torch.Tensor | None  # values that `data_ptr` gave an address of
    parameter_class: type[nn.Parameter] = nn.Parameter  # of the parameter that it stands for
    _is_param: bool  # torch looks for it
    chunk_rows: int | None = None  # rows of a lookup to hold at one time; see `chunked_embedding`

    @staticmethod
    def __new__(
        cls,
        weight: Weight,
        size: Sequence[int] | None = None,
        stride: Sequence[int] | None = None,
        offset: int = 0,
    ) -> OffloadedTensor:
        layout = weight.layout
        # Never an inference tensor: torch makes views of a parameter ordinary tensors in inference mode, too.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            tensor: OffloadedTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                layout.shape if size is None else size,
                strides=layout.stride if stride is None else stride,
                storage_offset=offset,
                dtype=layout.dtype,
                device=layout.device,
                requires_grad=False,
                storage_size=0,
            )
            # C++ code that asks for the address of the data gets an error, not a null pointer.
            torch._C._set_throw_on_mutable_data_ptr(tensor)
        tensor.weight = weight
        tensor.is_whole = tensor._covers_weight()
        tensor.trainable = False
        tensor.pinned = None
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_tracing():
            raise TraceError(
                f"torch.jit.trace cannot follow {func} of an offloaded weight: it would record the result as a "
                "constant. Trace the ordinary model: pylomin.restore(model), then trace, then lazy_loading again."
            )
        try:
            return _dispatch(func, args, kwargs or {})
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they have values that others hold, and people keep errors
            raise
        finally:
            del args, kwargs

    # -- values -----------------------------------------------------------------------------------------------------

    def _covers_weight(self) -> bool:
        layout = self.weight.layout
        return self.size() == layout.shape and self.stride() == layout.stride and not self.storage_offset()

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """This view, of a tensor that holds the whole weight."""
        return values.as_strided(self.size(), self.stride(), values.storage_offset() + self.storage_offset())

    def materialize(self) -> torch.Tensor:
        """An ordinary tensor with these values, which nobody else sees."""
        if self.is_whole:
            return self.of(private_values(self.weight))
        weight, start, span = self.weight, int(self.storage_offset()), _span(self)
        if weight.tensor is not None or not weight.keeps_order:
            return self.of(private_values(weight))
        with torch.inference_mode(False), torch.no_grad():
            run = weight.residency.load_runs(weight, [(start, start + span)])
            return run.clone().as_strided(self.size(), self.stride())

    def shared(self) -> torch.Tensor:
        """Like :meth:`materialize`, but tied weights share memory as long as somebody holds it. Not to be written."""
        weight = self.weight
        storage = weight.shared() if weight.shared is not None else None
        if storage is None:
            values = private_values(weight)
            weight.shared = weakref.ref(values.untyped_storage())
            return self.of(values)
        layout = weight.layout
        values = torch.empty(0, dtype=layout.dtype, device=layout.device)
        return self.of(values.set_(storage, 0, layout.shape, layout.stride))

    def numpy(self, *, force: bool = False) -> Any:
        """A read-only array: writing to it could not reach the weight."""
        array = self.materialize().numpy(force=force)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.materialize().numpy()
        array = array if dtype is None else array.astype(dtype, copy=False)
        if not copy:
            array.flags.writeable = False  # writing to it could not reach the weight
        return array

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __dlpack__(self, **kwargs: Any) -> Any:
        """Of a copy: writing to what is made of it does not reach the weight."""
        return self.materialize().__dlpack__(**kwargs)

    def tolist(self) -> Any:
        return self.materialize().tolist()

    # -- storage ----------------------------------------------------------------------------------------------------

    def data_ptr(self) -> int:
        """The address of real values, which stay in memory as long as this tensor object lives."""
        if self.pinned is None:
            self.pinned = self.shared()
        return self.pinned.data_ptr()

    def untyped_storage(self) -> Any:
        """An identity for finding ties, which costs nothing; the values where more than that is asked."""
        return OffloadedStorage(self.weight, self.shared)

    def storage(self) -> Any:
        return self.shared().storage()

    def share_memory_(self) -> OffloadedTensor:
        """Nothing to do: other processes read the same file."""
        return self

    # -- the parameter it stands for --------------------------------------------------------------------------------

    @property
    def data(self) -> OffloadedTensor:
        return OffloadedTensor(self.weight, self.size(), self.stride(), int(self.storage_offset()))

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        if not isinstance(values, OffloadedTensor):
            weight = self.weight
            values = OffloadedTensor(weight.replaced_by(weight.residency.take_over(weight, values)))
        torch.Tensor.data.__set__(self, values)  # type: ignore[attr-defined]
        self.weight, self.is_whole = values.weight, values.is_whole
        self.weight.transient = False
        self.pinned = None

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> OffloadedTensor:
        """Only ``False`` works. Gradients flow through offloaded weights, not into them."""
        if requires_grad and not isinstance(self, nn.Parameter):
            self.trainable = True  # nn.Parameter(...) asks for it
        elif requires_grad:
            raise OffloadedWriteError(
                f"weight '{self.weight.name}' is offloaded and cannot require grad: there is no memory to accumulate "
                "it in. Keep the modules you train in memory (lazy_loading(model, skip_modules=[...])), or get them "
                "back into it first: pylomin.restore(model, target_modules=[...])."
            )
        else:
            self.trainable = False
        return self

    def to_parameter(self) -> nn.Parameter:
        """The ordinary parameter that it stands for, with the attributes that users gave it."""
        parameter: nn.Parameter = torch.Tensor._make_subclass(self.parameter_class, self.shared(), self.trainable)
        own = OffloadedTensor.__annotations__
        parameter.__dict__.update({k: v for k, v in self.attributes().items() if k not in own})
        return parameter

    def attributes(self) -> dict[str, Any]:
        """What a copy has, too."""
        hidden = ("weight", "is_whole", "pinned", "_is_param")
        return {name: value for name, value in self.__dict__.items() if name not in hidden}

    # -- copies -----------------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedTensor:
        if id(self) in memo:
            known: OffloadedTensor = memo[id(self)]
            return known
        old = self.weight
        if id(old.residency) not in memo:
            memo[id(old.residency)] = old.residency.copy()
        if id(old) not in memo:
            copied = Weight(old.name, old.source, memo[id(old.residency)], old.conversions)
            memo[id(old)] = old.replaced_by(copied)
        clone = OffloadedTensor(memo[id(old)], self.size(), self.stride(), int(self.storage_offset()))
        if isinstance(self, nn.Parameter):
            clone = as_parameter(clone)
        clone.__dict__.update(copy.deepcopy(self.attributes(), memo))
        memo[id(self)] = clone
        return clone

    def __copy__(self) -> OffloadedTensor:
        clone = OffloadedTensor(self.weight, self.size(), self.stride(), int(self.storage_offset()))
        if isinstance(self, nn.Parameter):
            clone = as_parameter(clone)
        clone.__dict__.update(self.attributes())
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as the ordinary tensor or parameter, so that whoever loads it does not need pylomin."""
        values = self.to_parameter() if isinstance(self, nn.Parameter) else self.shared()
        return values.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        name, dtype, device = self.weight.name, self.dtype, self.device
        return f"OffloadedTensor({name!r}, size={tuple(self.shape)}, dtype={dtype}, device='{device}')"


def private_values(weight: Weight) -> torch.Tensor:
    """All values, in a tensor that nobody else sees. It need not fit in the budget, which is for what is loaded."""
    numel, count = weight.layout.numel, None
    if weight.tensor is None and weight.keeps_order and numel:
        # Quantised weights are decoded by rows.
        step = 1 if weight.source.packing is None else weight.source.packing.matrix_shape[1]
        count = lines_per_tile(numel // step, step * weight.element_bytes, None, weight.residency.memory_budget)
        count = None if count is None else count * step
    if count is None:
        return weight.residency.load_private(weight)
    runs = [(first, min(first + count, numel)) for first in range(0, numel, count)]
    with torch.inference_mode(False), torch.no_grad():
        values = weight.layout.empty()
        flat = values.as_strided((numel,), (1,))
        stream = weight.residency.stream_runs(weight, runs)
        for first, last in runs:
            flat[first:last] = next(stream)
    return values


def as_parameter(tensor: OffloadedTensor, *, trainable: bool = False) -> OffloadedTensor:
    """``tensor``, made just now, as it is in ``module._parameters``: ``isinstance(…, nn.Parameter)`` is true of it."""
    tensor._is_param = True  # as nn.Parameter() does it for a subclass, to a view, which takes longer
    tensor.trainable = trainable
    tensor.weight.transient = False
    return tensor


@not_compiled
def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return _dispatch_once(func, args, kwargs)
    except DeviceMemoryError:
        raise
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
        full = error.with_traceback(None)
    return _dispatch_again(func, args, kwargs, full)


def _dispatch_once(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if (rule := RULES.get(func)) is not None:
        result = rule(func, args, kwargs)
        if result is not NotImplemented:
            return result
    facts = _facts(func)
    if facts.is_composite:  # in inference mode these arrive whole, and some of them are views only at times
        return func.decompose(*args, **kwargs)
    if facts.is_view and isinstance(args[0], OffloadedTensor):
        result = _view(func, args, kwargs)
        if result is not NotImplemented:
            return result
    if facts.writes:
        written = tree_flatten(facts.written(args, kwargs))[0]
        targets = [target for target in written if isinstance(target, OffloadedTensor)]
        if targets:
            return _run_writing(func, args, kwargs, targets)
    return run_loaded(func, args, kwargs)


def _dispatch_again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], full: BaseException) -> Any:
    """A device had no memory for it."""
    leaves = tree_flatten((args, kwargs))[0]
    weights = [leaf.weight for leaf in leaves if isinstance(leaf, OffloadedTensor)]
    streamed = next((weight for weight in weights if weight.residency.carriers), None)
    if streamed is None:
        raise full
    refusal = operator_refusal(func, bool(_facts(func).writes))
    return computed_again(partial(_dispatch_once, func, args, kwargs), streamed, full, refusal)


def run_loaded(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``func`` with the values of its offloaded arguments, which are resident just for that."""
    leaves, spec = tree_flatten((args, kwargs))
    offloaded = [leaf for leaf in leaves if isinstance(leaf, OffloadedTensor)]
    with ExitStack() as held:
        values = _values(offloaded, held)
        args, kwargs = tree_unflatten([values.get(id(leaf), leaf) for leaf in leaves], spec)
        try:
            return func(*args, **kwargs)
        except BaseException as error:
            raise error.with_traceback(None)  # noqa: B904  # its frames have the values, and people keep errors
        finally:
            del args, kwargs, values


def _values(offloaded: Sequence[OffloadedTensor], held: ExitStack) -> dict[int, torch.Tensor]:
    """Values by ``id`` of the offloaded tensor: whole weights are held, small views are read on their own."""
    values: dict[int, torch.Tensor] = {}
    whole: list[OffloadedTensor] = []
    for tensor in offloaded:
        start, span = int(tensor.storage_offset()), _span(tensor)
        weight = tensor.weight
        if weight.tensor is None and weight.keeps_order and span < weight.layout.numel:
            run = weight.residency.load_runs(weight, [(start, start + span)])
            values[id(tensor)] = run.as_strided(tensor.size(), tensor.stride(), run.storage_offset())
        else:
            whole.append(tensor)
    for residency in {tensor.weight.residency: None for tensor in whole}:
        weights = {t.weight: None for t in whole if t.weight.residency is residency}
        held.enter_context(residency.hold(list(weights)))
    for tensor in whole:
        assert tensor.weight.tensor is not None
        values[id(tensor)] = tensor.of(tensor.weight.tensor.detach())
    return values


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last that a strided tensor touches."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.size(), tensor.stride(), strict=True))


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let torch compute the geometry, on a tensor without data."""
    source = args[0]
    end = source.storage_offset() + _span(source)
    carrier = torch.empty(end, dtype=source.dtype, device="meta")
    carrier = carrier.as_strided(source.size(), source.stride(), source.storage_offset())
    views = func(carrier, *args[1:], **kwargs)

    def wrap(view: torch.Tensor) -> OffloadedTensor:
        wrapped = OffloadedTensor(source.weight, view.size(), view.stride(), int(view.storage_offset()))
        wrapped.trainable = source.trainable
        return wrapped

    if any(view.dtype != source.dtype or view.is_conj() or view.is_neg() for view in tree_flatten(views)[0]):
        return NotImplemented
    return wrap(views) if isinstance(views, torch.Tensor) else [wrap(view) for view in views]


def _run_writing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], targets: Sequence[OffloadedTensor]) -> Any:
    """Run an operation that writes on private copies, which become the weights' values when it succeeded."""
    bases: dict[Weight, torch.Tensor] = {}
    for target in targets:
        weight = target.weight
        if weight not in bases:
            others = [a for a in tree_flatten((args[1:], kwargs))[0] if isinstance(a, OffloadedTensor)]
            overwritten = func is aten.copy_.default and target.is_whole and all(a.weight is not weight for a in others)
            bases[weight] = weight.layout.empty() if overwritten else private_values(weight)
    real = {id(target): target.of(bases[target.weight]) for target in targets}
    if func.overloadpacket in (aten.set_, aten.resize_, aten.resize_as_):
        _refuse_new_storage(func, targets[0], real[id(targets[0])], args)
        func, args = aten.copy_.default, args[:2]
    leaves, spec = tree_flatten((args, kwargs))
    sources = [leaf for leaf in leaves if isinstance(leaf, OffloadedTensor) and id(leaf) not in real]
    with ExitStack() as held:
        values = {id(t): t.of(bases[t.weight]) for t in sources if t.weight in bases}
        values |= _values([t for t in sources if t.weight not in bases], held)
        values |= real
        args, kwargs = tree_unflatten([values.get(id(leaf), leaf) for leaf in leaves], spec)
        result = func(*args, **kwargs)
    for target in targets:
        written = real[id(target)]
        moved = written.untyped_storage()._cdata != bases[target.weight].untyped_storage()._cdata
        if moved or written.size() != target.size() or written.stride() != target.stride():
            raise _new_storage_error(func, target)
    for weight, base in bases.items():
        weight.residency.write(weight, base)
    back = {id(values): target for target in targets for values in [real[id(target)]]}
    outputs, spec = tree_flatten(result)
    return tree_unflatten([back.get(id(output), output) for output in outputs], spec)


def _refuse_new_storage(func: Any, target: OffloadedTensor, values: torch.Tensor, args: tuple[Any, ...]) -> None:
    source = args[1] if len(args) > 1 else None
    same = isinstance(source, torch.Tensor) and source.shape == values.shape and source.dtype == values.dtype
    if func.overloadpacket is not aten.set_ or not same or not isinstance(target, nn.Parameter):
        raise _new_storage_error(func, target)


def _new_storage_error(func: Any, target: OffloadedTensor) -> OffloadedWriteError:
    return OffloadedWriteError(
        f"{func} would give weight '{target.weight.name}' another size or storage, which an offloaded weight "
        "cannot take. Assign a new parameter to its module, or pylomin.restore(model) first."
    )


@dataclass(frozen=True, slots=True)
class _Facts:
    """What an operator's schema says about aliasing."""

    is_view: bool
    is_composite: bool
    writes: tuple[int | str, ...]  # positions, or names of keyword-only arguments

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        positions = [args[i] for i in self.writes if isinstance(i, int) and i < len(args)]
        return positions + [kwargs[i] for i in self.writes if isinstance(i, str) and i in kwargs]


@cache
def _facts(func: Any) -> _Facts:
    writes: list[int | str] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            writes.append(argument.name if argument.kwarg_only else position)
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return _Facts(func.is_view and not writes, is_composite, tuple(writes))
