"""JSON from files that may be hostile: every fault is a StoreFormatError."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from typing import Any

from pylomin.errors import StoreFormatError

_MAX_INTEGER_DIGITS = 20  # enough for 2**64 - 1

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 200
_repr.maxlist = _repr.maxdict = 8


def shorten(value: object) -> str:
    """A ``repr`` of bounded length, for error messages."""
    return _repr.repr(value)


def parse_object(raw: bytes | bytearray, where: str) -> dict[str, Any]:
    """Parse one JSON object in UTF-8 without duplicate keys; ``where`` begins the error messages.

    Integers of more than 20 digits, and ``-0``, come back as float, as they do in safetensors.
    """
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_int=_bounded_int)
    except RecursionError:
        raise StoreFormatError(f"{where} is nested too deeply. {_REPLACE}") from None
    except UnicodeError as error:
        raise StoreFormatError(f"{where} is not valid UTF-8 text: {error}. {_REPLACE}") from error
    except ValueError as error:
        raise StoreFormatError(f"{where} is not valid JSON: {error}. {_REPLACE}") from error
    if not isinstance(value, dict):
        raise StoreFormatError(f"{where} is a JSON {type(value).__name__}; expected an object. {_REPLACE}")
    return value


_REPLACE = "The file is damaged or of another format; download or convert it again."


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    parsed = dict(pairs)
    if len(parsed) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        duplicate = counts.most_common(1)[0][0]
        raise ValueError(f"key {shorten(duplicate)} appears twice")
    for key, value in pairs:
        # JSON can escape half a surrogate pair, which no UTF-8 text can hold.
        _ = key.isascii() or key.encode()
        _ = isinstance(value, str) and (value.isascii() or value.encode())
    return parsed


def _bounded_int(digits: str) -> int | float:
    # Converting a number of millions of digits takes quadratic time.
    if len(digits) > _MAX_INTEGER_DIGITS or digits == "-0":
        return float(digits)
    return int(digits)
