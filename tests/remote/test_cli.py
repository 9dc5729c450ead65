from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save
from typer.testing import CliRunner

from pylomin.cli.app import app

from .test_http import several_blocks


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, prog_name="pylomin")
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result.stdout + result.stderr


@pytest.fixture
def url(server) -> str:
    server.put("m.safetensors", save(several_blocks()))
    return f"{server.url.replace('//', '//user:hunter2@')}/m.safetensors?token=s3cr3t"


def test_info(server, url):
    shown = run("info", url)
    assert "layers.5.weight" in shown
    assert "m.safetensors @ " in shown
    assert "in 1 file of 3.4 MiB" in shown
    found = json.loads(run("info", url, "--json"))
    assert found["source"] == f"{server.url}/m.safetensors"
    assert found["files"] == [{"path": f"{server.url}/m.safetensors", "size_bytes": len(save(several_blocks()))}]
    assert [line["name"] for line in found["weights"]] == sorted(several_blocks())
    for text in (shown, json.dumps(found)):
        assert "hunter2" not in text
        assert "s3cr3t" not in text
    assert len(server.asked) == 2, "the header alone, each time"


def test_convert_and_verify(server, url, tmp_path):
    run("convert", url, tmp_path / "copy.safetensors")
    copy = load_file(tmp_path / "copy.safetensors")
    assert all(torch.equal(copy[name], tensor) for name, tensor in several_blocks().items())
    server.put("copy.safetensors", (tmp_path / "copy.safetensors").read_bytes())
    assert "6 weights are as they were written" in run("verify", f"{server.url}/copy.safetensors")


def test_nothing_there(server, tmp_path):
    assert "does not exist: status 404" in run("info", f"{server.url}/none.safetensors", code=1)
    assert "does not exist" in run("info", tmp_path / "none", code=2)
