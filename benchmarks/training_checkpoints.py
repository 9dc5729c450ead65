"""How large are checkpoints of training, how long does training wait for them, and what survives?

Differences: a small language model is trained, then for ten steps more at a learning rate of 1e-5. Waiting: a series
takes turns with a plain copy of the same state into memory that is there already. Resuming: is it bit for bit? Kills: a
process that saves all the time is killed at random moments, and what it left is restored.
"""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pylomin
from benchmarks.common import ROOT, Spread, paired_ratios, time_call
from benchmarks.suite import DIRECTORY, finish, parse, save

CONTEXT = 32


@dataclass(frozen=True)
class Size:
    """How much to do."""

    width: int
    layers: int
    words: int
    warm_up_steps: int
    state_width: int  # of the model whose state is copied
    kills: int


SIZES = {
    "full": Size(width=512, layers=8, words=8192, warm_up_steps=200, state_width=4096, kills=50),
    "tiny": Size(width=64, layers=2, words=256, warm_up_steps=20, state_width=256, kills=2),
}


class LanguageModel(nn.Module):
    """A transformer that predicts each next word."""

    def __init__(self, size: Size, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.words, size.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        layer = nn.TransformerEncoderLayer(size.width, 8, 4 * size.width, dropout=dropout, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, size.layers, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.layers(self.embedding(words), mask=self.mask, is_causal=True)
        return nn.functional.linear(hidden, self.embedding.weight)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, size: Size, steps: int) -> list[float]:
    """Words that follow a simple rule, with noise."""
    losses = []
    for _ in range(steps):
        words = torch.randint(size.words, (8, 1)) + torch.arange(CONTEXT + 1) * torch.randint(1, 4, (8, 1))
        words = torch.where(torch.rand(words.shape) < 0.1, torch.randint(size.words, words.shape), words % size.words)
        output = model(words[:, :-1])
        loss = nn.functional.cross_entropy(output.flatten(0, 1), words[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def model_bytes(checkpoint: Path) -> int:
    return (checkpoint / "model.safetensors").stat().st_size


def errors(checkpoint: Path, model: nn.Module) -> dict[str, float]:
    """Root mean square of the errors of all weights, and that over the root mean square of the weights."""
    loaded = pylomin.load_checkpoint(checkpoint).model
    error = signal = 0.0
    count = 0
    for name, weight in model.state_dict().items():
        error += float((loaded[name].double() - weight.double()).square().sum())
        signal += float(weight.double().square().sum())
        count += weight.numel()
    return {"rms_error": (error / count) ** 0.5, "relative_rms_error": (error / signal) ** 0.5}


def differences(size: Size, directory: Path) -> dict[str, Any]:
    """Sizes and errors after ten steps."""
    torch.manual_seed(0)
    model = LanguageModel(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, size, size.warm_up_steps)
    old_half = copy.deepcopy(model).bfloat16()
    reference = pylomin.save_checkpoint(pylomin.build_checkpoint(model), directory / "reference")
    old = {name: weight.clone() for name, weight in model.state_dict().items()}
    for group in optimizer.param_groups:
        group["lr"] = 1e-5
    train(model, optimizer, size, 10)
    moved = sum(float((weight - old[name]).square().sum()) for name, weight in model.state_dict().items()) ** 0.5
    norm = sum(float(weight.square().sum()) for weight in old.values()) ** 0.5
    found: dict[str, Any] = {"full_bytes": model_bytes(reference), "relative_change": moved / norm}
    ways: dict[str, dict[str, Any]] = {
        "int8": {"quantize": "int8"},
        "int4": {"quantize": "int4"},
        "exact": {"lossless": True},
    }
    for name, options in ways.items():
        checkpoint = pylomin.build_checkpoint(model)
        path = pylomin.save_checkpoint(checkpoint, directory / name, reference=reference, **options)
        times = model_bytes(reference) / model_bytes(path)
        found[name] = {"times_smaller": times, **errors(path, model)}
    half = pylomin.save_checkpoint(pylomin.build_checkpoint(old_half), directory / "half")
    new_half = copy.deepcopy(model).bfloat16()
    path = pylomin.save_checkpoint(
        pylomin.build_checkpoint(new_half), directory / "half-exact", reference=half, lossless=True
    )
    found["exact, bfloat16"] = {
        "times_smaller": model_bytes(half) / model_bytes(path),
        **errors(path, new_half),
    }
    return found


def resuming(directory: Path) -> dict[str, Any]:
    """A hundred steps with dropout, scaler and scheduler, in one go and from a checkpoint."""
    small = SIZES["tiny"]

    def make() -> tuple[nn.Module, torch.optim.Optimizer, Any, Any]:
        model = LanguageModel(small, dropout=0.1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=200)
        return model, optimizer, scheduler, torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=10)

    def steps(run: tuple[nn.Module, torch.optim.Optimizer, Any, Any], count: int) -> list[float]:
        model, optimizer, scheduler, scaler = run
        losses = []
        for _ in range(count):
            words = torch.randint(small.words, (4, CONTEXT + 1))
            with torch.autocast("cpu"):
                loss = nn.functional.cross_entropy(model(words[:, :-1]).flatten(0, 1), words[:, 1:].flatten())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            losses.append(loss.item())
        return losses

    torch.manual_seed(0)
    first = make()
    steps(first, 50)
    exact = pylomin.save_checkpoint(pylomin.build_checkpoint(*first), directory / "resume")
    coarse = pylomin.save_checkpoint(pylomin.build_checkpoint(*first), directory / "resume-int8", quantize="int8")
    expected = steps(first, 100)
    second, third = make(), make()
    pylomin.restore_checkpoint(pylomin.load_checkpoint(exact), *second)
    same_losses = steps(second, 100) == expected
    pairs = zip(first[0].state_dict().values(), second[0].state_dict().values(), strict=True)
    pylomin.restore_checkpoint(pylomin.load_checkpoint(coarse), *third)
    gaps = [abs(a / b - 1) for a, b in zip(steps(third, 100), expected, strict=True)]
    return {
        "bit_for_bit": same_losses and all(torch.equal(a, b) for a, b in pairs),
        "largest_relative_gap_of_the_loss_from_int8": max(gaps),
    }


def waiting(size: Size, directory: Path, rounds: int) -> dict[str, Any]:
    """Time that training stands still for a save, beside one copy of the state."""
    width = size.state_width
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    tensors = [*model.state_dict().values()]
    tensors += [tensor for state in optimizer.state_dict()["state"].values() for tensor in state.values()]
    buffers = [torch.zeros_like(tensor) for tensor in tensors]

    def copy_once() -> None:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)

    copy_s, wait_s, write_s = [], [], []
    with pylomin.checkpoints(directory / "waiting", model, optimizer, keep=1) as series:
        for number in range(rounds + 1):
            (copied,) = time_call(copy_once, 1)
            start = time.perf_counter()
            series.step()
            waited = time.perf_counter() - start
            series.wait()
            written = time.perf_counter() - start
            if number:  # the first one also gets its memory
                copy_s.append(copied)
                wait_s.append(waited)
                write_s.append(written)
    return {
        "state_bytes": sum(tensor.nbytes for tensor in tensors),
        "copy_s": asdict(Spread.of(copy_s)),
        "wait_s": asdict(Spread.of(wait_s)),
        "until_written_s": asdict(Spread.of(write_s)),
        "wait_over_copy": asdict(paired_ratios(wait_s, copy_s)),
    }


def victim_state() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Of the process that is killed."""
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96))
    return model, torch.optim.Adam(model.parameters(), lr=1e-3)


def save_until_killed(directory: str) -> None:
    """Train and save, and say which step was begun to be saved."""
    torch.set_num_threads(1)
    model, optimizer = victim_state()
    with pylomin.checkpoints(directory, model, optimizer, full_every=3, keep=3, quantize="int8") as series:
        series.resume()
        while True:
            optimizer.zero_grad()
            model(torch.randn(4, 96)).square().mean().backward()
            optimizer.step()
            series.step(weight_sums=weight_sums(model))
            print(series.steps, flush=True)


def weight_sums(model: nn.Module) -> list[float]:
    """By which a restored model is compared with the one that was saved."""
    return [float(weight.detach().double().sum()) for weight in model.parameters()]


def kill_and_restore(directory: Path, generator: random.Random) -> bool:
    """Let a process save a few times, kill it in the middle; is the newest checkpoint there, and right?"""
    worker = json.dumps({"directory": str(directory)})
    command = [sys.executable, "-m", "benchmarks.training_checkpoints", "--worker", worker]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(2 + generator.randrange(5)):
            process.stdout.readline()
        time.sleep(generator.random() * 0.03)
        process.kill()
        begun = [line for line in process.stdout.read().split("\n") if line]
    model, optimizer = victim_state()
    series = pylomin.checkpoints(directory, model, optimizer)
    checkpoint = series.resume()
    if checkpoint is None or (begun and series.steps < int(begun[-1]) - 1):
        return False
    saved = checkpoint.extra["weight_sums"]
    return all(abs(a - b) < 1e-2 for a, b in zip(weight_sums(model), saved, strict=True))


def main() -> None:
    """Measure and write the result."""
    options = parse("training_checkpoints", __doc__, rounds=7, limit_s=600)
    if options.worker is not None:
        save_until_killed(**options.worker)
        return
    size = SIZES[options.size]
    generator = random.Random(0)
    DIRECTORY.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=DIRECTORY) as scratch:
        directory = Path(scratch)
        results: dict[str, Any] = {
            "differences": differences(size, directory),
            "resuming": resuming(directory),
            "waiting": waiting(size, directory, options.rounds),
        }
        restored: list[bool] = []
        while len(restored) < size.kills and (len(restored) < 2 or time.perf_counter() < options.deadline):
            restored.append(kill_and_restore(directory / "killed", generator))
    results["kills"] = {"kills": len(restored), "restored": sum(restored)}
    save(options, settings_of(options.rounds), {"rows": rows_of(results), **results})
    finish(options, {})


def settings_of(rounds: int) -> dict[str, Any]:
    """What has to be said of the work."""
    return {
        "model": "a language model of 8 layers for differences; four layers of 4096 x 4096 with Adam for waiting",
        "input": "ten steps at a learning rate of 1e-5 for the differences",
        "file_state": "written by itself",
        "rounds": rounds,
    }


def rows_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each question."""
    resumed, waited, kills = results["resuming"], results["waiting"], results["kills"]
    return [
        *(
            {"variant": f"difference, {name}", **results["differences"][name]}
            for name in ("int8", "int4", "exact", "exact, bfloat16")
        ),
        {"variant": "resumed, exact", "found": "bit for bit" if resumed["bit_for_bit"] else "**not** bit for bit"},
        {
            "variant": "resumed from int8",
            "found": f"loss within {resumed['largest_relative_gap_of_the_loss_from_int8']:.1%}",
        },
        {"variant": "training waits for a save", "times_copy": waited["wait_over_copy"]},
        {"variant": "killed while saving", "found": f"{kills['restored']} of {kills['kills']} restored"},
    ]


if __name__ == "__main__":
    main()
