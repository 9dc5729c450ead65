"""Run PyTorch models whose weights do not fit in memory.

``model = pylomin.lazy_loading(model)`` keeps the weights of any ``nn.Module`` on disk but while they are used.
"""

from pylomin.errors import (
    BudgetError,
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
from pylomin.store.sharded_loader import ShardedWeightsLoader
from pylomin.store.verify import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
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
    "chunked_embedding",
    "chunked_linear",
    "export_onnx",
    "fit",
    "from_pretrained",
    "lazy_loading",
    "load",
    "open_store",
    "peak_memory",
    "plan_of",
    "prefetch",
    "restore",
    "save_model",
    "save_store",
    "set_memory_budget",
    "stats",
    "verify",
]
