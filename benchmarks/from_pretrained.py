"""How much memory does loading a transformers checkpoint take, and saving it again?

Random checkpoints of 2 GB and more: a dense model in one file, the same in shards, and a mixture of
experts whose experts are stored one by one. Each is loaded in a process of its own, whose peak
resident memory is compared with that of one which only imports the same modules.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pylomin
from benchmarks.common import run_worker, status_bytes
from benchmarks.suite import finish, parse, save
from pylomin.store.writer import WeightToWrite, write_safetensors

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 500},
    "full": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 32000},
}
SHARDS = 4
EXPERTS = 8
ALLOWED_BYTES = 64 << 20  # beside twice the largest tensor
NEEDED_BYTES = 8 << 30


def config_of(kind: str, size: str) -> Any:
    """A Llama, or a Mixtral whose experts together are as large as the Llama's layers."""
    from transformers import LlamaConfig, MixtralConfig

    shape = SHAPES[size] | {"num_attention_heads": 16, "num_key_value_heads": 4}
    if kind != "experts":
        return LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    shape["intermediate_size"] //= EXPERTS // 2
    return MixtralConfig(**shape, num_local_experts=EXPERTS, dtype="bfloat16", architectures=["MixtralForCausalLM"])


def stored_weights(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, as a checkpoint has them: Mixtral's experts one by one."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        module, _, weight = name.rpartition(".")
        if not module.endswith(".experts"):
            yield name, shape
            continue
        prefix = module.replace(".mlp.", ".block_sparse_moe.")
        parts = {"w1": shape[1] // 2, "w3": shape[1] // 2} if weight == "gate_up_proj" else {"w2": shape[1]}
        for expert in range(shape[0]):
            for part, rows in parts.items():
                yield f"{prefix}.{expert}.{part}.weight", (rows, shape[2])


def write_checkpoint(kind: str, size: str, directory: Path) -> Path:
    """Write a random checkpoint, one tensor in memory at a time, unless it is there."""
    path = directory / f"{size}-{kind}"
    if (path / "config.json").exists():  # written last
        return path
    print(f"Writing {path}", flush=True)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    config = config_of(kind, size)
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    weights = [WeightToWrite(name, torch.bfloat16, s, partial(make, s)) for name, s in stored_weights(config)]
    if kind == "sharded":
        files = {f"model-{i + 1:05}-of-{SHARDS:05}.safetensors": weights[i::SHARDS] for i in range(SHARDS)}
        weight_map = {weight.name: file for file, group in files.items() for weight in group}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        files = {"model.safetensors": weights}
    for file, group in files.items():
        write_safetensors(path / file, group, metadata={"format": "pt"})
    config.save_pretrained(path)
    return path


def prepare(path: Path) -> Any:
    """Everything that all workers import."""
    import transformers

    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path)
    # A small model of the class makes transformers import what it needs to build one.
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    pylomin.lazy_loading(transformers.AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | small)))
    return transformers.AutoModelForCausalLM


def imports(path: Path) -> None:
    """Load nothing: what every other worker needs at least."""
    prepare(path)


def load(path: Path) -> None:
    """pylomin.from_pretrained."""
    _, info = pylomin.from_pretrained(prepare(path), path, output_loading_info=True)
    assert not any(info.values()), info


def load_and_run(path: Path) -> None:
    """pylomin.from_pretrained, then one forward of eight tokens."""
    model = pylomin.from_pretrained(prepare(path), path)
    with torch.inference_mode():
        model(torch.arange(8)[None])


def load_and_save(path: Path) -> None:
    """pylomin.from_pretrained, then model.save_pretrained in shards of at most 256 MB."""
    model = pylomin.from_pretrained(prepare(path), path)
    model.save_pretrained(path / "saved", max_shard_size="256MB")
    shutil.rmtree(path / "saved")


def load_and_write(path: Path) -> None:
    """pylomin.from_pretrained, then pylomin.save_model, which holds one weight at a time."""
    pylomin.save_model(pylomin.from_pretrained(prepare(path), path), path / "written")
    shutil.rmtree(path / "written")


def load_with_transformers(path: Path) -> None:
    """Transformers' own from_pretrained."""
    prepare(path).from_pretrained(path)


WORKERS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (imports, load, load_and_run, load_and_write, load_and_save, load_with_transformers)
}


def work(name: str, path: Path) -> dict[str, Any]:
    """What a process reports of itself."""
    torch.set_num_threads(1)
    WORKERS[name](path)
    return {"peak_rss_bytes": status_bytes("VmHWM")}


def measure(kind: str, size: str, directory: Path) -> dict[str, Any]:
    """One row: the peaks of all workers over that of the imports, and what is allowed."""
    path = write_checkpoint(kind, size, directory)
    weights = list(stored_weights(config_of(kind, size)))
    sizes = [2 * torch.Size(shape).numel() for _, shape in weights]
    runs = {
        name: run_worker(
            ["-m", "benchmarks.from_pretrained", "--worker", json.dumps({"name": name, "path": str(path)})]
        ).report
        for name in WORKERS
    }
    base_bytes = runs.pop("imports")["peak_rss_bytes"]
    row: dict[str, Any] = {
        "variant": kind,
        "tensors": len(sizes),
        "checkpoint_bytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "allowed_bytes": 2 * max(sizes) + ALLOWED_BYTES,
    }
    return row | {f"{name}_added_bytes": report["peak_rss_bytes"] - base_bytes for name, report in runs.items()}


def main() -> None:
    """Measure all kinds of checkpoints and write the result."""
    options = parse("from_pretrained", __doc__, rounds=1, limit_s=600)
    if options.worker:
        print(json.dumps(work(options.worker["name"], Path(options.worker["path"]))))
        return
    rows = []
    for kind in ("single", "sharded", "experts"):
        options.make_room("from_pretrained", NEEDED_BYTES)
        rows.append(measure(kind, options.size, options.directory("from_pretrained")))
    shape = SHAPES[options.size]
    settings = {
        "model": f"LlamaForCausalLM, {shape['num_hidden_layers']} layers, hidden size {shape['hidden_size']}, in "
        f"bfloat16, in one file or {SHARDS}; MixtralForCausalLM with {EXPERTS} experts, stored one by one",
        "input": "8 tokens where it runs",
        "file_state": "cached",
        "rounds": 1,
    }
    save(options, settings, {"rows": rows})
    ours = [f"{name}_added_bytes" for name in ("load", "load_and_run", "load_and_write")]
    failed = [row["variant"] for row in rows if max(row[name] for name in ours) > row["allowed_bytes"]]
    finish(options, dict.fromkeys(failed, "more memory than allowed"), required=failed)


if __name__ == "__main__":
    main()
