"""Which stored tensor is which weight: as transformers decides it, for every way in which names may differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import pylomin
from pylomin.errors import WeightMismatchError, WeightNotFoundError
from pylomin.lazy.tensor import OffloadedTensor

from .common import assert_alike, both, in_memory, saved

Tensors = dict[str, Tensor]


def edit(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    path = directory / "model.safetensors"
    save_file({name: tensor.clone() for name, tensor in change(load_file(path)).items()}, path)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("family", "auto_class"),
    [
        ("bert", "AutoModel"),
        ("bert", "AutoModelForMaskedLM"),
        ("bert", "AutoModelForSequenceClassification"),
        ("llama", "AutoModelForCausalLM"),
        ("t5", "AutoModelForSeq2SeqLM"),
        ("vit", "AutoModelForImageClassification"),
        ("llava", "AutoModelForImageTextToText"),
        ("mixtral", "AutoModel"),
    ],
)
def test_auto_classes(family: str, auto_class: str, tmp_path: Path) -> None:
    _, inputs = saved(family, tmp_path)
    expected, actual = both(getattr(transformers, auto_class), tmp_path)
    assert isinstance(actual, type(expected))
    assert_alike(expected, actual, inputs)


def test_checkpoint_of_a_head_into_the_base_model(tmp_path: Path) -> None:
    _, inputs = saved("bert", tmp_path)
    expected, actual = both(transformers.BertModel, tmp_path)
    assert in_memory(actual) == {"pooler.dense.weight", "pooler.dense.bias"}
    assert_alike(expected, actual, inputs)


def test_checkpoint_of_the_base_model_into_a_head(tmp_path: Path) -> None:
    _, inputs = saved("bert_pooled", tmp_path)
    expected, actual = both(transformers.BertForMaskedLM, tmp_path)
    assert {name.partition(".")[0] for name in in_memory(actual)} == {"cls"}
    assert actual.cls.predictions.decoder.weight is actual.bert.embeddings.word_embeddings.weight
    assert_alike(expected, actual, inputs)


def test_what_was_missing_can_be_trained(tmp_path: Path) -> None:
    _, inputs = saved("bert_pooled", tmp_path)
    models = both(transformers.BertForSequenceClassification, tmp_path)
    assert in_memory(models[1]) == {"classifier.weight", "classifier.bias"}
    for model in models:
        model(**inputs).logits.sum().backward()
    assert torch.equal(models[0].classifier.weight.grad, models[1].classifier.weight.grad)


@pytest.mark.parametrize("family", ["bert", "wav2vec2"])
def test_legacy_names(family: str, tmp_path: Path) -> None:
    """gamma and beta of old layer norms; weight_g and weight_v of weight norms before they were parametrizations."""
    model_class, inputs = saved(family, tmp_path)
    legacy = {
        "LayerNorm.weight": "LayerNorm.gamma",
        "LayerNorm.bias": "LayerNorm.beta",
        "parametrizations.weight.original0": "weight_g",
        "parametrizations.weight.original1": "weight_v",
    }

    def rename(tensors: Tensors) -> Tensors:
        for new, old in legacy.items():
            tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
        return tensors

    before = set(load_file(tmp_path / "model.safetensors"))
    edit(tmp_path, rename)
    assert set(load_file(tmp_path / "model.safetensors")) != before
    expected, actual = both(model_class, tmp_path)
    assert in_memory(actual) == set()
    assert_alike(expected, actual, inputs)


def test_key_mapping(tmp_path: Path) -> None:
    model_class, inputs = saved("gpt2", tmp_path)
    edit(tmp_path, lambda tensors: {name.replace("transformer.h.", "blocks/"): t for name, t in tensors.items()})
    expected, actual = both(model_class, tmp_path, key_mapping={"^blocks/": "transformer.h."})
    assert in_memory(actual) == set()
    assert_alike(expected, actual, inputs)


def test_loading_info_and_ignored_names(tmp_path: Path) -> None:
    model_class, inputs = saved("gpt2", tmp_path)

    def change(tensors: Tensors) -> Tensors:
        del tensors["transformer.h.0.ln_1.bias"]
        # transformers ignores the first of these.
        return tensors | {"transformer.h.0.attn.bias": torch.ones(3), "stranger": torch.ones(2)}

    edit(tmp_path, change)
    (expected, expected_info), (actual, info) = both(model_class, tmp_path, output_loading_info=True)
    assert info == expected_info
    assert info["missing_keys"] == {"transformer.h.0.ln_1.bias"} == in_memory(actual)
    assert info["unexpected_keys"] == {"stranger"}
    assert_alike(expected, actual, inputs)


def test_report_of_what_did_not_match(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model_class, _ = saved("gpt2", tmp_path)
    edit(tmp_path, lambda tensors: tensors | {"stranger": torch.ones(2)})
    logger = transformers.utils.logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    transformers.utils.logging.set_verbosity_warning()
    try:
        pylomin.from_pretrained(model_class, tmp_path)
    finally:
        transformers.utils.logging.set_verbosity_error()
        logger.removeHandler(caplog.handler)
    assert "stranger" in caplog.text
    assert "UNEXPECTED" in caplog.text


def test_tied_weights_are_one(tmp_path: Path) -> None:
    model_class, _ = saved("llama_tied", tmp_path)
    _, actual = both(model_class, tmp_path)
    assert actual.lm_head.weight is actual.model.embed_tokens.weight
    assert actual.get_input_embeddings().weight.weight.source.name == "model.embed_tokens.weight"


@pytest.mark.parametrize("same", [True, False])
def test_tied_weights_of_which_both_are_stored(same: bool, tmp_path: Path) -> None:
    """transformers compares their values, and does not tie what differs."""
    model_class, inputs = saved("llama_tied", tmp_path)
    table = "model.embed_tokens.weight"
    edit(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors[table] if same else tensors[table] * 2})
    expected, actual = both(model_class, tmp_path)
    assert (actual.lm_head.weight is actual.model.embed_tokens.weight) == same
    assert_alike(expected, actual, inputs)


def test_only_the_tied_name_is_stored(tmp_path: Path) -> None:
    model_class, inputs = saved("llama_tied", tmp_path)
    edit(
        tmp_path,
        lambda tensors: {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()},
    )
    expected, actual = both(model_class, tmp_path)
    assert in_memory(actual) == set()
    assert_alike(expected, actual, inputs)


def test_untied_by_an_argument(tmp_path: Path) -> None:
    model_class, inputs = saved("llama", tmp_path)
    expected, actual = both(model_class, tmp_path, tie_word_embeddings=False, attn_implementation="eager")
    assert actual.config._attn_implementation == expected.config._attn_implementation == "eager"
    assert actual.lm_head.weight is not actual.model.embed_tokens.weight
    assert_alike(expected, actual, inputs)


@pytest.mark.parametrize(
    ("stored", "config_dtype", "dtype", "found"),
    [
        (torch.float32, "float32", None, torch.float32),
        (torch.float32, "float32", torch.bfloat16, torch.bfloat16),
        (torch.float32, "bfloat16", "auto", torch.bfloat16),
        (torch.bfloat16, None, "auto", torch.bfloat16),
        (torch.bfloat16, "bfloat16", "float32", torch.float32),
        # transformers keeps T5's wo in float32, because float16 overflows there.
        (torch.float32, "float32", "float16", torch.float16),
    ],
)
def test_dtypes(
    stored: torch.dtype, config_dtype: str | None, dtype: torch.dtype | str | None, found: torch.dtype, tmp_path: Path
) -> None:
    model_class, inputs = saved("t5", tmp_path)
    edit(tmp_path, lambda tensors: {name: tensor.to(stored) for name, tensor in tensors.items()})
    edit_config(tmp_path, dtype=config_dtype)
    expected, actual = both(model_class, tmp_path, dtype=dtype)
    assert actual.shared.weight.dtype == found
    dtypes = {parameter.dtype for parameter in actual.parameters()}
    assert dtypes == ({torch.float16, torch.float32} if found == torch.float16 else {found})
    assert_alike(expected, actual, inputs)


def test_stacked_experts_are_cast_one_by_one(tmp_path: Path) -> None:
    model_class, inputs = saved("mixtral", tmp_path)
    expected, actual = both(model_class, tmp_path, dtype=torch.bfloat16)
    experts = actual.model.layers[0].mlp.experts.gate_up_proj
    assert isinstance(experts, OffloadedTensor)
    before = pylomin.stats(actual).bytes_read
    assert torch.equal(experts[1].clone(), expected.model.layers[0].mlp.experts.gate_up_proj[1])
    assert pylomin.stats(actual).bytes_read - before == experts[1].numel() * 4
    assert_alike(expected, actual, inputs)


def test_config_and_generation_config(tmp_path: Path) -> None:
    model_class, inputs = saved("llama", tmp_path)
    transformers.GenerationConfig(max_new_tokens=7, do_sample=True, top_k=3).save_pretrained(tmp_path)
    expected, actual = both(model_class, tmp_path, output_attentions=True, attn_implementation="eager")
    assert actual.generation_config.max_new_tokens == 7
    assert actual.config.output_attentions
    assert_alike(expected, actual, inputs)

    given = transformers.GenerationConfig(max_new_tokens=2, eos_token_id=2)
    expected, actual = both(model_class, tmp_path, generation_config=given)
    assert actual.generation_config.max_new_tokens == 2
    assert_alike(expected, actual, inputs)

    (tmp_path / "generation_config.json").unlink()
    expected, actual = both(model_class, tmp_path)
    assert_alike(expected, actual, inputs)


def test_given_config(tmp_path: Path) -> None:
    model_class, inputs = saved("llama", tmp_path)
    config = model_class.config_class.from_pretrained(tmp_path, num_hidden_layers=1)
    expected, actual = both(model_class, tmp_path, config=config)
    assert len(actual.model.layers) == 1
    assert_alike(expected, actual, inputs)


def test_files(tmp_path: Path) -> None:
    """Sharded, in a subfolder, of a variant."""
    model_class, inputs = saved("llama", tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    expected, actual = both(model_class, tmp_path / "sharded")
    assert_alike(expected, actual, inputs)
    expected.save_pretrained(tmp_path / "more" / "inner", variant="fp16")
    expected, actual = both(model_class, tmp_path / "more", subfolder="inner", variant="fp16", use_safetensors=True)
    assert_alike(expected, actual, inputs)


def test_other_shapes_are_an_error_or_initialised(tmp_path: Path) -> None:
    _, inputs = saved("bert_pooled", tmp_path)
    head = transformers.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    head.save_pretrained(tmp_path)
    with pytest.raises(WeightMismatchError, match=r"(?s)classifier.*\[3, 32\].*\[5, 32\]"):
        pylomin.from_pretrained(type(head), tmp_path, num_labels=5)
    expected, actual = both(type(head), tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert in_memory(actual) == {"classifier.weight", "classifier.bias"}
    assert_alike(expected, actual, inputs)


def test_nothing_matches(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    with pytest.raises(WeightNotFoundError, match=r"no weight in .* is one of BertModel's.*GPT2LMHeadModel"):
        pylomin.from_pretrained(transformers.BertModel, tmp_path)


def test_further_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of a config may name files beside the usual ones."""
    model_class, inputs = saved("llama", tmp_path)
    monkeypatch.setattr(model_class.config_class, "extra_files", ("head.safetensors", "absent.safetensors"))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({"lm_head.weight": tensors.pop("lm_head.weight")}, tmp_path / "head.safetensors")
    save_file(tensors, tmp_path / "model.safetensors")
    expected, actual = both(model_class, tmp_path)
    assert in_memory(actual) == set()
    assert_alike(expected, actual, inputs)
