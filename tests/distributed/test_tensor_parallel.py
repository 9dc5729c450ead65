"""Models sharded by torch over two ranks, whose shards are read from files. The oracle is torch's own, in memory."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import pylomin
from pylomin.lazy.distributed import local_of
from pylomin.lazy.tensor import OffloadedTensor
from tests.distributed.models import Block, empty, in_memory, plan, tokens, whole
from tests.distributed.ranks import check, launch

KINDS = ("load", "lazy", "values", "prefetch", "fit")


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def stored(directory: Path) -> Path:
    path = directory / f"block{dist.get_rank()}.safetensors"
    return path if path.exists() else pylomin.save_model(whole(), path)


def distributed(directory: Path, kind: str, **options: Any) -> nn.Module:
    path, ranks = stored(directory), mesh()
    if kind == "load":
        return pylomin.load(lambda: parallelize_module(Block().eval(), ranks, plan()), path, **options)
    if kind == "values":
        return pylomin.lazy_loading(in_memory(ranks), **options)
    model = pylomin.lazy_loading(empty(ranks), weights=path, **options)
    if kind == "prefetch":
        pylomin.prefetch(model)
    if kind == "fit":
        pylomin.fit(model, "1MiB", args=[tokens()])
    return model


def assert_offloaded(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, nn.Parameter), name
        assert isinstance(local_of(parameter), OffloadedTensor), name


def case_outputs(directory: Path) -> None:
    """Bit for bit those of torch's own model, and within rounding those of one process."""
    ranks, alone = mesh(), whole()
    expected = in_memory(ranks)
    for kind in KINDS:
        for mode in ("mapped", "buffered", "direct"):
            model = distributed(directory, kind, reading_mode=mode)
            assert_offloaded(model)
            for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
                with grad():
                    for _ in range(3):
                        actual = model(tokens())
                        assert torch.equal(actual, expected(tokens())), (kind, mode, grad)
                    torch.testing.assert_close(actual, alone(tokens()))


def case_bounded(directory: Path) -> None:
    """The budget is for the shards of this rank; what does not fit in it twice runs by tiles."""
    expected = whole()(tokens())
    for budget in ("64KiB", "20KiB", "12KiB"):
        model = pylomin.prefetch(distributed(directory, "lazy", memory_budget=budget))
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(model(tokens()), expected)
        assert pylomin.stats(model).peak_bytes <= pylomin.stats(model).memory_budget
    with pytest.raises(pylomin.BudgetError):
        distributed(directory, "lazy", memory_budget=100)


def case_chunks(directory: Path) -> None:
    expected = whole()(tokens())
    for kind in ("load", "values"):
        model = distributed(directory, kind)
        pylomin.chunked_embedding(model, target_module_name="words", chunk_size=3)
        pylomin.chunked_linear(model, target_module_name="up", chunk_size=5)
        torch.testing.assert_close(model(tokens()), expected)


def case_gradients(directory: Path) -> None:
    """They flow through shards into inputs, and what autograd keeps of a shard is a pointer to it."""
    alone, model = whole(), distributed(directory, "load")
    hidden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for one in (alone, model):
        inputs = hidden.clone().requires_grad_()
        one.after(inputs).square().sum().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(gradients[1], gradients[0])
    inputs = hidden.clone().requires_grad_()
    output = model.after(inputs)
    assert pylomin.stats(model).resident_bytes == 0
    output.sum().backward()


