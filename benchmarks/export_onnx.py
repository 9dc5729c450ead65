"""What does it take to export a 2 GB model to ONNX, and does the graph compute what the model does?

A Llama-shaped model in float32 streams from one safetensors file, and the ONNX file is written beside it. The export
runs in a process of its own, whose peak of resident memory the system tells; then onnxruntime runs the file and the
logits are compared with those of the offloaded model.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

import pylomin
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import ROOT, run_worker, write_result
from benchmarks.tables import RESULTS

SIZES = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 9,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
TOKENS = 16


def build() -> torch.nn.Module:
    """The model of ``SIZES``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**SIZES, use_cache=False)).eval()
    return model


def tokens() -> torch.Tensor:
    """The example input."""
    return torch.randint(SIZES["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(0))


def export(checkpoint: Path) -> dict[str, Any]:
    """Export, and say how long it took."""
    model = pylomin.load(build, checkpoint)
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    pylomin.export_onnx(model, (tokens(),), onnx_path(checkpoint), overwrite=True)
    return {
        "export_s": time.perf_counter() - start_s,
        "export_cpu_s": time.process_time() - cpu_start_s,
        "process_cpu_s": time.process_time(),
        "bytes_read": pylomin.stats(model).bytes_read,
    }


def compare(checkpoint: Path) -> dict[str, Any]:
    """The largest difference of the logits of onnxruntime from those of torch."""
    import onnxruntime

    model = pylomin.load(build, checkpoint)
    with torch.inference_mode():
        expected = model(tokens()).logits
    del model
    session = onnxruntime.InferenceSession(onnx_path(checkpoint))
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: tokens().numpy()})[0])
    return {
        "largest_difference": float((found - expected).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "same_tokens": bool(torch.equal(found.argmax(-1), expected.argmax(-1))),
        "onnxruntime": onnxruntime.__version__,
    }


def onnx_path(checkpoint: Path) -> Path:
    """Beside the weights, so that it can refer to them."""
    return checkpoint.with_suffix(".onnx")


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--publish", action="store_true", help="result to docs/results")
    parser.add_argument("--directory", type=Path, default=ROOT / ".demo" / "export", help="for the checkpoint")
    parser.add_argument("--worker", choices=("export", "compare"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    checkpoint = arguments.directory / "model.safetensors"
    if arguments.worker:
        print(json.dumps({"export": export, "compare": compare}[arguments.worker](checkpoint)))
        return
    random_checkpoint(build, f"export_onnx {SIZES}", checkpoint)
    command = ["-m", "benchmarks.export_onnx", "--directory", str(arguments.directory.resolve()), "--worker"]
    exported = run_worker([*command, "export"]).report
    # Of the one child so far; in KiB, but for macOS, which counts bytes.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    results = {
        **exported,
        "peak_bytes": peak if sys.platform == "darwin" else peak << 10,
        "weight_bytes": checkpoint.stat().st_size,
        "onnx_bytes": onnx_path(checkpoint).stat().st_size,
        "files": sorted(path.name for path in arguments.directory.iterdir()),
        **run_worker([*command, "compare"]).report,
    }
    path = (RESULTS if arguments.publish else arguments.output) / "export_onnx.json"
    write_result(path, {**SIZES, "dtype": "float32", "tokens": TOKENS}, results)
    print(
        f"{results['weight_bytes'] / 1e9:.2f} GB of weights exported in {results['process_cpu_s']:.0f} s of CPU and "
        f"{results['peak_bytes'] / 2**20:.0f} MiB; the file has {results['onnx_bytes'] / 1e6:.1f} MB; largest "
        f"difference {results['largest_difference']:.1e} of {results['largest_logit']:.1e}."
    )
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
