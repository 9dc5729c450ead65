"""What broke other libraries that offload weights, one test each."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import pylomin

from .common import (
    Mlp,
    SizedLinears,
    Tied,
    assert_same,
    bytes_read,
    check,
    compare,
    is_ordinary,
    resident_bytes,
    run,
    twins,
)

X = torch.linspace(-1, 1, 16).view(2, 8)


def test_linear_with_the_weight_of_an_embedding() -> None:
    class Model(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            return functional.linear(self.table(ids), self.table.weight)

    check(Model(), torch.tensor([[1, 2]]))


def test_custom_encode() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def encode(self, x: Tensor) -> Tensor:
            return x @ self.layer.weight.t() + self.layer.bias

    plain, lazy = twins(Model())
    assert_same(run(plain.encode, X), run(lazy.encode, X))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("when", ["before", "after"])
def test_old_weight_norm(when: str) -> None:
    outputs = []
    for offloads in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
        if when == "before":
            nn.utils.weight_norm(model[0])
        if offloads:
            model = pylomin.lazy_loading(model)
        if when == "after":
            nn.utils.weight_norm(model[0])
        outputs.append([run(model, X), run(model, X)])
    assert_same(outputs[0], outputs[1])


def test_module_that_calls_itself() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            inner = self(x, depth - 1) if depth else x
            return torch.tanh(inner @ self.weight)

    check(Model(), X)


@pytest.mark.parametrize("training", [False, True])
def test_multihead_attention(training: bool) -> None:
    check(nn.MultiheadAttention(8, 2).train(training), X, X, X)


@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder_layer(training: bool) -> None:
    check(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).train(training), X[None])


def test_parameter_list_and_dict() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.list = nn.ParameterList([torch.randn(8), torch.randn(8)])
            self.dict = nn.ParameterDict({"a": torch.randn(8)})

        def forward(self, x: Tensor) -> Tensor:
            return x * self.list[0] + self.list[1] * self.dict["a"]

    check(Model(), X)


def test_float8_weights() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8).to(torch.float8_e4m3fn), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.to(x.dtype).t()

    check(Model(), X)


def test_functional_call() -> None:
    plain, lazy = twins(Mlp())
    replaced = {"first.weight": torch.randn(16, 8)}
    assert_same(functional_call(plain, replaced, X), functional_call(lazy, replaced, X))
    compare(plain, lazy, X)


def test_load_state_dict_after_offloading_takes_effect() -> None:
    plain, lazy = twins(Mlp())
    state = Mlp().state_dict()
    plain.load_state_dict(state)
    lazy.load_state_dict(state)
    compare(plain, lazy, X)


def test_state_dict_has_real_values() -> None:
    plain, lazy = twins(Mlp())
    for name, value in lazy.state_dict().items():
        assert value.device.type == "cpu"
        assert_same(plain.state_dict()[name], value)
    buffer = io.BytesIO()
    torch.save(lazy.state_dict(), buffer)
    buffer.seek(0)
    assert_same(dict(plain.state_dict()), dict(torch.load(buffer, weights_only=True)))


def test_two_models_never_mix(tmp_path: Path) -> None:
    first, second = Mlp(), Mlp()
    plain_first, plain_second = copy.deepcopy(first), copy.deepcopy(second)
    lazy_first = pylomin.lazy_loading(first)
    lazy_second = pylomin.lazy_loading(second)
    for _ in range(2):
        assert_same(run(plain_first, X), run(lazy_first, X))
        assert_same(run(plain_second, X), run(lazy_second, X))
    pylomin.lazy_loading(Mlp(), output_dir=tmp_path)
    with pytest.raises(pylomin.PassError, match="exists"):
        pylomin.lazy_loading(Mlp(), output_dir=tmp_path)


@pytest.mark.parametrize("budget", [None, "smallest", "1MiB"])
def test_threads_in_one_model(budget: str | None) -> None:
    plain = SizedLinears(5, 32).requires_grad_(False)
    one_layer = 8192
    memory_budget = 4 * one_layer if budget == "smallest" else budget  # a layer for each thread
    lazy = pylomin.prefetch(pylomin.lazy_loading(copy.deepcopy(plain), memory_budget=memory_budget))
    inputs = [torch.randn(2, 32) for _ in range(4)]
    expected = [run(plain, x) for x in inputs]
    wrong: list[object] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(10):
                    if not torch.equal(lazy(inputs[i]), expected[i]):
                        wrong.append(i)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    if budget is None:
        lazy = pylomin.restore(lazy)


def test_exception_in_a_forward_releases_weights() -> None:
    class Fails(nn.Linear):
        fail = True

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            if self.fail:
                raise ValueError("in the middle")
            return out

    plain, lazy = twins(nn.Sequential(nn.Linear(8, 8), Fails(8, 8)))
    with pytest.raises(ValueError, match="in the middle") as raised:
        lazy(X)
    del raised
    gc.collect()
    assert resident_bytes(lazy) == 0
    plain[1].fail = lazy[1].fail = False
    compare(plain, lazy, X)


def test_tied_weights_are_one_weight(scratch: Path) -> None:
    plain, lazy = twins(Tied(rows=5000))
    weights = sum(p.nbytes for p in lazy.parameters())
    stored = sum(path.stat().st_size for path in scratch.rglob("*.safetensors"))
    assert stored < 1.1 * weights
    assert lazy.head.weight is lazy.table.weight
    compare(plain, lazy, torch.tensor([[1, 4999]]))


def test_ties_are_not_found_by_address_of_empty_tensors() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    weights = {"0.weight": torch.ones(4, 4), "1.weight": torch.zeros(4, 4)}
    lazy = pylomin.lazy_loading(model, weights=weights)
    assert lazy[0].weight is not lazy[1].weight
    assert_same(weights["0.weight"], lazy[0].weight)
    assert_same(weights["1.weight"], lazy[1].weight)
    empty = nn.ParameterList([torch.empty(0, 3), torch.empty(0, 3)])
    lazy_empty = pylomin.lazy_loading(empty)
    assert lazy_empty[0] is not lazy_empty[1]


def test_deepcopy_and_pickle() -> None:
    plain, lazy = twins(Mlp())
    compare(plain, copy.deepcopy(lazy), X)
    loaded = pickle.loads(pickle.dumps(lazy))
    assert is_ordinary(loaded)
    assert_same(run(plain, X), run(loaded.requires_grad_(False), X))


def test_buffers_written_in_forward_are_not_stale() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)
            self.register_buffer("calls", torch.zeros(()))
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(self.norm(x)) * self.calls

    plain, lazy = twins(Counts().train())
    for _ in range(4):
        assert_same(run(plain, X), run(lazy, X))
        assert_same(dict(plain.named_buffers()), dict(lazy.named_buffers()))


class Branches(nn.Module):
    """Uses its layers in another order than it defines them, and not all of them."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(5))

    def forward(self, x: Tensor, order: tuple[int, ...] = (4, 0, 2)) -> Tensor:
        for i in order:
            x = self.layers[i](x)
            if i == 3 and float(x.sum()) > -1e9:
                break
        return x


