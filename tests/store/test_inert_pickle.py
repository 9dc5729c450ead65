"""Pickles, good and hostile ones. Nothing in them is ever imported or called."""

from __future__ import annotations

import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pylomin.errors import StoreFormatError
from pylomin.io.files import WeightFile
from pylomin.store import inert_pickle
from pylomin.store.cursor import Cursor
from pylomin.store.inert_pickle import Global, Inert, read_pickle
from pylomin.store.open import open_store
from pylomin.store.torch_objects import TorchObjects

MARKER = "pylomin-was-here"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def parse(raw: bytes, directory: Path) -> object:
    path = directory / "x.pkl"
    path.write_bytes(raw)
    file = WeightFile(path)
    objects = TorchObjects(str(path))
    try:
        return read_pickle(Cursor(file, 0, len(raw), "the pickle"), objects.rebuild, objects.persistent)
    finally:
        file.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pickles")


# -- plain values -----------------------------------------------------------------------------------------------------

scalars = (
    st.none() | st.booleans() | st.integers(-(1 << 80), 1 << 80) | st.floats(allow_nan=False) | st.text() | st.binary()
)
keys = st.text() | st.integers() | st.none() | st.binary()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner, max_size=5).map(tuple),
    max_leaves=20,
)


@settings(max_examples=100, deadline=None)
@given(value=values, protocol=st.integers(3, 5))
def test_plain_values_are_as_pickle_reads_them(directory, value, protocol):
    assert parse(pickle.dumps(value, protocol), directory) == value


def test_old_text(directory):
    """As Python 2 wrote it."""
    assert parse(b"\x80\x02U\x03abcq\x00.", directory) == "abc"
    assert parse(b"\x80\x02T\x03\x00\x00\x00ab\xe9.", directory) == "abé"


def test_shared_and_cyclic_values(directory):
    shared = [1]
    first, second = parse(pickle.dumps([shared, shared], 2), directory)
    assert first is second
    cyclic: list[object] = []
    cyclic.append(cyclic)
    found = parse(pickle.dumps(cyclic, 2), directory)
    assert found[0] is found


@pytest.mark.parametrize("protocol", [2, 4])
def test_ordered_dicts_with_state(directory, protocol):
    value = OrderedDict([("a", 1), ("b", 2)])
    value._metadata = {"version": 1}
    assert parse(pickle.dumps(value, protocol), directory) == {"a": 1, "b": 2}


def test_old_ordered_dicts(directory):
    """Python 2 gave the pairs as an argument."""
    pairs = b"]]" + text("a") + b"aK\x01aa"
    assert parse(b"\x80\x02ccollections\nOrderedDict\n" + pairs + b"\x85R.", directory) == {"a": 1}


# -- code -------------------------------------------------------------------------------------------------------------


