from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from accelerate.utils import offload_state_dict
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules import module as torch_module

import pylomin
from pylomin.lazy.offload import residencies_of
from pylomin.lazy.tensor import OffloadedTensor
from pylomin.residency.weight import Weight

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """One thread, a fixed seed, and not one more hook for each call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    assert len(torch_module._global_parameter_registration_hooks) <= 1
    assert nn.Linear(2, 2).weight.device.type == "cpu"


class Net(nn.Module):
    """A tie, buffers of both kinds, and a parameter that is no module's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.norm = nn.BatchNorm1d(8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.table.weight
        self.scale = nn.Parameter(torch.full((8,), 2.0))
        self.register_buffer("frequencies", torch.arange(8.0) ** 0.5, persistent=False)
        self.register_buffer("offset", torch.linspace(0, 1, 8))
        self.eval()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.table(tokens) * self.scale + self.frequencies + self.offset)
        return self.head(self.body(x))


def trained() -> Net:
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(1, 2)
        model.norm.num_batches_tracked.fill_(7)
        model.offset.normal_()
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """As safetensors wants it: each tied weight under one name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "head.weight"}


@pytest.fixture
def model() -> Net:
    return trained()


@pytest.fixture
def path(model: Net, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(state_of(model), path)
    return path


TOKENS = torch.tensor([1, 3, 9, 0])


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(TOKENS)
    return result


# -- what comes out ---------------------------------------------------------------------------------------------------


def test_the_same_outputs(model: Net, path: Path) -> None:
    loaded = pylomin.load(Net, path)
    assert type(loaded) is Net
    assert not loaded.training
    assert all(isinstance(parameter, OffloadedTensor) for parameter in loaded.parameters())
    assert torch.equal(output(loaded), output(model))
    assert set(loaded.state_dict()) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].clone(), tensor), name


def test_nothing_is_written(model: Net, path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = path.stat().st_mtime_ns, sorted(os.listdir(tmp_path))
    output(pylomin.load(Net, path))
    assert (path.stat().st_mtime_ns, sorted(os.listdir(tmp_path))) == before


def test_buffers(model: Net, path: Path) -> None:
    """Stored ones are read, the others are computed as ever; all are in memory."""
    loaded = pylomin.load(Net, path)
    for name, buffer in model.named_buffers():
        found = loaded.get_buffer(name)
        assert not isinstance(found, OffloadedTensor)
        assert torch.equal(found, buffer), name
        assert found.dtype == buffer.dtype
    assert torch.equal(loaded.frequencies, torch.arange(8.0) ** 0.5)


def test_ties(path: Path) -> None:
    loaded = pylomin.load(Net, path)
    assert loaded.head.weight is loaded.table.weight
    assert len(list(loaded.parameters())) == len(list(Net().parameters()))


def test_ties_stored_under_the_other_name(model: Net, tmp_path: Path) -> None:
    state = state_of(model)
    state["head.weight"] = state.pop("table.weight")
    save_file(state, tmp_path / "model.safetensors")
    loaded = pylomin.load(Net, tmp_path / "model.safetensors")
    assert loaded.head.weight is loaded.table.weight
    assert torch.equal(output(loaded), output(model))


def test_ties_stored_under_both_names(model: Net) -> None:
    loaded = pylomin.load(Net, dict(model.state_dict()))
    assert torch.equal(output(loaded), output(model))


def test_the_mode_is_model_fns(path: Path) -> None:
    assert pylomin.load(lambda: Net().train(), path).training
    assert not pylomin.load(lambda: Net().eval(), path).training


def test_requires_grad_and_attributes_survive_a_restore(path: Path) -> None:
    def build() -> Net:
        net = Net()
        net.body.weight.requires_grad_(False)
        net.scale.note = "mine"
        return net

    loaded = pylomin.restore(pylomin.load(build, path))
    assert not loaded.body.weight.requires_grad
    assert loaded.table.weight.requires_grad
    assert loaded.scale.note == "mine"


# -- where weights come from ------------------------------------------------------------------------------------------


def test_a_mapping(model: Net) -> None:
    assert torch.equal(output(pylomin.load(Net, state_of(model))), output(model))


def test_a_store(model: Net, path: Path) -> None:
    assert torch.equal(output(pylomin.load(Net, pylomin.open_store(path))), output(model))


def test_a_directory(model: Net, path: Path) -> None:
    assert torch.equal(output(pylomin.load(Net, path.parent)), output(model))


def test_shards(model: Net, tmp_path: Path) -> None:
    state = state_of(model)
    names = list(state)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: state[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    for source in (index, str(index), tmp_path):
        assert torch.equal(output(pylomin.load(Net, source)), output(model))


def from_torch(state: dict[str, torch.Tensor], directory: Path) -> Path:
    torch.save({"state_dict": state, "epoch": 3}, directory / "model.ckpt")
    return directory / "model.ckpt"


def from_torch_legacy(state: dict[str, torch.Tensor], directory: Path) -> Path:
    torch.save(state, directory / "model.pt", _use_new_zipfile_serialization=False)
    return directory / "model.pt"


def from_transposed(state: dict[str, torch.Tensor], directory: Path) -> Path:
    torch.save({n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in state.items()}, directory / "model.bin")
    return directory / "model.bin"


def from_npz(state: dict[str, torch.Tensor], directory: Path) -> Path:
    numpy.savez_compressed(directory / "model.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    return directory / "model.npz"


def from_arrays(state: dict[str, torch.Tensor], directory: Path) -> Path:
    for name, tensor in state.items():
        numpy.save(directory / f"{name}.npy", numpy.array(tensor.numpy(), order="F"))
    return directory


def from_memmaps(state: dict[str, torch.Tensor], directory: Path) -> dict[str, Any]:
    from_arrays(state, directory)
    return {name: numpy.load(directory / f"{name}.npy", mmap_mode="r") for name in state}


def from_gguf(state: dict[str, torch.Tensor], directory: Path) -> Path:
    writer = gguf.GGUFWriter(directory / "model.gguf", "none")
    for name, tensor in state.items():
        writer.add_tensor(name, tensor.numpy().reshape(tuple(tensor.shape)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return directory / "model.gguf"


def from_offload_folder(state: dict[str, torch.Tensor], directory: Path) -> Path:
    offload_state_dict(directory, state)
    return directory


@pytest.mark.parametrize(
    "write",
    [
        from_torch, from_torch_legacy, from_transposed, from_npz, from_arrays, from_memmaps, from_gguf,
        from_offload_folder,
    ],
)  # fmt: skip
def test_every_format(write: Callable[..., Any], model: Net, tmp_path: Path) -> None:
    loaded = pylomin.load(Net, write(state_of(model), tmp_path))
    assert torch.equal(output(loaded), output(model))
    # Rows of the table alone, through the same store.
    assert torch.equal(loaded.table.weight[3:5], model.table.weight[3:5])
    restored = pylomin.restore(loaded)
    assert all(torch.equal(t, restored.state_dict()[name]) for name, t in model.state_dict().items())


def test_quantised_gguf(tmp_path: Path) -> None:
    weights = torch.randn(32, 64).numpy()
    blocks = gguf.quants.quantize(weights, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "none")
    writer.add_tensor("weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0))
    x = torch.randn(3, 64)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = pylomin.load(lambda: nn.Linear(64, 32, bias=False), tmp_path / "model.gguf", dtype=dtype)
        assert torch.equal(loaded(x.to(dtype)), nn.functional.linear(x.to(dtype), expected.to(dtype)))


# -- a function -------------------------------------------------------------------------------------------------------


class Weights:
    """Returns what it is asked for, from ``state``; keeps the questions."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state
        self.asked: list[tuple[str, list[str]]] = []

    def __call__(self, module_name: str, names: list[str]) -> dict[str, torch.Tensor]:
        self.asked.append((module_name, names))
        return {name: self.state[name] for name in names if name in self.state}


