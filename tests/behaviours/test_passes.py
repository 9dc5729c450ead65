"""Passes: their arguments, their order, what they refuse, and undoing them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pylomin
from pylomin.lazy.tensor import OffloadedTensor

from .common import (
    Mlp,
    SizedLinears,
    Tied,
    assert_same,
    assert_same_parameters,
    bytes_read,
    compare,
    is_ordinary,
    resident_bytes,
    run,
    tree,
    twins,
)

X = torch.linspace(-1, 1, 16).view(2, 8)


class Everything(nn.Module):
    """A table, layers, a recurrent module, attention and parameters beside children."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.mlp = Mlp()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.token = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.mlp(self.table(ids)) + self.token
        x = self.attention(x, x, x)[0]
        logits: Tensor = self.head(self.rnn(x)[0])
        return logits


IDS = torch.tensor([[1, 2, 19, 2]])


# -- restore ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("used", [False, True], ids=["cold", "used"])
@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_restore_undoes_everything(used: bool, storage: str) -> None:
    model = Everything()
    model.token.requires_grad_(False)
    model.token.tag = "mine"
    model.mlp.first.weight.optimizer_group = {"lr": 0.1}
    model.mlp.first.register_forward_hook(lambda m, a, out: out + 1)
    plain = copy.deepcopy(model)
    modules = list(model.modules())
    attributes = [set(module.__dict__) for module in modules]
    lazy = pylomin.lazy_loading(model, storage=storage)
    assert lazy is model
    assert list(lazy.modules()) == modules
    if used:
        run(lazy, IDS)
        run(lazy, IDS, grad=True)
    restored = pylomin.restore(lazy)
    assert restored is model
    assert list(restored.modules()) == modules
    assert is_ordinary(restored)
    assert list(tree(restored)) == list(tree(plain))
    assert [set(module.__dict__) for module in restored.modules()] == attributes
    assert_same_parameters(plain, restored)
    expected = [(p.requires_grad, p.stride(), p.is_leaf) for p in plain.parameters()]
    assert [(p.requires_grad, p.stride(), p.is_leaf) for p in restored.parameters()] == expected
    assert restored.token.tag == "mine"
    assert restored.mlp.first.weight.optimizer_group == {"lr": 0.1}
    assert vars(restored.mlp.second.weight) == vars(plain.mlp.second.weight)
    assert restored.head.weight is restored.table.weight
    for _ in range(2):
        assert_same(run(plain, IDS), run(restored, IDS))
        left, right = run(plain, IDS, grad=True), run(restored, IDS, grad=True)
        left.sum().backward()
        right.sum().backward()
    assert_same([p.grad for p in plain.parameters()], [p.grad for p in restored.parameters()])


def test_restored_model_keeps_no_scratch_files(scratch: Path) -> None:
    restored = pylomin.restore(pylomin.lazy_loading(Everything()))
    run(restored, IDS)
    assert list(scratch.iterdir()) == []


def test_restored_values_are_private() -> None:
    values = {"weight": torch.randn(4, 4), "bias": torch.zeros(4)}
    before = copy.deepcopy(values)
    lazy = pylomin.load(lambda: nn.Linear(4, 4), values)
    restored = pylomin.restore(lazy)
    with torch.no_grad():
        restored.weight.mul_(2)
    assert_same(before, values)


def test_restored_copy_is_independent() -> None:
    lazy = pylomin.lazy_loading(Mlp(), storage="cpu")
    clone = copy.deepcopy(lazy)
    restored = pylomin.restore(lazy)
    expected = clone.first.weight.clone()
    with torch.no_grad():
        restored.first.weight.mul_(2)
    assert_same(expected, clone.first.weight)


def test_restore_after_writes_and_conversions() -> None:
    plain, lazy = twins(Everything())
    for model in (plain, lazy):
        with torch.no_grad():
            model.mlp.first.weight.mul_(2)
        model.double()
        model.head.weight.data[3] = 1.0
    restored = pylomin.restore(lazy)
    assert_same_parameters(plain, restored)
    assert_same(run(plain, IDS), run(restored, IDS))


def test_restore_refuses_when_there_is_nothing() -> None:
    for model in (Mlp(), nn.ReLU(), pylomin.restore(pylomin.lazy_loading(Mlp()))):
        with pytest.raises(pylomin.PassError, match="nothing to restore: no pass was applied"):
            pylomin.restore(model)


def test_restore_of_a_part() -> None:
    plain, lazy = twins(Everything())
    pylomin.restore(lazy.mlp)
    assert is_ordinary(lazy.mlp)
    assert isinstance(lazy.token, OffloadedTensor)
    compare(plain, lazy, IDS)
    pylomin.restore(lazy)
    assert is_ordinary(lazy)
    assert_same(run(plain, IDS), run(lazy, IDS))


