"""Weights that are read without calling the module that owns them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import pylomin

from .common import (
    Mlp,
    Tied,
    assert_same,
    assert_same_outcome,
    check,
    compare,
    crash_proof,
    outcome,
    resident_bytes,
    run,
    twins,
)

Use = Callable[[Tensor], Any]

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # torch's own, about NumPy 2

USES: dict[str, Use] = {
    "add": lambda w: w + 1,
    "radd": lambda w: 1 + w,
    "sub": lambda w: w - w.mean(),
    "mul": lambda w: w * w,
    "div": lambda w: 2 / w,
    "pow": lambda w: w**2,
    "neg": lambda w: -w,
    "abs": lambda w: abs(w),
    "matmul": lambda w: w @ w.T,
    "matmul left": lambda w: torch.ones(2, w.shape[0]) @ w,
    "sum": lambda w: w.sum(),
    "sum dim": lambda w: w.sum(0),
    "norm": lambda w: w.norm(),
    "linalg norm": lambda w: torch.linalg.vector_norm(w, dim=1),
    "svd": lambda w: torch.linalg.svd(w),
    "max with index": lambda w: w.max(dim=1),
    "topk": lambda w: w.topk(2),
    "sort": lambda w: w.sort(dim=0),
    "std": lambda w: w.std(),
    "equal": lambda w: torch.equal(w, w.clone()),
    "not equal": lambda w: torch.equal(w, w + 1),
    "allclose": lambda w: torch.allclose(w, w * 1),
    "greater": lambda w: w > 0,
    "eq": lambda w: w == w,
    "contains": lambda w: 100.0 in w,
    "where": lambda w: torch.where(w > 0, w, 0),
    "iterate": lambda w: [row.sum() for row in w],
    "unpack": lambda w: [*w],
    "enumerate nested": lambda w: [[float(x) for x in row] for row in w],
    "reversed": lambda w: list(reversed(w)),
    "len": len,
    "bool": lambda w: bool(w[0, 0]),
    "bool of many": bool,
    "float": lambda w: float(w[1, 2]),
    "float of many": float,
    "int": lambda w: int(w[1, 2] * 100),
    "index": lambda w: [0, 1, 2][(w[0, 0] * 0).long()],
    "complex": lambda w: complex(w[1, 2]),
    "item": lambda w: w[0, 1].item(),
    "item of many": lambda w: w.item(),
    "tolist": lambda w: w.tolist(),
    "row tolist": lambda w: w[1].tolist(),
    "numpy": lambda w: w.detach().numpy().copy().tolist(),
    "numpy of row": lambda w: w.detach()[1].numpy().tolist(),
    "asarray": lambda w: np.asarray(w.detach()).tolist(),
    "np array dtype": lambda w: np.array(w.detach(), dtype=np.float64).tolist(),
    "np sum": lambda w: float(np.sum(w.detach().numpy())),
    "np ufunc": lambda w: np.add(w.detach(), 1).tolist(),
    "new tensor": lambda w: w.detach().new_tensor([1.0, 2.0]),
    "as tensor": lambda w: torch.as_tensor(w),
    "asarray of torch": lambda w: torch.asarray(w),
    "stack": lambda w: torch.stack([w, w]),
    "stack rows": lambda w: torch.stack([w[0], w[2]]),
    "cat": lambda w: torch.cat([w, w[:1]]),
    "block diag": lambda w: torch.block_diag(w, w),
    "dlpack": lambda w: torch.from_dlpack(w.detach()),
    "clone": lambda w: w.clone(),
    "contiguous": lambda w: w.contiguous(),
    "transpose": lambda w: w.t().contiguous(),
    "permute": lambda w: w.permute(1, 0) + 0,
    "view": lambda w: w.view(-1) + 0,
    "reshape": lambda w: w.reshape(2, -1) + 0,
    "reshape copies": lambda w: w.t().reshape(-1),
    "flatten": lambda w: w.flatten() * 1,
    "unsqueeze": lambda w: w.unsqueeze(1) * 1,
    "expand": lambda w: w[:1].expand(3, -1) + 0,
    "repeat": lambda w: w.repeat(2, 1),
    "diagonal": lambda w: w.diagonal() + 0,
    "unfold": lambda w: w.unfold(1, 2, 1) + 0,
    "narrow": lambda w: w.narrow(1, 1, 2) + 0,
    "chunk": lambda w: [part.sum() for part in w.chunk(3, dim=1)],
    "split": lambda w: [part + 0 for part in w.split([1, 3])],
    "tensor split": lambda w: [part + 0 for part in w.tensor_split(3)],
    "unbind": lambda w: [part + 0 for part in w.unbind(1)],
    "movedim": lambda w: w.movedim(0, 1) + 0,
    "view as complex": lambda w: torch.view_as_complex(w.view(4, -1, 2)) * 1,
    "view dtype": lambda w: w.detach().view(torch.int32) + 0,
    "view as bytes": lambda w: w.detach().view(torch.uint8).clone(),
    "as strided": lambda w: w.as_strided((2, 2), (1, 4), 1) + 0,
    "einsum": lambda w: torch.einsum("ij,kj->ik", w, w),
    "linear": lambda w: functional.linear(torch.ones(1, w.shape[1]), w),
    "addmm": lambda w: torch.addmm(torch.zeros(4), torch.ones(2, 4), w[:, :4]),
    "out": lambda w: torch.add(w, 1, out=torch.empty(4, 6)),
    "inplace on another": lambda w: torch.zeros(4, 6).add_(w),
    "copy to another": lambda w: torch.zeros(4, 6).copy_(w),
    "assign to slice": lambda w: torch.zeros(8, 6).index_copy_(0, torch.arange(4), w),
    "set item of another": lambda w: _set_item(torch.zeros(8, 6), w),
    "type as": lambda w: torch.ones(2).type_as(w),
    "to": lambda w: w.to(torch.float64),
    "double": lambda w: w.double() * 2,
    "half": lambda w: w.half(),
    "to other": lambda w: w.to(torch.ones(1, dtype=torch.float16)),
    "type": lambda w: w.type(torch.DoubleTensor) + 0,
    "cpu": lambda w: w.cpu() + 0,
    "is floating point": lambda w: (w.is_floating_point(), w.dtype, w.device, w.layout, w.is_leaf),
    "geometry": lambda w: (w.shape, w.size(1), w.stride(), w.storage_offset(), w.dim(), w.ndim, w.numel()),
    "sizes": lambda w: (w.nbytes, w.itemsize, w.element_size(), w.untyped_storage().nbytes()),
    "is contiguous": lambda w: (w.is_contiguous(), w.t().is_contiguous(), w.is_sparse, w.is_quantized, w.is_meta),
    "hashable": lambda w: {w: 1}[w],
    "zeros like": lambda w: torch.zeros_like(w),
    "ones like": lambda w: torch.ones_like(w, dtype=torch.float64),
    "full like": lambda w: torch.full_like(w, 3.0),
    "empty like": lambda w: torch.empty_like(w).shape,
    "rand like": lambda w: torch.rand_like(w),
    "randn like": lambda w: torch.randn_like(w),
    "bernoulli": lambda w: torch.bernoulli(torch.sigmoid(w)),
    "new zeros": lambda w: w.new_zeros(2, 3),
    "new full": lambda w: w.new_full((2,), 1.5),
    "isnan": lambda w: w.isnan().any(),
    "any": lambda w: (w > 10).any(),
    "cumsum": lambda w: w.cumsum(0),
    "gather": lambda w: w.gather(0, torch.zeros(1, 6, dtype=torch.long)),
    "take": lambda w: w.take(torch.tensor([0, 5, 23])),
    "masked select": lambda w: w.masked_select(w > 0),
    "nonzero": lambda w: w.nonzero(),
    "unique": lambda w: w.unique(),
    "fft": lambda w: torch.fft.fft(w),
    "cdist": lambda w: torch.cdist(w, w),
    "cosine": lambda w: functional.cosine_similarity(w[:1], w),
    "dropout": lambda w: functional.dropout(w, 0.5),
    "softmax": lambda w: w.softmax(-1),
    "pad": lambda w: functional.pad(w, (1, 1)),
    "interpolate": lambda w: functional.interpolate(w[None, None], scale_factor=2),
    "histc": lambda w: w.histc(4),
    "foreach": lambda w: torch._foreach_add([w, w], 1.0),
    "foreach norm": lambda w: torch._foreach_norm([w, w]),
    "parameters to vector": lambda w: nn.utils.parameters_to_vector([w, w]),
    "vmap": lambda w: torch.vmap(lambda row: row.sum())(w),
    "format of one": lambda w: f"{w[0, 0]:.3f}",
    "round": lambda w: round(float(w[0, 0]), 3),
    "matrix property": lambda w: (w.mT + 0, w.T + 0, w.H + 0),
    "real": lambda w: w.real + 0,
    "grad": lambda w: w.grad,
    "data": lambda w: w.data + 0,
    "detach": lambda w: w.detach() + 0,
    "has torch function": lambda w: (torch.is_tensor(w), isinstance(w, Tensor), isinstance(w, nn.Parameter)),
    "out of range": lambda w: w[4],
    "wrong shape": lambda w: w @ w,
    "wrong view": lambda w: w.view(5, 5),
    "wrong dim": lambda w: w.sum(7),
}


def _set_item(target: Tensor, w: Tensor) -> Tensor:
    target[2:6] = w
    return target


@pytest.mark.parametrize("storage", ["disk", "cpu"])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")
def test_use(use: Use, storage: str) -> None:
    plain, lazy = twins(nn.Linear(6, 4), storage=storage)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                torch.manual_seed(1)
                expected = outcome(use, plain.weight)
                torch.manual_seed(1)
                actual = outcome(use, lazy.weight)
                if isinstance(expected, Tensor) and expected is plain.weight:
                    assert actual is lazy.weight
                assert_same(expected, actual)
                del actual
    assert_same(plain.weight, lazy.weight)
    assert resident_bytes(lazy) == 0


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
@pytest.mark.parametrize("make", [torch.tensor, torch.Tensor.clone, copy.copy, copy.deepcopy])
def test_new_tensor_from_weight(make: Use) -> None:
    plain, lazy = twins(nn.Linear(6, 4))
    assert_same(make(plain.weight).detach(), make(lazy.weight).detach())


def test_tensor_of_nested_scalars_raises() -> None:
    """torch.tensor reads the address of each scalar, from C; it takes their values with .item() or torch.stack."""
    plain, lazy = twins(nn.Linear(6, 4))
    with pytest.raises(RuntimeError, match="not allocated"):
        torch.tensor([[lazy.weight[0, 0], 3.0]])
    assert_same(*(torch.tensor([[w[0, 0].item(), 3.0]]) for w in (plain.weight, lazy.weight)))


def test_singular_values_are_those_of_a_tensor_that_requires_grad() -> None:
    # torch.linalg.svdvals computes singular vectors, too, for tensor subclasses as for tensors that require grad.
    plain, lazy = twins(nn.Linear(6, 4))
    expected = torch.linalg.svdvals(plain.weight.detach().requires_grad_()).detach()
    assert_same(expected, torch.linalg.svdvals(lazy.weight))


def test_access_to_the_address_from_c_raises_instead_of_crashing() -> None:
    printed = crash_proof("""
