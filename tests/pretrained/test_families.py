"""Families of every kind are the model that transformers loads, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from .common import assert_alike, both, in_memory, saved

NAMES = (
    # text
    "bert", "albert", "deberta_v2", "electra", "roberta", "distilbert",
    "gpt2", "llama", "gemma3", "phi3", "opt", "bloom", "falcon", "qwen2",
    "t5", "bart", "pegasus", "marian",
    # experts, which most of these checkpoints hold one by one
    "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "olmoe", "gpt_oss", "phimoe", "ernie4_5_moe",
    "switch_transformers",
    # state spaces
    "mamba2", "recurrent_gemma",
    # pictures and sound; weight norms, batch norms, buffers that are saved
    "vit", "resnet", "convnext", "detr", "wav2vec2", "encodec", "whisper", "vits",
    # several kinds at once
    "clip", "chinese_clip", "llava", "qwen2_vl", "blip_2",
)  # fmt: skip

LEFT_IN_MEMORY = {"marian": {"model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}}


@pytest.mark.parametrize("name", NAMES)
def test_loads_what_transformers_loads(name: str, tmp_path: Path) -> None:
    model_class, inputs = saved(name, tmp_path)
    expected, actual = both(model_class, tmp_path)
    assert_alike(expected, actual, inputs)
    assert in_memory(actual) == LEFT_IN_MEMORY.get(name, set())
