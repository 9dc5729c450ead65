from __future__ import annotations

import argparse
import collections
import io
import itertools
import logging
import pathlib
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pylomin.errors import StoreChangedError, StoreFormatError, StoreReadError
from pylomin.io.files import WeightFile
from pylomin.store.dtypes import STORED_DTYPES
from pylomin.store.extents import StoredWeight
from pylomin.store.torch_legacy import TorchLegacyStore
from pylomin.store.torch_zip import TorchZipStore

from .files import open_descriptors, read_bytes, read_tensor, same_bits, touch_later

Store = TorchZipStore | TorchLegacyStore


def zip_store(value: object, path: Path, **arguments) -> TorchZipStore:
    torch.save(value, path, **arguments)
    return TorchZipStore(path)


def legacy_store(value: object, path: Path, **arguments) -> TorchLegacyStore:
    torch.save(value, path, _use_new_zipfile_serialization=False, **arguments)
    return TorchLegacyStore(path)


def check(store: Store, expected: dict[str, torch.Tensor]) -> None:
    assert set(store) == set(expected)
    for name, tensor in expected.items():
        assert same_bits(read_tensor(store, name), tensor.detach()), name


both = pytest.mark.parametrize("save", [zip_store, legacy_store])


class Point:
    """A class that no allow-list has."""


# -- tensors ----------------------------------------------------------------------------------------------------------

DTYPES = [*STORED_DTYPES, torch.complex128]
# torch writes the others without zip too, but cannot load them.
LOADED_FROM_LEGACY = {torch.float32, torch.bfloat16, torch.complex128, torch.bool, torch.int8, torch.int64}


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(save, dtype, tmp_path):
    raw = torch.arange(48, dtype=torch.uint8)
    tensor = raw.view(dtype) if dtype is not torch.bool else raw % 2 == 0
    store = save({"x": tensor}, tmp_path / "x.pt")
    assert isinstance(store.weight("x"), StoredWeight)
    check(store, {"x": tensor})
    if dtype in LOADED_FROM_LEGACY or save is zip_store:
        check(store, torch.load(tmp_path / "x.pt", weights_only=True))


@st.composite
def views(draw):
    """A tensor that is a view: permuted, sliced, expanded, of any dtype and number of dimensions."""
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    dtype = draw(
        st.sampled_from([torch.float32, torch.float16, torch.uint8, torch.int64, torch.complex128, torch.bool])
    )
    tensor = torch.arange(torch.Size(shape).numel()).to(dtype).view(shape)
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["permute", "slice", "expand", "select", "flatten"]))
        if kind == "permute":
            tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
        elif kind == "expand" and tensor.dim() < 4:
            tensor = tensor.unsqueeze(0).expand(draw(st.integers(0, 3)), *tensor.shape)
        elif kind == "slice" and tensor.dim():
            start, step = draw(st.integers(0, 2)), draw(st.integers(1, 3))
            dim = draw(st.integers(0, tensor.dim() - 1))
            tensor = tensor[(slice(None),) * dim + (slice(start, None, step),)]
        elif kind == "select" and tensor.dim() and tensor.shape[0]:
            tensor = tensor[draw(st.integers(0, tensor.shape[0] - 1))]
        elif kind == "flatten":
            tensor = tensor.flatten()
    return tensor


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("views")


@settings(max_examples=60, deadline=None)
@given(tensors=st.lists(views(), min_size=1, max_size=3), data=st.data())
def test_views(directory, tensors, data):
    value = {str(number): tensor for number, tensor in enumerate(tensors)}
    for save in (zip_store, legacy_store):
        store = save(value, directory / "views.pt")
        check(store, torch.load(directory / "views.pt", weights_only=True))
        for name in value:
            whole = read_bytes(store, name)
            start = data.draw(st.integers(0, len(whole)))
            stop = data.draw(st.integers(start, len(whole)))
            assert read_bytes(store, name, start, stop) == whole[start:stop]
        store.close()


@both
def test_contiguous_tensors_are_extents(save, tmp_path):
    base = torch.arange(24.0).view(4, 6)
    value = {
        "base": base,
        "row": base[2],
        "rows": base[1:3],
        "one": base[:1],
        "thin": base[:, :1][:1],
        "column": base[:, 1],
    }
    store = save(value, tmp_path / "x.pt")
    assert [name for name in value if not isinstance(store.weight(name), StoredWeight)] == ["column"]
    check(store, value)
    starts = [store.location(name).extent.start - store.location("base").extent.start for name in ("row", "rows")]
    assert starts == [48, 24]