def test_a_function_is_asked_for_a_module_when_it_is_used(model: Net) -> None:
    weights = Weights(state_of(model))
    loaded = pylomin.load(Net, weights)
    assert {name for _, names in weights.asked for name in names} == {
        "norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "offset",
    }  # fmt: skip
    weights.asked.clear()
    assert torch.equal(output(loaded), output(model))
    assert ("body", ["body.weight", "body.bias"]) in weights.asked
    assert ("", ["scale"]) in weights.asked
    assert all("head" not in module_name for module_name, _ in weights.asked)  # tied: asked for by the first name
    assert torch.equal(output(loaded), output(model))


def test_a_function_that_returns_everything(model: Net) -> None:
    loaded = pylomin.load(Net, lambda module_name, names: state_of(model))
    assert torch.equal(output(loaded), output(model))


def test_a_function_that_lacks_weights(model: Net) -> None:
    state = state_of(model)
    del state["body.bias"]
    loaded = pylomin.load(Net, Weights(state))
    with pytest.raises(pylomin.WeightNotFoundError, match=r"for module 'body' lacks 'body\.bias'"):
        output(loaded)
    state["body.bias"] = model.body.bias.detach()
    assert torch.equal(output(loaded), output(model))


def test_a_function_that_lacks_buffers(model: Net) -> None:
    state = state_of(model)
    del state["norm.running_var"]
    with pytest.raises(pylomin.WeightNotFoundError, match=r"lacks 'norm\.running_var'"):
        pylomin.load(Net, Weights(state))


