"""How fast does the host fill the ring of pinned memory that weights pass through on their way to a GPU?

By one thread and by several, from the disk past the page cache, and from the page cache. There is no GPU in this:
copies from the ring take no time, so that what is measured is what the host can do.
"""

from __future__ import annotations

import time
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pylomin
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import Spread
from benchmarks.disk import disk_bandwidth, drop_caches
from benchmarks.suite import finish, parse, save
from pylomin.io.modes import Mode
from pylomin.lazy.offload import residencies_of
from pylomin.residency import device as devices
from pylomin.residency.cuda import tensor_on
from pylomin.residency.device import Bytes, Event

WIDTHS = {"full": 4096, "tiny": 512}  # 64 MiB in each weight
LAYERS = {"full": 20, "tiny": 4}
READERS = (1, 2, 4)
MODES: dict[str, Mode] = {"cold, direct": "direct", "cached, buffered": "buffered"}
NOWHERE = torch.device("cpu", 7)


class Past:
    """A point in a stream in which all is done at once."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        """It is in the past."""


class Nowhere:
    """A device to which everything is copied in no time; see :class:`pylomin.residency.device.Device`."""

    copy_stream: Hashable = "copy"
    urgent_stream: Hashable = "urgent"
    memory_stream: Hashable = "memory"

    def current_stream(self) -> Hashable:
        return "compute"

    def on(self, stream: Hashable) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self, stream: Hashable) -> Event:
        return Past()

    def wait(self, stream: Hashable, event: Event) -> None:
        """Nothing is under way."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Takes no time."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def tensor(self, of: Bytes) -> torch.Tensor:
        return tensor_on(of, NOWHERE)

    def pin(self, address: int, nbytes: int) -> str | None:
        return None

    def unpin(self, address: int) -> None:
        """It was not pinned."""

    def free_bytes(self) -> int:
        return 1 << 40

    def is_capturing(self) -> bool:
        return False

    def finish(self) -> None:
        """Everything is."""


def build(size: str) -> nn.Module:
    """Layers of one weight each."""
    width = WIDTHS[size]
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(LAYERS[size])])


def pass_s(model: nn.Module) -> float:
    """Seconds to bring every weight to the device, one after the other; nothing is computed."""
    (residency,) = residencies_of(model)
    start = time.perf_counter()
    for parameter in model.parameters():
        with residency.hold([parameter.weight]):  # type: ignore[attr-defined]
            pass
    return time.perf_counter() - start


def measure(path: Path, size: str, rounds: int, deadline: float) -> tuple[dict[str, list[float]], list[float], str]:
    """Seconds of a pass by variant, the speed of the disk in each round, and what was done to make it cold."""
    models = {
        (name, count): pylomin.prefetch(
            pylomin.load(lambda: build(size), path, device=NOWHERE, reading_mode=mode), readers=count
        )
        for name, mode in MODES.items()
        for count in READERS
    }
    times_s: dict[str, list[float]] = {}
    disk: list[float] = []
    done = ""
    for round_number in range(rounds):
        done = drop_caches([path])
        disk.append(disk_bandwidth(path))
        for (name, count), model in models.items():
            if name.startswith("cold"):
                drop_caches([path])
            else:
                path.read_bytes()
            threads = "1 thread" if count == 1 else f"{count} threads"
            times_s.setdefault(f"{name}, {threads}", []).append(pass_s(model))
        if round_number and time.perf_counter() > deadline:
            break
    return times_s, disk, done


def main() -> None:
    """Measure and write the result."""
    options = parse("readers", __doc__, rounds=7, limit_s=180)
    options.make_room("readers", 1400 << 20)
    path = options.directory("readers") / "model.safetensors"
    random_checkpoint(lambda: build(options.size), f"linears {options.size}", path)
    devices.provide(NOWHERE, lambda _: Nowhere())
    nbytes = path.stat().st_size
    times_s, disk, done = measure(path, options.size, options.rounds, options.deadline)
    alone = {name: times_s[f"{name}, 1 thread"] for name in MODES}
    rows: list[dict[str, Any]] = [
        {
            "variant": variant,
            "bytes_per_s": asdict(Spread.of([nbytes / time_s for time_s in of_variant])),
            "times_one": asdict(
                Spread.of([one / s for one, s in zip(alone[variant.rpartition(",")[0]], of_variant, strict=True)])
            ),
        }
        for variant, of_variant in times_s.items()
    ]
    settings = {
        "model": f"{LAYERS[options.size]} weights of {nbytes / LAYERS[options.size] / (1 << 20):.0f} MiB",
        "input": "none",
        "file_state": "as each row says",
        "rounds": len(disk),
        "conditions": [
            f"cold: {done}",
            f"the disk alone, in pieces of 16 MiB: {Spread.of(disk).median / 1e9:.2f} GB/s",
        ],
    }
    save(options, settings, {"rows": rows, "disk_bytes_per_s": asdict(Spread.of(disk))})
    finish(options, {})


if __name__ == "__main__":
    main()
