"""The packages of the extra ``remote``, imported when the first remote file is opened."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Mapping
from typing import Any

from pylomin.errors import MissingPackageError, PassError

# All that a line's thread needs: a process that forks while another thread imports hangs at the next import.
_HTTP = ["fsspec", "aiohttp", "fsspec.implementations.http"]
_NEEDED = {
    "http": _HTTP,
    "https": _HTTP,
    "s3": ["fsspec", "s3fs"],
    "hf": [*_HTTP, "huggingface_hub"],
}


def check_packages(scheme: str) -> None:
    """Raise MissingPackageError unless all that files of this scheme need is installed."""
    for name in _NEEDED[scheme]:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise MissingPackageError(
                f"files of {scheme}:// need {name}, which is not installed: pip install 'pylomin[remote]'. ({error})"
            ) from error


def file_system(scheme: str, options: Mapping[str, Any]) -> Any:
    """A file system of fsspec's own, for the event loop that this is called in."""
    import fsspec

    try:
        return fsspec.filesystem(
            scheme, asynchronous=True, loop=asyncio.get_running_loop(), skip_instance_cache=True, **options
        )
    except TypeError as error:
        raise PassError(f"storage_options do not suit {scheme}://: {error}.") from error
