"""Outputs of a model as a flat list of named tensors, and their comparison bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.configuration_utils import PretrainedConfig

NamedTensors = list[tuple[str, Tensor]]


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> NamedTensors:
    """Run ``model`` and flatten all that it returns, caches included.

    Seeded before every call: some models draw noise or masks also in eval mode.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**inputs)
    tensors = flatten(output)
    assert tensors, f"{type(model).__name__} returned no tensors: {output!r}"
    return tensors


def aligned(model: nn.Module) -> nn.Module:
    """``model``, with its values copied to where torch puts those of a model that is built in memory.

    Loaders map files into memory, where a value may begin at any address; on some processors matrix products round
    differently where that is no multiple of 16.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()  # a tied parameter stays one object
    return model


def flatten(value: object, path: str = "output") -> NamedTensors:
    """All tensors in a nest of model outputs, mappings, sequences and objects such as caches."""
    return list(_walk(value, path, set()))


def _walk(value: Any, path: str, open_ids: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value.detach()
        return
    if id(value) in open_ids or isinstance(value, (str, bytes, type, nn.Module, PretrainedConfig)):
        return
    open_ids = open_ids | {id(value)}
    if isinstance(value, Mapping):
        children = [(f"{path}[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, Sequence):
        children = [(f"{path}[{index}]", item) for index, item in enumerate(value)]
    elif hasattr(value, "__dict__"):
        children = [(f"{path}.{name}", item) for name, item in sorted(vars(value).items())]
    else:
        return
    for child_path, child in children:
        yield from _walk(child, child_path, open_ids)


def assert_same(expected: NamedTensors, actual: NamedTensors) -> None:
    """Compare paths, dtypes, shapes and bits; the failure names the first path. NaNs are equal."""
    assert [path for path, _ in expected] == [path for path, _ in actual]
    for (path, left), (_, right) in zip(expected, actual, strict=True):
        assert left.dtype == right.dtype, f"{path}: dtype {right.dtype}, expected {left.dtype}"
        assert left.shape == right.shape, f"{path}: shape {right.shape}, expected {left.shape}"
        assert _same_bits(left, right), f"{path}: {_difference(left, right)}"


def _same_bits(left: Tensor, right: Tensor) -> bool:
    if left.is_floating_point() or left.is_complex():
        nan = left.isnan()
        if not torch.equal(nan, right.isnan()):
            return False
        left, right = left.masked_fill(nan, 0), right.masked_fill(nan, 0)
    return torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: Tensor) -> Tensor:
    # Bytes tell 0.0 from -0.0, which torch.equal does not.
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _difference(left: Tensor, right: Tensor) -> str:
    differs = (left != right) & ~(left.isnan() & right.isnan())
    # Equal infinities have no gap.
    gap = (left.to(torch.complex128) - right.to(torch.complex128)).abs().masked_fill(~differs, 0)
    return f"{int(differs.sum())} of {left.numel()} elements differ, by at most {gap.max():.3g}"