weight = pylomin.lazy_loading(nn.Linear(6, 4)).weight
try:
    values = torch.from_dlpack(torch.utils.dlpack.to_dlpack(weight.detach()))
    print("right" if torch.equal(values, weight.materialize()) else "wrong")
except RuntimeError as error:
    print("raised", error)
""")
    assert printed.startswith(("right", "raised"))


def test_stack_of_all_parameters() -> None:
    plain, lazy = twins(nn.ModuleList(nn.Linear(4, 3) for _ in range(3)))
    assert_same(*(torch.stack([layer.weight for layer in m]) for m in (plain, lazy)))
    assert_same(*(torch.cat([p.flatten() for p in m.parameters()]) for m in (plain, lazy)))
    assert sum(p.numel() for p in lazy.parameters()) == sum(p.numel() for p in plain.parameters())


def test_repr_shows_name_shape_and_no_values() -> None:
    lazy = pylomin.lazy_loading(nn.Sequential(nn.Linear(6, 4)))
    assert repr(lazy[0].weight) == "OffloadedTensor('0.weight', size=(4, 6), dtype=torch.float32, device='cpu')"
    assert f"{lazy[0].weight}" == str(lazy[0].weight) == repr(lazy[0].weight)
    assert pylomin.stats(lazy).bytes_read == 0


def test_repr_of_model_shows_what_is_lazy() -> None:
    plain, lazy = twins(nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 4), Mlp()))
    assert repr(lazy).replace("Lazy", "") == repr(plain)
    assert "LazyLinear(in_features=6" in repr(lazy)


def test_metadata_reads_nothing() -> None:
    lazy = pylomin.lazy_loading(Mlp())
    for name, parameter in lazy.named_parameters():
        assert name
        parameter.shape, parameter.dtype, parameter.stride(), parameter.numel(), len(parameter), parameter.nbytes
        parameter.t() if parameter.dim() == 2 else parameter.view(-1)
        parameter.detach(), parameter[0], parameter.data, hash(parameter), parameter.is_contiguous()
        torch.empty_like(parameter)
    lazy.state_dict()
    repr(lazy)
    assert pylomin.stats(lazy).bytes_read == 0


class SharedTable(nn.Module):
    """Computes logits with the weight of its embedding, and has an ``encode`` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)

    def encode(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.table.weight) @ self.body.weight + self.body.bias

    def forward(self, ids: Tensor) -> Tensor:
        return functional.linear(self.body(self.table(ids)), self.table.weight)


