"""A device that has no memory left for what is computed: weights make room, and what is safe is computed once more."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pylomin
from pylomin.errors import BudgetError, PylominError
from pylomin.lazy import tensor as tensor_module
from pylomin.lazy.offload import residencies_of
from pylomin.residency.device_errors import DeviceMemoryError
from pylomin.residency.prefetcher import RunAhead

from .fake_device import FAKE, FakeDevice, computing_on_the_host, installed, lazy

WIDTH = 128
LAYERS = 8
LAYER_BYTES = (WIDTH * WIDTH + WIDTH) * 4


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    device = computing_on_the_host(lazy)
    with installed(device):
        yield device


def built() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]).eval()


X = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
EXPECTED = built()(X).detach()


class Full:
    """Operations of a name find no memory where ``is_full`` says so; ``calls`` counts all, ``failed`` those."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, is_full: Callable[[], bool]) -> None:
        self.calls = self.failed = 0
        self.is_full = is_full
        run = getattr(F, name)

        def tried(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.is_full():
                self.failed += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words.")
            return run(*args, **kwargs)

        monkeypatch.setattr(F, name, tried)


def in_use(model: nn.Module) -> int:
    return pylomin.stats(model).resident_bytes


def test_weights_make_room_for_what_is_computed(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass with more input than before: it and those after it go on, with fewer weights in memory."""
    model = pylomin.prefetch(pylomin.lazy_loading(built(), device=FAKE, memory_budget="16MiB"))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(X), EXPECTED)
        assert in_use(model) >= LAYERS * LAYER_BYTES
        full = Full(monkeypatch, "linear", lambda: in_use(model) > 3 * LAYER_BYTES)
        for _ in range(10):
            assert torch.equal(model(X), EXPECTED)
        assert 1 <= full.failed < 10
        failed = full.failed
        for _ in range(5):
            assert torch.equal(model(X), EXPECTED)
        assert full.failed == failed, "the budget is one that works"
    budget = pylomin.stats(model).memory_budget
    assert budget is not None
    assert 2 * LAYER_BYTES <= budget <= 4 * LAYER_BYTES
    assert "lowered" in pylomin.plan_of(model).choices["budget"]


def test_an_error_names_the_budget(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pylomin.lazy_loading(built(), device=FAKE, memory_budget="16MiB")
    full = Full(monkeypatch, "linear", lambda: False)
    with torch.no_grad():
        model(X)
        full.calls, full.is_full = 0, lambda: True
        with pytest.raises(
            DeviceMemoryError, match=r"computed with weight '0.weight': CUDA out of memory\. "
        ) as raised:
            model(X)
        assert full.calls == 2, "once more, and no more"
        budget = pylomin.stats(model).memory_budget
        assert f"computed once more, in vain. memory_budget is {budget} " in str(raised.value)
        assert f"pylomin.set_memory_budget(model, {budget})" in str(raised.value)
        assert isinstance(raised.value, torch.OutOfMemoryError)
        assert isinstance(raised.value, BudgetError)
        assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
        (residency,) = residencies_of(model)
        assert not residency._holders
        assert in_use(model) <= 2 * LAYER_BYTES
        full.is_full = lambda: False
        assert torch.equal(model(X), EXPECTED)


def test_without_a_budget_there_is_none_to_lower(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pylomin.lazy_loading(built(), device=FAKE)
    full = Full(monkeypatch, "linear", lambda: full.calls == 4)
    with torch.no_grad():
        assert torch.equal(model(X), EXPECTED)
        assert full.failed == 1
        full.is_full = lambda: True
        with pytest.raises(DeviceMemoryError, match="No memory_budget is small enough: use smaller inputs"):
            model(X)


def test_the_budget_is_not_lowered_below_what_is_needed(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pylomin.lazy_loading(built(), device=FAKE, memory_budget="16MiB")
    full = Full(monkeypatch, "linear", lambda: full.calls % 2 == 1)
    with torch.no_grad():
        for _ in range(20):
            assert torch.equal(model(X), EXPECTED)
        full.is_full = lambda: False
        assert torch.equal(model(X), EXPECTED)
    budget = pylomin.stats(model).memory_budget
    assert budget is not None
    assert 2 * LAYER_BYTES <= budget < 3 * LAYER_BYTES, "or they would run by tiles"


def test_nothing_of_the_first_attempt_is_kept(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    run = F.linear

    def tried(x: torch.Tensor, *args: Any) -> torch.Tensor:
        large = torch.empty(100)
        assert not any(one() is not None for one in kept)
        kept.append(weakref.ref(large))
        if len(kept) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(x, *args)

    monkeypatch.setattr(F, "linear", tried)
    model = pylomin.lazy_loading(built(), device=FAKE, memory_budget="16MiB")
    with torch.no_grad():
        assert torch.equal(model(X), EXPECTED)
    assert len(kept) == 2 * LAYERS


def test_other_models_on_the_device_make_room_too(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    idle = pylomin.lazy_loading(built(), device=FAKE, memory_budget="16MiB")
    model = pylomin.lazy_loading(built(), device=FAKE, memory_budget="16MiB")
    with torch.no_grad():
        assert torch.equal(idle(X), EXPECTED)
        Full(monkeypatch, "linear", lambda: in_use(idle) > 0)
        assert torch.equal(model(X), EXPECTED)
        assert in_use(idle) == 0
    assert pylomin.stats(idle).memory_budget == 16 << 20, "it is not the one that needs the memory"


def test_gradients_flow_through_what_was_computed_twice(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, model = built(), pylomin.lazy_loading(built(), device=FAKE, memory_budget="16MiB")
    full = Full(monkeypatch, "linear", lambda: full.calls % 2 == 1)
    grads = []
    for one in (model, plain):
        x = X.clone().requires_grad_()
        one(x).sum().backward()
        grads.append(x.grad)
        full.is_full = lambda: False
    assert grads[0] is not None
    assert torch.equal(*grads)


# -- what is not computed once more -----------------------------------------------------------------------------------


class Counting(nn.Linear):
    """Changes something in its forward."""

    count = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().forward(x)


def refused(model: nn.Module, x: torch.Tensor, reason: str) -> None:
    with pytest.raises(DeviceMemoryError, match=f"It was not computed once more, for {reason}"):
        model(x)


def test_not_what_may_have_changed_something(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    model = pylomin.lazy_loading(Counting(WIDTH, WIDTH), device=FAKE, memory_budget="16MiB")
    full = Full(monkeypatch, "linear", lambda: True)
    with torch.no_grad():
        refused(model, X, "the forward of Counting may have changed something before it stopped")
    assert (model.count, full.calls) == (1, 1)


@pytest.mark.parametrize("training", [False, True])
def test_not_statistics_that_are_updated(device: FakeDevice, monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    norm = nn.BatchNorm1d(WIDTH).train(training)
    plain = copy.deepcopy(norm)
    model = pylomin.lazy_loading(norm, device=FAKE, memory_budget="16MiB")
    full = Full(monkeypatch, "batch_norm", lambda: full.calls == 1)
    with torch.no_grad():
        if training:
            refused(model, X, "BatchNorm1d updates its statistics while it trains")
            assert full.calls == 1
            assert int(model.num_batches_tracked) == 1, "as torch's own would be after such an error"
        else:
            assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("training", [False, True])
def test_not_what_draws_random_numbers(device: FakeDevice, monkeypatch: pytest.MonkeyPatch, training: bool) -> None:
    lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.5).train(training)
    plain, x = copy.deepcopy(lstm), torch.randn(3, 1, 8)
    model = pylomin.lazy_loading(lstm, device=FAKE, memory_budget="16MiB")
    run, calls = torch._VF.lstm, list[int]()  # type: ignore[attr-defined]

    def tried(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(*args)

    monkeypatch.setattr(torch._VF, "lstm", tried)  # type: ignore[attr-defined]
    with torch.no_grad():
        if training:
            refused(model, x, "LSTM draws random numbers while it trains")
        else:
            assert torch.equal(model(x)[0], plain(x)[0])


def test_not_what_hooks_or_modes_have_seen(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    model = pylomin.lazy_loading(built(), device=FAKE, memory_budget="16MiB")
    full = Full(monkeypatch, "linear", lambda: True)
    with torch.autograd.graph.save_on_cpu():
        refused(model, X, "hooks have seen the tensors that it saved for backward")
    with torch.no_grad(), Watching():
        refused(model, X, "a mode has seen its operations")
    assert full.calls == 2


# -- single operators -------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Reads a weight that it does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.table.weight)


def full_once(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    run, calls = tensor_module.run_loaded, list[int]()

    def tried(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(*args)

    monkeypatch.setattr(tensor_module, "run_loaded", tried)
    return calls


def test_an_operator_is_computed_once_more(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Tied()
    model = pylomin.lazy_loading(copy.deepcopy(plain), device=FAKE, memory_budget="16MiB")
    calls = full_once(monkeypatch)
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))
    assert len(calls) >= 2


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (torch.bernoulli, "aten.bernoulli.default draws random numbers"),
        (lambda weight: torch.ones_like(weight).add_(weight), "aten.add_.Tensor writes to a tensor"),
    ],
)
def test_an_operator_that_changes_something_is_not(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch, run: Callable[[torch.Tensor], Any], reason: str
) -> None:
    model = pylomin.lazy_loading(Tied(), device=FAKE, memory_budget="16MiB")
    full_once(monkeypatch)
    with torch.no_grad(), pytest.raises(DeviceMemoryError, match=reason):
        run(model.table.weight)


def test_on_the_host_it_stays_torchs_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pylomin.lazy_loading(built(), memory_budget="16MiB")
    full = Full(monkeypatch, "linear", lambda: True)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError) as raised:
        model(X)
    assert not isinstance(raised.value, PylominError)
    assert full.calls == 1


def test_a_tile_that_found_no_memory_ahead_is_read_when_it_is_used(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: list[int] = []

    def fail(ahead: RunAhead) -> None:
        failed.append(1)
        ahead._room._clear()
        ahead._error = torch.OutOfMemoryError("CUDA out of memory.")
        ahead._done.release()

    monkeypatch.setattr(RunAhead, "run", fail)
    linear, x = nn.Linear(512, 4096).eval(), torch.randn(3, 512)
    expected = linear(x).detach()
    model = pylomin.prefetch(pylomin.lazy_loading(linear, device=FAKE, memory_budget="2MiB"))
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(x), expected)
    assert failed
