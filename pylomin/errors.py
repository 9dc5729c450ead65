"""Every error that pylomin raises on purpose.

Each class inherits :class:`PylominError` and the built-in exception it specialises, so that ``except
ValueError`` in existing code keeps working. Messages say where, what was found, what was expected and what to do.
"""


class PylominError(Exception):
    """Base of all errors raised by pylomin."""


class PassError(PylominError, ValueError):
    """A pass was given arguments, or a model, that it cannot work with. The model is unchanged."""


class BudgetError(PylominError, MemoryError):
    """The memory budget cannot hold what must be in memory at one time."""


class PlanError(PylominError, ValueError):
    """A plan is malformed, or was made for another model."""


class StoreFormatError(PylominError, ValueError):
    """A weight file, header or shard index is malformed. Raised before any weight is read."""


class StoreReadError(PylominError, OSError):
    """The bytes of a weight could not be read: missing, truncated or unreadable file."""


class StoreChangedError(StoreReadError):
    """A weight file was modified after it was opened."""


class WeightNotFoundError(PylominError, KeyError):
    """A weight that the model needs is not in the store, or the other way round."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would escape the line breaks of our messages.
        return str(self.args[0]) if self.args else ""


class WeightMismatchError(PylominError, ValueError):
    """A stored weight has another shape or dtype than the model's."""


class OffloadedWriteError(PylominError, RuntimeError):
    """A write to an offloaded weight could not take effect."""


class TraceError(PylominError, RuntimeError):
    """``torch.jit.trace``, or a CUDA graph, met an operation on an offloaded weight that it cannot record."""


class StoreWriteError(PylominError, OSError):
    """Weights could not be written to a file (no space, no permission). The target is as it was before."""


class ExportError(PylominError, ValueError):
    """A model, or the weights that it streams, cannot be exported as they are."""


class ScratchError(StoreWriteError):
    """The scratch files that hold offloaded weights could not be written (no space, no permission)."""


class CheckpointError(PylominError, ValueError):
    """A training checkpoint is malformed, does not fit what it is restored into, or lacks its reference."""


class MissingPackageError(PylominError, ImportError):
    """A package that this function needs, and pylomin itself does not, is missing or too old."""


class OutputExistsError(PylominError, FileExistsError):
    """A file that should be written exists already."""


def without_frames(error: BaseException) -> BaseException:
    """For errors of ours that pass through frames which hold buffers: whoever keeps an error keeps its frames.

    Our texts say what the frames would. Errors of others are returned as they are.
    """
    if isinstance(error, PylominError):
        cause: BaseException | None = error
        while cause is not None:
            cause = cause.with_traceback(None).__cause__ or cause.__context__
    return error
