"""Round trips over dtypes, shapes and extreme values; the oracle is plain arithmetic in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pylomin.errors import PassError
from pylomin.quantize.codec import Encoded, decode, decode_rows, encode
from pylomin.quantize.packing import FULL, SCHEMES, Packing

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GROUPED = ("int8", "int4", "int8-row")
LIMITS = {"int8": 127, "int8-row": 127, "int4": 7}

shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple) | st.tuples(st.integers(1, 5), st.integers(1, 200))


def sample(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def group_limits(tensor: torch.Tensor, encoded: Encoded) -> torch.Tensor:
    """Half a step of each value's group, in float64."""
    packing = encoded.packing
    rows, columns = packing.matrix_shape
    size = columns if packing.scheme == "int8-row" else packing.group_size
    matrix = tensor.double().reshape(rows, columns)
    steps = encoded.parts[1].double().reshape(rows, -1)
    assert steps.shape[1] == -(-columns // size)
    return (steps.repeat_interleave(size, 1)[:, :columns] / 2).reshape(matrix.shape).reshape(tensor.shape)


def rounding(tensor: torch.Tensor) -> torch.Tensor:
    """What rounding the decoded value to the dtype may add."""
    info = torch.finfo(tensor.dtype)
    return tensor.double().abs() * info.eps * 1.01 + info.smallest_normal * info.eps


@settings(deadline=None, max_examples=150)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(GROUPED), st.sampled_from([1, 3, 16, 64]), st.integers(0, 99))
def test_no_value_is_off_by_more_than_half_a_step(shape, dtype, scheme, group_size, seed):
    tensor = sample(shape, dtype, seed)
    encoded = encode(tensor, scheme, group_size)
    decoded = decode(encoded.packing, encoded.parts)
    assert (decoded.dtype, decoded.shape) == (dtype, tensor.shape)
    assert [(p.dtype, p.shape) for p in encoded.parts] == [(p.dtype, p.shape) for p in encoded.packing.parts]
    assert sum(part.nbytes for part in encoded.parts) <= tensor.nbytes
    error = (decoded.double() - tensor.double()).abs()
    if encoded.packing.has_scales:
        assert bool((error <= group_limits(tensor, encoded) + rounding(tensor)).all())
    if tensor.numel() and encoded.packing.scheme != FULL:
        assert encoded.max_error == pytest.approx(float(error.max()), rel=1e-5, abs=1e-300)
        relative = float(error.square().sum().sqrt() / tensor.double().square().sum().sqrt())
        assert encoded.rms_error == pytest.approx(relative, rel=1e-4)
    else:
        assert torch.equal(decoded, tensor)
        assert encoded.max_error == encoded.rms_error == 0


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from(GROUPED),
    st.integers(-300, 300),
    st.lists(st.floats(-1, 1), min_size=4, max_size=70),
)
def test_every_magnitude_is_held_or_left_alone(dtype, scheme, exponent, values):
    tensor = (torch.tensor(values, dtype=torch.float64) * 10.0**exponent).to(dtype)
    encoded = encode(tensor, scheme)
    decoded = decode(encoded.packing, encoded.parts)
    if encoded.packing.has_scales and bool(torch.isfinite(tensor).all()):
        error = (decoded.double() - tensor.double()).abs()
        assert bool((error <= group_limits(tensor, encoded) + rounding(tensor)).all())
    else:
        assert encoded.packing.scheme in ("bf16", FULL)
    if encoded.packing.scheme == FULL:
        assert torch.equal(decoded, tensor)


