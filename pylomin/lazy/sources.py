"""Where the bytes of weights come from: matched against a store, or written to scratch files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path

import torch
from torch import nn

from pylomin.errors import PassError, WeightMismatchError, WeightNotFoundError
from pylomin.io.buffers import aligned
from pylomin.lazy.collector import paused_collector
from pylomin.lazy.distributed import is_distributed, selection_of, with_local
from pylomin.lazy.offload import Tie
from pylomin.residency.device import device_of, is_streamed_to
from pylomin.residency.memory_limits import memory_limits
from pylomin.residency.pinned import PinnedMemory
from pylomin.residency.residency import Residency
from pylomin.residency.weight import Layout, Source, contiguous_stride, dense_layout
from pylomin.store.base import ReadRequest, WeightInfo, WeightStore
from pylomin.store.disk import disk_error
from pylomin.store.dtypes import STORED_DTYPES, nbytes_of
from pylomin.store.memory import MemoryStore
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.scratch import ScratchDirectory
from pylomin.store.sliced import Part, sliced
from pylomin.store.tensor_bytes import byte_view
from pylomin.store.writer import WeightToWrite, write_safetensors

CPU = torch.device("cpu")
PINNED_CHUNK_BYTES = 256 << 20  # 256 MiB
PINNED_SPARE_BYTES = 256 << 20  # 256 MiB of the host that are not pinned


@paused_collector()
def matched_sources(ties: Sequence[Tie], store: WeightStore, *, cast: bool = False) -> tuple[list[Source], list[str]]:
    """A source in ``store`` for every weight, and the names that the store lacks.

    A weight is found by any of the names that are tied to it. With ``cast``, a floating-point weight may be stored in
    another floating-point dtype than the model's.

    Raises:
        WeightMismatchError: listing all weights whose stored shape or dtype differs from the model's.
    """
    sources: list[Source] = []
    missing: list[str] = []
    mismatches: list[str] = []
    for tie in ties:
        name = next((name for name in tie.names if name in store), None)
        if name is None:
            missing.append(tie.fqn)
            continue
        info, parameter = store.info(name), tie.owned  # of a DTensor, the shape is that of the whole weight
        castable = cast and info.dtype.is_floating_point and parameter.dtype.is_floating_point
        if info.shape != tuple(parameter.shape) or (info.dtype != parameter.dtype and not castable):
            mismatches.append(
                f"  '{name}' in {store.describe(name)}: found {info.dtype} {list(info.shape)}, expected "
                f"{parameter.dtype} {list(parameter.shape)}"
            )
            continue
        if is_distributed(parameter):
            shard = sliced(store, {tie.fqn: Part(name, selection_of(parameter))})
            sources.append(_stored_source(shard, tie.fqn))
            expect_parts(sources[-1])
        else:
            sources.append(_stored_source(store, name))
    if mismatches:
        raise WeightMismatchError(
            "stored weights differ from the model's:\n" + "\n".join(mismatches) + "\nGive the weights of this "
            "model; where only dtypes differ, use pylomin.load(..., dtype=...) or model.to(dtype)."
        )
    return sources, missing


def expect_parts(source: Source) -> None:
    """It is a shard: what lies beside it in its file is not read."""
    if source.stored is not None:
        source.stored.file.expect_parts()


def _stored_source(store: WeightStore, name: str) -> Source:
    info = store.info(name)
    return Source(store, name, Layout(info.dtype, info.shape, contiguous_stride(info.shape), CPU))


def expected_infos(model: nn.Module, ties: Sequence[Tie], dtype: torch.dtype | None) -> dict[str, WeightInfo]:
    """What a store that cannot be asked should have: each weight once, and the persistent buffers."""
    tensors = {tie.fqn: tie.owned.detach() for tie in ties}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return {
        name: WeightInfo(wanted, tuple(tensor.shape), nbytes_of(wanted, tensor.shape))
        for name, tensor in tensors.items()
        for wanted in (tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype,)
    }


def missing_error(missing: Sequence[str], unexpected: Sequence[str], store: WeightStore) -> WeightNotFoundError:
    """Lists every name, and what may have been meant."""
    lines = ["the weights of the model and those of the store do not match."]
    if missing:
        lines.append("Missing in the store:")
        for name in missing:
            similar = get_close_matches(name, unexpected or list(store), n=1, cutoff=0.6)
            lines.append(f"  '{name}'" + (f" (similar: '{similar[0]}')" if similar else ""))
    if unexpected:
        lines.append("In the store, but not in the model:")
        lines += [f"  '{name}' ({store.describe(name)})" for name in unexpected]
    return WeightNotFoundError("\n".join(lines))


def fill_buffers(model: nn.Module, store: WeightStore, *, dtype: torch.dtype | None = None) -> list[str]:
    """Read persistent buffers that ``store`` has into the model. Returns the names of persistent ones that it lacks.

    Raises:
        WeightMismatchError: a stored buffer has another shape.
        PassError: a buffer has no values and the store has none for it.
    """
    buffers = [
        (module, name, f"{prefix}.{name}" if prefix else name, buffer)
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    filled: dict[int, torch.Tensor] = {}  # by id of the buffer that it replaces, which may have several owners
    for module, name, fqn, buffer in buffers:
        if name not in module._non_persistent_buffers_set and fqn in store and id(buffer) not in filled:
            filled[id(buffer)] = _read_buffer(fqn, buffer, store, dtype)
    missing: list[str] = []
    for module, name, fqn, buffer in buffers:
        if id(buffer) in filled:
            continue
        if buffer.device.type == "meta":
            raise PassError(
                f"buffer '{fqn}' is on the meta device and the store has no values for it. Build the model with "
                "pylomin.load(lambda: Model(config), weights), which computes buffers."
            )
        if name not in module._non_persistent_buffers_set:
            missing.append(fqn)
    for module, name, _, buffer in buffers:
        module._buffers[name] = filled.get(id(buffer), buffer)
    return missing


def _read_buffer(fqn: str, buffer: torch.Tensor, store: WeightStore, dtype: torch.dtype | None) -> torch.Tensor:
    info = store.info(fqn)
    if info.shape != tuple(buffer.shape):
        raise WeightMismatchError(
            f"buffer '{fqn}' in {store.describe(fqn)}: found shape {list(info.shape)}, expected {list(buffer.shape)}."
        )
    if is_distributed(buffer):
        store = sliced(store, {fqn: Part(fqn, selection_of(buffer))})
        info = store.info(fqn)
    values = torch.empty(info.shape, dtype=info.dtype, device=CPU)
    if info.nbytes:
        store.read([ReadRequest(fqn, 0, byte_view(values))])
    wanted = dtype if dtype is not None and buffer.dtype.is_floating_point else buffer.dtype
    device = CPU if buffer.device.type == "meta" else buffer.device
    values = values.to(device=device, dtype=wanted)
    return with_local(values, buffer) if is_distributed(buffer) else values


def memory_sources(ties: Sequence[Tie]) -> list[Source]:
    """The parameters themselves, kept in host memory."""
    sources = []
    for tie in ties:
        layout = replace(dense_layout(tie.parameter), device=CPU)
        flat = _in_memory_order(tie.parameter).to(CPU).reshape(-1)
        sources.append(Source(MemoryStore({tie.fqn: flat}), tie.fqn, layout))
    return sources


def pinned_sources(ties: Sequence[Tie], device: torch.device | None) -> list[Source]:
    """The parameters, moved to host memory that a device copies from by itself.

    In chunks of a few weights, so that no more than a chunk is there twice. Where the host has no memory for that, or
    the system does not pin it, weights stay where they are and pass through the ring. So do those for the CPU.
    """
    sources: dict[str, Source] = {}
    for_device = [tie for tie in ties if is_streamed_to(device or tie.parameter.device)]
    for chunk in _chunks(for_device):
        offsets = [0, *accumulate(aligned(tie.parameter.nbytes) for tie in chunk)]
        available_bytes = memory_limits().available_bytes
        if available_bytes is not None and offsets[-1] + PINNED_SPARE_BYTES > available_bytes:
            break
        pins_for = device_of(device or chunk[0].parameter.device)
        memory = PinnedMemory(pins_for, max(1, offsets[-1]), what="for weights")
        if not memory.is_pinned:
            break
        for tie, offset in zip(chunk, offsets, strict=False):
            sources[tie.fqn] = _moved(tie, memory, offset)
    return [sources.get(tie.fqn) or memory_sources([tie])[0] for tie in ties]


def _chunks(ties: Sequence[Tie]) -> Iterator[list[Tie]]:
    chunk: list[Tie] = []
    for tie in ties:
        chunk.append(tie)
        if sum(tie.parameter.nbytes for tie in chunk) >= PINNED_CHUNK_BYTES:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _moved(tie: Tie, memory: PinnedMemory, offset: int) -> Source:
    parameter = tie.parameter
    layout = replace(dense_layout(parameter), device=CPU)
    flat = memory.bytes(offset, layout.nbytes).view(layout.dtype)
    with torch.no_grad():
        values = flat.as_strided(layout.shape, layout.stride).copy_(parameter)
    for slot in tie.slots:  # the former memory goes now, not when all weights have moved
        slot.parameter.data = values
    return Source(MemoryStore({tie.fqn: flat}), tie.fqn, layout)


def written_sources(
    ties: Sequence[Tie], residency: Residency, output_dir: str | os.PathLike[str] | None
) -> list[Source]:
    """The parameters, written to a file that only this model uses.

    Raises:
        ScratchError: they could not be written. Nothing is left behind.
        PassError: ``output_dir`` has a file of that name already.
    """
    if output_dir is None:
        residency.scratch = ScratchDirectory()
        directory = residency.scratch.path
    else:
        directory = Path(output_dir)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, str(directory), 0) from error
    path = directory / "model.safetensors"
    if path.exists():
        raise PassError(
            f"{str(path)!r} exists. To use its weights, pass weights={str(path)!r} instead of output_dir; to write "
            "this model's, choose another output_dir or remove the file."
        )
    write_safetensors(path, [_to_write(tie) for tie in ties], durable=output_dir is not None)
    store = SafetensorsStore(path)
    return [Source(store, tie.fqn, replace(dense_layout(tie.parameter), device=CPU)) for tie in ties]


def _to_write(tie: Tie) -> WeightToWrite:
    parameter = tie.parameter
    if parameter.dtype not in STORED_DTYPES:  # the bytes are what counts; the model knows the dtype
        return WeightToWrite(
            tie.fqn, torch.uint8, (parameter.nbytes,), lambda: _in_memory_order(parameter).reshape(-1).view(torch.uint8)
        )
    shape = tuple(parameter.shape[dim] for dim in _memory_order(parameter))
    return WeightToWrite(tie.fqn, parameter.dtype, shape, lambda: _in_memory_order(parameter))


def _in_memory_order(tensor: torch.Tensor) -> torch.Tensor:
    """Dimensions permuted so that the elements follow each other as in a copy of ``tensor``."""
    return tensor.detach().permute(_memory_order(tensor)).contiguous()


def _memory_order(tensor: torch.Tensor) -> list[int]:
    stride = dense_layout(tensor).stride
    return sorted(range(tensor.dim()), key=lambda dim: (-stride[dim], dim))
