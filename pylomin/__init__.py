"""Run PyTorch models whose weights do not fit in memory.

``model = pylomin.lazy_loading(model)`` keeps the weights of any ``nn.Module`` on disk but while they are used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pylomin.errors import (
    BudgetError,
    CheckpointError,
    ExportError,
    MissingPackageError,
    OffloadedWriteError,
    OutputExistsError,
    PassError,
    PlanError,
    PylominError,
    ScratchError,
    StoreChangedError,
    StoreFormatError,
    StoreReadError,
    StoreWriteError,
    WeightMismatchError,
    WeightNotFoundError,
)

if TYPE_CHECKING:
    from pylomin.checkpoint.checkpoint import Checkpoint, build_checkpoint, restore_checkpoint
    from pylomin.checkpoint.directory import load_checkpoint, save_checkpoint
    from pylomin.checkpoint.lightning import lightning_callback
    from pylomin.checkpoint.series import checkpoints, find_checkpoints
    from pylomin.checkpoint.trainer import trainer_callback
    from pylomin.export import export_onnx
    from pylomin.io.modes import Mode
    from pylomin.loading import load
    from pylomin.measure import PeakMemory, peak_memory, stats
    from pylomin.passes.chunked_embedding import chunked_embedding
    from pylomin.passes.chunked_linear import chunked_linear
    from pylomin.passes.fit import fit
    from pylomin.passes.lazy_loading import lazy_loading
    from pylomin.passes.lockstep import lockstep
    from pylomin.passes.memory_budget import set_memory_budget
    from pylomin.passes.planning import plan_of
    from pylomin.passes.prefetch import prefetch
    from pylomin.passes.quantize_inputs import quantize_inputs
    from pylomin.passes.restore import restore
    from pylomin.pretrained.loading import from_pretrained
    from pylomin.residency.device_errors import DeviceMemoryError
    from pylomin.residency.plan import Plan
    from pylomin.residency.stats import Stats
    from pylomin.save import save_model, save_store
    from pylomin.store.open import open_store
    from pylomin.store.quantization_report import quantization_report
    from pylomin.store.sharded_loader import ShardedWeightsLoader
    from pylomin.store.verify import VerifyReport, verify

__version__ = "0.1.0"

# Imported when they are first used: the command line answers, and completes, without waiting for torch. No module
# of the package may have the name of one of them, for importing the module would put it in the place of the name.
_LAZY = {
    "Checkpoint": "pylomin.checkpoint.checkpoint",
    "DeviceMemoryError": "pylomin.residency.device_errors",
    "Mode": "pylomin.io.modes",
    "PeakMemory": "pylomin.measure",
    "Plan": "pylomin.residency.plan",
    "ShardedWeightsLoader": "pylomin.store.sharded_loader",
    "Stats": "pylomin.residency.stats",
    "VerifyReport": "pylomin.store.verify",
    "build_checkpoint": "pylomin.checkpoint.checkpoint",
    "checkpoints": "pylomin.checkpoint.series",
    "chunked_embedding": "pylomin.passes.chunked_embedding",
    "chunked_linear": "pylomin.passes.chunked_linear",
    "export_onnx": "pylomin.export",
    "find_checkpoints": "pylomin.checkpoint.series",
    "fit": "pylomin.passes.fit",
    "from_pretrained": "pylomin.pretrained.loading",
    "lazy_loading": "pylomin.passes.lazy_loading",
    "lightning_callback": "pylomin.checkpoint.lightning",
    "load": "pylomin.loading",
    "load_checkpoint": "pylomin.checkpoint.directory",
    "lockstep": "pylomin.passes.lockstep",
    "open_store": "pylomin.store.open",
    "peak_memory": "pylomin.measure",
    "plan_of": "pylomin.passes.planning",
    "prefetch": "pylomin.passes.prefetch",
    "quantization_report": "pylomin.store.quantization_report",
    "quantize_inputs": "pylomin.passes.quantize_inputs",
    "restore": "pylomin.passes.restore",
    "restore_checkpoint": "pylomin.checkpoint.checkpoint",
    "save_checkpoint": "pylomin.checkpoint.directory",
    "save_model": "pylomin.save",
    "save_store": "pylomin.save",
    "set_memory_budget": "pylomin.passes.memory_budget",
    "stats": "pylomin.measure",
    "trainer_callback": "pylomin.checkpoint.trainer",
    "verify": "pylomin.store.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "BudgetError",
    "Checkpoint",
    "CheckpointError",
    "DeviceMemoryError",
    "ExportError",
    "MissingPackageError",
    "Mode",
    "OffloadedWriteError",
    "OutputExistsError",
    "PassError",
    "PeakMemory",
    "Plan",
    "PlanError",
    "PylominError",
    "ScratchError",
    "ShardedWeightsLoader",
    "Stats",
    "StoreChangedError",
    "StoreFormatError",
    "StoreReadError",
    "StoreWriteError",
    "VerifyReport",
    "WeightMismatchError",
    "WeightNotFoundError",
    "build_checkpoint",
    "checkpoints",
    "chunked_embedding",
    "chunked_linear",
    "export_onnx",
    "find_checkpoints",
    "fit",
    "from_pretrained",
    "lazy_loading",
    "lightning_callback",
    "load",
    "load_checkpoint",
    "lockstep",
    "open_store",
    "peak_memory",
    "plan_of",
    "prefetch",
    "quantization_report",
    "quantize_inputs",
    "restore",
    "restore_checkpoint",
    "save_checkpoint",
    "save_model",
    "save_store",
    "set_memory_budget",
    "stats",
    "trainer_callback",
    "verify",
]
