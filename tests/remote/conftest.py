from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pylomin.remote import download

from . import servers


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test keeps what it fetches."""
    directory = tmp_path / "cache"
    monkeypatch.setenv("PYLOMIN_CACHE_DIR", str(directory))
    monkeypatch.delenv("PYLOMIN_CACHE_SIZE", raising=False)
    return directory


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FIRST_WAIT_S", 0.001)


@pytest.fixture(autouse=True)
def _no_threads_are_left() -> Iterator[None]:
    yield
    if _remote_threads():
        gc.collect()  # takes long in a process that imported so much
    for thread in _remote_threads():
        thread.join(30)  # of one that ended itself, for it ran the collector, nobody has waited for the end
        assert not thread.is_alive()


def _remote_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pylomin-remote"]


@pytest.fixture(scope="session")
def _nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Nginx]:
    with servers.nginx(tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture
def nginx(_nginx: servers.Nginx) -> servers.Nginx:
    """An HTTP server, which everybody uses; with nothing in its log, and a directory of this test's own."""
    _nginx.log.write_text("")
    for path in _nginx.root.iterdir():
        path.unlink()
    return _nginx


@pytest.fixture
def server() -> Iterator[servers.Scripted]:
    with servers.running(servers.Scripted()) as server:
        yield server


@pytest.fixture(scope="session")
def _s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with servers.s3_server(tmp_path_factory.mktemp("s3") / "log") as port:
        yield port


@pytest.fixture
def s3(_s3: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    """Port of an S3 server, and a bucket of this test's own; credentials are where AWS's tools look for them."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{_s3}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    bucket = "bucket-" + "".join(char for char in tmp_path.name.lower() if char.isalnum())[-40:]
    servers.put_object(_s3, f"/{bucket}")
    return _s3, bucket
