"""Weights behind nginx."""

from __future__ import annotations

import os
import re
import time
import weakref
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pylomin
from pylomin.errors import (
    CheckpointError,
    PassError,
    StoreFormatError,
    StoreReadError,
)
from pylomin.io.files import Extent
from pylomin.remote.entry import BLOCK_BYTES
from pylomin.store.base import ReadRequest
from tests.store.contract import StoreContract
from tests.store.files import SAMPLE, read_tensor, same_bits, write_shards
from tests.store.gguf_files import gguf_file

from .servers import Nginx


def several_blocks(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.weight": torch.randn(300, 500, generator=generator) for i in range(6)}  # 600 kB each


def assert_holds(store, tensors) -> None:
    assert set(store) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(read_tensor(store, name), tensor), name


class TestContract(StoreContract):
    @pytest.fixture(autouse=True)
    def _server(self, nginx: Nginx):
        self.nginx = nginx
        self.stores = []
        yield
        for made in self.stores:
            if (store := made()) is not None:
                store.close()

    def make_store(self, tensors, directory):
        name = f"{len(self.stores)}.safetensors"
        save_file(tensors, self.nginx.root / name)
        return self.opened(name)

    def opened(self, name):
        store = pylomin.open_store(f"{self.nginx.url}/{name}")
        self.stores.append(weakref.ref(store))
        return store


class TestContractOfShards(TestContract):
    def make_store(self, tensors, directory):
        names = list(tensors)
        shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
        index = write_shards(
            self.nginx.root, {file: {n: tensors[n] for n in chosen} for file, chosen in shards.items()}
        )
        return self.opened(index.name)


def test_what_was_fetched_once_is_local(nginx):
    tensors = several_blocks()
    save_file(tensors, nginx.root / "m.safetensors")
    store = pylomin.open_store(f"{nginx.url}/m.safetensors")
    assert_holds(store, tensors)
    sent = [int(line.split()[9]) for line in nginx.requests()]
    size = (nginx.root / "m.safetensors").stat().st_size
    assert sum(sent) == size, "every byte came once"
    assert_holds(store, tensors)
    assert len(nginx.requests()) == len(sent), "the second pass asks for nothing"
    store.close()
    store = pylomin.open_store(f"{nginx.url}/m.safetensors")
    assert_holds(store, tensors)
    assert len(nginx.requests()) == len(sent) + 1, "opened again, one request finds out whether it still is the same"
    store.close()


def test_opening_fetches_the_header_alone(nginx):
    save_file(several_blocks(), nginx.root / "m.safetensors")
    store = pylomin.open_store(f"{nginx.url}/m.safetensors")
    assert store.info("layers.5.weight").shape == (300, 500)
    (line,) = nginx.requests()
    assert line.split()[8:10] == ["206", str(BLOCK_BYTES)]
    store.close()


def test_a_long_header_does_not_bring_weights_along(nginx):
    tensors = {f"{'name' * 40}.{i}": torch.full((300,), float(i)) for i in range(4000)}  # a header of 900 kB
    save_file(tensors, nginx.root / "m.safetensors")
    store = pylomin.open_store(f"{nginx.url}/m.safetensors")
    assert len(store) == 4000
    sent = sum(int(line.split()[9]) for line in nginx.requests())
    assert sent <= 4 * BLOCK_BYTES
    store.close()


def test_groups_are_fetched_together(nginx):
    tensors = {f"{i}": torch.full((10_000,), float(i)) for i in range(100)}
    save_file(tensors, nginx.root / "m.safetensors")
    store = pylomin.open_store(f"{nginx.url}/m.safetensors")
    buffers = {name: torch.empty(10_000) for name in tensors}
    store.read([ReadRequest(name, 0, memoryview(buffer.numpy()).cast("B")) for name, buffer in buffers.items()])
    assert all(torch.equal(buffers[name], tensor) for name, tensor in tensors.items())
    assert len(nginx.requests()) <= 3  # of 4 MB: the beginning, then at most 4 MiB each
    store.close()


def test_some_rows_fetch_some_blocks(nginx):
    table = torch.arange(4_000_000, dtype=torch.float32).view(10_000, 400)  # 16 MB
    save_file({"weight": table}, nginx.root / "m.safetensors")
    model = pylomin.load(lambda: nn.Embedding(10_000, 400), f"{nginx.url}/m.safetensors")
    rows = torch.tensor([[9999, 17, 5000, 17]])
    with torch.inference_mode():
        assert torch.equal(model(rows), table[rows])
    sent = sum(int(line.split()[9]) for line in nginx.requests())
    assert sent <= 8 * BLOCK_BYTES
    del model


FORMATS = ["model.safetensors", "model.pt", "old.bin", "arrays.npz", "small.npz", "array.npy", "model.gguf"]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format(nginx, name):
    tensors = {"a": torch.randn(600, 500), "b": torch.arange(300.0).view(3, 100)}
    path = nginx.root / name
    arrays = {key: tensor.numpy() for key, tensor in tensors.items()}
    if name.endswith(".safetensors"):
        save_file(tensors, path)
    elif name.endswith((".pt", ".bin")):
        torch.save(tensors, path, _use_new_zipfile_serialization=name == "model.pt")
    elif name.endswith(".npz"):
        (numpy.savez if name == "arrays.npz" else numpy.savez_compressed)(path, **arrays)
    elif name.endswith(".npy"):
        tensors = {"array": tensors["a"]}
        numpy.save(path, arrays["a"])
    else:
        path.write_bytes(gguf_file(tensors))
    store = pylomin.open_store(f"{nginx.url}/{name}?x=1")
    assert_holds(store, tensors)
    assert store.describe(next(iter(store))) == f"{nginx.url}/{name}"
    store.close()


def test_quantised_weights_run(nginx):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64))
    path = pylomin.save_model(plain, nginx.root / "q.safetensors", quantize="int8")
    local = pylomin.load(lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)), path)
    remote = pylomin.load(
        lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)), f"{nginx.url}/q.safetensors"
    )
    with torch.inference_mode():
        x = torch.randn(4, 256)
        assert torch.equal(remote(x), local(x))
    del remote, local


