"""Generate text from a model in a directory, under a memory budget.

``python examples/generate.py DIRECTORY "Once upon a time" --budget 2GiB`` streams the continuation,
then says how fast it came and how much memory the weights took. Without a directory it makes a tiny
model with random weights, whose text makes no sense.
"""

from __future__ import annotations

import argparse
import string
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, TextStreamer

import pylomin


@contextmanager
def tiny_model() -> Iterator[Path]:
    """A directory as a download would be; each printable character is a token."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.decoders import Fuse
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    printable = string.digits + string.ascii_letters + string.punctuation + " "
    characters = {character: index for index, character in enumerate(printable)}
    letters = Tokenizer(WordLevel(characters, unk_token="?"))
    letters.pre_tokenizer = Split(Regex("."), "isolated")
    letters.decoder = Fuse()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.3,  # random weights of the usual size repeat one token
        bos_token_id=None,
        eos_token_id=None,
    )
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(directory)
        yield Path(directory)


def main() -> None:
    """Load, generate and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="with config.json, weights and a tokenizer")
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--budget", help="for weights in memory, such as 2GiB; default: one module's at a time")
    parser.add_argument("--tokens", type=int, default=40, help="new tokens at most")
    parser.add_argument("--device", help="where to compute; default: the CPU")
    parser.add_argument("--dtype", help="of the model, such as bfloat16; default: as the config says")
    arguments = parser.parse_args()
    with nullcontext(arguments.directory) if arguments.directory else tiny_model() as directory:
        run(directory, arguments)


def run(directory: Path, arguments: Any) -> None:
    """Generate from the model in ``directory``."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = pylomin.from_pretrained(
        AutoModelForCausalLM,
        directory,
        device=arguments.device,
        dtype=arguments.dtype,
        memory_budget=arguments.budget,
    )
    model = pylomin.prefetch(model)
    prompt = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False).to(arguments.device or "cpu")
    start = time.perf_counter()
    with pylomin.peak_memory(model) as peak:
        output = model.generate(**prompt, max_new_tokens=arguments.tokens, streamer=TextStreamer(tokenizer))
    elapsed_s = time.perf_counter() - start
    new_tokens = output.shape[1] - prompt["input_ids"].shape[1]
    total_bytes = sum(parameter.nbytes for parameter in model.parameters())
    print(f"{new_tokens} tokens, {new_tokens / elapsed_s:.2f} per second")
    print(f"weights in memory: at most {peak.weight_bytes / 1e6:.1f} of {total_bytes / 1e6:.1f} MB")
    print(f"read from {directory}: {pylomin.stats(model).bytes_read / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
