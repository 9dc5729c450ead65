"""Weights composed from parts of others: the bytes of torch.cat and torch.stack, read from where the parts lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from pylomin.errors import StoreFormatError, StoreReadError, WeightNotFoundError
from pylomin.store.base import ReadRequest, WeightStore
from pylomin.store.memory import MemoryStore
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.virtual import Part, VirtualStore, VirtualWeight

from .contract import StoreContract
from .files import read_bytes, read_tensor, same_bits

Tensors = dict[str, torch.Tensor]


def whole(store: WeightStore, name: str) -> Part:
    return Part(store, name, 0, store.info(name).nbytes)


class TestVirtualStore(StoreContract):
    """Each weight of the contract in two parts, of two files."""

    def make_store(self, tensors: Tensors, directory: Path) -> VirtualStore:
        raw = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}
        halves = {name: len(flat) // 2 for name, flat in raw.items()}
        save_file({name: flat[: halves[name]].clone() for name, flat in raw.items()}, directory / "a.safetensors")
        save_file({name: flat[halves[name] :].clone() for name, flat in raw.items()}, directory / "b.safetensors")
        first, second = SafetensorsStore(directory / "a.safetensors"), SafetensorsStore(directory / "b.safetensors")
        return VirtualStore(
            {
                name: VirtualWeight(tensor.dtype, tuple(tensor.shape), (whole(first, name), whole(second, name)))
                for name, tensor in tensors.items()
            }
        )

    def test_describe_names_both_files(self, store):
        assert "a.safetensors" in store.describe("scalar")
        assert "b.safetensors" in store.describe("scalar")


class Watched(MemoryStore):
    """Counts calls, and the bytes that are asked for."""

    calls = 0
    nbytes = 0

    def read(self, requests: Sequence[ReadRequest]) -> None:
        self.calls += 1
        self.nbytes += sum(len(request.destination) for request in requests)
        super().read(requests)


def concatenated(store: WeightStore, names: Sequence[str], dim: int) -> VirtualWeight:
    infos = [store.info(name) for name in names]
    shape = list(infos[0].shape)
    shape[dim] = sum(info.shape[dim] for info in infos)
    parts = tuple(whole(store, name) for name in names)
    return VirtualWeight(infos[0].dtype, tuple(shape), parts, math.prod(shape[:dim]))


@st.composite
def concatenations(draw: st.DrawFn) -> tuple[list[torch.Tensor], int]:
    rank = draw(st.integers(1, 3))
    dim = draw(st.integers(0, rank - 1))
    shape = draw(st.lists(st.integers(1, 5), min_size=rank, max_size=rank))
    sizes = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    # Long rows are read in place, short ones in batches.
    shape[-1] *= draw(st.sampled_from([1, 1, 700])) if dim < rank - 1 else 1
    dtype = draw(st.sampled_from([torch.int16, torch.float64]))
    return [torch.randn(*shape[:dim], size, *shape[dim + 1 :]).mul(99).to(dtype) for size in sizes], dim


@given(concatenations(), st.data())
@settings(max_examples=60, deadline=None)
def test_any_bytes_of_any_concatenation(case: tuple[list[torch.Tensor], int], data: st.DataObject) -> None:
    tensors, dim = case
    base = MemoryStore({str(index): tensor for index, tensor in enumerate(tensors)})
    store = VirtualStore({"w": concatenated(base, list(base), dim)})
    expected = torch.cat(tensors, dim)
    assert same_bits(read_tensor(store, "w"), expected)
    raw = expected.reshape(-1).view(torch.uint8).numpy().tobytes() if expected.numel() else b""
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, len(raw)))
    assert read_bytes(store, "w", start, stop) == raw[start:stop]


def experts() -> tuple[Watched, VirtualStore, torch.Tensor]:
    """Three experts' matrices, stacked and then concatenated: (3, 4 + 4, 2000)."""
    matrices = {f"{kind}.{i}": torch.randn(4, 2000) for i in range(3) for kind in ("gate", "up")}
    base = Watched(matrices)
    stacks = {
        kind: VirtualWeight(torch.float32, (3, 4, 2000), tuple(whole(base, f"{kind}.{i}") for i in range(3)))
        for kind in ("gate", "up")
    }
    inner = VirtualStore(stacks)
    expected = torch.cat([torch.stack([matrices[f"{kind}.{i}"] for i in range(3)]) for kind in stacks], 1)
    return base, VirtualStore({"both": concatenated(inner, ["gate", "up"], 1)}), expected


def test_one_expert_is_one_call_for_its_bytes() -> None:
    base, store, expected = experts()
    assert store.info("both").shape == (3, 8, 2000)
    nbytes = expected[1].nbytes
    assert read_bytes(store, "both", nbytes, 2 * nbytes) == expected[1].numpy().tobytes()
    assert (base.calls, base.nbytes) == (1, nbytes)
    assert same_bits(read_tensor(store, "both"), expected)
    assert (base.calls, base.nbytes) == (2, 4 * nbytes)


def test_short_runs_pass_in_batches() -> None:
    """2 MiB of rows of 8 bytes: no call holds them all."""
    left, right = torch.randn(1 << 18, 1), torch.randn(1 << 18, 1)
    base = Watched({"left": left, "right": right})
    store = VirtualStore({"w": concatenated(base, ["left", "right"], 1)})
    assert same_bits(read_tensor(store, "w"), torch.cat([left, right], 1))
    assert (base.calls, base.nbytes) == (4, 2 << 20)
    base.calls = base.nbytes = 0
    assert read_bytes(store, "w", 4, 12) == left.new_tensor([right[0, 0], left[1, 0]]).numpy().tobytes()
    assert (base.calls, base.nbytes) == (2, 16)


def test_a_part_of_a_weight() -> None:
    base = MemoryStore({"fused": torch.arange(12.0).view(6, 2)})
    weight = VirtualWeight(torch.float32, (2, 2), (Part(base, "fused", 16, 16),))
    assert torch.equal(read_tensor(VirtualStore({"k": weight}), "k"), torch.tensor([[4.0, 5.0], [6.0, 7.0]]))


@pytest.mark.parametrize(
    ("offset_bytes", "nbytes", "blocks", "text"),
    [
        (0, 16, 1, r"was given \[16\] bytes; expected 32"),
        (0, 32, 3, "in 3 blocks"),
        (0, 32, 0, "in 0 blocks"),
        (20, 32, 1, "32 bytes at 20 are no part of weight 'a' in memory, which has 48"),
        (-4, 32, 1, "32 bytes at -4 are no part"),
    ],
)
def test_parts_that_do_not_fit(offset_bytes: int, nbytes: int, blocks: int, text: str) -> None:
    base = MemoryStore({"a": torch.zeros(12)})
    with pytest.raises(StoreFormatError, match=text):
        VirtualWeight(torch.float32, (8,), (Part(base, "a", offset_bytes, nbytes),), blocks)
    with pytest.raises(WeightNotFoundError):
        VirtualWeight(torch.float32, (8,), (Part(base, "b", 0, 32),))


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000), "b": torch.zeros(1000)}, path)
    store = VirtualStore({"w": concatenated(SafetensorsStore(path), ["a", "b"], 0)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)
    with pytest.raises(StoreReadError, match=r"model\.safetensors"):
        read_tensor(store, "w")
    store.close()
    store.close()
    with pytest.raises(StoreReadError, match="is closed"):
        read_tensor(store, "w")
