"""The view of decoded weights: the contract of a store, byte ranges, damage, hostile files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

import pylomin
from pylomin.errors import CheckpointError, StoreFormatError, StoreReadError
from pylomin.quantize.codec import decode, encode
from pylomin.store.packed_format import QUANTIZED_KEY, Packed, ReferenceTo, format_packed, parse_packed
from pylomin.store.quantized import MAX_CHAIN, QuantizedStore
from pylomin.store.safetensors import SafetensorsStore
from pylomin.store.sharded import ShardedStore

from .contract import StoreContract
from .files import raw_file, read_bytes, read_tensor, same_bits

Tensors = dict[str, torch.Tensor]
EXACT = 127 / 256  # int8 has no error for it: the scale is a power of two


def save_difference(tensors: Tensors, directory: Path, reference: Path, **options: object) -> Path:
    """A checkpoint of these weights that refers to another one."""
    checkpoint = pylomin.Checkpoint({"model": tensors})
    return pylomin.save_checkpoint(checkpoint, directory, reference=reference, **options)


def save_reference(tensors: Tensors, directory: Path) -> Path:
    return pylomin.save_checkpoint(pylomin.Checkpoint({"model": tensors}), directory)


class TestExactWeights(StoreContract):
    """The values of the contract must come back exactly: full precision beside one weight that is quantised."""

    def make_store(self, tensors: Tensors, directory: Path) -> QuantizedStore:
        exact = tensors | {"embedding.weight": tensors["embedding.weight"].bfloat16().float()}
        tensors.update(exact)
        path = pylomin.save_store(
            tensors, directory / "own", quantize="bf16", quantize_filter=["embedding.weight"], overwrite=True
        )
        store = pylomin.open_store(path)
        assert isinstance(store, QuantizedStore)
        return store


class TestLosslessDifferences(StoreContract):
    def make_store(self, tensors: Tensors, directory: Path) -> QuantizedStore:
        old = {
            name: (tensor * 1.01).to(tensor.dtype) if tensor.is_floating_point() and tensor.itemsize > 1 else tensor
            for name, tensor in tensors.items()
        }
        place = Path(tempfile.mkdtemp(dir=directory))
        reference = save_reference(old, place / "reference")
        store = pylomin.open_store(save_difference(tensors, place / "new", reference, lossless=True))
        assert isinstance(store, QuantizedStore)
        return store


@pytest.fixture
def weights() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        "embedding.weight": torch.randn(300, 130, generator=generator),
        "half": torch.randn(90, 64, generator=generator).half(),
        "bias": torch.randn(130, generator=generator),
    }


@pytest.mark.parametrize("scheme", ["int8", "int8-row", "int4", "bf16", "f16"])
def test_weights_are_those_of_the_codec(weights, tmp_path, scheme):
    store = pylomin.open_store(pylomin.save_store(weights, tmp_path, quantize=scheme))
    assert sorted(store) == sorted(weights)
    for name, weight in weights.items():
        encoded = encode(weight, scheme if name != "bias" else "bf16")
        expected = decode(encoded.packing, encoded.parts) if name != "bias" else weight
        assert same_bits(read_tensor(store, name), expected), name


def test_any_reader_finds_the_parts(weights, tmp_path):
    path = pylomin.save_store(weights, tmp_path, quantize="int8")
    encoded = encode(weights["embedding.weight"], "int8")
    with safe_open(path, "pt") as file:
        assert same_bits(file.get_tensor("embedding.weight"), encoded.parts[0])
        assert same_bits(file.get_tensor("embedding.weight_scale"), encoded.parts[1])
        assert same_bits(file.get_tensor("bias"), weights["bias"])
        entry = json.loads(file.metadata()[QUANTIZED_KEY])["weights"]["embedding.weight"]
    assert entry == {
        "scheme": "int8",
        "dtype": "F32",
        "shape": [300, 130],
        "group_size": 64,
        "max_error": pytest.approx(encoded.max_error, rel=1e-5),
        "rms_error": pytest.approx(encoded.rms_error, rel=1e-5),
    }


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory) -> dict[str, tuple[QuantizedStore, bytes]]:
    """The same weight in every way that it can be stored, and its bytes."""
    directory = tmp_path_factory.mktemp("kinds")
    generator = torch.Generator().manual_seed(1)
    old = {"w": torch.randn(700, 1001, generator=generator)}
    new = {"w": old["w"] + 1e-4 * torch.randn(700, 1001, generator=generator)}
    reference = save_reference(old, directory / "reference")
    paths: dict[str, Path] = {
        scheme: pylomin.save_store(new, directory / scheme, quantize=scheme) for scheme in ("int8", "int4", "bf16")
    }
    paths["difference"] = save_difference(new, directory / "difference", reference, quantize="int4")
    paths["lossless"] = save_difference(new, directory / "lossless", reference, lossless=True)
    paths["same"] = save_difference(old, directory / "same", reference, quantize="int8")
    found = {}
    for kind, path in paths.items():
        store = pylomin.open_store(path)
        assert isinstance(store, QuantizedStore)
        found[kind] = (store, read_bytes(store, "w"))
    assert found["lossless"][1] == bytes(new["w"].numpy())
    assert found["same"][1] == bytes(old["w"].numpy())
    return found


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_range_of_bytes(every_kind, data):
    store, whole = every_kind[data.draw(st.sampled_from(sorted(every_kind)))]
    start = data.draw(st.integers(0, len(whole)))
    stop = min(len(whole), start + data.draw(st.sampled_from([1, 5, 4004, 100_003, 1 << 20, 1 << 22])))
    assert read_bytes(store, "w", start, stop) == whole[start:stop]


def test_only_the_rows_that_are_asked_for_are_read(every_kind, monkeypatch):
    store, whole = every_kind["int8"]
    asked: list[int] = []
    read = type(store.file).read

    def watched(self, requests):
        asked.extend(len(request.destination) for request in requests)
        read(self, requests)

    monkeypatch.setattr(type(store.file), "read", watched)
    assert read_bytes(store, "w", 4004 * 7, 4004 * 9) == whole[4004 * 7 : 4004 * 9]
    assert asked == [2 * 1001, 2 * 16 * 2]


def test_packed_bytes_can_be_read_without_decoding(weights, tmp_path):
    store = pylomin.open_store(pylomin.save_store(weights, tmp_path, quantize="int8"))
    assert isinstance(store, QuantizedStore)
    packed = store.packed("embedding.weight")
    assert packed is not None
    codes, scales = (part.extent for part in packed.parts)
    assert codes.stop == scales.start, "one read gets both"
    assert packed.nbytes == packed.packing.nbytes == scales.stop - codes.start
    parts = [read_tensor(store.file, "embedding.weight" + part.suffix) for part in packed.packing.parts]
    assert same_bits(decode(packed.packing, parts), read_tensor(store, "embedding.weight"))
    assert store.packed("bias") is None


def test_shards(weights, tmp_path):
    path = pylomin.save_store(weights, tmp_path, quantize="int8", max_shard_size=45_000)
    assert path.name == "model.safetensors.index.json"
    store = pylomin.open_store(path)
    assert isinstance(store, QuantizedStore)
    assert isinstance(store.file, ShardedStore)
    for name in ("embedding.weight", "half"):
        encoded = encode(weights[name], "int8")
        assert same_bits(read_tensor(store, name), decode(encoded.packing, encoded.parts))
    assert pylomin.verify(path).ok


def test_a_weight_that_is_named_like_scales(tmp_path):
    tensors = {"w": torch.randn(64, 64), "w_scale": torch.randn(64, 64)}
    store = pylomin.open_store(pylomin.save_store(tensors, tmp_path, quantize="int8"))
    assert same_bits(read_tensor(store, "w"), tensors["w"].bfloat16().float()), "a scheme without scales"
    encoded = encode(tensors["w_scale"], "int8")
    assert same_bits(read_tensor(store, "w_scale"), decode(encoded.packing, encoded.parts))


def test_quantising_again(weights, tmp_path):
    """From int8 to int4, and back to full precision."""
    first = pylomin.save_store(weights, tmp_path / "a", quantize="int8")
    decoded = {name: read_tensor(pylomin.open_store(first), name) for name in weights}
    second = pylomin.open_store(pylomin.save_store(first, tmp_path / "b", quantize="int4"))
    encoded = encode(decoded["half"], "int4")
    assert same_bits(read_tensor(second, "half"), decode(encoded.packing, encoded.parts))
    third = pylomin.open_store(pylomin.save_store(first, tmp_path / "c"))
    assert isinstance(third, SafetensorsStore)
    assert all(same_bits(read_tensor(third, name), decoded[name]) for name in weights)


def test_a_model_runs(tmp_path):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 128), torch.nn.Linear(128, 64))
    path = pylomin.save_model(plain, tmp_path, quantize="int8")
    assert path.stat().st_size < 40_000
    lazy = pylomin.load(
        lambda: torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)),
        path,
        memory_budget=60_000,
    )
    with torch.no_grad():
        for layer in plain:
            encoded = encode(layer.weight, "int8")
            layer.weight.copy_(decode(encoded.packing, encoded.parts))
    words = torch.tensor([[1, 99, 1, 0]])
    with torch.inference_mode():
        torch.testing.assert_close(lazy(words), plain(words))  # the budget holds tiles, which round differently


# -- reports ----------------------------------------------------------------------------------------------------------


def test_report(weights, tmp_path):
    weights["half"][3, 4] = torch.inf
    path = pylomin.save_store(weights, tmp_path, quantize="int4", max_error=0.05)
    report = pylomin.quantization_report(path)
    assert {name: entry.scheme for name, entry in report.items()} == {"embedding.weight": "int8", "half": "full"}
    assert report["embedding.weight"].reason.startswith("int4 has a relative RMS error of 0.1")
    assert report["half"].reason == "non-finite values"
    assert 0.005 < report["embedding.weight"].rms_error < 0.006
    assert pylomin.quantization_report(weights) == {}


# -- damage -----------------------------------------------------------------------------------------------------------


def change(path: Path, name: str, where: int, values: bytes) -> None:
    """Overwrite bytes of a stored tensor."""
    store = SafetensorsStore(path)
    position = store.location(name).extent.start + where
    store.close()
    with path.open("r+b") as file:
        file.seek(position)
        file.write(values)


@pytest.mark.parametrize("scale", [b"\xc0\x7f", b"\x80\x7f", b"\x80\xbf"], ids=["nan", "inf", "negative"])
def test_damaged_scales(weights, tmp_path, scale):
    path = pylomin.save_store(weights, tmp_path, quantize="int8")
    change(path, "embedding.weight_scale", 100, scale)
    store = pylomin.open_store(path)
    read_bytes(store, "embedding.weight", 0, 520)  # of other rows
    with pytest.raises(StoreReadError, match=r"'embedding\.weight' in .* is damaged: its scales are from"):
        read_bytes(store, "embedding.weight")


def test_changed_bytes(weights, tmp_path):
    path = pylomin.save_store(weights, tmp_path, quantize="int8")
    change(path, "embedding.weight", 100, b"\x11")
    report = pylomin.verify(path)
    assert [difference.name for difference in report.differences] == ["embedding.weight"]
    store = QuantizedStore(SafetensorsStore(path), is_checked=True)
    read_bytes(store, "half")
    with pytest.raises(StoreReadError, match=r"'embedding\.weight' in .* is damaged: sha256 .* was expected, found"):
        read_bytes(store, "embedding.weight", 0, 1)


def test_damaged_block(tmp_path):
    old, new = {"w": torch.zeros(100, 100)}, {"w": torch.ones(100, 100)}
    directory = save_difference(new, tmp_path / "b", save_reference(old, tmp_path / "a"), lossless=True)
    change(directory / "model.safetensors", "w", 3, b"\xff\xff\xff")
    with pytest.raises(StoreReadError, match=r"weight 'w' in .* is damaged: block 0 cannot be decompressed"):
        read_bytes(pylomin.open_store(directory), "w")


def test_truncated_file(weights, tmp_path):
    path = pylomin.save_store(weights, tmp_path, quantize="int8")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreFormatError, match="ends at byte"):
        pylomin.open_store(path)


def entry(**changes: object) -> dict[str, object]:
    return {"scheme": "int8", "dtype": "F32", "shape": [2, 64], "group_size": 64} | changes


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"version": 2, "weights": {}}, "format version 2; this pylomin reads version 1"),
        ({"version": 1}, "lists no weights"),
        ({"version": 1, "weights": {"w": 3}}, "its entry is 3; expected an object"),
        ({"version": 1, "weights": {"w": entry(scheme="int3")}}, "scheme 'int3' is unknown"),
        ({"version": 1, "weights": {"w": entry(dtype="F33")}}, "dtype 'F33' is not one"),
        ({"version": 1, "weights": {"w": entry(dtype="I64")}}, "dtype I64 cannot be quantised"),
        ({"version": 1, "weights": {"w": entry(shape=[2, -64])}}, "expected a list of non-negative integers"),
        ({"version": 1, "weights": {"w": entry(shape="big")}}, "expected a list of non-negative integers"),
        ({"version": 1, "weights": {"w": entry(group_size=0)}}, "group_size is 0; expected a positive integer"),
        ({"version": 1, "weights": {"w": entry(group_size=True)}}, "group_size is True"),
        ({"version": 1, "weights": {"w": entry(max_error="much")}}, "an error is 'much'; expected a number"),
        ({"version": 1, "weights": {"w": entry(shape=[2, 65])}}, "needs 'w' of torch.int8 [2, 65]; found torch.int8"),
        ({"version": 1, "weights": {"w": entry(group_size=32)}}, "needs 'w_scale' of torch.bfloat16 [2, 2]"),
        ({"version": 1, "weights": {"w": entry(difference=True)}}, "needs a reference, but none is named"),
        ({"version": 1, "weights": {"w": entry(scheme="xor")}}, "it has 0 blocks; expected 1 for 512 bytes"),
        ({"version": 1, "weights": {"w": entry(scheme="same")}}, "needs a reference, but none is named"),
        ({"version": 1, "weights": {}, "reference": {"path": 3}}, "expected a path and a digest"),
        ([], "is a JSON list; expected an object"),
    ],
)
def test_hostile_files(tmp_path, document, problem):
    path = tmp_path / "model.safetensors"
    tensors = {"w": torch.zeros(2, 64, dtype=torch.int8), "w_scale": torch.zeros(2, 1, dtype=torch.bfloat16)}
    save_file(tensors, path, metadata={QUANTIZED_KEY: json.dumps(document)})
    with pytest.raises(StoreFormatError) as error:
        pylomin.open_store(path)
    assert problem in str(error.value)
    assert str(path) in str(error.value)


def test_absent_parts(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_file({"__metadata__": {QUANTIZED_KEY: json.dumps({"version": 1, "weights": {"w": entry()}})}}))
    with pytest.raises(StoreFormatError, match=r"needs 'w' of torch\.int8 .*; found nothing"):
        pylomin.open_store(path)


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.builds(
            lambda scheme, shape, group_size, error, reason, difference: Packed(
                encode(torch.zeros(shape), scheme, group_size).packing, difference, (), error, error, reason
            ),
            st.sampled_from(["int8", "int4", "bf16"]),
            st.tuples(st.integers(1, 9), st.integers(1, 9)),
            st.integers(1, 99),
            st.floats(0, allow_infinity=True),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
            st.booleans(),
        ),
        max_size=3,
    )
)
def test_the_header_round_trips(weights):
    reference = ReferenceTo("../a", "0" * 64)
    parsed, found = parse_packed(format_packed(weights, reference), "file")
    assert found == reference
    for name, packed in weights.items():
        assert (parsed[name].scheme, parsed[name].packing.shape) == (packed.scheme, packed.packing.shape)
        assert (parsed[name].max_error, parsed[name].reason) == (packed.max_error, packed.reason)
        assert parsed[name].is_difference == packed.is_difference


# -- references -------------------------------------------------------------------------------------------------------


@pytest.fixture
def chain(tmp_path) -> tuple[Path, Path]:
    old, new = {"w": torch.zeros(64, 64)}, {"w": torch.full((64, 64), EXACT)}
    reference = save_reference(old, tmp_path / "reference")
    return reference, save_difference(new, tmp_path / "new", reference, quantize="int8")


def test_a_missing_reference(chain):
    reference, new = chain
    reference.rename(reference.with_name("elsewhere"))
    with pytest.raises(CheckpointError, match=r"holds differences to .*reference/model\.safetensors', which cannot be"):
        pylomin.open_store(new)
    reference.with_name("elsewhere").rename(reference)
    assert same_bits(read_tensor(pylomin.open_store(new), "w"), torch.full((64, 64), EXACT))


@pytest.mark.parametrize("with_digests", [True, False])
def test_another_reference(chain, with_digests):
    reference, new = chain
    other = {"w": torch.ones(64, 64)}
    pylomin.save_store(other, reference, digests=with_digests, overwrite=True)
    with pytest.raises(CheckpointError, match=r"of digest [0-9a-f]{64}; what is there has .* It was replaced"):
        pylomin.open_store(new)


def test_both_can_be_moved(chain, tmp_path):
    (tmp_path / "moved").mkdir()
    for directory in chain:
        directory.rename(tmp_path / "moved" / directory.name)
    store = pylomin.open_store(tmp_path / "moved" / "new")
    assert same_bits(read_tensor(store, "w"), torch.full((64, 64), EXACT))


def test_weights_that_differ_in_kind_are_stored_whole(chain, tmp_path):
    reference, _ = chain
    tensors = {"w": torch.full((64, 65), EXACT), "new": torch.ones(3)}
    store = pylomin.open_store(save_difference(tensors, tmp_path / "other", reference, quantize="int8"))
    assert same_bits(read_tensor(store, "new"), tensors["new"])
    assert torch.equal(read_tensor(store, "w"), tensors["w"])


def test_chains_are_limited(tmp_path):
    path = save_reference({"w": torch.zeros(64, 64)}, tmp_path / "0")
    for number in range(1, MAX_CHAIN + 1):
        path = save_difference(
            {"w": torch.full((64, 64), EXACT * number)}, tmp_path / f"{number}", path, quantize="int8"
        )
    assert torch.equal(read_tensor(pylomin.open_store(path), "w"), torch.full((64, 64), EXACT * MAX_CHAIN))
    with pytest.raises(CheckpointError, match=f"{MAX_CHAIN} deep; {MAX_CHAIN} may be"):
        save_difference({"w": torch.zeros(64, 64)}, tmp_path / "more", path, quantize="int8")


def test_a_file_that_refers_to_itself(tmp_path):
    path = tmp_path / "model.safetensors"
    document = {"version": 1, "weights": {}, "reference": {"path": path.name, "digest": "0"}}
    save_file({"w": torch.zeros(1)}, path, metadata={QUANTIZED_KEY: json.dumps(document)})
    with pytest.raises(CheckpointError, match="is a difference to a difference"):
        pylomin.open_store(path)


def test_errors_do_not_add_up(tmp_path):
    """Differences are to the reference as it is decoded."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    path = save_reference({"w": weight}, tmp_path / "0")
    for number in range(1, 5):
        weight = weight + 1e-3 * torch.randn(64, 64, generator=generator)
        path = save_difference({"w": weight}, tmp_path / f"{number}", path, quantize="int4")
        error = (read_tensor(pylomin.open_store(path), "w") - weight).norm() / weight.norm()
        assert error < 2e-4
