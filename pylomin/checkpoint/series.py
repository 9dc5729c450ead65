"""Checkpoints while training goes on: written in the background, from a snapshot."""

from __future__ import annotations

import contextlib
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from pylomin.checkpoint.checkpoint import Checkpoint, Stateful, build_checkpoint, restore_checkpoint
from pylomin.checkpoint.directory import (
    SaveAs,
    load_checkpoint,
    read_document,
    remove_checkpoint,
    write_checkpoint,
)
from pylomin.checkpoint.encoding import EncodedCheckpoint, encode_checkpoint
from pylomin.checkpoint.snapshot import Snapshot
from pylomin.errors import PassError, PylominError
from pylomin.quantize.choose import Filter, chooser
from pylomin.quantize.lossless import check_available

_NAME = re.compile(r"step-(\d+)")


class CheckpointSeries:
    """The checkpoints of one training run; made by :func:`checkpoints`."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        state: tuple[nn.Module, Stateful, Stateful, Stateful],
        *,
        every: int,
        full_every: int,
        keep: int | None,
        differences: SaveAs,
    ) -> None:
        self.directory = Path(os.path.abspath(directory))
        self.steps = 0
        """How far training is: the number of the last step."""
        self._state = state
        self._every = every
        self._full_every = full_every
        self._keep = keep
        self._differences = differences
        self._snapshot = Snapshot()
        self._since_full = 0
        self._full: Path | None = None  # the reference of the next differences
        self._writer: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def __enter__(self) -> CheckpointSeries:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # What went wrong in the block matters more; but what was begun is brought to its end.
        with contextlib.suppress(Exception):
            self.close()

    def step(self, *, step: int | None = None, epoch: int | float | None = None, **extra: Any) -> bool:
        """Count a step of training, and save if it is one of ``every``. Call it after the optimizer's step.

        Training stands still while the state is copied, and for a save before it that is not written yet.

        Args:
            step: how far training is. Default: one more than at the call before.
            epoch, extra: as in :func:`pylomin.build_checkpoint`.

        Returns:
            Whether a checkpoint is being written now.

        Raises:
            PylominError: an earlier save failed; or something cannot be stored.
        """
        self.steps = self.steps + 1 if step is None else step
        if self.steps % self._every:
            return False
        self.save(epoch=epoch, **extra)
        return True

    def save(self, *, epoch: int | float | None = None, **extra: Any) -> None:
        """Save now, whatever ``every`` says; otherwise like :meth:`step`, which it does not count as."""
        self.wait()
        checkpoint = build_checkpoint(*self._state, epoch=epoch, step=self.steps, **extra)
        encoded = self._snapshot.take(encode_checkpoint(checkpoint))
        target = self.directory / f"step-{self.steps:08d}"
        save_as = SaveAs()
        if self._full is None or self._since_full + 1 >= self._full_every:
            self._full, self._since_full = target, 0
        else:
            save_as = replace(self._differences, reference=self._full)
            self._since_full += 1
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="pylomin-checkpoint")
        self._pending = self._writer.submit(self._write, encoded, target, save_as)

    def wait(self) -> None:
        """Return when what was begun is on disk. Raises what went wrong with it."""
        pending = self._pending
        if pending is None:
            return
        try:
            pending.result()
        finally:
            if pending.done():  # not if the wait was interrupted: what is written still needs the snapshot
                self._pending = None
                if pending.exception() is not None:
                    self._full = None  # it may be the one that failed

    def resume(self) -> Checkpoint | None:
        """Put the newest whole checkpoint back into model, optimizer, scheduler and scaler; count on from its step.

        Returns:
            It; None if there is none.

        Raises:
            CheckpointError: it does not fit.
        """
        self.wait()
        for path in reversed(find_checkpoints(self.directory)):
            try:
                checkpoint = load_checkpoint(path)
            except PylominError:
                continue  # torn or damaged
            restore_checkpoint(checkpoint, *self._state)
            self.steps = checkpoint.step or 0
            self._full = None  # the next one is whole
            return checkpoint
        return None

    def close(self) -> None:
        """Wait for what was begun. Raises what went wrong with it. Idempotent."""
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None

    def _write(self, encoded: EncodedCheckpoint, target: Path, save_as: SaveAs) -> None:
        if os.path.lexists(target) and not _is_whole(target):
            remove_checkpoint(target)
        write_checkpoint(encoded, target, save_as)
        if self._keep is not None:
            _remove_old(self.directory, self._keep)


def checkpoints(
    directory: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Stateful = None,
    scheduler: Stateful = None,
    scaler: Stateful = None,
    *,
    every: int = 1,
    full_every: int = 1,
    keep: int | None = None,
    quantize: str | None = None,
    filter: Filter | None = None,
    max_error: float | None = None,
) -> CheckpointSeries:
    """Save checkpoints of a training run in the background.

    ::

        with pylomin.checkpoints("run", model, optimizer, every=100, keep=3) as series:
            series.resume()
            while series.steps < 10_000:
                train_one_step()
                series.step()

    A save copies the state, which is all that training waits for; another thread writes the copy to
    ``<directory>/step-<number>``, where it appears when it is whole. The memory of the copy is used again for the
    next one. Leaving the block waits for the last one, and raises what went wrong.

    Args:
        directory: of this run alone. It is made when the first checkpoint is written.
        model, optimizer, scheduler, scaler: as in :func:`pylomin.build_checkpoint`.
        every: steps from one checkpoint to the next.
        full_every: of so many checkpoints, one is whole and the others hold differences to it. Default: all are whole.
        keep: how many of the newest checkpoints to keep; what they refer to stays, too. Default: all.
        quantize: the scheme of differences between weights of the model: ``"int8"`` or ``"int4"``. Default: exact
            differences, compressed, for which ``pip install 'pylomin[zstd]'`` is needed. Whole checkpoints are exact.
        filter, max_error: as in :func:`pylomin.save_checkpoint`.

    Raises:
        PassError: an argument is out of range.
        MissingPackageError: zstandard is needed and not installed.
    """
    for name, value in (("every", every), ("full_every", full_every), ("keep", 1 if keep is None else keep)):
        if type(value) is not int or value < 1:
            raise PassError(f"{name} is {value!r}; expected a positive integer.")
    chooser(quantize, filter)
    lossless = quantize is None and filter is None
    if lossless and full_every > 1:
        check_available()
    save_as = SaveAs(quantize, filter, max_error=max_error, lossless=lossless)
    return CheckpointSeries(
        directory,
        (model, optimizer, scheduler, scaler),
        every=every,
        full_every=full_every,
        keep=keep,
        differences=save_as,
    )


def find_checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints that a series wrote to ``directory``, the oldest first. Not all of them need be whole."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    found = {name: int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    return [Path(directory, name) for name in sorted(found, key=lambda name: found[name])]


def _is_whole(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except PylominError:
        return False
    return True


def _remove_old(directory: Path, keep: int) -> None:
    """Only what is whole counts; what is not is left alone."""
    documents = {}
    for path in find_checkpoints(directory):
        with contextlib.suppress(PylominError):
            documents[path] = read_document(os.fspath(path))
    needed = set(list(documents)[-keep:])
    for path in list(needed):
        reference = documents[path].get("reference")
        if reference is not None:
            needed.add(Path(os.path.normpath(path / reference["path"])))
    for path in documents:
        if path not in needed:
            remove_checkpoint(path)
