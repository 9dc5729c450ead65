"""Families whose weights stream to a device give the bits of the model that is resident there.

Once on the host, which stands for a device whose copies come as late as they may; and on a GPU, where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

import pylomin
from pylomin.lazy import fused
from tests.residency.fake_device import FAKE, Schedule, computing_on_the_host, installed, lazy, shuffled

from .catalog import BY_NAME
from .compare import NamedTensors, assert_same, outputs_of
from .family import Family
from .test_quantized import quantized

NAMES = (
    "bert", "roberta", "deberta_v2", "electra", "gpt2", "llama", "mistral", "gemma2", "qwen2", "bloom", "opt", "phi",
    "t5", "bart", "mixtral", "qwen2_moe", "mamba", "vit", "whisper", "clip",
)  # fmt: skip
SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "late copies": lambda: lazy,
    "shuffled": lambda: shuffled(0),
}


EVERY_WAY = pytest.mark.parametrize(
    ("device", "storage"),
    [
        ("late copies", "disk"),
        ("shuffled", "cpu"),
        pytest.param("cuda", "disk", marks=pytest.mark.cuda),
        pytest.param("cuda", "cpu", marks=pytest.mark.cuda),
    ],
    indirect=["device"],
)


@pytest.fixture(params=["shuffled", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    if request.param == "cuda":
        yield torch.device("cuda", torch.cuda.current_device())
        return
    with installed(computing_on_the_host(SCHEDULES[request.param]())):
        yield FAKE


@cache
def expected(family: Family, device: torch.device) -> NamedTensors:
    model = family.build()
    return outputs(model if device == FAKE else model.to(device), family, device)


def outputs(model: nn.Module, family: Family, device: torch.device) -> NamedTensors:
    inputs = family.inputs()
    if device != FAKE:
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    return outputs_of(model, inputs)


def offloaded(family: Family, device: torch.device, storage: Literal["disk", "cpu"]) -> nn.Module:
    return pylomin.lazy_loading(family.build(), device=device, storage=storage)


def assert_gives(wanted: NamedTensors, model: nn.Module, family: Family, device: torch.device) -> None:
    for _ in range(3):
        assert_same(wanted, outputs(model, family, device))


@EVERY_WAY
@pytest.mark.parametrize("name", NAMES)
def test_every_bit_is_kept(name: str, storage: Literal["disk", "cpu"], device: torch.device) -> None:
    family = BY_NAME[name]
    wanted = expected(family, device)
    model = offloaded(family, device, storage)
    assert_gives(wanted, model, family, device)
    # With residents and a window, read ahead.
    largest = max(parameter.nbytes for parameter in model.parameters())
    pylomin.set_memory_budget(pylomin.prefetch(model), 4 * largest + (1 << 20))
    assert_gives(wanted, model, family, device)
    stats = pylomin.stats(model)
    assert stats.memory_budget is not None
    assert stats.peak_bytes <= stats.memory_budget
    if storage == "cpu":
        assert stats.pinned_bytes == 0, "copied from where they are"


@pytest.mark.parametrize("scheme", ["int8", "int4", "bf16"])
@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
def test_quantised_weights_cross_packed(
    name: str, scheme: str, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "multiplies_integers", lambda: False)
    family = BY_NAME[name]
    path = quantized(family, scheme, tmp_path)

    def loaded() -> nn.Module:
        return pylomin.load(lambda: family.construct().eval(), path, strict=False, device=device)

    resident = pylomin.restore(pylomin.load(lambda: family.construct().eval(), path, strict=False))
    wanted = outputs(resident if device == FAKE else resident.to(device), family, device)
    model = loaded()
    assert_gives(wanted, model, family, device)
    packed_bytes = path.stat().st_size
    before = pylomin.stats(model).bytes_read
    assert_gives(wanted, pylomin.set_memory_budget(model, 100 * packed_bytes), family, device)
    assert pylomin.stats(model).bytes_read - before <= packed_bytes, "once, as it is packed"