@pytest.mark.parametrize("budget", [None, "1MiB"])
def test_order_of_use_is_a_prediction_only(budget: str | None) -> None:
    plain, lazy = twins(Branches(300), memory_budget=None if budget is None else 5 << 19)
    lazy = pylomin.prefetch(lazy)
    x = torch.randn(2, 300)
    for order in ((4, 0, 2), (4, 0, 2), (1, 3), (0, 1, 2, 3, 4), (2, 2, 2), (4, 0, 2), (), (3, 1)):
        assert_same(run(plain, x, order), run(lazy, x, order))


def test_packed_experts_load_only_routed_rows() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(16, 8, 8))

        def forward(self, x: Tensor, expert: int) -> Tensor:
            return x @ self.weights[expert]

    plain, lazy = twins(Experts())
    assert_same(run(plain, X, 11), run(lazy, X, 11))
    assert bytes_read(lazy, lambda: run(lazy, X, 11)) == 8 * 8 * 4


def test_a_live_tensor_keeps_only_itself() -> None:
    _, lazy = twins(SizedLinears(4, 64))
    row = lazy[0].weight[3] * 1
    lazy(torch.ones(1, 64))
    assert resident_bytes(lazy) == 0
    assert row.untyped_storage().nbytes() == 64 * 4


def test_nothing_is_collected_on_the_forward_path(monkeypatch: pytest.MonkeyPatch) -> None:
    _, lazy = twins(SizedLinears(3, 16))

    def forbidden(*args: object) -> int:
        raise AssertionError("called on the forward path")

    monkeypatch.setattr(gc, "collect", forbidden)
    monkeypatch.setattr(torch.cuda, "empty_cache", forbidden)
    run(lazy, torch.ones(1, 16))


def test_no_file_is_opened_or_parsed_on_the_forward_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "w.safetensors"
    save_file(SizedLinears(3, 16).state_dict(), path)
    lazy = pylomin.load(lambda: SizedLinears(3, 16), path)
    run(lazy, torch.ones(1, 16))
    import json

    def forbidden(*args: object, **kwargs: object) -> Any:
        raise AssertionError("called on the forward path")

    for module, name in ((json, "loads"), (json, "load")):
        monkeypatch.setattr(module, name, forbidden)
    monkeypatch.setattr("safetensors.safe_open", forbidden)
    run(lazy, torch.ones(1, 16))


def test_users_file_is_streamed_without_a_second_copy(tmp_path: Path, scratch: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(Mlp().state_dict(), path)
    lazy = pylomin.load(Mlp, path)
    run(lazy, X)
    assert [p for p in scratch.rglob("*") if p.is_file()] == []


def test_meta_weights_never_compute() -> None:
    with torch.device("meta"):
        model = Mlp()
    with pytest.raises(pylomin.PassError, match="meta device and has no values"):
        pylomin.lazy_loading(model)


def test_model_that_is_gone_leaves_nothing(scratch: Path) -> None:
    lazy = pylomin.prefetch(pylomin.lazy_loading(Mlp(), memory_budget="1MiB"))
    for _ in range(2):
        run(lazy, X)
    with torch.no_grad():
        lazy.first.weight.mul_(2)
    dead = weakref.ref(lazy.first)
    before = threading.active_count()
    del lazy
    gc.collect()
    assert dead() is None
    assert list(scratch.iterdir()) == []
    assert threading.active_count() <= before