def test_linear_with_the_weight_of_an_embedding() -> None:
    check(SharedTable(), torch.tensor([[1, 2], [9, 0]]))


def test_custom_method() -> None:
    plain, lazy = twins(SharedTable())
    x = torch.tensor([[1, 2], [9, 0]])
    for _ in range(2):
        assert_same(run(plain.encode, x), run(lazy.encode, x))


def test_forward_called_directly() -> None:
    plain, lazy = twins(Mlp())
    x = torch.randn(2, 8)
    for _ in range(2):
        assert_same(run(plain.forward, x), run(lazy.forward, x))
        assert_same(run(plain.first.forward, x), run(lazy.first.forward, x))
        assert_same(nn.Linear.forward(plain.first, x).detach(), nn.Linear.forward(lazy.first, x).detach())
    assert resident_bytes(lazy) == 0


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        x = torch.tanh(x @ self.weight) + self.bias
        return x if depth == 0 else self(x, depth - 1) * self.weight[depth]


def test_module_that_calls_itself() -> None:
    check(Recursive(), torch.randn(2, 4))


def test_module_used_twice_and_under_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) + self.a(x)

    lazy = check(Twice(), torch.randn(2, 4))
    assert lazy.a is lazy.b


def test_module_without_forward_of_its_own() -> None:
    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 3))

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = Bag()

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.bag.w

    check(Uses(), torch.randn(2, 3))


