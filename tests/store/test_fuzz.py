"""Damaged files of every format: an error of ours or weights, never anything else, and never much memory.

``make fuzz`` runs 10,000 examples of each format (PYLOMIN_FUZZ_EXAMPLES) instead of a few hundred.
"""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file

from pylomin.errors import PylominError
from pylomin.store.accelerate_folder import AccelerateFolderStore
from pylomin.store.base import WeightStore
from pylomin.store.file_formats import open_file
from pylomin.store.gguf import GGUFStore
from pylomin.store.npy import NpyStore
from pylomin.store.npz import NpzStore
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.sharded import ShardedStore
from pylomin.store.torch_legacy import TorchLegacyStore
from pylomin.store.torch_zip import TorchZipStore

from .files import read_bytes, write_offload_folder
from .gguf_files import STRING, gguf_file, text

EXAMPLES = int(os.environ.get("PYLOMIN_FUZZ_EXAMPLES", "100"))
MOST_BYTES = 32 << 20
READ_BYTES = 1 << 16  # larger weights are not read: who has no such model never does

WIDE = torch.arange(12.0).view(3, 4)
TENSORS = {"layer.weight": WIDE, "layer.bias": torch.arange(3).to(torch.bfloat16), "t": WIDE.t(), "empty": WIDE[:0]}
PLAIN = {"a": WIDE, "b": torch.arange(5, dtype=torch.int16), "s": torch.tensor(2.0)}
CHECKPOINT = {"state_dict": TENSORS | {"tied": WIDE}, "epoch": 3, "optimizer": [{"lr": 0.1, "x": (None, True, "y")}]}


def write_safetensors(path: Path) -> None:
    save_file(PLAIN, path)


def write_torch_zip(path: Path) -> None:
    torch.save(CHECKPOINT, path)


def write_torch_legacy(path: Path) -> None:
    torch.save(CHECKPOINT, path, _use_new_zipfile_serialization=False)


def write_npy(path: Path) -> None:
    with path.open("wb") as file:
        numpy.save(file, WIDE.t().numpy())


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        numpy.savez(file, **{name: tensor.numpy() for name, tensor in PLAIN.items()})


def write_compressed_npz(path: Path) -> None:
    with path.open("wb") as file:
        numpy.savez_compressed(file, **{name: tensor.numpy() for name, tensor in PLAIN.items()})


def write_gguf(path: Path) -> None:
    values = [text("general.name") + STRING.to_bytes(4, "little") + text("model")]
    blocks = {"q": ((2, 32), 8, bytes(range(68))), "k": ((1, 256), 12, bytes(range(144)))}
    path.write_bytes(gguf_file(PLAIN, blocks=blocks, values=values))


def write_index(path: Path) -> None:
    save_file(PLAIN, path.parent / "one.safetensors")
    torch.save({"c": WIDE}, path.parent / "two.bin")
    weight_map = dict.fromkeys(PLAIN, "one.safetensors") | {"c": "two.bin"}
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_offload_index(path: Path) -> None:
    write_offload_folder(path.parent, PLAIN).rename(path)


FORMATS: dict[str, tuple[Callable[[Path], None], Callable[[Path], WeightStore]]] = {
    "safetensors": (write_safetensors, SafetensorsStore),
    "torch zip": (write_torch_zip, TorchZipStore),
    "torch legacy": (write_torch_legacy, TorchLegacyStore),
    "npy": (write_npy, NpyStore),
    "npz": (write_npz, NpzStore),
    "compressed npz": (write_compressed_npz, NpzStore),
    "gguf": (write_gguf, GGUFStore),
    "shard index": (write_index, ShardedStore),
    "offload index": (write_offload_index, AccelerateFolderStore),
}
EXTREMES = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
]
TEXTS = [
    b"../../etc/passwd",
    b"/etc/passwd",
    b"\0",
    b"\xff",
    b"9" * 30,
    b"-1",
    b"1e400",
    b"NaN",
    b"[[[[",
    b"}",
    b'"',
    b"PK\1\2",
]
TEXTS += [b"cos\nsystem\n", b"(", b"t", b"R", b"u", b".", b"Q", b"\x85", b"X\xff\xff\xff\xff", b"h\0", b"}", b"]"]


def damaged(raw: bytes, generator: random.Random) -> bytes:
    """One to four changes: bytes replaced, numbers and texts written over others, pieces cut, doubled or moved."""
    changed = bytearray(raw)
    for _ in range(generator.randint(1, 4)):
        # Half of them near the ends, where most formats describe themselves.
        near = generator.choice((0, max(0, len(changed) - 200), None, None))
        start = (
            generator.randrange(len(changed) + 1)
            if near is None
            else min(len(changed), near + generator.randrange(200))
        )
        stop = min(len(changed), start + generator.choice((1, 1, 2, 4, 8, 30)))
        piece = bytes(changed[start:stop])
        match generator.randrange(8):
            case 0:
                changed[start:stop] = generator.randbytes(stop - start)
            case 1:
                size = generator.choice((1, 2, 4, 8))
                number = generator.choice(EXTREMES) & ((1 << 8 * size) - 1)
                changed[start : start + size] = number.to_bytes(size, generator.choice(("little", "big")))
            case 2:
                changed[start:stop] = generator.choice(TEXTS)
            case 3:
                new = generator.choice(TEXTS)
                changed[start : start + len(new)] = new
            case 4:
                del changed[start:stop]
            case 5:
                changed[start:start] = piece
            case 6:
                elsewhere = generator.randrange(len(changed) + 1)
                changed[elsewhere : elsewhere + len(piece)] = piece
            case 7 if generator.random() < 0.3:
                del changed[start:]
            case _:
                bit = generator.randrange(8)
                changed[start:stop] = bytes(byte ^ (1 << bit) for byte in piece)
    return bytes(changed)


def check(path: Path, open_store: Callable[[Path], WeightStore]) -> bool:
    """Is the file still valid? It may be, where what was changed is values or names."""
    problems: list[PylominError] = []
    try:
        store = open_store(path)
    except PylominError as error:
        problems.append(error)
    else:
        for name in store:
            info = store.info(name)
            assert info.nbytes == torch.Size(info.shape).numel() * info.dtype.itemsize
            if info.nbytes <= READ_BYTES:
                try:
                    read_bytes(store, name)
                except PylominError as error:
                    problems.append(error)
        store.close()
    assert all(len(str(problem)) < 20_000 for problem in problems)
    return not problems


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files(kind, tmp_path):
    write, open_store = FORMATS[kind]
    path = tmp_path / "good"
    write(path)
    assert check(path, open_store)
    raw = path.read_bytes()
    generator = random.Random(kind)
    target = tmp_path / "damaged"
    valid = 0
    tracemalloc.start()
    try:
        for number in range(EXAMPLES):
            target.write_bytes(damaged(raw, generator))
            try:
                valid += check(target, open_store)
                if number % 10 == 0 and "index" not in kind:
                    check(target, lambda path: open_file(str(path)))
            except BaseException:
                # The next run would not make it again, with other code before it.
                print("damaged file:", target.read_bytes().hex())
                raise
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    assert valid < EXAMPLES * 0.9  # what is tried is damage
