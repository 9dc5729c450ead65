"""Weights on an S3 server."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save, save_file

import pylomin
from pylomin.errors import PassError, StoreChangedError, StoreFormatError, StoreReadError
from tests.store.files import SAMPLE, read_tensor, write_shards

from .servers import put_object
from .test_http import assert_holds, assert_no_secrets, several_blocks


@pytest.fixture
def put(s3):
    port, bucket = s3

    def put(key: str, content: bytes) -> str:
        put_object(port, f"/{bucket}/{key}", content)
        return f"s3://{bucket}/{key}"

    return put


def test_a_file(put):
    tensors = several_blocks()
    url = put("some/model.safetensors", save(tensors))
    for _ in range(2):
        store = pylomin.open_store(url)
        assert_holds(store, tensors)
        assert store.describe("layers.0.weight") == url
        store.close()


def test_shards_in_a_directory(put, tmp_path):
    tensors = several_blocks()
    index = write_shards(tmp_path, {f"{i}.safetensors": {name: tensors[name]} for i, name in enumerate(tensors)})
    for path in [index, *tmp_path.glob("*.safetensors")]:
        url = put(f"model/{path.name}", path.read_bytes())
    directory = url.rpartition("/")[0]
    for source in (directory, f"{directory}/", f"{directory}/{index.name}"):
        store = pylomin.open_store(source)
        assert_holds(store, tensors)
        store.close()


def test_a_model(put):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(4)))
    url = put("m.safetensors", save(plain.state_dict()))
    model = pylomin.load(lambda: torch.nn.Sequential(*(torch.nn.Linear(300, 300) for _ in range(4))), url)
    x = torch.randn(2, 300)
    with torch.inference_mode():
        assert torch.equal(pylomin.prefetch(model)(x), plain(x))
    del model


def test_ambiguous_and_empty_directories(put, s3, tmp_path):
    save_file(SAMPLE, tmp_path / "a.safetensors")
    for name in "ab":
        url = put(f"two/{name}.safetensors", (tmp_path / "a.safetensors").read_bytes())
    with pytest.raises(StoreFormatError, match=r"directory 's3://.*/two' has 2 \*\.safetensors files"):
        pylomin.open_store(url.rpartition("/")[0])
    with pytest.raises(StoreReadError, match="does not exist"):
        pylomin.open_store(f"s3://{s3[1]}/nothing/here")
    with pytest.raises(StoreReadError, match="does not exist"):
        pylomin.open_store(f"s3://{s3[1]}/nothing.safetensors")
    with pytest.raises(StoreReadError, match="does not exist"):
        pylomin.open_store("s3://no-such-bucket/m.safetensors")


def test_it_changes(put):
    url = put("m.safetensors", save(several_blocks()))
    store = pylomin.open_store(url)
    new = several_blocks(1)
    put("m.safetensors", save(new))
    with pytest.raises(StoreChangedError, match=r"layers\.4\.weight.*was changed after it was opened"):
        read_tensor(store, "layers.4.weight")
    store.close()
    store = pylomin.open_store(url)
    assert_holds(store, new)
    store.close()


def test_an_empty_object(put):
    url = put("m.safetensors", b"")
    with pytest.raises(StoreFormatError, match="holds 0 bytes"):
        pylomin.open_store(url)


def test_no_credentials(put, monkeypatch, tmp_path):
    url = put("m.safetensors", save(SAMPLE))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(StoreReadError, match=r"credentials.*'anon': True") as raised:
        pylomin.open_store(url)
    assert_no_secrets(raised.value)


def test_nobody_answers(s3, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    options = {"key": "hunter2", "secret": "s3cr3t", "client_kwargs": {"endpoint_url": "http://127.0.0.1:1"}}
    with pytest.raises(StoreReadError, match="failed 6 times, the last time with: EndpointConnectionError") as raised:
        pylomin.open_store("s3://bucket/m.safetensors", storage_options=options)
    assert_no_secrets(raised.value)


def test_options_that_do_not_exist(s3):
    with pytest.raises(PassError, match="storage_options do not suit s3://"):
        pylomin.open_store("s3://bucket/m.safetensors", storage_options={"client_kwargs": 3, "nonsense": 1, "loop": 5})


@pytest.mark.parametrize("code", [403, 503])
def test_what_the_server_says(server, monkeypatch, code):
    """A scripted server in the place of S3, for what the other one never says."""
    from .test_faults import fine, status

    content = save(several_blocks())
    server.put("bucket/m.safetensors", content)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    options = {"key": "hunter2", "secret": "s3cr3t"}
    server.faults = [status(503), fine] if code == 503 else [status(403)]
    if code == 403:
        with pytest.raises(StoreReadError, match="may not be read: status 403") as raised:
            pylomin.open_store("s3://bucket/m.safetensors", storage_options=options)
        assert_no_secrets(raised.value)
        assert len(server.asked) == 1
        return
    store = pylomin.open_store("s3://bucket/m.safetensors", storage_options=options)
    assert_holds(store, several_blocks())
    store.close()


def test_the_connection_ends_in_the_middle(server, monkeypatch):
    from .test_faults import all_of_it, cut, fine

    server.put("bucket/m.safetensors", save(several_blocks()))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    server.faults = [cut(1000), fine, cut(100), fine, cut(0)]
    store = pylomin.open_store("s3://bucket/m.safetensors", storage_options={"key": "k", "secret": "s"})
    assert_holds(store, several_blocks())
    store.close()
    server.put("bucket/n.safetensors", save(several_blocks(2)))
    store = pylomin.open_store("s3://bucket/n.safetensors", storage_options={"key": "k", "secret": "s"})
    server.always = all_of_it
    with pytest.raises(StoreReadError, match="does not send parts of files"):
        read_tensor(store, "layers.4.weight")
    store.close()
