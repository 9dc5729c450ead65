"""Symmetric integers with one scale per group of neighbours in a row.

Each group of ``group_size`` values is divided by its largest magnitude over 127 (int8) or 7 (int4) and rounded. Scales
are bfloat16: their rounding moves the largest value by less than half a step, so nothing clips, and their range is that
of float32. (Scales of float16 would turn small groups, such as those of Adam's second moments, into zeros.)

Two int4 codes share a byte: the low halves of a row's bytes are the first half of its columns, the high halves the
second. So a row unpacks as two runs, without interleaving.
"""

from __future__ import annotations

import torch

LIMITS = {8: 127, 4: 7}  # the largest code, by bits
_SMALLEST_NORMAL = torch.finfo(torch.bfloat16).smallest_normal


def quantize(
    values: torch.Tensor, group_size: int, bits: int, codes: torch.Tensor, restored: torch.Tensor
) -> torch.Tensor:
    """Codes and scales of a matrix of shape ``(rows, columns)``, neither of them 0.

    Args:
        values: float32 or float64.
        group_size: columns that share a scale; the last group of a row may be shorter.
        bits: 8 or 4.
        codes: receives them; int8 of shape ``(rows, columns)`` or uint8 of shape ``(rows, ceil(columns / 2))``.
        restored: receives what :func:`dequantize` makes of the result; of the shape and dtype of ``values``.

    Returns:
        Scales, bfloat16 of shape ``(rows, ceil(columns / group_size))``, which are not finite where a value of the
        group is not, or is out of range.
    """
    # Every intermediate result lies in `restored`.
    blocks = list(zip(_blocks(values, group_size), _blocks(restored, group_size), strict=True))
    largest = [torch.abs(block, out=step).amax(-1) for block, step in blocks]
    exact_scales = (largest[0] if len(largest) == 1 else torch.cat(largest, 1)).div_(LIMITS[bits])
    if exact_scales.amin() >= _SMALLEST_NORMAL:  # nearly always
        scales = exact_scales.to(torch.float32).to(torch.bfloat16)
        divisors = scales.to(values.dtype)
    else:
        scales = _round_scales(exact_scales)
        divisors = scales.to(values.dtype)
        divisors.masked_fill_(divisors == 0, 1)
    divisors_of_blocks = _scale_blocks(divisors, values.shape[1], group_size)
    for (block, step), divisor in zip(blocks, divisors_of_blocks, strict=True):
        torch.div(block, divisor, out=step)
    restored.round_()
    codes.copy_(restored if bits == 8 else _pack(restored.to(torch.int8)))
    for (_, step), divisor in zip(blocks, divisors_of_blocks, strict=True):
        step.mul_(divisor)
    return scales


def dequantize(codes: torch.Tensor, scales: torch.Tensor, group_size: int, bits: int, out: torch.Tensor) -> None:
    """The inverse of :func:`quantize`, into ``out`` of shape ``(rows, columns)`` and any floating-point dtype.

    Every product is rounded once, to the dtype of ``out``.
    """
    columns = out.shape[1]
    if bits == 8:
        out.copy_(codes)
        steps = scales if out.dtype == torch.bfloat16 else scales.to(_step_dtype(out))
    else:
        half = codes.shape[1]
        # Both halves come out 16 times too large, which the scales make up for; shifting them down would take longer.
        signed = codes.view(torch.int8)
        out[:, :half].copy_(signed << 4)
        out[:, half:].copy_(signed[:, : columns - half] & -16)
        steps = scales.to(_step_dtype(out)) / 16
    for block, step in zip(_blocks(out, group_size), _scale_blocks(steps, columns, group_size), strict=True):
        block.mul_(step)


def _step_dtype(out: torch.Tensor) -> torch.dtype:
    return torch.float64 if out.dtype == torch.float64 else torch.float32


def _blocks(matrix: torch.Tensor, group_size: int) -> list[torch.Tensor]:
    """Views of shape ``(rows, groups, columns of a group)``: the full groups, and the shorter last one."""
    whole = matrix.shape[1] // group_size * group_size
    blocks = []
    if whole:
        blocks.append(matrix[:, :whole].unflatten(1, (-1, group_size)))
    if whole < matrix.shape[1]:
        blocks.append(matrix[:, whole:].unsqueeze(1))
    return blocks


def _scale_blocks(scales: torch.Tensor, columns: int, group_size: int) -> list[torch.Tensor]:
    """The scales that belong to the views of :func:`_blocks`."""
    whole = columns // group_size
    return [part.unsqueeze(-1) for part in (scales[:, :whole], scales[:, whole:]) if part.shape[1]]


def _round_scales(scales: torch.Tensor) -> torch.Tensor:
    """To the nearest bfloat16; up where that is subnormal, for the rounding is coarse there and values could clip."""
    exact = scales.to(torch.float32)
    rounded = exact.to(torch.bfloat16)
    tiny = (scales > 0) & (scales < _SMALLEST_NORMAL)
    if bool(tiny.any()):
        kept_bits = (exact.view(torch.int32) + 0xFFFF) >> 16 << 16
        above = kept_bits.clamp_(min=1 << 16).view(torch.float32).to(torch.bfloat16)
        rounded = torch.where(tiny, above, rounded)
    return rounded


def _pack(codes: torch.Tensor) -> torch.Tensor:
    half = (codes.shape[1] + 1) // 2
    packed = codes[:, :half] & 0x0F
    packed[:, : codes.shape[1] - half] |= codes[:, half:] << 4
    return packed.view(torch.uint8)
