"""Every class of torch.nn that owns parameters computes what it computes in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import pylomin

from .common import assert_same, check, compare, run, twins

Inputs = tuple[Any, ...]
Case = tuple[Callable[[], nn.Module], Callable[[], Inputs]]


def ids(*shape: int, rows: int = 10) -> Tensor:
    return torch.randint(0, rows, shape)


def normal(*shape: int) -> Callable[[], Inputs]:
    return lambda: (torch.randn(*shape),)


CASES: dict[str, Case] = {
    "linear": (lambda: nn.Linear(5, 3), normal(2, 5)),
    "linear without bias": (lambda: nn.Linear(5, 3, bias=False), normal(2, 4, 5)),
    "linear without batch": (lambda: nn.Linear(5, 3), normal(5)),
    "bilinear": (lambda: nn.Bilinear(4, 5, 3), lambda: (torch.randn(2, 4), torch.randn(2, 5))),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), normal(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), normal(2, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), normal(1, 2, 5, 5, 5)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2), normal(2, 4, 9, 9)),
    "conv2d reflect": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), normal(2, 4, 6, 6)),
    "conv2d same": (lambda: nn.Conv2d(4, 4, 4, padding="same"), normal(2, 4, 6, 6)),
    "conv transpose 1d": (lambda: nn.ConvTranspose1d(4, 6, 3), normal(2, 4, 9)),
    "conv transpose 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), normal(2, 4, 5, 5)),
    "conv transpose 3d": (lambda: nn.ConvTranspose3d(2, 4, 3), normal(1, 2, 4, 4, 4)),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), normal(6, 4)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), normal(3, 4, 5, 5)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(2), normal(2, 2, 3, 3, 3)),
    "batch norm cumulative": (lambda: nn.BatchNorm1d(4, momentum=None), normal(6, 4)),
    "batch norm without statistics": (lambda: nn.BatchNorm1d(4, track_running_stats=False), normal(6, 4)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(4, affine=True), normal(2, 4, 6)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), normal(2, 4, 5, 5)),
    "instance norm 3d": (lambda: nn.InstanceNorm3d(2, affine=True), normal(2, 2, 3, 3, 3)),
    "group norm": (lambda: nn.GroupNorm(2, 4), normal(2, 4, 5)),
    "layer norm": (lambda: nn.LayerNorm((3, 4)), normal(2, 3, 4)),
    "rms norm": (lambda: nn.RMSNorm(4), normal(2, 3, 4)),
    "embedding": (lambda: nn.Embedding(10, 4), lambda: (ids(2, 3),)),
    "embedding padding": (lambda: nn.Embedding(10, 4, padding_idx=1), lambda: (ids(2, 3),)),
    "embedding max norm": (lambda: nn.Embedding(10, 4, max_norm=0.5), lambda: (ids(2, 3),)),
    "embedding scaled": (lambda: nn.Embedding(10, 4, scale_grad_by_freq=True), lambda: (ids(2, 3),)),
    "embedding sparse": (lambda: nn.Embedding(10, 4, sparse=True), lambda: (ids(2, 3),)),
    "embedding one id": (lambda: nn.Embedding(10, 4), lambda: (torch.tensor(3),)),
    "embedding no ids": (lambda: nn.Embedding(10, 4), lambda: (torch.empty(2, 0, dtype=torch.long),)),
    "embedding int32 ids": (lambda: nn.Embedding(10, 4), lambda: (ids(2, 3).int(),)),
    "embedding bag mean": (lambda: nn.EmbeddingBag(10, 4), lambda: (ids(3, 4),)),
    "embedding bag sum": (lambda: nn.EmbeddingBag(10, 4, mode="sum"), lambda: (ids(3, 4),)),
    "embedding bag max": (lambda: nn.EmbeddingBag(10, 4, mode="max"), lambda: (ids(3, 4),)),
    "embedding bag offsets": (lambda: nn.EmbeddingBag(10, 4), lambda: (ids(7), torch.tensor([0, 2, 2, 5]))),
    "embedding bag last offset": (
        lambda: nn.EmbeddingBag(10, 4, mode="sum", include_last_offset=True),
        lambda: (ids(7), torch.tensor([0, 2, 5, 7])),
    ),
    "embedding bag weighted": (
        lambda: nn.EmbeddingBag(10, 4, mode="sum"),
        lambda: (ids(3, 4), None, torch.rand(3, 4)),
    ),
    "embedding bag padding": (
        lambda: nn.EmbeddingBag(10, 4, mode="mean", padding_idx=2),
        lambda: (torch.tensor([[1, 2, 3], [2, 2, 2], [9, 2, 0]]),),
    ),
    "embedding bag padding not used": (
        lambda: nn.EmbeddingBag(10, 4, mode="max", padding_idx=2),
        lambda: (torch.tensor([[1, 4, 3], [5, 5, 7]]),),
    ),
    "embedding bag max norm": (lambda: nn.EmbeddingBag(10, 4, max_norm=0.7), lambda: (ids(3, 4),)),
    "embedding bag empty": (lambda: nn.EmbeddingBag(10, 4), lambda: (ids(0), torch.tensor([0, 0]))),
    "rnn": (lambda: nn.RNN(4, 5, num_layers=2, nonlinearity="relu"), normal(3, 2, 4)),
    "rnn bidirectional": (lambda: nn.RNN(4, 5, bidirectional=True, batch_first=True), normal(3, 2, 4)),
    "lstm": (lambda: nn.LSTM(4, 5, num_layers=2), normal(3, 2, 4)),
    "lstm bidirectional": (lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True), normal(3, 2, 4)),
    "lstm projected": (lambda: nn.LSTM(4, 5, num_layers=2, proj_size=3, bidirectional=True), normal(3, 2, 4)),
    "lstm dropout": (lambda: nn.LSTM(4, 5, num_layers=3, dropout=0.5), normal(3, 2, 4)),
    "lstm without bias": (lambda: nn.LSTM(4, 5, bias=False), normal(3, 2, 4)),
    "lstm with state": (
        lambda: nn.LSTM(4, 5),
        lambda: (torch.randn(3, 2, 4), (torch.randn(1, 2, 5), torch.randn(1, 2, 5))),
    ),
    "lstm packed": (
        lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True),
        lambda: (pack_padded_sequence(torch.randn(6, 3, 4), torch.tensor([6, 4, 2])),),
    ),
    "lstm packed unsorted": (
        lambda: nn.LSTM(4, 5),
        lambda: (pack_sequence([torch.randn(n, 4) for n in (2, 5, 3)], enforce_sorted=False),),
    ),
    "gru": (lambda: nn.GRU(4, 5, num_layers=2, bidirectional=True), normal(3, 2, 4)),
    "gru packed": (
        lambda: nn.GRU(4, 5, dropout=0.3, num_layers=2),
        lambda: (pack_padded_sequence(torch.randn(6, 3, 4), torch.tensor([6, 4, 2])),),
    ),
    "rnn cell": (lambda: nn.RNNCell(4, 5), normal(2, 4)),
    "lstm cell": (lambda: nn.LSTMCell(4, 5), normal(2, 4)),
    "gru cell": (lambda: nn.GRUCell(4, 5), lambda: (torch.randn(2, 4), torch.randn(2, 5))),
    "prelu": (lambda: nn.PReLU(4), normal(2, 4, 3)),
    "prelu one": (nn.PReLU, normal(2, 4)),
    "transformer encoder layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16), normal(5, 2, 8)),
    "transformer encoder layer norm first": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, norm_first=True, batch_first=True, activation="gelu"),
        normal(2, 5, 8),
    ),
    "transformer decoder layer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True),
        lambda: (torch.randn(2, 4, 8), torch.randn(2, 5, 8)),
    ),
    "transformer decoder": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2, norm=nn.LayerNorm(8)),
        lambda: (torch.randn(4, 2, 8), torch.randn(5, 2, 8)),
    ),
    "transformer": (
        lambda: nn.Transformer(8, 2, 2, 2, 16, batch_first=True),
        lambda: (torch.randn(2, 4, 8), torch.randn(2, 5, 8)),
    ),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_module(case: Case, training: bool) -> None:
    make, inputs = case
    check(make().train(training), *inputs())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_first": True},
        {"bias": False},
        {"add_bias_kv": True, "add_zero_attn": True},
        {"kdim": 6, "vdim": 10},
        {"kdim": 6, "vdim": 10, "add_bias_kv": True, "batch_first": True},
        {"dropout": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("need_weights", [False, True], ids=["fast", "weights"])
def test_multihead_attention(options: dict[str, Any], need_weights: bool, training: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, **options).train(training)
    query, key, value = torch.randn(3, 4, 8), torch.randn(3, 4, options.get("kdim", 8)), torch.randn(3, 4, 8)
    value = torch.randn(3, 4, options.get("vdim", 8))
    check(attention, query, key, value, need_weights=need_weights)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_multihead_self_attention_with_masks(training: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    check(attention, x, x, x, key_padding_mask=padding, need_weights=False)


class SelfAttention(nn.Module):
    """Query, key and value are one object, as the fast path wants."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return out


