"""Putting offloaded weights in the place of a model's parameters, and taking them out again."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, get_args

import torch
from torch import nn

from pylomin.errors import BudgetError, PassError
from pylomin.io.buffers import ALIGNMENT_BYTES, PAGE_BYTES, SMALL_BYTES, aligned, block_bytes
from pylomin.io.modes import Mode
from pylomin.io.sizes import format_bytes
from pylomin.lazy.collector import paused_collector
from pylomin.lazy.distributed import distributed_parameter, is_distributed, local_of
from pylomin.lazy.module import LazyModule, holds_weights, lazy_class, loads_rows, loads_tiles
from pylomin.lazy.tensor import OffloadedTensor, as_parameter
from pylomin.residency.carrier import DEVICE_ALIGNMENT_BYTES
from pylomin.residency.device import is_streamed_to
from pylomin.residency.residency import Residency
from pylomin.residency.tiling import PACKED_TIMES, fits, lines_of, lines_per_tile
from pylomin.residency.weight import Layout, Source, Weight, dense_layout, steps_of


@dataclass(frozen=True, slots=True)
class Slot:
    """One place where a module keeps a parameter."""

    module: nn.Module
    name: str  # in the module
    fqn: str

    @property
    def parameter(self) -> torch.Tensor:
        """What this process has of the parameter: of a DTensor, the local shard."""
        return local_of(self.owned)

    @property
    def owned(self) -> nn.Parameter:
        """The parameter, as the module has it."""
        parameter = self.module._parameters[self.name]
        assert parameter is not None
        return parameter


@dataclass(slots=True)
class Tie:
    """All the slots of one weight. They held the same parameter, or parameters with the same memory."""

    slots: list[Slot] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)  # other names that the weight may be stored under

    @property
    def parameter(self) -> torch.Tensor:
        return self.slots[0].parameter

    @property
    def owned(self) -> nn.Parameter:
        return self.slots[0].owned

    @property
    def fqn(self) -> str:
        return self.slots[0].fqn

    @property
    def names(self) -> list[str]:
        return [slot.fqn for slot in self.slots] + self.aliases


def slots_of(model: nn.Module) -> Iterator[Slot]:
    """Every slot that holds a parameter, in the order of ``model.named_modules()``."""
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield Slot(module, name, f"{prefix}.{name}" if prefix else name)


def find_ties(slots: Iterable[Slot]) -> list[Tie]:
    """Slots grouped by weight, in order of first appearance."""
    ties: dict[object, Tie] = {}
    for slot in slots:
        ties.setdefault(_identity(slot.parameter), Tie()).slots.append(slot)
    return list(ties.values())


def _identity(parameter: torch.Tensor) -> object:
    if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.layout is not torch.strided:
        return id(parameter)
    if parameter.device.type == "meta" or not parameter.numel() or isinstance(parameter, OffloadedTensor):
        return id(parameter)  # all tensors without data have the same address
    geometry = (parameter.storage_offset(), tuple(parameter.shape), parameter.stride(), parameter.dtype)
    return (parameter.untyped_storage()._cdata, *geometry)


@paused_collector()
def offload(
    model: nn.Module,
    ties: Sequence[Tie],
    sources: Sequence[Source],
    residency: Residency,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | None = None,
    reading_mode: Mode | None = None,
) -> None:
    """Replace the parameters of ``ties`` by offloaded ones, and make the modules that hold their own weights lazy.

    The last step of every pass that offloads; before it, the model and ``residency`` are as they were.

    Args:
        sources: where the bytes of each weight are.
        device: where to compute; default: where the parameter is (the CPU for one without values).
        dtype: of floating-point weights in compute memory; default: the parameter's.
        memory_budget: the new budget of ``residency``; default: unchanged.
        reading_mode: how to read; default: unchanged.
    """
    weights = [
        Weight(tie.fqn, source, residency, _conversions(tie.parameter, source.layout, device, dtype))
        for tie, source in zip(ties, sources, strict=True)
    ]
    owned = []
    for tie, weight in zip(ties, weights, strict=True):
        if is_tileable(tie):
            weight.allow_tiles()
        weight.looked_up = all(loads_rows(slot.module, tie.parameter.dim()) for slot in tie.slots)
        owned += [Owned.of(slot.module, weight) for slot in tie.slots]
    budget = residency.memory_budget if memory_budget is None else memory_budget
    groups = offloaded_footprints(model) + footprints(owned)
    residency.expect(*check_budget(groups, budget))
    if reading_mode is not None:
        residency.set_reading_mode(reading_mode)
    residency.set_budget(budget)
    if model in _wanted:
        depth, readers = _wanted.pop(model)
        residency.set_depth(depth)
        if readers is not None:
            residency.set_readers(readers)
    # Made before anything is changed, for a class may refuse to be subclassed.
    lazy_classes = {
        slot.module: lazy_class(type(slot.module))
        for tie in ties
        for slot in tie.slots
        if holds_weights(slot.module) and not isinstance(slot.module, LazyModule)
    }
    for tie, weight in zip(ties, weights, strict=True):
        replaced: dict[int, nn.Parameter] = {}
        for slot in tie.slots:
            old = slot.owned
            if id(old) not in replaced:
                replaced[id(old)] = _stand_in(old, weight)
            slot.module._parameters[slot.name] = replaced[id(old)]
    for module, cls in lazy_classes.items():
        object.__setattr__(module, "__class__", cls)
        if isinstance(module, nn.RNNBase):
            module.__dict__.pop("_flat_weights", None)  # it would keep the old parameters


def _stand_in(old: nn.Parameter, weight: Weight) -> Any:
    new: Any
    if is_distributed(old):
        local = OffloadedTensor(weight)
        local.trainable = old.requires_grad
        new = distributed_parameter(local, old)
    else:
        new = as_parameter(OffloadedTensor(weight), trainable=old.requires_grad)
        new.parameter_class = type(old)
    new.__dict__.update({name: value for name, value in old.__dict__.items() if name not in new.__dict__})
    return new


def _conversions(
    parameter: torch.Tensor, stored: Layout, device: torch.device | None, dtype: torch.dtype | None
) -> tuple[Layout, ...]:
    if device is None:
        device = stored.device if parameter.device.type == "meta" else parameter.device
    if not stored.dtype.is_floating_point:
        dtype = stored.dtype
    elif dtype is None:
        dtype = parameter.dtype
    layout = replace(stored, dtype=dtype, device=device)
    return () if layout == stored else (layout,)


def move_rest(model: nn.Module, device: torch.device) -> None:
    """Buffers, and parameters that stay in memory, to where offloaded weights are computed with."""
    for slot in slots_of(model):
        parameter = slot.owned
        if not isinstance(slot.parameter, OffloadedTensor) and parameter.device != device:
            parameter.data = parameter.data.to(device)
    moved: dict[int, torch.Tensor] = {}  # by id; one may have several owners
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = moved.setdefault(id(buffer), buffer.to(device))


def offloaded_slots(model: nn.Module) -> list[tuple[Slot, OffloadedTensor]]:
    """The slots whose parameter is offloaded, and that parameter."""
    return [(s, p) for s in slots_of(model) if isinstance(p := s.parameter, OffloadedTensor)]


def residencies_of(model: nn.Module) -> list[Residency]:
    """One for most models; more where parts were offloaded separately."""
    return list({parameter.weight.residency: None for _, parameter in offloaded_slots(model)})


_wanted: weakref.WeakKeyDictionary[nn.Module, tuple[int | None, int | None]] = weakref.WeakKeyDictionary()


def want_prefetch(model: nn.Module, depth: int | None, readers: int | None) -> None:
    """``prefetch`` was applied to ``model`` before anything of it was offloaded."""
    _wanted[model] = (depth, readers)


def residency_for(model: nn.Module) -> Residency:
    """The residency of what is offloaded of ``model`` already, so that one budget counts it all; or a new one."""
    return next(iter(residencies_of(model)), None) or Residency()


class Owned(NamedTuple):
    """A weight, as one module that owns it uses it."""

    module: nn.Module
    name: str
    stored: Layout
    conversions: tuple[Layout, ...]
    tileable: bool
    tile_rows: int | None
    packed_bytes: int | None = None  # of a quantised one; its conversions begin with what it is decoded into

    @staticmethod
    def of(module: nn.Module, weight: Weight) -> Owned:
        tileable = weight.tileable and weight.keeps_order
        source, conversions, packed_bytes = weight.source, weight.conversions, None
        stored, *converted = steps_of(source, conversions)
        if weight.parts:
            stored, converted, packed_bytes = source.layout, [stored, *converted], weight.packed_bytes
        return Owned(module, weight.name, stored, tuple(converted), tileable, weight.tile_rows, packed_bytes)


class Footprint(NamedTuple):
    """Memory that a use of one weight takes, or of one line of it where it can be used by lines."""

    name: str
    stored_bytes: int
    converted_bytes: int
    lines: int = 1
    tile_rows: int | None = None
    is_packed: bool = False  # stored_bytes are those of its parts
    alignment_bytes: int = ALIGNMENT_BYTES

    def times(self, lines: int) -> Footprint:
        return self._replace(stored_bytes=lines * self.stored_bytes, converted_bytes=lines * self.converted_bytes)

    def tile(self, memory_budget: int | None) -> Footprint | None:
        """What is in memory at one time; None where that is the whole weight."""
        line_bytes = self.stored_bytes + self.converted_bytes
        times = PACKED_TIMES if self.is_packed else 2
        lines = lines_per_tile(self.lines, line_bytes, self.tile_rows, memory_budget, times=times)
        return None if lines is None else self.times(lines)

    def beside_tiles(self, memory_budget: int | None) -> Footprint | None:
        """What of it is in memory while it is used by tiles: the packed bytes, if they are few."""
        whole = self.times(self.lines)._replace(converted_bytes=0)
        return whole if self.is_packed and fits(whole.stored_bytes, memory_budget, PACKED_TIMES) else None


def is_tileable(tie: Tie) -> bool:
    """Whether all who own the weight use it by rows or by tiles, and at least one by tiles."""
    tiles = [loads_tiles(slot.module) and slot.name == "weight" for slot in tie.slots]
    dim = tie.parameter.dim()
    return any(tiles) and all(
        tiled or loads_rows(slot.module, dim) for slot, tiled in zip(tie.slots, tiles, strict=True)
    )


def footprints(owned: Iterable[Owned]) -> list[list[Footprint]]:
    """For each module, the weights that are in memory together when it is used; one row of what loads by rows.

    Rows of tables of three dimensions are matrices, experts, which load by tiles as linears do where they are too
    large.
    """
    groups: dict[nn.Module, dict[str, Footprint]] = {}
    for module, name, stored, conversions, tileable, tile_rows, packed_bytes in owned:
        rows = max(1, stored.shape[0]) if loads_rows(module, len(stored.shape)) else 1
        lines = 1
        if rows == 1 and tileable:
            lines = lines_of(stored)[0]
        elif len(stored.shape) == 3 and rows > 1:  # an expert, which is a matrix
            lines = max(1, stored.shape[1])
        parts = rows * lines
        is_packed = packed_bytes is not None
        device = (conversions[-1] if conversions else stored).device
        alignment_bytes = DEVICE_ALIGNMENT_BYTES if is_streamed_to(device) else ALIGNMENT_BYTES
        stored_bytes = stored.nbytes // parts if packed_bytes is None else -(-packed_bytes // parts)
        converted_bytes = sum(step.nbytes for step in conversions) // parts
        footprint = Footprint(name, stored_bytes, converted_bytes, lines, tile_rows, is_packed, alignment_bytes)
        groups.setdefault(module, {})[name] = footprint
    return [list(group.values()) for group in groups.values()]


def offloaded_footprints(model: nn.Module) -> list[list[Footprint]]:
    """Of what is offloaded of ``model`` already."""
    return footprints(Owned.of(slot.module, p.weight) for slot, p in offloaded_slots(model))


def planned_footprints(ties: Iterable[Tie], device: torch.device | None) -> list[list[Footprint]]:
    """Of ``ties``, if they are stored as they are in memory now."""
    owned: list[Owned] = []
    for tie in ties:
        layout = dense_layout(tie.parameter)
        conversions: tuple[Layout, ...] = ()
        if device is not None and is_streamed_to(device):
            layout = replace(layout, device=device)
        elif device is not None and device.type != "cpu":
            conversions = (replace(layout, device=device),)
        owned += [Owned(slot.module, tie.fqn, layout, conversions, is_tileable(tie), None) for slot in tie.slots]
    return footprints(owned)


def load_bytes(group: Sequence[Footprint]) -> int:
    """Most memory that loading ``group`` takes at one time, as the ledger counts it."""
    # Codes and scales are aligned each.
    buffer_bytes = sum(
        aligned(weight.stored_bytes, weight.alignment_bytes) + weight.is_packed * weight.alignment_bytes
        for weight in group
    )
    if buffer_bytes >= SMALL_BYTES:
        buffer_bytes = aligned(buffer_bytes, PAGE_BYTES)
    return buffer_bytes + sum(map(_converted_bytes, group))


def _converted_bytes(weight: Footprint) -> int:
    if weight.alignment_bytes > ALIGNMENT_BYTES:  # a block on a device, too
        return block_bytes(aligned(weight.converted_bytes, weight.alignment_bytes))
    return block_bytes(weight.converted_bytes) if weight.is_packed else weight.converted_bytes


def use_bytes(group: Sequence[Footprint], memory_budget: int | None) -> int:
    """Most memory that a use of ``group`` takes: what is held, and two tiles of what is not."""
    tiles = [tile for weight in group if (tile := weight.tile(memory_budget)) is not None]
    held = [weight.times(weight.lines) for weight in group if weight.tile(memory_budget) is None]
    held += [
        packed
        for weight in group
        if weight.tile(memory_budget) is not None and (packed := weight.beside_tiles(memory_budget)) is not None
    ]
    return load_bytes(held) + 2 * max((load_bytes([tile]) for tile in tiles), default=0)


def smallest_budget(group: Sequence[Footprint]) -> int:
    """The least budget under which ``group`` can be used; it can be under every greater one, too."""
    whole_bytes = load_bytes([weight.times(weight.lines) for weight in group])
    tileable = [weight.lines * (weight.stored_bytes + weight.converted_bytes) for weight in group if weight.lines > 1]
    whole_bytes = max([whole_bytes, *(2 * nbytes for nbytes in tileable)])  # what does not fit twice is tiled
    held_bytes = load_bytes([weight for weight in group if weight.lines == 1])
    line_bytes = max((load_bytes([weight]) for weight in group if weight.lines > 1), default=whole_bytes)
    if any(weight.is_packed and weight.lines > 1 for weight in group):
        # Packed bytes, of at most an eighth of the budget for the codes and another for the scales, are beside tiles.
        return max(4 * held_bytes, -(-4 * (held_bytes + 2 * line_bytes) // 3))
    # Two tiles take half of the budget, or two lines where a line is larger than a tile.
    tiled_bytes = max(held_bytes + 2 * line_bytes, 2 * held_bytes)
    is_tiled = any(weight.tile_rows is not None and weight.tile_rows < weight.lines for weight in group)
    return tiled_bytes if is_tiled else min(whole_bytes, tiled_bytes)


def check_mode(reading_mode: object) -> None:
    """Raises PassError unless it is a reading mode, or None."""
    if reading_mode is not None and reading_mode not in get_args(Mode):
        raise PassError(f"reading_mode is {reading_mode!r}; expected one of {', '.join(map(repr, get_args(Mode)))}.")


def check_budget(groups: Sequence[Sequence[Footprint]], memory_budget: int | None) -> tuple[int, int]:
    """The bytes of the largest use, and the least budget. Raises BudgetError, naming a weight, if there is less."""
    budgets = [smallest_budget(group) for group in groups]
    needed = max(budgets, default=0)
    if memory_budget is not None and needed > memory_budget:
        largest = groups[budgets.index(needed)]
        name = max(largest, key=lambda weight: weight.lines * weight.stored_bytes).name
        raise BudgetError(
            f"weight '{name}' needs {format_bytes(needed)} resident, but memory_budget is {memory_budget} "
            f"({format_bytes(memory_budget)}). Use memory_budget of at least {needed}, or keep its module in memory, "
            "outside the budget: pylomin.lazy_loading(model, skip_modules=[...])."
        )
    return max((use_bytes(group, memory_budget) for group in groups), default=0), needed
