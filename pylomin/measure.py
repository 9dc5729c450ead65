"""How much memory a block of code takes, and what the weights of a model have been doing."""

from __future__ import annotations

import resource
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pylomin.errors import PassError
from pylomin.io.buffers import observe
from pylomin.lazy.distributed import local_of
from pylomin.lazy.offload import residencies_of
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.residency.residency import resident_bytes_of_all
from pylomin.residency.stats import Stats

SAMPLE_S = 0.005  # between looks at the resident set


def stats(model: nn.Module) -> Stats:
    """What happened to the offloaded weights of ``model`` since they were offloaded.

    Raises:
        PassError: nothing of the model is offloaded.
    """
    found = [residency.stats() for residency in residencies_of(model)]
    if not found:
        raise PassError("nothing of this model is offloaded, so there is nothing to report.")
    return sum(found[1:], found[0])


class PeakMemory:
    """The peaks of a block, in bytes; read them after it.

    Attributes:
        tensor_bytes: weights in memory plus every other tensor that torch operations made (hidden states) in the
            thread of the block. Scratch space inside a kernel does not count.
        weight_bytes: of that, weights: those of the given model that are in memory for good, and offloaded ones while
            they are resident.
        process_bytes: resident set of the process, as the system counts it.
        cuda_bytes: what torch's CUDA allocator handed out, on the current device; 0 without CUDA.
        samples: ``(seconds since the start, resident set)``, for a picture.
    """

    def __init__(self) -> None:
        self.tensor_bytes = 0
        self.weight_bytes = 0
        self.process_bytes = 0
        self.cuda_bytes = 0
        self.samples: list[tuple[float, int]] = []


@contextmanager
def peak_memory(model: nn.Module | None = None, *, tensors: bool = True) -> Iterator[PeakMemory]:
    """Measure the peak memory of the block.

    Args:
        model: count its parameters and buffers that are in memory already.
        tensors: False leaves ``tensor_bytes`` and ``weight_bytes`` at 0 and costs no time; otherwise every operation
            takes some microseconds more.

    >>> with peak_memory() as peak:
    ...     _ = torch.ones(1000) + 1
    >>> peak.tensor_bytes
    8000
    """
    peak = PeakMemory()
    sampler = _Sampler(peak)
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with sampler:
        if tensors:
            with _Tracker(peak) as tracker:
                if model is not None:
                    tracker.see_weights(model)
                yield peak
        else:
            yield peak
    if cuda:
        peak.cuda_bytes = torch.cuda.max_memory_allocated()


class _Tracker(TorchDispatchMode):
    """Counts the storages that operations make, from their birth to their death or the end of the block.

    The interpreter holds what a finalizer calls, so this may hold no tensor: it would never die.
    """

    def __init__(self, peak: PeakMemory) -> None:
        super().__init__()
        self._peak = peak
        self._lock = threading.RLock()  # finalizers run anywhere, also while it is held
        self._known: dict[int, weakref.finalize[..., torch.UntypedStorage]] = {}
        self._tensor_bytes = 0
        self._weight_bytes = 0

    def __enter__(self) -> _Tracker:
        weight_bytes = resident_bytes_of_all()  # before it observes: asking takes back what has died
        self._undo = observe(self._add_weight)
        self._add_weight(weight_bytes)
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self._undo()
        with self._lock:  # what is alive now stays alive without being watched
            known, self._known = self._known, {}
            for finalizer in known.values():
                finalizer.detach()

    def see_weights(self, model: nn.Module) -> None:
        """Count what of ``model`` is in memory already, apart from offloaded weights."""
        for tensor in map(local_of, (*model.parameters(), *model.buffers())):
            if _has_storage(tensor):
                self._see(tensor, is_weight=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        aliased = {_storage_id(leaf) for leaf in map(local_of, tree_leaves((args, kwargs))) if _has_storage(leaf)}
        for leaf in map(local_of, tree_leaves(result)):
            if _has_storage(leaf) and _storage_id(leaf) not in aliased:
                self._see(leaf, is_weight=False)
        return result

    def _see(self, tensor: torch.Tensor, *, is_weight: bool) -> None:
        storage = tensor.untyped_storage()
        with self._lock:
            if storage._cdata in self._known:
                return
            finalizer = weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes(), is_weight)
            finalizer.atexit = False
            self._known[storage._cdata] = finalizer
            self._count(storage.nbytes(), is_weight)

    def _gone(self, key: int, nbytes: int, is_weight: bool) -> None:
        with self._lock:
            if self._known.pop(key, None) is not None:
                self._count(-nbytes, is_weight)

    def _add_weight(self, delta_bytes: int) -> None:
        with self._lock:
            self._count(delta_bytes, True)

    def _count(self, delta_bytes: int, is_weight: bool) -> None:
        self._tensor_bytes += delta_bytes
        self._peak.tensor_bytes = max(self._peak.tensor_bytes, self._tensor_bytes)
        if is_weight:
            self._weight_bytes += delta_bytes
            self._peak.weight_bytes = max(self._peak.weight_bytes, self._weight_bytes)


def _has_storage(leaf: object) -> bool:
    return (
        isinstance(leaf, torch.Tensor)
        and not isinstance(leaf, OffloadedTensor)
        and leaf.layout is torch.strided
        and leaf.device.type != "meta"
    )


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _Sampler:
    """Watches the resident set from a thread; where the system keeps a high-water mark, that is used as well."""

    def __init__(self, peak: PeakMemory) -> None:
        self._peak = peak
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pylomin-peak-memory", daemon=True)

    def __enter__(self) -> None:
        self._has_mark = _reset_high_water_mark()
        self._started = time.perf_counter()
        self._sample()
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._done.set()
        self._thread.join()
        self._sample()
        if self._has_mark:
            self._peak.process_bytes = max(self._peak.process_bytes, _status_bytes("VmHWM"))

    def _run(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self._sample()

    def _sample(self) -> None:
        nbytes = process_bytes()
        self._peak.samples.append((time.perf_counter() - self._started, nbytes))
        self._peak.process_bytes = max(self._peak.process_bytes, nbytes)


def process_bytes() -> int:
    """Resident set of this process now; where the system does not tell (no /proc), its peak so far."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_high_water_mark() -> bool:
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as clear_refs:
            clear_refs.write("5")
    except OSError:
        return False
    return True


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    return 0
