"""Mappings of a group's file are kept between its uses; its pages are not."""

from __future__ import annotations

import copy
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pylomin
from pylomin.errors import StoreChangedError, StoreReadError
from pylomin.io import syscalls
from pylomin.residency import rooms
from tests.forks import in_child
from tests.io.common import shown_of, touch_later

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own figures are those of Linux")
SIZE = 800  # weights of 2.4 MiB
LAYERS = 3


class Probed(nn.Linear):
    """A layer that shows its weight to somebody during its forward."""

    probe: Callable[[torch.Tensor], Any] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.probe is not None:
            self.probe(self.weight)
        return super().forward(x)


def layers() -> nn.Sequential:
    return nn.Sequential(*(Probed(SIZE, SIZE) for _ in range(LAYERS)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.safetensors"
    save_file(layers().state_dict(), path)
    return path


@pytest.fixture
def model(path: Path) -> nn.Module:
    return pylomin.load(layers, path, reading_mode="mapped").eval()


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes in bytes of what was mapped."""
    sizes: list[int] = []
    call = syscalls.map_file

    def counted(address: int, nbytes: int, fd: int, offset_bytes: int) -> None:
        sizes.append(nbytes)
        call(address, nbytes, fd, offset_bytes)

    monkeypatch.setattr(syscalls, "map_file", counted)
    return sizes


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.ones(2, SIZE))
    return result


def expected(path: Path) -> torch.Tensor:
    model = layers().eval()
    model.load_state_dict(load_file(path))
    return run(model)


def mapped_bytes_of(path: Path) -> int:
    return sum(shown.nbytes for shown in shown_of(path))


def resident_bytes_of(path: Path) -> int:
    return sum(shown.resident_bytes for shown in shown_of(path))


def assert_nothing_in_memory(model: nn.Module, path: Path) -> None:
    assert pylomin.stats(model).resident_bytes == 0
    assert resident_bytes_of(path) == 0


def test_a_file_is_mapped_once(model: nn.Module, path: Path, maps: list[int]) -> None:
    for _ in range(3):
        assert torch.equal(run(model), expected(path))
        assert_nothing_in_memory(model, path)
    assert len(maps) == LAYERS
    assert mapped_bytes_of(path) == sum(maps)
    assert pylomin.stats(model).loads == 3 * LAYERS, "each use is a load"


def test_all_goes_with_the_model(path: Path) -> None:
    model = pylomin.load(layers, path, reading_mode="mapped")
    run(model)
    assert mapped_bytes_of(path) > 0
    del model
    assert mapped_bytes_of(path) == 0, "at once, not when garbage is collected"


@pytest.mark.parametrize(
    "keep",
    [
        lambda weight: weight,
        lambda weight: weight[3:5],
        lambda weight: weight.detach(),
        lambda weight: weight.numpy(),
        lambda weight: weight[1].numpy(),
        lambda weight: weight.untyped_storage(),
        lambda weight: memoryview(weight.numpy()),
        torch.utils.dlpack.to_dlpack,
    ],
    ids=["weight", "view", "detached", "array", "array of a view", "storage", "memoryview", "capsule"],
)
def test_what_somebody_keeps_stays(
    model: nn.Module, path: Path, maps: list[int], keep: Callable[[torch.Tensor], Any]
) -> None:
    kept: list[Any] = []
    first = model[0]
    assert isinstance(first, Probed)
    run(model)
    first.probe = lambda weight: kept.append(keep(weight))
    assert torch.equal(run(model), expected(path))
    first.probe = None
    counted_bytes = pylomin.stats(model).resident_bytes
    assert counted_bytes >= SIZE * SIZE * 4, "it is counted as long as it is there"
    assert resident_bytes_of(path) >= SIZE * SIZE * 4
    run(model)
    assert len(maps) == LAYERS + 1, "others get a mapping of their own"
    kept.clear()
    assert_nothing_in_memory(model, path)
    assert torch.equal(run(model), expected(path))
    assert len(maps) == LAYERS + 1


def test_memory_that_was_shared_with_a_process(model: nn.Module, path: Path) -> None:
    first = model[0]
    assert isinstance(first, Probed)
    first.probe = lambda weight: weight.share_memory_()
    for _ in range(2):
        assert torch.equal(run(model), expected(path))
        assert_nothing_in_memory(model, path)


def test_writes(model: nn.Module, path: Path) -> None:
    first = model[0]
    assert isinstance(first, Probed)
    run(model)
    first.probe = lambda weight: weight.fill_(1)
    once = run(model)
    first.probe = None
    assert torch.equal(run(model), once), "they took effect"
    assert not torch.equal(once, expected(path))
    assert pylomin.stats(model).resident_bytes == 0


def test_an_exception_whose_traceback_has_the_weight(model: nn.Module, path: Path) -> None:
    first = model[0]
    assert isinstance(first, Probed)

    def fail(weight: torch.Tensor) -> None:
        raise ZeroDivisionError

    run(model)
    first.probe = fail
    with pytest.raises(ZeroDivisionError) as info:
        run(model)
    first.probe = None
    assert torch.equal(run(model), expected(path))
    del info
    assert_nothing_in_memory(model, path)


def test_a_change_between_uses(model: nn.Module, path: Path) -> None:
    run(model)
    content = path.read_bytes()
    touch_later(path)
    with pytest.raises(StoreChangedError, match="was changed after it was opened"):
        run(model)
    assert torch.equal(run(model), expected(path)), "its layout is as before"
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(StoreReadError, match=r"could not read weight '0\.bias', '0\.weight'"):
        run(model)
    path.write_bytes(content)
    assert torch.equal(run(model), expected(path))
    assert_nothing_in_memory(model, path)


def test_the_budget_changes(model: nn.Module, path: Path, maps: list[int]) -> None:
    run(model)
    pylomin.set_memory_budget(model, "3MiB")
    assert mapped_bytes_of(path) == 0
    for _ in range(3):
        assert torch.equal(run(model), expected(path))
        assert pylomin.stats(model).peak_bytes <= 3 << 20
    pylomin.set_memory_budget(model, None)
    before = len(maps)
    for _ in range(2):
        assert torch.equal(run(model), expected(path))
        assert_nothing_in_memory(model, path)
    assert len(maps) == before + LAYERS


def test_with_a_budget_what_lies_around_is_not_in_memory(path: Path, maps: list[int]) -> None:
    model = pylomin.load(layers, path, reading_mode="mapped", memory_budget="64MiB")
    for _ in range(3):
        assert torch.equal(run(model), expected(path))
    assert pylomin.stats(model).resident_bytes == resident_bytes_of(path) == sum(maps)


def test_a_forked_child_maps_for_itself(model: nn.Module, path: Path) -> None:
    def use() -> bool:
        torch.set_num_threads(1)
        right = torch.equal(run(model), run(model))
        return right and pylomin.stats(model).resident_bytes == 0

    run(model)
    assert in_child(use)
    assert torch.equal(run(model), expected(path))
    with model[0].weight.weight.residency.hold([model[0].weight.weight]):  # type: ignore[union-attr, operator]
        assert in_child(use)
    assert_nothing_in_memory(model, path)


def test_copies_map_for_themselves(model: nn.Module, path: Path) -> None:
    run(model)
    other = copy.deepcopy(model)
    assert torch.equal(run(other), expected(path))
    assert mapped_bytes_of(path) > 0
    del model
    assert torch.equal(run(other), expected(path))


def test_where_address_space_is_limited_none_is_kept(path: Path, maps: list[int]) -> None:
    def use() -> tuple[int, int]:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_AS, (1 << 45, resource.getrlimit(resource.RLIMIT_AS)[1]))
        model = pylomin.load(layers, path, reading_mode="mapped")
        for _ in range(2):
            run(model)
        return len(maps), mapped_bytes_of(path)

    assert in_child(use) == (2 * LAYERS, 0)


def test_a_model_of_very_many_weights_keeps_none(
    model: nn.Module, path: Path, maps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "MOST_MAPPED", 2 * LAYERS - 1)
    for _ in range(2):
        assert torch.equal(run(model), expected(path))
    assert len(maps) == 2 * LAYERS
    assert mapped_bytes_of(path) == 0
