"""A forked process uses the stores of its parent, whatever the parent's threads did at that moment."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import pylomin
from pylomin.remote.entry import BLOCK_BYTES
from pylomin.store.base import WeightStore
from tests.forks import in_child
from tests.robustness.common import run_script
from tests.store.files import read_bytes, write_shards

from . import servers
from .servers import Handler, Scripted, Served
from .test_http import several_blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:remote weights cannot all be kept"),
]
LIMIT_S = 60  # for a child; many are alive at a time, and all ask one server
FORKS = int(os.environ.get("PYLOMIN_FORKS", "8"))
LITTLE = 4 * BLOCK_BYTES  # of a cache, which makes every pass fetch


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return several_blocks()


def holds(store: WeightStore, tensors: dict[str, torch.Tensor]) -> bool:
    """Without torch, which cannot compute in the child of a process in which it computed with several threads."""
    return all(read_bytes(store, name) == tensor.numpy().tobytes() for name, tensor in tensors.items())


def slow(handler: Handler, served: Served) -> bool:
    time.sleep(0.01)
    return False


@pytest.mark.parametrize("room", [None, LITTLE], ids=["room", "little room"])
@pytest.mark.parametrize("used", ["opened", "in part", "all"])
def test_parent_and_child_read_on(
    server: Scripted, tensors: dict[str, torch.Tensor], room: int | None, used: str
) -> None:
    store = pylomin.open_store(server.put("m.safetensors", save(tensors)), cache_size=room)
    names = {"opened": [], "in part": ["layers.0.weight"], "all": list(tensors)}[used]
    assert holds(store, {name: tensors[name] for name in names})

    def use() -> bool:
        right = holds(store, tensors)
        store.close()
        return right

    assert in_child(use, LIMIT_S)
    assert holds(store, tensors)
    assert in_child(use, LIMIT_S)
    store.close()


def test_shards_that_the_parent_fetches(server: Scripted, tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The child reads one shard and closes all: what the parent's thread does for the others is not its own."""
    index = write_shards(tmp_path, {f"{i}.safetensors": {name: tensors[name]} for i, name in enumerate(tensors)})
    for path in tmp_path.glob("*.safetensors*"):
        server.put(path.name, path.read_bytes())
    store = pylomin.open_store(f"{server.url}/{index.name}")
    hold = threading.Event()

    def held(handler: Handler, served: Served) -> bool:
        assert hold.wait(LIMIT_S)
        return False

    server.always = held
    asked = len(server.asked)
    for shard in store.files:
        shard.prefetch_hint(0, shard.size_bytes)
    deadline = time.monotonic() + LIMIT_S
    while len(server.asked) < asked + len(tensors):
        assert time.monotonic() < deadline
        time.sleep(0.001)

    def close() -> bool:
        store.close()
        return True

    def read_one_and_close() -> bool:
        return holds(store, {"layers.0.weight": tensors["layers.0.weight"]}) and close()

    assert in_child(close, LIMIT_S)
    server.always = None
    assert in_child(read_one_and_close, LIMIT_S)
    hold.set()
    assert holds(store, tensors)
    store.close()


class Readers:
    """Threads that do something again and again until they are stopped."""

    def __init__(self, *actions: Callable[[], Any]) -> None:
        self._stopped = threading.Event()
        self._errors: list[BaseException] = []
        self._done = [0] * len(actions)
        self._threads = [threading.Thread(target=self._run, args=(i, action)) for i, action in enumerate(actions)]
        for thread in self._threads:
            thread.start()

    def _run(self, i: int, action: Callable[[], Any]) -> None:
        try:
            while not self._stopped.is_set():
                action()
                self._done[i] += 1
        except BaseException as error:
            self._errors.append(error)

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive()
        assert self._errors == []
        assert all(self._done)


def test_forks_in_the_middle_of_everything(server: Scripted, tensors: dict[str, torch.Tensor], cache: Path) -> None:
    """While threads open stores, fetch into the cache and past it, make room in it, and close."""
    server.always = slow
    url = server.put("m.safetensors", save(tensors))
    kept, fetching = pylomin.open_store(url), pylomin.open_store(url, cache_dir=cache / "little", cache_size=LITTLE)
    numbers = itertools.count()

    def fetch() -> None:
        assert holds(fetching, tensors)

    def open_anew() -> None:
        name = f"{next(numbers)}.safetensors"
        store = pylomin.open_store(server.put(name, save(tensors)), cache_size=20 * BLOCK_BYTES)
        assert holds(store, tensors)
        store.close()
        del server.files[name]

    def use() -> bool:
        right = holds(fetching, tensors) and holds(kept, tensors)
        again = pylomin.open_store(url, cache_dir=cache / "child")
        right = right and holds(again, tensors)
        for store in (kept, fetching, again):
            store.close()
        gc.collect()
        return right

    readers = Readers(fetch, fetch, open_anew, open_anew)
    try:
        for _ in range(FORKS):
            assert in_child(use, LIMIT_S)
    finally:
        readers.stop()
    assert holds(kept, tensors)
    kept.close()
    fetching.close()


def test_s3(s3: tuple[int, str], tensors: dict[str, torch.Tensor]) -> None:
    port, bucket = s3
    servers.put_object(port, f"/{bucket}/m.safetensors", save(tensors))
    store = pylomin.open_store(f"s3://{bucket}/m.safetensors", cache_size=LITTLE)
    assert holds(store, tensors)
    readers = Readers(lambda: holds(store, tensors))
    try:
        for _ in range(3):
            assert in_child(lambda: holds(store, tensors), LIMIT_S)
    finally:
        readers.stop()
    store.close()


def test_the_parents_connections_stay(server: Scripted, tensors: dict[str, torch.Tensor]) -> None:
    """A child that drops everything takes nothing from them."""
    stores = [pylomin.open_store(server.put("m.safetensors", save(tensors)), cache_size=LITTLE)]
    connections: set[object] = set()

    def watched(handler: Handler, served: Served) -> bool:
        connections.add(handler.client_address)
        return False

    def drop() -> bool:
        stores.clear()
        gc.collect()
        return True

    server.always = watched
    assert holds(stores[0], tensors)
    before = set(connections)
    assert in_child(drop, LIMIT_S)
    server.always = None
    server.faults = [watched]
    assert holds(stores[0], tensors)
    assert connections == before, "the first one that was free served on"
    stores.pop().close()


def test_a_child_that_ends_normally(server: Scripted, tensors: dict[str, torch.Tensor]) -> None:
    """Exit handlers run there too, and wait for nobody."""
    script = """
    import os, sys, pylomin
    from tests.store.files import read_bytes
    store = pylomin.open_store(sys.argv[1], cache_size="1MiB")
    expected = [read_bytes(store, name) for name in sorted(store)]
    for reads in (False, True):
        pid = os.fork()
        if pid == 0:
            if reads:
                assert [read_bytes(store, name) for name in sorted(store)] == expected
            sys.exit(3)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 3, status
    assert [read_bytes(store, name) for name in sorted(store)] == expected
    print("right")
    """
    done = run_script(script, server.put("m.safetensors", save(tensors)))
    assert (done.stdout, done.returncode) == ("right\n", 0), done.stderr
    assert all("cannot all be kept" in line or line.startswith(" ") for line in done.stderr.splitlines()), done.stderr
