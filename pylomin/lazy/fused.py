"""Linears that multiply by int8 codes as they are, where the processor has instructions for that.

A float32 input is written as three digits of 8 bits, base 254, below its largest magnitude. ``torch._int_mm``
multiplies them by the codes exactly, in int32; the products are put together in float32, and scaled. That is closer to
the exact result than a float32 product with the decoded weight is (relative error 1.7e-7 against 4e-7), reads a fourth
of the bytes, and decodes nothing. (The idea is that of Ozaki et al. 2012, "Error-free transformations of matrix
multiplication by using fast routines of matrix multiplication".)

Where neighbours in a row share a scale (scheme ``"int8"``), each group of columns is a product of its own: four of them
at a time, by digits that are zero outside of their group. It pays for few rows of input. On a weight of 5632 x 2048, on
two cores of an AMD EPYC with VNNI, one row took 0.7 ms with a scale for each row of the weight (``"int8-row"``), 1.3 ms
with one for 64 neighbours; decoding and a float32 product 4.5 ms, and a float32 product alone 2.1 ms. oneDNN packs the
codes for each product with more than one row; for one row of input and a scale for each row of the weight, the three
digits are multiplied one by one instead, while some of the codes are in the processor's cache: half of the time.

Where inputs are bfloat16, or ``torch.set_float32_matmul_precision("medium")`` allows float32 to be rounded to it, and
there is one scale for each row, ``torch._weight_int8pack_mm`` does the same in 0.4 ms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from pylomin.residency.weight import ResidentParameter, Weight, used_from

MOST_ROWS = {"int8-row": 32, "int8": 8}  # with more, decoding and a float32 product were nearly as fast
MOST_COLUMNS = 1 << 17  # more products of codes and digits could overflow int32
GROUPS_TOGETHER = 4  # in one product; with more, more is multiplied by zeros, with fewer there are more products
WHOLE_COLUMNS = 64  # torch's kernel for bfloat16 reads beyond the end of rows that are no multiple of 16
PRODUCTS_BYTES = 2 << 20  # 2 MiB of products by group at one time, which stay in the processor's cache
CODES_BYTES = 4 << 20  # 4 MiB of codes that are multiplied by one digit after the other, and stay there meanwhile
DIGITS = 3
LARGEST = 127
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fused_linear(
    module: nn.Module, group: Sequence[Weight], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    """What the forward of ``module`` returns, an ``nn.Linear`` with the offloaded weights ``group``.

    None where the plain way is better, or is needed: gradients, transforms, values that are not finite.
    """
    weight = group[0]
    if kwargs or len(args) != 1 or not _is_offloaded_as(module, weight) or not _suits(weight, args[0]):
        return None
    kept = used_from(group)
    with weight.residency.hold(kept, kept):
        codes, scales = weight.parts[0].tensor, weight.parts[1].tensor
        bias: torch.Tensor | None = getattr(module, "bias", None)
        needs_grad = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        if codes is None or scales is None or needs_grad or not _is_finite(scales):
            return None
        return _multiply(args[0], codes, scales, bias)


def _is_finite(scales: ResidentParameter) -> bool:
    if scales.is_finite is None:
        scales.is_finite = bool(torch.isfinite(scales).all())
    return scales.is_finite


def _is_offloaded_as(module: nn.Module, weight: Weight) -> bool:
    return getattr(module._parameters["weight"], "weight", None) is weight


def _suits(weight: Weight, x: object) -> bool:
    packing, layout = weight.source.packing, weight.layout
    if packing is None or not weight.parts or type(x) is not torch.Tensor or x.dtype != layout.dtype:
        return False
    most_rows, columns = MOST_ROWS.get(packing.scheme, 0), layout.shape[1]
    if not 0 < columns <= MOST_COLUMNS or x.shape[-1:] != (columns,) or not 0 < x.numel() <= most_rows * columns:
        return False
    if x.dtype not in DTYPES or x.device.type != "cpu" or layout.device != x.device or not weight.keeps_order:
        return False
    if packing.scheme == "int8" and columns % packing.group_size:
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return False
    is_watched = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None
    if is_watched or (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu")):
        return False
    return multiplies_integers() and not (weight.parts[0].tiled or weight.parts[1].tiled)


@cache
def multiplies_integers() -> bool:
    """Whether ``torch._int_mm`` is fast here, and exact: without these instructions its intermediate sums saturate."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)()) and hasattr(torch, "_int_mm")