def test_multihead_attention_fast_path() -> None:
    check(SelfAttention().eval(), torch.randn(2, 5, 8))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_transformer_encoder_makes_nested_tensors() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    check(encoder, torch.randn(2, 5, 8), src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_transformer_with_causal_mask() -> None:
    model = nn.Transformer(8, 2, 1, 1, 16).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    check(model, torch.randn(5, 2, 8), torch.randn(4, 2, 8), tgt_mask=mask, tgt_is_causal=True)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_transformer_encoder_layers_are_not_tied_by_offloading() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 3)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter)
    check(encoder.eval(), torch.randn(5, 2, 8))


def test_batch_norm_statistics_move_with_the_inputs() -> None:
    plain, lazy = twins(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train())
    for _ in range(3):
        x = torch.randn(2, 3, 6, 6)
        assert_same(run(plain, x), run(lazy, x))
        assert_same(dict(plain.named_buffers()), dict(lazy.named_buffers()))
    compare(plain.eval(), lazy.eval(), torch.randn(2, 3, 6, 6))


def test_batch_norm_without_affine_has_nothing_to_offload() -> None:
    with pytest.raises(pylomin.PassError, match="BatchNorm1d has no parameters"):
        pylomin.lazy_loading(nn.BatchNorm1d(4, affine=False))


