"""The cache directory: bounded, shared between processes, and whole whatever dies."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import pylomin
from pylomin.errors import StoreFormatError
from pylomin.io.descriptor import Descriptor
from pylomin.remote import cache as cache_module
from pylomin.remote import entry as entry_module
from pylomin.remote import fetching
from pylomin.remote.cache import Cache
from pylomin.remote.entry import BLOCK_BYTES, HEADER_BYTES, Entry, read_header
from pylomin.remote.transport import ObjectState
from pylomin.remote.urls import Url
from tests.forks import Child
from tests.store.files import read_bytes

from .servers import Handler, Served
from .test_http import assert_holds, several_blocks

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
LIMIT_S = 60  # for a child


def open_entry(cache: Cache, name: str, blocks: int, tag: str = "1") -> Entry:
    return cache.open(Url.parse(f"https://host/{name}"), ObjectState(blocks * BLOCK_BYTES, tag))


def fill(cache: Cache, entry: Entry, first: int, last: int, byte: bytes = b"x") -> bool:
    if not cache.reserve(entry, last - first):
        return False
    entry.write(first * BLOCK_BYTES, byte * (last - first) * BLOCK_BYTES)
    entry.mark(first, last)
    return True


def stems(cache: Cache) -> set[str]:
    return {path.name for path in Path(cache.directory).glob("*.data")}


def kept_bytes(cache: Cache) -> int:
    return sum(path.stat().st_blocks * 512 for path in Path(cache.directory).glob("*.data"))


class TestEntries:
    def test_blocks_are_there_when_they_are_marked(self, cache):
        kept = Cache(str(cache))
        entry = open_entry(kept, "a", 4)
        assert entry.missing(0, 4 * BLOCK_BYTES) == [(0, 4)]
        assert fill(kept, entry, 1, 2)
        entry.write(2 * BLOCK_BYTES, b"half of a block")
        assert entry.missing(0, 4 * BLOCK_BYTES) == [(0, 1), (2, 4)]
        assert entry.is_local(BLOCK_BYTES, 2 * BLOCK_BYTES)
        assert not entry.is_local(BLOCK_BYTES, 2 * BLOCK_BYTES + 1)
        assert entry.is_local(5, 5)
        kept.close(entry)
        again = open_entry(kept, "a", 4)
        assert again.missing(0, 4 * BLOCK_BYTES) == [(0, 1), (2, 4)]
        assert os.pread(again.data.fd, BLOCK_BYTES, BLOCK_BYTES) == b"x" * BLOCK_BYTES
        kept.close(again)

    def test_another_tag_is_another_file(self, cache):
        kept = Cache(str(cache))
        entry = open_entry(kept, "a", 2)
        fill(kept, entry, 0, 2)
        other = open_entry(kept, "a", 2, tag="2")
        assert other.missing(0, 2 * BLOCK_BYTES) == [(0, 2)]
        kept.close(entry)
        kept.close(other)

    def test_two_see_what_one_brings(self, cache):
        one, two = Cache(str(cache)), Cache(str(cache))
        first, second = open_entry(one, "a", 2), open_entry(two, "a", 2)
        assert first.claim(0, 1)
        assert not second.claim(0, 2)
        assert second.claim(1, 2)
        assert fill(one, first, 0, 1)
        first.unclaim(0, 1)
        assert not second.is_local(0, 1)
        assert not second.refresh(0, 2)
        assert second.is_local(0, BLOCK_BYTES)
        one.close(first)
        two.close(second)

    def test_without_locks_of_open_files_everybody_may_fetch(self, cache, monkeypatch):
        monkeypatch.setattr(entry_module, "_CLAIM", None)
        kept = Cache(str(cache))
        first, second = open_entry(kept, "a", 2), open_entry(kept, "a", 2)
        assert first.claim(0, 2)
        assert second.claim(0, 2)
        first.unclaim(0, 2)
        kept.close(first)
        kept.close(second)

    @pytest.mark.parametrize("kept", [False, True])
    def test_marks_outlive_the_system_only_when_the_bytes_do(self, cache, monkeypatch, kept):
        directory = Cache(str(cache))
        entry = open_entry(directory, "a", 3)
        fill(directory, entry, 0, 2)
        if kept:
            assert entry.keep() is None  # not all is there
        fill(directory, entry, 2, 3)
        directory.close(entry)
        monkeypatch.setattr(cache_module, "boot_id", lambda: "another")
        entry = open_entry(directory, "a", 3)
        assert entry.missing(0, 3 * BLOCK_BYTES) == ([(2, 3)] if kept else [(0, 3)])
        directory.close(entry)

    def test_without_a_name_for_the_boot_only_what_is_on_the_disk_counts(self, cache, monkeypatch):
        monkeypatch.setattr(cache_module, "boot_id", lambda: "")
        directory = Cache(str(cache))
        entry = open_entry(directory, "a", 2)
        fill(directory, entry, 0, 1)
        entry.keep()
        fill(directory, entry, 1, 2)
        directory.close(entry)
        entry = open_entry(directory, "a", 2)
        assert entry.missing(0, 2 * BLOCK_BYTES) == [(1, 2)]
        directory.close(entry)

    def test_whole_files_must_stay_as_they_are(self, cache):
        directory = Cache(str(cache))
        entry = open_entry(directory, "a", 2)
        fill(directory, entry, 0, 2)
        modified_ns = entry.keep()
        assert modified_ns is not None
        directory.seal(entry, modified_ns)
        directory.close(entry)
        (path,) = Path(cache).glob("*.data")
        with path.open("r+b") as file:
            file.write(b"somebody else")
        os.utime(path, ns=(1, 1))
        entry = open_entry(directory, "a", 2)
        assert entry.missing(0, 2 * BLOCK_BYTES) == [(0, 2)]
        directory.close(entry)

    @pytest.mark.parametrize(
        "damage", ["cut data", "cut record", "empty record", "garbage", "no record", "other format"]
    )
    def test_damaged_files_are_not_used(self, cache, damage):
        directory = Cache(str(cache))
        entry = open_entry(directory, "a", 2)
        fill(directory, entry, 0, 2)
        directory.close(entry)
        (data,), (record,) = Path(cache).glob("*.data"), Path(cache).glob("*.blocks")
        if damage == "cut data":
            os.truncate(data, 5)
        elif damage == "cut record":
            os.truncate(record, HEADER_BYTES + 1)
        elif damage == "empty record":
            os.truncate(record, 0)
        elif damage == "garbage":
            record.write_bytes(b"\xff" * record.stat().st_size)
        elif damage == "no record":
            record.unlink()
        else:
            header = json.loads(record.read_bytes()[:HEADER_BYTES])
            text = json.dumps(header | {"format": 99}).encode().ljust(HEADER_BYTES)
            record.write_bytes(text + record.read_bytes()[HEADER_BYTES:])
        entry = open_entry(directory, "a", 2)
        assert entry.missing(0, 2 * BLOCK_BYTES) == [(0, 2)]
        assert fill(directory, entry, 0, 2)
        directory.close(entry)

    def test_nowhere(self):
        entry = Entry.nowhere(3 * BLOCK_BYTES + 1)
        assert entry.missing(0, 4 * BLOCK_BYTES) == [(0, 4)]
        assert entry.bytes_of(3, 4) == (3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 1)
        assert not entry.writable
        assert entry.missing_blocks == 4
        entry.close()


class TestBound:
    def test_what_was_used_longest_ago_goes_first(self, cache):
        kept = Cache(str(cache), 10 * BLOCK_BYTES)
        for name in "abc":
            entry = open_entry(kept, name, 3)
            assert fill(kept, entry, 0, 3)
            kept.close(entry)
            time.sleep(0.02)  # times of files tell the order
        names = stems(kept)
        entry = open_entry(kept, "a", 3)  # used again
        kept.close(entry)
        entry = open_entry(kept, "d", 4)
        assert fill(kept, entry, 0, 4)
        kept.close(entry)
        assert len(stems(kept) & names) == 2
        assert kept_bytes(kept) <= 10 * BLOCK_BYTES
        assert open_entry(kept, "a", 3).is_complete
        assert not open_entry(kept, "b", 3).is_complete

    def test_what_is_in_use_stays(self, cache):
        kept = Cache(str(cache), 4 * BLOCK_BYTES)
        used = open_entry(kept, "a", 3)
        assert fill(kept, used, 0, 3)
        other = open_entry(kept, "b", 3)
        assert fill(kept, other, 0, 1)
        assert not fill(kept, other, 1, 3)
        assert used.is_complete
        kept.close(used)
        assert fill(kept, other, 1, 3), "once it is not in use, it makes room"
        assert kept_bytes(kept) <= 4 * BLOCK_BYTES
        kept.close(other)

    def test_what_was_granted_and_not_used_goes_back(self, cache):
        kept = Cache(str(cache), 400 * BLOCK_BYTES)
        one, two = open_entry(kept, "a", 300), open_entry(kept, "b", 300)
        assert fill(kept, one, 0, 1)
        assert one.granted == cache_module.LEASE_BLOCKS - 1
        assert kept.reserve(two, 100)
        assert not kept.reserve(two, 200)
        kept.close(one)
        assert kept.reserve(two, 200)
        kept.close(two)

    def test_a_smaller_bound_than_before(self, cache):
        kept = Cache(str(cache), 10 * BLOCK_BYTES)
        entry = open_entry(kept, "a", 9)
        assert fill(kept, entry, 0, 9)
        kept.close(entry)
        kept = Cache(str(cache), 5 * BLOCK_BYTES)
        entry = open_entry(kept, "b", 9)
        assert fill(kept, entry, 0, 5)
        assert not fill(kept, entry, 5, 6)
        assert kept_bytes(kept) <= 5 * BLOCK_BYTES
        kept.close(entry)

    def test_files_of_others_are_left_alone(self, cache):
        cache.mkdir()
        for name in ("notes.txt", "a.data", "b.blocks", "0" * 63 + ".data"):
            (cache / name).write_text("mine")
        kept = Cache(str(cache), BLOCK_BYTES)
        for name in "xyz":
            entry = open_entry(kept, name, 1)
            assert fill(kept, entry, 0, 1)
            kept.close(entry)
        for name in ("notes.txt", "a.data", "b.blocks", "0" * 63 + ".data"):
            assert (cache / name).read_text() == "mine"

    def test_what_others_left_half_made_goes(self, cache):
        cache.mkdir()
        (cache / ("0" * 64 + ".data")).write_bytes(b"x" * 100)
        (cache / ("1" * 64 + ".blocks")).write_bytes(b"x" * 100)
        kept = Cache(str(cache), 2 * BLOCK_BYTES)
        entry = open_entry(kept, "a", 1)
        assert fill(kept, entry, 0, 1)
        other = open_entry(kept, "b", 2)
        assert not fill(kept, other, 0, 2)
        assert not (cache / ("0" * 64 + ".data")).exists()
        assert not (cache / ("1" * 64 + ".blocks")).exists()
        kept.close(entry)
        kept.close(other)

    @pytest.mark.parametrize(("text", "blocks"), [(str(2 * BLOCK_BYTES), 2), ("768KiB", 3)])
    def test_the_environment_bounds_it(self, cache, monkeypatch, text, blocks):
        monkeypatch.setenv("PYLOMIN_CACHE_SIZE", text)
        kept = Cache()
        assert kept.directory == str(cache)
        entry = open_entry(kept, "a", 5)
        assert fill(kept, entry, 0, blocks)
        assert not fill(kept, entry, blocks, blocks + 1)
        kept.close(entry)

    def test_an_environment_that_says_nothing(self, monkeypatch):
        monkeypatch.setenv("PYLOMIN_CACHE_SIZE", "much")
        with pytest.raises(StoreFormatError, match="PYLOMIN_CACHE_SIZE is 'much'"):
            Cache()

    def test_by_default_half_of_what_is_free(self, cache, monkeypatch):
        free = 600 * BLOCK_BYTES + cache_module.SPARE_BYTES
        monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: Usage(free))
        kept = Cache(str(cache))
        entry = open_entry(kept, "a", 10_000)
        assert kept.reserve(entry, 500)
        assert not kept.reserve(entry, 900)
        kept.close(entry)


class Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_a_lock_that_is_never_given_back(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "LOCK_S", 0.05)
    cache.mkdir()
    lock = Descriptor(os.open(cache / "lock", os.O_RDWR | os.O_CREAT))
    fcntl.flock(lock.fd, fcntl.LOCK_EX)
    kept = Cache(str(cache))
    entry = open_entry(kept, "a", 1)
    assert not entry.writable
    with pytest.warns(RuntimeWarning, match="another process holds its lock"):
        kept.warn()


def read_all(url: str) -> dict[str, bytes]:
    store = pylomin.open_store(url)
    try:
        return {name: read_bytes(store, name) for name in store}
    finally:
        store.close()


def bytes_of(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def slow(handler: Handler, served: Served) -> bool:
    time.sleep(0.02)
    return False


def test_processes_fill_one_cache_together(server):
    """Each has the right bytes in the end, and hardly any came twice."""
    tensors = {f"{i}": torch.randn(1000, 700) for i in range(10)}  # 28 MB
    content = save(tensors)
    url = server.put("m.safetensors", content)
    server.always = slow
    readers = [Child(lambda: read_all(url), LIMIT_S) for _ in range(3)]
    for reader in readers:
        assert reader.result() == bytes_of(tensors)
    sent = sum(min(stop, len(content)) - start for start, stop in server.ranges("m.safetensors"))
    assert sent <= len(content) + 3 * BLOCK_BYTES + 2 * (4 << 20)


def test_a_process_is_killed_while_it_fills(server, cache):
    tensors = {f"{i}": torch.randn(1000, 700) for i in range(10)}
    content = save(tensors)
    url = server.put("m.safetensors", content)
    served = threading.Semaphore(0)

    def slower(handler: Handler, served_file: Served) -> bool:
        served.release()
        time.sleep(0.05)
        return False

    server.always = slower
    for requests in (2, 4, 6):
        reader = Child(lambda: read_all(url), LIMIT_S)
        for _ in range(requests):
            assert served.acquire(timeout=120)
        time.sleep(0.02)
        os.kill(reader.pid, signal.SIGKILL)
        reader.killed()
        while served.acquire(blocking=False):
            pass
        check_marked_blocks(cache, content)
    server.always = None
    store = pylomin.open_store(url)
    assert_holds(store, tensors)
    store.close()


def check_marked_blocks(cache: Path, content: bytes) -> None:
    """What the record calls whole is so."""
    for record in cache.glob("*.blocks"):
        data = record.with_suffix(".data").read_bytes()
        marks = record.read_bytes()[HEADER_BYTES:]
        for block, mark in enumerate(marks):
            if mark:
                begin = block * BLOCK_BYTES
                assert data[begin : begin + BLOCK_BYTES] == content[begin : begin + BLOCK_BYTES]


def test_what_a_killed_process_was_granted_is_free_again(server, cache):
    content = save(several_blocks())
    url = server.put("m.safetensors", content)
    stores = []

    def open_and_die() -> None:
        stores.append(pylomin.open_store(url))
        os.kill(os.getpid(), signal.SIGKILL)

    Child(open_and_die, LIMIT_S).killed()
    (record,) = cache.glob("*.blocks")
    descriptor = Descriptor(os.open(record, os.O_RDONLY))
    assert read_header(descriptor.fd).granted > 1
    store = pylomin.open_store(url)
    assert read_header(descriptor.fd).granted == 1
    store.close()


def test_who_claims_and_brings_nothing_is_waited_for_a_while(server, cache, monkeypatch):
    monkeypatch.setattr(fetching, "CLAIM_S", 0.1)
    tensors = several_blocks()
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    kept = Cache(str(cache))
    stopped = kept.open(Url.parse(url), store.files[0]._fetcher.state)
    assert stopped.claim(1, 3)
    assert_holds(store, tensors)
    kept.close(stopped)
    store.close()


def test_a_small_cache_holds_a_part_and_the_rest_comes_each_time(server):
    tensors = several_blocks()  # 3.6 MB
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url, cache_size=8 * BLOCK_BYTES)
    with pytest.warns(RuntimeWarning, match="cannot all be kept"):
        assert_holds(store, tensors)
    first = len(server.asked)
    assert_holds(store, tensors)
    again = sum(stop - start for start, stop in server.ranges("m.safetensors")[first:])
    assert 0 < again <= 7 * BLOCK_BYTES
    store.close()


@pytest.mark.parametrize("slow_disk", [False, True])
def test_everything_is_written_out_in_the_end(server, cache, monkeypatch, slow_disk):
    """Then another boot does not matter."""
    tensors = several_blocks()
    if slow_disk:  # the last block comes while others are written out
        last_has_come = threading.Event()
        keep, mark = Entry.keep, Entry.mark

        def slow_keep(entry: Entry) -> int | None:
            modified_ns = keep(entry)
            assert last_has_come.wait(60)
            return modified_ns

        def telling_mark(entry: Entry, first: int, last: int) -> None:
            mark(entry, first, last)
            if entry.is_complete:
                last_has_come.set()

        monkeypatch.setattr(fetching, "KEEP_BYTES", 1)
        monkeypatch.setattr(Entry, "keep", slow_keep)
        monkeypatch.setattr(Entry, "mark", telling_mark)
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    assert_holds(store, tensors)
    store.close()
    (record,) = cache.glob("*.blocks")
    descriptor = Descriptor(os.open(record, os.O_RDONLY))
    assert read_header(descriptor.fd).sealed_ns is not None
    assert set(record.read_bytes()[HEADER_BYTES:]) == {entry_module._KEPT}