def case_values(directory: Path) -> None:
    """What torch says of a shard: whole, local, copied, written, restored."""
    model, values = distributed(directory, "load"), whole().state_dict()
    weight = model.up.weight
    assert weight.placements == (Shard(0),)
    assert weight.shape == (98, 64)
    assert not weight.requires_grad
    assert torch.equal(weight.full_tensor(), values["up.weight"])
    local = distribute_tensor(values["up.weight"], mesh(), [Shard(0)], src_data_rank=None).to_local()
    assert torch.equal(weight.to_local(), local)
    state = model.state_dict()
    assert list(state) == list(values)
    assert all(torch.equal(_whole(value), values[name]) for name, value in state.items())
    copied = copy.deepcopy(model)
    assert_offloaded(copied)
    with torch.no_grad():
        copied.up.weight.zero_()
        assert copied.up.weight.full_tensor().abs().sum() == 0
    assert torch.equal(model.up.weight.full_tensor(), values["up.weight"])
    model.load_state_dict({name: value * 2 for name, value in state.items()})
    assert torch.equal(model.down.weight.full_tensor(), values["down.weight"] * 2)
    model.load_state_dict({name: value / 2 for name, value in model.state_dict().items()})
    pylomin.restore(model)
    assert type(model.up) is nn.Linear
    assert isinstance(model.up.weight, DTensor)
    assert model.up.weight.requires_grad
    assert type(local_of(model.up.weight)) is torch.Tensor
    expected = in_memory(mesh())
    assert torch.equal(model(tokens()), expected(tokens()))


def _whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


PLACEMENTS = (
    [Shard(0)],
    [Shard(1)],
    [Shard(2)],
    [Replicate()],
    [_StridedShard(0, split_factor=2)],
    [_StridedShard(1, split_factor=3)],
    [_StridedShard(2, split_factor=2)],
)


def values_of_every_kind() -> torch.Tensor:
    return torch.arange(7 * 6 * 10, dtype=torch.float32).reshape(7, 6, 10)


def case_placements(directory: Path) -> None:
    assert_shards(directory, mesh(), PLACEMENTS)


def assert_shards(directory: Path, ranks: DeviceMesh, every: Any) -> None:
    """Of each form of store, the shards that torch makes."""
    values = values_of_every_kind()
    path = directory / f"cube{dist.get_rank()}.safetensors"
    sources: list[Any] = [pylomin.save_store({"cube": values}, path, overwrite=True), {"cube": values}]
    torch.save({"cube": values}, path.with_suffix(".pt"))
    sources += [path.with_suffix(".pt"), lambda module, names: dict.fromkeys(names, values)]
    for placements in every:
        expected = distribute_tensor(values, ranks, placements, src_data_rank=None).to_local()
        for source in sources:
            model = pylomin.load(lambda: cube(ranks, placements), source)
            found = model.cube.to_local()
            assert isinstance(local_of(model.cube), OffloadedTensor)
            assert torch.equal(found, expected), (placements, source)
            assert torch.equal(found[1:2], expected[1:2]), (placements, source)


def cube(ranks: DeviceMesh, placements: Any) -> nn.Module:
    module = nn.Module()
    with torch.device("meta"):
        values = torch.empty(7, 6, 10)
    module.cube = nn.Parameter(distribute_tensor(values, ranks, placements, src_data_rank=None))
    return module


def case_quantised(directory: Path) -> None:
    """Shards of a quantised weight are decoded as they are read."""
    path = directory / f"int8-{dist.get_rank()}.safetensors"
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 256))
    pylomin.save_model(alone, path, quantize="int8")
    decoded = pylomin.load(lambda: nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 256)), path)
    hidden = torch.randn(3, 256)
    ranks, styles = mesh(), {"0": ColwiseParallel(), "1": plan()["down"]}

    def build() -> nn.Module:
        return parallelize_module(nn.Sequential(nn.Linear(256, 64), nn.Linear(64, 256)), ranks, styles)

    model = pylomin.load(build, path)
    torch.testing.assert_close(model(hidden), decoded(hidden))
    for mine, theirs in zip(model.parameters(), decoded.parameters(), strict=True):
        assert torch.equal(_whole(mine.detach()), theirs.detach())


def case_ties(directory: Path) -> None:
    """A store has a tied weight once; after torch distributed them, they are two parameters."""
    path, ranks = directory / f"tied{dist.get_rank()}.safetensors", mesh()
    alone = whole(tied=True)
    pylomin.save_model(alone, path)
    model = pylomin.load(lambda: parallelize_module(Block(tied=True).eval(), ranks, plan()), path)
    assert model.head.weight is model.words.weight
    torch.testing.assert_close(model(tokens()), alone(tokens()))
    unlike = plan() | {"words": ColwiseParallel(output_layouts=Replicate())}
    model = pylomin.load(lambda: parallelize_module(Block(tied=True).eval(), ranks, unlike), path)
    assert model.head.weight.placements != model.words.weight.placements
    torch.testing.assert_close(model(tokens()), alone(tokens()))