class Attack:
    """What it returns from ``__reduce__`` is called when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def write_marker(path: str) -> None:
    Path(path).write_text("x")


def attacks(marker: str) -> dict[str, bytes]:
    """Pickles that write a file when they are unpickled by Python."""
    code = f"open({marker!r}, 'w').close()"
    attack = Attack(exec, code)
    reduce = pickle.dumps(attack, 2)
    quoted = repr(code).encode()
    return {
        "reduce": reduce,
        "reduce of protocol 4": pickle.dumps(attack, 4),
        "nested": pickle.dumps({"state_dict": OrderedDict(w=torch.Size([1])), "x": [(attack,)]}, 2),
        "in place of a tensor": pickle.dumps({"w": attack}, 2),
        "as a key": pickle.dumps({"state_dict": {Attack(eval, code): 1}}, 2),
        "as a dict": b"\x80\x02c__builtin__\nexec\n(X" + struct.pack("<I", len(code)) + code.encode() + b"tR}b.",
        "system": pickle.dumps(Attack(__import__("os").system, f"touch {marker}"), 2),
        "inst": b"(S" + quoted + b"\ni__builtin__\nexec\n.",
        "obj": b"(c__builtin__\nexec\nS" + quoted + b"\no.",
        "global of protocol 0": b"c__builtin__\nexec\n(S" + quoted + b"\ntR.",
        "newobj": b"\x80\x02c__builtin__\nexec\nX" + struct.pack("<I", len(code)) + code.encode() + b"\x85\x81.",
        "newobj_ex": b"\x80\x04c__builtin__\nexec\nX" + struct.pack("<I", len(code)) + code.encode() + b"\x85}\x92.",
        "through an allowed name": pickle.dumps(Attack(getattr, "x", "upper"), 2),
        "through torch._utils": b"\x80\x02ctorch._utils\n_import_dotted_name\nX\x09\x00\x00\x00os.system\x85R.",
        "dotted": b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys.__class__") + b"\x93)R.",
        "a rebuilt type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n)}tR.",
        "extension": b"\x80\x02\x82\x01.",
        "persistent": b"\x80\x02cos\nsystem\nQ.",
        "persistent of protocol 0": b"Pabc\n.",
        "build": b"\x80\x02cos\nsystem\n}X\x01\x00\x00\x00aK\x01sb.",
    }


def zipped(raw: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", raw)
        file.writestr("x/byteorder", b"little")
        file.writestr("x/data/0", b"\0" * 64)
    return path


def legacy(raw: bytes, path: Path) -> Path:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, system)]
    path.write_bytes(b"".join([*head, raw, pickle.dumps([], 2)]))
    return path


@pytest.mark.parametrize("kind", attacks("x"))
@pytest.mark.parametrize("write", [zipped, legacy])
def test_no_code_runs(kind, write, tmp_path):
    marker = tmp_path / MARKER
    raw = attacks(str(marker))[kind]
    for first in (raw, b"\x80\x02}" + raw.removeprefix(b"\x80\x02")):
        with pytest.raises(StoreFormatError):
            open_store(write(first, tmp_path / "x.bin"))
    assert not marker.exists()


def test_the_attacks_would_work(tmp_path):
    """Some of them in Python's own Unpickler, so that the test above shows something."""
    for kind in ("reduce", "reduce of protocol 4", "nested", "system", "inst", "obj", "global of protocol 0"):
        marker = tmp_path / kind
        pickle.loads(attacks(str(marker))[kind])
        assert marker.exists()


def test_imports_nothing(directory):
    """Even an allowed name stays a name."""
    assert "wsgiref" not in sys.modules
    with pytest.raises(StoreFormatError, match=r"asks to call wsgiref\.validate"):
        parse(b"\x80\x02cwsgiref\nvalidate\n)R.", directory)
    assert parse(b"\x80\x02cwsgiref\nvalidate\n.", directory) == Global("wsgiref", "validate")
    assert "wsgiref" not in sys.modules
    assert isinstance(parse(b"\x80\x02cpathlib\nPosixPath\nX\x01\x00\x00\x00a\x85R.", directory), Inert)


