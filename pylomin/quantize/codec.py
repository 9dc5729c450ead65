"""Whole tensors to stored parts and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pylomin.errors import PassError
from pylomin.quantize.error_sum import ErrorSum
from pylomin.quantize.packing import FINER, FULL, GROUP_SIZE, SCHEMES, NotEncodable, Packing, Workspace


@dataclass(frozen=True, slots=True)
class Encoded:
    """A tensor under a scheme.

    Attributes:
        packing: the layout; its scheme is a finer one than was asked for where ``reason`` says so.
        parts: the stored tensors: codes, or the tensor itself, and scales if the scheme has them.
        max_error: the largest absolute difference to what :func:`decode` returns.
        rms_error: the root mean square of the differences, over that of the tensor.
        reason: why another scheme was taken; empty where none was.
    """

    packing: Packing
    parts: tuple[torch.Tensor, ...]
    max_error: float
    rms_error: float
    reason: str


def encode(
    tensor: torch.Tensor, scheme: str, group_size: int = GROUP_SIZE, *, max_error: float | None = None
) -> Encoded:
    """Encode a tensor; besides the result this takes some MiB.

    A tensor stays as it is where the scheme would not make it smaller, or cannot hold it: an integer or complex one,
    one with values that are not finite or out of the range of bfloat16 scales.

    Args:
        tensor: of any shape, on the CPU.
        scheme: ``"int8"`` or ``"int4"`` with a scale per group of neighbours in the last dimension, ``"int8-row"`` with
            one per row, ``"bf16"`` or ``"f16"``.
        group_size: neighbours that share a scale.
        max_error: where the relative RMS error would be larger, take a finer scheme.

    >>> encoded = encode(torch.linspace(-1, 1, 256).view(2, 128), "int8")
    >>> [part.dtype for part in encoded.parts], encoded.rms_error < 0.005
    ([torch.int8, torch.bfloat16], True)
    """
    reason = ""
    for candidate in candidates(scheme):
        packing = Packing(candidate, tensor.dtype, tuple(tensor.shape), group_size)
        if not is_smaller(packing):
            continue
        try:
            parts, errors = _encode(tensor.detach(), packing)
        except NotEncodable as problem:
            reason = str(problem)
            continue
        if max_error is None or errors.rms_error <= max_error:
            return Encoded(packing, parts, errors.max_error, errors.rms_error, reason)
        reason = exceeds(candidate, errors.rms_error)
    packing = Packing(FULL, tensor.dtype, tuple(tensor.shape), group_size)
    return Encoded(packing, (tensor.detach(),), 0.0, 0.0, reason)


def decode(packing: Packing, parts: Sequence[torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor that was encoded, but for the error of its scheme.

    Args:
        packing: of :class:`Encoded`.
        parts: of any shapes with the right number of elements.
        out: where to put it: contiguous, of the tensor's shape and any floating-point dtype. Default: a new tensor.
    """
    if out is None:
        out = torch.empty(packing.shape, dtype=packing.dtype)
    matrix = out.view(packing.matrix_shape)
    matrices = as_matrices(packing, parts)
    for first, last in packing.chunks():
        packing.decode_rows(tuple(part[first:last] for part in matrices), matrix[first:last])
    return out


def decode_rows(
    packing: Packing,
    parts: Sequence[torch.Tensor],
    rows: tuple[int, int] | Sequence[int] | torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Some rows of ``packing.matrix_shape``, from the packed bytes of these rows alone.

    Args:
        packing: of :class:`Encoded`.
        parts: of the whole tensor.
        rows: ``(first, last)``, the last one exclusive; or a list or 1-D tensor of row numbers.
        out: where to put them, of shape ``(rows, columns)``. Default: a new tensor.
    """
    matrices = as_matrices(packing, parts)
    if isinstance(rows, tuple):
        chosen = tuple(part[rows[0] : rows[1]] for part in matrices)
    else:
        index = torch.as_tensor(rows, dtype=torch.int64)
        chosen = tuple(part.index_select(0, index) for part in matrices)
    if out is None:
        out = torch.empty(chosen[0].shape[0], packing.matrix_shape[1], dtype=packing.dtype)
    packing.decode_rows(chosen, out)
    return out


def candidates(scheme: str) -> list[str]:
    """``scheme`` and those that are finer, but full precision. Raises PassError for an unknown one."""
    if scheme not in SCHEMES:
        raise PassError(f"quantisation scheme {scheme!r} is unknown; expected one of {', '.join(SCHEMES)}.")
    found = []
    while scheme != FULL:
        found.append(scheme)
        scheme = FINER[scheme]
    return found


def is_smaller(packing: Packing) -> bool:
    """Can the scheme be tried, and would it save anything?"""
    full = Packing(FULL, packing.dtype, packing.shape)
    return packing.dtype in FLOATING and packing.nbytes < full.nbytes


FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def exceeds(scheme: str, rms_error: float) -> str:
    """The reason for a finer scheme."""
    return f"{scheme} has a relative RMS error of {rms_error:.2g}"


def as_matrices(packing: Packing, parts: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The parts with the rows of ``packing.matrix_shape``."""
    rows = packing.matrix_shape[0]
    return tuple(part.reshape(rows, columns) for part, (_, columns) in zip(parts, packing.part_rows(), strict=True))


def _encode(tensor: torch.Tensor, packing: Packing) -> tuple[tuple[torch.Tensor, ...], ErrorSum]:
    matrix = tensor.reshape(packing.matrix_shape)
    parts = tuple(torch.empty(part.shape, dtype=part.dtype) for part in packing.parts)
    matrices = as_matrices(packing, parts)
    errors, workspace = ErrorSum(), Workspace()
    for first, last in packing.chunks():
        packing.encode_rows(matrix[first:last], tuple(part[first:last] for part in matrices), errors, workspace)
    return parts, errors
