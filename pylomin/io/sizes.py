"""Sizes in bytes, as users write them and as people read them."""

from __future__ import annotations

import re
from decimal import Decimal

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}


def parse_bytes(size: int | str, *, what: str = "memory_budget") -> int:
    """``512``, ``"512MiB"``, ``"1.5 GB"`` as a number of bytes.

    Raises:
        TypeError, ValueError: naming ``what``, what was given, and the forms that work.

    >>> parse_bytes("512MiB")
    536870912
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise TypeError(
            f"{what} is {size!r} ({type(size).__name__}); expected bytes as int, or a string such as '512MiB'."
        )
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError(f"{what} is {size!r}; expected bytes as int, or a string such as '512MiB' or '2GB'.")
        size = int(Decimal(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise ValueError(f"{what} is {size}; expected a positive number of bytes.")
    return size


def format_bytes(nbytes: int) -> str:
    """``489684992`` as ``'467.0 MiB'``.

    >>> format_bytes(489684992)
    '467.0 MiB'
    """
    value = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
