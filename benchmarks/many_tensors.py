"""How long does ``pylomin.load`` take for a checkpoint of very many tensors?

1,000, 3,000 and 10,000 tensors, 50 to a shard, small and large; files cached. What is measured in turn: the whole of
``load``, and of that the model's own construction without weights.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pylomin
from benchmarks.common import Spread
from benchmarks.suite import finish, parse, save
from pylomin.store.writer import WeightToWrite, write_safetensors

COUNTS = {"full": (1_000, 3_000, 10_000), "tiny": (50, 150)}
WIDTHS = {"full": (16, 128), "tiny": (4, 16)}  # of Linear(n, n): 1 and 64 KiB a tensor
TENSORS_PER_SHARD = 50
INDEX = "model.safetensors.index.json"


def build(tensors: int, width: int) -> nn.Module:
    """A model of as many weights."""
    return nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(tensors))


def sharded_checkpoint(tensors: int, width: int, directory: Path) -> Path:
    """Write the shards and their index, unless they are there."""
    index = directory / INDEX
    if index.exists():
        return index
    print(f"Writing {directory}", flush=True)
    directory.mkdir(parents=True, exist_ok=True)
    shards = -(-tensors // TENSORS_PER_SHARD)
    weight_map = {}
    weight = torch.full((width, width), 0.5)
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        numbers = range(shard * TENSORS_PER_SHARD, min((shard + 1) * TENSORS_PER_SHARD, tensors))
        names = [f"{number}.weight" for number in numbers]
        weight_map.update(dict.fromkeys(names, file))
        write_safetensors(
            directory / file,
            [WeightToWrite(name, torch.float32, (width, width), lambda: weight) for name in names],
            overwrite=True,
        )
    size_bytes = tensors * weight.numel() * 4
    index.write_text(json.dumps({"metadata": {"total_size": size_bytes}, "weight_map": weight_map}))  # written last
    return index


def construct(tensors: int, width: int) -> nn.Module:
    """The model without values."""
    with torch.device("meta"):
        return build(tensors, width)


def load(tensors: int, width: int, directory: Path) -> nn.Module:
    """What is measured."""
    model: nn.Module = pylomin.load(partial(build, tensors, width), directory)
    return model


def seconds(function: Callable[[], nn.Module]) -> float:
    """Time until the model is there; the last one is gone before."""
    gc.collect()
    start = time.perf_counter()
    model = function()
    elapsed_s = time.perf_counter() - start
    del model
    return elapsed_s


def main() -> None:
    """Measure and write the result."""
    options = parse("many_tensors", __doc__, rounds=5, limit_s=120)
    options.make_room("many_tensors", 2 << 30)
    root = options.directory("many_tensors")
    cases = [(tensors, width) for width in WIDTHS[options.size] for tensors in COUNTS[options.size]]
    directories = {case: sharded_checkpoint(*case, root / f"{case[0]}-{case[1]}").parent for case in cases}
    load_s: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    construct_s: dict[tuple[int, int], list[float]] = {case: [] for case in cases}
    for _ in range(options.rounds):
        for case, directory in directories.items():
            load_s[case].append(seconds(partial(load, *case, directory)))
            construct_s[case].append(seconds(partial(construct, *case)))
        if time.perf_counter() > options.deadline:
            break
    rows: list[dict[str, Any]] = [
        {
            "variant": f"{tensors:,} tensors",
            "tensors": tensors,
            "shards": -(-tensors // TENSORS_PER_SHARD),
            "weight_bytes": 4 * width * width * tensors,
            "load_s": asdict(Spread.of(load_s[tensors, width])),
            "construct_s": asdict(Spread.of(construct_s[tensors, width])),
            "us_per_tensor": Spread.of(load_s[tensors, width]).median / tensors * 1e6,
        }
        for tensors, width in cases
    ]
    settings = {
        "model": "ModuleList of Linear",
        "input": "none",
        "file_state": "cached",
        "rounds": len(load_s[cases[0]]),
    }
    save(options, settings, {"rows": rows})
    finish(options, {})


if __name__ == "__main__":
    main()
