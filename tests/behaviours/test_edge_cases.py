"""Corners: in-place changes of geometry, arrays that share memory, odd classes, things kept from inside a forward."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pylomin
from pylomin.lazy.tensor import OffloadedTensor

from .common import Mlp, assert_same, assert_same_parameters, check, compare, is_ordinary, outcome, run, twins

X = torch.linspace(-1, 1, 16).view(2, 8)

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # torch's own, about NumPy 2

GEOMETRY: dict[str, Callable[[Tensor], Any]] = {
    "t_": lambda w: w.t_(),
    "transpose_": lambda w: w.transpose_(0, 1),
    "unsqueeze_": lambda w: w.unsqueeze_(0),
    "squeeze_": lambda w: w.squeeze_(0),
    "swapaxes_": lambda w: w.swapaxes_(0, 1),
    "as_strided_": lambda w: w.as_strided_((2, 2), (2, 1)),
    "resize_": lambda w: w.resize_(2, 3),
    "resize_ larger": lambda w: w.resize_(20, 20),
    "resize_as_": lambda w: w.resize_as_(torch.ones(2, 3)),
    "set_": lambda w: w.set_(torch.ones(2, 3)),
    "set_ same shape": lambda w: w.set_(torch.ones(4, 6)),
    "set_ nothing": lambda w: w.set_(),
    "detach_": lambda w: w.detach_(),
    "resize_ same": lambda w: w.resize_(4, 6),
    "squeeze_ nothing": lambda w: w.squeeze_(),
}


@pytest.mark.parametrize("on", ["parameter", "data", "detached", "view"])
@pytest.mark.parametrize("change", GEOMETRY.values(), ids=GEOMETRY.keys())
def test_change_of_geometry_is_like_torch_or_refused(change: Callable[[Tensor], Any], on: str) -> None:
    plain, lazy = twins(nn.Linear(6, 4))
    targets = []
    for model in (plain, lazy):
        weight = model.weight
        targets.append({"parameter": weight, "data": weight.data, "detached": weight.detach(), "view": weight[:]}[on])
    with torch.no_grad():
        expected, actual = outcome(change, targets[0]), outcome(change, targets[1])
    if isinstance(actual, tuple):
        assert isinstance(expected, tuple) or actual[0] == "OffloadedWriteError"
        compare(*twins(nn.Linear(6, 4)), torch.ones(1, 6))
        return
    assert_same(targets[0], targets[1])
    assert targets[0].stride() == targets[1].stride()
    assert_same(plain.weight.detach(), lazy.weight.detach())
    assert plain.weight.stride() == lazy.weight.stride()


@pytest.mark.parametrize(
    "array_of",
    [
        lambda w: w.numpy(),
        np.asarray,
        lambda w: np.asarray(w[1:3]),
        lambda w: w[1].numpy(),
    ],
    ids=["numpy", "asarray", "asarray of rows", "numpy of a row"],
)
def test_writing_to_an_array_reaches_the_weight_or_is_refused(array_of: Callable[[Tensor], np.ndarray]) -> None:
    plain, lazy = twins(nn.Linear(6, 4))
    array_of(plain.weight.detach())[...] = 3.0
    try:
        array_of(lazy.weight.detach())[...] = 3.0
    except ValueError as error:
        assert "read-only" in str(error)  # noqa: PT017
        return
    assert_same(plain.weight, lazy.weight)


def test_array_that_is_copied_can_be_written() -> None:
    lazy = pylomin.lazy_loading(nn.Linear(6, 4))
    array = np.array(lazy.weight.detach())
    array[...] = 3.0
    assert not (lazy.weight.detach().numpy() == 3.0).any()


# -- optimizers without backward -------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
        lambda p: torch.optim.Adam(p, lr=0.1, foreach=True),
    ],
    ids=["SGD", "AdamW", "SGD foreach", "Adam foreach"],
)
def test_optimizer_with_gradients_assigned_by_hand(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    plain, lazy = twins(Mlp())
    optimizers = [make(list(model.parameters())) for model in (plain, lazy)]
    for _ in range(3):
        for model, optimizer in zip((plain, lazy), optimizers, strict=True):
            torch.manual_seed(4)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
            optimizer.zero_grad()
        compare(plain, lazy, X)


def test_zeroth_order_training() -> None:
    plain, lazy = twins(Mlp())
    for step in range(3):
        for model in (plain, lazy):
            with torch.no_grad():
                for sign in (1, -2, 1):
                    torch.manual_seed(step)
                    for parameter in model.parameters():
                        parameter.add_(torch.randn_like(parameter), alpha=0.01 * sign)
                    model(X)
        compare(plain, lazy, X)


# -- things kept from inside a forward -------------------------------------------------------------


class Keeps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.weight
        return x @ self.weight


def test_parameter_kept_in_a_forward_is_copied_and_pickled_as_ordinary() -> None:
    plain, lazy = twins(nn.Sequential(Keeps()))
    for model in (plain, lazy):
        run(model, X)
    clone = copy.deepcopy(lazy)
    assert_same(plain[0].kept, clone[0].kept)
    payload = pickle.dumps(lazy)
    assert b"pylomin" not in payload
    loaded = pickle.loads(payload)
    assert_same(plain[0].kept.detach(), loaded[0].kept.detach())
    assert is_ordinary(loaded)


def test_parameter_registered_elsewhere_in_a_forward() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            object.__setattr__(self, "other", nn.Linear(8, 8, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            self.other.weight = self.weight
            return self.other(x)

    plain, lazy = twins(Shares())
    for model in (plain, lazy):
        run(model, X)
    for _ in range(2):
        assert_same(run(plain, X), run(lazy, X))
        assert_same(run(plain.other, X), run(lazy.other, X))


def test_parameter_is_the_same_object_within_a_forward() -> None:
    class Compares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            assert self.weight is self.weight
            assert isinstance(self.weight, nn.Parameter)
            assert len({self.weight, self.weight}) == 1
            assert "weight" in dict(self.named_parameters())
            assert torch.equal(next(self.parameters()), self.weight)
            return x @ self.weight

    check(Compares(), X)


# -- classes ---------------------------------------------------------------------------------------


class Registers(nn.Linear):
    """A base class that wants to know its subclasses, and asks for an argument."""

    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, *, key: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.known.append(cls)


class Registered(Registers, key="a"):
    pass


def test_class_that_counts_its_subclasses() -> None:
    check(Registered(8, 8), X)
    assert Registers.known == [Registered]


class Strict(nn.Linear):
    """Refuses attributes that it does not know."""

    def __setattr__(self, name: str, value: Any) -> None:
        if self.__dict__.get("_sealed") and name not in self.__dict__:
            raise AttributeError(f"{name} is not allowed")
        super().__setattr__(name, value)

    def __init__(self) -> None:
        super().__init__(8, 8)
        self._sealed = True


def test_class_that_refuses_attributes() -> None:
    lazy = check(Strict(), X)
    assert is_ordinary(pylomin.restore(lazy))


def test_class_with_a_metaclass_and_generic() -> None:
    import abc
    from typing import Generic, TypeVar

    T = TypeVar("T")

    class Base(nn.Module, abc.ABC, Generic[T]):
        @abc.abstractmethod
        def transform(self, x: T) -> T: ...

    class Concrete(Base[Tensor]):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def transform(self, x: Tensor) -> Tensor:
            return x @ self.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.transform(x)

    check(Concrete(), X)


def test_class_that_compares_its_own_type() -> None:
    class Exact(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self, Exact)
            assert self.__class__.__module__ == __name__
            return super().forward(x)

    check(Exact(8, 8), X)


def test_class_that_uses_super_without_arguments_and_private_names() -> None:
    class Private(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.__factor = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.__factor

    check(Private(), X)


def test_signature_of_forward_is_kept() -> None:
    plain, lazy = twins(nn.MultiheadAttention(8, 2))
    assert inspect.signature(lazy.forward) == inspect.signature(plain.forward)
    assert inspect.signature(lazy.out_proj.forward) == inspect.signature(plain.out_proj.forward)
    assert lazy.out_proj.forward.__doc__ == plain.out_proj.forward.__doc__
    assert inspect.getsource(lazy.out_proj.forward) == inspect.getsource(plain.out_proj.forward)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_module_is_refused_or_works() -> None:
    model = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    expected = run(model, X)
    result = outcome(pylomin.lazy_loading, model)
    if isinstance(result, tuple):
        assert result[0] == "PassError"
    assert_same(expected, run(model, X))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_module_inside_a_model() -> None:
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8)))
    expected = run(model, X)
    result = outcome(pylomin.lazy_loading, model)
    if isinstance(result, tuple):
        assert result[0] == "PassError"
        assert "1." in result[1]
    assert_same(expected, run(model, X))


def test_compiled_module_is_offloaded_through_its_wrapper() -> None:
    model = Mlp()
    expected = run(model.requires_grad_(False), X)
    compiled = torch.compile(model, backend="eager")
    lazy = pylomin.lazy_loading(compiled)
    assert isinstance(model.first.weight, OffloadedTensor)
    for _ in range(2):
        assert_same(expected, run(lazy, X))
    torch._dynamo.reset()


# -- other ways to make modules of weights ---------------------------------------------------------


def test_embedding_from_pretrained() -> None:
    plain, lazy = twins(nn.Embedding(10, 8))
    ids = torch.tensor([1, 9])
    for make in (nn.Embedding.from_pretrained, nn.EmbeddingBag.from_pretrained):
        made = [make(model.weight) for model in (plain, lazy)]
        args = (ids,) if make == nn.Embedding.from_pretrained else (ids, torch.tensor([0, 1]))
        assert_same(run(made[0], *args), run(made[1], *args))


def test_recurrent_weight_replaced() -> None:
    plain, lazy = twins(nn.LSTM(8, 4, num_layers=2))
    for model in (plain, lazy):
        model.weight_hh_l0 = nn.Parameter(torch.ones(16, 4), requires_grad=False)
        model._parameters["bias_hh_l1"] = nn.Parameter(torch.ones(16), requires_grad=False)
        model.flatten_parameters()
        model._init_flat_weights()
    compare(plain, lazy, X[None])
    assert [len(group) for group in lazy.all_weights] == [4, 4]
    assert_same(plain.all_weights[0][0], lazy.all_weights[0][0])


def test_recurrent_module_restored_after_changes() -> None:
    plain, lazy = twins(nn.GRU(8, 4))
    for model in (plain, lazy):
        with torch.no_grad():
            model.weight_hh_l0.mul_(0.5)
        model.double()
    restored = pylomin.restore(lazy)
    assert all(left is right for left, right in zip(restored._flat_weights, restored.parameters(), strict=True))
    assert_same(run(plain, X[None].double()), run(restored, X[None].double()))


def test_save_in_the_old_format() -> None:
    plain, lazy = twins(Mlp())
    buffer = io.BytesIO()
    torch.save(lazy.state_dict(), buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    assert_same(dict(plain.state_dict()), dict(torch.load(buffer, weights_only=True)))


def test_parameters_with_odd_names() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight#1", "data", "ünï", "a b", "forward_weight", "_private", "x" * 300):
                self.register_parameter(name, nn.Parameter(torch.randn(8)))

        def forward(self, x: Tensor) -> Tensor:
            for parameter in self._parameters.values():
                x = x * parameter
            return x

    lazy = check(Odd(), X)
    with torch.no_grad():
        lazy._parameters["weight#1"].fill_(2.0)
    assert float(lazy._parameters["weight#1"].sum()) == 16.0


def test_module_with_thousands_of_parameters() -> None:
    plain, lazy = twins(nn.ParameterList([torch.full((2,), float(i)) for i in range(2000)]))
    assert_same(sum(plain), sum(lazy))


def test_model_that_contains_itself_in_an_attribute() -> None:
    class Cyclic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            object.__setattr__(self.layer, "parent", self)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer.parent.layer(x)

    plain, lazy = twins(Cyclic())
    compare(plain, lazy, X)
    clone = copy.deepcopy(lazy)
    assert clone.layer.parent is clone
    assert is_ordinary(pylomin.restore(lazy))


def test_lazy_loading_of_a_single_parameter_list_and_dict() -> None:
    for make in (lambda: nn.ParameterList([torch.ones(2)]), lambda: nn.ParameterDict({"a": torch.ones(2)})):
        plain, lazy = twins(make())
        assert_same_parameters(plain, lazy)
        assert is_ordinary(pylomin.restore(lazy))


def test_dropout_and_random_state_are_untouched() -> None:
    plain, lazy = twins(nn.Sequential(Mlp(), nn.Dropout(0.5)).train())
    for model in (plain, lazy):
        torch.manual_seed(3)
        model.random = [run(model, X), torch.get_rng_state()]
    torch.manual_seed(3)
    with torch.no_grad():
        plain(X)
        expected = torch.rand(3)
        torch.manual_seed(3)
        lazy(X)
        assert_same(expected, torch.rand(3))


def test_offloading_consumes_no_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    lazy = pylomin.restore(pylomin.lazy_loading(nn.LayerNorm(4)))
    torch.manual_seed(3)
    pylomin.lazy_loading(lazy)
    assert_same(expected, torch.rand(3))


def test_gradient_assigned_before_offloading_is_refused_by_name() -> None:
    model = Mlp()
    model.norm.bias.grad = torch.ones(16)
    with pytest.raises(pylomin.PassError, match=r"parameter 'norm\.bias' has a gradient"):
        pylomin.lazy_loading(model)
    pylomin.lazy_loading(model, skip_modules=[model.norm])


def test_hook_on_a_parameter_before_offloading() -> None:
    """The hook of a gradient that no longer exists may be refused or dropped, but must come back with restore."""
    model = nn.Linear(8, 8)
    calls: list[Tensor] = []
    model.weight.register_hook(lambda grad: calls.append(grad))
    result = outcome(pylomin.lazy_loading, model)
    if isinstance(result, tuple):
        assert result[0] == "PassError"
        return
    assert torch.isfinite(run(model, X)).all()
    pylomin.restore(model)
    model(X).sum().backward()
    assert len(calls) == 1
