"""Experts that a checkpoint holds one by one are read one by one, from where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pylomin
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.store.base import ReadRequest
from pylomin.store.safetensors import SafetensorsStore

from .common import assert_alike, both, saved


@pytest.fixture
def read_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is read from files, in order."""
    names: list[str] = []
    read = SafetensorsStore.read

    def watched(self: SafetensorsStore, requests: Sequence[ReadRequest]) -> None:
        names.extend(request.name for request in requests)
        read(self, requests)

    monkeypatch.setattr(SafetensorsStore, "read", watched)
    return names


def test_one_expert_of_a_stacked_weight(tmp_path: Path, read_names: list[str]) -> None:
    model_class, _ = saved("mixtral", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    _, model = both(model_class, tmp_path)
    prefix = "model.layers.1.block_sparse_moe.experts.2"
    experts = model.model.layers[1].mlp.experts
    assert isinstance(experts.gate_up_proj, OffloadedTensor)

    before = pylomin.stats(model).bytes_read
    read_names.clear()
    fused = torch.cat([stored[f"{prefix}.w1.weight"], stored[f"{prefix}.w3.weight"]])
    assert torch.equal(experts.gate_up_proj[2].clone(), fused)
    assert read_names == [f"{prefix}.w1.weight", f"{prefix}.w3.weight"]
    assert pylomin.stats(model).bytes_read - before == fused.nbytes

    read_names.clear()
    assert torch.equal(experts.down_proj[2].clone(), stored[f"{prefix}.w2.weight"])
    assert read_names == [f"{prefix}.w2.weight"]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "olmoe"])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_forward_reads_only_the_experts_that_it_routes_to(family: str, stacked: bool, tmp_path: Path) -> None:
    model_class, _ = saved(family, tmp_path, save_original_format=not stacked)
    names = load_file(tmp_path / "model.safetensors")
    assert any(".experts.0." in name for name in names) != stacked
    token = {"input_ids": torch.tensor([[7]])}
    expected, model = both(model_class, tmp_path, experts_implementation="eager")
    assert_alike(expected, model, token)

    sizes = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    experts = sum(nbytes for name, nbytes in sizes.items() if ".experts." in name)
    before = pylomin.stats(model).bytes_read
    model(**token)
    read = pylomin.stats(model).bytes_read - before
    routed = experts * model.config.num_experts_per_tok // _experts_of(model)
    table = model.get_input_embeddings().weight
    others = sum(sizes.values()) - experts - table.nbytes
    assert read == routed + others + table[0].nbytes


def _experts_of(model: torch.nn.Module) -> int:
    return next(p.shape[0] for name, p in model.named_parameters() if name.endswith("experts.down_proj"))


def test_nothing_is_read_while_loading(tmp_path: Path, read_names: list[str]) -> None:
    model_class, _ = saved("mixtral", tmp_path)
    pylomin.from_pretrained(model_class, tmp_path)
    assert read_names == []


def test_a_tight_budget(tmp_path: Path) -> None:
    model_class, inputs = saved("mixtral", tmp_path)
    expected, model = both(model_class, tmp_path)
    budget = 3 * max(sum(p.nbytes for p in module.parameters(recurse=False)) for module in expected.modules())
    model = pylomin.prefetch(pylomin.from_pretrained(model_class, tmp_path, memory_budget=budget))
    assert_alike(expected, model, inputs)
    assert 0 < pylomin.stats(model).peak_bytes <= budget
