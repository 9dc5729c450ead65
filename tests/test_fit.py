"""``fit``, plans that are shown, saved and used again, and budgets that change."""

from __future__ import annotations

import copy
import re
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import pylomin
from pylomin.lazy.offload import residencies_of
from pylomin.passes import fit as fit_module
from pylomin.residency.memory_limits import MemoryLimits

WIDTH = 320  # a layer has 401 KiB: large enough to be read ahead


class Toy(nn.Module):
    """A table, layers, and a head that is tied to the table."""

    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 1000, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.table(tokens)
        for layer in self.layers:
            hidden = self.norm(hidden + layer(hidden).tanh())
        return self.head(hidden)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.arange(12).view(2, 6) * 80


@pytest.fixture
def plain() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def forward(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(tokens)
    return output


def assert_right(model: nn.Module, plain: nn.Module, tokens: torch.Tensor, passes: int = 3) -> None:
    """Right outputs, within the budget."""
    expected = forward(plain, tokens)
    for _ in range(passes):
        torch.testing.assert_close(forward(model, tokens), expected)
    stats = pylomin.stats(model)
    assert stats.memory_budget is None or stats.peak_bytes <= stats.memory_budget


@pytest.mark.parametrize("reading_mode", [None, "mapped", "buffered", "direct"])
@pytest.mark.parametrize("budget", ["8MiB", "3MiB", "1.5MiB", "900KiB"])
@pytest.mark.parametrize("measured", [False, True])
def test_any_budget(
    plain: Toy, tokens: torch.Tensor, budget: str, reading_mode: pylomin.Mode | None, measured: bool
) -> None:
    args = [tokens] if measured else None
    model = copy.deepcopy(plain)
    assert pylomin.fit(model, budget, args=args, reading_mode=reading_mode) is model
    assert_right(model, plain, tokens)
    plan = pylomin.plan_of(model)
    assert plan.memory_budget == pylomin.stats(model).memory_budget
    assert (plan.elapsed_s is not None) == measured
    assert plan.peak_bytes is not None
    assert plan.peak_bytes <= plan.memory_budget


def test_everything_stays_where_it_fits(plain: Toy, tokens: torch.Tensor) -> None:
    model = pylomin.fit(copy.deepcopy(plain), "100MiB", args=[tokens])
    before = pylomin.stats(model)
    assert_right(model, plain, tokens)
    after = pylomin.stats(model)
    rows_bytes = 3 * 12 * WIDTH * 4  # only the table's rows are read again
    assert after.bytes_read - before.bytes_read <= rows_bytes
    assert not any(not group.resident for group in pylomin.plan_of(model).groups)


def test_what_it_says(plain: Toy, tokens: torch.Tensor) -> None:
    model = pylomin.fit(copy.deepcopy(plain), "900KiB", args=[tokens], reading_mode="buffered")
    text = str(pylomin.plan_of(model))
    assert re.search(r"^budget +900\.0 KiB +for \d", text, re.MULTILINE)
    assert re.search(r"^resident +[\d.]+ \w+ +\d of \d groups", text, re.MULTILINE)
    assert re.search(r"^time +\S+ s +each cycle, predicted$", text, re.MULTILINE)
    assert "buffered was asked for" in text
    assert re.search(r"^tiles +\d linears, for they do not fit", text, re.MULTILINE)
    assert re.search(r"^embeddings +1 looked up by rows", text, re.MULTILINE)


def test_on_a_model_that_is_offloaded_already(plain: Toy, tokens: torch.Tensor) -> None:
    model = pylomin.lazy_loading(copy.deepcopy(plain), memory_budget="100MiB")
    forward(model, tokens)
    assert pylomin.fit(model, "2MiB", reading_mode="direct") is model
    assert pylomin.stats(model).memory_budget == 2 << 20
    assert pylomin.stats(model).reading_mode in ("direct", "buffered")  # where the file system has no direct reads
    assert_right(model, plain, tokens)


def test_from_a_weight_file(plain: Toy, tokens: torch.Tensor, tmp_path: Path) -> None:
    pylomin.lazy_loading(copy.deepcopy(plain), output_dir=tmp_path)
    with torch.device("meta"):
        model = Toy().eval()
    pylomin.fit(model, "2MiB", weights=tmp_path / "model.safetensors")
    assert_right(model, plain, tokens)


def test_the_default_is_what_is_free(plain: Toy, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "memory_limits", lambda: MemoryLimits(1 << 30, 1 << 30, "a container of 1 GiB"))
    model = pylomin.fit(copy.deepcopy(plain))
    assert pylomin.stats(model).memory_budget == (1 << 30) - (256 << 20)
    assert "a container of 1 GiB" in str(pylomin.plan_of(model))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (MemoryLimits(None, None, "nothing tells"), "nothing tells, so there is no default for memory_budget"),
        (MemoryLimits(1 << 27, 1 << 27, "a tiny container"), r"only 128\.0 MiB .*a tiny container"),
    ],
)
def test_no_default(plain: Toy, limits: MemoryLimits, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_module, "memory_limits", lambda: limits)
    with pytest.raises(pylomin.BudgetError, match=message):
        pylomin.fit(plain)
    assert not residencies_of(plain)


