"""Weights whose elements do not follow each other in row-major order: transposed, sliced, expanded, byte-swapped."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pylomin.io.files import Extent, WeightFile
from pylomin.store.base import WeightInfo
from pylomin.store.extents import EncodedWeight, StoredWeight
from pylomin.store.tensor_bytes import byte_view

_MAX_SPAN_BYTES = 1 << 22  # 4 MiB: what one read may bring; transposing 16 MiB at a time took three times as long
_MIN_SPAN_BYTES = 1 << 16  # 64 KiB: below, reading what nobody needs is cheaper than another call
_MAX_WASTE = 8  # elements read for one that is needed, in longer reads
# Elements are only moved, so that any dtype of the same size does.
MOVED_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


@dataclass(frozen=True, slots=True)
class StridedWeight:
    """A weight with strides of its own in a file. No stride is negative; none reaches beyond the file."""

    info: WeightInfo
    file: WeightFile
    start: int  # file offset of the first element, in bytes
    stride: tuple[int, ...]  # in elements
    swapped: bool = False  # the bytes of each number lie in the other order than this machine's

    def read_into(self, offset_bytes: int, destination: memoryview) -> None:
        """Fill ``destination`` with row-major bytes; at most 4 MiB more are in memory."""
        itemsize, shape = self.info.dtype.itemsize, self.info.shape
        moved_as = MOVED_AS[itemsize]
        if len(destination) == self.info.nbytes:
            self._fill(torch.frombuffer(destination, dtype=moved_as).view(shape), self.start)
            return
        # The rows that the bytes are in, then those bytes of them. Bytes of a scalar come from its only row.
        row_bytes = self.info.nbytes // shape[0] if shape else self.info.nbytes
        first = offset_bytes // row_bytes
        last = -(-(offset_bytes + len(destination)) // row_bytes)
        rows = torch.empty((last - first, *shape[1:]) if shape else (), dtype=moved_as, device="cpu")
        self._fill(rows, self.start + (first * self.stride[0] * itemsize if shape else 0))
        skipped = offset_bytes - first * row_bytes
        destination[:] = byte_view(rows)[skipped : skipped + len(destination)]

    def _fill(self, target: torch.Tensor, start: int) -> None:
        """Fill ``target``, which has as many dimensions as the weight, from the element at ``start`` on."""
        itemsize = target.element_size()
        sizes = list(target.shape)
        span = 1 + sum((size - 1) * step for size, step in zip(sizes, self.stride, strict=True))
        span_bytes = span * itemsize
        fits = span_bytes <= _MIN_SPAN_BYTES or (
            span_bytes <= _MAX_SPAN_BYTES and span <= _MAX_WASTE * max(1, target.numel())
        )
        if fits or target.numel() == 1:
            raw = torch.empty(span, dtype=target.dtype, device="cpu")
            self.file.read(start, [byte_view(raw)])
            if self.swapped:
                raw = in_native_order(raw, self.info.dtype)
            target.copy_(raw.as_strided(sizes, self.stride))
            return
        # Halves along the largest stride overlap the least.
        dim = max((dim for dim, size in enumerate(sizes) if size > 1), key=lambda dim: self.stride[dim])
        half = sizes[dim] // 2
        self._fill(target.narrow(dim, 0, half), start)
        self._fill(target.narrow(dim, half, sizes[dim] - half), start + half * self.stride[dim] * itemsize)


def in_native_order(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous tensor of elements of ``dtype``, moved as others, with the bytes of each number reversed."""
    number_bytes = dtype.itemsize // (2 if dtype.is_complex else 1)
    return raw.view(torch.uint8).view(-1, number_bytes).flip(1).reshape(-1).view(raw.dtype)


def placed_weight(
    info: WeightInfo, file: WeightFile, start: int, stride: tuple[int, ...], *, swapped: bool = False
) -> StoredWeight | EncodedWeight:
    """The weight whose first element is at ``start``: an extent wherever its elements are one."""
    swapped = swapped and info.dtype.itemsize > 1
    if not swapped and (info.nbytes == 0 or is_row_major(info.shape, stride)):
        return StoredWeight(info, file, Extent(start, start + info.nbytes))
    return StridedWeight(info, file, start, stride, swapped)


def span_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last one (inclusive) of a strided tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Do the elements follow each other as torch's contiguous tensors have them?"""
    step = 1
    for size, found in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and found != step:
            return False
        step *= size
    return True
