"""Packed expert weights: the bytes of experts that are used, and what torch computes with all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pylomin
from pylomin.lazy.experts import GatheredTensor
from pylomin.lazy.tensor import OffloadedTensor

EXPERTS, K, N = 16, 24, 40
EXPERT_BYTES = K * N * 4
SMALL = 2 * EXPERT_BYTES  # a budget: neither a gathered batch nor one expert twice fits


class Packed(nn.Module):
    """Experts, as models keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, K, N) / K**0.5, requires_grad=False)


def packed(memory_budget: int | None) -> tuple[Tensor, OffloadedTensor]:
    torch.manual_seed(0)
    module = Packed()
    plain = module.weight.detach().clone()
    weight = pylomin.lazy_loading(module, memory_budget=memory_budget)._parameters["weight"]
    assert isinstance(weight, OffloadedTensor)
    return plain, weight


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected)


ROUTED = torch.tensor([3, 9, 3, 15, 9, 3])
TOKENS = torch.randn(len(ROUTED), K, generator=torch.Generator().manual_seed(1))
TOKENS_N = torch.randn(len(ROUTED), N, generator=torch.Generator().manual_seed(2))

GATHERED: dict[str, Callable[[Tensor], Tensor]] = {
    "right": lambda w: torch.bmm(TOKENS.unsqueeze(1), w[ROUTED]),
    "left": lambda w: torch.bmm(w[ROUTED], TOKENS_N.unsqueeze(-1)),
    "right, transposed": lambda w: torch.bmm(TOKENS_N.unsqueeze(1), w[ROUTED].transpose(1, 2)),
    "left, transposed": lambda w: torch.bmm(w[ROUTED].mT, TOKENS.unsqueeze(-1)),
    "several rows": lambda w: torch.bmm(TOKENS.unsqueeze(1).expand(-1, 5, -1), w[ROUTED]),
    "several columns": lambda w: torch.bmm(w[ROUTED], TOKENS_N.unsqueeze(-1).expand(-1, -1, 5)),
    "matmul": lambda w: TOKENS.unsqueeze(1) @ w[ROUTED],
    "negative": lambda w: torch.bmm(TOKENS.unsqueeze(1), w[ROUTED - EXPERTS]),
}


@pytest.mark.parametrize("budget", [None, SMALL, 8 * EXPERT_BYTES])
@pytest.mark.parametrize("name", GATHERED)
def test_gathered_products(name: str, budget: int | None) -> None:
    plain, weight = packed(budget)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        before = weight.weight.residency.stats().bytes_read
        with mode():
            assert_near(GATHERED[name](weight), GATHERED[name](plain))
        stats = weight.weight.residency.stats()
        assert stats.bytes_read - before == len(set(ROUTED.tolist())) * EXPERT_BYTES
        assert budget is None or stats.peak_bytes <= budget


def test_gathered_is_not_read_before_it_is_used() -> None:
    _, weight = packed(SMALL)
    gathered = weight[ROUTED]
    assert isinstance(gathered, GatheredTensor)
    assert gathered.shape == (len(ROUTED), K, N)
    assert weight.weight.residency.stats().bytes_read == 0


def test_small_gathers_are_ordinary_tensors() -> None:
    plain, weight = packed(None)
    assert type(weight[ROUTED]) is Tensor
    assert torch.equal(weight[ROUTED], plain[ROUTED])


@pytest.mark.parametrize(
    "use",
    [
        lambda g: g + 1,
        lambda g: g.sum(0),
        lambda g: g.transpose(1, 2).contiguous(),
        lambda g: g.transpose(0, 1),
        lambda g: torch.cat([g, g]),
        lambda g: g[2, 3],
        lambda g: torch.bmm(g, g.mT),
        lambda g: g.double(),
        lambda g: g.mul_(2) + g,
        lambda g: g.detach().mul_(2) + g,
        lambda g: g.mT.zero_() + g.mT,
        lambda g: torch.einsum("tkn,tk->tn", g, TOKENS),
    ],
)
def test_gathered_for_any_other_use(use: Callable[[Tensor], Tensor]) -> None:
    plain, weight = packed(SMALL)
    gathered = weight[ROUTED]
    assert isinstance(gathered, GatheredTensor)
    torch.testing.assert_close(use(gathered), use(plain[ROUTED]))
    assert torch.equal(weight[3], plain[3])


