"""Copies of offloaded models are independent of each other; pickles are ordinary models."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylomin
from pylomin.lazy.tensor import OffloadedTensor

from .common import Mlp, Tied, assert_same, assert_same_parameters, compare, is_ordinary, run, tree, twins

X = torch.linspace(-1, 1, 16).view(2, 8)


@pytest.mark.parametrize("used", [False, True], ids=["cold", "used"])
def test_deepcopy(used: bool) -> None:
    plain, lazy = twins(Mlp())
    if used:
        compare(plain, lazy, X)
    clone = copy.deepcopy(lazy)
    assert all(isinstance(p, OffloadedTensor) for p in clone.parameters())
    assert [type(m) for m in clone.modules()] == [type(m) for m in lazy.modules()]
    compare(plain, clone, X)
    compare(plain, lazy, X)


@pytest.mark.parametrize("which", ["original", "copy"])
@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_writes_to_one_copy_do_not_reach_the_other(which: str, storage: str) -> None:
    plain, lazy = twins(Mlp(), storage=storage)
    clone = copy.deepcopy(lazy)
    changed, kept = (lazy, clone) if which == "original" else (clone, lazy)
    expected = copy.deepcopy(plain)
    for model in (changed, expected):
        with torch.no_grad():
            model.first.weight.mul_(2)
            model.second.weight[0] = 3.0
            model.second.bias.data = torch.ones(8)
            model.norm.weight.data.fill_(0.5)
            model.scale.fill_(2.0)
    compare(plain, kept, X)
    compare(expected, changed, X)


class ClampsItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data.mul_(0.5)
        return x @ self.weight


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_writes_in_the_forward_of_one_copy_do_not_reach_the_other(storage: str) -> None:
    plain, lazy = twins(ClampsItself(), storage=storage)
    clone, plain_clone = copy.deepcopy(lazy), copy.deepcopy(plain)
    for _ in range(2):
        assert_same(run(plain, X), run(lazy, X))
    assert_same_parameters(plain_clone, clone)
    for _ in range(2):
        assert_same(run(plain_clone, X), run(clone, X))


@pytest.mark.parametrize("which", ["original", "copy"])
@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_one_copy_lives_when_the_other_is_gone(which: str, storage: str) -> None:
    plain, lazy = twins(Mlp(), storage=storage)
    with torch.no_grad():
        plain.first.weight.add_(1)
        lazy.first.weight.add_(1)
    clone = copy.deepcopy(lazy)
    kept = clone if which == "original" else lazy
    del lazy, clone
    gc.collect()
    compare(plain, kept, X)


def test_deepcopy_of_written_weights_and_then_writes() -> None:
    plain, lazy = twins(Mlp())
    models = [(plain, lazy)]
    for i in range(3):
        for model in models[-1]:
            with torch.no_grad():
                model.first.weight.add_(i)
        models.append((copy.deepcopy(models[-1][0]), copy.deepcopy(models[-1][1])))
    for model in models[0]:
        with torch.no_grad():
            model.first.weight.zero_()
    for left, right in models:
        assert_same_parameters(left, right)
        compare(left, right, X)


def test_deepcopy_keeps_ties() -> None:
    plain, lazy = twins(Tied())
    clone = copy.deepcopy(lazy)
    assert clone.head.weight is clone.table.weight
    assert clone.head.weight is not lazy.head.weight
    with torch.no_grad():
        clone.head.weight.zero_()
    ids = torch.tensor([[1, 4]])
    compare(plain, lazy, ids)
    assert int(clone(ids).count_nonzero()) == 0


def test_deepcopy_of_a_part() -> None:
    plain, lazy = twins(Mlp())
    part = copy.deepcopy(lazy.first)
    with torch.no_grad():
        part.weight.zero_()
    compare(plain, lazy, X)
    del lazy
    gc.collect()
    assert_same(plain.first.bias.expand(2, -1), run(part, X))


def test_deepcopy_of_a_parameter_and_of_a_list() -> None:
    plain, lazy = twins(Mlp())
    weight, again = copy.deepcopy([lazy.first.weight, lazy.first.weight])
    assert weight is again
    assert isinstance(weight, nn.Parameter)
    with torch.no_grad():
        weight.zero_()
    assert_same_parameters(plain, lazy)


def test_deepcopy_of_half_offloaded_model() -> None:
    model = Mlp()
    plain, lazy = twins(model, skip_modules=[model.first])
    clone = copy.deepcopy(lazy)
    clone.first.weight.data.zero_()
    lazy.first.requires_grad_(False)
    compare(plain, lazy, X)


def test_deepcopy_while_a_forward_runs() -> None:
    class CopiesItself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.copies: list[nn.Module] = []

        def forward(self, x: Tensor) -> Tensor:
            if not self.copies:
                self.copies.append(copy.deepcopy(self))
            return x @ self.weight

    plain, lazy = twins(CopiesItself())
    for model in (plain, lazy):
        run(model, X)
    compare(plain, lazy, X)
    compare(plain.copies[0], lazy.copies[0], X)


def test_deepcopy_of_recurrent_module() -> None:
    plain, lazy = twins(nn.LSTM(8, 4, num_layers=2))
    clone = copy.deepcopy(lazy)
    with torch.no_grad():
        lazy.weight_hh_l0.zero_()
    del lazy
    compare(plain, clone, X[None])


def test_copy_shares_parameters_like_the_plain_one() -> None:
    plain, lazy = twins(nn.Sequential(Mlp()))
    shallow_plain, shallow = copy.copy(plain), copy.copy(lazy)
    assert shallow[0] is lazy[0]
    layer = copy.copy(lazy[0].first)
    assert layer is not lazy[0].first
    assert layer.weight is lazy[0].first.weight
    with torch.no_grad():
        lazy[0].first.weight.mul_(2)
        plain[0].first.weight.mul_(2)
    compare(shallow_plain, shallow, X)
    assert_same(run(plain[0].first, X), run(layer, X))


def test_copy_of_a_recurrent_module() -> None:
    plain, lazy = twins(nn.GRU(8, 4))
    compare(copy.copy(plain), copy.copy(lazy), X[None])


def test_copy_of_a_parameter_is_another_parameter_with_the_same_memory() -> None:
    plain, lazy = twins(nn.Linear(4, 4))
    clones = [copy.copy(model.weight) for model in (plain, lazy)]
    assert clones[1] is not lazy.weight
    for model in (plain, lazy):
        with torch.no_grad():
            model.weight.fill_(1.0)
    assert_same(clones[0].detach(), clones[1].detach())


def test_budget_and_prefetch_are_copied() -> None:
    plain, lazy = twins(Mlp(), memory_budget="1MiB")
    clone = copy.deepcopy(pylomin.prefetch(lazy, depth=2))
    assert pylomin.stats(clone).memory_budget == 1 << 20
    assert pylomin.stats(clone).loads == 0
    for _ in range(3):
        assert_same(run(plain, X), run(clone, X))


# -- pickle ----------------------------------------------------------------------------------------


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: nn.Linear(8, 4), X),
    "mlp": (Mlp, X),
    "tied": (Tied, torch.tensor([[1, 4]])),
    "lstm": (lambda: nn.LSTM(8, 4, num_layers=2, bidirectional=True), X[None]),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), X[None]),
    "channels last": (lambda: nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last), X.view(1, 2, 2, 4)),
    "bfloat16": (lambda: nn.Linear(8, 4).bfloat16(), X.bfloat16()),
    "batch norm": (lambda: nn.BatchNorm1d(8), X),
    "lists": (lambda: nn.ParameterList([torch.ones(3), torch.zeros(2)]), X),
}


@pytest.mark.parametrize("copied", [through_pickle, through_torch])
@pytest.mark.parametrize(("make", "x"), MODELS.values(), ids=MODELS.keys())
def test_pickle_is_an_ordinary_model(make: Callable[[], nn.Module], x: Tensor, copied: Callable[[Any], Any]) -> None:
    model = make()
    reference = copy.deepcopy(model)
    lazy = pylomin.lazy_loading(model)
    loaded = copied(lazy)
    assert is_ordinary(loaded)
    assert list(tree(loaded)) == list(tree(reference))
    for (name, expected), (_, actual) in zip(reference.named_parameters(), loaded.named_parameters(), strict=True):
        assert_same(expected, actual, name)
        assert expected.requires_grad == actual.requires_grad
        assert expected.stride() == actual.stride()
    if not isinstance(reference, nn.ParameterList):
        expected = run(reference, x)
        assert_same(expected, run(loaded, x))
        assert_same(expected, run(lazy, x))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_does_not_mention_pylomin(protocol: int) -> None:
    model = nn.Sequential(Mlp(), nn.LSTM(8, 4), Tied())
    lazy = pylomin.prefetch(pylomin.lazy_loading(model, memory_budget="1MiB"))
    payload = pickle.dumps(lazy, protocol)
    assert b"pylomin" not in payload
    assert b"Offloaded" not in payload
    assert b"Lazy" not in payload
    assert is_ordinary(pickle.loads(payload))


def test_pickle_stores_ties_once() -> None:
    reference, lazy = twins(Tied(rows=1000))
    loaded = through_pickle(lazy)
    assert loaded.head.weight is loaded.table.weight
    expected, actual = io.BytesIO(), io.BytesIO()
    torch.save(reference, expected)
    torch.save(lazy, actual)
    assert actual.tell() < expected.tell() * 1.1


def test_pickle_after_writes_and_conversion() -> None:
    plain, lazy = twins(Mlp())
    for model in (plain, lazy):
        with torch.no_grad():
            model.first.weight.mul_(2)
        model.half()
    assert_same_parameters(plain, through_pickle(lazy))


def test_pickle_changes_nothing() -> None:
    plain, lazy = twins(Mlp())
    through_pickle(lazy)
    assert all(isinstance(p, OffloadedTensor) for p in lazy.parameters())
    compare(plain, lazy, X)


def test_pickled_model_can_be_offloaded_again() -> None:
    plain, lazy = twins(Mlp())
    again = pylomin.lazy_loading(through_pickle(lazy))
    compare(plain, again, X)


def test_pickle_of_a_parameter_and_of_a_view() -> None:
    plain, lazy = twins(nn.Linear(8, 4))
    weight, row = through_pickle((lazy.weight, lazy.weight.detach()[1:3]))
    assert type(weight) is nn.Parameter
    assert type(row) is Tensor
    assert_same(plain.weight.detach(), weight.detach())
    assert_same(plain.weight[1:3], row)


def test_pickle_of_a_users_subclass_with_reduce() -> None:
    assert_same(run(Reduces(3), X), run(through_pickle(pylomin.lazy_loading(Reduces(3))), X))


class Reduces(nn.Linear):
    """Pickles by its arguments, not by its state."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(8, 4)
        self.seed = seed
        self.handle = (i for i in range(3))  # cannot be pickled

    def __reduce__(self) -> Any:
        return (Reduces, (self.seed,))

    def __deepcopy__(self, memo: dict[int, Any]) -> Reduces:
        return Reduces(self.seed)


