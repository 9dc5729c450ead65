"""An offloaded model beside its twin in memory, and the comparison of the two bit for bit."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import pylomin
from pylomin.lazy.module import original_class
from pylomin.lazy.tensor import OffloadedTensor

Module = TypeVar("Module", bound=nn.Module)


def twins(model: Module, **options: Any) -> tuple[Module, Module]:
    """A copy that stays in memory, and the model, offloaded.

    Parameters that are to be offloaded do not require grad, since offloaded ones cannot, and torch chooses some
    kernels by that.
    """
    skipped = {p for module in options.get("skip_modules", ()) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter not in skipped and parameter.is_leaf:
            parameter.requires_grad_(False)
    return copy.deepcopy(model), pylomin.lazy_loading(model, **options)


def check(model: Module, *args: Any, seed: int = 0, **kwargs: Any) -> Module:
    """Offload ``model`` and compare two forwards without grad, then two with. Returns the offloaded model."""
    trained, lazy_trained = copy.deepcopy(model), pylomin.lazy_loading(copy.deepcopy(model))
    for _ in range(2):
        expected = run(trained, *args, seed=seed, **kwargs)
        assert_same(expected, run(lazy_trained, *args, seed=seed, **kwargs), "trainable")
    plain, lazy = twins(model)
    assert all(isinstance(parameter, OffloadedTensor) for parameter in lazy.parameters())
    compare(plain, lazy, *args, seed=seed, **kwargs)
    return lazy


def compare(plain: nn.Module, lazy: nn.Module, *args: Any, seed: int = 0, **kwargs: Any) -> None:
    """The same outputs, buffers and parameters after each of two forwards, without grad and then with."""
    for grad in (False, True):
        for _ in range(2):
            expected = run(plain, *args, seed=seed, grad=grad, **kwargs)
            actual = run(lazy, *args, seed=seed, grad=grad, **kwargs)
            assert_same(expected, actual)
            assert_same(dict(plain.named_buffers()), dict(lazy.named_buffers()))
            del expected, actual
            assert resident_bytes(lazy) == 0
    assert_same_parameters(plain, lazy)


def run(model: Callable[..., Any], *args: Any, seed: int = 0, grad: bool = False, **kwargs: Any) -> Any:
    """Call with copies of the arguments, seeded."""
    args, kwargs = copy.deepcopy((args, kwargs))
    torch.manual_seed(seed)
    with torch.set_grad_enabled(grad):
        return model(*args, **kwargs)


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or the type and text of what it raises."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__, str(error)


def assert_same_outcome(function: Callable[[Any], Any], plain: Any, lazy: Any) -> None:
    """``function`` returns the same, or raises the same, for both."""
    expected, actual = outcome(function, plain), outcome(function, lazy)
    assert_same(expected, actual)


def assert_same_parameters(plain: nn.Module, lazy: nn.Module) -> None:
    """Names, order, shapes, dtypes and values."""
    expected = list(plain.named_parameters(remove_duplicate=False))
    actual = list(lazy.named_parameters(remove_duplicate=False))
    assert [name for name, _ in expected] == [name for name, _ in actual]
    for (name, left), (_, right) in zip(expected, actual, strict=True):
        assert left.dtype == right.dtype, name
        assert_same(left, values(right), name)


def assert_same(expected: Any, actual: Any, path: str = "output") -> None:
    """Compare nests of tensors and plain values; tensors bit for bit. NaNs are equal."""
    if isinstance(expected, Tensor):
        assert isinstance(actual, Tensor), f"{path}: {type(actual).__name__} in place of a tensor"
        _assert_same_tensor(expected, actual, path)
    elif isinstance(expected, PackedSequence) or (isinstance(expected, tuple) and hasattr(expected, "_fields")):
        assert_same(tuple(expected), tuple(actual), path)
    elif isinstance(expected, Mapping):
        assert list(expected) == list(actual), path
        for key in expected:
            assert_same(expected[key], actual[key], f"{path}[{key!r}]")
    elif isinstance(expected, Sequence) and not isinstance(expected, str | bytes):
        assert len(expected) == len(actual), path
        for index, (left, right) in enumerate(zip(expected, actual, strict=True)):
            assert_same(left, right, f"{path}[{index}]")
    else:
        assert expected == actual, path


def _assert_same_tensor(expected: Tensor, actual: Tensor, path: str) -> None:
    assert expected.dtype == actual.dtype, path
    assert expected.shape == actual.shape, f"{path}: {actual.shape}, expected {expected.shape}"
    assert expected.layout == actual.layout, path
    if expected.is_nested or expected.layout is not torch.strided:
        parts = zip(_parts(expected), _parts(actual), strict=True)
        assert all(torch.equal(left, right) for left, right in parts), path
        return
    assert torch.equal(_bits(expected), _bits(actual)), f"{path}: other values"


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    if tensor.is_nested:
        return tensor.unbind()
    tensor = tensor.coalesce()
    return [tensor.indices(), tensor.values()]


def _bits(tensor: Tensor) -> Tensor:
    tensor = values(tensor).detach().resolve_conj().resolve_neg()
    if tensor.is_floating_point() and tensor.dtype.itemsize > 1:
        tensor = tensor.nan_to_num(12345.0)
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device="cpu")
    return flat.copy_(tensor.reshape(-1)).view(torch.uint8)


def values(tensor: Tensor) -> Tensor:
    """An ordinary tensor with the values of any."""
    return tensor.materialize() if isinstance(tensor, OffloadedTensor) else tensor


def resident_bytes(lazy: nn.Module) -> int:
    return pylomin.stats(lazy).resident_bytes


def bytes_read(lazy: nn.Module, use: Callable[[], Any]) -> int:
    """Bytes that ``use`` reads from the store."""
    before = pylomin.stats(lazy).bytes_read
    use()
    return pylomin.stats(lazy).bytes_read - before


def is_ordinary(model: nn.Module) -> bool:
    """No trace of a pass in classes and parameters."""
    classes = all(original_class(type(module)) is type(module) for module in model.modules())
    return classes and all(type(p) in (nn.Parameter, Tensor) for p in model.parameters())


def tree(model: nn.Module) -> Iterator[tuple[str, type]]:
    for name, module in model.named_modules():
        yield name, type(module)


def crash_proof(program: str) -> str:
    """What ``program`` prints, run in a process of its own, so that a crash is a failure."""
    imports = "import torch\nfrom torch import nn\nimport pylomin\n"
    done = subprocess.run([sys.executable, "-c", imports + program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Mlp(nn.Module):
    """Two layers, a norm, and a buffer."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(size, 2 * size)
        self.norm = nn.LayerNorm(2 * size)
        self.second = nn.Linear(2 * size, size)
        self.register_buffer("scale", torch.full((size,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        scaled: Tensor = self.second(torch.relu(self.norm(self.first(x)))) * self.scale
        return scaled


class Tied(nn.Module):
    """A language model in miniature: its head is its table."""

    def __init__(self, rows: int = 20, size: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, size)
        self.body = nn.Linear(size, size)
        self.head = nn.Linear(size, rows, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.body(self.table(ids))))
        return logits


class SizedLinears(nn.Sequential):
    """Equal layers, one after the other."""

    def __init__(self, layers: int, size: int) -> None:
        super().__init__(*(nn.Linear(size, size) for _ in range(layers)))
