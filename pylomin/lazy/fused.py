"""Linears that multiply by int8 codes as they are, where the processor has instructions for that.

A float32 input is written as three digits of 8 bits, base 256, below its largest magnitude. ``torch._int_mm``
multiplies them by the codes exactly, in int32; the products are put together in float32, and scaled. That is closer to
the exact result than a float32 product with the decoded weight is (relative error 1.6e-7 against 4e-7), reads a fourth
of the bytes, and decodes nothing. (The idea is that of Ozaki et al. 2012, "Error-free transformations of matrix
multiplication by using fast routines of matrix multiplication".)

Where neighbours in a row share a scale (scheme ``"int8"``), each group of columns is a product of its own: four of
them at a time, by digits that are zero outside of their group. The codes are the left factor, which oneDNN reads as
it lies; it would pack them anew as the right one. It pays for few rows of input. On a weight of 5632 x 2048, not in
any cache, on two cores of an AMD EPYC with VNNI, one row took 0.9 ms with a scale for each row of the weight
(``"int8-row"``), 1.9 ms with one for 64 neighbours; decoding and a float32 product 7 ms, and a float32 product alone
2.5 ms. For one row of input and a scale for each row of the weight, the three digits are multiplied one by one, while
some of the codes are in the processor's cache.

Where the codes are too large for the budget, tiles of them are multiplied, one after the other.

Where inputs are bfloat16, or ``torch.set_float32_matmul_precision("medium")`` allows float32 to be rounded to it, and
there is one scale for each row, ``torch._weight_int8pack_mm`` does the same in 0.6 ms. Where inputs may be rounded to 8
bits (``quantize_inputs``), one digit is left, and 0.4 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from pylomin.io.buffers import aligned
from pylomin.residency.tiling import runs_of_tiles
from pylomin.residency.weight import ResidentParameter, Weight, used_from

MOST_ROWS = {"int8-row": 32, "int8": 6}  # with more, decoding and a float32 product were nearly as fast
MOST_COLUMNS = 1 << 17  # more products of codes and digits could overflow int32
LANES = 4  # numbers that are multiplied together: 16 digits, which a register holds products of
WHOLE_COLUMNS = 64  # torch's kernel for bfloat16 reads beyond the end of rows that are no multiple of 16
PRODUCTS_BYTES = 2 << 20  # 2 MiB of products by group at one time, which stay in the processor's cache
CODES_BYTES = 4 << 20  # 4 MiB of codes that are multiplied by one digit after the other, and stay there meanwhile
LARGEST_INT8 = 127
DIGITS = 3
BASE = 256
LARGEST = 0x7F7F7F  # all digits are 127
HALVES = 0x808080
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Multiplier = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From codes (out, in) and their scales (out, groups), or as many, to a product."""