@both
def test_shared_storage_is_stored_once(save, tmp_path):
    weight = nn.Parameter(torch.randn(3, 4))
    store = save({"wte": weight, "lm_head": weight, "view": weight.view(12)}, tmp_path / "x.pt")
    extents = {name: store.location(name).extent for name in store}
    assert extents["wte"] == extents["lm_head"] == extents["view"]
    check(store, {"wte": weight, "lm_head": weight, "view": weight.view(12)})


@both
def test_order_is_that_of_the_file(save, tmp_path):
    store = save({str(i): torch.ones(4) * i for i in range(20)}, tmp_path / "x.pt")
    starts = [store.location(name).extent.start for name in store]
    assert starts == sorted(starts)


def test_large_transposed_weight_is_read_in_pieces(tmp_path, monkeypatch):
    weight = torch.arange(3000 * 2000, dtype=torch.float32).view(2000, 3000).t()  # 24 MB
    store = zip_store({"x": weight, "corner": weight[:3, :4]}, tmp_path / "x.pt")
    sizes: list[int] = []
    read = WeightFile.read
    monkeypatch.setattr(
        WeightFile, "read", lambda self, start, to: (sizes.append(sum(map(len, to))), read(self, start, to))[1]
    )
    assert same_bits(read_tensor(store, "x"), weight)
    assert max(sizes) <= 1 << 22
    assert sum(sizes) == weight.nbytes
    sizes.clear()
    assert same_bits(read_tensor(store, "corner"), weight[:3, :4])
    assert sum(sizes) <= 1 << 16


# -- what torch.save writes -------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickle_protocols(save, protocol, tmp_path):
    value = {"weight": torch.arange(3.0), "bias": nn.Parameter(torch.ones(2)), "half": torch.ones(2).half()}
    check(save(value, tmp_path / "x.pt", pickle_protocol=protocol), value)


@both
def test_state_dict_of_a_module(save, tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    check(save(model.state_dict(), tmp_path / "x.pt"), model.state_dict())


@both
def test_attributes_of_tensors(save, tmp_path):
    tensor = torch.arange(3.0)
    tensor.note = "kept by torch.save"
    parameter = nn.Parameter(torch.ones(2))
    parameter.note = "as well"
    check(save({"x": tensor, "y": parameter}, tmp_path / "x.pt"), {"x": tensor, "y": parameter})


@both
def test_empty(save, tmp_path):
    assert len(save({}, tmp_path / "x.pt")) == 0


@pytest.mark.parametrize("alignment", [1, 64, 4096, 16384])
def test_alignment(alignment, tmp_path):
    from torch.utils.serialization import config

    value = {"x": torch.arange(3.0), "y": torch.arange(300.0)}
    with config.patch({"save.storage_alignment": alignment}):
        store = zip_store(value, tmp_path / "x.pt")
    assert all(store.location(name).extent.start % alignment == 0 for name in store)
    check(store, value)


def test_file_objects_and_other_names(tmp_path):
    """The folder in the archive is named after the file; a stream has no name."""
    stream = io.BytesIO()
    torch.save({"x": torch.ones(2)}, stream)
    (tmp_path / "a b.öäü.bin").write_bytes(stream.getvalue())
    check(TorchZipStore(tmp_path / "a b.öäü.bin"), {"x": torch.ones(2)})
    check(zip_store({"x": torch.ones(2)}, tmp_path / "ü.pt"), {"x": torch.ones(2)})


def rewritten(path: Path, change, **entries: bytes) -> Path:
    """A copy of a zip file, by another program, with other entries: name in the folder to bytes."""
    target = path.with_suffix(".changed")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            folder, _, name = info.filename.partition("/")
            content = change(name, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
        for name, content in entries.items():
            new.writestr(f"{folder}/{name}", content)
    return target


def test_big_endian(tmp_path):
    value = {
        "f": torch.arange(6.0).view(2, 3),
        "t": torch.arange(6.0).view(2, 3).t(),
        "b": torch.ones(3, dtype=torch.bool),
    }
    value |= {"c": torch.arange(4).to(torch.complex64), "l": torch.arange(3), "s": torch.tensor(2.0)}
    torch.save(value, tmp_path / "x.pt")
    sizes = {str(key): size for key, size in enumerate((4, 4, 1, 4, 8, 4))}

    def swap(name: str, content: bytes) -> bytes:
        if name == "byteorder":
            return b"big"
        if not name.startswith("data/"):
            return content
        size = sizes[name.removeprefix("data/")]
        return b"".join(content[i : i + size][::-1] for i in range(0, len(content), size))

    path = rewritten(tmp_path / "x.pt", swap)
    check(TorchZipStore(path), torch.load(path, weights_only=True))
    check(TorchZipStore(path), value)


def test_without_byte_order_and_other_records(tmp_path):
    """As torch 1.6 wrote it."""
    torch.save({"x": torch.arange(3.0)}, tmp_path / "x.pt")
    keep = lambda name, content: content if name in ("data.pkl", "version") or name.startswith("data/") else None  # noqa: E731
    check(TorchZipStore(rewritten(tmp_path / "x.pt", keep)), {"x": torch.arange(3.0)})


# -- checkpoints ------------------------------------------------------------------------------------------------------

WEIGHTS = OrderedDict([("layer.weight", torch.arange(6.0).view(2, 3)), ("layer.bias", torch.ones(2))])
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, 3)}}, "param_groups": [{"lr": 0.1}]}
LIGHTNING = {
    "epoch": 3,
    "global_step": 100,
    "pytorch-lightning_version": "2.0",
    "state_dict": WEIGHTS,
    "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
    "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.3), "dirpath": pathlib.PurePosixPath("/x")}},
    "optimizer_states": [OPTIMIZER],
    "lr_schedulers": [],
    "hparams_name": "kwargs",
    "hyper_parameters": {"namespace": argparse.Namespace(a=1), "counts": collections.Counter("ab"), "set": {1, 2}},
    "generator": torch.device("cpu"),
    "dtype": torch.float16,
    "size": torch.Size([2, 3]),
    "bytes": b"abc",
    "complex": 1j,
    "layout": torch.strided,
}


