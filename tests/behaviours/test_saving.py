"""State dicts and files of an offloaded model are those of the plain one."""

from __future__ import annotations

import copyreg
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import pylomin
from pylomin.lazy.tensor import OffloadedTensor
from tests.families.compare import aligned

from .common import Mlp, Tied, assert_same, bytes_read, compare, outcome, resident_bytes, run, twins


def test_state_dict_has_the_same_names_order_and_layout() -> None:
    for make in (Mlp, Tied, lambda: nn.LSTM(4, 5), lambda: nn.MultiheadAttention(4, 2), lambda: nn.BatchNorm1d(4)):
        plain, lazy = twins(make())
        expected, actual = plain.state_dict(), lazy.state_dict()
        assert type(actual) is type(expected)
        assert list(actual) == list(expected)
        assert actual._metadata == expected._metadata
        for name in expected:
            left, right = expected[name], actual[name]
            assert (left.shape, left.dtype, left.stride(), left.device) == (
                right.shape,
                right.dtype,
                right.stride(),
                right.device,
            )
            assert_same(left, right)


def test_state_dict_options() -> None:
    plain, lazy = twins(Mlp())
    assert list(plain.state_dict(prefix="x.")) == list(lazy.state_dict(prefix="x."))
    kept = lazy.state_dict(keep_vars=True)
    assert kept["first.weight"] is lazy.first.weight
    into: dict[str, Any] = {}
    lazy.state_dict(destination=into)
    assert list(into) == list(plain.state_dict())


def test_named_parameters_match() -> None:
    plain, lazy = twins(Tied())
    for duplicates in (True, False):
        expected = [(n, p.shape, p.dtype) for n, p in plain.named_parameters(remove_duplicate=duplicates)]
        assert [(n, p.shape, p.dtype) for n, p in lazy.named_parameters(remove_duplicate=duplicates)] == expected
    assert [n for n, _ in lazy.named_modules()] == [n for n, _ in plain.named_modules()]
    assert [n for n, _ in lazy.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert all(isinstance(p, nn.Parameter) for p in lazy.parameters())
    assert lazy.get_parameter("body.weight") is lazy.body.weight
    assert lazy.get_submodule("body") is lazy.body


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("make", [Mlp, Tied, lambda: nn.LSTM(8, 4), lambda: nn.Linear(8, 4).half()])
def test_torch_save_of_state_dict(make: Any) -> None:
    plain, lazy = twins(make())
    payload = saved(lazy.state_dict())
    assert b"pylomin" not in payload
    loaded = torch.load(io.BytesIO(payload), weights_only=True)
    assert all(type(value) is Tensor for value in loaded.values())
    assert_same(dict(plain.state_dict()), dict(loaded))
    plain.load_state_dict(loaded)
    assert resident_bytes(lazy) == 0


def test_torch_save_of_state_dict_stores_ties_once() -> None:
    plain, lazy = twins(Tied(rows=2000))
    assert len(saved(lazy.state_dict())) < len(saved(plain.state_dict())) * 1.05
    loaded = torch.load(io.BytesIO(saved(lazy.state_dict())), weights_only=True)
    assert loaded["table.weight"].data_ptr() == loaded["head.weight"].data_ptr()


def test_torch_save_of_parameters_and_views() -> None:
    plain, lazy = twins(nn.Linear(8, 4))
    value = {"p": lazy.weight, "rows": lazy.weight.detach()[1:3], "t": lazy.weight.detach().t()}
    loaded = torch.load(io.BytesIO(saved(value)), weights_only=True)
    assert isinstance(loaded["p"], nn.Parameter)
    assert_same(plain.weight.detach(), loaded["p"].detach())
    assert_same(plain.weight[1:3], loaded["rows"])
    assert_same(plain.weight.t(), loaded["t"])
    assert loaded["t"].stride() == plain.weight.t().stride()


def test_torch_save_after_a_write() -> None:
    _, lazy = twins(Mlp())
    saved(lazy.state_dict())
    with torch.no_grad():
        lazy.first.weight.fill_(2.0)
    loaded = torch.load(io.BytesIO(saved(lazy.state_dict())), weights_only=True)
    assert_same(torch.full((16, 8), 2.0), loaded["first.weight"])


def test_torch_save_of_whole_model_loads_with_weights_only_globals() -> None:
    plain, lazy = twins(nn.Sequential(nn.Linear(8, 4)))
    allowed = [nn.Sequential, nn.Linear, set, object, copyreg._reconstructor]
    with torch.serialization.safe_globals(allowed):
        expected = outcome(torch.load, io.BytesIO(saved(plain)), weights_only=True)
        actual = outcome(torch.load, io.BytesIO(saved(lazy)), weights_only=True)
    assert type(expected) is type(actual)
    if isinstance(expected, nn.Module):
        assert_same(run(expected, torch.ones(1, 8)), run(actual, torch.ones(1, 8)))


def test_safetensors_save_file(tmp_path: Path) -> None:
    plain, lazy = twins(Mlp())
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    save_file(lazy.state_dict(), tmp_path / "lazy.safetensors")
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "lazy.safetensors").read_bytes()


def test_safetensors_save_file_of_ties_is_refused_alike(tmp_path: Path) -> None:
    plain, lazy = twins(Tied())
    expected = outcome(save_file, plain.state_dict(), tmp_path / "plain.safetensors")
    actual = outcome(save_file, lazy.state_dict(), tmp_path / "lazy.safetensors")
    assert actual == expected
    assert expected[0] == "RuntimeError"


