"""What is in a directory that ``save_pretrained`` made."""

from __future__ import annotations

import os
from collections.abc import Iterable

from pylomin.errors import PassError, StoreReadError
from pylomin.store.base import WeightStore
from pylomin.store.open import open_store

# In the order in which transformers looks for them.
_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_TORCH = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def checkpoint_directory(path: str | os.PathLike[str], subfolder: str = "") -> str:
    """The directory, which exists and has a config. Raises PassError, StoreReadError."""
    if not isinstance(path, (str, os.PathLike)):
        raise PassError(f"path is a {type(path).__name__}; expected the path of a directory.")
    directory = os.path.join(os.fspath(path), subfolder) if subfolder else os.fspath(path)
    if not os.path.isdir(directory):
        raise StoreReadError(
            f"{directory!r} is not a directory. pylomin.from_pretrained reads local directories and downloads "
            "nothing; download the model first: huggingface_hub.snapshot_download(...) returns a path to give here."
        )
    has_adapter = os.path.isfile(os.path.join(directory, "adapter_config.json"))
    if not os.path.isfile(os.path.join(directory, "config.json")):
        if has_adapter:
            raise StoreReadError(
                f"directory {directory!r} has an adapter, and no model. Load the model that it is for, then "
                f"peft.PeftModel.from_pretrained(model, {directory!r})."
            )
        raise StoreReadError(
            f"directory {directory!r} has no config.json. Expected a directory that save_pretrained made; "
            "for weights alone, use pylomin.load(lambda: Model(config), weights)."
        )
    if has_adapter:
        raise PassError(
            f"directory {directory!r} has an adapter beside the model, which transformers would add to it. Move the "
            "adapter's files to a directory of their own, then peft.PeftModel.from_pretrained(model, that_directory)."
        )
    return directory


def open_checkpoint(
    directory: str,
    *,
    file_name: str | None,
    extra_files: Iterable[str],
    variant: str | None,
    use_safetensors: bool | None,
) -> list[WeightStore]:
    """The weights in ``directory``.

    Args:
        directory: where the config is.
        file_name: what the config says of the weights' file.
        extra_files: further files, used where they exist.
        variant: ``"fp16"`` for ``model.fp16.safetensors``.
        use_safetensors: True for no ``.bin``, False for nothing else.

    Raises:
        StoreReadError: there are none, or they cannot be read.
        StoreFormatError: they are malformed.
    """
    names = _SAFETENSORS if use_safetensors else _TORCH if use_safetensors is False else (*_SAFETENSORS, *_TORCH)
    wanted = [file_name] if file_name else [_with_variant(name, variant) for name in names]
    for name in wanted:
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            extra = [os.path.join(directory, name) for name in extra_files]
            return [open_store(path), *(open_store(more) for more in extra if os.path.isfile(more))]
    found = sorted(name for name in os.listdir(directory) if name.endswith((".safetensors", ".bin", ".index.json")))
    raise StoreReadError(
        f"directory {directory!r} has no weights: expected one of {', '.join(wanted)}; found "
        f"{', '.join(found) or 'none'}."
    )


def _with_variant(name: str, variant: str | None) -> str:
    """As transformers names them: the variant stands before the last part of the name."""
    if variant is None:
        return name
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}"
