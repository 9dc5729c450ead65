"""Nested state as JSON: every value comes back with the type that it had.

Scalars and lists are themselves. Everything else is an object with one key that names the type, and whatever describes
the value: ``{"tuple": [...]}``, ``{"dict": [[key, value], ...]}``, ``{"tensor": "optimizer.state.0.exp_avg"}``. Tensors
are stored elsewhere, under names made of the keys that lead to them. Nothing here imports or calls what a file names.
"""

from __future__ import annotations

import base64
import enum
import math
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch

from pylomin.errors import CheckpointError, StoreFormatError
from pylomin.residency.weight import dense_layout
from pylomin.store.dtypes import STORED_DTYPES
from pylomin.store.strict_json import shorten

Json = Any
_MAX_PLAIN_INT = 1 << 63  # larger ones are written in hexadecimal, which takes linear time to read
_FACTORIES: dict[str, Callable[[], Any]] = {kind.__name__: kind for kind in (list, dict, set, tuple, int, float, str)}
_SEQUENCES: dict[str, Callable[[Iterable[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "size": torch.Size,
}
_SEQUENCE_NAMES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "size"}
_MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda pairs: Counter(dict(pairs)),
}
_MAPPING_NAMES: dict[type, str] = {dict: "dict", OrderedDict: "OrderedDict", Counter: "Counter"}


class Encoder:
    """Turns values into JSON, and collects their tensors.

    Attributes:
        tensors: what to store, by name. Contiguous views of the tensors that were met, or copies.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def encode(self, value: Any, path: str) -> Json:
        """The JSON of a value; ``path`` names it in errors and its tensors in the file.

        Raises:
            CheckpointError: naming the path of something that has no JSON.
        """
        kind = type(value)
        if value is None or kind is bool or (kind is str and _is_text(value)):
            return value
        if kind is int:
            return value if -_MAX_PLAIN_INT < value < _MAX_PLAIN_INT else {"int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is list:
            return self._items(value, path)
        if kind in _SEQUENCE_NAMES:
            return {_SEQUENCE_NAMES[kind]: self._items(value, path)}
        if kind in _MAPPING_NAMES:
            return {_MAPPING_NAMES[kind]: self._pairs(value, path)}
        if isinstance(value, torch.Tensor):
            return self._tensor(value, path)
        if isinstance(value, enum.Enum):
            return {"enum": [kind.__module__, kind.__qualname__, value.name]}
        return self._rare(value, path)

    def _rare(self, value: Any, path: str) -> Json:
        kind = type(value)
        if kind is complex:
            return {"complex": [self.encode(value.real, path), self.encode(value.imag, path)]}
        if kind in (bytes, bytearray):
            return {kind.__name__: base64.b64encode(value).decode()}
        if kind is torch.dtype:
            return {"dtype": str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"device": str(value)}
        if kind is deque:
            return {"deque": self._items(value, path), "maxlen": value.maxlen}
        if kind is defaultdict and (value.default_factory is None or value.default_factory in _FACTORIES.values()):
            factory = value.default_factory
            return {"defaultdict": self._pairs(value, path), "factory": None if factory is None else factory.__name__}
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.kind in "biufc":
            name = "ndarray" if isinstance(value, numpy.ndarray) else "number"
            native = numpy.ascontiguousarray(value, value.dtype.newbyteorder("="))
            return {name: self._tensor(torch.from_numpy(native.copy().reshape(value.shape)), path)}
        raise CheckpointError(
            f"{path} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold. Expected tensors, "
            "numbers, strings, None, enums, and lists, tuples, sets and dicts of them."
        )

    def _items(self, values: Iterable[Any], path: str) -> list[Json]:
        return [self.encode(value, f"{path}.{number}") for number, value in enumerate(values)]

    def _pairs(self, mapping: Any, path: str) -> list[list[Json]]:
        return [[self.encode(k, f"a key of {path}"), self.encode(v, f"{path}.{k}")] for k, v in mapping.items()]

    def _tensor(self, tensor: torch.Tensor, path: str) -> Json:
        name, number = path, 1
        while name in self.tensors:
            number += 1
            name = f"{path}#{number}"
        fields: dict[str, Json] = {"tensor": name}
        if isinstance(tensor, torch.nn.Parameter):
            fields["parameter"] = tensor.requires_grad
        values = tensor.detach()
        if values.layout is torch.strided and not values.is_contiguous():
            # Kept, for kernels may round differently for other strides.
            stride = dense_layout(values).stride
            order = sorted(range(values.dim()), key=lambda dim: (-stride[dim], dim))
            if order != list(range(values.dim())):
                fields["order"] = order
                values = values.permute(order)
        if values.dtype not in STORED_DTYPES:
            fields |= {"dtype": str(values.dtype).removeprefix("torch."), "shape": list(values.shape)}
            values = values.contiguous().reshape(-1).view(torch.uint8)
        self.tensors[name] = values
        return fields


def decode(value: Json, get_tensor: Callable[[str], torch.Tensor], where: str) -> Any:
    """The inverse of :meth:`Encoder.encode`, for JSON that may be hostile.

    Raises:
        StoreFormatError: ``where`` begins the message.
    """
    try:
        return _Decoder(get_tensor, where).decode(value)
    except RecursionError:
        raise StoreFormatError(f"{where} is nested too deeply.") from None


class _Decoder:
    def __init__(self, get_tensor: Callable[[str], torch.Tensor], where: str) -> None:
        self._get_tensor = get_tensor
        self._where = where

    def decode(self, value: Json) -> Any:
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind = next(iter(value), None)
        content = value.get(kind) if kind is not None else None
        try:
            return self._decode(kind, content, value)
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            if isinstance(error, (StoreFormatError, RecursionError, OSError)):
                raise
            self._fail(value, str(error))

    def _decode(self, kind: str | None, content: Json, value: dict[str, Json]) -> Any:
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](self.decode(item) for item in content)
        if kind in _MAPPINGS:
            return _MAPPINGS[kind](self._pairs(content))
        if kind == "tensor":
            return self._tensor(value)
        if kind == "int":
            return int(content, 16)
        if kind == "float":
            return float(content)
        if kind == "complex":
            return complex(*(self.decode(part) for part in content))
        if kind in ("bytes", "bytearray"):
            raw = base64.b64decode(content, validate=True)
            return raw if kind == "bytes" else bytearray(raw)
        if kind == "dtype":
            return _dtype(content)
        if kind == "device":
            return torch.device(content)
        if kind == "deque":
            return deque((self.decode(item) for item in content), value["maxlen"])
        if kind == "defaultdict":
            factory = value["factory"]
            return defaultdict(None if factory is None else _FACTORIES[factory], self._pairs(content))
        if kind in ("ndarray", "number"):
            array = self.decode(content).numpy()
            return array if kind == "ndarray" else array[()]
        if kind == "enum":
            return self._enum(*content)
        self._fail(value, "no such type")

    def _pairs(self, content: Json) -> list[tuple[Any, Any]]:
        return [(self.decode(key), self.decode(item)) for key, item in content]

    def _tensor(self, value: dict[str, Json]) -> torch.Tensor:
        values = self._get_tensor(value["tensor"])
        if "dtype" in value:
            values = values.view(_dtype(value["dtype"])).view(value["shape"])
        if "order" in value:
            order = value["order"]
            values = values.permute([order.index(dim) for dim in range(len(order))])
        if "parameter" in value:
            return torch.nn.Parameter(values, requires_grad=value["parameter"])
        return values

    def _enum(self, module: str, qualname: str, name: str) -> enum.Enum:
        # Only what the program has imported itself: a file must not make it import anything.
        found: Any = sys.modules.get(module)
        for part in qualname.split("."):
            found = vars(found).get(part) if found is not None else None
        if not isinstance(found, enum.EnumMeta):
            raise ValueError(f"import {module} before, which defines it")
        return found[name]

    def _fail(self, value: Json, problem: str) -> NoReturn:
        raise StoreFormatError(f"{self._where} has {shorten(value)}, which stands for no value: {problem}.")


def _is_text(value: str) -> bool:
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:  # half a surrogate pair, which no file can hold
        return False


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return dtype
