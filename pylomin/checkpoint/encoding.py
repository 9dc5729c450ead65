"""A checkpoint as a JSON document and two groups of tensors: the model's weights, and everything else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pylomin.checkpoint.checkpoint import SECTIONS, Checkpoint
from pylomin.checkpoint.tree import Encoder, decode
from pylomin.errors import StoreFormatError
from pylomin.save import weights_of
from pylomin.store.dtypes import STORED_DTYPES

GetTensor = Callable[[str], torch.Tensor]


@dataclass(slots=True)
class EncodedCheckpoint:
    """Everything that is stored of a checkpoint.

    Attributes:
        sections: JSON that refers to tensors by name.
        weights: tensors of the model's state dict under their own names; tied ones once.
        state: all other tensors.
    """

    sections: dict[str, Any]
    weights: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]


def encode_checkpoint(checkpoint: Checkpoint) -> EncodedCheckpoint:
    """Nothing is copied that need not be. Raises CheckpointError, naming what a checkpoint cannot hold."""
    encoder = Encoder()
    model = checkpoint.model
    storable = {name: value for name, value in model.items() if _is_weight(value)}
    weights, aliases = weights_of(storable)
    entries = [
        [name, {"weight": aliases.get(name, name)} if name in storable else encoder.encode(value, f"model.{name}")]
        for name, value in model.items()
    ]
    # What modules say of the version of their state.
    versions = encoder.encode(getattr(model, "_metadata", None), "the metadata of model")
    sections = {"model": {"entries": entries, "versions": versions}}
    for section in SECTIONS[1:]:
        sections[section] = encoder.encode(checkpoint.section(section), section)
    return EncodedCheckpoint(sections, {weight.name: storable[weight.name] for weight in weights}, encoder.tensors)


def decode_section(
    sections: dict[str, Any], section: str, get_weight: GetTensor, get_tensor: GetTensor, where: str
) -> Any:
    """The inverse for one section. Raises StoreFormatError; ``where`` begins the message."""
    where = f"section {section!r} of {where}"
    value = sections.get(section)
    if section != "model":
        return decode(value, get_tensor, where)
    try:
        state = _StateDict(
            (name, get_weight(entry["weight"]) if _names_weight(entry) else decode(entry, get_tensor, where))
            for name, entry in value["entries"]  # type: ignore[index]  # what is None is what the except is for
        )
        state._metadata = decode(value["versions"], get_tensor, where)  # type: ignore[index]
    except (TypeError, ValueError, LookupError) as error:
        if isinstance(error, StoreFormatError):
            raise
        raise StoreFormatError(f"{where} is no state dict: {error}.") from error
    return state


class _StateDict(dict[str, Any]):
    """As ``Module.state_dict()`` returns it: with what modules say of its version."""

    _metadata: Any


def _names_weight(entry: object) -> bool:
    return isinstance(entry, dict) and entry.keys() == {"weight"}


def _is_weight(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided and value.dtype in STORED_DTYPES
