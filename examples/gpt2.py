"""Generate text from a GPT-2 whose weights stay on disk: ``python examples/gpt2.py``.

The weights are random, so the text makes no sense; that it equals the text of the same model in
memory is the point. A checkpoint of yours goes where ``model.safetensors`` is.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_model
from transformers import GPT2Config, GPT2LMHeadModel

import pylomin

PROMPT = b"Memory is "


def generate(model: GPT2LMHeadModel, prompt: bytes, new_tokens: int) -> list[int]:
    """Greedy continuation of ``prompt``, one token per byte."""
    tokens = torch.tensor([list(prompt)])
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return list(output[0].tolist())


def main() -> None:
    """Save a small random model, load it without ever holding it in memory, and generate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--budget", default="8MiB", help="for resident weights")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    # The vocabulary is the 256 bytes, so no tokenizer is needed.
    config = GPT2Config(
        vocab_size=256,
        n_positions=256,
        n_embd=384,
        n_layer=6,
        n_head=6,
        initializer_range=0.2,  # random weights of the usual size repeat one token
        bos_token_id=None,
        eos_token_id=None,
    )
    in_memory = GPT2LMHeadModel(config).eval()
    expected = generate(in_memory, PROMPT, arguments.tokens)

    with tempfile.TemporaryDirectory() as directory:
        checkpoint = Path(directory) / "model.safetensors"
        save_model(in_memory, str(checkpoint))
        del in_memory
        model = pylomin.load(lambda: GPT2LMHeadModel(config), checkpoint, memory_budget=arguments.budget)
        model = pylomin.prefetch(model).eval()
        with pylomin.peak_memory(model) as peak:
            tokens = generate(model, PROMPT, arguments.tokens)
    print("prompt      ", PROMPT)
    print("continuation", tokens[len(PROMPT) :])
    print("as in memory", tokens == expected)
    print(f"peak weight memory {peak.weight_bytes / (1 << 20):.1f} MiB")


if __name__ == "__main__":
    main()
