"""Where does the time of a pass go that a cached file takes, beside computing?

The BERT of ``bert``, weights leaving memory after each use, pages of the file mapped. Stages are timed inside of passes
that take turns with the resident model's; timing itself adds a few microseconds to each call.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import BertModel

from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import Spread, read_rate
from benchmarks.suite import finish, parse, save
from examples.bert import SIZES, checkpoint, lazy, resident
from pylomin.io import syscalls
from pylomin.lazy.module import LazyModule, whole_weights
from pylomin.residency.hold import Hold
from pylomin.residency.loading import Room
from pylomin.residency.residency import Residency

NEEDED_BYTES = 2 << 30
# Stage: what is called. Later ones are parts of earlier ones.
STAGES: dict[str, tuple[Any, str]] = {
    "bring weights in": (Hold, "__enter__"),
    "of that, load": (Room, "load"),
    "of that, mapping pages": (syscalls, "map_file"),
    "of that, faulting pages in": (syscalls, "populate"),
    "let weights go": (Hold, "__exit__"),
    "rows of embeddings": (Residency, "load_runs"),
}
ALONE = "in and out, computing nothing"


@contextlib.contextmanager
def timed() -> Iterator[Mapping[str, list[float]]]:
    """Seconds of each call of each stage."""
    calls: dict[str, list[float]] = defaultdict(list)
    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in STAGES.items()}

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                calls[name].append(time.perf_counter() - start)

        return call

    for name, (owner, attribute) in STAGES.items():
        setattr(owner, attribute, watch(name, originals[name]))
    try:
        yield calls
    finally:
        for name, (owner, attribute) in STAGES.items():
            setattr(owner, attribute, originals[name])


def seconds(model: nn.Module, tokens: torch.Tensor) -> float:
    """Of one pass."""
    start = time.perf_counter()
    model(tokens)
    return time.perf_counter() - start


def hold_all(model: nn.Module) -> int:
    """Bring the weights of each module in and let them go, and compute nothing. Returns how many modules."""
    groups = [group for module in model.modules() if isinstance(module, LazyModule) if (group := whole_weights(module))]
    for group in groups:
        with group[0].residency.hold(group, group):
            pass
    return len(groups)


def main() -> None:
    """Measure and write the result."""
    options = parse("stages", __doc__, rounds=12, limit_s=120)
    config, directory = SIZES[options.size], options.directory("bert")
    options.make_room("bert", NEEDED_BYTES)
    weights = random_checkpoint(
        lambda: BertModel(config), f"BertModel {config.to_json_string(use_diff=True)}", checkpoint(directory)
    )
    read_rate(weights)
    tokens = torch.randint(config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(1))
    models = {"resident": resident(config, directory).eval(), "lazy": lazy(config, directory).eval()}
    passes: dict[str, list[float]] = {name: [] for name in models}
    stages: dict[str, list[float]] = {name: [] for name in STAGES}
    per_pass: dict[str, int] = {}
    stages[ALONE] = []
    with torch.inference_mode():
        for model in models.values():
            model(tokens)
        for _ in range(options.rounds):
            passes["resident"].append(seconds(models["resident"], tokens))
            with timed() as calls:
                passes["lazy"].append(seconds(models["lazy"], tokens))
            start = time.perf_counter()
            per_pass[ALONE] = hold_all(models["lazy"])
            stages[ALONE].append(time.perf_counter() - start)
            for name in STAGES:
                stages[name].append(sum(calls[name]))
                per_pass[name] = len(calls[name])
    rows: list[dict[str, Any]] = [
        {"variant": f"a pass, {name}", "ms_per_pass": asdict(Spread.of([s * 1e3 for s in of_model]))}
        for name, of_model in passes.items()
    ]
    rows += [
        {
            "variant": name,
            "ms_per_pass": asdict(Spread.of([s * 1e3 for s in of_stage])),
            "calls": per_pass[name],
            "us_per_call": Spread.of(of_stage).median / max(1, per_pass[name]) * 1e6,
        }
        for name, of_stage in stages.items()
    ]
    settings = {
        "model": f"BertModel, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
        "input": "batch 1 x 512 tokens",
        "file_state": "cached",
        "rounds": options.rounds,
    }
    save(options, settings, {"rows": rows})
    finish(options, {})


if __name__ == "__main__":
    main()
