"""``verify``: does every weight still have the bytes that were written?"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.store.base import WeightStore
from pylomin.store.digests import DIGESTS_KEY, layout_digest, new_digest, parse_digests
from pylomin.store.open import open_store
from pylomin.store.pieces import read_pieces
from pylomin.store.progress import Progress, progress_of
from pylomin.store.quantized import QuantizedStore
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.sharded import ShardedStore
from pylomin.store.tensor_bytes import byte_view


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as it was written."""

    name: str | None  # of a weight; None for the header: a name, dtype or shape
    path: str
    problem: str

    def __str__(self) -> str:
        what = "the header" if self.name is None else f"weight {self.name!r}"
        return f"{what} of {self.path!r}: {self.problem}"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What :func:`verify` found."""

    checked: tuple[str, ...]  # weights whose bytes are as they were written
    differences: tuple[Difference, ...]
    without_digest: tuple[str, ...]  # weights of which nothing can be said

    @property
    def ok(self) -> bool:
        """Nothing differs. Weights without a digest do not count."""
        return not self.differences

    def __str__(self) -> str:
        lines = [
            f"{len(self.checked)} weights are as they were written, {len(self.differences)} differences, "
            f"{len(self.without_digest)} without digest",
            *map(str, self.differences),
        ]
        return "\n".join(lines)


def verify(path: str | os.PathLike[str], *, progress: Progress = None) -> VerifyReport:
    """Read every weight and compare it with the digest that its file keeps (:func:`pylomin.save_store` writes it).

    Args:
        path: a safetensors file, a shard index, or a directory with one of them.
        progress: as in :func:`pylomin.save_store`.

    Returns:
        What differs, and which weights have no digest: all of them in a file that another library wrote. A weight that
        cannot be read is a difference, too.

    Raises:
        StoreReadError: a file is missing.
        StoreFormatError: a file is malformed, for instance truncated; nothing was compared.

    >>> import pylomin, tempfile, torch
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = pylomin.save_store({"w": torch.ones(3)}, directory)
    ...     print(verify(path))
    1 weights are as they were written, 0 differences, 0 without digest
    """
    store = open_store(path)
    try:
        with progress_of(progress, "Verifying") as report:
            # Digests are of what is stored.
            return _verify(store.file if isinstance(store, QuantizedStore) else store, report)
    finally:
        store.close()


def _verify(store: WeightStore, progress: Callable[[int, int], None] | None) -> VerifyReport:
    checked: list[str] = []
    differences: list[Difference] = []
    covered: set[str] = set()
    done_bytes, total_bytes = 0, sum(store.info(name).nbytes for name in store)
    for file in _files(store):
        text = file.metadata.get(DIGESTS_KEY)
        if text is None:
            continue
        try:
            layout, digests = parse_digests(text, file.path)
        except StoreFormatError as error:
            differences.append(Difference(None, file.path, str(error)))
            continue
        if layout_digest((name, (info := file.info(name)).dtype, info.shape) for name in file) != layout:
            differences.append(Difference(None, file.path, "a name, dtype or shape is not as it was written"))
        differences += [
            Difference(name, file.path, "has a digest, but is not in the file") for name in digests if name not in file
        ]
        for name in file:
            if name not in digests:
                continue
            covered.add(name)
            problem = _compare(file, name, digests[name])
            if problem is None:
                checked.append(name)
            else:
                differences.append(Difference(name, file.path, problem))
            done_bytes += file.info(name).nbytes
            if progress is not None:
                progress(done_bytes, total_bytes)
    return VerifyReport(tuple(checked), tuple(differences), tuple(name for name in store if name not in covered))


def _files(store: WeightStore) -> Sequence[SafetensorsStore]:
    """Those of the store's files that can keep digests."""
    shards = store.shards if isinstance(store, ShardedStore) else (store,)
    return [shard for shard in shards if isinstance(shard, SafetensorsStore)]


def _compare(file: SafetensorsStore, name: str, expected: str) -> str | None:
    digest = new_digest()
    try:
        for piece in read_pieces(file, name):
            digest.update(byte_view(piece))
    except StoreReadError as error:
        return str(error)
    found = digest.hexdigest()
    return None if found == expected else f"expected sha256 {expected}, found {found}"
