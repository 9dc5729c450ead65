"""Linears that multiply by int8 codes as they are, where the processor has instructions for that.

A float32 input is written as four digits of 8 bits, base 254, below its largest magnitude. ``torch._int_mm`` multiplies
them by the codes exactly, in int32; the products are put together in float32, and scaled. That is closer to the exact
result than a float32 product with the decoded weight is (relative error 5e-8 against 2e-7), reads a fourth of the
bytes, and decodes nothing. (The idea is that of Ozaki et al. 2012, "Error-free transformations of matrix
multiplication by using fast routines of matrix multiplication".)

It needs one scale for each row of the weight (scheme ``"int8-row"``), and pays for few rows of input. On a weight of
5632 x 2048, one thread with AMX, it took 1.1 ms for one row and 4.6 ms for 32; a float32 product alone 3.3 ms for one.
``torch._weight_int8pack_mm`` took 20 ms for a float32 row, and rounds where it is fast, with bfloat16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from pylomin.residency.weight import Weight, used_from

MOST_ROWS = 32  # 128 rows of digits; at 64, decoding and a float32 product were nearly as fast
MOST_COLUMNS = 1 << 17  # more products of codes and digits could overflow int32
DIGITS = 4
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
        codes, scales = (part.tensor for part in weight.parts)
        bias: torch.Tensor | None = getattr(module, "bias", None)
        needs_grad = torch.is_grad_enabled() and bias is not None and bias.requires_grad
        if codes is None or scales is None or needs_grad or not bool(torch.isfinite(scales).all()):
            return None
        return _multiply(args[0], codes.detach(), scales.detach(), bias)


def _is_offloaded_as(module: nn.Module, weight: Weight) -> bool:
    return getattr(module._parameters["weight"], "weight", None) is weight


def _suits(weight: Weight, x: object) -> bool:
    packing = weight.source.packing
    if packing is None or packing.scheme != "int8-row" or not weight.parts or type(x) is not torch.Tensor:
        return False
    if x.dtype not in DTYPES or x.dtype != weight.layout.dtype or x.device.type != "cpu" or not weight.keeps_order:
        return False
    columns = weight.layout.shape[1]
    if weight.layout.device != x.device or x.shape[-1:] != (columns,) or not 0 < columns <= MOST_COLUMNS:
        return False
    if not 0 < x.numel() // columns <= MOST_ROWS or (x.requires_grad and torch.is_grad_enabled()):
        return False
    is_watched = torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None
    if is_watched or torch.is_autocast_enabled("cpu") or any(part.tiled for part in weight.parts):
        return False
    return multiplies_integers()


@cache
def multiplies_integers() -> bool:
    """Whether ``torch._int_mm`` is fast here, and exact: without these instructions its intermediate sums saturate."""
    return bool(getattr(torch.cpu, "_is_vnni_supported", bool)()) and hasattr(torch, "_int_mm")


def _multiply(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor | None:
    rows = x.reshape(-1, codes.shape[1]).to(torch.float32)
    largest = rows.abs().amax(1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        return None
    steps = largest / LARGEST
    rest = rows / steps.masked_fill(steps == 0, 1)
    digits = torch.empty(DIGITS, *rows.shape, dtype=torch.int8)
    for digit in digits:
        rounded = rest.round().clamp_(-LARGEST, LARGEST)
        digit.copy_(rounded)
        rest = rest.sub_(rounded).mul_(2 * LARGEST)
    products = torch._int_mm(digits.view(-1, rows.shape[1]), codes.t()).view(DIGITS, len(rows), -1)
    sums = products[-1].to(torch.float32)
    for product in reversed(products[:-1].unbind()):
        sums = sums.div_(2 * LARGEST).add_(product)
    result = sums.mul_(steps).mul_(scales.view(-1).to(torch.float32))
    if bias is not None:
        result.add_(bias)
    return result.to(x.dtype).view(*x.shape[:-1], -1)
