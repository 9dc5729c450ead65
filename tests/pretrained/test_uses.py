"""What people do with a loaded model: generate, run pipelines, save, write to it, copy it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import pylomin
from pylomin.lazy.tensor import OffloadedTensor
from tests.families.compare import assert_same, flatten, outputs_of

from .common import assert_alike, both, saved, values_of

WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]", *(f"w{index}" for index in range(94))]
GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLING: dict[str, Any] = {"do_sample": True, "top_k": 20}
BEAMS: dict[str, Any] = {"do_sample": False, "num_beams": 3}


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()  # type: ignore[assignment]
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", **special)


@pytest.mark.parametrize("options", [GREEDY, SAMPLING, BEAMS], ids=["greedy", "sampling", "beams"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "t5", "whisper"])
def test_generate(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model_class, inputs = saved(family, tmp_path)
    prompt = {name: tensor for name, tensor in inputs.items() if not name.startswith("decoder_")}
    tokens = []
    for model in both(model_class, tmp_path):
        torch.manual_seed(0)
        tokens.append(model.generate(**prompt, **options, max_new_tokens=5, min_new_tokens=5))
    assert torch.equal(tokens[0], tokens[1])


@pytest.mark.parametrize(
    ("task", "family", "text", "options"),
    [
        ("text-generation", "llama", "w1 w2 w3", {"max_new_tokens": 4, "do_sample": False}),
        ("fill-mask", "bert", "w1 w2 [MASK] w3", {}),
        ("feature-extraction", "bert", "w1 w2", {}),
    ],
)
def test_pipeline(task: str, family: str, text: str, options: dict[str, Any], tmp_path: Path) -> None:
    model_class, _ = saved(family, tmp_path)
    results = [
        transformers.pipeline(task, model=model, tokenizer=tokenizer())(text, **options)  # type: ignore[call-overload]
        for model in both(model_class, tmp_path)
    ]
    assert results[0] == results[1]
    assert results[1]


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama_tied", "mixtral", "wav2vec2", "clip", "chinese_clip"])
def test_save_pretrained_writes_the_same_files(family: str, original: bool, tmp_path: Path) -> None:
    model_class, _ = saved(family, tmp_path / "source", save_original_format=original)
    expected, actual = both(model_class, tmp_path / "source")
    expected.save_pretrained(tmp_path / "expected", save_original_format=original, max_shard_size="60KB")
    actual.save_pretrained(tmp_path / "actual", save_original_format=original, max_shard_size="60KB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "expected").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "actual").iterdir()} == files
    assert pylomin.stats(actual).resident_bytes == 0


def test_a_written_weight_is_saved(tmp_path: Path) -> None:
    model_class, inputs = saved("mixtral", tmp_path)
    stored = (tmp_path / "model.safetensors").read_bytes()
    expected, actual = both(model_class, tmp_path)
    for model in (expected, actual):
        with torch.no_grad():
            model.model.layers[0].mlp.experts.gate_up_proj.mul_(2)
    assert (tmp_path / "model.safetensors").read_bytes() == stored
    assert_alike(expected, actual, inputs)
    actual.save_pretrained(tmp_path / "more")
    again, ours = both(model_class, tmp_path / "more")
    assert_alike(again, ours, inputs)


def test_restore_copy_and_convert(tmp_path: Path) -> None:
    model_class, inputs = saved("mixtral", tmp_path)
    expected, actual = both(model_class, tmp_path)
    assert_alike(expected, copy.deepcopy(actual), inputs)
    assert_alike(expected.to(torch.bfloat16), copy.deepcopy(actual).to(torch.bfloat16), inputs)
    expected, _ = both(model_class, tmp_path)
    pylomin.restore(actual)
    assert not any(isinstance(parameter, OffloadedTensor) for parameter in actual.parameters())
    assert all(type(parameter) is torch.nn.Parameter for parameter in actual.parameters())
    assert_alike(expected, actual, inputs)


def test_resized_embeddings(tmp_path: Path) -> None:
    model_class, inputs = saved("llama_tied", tmp_path)
    models = both(model_class, tmp_path)
    for model in models:
        torch.manual_seed(0)
        model.resize_token_embeddings(120, mean_resizing=False)
    assert_same(*(flatten(values_of(model), "state") for model in models))
    assert_same(*(outputs_of(model, inputs) for model in models))
