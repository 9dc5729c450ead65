"""Checkpoints from the training loop of Lightning."""

from __future__ import annotations

import os
from typing import Any

from pylomin.checkpoint.series import CheckpointSeries, checkpoints
from pylomin.errors import MissingPackageError


def lightning_callback(directory: str | os.PathLike[str], *, resume: bool = True, **options: Any) -> Any:
    """A callback for ``lightning.pytorch.Trainer`` that saves in the background.

    ::

        trainer = Trainer(callbacks=[pylomin.lightning_callback("run", every=100)])

    Args:
        directory: of this run alone.
        resume: True to go on from the newest whole checkpoint when training begins: model, optimizers, schedulers and
            random numbers. The counters of the loop and the order of the data begin anew; checkpoints count on.
        options: ``every``, ``full_every``, ``keep``, ``quantize``, ``filter``, ``max_error`` of
            :func:`pylomin.checkpoints`.

    Raises:
        MissingPackageError: lightning is not installed.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError as error:
        raise MissingPackageError("lightning_callback needs lightning: pip install 'pylomin[lightning]'.") from error

    class Checkpoints(Callback):  # type: ignore[misc]
        series: CheckpointSeries | None = None
        steps_before = 0  # of earlier runs
        last_step = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            self.series = checkpoints(directory, pl_module, trainer.optimizers, schedulers, scaler, **options)
            if resume and self.series.resume() is not None:
                self.steps_before = self.series.steps - trainer.global_step
            self.last_step = trainer.global_step

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            assert self.series is not None
            if trainer.global_step != self.last_step:  # not while gradients accumulate
                self.last_step = trainer.global_step
                self.series.step(step=self.steps_before + trainer.global_step, epoch=trainer.current_epoch)

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            assert self.series is not None
            self.series.close()

        def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
            if self.series is not None:
                self.series.__exit__(type(exception), exception, None)

    return Checkpoints()
