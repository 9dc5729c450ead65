"""torch.compile, torch.jit.trace, torch.fx and torch.export on offloaded models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pylomin

from .common import Mlp, Tied, assert_same, compare, crash_proof, outcome, resident_bytes, run, twins

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*Dynamo.*:UserWarning"),
]

MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(8, 4), lambda: torch.randn(2, 8)),
    "mlp": (Mlp, lambda: torch.randn(2, 8)),
    "tied": (Tied, lambda: torch.tensor([[1, 2, 3]])),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval(),
        lambda: torch.randn(1, 2, 6, 6),
    ),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), lambda: torch.randn(2, 3, 8)),
    "direct": (lambda: Direct(), lambda: torch.randn(2, 8)),
}


class Direct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.layer.weight.t()) * self.scale + self.layer.bias


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("make", "sample"), MODELS.values(), ids=MODELS.keys())
def test_compile(make: Callable[[], nn.Module], sample: Callable[[], Tensor], backend: str) -> None:
    plain, lazy = twins(make())
    compiled = torch.compile(lazy, backend=backend)
    for grad in (False, True):
        for _ in range(2):
            x = sample()
            assert_same(run(plain, x, grad=grad), run(compiled, x, grad=grad))
    del compiled
    assert resident_bytes(lazy) == 0


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_in_place_and_write(backend: str) -> None:
    plain, lazy = twins(Mlp())
    lazy.compile(backend=backend)
    x = torch.randn(2, 8)
    assert_same(run(plain, x), run(lazy, x))
    for model in (plain, lazy):
        with torch.no_grad():
            model.first.weight.mul_(2)
            model.second.bias[0] = 4.0
    assert_same(run(plain, x), run(lazy, x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_before_offloading(backend: str) -> None:
    model = Mlp()
    compiled = torch.compile(model, backend=backend)
    x = torch.randn(2, 8)
    expected = run(compiled, x)
    pylomin.lazy_loading(model)
    assert_same(expected, run(compiled, x))
    pylomin.restore(model)
    assert_same(expected, run(compiled, x))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_gradients() -> None:
    for backend in ("eager", "aot_eager"):
        plain, lazy = twins(Mlp())
        compiled = torch.compile(lazy, backend=backend)
        leaves = [torch.ones(2, 8, requires_grad=True) for _ in range(2)]
        for model, leaf in zip((plain, compiled), leaves, strict=True):
            model(leaf).sum().backward()
        assert_same(leaves[0].grad, leaves[1].grad)


def test_compiled_function_that_uses_a_model() -> None:
    plain, lazy = twins(Mlp())

    def step(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).relu() + model.first.weight.sum() + model.second.weight[0].mean()

    compiled = torch.compile(step, backend="eager")
    for _ in range(2):
        x = torch.randn(2, 8)
        with torch.no_grad():
            assert_same(step(plain, x), compiled(lazy, x))


def test_compile_of_a_part() -> None:
    plain, lazy = twins(nn.Sequential(Mlp(), Mlp()))
    for block in lazy:
        block.compile(backend="eager")
    x = torch.randn(2, 8)
    for _ in range(2):
        assert_same(run(plain, x), run(lazy, x))


@pytest.mark.parametrize(("make", "sample"), MODELS.values(), ids=MODELS.keys())
def test_jit_trace(make: Callable[[], nn.Module], sample: Callable[[], Tensor]) -> None:
    plain, lazy = twins(make())
    with torch.no_grad():
        expected = torch.jit.trace(plain, (sample(),), check_trace=False)
        traced = torch.jit.trace(lazy, (sample(),), check_trace=False)
    for _ in range(2):
        x = sample()
        assert_same(run(expected, x), run(traced, x))
        assert_same(run(plain, x), run(lazy, x))


def test_jit_trace_checks_itself() -> None:
    _, lazy = twins(Mlp())
    with torch.no_grad():
        torch.jit.trace(lazy, (torch.randn(2, 8),))


def test_jit_script_works_or_says_why() -> None:
    _, lazy = twins(Mlp())
    result = outcome(torch.jit.script, lazy)
    if isinstance(result, tuple):
        assert result[1]
    else:
        assert_same(run(lazy, torch.ones(2, 8)), run(result, torch.ones(2, 8)))


def test_fx_trace_then_offload() -> None:
    plain, lazy = twins(torch.fx.symbolic_trace(Mlp()))
    assert isinstance(lazy, torch.fx.GraphModule)
    compare(plain, lazy, torch.randn(2, 8))
    plain, lazy = twins(torch.fx.symbolic_trace(Direct()))
    compare(plain, lazy, torch.randn(2, 8))


def test_offload_then_fx_trace() -> None:
    plain, lazy = twins(Mlp())
    traced = torch.fx.symbolic_trace(lazy)
    x = torch.randn(2, 8)
    for _ in range(2):
        assert_same(run(plain, x), run(traced, x))
    expected = [str(node.target) for node in torch.fx.symbolic_trace(plain).graph.nodes]
    assert [str(node.target) for node in traced.graph.nodes] == expected


def test_fx_graph_edited_after_offloading() -> None:
    plain, lazy = twins(torch.fx.symbolic_trace(Mlp()))
    for model in (plain, lazy):
        for node in list(model.graph.nodes):
            if node.target is torch.relu:
                node.target = torch.tanh
        model.recompile()
    compare(plain, lazy, torch.randn(2, 8))


def test_fx_interpreter() -> None:
    plain, lazy = twins(torch.fx.symbolic_trace(Direct()))
    x = torch.randn(2, 8)
    assert_same(torch.fx.Interpreter(plain).run(x).detach(), torch.fx.Interpreter(lazy).run(x).detach())


def test_make_fx_works_or_says_why() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    plain, lazy = twins(Mlp())
    x = torch.randn(2, 8)
    traced = outcome(make_fx(lambda y: lazy(y)), x)
    if not isinstance(traced, tuple):
        with torch.no_grad():
            assert_same(plain(x), traced(x))


@pytest.mark.parametrize(("make", "sample"), MODELS.values(), ids=MODELS.keys())
def test_export(make: Callable[[], nn.Module], sample: Callable[[], Tensor]) -> None:
    """Exporting reads nothing, and the exported program streams its weights from where the model does."""
    plain, lazy = twins(make())
    x = sample()
    expected = torch.export.export(plain, (x,))  # rounds as it does, not always as the module
    exported = torch.export.export(lazy, (x,))
    assert pylomin.stats(lazy).loads == 0
    assert_same(run(expected.module(), x), run(exported.module(), x))
    assert resident_bytes(lazy) == 0
    compare(plain, lazy, x)


def test_export_with_dynamic_shapes() -> None:
    plain, lazy = twins(Mlp())
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(lazy, (torch.randn(2, 8),), dynamic_shapes=({0: batch},))
    for rows in (1, 5):
        x = torch.randn(rows, 8)
        assert_same(run(plain, x), run(exported.module(), x))


def test_exported_program_sees_what_is_written_to_the_weights() -> None:
    plain, lazy = twins(Mlp())
    x = torch.randn(2, 8)
    exported = torch.export.export(lazy, (x,)).module()
    for model in (plain, lazy):
        with torch.no_grad():
            model.first.weight.mul_(2)
    assert_same(run(plain, x), run(exported, x))


def test_profiler_and_flop_counter() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    plain, lazy = twins(Mlp())
    counts = []
    for model in (plain, lazy):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.ones(2, 8))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_torch_dispatch_and_function_modes() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    plain, lazy = twins(nn.Sequential(Mlp(), nn.LSTM(8, 4)))
    x = torch.randn(2, 8)
    with torch.no_grad():
        expected = plain(x)
        for mode in (Passes(), Calls()):
            with mode:
                assert_same(expected, lazy(x))


def test_default_device_and_deterministic_modes() -> None:
    plain, lazy = twins(nn.Sequential(Mlp(), nn.LSTM(8, 4)))
    x = torch.randn(2, 8)
    torch.set_default_dtype(torch.float64)
    try:
        assert_same(run(plain, x), run(lazy, x))
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("cpu"):
        assert_same(run(plain, x), run(lazy, x))
    with torch.device("meta"):
        assert_same(run(plain, x), run(lazy, x))
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(run(plain, x), run(lazy, x))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("source", ["mapping", "file"])
def test_load_under_a_default_device_of_meta(source: str, tmp_path: Path) -> None:
    weights = "state" if source == "mapping" else repr(str(tmp_path / "w.safetensors"))
    printed = crash_proof(f"""
from safetensors.torch import save_file
def make():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    return model.eval()
plain = make()
plain[1].running_mean.fill_(0.5)
state = plain.state_dict()
save_file(state, {str(tmp_path / "w.safetensors")!r})
with torch.device("meta"):
    lazy = pylomin.load(make, {weights})
x = torch.randn(3, 4)
with torch.no_grad():
    print(torch.equal(plain(x), lazy(x)))
""")
    assert printed == "True"


def test_lazy_loading_and_forward_under_a_default_device_of_meta() -> None:
    printed = crash_proof("""
import copy
lazy = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LSTM(4, 4))
plain = copy.deepcopy(lazy)
x = torch.tensor([[1, 4]])
with torch.device("meta"), torch.no_grad():
    lazy = pylomin.lazy_loading(lazy)
    lazy[1].weight.mul_(2)
    plain[1].weight.mul_(2)
    clone = copy.deepcopy(lazy)
    lazy.half().float()
    plain.half().float()
    print(torch.equal(plain(x)[0], lazy(x)[0]), clone(x)[0].device)
""")
    assert printed == "True cpu"
