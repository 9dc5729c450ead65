"""Files that are missing, damaged or changed, and disks that fail: an error that says so, and a model that recovers."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pylomin

from .common import (
    Stack,
    assert_nothing_held,
    forward,
    group_bytes,
    in_prefetch_thread,
    inputs,
    only_residency,
    prefetch_threads,
    run_in_thread,
    stack_pair,
)


def saved(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(saved(Stack(3)), path)
    return path


@pytest.fixture(params=[0, 1], ids=["", "prefetch"])
def streamed(request: pytest.FixtureRequest, path: Path) -> nn.Module:
    """A model over ``path`` that has run twice."""
    model = pylomin.load(Stack, path) if request.param > 1 else pylomin.load(lambda: Stack(3), path)
    if request.param:
        pylomin.prefetch(model)
    forward(model, inputs())
    forward(model, inputs())
    return model


def overwrite(path: Path, content: bytes) -> None:
    """In place, with a later modification time."""
    later = path.stat().st_mtime_ns + 10**9
    with open(path, "r+b") as file:
        file.truncate(0)
        file.write(content)
    os.utime(path, ns=(later, later))


def fails(model: nn.Module, *words: str) -> pylomin.PylominError:
    """A forward raises a PylominError with these words, and holds nothing afterwards."""
    with pytest.raises(pylomin.PylominError) as caught:
        run_in_thread(lambda: forward(model, inputs()))
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert_nothing_held(model, resident_bytes=only_residency(model).depth * group_bytes(model))
    return caught.value


def recovers(model: nn.Module, expected: torch.Tensor | None = None, forwards: int = 3) -> None:
    """At most what was read ahead still tells of the fault; then all is well."""
    expected = forward(Stack(3), inputs()) if expected is None else expected
    errors = 0
    for _ in range(forwards):
        try:
            output = run_in_thread(lambda: forward(model, inputs()))
        except pylomin.PylominError:
            errors += 1
        else:
            assert torch.equal(output, expected)
    assert errors <= 1
    assert torch.equal(run_in_thread(lambda: forward(model, inputs())), expected)
    if only_residency(model).depth:
        assert prefetch_threads()
    only_residency(model).set_depth(0)
    assert_nothing_held(model)


# -- after opening ----------------------------------------------------------------------------------------------------


def test_truncated_then_mended(path: Path, streamed: nn.Module) -> None:
    content = path.read_bytes()
    overwrite(path, content[: len(content) // 2])
    for _ in range(3):
        fails(streamed, "weight 'layers.", str(path), "Restore the file")
    overwrite(path, content)
    recovers(streamed)


def test_emptied_then_mended(path: Path, streamed: nn.Module) -> None:
    content = path.read_bytes()
    overwrite(path, b"")
    fails(streamed, str(path), "found 0 bytes")
    overwrite(path, content)
    recovers(streamed)


def test_grown(path: Path, streamed: nn.Module) -> None:
    content = path.read_bytes()
    overwrite(path, content + b"more")
    fails(streamed, "weight 'layers.", str(path), "changed")
    overwrite(path, content)
    recovers(streamed)


def test_other_values_in_place(path: Path, streamed: nn.Module) -> None:
    """Told once, because results before and after differ; then the new values count."""
    other = Stack(3, seed=7)
    save_file(saved(other), path.with_suffix(".new"))
    overwrite(path, path.with_suffix(".new").read_bytes())
    fails(streamed, "weight 'layers.", str(path), "changed after it was opened")
    recovers(streamed, forward(other, inputs()))


def test_another_layout_in_place(path: Path, streamed: nn.Module) -> None:
    """Never read with the old offsets."""
    content = path.read_bytes()
    tensors = saved(Stack(3))
    save_file({name.replace("layers", "lavers"): tensor for name, tensor in tensors.items()}, path.with_suffix(".new"))
    assert len(path.with_suffix(".new").read_bytes()) == len(content)
    overwrite(path, path.with_suffix(".new").read_bytes())
    for _ in range(3):
        fails(streamed, str(path), "open it again")
    overwrite(path, content)
    recovers(streamed)


def test_touched(path: Path, streamed: nn.Module) -> None:
    os.utime(path)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    fails(streamed, str(path), "changed after it was opened")
    recovers(streamed)


def test_replaced_by_rename(path: Path, streamed: nn.Module) -> None:
    """The file that was opened is still there, without a name."""
    save_file(saved(Stack(3, seed=7)), path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)
    recovers(streamed)


def test_deleted(path: Path, streamed: nn.Module) -> None:
    path.unlink()
    recovers(streamed)


def test_scratch_file_deleted(scratch: Path) -> None:
    x, expected, model = stack_pair(2)
    for file in scratch.rglob("*.safetensors"):
        file.unlink()
    assert torch.equal(forward(model, x), expected)
    del model
    assert list(scratch.iterdir()) == []


def test_scratch_file_truncated(scratch: Path) -> None:
    x, _, model = stack_pair(2)
    (file,) = scratch.rglob("*.safetensors")
    os.truncate(file, 5000)
    fails(model, "weight 'layers.", str(file))
    assert x is not None


# -- reads that fail --------------------------------------------------------------------------------------------------


class FailingReads:
    """Makes ``os.preadv`` fail at chosen calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real = os.preadv
        self.calls = 0
        self.fail: Callable[[int], bool] = lambda call: False
        self.code = errno.EIO
        monkeypatch.setattr(os, "preadv", self.preadv)

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int, *flags: int) -> int:
        self.calls += 1
        if self.fail(self.calls):
            raise OSError(self.code, os.strerror(self.code))
        return self.real(fd, buffers, offset, *flags)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> FailingReads:
    if not hasattr(os, "preadv"):
        pytest.skip("this system has no preadv")
    return FailingReads(monkeypatch)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOMEM])
