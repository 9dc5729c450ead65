"""Modules whose linears run by tiles behave as their twins in memory do."""

from __future__ import annotations

import copy
import mmap
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

import pylomin
from pylomin.lazy.module import original_class
from pylomin.lazy.tensor import OffloadedTensor

from .common import Mlp, Tied, assert_same, bytes_read, is_ordinary, resident_bytes, run, tree, values

X = torch.linspace(-1, 1, 64).view(4, 16)


def near(expected: Any, actual: Any) -> None:
    torch.testing.assert_close(actual, expected)


def tiled_twins(model: nn.Module, chunk_size: int | str = 5) -> tuple[nn.Module, nn.Module]:
    model.requires_grad_(False)
    return copy.deepcopy(model), pylomin.chunked_linear(model, chunk_size=chunk_size)


# -- the pass ---------------------------------------------------------------------------------------------------------


def test_by_default_every_linear_larger_than_a_tile() -> None:
    model = nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 10), nn.LayerNorm(10))
    plain = copy.deepcopy(model)
    lazy = pylomin.chunked_linear(model, chunk_size=12)
    assert lazy is model
    assert isinstance(lazy[0]._parameters["weight"], OffloadedTensor)
    assert type(lazy[1]) is nn.Linear
    assert type(lazy[2]) is nn.LayerNorm
    near(run(plain, X), run(lazy, X))


def test_nothing_is_larger_than_the_default_tile() -> None:
    model = Mlp()
    assert pylomin.chunked_linear(model) is model
    assert is_ordinary(model)


def test_size_in_bytes() -> None:
    lazy = pylomin.chunked_linear(nn.Linear(16, 100), chunk_size="1KiB")
    run(lazy, X)
    assert pylomin.stats(lazy).peak_bytes == 1024 + 400  # a tile of 16 rows, and the bias


def test_default_tile_is_4_mib() -> None:
    lazy = pylomin.chunked_linear(nn.Linear(1024, 2048, bias=False))
    run(lazy, torch.ones(1024))
    assert pylomin.stats(lazy).peak_bytes == 4 << 20


def test_second_call_changes_the_size() -> None:
    plain, lazy = tiled_twins(nn.Linear(16, 100, bias=False), chunk_size=10)
    run(lazy, X)
    assert pylomin.stats(lazy).peak_bytes == 640
    pylomin.chunked_linear(lazy, chunk_size=50)
    near(run(plain, X), run(lazy, X))
    assert pylomin.stats(lazy).peak_bytes == 3200


def test_tile_of_all_rows_is_the_whole_weight() -> None:
    model = nn.Linear(16, 20)
    plain, lazy = tiled_twins(model, chunk_size=20)
    assert lazy is model
    assert_same(run(plain, X), run(lazy, X))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"chunk_size": 0}, "chunk_size is 0; expected a number of rows"),
        ({"chunk_size": True}, "chunk_size is True"),
        ({"chunk_size": 2.0}, "chunk_size is 2.0"),
        ({"chunk_size": "many"}, "chunk_size is 'many'"),
        ({"target_module_name": "frist"}, r"no module 'frist' \(similar: 'first'\)\. Linears of this model: '"),
        ({"target_module_name": "norm"}, "LayerNorm is no nn.Linear"),
        ({"target_modules": []}, "target_modules is empty"),
        ({"target_modules": [nn.Linear(2, 2)]}, "no part of the model"),
        ({"target_modules": [], "target_module_name": "first"}, "give either"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], message: str) -> None:
    model = Mlp()
    with pytest.raises(ValueError, match=message):
        pylomin.chunked_linear(model, **arguments)
    assert is_ordinary(model)


def test_model_without_linears() -> None:
    with pytest.raises(pylomin.PassError, match="Conv2d has no linears"):
        pylomin.chunked_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        pylomin.chunked_linear("model")  # type: ignore[type-var]


