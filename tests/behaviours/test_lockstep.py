"""Many forwards of one model, one at a time, with each group of weights loaded once."""

from __future__ import annotations

import contextvars
import copy
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylomin
from pylomin.lazy.offload import residencies_of
from tests.families.catalog import BY_NAME
from tests.robustness.common import run_in_thread, run_in_threads

from .common import Mlp, SizedLinears, Tied, assert_same, bytes_read, outcome, resident_bytes, twins

SIZE = 320  # a linear of it has 400 KiB, enough to be read ahead
LAYERS = 6
LAYER_BYTES = (SIZE * SIZE + SIZE) * 4
BUDGETS = [None, int(2.02 * LAYER_BYTES), int(3.2 * LAYER_BYTES)]


def pair(model: nn.Module, budget: int | None = None, *, prefetch: bool = False) -> tuple[Any, Any]:
    plain, lazy = twins(model, memory_budget=budget, reading_mode="buffered")
    return plain, pylomin.prefetch(lazy) if prefetch else lazy


def inputs(count: int = 16) -> list[Tensor]:
    return [torch.randn(1 + index % 3, SIZE) for index in range(count)]


def assert_nothing_left(lazy: nn.Module) -> None:
    assert not [thread for thread in threading.enumerate() if thread.name == "pylomin-lockstep"]
    for residency in residencies_of(lazy):
        assert residency.turns is None
        assert not residency._holders
        assert not residency._waiting
        assert not any(weight.holds for weight in residency._weights.values())


# -- results, and how often weights are read --------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_results_have_the_same_bits_and_weights_are_read_once(budget: int | None, prefetch: bool, grad: bool) -> None:
    plain, lazy = pair(SizedLinears(LAYERS, SIZE), budget, prefetch=prefetch)
    xs = inputs()
    with torch.set_grad_enabled(grad):
        expected = [plain(x) for x in xs]
        for _ in range(3):
            results: list[Any] = []
            read = bytes_read(lazy, lambda results=results: results.extend(pylomin.lockstep(lazy, xs)))
            assert_same(expected, results)
            assert read <= LAYERS * LAYER_BYTES
    stats = pylomin.stats(lazy)
    assert budget is None or stats.peak_bytes <= budget
    if prefetch and budget != BUDGETS[1]:
        assert stats.prefetched >= LAYERS
    assert_nothing_left(lazy)


