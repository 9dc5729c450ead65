"""What goes wrong between here and there: each time a clear error or the right bytes, and nothing half-cached."""

from __future__ import annotations

import _thread
import os
import threading
import time

import pytest
import torch
from safetensors.torch import save
from torch import nn

import pylomin
from pylomin.errors import StoreChangedError, StoreReadError
from pylomin.remote import cache as cache_module
from pylomin.remote import download, http
from pylomin.remote import entry as entry_module
from pylomin.remote.entry import BLOCK_BYTES
from tests.store.files import read_tensor, same_bits

from .servers import Handler, Served
from .test_http import assert_holds, assert_no_secrets, several_blocks


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return several_blocks()


def status(code: int, headers: dict[str, str] | None = None):
    def fault(handler: Handler, served: Served) -> bool:
        handler.answer(code, b"said the server", headers)
        return True

    return fault


def cut(nbytes: int):
    """The connection ends after so many bytes of an answer."""

    def fault(handler: Handler, served: Served) -> bool:
        handler.serve(served, cut=nbytes)
        return True

    return fault


def pretending(length: int, cut: int | None = None):
    """Another Content-Length than the range has; and after so many bytes of it, the end."""

    def fault(handler: Handler, served: Served) -> bool:
        handler.serve(served, cut=cut, pretended=length)
        handler.close_connection = True
        return True

    return fault


def fine(handler: Handler, served: Served) -> bool:
    return False


def all_of_it(handler: Handler, served: Served) -> bool:
    handler.answer(200, served.content, {"ETag": served.tag})
    return True


def hang(handler: Handler, served: Served) -> bool:
    time.sleep(2)
    handler.hang_up()
    return True


def test_the_server_dies_in_the_middle(server, tensors):
    url = server.put("m.safetensors", save(tensors))
    server.faults = [cut(1000), fine, cut(0), cut(100_000), cut(1), fine]
    store = pylomin.open_store(url)
    assert_holds(store, tensors)
    asked = server.ranges("m.safetensors")
    assert asked[:2] == [(0, BLOCK_BYTES), (1000, BLOCK_BYTES)], "what came is not asked for again"
    store.close()


def test_the_server_dies_each_time(server, tensors):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    server.always = cut(50)
    with pytest.raises(StoreReadError, match=r"weight 'layers\.3\.weight': reading bytes .* failed 6 times"):
        read_tensor(store, "layers.3.weight")
    server.always = None
    assert_holds(store, tensors)
    store.close()


def test_slow_but_steady_progress_is_no_failure(server, tensors, monkeypatch):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    server.always = cut(300_000)  # more than a block, each time
    assert_holds(store, tensors)
    store.close()


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_states_that_pass(server, tensors, code):
    url = server.put("m.safetensors", save(tensors))
    server.faults = [status(code, {"Retry-After": "0"}), fine, status(code), status(code)]
    store = pylomin.open_store(url)
    assert_holds(store, tensors)
    store.close()


def test_states_that_stay(server, tensors):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    server.always = status(503)
    with pytest.raises(StoreReadError, match="failed 6 times, the last time with: status 503"):
        read_tensor(store, "layers.3.weight")
    store.close()


def test_the_server_says_how_long_to_wait(server, tensors, monkeypatch):
    waits = []
    sleep = download.asyncio.sleep

    async def recorded(delay_s):
        waits.append(delay_s)
        await sleep(0)

    monkeypatch.setattr(download.asyncio, "sleep", recorded)
    url = server.put("m.safetensors", save(tensors))
    server.faults = [status(429, {"Retry-After": "7"}), status(503, {"Retry-After": "99999"}), fine]
    pylomin.open_store(url).close()
    assert waits == [7.0, download.LONGEST_WAIT_S]


@pytest.mark.parametrize(("code", "message"), [(401, "401"), (403, "may not be read: status 403"), (404, "not exist")])
def test_final_answers_are_not_asked_for_twice(server, tensors, code, message):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    server.always = status(code)
    before = len(server.asked)
    with pytest.raises(StoreReadError, match=message):
        read_tensor(store, "layers.5.weight")
    assert len(server.asked) <= before + 2  # blocks of one weight, in one request or two
    server.always = None
    assert_holds(store, tensors)
    store.close()


def test_later_all_of_it_comes(server, tensors):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    server.always = all_of_it
    with pytest.raises(StoreReadError, match="answered a range request with status 200"):
        read_tensor(store, "layers.5.weight")
    store.close()