def test_restore_when_a_weight_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({name: value.contiguous() for name, value in Mlp().state_dict().items()}, path)
    lazy = pylomin.load(Mlp, path)
    path.write_bytes(path.read_bytes()[:-40])
    classes = list(tree(lazy))
    with pytest.raises(pylomin.StoreReadError):
        pylomin.restore(lazy)
    assert list(tree(lazy)) == classes
    assert all(isinstance(p, OffloadedTensor) for p in lazy.parameters())


def test_offload_restore_many_times() -> None:
    plain, lazy = twins(Everything())
    for _ in range(4):
        lazy = pylomin.restore(lazy)
        lazy = pylomin.lazy_loading(lazy)
        compare(plain, lazy, IDS)


def test_isinstance_and_identity() -> None:
    model = Everything()
    modules = dict(model.named_modules())
    lazy = pylomin.lazy_loading(model)
    for name, module in lazy.named_modules():
        assert module is modules[name]
    assert isinstance(lazy.mlp.first, nn.Linear)
    assert isinstance(lazy.rnn, nn.GRU)
    assert isinstance(lazy.table, nn.Embedding)
    assert type(lazy.mlp.first).__mro__[-3:] == nn.Linear.__mro__
    assert type(lazy.mlp.first) is type(lazy.mlp.second)


# -- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("collection", [list, tuple, set, iter, lambda items: (item for item in items)])
def test_targets_in_any_collection(collection: Callable[[Any], Any]) -> None:
    for choose, expected in (
        (lambda m: {"target_modules": collection([m.mlp.first, m.rnn])}, {"mlp.first", "rnn"}),
        (lambda m: {"target_classes": collection([nn.Linear])}, {"mlp.first", "mlp.second", "attention.out_proj"}),
        (
            lambda m: {"target_classes": collection([nn.Linear]), "skip_modules": collection([m.mlp])},
            {"attention.out_proj"},
        ),
        (
            lambda m: {"skip_modules": collection([m.mlp, m.attention, m.table])},
            {"rnn", ""},
        ),
    ):
        model = Everything()
        plain = copy.deepcopy(model)
        lazy = pylomin.lazy_loading(model, **choose(model))
        owners = {n.rpartition(".")[0] for n, p in lazy.named_parameters() if isinstance(p, OffloadedTensor)}
        assert owners == expected
        assert_same(run(plain, IDS), run(lazy, IDS))


def test_verbatim_lines_of_the_readme() -> None:
    model = Everything()
    model.embeddings = nn.Module()
    model.embeddings.word_embeddings = nn.Embedding(20, 8)
    model = pylomin.lazy_loading(
        model, target_classes=[nn.Linear, nn.Embedding], skip_modules=[model.embeddings.word_embeddings]
    )
    assert type(model.embeddings.word_embeddings.weight) is nn.Parameter
    model = pylomin.chunked_embedding(model, target_module_name="embeddings.word_embeddings", chunk_size=2048)
    assert isinstance(model.embeddings.word_embeddings.weight, OffloadedTensor)


