"""What a checkpoint is made of, and how it is put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from pylomin.checkpoint.rng import rng_state, set_rng_state
from pylomin.errors import CheckpointError

SECTIONS = ("model", "optimizer", "scheduler", "scaler", "rng", "epoch", "step", "extra")


class HasState(Protocol):
    """An optimizer, a scheduler, a scaler."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


Stateful = HasState | Sequence[HasState] | None


class Checkpoint:
    """The state of a training run.

    Attributes (read-only; those of a loaded checkpoint are read when they are first asked for):
        model: the state dict. That of a loaded checkpoint has offloaded tensors, whose values are read at each use.
        optimizer, scheduler, scaler: their state dicts, or lists of them; None where there was none.
        rng: of :func:`~pylomin.checkpoint.rng.rng_state`.
        epoch, step: as they were given.
        extra: whatever else was given.
    """

    def __init__(self, sections: Mapping[str, Any], read_section: Callable[[str], Any] | None = None) -> None:
        self._sections = dict(sections)
        self._read_section = read_section

    def section(self, name: str) -> Any:
        """One of ``SECTIONS``."""
        if name not in self._sections and self._read_section is not None:
            self._sections[name] = self._read_section(name)
        return self._sections.get(name)

    @property
    def model(self) -> dict[str, Any]:
        return self.section("model") or {}

    @property
    def optimizer(self) -> Any:
        return self.section("optimizer")

    @property
    def scheduler(self) -> Any:
        return self.section("scheduler")

    @property
    def scaler(self) -> Any:
        return self.section("scaler")

    @property
    def rng(self) -> dict[str, Any] | None:
        return self.section("rng")  # type: ignore[no-any-return]

    @property
    def epoch(self) -> int | float | None:
        return self.section("epoch")  # type: ignore[no-any-return]

    @property
    def step(self) -> int | None:
        return self.section("step")  # type: ignore[no-any-return]

    @property
    def extra(self) -> dict[str, Any]:
        return self.section("extra") or {}


def build_checkpoint(
    model: nn.Module,
    optimizer: Stateful = None,
    scheduler: Stateful = None,
    scaler: Stateful = None,
    *,
    epoch: int | float | None = None,
    step: int | None = None,
    **extra: Any,
) -> Checkpoint:
    """The state of a training run as it is now, random number generators included.

    Nothing is copied: save it before training goes on.

    Args:
        model: in memory or offloaded.
        optimizer, scheduler, scaler: one, several in a list, or None.
        epoch, step: where training is.
        extra: anything made of tensors, numbers, strings, enums, lists, tuples, sets and dicts.

    >>> import torch
    >>> checkpoint = build_checkpoint(torch.nn.Linear(2, 1), epoch=3, best_loss=0.5)
    >>> checkpoint.epoch, checkpoint.extra
    (3, {'best_loss': 0.5})
    """
    return Checkpoint(
        {
            "model": model.state_dict(),
            "optimizer": _state_of(optimizer),
            "scheduler": _state_of(scheduler),
            "scaler": _state_of(scaler),
            "rng": rng_state(),
            "epoch": epoch,
            "step": step,
            "extra": extra,
        }
    )


def restore_checkpoint(
    checkpoint: Checkpoint,
    model: nn.Module | None = None,
    optimizer: Stateful = None,
    scheduler: Stateful = None,
    scaler: Stateful = None,
    *,
    rng: bool = True,
    strict: bool = True,
) -> None:
    """Put a checkpoint back, so that training continues where it was.

    Args:
        checkpoint: from :func:`pylomin.load_checkpoint` or :func:`build_checkpoint`.
        model, optimizer, scheduler, scaler: where to put it, built as they were when it was made; None to leave out.
        rng: False to leave the random number generators alone.
        strict: False to allow names that only the model, or only the checkpoint has.

    Raises:
        CheckpointError: the checkpoint has no such state, or it does not fit.
        StoreReadError: a file is damaged.
    """
    targets = {"optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    for name, target in targets.items():
        state = checkpoint.section(name)
        if target is not None and state is None:
            raise CheckpointError(f"the checkpoint has no {name}. Save it with one, or restore without: {name}=None.")
        if isinstance(target, (list, tuple)) != isinstance(state, list) and target is not None:
            raise CheckpointError(f"{name} is one in the checkpoint and several here, or the other way round.")
        if isinstance(target, (list, tuple)) and len(target) != len(state):
            raise CheckpointError(f"the checkpoint has {len(state)} of {name}; {len(target)} were given.")
    if model is not None:
        try:
            model.load_state_dict(checkpoint.model, strict=strict)
        except RuntimeError as error:
            raise CheckpointError(f"the checkpoint does not fit the model: {error}") from error
    for name, target in targets.items():
        if target is not None:
            _load_state(name, target, checkpoint.section(name))
    if rng and checkpoint.rng is not None:
        set_rng_state(checkpoint.rng)


def _state_of(target: Stateful) -> Any:
    if target is None:
        return None
    if isinstance(target, (list, tuple)):
        return [one.state_dict() for one in target]
    return target.state_dict()  # type: ignore[union-attr]


def _load_state(name: str, target: Any, state: Any) -> None:
    pairs = zip(target, state, strict=True) if isinstance(target, (list, tuple)) else [(target, state)]
    for one, of_one in pairs:
        try:
            one.load_state_dict(of_one)
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"the checkpoint does not fit the {name}, a {type(one).__name__}: {error}") from error
