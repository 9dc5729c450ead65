"""Families that run from quantised files, as the model that was restored from the same file runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

import pylomin
from pylomin.lazy import fused

from .catalog import BY_NAME
from .compare import NamedTensors, assert_same, outputs_of
from .family import Family
from .test_tiles import assert_near

NAMES = ("bert", "gpt2", "llama", "t5", "mixtral")


@pytest.fixture
def without_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, which gives the same bits as the decoded model."""
    monkeypatch.setattr(fused, "multiplies_integers", lambda: False)


def quantized(family: Family, scheme: str, directory: Path) -> Path:
    def matrices(name: str, info: object) -> str | None:
        return scheme if len(info.shape) > 1 else None  # type: ignore[attr-defined]

    return pylomin.save_model(family.build(), directory / scheme, quantize=scheme, quantize_filter=matrices)


def loaded(family: Family, path: Path, memory_budget: int | None = None) -> nn.Module:
    return pylomin.load(lambda: family.construct().eval(), path, strict=False, memory_budget=memory_budget)


def decoded_outputs(family: Family, path: Path) -> NamedTensors:
    return outputs_of(pylomin.restore(loaded(family, path)), family.inputs())


def smallest_budget(family: Family, path: Path) -> int:
    with pytest.raises(pylomin.BudgetError) as raised:
        loaded(family, path, 1)
    return int(str(raised.value).partition("Use memory_budget of at least ")[2].split(",")[0])


@pytest.mark.usefixtures("without_fused")
@pytest.mark.parametrize("scheme", ["int8", "int8-row", "int4", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_bits_are_those_of_the_decoded_model(name: str, scheme: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    path = quantized(family, scheme, tmp_path)
    expected, packed_bytes = decoded_outputs(family, path), path.stat().st_size
    for memory_budget in (None, 100 * packed_bytes):
        model = pylomin.prefetch(loaded(family, path, memory_budget))
        for _ in range(3):
            assert_same(expected, outputs_of(model, family.inputs()))
        if memory_budget is not None:
            assert pylomin.stats(model).bytes_read <= packed_bytes, "read once, as it is packed"


@pytest.mark.parametrize("scheme", ["int8", "int8-row", "int4"])
@pytest.mark.parametrize("name", NAMES)
def test_budgets_from_the_smallest(name: str, scheme: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    path = quantized(family, scheme, tmp_path)
    expected, packed_bytes = decoded_outputs(family, path), path.stat().st_size
    smallest = smallest_budget(family, path)
    assert smallest < packed_bytes
    for memory_budget in (smallest, packed_bytes // 4, packed_bytes // 2, packed_bytes):
        model = loaded(family, path, max(smallest, memory_budget))
        for prefetched in (False, True):
            if prefetched:
                pylomin.prefetch(model)
            assert_near(expected, outputs_of(model, family.inputs()))
        stats = pylomin.stats(model)
        assert stats.peak_bytes <= max(smallest, memory_budget)
