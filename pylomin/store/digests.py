"""Digests of weights, kept in the header of the file that holds them.

``__metadata__["pylomin.digests"]`` is a JSON object: ``"algorithm"``; ``"layout"``, the digest of the names, dtypes
and shapes; ``"weights"``, a digest of the bytes of each weight, in hexadecimal. SHA-256 ran at 1.0 GB/s on one core
with SHA extensions and BLAKE2b at 0.9; the former can be checked with tools that every system has.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import torch

from pylomin.errors import StoreFormatError
from pylomin.store.strict_json import parse_object

DIGESTS_KEY = "pylomin.digests"
_ALGORITHM = "sha256"

Layout = Iterable[tuple[str, torch.dtype, tuple[int, ...]]]


def new_digest() -> hashlib._Hash:
    """Takes bytes by ``update``, without the GIL where they are many."""
    return hashlib.sha256(usedforsecurity=False)


EMPTY_DIGEST = "0" * (2 * new_digest().digest_size)
"""As long as any other, to set room aside for it."""


def layout_digest(layout: Layout) -> str:
    """Of names, dtypes and shapes in file order, which no digest of a weight covers."""
    digest = new_digest()
    digest.update(json.dumps([(name, str(dtype), list(shape)) for name, dtype, shape in layout]).encode())
    return digest.hexdigest()


def format_digests(layout: str, weights: Mapping[str, str]) -> str:
    """The JSON that a header keeps."""
    document = {"algorithm": _ALGORITHM, "layout": layout, "weights": dict(weights)}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def parse_digests(text: str, path: str) -> tuple[str, dict[str, str]]:
    """The inverse of :func:`format_digests`. Raises StoreFormatError."""
    document = parse_object(text.encode(), f"{DIGESTS_KEY} of {path!r}")
    algorithm, layout, weights = (document.get(key) for key in ("algorithm", "layout", "weights"))
    if algorithm != _ALGORITHM:
        raise StoreFormatError(
            f"the digests of {path!r} are of algorithm {algorithm!r}; expected {_ALGORITHM!r}. Use a newer pylomin."
        )
    if (
        not isinstance(layout, str)
        or not isinstance(weights, dict)
        or not all(isinstance(digest, str) for digest in weights.values())
    ):
        raise StoreFormatError(f"the digests of {path!r} are no strings. The file is damaged; download it again.")
    return layout, weights