def stages(numbers: Any) -> nn.Module:
    return nn.Sequential(OrderedDict((str(number), nn.Linear(32, 32)) for number in numbers))


def case_pipeline(directory: Path) -> None:
    """Stages of torch.distributed.pipelining: a rank reads its own layers of a file that has all."""
    torch.manual_seed(0)
    alone, rank = stages(range(4)), dist.get_rank()
    path = pylomin.save_model(alone, directory / f"stages{rank}.safetensors")
    mine = range(2 * rank, 2 * rank + 2)
    names = stages(mine).state_dict().keys()
    model = pylomin.load(lambda: stages(mine), path, key_map=lambda name: name if name in names else None)
    hidden = torch.randn(4, 32)
    part = torch.empty(2, 32)
    stage = PipelineStage(model, rank, 2, torch.device("cpu"), input_args=(part,), output_args=(part,))
    with torch.no_grad():
        output = ScheduleGPipe(stage, 2).step(*([hidden] if rank == 0 else []))
        if rank == 1:
            torch.testing.assert_close(output, alone(hidden))
    assert pylomin.stats(model).bytes_read == 2 * 2 * 4 * (32 * 32 + 32)  # two layers, for each of two batches


class Counted(nn.Module):
    """torch replicates the parameters and the buffers of what a style is for."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden)


def case_buffers(directory: Path) -> None:
    alone, ranks = Counted().eval(), mesh()
    alone.norm.running_mean.copy_(torch.arange(8.0))
    model = pylomin.load(
        lambda: parallelize_module(Counted().eval(), ranks, {"norm": SequenceParallel(sequence_dim=0)}),
        alone.state_dict(),
    )
    assert isinstance(model.norm.running_mean, DTensor)
    assert torch.equal(model.norm.running_mean.to_local(), torch.arange(8.0))


def case_refusals(directory: Path) -> None:
    ranks = mesh()
    path = stored(directory)
    with pytest.raises(pylomin.StoreFormatError, match=r"'words.weight' .* is a DTensor: this process has a shard"):
        pylomin.save_model(distributed(directory, "load"), directory / "copy.safetensors")
    summed = nn.Module()
    summed.weight = nn.Parameter(DTensor.from_local(torch.ones(2), ranks, [Partial()], run_check=False))
    with pytest.raises(pylomin.PassError, match=r"'weight' has placements .*Partial.* sum over ranks"):
        pylomin.lazy_loading(summed)
    with torch.device("meta"):
        sharded = fully_shard(Block(), mesh=ranks)
    with pytest.raises(pylomin.PassError, match=r"module '' is wrapped by FSDP.* fully_shard to train"):
        pylomin.lazy_loading(sharded, weights=path)
    with pytest.raises(pylomin.PassError, match=r"is wrapped by FSDP"):
        pylomin.load(lambda: fully_shard(Block(), mesh=ranks), path)
    with pytest.raises(pylomin.PassError, match=r"device is meta, but the model is distributed over a mesh of cpu"):
        pylomin.load(lambda: parallelize_module(Block(), ranks, plan()), path, device="meta")
    with pytest.raises(pylomin.WeightMismatchError, match=r"'up.weight' .* found torch.float32 \[3, 64\], expected"):
        pylomin.load(
            lambda: parallelize_module(Block(), ranks, plan()), whole().state_dict() | {"up.weight": torch.ones(3, 64)}
        )


def case_sharded_by_fsdp_afterwards(directory: Path) -> None:
    """FSDP takes the weights into its own memory, and the outputs are right."""
    model = fully_shard(pylomin.load(lambda: Block().eval(), stored(directory)), mesh=mesh())
    torch.testing.assert_close(model(tokens()), whole()(tokens()))
    assert not any(isinstance(local_of(parameter), OffloadedTensor) for parameter in model.parameters())


CASES = {name.removeprefix("case_"): case for name, case in list(globals().items()) if name.startswith("case_")}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return launch("test_tensor_parallel", 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case: str, results: dict[str, list[Any]]) -> None:
    check(results[case])
