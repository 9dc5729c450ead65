"""Checkpoints in the background: consistent, resumable, tidy, and honest about failures."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import pylomin
from benchmarks.training_checkpoints import kill_and_restore
from pylomin.checkpoint import series as series_module
from pylomin.errors import OutputExistsError, PassError, PylominError, StoreWriteError

from .training import Run, same_values


def names(directory: Path) -> list[str]:
    return [path.name for path in pylomin.find_checkpoints(directory)]


def test_saves_and_resumes(tmp_path):
    first = Run()
    with pylomin.checkpoints(tmp_path / "run", *first.state, every=3) as series:
        assert series.resume() is None
        saved = []
        for _ in range(7):
            first.step()
            saved.append(series.step(loss=0.5))
        assert saved == [False, False, True, False, False, True, False]
    assert names(tmp_path / "run") == ["step-00000003", "step-00000006"]

    second = Run(1)
    with pylomin.checkpoints(tmp_path / "run", *second.state, every=3) as series:
        checkpoint = series.resume()
        assert checkpoint is not None
        assert checkpoint.extra == {"loss": 0.5}
        assert series.steps == 6
        second.step()
        assert same_values(second.model.state_dict(), first.model.state_dict())


def test_the_snapshot_is_consistent(tmp_path, monkeypatch):
    """What is written is the state at the call, however far training is when it is written."""
    go_on = threading.Event()
    write = series_module.write_checkpoint

    def late(*args):
        assert go_on.wait(60)
        return write(*args)

    monkeypatch.setattr(series_module, "write_checkpoint", late)
    run = Run()
    run.train(2)
    with pylomin.checkpoints(tmp_path, *run.state) as series:
        series.step()
        after = run.train(5)
        go_on.set()
    resumed = Run(2)
    pylomin.restore_checkpoint(pylomin.load_checkpoint(tmp_path / "step-00000001"), *resumed.state)
    assert resumed.train(5) == after


def test_memory_of_the_snapshot_is_used_again(tmp_path):
    run = Run()
    with pylomin.checkpoints(tmp_path, *run.state) as series:
        run.step()
        series.step()
        series.wait()
        before = {name: tensor.data_ptr() for name, tensor in series._snapshot._weights.items()}
        run.step()
        series.step()
        assert {name: tensor.data_ptr() for name, tensor in series._snapshot._weights.items()} == before
        assert all(t.data_ptr() != before[n] for n, t in run.model.state_dict().items())


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_differences_between_whole_ones(tmp_path, quantize):
    torch.manual_seed(0)
    model = nn.Linear(64, 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    saved = []
    with pylomin.checkpoints(tmp_path, model, optimizer, full_every=3, quantize=quantize) as series:
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(2, 64)).sum().backward()
            optimizer.step()
            series.step()
            saved.append(model.weight.detach().clone())
    schemes = [pylomin.quantization_report(path) for path in pylomin.find_checkpoints(tmp_path)]
    expected = {None: "xor", "int8": "int8", "int4": "int4"}[quantize]
    assert [report["weight"].scheme if report else "full" for report in schemes] == [
        "full",
        expected,
        expected,
        "full",
        expected,
    ]
    for path, weight in zip(pylomin.find_checkpoints(tmp_path), saved, strict=True):
        loaded = pylomin.load_checkpoint(path).model["weight"]
        error = float((loaded - weight).norm() / weight.norm())
        assert error == 0 if quantize is None else error < 1e-4


@pytest.mark.parametrize(
    ("keep", "kept"), [(1, ["4", "5"]), (2, ["4", "5"]), (3, ["1", "3", "4", "5"]), (None, ["1", "2", "3", "4", "5"])]
)
def test_old_ones_go_but_what_others_need_stays(tmp_path, keep, kept):
    run = Run()
    with pylomin.checkpoints(tmp_path, *run.state, full_every=3, keep=keep, quantize="int8") as series:
        for _ in range(5):
            run.step()
            series.step()
    assert [name.lstrip("step-0") for name in names(tmp_path)] == kept
    assert sorted(p.name for p in tmp_path.iterdir()) == names(tmp_path), "nothing else is left"
    for path in pylomin.find_checkpoints(tmp_path):
        pylomin.restore_checkpoint(pylomin.load_checkpoint(path), *Run(1).state)


def test_torn_ones_are_ignored(tmp_path):
    run = Run()
    with pylomin.checkpoints(tmp_path, *run.state) as series:
        for _ in range(4):
            run.step()
            series.step()
    (tmp_path / "step-00000004" / "checkpoint.json").unlink()
    model_file = tmp_path / "step-00000003" / "model.safetensors"
    model_file.write_bytes(model_file.read_bytes()[:-1])
    (tmp_path / "step-5").write_text("not even a directory")
    other = Run(1)
    with pylomin.checkpoints(tmp_path, *other.state) as series:
        assert series.resume() is not None
        assert series.steps == 2
        series.step()
    assert pylomin.load_checkpoint(tmp_path / "step-00000003").step == 3, "a torn one is replaced"


def test_a_whole_one_is_not_replaced(tmp_path):
    run = Run()
    with pylomin.checkpoints(tmp_path, *run.state) as series:
        series.step()
    series = pylomin.checkpoints(tmp_path, *run.state)
    series.step()
    with pytest.raises(OutputExistsError, match="already exists"):
        series.close()


def test_failures_come_up(tmp_path, monkeypatch):
    """At the next save or at the end; later ones are written all the same."""
    run = Run()

    def fail(*args):
        raise StoreWriteError("no space")

    with pylomin.checkpoints(tmp_path, *run.state, full_every=5, quantize="int8") as series:
        with monkeypatch.context() as patch:
            patch.setattr(series_module, "write_checkpoint", fail)
            series.step()
            with pytest.raises(StoreWriteError, match="no space"):
                series.step()
        series.step()
    assert names(tmp_path) == ["step-00000003"]
    assert pylomin.quantization_report(tmp_path / "step-00000003") == {}, "whole, for the one before it failed"

    monkeypatch.setattr(series_module, "write_checkpoint", fail)
    with pytest.raises(StoreWriteError, match="no space"), pylomin.checkpoints(tmp_path, *run.state) as series:
        series.step(step=9)
    series.close()
    with pytest.raises(ZeroDivisionError), pylomin.checkpoints(tmp_path, *run.state) as series:
        series.step(step=9)
        1 / 0  # noqa: B018


def test_what_was_begun_is_finished_when_the_block_fails(tmp_path):
    run = Run()
    with pytest.raises(ZeroDivisionError), pylomin.checkpoints(tmp_path, *run.state) as series:
        series.step()
        1 / 0  # noqa: B018
    assert names(tmp_path) == ["step-00000001"]


def test_no_thread_is_left(tmp_path):
    before = threading.active_count()
    with pylomin.checkpoints(tmp_path, *Run().state) as series:
        series.step()
        assert threading.active_count() > before
    assert threading.active_count() == before


@pytest.mark.parametrize("argument", ["every", "full_every", "keep"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_refusals(tmp_path, argument, value):
    with pytest.raises(PassError, match=f"{argument} is {value!r}; expected a positive integer"):
        pylomin.checkpoints(tmp_path, nn.Linear(1, 1), **{argument: value})


def test_an_unknown_scheme(tmp_path):
    with pytest.raises(PassError, match="quantize is 'int1'"):
        pylomin.checkpoints(tmp_path, nn.Linear(1, 1), quantize="int1")


def test_kill_at_random_moments(tmp_path):
    """Whatever the moment, the newest whole checkpoint restores, and it is no older than the last save but one."""
    generator = random.Random(0)
    assert all(kill_and_restore(tmp_path, generator) for _ in range(2))
    leftovers = [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(leftovers) <= 1, "a later writer removes what a killed one left"


def test_a_reference_that_is_gone(tmp_path):
    """A difference without its reference is not whole: the next older one is taken."""
    run = Run()
    with pylomin.checkpoints(tmp_path, *run.state, full_every=2, quantize="int8") as series:
        for _ in range(4):
            run.step()
            series.step()
    shutil.rmtree(tmp_path / "step-00000003")
    with pytest.raises(PylominError):
        pylomin.load_checkpoint(tmp_path / "step-00000004")
    with pylomin.checkpoints(tmp_path, *Run(1).state) as series:
        assert series.resume() is not None
        assert series.steps == 2
