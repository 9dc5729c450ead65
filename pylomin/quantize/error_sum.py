"""The error of a reconstruction, summed over chunks."""

from __future__ import annotations

import math

import torch

_SAFE = (1e-12, 1e12)  # magnitudes whose squares, and sums of many of them, float32 holds


class ErrorSum:
    """Largest and root mean square error."""

    def __init__(self) -> None:
        self.max_error = 0.0
        """The largest absolute difference."""
        self._error_norm = 0.0
        self._norm = 0.0

    def add(self, values: torch.Tensor, decoded: torch.Tensor) -> None:
        """Count a chunk; ``values`` is float32 or float64."""
        error = decoded.to(values.dtype).sub_(values)
        largest = float(error.abs().amax())
        self.max_error = max(self.max_error, largest)
        self._error_norm = math.hypot(self._error_norm, _norm(error, largest))
        self._norm = math.hypot(self._norm, _norm(values, float(values.abs().amax())))

    @property
    def rms_error(self) -> float:
        """Root mean square of the differences over that of the values."""
        if not self._error_norm:
            return 0.0
        return self._error_norm / self._norm if self._norm else math.inf


def _norm(values: torch.Tensor, largest: float) -> float:
    flat = values.reshape(-1)
    if largest == 0 or _SAFE[0] < largest < _SAFE[1]:
        return math.sqrt(float(torch.dot(flat, flat)))
    flat = flat.double() / largest
    return largest * math.sqrt(float(torch.dot(flat, flat)))
