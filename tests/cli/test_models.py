"""plan, bench, generate and export-onnx, on a directory that transformers saved."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from safetensors.torch import save_file

import pylomin
from pylomin.cli.models import example_inputs
from pylomin.cli.weights_plan import groups_of

BUDGET = 256 << 10  # 256 KiB, about half of the weights


def test_plan_of_a_model(run, llama, tmp_path):
    result = run(
        "plan", llama, "--budget", BUDGET, "--save", tmp_path / "p.json", "--picture", tmp_path / "p.png", "--groups"
    )
    plan = pylomin.Plan.load(tmp_path / "p.json")
    assert plan.memory_budget == BUDGET
    assert plan.peak_bytes is not None
    assert plan.peak_bytes <= BUDGET
    assert plan.elapsed_s is not None
    assert "256.0 KiB" in result.stdout
    assert "model.layers.2.mlp.down_proj.weight" in result.stdout
    assert "passes per second" in result.stdout
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    # It is a plan for that model.
    from transformers import AutoModelForCausalLM

    model = pylomin.from_pretrained(AutoModelForCausalLM, llama, memory_budget=BUDGET)
    pylomin.prefetch(model, plan=tmp_path / "p.json")


def test_plan_of_weights(run, tmp_path):
    weights = {
        f"layers.{n}.{part}": torch.ones(256, 64 if part == "weight" else 1)
        for n in range(8)
        for part in ("weight", "bias")
    }
    save_file(weights, tmp_path / "w.safetensors")
    text = run("plan", tmp_path / "w.safetensors", "--budget", "200KiB", "--save", tmp_path / "p.json").stdout
    plan = pylomin.Plan.load(tmp_path / "p.json")
    assert len(plan.groups) == 8
    assert all(len(group.weights) == 2 for group in plan.groups)
    assert plan.resident_bytes + plan.window_bytes == 200 << 10
    assert plan.peak_bytes is not None
    assert plan.peak_bytes <= 200 << 10
    assert "reading alone" in text


def test_groups_are_neighbours_with_a_name_in_common():
    names = ["a.w", "a.b", "c", "d", "a.w2", "e.f.w", "e.g.w"]
    store = pylomin.open_store({name: torch.ones(1) for name in names})
    assert [group for group, _ in groups_of(store)] == [
        ("a.w", "a.b"),
        ("c",),
        ("d",),
        ("a.w2",),
        ("e.f.w",),
        ("e.g.w",),
    ]


def test_budgets_that_are_too_small(run, tmp_path):
    save_file({"w": torch.ones(1000)}, tmp_path / "w.safetensors")
    assert "Use at least 4000 bytes" in run("plan", tmp_path / "w.safetensors", "--budget", 3999, code=1).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "need --budget"),
        (("--budget", "1MiB", "--dtype", "bf16"), "--dtype is for models"),
        (("--budget", "x"), "'x'"),
    ],
)
def test_mistakes_with_weights_alone(run, tmp_path, options, message):
    save_file({"w": torch.ones(10)}, tmp_path / "w.safetensors")
    assert message in run("plan", tmp_path / "w.safetensors", *options, code=2).stderr


def test_pictures_need_a_format_and_matplotlib(run, tmp_path, monkeypatch):
    save_file({"w": torch.ones(10)}, tmp_path / "w.safetensors")
    options = ("plan", tmp_path / "w.safetensors", "--budget", "1MiB", "--picture")
    assert "cannot draw" in run(*options, tmp_path / "p.nothing", code=2).stderr
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pylomin[plot]" in run(*options, tmp_path / "p.png", code=2).stderr


def test_bench(run, llama):
    options = ("--budget", BUDGET, "--budget", 100, "--passes", 1)
    document = json.loads(run("bench", llama, *options, "--json").stdout)
    ways = {(way["mode"], way["state"]) for way in document["reading"]}
    assert len(ways) == 5
    assert all((way["bytes_per_s"] is None) == bool(way["problem"]) for way in document["reading"])
    refused, ran = document["runs"]
    assert refused["seconds"] is None
    assert "100" in refused["problem"]
    assert ran["seconds"] > 0
    assert 0 < ran["peak_bytes"] <= BUDGET
    assert 0 < ran["read_bytes"] < document["weight_bytes"]


def test_bench_of_weights_alone(run, tmp_path):
    save_file({"w": torch.ones(1 << 16)}, tmp_path / "w.safetensors")
    result = run("bench", tmp_path / "w.safetensors", "--budget", "1MiB")
    assert "page cache" in result.stdout
    assert "nothing is run" in result.stderr


def test_generate_as_transformers_does(run, llama):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama)
    inputs = tokenizer("w5 w9", return_tensors="pt", return_token_type_ids=False)
    tokens = AutoModelForCausalLM.from_pretrained(llama).generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    result = run("generate", llama, "--prompt", "w5 w9", "--budget", BUDGET, "--max-new-tokens", 6)
    assert result.stdout == f"{expected}\n"
    assert re.search(r"6 tokens, \S+ tokens/s, first token after", result.stderr)
    assert "budget 256.0 KiB" in result.stderr


def test_generate_by_chance(run, llama):
    options = ("generate", llama, "-p", "w5", "-n", 8, "--temperature", 2, "--seed")
    texts = [run(*options, seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_needs_a_tokenizer_a_prompt_and_a_model(run, llama, tmp_path):
    assert "no tokens" in run("generate", llama, "-p", "", code=2).stderr
    (tmp_path / "config.json").write_bytes((llama / "config.json").read_bytes())
    assert "no tokenizer" in run("generate", tmp_path, "-p", "w5", code=2).stderr


def test_without_transformers(run, llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pylomin[transformers]" in run("generate", llama, "-p", "w5", code=2).stderr


def test_export_onnx(run, llama, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    from transformers import AutoModelForCausalLM

    for path in llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run("export-onnx", tmp_path, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx.data").exists()
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    found = torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(found, AutoModelForCausalLM.from_pretrained(llama)(ids).logits, atol=1e-5, rtol=1e-4)
    assert "exists" in run("export-onnx", tmp_path, tmp_path / "model.onnx", code=2).stderr


def test_example_inputs():
    from transformers import T5Config, T5Model, ViTConfig, ViTModel, WhisperConfig, WhisperModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vit = ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8))
    t5 = T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16))
    for model in (vit, t5):
        inputs = example_inputs(model, 3)
        assert inputs is not None
        model(**inputs)
    whisper = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    config = WhisperConfig(
        **whisper,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        vocab_size=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    assert example_inputs(WhisperModel(config), 3) is None
