"""Trains and saves until it is killed; says which step is done. For ``test_series.py`` and the benchmark."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import pylomin


def train(directory: str, width: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    with pylomin.checkpoints(directory, model, optimizer, full_every=3, keep=3, quantize="int8") as series:
        series.resume()
        print(f"resumed {series.steps}", flush=True)
        while True:
            optimizer.zero_grad()
            model(torch.randn(4, width)).square().mean().backward()
            optimizer.step()
            series.step(weight_sums=[float(p.detach().double().sum()) for p in model.parameters()])
            print(f"step {series.steps}", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    train(sys.argv[1], int(sys.argv[2]))
