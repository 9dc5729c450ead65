"""Run PyTorch models whose weights do not fit in memory.

``model = pylomin.lazy_loading(model)`` keeps the weights of any ``nn.Module`` on disk but while they are used.
"""

from pylomin.errors import (
    BudgetError,
    OffloadedWriteError,
    OutputExistsError,
    PassError,
    PylominError,
    ScratchError,
    StoreChangedError,
    StoreFormatError,
    StoreReadError,
    StoreWriteError,
    WeightMismatchError,
    WeightNotFoundError,
)
from pylomin.lazy import partial as _partial  # noqa: F401  # registers the operators that need only some rows
from pylomin.load import load
from pylomin.measure import PeakMemory, peak_memory, stats
from pylomin.passes.chunked_embedding import chunked_embedding
from pylomin.passes.lazy_loading import lazy_loading
from pylomin.passes.prefetch import prefetch
from pylomin.passes.restore import restore
from pylomin.residency.stats import Stats
from pylomin.save import save_model, save_store
from pylomin.store.open import open_store
from pylomin.store.verify import VerifyReport, verify

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "OffloadedWriteError",
    "OutputExistsError",
    "PassError",
    "PeakMemory",
    "PylominError",
    "ScratchError",
    "Stats",
    "StoreChangedError",
    "StoreFormatError",
    "StoreReadError",
    "StoreWriteError",
    "VerifyReport",
    "WeightMismatchError",
    "WeightNotFoundError",
    "chunked_embedding",
    "lazy_loading",
    "load",
    "open_store",
    "peak_memory",
    "prefetch",
    "restore",
    "save_model",
    "save_store",
    "stats",
    "verify",
]
