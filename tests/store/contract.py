"""What every store promises. A backend's tests subclass this and make the store."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pylomin.errors import StoreReadError, WeightNotFoundError
from pylomin.store.base import ReadRequest, WeightStore

from .files import open_descriptors, read_bytes, read_tensor, same_bits


def sample_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "embedding.weight": torch.randn(50, 8, generator=generator),
        "layer.0.weight": torch.randn(16, 8, generator=generator).to(torch.bfloat16),
        "layer.0.bias": torch.randn(16, generator=generator).to(torch.float16),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "counts": torch.arange(5),
        "float8": torch.randn(4, generator=generator).to(torch.float8_e4m3fn),
        "unsigned": torch.tensor([0, 65535], dtype=torch.int32).to(torch.uint16),
        "complex": torch.randn(3, dtype=torch.complex64, generator=generator),
    }


class StoreContract:
    """Subclasses define ``make_store``; the tests here then run against their store."""

    def make_store(self, tensors: dict[str, torch.Tensor], directory: Path) -> WeightStore:
        raise NotImplementedError

    @pytest.fixture
    def tensors(self) -> dict[str, torch.Tensor]:
        return sample_tensors()

    @pytest.fixture
    def store(self, tensors: dict[str, torch.Tensor], tmp_path: Path) -> WeightStore:
        return self.make_store(tensors, tmp_path)

    def test_names(self, store, tensors):
        assert set(store) == set(tensors)
        assert len(store) == len(tensors)
        assert len(list(store)) == len(tensors)
        assert all(name in store for name in tensors)
        assert "absent" not in store
        assert None not in store

    def test_info(self, store, tensors):
        for name, tensor in tensors.items():
            info = store.info(name)
            assert info.dtype == tensor.dtype
            assert info.shape == tuple(tensor.shape)
            assert type(info.shape) is tuple
            assert info.nbytes == tensor.numel() * tensor.element_size()

    def test_values(self, store, tensors):
        for name, tensor in tensors.items():
            assert same_bits(read_tensor(store, name), tensor), name

    def test_describe(self, store, tensors):
        assert all(isinstance(store.describe(name), str) for name in tensors)
        assert all(store.describe(name) for name in tensors)

    def test_part_of_a_weight(self, store):
        whole = read_bytes(store, "embedding.weight")
        assert read_bytes(store, "embedding.weight", 32, 96) == whole[32:96]
        assert read_bytes(store, "embedding.weight", 5, 6) == whole[5:6]
        assert read_bytes(store, "embedding.weight", len(whole)) == b""

    def test_all_weights_in_one_call_in_any_order(self, store, tensors):
        names = sorted(tensors, reverse=True)
        buffers = {name: bytearray(store.info(name).nbytes) for name in names}
        store.read([ReadRequest(name, 0, memoryview(buffers[name])) for name in names])
        assert all(buffers[name] == read_bytes(store, name) for name in names)

    def test_same_bytes_asked_for_twice(self, store):
        whole = read_bytes(store, "counts")
        first, second = bytearray(24), bytearray(24)
        store.read(
            [
                ReadRequest("counts", 0, memoryview(first)),
                ReadRequest("counts", 8, memoryview(second)),
            ]
        )
        assert (bytes(first), bytes(second)) == (whole[:24], whole[8:32])

    def test_scattered_rows(self, store):
        whole = read_bytes(store, "embedding.weight")
        rows = [49, 3, 4, 20, 0]
        buffers = [bytearray(32) for _ in rows]
        store.read(
            [
                ReadRequest("embedding.weight", row * 32, memoryview(buffer))
                for row, buffer in zip(rows, buffers, strict=True)
            ]
        )
        assert [bytes(b) for b in buffers] == [whole[r * 32 : r * 32 + 32] for r in rows]

    def test_bytes_around_the_destination_stay(self, store):
        buffer = bytearray(b"\xee" * 60)
        store.read([ReadRequest("counts", 0, memoryview(buffer)[10:50])])
        assert buffer == b"\xee" * 10 + read_bytes(store, "counts") + b"\xee" * 10

    def test_no_requests(self, store):
        store.read([])

    @pytest.mark.parametrize(("start", "nbytes"), [(-1, 1), (0, 41), (40, 1), (41, 0), (1000, 8)])
    def test_bytes_outside_the_weight(self, store, start, nbytes):
        request = ReadRequest("counts", start, memoryview(bytearray(nbytes)))
        with pytest.raises(StoreReadError, match=r"weight 'counts' in .* has 40 bytes"):
            store.read([request])

    def test_unknown_weight(self, store):
        message = r"weight 'layer\.0\.wieght' is not in .*[Ss]imilar.*'layer\.0\.weight'"
        with pytest.raises(WeightNotFoundError, match=message):
            store.info("layer.0.wieght")
        with pytest.raises(WeightNotFoundError, match=message):
            store.describe("layer.0.wieght")
        with pytest.raises(WeightNotFoundError, match=message):
            store.read([ReadRequest("layer.0.wieght", 0, memoryview(bytearray(1)))])
        with pytest.raises(KeyError, match="No name of the 10 there is similar"):
            store.info("☃")

    def test_threads(self, store, tensors):
        expected = {name: read_bytes(store, name) for name in tensors}
        with ThreadPoolExecutor(8) as pool:
            results = pool.map(lambda name: (name, read_bytes(store, name)), list(tensors) * 40)
            assert all(data == expected[name] for name, data in results)

    def test_close(self, store):
        store.close()
        store.close()
        for name in ("counts", "empty"):
            with pytest.raises(StoreReadError, match="closed"):
                read_bytes(store, name)
        assert store.info("counts").nbytes == 40

    def test_descriptors_are_given_back(self, tensors, tmp_path):
        before = open_descriptors()
        for attempt in range(5):
            directory = tmp_path / str(attempt)
            directory.mkdir()
            store = self.make_store(tensors, directory)
            read_bytes(store, "counts")
            store.close()
            assert open_descriptors() == before
            store = self.make_store(tensors, directory)
            del store  # without close
            assert open_descriptors() == before
