"""How fast does a quantised model decode in a container that is too small for the float32 one?

The model of the decode benchmark, stored as int8 (a scale for 64 neighbours) and as int8-row (one for each row of a
weight), in a memory group of 1.4 GB at a budget of 800 MiB, against memory-mapped float32 transformers and llama.cpp
with Q8_0 under the same limit; once more with inputs rounded to bfloat16, as torch's precision for matrix products
allows it, and to 8 bits (``quantize_inputs``), as llama.cpp does. Then at other budgets, each beside float32 streaming
at that budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import pylomin
from benchmarks.common import WorkerRun, paired_ratios
from benchmarks.decode import (
    ABOVE_BUDGET_BYTES,
    BUDGET_BYTES,
    INPUT,
    LIMIT_BYTES,
    PIECE_BYTES,
    WINDOW_BYTES,
    decode,
    smallest_budget,
)
from benchmarks.gguf_file import gguf_file
from benchmarks.llama import PEERS, Decoder, LlamaCppDecoder, checkpoint, offloaded, prepare, run_benchmark
from benchmarks.passes import Report
from benchmarks.rows import pass_s
from benchmarks.suite import Conditions, Options, Variant, finish, rows_of, run_variants, save
from pylomin.io.sizes import format_bytes

NEEDED_BYTES = 7 << 30  # 7 GiB: float32 checkpoint and GGUF, two quantised ones, and Q8_0
SCHEMES = ("int8", "int8-row")
FLOAT32 = "float32"
MAPPED = "transformers, memory-mapped"
LLAMA_CPP = "llama.cpp Q8_0"
ROUNDED = "int8-row, inputs in bfloat16"  # torch.set_float32_matmul_precision("medium")
QUANTIZED = "int8-row, inputs in int8"  # pylomin.quantize_inputs
INPUTS = (ROUNDED, QUANTIZED)
SHARES = (0.5, 1.1)  # of the int8 file, beside the window and 800 MiB


def stored_as(scheme: str, directory: Path) -> Path:
    """The directory of a checkpoint."""
    return directory if scheme == FLOAT32 else directory / scheme


def q8_0(directory: Path) -> Path:
    """Where the quantised GGUF is."""
    return directory / "model-q8_0.gguf"


def work(variant: str, memory_budget: int | None, config: LlamaConfig, directory: Path) -> dict[str, Any]:
    """One variant in this process."""
    scheme = variant.partition(",")[0]
    if variant.startswith(ROUNDED):
        torch.set_float32_matmul_precision("medium")
    if scheme in (*SCHEMES, FLOAT32):
        report = Report(checkpoint(stored_as(scheme, directory)), piece_bytes=PIECE_BYTES)
        decoder = offloaded(config, stored_as(scheme, directory), memory_budget)
        if variant.startswith(QUANTIZED):
            assert decoder.model is not None
            pylomin.quantize_inputs(decoder.model)
    else:
        report = Report(piece_bytes=PIECE_BYTES)
        decoder = llama_cpp(config, directory) if variant == LLAMA_CPP else PEERS[variant](config, directory)
    decode(decoder, report, config, directory, is_reference=variant == "resident")
    return report.fields


def llama_cpp(config: LlamaConfig, directory: Path) -> Decoder:
    """llama.cpp with Q8_0 matrices."""
    # Where the processor has AMX, llama.cpp 0.3.36 crashes on several tokens at once: GCC drops most of the tile
    # configuration (https://github.com/ggml-org/llama.cpp/pull/26954). Single tokens take another way.
    return LlamaCppDecoder(q8_0(directory), config.vocab_size, batch=1)


def budgets(config: LlamaConfig, directory: Path) -> list[int]:
    """800 MiB, and others from a window to everything that is packed."""
    packed_bytes = checkpoint(stored_as(SCHEMES[0], directory)).stat().st_size
    window_bytes = max(smallest_budget(config, stored_as(name, directory)) for name in (FLOAT32, *SCHEMES))
    main = min(BUDGET_BYTES, 2 * packed_bytes)
    return [main, max(window_bytes, min(WINDOW_BYTES, packed_bytes)), *(int(s * packed_bytes) for s in SHARES)]


def variants(of_budgets: list[int]) -> list[Variant]:
    """The peers at 1.4 GB, and every way of storing at every budget."""
    result = [
        Variant(name, {"variant": name, "memory_budget": None}, limit_bytes, {"limit_bytes": limit_bytes})
        for name, limit_bytes in (("resident", None), (MAPPED, LIMIT_BYTES), (LLAMA_CPP, LIMIT_BYTES))
    ]
    for budget in of_budgets:
        for scheme in (FLOAT32, *SCHEMES, *(INPUTS if budget == of_budgets[0] else ())):
            name, limit_bytes = variant_name(scheme, budget), budget + ABOVE_BUDGET_BYTES
            settings = {"budget_bytes": budget, "limit_bytes": limit_bytes}
            result.append(Variant(name, {"variant": name, "memory_budget": budget}, limit_bytes, settings))
    return result


def variant_name(scheme: str, budget: int) -> str:
    """What the row of a way of storing and a budget is called."""
    return f"{scheme}, {format_bytes(budget)}"


def ratios(
    of_budgets: list[int], runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """How many times as fast one variant is as another, in pairs of a round: ``{"this / that": ...}``."""
    main = of_budgets[0]
    pairs = [(variant_name(scheme, main), peer) for scheme in (*SCHEMES, *INPUTS) for peer in (MAPPED, LLAMA_CPP)]
    pairs += [
        (variant_name(scheme, budget), variant_name(FLOAT32, budget)) for budget in of_budgets for scheme in SCHEMES
    ]
    return {
        f"{this} / {that}": vars(paired_ratios(*([pass_s(run) for run in runs[name]] for name in (that, this))))
        for this, that in pairs
        if this not in failures and that not in failures
    }


def never_slower(found: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether no quantised model is slower than float32 at the same budget, as far as the spread of rounds tells."""
    return all(ratio["largest"] >= 1 for name, ratio in found.items() if f"/ {FLOAT32}," in name)


