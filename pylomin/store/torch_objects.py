"""What torch.save writes of tensors, as records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeGuard

import torch

from pylomin.errors import StoreFormatError
from pylomin.store.inert_pickle import Global, Inert
from pylomin.store.strict_json import shorten

_MAX_DIMENSIONS = 64  # torch's operators take no more
_MAX_TENSOR_BYTES = (1 << 63) - 1  # torch counts in int64

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}
_STORAGE_MODULES = {"torch", "torch.cuda", "torch.storage"}
_TENSOR_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}

# Harmless, found in training checkpoints, and never built.
_INERT = {
    "_codecs.encode", "argparse.Namespace", "builtins.complex", "builtins.set", "builtins.frozenset", "builtins.slice",
    "builtins.bytearray", "builtins.range", "collections.Counter", "collections.deque", "datetime.datetime",
    "datetime.timedelta", "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict", "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar", "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy.dtype", "numpy.ndarray", "pathlib.Path", "pathlib.PosixPath", "pathlib.PurePosixPath",
    "pathlib.WindowsPath", "pytorch_lightning.utilities.parsing.AttributeDict", "torch.device",
    "torch.serialization._get_layout",
}  # fmt: skip

# Tensors of other kinds, by the function that rebuilds them.
_OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor without values",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device, saved through numpy",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "_rebuild_wrapper_subclass": "a tensor subclass",
}


@dataclass(frozen=True, slots=True)
class StorageRecord:
    """A storage that the pickle refers to."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """Length in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A dense tensor: elements of a storage."""

    storage: StorageRecord
    dtype: torch.dtype
    offset: int  # in elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class OtherTensor:
    """A tensor that cannot be read in place."""

    kind: str


class TorchObjects:
    """Turns the calls and references of torch.save's pickles into records; refuses all others.

    Args:
        path: of the file, for error messages.
    """

    def __init__(self, path: str) -> None:
        self.storages: dict[str, StorageRecord] = {}  # by key, as referred to
        self._path = path

    def persistent(self, reference: object) -> StorageRecord | Global:
        """The storage for ``("storage", type, key, location, numel)``, with a view in old files."""
        match reference:
            case ("module", Global() as cls, str(), str()):
                return cls  # with its source code, in old files; `rebuild` refuses it
            case ("storage", Global(module, name), str(key), str(), int(numel), *view) if (
                module in _STORAGE_MODULES and name in _STORAGE_DTYPES and numel >= 0 and view in ([], [None])
            ):
                record = StorageRecord(key, _STORAGE_DTYPES[name], numel)
                known = self.storages.setdefault(key, record)
                if known.nbytes != record.nbytes:
                    raise self._malformed(f"storage {shorten(key)} has two sizes: {known.nbytes} and {record.nbytes}")
                return record
        raise self._malformed(f"a reference is {_shown(reference)}; expected one to a storage")

    def rebuild(self, function: Global, arguments: tuple[Any, ...]) -> object:
        """What stands for the result of ``function(*arguments)``."""
        name = str(function)
        if name == "collections.OrderedDict":
            return self._ordered_dict(arguments)
        if name == "collections.defaultdict":
            return dict[object, object]()
        if name == "torch.Size" and len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
            return tuple(arguments[0])
        if function.module in {"torch._utils", "torch._tensor"}:
            return self._tensor(function.name, arguments)
        if name in _INERT:
            return Inert()
        raise StoreFormatError(
            f"{self._path!r} asks to call {name[:200]}, which is none of the functions that torch.save writes for "
            "tensors. pylomin runs no code from weight files. Save only the weights: "
            "torch.save(model.state_dict(), path)."
        )

    def _ordered_dict(self, arguments: tuple[Any, ...]) -> dict[object, object]:
        result: dict[object, object] = {}
        for pair in arguments[0] if len(arguments) == 1 and isinstance(arguments[0], list) else ():
            match pair:
                case (str(key), value) | [str(key), value] if key not in result:
                    result[key] = value
                case _:
                    raise self._malformed("an OrderedDict is made of what are no pairs with unique names")
        return result

    def _tensor(self, name: str, arguments: tuple[Any, ...]) -> object:
        if name in _OTHER_TENSORS:
            return OtherTensor(_OTHER_TENSORS[name])
        match name, arguments:
            case "_rebuild_tensor", (StorageRecord() as storage, offset, shape, stride):
                return self._record(storage, storage.dtype, offset, shape, stride)
            case "_rebuild_tensor_v2", (StorageRecord() as storage, offset, shape, stride, _, _, *metadata):
                return self._viewed(self._record(storage, storage.dtype, offset, shape, stride), metadata)
            case "_rebuild_tensor_v3", (
                StorageRecord() as storage, offset, shape, stride, _, _, Global("torch", dtype), *metadata
            ) if dtype in _DTYPES:  # fmt: skip
                return self._viewed(self._record(storage, _DTYPES[dtype], offset, shape, stride), metadata)
            case "_rebuild_parameter", ((TensorRecord() | OtherTensor()) as tensor, _, _):
                return tensor
            case "_rebuild_parameter_with_state", ((TensorRecord() | OtherTensor()) as tensor, _, _, _):
                return tensor
            case ("_rebuild_from_type" | "_rebuild_from_type_v2"), (
                Global("torch._utils", inner), Global() as cls, tuple(inner_arguments), _
            ) if not inner.startswith("_rebuild_from_type"):  # fmt: skip
                rebuilt = self._tensor(inner, inner_arguments)
                return rebuilt if str(cls) in _TENSOR_CLASSES else OtherTensor(f"a tensor subclass, {cls}")
        raise self._malformed(f"a tensor is made by {name[:100]} of {_shown(arguments)}")

    def _record(
        self, storage: StorageRecord, dtype: torch.dtype, offset: object, shape: object, stride: object
    ) -> TensorRecord:
        if not (_is_count(offset) and _are_counts(shape) and _are_counts(stride) and len(shape) == len(stride)):
            raise self._malformed(
                f"a tensor has offset {_shown(offset)}, shape {_shown(shape)}, stride {_shown(stride)}"
            )
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= max(size, 1)  # torch computes strides over the others where one is 0
        if nbytes > _MAX_TENSOR_BYTES or max(stride, default=0) > _MAX_TENSOR_BYTES:
            raise self._malformed(f"a tensor of shape {_shown(shape)} and stride {_shown(stride)} is too large")
        return TensorRecord(storage, dtype, offset, shape, stride)

    def _viewed(self, tensor: TensorRecord, metadata: list[Any]) -> TensorRecord | OtherTensor:
        flags = metadata[0] if metadata else None
        if isinstance(flags, dict) and (flags.get("conj") or flags.get("neg")):
            return OtherTensor("a conjugated or negated view")
        return tensor

    def _malformed(self, problem: str) -> StoreFormatError:
        return StoreFormatError(
            f"{problem}, in torch file {self._path!r}. The file is damaged or of another format; download it again."
        )


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0  # type() and not isinstance(): True is an int too


def _are_counts(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and len(values) <= _MAX_DIMENSIONS and all(map(_is_count, values))


def _shown(value: object) -> str:
    """A short ``repr``; what is nested deeply is not walked."""
    return shorten(value) if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"
