"""What does quantising a checkpoint take, and what is left of it?

``bert`` is a checkpoint in the shape of DistilBERT (0.27 GB): size and error of each scheme. ``large`` (2.6 GB) is
quantised in a process of its own, from a file that is not cached: memory, and speed beside the speed of the disk. Every
round first reads the source and writes as much as the result has, plainly, then quantises.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pylomin
from benchmarks.common import Spread, run_worker
from benchmarks.disk import drop_caches
from benchmarks.suite import parse, save
from pylomin.quantize.packing import SCHEMES
from pylomin.store.writer import WeightToWrite, write_safetensors

BLOCK_BYTES = 16 << 20  # 16 MiB
Shapes = dict[str, tuple[int, ...]]


def bert_shapes(layers: int, width: int, words: int) -> Shapes:
    """The weights of DistilBERT."""
    shapes: Shapes = {"embeddings.word": (words, width), "embeddings.position": (512, width)}
    for layer in range(layers):
        for name in ("q", "k", "v", "out"):
            shapes[f"{layer}.attention.{name}.weight"] = (width, width)
            shapes[f"{layer}.attention.{name}.bias"] = (width,)
        shapes |= {f"{layer}.up.weight": (4 * width, width), f"{layer}.up.bias": (4 * width,)}
        shapes |= {f"{layer}.down.weight": (width, 4 * width), f"{layer}.down.bias": (width,)}
        shapes |= {f"{layer}.norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
    return shapes


def decoder_shapes(layers: int, width: int, words: int) -> Shapes:
    """The weights of a decoder with gated layers."""
    shapes: Shapes = {"embedding.weight": (words, width)}
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            shapes[f"{layer}.{name}.weight"] = (width, width)
        shapes |= {f"{layer}.{name}.weight": (11 * width // 4, width) for name in ("gate", "up")}
        shapes |= {f"{layer}.down.weight": (width, 11 * width // 4), f"{layer}.norm.weight": (width,)}
    return shapes


SIZES: dict[str, dict[str, Shapes]] = {
    "full": {"bert": bert_shapes(6, 768, 30522), "large": decoder_shapes(12, 2048, 32000)},
    "tiny": {"bert": bert_shapes(2, 128, 1000), "large": decoder_shapes(2, 256, 1000)},
}


def write_random(path: Path, shapes: Shapes) -> None:
    """Normal values whose scale varies from row to row, as in trained models."""
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        rows = 0.5 + torch.rand(*shape[:-1], 1, generator=generator)
        return torch.randn(shape, generator=generator) * rows * 0.02

    weights = [WeightToWrite(name, torch.float32, shape, partial(make, shape)) for name, shape in shapes.items()]
    write_safetensors(path, weights, metadata={"format": "pt"}, overwrite=True)


def errors_and_sizes(source: Path, directory: Path) -> dict[str, Any]:
    """For each scheme."""
    found = {}
    for scheme in SCHEMES:
        path = pylomin.save_store(source, directory / f"{scheme}.safetensors", quantize=scheme, overwrite=True)
        errors = [entry.rms_error for entry in pylomin.quantization_report(path).values()]
        found[scheme] = {
            "bytes": path.stat().st_size,
            "times_smaller": source.stat().st_size / path.stat().st_size,
            "rms_error": asdict(Spread.of(errors)),
        }
        path.unlink()
    return found


def plain_read_s(path: Path) -> float:
    """Seconds to read a file in large blocks."""
    drop_caches([path])
    buffer = bytearray(BLOCK_BYTES)
    start = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def plain_write_s(path: Path, nbytes: int) -> float:
    """Seconds to write so many bytes, and to have them on disk."""
    block = os.urandom(BLOCK_BYTES)
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-nbytes // BLOCK_BYTES)):
            file.write(block)
        os.fsync(file.fileno())
    elapsed = time.perf_counter() - start
    path.unlink()
    return elapsed


def work(source: str, target: str, scheme: str) -> None:
    """Quantise once; print time and memory as JSON."""
    # Whatever is made once by the first use of torch is no part of it.
    pylomin.save_store({"w": torch.ones(64, 64)}, target, quantize=scheme, overwrite=True)
    with open("/proc/self/statm") as file:
        before_bytes = int(file.read().split()[1]) * resource.getpagesize()
    start = time.perf_counter()
    pylomin.save_store(source, target, quantize=scheme, overwrite=True)
    elapsed = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({"elapsed_s": elapsed, "added_bytes": max(0, peak_bytes - before_bytes)}))


def speed_and_memory(source: Path, directory: Path, rounds: int, scheme: str) -> dict[str, Any]:
    """Of quantising a file that is not cached, beside what the disk could do."""
    target = directory / "quantised.safetensors"
    times_s, shares, added = [], [], []
    read_s, write_s = [], []
    for _ in range(rounds):
        read_s.append(plain_read_s(source))
        drop_caches([source])
        worker = json.dumps({"source": str(source), "target": str(target), "scheme": scheme})
        run = run_worker(["-m", "benchmarks.quantize", "--worker", worker])
        write_s.append(plain_write_s(directory / "plain", target.stat().st_size))
        times_s.append(run.report["elapsed_s"])
        added.append(run.report["added_bytes"])
        shares.append(max(read_s[-1], write_s[-1]) / times_s[-1])
        target.unlink()
    return {
        "source_bytes": source.stat().st_size,
        "elapsed_s": asdict(Spread.of(times_s)),
        "plain_read_s": asdict(Spread.of(read_s)),
        "plain_write_s": asdict(Spread.of(write_s)),
        "share_of_disk_speed": asdict(Spread.of(shares)),
        "added_bytes": asdict(Spread.of(added)),
    }


def main() -> None:
    """Measure and write the result."""
    options = parse("quantize", __doc__, rounds=3, limit_s=600)
    if options.worker is not None:
        work(**options.worker)
        return
    shapes = SIZES[options.size]
    options.make_room("quantize", 4 << 30)  # 4 GiB
    directory = options.directory("quantize")
    paths = {name: directory / f"{name}.safetensors" for name in shapes}
    for name, path in paths.items():
        if not path.exists():
            write_random(path, shapes[name])
    results: dict[str, Any] = {"bert": errors_and_sizes(paths["bert"], directory)}
    results["large"] = {
        scheme: speed_and_memory(paths["large"], directory, options.rounds, scheme) for scheme in ("int8", "int4")
    }
    largest_bytes = max(4 * torch.Size(shape).numel() for shape in shapes["large"].values())
    save(options, {"rounds": options.rounds, "largest_weight_bytes": largest_bytes}, results)
    for scheme, found in results["bert"].items():
        print(
            f"{scheme:8} {found['bytes'] / 1e9:.4f} GB, {found['times_smaller']:.2f} times smaller, relative RMS error "
            f"{found['rms_error']['median']:.3%}, at most {found['rms_error']['largest']:.3%}"
        )
    for scheme, found in results["large"].items():
        print(
            f"{scheme:8} {found['source_bytes'] / 1e9:.2f} GB in {found['elapsed_s']['median']:.2f} s, "
            f"{found['share_of_disk_speed']['median']:.2f} of the disk's speed, "
            f"{found['added_bytes']['median'] / 2**20:.0f} MiB "
            f"(largest weight: {largest_bytes / 2**20:.0f} MiB)"
        )
    print(f"Written: {options.result}")


if __name__ == "__main__":
    main()
