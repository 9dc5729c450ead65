"""What users put in the place of an offloaded weight or module wins."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import pylomin
from pylomin.lazy.tensor import OffloadedTensor

from .common import Mlp, Tied, assert_same, assert_same_parameters, check, compare, outcome, run, twins


def test_parameter_replaced_by_assignment() -> None:
    plain, lazy = twins(Mlp())
    weight = torch.randn(16, 8)
    for model in (plain, lazy):
        model.first.weight = nn.Parameter(weight.clone(), requires_grad=False)
    assert type(lazy.first.weight) is nn.Parameter
    assert_same(dict(plain.named_parameters()), {n: p.detach() for n, p in lazy.named_parameters()})
    compare(plain, lazy, torch.randn(2, 8))


def test_parameter_replaced_in_the_dictionary() -> None:
    plain, lazy = twins(Mlp())
    weight = nn.Parameter(torch.randn(16, 8), requires_grad=False)
    for model in (plain, lazy):
        model.first._parameters["weight"] = weight
    compare(plain, lazy, torch.randn(2, 8))


def test_replaced_parameter_trains() -> None:
    plain, lazy = twins(Mlp())
    weight = torch.randn(16, 8)
    for model in (plain, lazy):
        model.first.weight = nn.Parameter(weight.clone())
        run(model, torch.ones(2, 8), grad=True).sum().backward()
    assert_same(plain.first.weight.grad, lazy.first.weight.grad)


def test_parameter_set_to_none_deleted_and_registered() -> None:
    plain, lazy = twins(Mlp())
    for model in (plain, lazy):
        model.first.bias = None
        del model.second.bias
        model.second.register_parameter("bias", nn.Parameter(torch.ones(8), requires_grad=False))
        model.second.register_parameter("extra", None)
        model.norm.register_parameter("extra", nn.Parameter(torch.zeros(3), requires_grad=False))
    assert list(plain.state_dict()) == list(lazy.state_dict())
    compare(plain, lazy, torch.randn(2, 8))


def test_deleted_parameter_is_gone() -> None:
    plain, lazy = twins(nn.Linear(4, 4))
    for model in (plain, lazy):
        del model.weight
    assert not hasattr(lazy, "weight")
    assert outcome(getattr, plain, "weight") == tuple(
        text.replace("Lazy", "") for text in outcome(getattr, lazy, "weight")
    )
    assert list(lazy.state_dict()) == ["bias"]


def test_weight_set_to_a_plain_tensor_is_refused_like_in_torch() -> None:
    plain, lazy = twins(nn.Linear(4, 4))
    for value in (torch.ones(4, 4), 3, "x"):
        assert outcome(setattr, plain, "weight", value) == outcome(setattr, lazy, "weight", value)


def test_weight_turned_into_a_plain_attribute() -> None:
    plain, lazy = twins(nn.Linear(4, 4))
    for model in (plain, lazy):
        del model.weight
        model.weight = torch.eye(4)
    assert_same(run(plain, torch.ones(2, 4)), run(lazy, torch.ones(2, 4)))
    assert list(lazy.state_dict()) == ["bias"]


def test_weight_turned_into_a_buffer() -> None:
    plain, lazy = twins(nn.Linear(4, 4))
    for model in (plain, lazy):
        del model.weight
        model.register_buffer("weight", torch.eye(4))
    compare(plain, lazy, torch.ones(2, 4))


def test_one_slot_of_a_tie_replaced() -> None:
    plain, lazy = twins(Tied())
    for model in (plain, lazy):
        model.head.weight = nn.Parameter(torch.ones(20, 8), requires_grad=False)
    compare(plain, lazy, torch.tensor([[1, 4]]))


def test_tie_made_after_offloading() -> None:
    class Untied(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight = nn.Parameter(torch.randn(20, 8))

    plain, lazy = twins(Untied())
    for model in (plain, lazy):
        model.head.weight = model.table.weight
    compare(plain, lazy, torch.tensor([[1, 4]]))
    for model in (plain, lazy):
        with torch.no_grad():
            model.table.weight.mul_(2)
    compare(plain, lazy, torch.tensor([[1, 4]]))
    restored = pylomin.restore(lazy)
    assert restored.head.weight is restored.table.weight


def test_offloaded_parameter_moved_to_another_module() -> None:
    plain, lazy = twins(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    for model in (plain, lazy):
        model[0].weight, model[1].weight = model[1].weight, model[0].weight
    compare(plain[0], lazy[0], torch.randn(2, 4))
    compare(plain[1], lazy[1], torch.randn(2, 4))


def test_offloaded_parameter_given_to_a_new_module() -> None:
    plain, lazy = twins(nn.Linear(4, 4, bias=False))
    other = nn.Linear(4, 4, bias=False)
    other.weight = lazy.weight
    x = torch.randn(2, 4)
    assert_same(run(plain, x), run(other, x))


def test_submodule_swapped() -> None:
    plain, lazy = twins(Mlp())
    for model in (plain, lazy):
        torch.manual_seed(3)
        model.first = nn.Linear(8, 16).requires_grad_(False)
        model.norm = nn.Identity()
    compare(plain, lazy, torch.randn(2, 8))
    lazy.first.weight.data.fill_(1.0)
    pylomin.restore(lazy)
    assert float(lazy.first.weight[0, 0]) == 1.0


def test_submodule_moved_and_module_added() -> None:
    plain, lazy = twins(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    extra = nn.Linear(4, 4).requires_grad_(False)
    for model in (plain, lazy):
        model[0], model[1] = model[1], model[0]
        model.append(extra)
        model.insert(0, nn.Tanh())
    compare(plain, lazy, torch.randn(2, 4))


def test_offloaded_submodule_used_in_another_model() -> None:
    plain, lazy = twins(Mlp())
    x = torch.randn(2, 8)
    expected = run(nn.Sequential(plain.first, plain.norm), x)
    part = nn.Sequential(lazy.first, lazy.norm)
    del lazy
    for _ in range(2):
        assert_same(expected, run(part, x))


def test_new_module_offloaded_later() -> None:
    plain, lazy = twins(Mlp())
    torch.manual_seed(1)
    new = nn.Linear(8, 16)
    plain.first = copy.deepcopy(new).requires_grad_(False)
    lazy.first = new
    lazy = pylomin.lazy_loading(lazy)
    assert all(isinstance(p, OffloadedTensor) for p in lazy.parameters())
    compare(plain, lazy, torch.randn(2, 8))


def test_skip_modules() -> None:
    model = Mlp()
    plain, lazy = twins(model, skip_modules=[model.first])
    assert type(lazy.first) is nn.Linear
    assert type(lazy.first.weight) is nn.Parameter
    assert lazy.first.weight.requires_grad
    assert_same(run(plain, torch.ones(2, 8)), run(lazy, torch.ones(2, 8)))


# -- functional_call -------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_functional_call_with_all_replacements(strict: bool) -> None:
    plain, lazy = twins(Mlp())
    replacements = {name: torch.randn_like(value) for name, value in Mlp().state_dict().items()}
    x = torch.randn(2, 8)
    for _ in range(2):
        expected = functional_call(plain, replacements, x, strict=strict)
        assert_same(expected, functional_call(lazy, replacements, x, strict=strict))
    compare(plain, lazy, x)


def test_functional_call_with_some_replacements() -> None:
    plain, lazy = twins(Mlp())
    replacements = {"first.weight": torch.randn(16, 8), "scale": torch.ones(8)}
    x = torch.randn(2, 8)
    assert_same(functional_call(plain, replacements, x), functional_call(lazy, replacements, x))
    compare(plain, lazy, x)
    assert isinstance(lazy.first.weight, OffloadedTensor)


def test_functional_call_of_tied_weights() -> None:
    plain, lazy = twins(Tied())
    x = torch.tensor([[1, 4]])
    replacements = {"table.weight": torch.randn(20, 8)}
    for tie in (True, False):
        expected = functional_call(plain, replacements, x, tie_weights=tie)
        assert_same(expected, functional_call(lazy, replacements, x, tie_weights=tie))
    compare(plain, lazy, x)


def test_functional_call_with_its_own_parameters() -> None:
    plain, lazy = twins(nn.Sequential(Mlp(), nn.Linear(8, 4)))
    x = torch.randn(2, 8)
    expected = functional_call(plain, dict(plain.named_parameters()), x)
    assert_same(expected, functional_call(lazy, dict(lazy.named_parameters()), x))
    assert_same(expected, functional_call(lazy, lazy.state_dict(), x))
    assert_same(expected, functional_call(plain, lazy.state_dict(), x))


def test_functional_call_that_raises_puts_everything_back() -> None:
    plain, lazy = twins(Mlp())
    with pytest.raises(RuntimeError):
        functional_call(lazy, {"first.weight": torch.ones(1, 1, 1)}, torch.randn(2, 8))
    compare(plain, lazy, torch.randn(2, 8))


@pytest.mark.parametrize("make", [Mlp, lambda: nn.GRU(8, 4), lambda: nn.MultiheadAttention(8, 2)])
def test_functional_call_of_other_modules(make: Any) -> None:
    model = make()
    plain, lazy = twins(model)
    replacements = {name: torch.randn_like(value) for name, value in plain.named_parameters()}
    x = torch.randn(3, 2, 8)
    args = (x, x, x) if isinstance(model, nn.MultiheadAttention) else (x,)
    assert_same(functional_call(plain, replacements, args), functional_call(lazy, replacements, args))


def test_grad_of_replacements() -> None:
    plain, lazy = twins(Mlp())
    x = torch.randn(2, 8)
    parameters = {name: value.detach().clone() for name, value in plain.named_parameters()}

    def gradients(model: nn.Module) -> Any:
        return torch.func.grad(lambda p: functional_call(model, p, (x,)).sum())(parameters)

    assert_same(gradients(plain), gradients(lazy))


def test_grad_of_some_replacements() -> None:
    plain, lazy = twins(Mlp())
    x = torch.randn(2, 8)

    def gradient(model: nn.Module) -> Tensor:
        return torch.func.grad(lambda w: functional_call(model, {"first.weight": w}, (x,)).sum())(torch.ones(16, 8))

    assert_same(gradient(plain), gradient(lazy))


def test_vmap_over_replacements() -> None:
    plain, lazy = twins(Mlp())
    x = torch.randn(2, 8)
    stacked = {name: torch.randn(3, *value.shape) for name, value in plain.named_parameters()}

    def outputs(model: nn.Module) -> Tensor:
        return torch.vmap(lambda p: functional_call(model, p, (x,)))(stacked)

    assert_same(outputs(plain), outputs(lazy))


def test_stack_module_state() -> None:
    models = [twins(Mlp()) for _ in range(2)]
    expected = torch.func.stack_module_state([plain for plain, _ in models])
    actual = torch.func.stack_module_state([lazy for _, lazy in models])
    assert_same([dict(part) for part in expected], [dict(part) for part in actual])


class Masked(nn.Linear):
    """A user's subclass that reads its weight in a property."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)))

    @property
    def masked(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.masked, self.bias)


