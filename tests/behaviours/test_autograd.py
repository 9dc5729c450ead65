"""Gradients flow through offloaded weights, and the graph keeps none of their bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import pylomin

from .common import Mlp, SizedLinears, assert_same, outcome, resident_bytes, run, twins

Case = tuple[Callable[[], nn.Module], Callable[[], Tensor]]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x)[0]
        return out


class Direct(nn.Module):
    """Uses weights without calling their owners."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.tanh(x @ self.layer.weight) * self.scale + self.layer.bias[2]
        return mixed @ self.layer.weight[1:5].t() + nn.functional.linear(x, self.layer.weight)[..., :4]


class First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)[0]
        return out


CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(8, 4), lambda: torch.randn(3, 8)),
    "linear 3-D": (lambda: nn.Linear(8, 4), lambda: torch.randn(2, 3, 8)),
    "linear without bias": (lambda: nn.Linear(8, 4, bias=False), lambda: torch.randn(3, 8)),
    "mlp": (Mlp, lambda: torch.randn(3, 8)),
    "bilinear": (lambda: _Bilinear(), lambda: torch.randn(3, 8)),
    "conv": (lambda: nn.Conv2d(2, 3, 3), lambda: torch.randn(1, 2, 6, 6)),
    "conv channels last": (
        lambda: nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),
        lambda: torch.randn(1, 2, 6, 6),
    ),
    "conv transpose": (lambda: nn.ConvTranspose1d(2, 3, 3), lambda: torch.randn(1, 2, 6)),
    "lstm": (lambda: First(nn.LSTM(8, 4, num_layers=2, bidirectional=True)), lambda: torch.randn(3, 2, 8)),
    "gru": (lambda: First(nn.GRU(8, 4)), lambda: torch.randn(3, 2, 8)),
    "lstm cell": (lambda: First(nn.LSTMCell(8, 4)), lambda: torch.randn(2, 8)),
    "layer norm": (lambda: nn.LayerNorm(8), lambda: torch.randn(3, 8)),
    "rms norm": (lambda: nn.RMSNorm(8), lambda: torch.randn(3, 8)),
    "group norm": (lambda: nn.GroupNorm(2, 4), lambda: torch.randn(2, 4, 3)),
    "batch norm train": (lambda: nn.BatchNorm1d(8).train(), lambda: torch.randn(4, 8)),
    "batch norm eval": (lambda: nn.BatchNorm1d(8).eval(), lambda: torch.randn(4, 8)),
    "prelu": (lambda: nn.PReLU(8), lambda: torch.randn(4, 8)),
    "attention train": (lambda: Attention().train(), lambda: torch.randn(2, 3, 8)),
    "attention eval": (lambda: Attention().eval(), lambda: torch.randn(2, 3, 8)),
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        lambda: torch.randn(2, 3, 8),
    ),
    "direct": (Direct, lambda: torch.randn(3, 8)),
}


class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x, x.flip(0))
        return out


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradient_of_the_input(case: Case) -> None:
    make, sample = case
    plain, lazy = twins(make())
    x = sample()
    for _ in range(2):
        results = []
        for model in (plain, lazy):
            leaf = x.clone().requires_grad_()
            out = model(leaf)
            if model is lazy:
                assert resident_bytes(lazy) == 0, "the graph keeps weights"
            out.square().sum().backward()
            results.append((out.detach(), leaf.grad))
            del out
        assert_same(results[0], results[1])
        assert resident_bytes(lazy) == 0
    assert all(p.grad is None for p in lazy.parameters())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_backward_twice_through_one_graph(case: Case) -> None:
    make, sample = case
    plain, lazy = twins(make())
    x = sample()
    results = []
    for model in (plain, lazy):
        leaf = x.clone().requires_grad_()
        out = model(leaf).sum()
        out.backward(retain_graph=True)
        out.backward()
        results.append(leaf.grad)
    assert_same(results[0], results[1])


DOUBLE = ["linear", "mlp", "conv", "lstm cell", "layer norm", "direct", "attention train", "rms norm", "prelu"]


@pytest.mark.parametrize("name", DOUBLE)
def test_double_backward(name: str) -> None:
    make, sample = CASES[name]
    plain, lazy = twins(make())
    x = sample()
    results = []
    for model in (plain, lazy):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(leaf).pow(3).sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
        results.append((gradient.detach(), leaf.grad))
    assert_same(results[0], results[1])
    del gradient
    assert resident_bytes(lazy) == 0


