"""Hooks of users, and torch's own rewrites of modules, before and after offloading."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import pylomin
from pylomin.lazy.tensor import OffloadedTensor

from .common import Mlp, assert_same, assert_same_parameters, compare, is_ordinary, resident_bytes, run, twins

Rewrite = Callable[[nn.Module], Any]

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.nn.utils.spectral_norm.*:FutureWarning"),
]


class Triangular(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu()

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class Scaled(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.scale


REWRITES: dict[str, tuple[Rewrite, Rewrite]] = {
    "old weight norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "old weight norm of all": (lambda m: nn.utils.weight_norm(m, dim=None), nn.utils.remove_weight_norm),
    "old spectral norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "weight norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "spectral norm": (parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "orthogonal": (parametrizations.orthogonal, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "own": (
        lambda m: parametrize.register_parametrization(m, "weight", Triangular()),
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "own with parameter": (
        lambda m: parametrize.register_parametrization(m, "weight", Scaled()),
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "two": (
        lambda m: [parametrize.register_parametrization(m, "weight", p) for p in (Triangular(), Scaled())],
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "own, original kept": (
        lambda m: parametrize.register_parametrization(m, "weight", Triangular()),
        lambda m: parametrize.remove_parametrizations(m, "weight", leave_parametrized=False),
    ),
    "pruned": (lambda m: prune.l1_unstructured(m, "weight", 0.5), lambda m: prune.remove(m, "weight")),
    "pruned rows": (lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0), lambda m: prune.remove(m, "weight")),
}


def apply(rewrite: Rewrite, *models: nn.Module) -> None:
    for model in models:
        torch.manual_seed(11)
        rewrite(model[1])


def same_forwards(plain: nn.Module, lazy: nn.Module) -> None:
    x = torch.randn(3, 6)
    for grad in (False, True):
        for _ in range(2):
            assert_same(run(plain, x, grad=grad).detach(), run(lazy, x, grad=grad).detach())
    assert list(plain.state_dict()) == list(lazy.state_dict())
    assert_same(dict(plain.state_dict()), {n: v.detach() for n, v in lazy.state_dict().items()})


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)).requires_grad_(False)


def rewritten(rewrite: Rewrite, *, training: bool = True) -> nn.Sequential:
    """Made anew each time: torch cannot copy some rewritten modules, and others share state with their copies."""
    model = base().train(training)
    apply(rewrite, model)
    return model.requires_grad_(False)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("rewrite", "undo"), REWRITES.values(), ids=REWRITES.keys())
def test_rewritten_before(rewrite: Rewrite, undo: Rewrite, training: bool) -> None:
    plain = rewritten(rewrite, training=training)
    lazy = pylomin.lazy_loading(rewritten(rewrite, training=training))
    same_forwards(plain, lazy)
    apply(undo, plain, lazy)
    same_forwards(plain, lazy)
    restored = pylomin.restore(lazy)
    assert is_ordinary(restored)
    same_forwards(plain, restored)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(("rewrite", "undo"), REWRITES.values(), ids=REWRITES.keys())
def test_rewritten_after(rewrite: Rewrite, undo: Rewrite, training: bool) -> None:
    plain, lazy = base().train(training), pylomin.lazy_loading(base().train(training))
    apply(rewrite, plain, lazy)
    same_forwards(plain, lazy)
    apply(undo, plain, lazy)
    same_forwards(plain, lazy)


@pytest.mark.parametrize(("rewrite", "undo"), REWRITES.values(), ids=REWRITES.keys())
def test_rewritten_after_and_restored_before_undoing(rewrite: Rewrite, undo: Rewrite) -> None:
    plain, lazy = base(), pylomin.lazy_loading(base())
    apply(rewrite, plain, lazy)
    same_forwards(plain, lazy)
    restored = pylomin.restore(lazy)
    same_forwards(plain, restored)
    apply(undo, plain, restored)
    same_forwards(plain, restored)
    assert is_ordinary(restored)


@pytest.mark.parametrize(("rewrite", "undo"), REWRITES.values(), ids=REWRITES.keys())
def test_rewritten_before_and_restored(rewrite: Rewrite, undo: Rewrite) -> None:
    plain, model = rewritten(rewrite), rewritten(rewrite)
    classes = [type(m) for m in model.modules()]
    lazy = pylomin.lazy_loading(model)
    same_forwards(plain, lazy)
    restored = pylomin.restore(lazy)
    assert [type(m) for m in restored.modules()] == classes
    same_forwards(plain, restored)


def test_parametrization_with_a_cache() -> None:
    model = base()
    parametrize.register_parametrization(model[1], "weight", Triangular())
    plain, lazy = twins(model)
    x = torch.randn(3, 6)
    with parametrize.cached():
        assert_same(run(plain, x), run(lazy, x))
        assert_same(run(plain, x), run(lazy, x))


def test_assignment_to_a_parametrized_weight() -> None:
    model = base()
    parametrize.register_parametrization(model[1], "weight", Triangular())
    plain, lazy = twins(model)
    for each in (plain, lazy):
        with torch.no_grad():
            each[1].weight = torch.ones(5, 5)
    same_forwards(plain, lazy)


def test_weight_norm_of_recurrent_and_convolutional_modules() -> None:
    for make, x in (
        (lambda: nn.Conv1d(4, 4, 3), torch.randn(1, 4, 6)),
        (lambda: nn.ConvTranspose1d(4, 4, 3), torch.randn(1, 4, 6)),
        (lambda: nn.Embedding(6, 4), torch.tensor([1, 5])),
    ):
        for norm in (nn.utils.weight_norm, parametrizations.weight_norm):
            for after in (False, True):
                models = []
                for offloads in (False, True):
                    torch.manual_seed(0)
                    model = make().requires_grad_(False)
                    if offloads and after:
                        models.append(norm(pylomin.lazy_loading(model)))
                    else:
                        model = norm(model)
                        models.append(pylomin.lazy_loading(model) if offloads else model)
                assert_same(run(models[0], x), run(models[1], x))


def test_new_parameter_made_of_offloaded_data() -> None:
    """The idiom of model surgery, and of torch's own weight_norm."""
    plain, lazy = twins(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    for model in (plain, lazy):
        model[0].weight = nn.Parameter(model[1].weight.data)
        model[0].bias = nn.Parameter(model[1].bias[[3, 2, 1, 0]])
    assert_same(run(plain, torch.ones(1, 4)), run(lazy, torch.ones(1, 4)))
    for model in (plain, lazy):
        model[1].weight = nn.Parameter(model[0].weight[:2])
        model[1].bias = nn.Parameter(model[0].bias.detach()[:2].clone(), requires_grad=False)
    assert_same(run(plain, torch.ones(1, 4)), run(lazy, torch.ones(1, 4)))


# -- hooks -----------------------------------------------------------------------------------------


def test_hooks_see_the_values() -> None:
    plain, lazy = twins(Mlp())
    logs: list[list[Any]] = [[], []]
    for model, log in zip((plain, lazy), logs, strict=True):
        for layer in (model.first, model.norm, model.second):
            layer.register_forward_pre_hook(lambda m, a, log=log: log.append(m.weight.sum().detach()))
            layer.register_forward_hook(lambda m, a, out, log=log: log.append((m.weight[0] * 1).detach()))
            layer.register_forward_hook(lambda m, a, k, out, log=log: out + m.bias.detach(), with_kwargs=True)
            layer.register_forward_hook(lambda m, a, out, log=log: log.append(1), always_call=True)
    compare(plain, lazy, torch.randn(2, 8))
    assert_same(logs[0], logs[1])


def test_hooks_registered_before_offloading_are_kept() -> None:
    model = Mlp()
    calls: list[str] = []
    handles = [
        model.first.register_forward_pre_hook(lambda m, a: calls.append("pre")),
        model.first.register_forward_hook(lambda m, a, out: calls.append("post")),
        model.first.register_full_backward_hook(lambda m, gi, go: calls.append("backward")),
    ]
    lazy = pylomin.lazy_loading(model)
    lazy(torch.ones(1, 8, requires_grad=True)).sum().backward()
    assert calls == ["pre", "post", "backward"]
    restored = pylomin.restore(lazy)
    restored(torch.ones(1, 8))
    assert calls == ["pre", "post", "backward", "pre", "post"]
    for handle in handles:
        handle.remove()
    restored(torch.ones(1, 8))
    assert len(calls) == 5


def test_hook_that_changes_the_input_and_writes_to_the_weight() -> None:
    def shrink(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            module.weight.mul_(0.5)
        return (args[0] + module.bias[0].detach(),)

    plain, lazy = twins(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    for model in (plain, lazy):
        model[1].register_forward_pre_hook(shrink)
    for _ in range(2):
        x = torch.randn(2, 4)
        assert_same(run(plain, x), run(lazy, x))
    assert_same_parameters(plain, lazy)


def test_hook_that_raises_leaves_nothing_resident() -> None:
    plain, lazy = twins(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    handle = lazy[1].register_forward_hook(_stop)
    with pytest.raises(KeyError, match="stop"):
        lazy(torch.ones(1, 4))
    assert resident_bytes(lazy) == 0
    handle.remove()
    compare(plain, lazy, torch.ones(1, 4))


def _stop(*args: object) -> None:
    raise KeyError("stop")


def test_global_hooks() -> None:
    plain, lazy = twins(Mlp())
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: names.append(type(m).__name__))
    try:
        run(plain, torch.ones(1, 8))
        expected, names[:] = list(names), []
        run(lazy, torch.ones(1, 8))
    finally:
        handle.remove()
    assert [name.replace("Lazy", "") for name in names] == expected


def test_parameter_registration_hook_sees_nothing_of_offloading() -> None:
    seen: list[str] = []
    handle = nn.modules.module.register_module_parameter_registration_hook(lambda m, name, p: seen.append(name))
    try:
        lazy = pylomin.lazy_loading(nn.Linear(4, 4))
        seen.clear()
        lazy(torch.ones(1, 4))
        pylomin.restore(lazy)
    finally:
        handle.remove()
    assert seen == []


def test_load_state_dict_hooks_run() -> None:
    plain, lazy = twins(Mlp())
    state = {f"old.{name}": value for name, value in Mlp().state_dict().items()}

    def rename(module: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        for name in list(state):
            state[name.removeprefix("old.")] = state.pop(name)

    for model in (plain, lazy):
        model.register_load_state_dict_pre_hook(rename)
        model.load_state_dict(dict(state))
    compare(plain, lazy, torch.randn(2, 8))


def test_forward_pre_hook_that_sets_the_weight() -> None:
    """What hook-based reparametrisations do: delete the parameter, then assign a tensor before every forward."""
    plain, lazy = twins(nn.Sequential(nn.Linear(4, 4, bias=False)))
    for model in (plain, lazy):
        layer = model[0]
        weight = layer.weight
        del layer.weight
        layer.register_parameter("raw", weight)
        layer.register_forward_pre_hook(lambda m, a: setattr(m, "weight", m.raw * 2))
    compare(plain, lazy, torch.randn(2, 4))
    assert isinstance(lazy[0].raw, OffloadedTensor)


def test_fused_batch_norm() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    nn.init.normal_(model[1].running_mean)
    plain, lazy = twins(model)
    x = torch.randn(1, 3, 6, 6)
    fused = [nn.utils.fuse_conv_bn_eval(m[0], m[1]) for m in (plain, lazy)]
    assert_same(run(fused[0], x), run(fused[1], x))
    compare(plain, lazy, x)


def test_clip_and_norm_of_parameters_without_grad() -> None:
    plain, lazy = twins(Mlp())
    assert_same(
        *(nn.utils.clip_grad_norm_(m.parameters(), 1.0) for m in (plain, lazy)),
    )
    vectors = [nn.utils.parameters_to_vector(m.parameters()) for m in (plain, lazy)]
    assert_same(vectors[0], vectors[1])
    for model in (plain, lazy):
        nn.utils.vector_to_parameters(vectors[0] * 2, model.parameters())
    assert_same_parameters(plain, lazy)


def test_swap_tensors() -> None:
    plain, lazy = twins(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    for model in (plain, lazy):
        torch.utils.swap_tensors(model[0].weight, model[1].weight)
    assert_same_parameters(plain, lazy)
    compare(plain[0], lazy[0], torch.randn(2, 4))


def test_skip_init_and_data_parallel() -> None:
    plain, lazy = twins(nn.DataParallel(Mlp()))
    compare(plain, lazy, torch.randn(2, 8))


def test_averaged_model() -> None:
    plain, lazy = twins(Mlp())
    averaged = [torch.optim.swa_utils.AveragedModel(m) for m in (plain, lazy)]
    for model, average in zip((plain, lazy), averaged, strict=True):
        with torch.no_grad():
            model.first.weight.add_(1)
        average.update_parameters(model)
        average.update_parameters(model)
    assert_same(run(averaged[0], torch.ones(2, 8)), run(averaged[1], torch.ones(2, 8)))
    compare(plain, lazy, torch.ones(2, 8))
