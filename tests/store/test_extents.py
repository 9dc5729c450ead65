from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pylomin.errors import StoreChangedError, StoreReadError
from pylomin.io.buffers import BufferPool
from pylomin.io.modes import Mode
from pylomin.io.placed import place
from pylomin.store.extents import read_placed
from pylomin.store.safetensors import SafetensorsStore

from .files import SAMPLE, same_bits, touch_later


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(SAMPLE, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("mode", ["mapped", "buffered", "direct"])
class TestReadPlaced:
    def test_values(self, path: Path, mode: Mode) -> None:
        store = SafetensorsStore(path)
        names = [name for name in store if store.info(name).nbytes]
        weights = [store.location(name) for name in names]
        placement = place([weight.extent for weight in weights], mode)
        buffer = placement.try_take(BufferPool())
        read_placed(store.files[0], placement, names, buffer)
        for name, weight, offset in zip(names, weights, placement.offsets, strict=True):
            count = SAMPLE[name].numel()
            flat = torch.frombuffer(buffer, dtype=weight.info.dtype, count=count, offset=offset)
            assert same_bits(flat.view(weight.info.shape), SAMPLE[name]), name

    def test_errors_name_the_weights(self, path: Path, mode: Mode) -> None:
        store = SafetensorsStore(path)
        names = [name for name in store if store.info(name).nbytes]
        placement = place([store.location(name).extent for name in names], mode)
        buffer = placement.try_take(BufferPool())
        touch_later(path)
        (first, *_) = placement.runs
        expected = ", ".join(repr(names[i]) for i in first.run.members)
        with pytest.raises(StoreChangedError) as caught:
            read_placed(store.files[0], placement, names, buffer)
        assert str(caught.value).startswith(f"could not read weight {expected}: weight file {str(path)!r} was changed")
        store.close()
        with pytest.raises(StoreReadError, match=r"could not read weight .* is closed"):
            read_placed(store.files[0], placement, names, buffer)