WRONG: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "not a module": (lambda m: pylomin.lazy_loading(3), TypeError, "expected a torch.nn.Module"),
    "class": (lambda m: pylomin.lazy_loading(nn.Linear), TypeError, "expected a torch.nn.Module.*found type"),
    "chunked not a module": (lambda m: pylomin.chunked_embedding(None), TypeError, "expected a torch.nn.Module"),
    "prefetch not a module": (lambda m: pylomin.prefetch("m"), TypeError, "expected a torch.nn.Module"),
    "restore not a module": (lambda m: pylomin.restore({}), TypeError, "expected a torch.nn.Module"),
    "module as skip": (lambda m: pylomin.lazy_loading(m, skip_modules=m.mlp), TypeError, "skip_modules is a Mlp"),
    "name as target": (lambda m: pylomin.lazy_loading(m, target_modules="mlp"), TypeError, "target_modules is a str"),
    "names as targets": (lambda m: pylomin.lazy_loading(m, target_modules=["mlp"]), TypeError, "contains 'mlp'"),
    "class as targets": (
        lambda m: pylomin.lazy_loading(m, target_classes=nn.Linear),
        TypeError,
        "target_classes is a type",
    ),
    "instances as classes": (
        lambda m: pylomin.lazy_loading(m, target_classes=[m.mlp]),
        TypeError,
        "target_classes contains",
    ),
    "wrong class": (lambda m: pylomin.lazy_loading(m, target_classes=[int]), TypeError, "target_classes contains"),
    "foreign skip": (
        lambda m: pylomin.lazy_loading(m, skip_modules=[nn.Linear(2, 2)]),
        pylomin.PassError,
        "skip_modules contains a Linear that is no part of the model",
    ),
    "foreign target": (
        lambda m: pylomin.lazy_loading(m, target_modules=[nn.Linear(2, 2)]),
        pylomin.PassError,
        "target_modules contains a Linear that is no part of the model",
    ),
    "no targets": (lambda m: pylomin.lazy_loading(m, target_modules=[]), pylomin.PassError, "nothing to offload"),
    "all skipped": (lambda m: pylomin.lazy_loading(m, skip_modules=[m]), pylomin.PassError, "nothing to offload"),
    "class not there": (
        lambda m: pylomin.lazy_loading(m, target_classes=[nn.Conv2d]),
        pylomin.PassError,
        "nothing to offload",
    ),
    "storage": (lambda m: pylomin.lazy_loading(m, storage="ram"), pylomin.PassError, "storage is 'ram'"),
    "device": (lambda m: pylomin.lazy_loading(m, device="nowhere"), RuntimeError, "nowhere"),
    "output_dir and cpu": (
        lambda m: pylomin.lazy_loading(m, storage="cpu", output_dir="x"),
        pylomin.PassError,
        "output_dir is for weights that are written",
    ),
    "weights and cpu": (
        lambda m: pylomin.lazy_loading(m, storage="cpu", weights=m.state_dict()),
        pylomin.PassError,
        "storage",
    ),
    "budget text": (lambda m: pylomin.lazy_loading(m, memory_budget="lots"), ValueError, "lots"),
    "budget negative": (lambda m: pylomin.lazy_loading(m, memory_budget=-1), ValueError, "-1"),
    "budget float": (lambda m: pylomin.lazy_loading(m, memory_budget=1.5), (TypeError, ValueError), "1.5"),
    "budget bool": (lambda m: pylomin.lazy_loading(m, memory_budget=True), (TypeError, ValueError), "True"),
    "budget zero": (lambda m: pylomin.lazy_loading(m, memory_budget=0), (ValueError, pylomin.BudgetError), "0"),
    "budget small": (
        lambda m: pylomin.lazy_loading(m, memory_budget=100),
        pylomin.BudgetError,
        r"weight '.*' needs .* resident, but memory_budget is 100 \(.*\)\. Use memory_budget of at least \d+",
    ),
    "missing weights": (
        lambda m: pylomin.lazy_loading(m, weights={"token": torch.zeros(8)}),
        pylomin.WeightNotFoundError,
        r"Missing in the store:\n(  '.*'\n)*  'mlp\.first\.weight'",
    ),
    "wrong shape": (
        lambda m: pylomin.lazy_loading(m, weights=m.state_dict() | {"token": torch.zeros(9)}),
        pylomin.WeightMismatchError,
        r"'token' in .*: found torch.float32 \[9\], expected torch.float32 \[8\]",
    ),
    "wrong dtype": (
        lambda m: pylomin.lazy_loading(m, weights=m.state_dict() | {"token": torch.zeros(8).half()}),
        pylomin.WeightMismatchError,
        r"found torch.float16 \[8\], expected torch.float32 \[8\]",
    ),
    "no file": (lambda m: pylomin.lazy_loading(m, weights="nowhere.safetensors"), OSError, "nowhere.safetensors"),
    "unwritable": (lambda m: pylomin.lazy_loading(m, output_dir="/proc/pylomin"), OSError, "/proc/pylomin"),
    "chunk size": (
        lambda m: pylomin.chunked_embedding(m, target_module_name="table", chunk_size=0),
        pylomin.PassError,
        "chunk_size is 0; expected a number of rows",
    ),
    "chunk size bool": (
        lambda m: pylomin.chunked_embedding(m, target_module_name="table", chunk_size=True),
        pylomin.PassError,
        "chunk_size is True",
    ),
    "chunk size float": (
        lambda m: pylomin.chunked_embedding(m, target_module_name="table", chunk_size=2.0),
        pylomin.PassError,
        "chunk_size is 2.0",
    ),
    "no such module": (
        lambda m: pylomin.chunked_embedding(m, target_module_name="tabel"),
        pylomin.PassError,
        r"no module 'tabel' \(similar: 'table'\)\. Embeddings of this model: 'table'",
    ),
    "no embedding": (
        lambda m: pylomin.chunked_embedding(m, target_module_name="mlp.first"),
        pylomin.PassError,
        "Linear is no nn.Embedding. Embeddings of this model: 'table'",
    ),
    "no target": (lambda m: pylomin.chunked_embedding(m), pylomin.PassError, "give either target_module_name or"),
    "both targets": (
        lambda m: pylomin.chunked_embedding(m, target_module_name="table", target_modules=[m.table]),
        pylomin.PassError,
        "give either target_module_name or",
    ),
    "empty targets": (
        lambda m: pylomin.chunked_embedding(m, target_modules=[]),
        pylomin.PassError,
        "target_modules is empty",
    ),
    "depth": (lambda m: pylomin.prefetch(m, depth=0), pylomin.PassError, "depth is 0; expected an int of at least 1"),
    "depth bool": (lambda m: pylomin.prefetch(m, depth=True), pylomin.PassError, "depth is True"),
    "prefetch budget": (
        lambda m: pylomin.prefetch(m, memory_budget="1GiB"),
        pylomin.PassError,
        "nothing in this model is offloaded yet",
    ),
    "nothing to restore": (pylomin.restore, pylomin.PassError, "nothing to restore"),
    "no stats": (pylomin.stats, pylomin.PassError, "nothing of this model is offloaded"),
}