def test_skipped_modules_train() -> None:
    recurrent = [nn.LSTM(8, 8), First(nn.Identity())]
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), *recurrent, nn.Linear(8, 8), nn.Linear(8, 2))
    plain, lazy = twins(model, skip_modules=[model[0], model[4]])
    assert [p.requires_grad for p in lazy.parameters()].count(True) == 4
    x = torch.randn(3, 2, 8)
    optimizers = [torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=0.01) for m in (plain, lazy)]
    for _ in range(3):
        for each, optimizer in zip((plain, lazy), optimizers, strict=True):
            optimizer.zero_grad()
            run(each, x, grad=True).square().mean().backward()
            optimizer.step()
        for left, right in zip(plain.parameters(), lazy.parameters(), strict=True):
            if left.requires_grad:
                assert_same(left.grad, right.grad)
                assert_same(left.detach(), right.detach())


def test_adapter_beside_an_offloaded_layer() -> None:
    class LoRA(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.a = nn.Parameter(torch.randn(2, 8))
            self.b = nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.base(x) + x @ self.a.t() @ self.b.t()
            return out

    torch.manual_seed(0)
    model = LoRA(nn.Linear(8, 4))
    lazy = pylomin.lazy_loading(model, target_classes=[nn.Linear])
    torch.manual_seed(0)
    plain = LoRA(nn.Linear(8, 4))
    x = torch.randn(3, 8)
    for each in (plain, lazy):
        each(x).sum().backward()
    assert_same((plain.a.grad, plain.b.grad), (lazy.a.grad, lazy.b.grad))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_gradient_checkpointing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Mlp() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    plain, lazy = twins(Checkpointed())
    x = torch.randn(2, 8)
    results = []
    for model in (plain, lazy):
        leaf = x.clone().requires_grad_()
        out = model(leaf)
        assert model is plain or resident_bytes(lazy) == 0
        out.sum().backward()
        results.append((out.detach(), leaf.grad))
    assert_same(results[0], results[1])
    del out
    assert resident_bytes(lazy) == 0


def test_checkpoint_sequential() -> None:
    plain, lazy = twins(nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))))
    results = []
    for model in (plain, lazy):
        leaf = torch.ones(2, 8, requires_grad=True)
        checkpoint_sequential(model, 3, leaf, use_reentrant=False).sum().backward()
        results.append(leaf.grad)
    assert_same(results[0], results[1])