def _multiply(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    """``x`` times the transpose of the weight with ``codes`` (out, in) and ``scales`` (out, groups), or as many."""
    out, columns = codes.shape
    if scales.numel() == out and columns % WHOLE_COLUMNS == 0 and _rounds_to_bfloat16(x.dtype):
        rows = x.reshape(-1, columns).to(torch.bfloat16)
        rounded = torch._weight_int8pack_mm(rows, codes, scales.view(-1)).to(x.dtype)
        if bias is not None:
            rounded.add_(bias)
        return rounded.view(*x.shape[:-1], out)
    rows = x.reshape(-1, columns).to(torch.float32)
    largest = rows.abs().amax(1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        return None
    steps, scales = largest / LARGEST, scales.detach().view(out, -1)
    digits, groups = _digits(rows, steps), scales.shape[1]
    result = torch.empty(len(rows), out)
    for some in _slices(out, digits, groups):
        of_groups = scales[some].t().unsqueeze(1).to(torch.float32, memory_format=torch.contiguous_format)
        torch.sum(_group_products(digits, codes[some], groups).mul_(of_groups), 0, out=result[:, some])
    result.mul_(steps)
    if bias is not None:
        result.add_(bias)
    return result.to(x.dtype).view(*x.shape[:-1], out)


def _slices(out: int, digits: torch.Tensor, groups: int) -> Iterator[slice]:
    """Rows of the weight that are multiplied together, as many as stay in the processor's cache."""
    _, rows, columns = digits.shape
    step = out
    if groups > 1:
        step = max(1, PRODUCTS_BYTES // (digits.nbytes // columns * 4 * groups))
    elif rows == 1:
        step = max(1, CODES_BYTES // columns)
    return (slice(first, first + step) for first in range(0, out, step))


def _rounds_to_bfloat16(dtype: torch.dtype) -> bool:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "medium":
        return False
    return dtype != torch.float16 and _multiplies_bfloat16()


@cache
def _multiplies_bfloat16() -> bool:
    """Without these instructions products with bfloat16 are slow."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()) and hasattr(torch, "_weight_int8pack_mm")


def _digits(rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Of shape (digits, *rows.shape), the most significant first, each from -127 to 127."""
    rest = rows / steps.masked_fill(steps == 0, 1)
    digits = torch.empty(DIGITS, *rows.shape, dtype=torch.int8)
    for digit in digits:
        rounded = rest.round().clamp_(-LARGEST, LARGEST)
        digit.copy_(rounded)
        rest = rest.sub_(rounded).mul_(2 * LARGEST)
    return digits


def _group_products(digits: torch.Tensor, codes: torch.Tensor, groups: int) -> torch.Tensor:
    """For each of the groups of columns, the numbers that are written in ``digits`` times the codes.

    Of shape (groups, rows, out), float32, as multiples of the steps of the rows.
    """
    count, rows, columns = digits.shape
    size = columns // groups
    together = next(k for k in range(GROUPS_TOGETHER, 0, -1) if groups % k == 0)
    blocks, width = groups // together, together * size
    # For each block of columns and each group in it, the digits of this group; zero in the other columns.
    apart = torch.zeros(blocks, count * rows, together, together, size, dtype=torch.int8)
    apart.diagonal(0, 2, 3).copy_(digits.view(count * rows, blocks, together, size).permute(1, 0, 3, 2))
    apart = apart.view(blocks, count * rows * together, width)
    products = torch.empty(blocks, count * rows * together, len(codes), dtype=torch.int32)
    for block in range(blocks):
        of_block = codes[:, block * width : (block + 1) * width].t()
        if groups == rows == 1:  # codes are multiplied as they lie; for more rows than one they are packed anew
            for digit, product in zip(apart[block].unbind(), products[block].unbind(), strict=True):
                torch._int_mm(digit.unsqueeze(0), of_block, out=product.unsqueeze(0))
        else:
            torch._int_mm(apart[block], of_block, out=products[block])
    of_digits = products.view(blocks, count, rows, together, len(codes)).unbind(1)
    sums = of_digits[-1].to(torch.float32)
    for of_digit in reversed(of_digits[:-1]):
        sums = sums.div_(2 * LARGEST).add_(of_digit)
    return sums.permute(0, 2, 1, 3).reshape(groups, rows, len(codes))