def test_a_function_that_returns_other_dtypes(model: Net) -> None:
    halves = {name: t.bfloat16() if t.is_floating_point() else t for name, t in state_of(model).items()}
    with pytest.raises(pylomin.WeightMismatchError, match=r"'.*' in .*: found torch\.bfloat16"):
        output(pylomin.load(Net, Weights(halves)))
    loaded = pylomin.load(Net, Weights(halves), dtype=torch.bfloat16)
    assert loaded.body.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.body.weight, halves["body.weight"])


def test_a_function_has_the_models_names(model: Net) -> None:
    for arguments in ({"prefix": "model."}, {"key_map": {"a": "b"}}):
        with pytest.raises(pylomin.PassError, match="rename there"):
            pylomin.load(Net, Weights(state_of(model)), **arguments)  # type: ignore[arg-type]


# -- other names ------------------------------------------------------------------------------------------------------


def test_prefix(model: Net, tmp_path: Path) -> None:
    state = {f"model.{name}": tensor for name, tensor in state_of(model).items()} | {"lm_head.weight": torch.ones(1)}
    save_file(state, tmp_path / "x.safetensors")
    for source in (state, tmp_path / "x.safetensors"):
        assert torch.equal(output(pylomin.load(Net, source, prefix="model.")), output(model))


def test_key_map(model: Net, tmp_path: Path) -> None:
    state = {name.replace("body", "fc"): tensor for name, tensor in state_of(model).items()}
    save_file(state, tmp_path / "x.safetensors")
    maps: list[Any] = [{"fc.weight": "body.weight", "fc.bias": "body.bias"}, lambda name: name.replace("fc", "body")]
    for source in (state, tmp_path / "x.safetensors"):
        for key_map in maps:
            assert torch.equal(output(pylomin.load(Net, source, key_map=key_map)), output(model))
    with pytest.raises(pylomin.WeightNotFoundError, match=r"'body\.bias' \(similar: 'fc\.bias'\)"):
        pylomin.load(Net, state, key_map={"fc.weight": "body.weight"})


# -- names ------------------------------------------------------------------------------------------------------------


def test_missing_and_unexpected_names_are_all_listed(model: Net) -> None:
    state = state_of(model)
    state["bodi.weight"] = state.pop("body.weight")
    del state["scale"], state["norm.running_var"], state["offset"]
    state["extra"] = torch.ones(1)
    with pytest.raises(pylomin.WeightNotFoundError) as caught:
        pylomin.load(Net, state)
    text = str(caught.value)
    for name in ("body.weight", "scale", "norm.running_var", "offset", "extra", "bodi.weight"):
        assert f"'{name}'" in text, text
    assert "'body.weight' (similar: 'bodi.weight')" in text
    assert "'table.weight'" not in text


