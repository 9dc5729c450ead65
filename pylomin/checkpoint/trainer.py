"""Checkpoints from the training loop of transformers."""

from __future__ import annotations

import os
from typing import Any

from pylomin.checkpoint.series import CheckpointSeries, checkpoints
from pylomin.errors import MissingPackageError


def trainer_callback(directory: str | os.PathLike[str], *, resume: bool = True, **options: Any) -> Any:
    """A callback for ``transformers.Trainer`` that saves in the background.

    ::

        trainer = Trainer(model, arguments, train_dataset=data, callbacks=[pylomin.trainer_callback("run", every=100)])

    Args:
        directory: of this run alone.
        resume: True to go on from the newest whole checkpoint when training begins: model, optimizer, scheduler,
            random numbers and ``state.global_step``. The order of the data begins anew.
        options: ``every``, ``full_every``, ``keep``, ``quantize``, ``filter``, ``max_error`` of
            :func:`pylomin.checkpoints`.

    Raises:
        MissingPackageError: transformers is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise MissingPackageError(
            "trainer_callback needs transformers: pip install 'pylomin[transformers]'."
        ) from error

    class Checkpoints(TrainerCallback):  # type: ignore[misc]
        series: CheckpointSeries | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.series = checkpoints(
                directory, kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"], **options
            )
            if resume and self.series.resume() is not None:
                state.global_step = self.series.steps

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.series is not None
            self.series.step(step=state.global_step, epoch=state.epoch)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert self.series is not None
            self.series.close()

    return Checkpoints()
