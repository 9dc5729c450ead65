"""What does a rewritten module cost when nothing has to be read?

128 layers ``Linear(64, 64)`` in a row, so small that the time goes into calling modules. The plain
model takes turns with one whose weights are offloaded but all resident under its memory budget.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import pylomin
from benchmarks.common import ROOT, Spread, time_call, write_result

LAYERS = 128
WIDTH = 64
PASSES_PER_ROUND = 20


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))).eval()
    lazy = pylomin.lazy_loading(copy.deepcopy(plain), memory_budget="1GiB")
    batch = torch.randn(1, WIDTH)

    plain_s, lazy_s = [], []
    with torch.inference_mode():
        assert torch.equal(plain(batch), lazy(batch))
        for _ in range(arguments.rounds):
            # The quickest pass of a round: interruptions only ever add time.
            plain_s.append(min(time_call(lambda: plain(batch), PASSES_PER_ROUND)))
            lazy_s.append(min(time_call(lambda: lazy(batch), PASSES_PER_ROUND)))
    added_us = [(b - a) / LAYERS * 1e6 for a, b in zip(plain_s, lazy_s, strict=True)]

    path = arguments.output / "module_overhead.json"
    settings = {
        "layers": LAYERS,
        "width": WIDTH,
        "rounds": arguments.rounds,
        "passes_per_round": PASSES_PER_ROUND,
        "threads": 1,
    }
    results = {
        "plain_us_per_call": asdict(Spread.of([time / LAYERS * 1e6 for time in plain_s])),
        "added_us_per_call": asdict(Spread.of(added_us)),
    }
    write_result(path, settings, results)
    added = Spread.of(added_us)
    print(
        f"A lazy module call adds {added.median:.2f} µs (from {added.smallest:.2f} to "
        f"{added.largest:.2f}) to {Spread.of(plain_s).median / LAYERS * 1e6:.2f} µs."
    )
    print(f"Written: {path}")


if __name__ == "__main__":
    main()