@both
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "checkpoint",
    [
        WEIGHTS,
        LIGHTNING,
        {"state_dict": WEIGHTS},
        {"model": WEIGHTS, "optimizer": OPTIMIZER, "step": torch.tensor(5)},
        {"model_state_dict": WEIGHTS, "ema": WEIGHTS},
        {"checkpoint": {"note": "a"}, "generator": WEIGHTS},
        {"model": {"state_dict": WEIGHTS}},
        {**WEIGHTS, "step": 5, 7: torch.ones(1), "extra": {"x": torch.ones(1)}},
    ],
    ids=["flat", "lightning", "state_dict", "model", "model_state_dict", "only one", "nested", "with others"],
)
def test_checkpoints(save, checkpoint, protocol, tmp_path):
    check(save(checkpoint, tmp_path / "x.ckpt", pickle_protocol=protocol), dict(WEIGHTS))


@both
def test_what_is_no_weight_is_reported(save, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "pylomin"):
        store = save(LIGHTNING, tmp_path / "x.ckpt")
    assert set(store.ignored) == LIGHTNING.keys() - {"state_dict"}
    assert "15 entries are no weights: epoch, global_step" in caplog.text
    assert save(WEIGHTS, tmp_path / "y.ckpt").ignored == ()


def test_a_choice_of_mappings(tmp_path):
    torch.save({"generator": WEIGHTS, "discriminator": {"x": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(StoreFormatError, match=r"tensors under 2 keys: 'generator', 'discriminator'.*state_dict_key="):
        TorchZipStore(tmp_path / "x.pt")
    check(TorchZipStore(tmp_path / "x.pt", state_dict_key="discriminator"), {"x": torch.ones(1)})
    with pytest.raises(StoreFormatError, match=r"no key 'other'; there are 'generator', 'discriminator'"):
        TorchZipStore(tmp_path / "x.pt", state_dict_key="other")


@both
@pytest.mark.parametrize("value", [torch.ones(2), [torch.ones(2)], 3, {"a": 1}, {"a": [torch.ones(1)]}, None])
def test_no_mapping_of_tensors(save, value, tmp_path):
    with pytest.raises(StoreFormatError, match="has no mapping of names to tensors; found: "):
        save(value, tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (lambda: torch.eye(3).to_sparse(), "a sparse tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantized tensor"),
        (lambda: torch.ones(3, device="meta"), "a tensor without values"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj(), "a conjugated or negated view"),
        (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "a conjugated or negated view"),
    ],
)
def test_other_tensors(tensor, kind, tmp_path):
    with pytest.raises(StoreFormatError, match=f"weight 'x' of .* is {kind}; only dense tensors can be read in place"):
        zip_store({"x": tensor()}, tmp_path / "x.pt")
    check(zip_store({"state_dict": WEIGHTS, "other": tensor()}, tmp_path / "y.pt"), dict(WEIGHTS))


@both
def test_a_whole_module(save, tmp_path):
    with pytest.raises(StoreFormatError, match=r"asks to call torch\.nn\.modules\.linear\.Linear, .*state_dict\(\)"):
        save(nn.Linear(2, 2), tmp_path / "x.pt")


@both
def test_other_classes(save, tmp_path):
    with pytest.raises(StoreFormatError, match=r"asks to call .*Point.*runs no code from weight files"):
        save({"x": torch.ones(1), "y": Point()}, tmp_path / "x.pt")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*TorchScript:DeprecationWarning")
def test_torchscript(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "x.pt")
    with pytest.raises(StoreFormatError, match="is a TorchScript archive"):
        TorchZipStore(tmp_path / "x.pt")


# -- the file ---------------------------------------------------------------------------------------------------------


def test_opening_reads_no_weights(tmp_path, monkeypatch):
    torch.save({str(i): torch.ones(1 << 18) for i in range(8)}, tmp_path / "x.pt")  # 8 MiB
    read, counted = WeightFile.read, []

    def count(self, start, buffers):
        counted.append((start, sum(map(len, buffers))))
        read(self, start, buffers)

    monkeypatch.setattr(WeightFile, "read", count)
    store = TorchZipStore(tmp_path / "x.pt")
    extents = [store.location(name).extent for name in store]
    for (start, nbytes), extent in itertools.product(counted, extents):
        assert start + nbytes <= extent.start or start >= extent.stop
    assert sum(nbytes for _, nbytes in counted) < 1 << 14


def test_thousands_of_weights(tmp_path):
    value = {f"layers.{i}.weight": torch.full((2,), float(i)) for i in range(1000)}
    check(zip_store(value, tmp_path / "x.pt"), value)


@both
def test_changed_file(save, tmp_path):
    path = tmp_path / "x.pt"
    store = save({"x": torch.ones(1000), "y": torch.ones(3, 4).t()}, path)
    raw = path.read_bytes()
    path.write_bytes(raw[:-100])
    for name in ("x", "y"):
        with pytest.raises(StoreChangedError, match=f"could not read weight '{name}'.*was changed"):
            read_tensor(store, name)
    path.write_bytes(raw)
    touch_later(path)
    assert torch.equal(read_tensor(store, "x"), torch.ones(1000))
    touch_later(path)
    with pytest.raises(StoreChangedError, match="the next read accepts"):
        read_tensor(store, "y")
    assert torch.equal(read_tensor(store, "y"), torch.ones(3, 4).t())


@both
def test_other_weights_of_the_same_size(save, tmp_path):
    """What describes the weights is as before, so the file counts as mended, but another description does not."""
    path = tmp_path / "x.pt"
    store = save({"x": torch.ones(10)}, path)
    torch.save({"z": torch.ones(10)}, path, _use_new_zipfile_serialization=save is zip_store)
    touch_later(path)
    for _ in range(2):
        with pytest.raises(StoreChangedError):
            read_tensor(store, "x")


@both
def test_failed_opening_closes_the_file(save, tmp_path):
    before = open_descriptors()
    for value in (Point(), 3):
        with pytest.raises(StoreFormatError):
            save(value, tmp_path / "x.pt")
    assert open_descriptors() == before


@both
@pytest.mark.parametrize("kind", [TorchZipStore, TorchLegacyStore])
def test_every_truncation_is_noticed(save, kind, tmp_path):
    save({"x": torch.ones(50), "y": torch.arange(6).view(2, 3).t()}, tmp_path / "x.pt").close()
    raw = (tmp_path / "x.pt").read_bytes()
    for size in range(0, len(raw), 31):
        (tmp_path / "cut.pt").write_bytes(raw[:size])
        with pytest.raises(StoreFormatError):
            kind(tmp_path / "cut.pt")


def test_missing(tmp_path):
    for kind in (TorchZipStore, TorchLegacyStore):
        with pytest.raises(StoreReadError, match="does not exist"):
            kind(tmp_path / "absent.pt")


def test_legacy_of_other_pickles(tmp_path):
    import pickle

    (tmp_path / "x.pt").write_bytes(b"".join(pickle.dumps(i, 2) for i in range(5)))
    with pytest.raises(StoreFormatError, match=r"is a pickle, but not one of torch\.save"):
        TorchLegacyStore(tmp_path / "x.pt")
