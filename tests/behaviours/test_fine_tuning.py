"""Training what is in memory through what is not: memory, order of reading, threads, and what is trained."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pylomin
from pylomin.lazy.offload import residencies_of
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.residency.residency import Residency
from tests.robustness.common import run_in_thread, run_in_threads

from .common import Mlp, SizedLinears, Tied, assert_same, bytes_read, resident_bytes, twins

SIZE = 320  # a linear of it has 400 KiB, enough to be read ahead
LAYERS = 6
LAYER_BYTES = (SIZE * SIZE + SIZE) * 4


class Adapted(nn.Module):
    """A frozen linear, and a small one that is trained."""

    def __init__(self, size: int = SIZE) -> None:
        super().__init__()
        self.base = nn.Linear(size, size)
        self.down = nn.Linear(size, 2, bias=False)
        self.up = nn.Linear(2, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x)))  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self, *, checkpointed: bool = False, reentrant: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adapted() for _ in range(LAYERS))
        self.checkpointed, self.reentrant = checkpointed, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if self.checkpointed else layer(x)
        return x


def adapters(model: Stack) -> list[nn.Module]:
    return [small for layer in model.layers for small in (layer.down, layer.up)]


def offloaded(model: Stack, budget: int | None, **options: Any) -> tuple[Stack, Stack, Residency]:
    plain, lazy = twins(model, skip_modules=adapters(model), memory_budget=budget, reading_mode="buffered", **options)
    (residency,) = residencies_of(lazy)
    return plain, lazy, residency


def step(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Gradients of one step."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    return [leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


# -- memory, and the order of reading ---------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("layers", [2.2, 3.2, 5.2])
def test_peak_of_a_step_is_within_the_budget(prefetch: bool, checkpointed: bool, layers: float) -> None:
    budget = int(layers * LAYER_BYTES)
    plain, lazy, _ = offloaded(Stack(checkpointed=checkpointed), budget)
    if prefetch:
        pylomin.prefetch(lazy)
    x = torch.randn(3, SIZE)
    for _ in range(4):
        assert_same(step(plain, x), step(lazy, x))
    assert pylomin.stats(lazy).peak_bytes <= budget


def test_the_order_covers_backward_and_is_read_ahead_in_reverse() -> None:
    plain, lazy, residency = offloaded(Stack(), int(3.2 * LAYER_BYTES))
    pylomin.prefetch(lazy)
    x = torch.randn(3, SIZE)
    for _ in range(3):
        step(lazy, x)
    names = [residency.weights_of(key)[0].name for key in residency.retention.order]
    forward = [f"layers.{i}.base.weight" for i in range(LAYERS)]
    turns = names * 2
    start = turns.index(forward[0])
    if turns[start + 1] == forward[0]:  # the end of a step, then the start of the next
        start += 1
    assert turns[start : start + 2 * LAYERS] == forward + forward[::-1]
    before = pylomin.stats(lazy)
    expected = step(plain, x)
    assert_same(expected, step(lazy, x))
    after = pylomin.stats(lazy)
    assert after.loads == before.loads, "something was not read ahead"
    assert after.hits - before.hits == 2 * LAYERS
    assert after.prefetched > before.prefetched


def test_what_is_used_last_and_first_in_backward_is_read_once() -> None:
    _, lazy, residency = offloaded(Stack(), int(3.2 * LAYER_BYTES))
    pylomin.prefetch(lazy)
    x = torch.randn(3, SIZE)
    for _ in range(4):
        step(lazy, x)
    stay = {key for key in residency.retention.order if residency.retention.stays(key)}
    streamed = LAYERS - len(stay)
    turns = [next(iter(residency.weights_of(key))).name for key in stay]
    ends = sum(f"layers.{i}.base.weight" not in turns for i in (0, LAYERS - 1))
    assert ends
    steps = 8
    read = bytes_read(lazy, lambda: [step(lazy, x) for _ in range(steps)])
    # What is being read ahead when counting begins, and when it ends, may be counted or not.
    assert abs(read - steps * (2 * streamed - ends) * LAYER_BYTES) <= 2 * LAYER_BYTES
    assert pylomin.stats(lazy).wasted <= LAYERS


def test_residents_are_counted_once_though_backward_needs_no_bias() -> None:
    _, lazy, residency = offloaded(Stack(), 4 * LAYER_BYTES + 65536)
    pylomin.prefetch(lazy)
    for _ in range(3):
        step(lazy, torch.randn(3, SIZE))
    plan = pylomin.plan_of(lazy)
    assert len(plan.groups) == LAYERS
    assert plan.resident_bytes >= 2 * LAYER_BYTES
    assert len(set(residency.retention.order)) == LAYERS


def test_a_recurrent_weight_is_not_read_for_every_step_of_backward() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(SIZE, SIZE)
            self.rest = SizedLinears(3, SIZE)

        def forward(self, x: Tensor) -> Tensor:
            return self.rest(self.lstm(x)[0])  # type: ignore[no-any-return]

    model = Cell()
    lstm_bytes = sum(p.nbytes for p in model.lstm.parameters())
    plain, lazy = twins(model, memory_budget=lstm_bytes + 2 * LAYER_BYTES, reading_mode="buffered")
    pylomin.prefetch(lazy)
    x = torch.randn(5, 1, SIZE)
    for _ in range(6):
        assert_same(step(plain, x), step(lazy, x))
    assert bytes_read(lazy, lambda: step(lazy, x)) <= 3 * lstm_bytes + 6 * LAYER_BYTES
    assert pylomin.stats(lazy).peak_bytes <= lstm_bytes + 2 * LAYER_BYTES


def test_without_a_budget_one_layer_is_in_memory() -> None:
    plain, lazy, _ = offloaded(Stack(), None)
    x = torch.randn(3, SIZE)
    assert_same(step(plain, x), step(lazy, x))
    assert pylomin.stats(lazy).peak_bytes <= LAYER_BYTES + 8192
    assert resident_bytes(lazy) == 0


# -- what the graph keeps ---------------------------------------------------------------------------


def saved_bytes(model: nn.Module, x: Tensor) -> tuple[int, Tensor]:
    """Bytes of floating-point matrices of ``SIZE`` x ``SIZE`` that a graph keeps, and its result."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == SIZE * SIZE:
            kept[tensor.untyped_storage().data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    return sum(kept.values()), out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_that_autocast_makes_are_made_again(dtype: torch.dtype) -> None:
    plain, lazy, _ = offloaded(Stack(), None)
    x = torch.randn(3, SIZE)
    results = []
    for model in (plain, lazy):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            kept, out = saved_bytes(model, leaf)
        assert kept == (0 if model is lazy else LAYERS * SIZE * SIZE * 2)
        out.float().square().sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert_same(results[0], results[1])
    assert resident_bytes(lazy) == 0


class Cast(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(torch.float64).t(), self.bias.double())


def test_copies_that_a_module_makes_are_made_again() -> None:
    plain, lazy = twins(Cast(SIZE, SIZE))
    results = []
    for model in (plain, lazy):
        leaf = torch.ones(2, SIZE, dtype=torch.float64, requires_grad=True)
        kept, out = saved_bytes(model, leaf)
        assert (kept == 0) == (model is lazy)
        out.sum().backward()
        results.append(leaf.grad)
    assert_same(results[0], results[1])


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 2)