@pytest.mark.parametrize("order", ["before", "after"])
def test_together_with_the_other_passes(order: str) -> None:
    model = nn.Sequential(nn.Embedding(30, 16), Mlp(16))
    modules, plain = list(model.modules()), copy.deepcopy(model)
    ids = torch.tensor([[1, 29, 3]])
    passes: list[Callable[[nn.Module], nn.Module]] = [
        lambda m: pylomin.chunked_linear(m, chunk_size=5),
        pylomin.lazy_loading,
        lambda m: pylomin.chunked_embedding(m, target_module_name="0", chunk_size=2),
        pylomin.prefetch,
    ]
    for apply in passes if order == "before" else passes[::-1][1:] + passes[::-1][:1]:
        apply(model)
    for _ in range(3):
        near(run(plain, ids), run(model, ids))
    assert list(pylomin.restore(model).modules()) == modules
    assert is_ordinary(model)
    assert list(tree(model)) == list(tree(plain))
    assert_same(dict(plain.named_parameters()), dict(model.named_parameters()))
    assert_same(run(plain, ids), run(model, ids))


def test_copies_are_tiled_too() -> None:
    plain, lazy = tiled_twins(nn.Linear(16, 100, bias=False))
    clone = copy.deepcopy(lazy)
    near(run(plain, X), run(clone, X))
    assert pylomin.stats(clone).peak_bytes == 5 * 64


def test_pickles_as_the_ordinary_module() -> None:
    plain, lazy = tiled_twins(Mlp(16))
    back = pickle.loads(pickle.dumps(lazy))
    assert is_ordinary(back)
    assert_same(run(plain, X), run(back, X))


def test_state_dict_and_loading_one() -> None:
    plain, lazy = tiled_twins(Mlp(16))
    assert_same(
        {k: values(v) for k, v in plain.state_dict().items()}, {k: values(v) for k, v in lazy.state_dict().items()}
    )
    other = Mlp(16).state_dict()
    for model in (plain, lazy):
        model.load_state_dict(other)
    near(run(plain, X), run(lazy, X))


# -- modules ----------------------------------------------------------------------------------------------------------


def test_only_the_bias_is_held() -> None:
    seen: list[int] = []
    lazy = pylomin.chunked_linear(nn.Linear(16, 100), chunk_size=10)

    def look(module: nn.Module, args: Any, out: Any) -> None:
        seen.append(pylomin.stats(module).peak_bytes)

    lazy.register_forward_hook(look)
    run(lazy, X)
    assert seen == [400 + 640]
    assert resident_bytes(lazy) == 0


def test_forward_that_looks_at_the_weight() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 20)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.linear.weight
            assert weight.shape == (20, 16)
            assert weight.dtype == x.dtype
            assert weight.device == x.device
            return self.linear(x) * weight.norm() + weight[3].sum()

    plain, lazy = tiled_twins(Looking())
    near(run(plain, X), run(lazy, X))


