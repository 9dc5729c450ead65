from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import nn

import pylomin
from pylomin.io import buffers
from pylomin.measure import PeakMemory, process_bytes
from pylomin.residency.residency import resident_bytes_of_all

KIB = 1 << 10


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()  # what other tests left must not be counted when it goes
    yield
    torch.set_num_threads(threads)
    assert not buffers._observers


def kib(n: int) -> torch.Tensor:
    """A tensor of ``n`` KiB."""
    return torch.zeros(n * KIB, dtype=torch.uint8)


# -- tensors ----------------------------------------------------------------------------------------------------------


def test_nothing() -> None:
    with pylomin.peak_memory() as peak:
        pass
    assert (peak.tensor_bytes, peak.weight_bytes, peak.cuda_bytes) == (0, 0, 0)
    assert peak.process_bytes > 0
    assert len(peak.samples) >= 2


def test_one_after_the_other() -> None:
    with pylomin.peak_memory() as peak:
        for n in (3, 5, 2):
            kib(n)
    assert peak.tensor_bytes == 5 * KIB
    assert peak.weight_bytes == 0


def test_beside_each_other() -> None:
    with pylomin.peak_memory() as peak:
        a = kib(3)
        b = kib(5)
        del a
        c = kib(4)
    assert peak.tensor_bytes == 9 * KIB
    assert (len(b), len(c)) == (5 * KIB, 4 * KIB)


def test_views_and_in_place_operations_are_free() -> None:
    with pylomin.peak_memory() as peak:
        a = kib(4)
        a.view(2, -1)[1].add_(1)
        a.t_() if a.dim() == 2 else a.detach()
        b = a[: KIB // 2]
        del a
        kib(1)
        assert len(b)
    assert peak.tensor_bytes == 5 * KIB, "a view keeps all of its storage"


def test_temporaries_count() -> None:
    with pylomin.peak_memory() as peak:
        x = torch.ones(KIB // 4)
        y = (x + 1) * 2
    assert y.sum() == KIB
    assert peak.tensor_bytes == 3 * KIB


def test_tensors_from_before_do_not_count() -> None:
    x = kib(100)
    with pylomin.peak_memory() as peak:
        x.view(10, -1)
        y = x[:10].clone()
    assert peak.tensor_bytes == 10
    assert len(y) == 10


def test_several_outputs() -> None:
    x = torch.randn(8, 8)
    with pylomin.peak_memory() as peak:
        values, indices = x.sort()
    assert peak.tensor_bytes == values.nbytes + indices.nbytes
    with pylomin.peak_memory() as peak:
        x.split(2)
    assert peak.tensor_bytes == 0


def test_gradients_count() -> None:
    x = torch.ones(256, requires_grad=True)
    with pylomin.peak_memory() as peak:
        (x * 3).sum().backward()
    assert peak.tensor_bytes == KIB + 8, "the gradient, the loss and the gradient of the loss"
    assert x.grad is not None


def test_tensors_may_outlive_the_block() -> None:
    with pylomin.peak_memory() as peak:
        x = kib(4)
    del x
    kib(100)
    assert peak.tensor_bytes == 4 * KIB


def test_other_threads_do_not_count() -> None:
    with pylomin.peak_memory() as peak:
        thread = threading.Thread(target=lambda: kib(50).add(1))
        thread.start()
        thread.join()
        kib(1)
    assert peak.tensor_bytes == KIB


def test_nested() -> None:
    with pylomin.peak_memory() as outer:
        a = kib(2)
        with pylomin.peak_memory() as inner:
            b = kib(3)
            del b
        kib(1)
        with pylomin.peak_memory() as second:
            kib(4)
    assert inner.tensor_bytes == 3 * KIB
    assert second.tensor_bytes == 4 * KIB
    assert outer.tensor_bytes == 6 * KIB
    assert len(a) == 2 * KIB


def test_an_exception_in_the_block() -> None:
    def fail() -> None:
        kib(2)
        raise ArithmeticError

    with pytest.raises(ArithmeticError), pylomin.peak_memory() as peak:
        fail()
    assert peak.tensor_bytes == 2 * KIB
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pylomin-peak")]
    with pylomin.peak_memory() as again:
        kib(1)
    assert again.tensor_bytes == KIB


def test_without_tensors() -> None:
    with pylomin.peak_memory(tensors=False) as peak:
        kib(100)
    assert (peak.tensor_bytes, peak.weight_bytes) == (0, 0)
    assert peak.process_bytes > 0


def test_process_bytes_sees_memory_come() -> None:
    with pylomin.peak_memory(tensors=False) as peak:
        before = process_bytes()
        x = torch.ones(32 << 20, dtype=torch.uint8)
    assert peak.process_bytes >= before + 30 * (1 << 20)
    assert len(x)


def test_samples_are_in_order() -> None:
    with pylomin.peak_memory() as peak:
        kib(1)
    times = [seconds for seconds, _ in peak.samples]
    assert times == sorted(times)
    assert times[0] >= 0
    assert all(nbytes > 0 for _, nbytes in peak.samples)
    assert max(nbytes for _, nbytes in peak.samples) <= peak.process_bytes


def test_a_fresh_peak() -> None:
    peak = PeakMemory()
    assert (peak.tensor_bytes, peak.weight_bytes, peak.process_bytes, peak.cuda_bytes, peak.samples) == (0, 0, 0, 0, [])


# -- models -----------------------------------------------------------------------------------------------------------


def stack(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths)))


