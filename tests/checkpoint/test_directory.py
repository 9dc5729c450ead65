"""Directories that appear whole or not at all; differences; damage."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import pylomin
from pylomin.checkpoint.directory import DOCUMENT, MODEL_FILE, STATE_FILE
from pylomin.errors import (
    CheckpointError,
    OutputExistsError,
    PassError,
    PylominError,
    StoreFormatError,
    StoreReadError,
    StoreWriteError,
)

from .training import Run, same_values


def save(run: Run, directory: Path, **options: object) -> Path:
    return pylomin.save_checkpoint(pylomin.build_checkpoint(*run.state, step=1), directory, **options)


class Large(Run):
    """Matrices that are large enough for the default filter."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.model = nn.Sequential(nn.Linear(24, 256), nn.Tanh(), nn.Linear(256, 24))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)


@pytest.fixture
def run() -> Run:
    run = Run()
    run.train(3)
    return run


@pytest.fixture
def large() -> Large:
    run = Large()
    run.train(2)
    return run


def test_files(run, tmp_path):
    path = save(run, tmp_path / "made" / "for it" / "c")
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == [
        DOCUMENT,
        MODEL_FILE,
        STATE_FILE,
    ]
    with safe_open(path / MODEL_FILE, "pt") as file:
        assert set(file.keys()) == set(run.model.state_dict())
    with safe_open(path / STATE_FILE, "pt") as file:
        assert "optimizer.state.0.exp_avg" in file.keys()  # noqa: SIM118
    assert json.loads((path / DOCUMENT).read_text())["sections"]["step"] == 1
    assert pylomin.verify(path).ok
    assert [p.name for p in path.parent.iterdir()] == ["c"]


def test_nothing_is_overwritten(run, tmp_path):
    path = save(run, tmp_path / "c")
    with pytest.raises(OutputExistsError, match=r"c' already exists\. Choose another name"):
        save(run, path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError):
        save(run, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    save(run, tmp_path / "empty")
    assert pylomin.load_checkpoint(tmp_path / "empty").step == 1


def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StoreWriteError, match=r"No space left on device.*Free some space there"):
        save(run, tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_no_directory_can_be_made(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreWriteError):
        save(run, tmp_path / "file" / "c")


def test_quantised(large, tmp_path):
    path = save(large, tmp_path / "c", quantize="int8")
    report = pylomin.quantization_report(path)
    assert {name: entry.scheme for name, entry in report.items()} == {"0.weight": "int8", "2.weight": "int8"}
    other = Large(1)
    pylomin.restore_checkpoint(pylomin.load_checkpoint(path), *other.state)
    error = (other.model[0].weight - large.model[0].weight).norm() / large.model[0].weight.norm()
    assert 0 < error < 0.006
    assert same_values(other.optimizer.state_dict(), large.optimizer.state_dict()), "exact unless asked for"


def test_the_loss_from_quantised_weights_stays_close(large, tmp_path):
    path = save(large, tmp_path / "c", quantize="int8")
    expected = large.train(20)
    other = Large(1)
    pylomin.restore_checkpoint(pylomin.load_checkpoint(path), *other.state)
    assert other.train(20) == pytest.approx(expected, rel=0.02)


def test_a_filter_that_takes_the_optimizer(large, tmp_path):
    path = save(large, tmp_path / "c", quantize="int8", filter=r"exp_avg$")
    assert pylomin.quantization_report(path) == {}
    report = pylomin.quantization_report(path / STATE_FILE)
    assert "int8" in {entry.scheme for entry in report.values()}
    assert all(name.endswith("exp_avg") for name in report)
    other = Large(1)
    pylomin.restore_checkpoint(pylomin.load_checkpoint(path), *other.state)
    saved, loaded = (r.optimizer.state_dict()["state"][0] for r in (large, other))
    assert torch.equal(saved["exp_avg_sq"], loaded["exp_avg_sq"])
    assert 0 < (saved["exp_avg"] - loaded["exp_avg"]).norm() / saved["exp_avg"].norm() < 0.01


def test_lossless_differences_resume_bit_for_bit(large, tmp_path):
    reference = save(large, tmp_path / "a")
    large.train(5)
    path = save(large, tmp_path / "b", reference=reference, lossless=True)
    assert (path / MODEL_FILE).stat().st_size < (reference / MODEL_FILE).stat().st_size
    expected = large.train(10)
    other = Large(1)
    pylomin.restore_checkpoint(pylomin.load_checkpoint(path), *other.state)
    assert other.train(10) == expected


@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.01), ("int4", 0.15)])
def test_the_error_is_a_part_of_the_difference(large, tmp_path, scheme, bound):
    reference = save(large, tmp_path / "a")
    old = large.weights()
    large.train(10)
    path = save(large, tmp_path / "b", reference=reference, quantize=scheme)
    model = pylomin.load_checkpoint(path).model
    for name in ("0.weight", "2.weight"):
        weight = large.model.state_dict()[name]
        error = (model[name] - weight).norm()
        assert error / (weight - old[name]).norm() < bound
        assert float(error / weight.norm()) == pytest.approx(
            pylomin.quantization_report(path)[name].rms_error, rel=1e-3
        )