def test_gathered_gradients() -> None:
    plain, weight = packed(SMALL)
    grads = []
    for w in (plain, weight):
        x, y = TOKENS.clone().requires_grad_(), TOKENS_N.clone().requires_grad_()
        a = torch.bmm(x.unsqueeze(1), w[ROUTED])
        b = torch.bmm(w[ROUTED], y.unsqueeze(-1))
        (a.square().sum() + b.square().sum()).backward()
        grads.append((x.grad, y.grad))
    torch.testing.assert_close(grads[1], grads[0])
    assert weight.weight.residency.stats().peak_bytes <= SMALL


def test_gathered_then_written_is_an_error() -> None:
    _, weight = packed(SMALL)
    gathered = weight[ROUTED]
    weight.mul_(2)
    for use in (lambda: gathered + 1, lambda: torch.bmm(TOKENS.unsqueeze(1), gathered)):
        with pytest.raises(RuntimeError, match="'weight' were chosen, but it was modified"):
            use()


def test_gathered_out_of_range_is_torchs_error() -> None:
    _, weight = packed(None)
    with pytest.raises(IndexError, match="out of bounds"):
        weight[torch.tensor([EXPERTS])]


def test_wrong_shapes_are_torchs_errors() -> None:
    plain, weight = packed(SMALL)
    for x in (TOKENS_N.unsqueeze(1), TOKENS[1:].unsqueeze(1), TOKENS, TOKENS.double().unsqueeze(1)):
        errors = []
        for w in (plain, weight):
            with pytest.raises(RuntimeError) as raised:
                torch.bmm(x, w[ROUTED])
            errors.append(str(raised.value))
        assert errors[0] == errors[1]


# -- groups of tokens ------------------------------------------------------------------------------------------------

grouped = pytest.mark.skipif(not hasattr(torch, "_grouped_mm"), reason="this torch has no grouped product")
ENDS = torch.cumsum(torch.bincount(ROUTED, minlength=EXPERTS), 0).to(torch.int32)


@grouped
@pytest.mark.parametrize("budget", [None, SMALL, 8 * EXPERT_BYTES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products(dtype: torch.dtype, budget: int | None) -> None:
    plain, weight = packed(budget)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            for left, w, p in (
                (TOKENS.to(dtype), weight.to(dtype), plain.to(dtype)),
                (TOKENS_N.to(dtype), weight.to(dtype).transpose(1, 2), plain.to(dtype).transpose(1, 2)),
            ):
                before = weight.weight.residency.stats().bytes_read
                actual, expected = (torch._grouped_mm(left, each, offs=ENDS) for each in (w, p))
                if budget == SMALL:  # tiles round otherwise
                    eps = torch.finfo(dtype).eps
                    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=4 * eps)
                else:
                    assert torch.equal(actual, expected)
                assert weight.weight.residency.stats().bytes_read - before == 3 * EXPERT_BYTES
    assert budget is None or weight.weight.residency.stats().peak_bytes <= budget


@grouped
def test_grouped_gradients() -> None:
    plain, weight = packed(SMALL)
    grads = []
    for w in (plain, weight):
        x = TOKENS.clone().requires_grad_()
        torch._grouped_mm(x, w, offs=ENDS).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0])
    assert weight.weight.residency.stats().peak_bytes <= SMALL


@grouped
def test_rows_of_no_group_are_zero() -> None:
    _, weight = packed(None)
    ends = torch.zeros(EXPERTS, dtype=torch.int32)
    assert not torch._grouped_mm(TOKENS, weight, offs=ends).any()
    ends[3:] = 2
    out = torch._grouped_mm(TOKENS, weight, offs=ends)
    assert out[:2].all()
    assert not out[2:].any()


# -- all experts -----------------------------------------------------------------------------------------------------


def test_product_with_every_expert_under_a_budget() -> None:
    plain, weight = packed(SMALL)
    x = torch.randn(EXPERTS, 3, K)
    bias = torch.randn(EXPERTS, 3, N)
    for compute in (
        lambda w: torch.bmm(x, w),
        lambda w: torch.bmm(w.transpose(1, 2), x.transpose(1, 2)),
        lambda w: torch.baddbmm(bias, x, w, beta=2, alpha=0.5),
    ):
        assert_near(compute(weight), compute(plain))
    stats = weight.weight.residency.stats()
    assert stats.peak_bytes <= SMALL
    assert stats.bytes_read == 3 * EXPERTS * EXPERT_BYTES


def test_budget_for_less_than_one_expert() -> None:
    plain, weight = packed(EXPERT_BYTES // 2)
    x = torch.randn(3, K)
    torch.testing.assert_close(x @ weight[5], x @ plain[5])
    assert weight.weight.residency.stats().bytes_read == EXPERT_BYTES
    assert weight.weight.residency.stats().peak_bytes <= EXPERT_BYTES // 2
