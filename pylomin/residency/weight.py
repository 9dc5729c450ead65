"""What residency knows of one weight: where its bytes are, what it looks like in memory, and its state."""

from __future__ import annotations

import enum
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from pylomin.residency.device import is_streamed_to
from pylomin.store.base import InMemoryStore, WeightStore
from pylomin.store.extents import StoredWeight
from pylomin.store.quantized import PackedWeight

if TYPE_CHECKING:
    from pylomin.residency.residency import Residency


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything about a tensor but its values. ``stride`` is dense: the elements fill a run of memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: torch.device

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        return self.stride == contiguous_stride(self.shape)

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor, as torch computes them."""
    stride: list[int] = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def steps_of(source: Source, conversions: tuple[Layout, ...], *, decoded: bool = True) -> tuple[Layout, ...]:
    """What a stored tensor looks like in compute memory: as it arrives there or is decoded there, then as converted.

    Bytes go to a device as they are stored, and are converted there. Values are decoded in the dtype that is wanted at
    once, with the same bits: no code times scale needs rounding.

    Args:
        decoded: False where the store decodes, in its own dtype.
    """
    if not conversions:
        return (source.layout,)
    first, stored = conversions[0], source.layout
    if is_streamed_to(first.device):
        stored = replace(stored, device=first.device)
        if first == stored:
            return conversions
    is_decoded_as = first.dtype.is_floating_point and first.stride == stored.stride and first.device == stored.device
    if decoded and source.packing is not None and is_decoded_as:
        return conversions
    return (stored, *conversions)


def conversions_to(layouts: tuple[Layout, ...]) -> tuple[Layout, ...]:
    """The same conversions, all on the last one's device: what is streamed to a device, or came from there, once."""
    if not any(is_streamed_to(layout.device) for layout in layouts):
        return layouts
    device = layouts[-1].device
    on_device = [replace(layout, device=device) for layout in layouts]
    return tuple(layout for i, layout in enumerate(on_device) if not i or layout != on_device[i - 1])


def used_from(weights: Sequence[Weight]) -> list[Weight]:
    """What is read, kept and planned where ``weights`` are used: of quantised ones, their parts."""
    kept: list[Weight] = []
    for weight in weights:
        kept.extend(weight.parts or (weight,))
    return kept


def dense_layout(tensor: torch.Tensor) -> Layout:
    """The layout that ``torch.empty_like`` would give a copy: strides are kept where the tensor is dense."""
    stride = torch.empty_like(tensor, device="meta").stride()
    return Layout(tensor.dtype, tuple(tensor.shape), tuple(stride), tensor.device)


class Source:
    """Bytes in a store that never change while this object lives; shared by every weight that reads them."""

    __slots__ = ("__weakref__", "layout", "memory", "name", "packing", "parts", "scales_of", "store", "stored")

    def __init__(
        self,
        store: WeightStore,
        name: str,
        layout: Layout,
        on_unused: Callable[[], None] | None = None,
    ) -> None:
        self.store = store
        # The store again, if its weights are tensors in memory. Python remembers the check of classes, not of objects.
        self.memory = cast(InMemoryStore, store) if issubclass(type(store), InMemoryStore) else None
        # Where in a file it is, if its store says so: then it is read, or mapped, past the store.
        stored = getattr(store, "weight", _nowhere)(name)
        self.stored: StoredWeight | None = stored if isinstance(stored, StoredWeight) else None
        # If it is quantised, how, and what it is decoded from. Its layout is that of the decoded values.
        packed = getattr(store, "packed", _nowhere)(name)
        self.packing = packed.packing if isinstance(packed, PackedWeight) else None
        self.parts = _sources_of(packed) if isinstance(packed, PackedWeight) else ()
        self.scales_of: str | None = None  # the quantised weight whose scales these are
        if self.packing is not None and self.packing.has_scales:
            self.parts[1].scales_of = name
        self.name = name
        self.layout = layout  # of the stored bytes, on the CPU
        if on_unused is not None:
            weakref.finalize(self, on_unused).atexit = False


def _sources_of(packed: PackedWeight) -> tuple[Source, ...]:
    infos = [part.info for part in packed.parts]
    layouts = [Layout(info.dtype, info.shape, contiguous_stride(info.shape), torch.device("cpu")) for info in infos]
    return tuple(Source(packed.store, name, layout) for name, layout in zip(packed.names, layouts, strict=True))


def _packed_on(part: Source, device: torch.device) -> tuple[Layout, ...]:
    """Packed bytes cross to a device as they are."""
    return (replace(part.layout, device=device),) if is_streamed_to(device) else ()


def _nowhere(name: str) -> None:
    """Of a store that does not say how it keeps its weights."""


# Tensors that are born in inference mode cannot be saved for backward later. This is what torch.inference_mode(False)
# consists of; its Python takes 20 µs more where the processor's caches are cold, as they are between two layers.
outside_inference_mode: Callable[[], AbstractContextManager[None]] = partial(torch._C._InferenceMode, False)


class State(enum.Enum):
    """Of a weight; residency alone changes it."""

    OFFLOADED = "offloaded"
    LOADING = "loading"
    RESIDENT = "resident"


