from __future__ import annotations

import re

import pytest
import torch

from pylomin.errors import PassError
from pylomin.quantize.choose import chooser
from pylomin.store.base import WeightInfo


def info(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> WeightInfo:
    return WeightInfo(dtype, shape, 0)


def test_default_filter():
    choose = chooser("int8", None)
    assert choose("w", info((64, 64))) == "int8"
    assert choose("w", info((2, 32, 64), torch.float16)) == "int8"
    assert choose("small", info((64, 63))) is None
    assert choose("bias", info((100_000,))) is None
    assert choose("scalar", info(())) is None
    assert choose("index", info((64, 64), torch.int64)) is None


@pytest.mark.parametrize("filter", [r"\.weight$", re.compile(r"\.weight$"), ["a.weight"], {"a.weight"}, ("a.weight",)])
def test_filters(filter):
    choose = chooser("int4", filter)
    assert choose("a.weight", info((1,))) == "int4"
    assert choose("a.weight.x", info((64, 64))) is None


def test_function():
    choose = chooser(None, lambda name, info: "int8" if len(info.shape) == 2 else None)
    assert choose("w", info((1, 1))) == "int8"
    assert choose("w", info((1,))) is None


def test_nothing():
    assert chooser(None, None)("w", info((64, 64))) is None


def test_refusals():
    with pytest.raises(PassError, match="quantize is 'int2'; expected one of int8, int8-row, int4, bf16, f16, or None"):
        chooser("int2", None)
    with pytest.raises(PassError, match="but quantize is None"):
        chooser(None, "weight")
    with pytest.raises(PassError, match=r"'\(' is no regular expression"):
        chooser("int8", "(")
    with pytest.raises(PassError, match="filter returned 'best' for weight 'w'"):
        chooser("int8", lambda name, info: "best")("w", info((1, 1)))
