"""Training resumed from a checkpoint continues bit for bit, whatever optimizer and scheduler it uses."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import pylomin
from pylomin.errors import CheckpointError

from .training import Run, same_values


def every_optimizer() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    """Those in torch.optim, and options that change what their state holds."""
    sizes = {"SGD": {"lr": 0.01}, "LBFGS": {"lr": 0.1, "max_iter": 3, "history_size": 4}}
    found: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        name: partial(cls, **sizes.get(name, {}))
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
    }
    del found["SparseAdam"]  # takes sparse gradients only
    if "Muon" in found:  # takes matrices only
        found["Muon"] = lambda parameters: torch.optim.Muon([p for p in parameters if p.dim() == 2])
    found["SGD momentum"] = partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True)
    found["AdamW amsgrad"] = partial(torch.optim.AdamW, amsgrad=True, foreach=True)
    found["Adam fused"] = partial(torch.optim.Adam, fused=True)
    found["Adam of a tensor"] = partial(torch.optim.Adam, lr=torch.tensor(1e-3))
    found["RMSprop centered"] = partial(torch.optim.RMSprop, centered=True, momentum=0.5)
    found["LBFGS strong_wolfe"] = partial(torch.optim.LBFGS, line_search_fn="strong_wolfe", max_iter=2)
    found["groups"] = lambda parameters: torch.optim.AdamW(
        [{"params": [p], "lr": 1e-3 * (i + 1), "betas": (0.8, 0.9 + i / 100)} for i, p in enumerate(parameters)]
    )
    return found


OPTIMIZERS = every_optimizer()
SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR object": lambda o: schedulers.LambdaLR(o, _Decay(0.8)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o),
    "LinearLR": lambda o: schedulers.LinearLR(o),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 1e-4, 1e-2, step_size_up=4, cycle_momentum=False),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1e-2, total_steps=60),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o), schedulers.ExponentialLR(o, 0.9)], [4]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, total_iters=4), schedulers.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 1e-2),
}


class _Decay:
    """A schedule with a state of its own, which LambdaLR saves."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, epoch: int) -> float:
        return self.factor**epoch


def resumed(make: Callable[[int], Run], tmp_path, steps: int = 6) -> None:
    """Train on in one run, and from its checkpoint in another one that began elsewhere."""
    first = make(0)
    first.train(steps)
    path = pylomin.save_checkpoint(pylomin.build_checkpoint(*first.state, step=steps), tmp_path / "checkpoint")
    expected = first.train(steps)

    second = make(1)
    second.train(2)
    checkpoint = pylomin.load_checkpoint(path)
    assert checkpoint.step == steps
    pylomin.restore_checkpoint(checkpoint, *second.state)
    assert second.train(steps) == expected
    assert same_values(second.model.state_dict(), first.model.state_dict())
    assert same_values(second.optimizer.state_dict(), first.optimizer.state_dict())
    assert same_values(second.scaler.state_dict(), first.scaler.state_dict())
    if first.scheduler is not None:
        assert same_values(second.scheduler.state_dict(), first.scheduler.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name, tmp_path):
    resumed(lambda seed: Run(seed, OPTIMIZERS[name]), tmp_path)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch on schedulers that it deprecates, or calls in another order
        resumed(lambda seed: Run(seed, make_scheduler=SCHEDULERS[name]), tmp_path)


def test_a_hundred_steps(tmp_path):
    resumed(lambda seed: Run(seed, make_scheduler=SCHEDULERS["OneCycleLR"]), tmp_path, steps=25)
    first = Run(0, make_scheduler=lambda o: schedulers.CosineAnnealingLR(o, 50))
    first.train(20)
    path = pylomin.save_checkpoint(pylomin.build_checkpoint(*first.state), tmp_path / "long")
    expected = first.train(100)
    second = Run(1, make_scheduler=lambda o: schedulers.CosineAnnealingLR(o, 50))
    pylomin.restore_checkpoint(pylomin.load_checkpoint(path), *second.state)
    assert second.train(100) == expected
    assert same_values(second.model.state_dict(), first.model.state_dict())


def test_sparse_adam(tmp_path):
    def make() -> tuple[nn.Embedding, torch.optim.SparseAdam]:
        torch.manual_seed(0)
        model = nn.Embedding(50, 8, sparse=True)
        return model, torch.optim.SparseAdam(model.parameters())

    def train(model: nn.Embedding, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randint(50, (4,))).square().sum().backward()
            optimizer.step()
        return model.weight.detach().clone()

    first = make()
    train(*first)
    path = pylomin.save_checkpoint(pylomin.build_checkpoint(*first), tmp_path / "c")
    expected = train(*first)
    second = make()
    pylomin.restore_checkpoint(pylomin.load_checkpoint(path), *second)
    assert torch.equal(train(*second), expected)


def test_state_keeps_its_strides(tmp_path):
    model = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(1, 4, 5, 5)).sum().backward()
    optimizer.step()
    path = pylomin.save_checkpoint(pylomin.build_checkpoint(model, optimizer), tmp_path / "c")
    saved = optimizer.state_dict()["state"][0]["exp_avg"]
    loaded = pylomin.load_checkpoint(path).optimizer["state"][0]["exp_avg"]
    assert loaded.stride() == saved.stride()
    assert torch.equal(loaded, saved)


