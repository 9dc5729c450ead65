"""Models that run from quantised files: what is read and kept, rows, tiles, writes, copies, faults."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pylomin
from pylomin.errors import ExportError, StoreReadError
from pylomin.io.buffers import SMALL_BYTES, BufferPool
from pylomin.lazy import fused
from pylomin.lazy.offload import Footprint, smallest_budget, use_bytes
from pylomin.residency.unpacking import Unpacking
from pylomin.store.quantized import QuantizedStore
from pylomin.store.renamed import renamed


def same_bits(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    assert left is not None
    assert right is not None
    return left.dtype == right.dtype and torch.equal(left, right)


class Model(nn.Module):
    """A table that is also the head, and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 256)
        self.up = nn.Linear(256, 768)
        self.down = nn.Linear(768, 256)
        self.norm = nn.LayerNorm(256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.down(F.gelu(self.up(x)))
        return F.linear(self.norm(x), self.table.weight)


TOKENS = torch.tensor([[3, 999, 3, 17]])


@pytest.fixture(autouse=True)
def without_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "multiplies_integers", lambda: False)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return pylomin.save_model(Model(), tmp_path_factory.mktemp("int8"), quantize="int8")


@pytest.fixture(scope="module")
def decoded(path: Path) -> Model:
    return pylomin.restore(pylomin.load(Model, path))


def store_of(path: Path) -> QuantizedStore:
    store = pylomin.open_store(path)
    assert isinstance(store, QuantizedStore)
    return store


def packed_bytes(path: Path, name: str) -> int:
    packed = store_of(path).packed(name)
    assert packed is not None
    return packed.nbytes


def test_only_packed_bytes_are_read_and_kept(path, decoded):
    file = store_of(path).file
    all_bytes = sum(file.info(name).nbytes for name in file)
    model = pylomin.load(Model, path, memory_budget=8 << 20)
    for _ in range(3):
        assert same_bits(model(TOKENS), decoded(TOKENS))
    stats = pylomin.stats(model)
    assert stats.bytes_read == all_bytes
    assert stats.resident_bytes <= all_bytes + (16 << 10)  # in whole pages
    largest_bytes = 1000 * 256 * 4
    assert stats.peak_bytes <= all_bytes + largest_bytes + (16 << 10)


def test_a_streamed_forward_reads_packed_bytes(path):
    model = pylomin.load(Model, path)
    model.up(torch.ones(1, 256))
    assert pylomin.stats(model).bytes_read == packed_bytes(path, "up.weight") + 768 * 4


