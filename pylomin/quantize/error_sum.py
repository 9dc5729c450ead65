"""The error of a reconstruction, summed over chunks."""

from __future__ import annotations

import math

import torch

_SAFE = (1e-20, 1e30)  # a sum of squares in float32 to which no square mattered that was too small or too large


class ErrorSum:
    """Largest and root mean square error."""

    def __init__(self) -> None:
        self.max_error = 0.0
        """The largest absolute difference."""
        self._error_norm = 0.0
        self._norm = 0.0

    def add(self, values: torch.Tensor, decoded: torch.Tensor) -> bool:
        """Count a chunk, and overwrite ``decoded``. Returns False, and counts nothing, if not all is finite.

        Args:
            values: float32 or float64.
        """
        error = decoded.to(values.dtype).sub_(values)
        lowest, highest = error.aminmax()
        largest = max(-float(lowest), float(highest))
        if not math.isfinite(largest):
            return False
        self.max_error = max(self.max_error, largest)
        self._error_norm = math.hypot(self._error_norm, _norm(error))
        self._norm = math.hypot(self._norm, _norm(values))
        return True

    @property
    def rms_error(self) -> float:
        """Root mean square of the differences over that of the values."""
        if not self._error_norm:
            return 0.0
        return self._error_norm / self._norm if self._norm else math.inf


def _norm(values: torch.Tensor) -> float:
    flat = values.reshape(-1)
    squares = float(torch.dot(flat, flat))
    if _SAFE[0] < squares < _SAFE[1]:
        return math.sqrt(squares)
    largest = float(flat.abs().amax())
    if largest == 0:
        return 0.0
    flat = flat.double() / largest
    return largest * math.sqrt(float(torch.dot(flat, flat)))
