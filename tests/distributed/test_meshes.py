"""Four ranks: meshes of two dimensions, shards of no rows, and ranks outside of a mesh."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import pylomin
from tests.distributed.ranks import check, launch
from tests.distributed.test_tensor_parallel import assert_shards


def case_two_dimensions(directory: Path) -> None:
    ranks = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    along = [Replicate(), Shard(0), Shard(1), Shard(2)]
    every = [list(pair) for pair in itertools.product(along, along)]
    assert_shards(directory, ranks, [*every, [_StridedShard(0, split_factor=2), Shard(0)]])


def case_empty_shards(directory: Path) -> None:
    """Three rows for four ranks."""
    ranks, values = init_device_mesh("cpu", (4,)), torch.arange(6.0).reshape(3, 2)

    def build() -> nn.Module:
        module = nn.Linear(2, 3, bias=False, device="meta")
        module.weight = nn.Parameter(distribute_tensor(module.weight, ranks, [Shard(0)], src_data_rank=None))
        return module

    path = pylomin.save_store({"weight": values}, directory / f"rows{dist.get_rank()}.safetensors")
    for source in (path, {"weight": values}):
        model = pylomin.load(build, source)
        assert model.weight.to_local().shape == ((1, 2) if dist.get_rank() < 3 else (0, 2))
        assert torch.equal(model.weight.full_tensor(), values)
        hidden = distribute_tensor(torch.eye(2), ranks, [Replicate()])
        assert torch.equal(model(hidden).full_tensor(), values.t())


def case_outside(directory: Path) -> None:
    """Only two of the ranks are in the mesh; the others have nothing of the weight."""
    ranks = DeviceMesh("cpu", [1, 3])
    with torch.device("meta"):
        model = nn.Linear(2, 4)
    model.weight = nn.Parameter(distribute_tensor(model.weight, ranks, [Shard(0)], src_data_rank=None))
    path = pylomin.save_store(
        {"weight": torch.arange(8.0).reshape(4, 2), "bias": torch.zeros(4)},
        directory / f"outside{dist.get_rank()}.safetensors",
    )
    pylomin.lazy_loading(model, weights=path)
    local = model.weight.to_local()
    expected = {1: [[0.0, 1.0], [2.0, 3.0]], 3: [[4.0, 5.0], [6.0, 7.0]]}.get(dist.get_rank(), [])
    assert local.tolist() == expected


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch("test_meshes", 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_four_ranks(case: str, results: dict[str, list[Any]]) -> None:
    check(results[case])