class ResidentParameter(nn.Parameter):
    """A weight while it is resident. Writes to it are noticed by its version, also those made through ``.data``."""

    is_finite: bool | None = None  # of scales, once somebody has looked

    @classmethod
    def of(cls, values: torch.Tensor) -> ResidentParameter:
        """One that does not require grad. As ``Parameter()`` makes it of most tensors, without asking what they are."""
        if type(values) is not torch.Tensor:
            return cls(values, requires_grad=False)
        made: ResidentParameter = torch.Tensor._make_subclass(cls, values, False)
        return made

    @property
    def data(self) -> torch.Tensor:
        # torch's own `.data` has a version counter of its own; `detach()` shares ours.
        with torch.no_grad():
            return self.detach()

    @data.setter
    def data(self, values: torch.Tensor) -> None:
        with torch.no_grad():
            self.copy_(values)


class Weight:
    """One named tensor of a model. Ties share one ``Weight``. Only residency changes its state.

    A quantised one has ``parts``, which are what is read, kept and planned; it is decoded from them as it is used.
    """

    __slots__ = (
        "__weakref__",
        "conversions",
        "error",
        "holds",
        "index",
        "is_part",
        "loaded",
        "loaded_version",
        "looked_up",
        "name",
        "parts",
        "residency",
        "shared",
        "source",
        "state",
        "tensor",
        "tile_rows",
        "tileable",
        "tiled",
        "transient",
        "twin",
        "writes",
    )

    def __init__(
        self,
        name: str,
        source: Source,
        residency: Residency,
        conversions: tuple[Layout, ...] = (),
        parts: tuple[Weight, ...] | None = None,
    ) -> None:
        self.name = name  # fully qualified, of its first owner
        self.source = source
        self.conversions = conversions  # layouts that the stored tensor is copied into, one after the other
        self.residency = residency
        self.is_part = False  # of a quantised weight
        if parts is None:
            suffixes = [part.suffix for part in source.packing.parts] if source.packing is not None else []
            device = self.layout.device
            parts = tuple(
                Weight(name + suffix, part, residency, _packed_on(part, device))
                for suffix, part in zip(suffixes, source.parts, strict=True)
            )
            for part in parts:
                part.is_part = True
        self.parts = parts
        self.transient = False  # made by an operation, perhaps anew in each forward: no part of any order
        self.looked_up = False  # whoever owns it uses some rows of it: a table, or experts
        self.tileable = False  # whoever owns it uses it by rows or by tiles; see `tiling`
        self.tiled = False  # it is used by tiles now; residency decides
        self.tile_rows: int | None = None  # in memory at one time, as the user wants it; see `chunked_linear`
        self.writes = 0
        self.shared: weakref.ref[torch.UntypedStorage] | None = None  # values given out to be pickled or pointed at
        self.state = State.OFFLOADED
        self.holds = 0  # forwards and operations that use it now
        self.tensor: ResidentParameter | None = None
        self.twin: ResidentParameter | None = None  # the same memory; see `trainable_twin`
        self.loaded_version = 0
        self.loaded: Any = None  # residency's record of the load that brought it
        self.error: BaseException | None = None  # of a background load, for the next use to raise
        self.index = residency.register(self)

    @property
    def layout(self) -> Layout:
        """What it looks like in compute memory."""
        return self.conversions[-1] if self.conversions else self.source.layout

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def keeps_order(self) -> bool:
        """A run of elements in compute memory is a run of elements in the store."""
        return all(step.stride == self.source.layout.stride for step in self.conversions)

    @property
    def element_bytes(self) -> int:
        """What one element takes while a run of elements is loaded, conversions included."""
        nbytes = -(-self.packed_bytes // max(1, self.layout.numel))
        for step in steps_of(self.source, self.conversions):
            nbytes += step.dtype.itemsize
        return nbytes

    @property
    def packed_bytes(self) -> int:
        """Of the parts of a quantised weight."""
        return sum([part.nbytes for part in self.parts])

    @property
    def peak_load_bytes(self) -> int:
        """Most bytes that exist at one time while it is loaded: a conversion needs both sides."""
        steps = [step.nbytes for step in steps_of(self.source, self.conversions)]
        if len(steps) == 1:
            return steps[0]
        return max(before + after for before, after in itertools.pairwise(steps))

    def convert(self, layout: Layout) -> Weight:
        """This weight as ``.to(...)`` would copy it; loaded from the same bytes."""
        steps = self.conversions if layout == self.layout else conversions_to((*self.conversions, layout))
        if steps and steps[0] == self.source.layout:  # back from a device
            steps = steps[1:]
        parts = self.parts if layout.device == self.layout.device else None  # packed bytes are where values are decoded
        converted = self.replaced_by(Weight(self.name, self.source, self.residency, steps, parts))
        converted.transient = True
        return converted

    def replaced_by(self, other: Weight) -> Weight:
        """``other``, used as this one is."""
        other.tileable, other.tile_rows, other.tiled = self.tileable, self.tile_rows, self.tiled
        other.looked_up = self.looked_up
        for part, as_part in zip(other.parts, self.parts, strict=False):
            part.tileable, part.tiled = as_part.tileable, as_part.tiled
        return other

    def allow_tiles(self, rows: int | None = None) -> None:
        """All who own it use it by rows or by tiles: of ``rows``, or as large as suits."""
        self.tileable, self.tile_rows = True, rows
        for part in self.parts:
            part.tileable = True

    def trainable_twin(self) -> ResidentParameter:
        """The resident tensor as one that requires grad, for use while gradients are off.

        torch.matmul chooses its kernel by ``requires_grad``, even then, and the kernels round differently.
        """
        assert self.tensor is not None
        if self.twin is None:
            # Outside of torch.func transforms, which would wrap it and end before it does.
            with torch._C._DisableFuncTorch(), outside_inference_mode():
                self.twin = ResidentParameter(self.tensor.detach(), requires_grad=True)
        return self.twin
