"""How long does opening a checkpoint of each format take, how much does it read, and what memory does a pass take?"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open
from torch import nn

import pylomin
from benchmarks.checkpoints import accelerate_folder, random_checkpoint
from benchmarks.common import Spread, WorkerError, run_worker, status_bytes
from benchmarks.suite import Options, finish, parse, save

SIZES = {"full": (4096, 32), "tiny": (256, 3)}  # width and number of the layers
ALLOWED_BYTES = 64 << 20  # beside twice the largest tensor
NEEDED_BYTES = 5 << 30
FORWARDS = 3
SAFETENSORS = "safetensors"


def build(width: int, layers: int) -> nn.Sequential:
    """Layers, of 64 MiB each at full size."""
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])


def _weights(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(checkpoint, "pt") as file:
        for name in file.keys():  # noqa: SIM118 # the file cannot be iterated over
            yield name, file.get_tensor(name)


# Writers: from the safetensors file and a fresh directory to the path that is opened.


def _torch_zip(checkpoint: Path, directory: Path) -> Path:
    torch.save({name: tensor.clone() for name, tensor in _weights(checkpoint)}, directory / "model.bin")
    return directory / "model.bin"


def _torch_transposed(checkpoint: Path, directory: Path) -> Path:
    torch.save({name: tensor.t().contiguous().t() for name, tensor in _weights(checkpoint)}, directory / "model.bin")
    return directory / "model.bin"


def _torch_legacy(checkpoint: Path, directory: Path) -> Path:
    state = {name: tensor.clone() for name, tensor in _weights(checkpoint)}
    torch.save(state, directory / "model.pt", _use_new_zipfile_serialization=False)
    return directory / "model.pt"


def _torch_shards(checkpoint: Path, directory: Path) -> Path:
    weight_map = {}
    for number, (name, tensor) in enumerate(_weights(checkpoint)):
        weight_map[name] = f"pytorch_model-{number:05}.bin"
        torch.save({name: tensor.clone()}, directory / weight_map[name])
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def _npz(checkpoint: Path, directory: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(directory / "model.npz", "w", method, compresslevel=1) as archive:
        for name, tensor in _weights(checkpoint):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                numpy.lib.format.write_array(entry, tensor.numpy())
    return directory / "model.npz"


def _compressed_npz(checkpoint: Path, directory: Path) -> Path:
    return _npz(checkpoint, directory, zipfile.ZIP_DEFLATED)


def _npy(checkpoint: Path, directory: Path) -> Path:
    for name, tensor in _weights(checkpoint):
        numpy.save(directory / f"{name}.npy", tensor.numpy())
    return directory


def _gguf(checkpoint: Path, directory: Path, quantization: str = "F32") -> Path:
    import gguf

    kind = gguf.GGMLQuantizationType[quantization]
    writer = gguf.GGUFWriter(directory / "model.gguf", "none")
    for name, tensor in _weights(checkpoint):
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / "model.gguf"


def _gguf_q8_0(checkpoint: Path, directory: Path) -> Path:
    return _gguf(checkpoint, directory, "Q8_0")


# Name: writer, how the path becomes what is opened, and whether the weights are those of the safetensors file exactly.
OnRamp = tuple[Callable[[Path, Path], Path], Callable[[Path], Any], bool]


def _memmaps(path: Path) -> Mapping[str, Any]:
    return {file.stem: numpy.load(file, mmap_mode="r") for file in path.glob("*.npy")}


def _loader(path: Path) -> pylomin.ShardedWeightsLoader:
    return pylomin.ShardedWeightsLoader(path, path.parent)


ON_RAMPS: dict[str, OnRamp] = {
    SAFETENSORS: (lambda checkpoint, directory: checkpoint, Path, True),
    "torch zip": (_torch_zip, Path, True),
    "torch zip, transposed": (_torch_transposed, Path, True),
    "torch legacy": (_torch_legacy, Path, True),
    "torch shards": (_torch_shards, Path, True),
    "ShardedWeightsLoader": (_torch_shards, _loader, True),
    "npz": (_npz, Path, True),
    "npz, compressed": (_compressed_npz, Path, True),
    "npy directory": (_npy, Path, True),
    "numpy memmaps": (_npy, _memmaps, True),
    "accelerate folder": (lambda checkpoint, directory: accelerate_folder(checkpoint, directory), Path, True),
    "gguf F32": (_gguf, Path, True),
    "gguf Q8_0": (_gguf_q8_0, Path, False),
}


def measure(name: str, path: Path, width: int, layers: int) -> dict[str, Any]:
    """Open, load and run in this process, which does nothing else. Memory is what the kernel counts (VmHWM)."""
    as_source = ON_RAMPS[name][1]
    torch.set_num_threads(1)
    with torch.no_grad():
        # What the first use of everything takes is not the checkpoint's.
        pylomin.load(lambda: nn.Linear(2, 2), nn.Linear(2, 2).state_dict())(torch.ones(1, 2))
        x = torch.linspace(-1, 1, width)[None]
        source = as_source(path)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = status_bytes("VmRSS")
        read_before, start = _bytes_read(), time.perf_counter()
        store = pylomin.open_store(source)
        opening_s, opening_bytes = time.perf_counter() - start, _bytes_read() - read_before
        model = pylomin.load(lambda: build(width, layers), store)
        loading_bytes = _bytes_read() - read_before
        times_s = []
        for _ in range(FORWARDS):
            start = time.perf_counter()
            output = model(x)
            times_s.append(time.perf_counter() - start)
    return {
        "opening_s": opening_s,
        "opening_bytes_read": opening_bytes,
        "loading_bytes_read": loading_bytes,
        "peak_growth_bytes": status_bytes("VmHWM") - before,
        "peak_bytes": status_bytes("VmHWM"),
        "forward_s": statistics.median(times_s),
        "output": output.double().sum().item(),
    }


def _bytes_read() -> int:
    """Bytes that this process got from read calls, cached or not."""
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


def main() -> None:
    """Measure each format in processes of its own, and write the results; fail if one takes more than the limit."""
    options = parse("onramps", __doc__, rounds=3, limit_s=800)
    width, layers = SIZES[options.size]
    if options.worker:
        print(json.dumps(measure(options.worker["name"], Path(options.worker["path"]), width, layers)))
        return
    options.make_room("onramps", NEEDED_BYTES)
    directory = options.directory("onramps")
    checkpoint = random_checkpoint(lambda: build(width, layers), f"{layers} x {width}", directory / "model.safetensors")
    limit_bytes = 2 * width * width * 4 + ALLOWED_BYTES
    rows = [
        {"variant": name, **_compare(options, name, checkpoint, directory / "format", limit_bytes)} for name in ON_RAMPS
    ]
    settings = {
        "model": f"{layers} linear layers of {width * width * 4 >> 20} MiB",
        "input": "batch 1",
        "file_state": "cached",
        "checkpoint_bytes": layers * width * width * 4,
        "limit_bytes": limit_bytes,
        "rounds": options.rounds,
    }
    save(options, settings, {"rows": rows})
    wrong = {
        row["variant"]: row.get("error", f"grows by more than {limit_bytes} bytes")
        for row in rows
        if not row.get("within_limit")
    }
    finish(options, wrong, required=wrong)


def _compare(options: Options, name: str, checkpoint: Path, directory: Path, limit_bytes: int) -> dict[str, Any]:
    print(f"--- {name}", flush=True)
    write, _, exact = ON_RAMPS[name]
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()

    def run(of: str, path: Path) -> dict[str, Any]:
        worker = json.dumps({"name": of, "path": str(path)})
        return run_worker(["-m", "benchmarks.onramps", "--size", options.size, "--worker", worker]).report

    try:
        path = write(checkpoint, directory)
        runs, ratios = [], []
        for _ in range(options.rounds):
            reference = run(SAFETENSORS, checkpoint)
            runs.append(run(name, path))
            ratios.append(runs[-1]["forward_s"] / reference["forward_s"])
            if exact and runs[-1]["output"] != reference["output"]:
                return {"error": f"output {runs[-1]['output']}, not {reference['output']}"}
    except WorkerError as error:
        print(error, file=sys.stderr)
        return {"error": str(error).splitlines()[-1]}
    finally:
        shutil.rmtree(directory)
    peak_bytes = max(one["peak_growth_bytes"] for one in runs)
    result = {
        "opening_s": asdict(Spread.of([one["opening_s"] for one in runs])),
        "opening_bytes_read": max(one["opening_bytes_read"] for one in runs),
        "loading_bytes_read": max(one["loading_bytes_read"] for one in runs),
        "peak_growth_bytes": peak_bytes,
        "within_limit": peak_bytes <= limit_bytes,
        "forward_s": asdict(Spread.of([one["forward_s"] for one in runs])),
        "times_safetensors": asdict(Spread.of(ratios)),
    }
    return result


if __name__ == "__main__":
    main()