@pytest.mark.parametrize(
    ("scheme", "relative"),
    [("int8", 0.00600), ("int8-row", 0.0088), ("int4", 0.1085), ("bf16", 0.0017), ("f16", 0.00025)],
)
def test_error_of_a_scheme(scheme, relative):
    """The figures for normal values whose scale varies between rows."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 768, generator=generator) * (0.5 + torch.rand(512, 1, generator=generator))
    encoded = encode(weight, scheme)
    assert encoded.packing.scheme == scheme
    assert relative * 0.8 < encoded.rms_error < relative


def test_size():
    weight = torch.zeros(512, 768)
    assert weight.nbytes / encode(weight, "int8").packing.nbytes == pytest.approx(3.879, abs=0.001)
    assert weight.nbytes / encode(weight, "int4").packing.nbytes == pytest.approx(7.529, abs=0.001)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_that_are_not_finite(scheme, bad, dtype):
    tensor = sample((8, 100), dtype, 0)
    tensor[3, 7] = bad
    encoded = encode(tensor, scheme)
    assert encoded.packing.scheme == FULL
    assert encoded.reason == "non-finite values"
    assert torch.equal(decode(encoded.packing, encoded.parts), tensor) == (not math.isnan(bad))


@pytest.mark.parametrize("value", [65504.0, -65504.0])
def test_decoding_does_not_overflow(value):
    """The scale is rounded, so 127 times it may be more than the dtype holds; then the tensor stays as it is."""
    tensor = torch.full((4, 64), value, dtype=torch.float16)
    decoded = decode((encoded := encode(tensor, "int8")).packing, encoded.parts)
    assert bool(torch.isfinite(decoded).all())
    assert encoded.packing.scheme != FULL or encoded.reason == "values out of range"
    assert (decoded.double() - tensor.double()).abs().max() <= 65504 / 127


def test_range_of_float64():
    encoded = encode(torch.full((2, 64), 1e300, dtype=torch.float64), "int4")
    assert (encoded.packing.scheme, encoded.reason) == (FULL, "values out of range")
    encoded = encode(torch.full((2, 64), 1e-300, dtype=torch.float64), "int4")
    assert (encoded.packing.scheme, encoded.rms_error, encoded.max_error) == ("int4", 1.0, 1e-300)
    encoded = encode(torch.full((2, 64), 1e-300, dtype=torch.float64), "int4", max_error=0.5)
    assert encoded.packing.scheme == FULL


def test_second_moments_of_adam_survive():
    """float16 scales would make most of them zero."""
    moments = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)).mul(1e-12).square()
    encoded = encode(moments, "int8")
    decoded = decode(encoded.packing, encoded.parts)
    assert encoded.rms_error < 0.01
    assert (decoded == 0).float().mean() < 0.1


def test_small_and_large_groups_do_not_disturb_each_other():
    tensor = torch.cat([torch.full((1, 64), 1e-38), torch.full((1, 64), 1e30), torch.zeros(1, 64)], 1)
    encoded = encode(tensor, "int8")
    decoded = decode(encoded.packing, encoded.parts)
    assert torch.allclose(decoded, tensor, rtol=0.01, atol=0)


def test_zeros():
    for scheme in SCHEMES:
        encoded = encode(torch.zeros(3, 130), scheme)
        assert encoded.packing.scheme == scheme
        assert not decode(encoded.packing, encoded.parts).any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_stay(dtype):
    tensor = torch.ones(4, 100).to(dtype)
    assert encode(tensor, "int8").parts[0] is not None
    assert encode(tensor, "int8").packing.scheme == FULL


def test_what_would_not_get_smaller_stays():
    assert encode(torch.ones(3, dtype=torch.bfloat16), "bf16").packing.scheme == FULL
    assert encode(torch.ones(1, 1, dtype=torch.float16), "int8").packing.scheme == FULL
    assert encode(torch.empty(0, 8), "int8").packing.scheme == FULL


def test_finer_schemes_where_the_error_is_too_large():
    tensor = sample((64, 64), torch.float32, 0)
    assert encode(tensor, "int4", max_error=0.2).packing.scheme == "int4"
    encoded = encode(tensor, "int4", max_error=0.02)
    assert encoded.packing.scheme == "int8"
    assert encoded.reason.startswith("int4 has a relative RMS error of 0.1")
    assert encode(tensor, "int4", max_error=0.002).packing.scheme == "bf16"
    assert encode(sample((64, 256), torch.float32, 0), "int8-row", max_error=0.0064).packing.scheme == "int8"
    encoded = encode(tensor, "int4", max_error=0)
    assert encoded.packing.scheme == FULL
    assert torch.equal(encoded.parts[0], tensor)


def test_unknown_scheme():
    with pytest.raises(PassError, match="'int3' is unknown; expected one of int8"):
        encode(torch.ones(2, 2), "int3")


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(7, 130), (40, 64), (256,), (2, 3, 65), (130,)]),
    st.sampled_from(SCHEMES),
    st.data(),
)
def test_rows(shape, scheme, data):
    tensor = sample(shape, torch.float32, 1)
    encoded = encode(tensor, scheme)
    whole = decode(encoded.packing, encoded.parts).reshape(encoded.packing.matrix_shape)
    rows = encoded.packing.matrix_shape[0]
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first + 1, rows))
    assert torch.equal(decode_rows(encoded.packing, encoded.parts, (first, last)), whole[first:last])
    wanted = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=5))
    out = torch.empty(len(wanted), whole.shape[1])
    assert decode_rows(encoded.packing, encoded.parts, wanted, out) is out
    assert torch.equal(out, whole[wanted])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_into_a_buffer(scheme, dtype):
    """Of the tensor's own dtype, or of another: for a processor that computes faster in it."""
    tensor = sample((60, 700), torch.float32, 2)
    encoded = encode(tensor, scheme)
    buffer = torch.full((60, 700), math.nan, dtype=dtype)
    assert decode(encoded.packing, encoded.parts, buffer) is buffer
    expected = decode(encoded.packing, encoded.parts).to(dtype)
    torch.testing.assert_close(buffer, expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_the_layout_is_what_the_format_says():
    """Other readers rely on it: int8 in the original shape, int4 with the halves of a row in the halves of bytes."""
    tensor = torch.tensor([[1.0, -2, 3, -4, 5, -6, 7]])
    codes, scales = encode(tensor, "int4", 64).parts
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[(5 & 15) << 4 | 1, (-6 & 15) << 4 | (-2 & 15), 7 << 4 | 3, -4 & 15]]
    codes, scales = encode(tensor * 127 / 7, "int8").parts
    assert codes.shape == tensor.shape
    assert codes.tolist() == [[18, -36, 54, -73, 91, -109, 127]]


