"""verify, convert and quantize."""

from __future__ import annotations

import json

import pytest
import torch

import pylomin
from tests.store.files import read_bytes

WEIGHTS = {"layer.weight": torch.linspace(-1, 1, 64 * 80).view(64, 80), "layer.bias": torch.ones(64)}


@pytest.fixture
def source(tmp_path):
    torch.save(WEIGHTS, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_convert_keeps_the_bits(run, source, tmp_path):
    target = tmp_path / "copy.safetensors"
    assert run("convert", source, target).stdout == f"{target}\n"
    store = pylomin.open_store(target)
    assert {name: read_bytes(store, name) for name in store} == {n: t.numpy().tobytes() for n, t in WEIGHTS.items()}
    store.close()
    assert "2 weights are as they were written, 0 differences" in run("verify", target).stdout


def test_convert_dtype_shards_and_order(run, source, tmp_path):
    order = tmp_path / "order.txt"
    order.write_text("layer.bias\n\nlayer.weight\n")
    out = tmp_path / "out"
    path = run("convert", source, out, "--dtype", "bf16", "--max-shard-size", "9KB", "--order", order).stdout.strip()
    assert path.endswith("model.safetensors.index.json")
    store = pylomin.open_store(path)
    assert {store.info(name).dtype for name in store} == {torch.bfloat16}
    assert store.describe("layer.bias") == str(out / "model-00001-of-00002.safetensors")
    store.close()


def test_convert_in_the_order_of_a_plan(run, source, tmp_path):
    run("plan", source, "--budget", "1MiB", "--save", tmp_path / "plan.json")
    run("convert", source, tmp_path / "w.safetensors", "--order", tmp_path / "plan.json")
    store = pylomin.open_store(tmp_path / "w.safetensors")
    assert list(store) == list(WEIGHTS)
    store.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "names no weights"), (b"\xff\xfe", "neither a plan nor"), (b"{}", "holds no plan"), (b"other\n", "'other'")],
)
def test_orders_that_are_none(run, source, tmp_path, content, message):
    (tmp_path / "order").write_bytes(content)
    assert message in run("convert", source, tmp_path / "w.safetensors", "--order", tmp_path / "order", code=2).stderr
    assert not (tmp_path / "w.safetensors").exists()


def test_nothing_is_overwritten_unasked(run, source, tmp_path):
    target = tmp_path / "w.safetensors"
    run("convert", source, target)
    assert "exists" in run("convert", source, target, "--dtype", "float16", code=2).stderr
    run("convert", source, target, "--dtype", "float16", "--overwrite")


def test_dtype_or_quantize(run, source, tmp_path):
    options = ("--dtype", "bf16", "--quantize", "int8")
    assert "give one of them" in run("convert", source, tmp_path / "w.safetensors", *options, code=2).stderr


def test_verify_finds_a_changed_byte(run, source, tmp_path):
    path = tmp_path / "w.safetensors"
    run("convert", source, path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    result = run("verify", path, code=1)
    assert "sha256" in result.stdout
    assert "1 differences" in result.stdout
    document = json.loads(run("verify", path, "--json", code=1).stdout)
    assert document["ok"] is False
    assert len(document["differences"]) == len(document["checked"]) == 1


def test_verify_without_digests(run, tmp_path):
    pylomin.save_store({"w": torch.ones(2)}, tmp_path, digests=False)
    result = run("verify", tmp_path)
    assert "1 without digest" in result.stdout
    assert "Nothing could be compared" in result.stderr


def test_quantize_reports_sizes_and_errors(run, source, tmp_path):
    path = tmp_path / "q.safetensors"
    document = json.loads(run("quantize", source, path, "--scheme", "int8", "--group-size", "16", "--json").stdout)
    lines = {line["name"]: line for line in document["weights"]}
    assert document["stored_bytes"] == 64 * 80 + 64 * 5 * 2 + 64 * 4
    report = pylomin.quantization_report(path)["layer.weight"]
    assert lines["layer.weight"]["rms_error"] == report.rms_error
    assert lines["layer.weight"]["max_error"] == report.max_error
    table = run("quantize", source, path, "--overwrite").stdout
    assert "20.2 KiB became" in table
    assert str(path) in table


def test_quantize_falls_back(run, source, tmp_path):
    options = ("--scheme", "int4", "--max-error", "0.01", "--filter", "weight$")
    table = run("quantize", source, tmp_path / "q.safetensors", *options).stdout
    assert "int4 has a relative RMS error" in table


def test_a_filter_that_is_no_expression(run, source, tmp_path):
    assert "no regular expression" in run("quantize", source, tmp_path / "q", "--filter", "(", code=2).stderr