@pytest.mark.parametrize("make", [Mlp, Tied, lambda: nn.Conv2d(2, 3, 3), lambda: nn.LSTM(8, 4, 2)])
def test_safetensors_save_model(make: Any, tmp_path: Path) -> None:
    plain, lazy = twins(make())
    save_model(plain, str(tmp_path / "plain.safetensors"))
    save_model(lazy, str(tmp_path / "lazy.safetensors"))
    expected, actual = load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "lazy.safetensors")
    assert_same(expected, actual)
    assert resident_bytes(lazy) == 0


def test_safetensors_save_model_of_channels_last(tmp_path: Path) -> None:
    plain, lazy = twins(nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last))
    for model, name in ((plain, "plain"), (lazy, "lazy")):
        save_model(model, str(tmp_path / f"{name}.safetensors"), force_contiguous=True)
    assert_same(load_file(tmp_path / "plain.safetensors"), load_file(tmp_path / "lazy.safetensors"))


def test_safetensors_load_model(tmp_path: Path) -> None:
    for make in (Mlp, Tied):
        plain, lazy = twins(make())
        other = make()
        path = str(tmp_path / f"{make.__name__}.safetensors")
        save_model(other, path)
        assert load_model(plain, path) == load_model(lazy, path)
        compare(plain, lazy, torch.tensor([[1, 2]]) if make is Tied else torch.ones(2, 8))


def test_saved_file_can_be_streamed_from(tmp_path: Path) -> None:
    plain, lazy = twins(Tied())
    save_model(lazy, str(tmp_path / "m.safetensors"))
    again = pylomin.load(Tied, tmp_path / "m.safetensors")
    compare(plain, again, torch.tensor([[1, 2]]))


def test_state_dict_values_outlive_the_model() -> None:
    plain, lazy = twins(Mlp())
    state = lazy.state_dict()
    del lazy
    for name, value in plain.state_dict().items():
        assert_same(value, state[name])


def test_state_dict_hooks_run() -> None:
    plain, lazy = twins(Mlp())
    for model in (plain, lazy):
        model.register_state_dict_post_hook(_drop_scale)
        model.register_state_dict_pre_hook(lambda module, prefix, keep_vars: module.norm.bias.data.fill_(3.0))
    assert_same(dict(plain.state_dict()), dict(lazy.state_dict()))


def _drop_scale(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    del state["scale"]


def test_get_extra_state() -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"sum": float(self.weight.sum())}

        def set_extra_state(self, state: Any) -> None:
            self.loaded = state

    plain, lazy = twins(Extra(4, 4))
    assert plain.state_dict()["_extra_state"] == lazy.state_dict()["_extra_state"]
    lazy.load_state_dict(plain.state_dict())
    assert lazy.loaded == plain.state_dict()["_extra_state"]


# -- transformers ----------------------------------------------------------------------------------


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    return BertForMaskedLM(config).eval()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 40, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize("shard", [None, "6KB"], ids=["one file", "shards"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_transformers_save_pretrained(make: Any, shard: str | None, tmp_path: Path) -> None:
    plain, lazy = twins(make())
    ids = torch.tensor([[1, 2, 3, 4]])
    compare(plain, lazy, ids)
    options = {} if shard is None else {"max_shard_size": shard}
    plain.save_pretrained(tmp_path / "plain", **options)
    lazy.save_pretrained(tmp_path / "lazy", **options)
    names = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert sorted(path.name for path in (tmp_path / "lazy").iterdir()) == names
    for name in names:
        if name.endswith(".safetensors"):
            assert_same(load_file(tmp_path / "plain" / name), load_file(tmp_path / "lazy" / name))
    loaded = aligned(type(plain).from_pretrained(tmp_path / "lazy").eval())
    loaded.requires_grad_(False)
    assert_same(run(plain, ids).logits, run(loaded, ids).logits)
    assert_same(run(plain, ids).logits, run(lazy, ids).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_transformers_generate_and_resize() -> None:
    plain, lazy = twins(gpt2())
    ids = torch.tensor([[1, 2, 3]])
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert_same(plain.generate(ids, attention_mask=mask, **options), lazy.generate(ids, attention_mask=mask, **options))
    assert lazy.get_input_embeddings().weight is lazy.get_output_embeddings().weight
    for model in (plain, lazy):
        torch.manual_seed(0)
        model.resize_token_embeddings(48, mean_resizing=False)
    assert lazy.lm_head.weight.shape == (48, 16)
    assert_same(run(plain, ids).logits[..., :40], run(lazy, ids).logits[..., :40])


def test_saving_reads_every_weight_once() -> None:
    lazy = pylomin.lazy_loading(Tied(rows=50))
    total = sum(p.nbytes for p in lazy.parameters())
    assert bytes_read(lazy, lambda: saved(lazy.state_dict())) == total


def test_offloaded_tensors_in_the_state_dict_are_not_resident() -> None:
    lazy = pylomin.lazy_loading(Mlp())
    state = lazy.state_dict()
    assert isinstance(state["first.weight"], OffloadedTensor)
    assert not state["first.weight"].requires_grad
    assert pylomin.stats(lazy).bytes_read == 0
