"""Does decoding with a mixture of experts read only the experts that were routed to?

64 experts of which 4 are routed, and a shared one, in each layer; batch 1, file cold, no memory budget, so that every
token reads all it needs. What it needs is known from the routers' choices.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts, Qwen2MoeTopKRouter

import pylomin
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import WorkerRun
from benchmarks.llama import TorchDecoder
from benchmarks.passes import Report
from benchmarks.suite import Conditions, Options, Variant, finish, parse, rows_of, run_variants, save

PROMPT_TOKENS = 4
TOKENS = 12
LIMIT_BYTES = 1_400_000_000  # 1.4 GB


def moe_config(width: int, layers: int, vocabulary: int) -> Qwen2MoeConfig:
    """64 experts, 4 of them routed."""
    return Qwen2MoeConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        moe_intermediate_size=width // 2,
        shared_expert_intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        num_experts=64,
        num_experts_per_tok=4,
        decoder_sparse_step=1,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )


SIZES = {"full": moe_config(1024, 4, 16_000), "tiny": moe_config(64, 2, 1_000)}


class Needed:
    """The bytes that a pass cannot do without: weights that all tokens share, and the experts routed to."""

    def __init__(self, model: nn.Module) -> None:
        self._expert_bytes: list[int] = []
        self._routed: list[set[int]] = []
        self._shared_bytes = 0
        for module in model.modules():
            own_bytes = sum(weight.numel() * weight.element_size() for weight in module.parameters(recurse=False))
            if isinstance(module, Qwen2MoeExperts):
                self._expert_bytes.append(own_bytes // module.num_experts)
            elif isinstance(module, nn.Embedding):
                self._shared_bytes += own_bytes // module.num_embeddings  # the row of the one token
            else:
                self._shared_bytes += own_bytes
            if isinstance(module, Qwen2MoeTopKRouter):
                routed: set[int] = set()
                self._routed.append(routed)
                module.register_forward_hook(partial(_note, routed))

    def take(self) -> int:
        """Of the pass since the last call."""
        total_bytes = self._shared_bytes
        for expert_bytes, routed in zip(self._expert_bytes, self._routed, strict=True):
            total_bytes += expert_bytes * len(routed)
            routed.clear()
        return total_bytes


def _note(routed: set[int], module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook of a router, whose third output are the experts' numbers."""
    routed.update(output[2].flatten().tolist())


def work(variant: str, config: Qwen2MoeConfig, weights: Path) -> dict[str, Any]:
    """The model in memory, or offloaded."""
    is_resident = variant == "resident"
    report = Report(None if is_resident else weights)
    model: nn.Module = pylomin.load(lambda: Qwen2MoeForCausalLM(config), weights)
    model = pylomin.restore(model) if is_resident else pylomin.prefetch(model)
    needed = Needed(model)
    decoder = TorchDecoder(model)
    count = PROMPT_TOKENS + TOKENS + 1
    numbers = torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        logits = decoder(numbers[:PROMPT_TOKENS])
        needed.take()
        report.measure_disk(model)
        for number in numbers[PROMPT_TOKENS:-1]:
            report.passes(partial(decoder, [number]), 1, model)
            report.fields["passes"][-1]["needed_bytes"] = needed.take()
        fields = report.finish(lambda: decoder(numbers[-1:]), model)
    report.compare(logits, weights.with_name("resident-logits.safetensors"), is_reference=is_resident)
    return fields


def main() -> None:
    """Measure and write the result."""
    options = parse("moe", __doc__, rounds=2, limit_s=120)
    config = SIZES[options.size]
    weights = options.directory("moe") / "model.safetensors"
    if options.worker:
        print(json.dumps(work(options.worker["variant"], config, weights)))
        return
    measure(options, config, weights)


def measure(options: Options, config: Qwen2MoeConfig, weights: Path) -> None:
    """Run both variants."""
    options.make_room("moe", 2 << 30)
    recipe = f"Qwen2MoeForCausalLM {config.to_json_string(use_diff=True)}"
    random_checkpoint(lambda: Qwen2MoeForCausalLM(config), recipe, weights)
    conditions = Conditions(cold=[weights])
    variants = [
        Variant("resident", {"variant": "resident"}),
        Variant("pylomin", {"variant": "pylomin"}, LIMIT_BYTES, {"limit_bytes": LIMIT_BYTES}),
    ]

    def report(runs: Mapping[str, list[WorkerRun]], failures: Mapping[str, str]) -> None:
        settings = {
            "model": f"Qwen2MoeForCausalLM, {config.num_hidden_layers} layers, hidden size {config.hidden_size}, "
            f"{config.num_experts} experts, {config.num_experts_per_tok} routed, 1 shared",
            "input": f"{TOKENS} tokens at batch 1, after {PROMPT_TOKENS}",
            "checkpoint_bytes": weights.stat().st_size,
            "file_state": "cold",
            "conditions": sorted(conditions.notes),
        }
        save(options, settings, {"rows": rows_of(variants, runs, failures)})

    finish(options, run_variants(options, variants, conditions, report), required=["resident", "pylomin"])


if __name__ == "__main__":
    main()
