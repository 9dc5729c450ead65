"""The contract between a store of weights and everything above it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True, slots=True)
class WeightInfo:
    """What a store knows of one weight without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Bytes ``[offset_bytes, offset_bytes + len(destination))`` of a weight, and where they go.

    ``destination`` is a writable, C-contiguous memoryview of format ``B``.
    """

    name: str
    offset_bytes: int
    destination: memoryview


class WeightStore(Protocol):
    """Where offloaded weights live: names to metadata and bytes.

    Read-only; callable from any thread.
    """

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]:
        """Names in the order in which their bytes lie."""
        ...

    def __len__(self) -> int: ...

    def info(self, name: str) -> WeightInfo:
        """Metadata of one weight.

        Raises :class:`~pylomin.errors.WeightNotFoundError` with similar names.
        """
        ...

    def describe(self, name: str) -> str:
        """Where the weight is, for error messages: ``'/data/model.safetensors'``, ``'memory'``."""
        ...

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Fill every destination, in as few reads as adjacency allows; return when all is there.

        Raises :class:`~pylomin.errors.StoreReadError` (the destinations then hold nothing of
        meaning).
        """
        ...

    def close(self) -> None:
        """Give back file descriptors. Reading afterwards raises ``StoreReadError``. Idempotent."""
        ...


@runtime_checkable
class InMemoryStore(Protocol):
    """A store whose weights already are tensors in memory and can be used without a copy."""

    def tensor(self, name: str) -> torch.Tensor:
        """The stored tensor itself, not a copy."""
        ...
