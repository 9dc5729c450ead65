"""Progress of what reads or writes a whole checkpoint."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Literal

Progress = bool | Callable[[int, int], None] | None
"""A function of (bytes done, bytes in all); True for a bar, False for none, None for a bar where somebody sees it."""


@contextlib.contextmanager
def progress_of(
    progress: Progress, description: str, *, unit: Literal["bytes", "inputs"] = "bytes"
) -> Iterator[Callable[[int, int], None] | None]:
    """The function to call for ``progress``. A bar needs rich; without it there is none.

    Raises:
        ModuleNotFoundError: a bar was asked for, and rich is not installed.
    """
    if callable(progress):
        yield progress
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            ProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar
    except ModuleNotFoundError as error:
        if progress is None:
            yield None
            return
        raise ModuleNotFoundError("progress=True needs rich: pip install 'pylomin[cli]'.") from error
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    columns += [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description)
        yield lambda done, total: bar.update(task, completed=done, total=total)
