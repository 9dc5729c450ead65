"""Shards on GPUs, joined by nccl: as many ranks as there are devices, two at most."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

import pylomin
from tests.distributed.models import Block, in_memory, plan, tokens, whole
from tests.distributed.ranks import join, outputs, start


def main(rank: int, ranks: int, directory: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    join(rank, ranks, directory, device=device)
    mesh = init_device_mesh("cuda", (ranks,))
    path, expected = pylomin.save_model(whole(), Path(directory, f"{rank}.safetensors")), in_memory(mesh).to(device)
    for budget in (None, "64KiB"):
        model = pylomin.load(lambda: parallelize_module(Block().eval(), mesh, plan()), path, memory_budget=budget)
        pylomin.prefetch(model)
        with torch.no_grad():
            for _ in range(3):
                assert_same(model(tokens().to(device)), expected(tokens().to(device)), exact=budget is None)
    dist.destroy_process_group()


def assert_same(actual: torch.Tensor, expected: torch.Tensor, *, exact: bool) -> None:
    assert torch.equal(actual, expected) if exact else torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.cuda
def test_shards_on_gpus(tmp_path: Path) -> None:
    ranks = min(2, torch.cuda.device_count())
    for rank, (status, said) in enumerate(outputs(start("test_cuda", ranks, tmp_path))):
        assert status == 0, f"rank {rank}:\n{said}"
