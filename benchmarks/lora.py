"""How close to two passes of reading is a step of LoRA fine-tuning, whose base does not fit in memory?

Adapters of rank 8 on the attention of the decoding benchmark's model, 2.3 GB of float32 that are read for the forward
and again for the backward, under a budget of 300 MiB, file cold. The resident model says how long computing takes, and
what the gradients are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import LlamaConfig

from benchmarks.common import WorkerRun
from benchmarks.decode import ABOVE_BUDGET_BYTES, PIECE_BYTES
from benchmarks.llama import NEEDED_BYTES, checkpoint, offloaded, prepare, resident, run_benchmark
from benchmarks.passes import Report
from benchmarks.suite import Conditions, Options, Variant, finish, rows_of, run_variants, save

TOKENS = 32  # of a step: reading, not computing, limits it
WARM_UP_STEPS = 2  # the order of the weights is known, and what stays has been loaded
STEPS = 4
STEP_BYTES = 40 << 20  # 40 MiB: what is kept for backward, gradients, states of the optimizer; by the allocator
BUDGETS = {"full": 300 << 20, "tiny": 1 << 20}  # 300 MiB of 2.4 GiB, 1 MiB of 1.5 MiB


def adapted(base: nn.Module) -> nn.Module:
    """``base`` with adapters, the same for every variant."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: nn.Module = peft.get_peft_model(base, settings)
    return model.train()


def work(variant: str, memory_budget: int, config: LlamaConfig, directory: Path) -> dict[str, Any]:
    """The base in memory, or under the budget."""
    is_resident = variant == "resident"
    report = Report(None if is_resident else checkpoint(directory), piece_bytes=PIECE_BYTES)
    decoder = resident(config, directory) if is_resident else offloaded(config, directory, memory_budget)
    assert decoder.model is not None
    model = adapted(decoder.model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    tokens = torch.randint(3, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()

    step()
    # Before the first update: afterwards a difference in rounding would add up.
    gradients = torch.cat([p.grad.flatten() for p in trained if p.grad is not None]).clone()
    for _ in range(WARM_UP_STEPS):
        step()
    report.measure_disk(model)
    report.passes(step, STEPS, model)
    fields = report.finish(step, model)
    report.compare(gradients, directory / "resident-gradients.safetensors", is_reference=is_resident)
    fields["difference"] /= gradients.abs().max().item()
    return fields


def main() -> None:
    """Measure and write the result."""
    run_benchmark("lora", __doc__, work, measure, rounds=3, limit_s=300)


def measure(options: Options, config: LlamaConfig, directory: Path) -> None:
    """Run both variants."""
    options.make_room("llama", NEEDED_BYTES)
    weights = prepare(config, directory)
    conditions = Conditions(cold=[weights])
    budget = BUDGETS[options.size]
    limit_bytes = budget + ABOVE_BUDGET_BYTES
    settings = {"budget_bytes": budget, "limit_bytes": limit_bytes, "beside_bytes": STEP_BYTES}
    variants = [
        Variant("resident", {"variant": "resident", "memory_budget": budget}),
        Variant("pylomin", {"variant": "pylomin", "memory_budget": budget}, limit_bytes, settings),
    ]

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        settings = {
            "model": f"LlamaForCausalLM, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
            "LoRA of rank 8 on queries and values",
            "input": f"a step of AdamW on 1 x {TOKENS} tokens, after {1 + WARM_UP_STEPS}",
            "checkpoint_bytes": weights.stat().st_size,
            "file_state": "cold",
            "conditions": sorted(conditions.notes),
        }
        save(options, settings, {"rows": rows_of(variants, runs, failures)})

    failures = run_variants(options, variants, conditions, report)
    finish(options, failures, required=[variant.name for variant in variants])


if __name__ == "__main__":
    main()
