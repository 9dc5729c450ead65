"""Fine-tune adapters (LoRA) on a model whose weights do not fit in memory.

``python examples/lora.py DIRECTORY --text book.txt --budget 2GiB --output adapter`` reads the base from DIRECTORY for
each forward, and again, last layer first, for each backward; only the adapters are trained, and saved. Without a
directory it makes a small model with random weights, of which an eighth fits into the budget, and trains on this file.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import pylomin
from pylomin.io.sizes import parse_bytes

LENGTH = 64  # tokens of a step


@contextmanager
def small_model() -> Iterator[Path]:
    """A directory as a download would be; each character is a token."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    characters = {chr(code): index for index, code in enumerate([10, *range(32, 127)])}
    letters = Tokenizer(WordLevel(characters, unk_token="?"))
    letters.pre_tokenizer = Split(Regex(r"[\s\S]"), "isolated")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(characters), hidden_size=256, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4
    )
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(directory)
        yield Path(directory)


def main() -> None:
    """Load, adapt, train, save and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="with config.json, weights and a tokenizer")
    parser.add_argument("--text", type=Path, default=Path(__file__), help="what to learn")
    parser.add_argument("--budget", default="2MiB", help="for weights of the base in memory")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rank", type=int, default=8, help="of the adapters")
    parser.add_argument("--output", type=Path, help="directory to save the adapters to")
    parser.add_argument("--device", help="where to compute; default: the CPU")
    arguments = parser.parse_args()
    with nullcontext(arguments.directory) if arguments.directory else small_model() as directory:
        train(directory, arguments)


def train(directory: Path, arguments: Any) -> None:
    """Train adapters on the model in ``directory``."""
    budget = parse_bytes(arguments.budget)
    base = pylomin.from_pretrained(
        AutoModelForCausalLM, directory, device=arguments.device, memory_budget=arguments.budget
    )
    base = pylomin.prefetch(base)
    base_bytes = sum(parameter.nbytes for parameter in base.parameters())
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=arguments.rank, target_modules="all-linear")).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)

    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokens = tokenizer(arguments.text.read_text(), return_tensors="pt").input_ids[0]
    start, first, last = time.perf_counter(), 0.0, 0.0
    for step in range(arguments.steps):
        begin = step * LENGTH % max(1, len(tokens) - LENGTH)
        batch = tokens[None, begin : begin + LENGTH].to(arguments.device or "cpu")
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item() if step == 0 else first), loss.item()
        if step % 10 == 0 or step == arguments.steps - 1:
            print(f"step {step + 1}: loss {last:.3f}", flush=True)
    elapsed_s = time.perf_counter() - start

    stats = pylomin.stats(base)
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    print(f"loss {first:.3f} -> {last:.3f} in {elapsed_s:.1f} s; adapters: {trained_bytes / 1e6:.2f} MB")
    print(f"base in memory: at most {stats.peak_bytes / 1e6:.2f} of {base_bytes / 1e6:.2f} MB")
    print(f"read for each step: {stats.bytes_read / arguments.steps / base_bytes:.2f} times the base")
    print(f"within the budget: {stats.peak_bytes <= budget}")
    if arguments.output is not None:
        model.save_pretrained(arguments.output)
        print(f"adapters saved to {arguments.output}")


if __name__ == "__main__":
    main()
