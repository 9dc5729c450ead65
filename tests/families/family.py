"""What a family is: a tiny model of one architecture, built from a config, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Kind = Literal[
    "encoder",
    "decoder",
    "encoder-decoder",
    "moe",
    "state-space",
    "vision",
    "audio",
    "multimodal",
]
Config = Mapping[str, Any]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One architecture. Builds have equal weights; calls of ``inputs`` give equal tensors."""

    name: str
    kind: Kind
    construct: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    generates: bool = False

    def build(self) -> nn.Module:
        """A new model in eval mode in which no weight is left at a constant."""
        torch.manual_seed(0)
        model = self.construct().eval()
        disturb(model)
        calibrate(model, self.inputs())
        return model

    def prompt(self) -> Inputs:
        """What ``generate`` gets: the inputs without a decoder's part and without padding."""
        return {
            name: tensor
            for name, tensor in self.inputs().items()
            if not name.startswith("decoder_") and name != "attention_mask"
        }


def disturb(model: nn.Module) -> None:
    """Add seeded noise to every floating parameter.

    Biases, norms and class tokens start at zero or one; left there, two of them could be mixed up
    and no output would tell. Matrices and filters get as much as keeps a signal's size over layers.
    """
    generator = seeded(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                fan_in = parameter.numel() / len(parameter) if parameter.dim() > 1 else 100
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=max(0.1, (2 / fan_in) ** 0.5))


def calibrate(model: nn.Module, inputs: Inputs) -> None:
    """Give batch norms the statistics of ``inputs``.

    With those they start with, a deep convolutional network forgets what it saw.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the average of all batches, which is this one
        norm.train()
    if norms:
        with torch.no_grad():
            model(**inputs)
    for norm in norms:
        # Few samples may hardly vary; dividing by that would blow up every rounding error.
        cast(Tensor, norm.running_var).clamp_(min=0.1)
    # Some modules keep what they derived from a weight until they train again.
    model.train().eval()


def family(
    kind: Kind,
    name: str,
    model_class: str,
    config: Config,
    inputs: Callable[[], Inputs],
    *,
    generates: bool = False,
) -> Family:
    """A family whose model is ``model_class(config)``, both found in transformers by name."""

    def construct() -> nn.Module:
        cls = getattr(transformers, model_class)
        model: nn.Module = cls(cls.config_class(**config))
        return model

    return Family(name, kind, construct, inputs, generates)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def token_ids(rows: int = 2, length: int = 8, *, seed: int = 0, below: int = 99) -> Tensor:
    """Token ids, shape (rows, length). Ids below 5 are left out: there the special tokens are."""
    return torch.randint(5, below, (rows, length), generator=seeded(seed))


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def text(rows: int = 2, length: int = 8) -> Inputs:
    """Ids and a mask under which the last two tokens of the last row are padding."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, -2:] = 0
    return {"input_ids": token_ids(rows, length), "attention_mask": mask}


def text_pair() -> Inputs:
    """Encoder text, and the beginning of a decoder's."""
    return text() | {"decoder_input_ids": token_ids(2, 5, seed=1)}


def first_token() -> Tensor:
    """A mask that chooses the first token of each row of ``text``."""
    mask = torch.zeros(2, 8, dtype=torch.long)
    mask[:, 0] = 1
    return mask


def pixels(size: int = 32, *, rows: int = 2, channels: int = 3) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": floats(rows, channels, size, size)}


def mel(bins: int, frames: int) -> Callable[[], Inputs]:
    return lambda: {"input_features": floats(2, bins, frames)}


def waveform(samples: int = 800, *, name: str = "input_values") -> Callable[[], Inputs]:
    return lambda: {name: floats(2, samples)}
