"""save_store and save_model: what is read back is what was there, in the files that were asked for."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn

import pylomin
from pylomin.quantize.codec import decode, encode
from pylomin.residency.plan import PlannedGroup, weight_identity
from pylomin.store import pieces
from pylomin.store.dtypes import STORED_DTYPES
from pylomin.store.open import open_store

TENSORS = {
    "b.weight": torch.randn(5, 7),
    "a.weight": torch.randn(3, 4).half(),
    "a.bias": torch.arange(6),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "c.weight": torch.randn(40, 40).bfloat16(),
    "quantised": torch.arange(-4.0, 4.0).to(torch.float8_e4m3fn),
}


def values(source: Any) -> dict[str, torch.Tensor]:
    store = open_store(source)
    found = {}
    for name in store:
        info = store.info(name)
        runs = [run.reshape(-1).view(torch.uint8).clone() for run in pieces.read_pieces(store, name)]
        raw = torch.cat(runs) if runs else torch.empty(0, dtype=torch.uint8)
        found[name] = raw.view(info.dtype).reshape(info.shape)
    return found


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        left, right = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (actual[name], tensor))
        assert torch.equal(left, right), name


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every weight were large."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 24)


class TestSaveStore:
    @pytest.mark.parametrize("kind", ["mapping", "file", "directory", "index", "store"])
    def test_every_source(self, kind: str, tmp_path: Path, small_pieces: None) -> None:
        source: Any = TENSORS
        if kind in ("file", "directory", "store"):
            save_file(TENSORS, tmp_path / "source.safetensors")
            source = tmp_path if kind == "directory" else tmp_path / "source.safetensors"
        if kind == "store":
            source = open_store(source)
        if kind == "index":
            source = pylomin.save_store(TENSORS, tmp_path / "sharded", max_shard_size=300)
        path = pylomin.save_store(source, tmp_path / "copy.safetensors")
        assert path == tmp_path / "copy.safetensors"
        assert_same(load_file(path), TENSORS)
        if kind == "store":
            assert_same(values(source), TENSORS)  # not closed: it is the caller's

    @settings(max_examples=40, deadline=None)
    @given(
        sizes=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(sorted(map(str, STORED_DTYPES)))), max_size=8),
        shard=st.none() | st.integers(1, 200),
        order=st.randoms(),
        piece=st.integers(1, 40),
    )
    def test_any_sizes(self, sizes: Any, shard: int | None, order: Any, piece: int, tmp_path_factory: Any) -> None:
        dtypes = {str(dtype): dtype for dtype in STORED_DTYPES}
        tensors = {
            f"w{i}": torch.arange(n * 16, dtype=torch.uint8).view(dtypes[dtype]) for i, (n, dtype) in enumerate(sizes)
        }
        names = [*tensors]
        order.shuffle(names)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pieces, "PIECE_BYTES", piece)
            target = tmp_path_factory.mktemp("any")
            path = pylomin.save_store(tensors, target, max_shard_size=shard, order=names[:4])
            again = pylomin.save_store(path, target / "again")
        assert_same(values(path), tensors)
        assert_same(load_file(again), tensors)
        report = pylomin.verify(path)
        assert report.ok
        assert set(report.checked) == set(tensors)

    def test_dtype(self, tmp_path: Path, small_pieces: None) -> None:
        strided = torch.randn(6, 4).t()
        path = pylomin.save_store({**TENSORS, "strided": strided}, tmp_path / "m.safetensors", dtype=torch.bfloat16)
        wide = {"b.weight", "a.weight", "scalar", "empty", "c.weight", "strided"}
        expected = {n: t.to(torch.bfloat16) if n in wide else t for n, t in {**TENSORS, "strided": strided}.items()}
        assert_same(load_file(path), expected)

    @pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
    def test_dtype_that_is_none(self, dtype: torch.dtype, tmp_path: Path) -> None:
        with pytest.raises(pylomin.PassError, match=r"expected a floating-point dtype"):
            pylomin.save_store(TENSORS, tmp_path / "m", dtype=dtype)
        assert os.listdir(tmp_path) == []

    def test_filter(self, tmp_path: Path) -> None:
        path = pylomin.save_store(TENSORS, tmp_path, filter=lambda name: name.startswith("a."))
        assert set(load_file(path)) == {"a.weight", "a.bias"}

    @pytest.mark.parametrize("as_plan", [False, True])
    def test_order(self, as_plan: bool, tmp_path: Path) -> None:
        names = ["c.weight", "a.bias", "c.weight"]
        order: Any = iter(names)
        if as_plan:
            groups = (PlannedGroup(("c.weight",), 8, True), PlannedGroup(("a.bias",), 8, True))
            weights = dict.fromkeys(TENSORS, weight_identity("float32", ()))
            order = pylomin.Plan(weights, groups, (0, 1, 0), 16, 0)
        path = pylomin.save_store(TENSORS, tmp_path, order=order)
        rest = [name for name in TENSORS if name not in names]
        assert list(open_store(path)) == ["c.weight", "a.bias", *rest]

    def test_order_of_names_that_are_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(pylomin.WeightNotFoundError, match=r"'a\.weights'.*'memory'.*Similar: 'a\.weight'"):
            pylomin.save_store(TENSORS, tmp_path / "m", order=["a.weights"])
        wrong: Any
        for wrong in ("a.weight", 7):
            with pytest.raises(pylomin.PassError, match="expected a list of names"):
                pylomin.save_store(TENSORS, tmp_path / "m", order=wrong)
        assert os.listdir(tmp_path) == []

    def test_metadata_is_kept(self, tmp_path: Path) -> None:
        save_file(TENSORS, tmp_path / "source.safetensors", metadata={"format": "pt", "note": "mine"})
        path = pylomin.save_store(tmp_path / "source.safetensors", tmp_path / "a", digests=False, max_shard_size=500)
        again = pylomin.save_store(path, tmp_path / "b.safetensors", digests=False)
        with safe_open(again, "pt") as file:
            assert file.metadata() == {"format": "pt", "note": "mine"}

    def test_metadata_that_transformers_asks_for(self, tmp_path: Path) -> None:
        with safe_open(pylomin.save_store(TENSORS, tmp_path, digests=False), "pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_digests_are_those_of_the_bytes(self, tmp_path: Path) -> None:
        import hashlib

        with safe_open(pylomin.save_store(TENSORS, tmp_path), "pt") as file:
            digests = json.loads(file.metadata()["pylomin.digests"])["weights"]
        tensor = TENSORS["b.weight"]
        assert digests["b.weight"] == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

    def test_progress(self, tmp_path: Path, small_pieces: None) -> None:
        calls: list[tuple[int, int]] = []
        source = pylomin.save_store(TENSORS, tmp_path / "source")
        path = pylomin.save_store(source, tmp_path, progress=lambda *call: calls.append(call))
        done = [d for d, _ in calls]
        assert done == sorted(done)
        assert calls[-1] == (path.stat().st_size, path.stat().st_size)
        assert len(calls) > 20

    def test_progress_bar(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        pylomin.save_store(TENSORS, tmp_path / "a")
        assert capsys.readouterr() == ("", "")  # stderr is no terminal
        pylomin.save_store(TENSORS, tmp_path / "b", progress=True)
        assert capsys.readouterr().out == ""

    def test_a_source_that_fails(self, tmp_path: Path) -> None:
        source = pylomin.save_store(TENSORS, tmp_path / "source")
        store = open_store(source)
        os.truncate(source, source.stat().st_size - 1)
        with pytest.raises(pylomin.StoreReadError):
            pylomin.save_store(store, tmp_path / "new" / "target", max_shard_size=100)
        assert os.listdir(tmp_path) == ["source"]


def test_weights_that_are_encoded_and_others_do_not_share_memory_while_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread reads ahead what is encoded, while another reads what is written as it is; nothing is cached."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 8 << 10)
    monkeypatch.setattr(pieces, "CACHED", 2.0)
    names = [f"{number}.{kind}" for number in range(6) for kind in ("encoded", "plain")]
    tensors = {name: torch.randn(64, 256) for name in names}
    save_file(tensors, tmp_path / "source.safetensors")
    assert pieces._cold(open_store(tmp_path / "source.safetensors"), names[0]) is not None
    saved = pylomin.save_store(
        tmp_path / "source.safetensors", tmp_path / "saved", quantize="int8", quantize_filter="encoded"
    )
    expected = {
        name: decode((found := encode(tensor, "int8")).packing, found.parts) if "encoded" in name else tensor
        for name, tensor in tensors.items()
    }
    assert_same(values(saved), expected)


class TestTarget:
    def test_directory_is_made(self, tmp_path: Path) -> None:
        path = pylomin.save_store(TENSORS, tmp_path / "new" / "llama-3.1-8B")
        assert path == tmp_path / "new" / "llama-3.1-8B" / "model.safetensors"
        assert_same(load_file(path), TENSORS)

    def test_relative(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert pylomin.save_store(TENSORS, "m.safetensors") == tmp_path / "m.safetensors"

    @pytest.mark.parametrize("name", ["model.bin", "model.safetensors.index.json", "x.gguf"])
    def test_other_formats_are_refused(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(pylomin.StoreFormatError, match=r"ends in '\.safetensors', or a directory"):
            pylomin.save_store(TENSORS, tmp_path / name)
        assert os.listdir(tmp_path) == []

    def test_a_file_in_the_place_of_a_directory(self, tmp_path: Path) -> None:
        (tmp_path / "x").write_text("precious")
        with pytest.raises(pylomin.OutputExistsError, match="is no directory"):
            pylomin.save_store(TENSORS, tmp_path / "x", overwrite=True)

    @pytest.mark.parametrize("old_shard", [None, 300, 100])
    @pytest.mark.parametrize("new_shard", [None, 300, 100])
    def test_overwriting(self, old_shard: int | None, new_shard: int | None, tmp_path: Path) -> None:
        for name in ("config.json", "other.safetensors", "model-00001-of-00099.safetensors"):
            (tmp_path / name).write_text("precious")
        strangers = set(os.listdir(tmp_path))
        pylomin.save_store({name: torch.ones(30) for name in "abcdef"}, tmp_path, max_shard_size=old_shard)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(pylomin.OutputExistsError, match="overwrite=True"):
            pylomin.save_store(TENSORS, tmp_path, max_shard_size=new_shard)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
        path = pylomin.save_store(TENSORS, tmp_path, max_shard_size=new_shard, overwrite=True)
        assert_same(values(path), TENSORS)
        own = {path.name} if new_shard is None else {path.name, *json.loads(path.read_text())["weight_map"].values()}
        assert set(os.listdir(tmp_path)) == own | strangers

    def test_an_old_index_cannot_make_it_remove_other_files(self, tmp_path: Path) -> None:
        target = tmp_path / "m"
        target.mkdir()
        names = ["../precious", "precious.safetensors", "/etc/hostname", "../model-00001-of-00002.safetensors", 7]
        for name in ("precious", "m/precious.safetensors", "model-00001-of-00002.safetensors"):
            (tmp_path / name).write_text("precious")
        index = {"weight_map": {str(i): name for i, name in enumerate(names)}}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))
        pylomin.save_store(TENSORS, target, overwrite=True)
        assert (tmp_path / "precious").exists()
        assert (tmp_path / "model-00001-of-00002.safetensors").exists()
        assert sorted(os.listdir(target)) == ["model.safetensors", "precious.safetensors"]

    @pytest.mark.parametrize("shard", [None, 500])
    def test_over_the_source(self, shard: int | None, tmp_path: Path, small_pieces: None) -> None:
        path = pylomin.save_store(TENSORS, tmp_path, max_shard_size=shard)
        reader = open_store(path)
        assert pylomin.save_store(path, tmp_path, max_shard_size=shard, dtype=torch.float64, overwrite=True) == path
        assert_same(values(reader), TENSORS)
        assert values(path)["b.weight"].dtype == torch.float64
        assert pylomin.verify(path).ok

    @pytest.mark.parametrize("shard", [None, 300])
    def test_no_room(self, shard: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
        with pytest.raises(
            pylomin.StoreWriteError, match=r"No space left.*free there: 1000 bytes.*another directory\."
        ):
            pylomin.save_store(TENSORS, tmp_path / "x", max_shard_size=shard)
        assert os.listdir(tmp_path) == []

    def test_no_permission_to_make_a_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(path: str, mode: int = 0o777) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        monkeypatch.setattr(os, "mkdir", refuse)
        with pytest.raises(pylomin.StoreWriteError, match=r"Permission denied.*Make it writable"):
            pylomin.save_store(TENSORS, tmp_path / "x")


class TestShards:
    def test_layout_of_transformers(self, tmp_path: Path) -> None:
        plain = bert()
        plain.save_pretrained(tmp_path / "theirs", max_shard_size="6KB")
        path = pylomin.save_model(plain, tmp_path / "ours", max_shard_size="6KB")
        theirs = json.loads((tmp_path / "theirs" / path.name).read_text())
        ours = json.loads(path.read_text())
        assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
        assert ours["weight_map"].keys() == theirs["weight_map"].keys()
        assert sorted(os.listdir(tmp_path / "ours")) == sorted(
            name for name in os.listdir(tmp_path / "theirs") if "safetensors" in name
        )

    def test_one_shard_has_no_index(self, tmp_path: Path) -> None:
        assert pylomin.save_store(TENSORS, tmp_path, max_shard_size="1MB").name == "model.safetensors"

    def test_names_follow_the_file(self, tmp_path: Path) -> None:
        path = pylomin.save_store(TENSORS, tmp_path / "x.safetensors", max_shard_size=1)
        assert path.name == "x.safetensors.index.json"
        count = len(TENSORS)
        assert (tmp_path / f"x-00001-of-{count:05d}.safetensors").exists()
        assert_same(values(path), TENSORS)

    @pytest.mark.parametrize("size", [0, -1, "5 apples", True])
    def test_sizes_that_are_none(self, size: Any, tmp_path: Path) -> None:
        with pytest.raises((TypeError, ValueError), match="max_shard_size"):
            pylomin.save_store(TENSORS, tmp_path, max_shard_size=size)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(self.table(ids))))


def expected_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items() if n != "head.weight"}


class TestSaveModel:
    @pytest.mark.parametrize("how", ["ordinary", "offloaded", "in part", "budget", "cpu"])
    @pytest.mark.parametrize("shard", [None, 300])
    def test_same_bytes(self, how: str, shard: int | None, tmp_path: Path, small_pieces: None) -> None:
        model = Net().eval()
        expected, ids = expected_of(model), torch.tensor([1, 2])
        with torch.no_grad():
            output = model(ids)
        if how == "in part":
            pylomin.lazy_loading(model, target_modules=[model.body, model.norm])
        elif how != "ordinary":
            options: Any = {"budget": {"memory_budget": "1MiB"}, "cpu": {"storage": "cpu"}}.get(how, {})
            pylomin.lazy_loading(model, **options)
        with torch.no_grad():
            assert torch.equal(model(ids), output)  # with a budget, weights are resident now
        path = pylomin.save_model(model, tmp_path, max_shard_size=shard)
        assert_same(values(path), expected)
        assert pylomin.verify(path).ok
        again = pylomin.load(Net, path).eval()
        with torch.no_grad():
            assert torch.equal(again(ids), output)

    def test_what_was_written_to_weights(self, tmp_path: Path, small_pieces: None) -> None:
        model = pylomin.lazy_loading(Net(), memory_budget="1MiB")
        with torch.no_grad():
            model.body.weight.fill_(3.0)
            model(torch.tensor([1, 2]))
            model.conv.weight.mul_(2)
        model.norm.weight = nn.Parameter(torch.full((8,), 7.0))
        assert_same(load_file(pylomin.save_model(model, tmp_path)), expected_of(model))

    def test_converted(self, tmp_path: Path, small_pieces: None) -> None:
        model = pylomin.lazy_loading(Net()).half()
        saved = load_file(pylomin.save_model(model, tmp_path / "a"))
        assert_same(saved, expected_of(model))
        assert saved["table.weight"].dtype == torch.float16
        double = load_file(pylomin.save_model(model, tmp_path / "b", dtype=torch.float64))
        assert torch.equal(double["conv.weight"], saved["conv.weight"].double())

    def test_dtypes_that_are_stored_as_bytes(self, tmp_path: Path) -> None:
        model = nn.Module()
        model.w = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        pylomin.lazy_loading(model)
        with pytest.raises(pylomin.StoreFormatError, match=r"'w' has dtype torch\.complex128"):
            pylomin.save_model(model, tmp_path / "x")
        assert os.listdir(tmp_path) == []

    def test_ties_are_noted(self, tmp_path: Path) -> None:
        path = pylomin.save_model(pylomin.lazy_loading(Net()), tmp_path, order=["head.weight", "conv.bias"])
        assert list(open_store(path))[:2] == ["table.weight", "conv.bias"]
        with safe_open(path, "pt") as file:
            assert file.metadata()["head.weight"] == "table.weight"
        other = Net()
        load_model(other, path)  # the library knows what the note means
        assert_same(expected_of(other), load_file(path))

    def test_a_tie_of_which_one_name_is_left_out(self, tmp_path: Path) -> None:
        path = pylomin.save_model(Net(), tmp_path, filter=lambda name: name != "table.weight")
        assert "head.weight" in load_file(path)

    def test_parts_of_one_tensor_are_no_ties(self, tmp_path: Path) -> None:
        model, whole = nn.Module(), torch.randn(4, 4)
        for name, part in {"rows": whole[:2], "turned": whole.t(), "whole": whole, "same": whole}.items():
            model.register_buffer(name, part)
        expected = {"rows": whole[:2], "turned": whole.t(), "whole": whole}
        assert_same(load_file(pylomin.save_model(model, tmp_path)), expected)

    @pytest.mark.parametrize("shard", [None, 200])
    def test_over_the_file_that_it_streams_from(self, shard: int | None, tmp_path: Path, small_pieces: None) -> None:
        expected = expected_of(Net())
        path = pylomin.save_store(expected, tmp_path, max_shard_size=shard)
        model = pylomin.load(Net, path).eval()
        with torch.no_grad():
            model.body.bias.fill_(1.0)
            output = model(torch.tensor([3, 4]))
        assert pylomin.save_model(model, tmp_path, max_shard_size=shard, overwrite=True) == path
        assert_same(values(path), {**expected, "body.bias": torch.ones(8)})
        with torch.no_grad():
            assert torch.equal(model(torch.tensor([3, 4])), output)
            assert torch.equal(pylomin.load(Net, path).eval()(torch.tensor([3, 4])), output)

    def test_saving_makes_nothing_resident_and_evicts_nothing(self, tmp_path: Path) -> None:
        model = pylomin.lazy_loading(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), memory_budget="40KiB")
        with torch.no_grad():
            model(torch.ones(1, 64))
        before = pylomin.stats(model)
        pylomin.save_model(model, tmp_path)
        after = pylomin.stats(model)
        assert after.resident_bytes == before.resident_bytes > 0

    def test_what_no_file_can_hold(self, tmp_path: Path) -> None:
        class Extra(nn.Linear):
            def get_extra_state(self) -> Any:
                return {"step": 1}

            def set_extra_state(self, state: Any) -> None:
                raise AssertionError

        model = nn.Sequential(Extra(2, 2))
        with pytest.raises(pylomin.StoreFormatError, match=r"'0\._extra_state'.*is a dict.*filter="):
            pylomin.save_model(model, tmp_path)
        saved = pylomin.save_model(model, tmp_path, filter=lambda name: name != "0._extra_state")
        assert set(load_file(saved)) == {"0.weight", "0.bias"}
        with torch.device("meta"):
            empty = nn.Linear(2, 2)
        with pytest.raises(pylomin.StoreFormatError, match="has no values"):
            pylomin.save_model(empty, tmp_path / "x")
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
            pylomin.save_model({"w": torch.ones(1)}, tmp_path / "x")  # type: ignore[arg-type]

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
    def test_names_are_those_of_save_pretrained(self, tmp_path: Path) -> None:
        for make in (bert, gpt2, t5):
            model = make()
            model.save_pretrained(tmp_path / f"{make.__name__}-theirs")
            expected = load_file(tmp_path / f"{make.__name__}-theirs" / "model.safetensors")
            path = pylomin.save_model(pylomin.lazy_loading(model), tmp_path / make.__name__)
            assert_same(load_file(path), expected)


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertForMaskedLM(config).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("shard", [None, 100])
def test_concurrent_writers(shard: int | None, tmp_path: Path) -> None:
    """The target is, in the end, what one of them wrote, and nothing else is left."""
    sources = [{name: torch.full((30,), float(i)) for name in "abcd"} for i in range(4)]
    errors: list[BaseException] = []

    def write(source: dict[str, torch.Tensor]) -> None:
        try:
            for _ in range(5):
                pylomin.save_store(source, tmp_path, max_shard_size=shard, overwrite=True)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert pylomin.verify(tmp_path).ok
    found = values(tmp_path)
    assert any(all(torch.equal(found[name], source[name]) for name in source) for source in sources)
    assert len(os.listdir(tmp_path)) == (1 if shard is None else 5)
