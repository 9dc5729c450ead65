"""Decoders of the block-quantised types of GGUF, to float32, bit for bit as the ``gguf`` package decodes them.

Layouts of the blocks: ``ggml/src/ggml-common.h`` of https://github.com/ggml-org/ggml.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from pylomin.io.files import WeightFile
from pylomin.store.base import WeightInfo
from pylomin.store.tensor_bytes import byte_view

_DECODED_AT_ONCE = 1 << 20  # elements: 4 MiB of them, and a few times that in between


@dataclass(frozen=True, slots=True)
class BlockType:
    """A quantised type: ``elements`` numbers in ``nbytes`` bytes."""

    elements: int
    nbytes: int
    decode: Callable[[torch.Tensor], torch.Tensor]  # uint8 (blocks, nbytes) to float32 (blocks, elements)


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight whose blocks follow each other in row-major order from ``start`` on."""

    info: WeightInfo
    file: WeightFile
    start: int  # file offset of the first block, in bytes
    block: BlockType

    def read_into(self, offset_bytes: int, destination: memoryview) -> None:
        """Fill ``destination`` with float32 numbers; only the blocks that hold them are read."""
        itemsize, block = self.info.dtype.itemsize, self.block
        position, stop = offset_bytes, offset_bytes + len(destination)
        block_bytes = block.elements * itemsize
        at_once = max(1, _DECODED_AT_ONCE // block.elements)
        while position < stop:
            first = position // block_bytes
            last = min(-(-stop // block_bytes), first + at_once)
            raw = torch.empty((last - first, block.nbytes), dtype=torch.uint8, device="cpu")
            self.file.read(self.start + first * block.nbytes, [byte_view(raw)])
            decoded = byte_view(block.decode(raw).contiguous())
            skipped = position - first * block_bytes
            count = min(stop - position, len(decoded) - skipped)
            done = position - offset_bytes
            destination[done : done + count] = decoded[skipped : skipped + count]
            position += count


def _halves(raw: torch.Tensor) -> torch.Tensor:
    """Bytes (blocks, 2) as float16 numbers (blocks, 1), in float32."""
    return raw.contiguous().view(torch.float16).float()


def _nibbles(raw: torch.Tensor, run: int) -> torch.Tensor:
    """Of each ``run`` bytes the low halves, then the high halves: (blocks, runs, 2, run)."""
    runs = raw.reshape(raw.shape[0], -1, 1, run)
    return torch.cat((runs & 0x0F, runs >> 4), dim=2)


def _decode_q8_0(raw: torch.Tensor) -> torch.Tensor:
    return raw[:, 2:].contiguous().view(torch.int8).float() * _halves(raw[:, :2])


def _decode_q4_0(raw: torch.Tensor) -> torch.Tensor:
    numbers = _nibbles(raw[:, 2:], 16).reshape(raw.shape[0], 32).to(torch.int8) - 8
    return _halves(raw[:, :2]) * numbers.float()


def _decode_q4_k(raw: torch.Tensor) -> torch.Tensor:
    count = raw.shape[0]
    low, middle, mixed = raw[:, 4:16].reshape(count, 3, 4).unbind(1)
    scales = torch.cat((low & 0x3F, (mixed & 0x0F) | ((low >> 2) & 0x30)), dim=1)
    minima = torch.cat((middle & 0x3F, (mixed >> 4) | ((middle >> 2) & 0x30)), dim=1)
    scale = (_halves(raw[:, :2]) * scales.float()).unsqueeze(2)
    minimum = (_halves(raw[:, 2:4]) * minima.float()).unsqueeze(2)
    numbers = _nibbles(raw[:, 16:], 32).reshape(count, 8, 32).float()
    return (scale * numbers - minimum).reshape(count, 256)


def _decode_q6_k(raw: torch.Tensor) -> torch.Tensor:
    count = raw.shape[0]
    low = _nibbles(raw[:, :128], 64).reshape(count, 8, 32)
    runs = raw[:, 128:192].reshape(count, 2, 1, 32)
    high = torch.cat([(runs >> shift) & 0x03 for shift in (0, 2, 4, 6)], dim=2).reshape(count, 8, 32)
    numbers = ((low | (high << 4)).to(torch.int8) - 32).reshape(count, 16, 16).float()
    scales = raw[:, 192:208].contiguous().view(torch.int8).float()
    scale = (_halves(raw[:, 208:]) * scales).unsqueeze(2)
    return (scale * numbers).reshape(count, 256)


BLOCK_TYPES = {
    "Q4_0": BlockType(32, 18, _decode_q4_0),
    "Q8_0": BlockType(32, 34, _decode_q8_0),
    "Q4_K": BlockType(256, 144, _decode_q4_k),
    "Q6_K": BlockType(256, 210, _decode_q6_k),
}
