"""What ``nn.Module`` can do to all of its parameters at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pylomin
from pylomin.lazy.tensor import OffloadedTensor

from .common import Mlp, Tied, assert_same, assert_same_parameters, compare, outcome, resident_bytes, run, twins

Convert = Callable[[nn.Module], nn.Module]

CONVERSIONS: dict[str, tuple[Convert, torch.dtype]] = {
    "to half": (lambda m: m.to(torch.float16), torch.float16),
    "half": (lambda m: m.half(), torch.float16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "double": (lambda m: m.double(), torch.float64),
    "float": (lambda m: m.float(), torch.float32),
    "type": (lambda m: m.type(torch.float64), torch.float64),
    "type string": (lambda m: m.type("torch.DoubleTensor"), torch.float64),
    "type class": (lambda m: m.type(torch.HalfTensor), torch.float16),
    "to device and dtype": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "to tensor": (lambda m: m.to(torch.ones(1, dtype=torch.float64)), torch.float64),
    "round trip": (lambda m: m.half().float(), torch.float32),
    "round trip bfloat16": (lambda m: m.bfloat16().double().half(), torch.float16),
    "wider and back": (lambda m: m.double().float(), torch.float32),
    "cpu": (lambda m: m.cpu(), torch.float32),
    "to nothing new": (lambda m: m.to("cpu", torch.float32, non_blocking=True), torch.float32),
    "apply": (lambda m: m.apply(lambda layer: None), torch.float32),
    "_apply": (lambda m: m._apply(lambda t: t * 2), torch.float32),
    "_apply in place": (lambda m: m._apply(lambda t: t.mul_(2)), torch.float32),
    "_apply to double": (lambda m: m._apply(lambda t: t.double() + 1), torch.float64),
    "share memory": (lambda m: m.share_memory(), torch.float32),
    "train": (lambda m: m.train(), torch.float32),
    "eval": (lambda m: m.eval(), torch.float32),
    "requires grad": (lambda m: m.requires_grad_(False), torch.float32),
}


@pytest.mark.parametrize("used", [False, True], ids=["cold", "used"])
@pytest.mark.parametrize(("convert", "dtype"), CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_conversion(convert: Convert, dtype: torch.dtype, used: bool) -> None:
    plain, lazy = twins(Mlp())
    if used:
        compare(plain, lazy, torch.randn(2, 8))
    with torch.no_grad():
        plain, converted = convert(plain), convert(lazy)
    assert converted is lazy
    assert all(parameter.dtype == dtype for parameter in lazy.parameters())
    assert all(isinstance(parameter, OffloadedTensor) for parameter in lazy.parameters())
    assert all(isinstance(parameter, nn.Parameter) for parameter in lazy.parameters())
    compare(plain, lazy, torch.randn(2, 8, dtype=dtype))


def test_conversion_reads_nothing() -> None:
    lazy = pylomin.lazy_loading(Mlp())
    lazy.half().to(torch.float64).cpu()
    assert pylomin.stats(lazy).bytes_read == 0


def test_conversion_of_one_module() -> None:
    plain, lazy = twins(Mlp())
    for model in (plain, lazy):
        model.first.double()
    assert_same_parameters(plain, lazy)
    assert lazy.second.weight.dtype == torch.float32


@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.double().half()], ids=["half", "twice"])
def test_conversion_keeps_ties(convert: Convert) -> None:
    plain, lazy = (convert(model) for model in twins(Tied()))
    assert plain.head.weight is plain.table.weight
    assert lazy.head.weight is lazy.table.weight
    compare(plain, lazy, torch.tensor([[1, 5]]))


def test_write_after_conversion() -> None:
    plain, lazy = (model.half() for model in twins(Mlp()))
    for model in (plain, lazy):
        with torch.no_grad():
            model.first.weight.add_(0.1)
            model.second.weight[0] = 1.0
    compare(plain, lazy, torch.randn(2, 8, dtype=torch.float16))


def test_conversion_after_write() -> None:
    plain, lazy = twins(Mlp())
    for model in (plain, lazy):
        with torch.no_grad():
            model.first.weight.add_(0.1)
        model.half()
        with torch.no_grad():
            model.first.weight.mul_(2)
        model.float()
    compare(plain, lazy, torch.randn(2, 8))


def test_converted_weight_does_not_follow_the_old_one() -> None:
    plain, lazy = twins(nn.Linear(4, 4))
    halves = [model.weight.half() for model in (plain, lazy)]
    with torch.no_grad():
        for model in (plain, lazy):
            model.weight.zero_()
    assert_same(halves[0], halves[1])
    with torch.no_grad():
        for half in halves:
            half.fill_(2.0)
    assert_same(plain.weight, lazy.weight)
    assert_same(halves[0], halves[1])


def test_two_copies_of_one_conversion_are_two_tensors() -> None:
    plain, lazy = twins(nn.Linear(4, 4))
    pairs = [(model.weight.half(), model.weight.half()) for model in (plain, lazy)]
    for first, _ in pairs:
        first.zero_()
    assert_same(pairs[0][1], pairs[1][1])


def test_copy_without_conversion_is_a_copy() -> None:
    plain, lazy = twins(nn.Linear(4, 4))
    for model in (plain, lazy):
        model.weight.to(torch.float32, copy=True).zero_()
        model.weight.to("cpu", copy=True).zero_()
        torch.asarray(model.weight, copy=True).zero_()
    assert_same_parameters(plain, lazy)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_each_dtype_in_recurrent_and_convolutional_modules(dtype: torch.dtype) -> None:
    plain, lazy = (m.to(dtype) for m in twins(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(6, 4))))
    compare(plain, lazy, torch.randn(2, 4, 8).to(dtype))
    if not dtype.is_complex:
        plain, lazy = (m.to(dtype) for m in twins(nn.LSTM(4, 5)))
        compare(plain, lazy, torch.randn(3, 2, 4, dtype=dtype))


def test_channels_last_3d() -> None:
    plain, lazy = (m.to(memory_format=torch.channels_last_3d) for m in twins(nn.Conv3d(2, 4, 3)))
    assert lazy.weight.stride() == plain.weight.stride()
    compare(plain, lazy, torch.randn(1, 2, 5, 5, 5))


def test_channels_last_and_half_at_once() -> None:
    plain, lazy = (m.to(torch.float64, memory_format=torch.channels_last) for m in twins(nn.Conv2d(2, 4, 3)))
    assert lazy.weight.stride() == plain.weight.stride()
    compare(plain, lazy, torch.randn(1, 2, 5, 5, dtype=torch.float64))


def test_to_meta() -> None:
    plain, lazy = twins(Tied())
    for model in (plain, lazy):
        assert model.to("meta") is model
    assert all(p.device.type == "meta" for p in lazy.parameters())
    assert [p.shape for p in lazy.parameters()] == [p.shape for p in plain.parameters()]
    assert outcome(lazy, torch.ones(1, 2, dtype=torch.long, device="meta")).shape == (1, 2, 20)


def test_to_empty_and_load() -> None:
    plain, lazy = twins(Mlp())
    state = Mlp().state_dict()
    for model in (plain, lazy):
        assert model.to_empty(device="cpu") is model
        model.load_state_dict(state)
    for _ in range(2):
        x = torch.randn(2, 8)
        assert_same(run(plain, x), run(lazy, x))


def test_to_meta_and_to_empty_and_load() -> None:
    plain, lazy = twins(Mlp())
    state = Mlp().state_dict()
    for model in (plain, lazy):
        model.to("meta").to_empty(device="cpu")
        model.load_state_dict(state)
    x = torch.randn(2, 8)
    assert_same(run(plain, x), run(lazy, x))


def test_to_a_device_that_does_not_exist() -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    plain, lazy = twins(Mlp())
    assert outcome(plain.cuda)[0] == outcome(lazy.cuda)[0]
    assert outcome(plain.to, "cuda")[0] == outcome(lazy.to, "cuda")[0]
    compare(plain, lazy, torch.randn(2, 8))


def test_requires_grad_is_refused() -> None:
    lazy = pylomin.lazy_loading(Mlp())
    for enable in (lazy.requires_grad_, lazy.first.weight.requires_grad_, lambda: lazy.first.requires_grad_(True)):
        with pytest.raises(pylomin.OffloadedWriteError, match=r"is offloaded and cannot require grad.*skip_modules"):
            enable()
    with pytest.raises(pylomin.OffloadedWriteError, match="cannot require grad"):
        lazy.first.weight.requires_grad = True
    assert not any(p.requires_grad for p in lazy.parameters())


def test_requires_grad_false_zero_grad_and_grad() -> None:
    lazy = pylomin.lazy_loading(Mlp())
    assert lazy.requires_grad_(False) is lazy
    lazy.first.weight.requires_grad = False
    lazy.zero_grad()
    lazy.zero_grad(set_to_none=False)
    assert all(p.grad is None for p in lazy.parameters())


def test_freezing_after_offloading_survives_restore() -> None:
    lazy = pylomin.lazy_loading(Mlp())
    lazy.first.requires_grad_(False)
    restored = pylomin.restore(lazy)
    assert not restored.first.weight.requires_grad
    assert restored.second.weight.requires_grad


def test_apply_with_initialisation() -> None:
    plain, lazy = twins(Mlp())

    def initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            torch.manual_seed(7)
            nn.init.normal_(module.weight)
            nn.init.zeros_(module.bias)

    for model in (plain, lazy):
        model.apply(initialise)
    compare(plain, lazy, torch.randn(2, 8))


def test_reset_parameters() -> None:
    modules = [nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(4, 4), nn.LSTM(4, 4), nn.GRUCell(4, 4)]
    plain, lazy = twins(nn.ModuleList([*modules, nn.MultiheadAttention(4, 2)]))
    for left, right in zip(plain, lazy, strict=True):
        for module in (left, right):
            torch.manual_seed(5)
            getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))()
    assert_same_parameters(plain, lazy)


def test_swap_on_conversion_setting() -> None:
    plain, lazy = twins(Mlp())
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        plain.double()
        lazy.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    compare(plain, lazy, torch.randn(2, 8, dtype=torch.float64))


def test_conversion_of_recurrent_modules_flattens_nothing() -> None:
    plain, lazy = (m.double() for m in twins(nn.GRU(4, 5)))
    for model in (plain, lazy):
        model.flatten_parameters()
    compare(plain, lazy, torch.randn(3, 2, 4, dtype=torch.float64))


def test_bytes_counted_in_conversions_leave() -> None:
    lazy = pylomin.lazy_loading(nn.Linear(32, 32)).half()
    for _ in range(3):
        run(lazy, torch.randn(2, 32, dtype=torch.float16))
        assert resident_bytes(lazy) == 0


def test_buffers_follow_conversions() -> None:
    plain, lazy = (m.half() for m in twins(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()))
    assert_same(dict(plain.named_buffers()), dict(lazy.named_buffers()))
    compare(plain, lazy, torch.randn(4, 4, dtype=torch.float16))


def test_functional_conversion_of_a_parameter() -> None:
    def ordinary(tensor: Tensor) -> Tensor:
        return tensor * 1

    plain, lazy = twins(nn.Linear(4, 4))
    for convert in (lambda w: w.to(torch.float64), lambda w: w.double().float(), lambda w: w.to(torch.int32)):
        assert_same(ordinary(convert(plain.weight)), ordinary(convert(lazy.weight)))