def test_differences_are_refused(nginx, tmp_path):
    model = nn.Linear(64, 64)
    first = pylomin.save_checkpoint(pylomin.build_checkpoint(model), tmp_path / "first")
    pylomin.save_checkpoint(
        pylomin.build_checkpoint(model), tmp_path / "second", reference=tmp_path / "first", quantize="int8"
    )
    for path in sorted((tmp_path / "second").rglob("*.safetensors")):
        (nginx.root / path.name).write_bytes(path.read_bytes())
    assert first is not None
    with pytest.raises(CheckpointError, match="not read over a network"):
        pylomin.open_store(f"{nginx.url}/model.safetensors")


def test_many_shards(nginx):
    tensors = several_blocks()
    index = write_shards(nginx.root, {f"{i}.safetensors": {name: tensors[name]} for i, name in enumerate(tensors)})
    store = pylomin.open_store(f"{nginx.url}/{index.name}")
    assert len(store.shards) == 6
    assert_holds(store, tensors)
    store.close()


def test_a_shard_is_missing(nginx):
    tensors = several_blocks()
    index = write_shards(nginx.root, {f"{i}.safetensors": {name: tensors[name]} for i, name in enumerate(tensors)})
    (nginx.root / "3.safetensors").unlink()
    with pytest.raises(StoreReadError, match=r"3\.safetensors' does not exist: status 404"):
        pylomin.open_store(f"{nginx.url}/{index.name}")


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "http://other/x.safetensors", "a?b", "..", "a\\b"]
)
def test_an_index_that_points_elsewhere(nginx, name):
    index = write_shards(nginx.root, {"a.safetensors": {"x": torch.ones(1)}}, weight_map={"x": name})
    with pytest.raises(StoreFormatError, match="expected the name of a"):
        pylomin.open_store(f"{nginx.url}/{index.name}")
    assert len(nginx.requests()) == 1, "nobody else was asked"


@pytest.mark.parametrize("reading_mode", ["mapped", "buffered", "direct"])
@pytest.mark.parametrize("room", [None, 1_000_000], ids=["room", "little room"])
@pytest.mark.filterwarnings("ignore:remote weights cannot all be kept")
def test_a_model_runs_as_the_original_does(nginx, reading_mode, room):
    torch.manual_seed(0)
    plain = nn.Sequential(*(nn.Linear(400, 400) for _ in range(6)))
    save_file(plain.state_dict(), nginx.root / "m.safetensors")
    store = pylomin.open_store(f"{nginx.url}/m.safetensors", cache_size=room)
    model = pylomin.load(
        lambda: nn.Sequential(*(nn.Linear(400, 400) for _ in range(6))),
        store,
        memory_budget=1_500_000,
        reading_mode=reading_mode,
    )
    model = pylomin.prefetch(model)
    x = torch.randn(3, 400)
    with torch.inference_mode():
        for _ in range(3):
            assert torch.equal(model(x), plain(x))
    store.close()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "qwen3", "mixtral"])
def test_transformers(nginx, family):
    model = tiny(family)
    save_file({name: value.contiguous() for name, value in unique(model).items()}, nginx.root / f"{family}.safetensors")
    lazy = pylomin.load(lambda: tiny(family), f"{nginx.url}/{family}.safetensors", memory_budget="8MiB").eval()
    words = torch.arange(12)[None]
    more = {"decoder_input_ids": words} if family == "t5" else {}
    with torch.inference_mode():
        expected, found = model(words, **more), lazy(words, **more)
    assert torch.equal(found[0], expected[0])
    del lazy


