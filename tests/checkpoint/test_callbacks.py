"""The callbacks, in the training loops that they are for."""

from __future__ import annotations

import builtins
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import pylomin
from examples import training_resume
from pylomin.errors import MissingPackageError


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = self.layer(x)
        return {"logits": y} if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


def data() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(4, generator=generator), "labels": torch.ones(1)} for _ in range(12)]


def newest(directory: Path) -> pylomin.Checkpoint:
    return pylomin.load_checkpoint(pylomin.find_checkpoints(directory)[-1])


def train_with_transformers(directory: Path, scratch: Path, max_steps: int) -> Regression:
    from transformers import Trainer, TrainingArguments

    model = Regression()
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=max_steps,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    callback = pylomin.trainer_callback(directory, every=2, keep=2)
    Trainer(model, arguments, train_dataset=data(), callbacks=[callback]).train()
    return model


def test_transformers(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what others say of themselves
        model = train_with_transformers(tmp_path / "run", tmp_path / "scratch", 5)
        assert [path.name for path in pylomin.find_checkpoints(tmp_path / "run")] == ["step-00000002", "step-00000004"]
        model = train_with_transformers(tmp_path / "run", tmp_path / "scratch", 6)
    checkpoint = newest(tmp_path / "run")
    assert (checkpoint.step, len(checkpoint.optimizer["state"])) == (6, 2)
    assert checkpoint.optimizer["state"][0]["step"] == 6, "it went on from step 4"
    assert torch.equal(checkpoint.model["layer.weight"], model.layer.weight)


def train_with_lightning(directory: Path, max_steps: int) -> nn.Module:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.utilities import disable_possible_user_warnings

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Regression()

        def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
            return self.model(**batch)["loss"]

        def configure_optimizers(self) -> object:
            optimizer = torch.optim.Adam(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 2)]

    disable_possible_user_warnings()
    module = Module()
    trainer = Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[pylomin.lightning_callback(directory, every=2)],
    )
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=2))
    return module


def test_lightning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train_with_lightning(tmp_path, 5)
        assert newest(tmp_path).step == 4
        module = train_with_lightning(tmp_path, 2)
    checkpoint = newest(tmp_path)
    assert checkpoint.step == 6
    assert checkpoint.optimizer[0]["state"][0]["step"] == 6
    assert len(checkpoint.scheduler) == 1
    assert torch.equal(checkpoint.model["model.layer.weight"], module.model.layer.weight)


def test_the_example_goes_on_as_if_nothing_had_happened(tmp_path, capsys):
    expected = training_resume.train(str(tmp_path / "whole"), 110)
    (tmp_path / "halves").mkdir()
    pylomin.find_checkpoints(tmp_path / "whole")[0].rename(tmp_path / "halves" / "step-00000050")
    assert training_resume.train(str(tmp_path / "halves"), 110) == expected
    assert "resumed from step 50" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "package"), [("trainer_callback", "transformers"), ("lightning_callback", "lightning")]
)
def test_without_the_package(monkeypatch, tmp_path, function, package):
    real = builtins.__import__

    def import_(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", import_)
    with pytest.raises(MissingPackageError, match=rf"pip install 'pylomin\[{package}\]'"):
        getattr(pylomin, function)(tmp_path)
