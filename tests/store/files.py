"""Makes weight files, good ones and bad ones, and looks at what is open."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pylomin.store.base import ReadRequest, WeightStore

SAMPLE = {"b": torch.arange(4.0), "a": torch.arange(6, dtype=torch.int16).view(2, 3)}


def raw_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header, correct or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write_shards(
    directory: Path,
    shards: Mapping[str, Mapping[str, torch.Tensor]],
    *,
    weight_map: Mapping[str, str] | None = None,
) -> Path:
    """Shard files and their index; returns the index's path."""
    for file, tensors in shards.items():
        save_file(dict(tensors), directory / file)
    if weight_map is None:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def write_offload_folder(directory: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A folder as accelerate writes it; returns the path of its index."""
    for name, tensor in tensors.items():
        flat = tensor.contiguous().reshape(-1)
        (directory / f"{name}.dat").write_bytes(bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b"")
    index = directory / "index.json"
    described = {n: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)} for n, t in tensors.items()}
    index.write_text(json.dumps(described))
    return index


def read_bytes(store: WeightStore, name: str, start: int = 0, stop: int | None = None) -> bytes:
    stop = store.info(name).nbytes if stop is None else stop
    destination = bytearray(stop - start)
    store.read([ReadRequest(name, start, memoryview(destination))])
    return bytes(destination)


def read_tensor(store: WeightStore, name: str) -> torch.Tensor:
    info = store.info(name)
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    raw = torch.frombuffer(bytearray(read_bytes(store, name)), dtype=torch.uint8)
    return raw.view(info.dtype).reshape(info.shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes: also for dtypes that torch cannot compare, and for NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    # contiguous() leaves any stride to a dimension of size 1, which view() refuses.
    flat_a, flat_b = (t.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8) for t in (a, b))
    return torch.equal(flat_a, flat_b)


def open_descriptors() -> int:
    gc.collect()  # what others left
    return len(os.listdir("/dev/fd"))


def touch_later(path: Path, seconds: int = 1) -> None:
    """Move the modification time on, whatever the resolution of the file system's clock."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + seconds * 10**9))
