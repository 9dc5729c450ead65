from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pylomin.errors import StoreReadError
from pylomin.io.buffers import ALIGNMENT_BYTES, BufferPool
from pylomin.residency import loading
from pylomin.residency.piece import Piece
from pylomin.residency.places import Places
from pylomin.residency.residency import Residency
from pylomin.residency.weight import Layout, Weight
from pylomin.store.memory import MemoryStore

from .common import CPU, CountingStore, layout, weight_of


def load(pool: BufferPool, *pieces: Piece) -> list[torch.Tensor]:
    room = loading.try_reserve(pool, Places(pieces, "buffered"))
    assert room is not None
    return room.load()


@pytest.fixture
def residency() -> Residency:
    return Residency()


def test_a_group_is_one_read_into_one_buffer(residency: Residency) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.tensor(2.0)}
    store = CountingStore(tensors)
    loaded = load(BufferPool(), *(Piece.of(weight_of(store, name, residency)) for name in tensors))
    assert all(torch.equal(x, y) for x, y in zip(loaded, tensors.values(), strict=True))
    assert [x.dtype for x in loaded] == [torch.float32, torch.int64, torch.float32]
    assert len(store.reads) == 1
    addresses = [x.data_ptr() for x in loaded]
    assert [address - addresses[0] for address in addresses] == [0, 64, 128]
    assert all(x.data_ptr() % ALIGNMENT_BYTES == 0 for x in loaded)


def test_the_ledger_counts_the_group(residency: Residency) -> None:
    pool = BufferPool()
    store = CountingStore({"a": torch.ones(3), "b": torch.ones(17)})
    pieces = [Piece.of(weight_of(store, name, residency)) for name in "ab"]
    assert Places(pieces, "buffered").peak_bytes == 64 + 128
    loaded = load(pool, *pieces)
    assert pool.in_use_bytes() == 192
    del loaded[0]
    assert pool.in_use_bytes() == 192, "one buffer for both"
    loaded.clear()
    assert pool.in_use_bytes() == 0


def test_no_room() -> None:
    residency = Residency()
    store = CountingStore({"a": torch.ones(100), "b": torch.ones(100)})
    pieces = [Piece.of(weight_of(store, name, residency)) for name in "ab"]
    pool = BufferPool(limit_bytes=800)
    assert loading.try_reserve(pool, Places(pieces, "buffered")) is None
    assert loading.try_reserve(pool, Places(pieces[:1], "buffered")) is not None
    assert pool.in_use_bytes() == 0


def test_no_room_for_the_second_of_two_reservations() -> None:
    """What was reserved first goes back."""
    residency = Residency()
    store = CountingStore({"a": torch.ones(100, dtype=torch.bfloat16)})
    piece = Piece.of(weight_of(store, "a", residency, layout(torch.float32, 100)))
    assert Places([piece], "buffered").peak_bytes == 256 + 400
    pool = BufferPool(limit_bytes=500)
    assert loading.try_reserve(pool, Places([piece], "buffered")) is None
    assert pool.in_use_bytes() == 0
    pool.set_limit(656)
    assert torch.equal(load(pool, piece)[0], torch.ones(100))


def test_conversions_are_counted_and_the_stored_bytes_leave(residency: Residency) -> None:
    pool = BufferPool()
    stored = torch.randn(100).to(torch.bfloat16)
    store = CountingStore({"a": stored})
    piece = Piece.of(weight_of(store, "a", residency, layout(torch.float32, 100), layout(torch.float64, 100)))
    (loaded,) = load(pool, piece)
    assert loaded.dtype == torch.float64
    assert torch.equal(loaded, stored.double())
    assert pool.in_use_bytes() == 800
    assert pool.peak_bytes == 256 + 400 + 800
    del loaded
    assert pool.in_use_bytes() == 0


def test_strides_are_kept(residency: Residency) -> None:
    """Stored in memory order, viewed as the model has it."""
    values = torch.randn(4, 6)
    store = CountingStore({"a": values.t().contiguous()})
    weight = weight_of(store, "a", residency)
    weight.source.layout = Layout(torch.float32, (4, 6), (1, 4), CPU)
    (loaded,) = load(BufferPool(), Piece.of(weight))
    assert loaded.stride() == (1, 4)
    assert torch.equal(loaded, values)


def test_runs_are_packed(residency: Residency) -> None:
    store = CountingStore({"a": torch.arange(100.0)})
    piece = Piece.of(weight_of(store, "a", residency), ((3, 6), (10, 11), (50, 60)))
    (loaded,) = load(BufferPool(), piece)
    assert loaded.tolist() == [3.0, 4.0, 5.0, 10.0, *map(float, range(50, 60))]
    assert store.reads == [[("a", 12, 12), ("a", 40, 4), ("a", 200, 40)]]


