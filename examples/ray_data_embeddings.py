"""Embed a dataset on many machines with Ray Data; each worker streams the model from one file, under a budget.

``python examples/ray_data_embeddings.py DIRECTORY --rows 1000000 --shard 5000 --address auto`` runs on the Ray cluster
that is there, whose machines all see DIRECTORY; without an address, Ray starts on this machine. Rows are embedded in
shards, each a Parquet file. Ray starts a worker anew that died. When all of it was killed, run it again: it goes on.
"""

from __future__ import annotations

import argparse
import time
import uuid
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import ray
import torch
from torch import nn
from transformers import BertConfig, BertModel

import pylomin

# A small encoder with random weights. The vocabulary is the 256 bytes, so no tokenizer is needed.
CONFIG = BertConfig(vocab_size=256, hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768)
LENGTH = 24  # tokens of a row


def embed(model: nn.Module, rows: range) -> torch.Tensor:
    """Means of the last hidden states, of shape (rows, hidden size). Here the texts are made; yours would be read."""
    texts = [f"Row {row} of many." for row in rows]
    tokens = torch.tensor([list(text.encode().ljust(LENGTH)[:LENGTH]) for text in texts])
    with torch.inference_mode():
        means: torch.Tensor = model(tokens).last_hidden_state.mean(1)
    return means


class Embedder:
    """A worker. All weights pass through its budget once for each shard; none has the model in memory."""

    def __init__(self, weights: Path, budget: str) -> None:
        model = pylomin.load(lambda: BertModel(CONFIG), weights, memory_budget=budget)
        self.model = pylomin.prefetch(model).eval()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Embed and write one shard; Ray only carries word of it."""
        start, stop, path = int(batch["start"][0]), int(batch["stop"][0]), Path(batch["path"][0])
        values = pyarrow.array(embed(self.model, range(start, stop)).flatten().numpy())
        vectors = pyarrow.FixedSizeListArray.from_arrays(values, CONFIG.hidden_size)
        scratch = path.with_name(f"{uuid.uuid4()}.partial")
        pyarrow.parquet.write_table(pyarrow.table({"row": range(start, stop), "embedding": vectors}), scratch)
        scratch.replace(path)  # so a shard that is there is whole
        return {"rows": [stop - start], "peak_bytes": [pylomin.stats(self.model).peak_bytes]}


def main() -> None:
    """Embed the shards that are missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="for the weights and the embeddings")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--shard", type=int, default=100, help="rows of one; the same when it is run again")
    parser.add_argument("--budget", default="4MiB", help="for weights in memory, of each worker")
    parser.add_argument("--workers", type=int, default=2, help="each takes one processor")
    parser.add_argument("--address", help="of a Ray cluster, or auto")
    arguments = parser.parse_args()
    directory, rows, size = arguments.directory.resolve(), arguments.rows, arguments.shard
    directory.mkdir(parents=True, exist_ok=True)
    weights = directory / "model.safetensors"
    if not weights.exists():
        torch.manual_seed(0)
        pylomin.save_store(BertModel(CONFIG).state_dict(), weights)

    ranges = [(start, min(start + size, rows)) for start in range(0, rows, size)]
    shards = {directory / f"rows-{start:010}-{stop:010}.parquet": (start, stop) for start, stop in ranges}
    if others := set(directory.glob("rows-*.parquet")) - shards.keys():
        parser.error(f"{min(others)} is of other --rows or another --shard; continue with those, or elsewhere")
    missing = [
        {"path": str(path), "start": start, "stop": stop} for path, (start, stop) in shards.items() if not path.exists()
    ]
    done, peak_bytes, began = rows - sum(shard["stop"] - shard["start"] for shard in missing), 0, time.perf_counter()
    print(f"{done:,} of {rows:,} rows were there", flush=True)
    if arguments.address:
        ray.init(arguments.address)
    else:  # 100 MiB for what Ray carries, which is little
        ray.init(num_cpus=arguments.workers, object_store_memory=100 << 20, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts rows, and those that were there
    embedded = ray.data.from_items(missing, override_num_blocks=max(1, len(missing))).map_batches(
        Embedder,
        fn_constructor_args=(weights, arguments.budget),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
    )
    for shard in embedded.iter_rows():
        done, peak_bytes = done + shard["rows"], max(peak_bytes, shard["peak_bytes"])
        print(f"{done:,} of {rows:,} rows after {time.perf_counter() - began:.0f} s", flush=True)
    ray.shutdown()
    for scratch in directory.glob("*.partial"):  # of workers that were killed
        scratch.unlink()
    print(f"weights in memory: at most {peak_bytes / 1e6:.2f} of {weights.stat().st_size / 1e6:.2f} MB a worker")


if __name__ == "__main__":
    main()