def test_several_optimizers(tmp_path):
    first = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.ModuleList(first)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1 * (i + 1)) for i, m in enumerate(first)]
    path = pylomin.save_checkpoint(pylomin.build_checkpoint(model, optimizers), tmp_path / "c")
    others = [torch.optim.Adam(m.parameters()) for m in first]
    checkpoint = pylomin.load_checkpoint(path)
    pylomin.restore_checkpoint(checkpoint, model, others)
    assert [optimizer.param_groups[0]["lr"] for optimizer in others] == [0.1, 0.2]
    with pytest.raises(CheckpointError, match="one in the checkpoint and several here, or the other way round"):
        pylomin.restore_checkpoint(checkpoint, model, others[0])
    with pytest.raises(CheckpointError, match="has 2 of optimizer; 1 were given"):
        pylomin.restore_checkpoint(checkpoint, model, others[:1])


def test_everything_else_that_is_given(tmp_path):
    model = nn.Linear(2, 1)
    extra = {"best": 0.25, "history": [(1, 0.5), (2, float("nan"))], "mask": torch.tensor([True, False])}
    path = pylomin.save_checkpoint(pylomin.build_checkpoint(model, epoch=3, step=7, **extra), tmp_path / "c")
    loaded = pylomin.load_checkpoint(path)
    assert (loaded.epoch, loaded.step) == (3, 7)
    assert same_values(loaded.extra, extra)
    assert (loaded.optimizer, loaded.scheduler, loaded.scaler) == (None, None, None)


class Versioned(nn.Module):
    """State that is no tensor, and a version that it is read by."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.seen: object = None

    def get_extra_state(self) -> object:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        self.seen = local_metadata.get("version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_extra_state_and_versions_of_modules(tmp_path):
    model, other = nn.Sequential(Versioned(), nn.Linear(1, 1)), nn.Sequential(Versioned(), nn.Linear(1, 1))
    model[0].count = 5
    path = pylomin.save_checkpoint(pylomin.build_checkpoint(model), tmp_path / "c")
    pylomin.restore_checkpoint(pylomin.load_checkpoint(path), other)
    assert (other[0].count, other[0].seen) == (5, 3)


def test_tied_weights_are_stored_once(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(64, 64, bias=False), "b": nn.Linear(64, 64, bias=False)})
    model["b"].weight = model["a"].weight
    path = pylomin.save_checkpoint(pylomin.build_checkpoint(model), tmp_path / "c")
    assert list(pylomin.open_store(path)) == ["a.weight"]
    loaded = pylomin.load_checkpoint(path)
    assert loaded.model["a.weight"] is loaded.model["b.weight"]
    expected = model["a"].weight.detach().clone()
    nn.init.zeros_(model["a"].weight)
    pylomin.restore_checkpoint(loaded, model)
    assert torch.equal(model["b"].weight, expected)


def test_an_offloaded_model(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    pylomin.lazy_loading(model)
    path = pylomin.save_checkpoint(pylomin.build_checkpoint(model), tmp_path / "c")
    with torch.no_grad():
        model[0].weight.zero_()
    pylomin.restore_checkpoint(pylomin.load_checkpoint(path), model)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_runs_as_a_model(tmp_path):
    run = Run()
    run.train(2)
    path = pylomin.save_checkpoint(pylomin.build_checkpoint(*run.state), tmp_path / "c")
    lazy = pylomin.load(lambda: Run(1).model, path).eval()
    batch = torch.randn(3, 24)
    run.model.eval()
    with torch.inference_mode():
        assert torch.equal(lazy(batch), run.model(batch))


def test_from_memory():
    """What was built can be restored without a file."""
    run = Run()
    checkpoint = pylomin.build_checkpoint(*run.state)
    expected = torch.rand(1)
    pylomin.restore_checkpoint(checkpoint, *Run(1).state[:2])
    assert torch.equal(torch.rand(1), expected)


def test_random_numbers_can_be_left_alone():
    checkpoint = pylomin.build_checkpoint(nn.Linear(1, 1))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    pylomin.restore_checkpoint(checkpoint, nn.Linear(1, 1), rng=False)
    torch.manual_seed(5)
    pylomin.restore_checkpoint(checkpoint, rng=False)
    assert torch.equal(torch.rand(1), expected)


def test_what_does_not_fit(tmp_path):
    run = Run()
    checkpoint = pylomin.build_checkpoint(run.model)
    with pytest.raises(CheckpointError, match=r"has no optimizer\. Save it with one, or restore without"):
        pylomin.restore_checkpoint(checkpoint, run.model, run.optimizer)
    with pytest.raises(CheckpointError, match=r"does not fit the model: [\s\S]*size mismatch"):
        pylomin.restore_checkpoint(checkpoint, nn.Sequential(nn.Linear(24, 47)), strict=False)
    checkpoint = pylomin.build_checkpoint(run.model, run.optimizer)
    other = torch.optim.Adam([nn.Parameter(torch.ones(1))])
    with pytest.raises(CheckpointError, match=r"does not fit the optimizer, a Adam: .*parameter group"):
        pylomin.restore_checkpoint(checkpoint, optimizer=other)


def test_what_cannot_be_stored(tmp_path):
    with pytest.raises(CheckpointError, match=r"extra\.callback is a builtins\.function"):
        pylomin.save_checkpoint(pylomin.build_checkpoint(nn.Linear(1, 1), callback=lambda: 0), tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