def test_what_is_computed_from_a_weight_is_kept() -> None:
    plain, lazy = twins(Scaled(SIZE, SIZE))
    results = []
    for model in (plain, lazy):
        leaf = torch.ones(2, SIZE, requires_grad=True)
        kept, out = saved_bytes(model, leaf)
        assert kept == SIZE * SIZE * 4
        out.sum().backward()
        results.append(leaf.grad)
    assert_same(results[0], results[1])


class Conjugated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.conj()) * self.weight.imag[0] @ self.weight.mT


def test_conjugated_views() -> None:
    plain, lazy = twins(Conjugated())
    x = torch.randn(2, 8, dtype=torch.complex64)
    results = []
    for model in (plain, lazy):
        leaf = x.clone().requires_grad_()
        model(leaf).abs().sum().backward()
        results.append(leaf.grad)
    assert_same(results[0], results[1])


def test_the_graph_of_a_double_backward_keeps_no_weights() -> None:
    plain, lazy = twins(SizedLinears(4, SIZE))
    x = torch.randn(2, SIZE)
    results = []
    for model in (plain, lazy):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).pow(3).sum(), leaf, create_graph=True)
        assert model is plain or resident_bytes(lazy) == 0
        gradient.square().sum().backward()
        results.append((gradient.detach(), leaf.grad))
    assert_same(results[0], results[1])


