"""Where does the time of a pass go, beside computing?

The BERT of ``bert``, in two ways. *mapped*: weights leave memory after each use, pages of the cached file are mapped.
*direct*: 300 MiB of weights stay, the others are read past the page cache ahead of their use. Stages are timed inside
of passes that take turns with the resident model's; timing itself adds a few microseconds to each call. *least* does
the same as *mapped* with two system calls for each module and nothing else: what the machine allows.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import BertConfig, BertModel

import pylomin
from benchmarks.checkpoints import random_checkpoint
from benchmarks.common import Spread, paired_ratios, read_rate
from benchmarks.disk import drop_caches
from benchmarks.suite import finish, parse, save
from examples.bert import SIZES, checkpoint, lazy, resident
from pylomin.io import syscalls
from pylomin.lazy.module import LazyModule, whole_weights
from pylomin.residency.hold import Hold
from pylomin.residency.loading import Room
from pylomin.residency.residency import Residency
from pylomin.store.safetensors import SafetensorsStore

NEEDED_BYTES = 2 << 30
BUDGET = "300MiB"
MADV_POPULATE_READ = 22  # Linux 5.14; the mmap module does not name it
CACHES_BYTES = 128 << 20  # 128 MiB; more than the caches of a processor hold
# Stage: what is called. Some are parts of others.
STAGES: dict[str, tuple[Any, str]] = {
    "bring weights in": (Hold, "__enter__"),
    "of that, load": (Room, "load"),
    "of that, faulting pages in": (syscalls, "populate"),
    "let weights go": (Hold, "__exit__"),
    "of that, dropping pages": (syscalls, "drop"),
    "rows of embeddings": (Residency, "load_runs"),
}
WAIT, READ = "of that, waiting for reads", "reads, in the background"
OF_MODEL = {
    "mapped": list(STAGES),
    "direct": ["bring weights in", WAIT, "let weights go", "rows of embeddings", READ],
}
ALONE, ALONE_COLD = "in and out, computing nothing", "the same, processor caches overwritten in between"


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


def least(config: BertConfig, directory: Path) -> nn.Module:
    """Weights in one mapping of the file; each module faults its pages in before it runs and lets them go afterwards.

    Without a ledger, a check of the file, errors, and rows of embeddings, which stay.
    """
    with init_empty_weights(include_buffers=False):
        model: nn.Module = BertModel(config)
    with open(checkpoint(directory), "rb") as file:
        pages = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    whole, weights, ranges = torch.frombuffer(pages, dtype=torch.uint8), {}, {}
    with contextlib.closing(SafetensorsStore(checkpoint(directory))) as store:
        for name, parameter in model.named_parameters():
            stored = store.location(name)
            values = whole[stored.extent.start : stored.extent.stop].view(stored.info.dtype)
            weights[name] = values.view(parameter.shape)
            start = stored.extent.start // mmap.PAGESIZE * mmap.PAGESIZE
            ranges[name] = start, stored.extent.stop - start
    model.load_state_dict(weights, assign=True)
    for prefix, module in model.named_modules():
        own = [ranges[f"{prefix}.{name}"] for name, _ in module.named_parameters(recurse=False)]
        if own and not isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(partial(_advise, pages, MADV_POPULATE_READ, own))
            module.register_forward_hook(partial(_advise, pages, mmap.MADV_DONTNEED, own))
    return model


def _advise(pages: mmap.mmap, advice: int, ranges: list[tuple[int, int]], *hook_args: Any) -> None:
    for start, nbytes in ranges:
        pages.madvise(advice, start, nbytes)


def seconds(model: nn.Module, tokens: torch.Tensor) -> float:
    """Of one pass."""
    start = time.perf_counter()
    model(tokens)
    return time.perf_counter() - start


def hold_all(model: nn.Module, between: Callable[[], Any] = lambda: None) -> tuple[float, int]:
    """Bring the weights of each module in and let them go, and compute nothing.

    Args:
        between: called before each of both; not timed.

    Returns:
        Seconds, and how many modules.
    """
    groups = [
        group for module in model.modules() if isinstance(module, LazyModule) and (group := whole_weights(module))
    ]
    seconds = 0.0
    for group in groups:
        hold = group[0].residency.hold(group, group)
        for step in (hold.__enter__, hold.__exit__):
            between()
            start = time.perf_counter()
            step()
            seconds += time.perf_counter() - start
    return seconds, len(groups)


def main() -> None:
    """Measure and write the result."""
    options = parse("stages", __doc__, rounds=10, limit_s=180)
    config, directory = SIZES[options.size], options.directory("bert")
    options.make_room("bert", NEEDED_BYTES)
    weights = random_checkpoint(
        lambda: BertModel(config), f"BertModel {config.to_json_string(use_diff=True)}", checkpoint(directory)
    )
    drop_caches([weights])  # how large the pages of a cached file are depends on how they came there
    read_rate(weights)
    tokens = torch.randint(config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(1))
    ms: dict[str, list[float]] = defaultdict(list)
    calls: dict[str, int] = {}
    with torch.inference_mode():
        models = {"mapped": lazy(config, directory).eval()}
        models["direct"] = pylomin.fit(lazy(config, directory).eval(), BUDGET, args=[tokens], reading_mode="direct")
        inside, floor = resident(config, directory).eval(), least(config, directory).eval()
        overwritten = torch.zeros(CACHES_BYTES, dtype=torch.uint8)
        for model in (inside, floor, *models.values()):
            model(tokens)
        for number in range(options.rounds):
            if number and time.perf_counter() > options.deadline:
                break
            ms["resident: a pass"].append(seconds(inside, tokens) * 1e3)
            ms["least: a pass"].append(seconds(floor, tokens) * 1e3)
            for name, model in models.items():
                before = pylomin.stats(model)
                with timed() as measured:
                    ms[f"{name}: a pass"].append(seconds(model, tokens) * 1e3)
                after = pylomin.stats(model)
                lasted = {stage: (sum(measured[stage]), len(measured[stage])) for stage in STAGES}
                lasted[WAIT] = (after.stall_s - before.stall_s, 0)
                lasted[READ] = (after.read_s - before.read_s, after.prefetched - before.prefetched)
                if name == "mapped":
                    lasted[ALONE] = hold_all(model)
                    lasted[ALONE_COLD] = hold_all(model, lambda: overwritten.add_(1))
                for stage in [*OF_MODEL[name], *(stage for stage in (ALONE, ALONE_COLD) if stage in lasted)]:
                    elapsed_s, calls[f"{name}: {stage}"] = lasted[stage]
                    ms[f"{name}: {stage}"].append(elapsed_s * 1e3)
    rows: list[dict[str, Any]] = []
    for name, values in ms.items():
        row: dict[str, Any] = {"variant": name, "ms_per_pass": asdict(Spread.of(values))}
        if calls.get(name):
            row |= {"calls": calls[name], "us_per_call": Spread.of(values).median / calls[name] * 1e3}
        rows.append(row)
    settings = {
        "model": f"BertModel, {config.num_hidden_layers} layers, hidden size {config.hidden_size}",
        "input": "batch 1 x 512 tokens",
        "file_state": "cached for mapped, past the page cache for direct",
        "rounds": len(ms["resident: a pass"]),
    }
    ratios = {
        f"{name} / resident": asdict(paired_ratios(ms["resident: a pass"], ms[f"{name}: a pass"]))
        for name in ("least", *models)
    }
    save(options, settings, {"rows": rows, "speed_ratios": ratios})
    finish(options, {})


if __name__ == "__main__":
    main()