@pytest.mark.parametrize("in_flight", [1, 3, 16, 100])
def test_as_many_in_flight_as_were_asked_for(in_flight: int) -> None:
    plain, lazy = pair(SizedLinears(LAYERS, SIZE))
    begun: set[int] = set()
    most = 0

    def fn(item: tuple[int, Tensor]) -> Tensor:
        nonlocal most
        begun.add(item[0])
        most = max(most, len(begun))
        result: Tensor = lazy(item[1])
        begun.remove(item[0])
        return result

    xs = inputs()
    expected = [plain(x) for x in xs]
    read = bytes_read(
        lazy, lambda: assert_same(expected, pylomin.lockstep(lazy, enumerate(xs), fn, max_in_flight=in_flight))
    )
    assert most == min(in_flight, 16)
    assert read <= -(-16 // in_flight) * LAYERS * LAYER_BYTES


class Branches(nn.Module):
    """Each input goes its own way, and some go on for longer."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in range(4))
        self.shared = nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, ways: tuple[int, ...]) -> Tensor:
        for way in ways:
            x = torch.tanh(self.shared(torch.tanh(self.ways[way](x))))
        return x


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_inputs_that_go_different_ways(budget: int | None, prefetch: bool) -> None:
    plain, lazy = pair(Branches(), budget, prefetch=prefetch)
    ways = [(0,), (1, 2), (3, 3, 3), (), (0, 1, 2, 3), (2,), (1, 2, 1, 2, 1), (3, 0)]
    given = [(torch.randn(2, SIZE), way) for way in ways]
    expected = [plain(*item) for item in given]
    alone = sum(2 * len(way) for way in ways) * LAYER_BYTES
    results: list[Any] = []
    read = bytes_read(lazy, lambda: results.extend(pylomin.lockstep(lazy, given)))
    assert_same(expected, results)
    assert read <= 0.75 * alone
    assert_nothing_left(lazy)


@pytest.mark.parametrize("budget", [None, 1 << 17])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "qwen3_moe"])
@pytest.mark.parametrize("sample", [False, True])
def test_generate(name: str, budget: int | None, sample: bool) -> None:
    family = BY_NAME[name]
    plain, lazy = family.build(), pylomin.lazy_loading(family.build(), memory_budget=budget)
    if budget is not None:
        pylomin.prefetch(lazy)
    prompt = family.prompt()["input_ids"][:1]
    prompts = [(prompt[:, : 2 + index % 3], 3 + index % 4) for index in range(6)]

    def generate(model: Any, item: tuple[Tensor, int]) -> Tensor:
        tokens: Tensor = model.generate(
            input_ids=item[0], max_new_tokens=item[1], min_new_tokens=item[1], do_sample=sample
        )
        return tokens

    expected = []
    for item in prompts:
        torch.manual_seed(3)
        expected.append(generate(plain, item))
    torch.manual_seed(3)
    together = bytes_read(
        lazy, lambda: assert_same(expected, pylomin.lockstep(lazy, prompts, lambda item: generate(lazy, item)))
    )
    assert_nothing_left(lazy)
    if budget is None:
        assert together < 0.6 * bytes_read(lazy, lambda: [generate(lazy, item) for item in prompts])


def test_how_inputs_are_given() -> None:
    class Keywords(nn.Linear):
        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    lazy = pylomin.lazy_loading(Keywords(4, 4))
    x = torch.randn(2, 4)
    results = pylomin.lockstep(lazy, ({"x": x, "scale": scale} for scale in (1.0, 2.0)))
    assert_same([lazy(x), lazy(x, scale=2.0)], results)
    assert_same([lazy(x)], pylomin.lockstep(lazy, [(x,)]))
    assert pylomin.lockstep(lazy, []) == []


def test_a_model_in_memory() -> None:
    model = Mlp()
    xs = [torch.randn(2, 8) for _ in range(3)]
    assert_same([model(x) for x in xs], pylomin.lockstep(model, xs))


@pytest.mark.parametrize("prefetch", [False, True])
def test_tiles_are_read_once(prefetch: bool) -> None:
    size = 1024  # 4 MiB
    plain, lazy = pair(SizedLinears(2, size), 5 << 20, prefetch=prefetch)
    xs = [torch.randn(2, size) for _ in range(5)]
    for _ in range(2):
        results: list[Any] = []
        read = bytes_read(lazy, lambda results=results: results.extend(pylomin.lockstep(lazy, xs)))
        assert_same([lazy(x) for x in xs], results)
        assert read <= 2 * (size * size + size) * 4
    torch.testing.assert_close(results, [plain(x) for x in xs])
    assert pylomin.stats(lazy).peak_bytes <= 5 << 20
    assert_nothing_left(lazy)


@pytest.mark.parametrize("scheme", ["int8", "int8-row", "int4"])
@pytest.mark.parametrize("budget", [None, 2 * LAYER_BYTES])
def test_quantised_weights(scheme: str, budget: int | None, tmp_path: Any) -> None:
    path = tmp_path / "model.safetensors"
    pylomin.save_model(SizedLinears(LAYERS, SIZE), path, quantize=scheme)
    lazy = pylomin.load(lambda: SizedLinears(LAYERS, SIZE), path, memory_budget=budget)
    pylomin.prefetch(lazy)
    xs = inputs(6)
    with torch.no_grad():
        expected = [lazy(x) for x in xs]
        results: list[Any] = []
        read = bytes_read(lazy, lambda: results.extend(pylomin.lockstep(lazy, xs)))
    assert_same(expected, results)
    assert read <= path.stat().st_size
    assert_nothing_left(lazy)


def test_tied_weights_and_lookups() -> None:
    plain, lazy = twins(Tied())
    ids = [torch.tensor([index, 2, 3]) for index in range(8)]
    assert_same([plain(x) for x in ids], pylomin.lockstep(lazy, ids))


# -- what is kept apart, and what is carried over -----------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = SizedLinears(3, 64)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.dropout(layer(x)) + torch.rand(64)
        return x


def test_each_input_draws_what_it_would_alone() -> None:
    plain, lazy = twins(Noisy().train())
    xs = [torch.randn(2, 64) for _ in range(5)]
    expected = []
    for x in xs:
        torch.manual_seed(7)
        expected.append(plain(x))
    after = torch.rand(3)
    torch.manual_seed(7)
    assert_same(expected, pylomin.lockstep(lazy, xs))
    assert_same(after, torch.rand(3))  # as the last input left it


def test_modes_of_the_caller() -> None:
    lazy = pylomin.lazy_loading(SizedLinears(2, 8))
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(5)

    def seen(x: Tensor) -> tuple[Any, ...]:
        out = lazy(x)
        value = variable.get()
        variable.set(value + 1)
        where = torch.empty(1).device.type
        return out.dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), where, value

    xs = [torch.ones(1, 8)] * 3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pylomin.lockstep(lazy, xs, seen) == [(torch.bfloat16, True, False, "cpu", 5)] * 3
    with torch.inference_mode():
        assert pylomin.lockstep(lazy, xs, seen) == [(torch.float32, False, True, "cpu", 5)] * 3
    with torch.no_grad(), torch.device("meta"):
        xs = [torch.ones(1, 8, device="cpu")] * 3
        assert pylomin.lockstep(lazy, xs, seen) == [(torch.float32, False, False, "meta", 5)] * 3
    assert variable.get() == 5


@pytest.mark.parametrize("prefetch", [False, True])
def test_gradients(prefetch: bool) -> None:
    plain, lazy = pair(SizedLinears(LAYERS, SIZE), int(3.2 * LAYER_BYTES), prefetch=prefetch)

    def gradient(model: nn.Module, x: Tensor) -> Tensor | None:
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        return leaf.grad

    xs = inputs(6)
    expected = [gradient(plain, x) for x in xs]
    for number in range(3):
        results: list[Any] = []
        read = bytes_read(
            lazy, lambda results=results: results.extend(pylomin.lockstep(lazy, xs, lambda x: gradient(lazy, x)))
        )
        assert_same(expected, results)
        # At first nobody knows that what the last input uses last in its forward it uses again.
        assert read <= 2 * LAYERS * LAYER_BYTES or number == 0
    assert_nothing_left(lazy)


def test_hidden_states_of_all_but_one_are_small() -> None:
    """Inside a block there is a large hidden state, between them there is none."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            wide = x.repeat(200, 1).tanh().view(200, *x.shape).mean(0)
            return self.second(wide)  # type: ignore[no-any-return]

    lazy = pylomin.lazy_loading(nn.Sequential(*(Wide() for _ in range(3))))
    with torch.no_grad():
        peaks = []
        for count in (1, 20):
            xs = [torch.randn(10, 64) for _ in range(count)]
            with pylomin.peak_memory(lazy) as peak:
                pylomin.lockstep(lazy, xs)
            peaks.append(peak.tensor_bytes - peak.weight_bytes)
    transient = 200 * 10 * 64 * 4
    assert peaks[0] >= transient
    assert peaks[1] <= peaks[0] + 20 * 4 * 10 * 64 * 4


# -- exceptions, interrupts --------------------------------------------------------------------------


def failing(model: nn.Sequential) -> Callable[[tuple[int, Tensor]], Tensor]:
    def fn(item: tuple[int, Tensor]) -> Tensor:
        x = item[1]
        for number, layer in enumerate(model):
            if number == 3 and item[0] % 3 == 1:
                raise ArithmeticError(f"input {item[0]}")
            x = layer(x)
        return x

    return fn


def test_exceptions_in_the_place_of_results() -> None:
    plain, lazy = pair(SizedLinears(LAYERS, SIZE))
    xs = inputs(7)
    results = pylomin.lockstep(lazy, enumerate(xs), failing(lazy), return_exceptions=True)
    for index, result in enumerate(results):
        if index % 3 == 1:
            assert isinstance(result, ArithmeticError)
            assert str(result) == f"input {index}"
        else:
            assert_same(plain(xs[index]), result)
    assert resident_bytes(lazy) == 0
    assert_nothing_left(lazy)


def test_the_first_exception_ends_all() -> None:
    plain, lazy = pair(SizedLinears(LAYERS, SIZE), int(3.2 * LAYER_BYTES), prefetch=True)
    xs = inputs(40)
    ended = []

    def fn(item: tuple[int, Tensor]) -> Tensor:
        try:
            return failing(lazy)(item)
        except Exception:
            raise
        except BaseException:
            ended.append(item[0])
            raise

    with pytest.raises(ArithmeticError, match="input 1") as caught:
        pylomin.lockstep(lazy, enumerate(xs), fn)
    assert getattr(caught.value, "__notes__", ["in lockstep, input 1 of 40"]) == ["in lockstep, input 1 of 40"]
    assert 0 < len(ended) < 32
    assert_nothing_left(lazy)
    assert_same(plain(xs[0]), lazy(xs[0]))
    assert_same([plain(x) for x in xs], pylomin.lockstep(lazy, xs))


def test_an_interrupt_ends_all() -> None:
    plain, lazy = pair(SizedLinears(LAYERS, SIZE), prefetch=True)
    xs = inputs(40)
    finished = []

    def fn(item: tuple[int, Tensor]) -> Tensor:
        if item[0] == 20:
            signal.raise_signal(signal.SIGINT)
        for _ in range(200):
            result: Tensor = lazy(item[1])
            finished.append(item[0])
        return result

    with pytest.raises(KeyboardInterrupt):
        pylomin.lockstep(lazy, enumerate(xs), fn)
    assert len(finished) < 40 * 200
    assert_nothing_left(lazy)
    assert_same([plain(x) for x in xs[:3]], pylomin.lockstep(lazy, xs[:3]))


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("fails", [3, 4])
def test_a_read_that_fails(prefetch: bool, fails: int) -> None:
    model = SizedLinears(LAYERS, SIZE)
    state = copy.deepcopy(model.state_dict())
    broken = False

    def weights(module: str, names: list[str]) -> dict[str, Tensor]:
        if broken and f"{fails}.weight" in names:
            raise OSError("the disk is gone")
        return {name: state[name].clone() for name in names}

    lazy = pylomin.load(lambda: SizedLinears(LAYERS, SIZE), weights)
    if prefetch:
        pylomin.prefetch(lazy)
    xs = inputs(5)
    expected = [model(x) for x in xs]
    assert_same(expected, pylomin.lockstep(lazy, xs))
    broken = True
    results = pylomin.lockstep(lazy, xs, return_exceptions=True)
    assert all(isinstance(result, OSError) for result in results)
    with pytest.raises(OSError, match="the disk is gone"):
        pylomin.lockstep(lazy, xs)
    assert_nothing_left(lazy)
    broken = False
    assert_same(expected, pylomin.lockstep(lazy, xs))


def test_a_worker_that_keeps_memory_others_need_gets_an_error_not_a_hang() -> None:
    _, lazy = pair(SizedLinears(LAYERS, SIZE), int(2.2 * LAYER_BYTES))
    (residency,) = residencies_of(lazy)

    def hog(index: int) -> Tensor:
        own = [parameter.weight for parameter in lazy[index].parameters()]
        with residency.hold(own):
            return lazy[5](torch.ones(1, SIZE))  # type: ignore[no-any-return]

    results = run_in_thread(lambda: pylomin.lockstep(lazy, range(3), hog, return_exceptions=True))
    assert any(isinstance(result, pylomin.BudgetError) for result in results)
    assert_nothing_left(lazy)


# -- beside others -----------------------------------------------------------------------------------


def test_other_threads_use_the_model_meanwhile() -> None:
    plain, lazy = pair(SizedLinears(LAYERS, SIZE), int(6.2 * LAYER_BYTES), prefetch=True)
    xs = inputs(8)
    expected = [plain(x) for x in xs]

    def together() -> Any:
        return [pylomin.lockstep(lazy, xs) for _ in range(4)]

    def alone() -> Any:
        return [[lazy(x) for x in xs] for _ in range(4)]

    for results in run_in_threads([together, alone, alone]):
        assert_same([expected] * 4, results)
    assert_nothing_left(lazy)


def test_what_is_refused() -> None:
    lazy = pylomin.lazy_loading(Mlp())
    x = torch.ones(2, 8)
    with pytest.raises(pylomin.PassError, match="runs in lockstep already"):
        pylomin.lockstep(lazy, [x], lambda x: pylomin.lockstep(lazy, [x]))
    for wrong in (x, {"x": x}, "text", 5):
        with pytest.raises(TypeError, match="expected an iterable of inputs"):
            pylomin.lockstep(lazy, wrong)
    for number in (0, True, 2.5):
        with pytest.raises(pylomin.PassError, match="max_in_flight is"):
            pylomin.lockstep(lazy, [x], max_in_flight=number)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        pylomin.lockstep(len, [x])
    assert_nothing_left(lazy)


def test_progress() -> None:
    lazy = pylomin.lazy_loading(Mlp())
    seen: list[tuple[int, int]] = []
    pylomin.lockstep(lazy, [torch.ones(2, 8)] * 4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    pylomin.lockstep(lazy, [torch.ones(2, 8)] * 4, progress=True)

    def fail(done: int, total: int) -> None:
        raise LookupError(f"{done} of {total}")

    kind, text = outcome(lambda: pylomin.lockstep(lazy, [torch.ones(2, 8)] * 4, progress=fail, return_exceptions=True))
    assert (kind, text) == ("LookupError", "1 of 4")
    assert_nothing_left(lazy)


def test_prefetching_goes_on_as_before() -> None:
    _, lazy = pair(SizedLinears(LAYERS, SIZE), int(3.2 * LAYER_BYTES))
    pylomin.prefetch(lazy, depth=3)
    pylomin.lockstep(lazy, inputs(3))
    (residency,) = residencies_of(lazy)
    assert residency.depth == 3
    before = pylomin.stats(lazy).prefetched
    for _ in range(4):
        lazy(inputs(1)[0])
    assert pylomin.stats(lazy).prefetched > before


def test_the_next_group_is_read_while_inputs_compute() -> None:
    """Also where all groups are alike, and the window has just room for two."""
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(24)))  # 1 MiB each
    model = pylomin.prefetch(pylomin.lazy_loading(model, memory_budget="8MiB", reading_mode="buffered"))
    inputs = list(torch.randn(4, 1, 512))
    with torch.no_grad():
        for _ in range(2):
            model(inputs[0])
        pylomin.lockstep(model, inputs)
        before = pylomin.stats(model)
        pylomin.lockstep(model, inputs)
    after = pylomin.stats(model)
    streamed = (after.bytes_read - before.bytes_read) >> 20
    assert streamed >= 24 - 8
    assert after.prefetched - before.prefetched >= streamed - 2
