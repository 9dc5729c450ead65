"""A small model with one linear of each kind, and how its parts are distributed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WORDS, WIDTH, INNER = 51, 64, 98


class Block(nn.Module):
    """Unequal shards: 51 words and 49 of 98 inner units do not divide by 2 or 4."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.after(self.words(tokens))

    def after(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.down(torch.relu(self.up(self.norm(hidden))))
        output: Tensor = self.head(hidden)
        return output


def plan() -> dict[str, Any]:
    return {
        "words": RowwiseParallel(input_layouts=Replicate()),
        "up": ColwiseParallel(),
        "down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }


def whole(*, tied: bool = False) -> Block:
    torch.manual_seed(0)
    return Block(tied=tied).eval()


def empty(mesh: DeviceMesh) -> nn.Module:
    with torch.device("meta"):
        model = Block()
    return parallelize_module(model.eval(), mesh, plan())


def in_memory(mesh: DeviceMesh) -> nn.Module:
    """The model as torch alone distributes it."""
    model, values = parallelize_module(Block().eval(), mesh, plan()), whole().state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = values[name]
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, mesh, parameter.placements)
            parameter.copy_(value)
    return model


def tokens() -> Tensor:
    return torch.arange(21).reshape(3, 7) * 5 % WORDS
