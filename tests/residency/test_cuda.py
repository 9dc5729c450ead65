"""What only a GPU can show. The families, rows, writes and the order of everything are tested on a fake device, too."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pylomin
from pylomin.errors import BudgetError, TraceError
from pylomin.lazy.offload import residencies_of
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.residency.carrier import DEVICE_ALIGNMENT_BYTES, carrier_to
from pylomin.residency.cuda import CudaDevice
from pylomin.residency.device import device_of
from pylomin.residency.device_errors import DeviceMemoryError
from pylomin.residency.device_memory import DeviceBytes, DeviceMemory
from pylomin.residency.pinned import PinnedMemory

pytestmark = pytest.mark.cuda

WIDTH = 1024
LAYERS = 8
WEIGHTS_BYTES = LAYERS * (WIDTH * WIDTH + WIDTH) * 4
BUDGET = WEIGHTS_BYTES // 3
SEGMENT_BYTES = 20 << 20  # that torch's allocator takes for blocks of 1 to 10 MiB, such as those of four layers
Storage = Literal["disk", "cpu"]
STORAGES: tuple[Storage, ...] = ("disk", "cpu")


@pytest.fixture
def device() -> Iterator[torch.device]:
    yield torch.device("cuda", torch.cuda.current_device())
    gc.collect()


def built() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]).eval()


def inputs(device: torch.device) -> torch.Tensor:
    return torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)


def resident(device: torch.device) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = built().to(device)(inputs(device))
    return output


def streamed(device: torch.device, storage: Storage, budget: int | None = BUDGET) -> nn.Sequential:
    return pylomin.prefetch(pylomin.lazy_loading(built(), device=device, storage=storage, memory_budget=budget))


def test_bytes_of_a_tensor_keep_their_owner(device: torch.device) -> None:
    cuda = device_of(device)
    memory = DeviceMemory(cuda, 1 << 20)
    part = DeviceBytes(memory, DEVICE_ALIGNMENT_BYTES, 4096)
    tensor = part.begin()
    assert tensor.data_ptr() == memory.base.data_ptr() + DEVICE_ALIGNMENT_BYTES
    assert (tensor.device, tensor.dtype, tensor.nbytes) == (device, torch.uint8, 4096)
    tensor.fill_(7)
    assert int(memory.base[DEVICE_ALIGNMENT_BYTES]) == 7
    assert part.tensor(512, 8).data_ptr() == tensor.data_ptr() + 512


def test_pinned_memory_is_of_its_exact_size(device: torch.device) -> None:
    before = torch.cuda.memory_allocated(device)
    memory = PinnedMemory(device_of(device), (3 << 20) + 5, what="for a test")
    assert memory.is_pinned
    assert memory.nbytes == (3 << 20) + 4096
    tensor = memory.bytes(100, 1000)
    assert tensor.is_pinned()
    assert torch.cuda.memory_allocated(device) == before


def test_a_pin_that_fails_leaves_no_error_behind(device: torch.device) -> None:
    cuda = CudaDevice(device)
    assert cuda.pin(0, 4096) is not None
    assert float(torch.ones(2, device=device).sum()) == 2.0


@pytest.mark.parametrize("storage", STORAGES)
def test_the_bits_of_the_resident_model(device: torch.device, storage: Storage) -> None:
    expected = resident(device)
    for budget in (None, BUDGET, 2 * WEIGHTS_BYTES):
        model = streamed(device, storage, budget)
        with torch.no_grad():
            for _ in range(4):
                assert torch.equal(model(inputs(device)), expected)


@pytest.mark.parametrize("storage", STORAGES)
def test_no_more_memory_than_the_budget(device: torch.device, storage: Storage) -> None:
    """Though nothing waits: the host is far ahead of the device."""
    model, x = streamed(device, storage), inputs(device)
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with torch.no_grad():
        for _ in range(5):
            model(x)
    torch.cuda.synchronize()
    activations = 4 * x.nbytes + (32 << 20)  # and the workspace of cuBLAS
    assert torch.cuda.max_memory_allocated(device) - before <= BUDGET + activations
    assert pylomin.stats(model).peak_bytes <= BUDGET


def test_the_host_waits_for_nothing(device: torch.device) -> None:
    """Weights in host memory: torch itself raises where an operation would wait for the device."""
    model, x = streamed(device, "cpu"), inputs(device)
    expected = resident(device)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = [model(x) for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(output, expected) for output in outputs)


def test_streams_of_users(device: torch.device) -> None:
    model, x, expected = streamed(device, "cpu"), inputs(device), resident(device)
    streams = [torch.cuda.Stream(device) for _ in range(3)]
    torch.cuda.synchronize()
    outputs = []
    with torch.no_grad():
        for turn in range(12):
            with torch.cuda.stream(streams[turn % 3]):
                outputs.append(model(x))
    torch.cuda.synchronize()
    assert all(torch.equal(output, expected) for output in outputs)


@pytest.mark.parametrize("storage", STORAGES)
def test_threads(device: torch.device, storage: Storage) -> None:
    model, x, expected = streamed(device, storage), inputs(device), resident(device)
    equal: list[bool] = []

    def work() -> None:
        with torch.no_grad():
            equal.extend(torch.equal(model(x), expected) for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 20


def test_several_models_share_a_ring(device: torch.device) -> None:
    models = [streamed(device, "disk") for _ in range(3)]
    x, expected = inputs(device), resident(device)
    with torch.no_grad():
        for _ in range(3):
            for model in models:
                assert torch.equal(model(x), expected)
    assert {pylomin.stats(model).pinned_bytes for model in models} == {carrier_to(device).ring_bytes}


def test_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    device = torch.device("cuda:1")
    model = streamed(device, "disk")
    with torch.no_grad():
        assert torch.equal(model(inputs(device)), resident(device))
    assert torch.cuda.current_device() == 0


def test_a_graph_is_refused(device: torch.device) -> None:
    model, x = streamed(device, "cpu"), inputs(device)
    with torch.no_grad():
        expected = model(x)
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(TraceError, match="CUDA graph is being captured"), torch.cuda.graph(graph):
            model(x + 1)  # a graph with nothing in it is warned of
        assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore")  # compilers have much to say
def test_compiled(device: torch.device) -> None:
    model, x, expected = streamed(device, "cpu"), inputs(device), resident(device)
    compiled = torch.compile(model)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), expected)


def test_autocast_and_gradients(device: torch.device) -> None:
    grads = []
    for model in (streamed(device, "cpu"), built().to(device)):
        x = inputs(device).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            model(x).float().square().sum().backward()
        grads.append(x.grad)
    assert grads[0] is not None
    assert grads[1] is not None
    assert torch.equal(grads[0], grads[1])


def test_a_full_device_names_a_budget(device: torch.device) -> None:
    model, x, expected = streamed(device, "cpu", 64 * WEIGHTS_BYTES), inputs(device), resident(device)
    (residency,) = residencies_of(model)
    weights = [p.weight for p in model.parameters() if isinstance(p, OffloadedTensor)]
    gc.collect()
    torch.cuda.empty_cache()
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    room_bytes = torch.cuda.memory_reserved(device) + SEGMENT_BYTES + (4 << 20)  # half of the weights
    torch.cuda.set_per_process_memory_fraction(room_bytes / total_bytes, device)
    try:
        with torch.no_grad():
            assert torch.equal(model(x), expected), "what is idle leaves for what comes"
        pylomin.set_memory_budget(model, 64 * WEIGHTS_BYTES)
        with pytest.raises(BudgetError, match="has no memory left"), residency.hold(weights):
            pass
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_weights_make_room_for_what_is_computed(device: torch.device) -> None:
    rows = 6 << 10  # inputs and outputs of 24 MiB
    x = inputs(device).repeat(rows // 64, 1)
    with torch.no_grad():
        expected = built().to(device)(x)
    model = streamed(device, "cpu", 64 * WEIGHTS_BYTES)
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.empty_cache()
    before_bytes = torch.cuda.memory_reserved(device)
    with torch.no_grad():
        model(x[:64])
    total_bytes = torch.cuda.get_device_properties(device).total_memory
    # All weights take two segments. Beside two of x there is room for one.
    room_bytes = before_bytes + 2 * x.nbytes + SEGMENT_BYTES + (12 << 20)
    torch.cuda.set_per_process_memory_fraction(room_bytes / total_bytes, device)
    try:
        with torch.no_grad():
            assert torch.equal(model(x), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    budget = pylomin.stats(model).memory_budget
    assert budget is not None
    assert budget <= WEIGHTS_BYTES


def test_what_finds_no_memory_names_a_budget(device: torch.device) -> None:
    model, x = streamed(device, "cpu", 64 * WEIGHTS_BYTES), inputs(device)
    torch.cuda.synchronize()
    large = x[:1].expand(1 << 20, WIDTH)  # 4 GiB of results
    with torch.no_grad():
        model(x)
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        room_bytes = torch.cuda.memory_reserved(device) + (64 << 20)
        torch.cuda.set_per_process_memory_fraction(room_bytes / total_bytes, device)
        try:
            with pytest.raises(DeviceMemoryError, match=r"CUDA out of memory.*pylomin\.set_memory_budget\(model, "):
                model(large)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        assert torch.equal(model(x), resident(device))


@pytest.mark.parametrize("readers", [2, 4])
def test_several_readers(device: torch.device, readers: int) -> None:
    model, x, expected = streamed(device, "disk"), inputs(device), resident(device)
    pylomin.prefetch(model, readers=readers)
    with torch.no_grad():
        for _ in range(4):
            assert torch.equal(model(x), expected)


def test_autocast_keeps_nothing(device: torch.device) -> None:
    """What it casts is gone with the layer: no copy of all weights, for as long as its block is."""
    model, x = streamed(device, "cpu", 2 * WEIGHTS_BYTES), inputs(device)
    with torch.no_grad():
        model(x)  # all of it stays
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        model(x)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        for _ in range(3):
            model(x)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated(device) - before < LAYERS // 2 * WIDTH * WIDTH * 2


def test_lookups_of_a_large_table(device: torch.device) -> None:
    table = nn.Embedding(100_000, 64)
    tokens = torch.tensor([[5, 99_999, 5, 0]], device=device)
    expected = F.embedding(tokens.cpu(), table.weight.detach())
    model = pylomin.lazy_loading(table, device=device)
    before = pylomin.stats(model).bytes_read
    with torch.no_grad():
        assert torch.equal(model(tokens).cpu(), expected)
    assert pylomin.stats(model).bytes_read - before == 3 * 64 * 4


def test_fit(device: torch.device) -> None:
    x, expected = inputs(device), resident(device)
    model = pylomin.fit(built(), device=device, args=[x])
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert "free" in pylomin.plan_of(model).choices["budget"]