class Scaled(nn.Linear):
    """A linear with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2, self.bias)


def test_linear_with_its_own_forward() -> None:
    plain, lazy = tiled_twins(Scaled(16, 20))
    near(run(plain, X), run(lazy, X))
    with pytest.raises(pylomin.BudgetError, match=r"weight 'weight' needs .* resident"):
        pylomin.lazy_loading(Scaled(16, 20), memory_budget=1000)


def test_tied_table_and_head() -> None:
    """Rows for the lookup, tiles for the head, one stored weight."""
    ids = torch.tensor([[1, 2, 19, 2]])
    for name in ("head", "body"):
        model = Tied()
        plain, lazy = copy.deepcopy(model), pylomin.chunked_linear(model, target_module_name=name, chunk_size=3)
        pylomin.lazy_loading(lazy)
        assert lazy.head._parameters["weight"] is lazy.table._parameters["weight"]
        near(run(plain, ids), run(lazy, ids))
        read = bytes_read(lazy, lambda lazy=lazy: run(lazy, ids))
        assert read == 3 * 32 + (8 * 8 + 8) * 4 + 20 * 32


def test_tied_under_the_smallest_budget() -> None:
    ids = torch.tensor([[1, 2, 19, 2]])
    model = Tied(rows=500, size=8)
    plain, lazy = copy.deepcopy(model), pylomin.lazy_loading(model, memory_budget=1000)
    near(run(plain, ids), run(lazy, ids))
    assert pylomin.stats(lazy).peak_bytes <= 1000


def test_weight_that_is_used_directly() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(500, 16)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.table(ids)
            return F.linear(hidden, self.table.weight) + hidden @ self.table.weight.t()

    ids = torch.tensor([[1, 2, 499]])
    model = Direct()
    plain, lazy = copy.deepcopy(model), pylomin.lazy_loading(model, memory_budget=4096)
    near(run(plain, ids), run(lazy, ids))
    assert pylomin.stats(lazy).peak_bytes <= 4096


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    plain, lazy = tiled_twins(nn.Linear(16, 100))
    for model in (plain, lazy):
        model.to(dtype)
    near(run(plain, X.to(dtype)), run(lazy, X.to(dtype)))
    assert pylomin.stats(lazy).peak_bytes <= 100 * 12 + 5 * 16 * 12 + 192


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad: bool) -> None:
    plain, lazy = tiled_twins(Mlp(16))
    with torch.autocast("cpu", torch.bfloat16):
        near(run(plain, X, grad=grad), run(lazy, X, grad=grad))


def test_load_with_dtype(tmp_path: Path) -> None:
    weights = {"weight": torch.randn(300, 16), "bias": torch.randn(300)}
    save_file(weights, tmp_path / "weights.safetensors")
    lazy = pylomin.load(
        lambda: nn.Linear(16, 300), tmp_path / "weights.safetensors", dtype=torch.float64, memory_budget="12KiB"
    )
    near(F.linear(X.double(), weights["weight"].double(), weights["bias"].double()), run(lazy, X.double()))
    assert pylomin.stats(lazy).peak_bytes <= 12 << 10


def test_functional_call_and_replaced_weights() -> None:
    plain, lazy = tiled_twins(nn.Linear(16, 20))
    weight = torch.randn(20, 16)
    expected, actual = (torch.func.functional_call(model, {"weight": weight}, (X,)) for model in (plain, lazy))
    near(expected, actual)
    for model in (plain, lazy):
        model.weight = nn.Parameter(weight, requires_grad=False)
    near(run(plain, X), run(lazy, X))


def test_hooks() -> None:
    model = nn.Linear(16, 20)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, out: out + module.weight.sum())
    plain, lazy = tiled_twins(model)
    near(run(plain, X), run(lazy, X))


def test_training_what_comes_before() -> None:
    plain = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 300), nn.Linear(300, 2))
    lazy = copy.deepcopy(plain)
    pylomin.lazy_loading(lazy, skip_modules=[lazy[0]], memory_budget=8192)
    for model in (plain, lazy):
        run(model, X, grad=True).square().sum().backward()
    near(plain[0].weight.grad, lazy[0].weight.grad)
    assert pylomin.stats(lazy).peak_bytes <= 8192


def test_checkpointing() -> None:
    plain, lazy = tiled_twins(Mlp(16))
    grads = []
    for model in (plain, lazy):
        x = X.clone().requires_grad_()
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()
        grads.append(x.grad)
    near(*grads)


def test_threads() -> None:
    plain, lazy = tiled_twins(Mlp(16))
    pylomin.lazy_loading(lazy)
    expected, failures = run(plain, X), []

    def work() -> None:
        try:
            for _ in range(20):
                near(expected, run(lazy, X))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert resident_bytes(lazy) == 0


def test_exception_in_the_middle_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, lazy = tiled_twins(nn.Linear(16, 100))
    residency = lazy._parameters["weight"].weight.residency
    load_runs, calls = residency.load_runs, []

    def failing(*args: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 7:
            raise OSError("gone")
        return load_runs(*args)

    monkeypatch.setattr(residency, "load_runs", failing)
    with pytest.raises(OSError, match="gone") as raised:
        run(lazy, X)
    assert resident_bytes(lazy) == 0  # also while somebody keeps the error
    assert raised.value is not None
    near(run(plain, X), run(lazy, X))


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.randn(3000, 16), "bias": torch.zeros(3000)}, path)
    lazy = pylomin.chunked_linear(pylomin.load(lambda: nn.Linear(16, 3000), path), chunk_size=100)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    for _ in range(2):
        with pytest.raises(pylomin.StoreReadError, match=r"weights\.safetensors"):
            run(lazy, X)
        assert resident_bytes(lazy) == 0


def test_a_resident_weight_is_not_read_again() -> None:
    plain, lazy = tiled_twins(nn.Linear(16, 100))
    weight = lazy._parameters["weight"].weight
    with weight.residency.hold([weight]):
        assert bytes_read(lazy, lambda: near(run(plain, X), run(lazy, X))) == 400  # the bias


def test_trace_has_the_whole_weight() -> None:
    plain, lazy = tiled_twins(nn.Linear(16, 20))
    with pytest.warns(DeprecationWarning, match="trace"):
        traced = torch.jit.trace(lazy, (X,))
    assert_same(run(plain, X), run(traced, X))


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_linear_larger_than_the_budget() -> None:
    model = nn.Linear(256, 4096)  # 4 MiB
    plain, lazy = copy.deepcopy(model), pylomin.lazy_loading(model, memory_budget="256KiB")
    x = torch.randn(3, 256)
    near(run(plain, x), run(lazy, x))
    assert pylomin.stats(lazy).peak_bytes <= 256 << 10
    assert original_class(type(lazy)) is nn.Linear
    assert bytes_read(lazy, lambda: run(lazy, x)) <= 4096 * 257 * 4


def test_peak_memory_counts_a_tile() -> None:
    lazy = pylomin.chunked_linear(nn.Linear(256, 4096), chunk_size="64KiB")
    run(lazy, torch.ones(256))
    with pylomin.peak_memory(lazy) as peak:
        run(lazy, torch.ones(256))
    tile_and_bias = (64 << 10) + 4096 * 4
    assert tile_and_bias <= peak.weight_bytes <= tile_and_bias + 2 * mmap.PAGESIZE  # whole pages are mapped


def test_bias_larger_than_tiles() -> None:
    model = nn.Linear(2, 4096)
    plain = copy.deepcopy(model)
    with pytest.raises(pylomin.BudgetError, match="Use memory_budget of at least 32768"):
        pylomin.lazy_loading(model, memory_budget=32767)
    lazy = pylomin.lazy_loading(model, memory_budget=32768)
    near(run(plain, X[:, :2]), run(lazy, X[:, :2]))
    assert pylomin.stats(lazy).peak_bytes <= 32768


def test_smallest_budget_is_that_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(256, 300), nn.Conv1d(4, 40, 10), nn.LSTM(4, 20))
    with pytest.raises(pylomin.BudgetError, match=r"weight '2\.weight_hh_l0' needs") as raised:
        pylomin.lazy_loading(model, memory_budget=100)
    needed = int(str(raised.value).partition("Use memory_budget of at least ")[2].split(",")[0])
    assert is_ordinary(model)
    pylomin.lazy_loading(model, memory_budget=needed)
    run(model[0], torch.ones(256))
    run(model[1], torch.ones(1, 4, 20))
    run(model[2], torch.ones(3, 1, 4))
    assert pylomin.stats(model).peak_bytes <= needed


def test_smaller_budget_later() -> None:
    model = Mlp(64)
    plain, lazy = copy.deepcopy(model), pylomin.lazy_loading(model, memory_budget="1MiB")
    x = torch.randn(2, 64)
    assert_same(run(plain, x), run(lazy, x))
    pylomin.prefetch(lazy, memory_budget="16KiB")
    for _ in range(3):
        near(run(plain, x), run(lazy, x))


@settings(max_examples=25, deadline=None)
@given(out=st.integers(1, 300), size=st.integers(1, 300), bias=st.booleans(), beyond=st.integers(0, 100_000))
def test_any_linear_keeps_any_budget_that_is_accepted(out: int, size: int, bias: bool, beyond: int) -> None:
    plain, x = nn.Linear(size, out, bias=bias), torch.ones(2, size)
    with pytest.raises(pylomin.BudgetError) as raised:
        pylomin.lazy_loading(copy.deepcopy(plain), memory_budget=1)
    needed = int(str(raised.value).partition("Use memory_budget of at least ")[2].split(",")[0])
    for budget in (needed, needed + beyond):
        lazy = pylomin.lazy_loading(copy.deepcopy(plain), memory_budget=budget)
        near(run(plain, x), run(lazy, x))
        assert pylomin.stats(lazy).peak_bytes <= budget
