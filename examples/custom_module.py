"""pylomin on a module of your own: ``python examples/custom_module.py``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

import pylomin


class TinyLanguageModel(nn.Module):
    """Reads its embedding also as output layer, without calling the module that owns it."""

    def __init__(self, vocabulary: int = 20_000, width: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of shape (batch, length, vocabulary) for tokens of shape (batch, length)."""
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = hidden + torch.tanh(layer(hidden))
        return functional.linear(hidden, self.embedding.weight)


def main() -> None:
    """Run the model in memory, then with its weights on disk, and compare."""
    torch.manual_seed(0)
    model: nn.Module = TinyLanguageModel()
    tokens = torch.randint(20_000, (1, 16))
    with torch.no_grad():
        expected = model(tokens)
        model = pylomin.lazy_loading(model)
        with pylomin.peak_memory(model) as peak:
            output = model(tokens)
    print("equal to the model in memory:", torch.allclose(output, expected, atol=1e-5))
    print(f"peak weight memory: {peak.weight_bytes / (1 << 20):.1f} MiB")


if __name__ == "__main__":
    main()