def test_an_empty_store() -> None:
    with pytest.raises(pylomin.WeightNotFoundError, match=r"table\.weight"):
        pylomin.load(Net, {})


def test_not_strict_ignores_unexpected_names(model: Net) -> None:
    loaded = pylomin.load(Net, state_of(model) | {"extra": torch.ones(1)}, strict=False)
    assert torch.equal(output(loaded), output(model))


def test_not_strict_initialises_what_is_missing(model: Net) -> None:
    state = state_of(model)
    del state["scale"], state["body.bias"], state["norm.running_mean"]

    loaded = pylomin.load(Net, state, strict=False)
    in_memory = {n for n, p in loaded.named_parameters() if not isinstance(p, OffloadedTensor)}
    assert in_memory == {"scale", "body.bias"}
    expected = Net()
    expected.load_state_dict({name: tensor.detach().clone() for name, tensor in loaded.state_dict().items()})
    assert torch.equal(output(loaded), output(expected))
    assert 0 < float(loaded.body.bias.detach().abs().max()) <= 8**-0.5
    assert torch.equal(loaded.scale, torch.full((8,), 2.0))
    assert loaded.scale.requires_grad


def test_not_strict_with_a_missing_tie(model: Net) -> None:
    state = state_of(model)
    del state["table.weight"]
    loaded = pylomin.load(Net, state, strict=False)
    assert loaded.head.weight is loaded.table.weight
    assert not isinstance(loaded.table.weight, OffloadedTensor)
    assert loaded.table.weight.device.type == "cpu"
    assert output(loaded).isfinite().all()


def test_not_strict_with_parameters_that_are_replaced_while_building() -> None:
    """Which parameters are missing is found by the order of registration, also where some do not survive."""

    def build() -> nn.Module:
        layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))
        for layer in layers[1:4]:
            layer.weight = layers[0].weight
        layers.extend(nn.Linear(4, 4) for _ in range(6))
        layers[5].weight = nn.Parameter(torch.full((4, 4), 5.0))
        del layers[4].bias
        layers[4].register_parameter("bias", nn.Parameter(torch.full((4,), 4.0)))
        return nn.Sequential(*layers)

    state = {name: torch.randn(p.shape) for name, p in build().named_parameters()}
    missing = ["0.weight", "4.bias", "5.weight", "8.weight", "11.bias"]
    for name in missing:
        del state[name]
    loaded = pylomin.load(build, state, strict=False)
    for name, parameter in loaded.named_parameters():
        assert isinstance(parameter, OffloadedTensor) == (name not in missing), name
        if name in state:
            assert torch.equal(parameter.detach().clone(), state[name]), name
    assert torch.equal(loaded[4].bias, torch.full((4,), 4.0))
    assert torch.equal(loaded[5].weight, torch.full((4, 4), 5.0))
    assert 0 < float(loaded[8].weight.detach().abs().max()) <= 0.5
    assert 0 < float(loaded[11].bias.detach().abs().max()) <= 0.5
    assert loaded[1].weight is loaded[0].weight


def test_shared_buffers_stored_once() -> None:
    """safetensors stores shared memory once; both owners get the stored values."""

    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            table = torch.zeros(3)
            self.first, self.second = nn.Module(), nn.Module()
            self.first.register_buffer("table", table)
            self.second.register_buffer("table", table)

    loaded = pylomin.load(Shares, {"weight": torch.ones(2), "first.table": torch.full((3,), 7.0)})
    assert torch.equal(loaded.first.table, torch.full((3,), 7.0))
    assert torch.equal(loaded.second.table, torch.full((3,), 7.0))
    assert loaded.first.table is loaded.second.table, "still shared, as in an ordinary model"


