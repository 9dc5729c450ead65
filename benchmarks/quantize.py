"""What does quantising a checkpoint take, and what is left of it?

``bert`` is a checkpoint in the shape of DistilBERT (0.27 GB): size and error of each scheme. ``large`` (2.6 GB) is
quantised in a process of its own, from a file that is not cached: memory, and speed beside that of the disk. A round
quantises, then only reads the source, only writes as much as the result has, and does both at the same time.
"""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pylomin
from benchmarks.common import Spread, run_worker, status_bytes
from benchmarks.disk import drop_caches
from benchmarks.suite import finish, parse, save
from pylomin.errors import StoreWriteError
from pylomin.io.buffers import anonymous_memory
from pylomin.io.files import WeightFile
from pylomin.quantize.packing import SCHEMES
from pylomin.store.disk import DiskWriter
from pylomin.store.writer import WeightToWrite, write_safetensors

BLOCK_BYTES = 4 << 20  # 4 MiB
READ_BYTES = 32 << 20  # 32 MiB
ALLOWED_BYTES = 64 << 20  # beside twice the largest weight
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


def errors_and_sizes(source: Path, directory: Path) -> list[dict[str, Any]]:
    """A row for each scheme."""
    rows = []
    for scheme in SCHEMES:
        path = pylomin.save_store(source, directory / f"{scheme}.safetensors", quantize=scheme, overwrite=True)
        errors = [entry.rms_error for entry in pylomin.quantization_report(path).values()]
        rows.append(
            {
                "variant": f"DistilBERT, {scheme}",
                "result_bytes": path.stat().st_size,
                "times_smaller": source.stat().st_size / path.stat().st_size,
                "rms_error": asdict(Spread.of(errors)),
            }
        )
        path.unlink()
    return rows


def plain_s(source: Path | None, target: Path, nbytes: int) -> float:
    """Seconds to read a file and, at the same time, to write so many bytes, past the page cache and in large blocks."""
    drop_caches([] if source is None else [source])
    start = time.perf_counter()
    with ThreadPoolExecutor() as threads:
        tasks = [] if source is None else [threads.submit(_read, source)]
        if nbytes:
            tasks.append(threads.submit(_write, target, nbytes))
        for task in tasks:
            task.result()
    elapsed = time.perf_counter() - start
    target.unlink(missing_ok=True)
    return elapsed


def _read(path: Path) -> None:
    file = WeightFile(path)
    buffer = memoryview(anonymous_memory(READ_BYTES))  # huge pages, as for everything that pylomin reads directly
    for position in range(0, file.size_bytes, READ_BYTES):
        file.read_direct(position, min(READ_BYTES, file.size_bytes - position), buffer)
    file.close()


def _write(path: Path, nbytes: int) -> None:
    block = memoryview(os.urandom(BLOCK_BYTES))
    with DiskWriter(str(path.parent), nbytes, StoreWriteError).create(str(path), durable=True) as output:
        for position in range(0, nbytes, BLOCK_BYTES):
            output.append(block[: nbytes - position])


def work(source: str, target: str, scheme: str) -> None:
    """Quantise once; print time and memory as JSON."""
    # Whatever is made once by the first use of torch is no part of it.
    pylomin.save_store({"w": torch.ones(64, 64)}, target, quantize=scheme, overwrite=True)
    before_bytes = status_bytes("VmRSS")
    start = time.perf_counter()
    pylomin.save_store(source, target, quantize=scheme, overwrite=True)
    elapsed = time.perf_counter() - start
    print(json.dumps({"elapsed_s": elapsed, "added_bytes": status_bytes("VmHWM") - before_bytes}))


def speed_and_memory(source: Path, directory: Path, rounds: int, scheme: str) -> dict[str, Any]:
    """Of quantising a file that is not cached, beside what the disk could do."""
    target, plain = directory / "quantised.safetensors", directory / "plain"
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        drop_caches([source])
        worker = json.dumps({"source": str(source), "target": str(target), "scheme": scheme})
        report = run_worker(["-m", "benchmarks.quantize", "--worker", worker]).report
        nbytes = target.stat().st_size
        target.unlink()
        read_s, write_s = plain_s(source, plain, 0), plain_s(None, plain, nbytes)
        both_s = plain_s(source, plain, nbytes)
        found = {
            "elapsed_s": report["elapsed_s"],
            "plain_read_s": read_s,
            "plain_write_s": write_s,
            "plain_both_s": both_s,
            "share_of_slower": max(read_s, write_s) / report["elapsed_s"],
            "share_of_both": both_s / report["elapsed_s"],
            "added_bytes": report["added_bytes"],
        }
        for name, figure in found.items():
            figures.setdefault(name, []).append(figure)
    return {
        "variant": f"decoder, {scheme}",
        "result_bytes": nbytes,
        "times_smaller": source.stat().st_size / nbytes,
        **{name: asdict(Spread.of(values)) for name, values in figures.items()},
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
    rows = errors_and_sizes(paths["bert"], directory)
    rows += [speed_and_memory(paths["large"], directory, options.rounds, scheme) for scheme in ("int8", "int4")]
    largest_bytes = max(4 * torch.Size(shape).numel() for shape in shapes["large"].values())
    settings = {
        "model": f"weights in the shape of DistilBERT ({paths['bert'].stat().st_size / 1e9:.2f} GB), and of a decoder "
        f"({paths['large'].stat().st_size / 1e9:.2f} GB; the largest weight has {largest_bytes >> 20} MiB)",
        "input": "none",
        "file_state": "cold",
        "rounds": options.rounds,
        "allowed_bytes": 2 * largest_bytes + ALLOWED_BYTES,
    }
    save(options, settings, {"rows": rows})
    finish(options, {})


if __name__ == "__main__":
    main()
