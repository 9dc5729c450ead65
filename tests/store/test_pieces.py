"""Reading weights a piece at a time, past the page cache where they are not in it, and ahead of their use."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pylomin.errors import StoreReadError
from pylomin.io.files import WeightFile
from pylomin.store.pieces import AHEAD, PIECE_BYTES, made_ahead, read_pieces
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.writer import WeightToWrite, write_safetensors

from .files import same_bits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    weights = [WeightToWrite(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]
    write_safetensors(path, weights, metadata=metadata, durable=True)  # nothing of it is in the page cache


def joined(store: SafetensorsStore, name: str) -> torch.Tensor:
    """The pieces; each must still be as it was when the next one comes."""
    copies: list[torch.Tensor] = []
    last: torch.Tensor | None = None
    for piece in read_pieces(store, name):
        assert last is None or same_bits(last, copies[-1])
        copies.append(piece.clone())
        last = piece
    return torch.cat(copies)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("extra", [0, 1, 4095, 70_000])
def test_cold_pieces(path: Path, dtype: torch.dtype, extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    direct: list[int] = []
    read_direct = WeightFile.read_direct

    def count(self: WeightFile, offset_bytes: int, nbytes: int, buffer: memoryview) -> None:
        direct.append(nbytes)
        read_direct(self, offset_bytes, nbytes, buffer)

    numel = 2 * PIECE_BYTES // dtype.itemsize + extra
    tensors = {
        "small": torch.arange(100, dtype=torch.uint8),
        "large": torch.randint(256, (numel * dtype.itemsize,), dtype=torch.uint8).view(dtype),
    }
    write(path, tensors)
    store = SafetensorsStore(path)
    monkeypatch.setattr(WeightFile, "read_direct", count)
    if store.files[0].direct_refused is None and store.files[0].cached_fraction([store.location("large").extent]) == 0:
        assert same_bits(joined(store, "large"), tensors["large"])
        assert sum(direct) == tensors["large"].nbytes
    for name, tensor in tensors.items():
        assert same_bits(joined(store, name), tensor)
    with path.open("rb") as file:
        file.read()  # now it is cached, as far as the system likes
    assert same_bits(joined(store, "large"), tensors["large"])
    store.close()


def test_cold_pieces_of_a_file_that_is_cut_off(path: Path) -> None:
    write(path, {"w": torch.zeros(3 * PIECE_BYTES, dtype=torch.uint8)})
    store = SafetensorsStore(path)
    pieces = read_pieces(store, "w")
    next(pieces)
    os.truncate(path, 2 * PIECE_BYTES)
    with pytest.raises(StoreReadError, match="'w'"):
        list(pieces)
    store.close()


def test_made_ahead_makes_a_few_ahead() -> None:
    made: list[int] = []
    enough = threading.Semaphore(0)

    def items() -> Iterator[int]:
        for number in range(2 * AHEAD):
            made.append(number)
            enough.release()
            yield number

    for number in made_ahead(items()):
        for _ in range(1 + AHEAD if number == 0 else 1 if number + AHEAD < 2 * AHEAD else 0):
            assert enough.acquire(timeout=10)
        assert len(made) == min(number + 1 + AHEAD, 2 * AHEAD)


def test_made_ahead_waits_for_large_items() -> None:
    made: list[int] = []
    for number in made_ahead(iter_and_note(made), beside=lambda item: False):
        assert made == list(range(number + 1))


def iter_and_note(made: list[int]) -> Iterator[int]:
    for number in range(4):
        made.append(number)
        yield number


def test_made_ahead_keeps_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    inside = list(made_ahead((torch.get_num_threads() for _ in range(3)), one_core=True))
    assert inside == [1, 1, 1]
    assert torch.get_num_threads() == before
    others = list(made_ahead(torch.get_num_threads() for _ in range(1)))
    assert others == [before]


def test_what_is_computed_after_the_first_save_uses_all_cores() -> None:
    ask = "import torch, pylomin.store.pieces as p; {} print(torch.get_num_threads())"
    save = "list(p.made_ahead(iter([1]), one_core=True));"
    before, after = (
        subprocess.run([sys.executable, "-c", ask.format(first)], capture_output=True, text=True, check=True).stdout
        for first in ("", save)
    )
    assert after == before


def test_made_ahead_passes_errors_on() -> None:
    def fail() -> Iterator[int]:
        yield 1
        raise ArithmeticError("two")

    items = made_ahead(fail())
    assert next(items) == 1
    with pytest.raises(ArithmeticError, match="two"):
        next(items)


def test_made_ahead_can_be_left() -> None:
    items = made_ahead(iter([1, 2, 3]))
    assert next(items) == 1
    items.close()
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("pylomin-made-ahead")]
