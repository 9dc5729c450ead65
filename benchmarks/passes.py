"""The inside of a measured process: what it does around a model's passes, and what it reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import pylomin
from benchmarks.disk import cached_share, disk_bandwidth, forget, speeds_together
from pylomin.measure import process_bytes


class Report:
    """Collects what one process has to say about one model; ``fields`` go to the parent as JSON.

    Args:
        cold: the file whose reads are measured cold: it is dropped from the page cache before every pass. None:
            nothing is read from the disk.
        piece_bytes: how much of it the model reads at one time.
    """

    def __init__(self, cold: Path | None = None, *, piece_bytes: int = 16 << 20) -> None:
        self._cold = cold
        self._piece_bytes = piece_bytes
        self.fields: dict[str, Any] = {
            "started_s": time.time(),
            "start_process_bytes": process_bytes(),
            "passes": [],
        }
        if cold is not None:
            self.fields["cached_share"] = cached_share(cold)
            self.fields["bandwidth_bytes_per_s"] = []

    def measure_disk(self, model: nn.Module | None) -> None:
        """Measure how fast the disk is now, read as the model reads; before the passes, and ``finish`` after them."""
        if self._cold is not None:
            bandwidth = disk_bandwidth(self._cold, _mode(model), self._piece_bytes)
            self.fields["bandwidth_bytes_per_s"].append(bandwidth)

    def measure_together(self, model: nn.Module | None) -> None:
        """Measure how fast the disk is while the processors compute, and they while it is read. After the passes."""
        if self._cold is not None:
            self.fields["together"] = speeds_together(self._cold, _mode(model), self._piece_bytes)

    def passes(self, run: Callable[[], Any], count: int, model: nn.Module | None = None) -> None:
        """Time ``count`` calls of ``run``, and what they read of the weights of ``model``, if those are offloaded."""
        for _ in range(count):
            if self._cold is not None:
                forget(self._cold)
            before = _bytes_read(model)
            start = time.perf_counter()
            run()
            elapsed_s = time.perf_counter() - start
            self.fields["passes"].append({"s": elapsed_s, "read_bytes": _bytes_read(model) - before})

    def paired_passes(self, run: Callable[[], Any], count: int, model: nn.Module | None = None) -> None:
        """As :meth:`passes`, with the disk measured before each of them, while its first weights are read ahead.

        So there is one in between that is not counted.
        """
        for _ in range(count):
            self.measure_disk(model)
            run()
            self.passes(run, 1, model)

    def finish(self, run: Callable[[], Any], model: nn.Module | None = None) -> dict[str, Any]:
        """The report. Measures one more pass of ``run``, slower for it, for the memory of tensors."""
        self.fields["finished_s"] = time.time()
        self.measure_disk(model)
        if model is not None:
            with pylomin.peak_memory(model) as peak:
                run()
            self.fields["peak_tensor_bytes"] = peak.tensor_bytes
            self.fields["peak_weight_bytes"] = peak.weight_bytes
            if stats := _stats(model):
                self.fields["ledger_peak_bytes"] = stats.peak_bytes
                self.fields["reading_mode"] = stats.reading_mode
                self.fields["stall_s"] = stats.stall_s
        return self.fields

    def compare(self, output: torch.Tensor, reference: Path, *, is_reference: bool = False) -> None:
        """Report the largest difference of ``output`` from the one kept in ``reference``, or keep it there."""
        from safetensors.torch import load_file, save_file

        if is_reference:
            save_file({"output": output.contiguous()}, reference)
        self.fields["difference"] = (output - load_file(reference)["output"]).abs().max().item()


def _mode(model: nn.Module | None) -> Literal["direct", "buffered"]:
    stats = _stats(model)
    return "buffered" if stats and stats.reading_mode == "buffered" else "direct"


def _stats(model: nn.Module | None) -> pylomin.Stats | None:
    try:
        return None if model is None else pylomin.stats(model)
    except pylomin.PassError:  # nothing of it is offloaded
        return None


def _bytes_read(model: nn.Module | None) -> int:
    stats = _stats(model)
    return 0 if stats is None else stats.bytes_read