def main() -> None:
    """Measure and write the result."""
    run_benchmark("quantized_decode", __doc__, work, measure, rounds=3, limit_s=780)


def prepare_quantized(config: LlamaConfig, directory: Path) -> list[Path]:
    """Write what the variants read, as far as it is not there."""
    weights = prepare(config, directory)
    files = [weights]
    for scheme in SCHEMES:
        path = checkpoint(stored_as(scheme, directory))
        if not path.exists() or path.stat().st_mtime < weights.stat().st_mtime:
            path.parent.mkdir(exist_ok=True)
            print(f"Writing {path}", flush=True)
            pylomin.save_store(weights, path, quantize=scheme, overwrite=True)
        files.append(path)
    return [*files, gguf_file(config, weights, q8_0(directory), is_quantized=True)]


def measure(options: Options, config: LlamaConfig, directory: Path) -> None:
    """Run all variants."""
    options.make_room("llama", NEEDED_BYTES)
    files = prepare_quantized(config, directory)
    conditions = Conditions(cold=files)
    of_budgets = budgets(config, directory)
    all_variants = variants(of_budgets)

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        settings = {
            "model": f"LlamaForCausalLM, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
            "input": INPUT,
            "checkpoint_bytes": files[0].stat().st_size,
            "quantized_bytes": {scheme: checkpoint(stored_as(scheme, directory)).stat().st_size for scheme in SCHEMES},
            "file_state": "cold",
            "conditions": sorted(conditions.notes),
        }
        found = ratios(of_budgets, runs, failures)
        results = {
            "rows": rows_of(all_variants, runs, failures),
            "speed_ratios": found,
            "never_slower_than_float32": never_slower(found),
        }
        save(options, settings, results)

    failures = run_variants(options, all_variants, conditions, report)
    peers = (MAPPED, LLAMA_CPP)
    finish(options, failures, required=[variant.name for variant in all_variants if variant.name not in peers])


if __name__ == "__main__":
    main()