# -- tiles, rows, ties, quantised weights -----------------------------------------------------------


def test_tiles() -> None:
    plain, lazy, _ = offloaded(Stack(), None)
    pylomin.chunked_linear(lazy, target_modules=[layer.base for layer in lazy.layers], chunk_size=SIZE // 8)
    x = torch.randn(3, SIZE)
    for expected, gradient in zip(step(plain, x), step(lazy, x), strict=True):
        torch.testing.assert_close(gradient, expected)
    assert pylomin.stats(lazy).peak_bytes <= LAYER_BYTES // 2


@pytest.mark.parametrize(("first", "then"), [(8 * LAYER_BYTES, 800 << 10), (800 << 10, 8 * LAYER_BYTES)])
@pytest.mark.parametrize("checkpointed", [None, "reentrant", "not reentrant"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_tiles_from_the_forward_on_or_not_any_more(first: int, then: int, checkpointed: str | None) -> None:
    stack = Stack(checkpointed=checkpointed is not None, reentrant=checkpointed == "reentrant")
    plain, lazy, _ = offloaded(stack, first)
    x = torch.randn(3, SIZE)
    for _ in range(2):
        results = []
        for model in (plain, lazy):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            out = model(leaf)
            if model is lazy:
                pylomin.set_memory_budget(lazy, then)
            out.square().sum().backward()
            results.append([leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        pylomin.set_memory_budget(lazy, first)
        for expected, gradient in zip(*results, strict=True):
            torch.testing.assert_close(gradient, expected)


def test_a_write_between_forward_and_backward_by_tiles_raises() -> None:
    lazy = pylomin.chunked_linear(pylomin.lazy_loading(nn.Linear(8, 8)), target_module_name="", chunk_size=64)
    out = lazy(torch.randn(2, 8, requires_grad=True))
    with torch.no_grad():
        lazy.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an in-place operation"):
        out.sum().backward()


def test_tied_weights_and_lookups() -> None:
    class Prompted(Tied):
        """Learns what stands before its input."""

        def __init__(self) -> None:
            super().__init__()
            self.prompt = nn.Parameter(torch.randn(3, 8))

        def forward(self, ids: Tensor) -> Tensor:
            x = torch.cat([self.prompt, self.table(ids)])
            logits: Tensor = self.head(torch.tanh(self.body(x)))
            return logits

    model = Prompted().requires_grad_(False)
    plain = copy.deepcopy(model)
    lazy = pylomin.lazy_loading(model, target_classes=[nn.Linear, nn.Embedding])
    pylomin.chunked_embedding(lazy, target_module_name="table", chunk_size=4)
    gradients = []
    for each in (plain, lazy):
        each.prompt.requires_grad_(True)
        each(torch.tensor([1, 5, 5, 19])).square().sum().backward()
        gradients.append(each.prompt.grad)
    assert_same(gradients[0], gradients[1])


@pytest.mark.parametrize("scheme", ["int8", "int8-row", "int4"])
@pytest.mark.parametrize("budget", [None, 2 * LAYER_BYTES])
def test_quantised_weights(scheme: str, budget: int | None, tmp_path: Any) -> None:
    model = SizedLinears(4, SIZE).requires_grad_(False)
    pylomin.save_model(model, tmp_path / "model.safetensors", quantize=scheme)

    def load(**options: Any) -> nn.Module:
        return pylomin.load(
            lambda: SizedLinears(4, SIZE).requires_grad_(False), tmp_path / "model.safetensors", **options
        )

    plain, lazy = pylomin.restore(load()), load(memory_budget=budget)
    x = torch.randn(3, SIZE)
    for _ in range(2):
        for expected, gradient in zip(step(plain, x), step(lazy, x), strict=True):
            torch.testing.assert_close(gradient, expected)
    if budget is not None:
        assert pylomin.stats(lazy).peak_bytes <= budget


# -- threads ----------------------------------------------------------------------------------------


def test_backward_in_another_thread_goes_on_in_the_order_of_the_forward() -> None:
    """As autograd does it for other devices."""
    plain, lazy, residency = offloaded(Stack(), int(3.2 * LAYER_BYTES))
    pylomin.prefetch(lazy)
    x = torch.randn(3, SIZE)
    for _ in range(5):
        gradients = []
        for model in (plain, lazy):
            model.zero_grad()
            leaf = x.clone().requires_grad_()
            loss = model(leaf).square().sum()
            before = pylomin.stats(lazy)
            run_in_thread(loss.backward)
            gradients.append([leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        assert_same(gradients[0], gradients[1])
    assert len(residency.retention.order) == 2 * LAYERS
    assert pylomin.stats(lazy).loads == before.loads, "something was not read ahead"


def test_steps_in_several_threads() -> None:
    model = Stack()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plain, lazy = twins(model, memory_budget=int(8.2 * LAYER_BYTES))
    xs = [torch.randn(2, SIZE) for _ in range(4)]
    expected = [step(plain, x)[0] for x in xs]

    def work(x: Tensor) -> list[Tensor | None]:
        return [step(lazy, x)[0] for _ in range(5)]

    for _ in range(5):
        for first, results in zip(expected, run_in_threads([partial(work, x) for x in xs]), strict=True):
            assert_same([first] * 5, results)


# -- what is trained --------------------------------------------------------------------------------


def test_restored_modules_train() -> None:
    model = nn.Sequential(Mlp(), nn.Linear(8, 8), nn.LayerNorm(8))
    plain = copy.deepcopy(model)
    for parameter in plain[0].parameters():
        parameter.requires_grad_(False)
    plain[1].weight.requires_grad_(False)
    plain[1].bias.requires_grad_(False)
    plain[0].norm.requires_grad_(True)
    lazy = pylomin.lazy_loading(model, memory_budget="1MiB")
    pylomin.prefetch(lazy)
    assert pylomin.restore(lazy, target_modules=[lazy[0].norm, lazy[2]]) is lazy
    assert [name for name, p in lazy.named_parameters() if p.requires_grad] == [
        name for name, p in plain.named_parameters() if p.requires_grad
    ]
    assert type(lazy[2]) is nn.LayerNorm
    assert isinstance(lazy[1].weight, OffloadedTensor)
    assert residencies_of(lazy)[0].depth == 1
    x = torch.randn(4, 8)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (plain, lazy)]
    for _ in range(3):
        for each, optimizer in zip((plain, lazy), optimizers, strict=True):
            optimizer.zero_grad()
            each(x).square().sum().backward()
            optimizer.step()
        for (name, left), right in zip(plain.named_parameters(), lazy.parameters(), strict=True):
            if left.requires_grad:
                assert_same(left.detach(), right.detach(), name)
    pylomin.restore(lazy)
    assert_same(list(plain.parameters()), list(lazy.parameters()))


def test_restoring_one_of_tied_modules_restores_both() -> None:
    lazy = pylomin.lazy_loading(Tied())
    pylomin.restore(lazy, target_modules=[lazy.head])
    assert lazy.head.weight is lazy.table.weight
    assert type(lazy.head) is nn.Linear
    assert lazy.table.weight.requires_grad
    assert isinstance(lazy.body.weight, OffloadedTensor)
    lazy(torch.tensor([1, 2])).sum().backward()
    assert lazy.head.weight.grad is not None


def test_restoring_all_by_name_is_restoring() -> None:
    lazy = pylomin.lazy_loading(Mlp())
    pylomin.prefetch(lazy)
    (residency,) = residencies_of(lazy)
    pylomin.restore(lazy, target_modules=lazy.modules())
    assert type(lazy.first) is nn.Linear
    assert residency.depth == 0


def test_nothing_to_restore_of_a_module() -> None:
    lazy = pylomin.lazy_loading(nn.Sequential(Mlp()))
    with pytest.raises(pylomin.PassError, match=r"none of target_modules has .*block\.modules\(\)"):
        pylomin.restore(lazy, target_modules=[lazy[0]])
    with pytest.raises(pylomin.PassError, match="no part of the model"):
        pylomin.restore(lazy, target_modules=[nn.Linear(2, 2)])
    assert isinstance(lazy[0].first.weight, OffloadedTensor)
