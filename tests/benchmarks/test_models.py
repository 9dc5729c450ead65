"""What the benchmarks compute beside pylomin: the order of rows in a GGUF, the bytes that experts need, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pylomin
from benchmarks import big_linear, common, llama, lora, many_tensors, suite, tensor_parallel
from benchmarks.gguf_file import gguf_file, gguf_name, interleaved
from benchmarks.moe import SIZES, Needed, Qwen2MoeForCausalLM
from benchmarks.suite import make_room


def test_interleaved_rows_rotate_alike() -> None:
    """llama.cpp turns rows (0, 1) of a head together, transformers rows (0, half)."""
    heads, width = 2, 8
    weight = torch.randn(heads * width, 3)
    mixed = interleaved(weight, heads).view(heads, width, 3)
    halves = weight.view(heads, width, 3)
    for pair in range(width // 2):
        assert torch.equal(mixed[:, 2 * pair], halves[:, pair])
        assert torch.equal(mixed[:, 2 * pair + 1], halves[:, pair + width // 2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("model.layers.11.mlp.down_proj.weight", "blk.11.ffn_down.weight"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ("lm_head.weight", "output.weight"),
    ],
)
def test_gguf_names(name: str, expected: str) -> None:
    assert gguf_name(name) == expected


@pytest.mark.parametrize("is_quantized", [False, True])
def test_gguf_holds_the_checkpoint(is_quantized: bool, tmp_path: Path) -> None:
    config = llama.SIZES["tiny"]
    torch.manual_seed(0)
    weights = llama.LlamaForCausalLM(config).state_dict()
    path = pylomin.save_store(weights, tmp_path / "model.safetensors")
    gguf = gguf_file(config, path, tmp_path / "model.gguf", is_quantized=is_quantized)
    stored = load_file(pylomin.save_store(gguf, tmp_path / "read.safetensors"))
    assert stored.keys() == {gguf_name(name) for name in weights}
    for name, values in weights.items():
        if "q_proj" in name or "k_proj" in name:
            values = interleaved(values, config.num_attention_heads)
        difference = (stored[gguf_name(name)] - values).abs()
        # Rows of 176 are no whole blocks of 32, and norms are no matrices.
        if is_quantized and "down_proj" not in name and "norm" not in name:
            step = values.view(-1, 32).abs().amax(1) / 127
            allowed = step / 2 + 127 * step * 2**-11  # the nearest of 255 values, with a scale in float16
            assert (difference.view(-1, 32).amax(1) <= 1.01 * allowed).all()
            assert difference.any()
        else:
            assert not difference.any()


def test_needed_bytes_are_shared_weights_and_routed_experts() -> None:
    config = SIZES["tiny"]
    model = Qwen2MoeForCausalLM(config).eval()
    needed = Needed(model)
    with torch.inference_mode():
        model(torch.tensor([[1]]))
    sizes = {name: weight.numel() * 4 for name, weight in model.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    embedding = sizes["model.embed_tokens.weight"]
    expected = sum(sizes.values()) - experts - embedding
    expected += experts * config.num_experts_per_tok // config.num_experts + embedding // config.vocab_size
    assert needed.take() == expected
    assert needed.take() < expected, "a pass starts anew"


def test_shards_hold_the_model_and_are_kept(tmp_path: Path) -> None:
    index = many_tensors.sharded_checkpoint(120, 2, tmp_path / "shards")
    assert len(set(json.loads(index.read_text())["weight_map"].values())) == 3
    model = many_tensors.load(120, 2, index.parent)
    assert torch.equal(model[119].weight.detach().clone(), torch.full((2, 2), 0.5))  # type: ignore[index]
    written = index.stat().st_mtime_ns
    assert many_tensors.sharded_checkpoint(120, 2, index.parent).stat().st_mtime_ns == written


def test_least_recently_used_checkpoints_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "DIRECTORY", tmp_path)
    monkeypatch.setattr(suite, "DISK_BYTES", 250)
    for name in ("old", "new"):
        (make_room(tmp_path / "full" / name, 0) / "weights").write_bytes(bytes(100))
    make_room(tmp_path / "full" / "third", 100)
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == ["new", "third"]
    make_room(tmp_path / "full" / "new", 100)  # what it holds itself does not count twice
    assert (tmp_path / "full" / "new" / "weights").exists()


def test_worker_reports_within_its_budget(tmp_path: Path) -> None:
    """One measured process from inside, in small."""
    width, budget, weights = 256, 64 << 10, tmp_path / "model.safetensors"
    big_linear.random_checkpoint(
        lambda: torch.nn.Sequential(torch.nn.Linear(width, width, bias=False)), "test", weights
    )
    big_linear.work("resident", width, budget, weights)
    report = big_linear.work("pylomin", width, budget, weights)
    assert len(report["passes"]) == big_linear.PASSES
    assert all(one["read_bytes"] >= width * width * 4 - budget for one in report["passes"])
    assert len(report["bandwidth_bytes_per_s"]) == big_linear.PASSES + 1
    assert report["ledger_peak_bytes"] <= budget
    assert report["peak_weight_bytes"] <= budget
    assert report["difference"] < 1e-4


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft calls it
def test_fine_tuning_is_measured_within_its_budget(tmp_path: Path) -> None:
    config, budget = llama.SIZES["tiny"], lora.BUDGETS["tiny"]
    llama.prepare(config, tmp_path)
    lora.work("resident", budget, config, tmp_path)
    report = lora.work("pylomin", budget, config, tmp_path)
    assert len(report["passes"]) == lora.STEPS
    assert report["ledger_peak_bytes"] <= budget
    assert report["peak_weight_bytes"] <= budget
    assert report["difference"] < 1e-5


def test_ranks_are_compared_with_their_part_of_what_one_reads() -> None:
    def runs(*read_bytes: int) -> list[common.WorkerRun]:
        passes = [{"s": 2.0, "read_bytes": nbytes} for nbytes in read_bytes]
        return [common.WorkerRun({"passes": passes, "replicated_bytes": 100}, [])]

    row = tensor_parallel.read_of("two ranks", {"one rank": runs(1100, 1100), "two ranks": runs(600, 900)})
    assert row["rank_read_bytes"] == {"median": 750, "smallest": 600, "largest": 900}
    assert row["read_of_allowed"] == {"median": 1.25, "smallest": 1.0, "largest": 1.5}
    assert row["time_of_one_rank"]["median"] == 1