def test_a_shared_module_with_buffers(model: Net) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.BatchNorm1d(4).eval()
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    reference = Twice()
    with torch.no_grad():
        for tensor in (*reference.parameters(), *reference.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(1, 2)
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items() if name.startswith("a.")}
    loaded = pylomin.load(Twice, state)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(loaded(x), reference(x))


# -- shapes and dtypes ------------------------------------------------------------------------------------------------


def test_mismatches_are_all_listed(model: Net) -> None:
    state = state_of(model)
    state["scale"] = torch.ones(9)
    state["body.weight"] = state["body.weight"].half()
    with pytest.raises(pylomin.WeightMismatchError) as caught:
        pylomin.load(Net, state)
    assert "'scale'" in str(caught.value)
    assert "[9]" in str(caught.value)
    assert "'body.weight'" in str(caught.value)
    assert "float16" in str(caught.value)
    assert "dtype=" in str(caught.value)


def test_a_buffer_of_another_shape(model: Net) -> None:
    with pytest.raises(pylomin.WeightMismatchError, match=r"'offset'.*\[3\].*\[8\]"):
        pylomin.load(Net, state_of(model) | {"offset": torch.ones(3)})


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype(model: Net, tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    state = {n: t.to(stored) if t.is_floating_point() else t for n, t in state_of(model).items()}
    save_file(state, tmp_path / "model.safetensors")
    reference = Net().to(wanted)
    reference.load_state_dict({n: t.to(wanted) if t.is_floating_point() else t for n, t in state.items()}, strict=False)
    reference.frequencies = Net().frequencies
    reference.frequencies = reference.frequencies.to(wanted)
    loaded = pylomin.load(Net, tmp_path / "model.safetensors", dtype=wanted)
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    assert loaded.offset.dtype == wanted
    assert loaded.norm.num_batches_tracked.dtype == torch.int64
    loaded.frequencies = loaded.frequencies.to(wanted)
    assert torch.equal(output(loaded), output(reference))


def test_dtype_of_what_is_initialised(model: Net) -> None:
    state = state_of(model)
    del state["scale"]
    loaded = pylomin.load(Net, state, dtype=torch.bfloat16, strict=False)
    assert loaded.scale.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_a_dtype_that_is_none(model: Net, dtype: torch.dtype) -> None:
    with pytest.raises(pylomin.PassError, match="expected a floating-point dtype"):
        pylomin.load(Net, state_of(model), dtype=dtype)


# -- model_fn ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("returned", [None, 5, "model", Net])
def test_model_fn_that_returns_something_else(model: Net, returned: Any) -> None:
    with pytest.raises(pylomin.PassError, match=r"model_fn returned a \w+; expected a torch\.nn\.Module"):
        pylomin.load(lambda: returned, state_of(model))


def test_model_fn_that_raises(model: Net) -> None:
    def build() -> nn.Module:
        nn.Linear(2, 2)
        raise ArithmeticError("no model today")

    with pytest.raises(ArithmeticError, match="no model today"):
        pylomin.load(build, state_of(model))
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_model_fn_is_no_function(model: Net) -> None:
    with pytest.raises((TypeError, pylomin.PassError), match="model_fn"):
        pylomin.load(model, state_of(model))  # type: ignore[arg-type]


@pytest.mark.parametrize("read", [lambda p: p.item(), lambda p: p.tolist(), lambda p: p.numpy()])
def test_model_fn_that_reads_a_value(read: Callable[[torch.Tensor], object]) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(2.0))
            self.value = read(self.weight.detach())

    with pytest.raises(pylomin.PassError, match="value"):
        pylomin.load(Reads, {"weight": torch.tensor(1.0)})