@pytest.mark.parametrize("length", [10, 10_000_000], ids=["too short", "too long"])
def test_wrong_content_length(server, tensors, length):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    server.always = pretending(length, cut=length)
    with pytest.raises(StoreReadError, match=rf"layers\.5\.weight.*announced {length} bytes for the range"):
        read_tensor(store, "layers.5.weight")
    server.always = None
    assert_holds(store, tensors)
    store.close()


def test_more_than_was_announced(server, tensors):
    """The rest may be seen together with the headers, when the whole answer is no HTTP, or after them."""
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    server.always = pretending(10)
    with pytest.raises(StoreReadError, match=r"layers\.5\.weight.*(announced 10 bytes|failed 6 times)"):
        read_tensor(store, "layers.5.weight")
    server.always = None
    assert_holds(store, tensors)
    store.close()


@pytest.mark.parametrize(
    "content_range",
    ["bytes 0-99/{size}", "bytes 5-1/9", "items 1-2/3", "", "bytes */{size}", "bytes 0-9/*"],
)
def test_wrong_content_range(server, tensors, content_range):
    content = save(tensors)
    url = server.put("m.safetensors", content)
    store = pylomin.open_store(url)

    def fault(handler: Handler, served: Served) -> bool:
        headers = {"ETag": served.tag, "Content-Range": content_range.format(size=len(content))}
        handler.answer(206, b"x" * 100, headers)
        return True

    server.always = fault
    with pytest.raises(StoreReadError, match=r"Download the file|was changed"):
        read_tensor(store, "layers.5.weight")
    server.always = None
    assert_holds(store, tensors)
    store.close()


def test_more_than_was_asked_for(server, tensors):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)

    def fault(handler: Handler, served: Served) -> bool:
        start, stop = server.ranges("m.safetensors")[-1]
        stop = min(stop, len(served.content))
        headers = {"ETag": served.tag, "Content-Range": f"bytes {start}-{stop - 1}/{len(served.content)}"}
        handler.close_connection = True  # which tells where the answer ends
        handler.answer(206, served.content[start:stop] + b"more", headers, length=None)
        return True

    server.always = fault
    with pytest.raises(StoreReadError, match="sends more than it was asked for"):
        read_tensor(store, "layers.5.weight")
    server.always = None
    assert_holds(store, tensors)
    store.close()


def test_compressed_answers(server, tensors):
    url = server.put("m.safetensors", save(tensors), headers={"Content-Encoding": "gzip"})
    with pytest.raises(StoreReadError, match=r"Content-Encoding gzip|ContentEncoding|400"):
        pylomin.open_store(url)


def test_it_changes_between_header_and_weights(server, tensors):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    new = several_blocks(1)
    server.put("m.safetensors", save(new))
    with pytest.raises(
        StoreChangedError, match=r"layers\.4\.weight.*was changed after it was opened: expected .*ETag .* found"
    ):
        read_tensor(store, "layers.4.weight")
    store.close()
    store = pylomin.open_store(url)
    assert_holds(store, new)
    store.close()


def test_it_changes_between_passes(server, tensors):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    assert_holds(store, tensors)
    new = several_blocks(1)
    server.put("m.safetensors", save(new))
    assert_holds(store, tensors)  # all of what was opened is here
    again = pylomin.open_store(url)
    assert_holds(again, new)
    store.close()
    again.close()


@pytest.mark.parametrize("new", [b"", b"short", None], ids=["emptied", "shorter", "gone"])
def test_it_ends(server, tensors, new):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    if new is None:
        del server.files["m.safetensors"]
    else:
        server.put("m.safetensors", new)
    with pytest.raises(StoreReadError, match=r"was changed|does not exist"):
        read_tensor(store, "layers.4.weight")
    store.close()


def test_another_size_with_the_same_tag(server, tensors):
    content = save(tensors)
    url = server.put("m.safetensors", content, tag='"fixed"')
    store = pylomin.open_store(url)
    server.put("m.safetensors", content + b"more", tag='"fixed"')
    with pytest.raises(StoreChangedError, match="was changed"):
        read_tensor(store, "layers.4.weight")
    store.close()


def test_it_changes_while_it_is_opened(server, tensors):
    url = server.put("m.safetensors", save(tensors))

    def fault(handler: Handler, served: Served) -> bool:
        server.put("m.safetensors", save(several_blocks(1)))
        handler.serve(served, cut=100)
        return True

    server.faults = [fault]
    with pytest.raises(StoreChangedError, match="changed while it was opened"):
        pylomin.open_store(url)


