from __future__ import annotations

import json

import pytest
import torch
from accelerate.utils import offload_state_dict

from pylomin.errors import StoreFormatError, StoreReadError
from pylomin.store.accelerate_folder import AccelerateFolderStore
from pylomin.store.open import open_store

from .files import SAMPLE, open_descriptors, read_tensor, same_bits, write_offload_folder


def test_as_accelerate_writes_it(tmp_path):
    state = {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.ones(3).bfloat16(),
        "n": torch.tensor(5),
        "h": torch.ones(2).half(),
    }
    offload_state_dict(tmp_path, state)
    for source in (tmp_path, tmp_path / "index.json"):
        store = open_store(source)
        assert type(store) is AccelerateFolderStore
        assert set(store) == set(state)
        assert all(same_bits(read_tensor(store, name), tensor) for name, tensor in state.items())
        assert store.location("a.weight").extent.nbytes == 48


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ([], r"describes weight 'b' as \[\]"),
        ({"dtype": "float32"}, "describes weight 'b' as"),
        ({"dtype": "object", "shape": [4]}, "describes weight 'b' as"),
        ({"dtype": "float32", "shape": [-4]}, "describes weight 'b' as"),
        ({"dtype": "float32", "shape": [True] * 4}, "describes weight 'b' as"),
        ({"dtype": "float32", "shape": [1] * 65}, "describes weight 'b' as"),
        ({"dtype": "float32", "shape": [5]}, r"b\.dat' has 16 bytes; its index says 20"),
        ({"dtype": "float32", "shape": [1 << 62, 1 << 62]}, r"b\.dat' has 16 bytes; its index says"),
    ],
)
def test_malformed(described, message, tmp_path):
    index = write_offload_folder(tmp_path, SAMPLE)
    index.write_text(json.dumps(json.loads(index.read_text()) | {"b": described}))
    before = open_descriptors()
    with pytest.raises(StoreFormatError, match=message):
        AccelerateFolderStore(index)
    assert open_descriptors() == before


@pytest.mark.parametrize("name", ["../secret", "/etc/secret", "link", "a\0b"])
def test_files_outside(name, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.dat").write_bytes(bytes(4))
    (folder / "link.dat").symlink_to(tmp_path / "secret.dat")
    (folder / "index.json").write_text(json.dumps({name: {"dtype": "float32", "shape": [1]}}))
    with pytest.raises(StoreFormatError, match="outside its directory"):
        open_store(folder)


def test_missing_files(tmp_path):
    index = write_offload_folder(tmp_path, SAMPLE)
    (tmp_path / "a.dat").unlink()
    with pytest.raises(StoreReadError, match=r"lists weight 'a', but .*a\.dat' does not exist"):
        AccelerateFolderStore(index)