def test_parameters_beside_children() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.token = nn.Parameter(torch.randn(1, 1, 4))
            self.position = nn.Parameter(torch.randn(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            token = self.token.expand(x.shape[0], -1, -1)
            return self.layer(torch.cat([token, x], dim=1)) + self.position[: x.shape[1] + 1]

    check(Mixed(), torch.randn(2, 3, 4))


def test_call_statics_on_a_weight_kept_from_before_offloading() -> None:
    model = nn.Linear(4, 3)
    weight = model.weight
    expected = weight.detach().clone()
    lazy = pylomin.lazy_loading(model)
    assert_same(expected, weight.detach())  # who holds the old parameter keeps its values
    assert_same(expected, lazy.weight)


def test_weight_kept_from_inside_a_forward() -> None:
    class Leaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))
            self.kept: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.kept.append(self.weight)
            self.kept.append(self.weight.t())
            self.kept.append(self.weight.detach()[1:3])
            return x @ self.weight

    plain, lazy = twins(nn.Sequential(*(Leaks() for _ in range(4))))
    x = torch.randn(2, 64)
    for _ in range(3):
        assert_same(run(plain, x), run(lazy, x))
    for left, right in zip(plain, lazy, strict=True):
        assert_same([t.detach() for t in left.kept], [t.detach() for t in right.kept])


