"""What ``from_pretrained`` of transformers makes is what ours has to make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pylomin
from pylomin.lazy.tensor import OffloadedTensor
from tests.families.catalog import BY_NAME
from tests.families.compare import aligned, assert_same, flatten, outputs_of
from tests.families.family import Inputs


def saved(name: str, directory: Path, **options: Any) -> tuple[Any, Inputs]:
    """Save the model of a family; its class, and inputs for it."""
    family = BY_NAME[name]
    model: Any = family.build()
    model.save_pretrained(directory, **options)
    return type(model), family.inputs()


def both(model_class: Any, directory: Path, **options: Any) -> tuple[Any, Any]:
    """The model as transformers loads it, and as we do; both draw the same numbers for what is missing."""
    torch.manual_seed(1)
    expected = model_class.from_pretrained(directory, **options)
    aligned(expected[0] if isinstance(expected, tuple) else expected)  # with loading info, or without
    torch.manual_seed(1)
    return expected, pylomin.from_pretrained(model_class, directory, **options)


def assert_alike(expected: Any, actual: Any, inputs: Inputs | None = None) -> None:
    """Same classes, values, configs, and outputs for ``inputs``."""
    assert not actual.training
    assert_same(flatten(values_of(expected), "state"), flatten(values_of(actual), "state"))
    assert names_of(expected) == names_of(actual)
    assert expected.config.to_dict() == actual.config.to_dict()
    assert expected.name_or_path == actual.name_or_path
    if hasattr(expected, "generation_config"):
        assert expected.generation_config.to_dict() == actual.generation_config.to_dict()
    if inputs is not None:
        for _ in range(2):
            assert_same(outputs_of(expected, inputs), outputs_of(actual, inputs))


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Values of all parameters and buffers, also of buffers that no state dict has."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: t.materialize() if isinstance(t, OffloadedTensor) else t.detach() for name, t in tensors.items()}


def names_of(model: nn.Module) -> dict[str, bool]:
    """Names, of which a tied parameter has one, and whether users want to train it."""
    return {
        name: parameter.trainable if isinstance(parameter, OffloadedTensor) else parameter.requires_grad
        for name, parameter in model.named_parameters()
    }


def in_memory(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not isinstance(parameter, OffloadedTensor)}
