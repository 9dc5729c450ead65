"""From weights to a checkpoint: in which order, in which dtype or format, in which files."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Protocol

import torch

from pylomin.errors import OutputExistsError, StoreFormatError, StoreWriteError, WeightNotFoundError
from pylomin.store.disk import disk_error
from pylomin.store.pieces import slices_of
from pylomin.store.progress import Progress, progress_of
from pylomin.store.writer import SUFFIX, WeightToWrite, write_checkpoint

_OTHER_FILES = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".npy", ".json", ".onnx")
# Formats of 8 bits and less mean something together with scales that are stored elsewhere: they stay as they are.
_CASTABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


class Encoder(Protocol):
    """Decides what is stored for a weight: where quantised formats plug in."""

    def encode(self, weight: WeightToWrite) -> Sequence[WeightToWrite]:
        """What to write in the place of ``weight``, next to each other and in one file; it may be ``[weight]``."""
        ...

    def metadata(self, names: Sequence[str]) -> Mapping[str, str]:
        """Strings for the header of the file with these weights; see :data:`pylomin.store.writer.Metadata`."""
        ...


@dataclass(frozen=True, slots=True)
class Cast:
    """An :class:`Encoder` that stores floating-point weights of 16 to 64 bits in another dtype."""

    dtype: torch.dtype

    def encode(self, weight: WeightToWrite) -> list[WeightToWrite]:
        if weight.dtype not in _CASTABLE or weight.dtype == self.dtype:
            return [weight]

        def pieces() -> Iterator[torch.Tensor]:
            for piece in weight.pieces():
                for run in slices_of(piece.detach().contiguous()):
                    yield run.to(self.dtype)

        return [WeightToWrite(weight.name, self.dtype, weight.shape, pieces)]

    def metadata(self, names: Sequence[str]) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True, slots=True)
class SaveOptions:
    """How a checkpoint is written; see :func:`pylomin.save_store`."""

    encoder: Encoder | None = None
    max_shard_bytes: int | None = None
    order: tuple[str, ...] = ()  # of names; the other weights follow
    digests: bool = True
    progress: Progress = None
    overwrite: bool = False


def save_weights(
    weights: Sequence[WeightToWrite],
    path: str | os.PathLike[str],
    options: SaveOptions,
    *,
    metadata: Mapping[str, str],
    aliases: Mapping[str, str],
    where: str,
) -> Path:
    """Write ``weights`` as one checkpoint; returns the path to open.

    Args:
        metadata: for the header of each file.
        aliases: other names that ``options.order`` may call a weight by, and the name that it has.
        where: what the weights are of, for error messages.
    """
    ordered = _in_order(weights, [aliases.get(name, name) for name in options.order], where)
    encoder = options.encoder
    groups = [list(encoder.encode(weight)) if encoder else [weight] for weight in ordered]

    def all_metadata(names: Sequence[str]) -> Mapping[str, str]:
        return {**metadata, **(encoder.metadata(names) if encoder else {})}

    with _target(path) as (directory, stem), progress_of(options.progress, f"Writing {stem}") as progress:
        written = write_checkpoint(
            directory,
            stem,
            _shards(groups, options.max_shard_bytes),
            metadata=all_metadata,
            digests=options.digests,
            overwrite=options.overwrite,
            progress=progress,
        )
    return Path(written)


def _in_order(weights: Sequence[WeightToWrite], order: Sequence[str], where: str) -> list[WeightToWrite]:
    by_name = {weight.name: weight for weight in weights}
    for name in order:
        if name not in by_name:
            similar = get_close_matches(name, by_name, n=1)
            hint = f" Similar: {similar[0]!r}." if similar else ""
            raise WeightNotFoundError(f"order has {name!r}, which is no weight of {where}.{hint}")
    return [by_name[name] for name in dict.fromkeys([*order, *by_name])]


def _shards(groups: Sequence[Sequence[WeightToWrite]], max_bytes: int | None) -> list[list[WeightToWrite]]:
    """Groups in files of at most ``max_bytes`` of weights, but for those that are larger by themselves."""
    shards: list[list[WeightToWrite]] = [[]]
    used_bytes = 0
    for group in groups:
        nbytes = sum(weight.nbytes for weight in group)
        if max_bytes is not None and shards[-1] and used_bytes + nbytes > max_bytes:
            shards.append([])
            used_bytes = 0
        shards[-1].extend(group)
        used_bytes += nbytes
    return shards


@contextlib.contextmanager
def _target(path: str | os.PathLike[str]) -> Iterator[tuple[str, str]]:
    """The directory and the name without suffix that ``path`` means. A directory is made, and removed on failure."""
    target = os.path.abspath(path)
    directory, name = os.path.split(target)
    if name.endswith(SUFFIX) and not os.path.isdir(target):
        yield directory, name.removesuffix(SUFFIX)
        return
    if name.endswith(_OTHER_FILES):
        raise StoreFormatError(
            f"{target!r} would not be a safetensors file. Expected a name that ends in {SUFFIX!r}, or a directory."
        )
    if os.path.lexists(target) and not os.path.isdir(target):
        raise OutputExistsError(f"{target!r} exists and is no directory. Choose another name.")
    made: list[str] = []
    try:
        _make_directories(target, made)
        yield target, "model"
    except BaseException:
        for directory in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        raise


def _make_directories(path: str, made: list[str]) -> None:
    """Like ``os.makedirs``; notes those that had to be made, outermost first."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_directories(parent, made)
    try:
        os.mkdir(path)
    except FileExistsError:
        return  # made by somebody else just now
    except OSError as error:
        raise disk_error(error, parent, 0, StoreWriteError) from error
    made.append(path)