def test_a_read_error_at_every_layer(path: Path, reads: FailingReads, code: int) -> None:
    model = pylomin.load(lambda: Stack(3), path)
    expected = forward(Stack(3), inputs())
    reads.code = code
    for layer in range(3):
        reads.calls, reads.fail = 0, lambda call, layer=layer: call == layer + 1
        fails(model, f"'layers.{layer}.weight'", str(path), os.strerror(code), "Check the disk")
        reads.fail = lambda call: False
        assert torch.equal(forward(model, inputs()), expected)
    assert_nothing_held(model)


@pytest.mark.parametrize("layers_in_budget", [None, 1, 2, 2.5])
def test_a_read_error_with_a_budget_and_prefetch(
    path: Path, reads: FailingReads, layers_in_budget: float | None
) -> None:
    model = pylomin.prefetch(pylomin.load(lambda: Stack(3), path))
    if layers_in_budget is not None:
        only_residency(model).set_budget(int(layers_in_budget * group_bytes(model)))
    expected = forward(model, inputs())
    torch.testing.assert_close(expected, forward(Stack(3), inputs()))  # tiles of a small budget round differently
    for call in range(1, 8):
        reads.calls, reads.fail = 0, lambda n, call=call: n == call
        kept: list[Exception] = []
        good = 0
        for _ in range(4):
            try:
                good += torch.equal(run_in_thread(lambda: forward(model, inputs())), expected)
            except pylomin.StoreReadError as error:
                kept.append(error)  # alive, with its traceback, while the next forward runs
        assert len(kept) <= 1, [str(error) for error in kept]
        assert good == 4 - len(kept)
        reads.fail = lambda n: False
        assert torch.equal(run_in_thread(lambda: forward(model, inputs())), expected)


def test_a_read_error_only_in_the_background(path: Path, reads: FailingReads) -> None:
    model = pylomin.prefetch(pylomin.load(lambda: Stack(3), path))
    forward(model, inputs())
    forward(model, inputs())
    reads.fail = lambda call: in_prefetch_thread()
    for _ in range(3):
        fails(model, "weight 'layers.", str(path), "Input/output error")
    reads.fail = lambda call: False
    recovers(model)


