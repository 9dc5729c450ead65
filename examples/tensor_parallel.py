"""A transformers model over several processes or machines, each of which reads its own shards of one checkpoint.

``torchrun --nproc-per-node 2 examples/tensor_parallel.py DIRECTORY`` runs on this machine, with nccl where there are
GPUs and gloo where there are none; for several machines give torchrun ``--nnodes`` and ``--rdzv-endpoint``. Without a
directory a tiny model with random weights is made.
"""

from __future__ import annotations

import argparse
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import pylomin


def tiny_model() -> str:
    """A directory as a download would be, made by the first process."""
    found: list[str] = [""]
    if dist.get_rank() == 0:
        found[0] = tempfile.mkdtemp()
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=4)
        AutoModelForCausalLM.from_config(config).save_pretrained(found[0])
    dist.broadcast_object_list(found, src=0)
    return found[0]


def main() -> None:
    """Load, run, and say what this process read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="with config.json and weights")
    parser.add_argument("--budget", help="for the weights of each process in memory, such as 2GiB")
    arguments = parser.parse_args()
    dist.init_process_group(timeout=timedelta(seconds=60))  # after which the others end, too, if one does not come
    directory = arguments.directory or tiny_model()
    model = pylomin.from_pretrained(
        AutoModelForCausalLM, directory, memory_budget=arguments.budget, tp_plan="auto", tp_size=dist.get_world_size()
    )
    model = pylomin.prefetch(model)
    tokens = torch.arange(16).unsqueeze(0)
    with torch.inference_mode():
        logits = model(input_ids=tokens).logits
    whole = sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())
    read = pylomin.stats(model).bytes_read
    print(f"rank {dist.get_rank()} read {read:,} of {whole:,} bytes; next token {int(logits[0, -1].argmax())}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