@pytest.mark.parametrize(("call", "error", "text"), WRONG.values(), ids=WRONG.keys())
def test_wrong_arguments_leave_the_model_unchanged(
    call: Callable[[nn.Module], Any], error: type[Exception], text: str, scratch: Path
) -> None:
    model = Everything()
    plain = copy.deepcopy(model)
    parameters = list(model.parameters())
    with pytest.raises(error, match=text):
        call(model)
    assert is_ordinary(model)
    assert all(left is right for left, right in zip(parameters, model.parameters(), strict=True))
    assert_same(run(plain, IDS), run(model, IDS))
    assert list(scratch.iterdir()) == []


def test_arguments_are_keyword_only() -> None:
    with pytest.raises(TypeError):
        pylomin.lazy_loading(Mlp(), "weights.safetensors")
    with pytest.raises(TypeError):
        pylomin.chunked_embedding(Tied(), "table")
    with pytest.raises(TypeError):
        pylomin.prefetch(Mlp(), 2)


def test_max_norm_cannot_be_chunked() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(pylomin.PassError, match="has max_norm, which rewrites the rows"):
        pylomin.chunked_embedding(model, target_module_name="0")
    assert is_ordinary(model)


def test_second_lazy_loading_is_an_error_that_says_so() -> None:
    plain, lazy = twins(Mlp())
    with pytest.raises(pylomin.PassError, match="was applied to this model already, and nothing is left in memory"):
        pylomin.lazy_loading(lazy)
    compare(plain, lazy, X)


def test_second_lazy_loading_takes_the_rest() -> None:
    model = Everything()
    plain = copy.deepcopy(model).requires_grad_(False)
    lazy = pylomin.lazy_loading(model, target_classes=[nn.Linear])
    lazy = pylomin.lazy_loading(lazy, target_modules=[lazy.rnn])
    lazy = pylomin.lazy_loading(lazy)
    assert all(isinstance(p, OffloadedTensor) for p in lazy.parameters())
    for _ in range(2):
        assert_same(run(plain, IDS, grad=True), run(lazy, IDS, grad=True))
    assert resident_bytes(lazy) == 0


def test_output_dir_that_has_weights_already(tmp_path: Path) -> None:
    pylomin.lazy_loading(Mlp(), output_dir=tmp_path)
    model = Mlp()
    with pytest.raises(pylomin.PassError, match=r"model\.safetensors' exists\. To use its weights, pass weights="):
        pylomin.lazy_loading(model, output_dir=tmp_path)
    assert is_ordinary(model)


# -- order -----------------------------------------------------------------------------------------

PASSES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "lazy": lambda m: pylomin.lazy_loading(m),
    "chunked": lambda m: pylomin.chunked_embedding(m, target_module_name="table", chunk_size=3),
    "prefetch": lambda m: pylomin.prefetch(m),
}


@pytest.mark.parametrize("order", list(itertools.permutations(PASSES)), ids="-".join)
@pytest.mark.parametrize("budget", [None, "1MiB"])
def test_any_order_of_passes(order: tuple[str, ...], budget: str | None) -> None:
    model = Everything()
    plain = copy.deepcopy(model).requires_grad_(False)
    lazy = model
    for name in order:
        apply = PASSES[name]
        lazy = pylomin.lazy_loading(lazy, memory_budget=budget) if name == "lazy" else apply(lazy)
        assert lazy is model
        assert_same(run(plain, IDS).detach(), run(lazy, IDS).detach())
    assert all(isinstance(p, OffloadedTensor) for p in lazy.parameters())
    for _ in range(4):
        assert_same(run(plain, IDS, grad=True), run(lazy, IDS, grad=True))
    assert lazy.head.weight is lazy.table.weight
    restored = pylomin.restore(lazy)
    assert is_ordinary(restored)
    assert_same(run(plain.requires_grad_(True), IDS), run(restored, IDS))