def test_a_server_that_says_nothing(server, tensors, monkeypatch):
    monkeypatch.setattr(http, "IDLE_S", 0.1)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    server.always = hang
    with pytest.raises(StoreReadError, match="failed 2 times, the last time with: SocketTimeoutError"):
        read_tensor(store, "layers.4.weight")
    store.close()


def test_nothing_of_a_failed_request_is_used(server, tensors, cache):
    """The bytes that came are in the file; its record does not say so, and nobody else believes it either."""
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    server.always = cut(20_000)
    with pytest.raises(StoreReadError):
        read_tensor(store, "layers.4.weight")
    (record,) = cache.glob("*.blocks")
    marks = record.read_bytes()[entry_module.HEADER_BYTES :]
    assert marks.count(0) == len(marks) - 1, "only what came when it was opened"
    store.close()
    server.always = None
    store = pylomin.open_store(url)
    assert_holds(store, tensors)
    store.close()


def test_secrets_are_not_shown(server, tensors, caplog):
    content = save(tensors)
    server.put("m.safetensors", content)
    url = f"{server.url.replace('//', '//user:hunter2@')}/m.safetensors?X-Amz-Signature=s3cr3t"
    store = pylomin.open_store(url, storage_options={"headers": {"X-Key": "s3cr3t"}})
    assert server.headers[-1]["X-Key"] == "s3cr3t"
    assert server.headers[-1]["Authorization"].startswith("Basic ")
    assert "hunter2" not in store.path + repr(store.files[0]) + store.describe("layers.0.weight")
    for fault in (status(403), status(500), status(404), all_of_it, cut(5), pretending(3), pretending(10_000_000)):
        server.always = fault
        with pytest.raises(StoreReadError) as raised:
            read_tensor(store, "layers.4.weight")
        assert_no_secrets(raised.value)
    server.always = None
    server.put("m.safetensors", content + b"x")
    with pytest.raises(StoreChangedError) as raised:
        read_tensor(store, "layers.4.weight")
    assert_no_secrets(raised.value)
    store.close()
    assert "hunter2" not in caplog.text
    assert "s3cr3t" not in caplog.text


def test_nor_in_the_cache(server, tensors, cache):
    url = f"{server.url.replace('//', '//user:hunter2@')}/m.safetensors?token=s3cr3t"
    server.put("m.safetensors", save(tensors))
    pylomin.open_store(url).close()
    for path in cache.iterdir():
        assert b"hunter2" not in path.read_bytes()
        assert b"s3cr3t" not in path.read_bytes()


def test_another_signature_is_the_same_file(server, tensors):
    server.put("m.safetensors", save(tensors))
    url = f"{server.url}/m.safetensors?part=1"
    store = pylomin.open_store(f"{url}&X-Amz-Signature=one&X-Amz-Date=1")
    assert_holds(store, tensors)
    store.close()
    before = len(server.asked)
    store = pylomin.open_store(f"{url}&X-Amz-Signature=two&X-Amz-Date=2")
    assert_holds(store, tensors)
    store.close()
    assert len(server.asked) == before + 1
    store = pylomin.open_store(f"{server.url}/m.safetensors?part=2")
    assert_holds(store, tensors)
    store.close()
    assert len(server.asked) > before + 2


def test_a_forward_fails_and_works_again(server):
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(400, 400) for _ in range(6)))
    url = server.put("m.safetensors", save(plain.state_dict()))
    model = pylomin.prefetch(pylomin.load(lambda: nn.Sequential(*(nn.Linear(400, 400) for _ in range(6))), url))
    x = torch.randn(2, 400)
    server.always = status(403)
    with torch.inference_mode():
        with pytest.raises(StoreReadError, match=r"could not read weight .*status 403"):
            model(x)
        server.always = None
        assert torch.equal(model(x), plain(x))
    del model


def test_closed_while_somebody_waits(server, tensors):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    asked = threading.Event()

    def fault(handler: Handler, served: Served) -> bool:
        asked.set()
        time.sleep(0.3)
        return False

    server.always = fault
    errors = []

    def read() -> None:
        try:
            read_tensor(store, "layers.4.weight")
        except StoreReadError as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert asked.wait(10)
    store.close()
    reader.join(30)
    assert not reader.is_alive()
    assert len(errors) == 1
    assert "closed" in str(errors[0])