def test_a_read_that_gives_fewer_bytes_each_time(path: Path, reads: FailingReads) -> None:
    """Short reads are no error."""
    model = pylomin.load(lambda: Stack(3), path)

    def short(fd: int, buffers: Sequence[Any], offset: int, *flags: int) -> int:
        first = memoryview(buffers[0])
        return reads.real(fd, [first[: max(1, len(first) // 2)]], offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", short)
        assert torch.equal(forward(model, inputs()), forward(Stack(3), inputs()))


def test_a_read_error_in_a_lookup(tmp_path: Path, reads: FailingReads) -> None:
    path = tmp_path / "table.safetensors"
    table = torch.randn(100, 16)
    save_file({"weight": table}, path)
    model = pylomin.load(lambda: nn.Embedding(100, 16), path)
    reads.calls, reads.fail = 0, lambda call: call == 1
    tokens = torch.tensor([5, 50])
    with pytest.raises(pylomin.StoreReadError, match=r"'weight'.*table\.safetensors.*Input/output error"):
        forward(model, tokens)
    assert_nothing_held(model)
    assert torch.equal(forward(model, tokens), table[tokens])


def test_a_read_error_in_restore(path: Path, reads: FailingReads) -> None:
    """The model is as it was: offloaded, and working."""
    model = pylomin.prefetch(pylomin.load(lambda: Stack(3), path))
    reads.calls, reads.fail = 0, lambda call: call == 4
    with pytest.raises(pylomin.StoreReadError, match="Input/output error"):
        pylomin.restore(model)
    reads.fail = lambda call: False
    assert only_residency(model).depth == 1
    assert torch.equal(forward(model, inputs()), forward(Stack(3), inputs()))
    pylomin.restore(model)
    assert torch.equal(forward(model, inputs()), forward(Stack(3), inputs()))


def test_a_read_error_in_backward(path: Path, reads: FailingReads) -> None:
    model = pylomin.load(lambda: Stack(3), path)
    x = inputs().requires_grad_()
    loss = model(x).sum()
    reads.calls, reads.fail = 0, lambda call: call == 2
    with pytest.raises(pylomin.StoreReadError, match=r"'layers\.\d\.weight'.*Input/output error"):
        loss.backward()
    assert_nothing_held(model)
    reads.fail = lambda call: False
    model(x).sum().backward()
    assert x.grad is not None
    assert_nothing_held(model)


def test_a_read_error_in_state_dict_values(path: Path, reads: FailingReads) -> None:
    model = pylomin.load(lambda: Stack(3), path)
    state = model.state_dict()
    reads.calls, reads.fail = 0, lambda call: call == 1
    with pytest.raises(pylomin.StoreReadError, match="Input/output error"):
        state["layers.0.weight"].sum()
    assert state["layers.0.weight"].sum() == saved(Stack(3))["layers.0.weight"].sum()
    assert_nothing_held(model)


# -- files that are wrong from the start ------------------------------------------------------------------------------


def refused(weights: Any, *words: str, kind: type[Exception] = pylomin.PylominError) -> None:
    """Both ways of streaming from ``weights`` raise with these words, and the model is as it was."""
    with pytest.raises(kind) as caught:
        pylomin.load(lambda: Stack(3), weights)
    plain = Stack(3)
    expected = forward(plain, inputs())
    with pytest.raises(kind) as again:
        pylomin.lazy_loading(plain, weights=weights)
    for error in (caught, again):
        assert isinstance(error.value, pylomin.PylominError)
        for word in words:
            assert word in str(error.value), str(error.value)
    assert torch.equal(forward(plain, inputs()), expected)
    assert type(plain.layers[0]) is nn.Linear


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start: int, stop: int, dtype: str = "U8", shape: Sequence[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [stop - start] if shape is None else shape, "data_offsets": [start, stop]}


def test_missing(tmp_path: Path) -> None:
    refused(tmp_path / "absent.safetensors", "absent.safetensors", kind=pylomin.StoreReadError)


def test_unreadable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the file's mode were 0, which would not keep the superuser out."""
    really_open = os.open

    def open_others(name: Any, *arguments: Any, **options: Any) -> int:
        if os.fspath(name) == str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return really_open(name, *arguments, **options)

    monkeypatch.setattr(os, "open", open_others)
    refused(path, str(path), "Permission denied", kind=pylomin.StoreReadError)


def test_wrong_shape(path: Path) -> None:
    tensors = saved(Stack(3)) | {"layers.1.bias": torch.ones(5)}
    save_file(tensors, path)
    refused(path, "'layers.1.bias'", str(path), "[5]", "[264]", kind=pylomin.WeightMismatchError)


def test_wrong_dtype(path: Path) -> None:
    tensors = saved(Stack(3))
    tensors["layers.2.weight"] = tensors["layers.2.weight"].half()
    save_file(tensors, path)
    refused(path, "'layers.2.weight'", str(path), "float16", "float32", kind=pylomin.WeightMismatchError)


def test_all_mismatches_are_listed(path: Path) -> None:
    save_file({name: tensor[:-1].clone() for name, tensor in saved(Stack(3)).items()}, path)
    refused(path, *saved(Stack(3)), kind=pylomin.WeightMismatchError)


def test_unknown_names(path: Path) -> None:
    save_file({name.replace("layers.1", "layer.1"): tensor for name, tensor in saved(Stack(3)).items()}, path)
    refused(path, "'layers.1.weight'", "'layers.1.bias'", kind=pylomin.WeightNotFoundError)


FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "holds 0 bytes"),
    "a few bytes": (lambda: b"abc", "holds 3 bytes"),
    "no JSON": (lambda: raw(b"{not json}"), "JSON"),
    "a header longer than the file": (lambda: raw({}, length=10**6), "claims a safetensors header of 1000000 bytes"),
    "a header of 2**63 bytes": (lambda: raw({}, length=2**63), "claims a safetensors header"),
    "a header cut short": (lambda: raw({"a": entry(0, 4)}, b"abcd", length=9), "JSON"),
    "a name twice": (
        lambda: raw(b'{"a":' + json.dumps(entry(0, 4)).encode() + b',"a":' + json.dumps(entry(0, 4)).encode() + b"}"),
        "appears twice",
    ),
    "an overlap": (lambda: raw({"a": entry(0, 4), "b": entry(2, 6)}, b"abcdef"), "overlaps"),
    "a hole": (lambda: raw({"a": entry(0, 4), "b": entry(6, 8)}, b"abcdefgh"), "hole"),
    "an end after the file's": (lambda: raw({"a": entry(0, 4)}, b"ab"), "the file at"),
    "offsets that do not fit the shape": (lambda: raw({"a": entry(0, 4, shape=[5])}, b"abcd"), "expected 5"),
    "a negative offset": (lambda: raw({"a": entry(-4, 0, shape=[4])}, b""), "non-negative"),
    "bytes of nobody": (lambda: raw({"a": entry(0, 4)}, b"abcdef"), "belong to no weight"),
    "an unknown dtype": (lambda: raw({"a": entry(0, 4, dtype="F128")}, b"abcd"), "F128"),
    "a gigantic shape": (lambda: raw({"a": entry(0, 4, shape=[2**62, 2**62])}, b"abcd"), "too large"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_with(name: str, path: Path) -> None:
    make, words = FILES[name]
    path.write_bytes(make())
    refused(path, words, str(path), kind=pylomin.StoreFormatError)


def test_an_index_that_points_outside(tmp_path: Path) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save_file(saved(Stack(3)), tmp_path / "secret.safetensors")
    os.symlink(tmp_path / "secret.safetensors", inside / "link.safetensors")
    index = inside / "model.safetensors.index.json"
    for target in ("../secret.safetensors", str(tmp_path / "secret.safetensors"), "link.safetensors"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(saved(Stack(3)), target)}))
        refused(index, "outside", target.split("/")[-1], kind=pylomin.StoreFormatError)


def test_an_index_with_a_missing_shard(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(saved(Stack(3)), "gone.safetensors")}))
    refused(index, "gone.safetensors", kind=pylomin.StoreReadError)


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no weights", kind=pylomin.StoreFormatError)


