"""Every value comes back with the type that it had; no file makes anything run."""

from __future__ import annotations

import collections
import enum
import json
import math
import random
import sys

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pylomin.checkpoint.tree import Encoder, decode
from pylomin.errors import CheckpointError, StoreFormatError
from pylomin.store.strict_json import parse_object

from .training import same_values


class Colour(enum.Enum):
    RED = 1
    GREEN = "green"


class Level(enum.IntEnum):
    LOW = 0


def round_trip(value: object) -> object:
    encoder = Encoder()
    text = json.dumps({"value": encoder.encode(value, "extra")}, allow_nan=False)
    tensors = {name: tensor.clone() for name, tensor in encoder.tensors.items()}
    return decode(parse_object(text.encode(), "file")["value"], tensors.__getitem__, "file")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats()
    | texts
    | st.binary(max_size=4)
    | st.complex_numbers(allow_nan=False)
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(texts | st.integers(), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None, max_examples=150)
@given(values)
def test_any_nesting(value):
    assert same_values(round_trip(value), value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        math.nan,
        -math.inf,
        2**63,
        -(2**63),
        {},
        {1: "a", "1": "b", None: "c", (1, 2): "d", 1.5: "e"},
        collections.OrderedDict([("b", 1), ("a", 2)]),
        collections.Counter({3: 2, 5: 1}),
        collections.defaultdict(list, {"a": [1]}),
        collections.deque([1, 2], maxlen=3),
        {1, 2},
        frozenset(["x"]),
        {"set": [1]},
        {"tensor": "not one"},
        [[], (), [()]],
        bytearray(b"ab"),
        torch.float16,
        torch.device("cuda", 1),
        torch.Size([2, 3]),
        Colour.GREEN,
        Level.LOW,
        random.Random(0).getstate(),
    ],
    ids=repr,
)
def test_types(value):
    back = round_trip(value)
    assert same_values(back, value)
    assert math.copysign(1, back) == math.copysign(1, value) if isinstance(value, float) else True
    if isinstance(value, collections.defaultdict):
        assert back.default_factory is value.default_factory
    if isinstance(value, collections.deque):
        assert back.maxlen == value.maxlen


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.empty(0, 3),
        torch.randn(2, 3).bfloat16(),
        torch.tensor([math.nan, -0.0]),
        torch.randn(2, 3, dtype=torch.complex128),
        torch.tensor([True]),
        torch.randn(4, 3).t(),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(6)[::2],
        torch.ones(1).expand(3),
        torch.randn(2, dtype=torch.complex64).conj(),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.stride())}",
)
def test_tensors(tensor):
    back = round_trip({"t": [tensor]})["t"][0]
    assert same_values(back, tensor.resolve_conj())
    assert back.stride() == torch.empty_like(tensor).stride()


def test_parameters():
    back = round_trip([torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False)])
    assert [type(p) for p in back] == [torch.nn.Parameter] * 2
    assert [p.requires_grad for p in back] == [True, False]


def test_numpy():
    state = numpy.random.RandomState(0).get_state()
    strided = numpy.arange(6).reshape(2, 3)[:, ::2]
    back = round_trip([state, numpy.float32(0.1), strided, numpy.int64(3), numpy.array(2.0)])
    assert [type(value) for value in back] == [tuple, numpy.float32, numpy.ndarray, numpy.int64, numpy.ndarray]
    assert type(back[0][1]) is numpy.ndarray
    assert (back[0][1] == state[1]).all()
    assert back[0][1].dtype == state[1].dtype
    assert back[0][2:] == state[2:]
    assert back[1] == numpy.float32(0.1)
    assert (back[2] == [[0, 2], [3, 5]]).all()
    assert back[4].shape == ()


def test_names_are_unique():
    encoder = Encoder()
    encoder.encode({"a": {"b": torch.zeros(1)}, "a.b": torch.ones(1), 1: torch.ones(2), "1": torch.ones(3)}, "s")
    lengths = {name: len(tensor) for name, tensor in encoder.tensors.items()}
    assert lengths == {"s.a.b": 1, "s.a.b#2": 1, "s.1": 2, "s.1#2": 3}


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {"b": lambda: 0}]}, r"extra\.a\.1\.b is a builtins\.function"),
        (object(), r"extra is a builtins\.object"),
        ({object(): 1}, r"a key of extra is a builtins\.object"),
        (collections.defaultdict(lambda: 0), r"extra is a collections\.defaultdict"),
        (numpy.array([object()]), r"extra is a numpy\.ndarray"),
        (type("S", (str,), {})("x"), r"extra is a .*\.S"),
        ("\ud800", r"extra is a builtins\.str"),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_what_has_no_json(value, path):
    with pytest.raises(CheckpointError, match=path + ", which a checkpoint cannot hold"):
        Encoder().encode(value, "extra")


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"function": "os.system"},
        {"enum": ["os", "system", "x"]},
        {"enum": ["no.such.module", "X", "x"]},
        {"enum": [__name__, "Colour", "BLUE"]},
        {"enum": 3},
        {"tuple": 3},
        {"dict": [1]},
        {"dict": [[{"dict": []}, 1]]},
        {"set": [[1]]},
        {"int": "z"},
        {"int": 3},
        {"float": "x"},
        {"bytes": "###"},
        {"dtype": "nn"},
        {"dtype": "no_such"},
        {"device": "abacus"},
        {"defaultdict": [], "factory": "open"},
        {"tensor": "absent"},
        {"tensor": "t", "dtype": "complex128", "shape": [99]},
        {"tensor": "t", "order": [5, 5]},
        {"tensor": ["t"]},
        {"number": 3},
        {"complex": ["a", "b"]},
    ],
    ids=str,
)
def test_hostile_json(value):
    with pytest.raises(StoreFormatError, match=r"^file has .*, which stands for no value"):
        decode(value, {"t": torch.zeros(16, dtype=torch.uint8)}.__getitem__, "file")


def test_deep_nesting():
    value: object = 1
    for _ in range(50_000):
        value = [value]
    with pytest.raises(StoreFormatError, match="nested too deeply"):
        decode(value, {}.__getitem__, "file")


def test_an_enum_is_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with pytest.raises(StoreFormatError, match="import this before"):
        decode({"enum": ["this", "x", "y"]}, {}.__getitem__, "file")
    assert "this" not in sys.modules