def test_output_that_is_a_weight() -> None:
    class Gives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self) -> tuple[Tensor, Tensor, Tensor]:
            return self.weight, self.weight[1], self.weight.t()

    plain, lazy = twins(nn.ModuleList(Gives() for _ in range(3)))
    outputs = [layer() for layer in lazy]
    outputs += [layer() for layer in lazy]
    for left, right in zip([layer() for layer in plain] * 2, outputs, strict=True):
        assert_same(left, right)


def test_weights_of_two_models_in_one_operation() -> None:
    plain_a, lazy_a = twins(nn.Linear(4, 3))
    plain_b, lazy_b = twins(nn.Linear(4, 3))
    assert_same(plain_a.weight * plain_b.weight, lazy_a.weight * lazy_b.weight)
    assert_same(plain_a.weight @ plain_b.weight.t(), lazy_a.weight @ lazy_b.weight.t())
    lazy_a.load_state_dict(lazy_b.state_dict())
    assert_same(plain_b.weight, lazy_a.weight)


def test_expressions_between_weights_and_buffers() -> None:
    plain, lazy = twins(Mlp())
    use = lambda m: (m.scale * m.second.bias, m.second.weight.mv(m.norm.weight))  # noqa: E731
    assert_same_outcome(use, plain, lazy)


def test_weights_in_threads_and_generators() -> None:
    plain, lazy = twins(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)))
    rows = (layer.weight[1] * 1 for layer in lazy)
    assert_same([layer.weight[1] * 1 for layer in plain], list(rows))


def test_tied_head() -> None:
    lazy = check(Tied(), torch.tensor([[1, 2, 19]]))
    assert lazy.head.weight is lazy.table.weight


def test_cached_property_of_a_weight() -> None:
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.cache: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = self.layer.weight.t().contiguous()
            return self.layer(x) @ self.cache

    check(Cached(), torch.randn(2, 4))


def test_weight_in_a_closure_and_a_dictionary() -> None:
    model = nn.Linear(4, 4)
    plain, lazy = twins(model)
    registry = {"w": lazy.weight}
    multiply = functools.partial(torch.mul, lazy.weight)
    assert_same(plain.weight * 2, multiply(2))
    assert_same(plain.weight + 1, registry["w"] + 1)


def test_values_do_not_change_when_used_out_of_order() -> None:
    plain, lazy = twins(nn.ModuleList(nn.Linear(8, 8) for _ in range(5)))
    x = torch.randn(2, 8)
    for order in ([0, 1, 2, 3, 4], [4, 0, 3], [2, 2, 2], [1, 4]):
        for i in order:
            assert_same(run(plain[i], x), run(lazy[i], x))
    for left, right in zip(plain, lazy, strict=True):
        compare(left, right, x)
