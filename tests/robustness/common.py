"""Small models, a store that can be made to wait or fail, and what must be true when nothing runs."""

from __future__ import annotations

import copy
import faulthandler
import gc
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pylomin
from pylomin.lazy.offload import offloaded_slots, residencies_of
from pylomin.residency.residency import Residency
from pylomin.residency.weight import State, Weight
from pylomin.store.base import ReadRequest, WeightInfo
from pylomin.store.memory import MemoryStore

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 264  # a layer's weight has 272 KiB: large enough to be prefetched
PATIENCE_S = 30.0  # after which something that should have ended counts as hanging
PREFETCH_THREAD = "pylomin-prefetch"


class Stack(nn.Module):
    """Large linear layers one after the other."""

    def __init__(self, layers: int = 4, width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=width**-0.5, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def inputs(width: int = WIDTH, seed: int = 1) -> torch.Tensor:
    return torch.randn(2, width, generator=torch.Generator().manual_seed(seed))


def stack_pair(layers: int = 4, **options: Any) -> tuple[torch.Tensor, torch.Tensor, Stack]:
    """An input, the output that the model in memory gives for it, and the model, offloaded."""
    x = inputs()
    model = Stack(layers)
    with torch.no_grad():
        expected = model(x)
    pylomin.lazy_loading(model, **options)
    return x, expected, model


def group_bytes(model: nn.Module) -> int:
    """What the largest layer takes in the ledger."""
    return only_residency(model)._largest_bytes


def forward(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(x)
    return output


def undisturbed(plain: nn.Module, x: torch.Tensor, memory_budget: int | None) -> torch.Tensor:
    """What ``plain``, once offloaded, gives for ``x`` under a budget where nothing disturbs it.

    Its own bits, but where the budget is so small that weights are used by tiles: those may round differently on some
    processors, in the same way every time as long as no weight stays in memory.
    """
    model = pylomin.lazy_loading(copy.deepcopy(plain))
    only_residency(model).set_budget(memory_budget)
    output = forward(model, x)
    assert is_right(model, output, forward(plain, x))
    return output


def is_right(model: nn.Module, output: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether an output of ``model`` has the expected bits; up to rounding if it used weights by tiles just now."""
    if any(weight.tiled for weight in weights_of(model)):
        return torch.allclose(output, expected, rtol=1e-5, atol=1e-5)
    return torch.equal(output, expected)


def only_residency(model: nn.Module) -> Residency:
    (residency,) = residencies_of(model)
    return residency


def weights_of(model: nn.Module) -> list[Weight]:
    return list({parameter.weight: None for _, parameter in offloaded_slots(model)})


def ends(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> bool:
    """Wait until ``condition`` is true, or time is up."""
    if condition():
        return True
    pause = threading.Event()
    for _ in range(int(patience_s / 0.005)):
        pause.wait(0.005)
        if condition():
            return True
    return False


def lock_of(residency: Residency) -> Any:
    """The one lock that guards its state, whichever it is."""
    return next(getattr(residency, name) for name in ("lock", "_lock", "_changed") if hasattr(residency, name))


def settled(residency: Residency, patience_s: float = 5.0) -> bool:
    """No background read is under way."""
    return ends(
        lambda: not any(weight.state is State.LOADING for weight in list(residency._weights.values())), patience_s
    )


def assert_nothing_held(model: nn.Module, *, resident_bytes: int | None = 0) -> None:
    """No weight is pinned or half loaded, nobody owns the lock, the ledger counts what is resident."""
    for residency in residencies_of(model):
        assert_lock_free(residency)
        assert settled(residency), "a background read did not end"
        for weight in weights_of(model):
            assert weight.holds == 0, weight.name
            assert weight.state is not State.LOADING, weight.name
            assert (weight.state is State.RESIDENT) == (weight.tensor is not None), weight.name
        prefetcher = residency._prefetcher
        assert prefetcher is None or ends(lambda p=prefetcher: p.in_flight == 0, 5), "a read that nobody does"  # type: ignore[misc]
        assert not residency._holders
        assert not residency._waiting
        in_use_bytes = residency.pool.in_use_bytes()
        assert resident_bytes is None or in_use_bytes <= resident_bytes, "something stayed in memory"


def assert_lock_free(residency: Residency) -> None:
    """Another thread can take the residency's lock; if not, give it back so that the process can end."""
    lock = lock_of(residency)
    free: list[bool] = []

    def try_it() -> None:
        taken = lock.acquire(timeout=0.5)
        free.append(taken)
        if taken:
            lock.release()

    run_in_thread(try_it)
    if not free[0]:
        while lock._is_owned():
            lock.release()
    assert free[0], "the residency's lock was left taken"


def run_in_thread(function: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Call ``function`` in a thread of its own. Raises what it raises, and AssertionError if it does not end."""
    return run_in_threads([function], patience_s)[0]


def run_in_threads(functions: Sequence[Callable[[], Any]], patience_s: float = PATIENCE_S) -> list[Any]:
    """Call all at the same time. Returns their results; an exception counts as one if there are several functions."""
    results: list[Any] = [None] * len(functions)
    start = threading.Barrier(len(functions))

    def call(index: int) -> None:
        start.wait()
        try:
            results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=call, args=(i,), daemon=True) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience_s)
    hanging = sum(thread.is_alive() for thread in threads)
    if hanging:
        faulthandler.dump_traceback()
    assert not hanging, f"{hanging} of {len(threads)} threads did not end"
    if len(functions) == 1 and isinstance(results[0], BaseException):
        raise results[0]
    return results


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(PREFETCH_THREAD)]


def reads_ended(residency: Residency) -> bool:
    """Whether all background reads end."""
    prefetcher = residency.prefetcher
    assert prefetcher is not None
    return ends(lambda: prefetcher.in_flight == 0)


def in_prefetch_thread() -> bool:
    return threading.current_thread().name.startswith(PREFETCH_THREAD)


def open_descriptors() -> int:
    gc.collect()  # what others left
    return len(os.listdir("/proc/self/fd"))


def resident_set_bytes() -> int:
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


class FaultyStore:
    """Weights that are read as if from a file, and a function that is called before each read."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = MemoryStore(tensors)
        self.before_read: Callable[[list[str]], None] = lambda names: None
        self.reads: list[list[str]] = []  # names, one list for each call

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def info(self, name: str) -> WeightInfo:
        return self._tensors.info(name)

    def describe(self, name: str) -> str:
        return "the faulty store"

    def read(self, requests: Sequence[ReadRequest]) -> None:
        names = [request.name for request in requests]
        self.reads.append(names)
        self.before_read(names)
        self._tensors.read(requests)

    def has_begun(self, count: int) -> bool:
        """So many reads, or more."""
        return len(self.reads) >= count

    def close(self) -> None:
        self._tensors.close()


class Gate:
    """Where a read waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self.opened.wait(PATIENCE_S), "nobody opened the gate"

    def wait_until_reached(self) -> None:
        assert self.reached.wait(PATIENCE_S), "nobody came to the gate"


def faulty_stack(layers: int = 4, **options: Any) -> tuple[torch.Tensor, torch.Tensor, Stack, FaultyStore]:
    """Like :func:`stack_pair`, streamed from a :class:`FaultyStore`."""
    x = inputs()
    model = Stack(layers)
    with torch.no_grad():
        expected = model(x)
    store = FaultyStore({name: p.detach().clone() for name, p in model.named_parameters()})
    pylomin.lazy_loading(model, weights=store, **options)
    return x, expected, model, store


def background_gate(store: FaultyStore, name: str) -> Gate:
    """The next background read of ``name`` waits here."""
    gate = Gate()

    def before_read(names: list[str]) -> None:
        if in_prefetch_thread() and name in names and not gate.opened.is_set():
            gate.wait()

    store.before_read = before_read
    return gate


def run_script(script: str, *arguments: str, timeout_s: float = 60, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh interpreter, from the root of the repository."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
        **options,
    )
