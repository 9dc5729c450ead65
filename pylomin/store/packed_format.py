"""What a file says of weights that it does not hold as they are.

``__metadata__["pylomin.quantized"]`` is a JSON object: ``"version"``; ``"weights"``, for each such weight its scheme,
original dtype and shape, and errors; and in a file of differences ``"reference"``, the path and digest of the file that
has the rest. A scheme of :mod:`pylomin.quantize` names how the weight, or with ``"difference"`` its difference to the
reference, is stored under its own name, and the scales, where there are any, under ``<name>_scale``. ``"xor"`` is a
run of compressed blocks, ``"same"`` is nothing at all.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from pylomin.errors import StoreFormatError
from pylomin.quantize.lossless import BLOCK_BYTES
from pylomin.quantize.packing import FULL, SCHEMES, Packing
from pylomin.store.digests import DIGESTS_KEY
from pylomin.store.dtypes import STORED_DTYPES, TORCH_DTYPES
from pylomin.store.strict_json import parse_object, shorten

QUANTIZED_KEY = "pylomin.quantized"
_VERSION = 1
UNKNOWN = -1.2345678901234567e-308  # an error that is not known yet; no number takes more characters

XOR = "xor"
SAME = "same"


@dataclass(frozen=True, slots=True)
class Packed:
    """How one weight is stored.

    Attributes:
        packing: scheme (or ``XOR``, ``SAME``), original dtype and shape, group size.
        is_difference: to the weight of the same name in the reference.
        blocks: of ``XOR``: bytes of each compressed block, in order; each holds ``BLOCK_BYTES`` of the weight.
        max_error: the largest absolute error.
        rms_error: the root mean square error over the root mean square of the weight.
        reason: why another scheme than the one that was asked for; empty where it is the one.
    """

    packing: Packing
    is_difference: bool = False
    blocks: tuple[int, ...] = ()
    max_error: float = 0.0
    rms_error: float = 0.0
    reason: str = ""

    @property
    def scheme(self) -> str:
        return self.packing.scheme

    @property
    def needs_reference(self) -> bool:
        return self.is_difference or self.scheme in (XOR, SAME)


@dataclass(frozen=True, slots=True)
class ReferenceTo:
    """The file that a file of differences needs."""

    path: str  # relative to the directory of the file of differences
    digest: str


def file_digest(metadata: Mapping[str, str]) -> str | None:
    """What identifies the content of a file, by the digests of all that it holds; None where it keeps none."""
    if DIGESTS_KEY not in metadata:
        return None
    identity = json.dumps([metadata[DIGESTS_KEY], metadata.get(QUANTIZED_KEY)])
    return hashlib.sha256(identity.encode(), usedforsecurity=False).hexdigest()


def format_packed(weights: Mapping[str, Packed], reference: ReferenceTo | None) -> str:
    """The JSON that a header keeps; it is not shorter while errors are ``UNKNOWN``."""
    document: dict[str, Any] = {"version": _VERSION}
    if reference is not None:
        document["reference"] = {"path": reference.path, "digest": reference.digest}
    document["weights"] = {name: _to_json(packed) for name, packed in weights.items()}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def _to_json(packed: Packed) -> dict[str, Any]:
    packing = packed.packing
    fields: dict[str, Any] = {
        "scheme": packing.scheme,
        "dtype": STORED_DTYPES[packing.dtype],
        "shape": list(packing.shape),
    }
    if packing.has_scales:
        fields["group_size"] = packing.group_size
    if packed.is_difference:
        fields["difference"] = True
    if packed.blocks:
        fields["blocks"] = list(packed.blocks)
    if packing.scheme in SCHEMES:
        for name, value in (("max_error", packed.max_error), ("rms_error", packed.rms_error)):
            fields[name] = value if math.isfinite(value) else str(value)  # JSON has no infinity
    if packed.reason:
        fields["reason"] = packed.reason
    return fields


def parse_packed(text: str, path: str) -> tuple[dict[str, Packed], ReferenceTo | None]:
    """The inverse of :func:`format_packed`, for text that may be hostile.

    Raises:
        StoreFormatError: naming the path, the weight, what was expected and what was found.
    """
    document = parse_object(text.encode(), f"{QUANTIZED_KEY} of {path!r}")
    version, weights = document.get("version"), document.get("weights")
    if version != _VERSION:
        raise StoreFormatError(
            f"{path!r} has quantised weights of format version {shorten(version)}; this pylomin reads version "
            f"{_VERSION}. Use a newer pylomin."
        )
    if not isinstance(weights, dict):
        raise StoreFormatError(f"{QUANTIZED_KEY} of {path!r} lists no weights. {_REPLACE}")
    parsed = {name: _Parser(path, name).packed(fields) for name, fields in weights.items()}
    reference = _parse_reference(document.get("reference"), path)
    if reference is None:
        needing = next((name for name, packed in parsed.items() if packed.needs_reference), None)
        if needing is not None:
            raise StoreFormatError(f"weight {needing!r} of {path!r} needs a reference, but none is named. {_REPLACE}")
    return parsed, reference


_REPLACE = "The file is damaged; write or download it again."


def _parse_reference(value: object, path: str) -> ReferenceTo | None:
    if value is None:
        return None
    fields = (value.get("path"), value.get("digest")) if isinstance(value, dict) else (None, None)
    if not all(isinstance(field, str) and "\0" not in field for field in fields):
        raise StoreFormatError(f"the reference of {path!r} is {shorten(value)}; expected a path and a digest.")
    return ReferenceTo(*fields)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class _Parser:
    path: str
    name: str

    def packed(self, fields: object) -> Packed:
        if not isinstance(fields, dict):
            self._fail(f"its entry is {shorten(fields)}; expected an object")
        scheme = fields.get("scheme")
        if scheme not in (*SCHEMES, FULL, XOR, SAME):
            self._fail(f"scheme {shorten(scheme)} is unknown; expected one of {', '.join((*SCHEMES, XOR, SAME))}")
        dtype = fields.get("dtype")
        if not isinstance(dtype, str) or dtype not in TORCH_DTYPES:
            self._fail(f"dtype {shorten(dtype)} is not one that torch can hold")
        if scheme in SCHEMES and not TORCH_DTYPES[dtype].is_floating_point:
            self._fail(f"dtype {dtype} cannot be quantised")
        group_size = fields.get("group_size", 1)
        if type(group_size) is not int or group_size < 1:
            self._fail(f"group_size is {shorten(group_size)}; expected a positive integer")
        shape, blocks = (self._integers(fields.get(field, []), field) for field in ("shape", "blocks"))
        packing = Packing(scheme, TORCH_DTYPES[dtype], shape, group_size)
        nbytes = math.prod(shape) * packing.dtype.itemsize
        if scheme == XOR and len(blocks) != -(-nbytes // BLOCK_BYTES):
            self._fail(f"it has {len(blocks)} blocks; expected {-(-nbytes // BLOCK_BYTES)} for {nbytes} bytes")
        reason = fields.get("reason", "")
        return Packed(
            packing,
            fields.get("difference") is True,
            blocks,
            self._error(fields.get("max_error", 0.0)),
            self._error(fields.get("rms_error", 0.0)),
            reason if isinstance(reason, str) else "",
        )

    def _integers(self, values: object, field: str) -> tuple[int, ...]:
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 1 << 63 for v in values):
            self._fail(f"{field} is {shorten(values)}; expected a list of non-negative integers")
        return tuple(values)

    def _error(self, value: object) -> float:
        try:
            return float(value)  # type: ignore[arg-type]  # what is no number is what the except is for
        except (TypeError, ValueError):
            self._fail(f"an error is {shorten(value)}; expected a number")

    def _fail(self, problem: str) -> NoReturn:
        raise StoreFormatError(f"weight {shorten(self.name)} of {self.path!r}: {problem}. {_REPLACE}")