def test_an_ordinary_model() -> None:
    model = stack(16, 32, 16)
    model.register_buffer("table", torch.zeros(100))
    x = torch.ones(1, 16)
    with torch.no_grad(), pylomin.peak_memory(model) as peak:
        model(x)
    assert peak.weight_bytes == 2 * 16 * 32 * 4 + 400
    assert peak.tensor_bytes == peak.weight_bytes + 4 * (32 + 16)


def test_tied_weights_count_once() -> None:
    model = stack(16, 16, 16)
    model[1].weight = model[0].weight
    with pylomin.peak_memory(model) as peak:
        pass
    assert peak.weight_bytes == 16 * 16 * 4


def test_an_offloaded_model_takes_its_largest_layer() -> None:
    model = pylomin.lazy_loading(stack(16, 64, 256, 16))
    x = torch.ones(1, 16)
    with torch.no_grad(), pylomin.peak_memory(model) as peak:
        for _ in range(3):
            model(x)
    assert peak.weight_bytes == 64 * 256 * 4
    assert peak.weight_bytes < peak.tensor_bytes <= peak.weight_bytes + 4 * (64 + 256 + 16)


def test_an_offloaded_model_that_is_not_named() -> None:
    """Its weights count all the same while they are resident."""
    model = pylomin.lazy_loading(stack(16, 64, 256, 16))
    with torch.no_grad(), pylomin.peak_memory() as peak:
        model(torch.ones(1, 16))
    assert peak.weight_bytes == 64 * 256 * 4


def test_what_stays_in_memory_counts_too() -> None:
    model = stack(16, 64, 256, 16)
    pylomin.lazy_loading(model, skip_modules=[model[2]])
    with torch.no_grad(), pylomin.peak_memory(model) as peak:
        model(torch.ones(1, 16))
    assert peak.weight_bytes == 256 * 16 * 4 + 64 * 256 * 4


def test_residents_from_before_count() -> None:
    """Weights that an earlier forward left in memory are in memory."""
    model = pylomin.lazy_loading(stack(16, 64, 256, 16), memory_budget="10MiB")
    x = torch.ones(1, 16)
    total_bytes = 4 * (16 * 64 + 64 * 256 + 256 * 16)
    with torch.no_grad():
        with pylomin.peak_memory(model) as cold:
            model(x)
        with pylomin.peak_memory(model) as warm:
            model(x)
    assert pylomin.stats(model).resident_bytes >= total_bytes
    assert cold.weight_bytes == total_bytes
    assert warm.weight_bytes == total_bytes


def test_residents_that_leave_inside_the_block() -> None:
    model = pylomin.lazy_loading(stack(64, 64, 64), memory_budget="10MiB")
    x = torch.ones(1, 64)
    with torch.no_grad():
        model(x)
        with pylomin.peak_memory(model) as peak:
            pylomin.prefetch(model, memory_budget=64 * 64 * 4)
            kib(10)
    assert peak.tensor_bytes >= 10 * KIB, "what leaves is not counted as less than nothing"


def test_conversions_count_once() -> None:
    """While a weight is converted both sides exist; the activations come on top of the larger one alone."""
    weights = {"weight": torch.ones(256, 256, dtype=torch.bfloat16)}
    model = pylomin.load(lambda: nn.Linear(256, 256, bias=False), weights, dtype=torch.float32)
    x = torch.ones(1, 256)
    with torch.no_grad(), pylomin.peak_memory(model) as peak:
        model(x)
    assert peak.weight_bytes == 256 * 256 * 4
    assert peak.tensor_bytes == peak.weight_bytes + 256 * 4