def test_users_deepcopy() -> None:
    lazy = pylomin.lazy_loading(Reduces(3))
    assert_same(run(Reduces(3), X), run(copy.deepcopy(lazy), X))
    assert copy.deepcopy(lazy).seed == 3


class CountsCopies(nn.Linear):
    """Has its own idea of what a copy is."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> CountsCopies:
        clone = CountsCopies(self.in_features, self.out_features)
        clone.load_state_dict(self.state_dict())
        clone.copies = self.copies + 1
        return clone


def test_users_deepcopy_is_called() -> None:
    model = CountsCopies(8, 4)
    x = X
    expected = run(model, x)
    lazy = pylomin.lazy_loading(model)
    clone = copy.deepcopy(lazy)
    assert clone.copies == 1
    assert_same(expected, run(clone, x))


def test_getstate_and_setstate_of_the_user() -> None:
    lazy = pylomin.lazy_loading(WithState())
    for copied in (copy.deepcopy, through_pickle):
        clone = copied(lazy)
        assert clone.restored
        assert not hasattr(clone, "handle")
        assert_same(run(lazy, X), run(clone, X))


class WithState(nn.Linear):
    """Keeps something that cannot be copied."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.handle = (i for i in range(3))
        self.restored = False

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.restored = True


def test_hooks_are_copied_with_the_model() -> None:
    plain, lazy = twins(Hooked())
    compare(copy.deepcopy(plain), copy.deepcopy(lazy), X)


class Hooked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 4)
        self.register_forward_hook(double_output)


def double_output(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


def test_copies_leave_nothing_behind(scratch: Path) -> None:
    lazy = pylomin.lazy_loading(Mlp())
    with torch.no_grad():
        lazy.first.weight.add_(1)
    clones = [copy.deepcopy(lazy) for _ in range(3)]
    for clone in clones:
        with torch.no_grad():
            clone.first.weight.add_(1)
        run(clone, X)
    del lazy, clones, clone
    gc.collect()
    assert list(scratch.iterdir()) == []