def test_descriptors_of_refused_files_are_closed(path: Path) -> None:
    from .common import open_descriptors

    path.write_bytes(raw({"a": entry(0, 4)}, b"ab"))
    with pytest.raises(pylomin.StoreFormatError):
        pylomin.load(lambda: Stack(3), path)
    before = open_descriptors()
    for _ in range(20):
        with pytest.raises(pylomin.StoreFormatError):
            pylomin.load(lambda: Stack(3), path)
    assert open_descriptors() <= before


# -- writes that fail -------------------------------------------------------------------------------------------------


class FailingWrites:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real = os.pwrite
        self.fails = False
        self.code = errno.ENOSPC
        monkeypatch.setattr(os, "pwrite", self.pwrite)

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        if self.fails:
            half = len(data) // 2
            if half and self.code == errno.ENOSPC:
                self.real(fd, data[:half], offset)  # as much as there was room for
            raise OSError(self.code, os.strerror(self.code))
        return self.real(fd, data, offset)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> FailingWrites:
    return FailingWrites(monkeypatch)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_no_room_for_the_scratch_file(scratch: Path, writes: FailingWrites, code: int) -> None:
    model = Stack(2)
    expected = forward(model, inputs())
    writes.fails, writes.code = True, code
    with pytest.raises(pylomin.ScratchError, match=re.escape(str(scratch))) as caught:
        pylomin.lazy_loading(model)
    assert os.strerror(code) in str(caught.value)
    assert "output_dir=" in str(caught.value)
    assert type(model.layers[0]) is nn.Linear
    assert torch.equal(forward(model, inputs()), expected)
    del caught
    assert list(scratch.iterdir()) == []
    writes.fails = False
    pylomin.lazy_loading(model)
    assert torch.equal(forward(model, inputs()), expected)