def test_users_saved_tensor_hooks_still_run() -> None:
    plain, lazy = twins(Mlp())
    counts = []
    for model in (plain, lazy):
        packed: list[torch.Size] = []

        def pack(tensor: Tensor, packed: list[torch.Size] = packed) -> Tensor:
            packed.append(tensor.shape)
            return tensor.clone()

        leaf = torch.ones(2, 8, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(leaf)
        out.sum().backward()
        counts.append((len(packed) > 0, leaf.grad))
    assert_same(counts[0], counts[1])


def test_save_on_cpu() -> None:
    plain, lazy = twins(Mlp())
    gradients = []
    for model in (plain, lazy):
        leaf = torch.ones(2, 8, requires_grad=True)
        with torch.autograd.graph.save_on_cpu():
            out = model(leaf)
        out.sum().backward()
        gradients.append(leaf.grad)
    assert_same(gradients[0], gradients[1])


@pytest.mark.parametrize("write", ["in place", "row", "load_state_dict"])
@pytest.mark.parametrize("direct", [False, True], ids=["module", "direct"])
def test_write_between_forward_and_backward_raises(write: str, direct: bool) -> None:
    lazy = pylomin.lazy_loading(nn.Linear(8, 4))
    x = torch.randn(2, 8, requires_grad=True)
    out = x @ lazy.weight.t() if direct else lazy(x)
    with torch.no_grad():
        if write == "in place":
            lazy.weight.mul_(2)
        elif write == "row":
            lazy.weight[0].zero_()
        else:
            lazy.load_state_dict(nn.Linear(8, 4).state_dict())
    with pytest.raises(RuntimeError, match=r"modified by an in-?place operation"):
        out.sum().backward()


@pytest.mark.parametrize("direct", [False, True], ids=["module", "direct"])
def test_write_to_data_between_forward_and_backward(direct: bool) -> None:
    """torch does not notice this one and takes the new values. Noticing is fine, other values are not."""
    plain, lazy = twins(nn.Linear(8, 4))
    gradients = []
    for model in (plain, lazy):
        leaf = torch.ones(2, 8, requires_grad=True)
        out = leaf @ model.weight.t() if direct else model(leaf)
        model.weight.data.mul_(2)
        gradients.append(outcome(lambda out=out, leaf=leaf: (out.sum().backward(), leaf.grad)[1]))
    if isinstance(gradients[1], tuple):
        assert "modified by an in-place operation" in gradients[1][1]
    else:
        assert_same(gradients[0], gradients[1])


def test_write_to_another_weight_between_forward_and_backward_is_allowed() -> None:
    plain, lazy = twins(Mlp())
    gradients = []
    for model in (plain, lazy):
        leaf = torch.ones(2, 8, requires_grad=True)
        out = model(leaf)
        with torch.no_grad():
            model.first.bias.add_(1)  # not needed for the gradient
        out.sum().backward()
        gradients.append(leaf.grad)
    assert_same(gradients[0], gradients[1])


def test_replacing_the_data_between_forward_and_backward() -> None:
    plain, lazy = twins(nn.Linear(8, 4))
    gradients = []
    for model in (plain, lazy):
        leaf = torch.ones(2, 8, requires_grad=True)
        out = model(leaf)
        model.weight.data = torch.zeros(4, 8)  # what was saved keeps the old memory
        out.sum().backward()
        gradients.append(leaf.grad)
    assert_same(gradients[0], gradients[1])


def test_backward_after_the_model_is_gone() -> None:
    plain, lazy = twins(Mlp())
    leaves = [torch.ones(2, 8, requires_grad=True) for _ in range(2)]
    outputs = [plain(leaves[0]), lazy(leaves[1])]
    del lazy
    for out in outputs:
        out.sum().backward()
    assert_same(leaves[0].grad, leaves[1].grad)


def test_backward_after_conversion_and_restore() -> None:
    for change in (lambda m: m.double(), pylomin.restore):
        plain, lazy = twins(Mlp())
        leaves = [torch.ones(2, 8, requires_grad=True) for _ in range(2)]
        outputs = [plain(leaves[0]), lazy(leaves[1])]
        change(lazy)
        for out in outputs:
            out.sum().backward()
        assert_same(leaves[0].grad, leaves[1].grad)


def test_memory_does_not_grow_with_depth_in_grad_mode() -> None:
    lazy = pylomin.lazy_loading(SizedLinears(8, 32))
    out = lazy(torch.randn(2, 32, requires_grad=True))
    assert resident_bytes(lazy) == 0
    out.sum().backward()
    assert pylomin.stats(lazy).peak_bytes <= 2 * (32 * 32 + 32) * 4 + 2 * 4096


def test_grad_mode_under_the_smallest_budget() -> None:
    model = SizedLinears(8, 64)
    plain, lazy = twins(model, memory_budget=5 * 4096 + 4096)
    leaves = [torch.ones(2, 64, requires_grad=True) for _ in range(2)]
    for each, leaf in zip((plain, lazy), leaves, strict=True):
        each(leaf).sum().backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)  # tiles round otherwise


def test_functional_jvp_vjp_jacobian_hessian() -> None:
    plain, lazy = twins(Mlp())
    x, v = torch.randn(8), torch.randn(8)
    functional = torch.autograd.functional
    for compute in (
        lambda m: functional.jvp(m, x, v),
        lambda m: functional.vjp(m, x, v),
        lambda m: functional.jacobian(m, x),
        lambda m: functional.jacobian(m, x, vectorize=True),
        lambda m: functional.hessian(lambda y: m(y).square().sum(), x),
    ):
        assert_same(compute(plain), compute(lazy))
    assert resident_bytes(lazy) == 0


@pytest.mark.parametrize("name", ["linear", "mlp", "conv", "layer norm", "direct", "attention train", "prelu"])
def test_func_transforms(name: str) -> None:
    make, sample = CASES[name]
    plain, lazy = twins(make())
    x = sample()
    transforms: list[Callable[[Callable[[Tensor], Tensor]], Any]] = [
        lambda f: torch.func.grad(lambda y: f(y).sum())(x),
        lambda f: torch.func.vjp(f, x)[0],
        lambda f: torch.func.vjp(f, x)[1](torch.ones_like(f(x))),
        lambda f: torch.func.jacrev(lambda y: f(y).sum(0))(x),
        lambda f: torch.vmap(f)(torch.stack([x, x + 1])),
        lambda f: torch.vmap(torch.func.grad(lambda y: f(y).sum()))(torch.stack([x, x + 1])),
    ]
    for transform in transforms:
        expected = transform(plain)
        assert_same(expected, transform(lazy))
    assert resident_bytes(lazy) == 0