def test_a_frozen_layer_is_not_stored_again(large, tmp_path):
    large.model[0].requires_grad_(False)
    large.optimizer = torch.optim.SGD(large.model[2].parameters(), lr=0.1)
    reference = save(large, tmp_path / "a")
    large.train(2)
    path = save(large, tmp_path / "b", reference=reference)
    assert {name: entry.scheme for name, entry in pylomin.quantization_report(path).items()} == {
        "0.weight": "same",
        "0.bias": "same",
    }
    assert same_values(dict(pylomin.load_checkpoint(path).model)["0.weight"].clone(), large.model[0].weight.detach())


def test_arguments_that_exclude_each_other(run, tmp_path):
    with pytest.raises(PassError, match=r"give reference=, or leave lossless out"):
        save(run, tmp_path / "c", lossless=True)
    with pytest.raises(PassError, match="lossless and quantize exclude each other"):
        save(run, tmp_path / "c", lossless=True, reference=tmp_path, quantize="int8")
    with pytest.raises(PassError, match="quantize is 'int5'"):
        save(run, tmp_path / "c", quantize="int5")
    with pytest.raises(PassError, match="'int5' for weight"):
        save(run, tmp_path / "c", filter=lambda name, info: "int5")
    assert list(tmp_path.iterdir()) == []


def test_a_reference_that_is_none(run, tmp_path):
    with pytest.raises(StoreReadError, match="is no checkpoint that can be read"):
        save(run, tmp_path / "c", reference=tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- damage -----------------------------------------------------------------------------------------------------------


def test_missing_files(run, tmp_path):
    path = save(run, tmp_path / "c")
    with pytest.raises(StoreReadError, match="is no checkpoint that can be read"):
        pylomin.load_checkpoint(tmp_path)
    (path / STATE_FILE).unlink()
    with pytest.raises(StoreReadError, match=r"state\.safetensors"):
        pylomin.load_checkpoint(path)


def test_files_of_different_checkpoints(run, tmp_path):
    first = save(run, tmp_path / "a")
    run.train(1)
    second = save(run, tmp_path / "b")
    (second / MODEL_FILE).rename(first / MODEL_FILE)
    with pytest.raises(CheckpointError, match=r"is of digest .*The files are not of one checkpoint"):
        pylomin.load_checkpoint(first)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not valid JSON"),
        ("[]", "is a JSON list"),
        ("{}", "is of format None None; this pylomin reads"),
        ('{"format": "pylomin.checkpoint", "version": 2}', "2; this pylomin reads pylomin.checkpoint 1"),
        ('{"format": "pylomin.checkpoint", "version": 1}', "has no 'sections'"),
        ('{"format": "pylomin.checkpoint", "version": 1, "sections": {}}', "has no 'files'"),
    ],
)
def test_hostile_documents(run, tmp_path, text, problem):
    path = save(run, tmp_path / "c")
    (path / DOCUMENT).write_text(text)
    with pytest.raises(StoreFormatError) as error:
        pylomin.load_checkpoint(path)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "model", [None, 3, {"entries": 3, "versions": None}, {"entries": [[1]]}, {"entries": [["a", {"x": 1}]]}]
)
def test_hostile_state_dict(run, tmp_path, model):
    path = save(run, tmp_path / "c")
    document = json.loads((path / DOCUMENT).read_text())
    document["sections"]["model"] = model
    (path / DOCUMENT).write_text(json.dumps(document))
    with pytest.raises(StoreFormatError, match="section 'model' of"):
        _ = pylomin.load_checkpoint(path).model


@pytest.mark.parametrize("file", [DOCUMENT, MODEL_FILE, STATE_FILE])
def test_any_damage_is_noticed(run, tmp_path, file):
    """Bytes changed or lost anywhere: an error of ours, or the very same state."""
    path = save(run, tmp_path / "c", quantize="int8", filter="weight")
    expected = pylomin.load_checkpoint(path)
    expected_model = {name: value.clone() for name, value in expected.model.items()}
    expected_optimizer = expected.optimizer
    raw = (path / file).read_bytes()
    generator = random.Random(0)
    for attempt in range(60):
        damaged = bytearray(raw)
        if attempt % 3 == 0:
            damaged = damaged[: generator.randrange(len(raw))]
        else:
            damaged[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        (path / file).write_bytes(damaged)
        try:
            checkpoint = pylomin.load_checkpoint(path)
            model = {name: value.clone() for name, value in checkpoint.model.items()}
            optimizer = checkpoint.optimizer
        except PylominError:
            continue
        if file != DOCUMENT:  # of which no digest is kept
            assert same_values(model, expected_model)
            assert same_values(optimizer, expected_optimizer)
