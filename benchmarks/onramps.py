"""Time to open, bytes read and peak memory for a checkpoint of each format: ``python -m benchmarks.onramps``."""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open
from torch import nn

import pylomin
from benchmarks.checkpoints import accelerate_folder, random_checkpoint
from benchmarks.common import ROOT, WorkerError, run_worker, write_result

WIDTH = 4096
LAYERS = 32
LAYER_BYTES = WIDTH * WIDTH * 4  # 64 MiB
LIMIT_BYTES = 2 * LAYER_BYTES + (64 << 20)
FORWARDS = 3
SAFETENSORS = "safetensors"


def build() -> nn.Sequential:
    """32 layers of 64 MiB: 2 GiB."""
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])


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


def measure(name: str, path: Path) -> dict[str, Any]:
    """Open, load and run in this process, which does nothing else. Memory is what the kernel counts (VmHWM)."""
    as_source = ON_RAMPS[name][1]
    torch.set_num_threads(1)
    with torch.no_grad():
        # What the first use of everything takes is not the checkpoint's.
        pylomin.load(lambda: nn.Linear(2, 2), nn.Linear(2, 2).state_dict())(torch.ones(1, 2))
        x = torch.linspace(-1, 1, WIDTH)[None]
        source = as_source(path)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status("VmRSS")
        read_before, start = _bytes_read(), time.perf_counter()
        store = pylomin.open_store(source)
        opening_s, opening_bytes = time.perf_counter() - start, _bytes_read() - read_before
        model = pylomin.load(build, store)
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
        "peak_growth_bytes": _status("VmHWM") - before,
        "peak_bytes": _status("VmHWM"),
        "forward_s": statistics.median(times_s),
        "output": output.double().sum().item(),
    }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def _bytes_read() -> int:
    """Bytes that this process got from read calls, cached or not."""
    return int(Path("/proc/self/io").read_text().splitlines()[0].split()[1])


def main() -> None:
    """Measure each format in processes of its own, and write the results; fail if one takes more than the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each format, in turn with safetensors")
    parser.add_argument("--directory", type=Path, help="where to write checkpoints; default: a temporary directory")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "onramps.json")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    if unknown := set(arguments.names) - ON_RAMPS.keys():
        parser.error(f"no format {', '.join(sorted(unknown))}; there are {', '.join(ON_RAMPS)}")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        checkpoint = random_checkpoint(build, f"{LAYERS} x {WIDTH}", Path(scratch) / "model.safetensors")
        names = arguments.names or ON_RAMPS
        results = {name: _compare(name, checkpoint, Path(scratch), arguments.rounds) for name in names}
    settings = {"layers": LAYERS, "layer_bytes": LAYER_BYTES, "limit_bytes": LIMIT_BYTES, "rounds": arguments.rounds}
    write_result(arguments.output, settings, {"cache": "warm", "formats": results})
    failed = [name for name, result in results.items() if not result.get("within_limit")]
    if failed:
        raise SystemExit(f"above {LIMIT_BYTES} bytes, wrong or failed: {', '.join(failed)}")


def _compare(name: str, checkpoint: Path, scratch: Path, rounds: int) -> dict[str, Any]:
    print(f"--- {name}", flush=True)
    write, _, exact = ON_RAMPS[name]
    directory = scratch / "format"
    directory.mkdir()
    try:
        path = write(checkpoint, directory)
        runs, ratios = [], []
        for _ in range(rounds):
            reference = _run(SAFETENSORS, checkpoint)
            runs.append(_run(name, path))
            ratios.append(runs[-1]["forward_s"] / reference["forward_s"])
            if exact and runs[-1]["output"] != reference["output"]:
                return {"error": f"output {runs[-1]['output']}, not {reference['output']}"}
    except WorkerError as error:
        print(error, file=sys.stderr)
        return {"error": str(error).splitlines()[-1]}
    finally:
        shutil.rmtree(directory)
    peak_bytes = max(run["peak_growth_bytes"] for run in runs)
    result = {
        "opening_s": statistics.median(run["opening_s"] for run in runs),
        "opening_bytes_read": max(run["opening_bytes_read"] for run in runs),
        "loading_bytes_read": max(run["loading_bytes_read"] for run in runs),
        "peak_growth_bytes": peak_bytes,
        "within_limit": peak_bytes <= LIMIT_BYTES,
        "forward_s": statistics.median(run["forward_s"] for run in runs),
        "forward_to_safetensors": [min(ratios), statistics.median(ratios), max(ratios)],
    }
    print(json.dumps(result), flush=True)
    return result


def _run(name: str, path: Path) -> dict[str, Any]:
    return run_worker(["-m", "benchmarks.onramps", "--measure", name, str(path)]).report


if __name__ == "__main__":
    main()