def test_no_room_in_the_output_directory(tmp_path: Path, writes: FailingWrites) -> None:
    model = Stack(2)
    writes.fails = True
    with pytest.raises(pylomin.ScratchError, match="No space left"):
        pylomin.lazy_loading(model, output_dir=tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    writes.fails = False
    pylomin.lazy_loading(model, output_dir=tmp_path / "out")
    assert torch.equal(forward(model, inputs()), forward(Stack(2), inputs()))


@pytest.mark.parametrize("budget", [None, "5MiB"])
def test_no_room_for_a_write(writes: FailingWrites, budget: str | None) -> None:
    """The old value stays, in memory and in the store."""
    x, expected, model = stack_pair(2, memory_budget=budget)
    with torch.no_grad():
        model.layers[0].bias.mul_(2)
    changed = forward(model, x)
    assert not torch.equal(changed, expected)
    writes.fails = True
    for _ in range(2):
        with pytest.raises(pylomin.ScratchError, match="No space left") as caught, torch.no_grad():
            model.layers[0].bias.mul_(2)
        assert "'layers.0.bias'" in str(caught.value), "the text names the weight"
        assert torch.equal(forward(model, x), changed)
    writes.fails = False
    assert torch.equal(forward(model, x), changed)
    with torch.no_grad():
        model.layers[0].bias.mul_(0.5)
    assert torch.equal(forward(model, x), expected)
    assert_nothing_held(model, resident_bytes=5 << 20 if budget else 0)


class Counting(nn.Module):
    """Writes to its own weights in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(264))
        self.second = nn.Parameter(torch.zeros(264))

    def forward(self) -> tuple[float, float]:
        with torch.no_grad():
            self.first.add_(1)
            self.second.add_(1)
        return float(self.first[0]), float(self.second[0])


@pytest.mark.parametrize("budget", [None, "5MiB"])
def test_no_room_for_a_write_in_a_forward(writes: FailingWrites, budget: str | None) -> None:
    """The forward raises; afterwards each weight has one value, whether or not it is read again from the store."""
    model = pylomin.lazy_loading(Counting(), memory_budget=budget)
    assert model() == (1.0, 1.0)
    writes.fails = True
    with pytest.raises(pylomin.ScratchError, match="No space left"):
        model()
    writes.fails = False
    assert_nothing_held(model, resident_bytes=5 << 20)
    values = [parameter.detach().clone() for parameter in model.parameters()]
    only_residency(model).set_budget(1)  # evicts
    only_residency(model).set_budget(5 << 20)
    again = [parameter.detach().clone() for parameter in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(values, again, strict=True))
    assert all(torch.equal(value, torch.ones(264)) for value in again)
    assert model() == (2.0, 2.0)
    assert_nothing_held(model, resident_bytes=5 << 20)


def test_no_permission_for_the_overlay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, expected, model = stack_pair(1)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    with pytest.raises(pylomin.ScratchError, match="absent"), torch.no_grad():
        model.layers[0].bias.add_(1)
    assert torch.equal(forward(model, x), expected)
    assert_nothing_held(model)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    import gc

    gc.collect()
