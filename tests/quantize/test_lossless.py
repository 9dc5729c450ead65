from __future__ import annotations

import builtins

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pylomin.errors import MissingPackageError
from pylomin.quantize.lossless import check_available, compress, restore


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.sampled_from([1, 2, 4, 8]), st.integers(0, 9))
def test_round_trip(numbers, itemsize, seed):
    generator = torch.Generator().manual_seed(seed)
    old, new = (torch.randint(0, 256, (numbers, itemsize), dtype=torch.uint8, generator=generator) for _ in range(2))
    values = old.clone()
    assert restore(memoryview(compress(new, old)), values)
    assert torch.equal(values, new)


def test_close_values_take_little():
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(100_000, generator=generator).bfloat16()
    new = (old.float() * (1 + 1e-4 * torch.randn(100_000, generator=generator))).bfloat16()
    a, b = (t.view(torch.uint8).view(-1, 2) for t in (new, old))
    assert len(compress(a, b)) < a.numel() / 8


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "other length"])
def test_damage_is_noticed(damage):
    old = torch.zeros(1000, 4, dtype=torch.uint8)
    new = torch.randint(0, 256, (1000, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    block = bytearray(compress(new, old))
    if damage == "truncated":
        block = block[:-10]
    elif damage == "changed":
        block[:4] = b"????"
    elif damage == "empty":
        block.clear()
    else:
        block = bytearray(compress(new[:500], old[:500]))
    assert not restore(memoryview(block), old.clone())


def test_without_zstandard(monkeypatch):
    real = builtins.__import__

    def import_(name, *args, **kwargs):
        if name == "zstandard":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_)
    with pytest.raises(MissingPackageError, match=r"pip install 'pylomin\[zstd\]'"):
        check_available()
