"""The comparison notices what it must, and says where."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from .catalog import BY_NAME, FAMILIES
from .compare import assert_same, flatten, outputs_of


@dataclass
class Cache:
    keys: list[Tensor]
    length: int = 1


def test_flatten_names_every_tensor_of_a_nest() -> None:
    nest = {"logits": torch.ones(1), "cache": Cache([torch.ones(2), torch.ones(3)]), "loss": None}
    assert [path for path, _ in flatten(nest)] == [
        "output['logits']",
        "output['cache'].keys[0]",
        "output['cache'].keys[1]",
    ]


def test_flatten_ends_on_an_object_that_contains_itself() -> None:
    cache = Cache([torch.ones(1)])
    cache.keys.append(cache)  # type: ignore[arg-type]
    assert len(flatten(cache)) == 1


def test_equal_bits_are_the_same_and_so_are_nans() -> None:
    tensor = torch.tensor([1.0, float("nan"), -0.0])
    assert_same(flatten([tensor, torch.arange(3)]), flatten([tensor.clone(), torch.arange(3)]))


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        (torch.tensor([1.0, 0.0, 2.5]), r"output\[1\]: 1 of 3 elements differ, by at most 0\.5"),
        (torch.tensor([1.0, -0.0, 2.0]), r"output\[1\]: 0 of 3"),
        (torch.tensor([1.0, float("nan"), 2.0]), r"output\[1\]: 1 of 3"),
        (torch.tensor([1.0, 0.0]), r"output\[1\]: shape .*\[2\].*, expected .*\[3\]"),
        (torch.tensor([1, 0, 2]), r"output\[1\]: dtype torch\.int64, expected torch\.float32"),
    ],
    ids=["value", "sign of zero", "nan", "shape", "dtype"],
)
def test_the_first_difference_is_named(actual: Tensor, message: str) -> None:
    same = torch.zeros(1)
    expected = flatten([same, torch.tensor([1.0, 0.0, 2.0]), same])
    with pytest.raises(AssertionError, match=message):
        assert_same(expected, flatten([same, actual, same + 1]))


def test_a_missing_tensor_is_noticed() -> None:
    with pytest.raises(AssertionError):
        assert_same(flatten([torch.ones(1), torch.ones(1)]), flatten([torch.ones(1)]))


@pytest.mark.parametrize("name", ["bert", "gpt2", "mixtral", "resnet"])
def test_a_wrong_bit_in_any_weight_of_a_family_shows(name: str) -> None:
    family = BY_NAME[name]
    model = family.build()
    expected = outputs_of(model, family.inputs())
    for parameter in model.parameters():
        original = parameter.detach().clone()
        parameter.data.view(torch.int32).bitwise_xor_(1 << 22)  # the first bit of the fraction
        with pytest.raises(AssertionError):
            assert_same(expected, outputs_of(model, family.inputs()))
        parameter.data.copy_(original)
    assert_same(expected, outputs_of(model, family.inputs()))


def test_there_are_families_of_every_kind() -> None:
    assert {family.kind for family in FAMILIES} == {
        "encoder",
        "decoder",
        "encoder-decoder",
        "moe",
        "state-space",
        "vision",
        "audio",
        "multimodal",
    }
