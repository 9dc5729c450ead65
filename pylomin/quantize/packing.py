"""How one weight is laid out under a scheme, and how its rows are encoded and decoded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pylomin.quantize.blockwise import LIMITS, dequantize, quantize
from pylomin.quantize.error_sum import ErrorSum

GROUP_SIZE = 64
CHUNK_BYTES = 1 << 20  # 1 MiB of values at a time: they and their temporaries stay in the processor's cache

_BITS = {"int8": 8, "int8-row": 8, "int4": 4}
_CASTS = {"bf16": torch.bfloat16, "f16": torch.float16}
SCHEMES = (*_BITS, *_CASTS)
FULL = "full"  # as it is
NON_FINITE = "non-finite values"

# What to try next where a scheme's error is too large.
FINER = {"int4": "int8", "int8-row": "int8", "int8": "bf16", "f16": FULL, "bf16": FULL}


class NotEncodable(Exception):  # an answer, not an error: the weight stays in full precision
    """A scheme cannot hold these values; the message says why."""


class Workspace:
    """Memory for intermediate values, used again and again: fresh pages would cost as much as the arithmetic."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def like(self, values: torch.Tensor) -> torch.Tensor:
        """Of the shape and dtype of ``values``; overwritten by what is asked for next."""
        if self._memory.dtype != values.dtype or self._memory.numel() < values.numel():
            self._memory = torch.empty(values.numel(), dtype=values.dtype)
        return self._memory[: values.numel()].view(values.shape)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the stored tensors that make up a weight."""

    suffix: str  # of its name, after that of the weight
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Packing:
    """The layout of a weight of ``shape`` and ``dtype`` under ``scheme``.

    The weight is seen as a matrix of its last dimension's vectors. A vector alone, of whole groups, is seen as a matrix
    of its groups, so that parts of it can be decoded. Each part has as many rows as that matrix, one after the other.

    Attributes:
        scheme: one of ``SCHEMES``, or ``FULL``.
        group_size: neighbours that share a scale; without meaning for schemes that have no scales.
    """

    scheme: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    group_size: int = GROUP_SIZE

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        if not self.shape:
            return 1, 1
        last = self.shape[-1]
        if len(self.shape) == 1 and self.scheme != "int8-row" and last and last % self.group_size == 0:
            return last // self.group_size, self.group_size
        return math.prod(self.shape[:-1]), last

    @property
    def row_bytes(self) -> int:
        """Of the decoded weight."""
        return self.matrix_shape[1] * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of all parts."""
        return sum(part.nbytes for part in self.parts)

    @property
    def has_scales(self) -> bool:
        return self.scheme in _BITS

    @property
    def parts(self) -> tuple[Part, ...]:
        """The stored tensors, in the order in which they lie."""
        if not self.has_scales:
            return (Part("", _CASTS.get(self.scheme, self.dtype), self.shape),)
        columns = self.matrix_shape[1]
        if _BITS[self.scheme] == 8:
            codes = Part("", torch.int8, self.shape)
        else:
            codes = Part("", torch.uint8, self._stored_shape((columns + 1) // 2))
        return codes, Part("_scale", torch.bfloat16, self._stored_shape(-(-columns // self._columns_per_scale)))

    @property
    def _columns_per_scale(self) -> int:
        return max(1, self.matrix_shape[1]) if self.scheme == "int8-row" else self.group_size

    def _stored_shape(self, columns: int) -> tuple[int, ...]:
        rows = self.matrix_shape[0]
        return (rows * columns,) if len(self.shape) < 2 else (*self.shape[:-1], columns)

    def part_rows(self) -> tuple[tuple[torch.dtype, int], ...]:
        """Dtype and columns of each part, as a matrix with the rows of ``matrix_shape``."""
        rows = max(1, self.matrix_shape[0])
        return tuple((part.dtype, math.prod(part.shape) // rows) for part in self.parts)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows, the last one exclusive, of about ``CHUNK_BYTES`` each."""
        rows = self.matrix_shape[0]
        step = max(1, CHUNK_BYTES // max(1, self.row_bytes))
        for first in range(0, rows, step):
            yield first, min(first + step, rows)

    def encode_rows(
        self,
        values: torch.Tensor,
        out: tuple[torch.Tensor, ...],
        errors: ErrorSum,
        workspace: Workspace,
        reference: torch.Tensor | None = None,
    ) -> None:
        """The parts of some rows.

        Args:
            values: ``(some rows, columns)`` of ``dtype``.
            out: receives the parts, as matrices; see :meth:`part_rows`.
            errors: what decoding will not give back is added to it.
            workspace: for intermediate values.
            reference: encode the difference to these rows.

        Raises:
            NotEncodable: the scheme cannot hold these values.
        """
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        exact = values.to(wide)
        target = exact if reference is None else exact - reference.to(wide)
        restored = workspace.like(exact)
        if self.has_scales:
            codes, scales = out
            bits = _BITS[self.scheme]
            scales.copy_(quantize(target, self._columns_per_scale, bits, codes, restored))
            largest = float(scales.amax()) * LIMITS[bits]
        else:
            restored.copy_(out[0].copy_(target))
            largest = float(out[0].abs().amax())
        decoded = restored.to(self.dtype) if reference is None else reference.clone().add_(restored)
        if not largest <= torch.finfo(self.dtype).max or not errors.add(exact, decoded):
            raise NotEncodable("values out of range" if bool(torch.isfinite(values).all()) else NON_FINITE)

    def decode_rows(self, parts: tuple[torch.Tensor, ...], out: torch.Tensor, *, add: bool = False) -> None:
        """Rows from their parts.

        Args:
            parts: as matrices; see :meth:`part_rows`.
            out: ``(rows, columns)``, of any floating-point dtype and strides.
            add: add to what is in ``out``, which holds the rows of a reference.
        """
        if not self.has_scales:
            out.add_(parts[0]) if add else out.copy_(parts[0])
            return
        target = out
        if add:
            target = torch.empty_like(out, dtype=torch.float64 if out.dtype == torch.float64 else torch.float32)
        codes, scales = parts
        dequantize(codes, scales, self._columns_per_scale, _BITS[self.scheme], target)
        if add:
            out.add_(target)
