"""Which tensors of a torch checkpoint are the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pylomin.errors import StoreFormatError
from pylomin.store.strict_json import shorten
from pylomin.store.torch_objects import OtherTensor, TensorRecord

_MAX_NESTING = 4  # mappings around the weights

# Where training programs put the state_dict, in the order in which they are looked for.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "params", "weights")


def select_weights(root: object, path: str, key: str | None = None) -> tuple[dict[str, TensorRecord], tuple[str, ...]]:
    """The weights of a checkpoint by name, and the names of what else is in it.

    Args:
        root: what the checkpoint's pickle holds.
        path: of the file, for error messages.
        key: which of the checkpoint's mappings holds the weights. Default: the one under the first of the names that
            training programs use, else the checkpoint itself, else the only mapping in it that has tensors.

    Raises:
        StoreFormatError: there are none, there is more than one candidate, or a weight is not dense.
    """
    ignored: list[str] = []
    mapping, trail = root, ""
    for _ in range(_MAX_NESTING):
        if not isinstance(mapping, dict):
            break
        chosen = key if key is not None and not trail else _wrapper(mapping, path)
        if chosen is None:
            break
        if chosen not in mapping:
            raise StoreFormatError(f"torch file {path!r} has no key {chosen!r}; there are {_keys(mapping)}.")
        ignored += [f"{trail}{name}" for name in mapping if name != chosen]
        mapping, trail = mapping[chosen], f"{trail}{chosen}."
    weights: dict[str, TensorRecord] = {}
    for name, value in mapping.items() if isinstance(mapping, dict) else ():
        if isinstance(value, OtherTensor) and isinstance(name, str):
            raise StoreFormatError(
                f"weight {shorten(name)} of {path!r} is {value.kind}; only dense tensors can be read in place. Load "
                "the file with torch.load, convert that tensor, and pass the mapping."
            )
        if isinstance(value, TensorRecord) and isinstance(name, str):
            weights[name] = value
        else:
            ignored.append(f"{trail}{name if isinstance(name, str) else shorten(name)}")
    if not weights and not (isinstance(mapping, dict) and not mapping):
        found = f"keys {_keys(mapping)}" if isinstance(mapping, dict) else f"a {type(mapping).__name__}"
        raise StoreFormatError(
            f"torch file {path!r} has no mapping of names to tensors; found: {found}. Save the weights with "
            "torch.save(model.state_dict(), path)."
        )
    return weights, tuple(ignored)


def _wrapper(mapping: Mapping[Any, Any], path: str) -> str | None:
    """The key of the mapping in which to look further."""
    for name in _WRAPPERS:
        if _holds_tensors(mapping.get(name)):
            return name
    if any(isinstance(value, (TensorRecord, OtherTensor)) for value in mapping.values()):
        return None
    candidates = [name for name, value in mapping.items() if isinstance(name, str) and _holds_tensors(value)]
    if len(candidates) > 1:
        raise StoreFormatError(
            f"torch file {path!r} has tensors under {len(candidates)} keys: {_keys(candidates)}. Choose one "
            f"with state_dict_key={shorten(candidates[0])} of TorchZipStore or TorchLegacyStore."
        )
    return candidates[0] if candidates else None


def _holds_tensors(value: object, nesting: int = _MAX_NESTING) -> bool:
    if not isinstance(value, dict) or nesting == 0:
        return False
    return any(isinstance(v, (TensorRecord, OtherTensor)) for v in value.values()) or any(
        _holds_tensors(value[name], nesting - 1) for name in _WRAPPERS if name in value
    )


def _keys(names: Iterable[Any]) -> str:
    names = list(names)
    return ", ".join(shorten(name) for name in names[:20]) + (" and more" if len(names) > 20 else "")
