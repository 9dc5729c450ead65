"""The first tiles of the weight that is used next, which are read while the last of this one are used."""

from __future__ import annotations

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import nn

import pylomin

from .common import (
    FaultyStore,
    assert_nothing_held,
    ends,
    forward,
    in_prefetch_thread,
    only_residency,
    reads_ended,
    weights_of,
)

BUDGET = 2 << 20  # 2 MiB: of each weight, 4 MiB, there are nine tiles


def tiled_pair() -> tuple[torch.Tensor, torch.Tensor, nn.Sequential, FaultyStore, list[tuple[str, bool]]]:
    """Two weights that are used by tiles, one after the other, with a known order, and which reads there were.

    Of each read: the name of the weight, and whether it was begun ahead.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False), nn.Linear(1024, 1024, bias=False))
    x = torch.randn(1, 1024)
    with torch.no_grad():
        expected = model(x)
    store = FaultyStore({name: value.detach().clone() for name, value in model.state_dict().items()})
    pylomin.prefetch(pylomin.lazy_loading(model, weights=store, memory_budget=BUDGET))
    reads: list[tuple[str, bool]] = []
    for _ in range(2):
        forward(model, x)
    assert reads_ended(only_residency(model))
    only_residency(model).drop_ahead(())
    store.before_read = lambda names: reads.append((names[0], in_prefetch_thread()))
    return x, expected, model, store, reads


def test_they_are_read_in_the_background() -> None:
    x, expected, model, _, reads = tiled_pair()
    for again in (False, True):
        reads.clear()
        torch.testing.assert_close(forward(model, x), expected)
        first = [next(ahead for name, ahead in reads if name == f"{i}.weight") for i in range(2)]
        assert first == [again, True], "after the last weight comes the first again"
    assert reads_ended(only_residency(model))
    assert pylomin.stats(model).peak_bytes <= BUDGET
    only_residency(model).drop_ahead(())
    assert_nothing_held(model)


@pytest.mark.parametrize("quarters", [6, 8, 10, 12], ids=lambda quarters: f"{quarters / 4} MiB")
def test_they_are_read_first(quarters: int) -> None:
    """Also after a weight that is loaded whole, and before any that is used after them, which may be there already."""
    torch.manual_seed(0)
    sizes = [(192, 1024), (1024, 1024), (1024, 192), (192, 192)]
    model = nn.Sequential(*[nn.Linear(*size, bias=False) for size in sizes])
    x = torch.randn(1, 192)
    with torch.no_grad():
        expected = model(x)
    store = FaultyStore({name: value.detach().clone() for name, value in model.state_dict().items()})
    budget = quarters << 18
    pylomin.prefetch(pylomin.lazy_loading(model, weights=store, memory_budget=budget))
    for _ in range(3):
        forward(model, x)
    assert reads_ended(only_residency(model))
    reads: list[tuple[str, bool]] = []
    store.before_read = lambda names: reads.append((names[0], in_prefetch_thread()))
    for _ in range(3):
        torch.testing.assert_close(forward(model, x), expected)
    assert reads_ended(only_residency(model))
    assert all(ahead for name, ahead in reads if name == "1.weight")
    following = {(name, after) for (name, _), (after, _) in pairwise(reads)}
    assert ("0.weight", "2.weight") not in following
    assert pylomin.stats(model).peak_bytes <= budget


def test_nothing_is_read_twice() -> None:
    x, _, model, _, reads = tiled_pair()
    for _ in range(5):
        forward(model, x)
    assert reads_ended(only_residency(model))
    ahead = len(reads) - 5 * 18
    assert ahead in (1, 2), "the first tiles of a sixth"


def test_what_is_written_meanwhile_is_used() -> None:
    x, _, model, _, _ = tiled_pair()
    forward(model, x)  # tiles of the first weight are read ahead now
    new = torch.randn(1024, 1024)
    with torch.no_grad():
        model.get_parameter("0.weight").copy_(new)
        expected = nn.functional.linear(x, new)
        torch.testing.assert_close(model[0](x), expected, rtol=1e-4, atol=1e-4)


def test_another_use_takes_their_memory() -> None:
    """The weight is used in another way than was expected, and needs all of the budget."""
    x, expected, model, _, _ = tiled_pair()
    forward(model, x)
    weight, residency = weights_of(model)[1], only_residency(model)
    runs = [(0, (BUDGET - 8192) // 4)]
    values = residency.load_runs(weight, runs)
    assert values.numel() == runs[0][1]
    del values
    torch.testing.assert_close(forward(model, x), expected)
    assert pylomin.stats(model).peak_bytes <= BUDGET


@pytest.mark.parametrize("budget", [BUDGET // 2, 4 * BUDGET])
def test_another_budget(budget: int) -> None:
    x, expected, model, _, _ = tiled_pair()
    forward(model, x)
    pylomin.set_memory_budget(model, budget)
    for _ in range(3):
        torch.testing.assert_close(forward(model, x), expected)
    assert pylomin.stats(model).resident_bytes <= budget


def test_an_error_is_raised_by_who_uses_them() -> None:
    x, expected, model, store, _ = tiled_pair()

    def fail(names: list[str]) -> None:
        if in_prefetch_thread() and names == ["1.weight"]:
            raise pylomin.StoreReadError("the disk is gone")

    store.before_read = fail
    with pytest.raises(pylomin.StoreReadError, match="the disk is gone"):
        forward(model, x)
    store.before_read = lambda names: None
    torch.testing.assert_close(forward(model, x), expected)


def test_a_model_that_is_dropped_is_gone() -> None:
    x, _, model, _, _ = tiled_pair()
    forward(model, x)
    assert reads_ended(only_residency(model))
    residency = weakref.ref(only_residency(model))
    gc.disable()
    try:
        del model
        assert ends(lambda: residency() is None, 5)
    finally:
        gc.enable()


def test_threads() -> None:
    """Each takes what another has begun."""
    x, expected, model, _, _ = tiled_pair()
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda _: forward(model, x), range(24)))
    for output in outputs:
        torch.testing.assert_close(output, expected)
    assert pylomin.stats(model).peak_bytes <= BUDGET
