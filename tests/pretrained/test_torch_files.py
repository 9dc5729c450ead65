"""Checkpoints in ``.bin`` files, which are read in place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pylomin
from pylomin.errors import StoreReadError

from .common import assert_alike, both, in_memory, saved


def rewrite(directory: Path, shards: int) -> None:
    """As ``save_pretrained(safe_serialization=False)`` wrote them."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return
    names = list(tensors)
    files = {f"pytorch_model-{i + 1:05}-of-{shards:05}.bin": names[i::shards] for i in range(shards)}
    for file, part in files.items():
        torch.save({name: tensors[name] for name in part}, directory / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", ["bert", "mixtral", "whisper"])
def test_loads_what_transformers_loads(family: str, shards: int, tmp_path: Path) -> None:
    model_class, inputs = saved(family, tmp_path)
    rewrite(tmp_path, shards)
    expected, actual = both(model_class, tmp_path)
    assert in_memory(actual) == set()
    assert_alike(expected, actual, inputs)
    with pytest.raises(StoreReadError, match=r"expected one of model.safetensors, .*pytorch_model"):
        pylomin.from_pretrained(model_class, tmp_path, use_safetensors=True)


def test_both_names_of_a_tied_weight(tmp_path: Path) -> None:
    model_class, inputs = saved("llama_tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    expected, actual = both(model_class, tmp_path)
    assert actual.lm_head.weight is actual.model.embed_tokens.weight
    assert_alike(expected, actual, inputs)


def test_safetensors_come_first(tmp_path: Path) -> None:
    model_class, inputs = saved("llama", tmp_path)
    tensors = {name: tensor * 2 for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    expected, actual = both(model_class, tmp_path)
    assert_alike(expected, actual, inputs)
    expected, actual = both(model_class, tmp_path, use_safetensors=False)
    assert torch.equal(actual.lm_head.weight.detach().clone(), tensors["lm_head.weight"])
    assert_alike(expected, actual, inputs)
