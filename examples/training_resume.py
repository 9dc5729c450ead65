"""Train a small model with checkpoints in the background; run it again, or kill it in between, and it goes on.

python examples/training_resume.py --directory run --steps 300
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch import nn

import pylomin


def make_model() -> nn.Module:
    """A small language model of characters: the next one from the eight before it."""
    return nn.Sequential(
        nn.Embedding(128, 32), nn.Flatten(), nn.Linear(8 * 32, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 128)
    )


def train(directory: str, steps: int) -> float:
    """Train up to ``steps``, from the newest checkpoint in ``directory`` if there is one; return the last loss."""
    torch.manual_seed(0)
    with open(__file__, encoding="ascii") as file:
        text = torch.tensor([ord(character) for character in file.read()])
    windows = text.unfold(0, 9, 1)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)

    loss = float("nan")
    with pylomin.checkpoints(directory, model, optimizer, scheduler, every=50, keep=3) as series:
        if (checkpoint := series.resume()) is not None:
            loss = checkpoint.extra["loss"]
            print(f"resumed from step {series.steps}, loss {loss:.4f}")
        while series.steps < steps:
            batch = windows[torch.randint(len(windows), (64,))]
            output = nn.functional.cross_entropy(model(batch[:, :8]), batch[:, 8])
            optimizer.zero_grad()
            output.backward()
            optimizer.step()
            scheduler.step()
            loss = output.item()
            series.step(loss=loss)
    print(f"step {series.steps}, loss {loss:.4f}")
    return loss


def main() -> None:
    """Train in two halves, and in one go: the same numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", help="where to keep checkpoints; default: show that resuming changes nothing")
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    if arguments.directory is not None:
        train(arguments.directory, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as halves:
        expected = train(whole, arguments.steps)
        for path in pylomin.find_checkpoints(whole)[:-2]:  # as if it had been killed later than this one was written
            path.rename(f"{halves}/{path.name}")
        print("the same as in one go:", train(halves, arguments.steps) == expected)


if __name__ == "__main__":
    main()