def test_a_lookup_reads_the_packed_rows(path, decoded):
    model = pylomin.load(Model, path)
    assert same_bits(model.table(TOKENS), decoded.table(TOKENS))
    assert pylomin.stats(model).bytes_read == 3 * (256 + 2 * 256 // 64)


def test_chunked_lookups(path, decoded):
    model = pylomin.load(Model, path, memory_budget="64KiB")
    pylomin.chunked_embedding(model, target_module_name="table", chunk_size=2)
    tokens = torch.arange(0, 1000, 7).view(1, -1)
    assert same_bits(model.table(tokens), decoded.table(tokens))
    assert pylomin.stats(model).peak_bytes <= 64 << 10


def test_tiles(path, decoded):
    model = pylomin.chunked_linear(pylomin.load(Model, path), target_module_name="up", chunk_size=100)
    x = torch.randn(5, 256)
    torch.testing.assert_close(model.up(x), decoded.up(x), rtol=1e-5, atol=1e-5)
    assert pylomin.stats(model).peak_bytes < 768 * 256 * 4


def test_tiles_of_packed_bytes_that_stay(path, decoded):
    """Decoded, the weight would take a large share of the budget; its packed bytes do not, and are read once."""
    x, budget = torch.randn(5, 256), 2 << 20
    model = pylomin.load(Model, path, memory_budget=budget)
    pylomin.chunked_linear(model, target_module_name="up", chunk_size=64)
    for _ in range(4):
        torch.testing.assert_close(model.up(x), decoded.up(x), rtol=1e-5, atol=1e-5)
    stats = pylomin.stats(model)
    assert stats.peak_bytes <= budget
    assert stats.bytes_read == packed_bytes(path, "up.weight") + 768 * 4
    assert stats.peak_bytes < 768 * 256 * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_decoded_in_the_dtype_that_is_wanted(path, dtype):
    expected = pylomin.restore(pylomin.load(Model, path)).to(dtype)
    model = pylomin.load(Model, path, dtype=dtype)
    assert same_bits(model(TOKENS), expected(TOKENS))
    converted = pylomin.load(Model, path).to(dtype)
    assert same_bits(converted(TOKENS), expected(TOKENS))


def test_fit_and_plan(path, decoded, tmp_path):
    model = pylomin.fit(pylomin.load(Model, path), "400KiB", args=[TOKENS])
    torch.testing.assert_close(model(TOKENS), decoded(TOKENS), rtol=1e-4, atol=1e-4)
    plan = pylomin.plan_of(model)
    assert plan.weights["up.weight"] == "int8 [768, 256]"
    assert plan.weights["up.weight_scale"] == "bfloat16 [768, 4]"
    assert pylomin.stats(model).peak_bytes <= 400 << 10
    other = pylomin.load(Model, path, memory_budget="400KiB")
    pylomin.prefetch(other, plan=plan.save(tmp_path / "plan.json"))
    torch.testing.assert_close(other(TOKENS), decoded(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory_budget", [None, 1 << 20, 8 << 20])
def test_decoding_reuses_memory(path, monkeypatch, memory_budget):
    model = pylomin.load(lambda: nn.Sequential(nn.Linear(256, 768), nn.Linear(768, 256)), _linears(path))
    pylomin.prefetch(pylomin.set_memory_budget(model, memory_budget))
    x = torch.ones(1, 256)
    for _ in range(4):
        model(x)
    allocated: list[int] = []
    allocate = BufferPool._allocate
    monkeypatch.setattr(
        BufferPool,
        "_allocate",
        lambda pool, nbytes, space: (allocated.append(nbytes), allocate(pool, nbytes, space))[1],
    )
    for _ in range(4):
        model(x)
    assert [nbytes for nbytes in allocated if nbytes >= SMALL_BYTES] == []


def test_a_smaller_budget_takes_effect(path, decoded):
    model = pylomin.load(Model, path, memory_budget="8MiB")
    model(TOKENS)
    pylomin.set_memory_budget(model, "300KiB")
    torch.testing.assert_close(model(TOKENS), decoded(TOKENS), rtol=1e-4, atol=1e-4)
    assert pylomin.stats(model).peak_bytes <= 300 << 10


def test_gradients_flow_through(path, decoded):
    model = pylomin.load(Model, path)
    inputs = [torch.ones(2, 256, requires_grad=True) for _ in range(2)]
    for module, x in zip((model.up, pylomin.restore(pylomin.load(Model, path)).up), inputs, strict=True):
        module(x).square().sum().backward()
    assert same_bits(inputs[0].grad, inputs[1].grad)


def test_writes_are_kept_in_full_precision(path):
    model = pylomin.load(Model, path, memory_budget="8MiB")
    values = torch.randn(768, 256)
    with torch.no_grad():
        model.up.weight.copy_(values)
        assert torch.equal(model.up(torch.eye(256)), F.linear(torch.eye(256), values, model.up.bias))
    assert torch.equal(model.state_dict()["up.weight"], values)
    assert not same_bits(pylomin.restore(pylomin.load(Model, path)).up.weight, values), "the file is as it was"


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "restore": pylomin.restore,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(path, decoded, how):
    made = COPIES[how](pylomin.load(Model, path))
    assert same_bits(made(TOKENS), decoded(TOKENS))


def test_saving_gives_decoded_weights(path, decoded, tmp_path):
    saved = pylomin.save_model(pylomin.load(Model, path), tmp_path / "full.safetensors")
    state = pylomin.restore(pylomin.load(Model, saved)).state_dict()
    for name, expected in decoded.state_dict().items():
        assert same_bits(state[name], expected), name


def test_threads(path, decoded):
    model = pylomin.prefetch(pylomin.load(Model, path, memory_budget="2MiB"))
    expected, results = decoded(TOKENS), []

    def run() -> None:
        for _ in range(5):
            results.append(model(TOKENS))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def damage(path: Path, target: Path, name: str, raw: bytes) -> Path:
    """A copy of the file in which the first bytes of one stored tensor are others."""
    content = bytearray(path.read_bytes())
    start = store_of(path).file.location(name).extent.start
    content[start : start + len(raw)] = raw
    target.write_bytes(content)
    return target


def test_damaged_scales(path, tmp_path):
    broken = damage(path, tmp_path / "broken.safetensors", "up.weight_scale", b"\xc0\x7f")  # NaN
    model = pylomin.prefetch(pylomin.load(Model, broken, memory_budget="8MiB"))
    for _ in range(2):
        with pytest.raises(StoreReadError, match=r"weight 'up.weight' in .* is damaged: its scales"):
            model(TOKENS)
    assert model.down(torch.ones(1, 768)).shape == (1, 256), "nothing is left held"


def test_truncated_while_in_use(path, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes())
    model = pylomin.load(Model, cut, reading_mode="buffered")
    with cut.open("r+b") as file:
        file.truncate(cut.stat().st_size // 2)
    with pytest.raises(StoreReadError):
        for module, width in ((model.up, 256), (model.down, 768)):
            module(torch.ones(1, width))


def test_export_refuses(path, tmp_path):
    pytest.importorskip("onnxscript")
    with pytest.raises(ExportError, match="coded form"):
        pylomin.export_onnx(pylomin.load(Model, path), (TOKENS,), tmp_path / "model.onnx")


def test_renamed(path, decoded):
    inner = store_of(path)
    model = pylomin.load(lambda: nn.Sequential(nn.Linear(256, 768)), _only_up(inner))
    x = torch.randn(2, 256)
    assert same_bits(model(x), decoded.up(x))
    assert pylomin.stats(model).bytes_read == packed_bytes(path, "up.weight") + 768 * 4


def _linears(path: Path) -> object:
    names = {"up.weight": "0.weight", "up.bias": "0.bias", "down.weight": "1.weight", "down.bias": "1.bias"}
    return renamed(store_of(path), key_map=names.get)


def _only_up(store: QuantizedStore) -> object:
    return renamed(store, key_map=lambda name: name.replace("up.", "0.") if name.startswith("up.") else None)


@pytest.mark.parametrize("held", [0, 100, 4000, 300_000])
@pytest.mark.parametrize("line", [(1, 4), (70, 256), (4000, 16_000), (90_000, 360_000)])
@pytest.mark.parametrize("lines", [2, 7, 1000])
def test_smallest_budget_and_greater_ones_hold_a_use(held, line, lines):
    group = [Footprint("weight", *line, lines, None, is_packed=True), Footprint("bias", held, 0)]
    for beyond in (0, 1, 5000, 1 << 20, 1 << 30):
        budget = smallest_budget(group) + beyond
        assert use_bytes(group, budget) <= budget


# -- fused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_fused(without_fused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the processor is slow at it; only inexact ones would have to be left out."""
    monkeypatch.setattr(fused, "multiplies_integers", lambda: True)


# Scheme, and columns of the weight: of groups, eight, seven (by themselves) or six (three and three) of 64.
FUSED = [("int8-row", 515), ("int8", 512), ("int8", 448), ("int8", 384), ("int8", 64)]


def linear(
    directory: Path, scheme: str, columns: int, dtype: torch.dtype = torch.float32
) -> tuple[nn.Linear, nn.Linear]:
    """A linear that runs from int8, and the same decoded, in float64."""
    torch.manual_seed(0)
    made = nn.Linear(columns, 300)
    saved = pylomin.save_model(made, directory / "int8", quantize=scheme, overwrite=True)

    def load(dtype: torch.dtype) -> nn.Linear:
        return pylomin.load(lambda: nn.Linear(columns, 300), saved, dtype=dtype)

    return load(dtype), pylomin.restore(load(torch.float64))


@pytest.mark.usefixtures("with_fused")
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize(("scheme", "columns"), FUSED)
def test_fused_is_as_exact_as_float32(tmp_path, scheme, columns, scale):
    model, exact = linear(tmp_path, scheme, columns)
    x = scale * torch.randn(2, 3, columns) * torch.logspace(-3, 3, columns)
    plain = pylomin.restore(copy.deepcopy(model))
    loads = pylomin.stats(model).loads
    with torch.no_grad():
        expected = exact(x.double())
        error, plain_error = ((y.double() - expected).abs().max() for y in (model(x), plain(x)))
    assert error <= max(2 * plain_error, 1e-6 * float(expected.abs().max()))
    assert pylomin.stats(model).loads == loads + 1
    assert pylomin.stats(model).peak_bytes < 300 * columns * 2, "nothing was decoded"


@pytest.mark.usefixtures("with_fused")
@pytest.mark.parametrize("columns", [64, 512, 515])
def test_one_row_is_as_one_of_many(tmp_path, columns, monkeypatch):
    """It is multiplied in another order: a digit at a time, by some codes at a time."""
    model, _ = linear(tmp_path, "int8-row", columns)
    x = torch.randn(3, columns)
    monkeypatch.setattr(fused, "CODES_BYTES", 70 * columns)
    with torch.no_grad():
        many = model(x)
        for i in range(3):
            assert torch.equal(model(x[i]), many[i])
            assert torch.equal(model(x[i].view(1, 1, columns)), many[i].view(1, 1, -1))


@pytest.mark.usefixtures("with_fused")
@pytest.mark.parametrize(("scheme", "columns"), FUSED)
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_fused_by_tiles(tmp_path, scheme, columns, precision, monkeypatch):
    """Of codes that are too large for the budget; nothing is decoded. Each row of the weight gives the same bits."""
    monkeypatch.setattr(fused, "_multiplies_bfloat16", lambda: True)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    whole, _ = linear(tmp_path, scheme, columns)
    model, _ = linear(tmp_path, scheme, columns)
    budget = 300 * columns * 3
    pylomin.set_memory_budget(model, budget)
    monkeypatch.setattr(Unpacking, "decode", None)
    codes, scales = model._parameters["weight"].weight.parts
    assert codes.tiled
    assert not scales.tiled
    with torch.no_grad():
        for x in (torch.randn(columns), torch.randn(2, 3, columns)):
            before = pylomin.stats(model).bytes_read
            assert torch.equal(model(x), whole(x))
            assert pylomin.stats(model).bytes_read - before >= 300 * columns
    assert pylomin.stats(model).peak_bytes <= budget


@pytest.mark.usefixtures("with_fused")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_rounds_half_precision_once(tmp_path, dtype):
    model, exact = linear(tmp_path, "int8-row", 515, dtype)
    x = torch.randn(4, 515).to(dtype)
    torch.testing.assert_close(model(x), exact(x.double()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.usefixtures("with_fused")
@pytest.mark.parametrize(
    "x",
    [
        torch.full((1, 512), torch.nan),
        torch.full((1, 512), torch.inf),
        torch.zeros(2, 512),
        torch.ones(max(fused.MOST_ROWS.values()) + 1, 512),
        torch.ones(0, 512),
        torch.ones(1, 512, requires_grad=True),
    ],
    ids=["nan", "inf", "zeros", "many rows", "no rows", "gradients"],
)
@pytest.mark.parametrize("scheme", fused.MOST_ROWS)
def test_not_fused_or_the_same(tmp_path, scheme, x):
    model, _ = linear(tmp_path, scheme, 512)
    assert torch.equal(model(x).isnan(), (expected := pylomin.restore(copy.deepcopy(model))(x)).isnan())
    assert torch.equal(model(x).nan_to_num(), expected.nan_to_num())
    assert model(x).requires_grad == x.requires_grad


@pytest.mark.usefixtures("with_fused")
def test_groups_that_end_within_a_row_are_decoded(tmp_path):
    model, exact = linear(tmp_path, "int8", 515)
    x = torch.randn(1, 515)
    torch.testing.assert_close(model(x), exact(x.double()).float())
    assert pylomin.stats(model).peak_bytes > 300 * 515 * 4


@pytest.mark.usefixtures("with_fused")
@pytest.mark.parametrize("memory_budget", [None, 300 * 512 * 3], ids=["whole", "by tiles"])
@pytest.mark.parametrize("shape", [(512,), (1, 512), (2, 3, 512)], ids=str)
def test_quantized_inputs(tmp_path, shape, memory_budget):
    """Each row is rounded to 255 steps of its own; nothing else is."""
    model, exact = linear(tmp_path, "int8-row", 512)
    assert pylomin.quantize_inputs(model) is model
    pylomin.set_memory_budget(model, memory_budget)
    x = torch.randn(shape) * torch.logspace(-2, 0, math.prod(shape[:-1])).view(*shape[:-1], 1)
    step = x.abs().amax(-1, keepdim=True) / 127
    with torch.no_grad():
        expected = exact((x / step).round().double() * step.double())
        output = model(x)
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output, exact(x.double()).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(model)(x), output), "copies do as the original does"
    pylomin.quantize_inputs(model, enabled=False)
    torch.testing.assert_close(model(x), exact(x.double()).float())


@pytest.mark.usefixtures("with_fused")
def test_inputs_that_are_not_quantized(tmp_path):
    """Of the other scheme, with gradients, and those that are not finite; nor is there anything in a plain model."""
    grouped, exact = linear(tmp_path / "grouped", "int8", 512)
    x = torch.randn(1, 512)
    torch.testing.assert_close(pylomin.quantize_inputs(grouped)(x), exact(x.double()).float())
    model, exact = linear(tmp_path / "rows", "int8-row", 512)
    pylomin.quantize_inputs(model)
    torch.testing.assert_close(model(x.clone().requires_grad_()), exact(x.double()).float())
    assert model(torch.full((1, 512), torch.nan)).isnan().all()
    assert torch.equal(model(torch.zeros(1, 512)), model.bias.detach().view(1, -1))
    with pytest.raises(pylomin.PassError, match="nothing of this model is offloaded"):
        pylomin.quantize_inputs(nn.Linear(2, 2))


@pytest.fixture
def medium_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also where the processor is slow at it."""
    monkeypatch.setattr(fused, "_multiplies_bfloat16", lambda: True)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("with_fused", "medium_precision")
def test_medium_precision_rounds_inputs_to_bfloat16(tmp_path):
    model, exact = linear(tmp_path, "int8-row", 512)
    x = torch.randn(2, 3, 512)
    expected = exact(x.bfloat16().double())
    torch.testing.assert_close(model(x).double(), expected, rtol=2**-7, atol=2**-8)
    assert not torch.equal(model(x), exact(x.double()).float())
    torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(model(x), exact(x.double()).float())


@pytest.mark.usefixtures("with_fused", "medium_precision")
def test_medium_precision_keeps_what_is_not_finite(tmp_path):
    model, _ = linear(tmp_path, "int8-row", 512)
    assert model(torch.full((1, 512), torch.nan)).isnan().all()
    assert not model(torch.full((1, 512), torch.inf)).isfinite().any()


def test_what_is_looked_up_takes_no_room_for_all_of_it(tmp_path):
    """Of a table only rows are decoded: everything packed stays, with room for the largest layer beside it."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Embedding(8000, 256), nn.Linear(256, 256), nn.Linear(256, 256))

    path = pylomin.save_model(make(), tmp_path, quantize="int8")
    packed_bytes = path.stat().st_size
    model = pylomin.load(make, path, memory_budget=packed_bytes + (3 << 20))  # the table decoded has 8 MiB
    words = torch.tensor([[1, 7999, 5]])
    with torch.inference_mode():
        for _ in range(6):
            expected = model(words)
        loads = pylomin.stats(model).loads
        assert torch.equal(model(words), expected)
    assert pylomin.stats(model).loads == loads