def fused_linear(
    module: nn.Module, group: Sequence[Weight], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.Tensor | None:
    """What the forward of ``module`` returns, an ``nn.Linear`` with the offloaded weights ``group``.

    None where the plain way is better, or is needed: gradients, transforms, values that are not finite.
    """
    weight = group[0]
    if kwargs or len(args) != 1 or not _is_offloaded_as(module, weight) or not _suits(weight, args[0]):
        return None
    kept, (codes, scales) = used_from(group), weight.parts
    with weight.residency.hold([part for part in kept if not part.tiled], kept):
        bias: torch.Tensor | None = getattr(module, "bias", None)
        needs_grad = bias is not None and bias.requires_grad and torch.is_grad_enabled()
        if scales.tensor is None or needs_grad or not _is_finite(scales.tensor):
            return None
        columns, quantizes = weight.layout.shape[1], weight.residency.quantizes_inputs
        multiply = _multiplier(args[0], columns, scales.tensor, quantizes=quantizes)
        if multiply is None:
            return None
        if codes.tensor is not None:
            result = multiply(codes.tensor, scales.tensor)
        else:
            result = torch.cat(list(_by_tiles(multiply, codes, scales.tensor)), 1)
        if bias is not None:
            result.add_(bias)
        return result.to(args[0].dtype).view(*args[0].shape[:-1], -1)


def _by_tiles(multiply: Multiplier, codes: Weight, scales: torch.Tensor) -> Iterator[torch.Tensor]:
    """The columns of the product, tile by tile of ``codes``, which are too large for the budget."""
    out, columns = codes.layout.shape
    runs = runs_of_tiles(codes, codes.residency.memory_budget)
    stream = codes.residency.stream_runs(codes, runs)
    for first, last in runs:
        yield multiply(next(stream).view(-1, columns), scales.view(out, -1)[first // columns : last // columns])


def _is_finite(scales: ResidentParameter) -> bool:
    if scales.is_finite is None:
        scales.is_finite = all(math.isfinite(bound.item()) for bound in torch.aminmax(scales))  # NaN is both bounds
    return scales.is_finite


def _is_offloaded_as(module: nn.Module, weight: Weight) -> bool:
    return getattr(module._parameters["weight"], "weight", None) is weight


def _suits(weight: Weight, x: object) -> bool:
    packing, layout = weight.source.packing, weight.layout
    if packing is None or not weight.parts or type(x) is not torch.Tensor or x.dtype != layout.dtype:
        return False
    most_rows, (out, columns) = MOST_ROWS.get(packing.scheme, 0), layout.shape
    if not out or not 0 < columns <= MOST_COLUMNS:
        return False
    if x.shape[-1:] != (columns,) or not 0 < x.numel() <= most_rows * columns:
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
    codes, scales = weight.parts
    return multiplies_integers() and not scales.tiled and (out > 1 or not codes.tiled)


@cache
def multiplies_integers() -> bool:
    """Whether ``torch._int_mm`` is fast here, and exact: without these instructions its intermediate sums saturate."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)()) and hasattr(torch, "_int_mm")


def _multiplier(x: torch.Tensor, columns: int, scales: torch.Tensor, *, quantizes: bool) -> Multiplier | None:
    """What multiplies ``x`` by the transpose of the rows of the weight that it is given, as a (rows, out) tensor.

    None where it is not finite.
    """
    groups = scales.numel() // len(scales)
    quantizes &= groups == 1
    if groups == 1 and not quantizes and columns % WHOLE_COLUMNS == 0 and _rounds_to_bfloat16(x.dtype):
        return partial(_multiply_rounded, x.reshape(-1, columns).to(torch.bfloat16), x.dtype)
    rows = x.reshape(-1, columns).to(torch.float32)
    largest = torch.linalg.vector_norm(rows, torch.inf, 1, keepdim=True)
    if not math.isfinite((largest if len(rows) == 1 else largest.amax()).item()):
        return None
    largest.clamp_min_(torch.finfo(torch.float32).tiny)
    if quantizes:
        steps = largest.div_(LARGEST_INT8)
        return partial(_multiply_quantized, (rows / steps).round_().to(torch.int8).t(), steps)
    digits, units = _digits(rows, largest), largest * (BASE ** (DIGITS - 1) / LARGEST)
    if groups == len(rows) == 1:
        return partial(_digit_by_digit, digits.view(torch.int8).view(columns, -1).t().contiguous(), units)
    return partial(_all_digits, _apart(digits, groups), units)


def _multiply_rounded(
    rows: torch.Tensor, dtype: torch.dtype, codes: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    return torch._weight_int8pack_mm(rows, codes, scales.view(-1)).to(dtype)


def _rounds_to_bfloat16(dtype: torch.dtype) -> bool:
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "medium":
        return False
    return dtype != torch.float16 and _multiplies_bfloat16()


@cache
def _multiplies_bfloat16() -> bool:
    """Without these instructions products with bfloat16 are slow."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()) and hasattr(torch, "_weight_int8pack_mm")


def _multiply_quantized(
    columns: torch.Tensor, steps: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """The numbers in ``columns``, as multiples of ``steps``, times the weight."""
    products = torch._int_mm(codes, columns).to(torch.float32)
    return products.mul_(scales.view(-1, 1)).t().contiguous().mul_(steps)


def _digits(rows: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """``rows`` as multiples of ``largest / LARGEST``, int32, whose bytes are the digits, from -128 to 127.

    The least significant byte first; that after the most significant digit is zero.
    """
    numbers = (rows / largest).mul_(LARGEST).round_().to(torch.int32)
    # A byte of the sum is a digit plus 128; with its highest bit inverted, it is the digit as int8.
    return numbers.add_(HALVES).bitwise_xor_(HALVES)


def _apart(digits: torch.Tensor, groups: int) -> torch.Tensor:
    """For each block of columns, and each of its groups, the digits of this group; zero in the other columns.

    Of shape (blocks, columns of a block, rows, groups of a block), with zeros for rows up to a number that fills lanes.
    """
    rows, columns = digits.shape
    together = math.gcd(groups, LANES)
    blocks, size, padded = groups // together, columns // groups, aligned(rows, LANES // together)
    apart = torch.zeros(blocks, together, size, padded, together, dtype=torch.int32)
    apart[:, :, :, :rows].diagonal(0, 1, 4).copy_(digits.view(rows, blocks, together, size).permute(1, 3, 0, 2))
    return apart.view(blocks, together * size, padded, together)


def _all_digits(apart: torch.Tensor, units: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers that are written in digits, in ``units`` of the most significant, times the weight."""
    blocks, width, padded, together = apart.shape
    rows, out, scales = len(units), len(codes), scales.view(len(codes), -1)
    factors = apart.view(torch.int8).view(blocks, width, -1)
    step = -(-out // -(-4 * blocks * out * factors.shape[2] // PRODUCTS_BYTES))
    products = torch.empty(blocks, step, factors.shape[2], dtype=torch.int32)
    of_digits = torch.empty(blocks, step, padded, together, apart.element_size())
    numbers = torch.empty(rows, step, blocks * together)
    result = torch.empty(rows, out)
    for some in (slice(first, min(first + step, out)) for first in range(0, out, step)):
        in_step = slice(some.stop - some.start)
        of_blocks = codes[some].split(width, 1)
        for block, factor, product in zip(of_blocks, factors.unbind(), products[:, in_step].unbind(), strict=True):
            torch._int_mm(block, factor, out=product)
        of_digits.view_as(products)[:, in_step].copy_(products[:, in_step])
        into = numbers.view(rows, step, blocks, together)[:, in_step].permute(2, 1, 0, 3)
        _number(of_digits[:, in_step, :rows], out=into)
        for of_row, sums in zip(numbers[:, in_step], result[:, some], strict=True):
            torch.sum(of_row.mul_(scales[some]), 1, out=sums)
    return result.mul_(units)


def _digit_by_digit(
    digits: torch.Tensor, units: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """The same for one row, whose digits are rows here, and one group of columns.

    Some codes at a time, which stay in the processor's cache meanwhile.
    """
    products = torch.empty(DIGITS, len(codes), 1, dtype=torch.int32)
    step = max(1, CODES_BYTES // codes.shape[1])
    for first in range(0, len(codes), step):
        for digit, product in zip(digits[:DIGITS].unsqueeze(2), products, strict=True):
            torch._int_mm(codes[first : first + step], digit, out=product[first : first + step])
    numbers = _number(products.to(torch.float32).permute(1, 2, 0))
    return numbers.mul_(scales.view(-1, 1)).mul_(units).t()


def _number(digits: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """What is written in the last dimension, the least significant digit first, in units of the most significant."""
    low, middle, high = digits.unbind(-1)[:DIGITS]
    return torch.add(high, torch.add(middle, low, alpha=1 / BASE), alpha=1 / BASE, out=out)