@pytest.mark.parametrize("name", ["linear", "mlp", "layer norm", "direct", "prelu"])
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_forward_mode(name: str) -> None:
    make, sample = CASES[name]
    plain, lazy = twins(make())
    x = sample()
    v = torch.ones_like(x)
    assert_same(torch.func.jvp(plain, (x,), (v,)), torch.func.jvp(lazy, (x,), (v,)))
    results = []
    for model in (plain, lazy):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, v)
            results.append(tuple(torch.autograd.forward_ad.unpack_dual(model(dual))))
    assert_same(results[0], results[1])


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda m, x: torch.func.grad(lambda y: m(y).sum())(x),
    "vmap": lambda m, x: torch.vmap(m)(x),
    "jvp": lambda m, x: torch.func.jvp(m, (x,), (x,)),
    "jacfwd": lambda m, x: torch.func.jacfwd(lambda y: m(y).sum(0))(x),
    "functionalize": lambda m, x: torch.func.functionalize(m)(x),
    "forward ad": lambda m, x: _dual(m, x),
}


def _dual(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        return tuple(torch.autograd.forward_ad.unpack_dual(model(dual)))


@pytest.mark.parametrize("storage", ["disk", "cpu"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_weights_loaded_under_a_transform_serve_later_forwards(
    transform: Callable[[nn.Module, Tensor], Any], storage: str
) -> None:
    plain, lazy = twins(nn.Sequential(Mlp(), Direct()), memory_budget="1MiB", storage=storage)
    x = torch.randn(2, 8)
    for _ in range(2):
        with torch.no_grad():
            expected = transform(plain, x)
            assert_same(expected, transform(lazy, x))
        assert_same(run(plain, x), run(lazy, x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_hessian_by_func() -> None:
    plain, lazy = twins(Mlp())
    x = torch.randn(8)
    for model_pair in [(plain, lazy)]:
        expected, actual = (torch.func.hessian(lambda y, m=m: m(y).square().sum())(x) for m in model_pair)
        assert_same(expected, actual)


def test_inference_mode_then_grad_mode() -> None:
    plain, lazy = twins(nn.Sequential(Mlp(), nn.LSTM(8, 4)))
    x = torch.randn(3, 8)
    for model in (plain, lazy):
        with torch.inference_mode():
            model(x)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for model, leaf in zip((plain, lazy), leaves, strict=True):
        model(leaf)[0].sum().backward()
    assert_same(leaves[0].grad, leaves[1].grad)
    with torch.inference_mode():
        assert_same(plain(x), lazy(x))


@pytest.mark.parametrize("budget", [None, "1MiB"], ids=["streamed", "resident"])
def test_inference_mode_does_not_poison_residents(budget: str | None) -> None:
    plain, lazy = twins(Mlp(), memory_budget=budget)
    x = torch.randn(2, 8)
    with torch.inference_mode():
        lazy(x)
        lazy.first.weight.mul_(1.0)
    leaf, plain_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
    lazy(leaf).sum().backward()
    plain(plain_leaf).sum().backward()
    assert_same(plain_leaf.grad, leaf.grad)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["mlp", "conv", "lstm", "attention eval", "direct", "layer norm"])
def test_autocast(name: str, grad: bool) -> None:
    make, sample = CASES[name]
    plain, lazy = twins(make())
    x = sample()
    for _ in range(2):
        results = []
        for model in (plain, lazy):
            leaf = x.clone().requires_grad_(grad)
            with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(leaf)
                again = model(leaf)
            if grad:
                (out.float().sum() + again.float().sum()).backward()
            results.append([out.detach(), again.detach(), leaf.grad if grad else None])
        assert_same(results[0], results[1])


def test_autocast_cache_does_not_keep_weights_or_stale_values() -> None:
    plain, lazy = twins(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    x = torch.randn(2, 8)
    results: list[list[Tensor]] = [[], []]
    for model, outs in zip((plain, lazy), results, strict=True):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            outs.append(model(x))
            model[0].weight.mul_(2)
            outs.append(model(x))
    assert_same(results[0], results[1])
    assert resident_bytes(lazy) == 0


def test_weight_is_a_leaf_without_grad_fn() -> None:
    lazy = pylomin.lazy_loading(Mlp())
    weight = lazy.first.weight
    assert weight.is_leaf
    assert weight.grad_fn is None
    assert weight.grad is None
    assert (weight * 2).requires_grad is False


def test_gradient_hooks_on_modules() -> None:
    plain, lazy = twins(Mlp())
    seen: list[list[Any]] = [[], []]
    for model, log in zip((plain, lazy), seen, strict=True):
        for layer in (model.first, model.norm, model.second):
            layer.register_full_backward_hook(lambda m, gi, go, log=log: log.append((gi[0], go[0], m.weight.sum())))
            layer.register_full_backward_pre_hook(lambda m, go, log=log: log.append((go[0], m.weight[0].detach() * 1)))
        model(torch.ones(2, 8, requires_grad=True)).sum().backward()
    assert_same(seen[0], seen[1])
    assert resident_bytes(lazy) == 0
