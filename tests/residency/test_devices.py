"""What a device cannot do, and what is asked of it: memory that is full, graphs, rows, writes, copies, fit."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pylomin
from pylomin.errors import BudgetError, PassError, TraceError
from pylomin.lazy import sources
from pylomin.lazy.offload import residencies_of
from pylomin.residency import memory_limits
from pylomin.residency.carrier import carrier_to
from pylomin.residency.residency import Residency

from .fake_device import FAKE, FakeDevice, computing_on_the_host, installed, lazy, shuffled


class Model(nn.Module):
    """A table that is also the head, and linears with a norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 64)
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)
        self.norm = nn.LayerNorm(64)
        self.register_buffer("shift", torch.ones(64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens) + self.shift
        x = x + self.down(F.gelu(self.up(x)))
        return F.linear(self.norm(x), self.table.weight)


TOKENS = torch.tensor([[3, 999, 3, 17]])
TABLE_BYTES = 1000 * 64 * 4


@pytest.fixture
def device() -> Iterator[FakeDevice]:
    device = computing_on_the_host(lazy)
    with installed(device):
        yield device


def built() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def run(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(TOKENS)
    return output


EXPECTED = run(built())


def only_residency(model: nn.Module) -> Residency:
    (residency,) = residencies_of(model)
    return residency


@pytest.mark.parametrize("storage", ["disk", "cpu"])
def test_lookups_move_only_rows(device: FakeDevice, storage: Any) -> None:
    model = pylomin.lazy_loading(built(), device=FAKE, storage=storage)
    device.copied_bytes = 0
    with torch.no_grad():
        rows = model.table(TOKENS)
    assert torch.equal(rows, built().table(TOKENS))
    assert device.copied_bytes == 3 * 64 * 4


def test_a_full_device_gives_up_what_is_idle(device: FakeDevice) -> None:
    model = pylomin.lazy_loading(built(), device=FAKE, memory_budget="4MiB")
    run(model)
    assert pylomin.stats(model).resident_bytes > TABLE_BYTES
    device.capacity_bytes = device._used_bytes + (32 << 10)  # others take the rest; no room for another weight
    other = pylomin.lazy_loading(nn.Linear(64, 256), device=FAKE, memory_budget="4MiB")
    residency = only_residency(model)
    with residency.lock:
        while residency._evict_one():
            pass
    assert torch.equal(run(model), EXPECTED)
    del other


def test_a_device_that_is_too_full_says_which_budget_works(device: FakeDevice) -> None:
    model = pylomin.lazy_loading(built(), device=FAKE, memory_budget="4MiB")
    device.capacity_bytes = 200 << 10
    with pytest.raises(
        BudgetError, match=r"no memory left for weight 'table.weight'.*No memory_budget is small enough"
    ):
        run(model)
    model = pylomin.lazy_loading(built().up, device=FAKE, memory_budget="4MiB")
    device.capacity_bytes = 60 << 10
    with pytest.raises(BudgetError, match="use smaller inputs"):
        model(torch.ones(1, 64))
    device.capacity_bytes = 1 << 30
    assert torch.equal(model(torch.ones(1, 64)), built().up(torch.ones(1, 64)))


def test_the_budget_that_is_named_works(device: FakeDevice) -> None:
    layers = nn.Sequential(*[nn.Linear(128, 128) for _ in range(8)]).eval()
    x = torch.randn(2, 128)
    expected = layers(x).detach()
    model = pylomin.lazy_loading(layers, device=FAKE, memory_budget="16MiB")
    device.capacity_bytes = 300 << 10
    with torch.no_grad():
        assert torch.equal(model(x), expected), "what is idle left for what came"
    budget = pylomin.stats(model).memory_budget
    assert budget is not None
    assert budget <= device.capacity_bytes, "or every pass would come to a device that is full"
    assert "lowered from 16.0 MiB" in only_residency(model).choices["budget"]
    pylomin.set_memory_budget(model, "16MiB")
    # Held at once, they cannot leave.
    residency = only_residency(model)
    weights = list(residency._weights.values())
    with pytest.raises(BudgetError, match="has no memory left"), residency.hold(weights):
        pass
    assert pylomin.stats(model).resident_bytes <= device.capacity_bytes
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def test_converting_that_finds_no_memory_is_tried_once_more(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pylomin.residency.loading import Room

    model = pylomin.load(lambda: Model().eval(), built().state_dict(), device=FAKE, dtype=torch.float64)
    expected = built().double()(TOKENS).detach()
    convert, calls = Room._convert, []

    def full(room: Room, tensors: list[torch.Tensor]) -> None:
        calls.append(room)
        if len(calls) in failing:
            raise torch.cuda.OutOfMemoryError("full")
        convert(room, tensors)

    monkeypatch.setattr(Room, "_convert", full)
    failing = {1, 3}
    assert torch.equal(run(model), expected)
    calls.clear()
    failing = set(range(100))
    with pytest.raises(BudgetError, match="memory_budget is not given"):
        run(model)
    failing = set()
    assert torch.equal(run(model), expected)


def test_lockstep_is_refused(device: FakeDevice) -> None:
    model = pylomin.lazy_loading(built(), device=FAKE)
    with pytest.raises(PassError, match="one batch"):
        pylomin.lockstep(model, [TOKENS, TOKENS])
    assert torch.equal(run(model), EXPECTED)


def test_graphs_are_refused(device: FakeDevice) -> None:
    model = pylomin.lazy_loading(built(), device=FAKE)
    device.capturing = True
    with pytest.raises(TraceError, match="CUDA graph is being captured"):
        model.up(torch.ones(1, 64))
    with pytest.raises(TraceError, match="CUDA graph is being captured"):
        model.table(TOKENS)
    device.capturing = False
    assert torch.equal(run(model), EXPECTED)


def test_writes_reach_the_weight(device: FakeDevice) -> None:
    model, plain = pylomin.lazy_loading(built(), device=FAKE), built()
    with torch.no_grad():
        for one in (model, plain):
            one.up.weight.mul_(2)
            one.table.weight[3] = 1.0
    assert torch.equal(run(model), run(plain))
    model.load_state_dict(built().state_dict())
    assert torch.equal(run(model), EXPECTED)


def test_a_write_to_one_weight_is_none_to_its_neighbours(device: FakeDevice) -> None:
    class Counting(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.bias.add_(1)
            return super().forward(x)

    layer, x = Counting(64, 256), torch.randn(1, 64)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    model = pylomin.lazy_loading(layer, device=FAKE)
    for count in (1, 2):
        with torch.no_grad():
            assert torch.equal(model(x), F.linear(x, weight, bias + count if count == 1 else bias + 1 + 1))
    assert model.bias.weight.writes == 2
    assert model.weight.weight.writes == 0


def test_copies_conversions_and_the_way_back(device: FakeDevice) -> None:
    model = pylomin.lazy_loading(built(), device=FAKE)
    assert torch.equal(run(copy.deepcopy(model)), EXPECTED)
    half = pylomin.lazy_loading(built(), device=FAKE).to(torch.bfloat16)
    assert torch.equal(run(half), run(built().to(torch.bfloat16)))
    on_host = pylomin.lazy_loading(built(), device=FAKE).to("cpu")
    assert torch.equal(run(on_host), EXPECTED)
    assert on_host.up.weight.device == torch.device("cpu")
    assert torch.equal(run(pylomin.restore(model)), EXPECTED)
    state = pylomin.lazy_loading(built(), device=FAKE).state_dict()
    assert all(torch.equal(state[name], value) for name, value in built().state_dict().items())


def test_gradients_flow_through_streamed_weights(device: FakeDevice) -> None:
    model, plain = pylomin.lazy_loading(built(), device=FAKE), built()
    grads = []
    for one in (model, plain):
        x = torch.ones(1, 64, requires_grad=True)
        one.down(F.gelu(one.up(x))).sum().backward()
        grads.append(x.grad)
    assert grads[0] is not None
    assert torch.equal(*grads)


def test_autocast(device: FakeDevice) -> None:
    model, plain = pylomin.lazy_loading(built(), device=FAKE), built()
    outputs = []
    for one in (model, plain):
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(run(one))
    assert torch.equal(*outputs)


def test_large_linears_run_by_tiles(device: FakeDevice) -> None:
    linear, x = nn.Linear(512, 2048).eval(), torch.randn(3, 512)
    expected = linear(x).detach()
    model = pylomin.prefetch(pylomin.lazy_loading(linear, device=FAKE, memory_budget="1MiB"))
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(x), expected)
    assert pylomin.stats(model).peak_bytes <= 1 << 20


def test_several_models_share_a_ring_and_a_device(device: FakeDevice) -> None:
    first, second = (pylomin.lazy_loading(built(), device=FAKE) for _ in range(2))
    for _ in range(3):
        assert torch.equal(run(first), EXPECTED)
        assert torch.equal(run(second), EXPECTED)
    assert pylomin.stats(first).pinned_bytes == pylomin.stats(second).pinned_bytes == sum(device.pinned.values())


def test_models_that_are_gone_leave_nothing_pinned(device: FakeDevice) -> None:
    model = pylomin.lazy_loading(built(), device=FAKE, storage="cpu")
    pinned = sum(device.pinned.values())
    needed = sum(-(-p.nbytes // 64) * 64 for p in built().parameters())
    assert needed <= pinned < needed + 4096, "no more than a page more than the weights"
    run(model)
    del model
    gc.collect()
    device.finish()
    other = pylomin.lazy_loading(built(), device=FAKE)
    run(other)  # what was copied is forgotten with the next copy
    assert sum(device.pinned.values()) == pylomin.stats(other).pinned_bytes


def test_a_host_without_memory_to_pin_uses_the_ring(device: FakeDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PINNED_SPARE_BYTES", 1 << 60)
    model = pylomin.lazy_loading(built(), device=FAKE, storage="cpu")
    assert torch.equal(run(model), EXPECTED)
    assert sum(device.pinned.values()) == pylomin.stats(model).pinned_bytes > 0


def test_a_small_host_gets_a_small_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    small = memory_limits.MemoryLimits(None, 1 << 20, "a test")
    monkeypatch.setattr("pylomin.residency.carrier.memory_limits", lambda: small)
    with installed(computing_on_the_host(lazy), slot_bytes=64 << 10, slots=64) as carrier:
        assert carrier.ring().nbytes == 2 * (64 << 10)


def test_fit_uses_what_the_device_has(device: FakeDevice) -> None:
    device.capacity_bytes = 2 << 30
    model = pylomin.fit(built(), device=FAKE, args=[TOKENS])
    assert torch.equal(run(model), EXPECTED)
    budget = pylomin.stats(model).memory_budget
    assert budget == (2 << 30) - int(0.2 * (2 << 30))
    assert "cpu:1" in pylomin.plan_of(model).choices["budget"]


def test_fit_streams_what_does_not_fit(device: FakeDevice) -> None:
    layers = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]).eval()
    x = torch.randn(2, 256)
    expected = layers(x).detach()
    model = pylomin.fit(layers, "1MiB", device=FAKE, args=[x])
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert pylomin.stats(model).peak_bytes <= 1 << 20
    assert device._used_bytes <= (1 << 20) + 4096, "memory, not only the ledger"


def test_no_more_device_memory_than_the_budget() -> None:
    """However far the host is ahead: nothing that was begun has run yet."""
    device = FakeDevice(lazy)
    layers = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)]).eval()
    peak = 0
    with installed(device):
        budget = 1 << 20
        model = pylomin.prefetch(pylomin.lazy_loading(layers, device=FAKE, storage="cpu", memory_budget=budget))
        with torch.no_grad():
            for _ in range(4):
                for layer in layers:
                    residency = only_residency(model)
                    with residency.hold([layer.weight.weight, layer.bias.weight]):
                        peak = max(peak, device._used_bytes)
        assert device.host_waits == 0
        assert budget // 2 < peak <= budget
        del model, layer, layers, residency


def test_pinned_weights_are_copied_where_they_are_written_to(device: FakeDevice) -> None:
    model = pylomin.lazy_loading(built(), device=FAKE, storage="cpu")
    with torch.no_grad():
        model.up.weight.zero_()
    plain = built()
    nn.init.zeros_(plain.up.weight)
    assert torch.equal(run(model), run(plain))


def test_damaged_scales_are_found_on_the_way(device: FakeDevice, tmp_path: Path) -> None:
    path = pylomin.save_model(built(), tmp_path / "int8", quantize="int8")
    with path.open("r+b") as file:
        raw = file.read()
        header = int.from_bytes(raw[:8], "little")
        tensors = json.loads(raw[8 : 8 + header])
        begin, _ = tensors["up.weight_scale"]["data_offsets"]
        file.seek(8 + header + begin)
        file.write(b"\xff\xff")  # NaN
    model = pylomin.load(lambda: Model().eval(), path, device=FAKE)
    with pytest.raises(pylomin.StoreReadError, match=r"'up.weight' .* is damaged"):
        run(model)
    assert pylomin.stats(model).resident_bytes == 0


def test_no_such_device() -> None:
    if torch.cuda.is_available():
        return
    with pytest.raises(PassError, match="device is 'cuda', which cannot be used here"):
        pylomin.lazy_loading(built(), device="cuda")


def test_one_carrier_for_each_device() -> None:
    with installed(computing_on_the_host(shuffled(0))) as carrier:
        assert carrier_to(FAKE) is carrier


def host_with(available_bytes: int | None) -> memory_limits.MemoryLimits:
    return memory_limits.MemoryLimits(None, available_bytes, "a test")


@pytest.mark.parametrize(
    ("available_bytes", "ordinary_bytes", "place"),
    [
        (4 << 30, 0, "cpu"),
        (4 << 30, 1 << 30, "cpu"),
        ((256 << 20) + (32 << 10), 0, "disk"),  # less than what is left for other things, and one chunk
        ((256 << 20) + (600 << 10), 0, "disk"),  # the weights are pages of a file, say, and would be in memory twice
        ((256 << 20) + (600 << 10), 1 << 30, "cpu"),  # they are in ordinary memory, and move
        (None, 0, "disk"),
    ],
)
def test_fit_chooses_where_weights_go(
    device: FakeDevice,
    monkeypatch: pytest.MonkeyPatch,
    available_bytes: int | None,
    ordinary_bytes: int,
    place: str,
) -> None:
    monkeypatch.setattr("pylomin.passes.fit.memory_limits", lambda: host_with(available_bytes))
    monkeypatch.setattr("pylomin.passes.fit.anonymous_bytes", lambda: ordinary_bytes)
    model = pylomin.fit(built(), "1MiB", device=FAKE)
    assert torch.equal(run(model), EXPECTED)
    is_in_memory = model.up.weight.weight.source.memory is not None
    assert is_in_memory == (place == "cpu")
    assert pylomin.plan_of(model).choices["storage"].startswith("host memory" if is_in_memory else "disk")


def test_fit_puts_weights_where_it_is_told(device: FakeDevice, tmp_path: Path) -> None:
    for storage, is_in_memory in (("disk", False), ("cpu", True)):
        model = pylomin.fit(built(), "1MiB", device=FAKE, storage=storage)  # type: ignore[arg-type]
        assert (model.up.weight.weight.source.memory is not None) is is_in_memory
        assert "storage" not in pylomin.plan_of(model).choices
        assert torch.equal(run(model), EXPECTED)
    model = pylomin.fit(built(), "1MiB", device=FAKE, output_dir=tmp_path / "weights")
    assert (tmp_path / "weights" / "model.safetensors").exists()
    with pytest.raises(PassError, match="storage is 'ram'"):
        pylomin.fit(built(), "1MiB", device=FAKE, storage="ram")  # type: ignore[arg-type]
    assert "storage" not in pylomin.plan_of(pylomin.fit(built(), "1MiB")).choices, "on the host"


def test_ordinary_memory_of_this_process(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    assert memory_limits.anonymous_bytes(tmp_path) == 0
    (tmp_path / "proc/self/status").write_text("VmSize:\t  99 kB\nRssAnon:\t  12 kB\nRssFile:\t 5 kB\n")
    assert memory_limits.anonymous_bytes(tmp_path) == 12 << 10
    assert memory_limits.anonymous_bytes() > 0