def test_model_fn_that_makes_a_buffer_of_a_weight() -> None:
    class Derives(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("doubled", self.weight.detach() * 2)

    with pytest.raises(pylomin.PylominError, match="'doubled'"):
        pylomin.load(Derives, {"weight": torch.ones(2)})
    loaded = pylomin.load(Derives, {"weight": torch.ones(2), "doubled": torch.full((2,), 9.0)})
    assert loaded.doubled.tolist() == [9.0, 9.0]


def test_a_buffer_without_values_and_an_empty_store() -> None:
    class OnlyBuffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("doubled", self.weight.detach() * 2)

    with pytest.raises(pylomin.PylominError):
        pylomin.load(OnlyBuffer, {})


def test_a_model_built_on_the_meta_device(model: Net, path: Path) -> None:
    """By model_fn itself: parameters are no problem, a buffer that is not stored is."""

    def build() -> nn.Module:
        with torch.device("meta"):
            return nn.Linear(8, 8)

    loaded = pylomin.load(build, {"weight": model.body.weight.detach(), "bias": model.body.bias.detach()})
    x = torch.ones(1, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.body(x))

    def with_buffers() -> nn.Module:
        with torch.device("meta"):
            return Net()

    with pytest.raises(pylomin.PassError, match="'frequencies'"):
        pylomin.load(with_buffers, path)


def test_a_model_that_was_loaded_before(path: Path, model: Net) -> None:
    """model_fn may load parts of the model itself."""
    body = {"weight": model.body.weight.detach(), "bias": model.body.bias.detach()}

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), pylomin.load(lambda: nn.Linear(8, 8), body))

    try:
        loaded = pylomin.load(build, {f"{i}.{n}": t for i in range(2) for n, t in body.items()})
    except pylomin.PylominError:
        return  # told, which is enough
    x = torch.ones(1, 8)
    with torch.no_grad():
        assert torch.equal(loaded(x), model.body(model.body(x)))


def test_other_threads_build_ordinary_models(model: Net) -> None:
    building, go_on = threading.Event(), threading.Event()

    def build() -> Net:
        net = Net()
        building.set()
        assert go_on.wait(30)
        return net

    loaded: list[nn.Module] = []
    thread = threading.Thread(target=lambda: loaded.append(pylomin.load(build, state_of(model))), daemon=True)
    thread.start()
    assert building.wait(30)
    ordinary = nn.Linear(4, 4)
    assert ordinary.weight.device.type == "cpu"
    assert ordinary(torch.ones(1, 4)).isfinite().all()
    go_on.set()
    thread.join(30)
    assert torch.equal(output(loaded[0]), output(model))


def test_several_threads_load_at_the_same_time(model: Net, path: Path) -> None:
    expected = output(model)
    results: list[bool] = []

    def work() -> None:
        for _ in range(5):
            results.append(torch.equal(output(pylomin.load(Net, path)), expected))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == [True] * 20


