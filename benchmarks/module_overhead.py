"""What does a rewritten module cost when nothing has to be read?

128 layers ``Linear(64, 64)`` in a row, so small that the time goes into calling modules. The plain model takes turns
with one whose weights are offloaded but all resident under its memory budget, and with accelerate's two ways.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

import pylomin
from benchmarks.common import Spread, time_call
from benchmarks.suite import finish, parse, save

LAYERS = 128
WIDTH = 64
PASSES_PER_ROUND = {"plain": 20, "pylomin, all resident": 20}  # others are slow, and their times differ less
CPU = torch.device("cpu")


def build(directory: str) -> dict[str, nn.Module]:
    """The same model in every way."""
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).eval()
    in_ram, on_disk = copy.deepcopy(plain), copy.deepcopy(plain)
    cpu_offload(in_ram, execution_device=CPU)
    disk_offload(on_disk, directory, execution_device=CPU)
    return {
        "plain": plain,
        "pylomin, all resident": pylomin.lazy_loading(copy.deepcopy(plain), memory_budget="1GiB"),
        "accelerate cpu_offload": in_ram,
        "accelerate disk_offload": on_disk,
    }


def measure(models: Mapping[str, nn.Module], rounds: int, deadline: float) -> dict[str, list[float]]:
    """Seconds of a pass, one for each round: the quickest of some, since interruptions only ever add time."""
    batch = torch.randn(1, WIDTH)
    times_s: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        expected = models["plain"](batch)
        for name, model in models.items():
            assert torch.equal(model(batch), expected), name
        for _ in range(rounds):
            for name, model in models.items():
                times_s[name].append(min(time_call(partial(model, batch), PASSES_PER_ROUND.get(name, 2))))
            if time.perf_counter() > deadline:
                break
    return times_s


def main() -> None:
    """Measure and write the result."""
    options = parse("module_overhead", __doc__, rounds=50, limit_s=60)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        times_s = measure(build(directory), options.rounds if options.size == "full" else 3, options.deadline)
    plain_s = times_s["plain"]
    rows: list[dict[str, Any]] = [
        {
            "variant": name,
            "us_per_call": asdict(Spread.of([time / LAYERS * 1e6 for time in of_variant])),
            "added_us_per_call": asdict(
                Spread.of([(time - other) / LAYERS * 1e6 for time, other in zip(of_variant, plain_s, strict=True)])
            ),
        }
        for name, of_variant in times_s.items()
    ]
    settings = {
        "model": f"{LAYERS} Linear({WIDTH}, {WIDTH}) in a row",
        "input": "batch 1",
        "file_state": "cached",
        "rounds": len(plain_s),
        "passes_per_round": PASSES_PER_ROUND["plain"],
        "threads": 1,
    }
    save(options, settings, {"rows": rows})
    finish(options, {})


if __name__ == "__main__":
    main()