def tiny(family: str) -> nn.Module:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 99}
    if family == "gpt2":
        sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64}
    elif family == "t5":
        sizes = {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4, "d_kv": 16, "vocab_size": 99}
    elif family in ("llama", "qwen3", "mixtral"):
        sizes |= {"num_key_value_heads": 2}
    if family == "qwen3":
        sizes |= {"head_dim": 16}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **sizes)
    return transformers.AutoModel.from_config(config).eval()


def unique(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("denied/m.safetensors", "may not be read: status 403"),
        ("none.safetensors", "does not exist: status 404. Check the URL"),
        ("whole/m.safetensors", "does not send parts of files: it answered a range request with status 200"),
        ("untagged/m.safetensors", "neither ETag nor Last-Modified"),
        ("", "which HTTP cannot list"),
    ],
)
def test_refusals(nginx, path, message):
    save_file(SAMPLE, nginx.root / "m.safetensors")
    with pytest.raises(StoreReadError, match=message) as raised:
        pylomin.open_store(f"{nginx.url.replace('//', '//user:hunter2@')}/{path}?token=s3cr3t#s3cr3t")
    assert_no_secrets(raised.value)


def assert_no_secrets(error: BaseException) -> None:
    """Neither in an error nor in those that it came from."""
    seen: list[BaseException | None] = [error]
    while seen:
        one = seen.pop()
        if one is not None:
            assert not re.search("hunter2|s3cr3t", f"{one} {one!r} {one.args}"), type(one)
            seen += [one.__cause__, one.__context__]


def test_dates_do_where_there_are_no_tags(nginx):
    save_file(SAMPLE, nginx.root / "m.safetensors")
    store = pylomin.open_store(f"{nginx.url}/dated/m.safetensors")
    assert_holds(store, SAMPLE)
    store.close()


def test_redirects_are_followed(nginx):
    save_file(SAMPLE, nginx.root / "m.safetensors")
    store = pylomin.open_store(f"{nginx.url}/moved/m.safetensors")
    assert_holds(store, SAMPLE)
    store.close()


def test_an_empty_file(nginx):
    (nginx.root / "m.safetensors").write_bytes(b"")
    with pytest.raises(StoreFormatError, match=r"m\.safetensors' holds 0 bytes"):
        pylomin.open_store(f"{nginx.url}/m.safetensors")


def test_a_page_in_the_place_of_a_file(nginx):
    (nginx.root / "m.bin").write_bytes(b"<html>Not found</html>")
    with pytest.raises(StoreFormatError, match="is not of a supported format"):
        pylomin.open_store(f"{nginx.url}/m.bin")


def test_nobody_answers():
    with pytest.raises(StoreReadError, match=r"failed 6 times, the last time with: ClientConnectorError"):
        pylomin.open_store("http://user:hunter2@127.0.0.1:1/m.safetensors")


@pytest.mark.parametrize("url", ["ftp://host/x", "file:///x", "gs://bucket/x"])
def test_other_schemes(url):
    with pytest.raises(StoreFormatError, match="expected one of s3, https, http, hf"):
        pylomin.open_store(url)


def test_arguments_for_urls(tmp_path):
    save_file(SAMPLE, tmp_path / "m.safetensors")
    for argument in ({"storage_options": {}}, {"cache_dir": tmp_path}, {"cache_size": 1}):
        with pytest.raises(PassError, match="are for URLs"):
            pylomin.open_store(tmp_path / "m.safetensors", **argument)
    with pytest.raises(PassError, match="storage_options is a list"):
        pylomin.open_store("http://127.0.0.1/x", storage_options=[])
    with pytest.raises(ValueError, match="cache_size is 'much'"):
        pylomin.open_store("http://127.0.0.1/x", cache_size="much")


def test_what_is_cached_is_told(nginx):
    tensors = several_blocks()
    save_file(tensors, nginx.root / "m.safetensors")
    store = pylomin.open_store(f"{nginx.url}/m.safetensors")
    (file,) = store.files
    extents = [store.location(name).extent for name in tensors]
    assert file.cached_fraction(extents[3:]) == 0.0
    assert not file.is_at_path()
    assert_holds(store, tensors)
    assert file.cached_fraction(extents) > 0.9
    assert file.cached_fraction([Extent(0, 0)]) == 0.0
    store.close()
    assert file.cached_fraction(extents) is None


def test_what_follows_is_fetched_while_nobody_asks(nginx):
    tensors = several_blocks()
    index = write_shards(nginx.root, {f"{i}.safetensors": {name: tensors[name]} for i, name in enumerate(tensors)})
    store = pylomin.open_store(f"{nginx.url}/{index.name}")
    read_tensor(store, "layers.0.weight")
    deadline = time.monotonic() + 30
    while len(nginx.requests()) < 9:  # the index, six beginnings, the rest of the first and of the second shard
        assert time.monotonic() < deadline
    store.close()


def test_the_default_directory(monkeypatch):
    from pylomin.remote.cache import default_directory

    monkeypatch.delenv("PYLOMIN_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert default_directory() == "/there/pylomin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_directory() == os.path.join(Path.home(), ".cache", "pylomin")