def test_wrong_arguments(plain: Toy, tokens: torch.Tensor) -> None:
    with pytest.raises(pylomin.PassError, match=r"args is a Tensor; expected a list"):
        pylomin.fit(plain, "4MiB", args=tokens)  # type: ignore[arg-type]
    with pytest.raises(pylomin.PassError, match="reading_mode is 'fast'; expected one of 'mapped', 'buffered'"):
        pylomin.fit(plain, "4MiB", reading_mode="fast")  # type: ignore[arg-type]
    with pytest.raises(pylomin.BudgetError, match=r"Use memory_budget of at least \d+"):
        pylomin.fit(plain, 10)
    assert not residencies_of(plain)


# -- plans ------------------------------------------------------------------------------------------------------------


def test_no_plan_without_a_budget_or_an_order(plain: Toy) -> None:
    with pytest.raises(pylomin.PassError, match="nothing of it is offloaded"):
        pylomin.plan_of(plain)
    model = pylomin.lazy_loading(plain)
    with pytest.raises(pylomin.PassError, match="no memory budget"):
        pylomin.plan_of(model)
    pylomin.set_memory_budget(model, "2MiB")
    with pytest.raises(pylomin.PassError, match="the order in which weights are used is not known"):
        pylomin.plan_of(model)


@pytest.mark.parametrize("saved", [False, True])
def test_with_a_plan_the_first_pass_reads_ahead(plain: Toy, tokens: torch.Tensor, saved: bool, tmp_path: Path) -> None:
    first = pylomin.fit(copy.deepcopy(plain), "2MiB", args=[tokens], reading_mode="buffered")
    plan = pylomin.plan_of(first)
    model = pylomin.lazy_loading(copy.deepcopy(plain), memory_budget="2MiB", reading_mode="buffered")
    pylomin.prefetch(model, plan=plan.save(tmp_path / "plan.json") if saved else plan)
    assert pylomin.plan_of(model).order == plan.order
    assert_right(model, plain, tokens, passes=1)
    assert pylomin.stats(model).prefetched > 0


def test_a_plan_for_another_budget_is_made_anew(plain: Toy, tokens: torch.Tensor) -> None:
    plan = pylomin.plan_of(pylomin.fit(copy.deepcopy(plain), "100MiB"))
    model = pylomin.lazy_loading(copy.deepcopy(plain))
    pylomin.prefetch(model, memory_budget="2MiB", plan=plan)
    assert pylomin.plan_of(model).resident_bytes <= 2 << 20
    assert_right(model, plain, tokens)


def test_a_plan_for_another_model_is_refused(plain: Toy, tmp_path: Path) -> None:
    plan = pylomin.plan_of(pylomin.fit(plain, "4MiB"))
    other = pylomin.lazy_loading(Toy(layers=7), memory_budget="4MiB")
    with pytest.raises(pylomin.PlanError, match=r"made for another model: 'layers\.6\.bias' is float32 \[320\]"):
        pylomin.prefetch(other, plan=plan)
    assert residencies_of(other)[0].depth == 0, "nothing was changed"
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(pylomin.PlanError, match="holds no plan that can be used"):
        pylomin.prefetch(other, plan=tmp_path / "plan.json")


# -- budgets that change ----------------------------------------------------------------------------------------------


def test_set_memory_budget(plain: Toy, tokens: torch.Tensor) -> None:
    model = pylomin.prefetch(pylomin.lazy_loading(copy.deepcopy(plain)))
    for budget in ("100MiB", "2MiB", None, "1MiB", "3MiB", "100MiB"):
        assert pylomin.set_memory_budget(model, budget) is model
        assert_right(model, plain, tokens, passes=4)


def test_a_smaller_budget_takes_effect_at_once(plain: Toy, tokens: torch.Tensor) -> None:
    model = pylomin.fit(copy.deepcopy(plain), "100MiB")
    assert_right(model, plain, tokens)
    assert pylomin.stats(model).resident_bytes > 2 << 20
    pylomin.set_memory_budget(model, "2MiB")
    assert pylomin.stats(model).resident_bytes <= 2 << 20


def test_a_budget_that_cannot_work_is_refused(plain: Toy, tokens: torch.Tensor) -> None:
    model = pylomin.lazy_loading(copy.deepcopy(plain), memory_budget="4MiB")
    with pytest.raises(pylomin.BudgetError, match="at least"):
        pylomin.set_memory_budget(model, 100)
    assert pylomin.stats(model).memory_budget == 4 << 20
    assert_right(model, plain, tokens)
    with pytest.raises(pylomin.PassError, match="nothing of this model is offloaded"):
        pylomin.set_memory_budget(plain, "1MiB")


def test_while_other_threads_run_the_model(plain: Toy, tokens: torch.Tensor) -> None:
    expected = forward(plain, tokens)
    model = pylomin.fit(copy.deepcopy(plain), "100MiB", reading_mode="buffered")
    outcomes: list[object] = []

    def run() -> None:
        try:
            outcomes.extend(torch.allclose(forward(model, tokens), expected, atol=1e-5) for _ in range(20))
        except Exception as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for budget in ["3MiB", "100MiB", None, "6MiB"] * 5:
        pylomin.set_memory_budget(model, budget)
    for thread in threads:
        thread.join(60)
    assert outcomes == [True] * 40
