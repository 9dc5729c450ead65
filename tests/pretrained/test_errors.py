"""What cannot be loaded says why, and what to do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

import pylomin
from pylomin.errors import (
    BudgetError,
    MissingPackageError,
    PassError,
    StoreChangedError,
    StoreFormatError,
    StoreReadError,
    WeightMismatchError,
)

from .common import saved

LLAMA = transformers.LlamaForCausalLM


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    saved("llama", tmp_path)
    return tmp_path


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(StoreReadError, match=r"'org/model' is not a directory.*downloads nothing.*snapshot_download"):
        pylomin.from_pretrained(LLAMA, "org/model")
    (tmp_path / "file").touch()
    with pytest.raises(StoreReadError, match="is not a directory"):
        pylomin.from_pretrained(LLAMA, tmp_path / "file")
    with pytest.raises(PassError, match="path is a NoneType"):
        pylomin.from_pretrained(LLAMA, None)  # type: ignore[arg-type]


def test_no_config(directory: Path) -> None:
    (directory / "config.json").unlink()
    with pytest.raises(StoreReadError, match=r"has no config.json.*pylomin.load"):
        pylomin.from_pretrained(LLAMA, directory)
    (directory / "adapter_config.json").touch()
    with pytest.raises(StoreReadError, match=r"has an adapter.*PeftModel.from_pretrained"):
        pylomin.from_pretrained(LLAMA, directory)


def test_adapter_beside_the_model(directory: Path) -> None:
    (directory / "adapter_config.json").touch()
    with pytest.raises(PassError, match=r"has an adapter beside the model.*PeftModel.from_pretrained"):
        pylomin.from_pretrained(LLAMA, directory)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": 3}'])
def test_malformed_config(text: str, directory: Path) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(PassError, match="cannot read the config"):
        pylomin.from_pretrained(transformers.AutoModel, directory)


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "weights.safetensors")
    with pytest.raises(StoreReadError, match=r"expected one of model.safetensors, .*; found weights.safetensors"):
        pylomin.from_pretrained(LLAMA, directory)
    with pytest.raises(StoreReadError, match=r"one of model.fp16.safetensors, model.safetensors.index.fp16.json;"):
        pylomin.from_pretrained(LLAMA, directory, variant="fp16", use_safetensors=True)


def test_damaged_weights(directory: Path) -> None:
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(StoreFormatError, match=r"model.safetensors"):
        pylomin.from_pretrained(LLAMA, directory)
    path.write_bytes(whole)
    model = pylomin.from_pretrained(LLAMA, directory)
    path.write_bytes(whole[:100])
    with pytest.raises(StoreChangedError, match=r"model.safetensors"):
        model(torch.tensor([[1]]))


@pytest.mark.parametrize(
    "model_class", [nn.Linear, transformers.PreTrainedModel, "LlamaForCausalLM", LLAMA.config_class]
)
def test_no_model_class(model_class: Any, directory: Path) -> None:
    with pytest.raises(PassError, match=r"model_class is .*expected a model class of transformers"):
        pylomin.from_pretrained(model_class, directory)


def test_auto_class_without_a_model(directory: Path) -> None:
    with pytest.raises(PassError, match=r"AutoModelForMaskedLM has no model for a LlamaConfig.*LlamaForCausalLM"):
        pylomin.from_pretrained(transformers.AutoModelForMaskedLM, directory)


def test_quantised_checkpoint(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(PassError, match=r"are quantised .*'gptq'"):
        pylomin.from_pretrained(LLAMA, directory)


def test_code_in_the_directory_never_runs(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(PassError, match="cannot read the config"):
        pylomin.from_pretrained(transformers.AutoModel, directory)
    with pytest.raises(PassError, match="does not take trust_remote_code: no code of a checkpoint is run"):
        pylomin.from_pretrained(transformers.AutoModel, directory, trust_remote_code=True)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"device_map": "auto"}, PassError, "does not take device_map: give device="),
        ({"quantization_config": {"bits": 4}}, PassError, "does not take quantization_config"),
        ({"state_dict": {"a": torch.ones(1)}}, PassError, "does not take state_dict: use pylomin.load"),
        ({"dtype": "float31"}, PassError, "dtype is 'float31'; expected a floating-point dtype"),
        ({"dtype": torch.int8}, PassError, "dtype is torch.int8"),
        ({"memory_budget": 64}, BudgetError, "memory_budget is 64"),
        ({"vocab_size": 50}, WeightMismatchError, r"(?s)embed_tokens.weight.*\[99, 32\].*\[50, 32\]"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], text: str, directory: Path) -> None:
    with pytest.raises(error, match=text):
        pylomin.from_pretrained(LLAMA, directory, **arguments)


class Failing(ConversionOps):
    """A converter that does not fit the checkpoint."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        raise ValueError("three heads are not two")


def test_converter_that_fails_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter = WeightConverter("q_proj.weight", "q_proj.weight", operations=[Failing()])
    monkeypatch.setattr("transformers.modeling_utils.get_model_conversion_mapping", lambda *_: [converter])
    with pytest.raises(PassError, match=r"(?s)cannot load .*q_proj.weight.*three heads are not two.*Failing"):
        pylomin.from_pretrained(LLAMA, directory)


def test_without_transformers(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'pylomin\[transformers\]'"):
        pylomin.from_pretrained(LLAMA, directory)
    with pytest.raises(ImportError):
        pylomin.from_pretrained(LLAMA, directory)


def test_transformers_of_old(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "4.57.1")
    with pytest.raises(MissingPackageError, match=r"needs transformers 5 or later; found 4.57.1"):
        pylomin.from_pretrained(LLAMA, directory)
