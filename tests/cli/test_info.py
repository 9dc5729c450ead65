from __future__ import annotations

import json

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pylomin
from pylomin.cli.layout import lines_of
from tests.store.files import write_offload_folder, write_shards

WEIGHTS = {"layer.weight": torch.arange(12.0).view(3, 4), "layer.bias": torch.ones(3, dtype=torch.float64)}


def write_gguf(path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for name, tensor in WEIGHTS.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(kind, directory):
    arrays = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    path = directory / kind
    if kind == "model.safetensors":
        save_file(WEIGHTS, path)
    elif kind in ("model.pt", "old.bin"):
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=kind == "model.pt")
    elif kind in ("arrays.npz", "small.npz"):
        (numpy.savez if kind == "arrays.npz" else numpy.savez_compressed)(path, **arrays)
    elif kind == "arrays":
        path.mkdir()
        for name, array in arrays.items():
            numpy.save(path / name, array)
    elif kind == "model.gguf":
        write_gguf(path)
    elif kind == "folder":
        path.mkdir()
        write_offload_folder(path, WEIGHTS)
    else:
        path.mkdir()
        write_shards(
            path,
            {
                "a.safetensors": {"layer.weight": WEIGHTS["layer.weight"]},
                "b.safetensors": {"layer.bias": WEIGHTS["layer.bias"]},
            },
        )
    return path


KINDS = [
    "model.safetensors",
    "model.pt",
    "old.bin",
    "arrays.npz",
    "small.npz",
    "arrays",
    "model.gguf",
    "folder",
    "shards",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format(run, tmp_path, kind):
    path = write(kind, tmp_path)
    document = json.loads(run("info", path, "--json").stdout)
    found = {line["name"]: (line["dtype"], line["shape"], line["size_bytes"]) for line in document["weights"]}
    assert found == {"layer.weight": ("float32", [3, 4], 48), "layer.bias": ("float64", [3], 24)}
    assert document["size_bytes"] == 72
    assert all(line["shares_with"] is None for line in document["weights"])
    layout = "deflated" if kind == "small.npz" else "contiguous"
    assert {line["layout"] for line in document["weights"]} == {layout}
    table = run("info", path).stdout
    assert "layer.weight" in table
    assert "3 × 4" in table
    assert "2 weights, 72 B (float32 48 B, float64 24 B)" in table


def test_offsets_lead_to_the_bytes(run, tmp_path):
    path = write("model.safetensors", tmp_path)
    for line in json.loads(run("info", path, "--json").stdout)["weights"]:
        raw = path.read_bytes()[line["start"] : line["start"] + line["stored_bytes"]]
        assert raw == WEIGHTS[line["name"]].numpy().tobytes()


def test_shared_and_strided(run, tmp_path):
    base = torch.arange(16.0).view(4, 4)
    torch.save({"base": base, "rows": base[1:], "turned": base.t(), "own": torch.ones(4)}, tmp_path / "w.pt")
    lines = {line["name"]: line for line in json.loads(run("info", tmp_path / "w.pt", "--json").stdout)["weights"]}
    assert {name: line["shares_with"] for name, line in lines.items()} == {
        "base": None,
        "rows": "base",
        "turned": "base",
        "own": None,
    }
    assert lines["turned"]["layout"] == "strided"
    assert "shares bytes with base" in run("info", tmp_path / "w.pt").stdout


def test_ties(run, tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    path = pylomin.save_model(net, tmp_path)
    assert json.loads(run("info", path, "--json").stdout)["ties"] == {"1.weight": "0.weight"}
    assert "1.weight is tied to 0.weight" in run("info", path).stdout


def test_quantised(run, tmp_path):
    path = pylomin.save_store({"w": torch.randn(64, 64), "b": torch.ones(4)}, tmp_path, quantize="int4")
    lines = {line["name"]: line for line in json.loads(run("info", path, "--json").stdout)["weights"]}
    assert lines["w"]["layout"] == "int4"
    assert lines["w"]["stored_bytes"] == 64 * 32 + 64 * 2
    assert 0 < lines["w"]["rms_error"] < 0.2
    assert lines["b"]["layout"] == "contiguous"
    assert lines["b"]["rms_error"] is None
    assert "int4, 2.1 KiB stored" in run("info", path).stdout


def test_blocks_of_gguf(run, tmp_path):
    gguf = pytest.importorskip("gguf")
    from gguf.quants import quantize

    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor(
        "w",
        quantize(numpy.ones((2, 32), numpy.float32), gguf.GGMLQuantizationType.Q8_0),
        raw_dtype=gguf.GGMLQuantizationType.Q8_0,
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (line,) = json.loads(run("info", tmp_path / "q.gguf", "--json").stdout)["weights"]
    assert (line["layout"], line["shape"], line["stored_bytes"]) == ("blocks", [2, 32], 68)


def test_an_empty_file(run, tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    assert "no weights in 0 files" in run("info", tmp_path).stdout


def test_weights_without_elements_share_nothing(tmp_path):
    save_file({"a": torch.ones(0), "b": torch.ones(2), "c": torch.ones(0)}, tmp_path / "model.safetensors")
    store = pylomin.open_store(tmp_path)
    assert [line.shares_with for line in lines_of(store)] == [None] * 3
    store.close()