def test_runs_with_a_conversion(residency: Residency) -> None:
    store = CountingStore({"a": torch.arange(100).to(torch.float16)})
    piece = Piece.of(weight_of(store, "a", residency, layout(torch.float32, 100)), ((98, 100), (0, 2)))
    (loaded,) = load(BufferPool(), piece)
    assert loaded.dtype == torch.float32
    assert loaded.tolist() == [98.0, 99.0, 0.0, 1.0]


def test_weights_in_memory_are_not_copied(residency: Residency) -> None:
    tensor = torch.randn(5, 3)
    address = tensor.data_ptr()  # asking again would make the copy that is otherwise made before a write
    pool = BufferPool()
    weight = weight_of(MemoryStore({"a": tensor}), "a", residency)
    (whole,) = load(pool, Piece.of(weight))
    (run,) = load(pool, Piece.of(weight, ((3, 9),)))
    (runs,) = load(pool, Piece.of(weight, ((3, 5), (14, 15))))
    assert torch._C._data_address(whole) == address
    assert (torch._C._data_address(run), run.storage_offset()) == (address, 3)
    assert torch.equal(run, tensor.view(-1)[3:9])
    assert torch.equal(runs, tensor.view(-1)[[3, 4, 14]])
    assert pool.peak_bytes == 0


def test_several_stores_in_one_group(residency: Residency) -> None:
    """One read of each; those in memory are not read at all."""
    first, second = (
        CountingStore({"a": torch.ones(4), "c": torch.full((4,), 3.0)}),
        CountingStore({"b": torch.zeros(4)}),
    )
    memory = MemoryStore({"d": torch.full((4,), 4.0)})
    pieces = [
        Piece.of(weight_of(store, name, residency))
        for store, name in ((first, "a"), (second, "b"), (first, "c"), (memory, "d"))
    ]
    loaded = load(BufferPool(), *pieces)
    assert [float(x[0]) for x in loaded] == [1.0, 0.0, 3.0, 4.0]
    assert len(first.reads) == len(second.reads) == 1


def test_empty_weights(residency: Residency) -> None:
    store = CountingStore({"a": torch.empty(0, 4), "b": torch.ones(2)})
    pieces = [Piece.of(weight_of(store, name, residency)) for name in "ab"]
    loaded = load(BufferPool(), *pieces)
    assert [tuple(x.shape) for x in loaded] == [(0, 4), (2,)]
    (only,) = load(BufferPool(), pieces[0])
    assert tuple(only.shape) == (0, 4)


@pytest.mark.parametrize("inference", [False, True])
def test_loaded_tensors_are_ordinary(residency: Residency, inference: bool) -> None:
    """Not inference tensors, wherever they are loaded; autograd may save them later."""
    store = CountingStore({"a": torch.ones(4), "b": torch.ones(4, dtype=torch.float64)})
    pieces = [
        Piece.of(weight_of(store, "a", residency)),
        Piece.of(weight_of(store, "b", residency, layout(torch.half, 4))),
    ]
    with torch.inference_mode(inference):
        loaded = load(BufferPool(), *pieces)
    assert not any(x.is_inference() or x.requires_grad for x in loaded)


def test_a_failed_read_gives_its_memory_back_while_the_error_lives(residency: Residency) -> None:
    pool = BufferPool()
    store = CountingStore({"a": torch.ones(100), "b": torch.ones(4, dtype=torch.half)})
    pieces = [
        Piece.of(weight_of(store, "a", residency)),
        Piece.of(weight_of(store, "b", residency, layout(torch.float, 4))),
    ]
    store.close()
    room = loading.try_reserve(pool, Places(pieces, "buffered"))
    assert room is not None
    with pytest.raises(StoreReadError) as caught:
        room.load()
    del room
    assert pool.in_use_bytes() == 0
    assert caught.value is not None


@given(
    st.lists(st.sampled_from([torch.float32, torch.int8, torch.bfloat16, torch.complex64]), min_size=1, max_size=5),
    st.data(),
)
def test_any_runs_of_any_dtypes(dtypes: list[torch.dtype], data: st.DataObject) -> None:
    residency = Residency()
    tensors = {str(i): torch.randn(data.draw(st.integers(1, 40))).mul(50).to(dtype) for i, dtype in enumerate(dtypes)}
    store = CountingStore(tensors)
    pieces, expected, weights = [], [], []
    for name, tensor in tensors.items():
        weight: Weight = weight_of(store, name, residency)
        weights.append(weight)
        if data.draw(st.booleans()):
            cuts = sorted(data.draw(st.lists(st.integers(0, len(tensor)), min_size=2, max_size=6, unique=True)))
            runs = tuple(zip(cuts[::2], cuts[1::2], strict=False))
            pieces.append(Piece.of(weight, runs))
            expected.append(torch.cat([tensor[a:b] for a, b in runs]))
        else:
            pieces.append(Piece.of(weight))
            expected.append(tensor)
    pool = BufferPool()
    loaded = load(pool, *pieces)
    assert all(torch.equal(x, y) for x, y in zip(loaded, expected, strict=True))
    assert store.bytes_read == sum(x.nbytes for x in expected)
