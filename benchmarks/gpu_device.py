"""What the GPU benchmark asks of the device that it measures."""

from __future__ import annotations

from typing import Any

import torch


class Gpu:
    """The current CUDA device. Tests have another in its place, so that the benchmark runs without one."""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """Of torch's allocator, since :meth:`reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device)

    def now(self) -> Any:
        """A point in the current stream, with its time."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms_between(self, first: Any, last: Any) -> float:
        """Milliseconds; both points have been reached."""
        elapsed_ms: float = first.elapsed_time(last)
        return elapsed_ms


gpu = Gpu()
