"""A thousand forwards leave the process as one forward did."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import pylomin
from pylomin.residency import residency as residency_module

from .common import (
    Stack,
    assert_nothing_held,
    forward,
    group_bytes,
    only_residency,
    open_descriptors,
    resident_set_bytes,
    settled,
    stack_pair,
    undisturbed,
)

TOLERANCE_BYTES = 4 << 20  # 4 MiB


class Mixed(nn.Module):
    """A table, a recurrent layer, a shared layer and a write in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(200, 16)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.shared = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.count = nn.Parameter(torch.zeros(3))
        self.head = nn.Linear(16, 200, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.count.add_(1)
        x, _ = self.rnn(self.table(tokens))
        return self.head(self.norm(self.shared(self.shared(x))))


@pytest.mark.parametrize(("depth", "layers_in_budget"), [(0, None), (1, None), (0, 2), (2, 3), (1, 10)])
def test_hundreds_of_forwards(depth: int, layers_in_budget: int | None) -> None:
    x, expected, model = stack_pair(4)
    if depth:
        pylomin.prefetch(model, depth=depth)
    if layers_in_budget is not None:
        only_residency(model).set_budget(layers_in_budget * group_bytes(model))
    residency = only_residency(model)
    for _ in range(50):
        forward(model, x)
    assert settled(residency)
    descriptors, threads, memory = open_descriptors(), threading.active_count(), resident_set_bytes()
    known_order, pool_bytes = (
        len(residency.retention.trace._after),
        residency.pool.live_bytes + residency.pool.free_bytes,
    )
    for _ in range(200):
        output = forward(model, x)
    assert torch.equal(output, expected)
    assert settled(residency)
    assert open_descriptors() <= descriptors
    assert threading.active_count() == threads
    assert resident_set_bytes() - memory < TOLERANCE_BYTES
    assert len(residency.retention.trace._after) == known_order
    assert residency.pool.live_bytes + residency.pool.free_bytes <= pool_bytes + group_bytes(model) * depth
    assert len(residency.pool._returned) <= 8
    assert_nothing_held(model, resident_bytes=(layers_in_budget or depth) * group_bytes(model))


def test_a_thousand_forwards_alternating_between_settings() -> None:
    x, _, model = stack_pair(2)
    residency, layer_bytes = only_residency(model), group_bytes(model)
    budgets = (None, layer_bytes, 2 * layer_bytes, 9 * layer_bytes)
    expected = {budget: undisturbed(Stack(2), x, budget) for budget in budgets}
    for round_ in range(1000):
        if round_ % 20 == 0:
            residency.set_depth(round_ // 20 % 3)
            residency.set_budget(budgets[round_ // 20 % 4])
        assert torch.equal(forward(model, x), expected[residency.memory_budget])
        if round_ == 300:
            assert settled(residency)
            descriptors, memory, threads = open_descriptors(), resident_set_bytes(), threading.active_count()
    residency.set_depth(0)
    assert open_descriptors() <= descriptors
    assert threading.active_count() <= threads
    assert resident_set_bytes() - memory < TOLERANCE_BYTES
    assert_nothing_held(model, resident_bytes=9 * layer_bytes)


def test_a_thousand_forwards_of_every_kind_of_module() -> None:
    torch.manual_seed(0)
    model = Mixed()
    tokens = torch.arange(10).view(2, 5)
    expected = forward(model, tokens)
    model = pylomin.prefetch(pylomin.lazy_loading(model), depth=1)
    residency = only_residency(model)
    for round_ in range(1000):
        output = forward(model, tokens)
        if round_ == 100:
            descriptors, memory = open_descriptors(), resident_set_bytes()
            known_order = len(residency.retention.trace._after)
    assert torch.equal(output, expected)
    assert open_descriptors() <= descriptors
    assert resident_set_bytes() - memory < TOLERANCE_BYTES
    assert len(residency.retention.trace._after) == known_order
    assert torch.equal(model.count.detach().clone(), torch.full((3,), 1001.0))
    assert_nothing_held(model)


def test_a_thousand_writes_reuse_their_bytes(scratch: Path) -> None:
    model = pylomin.lazy_loading(nn.Linear(64, 64))
    for step in range(1000):
        with torch.no_grad():
            model.weight.fill_(step)
    assert torch.equal(forward(model, torch.ones(1, 64)) - model.bias.detach().clone(), torch.full((1, 64), 999.0 * 64))
    overlay_bytes = sum(path.stat().st_size for path in scratch.rglob("overlay-*"))
    assert overlay_bytes <= 4 * 64 * 64 * 4


def test_a_thousand_forwards_with_gradients() -> None:
    x, _, model = stack_pair(2)
    for round_ in range(150):
        point = x.clone().requires_grad_()
        model(point).sum().backward()
        if round_ == 50:
            descriptors, memory = open_descriptors(), resident_set_bytes()
    assert open_descriptors() <= descriptors
    assert resident_set_bytes() - memory < TOLERANCE_BYTES
    assert_nothing_held(model)


def test_short_lived_threads_leave_nothing_in_the_trace() -> None:
    x, _, model = stack_pair(2)
    residency = only_residency(model)
    for _ in range(50):
        thread = threading.Thread(target=forward, args=(model, x))
        thread.start()
        thread.join()
    assert len(residency.retention.trace._after) <= 8
    assert_nothing_held(model)


def test_models_made_and_deleted(scratch: Path) -> None:
    x = torch.ones(1, 264)
    for round_ in range(40):
        model = pylomin.prefetch(pylomin.lazy_loading(Stack(2), memory_budget="4MiB"))
        forward(model, x)
        forward(model, x)
        del model
        if round_ == 10:
            descriptors, memory = open_descriptors(), resident_set_bytes()
    assert open_descriptors() <= descriptors + 1
    assert resident_set_bytes() - memory < TOLERANCE_BYTES
    assert len(list(scratch.iterdir())) <= 1
    assert len(residency_module._all) <= 2


def test_copies_made_and_deleted(scratch: Path) -> None:
    x, expected, model = stack_pair(2)
    for round_ in range(30):
        twin = copy.deepcopy(model)
        assert torch.equal(forward(twin, x), expected)
        del twin
        if round_ == 10:
            descriptors, memory = open_descriptors(), resident_set_bytes()
    assert open_descriptors() <= descriptors
    assert resident_set_bytes() - memory < TOLERANCE_BYTES
    assert len(list(scratch.iterdir())) == 1


def test_conversions_made_again_and_again_do_not_grow() -> None:
    _, _, model = stack_pair(1)
    residency = only_residency(model)
    for _ in range(100):
        model.layers[0].weight.to(torch.float64)
        model.layers[0].weight.half()
    gc.collect()
    assert len(residency._weights) <= 4
