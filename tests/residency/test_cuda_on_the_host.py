"""Of what CUDA needs, what can be tried on the host: tensors on bytes of others, and calls that torch has."""

from __future__ import annotations

import ast
import gc
import inspect
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pylomin.residency import cuda
from pylomin.residency.cuda import tensor_on

CPU = torch.device("cpu")


class Part:
    """Bytes, as :class:`pylomin.residency.device_memory.DeviceBytes` hands them out."""

    def __init__(self, base: torch.Tensor, offset_bytes: int, nbytes: int) -> None:
        self.base, self.offset_bytes, self.nbytes = base, offset_bytes, nbytes


def test_a_tensor_on_bytes_of_others() -> None:
    base = torch.zeros(100, dtype=torch.uint8)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            tensor = tensor_on(Part(base, 8, 40), CPU)
        assert not tensor.is_inference()
        assert (tensor.device, tensor.dtype, tensor.shape) == (CPU, torch.uint8, (40,))
        assert tensor.data_ptr() == base.data_ptr() + 8
        tensor.fill_(3)
        assert base.sum() == 3 * 40
        assert torch.equal(tensor.view(torch.float32).view(2, 5).clone().flatten().view(torch.uint8), tensor)


@pytest.mark.parametrize(
    "derive",
    [
        lambda tensor: tensor,
        lambda tensor: tensor[4:8],
        lambda tensor: tensor.view(torch.float32).as_strided((2, 2), (1, 2)).detach(),
        lambda tensor: torch.nn.Parameter(tensor.view(torch.float32), requires_grad=True) * 2,  # in an autograd graph
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()),
    ],
)
def test_all_that_views_it_keeps_its_owner(derive: Callable[[torch.Tensor], Any]) -> None:
    part = Part(torch.zeros(64, dtype=torch.uint8), 0, 32)
    alive = weakref.ref(part)
    tensor = tensor_on(part, CPU)
    del part
    view = derive(tensor)
    del tensor
    gc.collect()
    assert alive() is not None
    del view
    gc.collect()
    assert alive() is None


def test_a_copy_does_not() -> None:
    part = Part(torch.zeros(64, dtype=torch.uint8), 0, 32)
    alive = weakref.ref(part)
    copied = tensor_on(part, CPU).clone()
    del part
    gc.collect()
    assert alive() is None
    assert copied.numel() == 32


FILES = [Path(inspect.getfile(cuda)), *(Path(__file__).parents[2] / "benchmarks").glob("gpu*.py")]


def calls_of_cuda() -> list[tuple[str, list[str]]]:
    """(dotted name, names of keyword arguments) of each call of ``torch.cuda`` in the files that need a device."""
    found = []
    for file in [*FILES, Path(__file__).with_name("test_cuda.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)).startswith("torch.cuda."):
                found.append((f"{name}/{len(node.args)}", [keyword.arg or "" for keyword in node.keywords]))
    return found


def test_every_call_fits_the_signatures_of_this_torch() -> None:
    calls = calls_of_cuda()
    assert len(calls) > 20
    for dotted, keywords in calls:
        name, _, count = dotted.partition("/")
        function: Any = torch
        for part in name.split(".")[1:]:
            function = getattr(function, part)
        target = function.__new__ if name in ("torch.cuda.Stream", "torch.cuda.Event") else function
        leading = (None,) * (int(count) + (target is not function))
        inspect.signature(target).bind(*leading, **dict.fromkeys(keywords))