def test_embedding_max_norm_renormalises_rows_for_good() -> None:
    plain, lazy = twins(nn.Embedding(10, 4, max_norm=0.3))
    x = torch.tensor([[1, 2], [2, 5]])
    for _ in range(2):
        assert_same(run(plain, x), run(lazy, x))
        assert_same(plain.weight, lazy.weight)
    assert_same(run(plain, torch.arange(10)), run(lazy, torch.arange(10)))
    assert_same(plain.weight, lazy.weight)


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(4, 4)) for _ in range(3)])
        self.named = nn.ParameterDict({"left": nn.Parameter(torch.randn(4)), "right": nn.Parameter(torch.randn(4))})

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x @ weight
        for name in sorted(self.named):
            x = x + self.named[name]
        return x * len(self.weights) + sum(p.sum() for p in self.named.values())


def test_parameter_list_and_dict() -> None:
    lazy = check(Lists(), torch.randn(2, 4))
    assert len(lazy.weights) == 3
    assert list(lazy.named.keys()) == ["left", "right"]
    assert "left" in lazy.named
    assert lazy.weights[-1] is lazy.weights[2]


def test_parameter_list_slice_extend_and_nesting() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.ParameterList([torch.randn(4), nn.ParameterList([torch.randn(4)]), torch.randn(4)])

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weights[0] + self.weights[1][0] * sum(w.sum() for w in self.weights[2:])

    lazy = check(Sliced(), torch.randn(2, 4))
    lazy.weights.append(nn.Parameter(torch.ones(4)))
    assert len(lazy.weights[2:]) == 2


def test_nested_containers() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"a": nn.Linear(4, 4)})["a"]) for _ in range(2)]
            self.blocks = nn.ModuleList(blocks)
            self.heads = nn.ModuleDict({"x": nn.Linear(4, 2), "y": nn.Sequential(nn.Linear(4, 2), nn.Tanh())})

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            for block in self.blocks:
                x = block(x)
            return {name: head(x) for name, head in self.heads.items()}

    check(Nested(), torch.randn(2, 4))


def test_adaptive_log_softmax() -> None:
    model = nn.AdaptiveLogSoftmaxWithLoss(8, 20, cutoffs=[4, 10], div_value=2.0, head_bias=True)
    plain, lazy = twins(model)
    x, target = torch.randn(6, 8), torch.tensor([0, 3, 5, 9, 12, 19])
    compare(plain, lazy, x, target)
    for name in ("log_prob", "predict"):
        assert_same(run(getattr(plain, name), x), run(getattr(lazy, name), x))


def test_uninitialized_parameters_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3))
    with pytest.raises(pylomin.PassError, match=r"parameter '1\.weight' is uninitialized; run the model once"):
        pylomin.lazy_loading(model)
    assert type(model[0]) is nn.Linear
    assert type(model[0].weight) is nn.Parameter


def test_lazy_linear_works_once_it_is_initialized() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyConv1d(2, 1))
    model(torch.randn(3, 3, 4))
    check(model, torch.randn(3, 3, 4))


def test_cosine_distance_modules_without_parameters_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Identity())
    lazy = check(model.train(), torch.randn(2, 4))
    assert [type(module) for module in list(lazy)[1:]] == [nn.ReLU, nn.Dropout, nn.Flatten, nn.Identity]
