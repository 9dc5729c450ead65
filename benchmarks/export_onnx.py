"""What does it take to export a 2 GB model to ONNX, and does the graph compute what the model does?

A Llama-shaped model in float32 streams from one safetensors file, and the ONNX file is written beside it. The export
runs in a process of its own, whose peak of resident memory the system tells; then onnxruntime runs the file and the
logits are compared with those of the offloaded model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import pylomin
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import run_worker, status_bytes
from benchmarks.suite import finish, parse, save

SHARED = {"num_attention_heads": 32, "num_key_value_heads": 4}
SIZES = {
    "full": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 9, **SHARED},
    "tiny": {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, **SHARED},
}
NEEDED_BYTES = 5 << 29  # 2.5 GiB
TOKENS = 16


def build(sizes: Mapping[str, int]) -> torch.nn.Module:
    """A model of ``SIZES``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False)).eval()
    return model


def tokens(sizes: Mapping[str, int]) -> torch.Tensor:
    """The example input."""
    return torch.randint(sizes["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(0))


def export(checkpoint: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Export, and say how long it took."""
    model = pylomin.load(lambda: build(sizes), checkpoint)
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    pylomin.export_onnx(model, (tokens(sizes),), onnx_path(checkpoint), overwrite=True)
    return {
        "export_s": time.perf_counter() - start_s,
        "export_cpu_s": time.process_time() - cpu_start_s,
        "process_cpu_s": time.process_time(),
        "bytes_read": pylomin.stats(model).bytes_read,
        "peak_bytes": status_bytes("VmHWM"),
    }


def compare(checkpoint: Path, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The largest difference of the logits of onnxruntime from those of torch."""
    import onnxruntime

    model = pylomin.load(lambda: build(sizes), checkpoint)
    with torch.inference_mode():
        expected = model(tokens(sizes)).logits
    del model
    session = onnxruntime.InferenceSession(onnx_path(checkpoint))
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: tokens(sizes).numpy()})[0])
    return {
        "largest_difference": float((found - expected).abs().max()),
        "largest_logit": float(expected.abs().max()),
        "same_tokens": bool(torch.equal(found.argmax(-1), expected.argmax(-1))),
        "onnxruntime": onnxruntime.__version__,
    }


def onnx_path(checkpoint: Path) -> Path:
    """Beside the weights, so that it can refer to them."""
    return checkpoint.with_suffix(".onnx")


WORKERS = {"export": export, "compare": compare}


def main() -> None:
    """Measure and write the result."""
    options = parse("export_onnx", __doc__, rounds=1, limit_s=300)
    options.make_room("export_onnx", NEEDED_BYTES)
    sizes, directory = SIZES[options.size], options.directory("export_onnx")
    checkpoint = directory / "model.safetensors"
    if options.worker:
        print(json.dumps(WORKERS[options.worker["step"]](checkpoint, sizes)))
        return
    random_checkpoint(lambda: build(sizes), f"export_onnx {sizes}", checkpoint)

    def run(step: str) -> dict[str, Any]:
        worker = json.dumps({"step": step})
        return run_worker(["-m", "benchmarks.export_onnx", "--size", options.size, "--worker", worker]).report

    exported = run("export")
    row = {
        "variant": "export_onnx",
        **exported,
        "weight_bytes": checkpoint.stat().st_size,
        "onnx_bytes": onnx_path(checkpoint).stat().st_size,
        "files": sorted(path.name for path in directory.iterdir()),
        **run("compare"),
    }
    settings = {
        "model": f"LlamaForCausalLM, {sizes['num_hidden_layers']} layers, hidden size {sizes['hidden_size']}",
        "checkpoint_bytes": row["weight_bytes"],
        "input": f"{TOKENS} tokens",
        "file_state": "cached",
        "rounds": 1,
    }
    save(options, settings, {"rows": [row]})
    finish(options, {})


if __name__ == "__main__":
    main()