def test_many_threads_fetch_each_byte_once(server, tensors):
    content = save(tensors)
    url = server.put("m.safetensors", content)
    store = pylomin.open_store(url)
    found: dict[int, bool] = {}

    def read(i: int) -> None:
        found[i] = all(same_bits(read_tensor(store, name), tensor) for name, tensor in tensors.items())

    threads = [threading.Thread(target=read, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(12), True)
    assert sum(stop - start for start, stop in server.ranges("m.safetensors")[1:]) + BLOCK_BYTES <= (
        len(content) + BLOCK_BYTES
    )
    store.close()


def test_a_directory_that_cannot_be_written(server, tensors, monkeypatch, cache):
    url = server.put("m.safetensors", save(tensors))
    monkeypatch.setattr(cache_module, "fcntl", Refusing())
    with pytest.warns(RuntimeWarning, match=r"cannot all be kept in .*Read-only file system.*cache_dir="):
        store = pylomin.open_store(url)
    assert_holds(store, tensors)
    assert_holds(store, tensors)
    store.close()


class Refusing:
    """What fcntl is to the cache, on a file system that cannot be written."""

    LOCK_EX = LOCK_SH = LOCK_NB = LOCK_UN = 0

    def flock(self, fd: int, kind: int) -> None:
        raise OSError(30, os.strerror(30))


def test_a_full_directory_that_cannot_be_written_is_used(server, tensors, cache, monkeypatch):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url)
    assert_holds(store, tensors)
    store.close()
    before = len(server.asked)
    real = os.open

    def refusing(path, flags, *more, **named):
        if str(path).startswith(str(cache)) and flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(30, os.strerror(30))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refusing)
    store = pylomin.open_store(url)
    assert_holds(store, tensors)
    store.close()
    assert len(server.asked) == before + 1


def test_the_disk_is_full(server, tensors, monkeypatch, cache):
    url = server.put("m.safetensors", save(tensors))
    left = [1_000_000]
    real = os.pwrite

    def pwrite(fd, data, offset):
        if len(data) > entry_module.HEADER_BYTES:
            left[0] -= len(data)
            if left[0] < 0:
                raise OSError(28, os.strerror(28))
        return real(fd, data, offset)

    monkeypatch.setattr(entry_module.os, "pwrite", pwrite)
    store = pylomin.open_store(url)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert_holds(store, tensors)
    assert_holds(store, tensors)
    store.close()
    monkeypatch.undo()
    monkeypatch.setenv("PYLOMIN_CACHE_DIR", str(cache))
    store = pylomin.open_store(url)
    assert_holds(store, tensors)  # what was kept is whole, the rest comes now
    store.close()


def test_a_nearly_full_disk_is_left_some_room(server, tensors, monkeypatch, cache):
    url = server.put("m.safetensors", save(tensors))
    monkeypatch.setattr(cache_module, "SPARE_BYTES", 1 << 60)
    with pytest.warns(RuntimeWarning, match="there is room for 0 B more"):
        store = pylomin.open_store(url)
    assert_holds(store, tensors)
    store.close()


@pytest.mark.parametrize("room", [None, 1], ids=["into the cache", "past the cache"])
@pytest.mark.filterwarnings("ignore:remote weights cannot all be kept")
def test_an_interrupt_ends_the_wait(server, tensors, room):
    url = server.put("m.safetensors", save(tensors))
    store = pylomin.open_store(url, cache_size=room)

    def fault(handler: Handler, served: Served) -> bool:
        _thread.interrupt_main()
        time.sleep(0.3)
        return False

    server.faults = [fault]
    with pytest.raises(KeyboardInterrupt):
        read_tensor(store, "layers.4.weight")
        time.sleep(1)
    server.faults = []
    assert_holds(store, tensors)
    store.close()


def test_interrupted_reads_leave_the_buffer_alone(server, tensors, monkeypatch):
    """A read past the cache is given up: its bytes go nowhere when they come."""
    from pylomin.remote.file import _Destination
    from pylomin.remote.transport import SinkError

    first, second = bytearray(5), bytearray(5)
    destination = _Destination(100, [memoryview(first), memoryview(second)])
    destination.write(103, b"abcd")
    assert (bytes(first), bytes(second)) == (b"\0\0\0ab", b"cd\0\0\0")
    assert [len(part) for part in destination.slices(102, 107)] == [3, 2]
    destination.abandon()
    with pytest.raises(SinkError):
        destination.write(100, b"x")
    assert bytes(first) == b"\0\0\0ab"
