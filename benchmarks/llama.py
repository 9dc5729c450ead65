"""A Llama-shaped model, and the ways to run it that the decoding benchmarks compare."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import pylomin
from benchmarks.checkpoints import random_checkpoint
from benchmarks.gguf_file import gguf_file
from benchmarks.suite import Options, parse


def llama_config(words: int, width: int, hidden: int, layers: int, heads: int, positions: int) -> LlamaConfig:
    """A shape with a head of its own."""
    return LlamaConfig(
        vocab_size=words,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )


SIZES = {
    # 2.3 GB are streamed for each token: everything but the embedding, of which a token needs one row.
    "full": llama_config(32_000, 2048, 5632, 10, 16, 2048),
    "tiny": llama_config(2_000, 64, 176, 2, 2, 256),
}
NEEDED_BYTES = int(5.2 * (1 << 30))  # checkpoint and GGUF
CONTEXT = 128  # tokens, of llama.cpp's key-value cache


class Decoder(Protocol):
    """A model with the key-value cache of what it has seen."""

    @property
    def model(self) -> nn.Module | None:
        """None if it is not torch's."""

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        """Logits after the last of ``tokens``, of shape (vocabulary,)."""


class TorchDecoder:
    """A transformers model."""

    def __init__(self, model: nn.Module) -> None:
        self.model: nn.Module | None = model.eval()
        self._run = model
        self._cache: Any = None

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        output = self._run(torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        logits: torch.Tensor = output.logits[0, -1]
        return logits


class LlamaCppDecoder:
    """llama.cpp, through llama-cpp-python: weights memory-mapped, as it does by default.

    Args:
        batch: how many tokens of a prompt go through the model together.
    """

    model: nn.Module | None = None

    def __init__(self, path: Path, vocabulary: int, *, batch: int = CONTEXT) -> None:
        from llama_cpp import Llama

        threads = len(os.sched_getaffinity(0))
        self._llama = Llama(
            str(path), n_ctx=CONTEXT, n_batch=batch, n_threads=threads, n_threads_batch=threads, verbose=False
        )
        self._vocabulary = vocabulary

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        self._llama.eval(tokens)
        logits = numpy.ctypeslib.as_array(self._llama._ctx.get_logits(), shape=(self._vocabulary,))
        return torch.from_numpy(logits.copy())


def checkpoint(directory: Path) -> Path:
    """Where the weights are."""
    return directory / "model.safetensors"


def prepare(config: LlamaConfig, directory: Path) -> Path:
    """Write what the variants read: the checkpoint, with its config beside it, and the GGUF; returns the first."""
    recipe = f"LlamaForCausalLM {config.to_json_string(use_diff=True)}"
    weights = random_checkpoint(lambda: LlamaForCausalLM(config), recipe, checkpoint(directory))
    config.save_pretrained(directory)
    index_for_accelerate(weights, directory / "accelerate")
    gguf_file(config, weights, directory / "model.gguf")
    return weights


def index_for_accelerate(weights: Path, folder: Path, *, dtype: str = "float32") -> None:
    """The index that accelerate keeps for offloaded weights that are in a safetensors file already."""
    from safetensors import safe_open

    folder.mkdir(exist_ok=True)
    with safe_open(weights, "pt") as file:
        index = {
            name: {"safetensors_file": str(weights), "weight_name": name, "dtype": dtype}
            for name in file.keys()  # noqa: SIM118 # the file cannot be iterated over
        }
    (folder / "index.json").write_text(json.dumps(index))


def empty(config: LlamaConfig) -> nn.Module:
    """The model without weights."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model: nn.Module = LlamaForCausalLM(config)
    return model


def resident(config: LlamaConfig, directory: Path) -> Decoder:
    """All weights in ordinary memory."""
    from safetensors import safe_open

    model = empty(config)
    weights = {}
    for name in model.state_dict():
        # Opened for each weight, and copied: a mapped file would count as memory of this process.
        with safe_open(checkpoint(directory), "pt") as file:
            weights[name] = file.get_tensor(name).clone()
    model.load_state_dict(weights, assign=True)
    return TorchDecoder(model)


def mapped(config: LlamaConfig, directory: Path) -> Decoder:
    """Transformers' own loading, which maps the file: the system brings pages in and takes them away."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return TorchDecoder(model)


def accelerate(config: LlamaConfig, directory: Path) -> Decoder:
    """Accelerate's ``disk_offload``, from the safetensors file."""
    from accelerate import disk_offload

    model = empty(config)
    disk_offload(model, str(directory / "accelerate"), execution_device=torch.device("cpu"))
    return TorchDecoder(model)


def llama_cpp(config: LlamaConfig, directory: Path) -> Decoder:
    """llama.cpp with F32 weights."""
    return LlamaCppDecoder(directory / "model.gguf", config.vocab_size)


def offloaded(config: LlamaConfig, directory: Path, memory_budget: int | None) -> Decoder:
    """pylomin, with what fits into the budget in memory and the rest read ahead."""
    model = pylomin.load(lambda: LlamaForCausalLM(config), checkpoint(directory), memory_budget=memory_budget)
    return TorchDecoder(pylomin.prefetch(model))


PEERS: dict[str, Callable[[LlamaConfig, Path], Decoder]] = {
    "resident": resident,
    "transformers, memory-mapped": mapped,
    "accelerate disk_offload": accelerate,
    "llama.cpp F32": llama_cpp,
}


def run_benchmark(
    name: str,
    description: str | None,
    work: Callable[..., dict[str, Any]],
    measure: Callable[[Options, LlamaConfig, Path], None],
    *,
    rounds: int,
    limit_s: float,
) -> None:
    """The benchmark ``name``, or in a process of its own what one of its variants does."""
    options = parse(name, description, rounds=rounds, limit_s=limit_s)
    config, directory = SIZES[options.size], options.directory("llama")
    if options.worker:
        print(json.dumps(work(**options.worker, config=config, directory=directory)))
    else:
        measure(options, config, directory)
