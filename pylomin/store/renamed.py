"""A store under other names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from pylomin.errors import StoreFormatError, WeightNotFoundError
from pylomin.store.base import InMemoryStore, ReadRequest, WeightInfo, WeightStore
from pylomin.store.extents import ExtentStore
from pylomin.store.quantized import PackedWeight
from pylomin.store.requests import check_request, weight_not_found

KeyMap = Mapping[str, str] | Callable[[str], str | None]
_MAX_NAMES_SHOWN = 10


def renamed(store: WeightStore, *, key_map: KeyMap | None = None, prefix: str | None = None) -> WeightStore:
    """The weights of ``store`` under the names that a model has for them. Nothing is read or copied.

    Args:
        store: under the names of its file. Closed with the returned store.
        key_map: stored name to the model's name: a mapping, in which a name that stays may be left out, or a function,
            which returns None for a weight to leave out.
        prefix: what stored names begin with and the model's do not, ``"model."``. It is taken off before ``key_map``
            is asked; weights without it are left out.

    Raises:
        WeightNotFoundError: ``key_map`` renames what is not in the store, or no name begins with ``prefix``.
        StoreFormatError: two weights would get one name.
    """
    if key_map is None and prefix is None:
        return store
    names = _names(store, key_map, prefix or "")
    if isinstance(store, ExtentStore):  # stays one, so that its extents are seen
        weights = {new: store.weight(old) for new, old in names.items()}
        return ExtentStore(store.path, weights, store.files)
    return RenamedMemoryStore(store, names) if isinstance(store, InMemoryStore) else RenamedStore(store, names)


class RenamedStore:
    """A :class:`~pylomin.store.base.WeightStore` over the weights of another one.

    Args:
        store: where the weights are.
        names: name here to name there.
    """

    def __init__(self, store: WeightStore, names: Mapping[str, str]) -> None:
        self._store = store
        self._names = dict(names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def packed(self, name: str) -> PackedWeight | None:
        """As of the store, if it is one of quantised weights. Raises WeightNotFoundError."""
        packed: Callable[[str], PackedWeight | None] | None = getattr(self._store, "packed", None)
        return None if packed is None else packed(self._name_there(name))

    def info(self, name: str) -> WeightInfo:
        """Metadata of one weight. Raises WeightNotFoundError."""
        return self._store.info(self._name_there(name))

    def describe(self, name: str) -> str:
        """Where the weight is, and its name there. Raises WeightNotFoundError."""
        there = self._name_there(name)
        where = self._store.describe(there)
        return where if there == name else f"{where}, as {there!r}"

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """As :meth:`~pylomin.store.base.WeightStore.read`."""
        for request in requests:
            check_request(request, self.info(request.name), self.describe(request.name))
        self._store.read([replace(request, name=self._name_there(request.name)) for request in requests])

    def close(self) -> None:
        """Close the other store. Idempotent."""
        self._store.close()

    def _name_there(self, name: str) -> str:
        try:
            return self._names[name]
        except KeyError:
            raise weight_not_found(name, self._names, "the store, as renamed") from None


class RenamedMemoryStore(RenamedStore):
    """As :class:`RenamedStore`, over weights in memory."""

    def __init__(self, store: WeightStore, names: Mapping[str, str]) -> None:
        assert isinstance(store, InMemoryStore)
        super().__init__(store, names)
        self._memory: InMemoryStore = store

    def tensor(self, name: str) -> torch.Tensor:
        """The stored tensor itself, not a copy."""
        return self._memory.tensor(self._name_there(name))


def _names(store: WeightStore, key_map: KeyMap | None, prefix: str) -> dict[str, str]:
    """New name to old name."""
    kept = {name.removeprefix(prefix): name for name in store if name.startswith(prefix)}
    if prefix and not kept:
        some = ", ".join(map(repr, list(store)[:_MAX_NAMES_SHOWN]))
        raise WeightNotFoundError(
            f"no weight has a name that begins with prefix {prefix!r}; there are {some or 'none'}."
        )
    if isinstance(key_map, Mapping):
        absent = [name for name in key_map if name not in kept]
        if absent:
            raise weight_not_found(absent[0], kept, "the store, and key_map renames it")
    names: dict[str, str] = {}
    for name, old in kept.items():
        if key_map is None:
            new: str | None = name
        else:
            new = key_map.get(name, name) if isinstance(key_map, Mapping) else key_map(name)
        if new is None:
            continue
        if not isinstance(new, str):
            raise StoreFormatError(
                f"key_map gives {new!r} for weight {name!r}; expected a name, or None to leave it out."
            )
        if new in names:
            raise StoreFormatError(f"weights {names[new]!r} and {old!r} would both be named {new!r}. Check key_map.")
        names[new] = old
    return names