# -- resources --------------------------------------------------------------------------------------------------------


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n("
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"%stQ"
WITH_STORAGE = TENSOR + STORAGE % b"K\x03"
FROM_TYPE = b"ctorch._tensor\n_rebuild_from_type_v2\n"
CALL = b"(" + FROM_TYPE + b"ctorch\nTensor\n"
BOMBS = {
    "text": b"\x80\x02X\xff\xff\xff\xff.",
    "text of 64 bits": b"\x80\x04\x8d" + b"\xff" * 8 + b".",
    "bytes": b"\x80\x03B\xff\xff\xff\x7f.",
    "bytes of 64 bits": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "bytearray": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00.",
    "long": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "memo": b"\x80\x02Nr\xff\xff\xff\xffj\xfe\xff\xff\xff.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xff.",
    "name": b"\x80\x02c" + b"a" * 5_000 + b"\n.",
    "no end": b"\x80\x02" + b"(" * 5_000,
    "deep lists": b"\x80\x02" + b"]" * 5_000 + b"a" * 4_999 + b".",
    "deep tuples": b"\x80\x02)" + b"\x85" * 5_000 + b".",
    "deep tuple as a key": b"\x80\x02})" + b"\x85" * 5_000 + b"Ns.",
    "wide tuple as a key": b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"}h\x00Ns.",
    "deep calls": b"\x80\x02" + FROM_TYPE + CALL * 2000 + b")" + b"}t" * 2000 + b"R.",
    "deep argument": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)" + b"\x85" * 5_000 + b"R.",
    "wide argument": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)q\x00" + b"h\x00h\x00\x86q\x00" * 100 + b"R.",
    "many marks": b"\x80\x02" + b"(" * 5_000 + b"t" * 5_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs(kind, directory):
    """An error, or a value that nobody looks at, soon and in little memory."""
    tracemalloc.start()
    try:
        for write in (zipped, legacy):
            with pytest.raises(StoreFormatError) as caught:
                open_store(write(BOMBS[kind], directory / "x.bin"))
            assert len(str(caught.value)) < 5000
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100 << 20


def test_more_opcodes_than_any_checkpoint_has(directory, monkeypatch):
    monkeypatch.setattr(inert_pickle, "_MAX_OPCODES", 1000)
    with pytest.raises(StoreFormatError, match="has more than 1000 opcodes"):
        parse(b"}" * 1001, directory)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "ends too early"),
        (b"\x80\x02", "ends too early"),
        (b"\x80\x02.", "takes from an empty stack"),
        (b"\x80\x02(.", "takes from an empty stack"),
        (b"\x80\x02Nt.", "lacks a mark"),
        (b"\x80\x02h\x05.", "refers to object 5"),
        (b"\x80\x02NNa.", "appends to what is no list"),
        (b"\x80\x02NNNs.", "sets items of what is no dict"),
        (b"\x80\x02}(Nu.", "sets items of what is no dict"),
        (b"\x80\x02NNR.", "calls what is no function"),
        (b"\x80\x02cos\nsystem\nNR.", "calls what is no function"),
        (b"\x80\x02NNb.", "gives a state to what has none"),
        (b"\x80\x04NN\x93.", "names an object by what is no text"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "not UTF-8"),
        (b"\x80\x02}(" + text("a") + b"N" + text("a") + b"Nu.", "has key 'a' twice"),
        (b"\x80\x02}" + text("a") + b"Ns" + text("a") + b"Ns.", "has key 'a' twice"),
        (b"S'a'\n.", "has opcode b'S', which torch.save does not write"),
        (b"\x80\x02" + TENSOR + b"NK\x00)))NtR.", "a tensor is made by _rebuild_tensor_v2 of"),
        (b"\x80\x02" + WITH_STORAGE + b"J\xff\xff\xff\xff)))NtR.", "a tensor has offset -1"),
        (b"\x80\x02" + WITH_STORAGE + b"K\x00K\x02\x85)NNtR.", "shape .2,., stride ()"),
        (b"\x80\x02" + WITH_STORAGE + b"K\x00\x88\x85K\x01\x85NNtR.", "shape .True,., stride"),
        (b"\x80\x02" + WITH_STORAGE + b"K\x00\x8a\x09" + b"\xff" * 8 + b"\x00\x85K\x01\x85NNtR.", "too large"),
        (b"\x80\x02" + STORAGE % b"J\xff\xff\xff\xff" + b".", "expected one to a storage"),
        (b"\x80\x02" + STORAGE % b"N" + b".", "expected one to a storage"),
        (b"\x80\x02" + STORAGE % b"K\x03" + STORAGE % b"K\x04" + b"\x86.", "has two sizes: 12 and 16"),
    ],
)  # fmt: skip
def test_malformed(raw, message, directory):
    with pytest.raises(StoreFormatError, match=message):
        parse(raw, directory)
