"""Families run by tiles: all of their linears, budgets smaller than their largest layer, and routed experts only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pylomin
from pylomin.lazy.module import is_linear

from .catalog import BY_NAME
from .compare import NamedTensors, outputs_of
from .family import Family

NAMES = ("bert", "gpt2", "llama", "t5", "mixtral", "vit", "whisper")


def assert_near(expected: NamedTensors, actual: NamedTensors) -> None:
    """Equal but for the rounding of products that were taken in parts, and what layers make of it."""
    assert [path for path, _ in expected] == [path for path, _ in actual]
    for (path, left), (_, right) in zip(expected, actual, strict=True):
        torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-4, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_every_linear_by_tiles(name: str) -> None:
    family = BY_NAME[name]
    expected = outputs_of(family.build(), family.inputs())
    model = family.build()
    linears = [module for module in model.modules() if is_linear(module)]
    assert linears
    for passes in (
        lambda m: pylomin.lazy_loading(pylomin.chunked_linear(m, chunk_size=5)),
        lambda m: pylomin.prefetch(pylomin.chunked_linear(pylomin.lazy_loading(m), chunk_size="1KiB")),
    ):
        model = passes(model)
        for _ in range(2):
            assert_near(expected, outputs_of(model, family.inputs()))
        model = pylomin.restore(model)


@pytest.mark.parametrize("name", NAMES)
def test_budget_smaller_than_the_largest_layer(name: str) -> None:
    family = BY_NAME[name]
    expected = outputs_of(family.build(), family.inputs())
    model = family.build()
    budget = smallest_budget(model)
    largest = max(parameter.nbytes for module in model.modules() if is_linear(module) for parameter in [module.weight])
    for prefetched in (False, True):
        model = pylomin.lazy_loading(model, memory_budget=budget)
        if prefetched:
            pylomin.prefetch(model)
        for _ in range(2):
            assert_near(expected, outputs_of(model, family.inputs()))
        assert pylomin.stats(model).peak_bytes <= budget
        model = pylomin.restore(model)
    if name not in ("vit", "whisper"):  # their convolutions load whole
        assert budget < largest


def smallest_budget(model: nn.Module) -> int:
    with pytest.raises(pylomin.BudgetError) as raised:
        pylomin.lazy_loading(model, memory_budget=1)
    return int(str(raised.value).partition("Use memory_budget of at least ")[2].split(",")[0])


# -- experts -----------------------------------------------------------------------------------------------------------

EXPERTS = ("mixtral", "qwen2_moe", "olmoe", "gpt_oss", "deepseek_v3")


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", EXPERTS)
def test_only_routed_experts_are_read(name: str, implementation: str) -> None:
    family = BY_NAME[name]
    inputs = {"input_ids": family.inputs()["input_ids"][:1, :1]}
    expected, used = routed(family, implementation, inputs)
    model = with_experts(family, implementation)
    packed = {n: p for n, p in model.named_parameters() if n.rpartition(".")[0].endswith(".experts")}
    assert packed
    one_of_each = sum(p.nbytes // len(p) for p in packed.values())
    layers = len({n.rpartition(".")[0] for n in packed})
    rest = sum(p.nbytes for n, p in model.named_parameters() if n not in packed)

    model = pylomin.lazy_loading(model)
    for _ in range(2):
        before = pylomin.stats(model).bytes_read
        actual = outputs_of(model, inputs)
        read = pylomin.stats(model).bytes_read - before
        assert_near(expected, actual)
        assert read <= rest + used * one_of_each // layers


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", EXPERTS[:4:3])
def test_experts_under_the_smallest_budget(name: str, implementation: str) -> None:
    family = BY_NAME[name]
    expected = outputs_of(with_experts(family, implementation), family.inputs())
    model = with_experts(family, implementation)
    budget = smallest_budget(model)
    model = pylomin.lazy_loading(model, memory_budget=budget)
    assert_near(expected, outputs_of(model, family.inputs()))
    assert pylomin.stats(model).peak_bytes <= budget


def with_experts(family: Family, implementation: str) -> nn.Module:
    model: Any = family.build()
    model.set_experts_implementation(implementation)
    return model


def routed(family: Family, implementation: str, inputs: dict[str, torch.Tensor]) -> tuple[NamedTensors, int]:
    """The outputs of the resident model, and how many experts one token went to in all layers."""
    model = with_experts(family, implementation)
    used: list[int] = []
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            # Of (hidden states, chosen experts, their weights).
            module.register_forward_pre_hook(lambda m, args: used.append(len(args[1].unique())))
    expected = outputs_of(model, inputs)
    assert used
    return expected, sum(used)
