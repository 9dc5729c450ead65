"""Parameters that are one rank's shards of weights: DTensors of ``torch.distributed.tensor``.

Such a parameter stays a DTensor, around an offloaded tensor in the place of its local one. So torch's own dispatch,
hooks and collectives see what they always see, and whatever they do with the local tensor loads it. Everything else
(stores, residency, the budget) knows the local shard only, as a weight of its shape.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import nn

from pylomin.errors import PassError
from pylomin.residency.weight import contiguous_stride
from pylomin.store.selection import Interval, Selection, intervals_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def is_distributed(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor. Nothing is imported for that: who has one has imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank has of a parameter: of one that is not distributed, itself."""
    return parameter._local_tensor if is_distributed(parameter) else parameter


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is distributed."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size  # of the whole tensor
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: torch.Tensor) -> Sharding:
        assert is_distributed(tensor)
        return Sharding(tensor.device_mesh, tuple(tensor.placements), tensor.size(), tuple(tensor.stride()))

    def around(self, local: torch.Tensor) -> DTensor:
        """The tensor of which ``local`` is this rank's shard. It requires no grad."""
        from torch.distributed.tensor import DTensor

        with torch.no_grad():
            return DTensor.from_local(
                local, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
            )


def with_local(local: torch.Tensor, like: DTensor) -> DTensor:
    """A DTensor distributed as another, of whose shard here ``local`` has the values. It requires no grad."""
    sharding = Sharding.of(like)
    if local.is_contiguous():
        sharding = replace(sharding, stride=contiguous_stride(tuple(sharding.shape)))
    return sharding.around(local)


def distributed_parameter(local: torch.Tensor, like: DTensor, *, requires_grad: bool = False) -> Any:
    """As :func:`with_local`, as it sits in ``module._parameters``."""
    with torch.inference_mode(False):
        return nn.Parameter(with_local(local, like), requires_grad=requires_grad)


def selection_of(tensor: DTensor) -> Selection:
    """Which elements of the weight this rank has.

    Raises:
        PassError: torch's local tensor has another shape than its placements give.
    """
    shape, mesh, placements = tuple(tensor.shape), tensor.device_mesh, tensor.placements
    if mesh.get_coordinate() is None:  # a rank that is not in the mesh has nothing
        intervals: tuple[tuple[Interval, ...], ...] = tuple(((0, 0),) for _ in shape)
    elif all(type(placement).__name__ in ("Shard", "Replicate") for placement in placements):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
        intervals = tuple(((first, first + size),) for first, size in zip(offsets, sizes, strict=True))
    else:
        intervals = tuple(_intervals_along(dim, tensor) for dim in range(len(shape)))
    selection = Selection(shape, intervals)
    found = tuple(tensor._local_tensor.shape)
    if selection.selected_shape != found and mesh.get_coordinate() is not None:
        raise PassError(
            f"a parameter of shape {list(shape)} with placements {placements} has a local tensor of shape "
            f"{list(found)}; expected {list(selection.selected_shape)}. Distribute it with "
            "torch.distributed.tensor.distribute_tensor."
        )
    return selection


def _intervals_along(dim: int, tensor: DTensor) -> tuple[Interval, ...]:
    """What this rank has along one dimension: the indices, sharded as the tensor is. No rank waits for another."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    size, mesh = tensor.shape[dim], tensor.device_mesh
    placements: list[Any] = []
    for placement in tensor.placements:
        along, kind = getattr(placement, "dim", None), cast(Any, type(placement))
        if along is None or along % tensor.dim() != dim:
            placements.append(Replicate())
        elif hasattr(placement, "split_factor"):
            placements.append(kind(0, split_factor=placement.split_factor))
        else:
            placements.append(kind(0))
    if all(placement.is_replicate() for placement in placements):
        return ((0, size),)
    indices = torch.arange(size, device=mesh.device_type)
    local = distribute_tensor(indices, mesh, placements, src_data_rank=None).to_local()
    return intervals_of(local.tolist())


def check_distributed(model: nn.Module, parameters: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises PassError if the model, or one of its parameters, is distributed in a way that has no bytes on disk."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is not None:
        wrapped = (module.FSDPModule, module.FullyShardedDataParallel)
        for name, part in model.named_modules():
            if isinstance(part, wrapped):
                raise PassError(
                    f"module '{name}' is wrapped by FSDP, which keeps its parameters in memory of its own, gathers "
                    "them and frees them. Use either: fully_shard to train, or a tensor-parallel model "
                    "(parallelize_module) with pylomin, whose weights leave memory between uses."
                )
    for name, parameter in parameters:
        if is_distributed(parameter) and any(placement.is_partial() for placement in parameter.placements):
            raise PassError(
                f"parameter '{name}' has placements {parameter.placements}: its values are a sum over ranks. Give it "
                "Shard or Replicate placements."
            )


def mesh_device(parameters: Iterable[torch.Tensor], device: torch.device | None) -> torch.device | None:
    """Where to compute: on the device of the mesh where there is one.

    Raises:
        PassError: ``device`` is of another type than that of the mesh.
    """
    for parameter in parameters:
        if not is_distributed(parameter):
            continue
        kind = parameter.device_mesh.device_type
        if device is None:
            if kind == "cpu":
                return None
            return torch.device(kind, torch.get_device_module(kind).current_device())
        if device.type != kind:
            raise PassError(f"device is {device}, but the model is distributed over a mesh of {kind} devices.")
    return device
