"""Models of transformers, from the directories that ``save_pretrained`` made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pylomin.errors import MissingPackageError


def is_pretrained(path: Path) -> bool:
    """Whether this is such a directory, and not one with weights alone."""
    try:
        config = json.loads((path / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "model_type" in config


def open_model(
    directory: Path, *, memory_budget: int | None = None, dtype: str | None = None, auto_class: str | None = None
) -> Any:
    """The model, offloaded, of the class that it was saved from unless an auto class is named."""
    from pylomin.pretrained.loading import from_pretrained

    transformers = import_transformers()
    model_class = getattr(transformers, auto_class) if auto_class else _saved_class(transformers, directory)
    return from_pretrained(model_class, directory, memory_budget=memory_budget, dtype=dtype)


def import_transformers() -> Any:
    """Import transformers, without its progress bars: they are about loading what is not loaded here.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingPackageError(
            f"models of transformers need it: pip install 'pylomin[transformers]'. ({error})"
        ) from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _saved_class(transformers: Any, directory: Path) -> Any:
    try:
        names = json.loads((directory / "config.json").read_bytes()).get("architectures") or []
    except (OSError, ValueError, AttributeError):
        names = []  # from_pretrained says what is wrong
    found = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    return transformers.AutoModel if found is None else found


def example_inputs(model: Any, tokens: int, *, batch: int = 1) -> dict[str, Any] | None:
    """Arguments for one forward; None for a kind of model that is not known here."""
    import torch

    config = model.config
    if model.main_input_name == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        ids = torch.arange(1, tokens + 1).remainder(vocabulary).repeat(batch, 1)
        return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
    if model.main_input_name == "pixel_values" and getattr(config, "image_size", None):
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return {
            "pixel_values": torch.zeros(batch, getattr(config, "num_channels", 3), height, width, dtype=model.dtype)
        }
    return None


def dynamic_shapes(inputs: dict[str, Any]) -> dict[str, dict[int, Any]]:
    """The batch, and of token ids the length, may differ from the example's."""
    import torch

    return {
        name: dict.fromkeys(range(2) if name.endswith("input_ids") else range(1), torch.export.Dim.DYNAMIC)
        for name in inputs
    }