def test_prefetched_weights_count() -> None:
    model = pylomin.prefetch(pylomin.lazy_loading(stack(300, 300, 300, 300)))
    x = torch.ones(1, 300)
    with torch.no_grad():
        model(x)
        with pylomin.peak_memory(model) as peak:
            for _ in range(3):
                model(x)
    assert 300 * 300 * 4 <= peak.weight_bytes <= 2 * 300 * 300 * 4


def test_a_lookup_takes_its_rows() -> None:
    model = pylomin.lazy_loading(nn.Embedding(1000, 16))
    with torch.no_grad(), pylomin.peak_memory(model) as peak:
        model(torch.tensor([1, 500]))
    assert peak.weight_bytes == 2 * 16 * 4


@pytest.mark.parametrize("offloaded", [False, True])
def test_a_model_that_was_measured_goes_with_its_weights(offloaded: bool) -> None:
    """Also one with buffers, which are in memory at the beginning and at the end of the block."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    if offloaded:
        pylomin.lazy_loading(model, memory_budget="1MiB")
    before = resident_bytes_of_all()
    for _ in range(2):
        with pylomin.peak_memory(model) as peak:
            model(torch.ones(2, 8))
    assert peak.weight_bytes > 0
    assert (resident_bytes_of_all() > before) == offloaded
    dropped = weakref.ref(model)
    del model
    gc.collect()
    assert dropped() is None
    assert resident_bytes_of_all() <= before


def test_nothing_is_watched_after_the_block() -> None:
    """A thousand measurements of one model leave as much behind as one did: nothing."""
    before = len(weakref.finalize._registry)  # type: ignore[attr-defined]
    model = nn.BatchNorm1d(8).eval()
    with pylomin.peak_memory(model) as peak:
        result = model(torch.ones(2, 8))
    assert len(weakref.finalize._registry) <= before  # type: ignore[attr-defined]
    dropped = weakref.ref(peak)
    del peak
    gc.collect()
    assert dropped() is None, "its samples would stay as long as the result"
    assert result.shape == (2, 8)


def test_results_do_not_change() -> None:
    plain = stack(16, 64, 16)
    x = torch.ones(1, 16)
    with torch.no_grad():
        expected = plain(x)
        model = pylomin.lazy_loading(plain)
        with pylomin.peak_memory(model):
            assert torch.equal(model(x), expected)
            with torch.inference_mode():
                assert torch.equal(model(x), expected)


# -- stats ------------------------------------------------------------------------------------------------------------


def test_stats_of_a_model_in_memory() -> None:
    with pytest.raises(pylomin.PassError, match="nothing of this model is offloaded"):
        pylomin.stats(nn.Linear(2, 2))


def test_stats() -> None:
    model = pylomin.lazy_loading(stack(16, 64, 16))
    before = pylomin.stats(model)
    assert before == pylomin.Stats(reading_mode=before.reading_mode, reading_why=before.reading_why)
    with torch.no_grad():
        for _ in range(3):
            model(torch.ones(1, 16))
    stats = pylomin.stats(model)
    assert (stats.loads, stats.hits, stats.prefetched, stats.wasted) == (6, 0, 0, 0)
    assert stats.bytes_read == 3 * 2 * 16 * 64 * 4
    assert stats.peak_bytes == 16 * 64 * 4
    assert stats.resident_bytes == 0
    assert stats.memory_budget is None
    assert stats.reading_mode == before.reading_mode
    assert stats.reading_mode in stats.reading_why or "cached" in stats.reading_why
    assert stats.stall_s > 0


def test_stats_of_parts_offloaded_by_themselves() -> None:
    first, second = stack(16, 16), stack(16, 16)
    pylomin.lazy_loading(first, memory_budget="1MiB")
    pylomin.lazy_loading(second)
    model = nn.Sequential(first, second)
    with torch.no_grad():
        model(torch.ones(1, 16))
        model(torch.ones(1, 16))
    stats = pylomin.stats(model)
    assert (stats.loads, stats.hits) == (3, 1)
    assert stats.memory_budget == 1 << 20
    assert stats.bytes_read == 3 * 16 * 16 * 4


def test_stats_of_a_part() -> None:
    model = pylomin.lazy_loading(stack(16, 16, 16))
    with torch.no_grad():
        model(torch.ones(1, 16))
    assert pylomin.stats(model[0]).loads == 2, "counters are those of the model it was offloaded with"
