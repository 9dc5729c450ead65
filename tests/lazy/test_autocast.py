"""Autocast keeps nothing of offloaded weights: its copies would be outside of the budget, until its block ends."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pylomin


class Casts(TorchDispatchMode):
    """Counts conversions of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and args[0].dim() == 2 and args[0].shape[0] == 32
        return func(*args, **(kwargs or {}))


@contextmanager
def casting(*, gradients: bool) -> Iterator[Casts]:
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16), Casts() as casts:
        yield casts


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.parametrize("gradients", [False, True])
def test_what_was_cast_is_not_kept(gradients: bool) -> None:
    plain = nn.Linear(64, 32)
    model = pylomin.lazy_loading(copy.deepcopy(plain), memory_budget="1MiB")
    with casting(gradients=gradients) as kept:
        expected = [plain(X) for _ in range(3)]
    assert kept.count == 1, "as it is of weights that require grad"
    with casting(gradients=gradients) as casts:
        outputs = [model(X) for _ in range(3)]
    assert casts.count == 3
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cls", [nn.Linear, nn.Bilinear])
def test_the_same_bits(cls: Any, dtype: torch.dtype) -> None:
    plain = (nn.Linear(64, 32) if cls is nn.Linear else nn.Bilinear(64, 64, 32)).to(dtype)
    inputs = [X.to(dtype)] * (2 if cls is nn.Bilinear else 1)
    model = pylomin.lazy_loading(copy.deepcopy(plain), memory_budget="4MiB")
    for enabled in (True, False):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(model(*inputs), plain(*inputs))
    torch.set_autocast_enabled("cuda", True)  # of another device
    try:
        with torch.no_grad():
            assert torch.equal(model(*inputs), plain(*inputs))
    finally:
        torch.set_autocast_enabled("cuda", False)
