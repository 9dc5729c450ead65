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
from pylomin.export import export_onnx
from pylomin.io.modes import Mode
from pylomin.lazy import partial as _partial  # noqa: F401  # registers the operators that need only some rows
from pylomin.load import load
from pylomin.measure import PeakMemory, peak_memory, stats
from pylomin.passes.chunked_embedding import chunked_embedding
from pylomin.passes.chunked_linear import chunked_linear
from pylomin.passes.fit import fit
from pylomin.passes.lazy_loading import lazy_loading
from pylomin.passes.memory_budget import set_memory_budget
from pylomin.passes.planning import plan_of
from pylomin.passes.prefetch import prefetch
from pylomin.passes.restore import restore
from pylomin.pretrained.loading import from_pretrained
from pylomin.residency.plan import Plan
from pylomin.residency.stats import Stats
from pylomin.save import save_model, save_store
from pylomin.store.open import open_store
from pylomin.store.quantization_report import quantization_report
from pylomin.store.sharded_loader import ShardedWeightsLoader
from pylomin.store.verify import VerifyReport, verify

if TYPE_CHECKING:
    from pylomin.checkpoint.checkpoint import Checkpoint, build_checkpoint, restore_checkpoint
    from pylomin.checkpoint.directory import load_checkpoint, save_checkpoint
    from pylomin.checkpoint.lightning import lightning_callback
    from pylomin.checkpoint.series import checkpoints, find_checkpoints
    from pylomin.checkpoint.trainer import trainer_callback

__version__ = "0.1.0"

# Imported when they are first used, for most programs use none of them.
_LAZY = {
    "Checkpoint": "pylomin.checkpoint.checkpoint",
    "build_checkpoint": "pylomin.checkpoint.checkpoint",
    "checkpoints": "pylomin.checkpoint.series",
    "find_checkpoints": "pylomin.checkpoint.series",
    "lightning_callback": "pylomin.checkpoint.lightning",
    "load_checkpoint": "pylomin.checkpoint.directory",
    "restore_checkpoint": "pylomin.checkpoint.checkpoint",
    "save_checkpoint": "pylomin.checkpoint.directory",
    "trainer_callback": "pylomin.checkpoint.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


__all__ = [
    "BudgetError",
    "Checkpoint",
    "CheckpointError",
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
    "open_store",
    "peak_memory",
    "plan_of",
    "prefetch",
    "quantization_report",
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
