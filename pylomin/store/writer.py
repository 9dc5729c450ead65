"""Writing ``.safetensors`` files with one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from pylomin.errors import OutputExistsError, WeightMismatchError
from pylomin.store.disk import check_room, disk_error, write_at
from pylomin.store.dtypes import nbytes_of
from pylomin.store.header import build_header
from pylomin.store.tensor_bytes import byte_view, contiguous_cpu


@dataclass(frozen=True, slots=True)
class WeightToWrite:
    """A weight that is made only when its turn to be written comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    get_tensor: Callable[[], torch.Tensor]  # called once; any device and strides


def write_safetensors(
    path: str | os.PathLike[str],
    weights: Sequence[WeightToWrite],
    *,
    metadata: Mapping[str, str] | None = None,
    durable: bool = False,
    overwrite: bool = False,
) -> None:
    """Write weights, in the given order, to a safetensors file that appears complete or not at all.

    The file grows under a temporary name beside ``path`` and is renamed when it is whole; on any
    failure it is removed and ``path`` is as before.

    Args:
        path: the file to write; its directory exists.
        weights: what to write. Weights that are used together should follow each other here: then
            one read gets them all.
        metadata: strings for the header.
        durable: True to return only when the file would survive a power failure.
        overwrite: True to replace a file at ``path``.

    Raises:
        OutputExistsError: there is a file at ``path``.
        StoreFormatError: safetensors cannot hold a weight's dtype. Nothing was written.
        WeightMismatchError: a tensor has another dtype or shape than announced.
        ScratchError: no space or no permission, naming directory, needed and free bytes.
    """
    target = os.path.abspath(path)
    directory = os.path.dirname(target)
    header = build_header(((w.name, w.dtype, w.shape) for w in weights), metadata)
    total_bytes = len(header) + sum(nbytes_of(w.dtype, w.shape) for w in weights)
    _check_absent(target, overwrite)
    check_room(directory, total_bytes)
    temporary = os.path.join(directory, f".pylomin-{secrets.token_hex(8)}.tmp")
    output = _Output(temporary, directory, total_bytes)
    try:
        output.open()
        output.append(memoryview(header))
        for weight in weights:
            output.append(_bytes_of(weight))
        output.finish(durable)
        _check_absent(target, overwrite)
        output.rename(target)
    except BaseException:
        output.discard()
        raise
    if durable:
        output.sync_directory()


class _Output:
    """The temporary file; every OSError of its own becomes a ScratchError."""

    def __init__(self, path: str, directory: str, total_bytes: int) -> None:
        self._path = path
        self._directory = directory
        self._total_bytes = total_bytes
        self._fd: int | None = None
        self._position = 0

    def open(self) -> None:
        # Not tempfile: its files are private to the user, and this one follows the umask.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with self._scratch_errors():
            self._fd = os.open(self._path, flags, 0o666)

    def append(self, view: memoryview) -> None:
        assert self._fd is not None
        with self._scratch_errors():
            write_at(self._fd, self._position, view)
        self._position += len(view)

    def finish(self, durable: bool) -> None:
        assert self._fd is not None
        with self._scratch_errors():
            if durable:
                os.fsync(self._fd)
            fd, self._fd = self._fd, None
            # Network file systems may report a full disk only here.
            os.close(fd)

    def rename(self, target: str) -> None:
        with self._scratch_errors():
            os.replace(self._path, target)

    def discard(self) -> None:
        # The failure that led here matters more than one in clearing up after it.
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
        with contextlib.suppress(OSError):
            os.unlink(self._path)

    def sync_directory(self) -> None:
        with self._scratch_errors():
            fd = os.open(self._directory, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            except OSError as error:
                # Some file systems have no such thing as syncing a directory.
                if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
                    raise
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _scratch_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(error, self._directory, self._total_bytes) from error


def _check_absent(target: str, overwrite: bool) -> None:
    if os.path.lexists(target) and (not overwrite or os.path.isdir(target)):
        raise OutputExistsError(
            f"{target!r} already exists. Choose another name, or pass overwrite=True to replace a file."
        )


def _bytes_of(weight: WeightToWrite) -> memoryview:
    tensor = weight.get_tensor()
    if tensor.dtype != weight.dtype or tuple(tensor.shape) != tuple(weight.shape):
        raise WeightMismatchError(
            f"weight {weight.name!r} was to be written with dtype {weight.dtype} and shape "
            f"{tuple(weight.shape)}; the tensor has {tensor.dtype} and {tuple(tensor.shape)}."
        )
    return byte_view(contiguous_cpu(tensor, weight.name))
