from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import pylomin


@pytest.fixture(scope="module")
def series(tmp_path_factory):
    """Three checkpoints: the second holds differences to the first."""
    directory = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    net = nn.Linear(64, 80)
    optimizer = torch.optim.AdamW(net.parameters())
    for step in (1, 2, 3):
        net(torch.ones(2, 64)).sum().backward()
        optimizer.step()
        checkpoint = pylomin.build_checkpoint(net, optimizer, epoch=0, step=step, loss=0.5)
        reference = directory / "step-00000001" if step == 2 else None
        options = {"quantize": "int8", "reference": reference} if step == 2 else {}
        pylomin.save_checkpoint(checkpoint, directory / f"step-{step:08d}", **options)
    return directory


@pytest.fixture
def first(series):
    return series / "step-00000001"


@pytest.fixture
def second(series):
    return series / "step-00000002"


def test_ls(run, series, first):
    found = json.loads(run("checkpoint", "ls", series, "--json").stdout)
    assert [(entry["step"], entry["epoch"], entry["problem"]) for entry in found] == [(n, 0, None) for n in (1, 2, 3)]
    assert [entry["reference"] for entry in found] == [None, "../step-00000001", None]
    lines = run("checkpoint", "ls", series).stdout.splitlines()
    assert lines[2].endswith("difference to ../step-00000001")
    assert len(run("checkpoint", "ls", first).stdout.splitlines()) == 2


def test_ls_names_what_is_torn(run, tmp_path):
    checkpoint = pylomin.build_checkpoint(nn.Linear(2, 2), step=7)
    pylomin.save_checkpoint(checkpoint, tmp_path / "best")
    (tmp_path / "step-00000001").mkdir()
    found = json.loads(run("checkpoint", "ls", tmp_path, "--json", code=1).stdout)
    assert [(entry["step"], bool(entry["problem"])) for entry in found] == [(7, False), (None, True)]


def test_ls_of_nothing(run, tmp_path):
    assert "No checkpoints" in run("checkpoint", "ls", tmp_path, code=1).stderr


def test_show(run, second):
    document = json.loads(run("checkpoint", "show", second, "--json").stdout)
    assert document["step"] == 2
    assert document["extra"] == {"loss": 0.5}
    assert document["parts"] == ["optimizer", "rng"]
    model, state = document["files"]
    assert model["tensors"] == 2
    assert model["layouts"]["int8 difference"] == 1
    assert 0 < model["rms_error"] < 0.01
    assert set(state["layouts"]) == {"exact"}
    text = run("checkpoint", "show", second).stdout
    assert "extra loss" in text
    assert "1 int8 difference" in text


def test_show_what_is_no_checkpoint(run, tmp_path):
    assert "checkpoint.json" in run("checkpoint", "show", tmp_path, code=1).stderr


def test_diff(run, series, first):
    third = series / "step-00000003"
    found = {
        entry["name"]: entry for entry in json.loads(run("checkpoint", "diff", first, third, "--json", code=1).stdout)
    }
    mine, theirs = (load_file(path / "model.safetensors")["weight"].double() for path in (first, third))
    assert found["weight"]["max"] == (theirs - mine).abs().max().item()
    assert found["weight"]["rms"] == pytest.approx(((theirs - mine).norm() / mine.norm()).item())
    assert found["step"]["difference"] == "1 became 3"
    assert "values" in run("checkpoint", "diff", first, third, code=1).stdout


def test_diff_of_equals(run, first):
    assert run("checkpoint", "diff", first, first).stdout == ""
    assert "none" in run("checkpoint", "diff", first, first, "--all").stdout


def test_diff_of_other_models(run, first, tmp_path):
    pylomin.save_checkpoint(pylomin.build_checkpoint(nn.Linear(4, 80, bias=False), step=1), tmp_path / "other")
    found = json.loads(run("checkpoint", "diff", first, tmp_path / "other", "--json", code=1).stdout)
    differences = {entry["name"]: entry["difference"] for entry in found}
    assert differences["weight"] == "float32 [80, 64] became float32 [80, 4]"
    assert differences["bias"] == "only in the first"


def test_export_of_differences(run, second, tmp_path):
    path = run("checkpoint", "export", second, tmp_path).stdout.strip()
    expected = pylomin.load_checkpoint(second).model
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].materialize()) for name in found)
    assert "exists" in run("checkpoint", "export", second, tmp_path, code=2).stderr
