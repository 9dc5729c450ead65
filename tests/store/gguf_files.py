"""Makes GGUF files, good ones and bad ones."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import torch

NUMBERS = {
    torch.float32: 0,
    torch.float16: 1,
    torch.int8: 24,
    torch.int16: 25,
    torch.int32: 26,
    torch.int64: 27,
    torch.float64: 28,
    torch.bfloat16: 30,
}
UINT32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def listed(name: str, shape: Sequence[int], number: int, offset: int) -> bytes:
    """How the header lists a tensor; ``shape`` is torch's."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), number, offset)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def gguf_file(
    tensors: Mapping[str, torch.Tensor],
    *,
    blocks: Mapping[str, tuple[tuple[int, ...], int, bytes]] | None = None,
    values: Sequence[bytes] = (),
    alignment: int = 32,
    version: int = 3,
) -> bytes:
    """A file of plain tensors and of ``blocks``: name to shape, number of the type and bytes."""
    entries = [(n, tuple(t.shape), NUMBERS[t.dtype], tensor_bytes(t)) for n, t in tensors.items()]
    entries += [(name, *entry) for name, entry in (blocks or {}).items()]
    data, infos = b"", b""
    for name, shape, number, raw in entries:
        data += bytes(-len(data) % alignment)
        infos += listed(name, shape, number, len(data))
        data += raw
    head = b"GGUF" + struct.pack("<IQQ", version, len(entries), len(values)) + b"".join(values) + infos
    return head + bytes(-len(head) % alignment) + data