def test_users_subclass_of_linear() -> None:
    plain, lazy = twins(Masked())
    assert isinstance(lazy, Masked)
    compare(plain, lazy, torch.randn(2, 4))
    assert_same(plain.masked, lazy.masked)


def test_class_with_getattr_slots_and_descriptors() -> None:
    class Odd(nn.Module):
        kind = "odd"

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def __getattr__(self, name: str) -> Any:
            return 2.0 if name == "factor" else super().__getattr__(name)

        def __call__(self, x: Tensor) -> Tensor:
            return super().__call__(x) * self.factor

        def forward(self, x: Tensor) -> Tensor:
            assert type(self).kind == "odd"
            return x @ self.weight

    check(Odd(), torch.randn(2, 4))


def test_class_that_forbids_attributes_and_compares_by_value() -> None:
    class ByValue(nn.Linear):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, ByValue) and self.in_features == other.in_features

        def __hash__(self) -> int:
            return hash(self.in_features)

    check(nn.Sequential(ByValue(4, 4), nn.Tanh(), ByValue(4, 4)), torch.randn(2, 4))


def test_forward_set_on_the_instance() -> None:
    plain, lazy = twins(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    for model in (plain, lazy):
        layer = model[0]
        layer.forward = lambda x, layer=layer: nn.functional.linear(x, layer.weight) * 2
    compare(plain, lazy, torch.randn(2, 4))


def test_forward_set_on_the_instance_before_offloading() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    layer = model[0]
    original = layer.forward
    layer.forward = lambda x: original(x) * 2  # closes over this very layer
    x = torch.randn(2, 4)
    expected = run(model, x)
    lazy = pylomin.lazy_loading(model)
    for _ in range(2):
        assert_same(expected, run(lazy, x))
    assert_same_parameters(pylomin.restore(lazy), lazy)
    assert_same(expected, run(lazy, x))