def test_strided_and_offset_tensors():
    tensor = sample((130, 70), torch.float32, 3)
    for view in (tensor.t(), tensor[3:, 5:], tensor[:, ::2]):
        encoded, copied = encode(view, "int8"), encode(view.contiguous(), "int8")
        assert all(torch.equal(a, b) for a, b in zip(encoded.parts, copied.parts, strict=True))


def test_per_row_codes_are_those_of_the_fused_kernel():
    generator = torch.Generator().manual_seed(0)
    weight, rows = torch.randn(32, 64, generator=generator), torch.randn(4, 64, generator=generator)
    codes, scales = (encoded := encode(weight, "int8-row")).parts
    fused = torch._weight_int8pack_mm(rows.bfloat16(), codes, scales.reshape(-1))
    expected = rows.bfloat16().float() @ decode(encoded.packing, encoded.parts).t()
    torch.testing.assert_close(fused.float(), expected, rtol=0.02, atol=0.1)


def test_packing_of_a_vector():
    assert Packing("int8", torch.float32, (256,)).matrix_shape == (4, 64)
    assert Packing("int8", torch.float32, (250,)).matrix_shape == (1, 250)
    assert Packing("int8-row", torch.float32, (256,)).matrix_shape == (1, 256)
    assert Packing("int8", torch.float32, ()).matrix_shape == (1, 1)
