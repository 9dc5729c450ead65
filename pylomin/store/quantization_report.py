"""``quantization_report``: what quantising took from each weight."""

from __future__ import annotations

import os

from pylomin.store.base import WeightStore
from pylomin.store.open import open_store
from pylomin.store.packed_format import Packed
from pylomin.store.quantized import QuantizedStore


def quantization_report(source: str | os.PathLike[str] | WeightStore) -> dict[str, Packed]:
    """How weights are stored that are not stored as they are, with their errors; or why they are, after all.

    Args:
        source: anything that :func:`pylomin.open_store` takes.

    Returns:
        By name: ``scheme``, ``max_error`` (absolute), ``rms_error`` (relative to the root mean square of the weight)
        and ``reason``, which says why the scheme is not the one that was asked for.

    Raises:
        StoreReadError, StoreFormatError: as :func:`pylomin.open_store`.

    >>> import tempfile, torch, pylomin
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = pylomin.save_store({"w": torch.randn(64, 64)}, directory, quantize="int4", max_error=0.01)
    ...     report = quantization_report(path)
    >>> report["w"].scheme, report["w"].reason.startswith("int4 has a relative RMS error of 0.1")
    ('int8', True)
    """
    store = open_store(source)
    try:
        return store.report() if isinstance(store, QuantizedStore) else {}
    finally:
        if store is not source:
            store.close()
