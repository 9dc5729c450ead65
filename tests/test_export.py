"""export_onnx: onnxruntime computes what the model does, from weights that were not copied without need."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pylomin
from pylomin.lazy.module import LazyModule
from pylomin.store.open import open_store
from pylomin.store.safetensors import SafetensorsStore

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),
]


@pytest.fixture(scope="module", autouse=True)
def _one_table_of_operators() -> Iterator[None]:
    """Torch builds it anew for each export, which takes longer than the rest of it."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


class Net(nn.Module):
    """Ties, a convolution, and a buffer that is too large to be part of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.randn(600, 8), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids)) + self.shift[: ids.shape[1]])


IDS = torch.tensor([[1, 2, 3], [3, 4, 5]])


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.fixture
def weights(net: Net, tmp_path: Path) -> Path:
    return pylomin.save_model(net, tmp_path)


def run_onnx(path: Path, *inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path))
    feeds = {slot.name: value.numpy() for slot, value in zip(session.get_inputs(), inputs, strict=True)}
    return torch.from_numpy(session.run(None, feeds)[0])


def check(model: nn.Module, path: Path, *inputs: Tensor, **options: Any) -> dict[str, set[str]]:
    """Export, compare with the model, and say which initialisers are in which file ("" for the graph)."""
    with torch.no_grad():
        expected = model(*inputs, **options.get("kwargs", {}))
    expected = expected[0] if not isinstance(expected, Tensor) else expected
    assert pylomin.export_onnx(model, inputs, path, **options) == path
    torch.testing.assert_close(run_onnx(path, *inputs), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        again = model(*inputs, **options.get("kwargs", {}))
    assert torch.equal(again if isinstance(again, Tensor) else again[0], expected)
    return files_of(path)


def files_of(path: Path) -> dict[str, set[str]]:
    files: dict[str, set[str]] = {}
    for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        files.setdefault(external.get("location", ""), set()).add(tensor.name)
    return files


def without_buffer(files: dict[str, set[str]]) -> dict[str, set[str]]:
    """But for the buffer, which is in the data file always."""
    files["m.onnx.data"].remove("shift")
    return {file: names for file, names in files.items() if file and names}


ALL = {"table.weight", "body.weight", "body.bias"}


def named(names: set[str]) -> set[str]:
    """The tied weight by one name."""
    return {"table.weight" if name == "head.weight" else name for name in names}


class TestWhereTheWeightsAre:
    def test_beside(self, net: Net, weights: Path, tmp_path: Path) -> None:
        model = pylomin.load(Net, weights).eval()
        model.shift.copy_(net.shift)
        classes = [type(module) for module in model.modules()]
        parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
        before = weights.read_bytes()
        stats = pylomin.stats(model)
        pylomin.export_onnx(model, (IDS,), tmp_path / "m.onnx")
        assert pylomin.stats(model) == stats  # nothing was read
        files = files_of(tmp_path / "m.onnx")
        with torch.no_grad():
            torch.testing.assert_close(run_onnx(tmp_path / "m.onnx", IDS), net(IDS))
            assert torch.equal(model(IDS), net(IDS))
        assert named(without_buffer(files)["model.safetensors"]) == ALL
        assert weights.read_bytes() == before
        assert [type(module) for module in model.modules()] == classes
        assert isinstance(model.body, LazyModule)
        assert [(name, id(parameter)) for name, parameter in model.named_parameters()] == parameters
        assert not model.training
        onnx.checker.check_model(str(tmp_path / "m.onnx"))
        assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data", "model.safetensors"]
        assert b"site-packages" not in (tmp_path / "m.onnx").read_bytes()

    def test_below_and_sharded(self, net: Net, tmp_path: Path) -> None:
        path = pylomin.save_model(net, tmp_path / "deep" / "er", max_shard_size=200)
        files = without_buffer(check(pylomin.lazy_loading(net, weights=path), tmp_path / "m.onnx", IDS))
        assert len(files) == 3
        assert all(file.startswith("deep/er/model-0000") for file in files)
        assert named(set().union(*files.values())) == ALL

    @pytest.mark.parametrize("how", ["elsewhere", "link", "scratch", "output_dir", "ordinary", "in part"])
    def test_otherwise(self, how: str, net: Net, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.mkdir()
        expected: set[str] = ALL
        if how in ("elsewhere", "link"):
            path = pylomin.save_model(net, tmp_path / "source")
            if how == "link":
                (target / "link.safetensors").symlink_to(path)
                path = target / "link.safetensors"
            model = pylomin.lazy_loading(net, weights=path)
        elif how == "output_dir":
            model = pylomin.lazy_loading(net, output_dir=target)
            expected = set()
        elif how == "in part":
            model = pylomin.lazy_loading(net, target_modules=[net.body])
        else:
            model = net if how == "ordinary" else pylomin.lazy_loading(net)
        files = without_buffer(check(model, target / "m.onnx", IDS))
        assert named(files.get("m.onnx.data", set())) == expected
        del model, net
        assert torch.isfinite(run_onnx(target / "m.onnx", IDS)).all()  # scratch files are gone now
        os.rename(target / "m.onnx.data", target / "data.safetensors")
        report = pylomin.verify(target / "data.safetensors")
        assert report.ok
        assert len(report.checked) == len(expected) + 1  # a tied weight once

    @pytest.mark.parametrize("budget", [None, "1MiB"])
    def test_written_to(self, budget: str | None, net: Net, weights: Path, tmp_path: Path) -> None:
        model = pylomin.lazy_loading(net, weights=weights, memory_budget=budget)
        with torch.no_grad():
            model(IDS)
            model.body.bias.fill_(3.0)
        files = without_buffer(check(model, tmp_path / "m.onnx", IDS))
        assert files["m.onnx.data"] == {"body.bias"}

    def test_converted(self, net: Net, weights: Path, tmp_path: Path) -> None:
        model = pylomin.lazy_loading(net.double(), weights=pylomin.save_model(net, tmp_path / "d"))
        files = without_buffer(check(model.float(), tmp_path / "m.onnx", IDS))
        assert named(files["m.onnx.data"]) == ALL

    def test_a_file_that_was_replaced(self, net: Net, weights: Path, tmp_path: Path) -> None:
        model = pylomin.lazy_loading(net, weights=weights)
        pylomin.save_store({name: torch.zeros(1) for name in ALL}, weights, overwrite=True)
        files = without_buffer(check(model, tmp_path / "m.onnx", IDS))
        assert named(files["m.onnx.data"]) == ALL

    def test_offsets_that_are_no_multiple_of_the_element_size(self, net: Net, tmp_path: Path) -> None:
        save_file({n: t for n, t in net.state_dict().items() if n != "head.weight"}, tmp_path / "w.safetensors")
        raw = (tmp_path / "w.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        (tmp_path / "w.safetensors").write_bytes(
            (length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :]
        )
        files = without_buffer(
            check(pylomin.lazy_loading(net, weights=tmp_path / "w.safetensors"), tmp_path / "m.onnx", IDS)
        )
        assert named(files["m.onnx.data"]) == ALL

    def test_laid_out_otherwise_than_stored(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3)).to(memory_format=torch.channels_last).eval()
        pylomin.lazy_loading(model, output_dir=tmp_path)
        files = check(model, tmp_path / "m.onnx", torch.randn(1, 3, 6, 6))
        assert files["m.onnx.data"] == {"0.weight"}
        assert files["model.safetensors"] == {"0.bias"}


class TestOverwriting:
    def test_the_data_that_the_model_streams_from(self, net: Net, weights: Path, tmp_path: Path) -> None:
        check(net, tmp_path / "m.onnx", IDS)
        store = SafetensorsStore(tmp_path / "m.onnx.data")
        again = pylomin.load(Net, store, strict=False).eval()
        again.shift.copy_(net.shift)
        files = without_buffer(check(again, tmp_path / "m.onnx", IDS, overwrite=True))
        assert named(files["m.onnx.data"]) == ALL

    def test_old_data_goes(self, tmp_path: Path) -> None:
        model, x = nn.Linear(4, 3).eval(), torch.ones(1, 4)
        check(model, tmp_path / "m.onnx", x)
        with pytest.raises(pylomin.OutputExistsError, match=r"m\.onnx' already exists"):
            pylomin.export_onnx(model, (x,), tmp_path / "m.onnx")
        pylomin.lazy_loading(model, output_dir=tmp_path)
        assert check(model, tmp_path / "m.onnx", x, overwrite=True) == {"model.safetensors": {"weight", "bias"}}
        assert sorted(os.listdir(tmp_path)) == ["m.onnx", "model.safetensors"]


class TestOptions:
    def test_shapes_names_and_opset(self, net: Net, weights: Path, tmp_path: Path) -> None:
        model = pylomin.lazy_loading(net, weights=weights)
        batch, length = torch.export.Dim("batch"), torch.export.Dim("length", max=600)
        options = {"input_names": ["tokens"], "output_names": ["scores"], "opset": 20}
        path = tmp_path / "m.onnx"
        pylomin.export_onnx(model, (IDS,), path, dynamic_shapes=({0: batch, 1: length},), **options)
        longer = torch.arange(10).view(1, 10)
        with torch.no_grad():
            torch.testing.assert_close(run_onnx(path, longer), model(longer))
        exported = onnx.load(str(path), load_external_data=False)
        assert [value.name for value in exported.graph.input] == ["tokens"]
        assert [value.name for value in exported.graph.output] == ["scores"]
        assert exported.opset_import[0].version == 20


class Coded(SafetensorsStore):
    """A store that says that it computes its values."""

    def packed(self, name: str) -> object:
        return "int8"


class TestRefusals:
    def test_coded_weights(self, net: Net, weights: Path, tmp_path: Path) -> None:
        pylomin.lazy_loading(net, weights=Coded(weights))
        with pytest.raises(
            pylomin.ExportError, match=r"'table\.weight' is stored in a coded form.*pylomin\.save_model"
        ):
            pylomin.export_onnx(net, (IDS,), tmp_path / "m.onnx")
        assert os.listdir(tmp_path) == ["model.safetensors"]

    def test_arguments(self, net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(pylomin.ExportError, match=r"ends in '\.onnx'"):
            pylomin.export_onnx(net, (IDS,), tmp_path / "m")
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
            pylomin.export_onnx(IDS, (IDS,), tmp_path / "m.onnx")  # type: ignore[arg-type]
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'pylomin\[onnx\]'"):
            pylomin.export_onnx(net, (IDS,), tmp_path / "m.onnx")

    def test_missing_directory_and_full_disk(
        self, net: Net, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(pylomin.StoreWriteError, match=r"No such file or directory.*Create the directory"):
            pylomin.export_onnx(net, (IDS,), tmp_path / "absent" / "m.onnx")

        def fail(*args: Any) -> int:
            raise OSError(28, "No space left on device")

        before = os.listdir(tmp_path)
        monkeypatch.setattr(os, "pwrite", fail)
        with pytest.raises(pylomin.StoreWriteError, match="No space left on device"):
            pylomin.export_onnx(net, (IDS,), tmp_path / "m.onnx")
        assert os.listdir(tmp_path) == before


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**sizes, intermediate_size=32))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, intermediate_size=32, use_cache=False))


def t5() -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=8))


@pytest.mark.parametrize("make", [bert, gpt2, llama, t5, vit], ids=lambda make: make.__name__)
def test_transformers(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make().eval()
    path = pylomin.save_model(model, tmp_path)
    pylomin.lazy_loading(model, weights=path)
    files = check(model, tmp_path / "m.onnx", torch.randn(1, 3, 16, 16) if make is vit else IDS)
    names = set(open_store(path))
    unused = {name for name in names if name.startswith("pooler.")}
    assert len(files["model.safetensors"]) >= len(names - unused)
    assert "m.onnx.data" not in files
