"""Weights on a server that speaks as the Hugging Face hub does."""

from __future__ import annotations

from collections.abc import Iterator

import huggingface_hub
import pytest
from safetensors.torch import save

import pylomin
from pylomin.errors import StoreReadError
from tests.store.files import read_tensor, write_shards

from . import servers
from .test_http import assert_holds, assert_no_secrets, several_blocks


@pytest.fixture
def hub(monkeypatch) -> Iterator[servers.Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # which it reads once, when imported
    with servers.running(servers.Hub()) as hub:
        yield hub


@pytest.fixture
def options(hub) -> dict[str, object]:
    return {"endpoint": hub.url, "token": False}


def test_a_file(hub, options):
    tensors = several_blocks()
    hub.commit({"model.safetensors": save(tensors), "config.json": b"{}"})
    for source in ("hf://owner/model/model.safetensors", "hf://owner/model", "hf://owner/model@main/model.safetensors"):
        store = pylomin.open_store(source, storage_options=options)
        assert_holds(store, tensors)
        assert store.describe("layers.0.weight").startswith("hf://owner/model")
        store.close()
    sent = [text for _, text in hub.asked if text is not None]
    assert sum(text == "bytes=0-262143" for text in sent) == 3, "opened three times"
    assert len(sent) <= 3 + 3, "and fetched once"


def test_shards_are_of_one_commit(hub, options, tmp_path):
    tensors = several_blocks()
    write_shards(tmp_path, {f"{i}.safetensors": {name: tensors[name]} for i, name in enumerate(tensors)})
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    hub.commit(files)
    store = pylomin.open_store("hf://owner/model", storage_options=options)
    hub.commit(dict.fromkeys(files, b"other"))
    assert_holds(store, tensors)
    store.close()


def test_a_new_commit_with_the_same_file_is_cached(hub, options):
    tensors = several_blocks()
    hub.commit({"model.safetensors": save(tensors)})
    store = pylomin.open_store("hf://owner/model", storage_options=options)
    assert_holds(store, tensors)
    store.close()
    hub.commit({"model.safetensors": save(tensors), "more": b"x"})
    before = len(hub.asked)
    store = pylomin.open_store("hf://owner/model", storage_options=options)
    assert_holds(store, tensors)
    store.close()
    assert sum(text is not None for _, text in hub.asked[before:]) == 1


def test_another_commit(hub, options):
    old, new = several_blocks(), several_blocks(1)
    first = hub.commit({"model.safetensors": save(old)})
    hub.commit({"model.safetensors": save(new)})
    for revision, tensors in ((f"@{first}", old), ("", new)):
        store = pylomin.open_store(f"hf://owner/model{revision}/model.safetensors", storage_options=options)
        assert_holds(store, tensors)
        store.close()


def test_tokens(hub):
    hub.token = "s3cr3t"
    tensors = several_blocks()
    hub.commit({"model.safetensors": save(tensors)})
    store = pylomin.open_store("hf://owner/model", storage_options={"endpoint": hub.url, "token": "s3cr3t"})
    assert_holds(store, tensors)
    store.close()
    for token in (False, "hunter2"):
        with pytest.raises(StoreReadError, match=r"make sure you are authenticated|status 401") as raised:
            pylomin.open_store(
                "hf://owner/model/model.safetensors", storage_options={"endpoint": hub.url, "token": token}
            )
        assert_no_secrets(raised.value)


@pytest.mark.parametrize("source", ["hf://owner/none/model.safetensors", "hf://owner/model/none.safetensors"])
def test_nothing_there(hub, options, source):
    hub.commit({"model.safetensors": save(several_blocks())})
    with pytest.raises(StoreReadError, match="does not exist"):
        pylomin.open_store(source, storage_options=options)


def test_the_token_goes_to_the_hub_alone(hub, options, server):
    """Where the hub sends us elsewhere, as it does for large files."""
    content = save(several_blocks())
    hub.token = "s3cr3t"
    hub.commit({"model.safetensors": content})
    elsewhere = server.put("blob", content)
    serve = servers.HubHandler.serve

    def redirect(handler: servers.Handler, served: servers.Served, **more: object) -> None:
        handler.answer(302, b"", {"Location": elsewhere.replace("127.0.0.1", "localhost")})

    servers.HubHandler.serve = redirect
    try:
        store = pylomin.open_store("hf://owner/model", storage_options={"endpoint": hub.url, "token": "s3cr3t"})
        read_tensor(store, "layers.3.weight")
        store.close()
    finally:
        servers.HubHandler.serve = serve
    assert server.headers
    assert all("Authorization" not in headers for headers in server.headers)
