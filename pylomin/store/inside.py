"""Paths that come from files: they stay inside the directory that the user named."""

from __future__ import annotations

import os
from pathlib import Path

from pylomin.errors import StoreFormatError


def path_inside(directory: str | os.PathLike[str], name: str, source: str) -> str:
    """The path of file ``name`` in ``directory``; ``source`` begins the error message.

    Links may not leave the directory either. The one exception is the Hugging Face hub cache, whose
    ``<repo>/snapshots/<revision>/`` holds links into ``<repo>/blobs/``.

    Raises:
        StoreFormatError: the file is, or would be, outside.
    """
    root = Path(os.path.realpath(directory))
    path = Path(directory) / name
    real = Path(os.path.realpath(path)) if "\0" not in name else root.parent
    if Path(name).is_absolute() or ".." in Path(name).parts or not _is_allowed(real, root):
        raise StoreFormatError(
            f"{source} points to {name[:1000]!r}, which is {str(real)!r}: outside its directory {str(root)!r}. "
            "Expected the name of a file in that directory."
        )
    return str(path)


def _is_allowed(real: Path, root: Path) -> bool:
    """Is a file's real path below the real directory, or where the hub cache keeps it?"""
    if real.is_relative_to(root):
        return True
    # <repo>/snapshots/<revision>/[folder/]: compared as a real path, so a linked blobs/ does not pass.
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    return snapshots is not None and real.parent == snapshots.parent / "blobs"
