"""Operations on the first dimension read the rows that they need, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import pylomin
from pylomin.lazy.tensor import OffloadedTensor

from .common import assert_same, bytes_read, outcome, run, twins

ROWS, SIZE = 50, 8
ROW_BYTES = SIZE * 4
Use = Callable[[Tensor], Any]


def mask(*rows: int) -> Tensor:
    chosen = torch.zeros(ROWS, dtype=torch.bool)
    chosen[list(rows)] = True
    return chosen


# What is done with the table, and how many rows that may read.
READS: dict[str, tuple[Use, int]] = {
    "select": (lambda w: w[3] * 1, 1),
    "select negative": (lambda w: w[-1] * 1, 1),
    "select method": (lambda w: w.select(0, 7) * 1, 1),
    "element": (lambda w: w[3, 2].item(), 1),
    "slice": (lambda w: w[2:6] * 1, 4),
    "slice to end": (lambda w: w[-3:] * 1, 3),
    "slice empty": (lambda w: w[5:5] * 1, 0),
    "slice beyond": (lambda w: w[45:99] * 1, 5),
    "narrow": (lambda w: w.narrow(0, 4, 2) * 1, 2),
    "slice and columns": (lambda w: w[2:4, 1:3] * 1, 2),
    "row and columns": (lambda w: w[2, 1:3] * 1, 1),
    "unsqueezed row": (lambda w: w[3][None] * 1, 1),
    "none": (lambda w: w[None, 3] * 1, 1),
    "ellipsis": (lambda w: w[3, ...] * 1, 1),
    "list": (lambda w: w[[1, 4, 9]], 3),
    "list with repeats": (lambda w: w[[1, 1, 9, 1]], 2),
    "list negative": (lambda w: w[[-1, 0]], 2),
    "empty list": (lambda w: w[[]], 0),
    "tensor": (lambda w: w[torch.tensor([30, 2, 30])], 2),
    "tensor int32": (lambda w: w[torch.tensor([30, 2], dtype=torch.int32)], 2),
    "tensor negative": (lambda w: w[torch.tensor([-50, -1])], 2),
    "tensor scalar": (lambda w: w[torch.tensor(4)] * 1, 1),
    "tensor 2-D": (lambda w: w[torch.tensor([[1, 2], [2, 40]])], 3),
    "tensor 3-D": (lambda w: w[torch.tensor([[[1], [2]], [[2], [40]]])], 3),
    "tensor empty": (lambda w: w[torch.empty(0, dtype=torch.long)], 0),
    "tensor empty 2-D": (lambda w: w[torch.empty(3, 0, dtype=torch.long)], 0),
    "bool mask": (lambda w: w[mask(0, 7, 49)], 3),
    "bool mask empty": (lambda w: w[mask()], 0),
    "index select": (lambda w: w.index_select(0, torch.tensor([9, 3])), 2),
    "index select negative dim": (lambda w: w.index_select(-2, torch.tensor([9, 3])), 2),
    "embedding": (lambda w: functional.embedding(torch.tensor([[3, 9], [9, 9]]), w), 2),
    "embedding padding": (lambda w: functional.embedding(torch.tensor([3, 9]), w, padding_idx=3), 2),
    "embedding none": (lambda w: functional.embedding(torch.empty(0, dtype=torch.long), w), 0),
    "embedding bag": (lambda w: functional.embedding_bag(torch.tensor([[3, 9], [9, 9]]), w), 2),
    "embedding bag max": (lambda w: functional.embedding_bag(torch.tensor([[3, 9]]), w, mode="max"), 2),
    "two steps": (lambda w: w[10:20][3] * 1, 1),
    "view then rows": (lambda w: w.view(25, 2, SIZE)[3] * 1, 2),
    "detach": (lambda w: w.detach()[4] * 1, 1),
    "data": (lambda w: w.data[4] * 1, 1),
    "chunk": (lambda w: w.chunk(10)[2] * 1, 5),
    "split": (lambda w: w.split(10)[1] * 1, 10),
    "unbind": (lambda w: w.unbind(0)[2] * 1, 1),
    "linear of rows": (lambda w: functional.linear(torch.ones(1, SIZE), w[4:8]), 4),
    "tolist": (lambda w: w[5].tolist(), 1),
    "numpy": (lambda w: w.detach()[5].numpy().tolist(), 1),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("use", "rows"), READS.values(), ids=READS.keys())
def test_reads_only_those_rows(use: Use, rows: int, grad: bool) -> None:
    plain, lazy = twins(nn.Embedding(ROWS, SIZE))
    with torch.set_grad_enabled(grad):
        expected = use(plain.weight)
        for _ in range(2):
            assert_same(expected, use(lazy.weight))
            assert bytes_read(lazy, lambda: use(lazy.weight)) <= rows * ROW_BYTES


def evaluate(expression: str, w: Tensor) -> Any:
    names = {"w": w, "torch": torch, "functional": functional, "mask": mask, "ROWS": ROWS, "SIZE": SIZE}
    return eval(expression, names)


@pytest.mark.parametrize(
    "expression",
    [
        "w[:, 3]",
        "w[..., 0]",
        "w[::2]",
        "w[1::7] * 1",
        "w[torch.tensor([1, 2]), torch.tensor([3, 4])]",
        "w[:, [1, 2]]",
        "w[[1, 2], 1:3]",
        "w[2:5, [0, 3]]",
        "w[mask(1, 2), 3]",
        "w[w > 0]",
        "w[torch.tensor([1, 0], dtype=torch.uint8).new_zeros(ROWS).bool()]",
        "w[([1, 2], [3, 4])]",
        "w[True]",
        "w[None]",
        "w[()]",
        "w[w.argmax(0)]",
        "w.index_select(1, torch.tensor([3, 0]))",
        "torch.take_along_dim(w, torch.zeros(1, SIZE, dtype=torch.long), 0)",
        "w.gather(0, torch.ones(2, SIZE, dtype=torch.long))",
        "w.t()[3]",
        "w.t()[:, 3] * 1",
        "w.t()[:, [3, 4]]",
        "w.t().index_select(1, torch.tensor([3, 4]))",
        "w.flip(0)[2]",
        "w.roll(1, 0)[2]",
    ],
)
def test_other_indexing(expression: str) -> None:
    plain, lazy = twins(nn.Embedding(ROWS, SIZE))
    for _ in range(2):
        assert_same(evaluate(expression, plain.weight), evaluate(expression, lazy.weight))


@pytest.mark.parametrize(
    "expression",
    [
        "w[ROWS]",
        "w[-ROWS - 1]",
        "w[0, SIZE]",
        "w.select(0, 99)",
        "w[[1, ROWS]]",
        "w[[-ROWS - 1]]",
        "w[torch.tensor([[0, 500]])]",
        "w[torch.tensor([True, False])]",
        "w[1.5]",
        "w[torch.tensor([1.5])]",
        "w[0, 0, 0]",
        "w['a']",
        "w.index_select(0, torch.tensor([ROWS]))",
        "w.index_select(0, torch.tensor([-1]))",
        "w.index_select(0, torch.tensor([[1]]))",
        "w.index_select(0, torch.tensor([1.0]))",
        "w.index_select(5, torch.tensor([1]))",
        "w.narrow(0, 48, 5)",
        "functional.embedding(torch.tensor([0, ROWS]), w)",
        "functional.embedding(torch.tensor([-1]), w)",
        "functional.embedding(torch.tensor([1.0]), w)",
        "functional.embedding(torch.tensor([1]), w, padding_idx=ROWS)",
        "functional.embedding_bag(torch.tensor([[0, ROWS]]), w)",
        "functional.embedding_bag(torch.tensor([[0, -1]]), w)",
        "functional.embedding_bag(torch.tensor([0, 1]), w)",
        "functional.embedding_bag(torch.tensor([0, 1]), w, torch.tensor([1]))",
    ],
)
def test_errors_are_those_of_torch(expression: str) -> None:
    plain, lazy = twins(nn.Embedding(ROWS, SIZE))
    expected = outcome(evaluate, expression, plain.weight)
    assert isinstance(expected, tuple), "the plain model raises"
    for _ in range(2):
        assert outcome(evaluate, expression, lazy.weight) == expected
    assert_same(plain.weight, lazy.weight)


index_item = st.one_of(
    st.integers(-6, 6),
    st.slices(7),
    st.just(...),
    st.none(),
    st.booleans(),
    st.lists(st.integers(-7, 6), max_size=4),
    st.lists(st.integers(-7, 7), min_size=1, max_size=3).map(torch.tensor),
    st.lists(st.lists(st.integers(-7, 6), min_size=2, max_size=2), min_size=1, max_size=2).map(torch.tensor),
    st.lists(st.booleans(), min_size=7, max_size=7).map(torch.tensor),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.one_of(index_item, st.tuples(index_item, index_item), st.tuples(index_item, index_item, index_item)))
def test_any_index(index: Any) -> None:
    weight = torch.arange(7 * 3 * 4.0).reshape(7, 3, 4)
    lazy = pylomin.lazy_loading(nn.ParameterList([weight.clone()]))
    expected = outcome(lambda: weight[index] * 1)
    assert_same(expected, outcome(lambda: lazy[0][index] * 1))


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    index=st.one_of(index_item, st.tuples(index_item, index_item)), value=st.sampled_from(["scalar", "tensor", "row"])
)
def test_any_assignment(index: Any, value: str) -> None:
    weight = torch.arange(7 * 3 * 4.0).reshape(7, 3, 4)
    lazy = pylomin.lazy_loading(nn.ParameterList([weight.clone()]))
    assigned: Any = {"scalar": 5.0, "tensor": torch.tensor(-1.0), "row": torch.arange(4.0) + 100}[value]

    def assign(target: Tensor) -> None:
        with torch.no_grad():
            target[index] = assigned

    expected = outcome(assign, weight)
    assert outcome(assign, lazy[0]) == expected
    if expected is None:  # torch may have written some elements before it raised
        assert_same(weight, lazy[0])


class Experts(nn.Module):
    """Packed weights of several experts, of which each token uses one."""

    def __init__(self, experts: int = 8) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, 4, 6))
        self.down = nn.Parameter(torch.randn(experts, 6, 4))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            rows = (chosen == expert).nonzero().reshape(-1)
            out.index_add_(0, rows, torch.relu(x[rows] @ self.up[expert]) @ self.down[expert])
        return out


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_packed_experts_load_only_those_routed_to(grad: bool) -> None:
    plain, lazy = twins(Experts())
    x = torch.randn(5, 4)
    for chosen in ([3, 3, 3, 3, 3], [0, 7, 0, 7, 0]):
        routed = torch.tensor(chosen)
        expected = run(plain, x, routed, grad=grad)
        assert_same(expected, run(lazy, x, routed, grad=grad))
        read = bytes_read(lazy, lambda: run(lazy, x, routed, grad=grad))
        assert read == len(set(chosen)) * (4 * 6 + 6 * 4) * 4


def test_packed_experts_with_batched_matmul() -> None:
    plain, lazy = twins(Experts())
    use = lambda m: torch.bmm(torch.ones(2, 1, 4), m.up[torch.tensor([1, 6])])  # noqa: E731
    assert_same(use(plain), use(lazy))
    assert bytes_read(lazy, lambda: use(lazy)) == 2 * 4 * 6 * 4


def test_rows_of_a_converted_table() -> None:
    plain, lazy = (m.half() for m in twins(nn.Embedding(ROWS, SIZE)))
    x = torch.tensor([1, 40])
    assert_same(run(plain, x), run(lazy, x))
    assert bytes_read(lazy, lambda: run(lazy, x)) == 2 * ROW_BYTES  # stored as float32


def test_rows_of_a_written_table() -> None:
    plain, lazy = twins(nn.Embedding(ROWS, SIZE))
    for model in (plain, lazy):
        with torch.no_grad():
            model.weight[3] = 7.0
    x = torch.tensor([2, 3, 4])
    assert_same(run(plain, x), run(lazy, x))
    assert bytes_read(lazy, lambda: run(lazy, x)) == 3 * ROW_BYTES


def test_rows_of_a_table_in_the_users_file(tmp_path: Path) -> None:
    plain = nn.Embedding(ROWS, SIZE).requires_grad_(False)
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    lazy = pylomin.load(lambda: nn.Embedding(ROWS, SIZE), tmp_path / "w.safetensors")
    x = torch.tensor([[0, 49]])
    assert_same(run(plain, x), run(lazy, x))
    assert bytes_read(lazy, lambda: run(lazy, x)) == 2 * ROW_BYTES


def table(source: str, tmp_path: Path) -> tuple[nn.Embedding, nn.Embedding]:
    """An embedding, and one with the same rows offloaded in some way."""
    plain = nn.Embedding(ROWS, SIZE).requires_grad_(False)
    values = plain.weight.detach().clone()
    if source == "storage cpu":
        return twins(plain, storage="cpu")
    if source == "mapping":
        return plain, pylomin.load(lambda: nn.Embedding(ROWS, SIZE), {"weight": values})
    if source == "mapping of views":
        values = torch.cat([torch.zeros(3, SIZE), values])[3:]
        return plain, pylomin.load(lambda: nn.Embedding(ROWS, SIZE), {"weight": values})
    if source == "file":
        save_file({"before": torch.ones(7), "weight": values}, tmp_path / "w.safetensors")
        return plain, pylomin.load(lambda: nn.Embedding(ROWS, SIZE), tmp_path / "w.safetensors", strict=False)
    if source == "resident":
        plain, lazy = twins(plain, memory_budget="1MiB")
        lazy.weight.sum()
        return plain, lazy
    plain, lazy = twins(plain, storage="cpu" if "cpu" in source else "disk")
    for model in (plain, lazy):
        if "converted" in source:
            model.half()
        else:
            model.weight[4].fill_(3.0)
            model.weight[::3].mul_(2.0)
    return plain, lazy


SOURCES = [
    "storage cpu",
    "mapping",
    "mapping of views",
    "file",
    "resident",
    "converted",
    "converted on cpu",
    "written",
    "written on cpu",
]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("use", [use for use, _ in READS.values()], ids=READS.keys())
def test_values_from_every_kind_of_source(use: Use, source: str, tmp_path: Path) -> None:
    plain, lazy = table(source, tmp_path)
    half = plain.weight.dtype == torch.float16
    for _ in range(2):
        expected = outcome(use, plain.weight)
        actual = outcome(use, lazy.weight)
        if half and isinstance(expected, tuple):  # such as a linear layer with float32 inputs
            assert isinstance(actual, tuple)
        else:
            assert_same(expected, actual)
    assert_same(plain.weight, lazy.weight)


def test_rows_kept_in_host_memory() -> None:
    plain, lazy = twins(nn.Embedding(ROWS, SIZE), storage="cpu")
    for x in (torch.tensor([[0, 49], [3, 3]]), torch.tensor([1, 2])):
        assert_same(run(plain, x), run(lazy, x))
    assert_same(plain.weight[torch.tensor([-1, 3])], lazy.weight[torch.tensor([-1, 3])])


def test_rows_of_a_transposed_table() -> None:
    model = nn.Embedding(6, 4)
    model.weight = nn.Parameter(torch.randn(4, 6).t())
    plain, lazy = twins(model)
    x = torch.tensor([[0, 5], [2, 2]])
    assert_same(run(plain, x), run(lazy, x))
    assert_same(plain.weight[[1, 5]], lazy.weight[[1, 5]])
    assert_same(plain.weight[-1] + 0, lazy.weight[-1] + 0)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 1000])
def test_chunked_lookup(chunk_size: int) -> None:
    plain, lazy = twins(nn.Sequential(nn.Embedding(ROWS, SIZE)))
    lazy = pylomin.chunked_embedding(lazy, target_module_name="0", chunk_size=chunk_size)
    for x in (torch.randint(0, ROWS, (4, 9)), torch.tensor([3, 3, 3]), torch.empty(0, 2, dtype=torch.long)):
        assert_same(run(plain, x), run(lazy, x))
        distinct = len(x.unique())
        assert bytes_read(lazy, lambda: run(lazy, x)) == distinct * ROW_BYTES


def test_mutating_a_lookup_does_not_change_the_table() -> None:
    plain, lazy = twins(nn.Embedding(ROWS, SIZE))
    x = torch.tensor([1, 2])
    for model in (plain, lazy):
        run(model, x).fill_(9.0)
        model.weight[[1, 2]].fill_(9.0)
        model.weight[torch.tensor([3])].zero_()
        model.weight.index_select(0, x).zero_()
        model.weight[mask(4)].zero_()
    assert_same(plain.weight, lazy.weight)


def test_view_of_rows_is_not_read_until_it_is_used() -> None:
    lazy = pylomin.lazy_loading(nn.Embedding(ROWS, SIZE))
    view = lazy.weight[3:5]
    assert isinstance(view, OffloadedTensor)
    assert view.shape == (2, SIZE)
    assert pylomin.stats(lazy).bytes_read == 0