def test_passes_twice() -> None:
    plain, lazy = twins(Everything())
    for size in (3, 1):
        lazy = pylomin.chunked_embedding(lazy, target_module_name="table", chunk_size=size)
        lazy = pylomin.prefetch(lazy, depth=size)
        for _ in range(3):
            assert_same(run(plain, IDS), run(lazy, IDS))


def test_prefetch_of_a_bigger_model() -> None:
    plain, lazy = twins(SizedLinears(6, 300))  # layers of 352 KiB, which are worth reading ahead
    lazy = pylomin.prefetch(lazy, depth=2)
    x = torch.randn(2, 300)
    for _ in range(4):
        assert_same(run(plain, x), run(lazy, x))
    stats = pylomin.stats(lazy)
    assert stats.prefetched > 0
    for i in (3, 1, 5, 0):
        assert_same(run(plain[i], x), run(lazy[i], x))
    for model in (plain, lazy):
        with torch.no_grad():
            model[0].weight.mul_(2)
            model[2].weight.zero_()
    for _ in range(2):
        assert_same(run(plain, x), run(lazy, x))
    pylomin.restore(lazy)
    assert_same(run(plain, x), run(lazy, x))


# -- budgets ---------------------------------------------------------------------------------------


def test_smallest_budget_that_the_error_names_works() -> None:
    for make in (Mlp, Everything, lambda: SizedLinears(3, 40)):
        model = make()
        plain = copy.deepcopy(model).requires_grad_(False)
        with pytest.raises(pylomin.BudgetError) as raised:
            pylomin.lazy_loading(model, memory_budget=10)
        needed = int(str(raised.value).partition("Use memory_budget of at least ")[2].split(",")[0].split(".")[0])
        with pytest.raises(pylomin.BudgetError):
            pylomin.lazy_loading(model, memory_budget=needed - 1)
        lazy = pylomin.lazy_loading(model, memory_budget=needed)
        x = IDS if isinstance(model, Everything) else torch.randn(2, 8 if isinstance(model, Mlp) else 40)
        for grad in (False, True):
            for _ in range(2):
                # Tiles round otherwise than whole weights.
                torch.testing.assert_close(run(lazy, x, grad=grad), run(plain, x, grad=grad))
        assert pylomin.stats(lazy).peak_bytes <= needed


def test_budget_error_names_the_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(400, 300, 1))
    with pytest.raises(pylomin.BudgetError, match=r"weight '1\.weight' needs .*skip_modules"):
        pylomin.lazy_loading(model, memory_budget="100KiB")
    assert is_ordinary(model)


def test_budget_that_holds_all_reads_once() -> None:
    plain, lazy = twins(Mlp(), memory_budget="1MiB")
    run(lazy, X)
    assert bytes_read(lazy, lambda: run(lazy, X)) == 0
    assert_same(run(plain, X), run(lazy, X))
    assert 0 < resident_bytes(lazy) <= 1 << 20


def test_parameters_metadata_matches() -> None:
    plain, lazy = twins(Everything())
    for (name, left), (other, right) in zip(plain.named_parameters(), lazy.named_parameters(), strict=True):
        assert name == other
        assert (left.shape, left.dtype, left.stride(), left.device, left.layout) == (
            right.shape,
            right.dtype,
            right.stride(),
            right.device,
            right.layout,
        )


def test_dir_of_a_module_and_its_attributes() -> None:
    plain, lazy = twins(Mlp())
    assert set(dir(plain.first)) <= set(dir(lazy.first))
    assert set(plain.first.__dict__) == set(lazy.first.__dict__)
    lazy.first.note = "kept"
    assert pylomin.restore(lazy).first.note == "kept"


def test_extra_attributes_of_parameters_survive_offloading() -> None:
    model = nn.Linear(4, 4)
    model.weight.tag = ["a"]
    lazy = pylomin.lazy_loading(model)
    assert lazy.weight.tag == ["a"]
    lazy.weight.later = 3
    clone = copy.deepcopy(lazy)
    assert clone.weight.tag == ["a"]
    assert clone.weight.tag is not lazy.weight.tag
    restored = pylomin.restore(lazy)
    assert restored.weight.later == 3