def test_nothing_keeps_the_model(model: Net) -> None:
    loaded = pylomin.load(Net, state_of(model))
    residency = weakref.ref(residencies_of(loaded)[0])
    parameter = weakref.ref(loaded.scale)
    del loaded
    assert residency() is None
    assert parameter() is None


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_paused_but_for_model_fn(
    path: Path, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is as it was before, whatever happens."""
    seen: dict[str, bool] = {}

    def build() -> Net:
        seen["model_fn"] = gc.isenabled()
        return Net()

    class Watched(Weight):
        def __init__(self, *args: Any) -> None:
            seen["offload"] = gc.isenabled()
            super().__init__(*args)

    monkeypatch.setattr("pylomin.lazy.offload.Weight", Watched)
    was_enabled = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        pylomin.load(build, path)
        assert seen == {"model_fn": enabled, "offload": False}
        assert gc.isenabled() == enabled
        with pytest.raises(pylomin.BudgetError):
            pylomin.load(build, path, memory_budget=1)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was_enabled else gc.disable)()


def test_device(model: Net, path: Path) -> None:
    assert torch.equal(output(pylomin.load(Net, path, device="cpu")), output(model))
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        pylomin.load(Net, path, device="no such device")


def test_memory_budget(model: Net, path: Path) -> None:
    loaded = pylomin.load(Net, path, memory_budget="64KiB")
    assert residencies_of(loaded)[0].memory_budget == 64 << 10
    assert torch.equal(output(loaded), output(model))


def test_a_budget_that_is_too_small(path: Path) -> None:
    with pytest.raises(pylomin.BudgetError, match=r"weight '\S+' needs .* memory_budget is 100 .*at least") as caught:
        pylomin.load(Net, path, memory_budget=100)
    least = int(str(caught.value).split("at least ")[1].split(",")[0])
    pylomin.load(Net, path, memory_budget=least)
    with pytest.raises(pylomin.BudgetError):
        pylomin.load(Net, path, memory_budget=least - 1)


@pytest.mark.parametrize(
    ("budget", "kind"), [(0, ValueError), ("much", ValueError), (1.5, TypeError), (-1, ValueError)]
)
def test_a_budget_that_is_none(path: Path, budget: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="memory_budget"):
        pylomin.load(Net, path, memory_budget=budget)


# -- transformers -----------------------------------------------------------------------------------------------------


def saved_by_transformers(model: Any, directory: Path) -> Path:
    model.eval().save_pretrained(directory)
    return directory / "model.safetensors"


def test_llama(tmp_path: Path) -> None:
    """The frequencies of its rotary embedding are computed, not stored."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(config)
    path = saved_by_transformers(reference, tmp_path)
    loaded = pylomin.load(lambda: transformers.LlamaForCausalLM(config).eval(), path)
    assert torch.equal(loaded.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, reference(tokens).logits)
        expected = reference.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(loaded.generate(tokens, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)


def test_gpt2(tmp_path: Path) -> None:
    """Its head is the embedding, which is stored once."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    reference = transformers.GPT2LMHeadModel(config)
    path = saved_by_transformers(reference, tmp_path)
    loaded = pylomin.load(lambda: transformers.GPT2LMHeadModel(config).eval(), path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, reference(tokens).logits)


def test_t5(tmp_path: Path) -> None:
    """Three or four names for one weight."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    reference = transformers.T5ForConditionalGeneration(config)
    path = saved_by_transformers(reference, tmp_path)
    loaded = pylomin.load(lambda: transformers.T5ForConditionalGeneration(config).eval(), path)
    assert loaded.shared.weight is loaded.encoder.embed_tokens.weight
    assert loaded.shared.weight is loaded.decoder.embed_tokens.weight
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        expected = reference(input_ids=tokens, decoder_input_ids=tokens).logits
        assert torch.equal(loaded(input_ids=tokens, decoder_input_ids=tokens).logits, expected)


# -- memory -----------------------------------------------------------------------------------------------------------


def test_it_never_was_in_memory(tmp_path: Path) -> None:
    """A model of 200 MB, in a process whose memory grows by a fraction of that."""
    script = """
    import sys, torch, pylomin
    from pathlib import Path
    from torch import nn
    from pylomin.store.writer import WeightToWrite, write_safetensors

    LAYERS, WIDTH = 50, 1000  # of 4 MB each
    torch.set_num_threads(1)
    path = Path(sys.argv[1]) / "model.safetensors"
    weights = [
        WeightToWrite(f"{i}.weight", torch.float32, (WIDTH, WIDTH), lambda: torch.eye(WIDTH)) for i in range(LAYERS)
    ]
    write_safetensors(path, weights)

    def build():
        return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)])

    x = torch.arange(float(WIDTH))[None]
    with torch.no_grad():
        pylomin.load(lambda: nn.Linear(2, 2), {"weight": torch.ones(2, 2), "bias": torch.ones(2)})(torch.ones(1, 2))
        from pylomin.measure import process_bytes
        before = process_bytes()
        with pylomin.peak_memory(tensors=False) as peak:
            model = pylomin.load(build, path)
            assert torch.equal(model(x), x)
            pylomin.prefetch(model)
            assert torch.equal(model(x), x)
            assert torch.equal(model(x), x)
    print(peak.process_bytes - before, pylomin.stats(model).peak_bytes)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    growth_bytes, ledger_bytes = map(int, done.stdout.split())
    assert ledger_bytes <= 3 * 4_005_888
    assert growth_bytes < 60e6
