"""A short training run that draws random numbers everywhere: data, dropout, a scaler, a schedule."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Run:
    """A model in training; ``seed`` decides where it starts."""

    def __init__(
        self,
        seed: int = 0,
        make_optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW,
        make_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        self.model = nn.Sequential(
            nn.Linear(24, 48), nn.BatchNorm1d(48), nn.Dropout(0.2), nn.Tanh(), nn.Linear(48, 24, bias=False)
        )
        self.optimizer = make_optimizer(self.model.parameters())
        self.scheduler = make_scheduler(self.optimizer) if make_scheduler else None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=7)

    @property
    def state(self) -> tuple[Any, Any, Any, Any]:
        return self.model, self.optimizer, self.scheduler, self.scaler

    def train(self, steps: int) -> list[float]:
        return [self.step() for _ in range(steps)]

    def step(self) -> float:
        batch = torch.randn(8, 24) * random.random()

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            with torch.autocast("cpu"):
                loss = (self.model(batch) - batch).float().square().mean()
            if isinstance(self.optimizer, torch.optim.LBFGS):
                loss.backward()
            else:
                self.scaler.scale(loss).backward()
            return loss

        if isinstance(self.optimizer, torch.optim.LBFGS):
            loss = self.optimizer.step(closure)
        else:
            loss = closure()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            self.scheduler.step()
        return float(loss.detach())

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def same_values(a: Any, b: Any) -> bool:
    """Equal types and values, all the way down; tensors bit for bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_values(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same_values(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
