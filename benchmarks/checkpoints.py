"""Random checkpoints for benchmarks, of any size: one tensor is in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from pylomin.store.writer import WeightToWrite, write_safetensors


def random_checkpoint(model_fn: Callable[[], nn.Module], recipe: str, path: Path) -> Path:
    """Write weights for the model that ``model_fn`` builds, unless ``path`` already holds them.

    Weights are normal(0, 0.02), those of layer norms normal(1, 0.02), from a fixed seed. ``recipe``
    is kept in the file and tells whether the file there is the one that is wanted.
    """
    metadata = {"recipe": recipe}
    if _metadata(path) == metadata:
        return path
    print(f"Writing {path}", flush=True)
    with torch.device("meta"):
        template = model_fn().state_dict()
    generator = torch.Generator().manual_seed(0)

    def make(name: str) -> torch.Tensor:
        mean = 1.0 if name.lower().endswith("norm.weight") else 0.0
        weight = torch.empty_like(template[name], device="cpu")
        return weight.normal_(mean, 0.02, generator=generator)

    path.parent.mkdir(parents=True, exist_ok=True)
    weights = [
        WeightToWrite(name, tensor.dtype, tuple(tensor.shape), partial(make, name)) for name, tensor in template.items()
    ]
    write_safetensors(path, weights, metadata=metadata, overwrite=True)
    os.sync()  # else the system writes it during the measurements
    return path


def _metadata(path: Path) -> dict[str, str] | None:
    """What the file says of itself; ``None`` if it is missing or not as long as its header says."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata())
    except (OSError, SafetensorError):
        return None


def accelerate_folder(checkpoint: Path, folder: Path) -> Path:
    """Write the folder that accelerate's ``disk_offload`` reads, unless a newer one is there."""
    from accelerate.utils import offload_weight, save_offload_index

    index_file = folder / "index.json"  # written last
    if index_file.exists() and index_file.stat().st_mtime > checkpoint.stat().st_mtime:
        return folder
    print(f"Writing {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {}
    with safe_open(checkpoint, "pt") as file:
        for name in file.keys():  # noqa: SIM118 # the file cannot be iterated over
            offload_weight(file.get_tensor(name), name, str(folder), index)
    save_offload_index(index, str(folder))
    os.sync()
    return folder
