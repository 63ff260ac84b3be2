"""The sandbox exchange as a real HTTP and WebSocket server on this machine, with a clock of its own."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, urlsplit

from recur.connectors.sandbox.endpoints import Endpoints
from recur.connectors.sandbox.stream import StreamFaults, Streams
from recur.connectors.sandbox.world import World

_log = logging.getLogger(__name__)

LIMIT_REQUESTS = 600
LIMIT_WINDOW_S = 5.0


class VirtualClock:
    """The venue's time: starts at ``now_ms`` and runs ``speed`` times as fast as real time (0 stands still)."""

    def __init__(self, now_ms: int, speed: float = 0.0) -> None:
        self._speed = speed
        self._anchor = (now_ms, time.monotonic())

    def now_ms(self) -> int:
        at_ms, since = self._anchor
        return at_ms + int((time.monotonic() - since) * 1000 * self._speed)

    def set(self, ms: int) -> None:
        """Jump to ``ms``; the pace stays."""
        self._anchor = (ms, time.monotonic())


class AddressLimit:
    """The venue's limit per address: over 600 requests in 5 s bans it; each request while banned extends the ban."""

    def __init__(self, ban_s: float = 600.0) -> None:
        self._ban_s = ban_s
        self._banned_until = 0.0
        self._recent: deque[float] = deque()
        self._lock = threading.Lock()
        self.refused = 0
        self.most_in_window = 0

    def admits(self, at_s: float) -> bool:
        """Count one request at ``at_s`` (monotonic seconds) and say whether it is served."""
        with self._lock:
            self._recent.append(at_s)
            while self._recent[0] <= at_s - LIMIT_WINDOW_S:
                self._recent.popleft()
            self.most_in_window = max(self.most_in_window, len(self._recent))
            if at_s < self._banned_until or len(self._recent) > LIMIT_REQUESTS:
                self._banned_until = at_s + self._ban_s
                self.refused += 1
                return False
            return True


class SandboxServer:
    """Serves ``world`` over HTTP/1.1 on ``host``:``port`` (0 = any free port), one thread per connection.

    The same port takes WebSocket connections to ``/v5/public/{category}``, see ``stream``.

    Use it as a context manager (gives the server; its ``base_url`` is what a client needs), or call ``start``
    and ``stop``. ``requests`` counts the requests per path, ``connections`` the sockets opened, ``limit``
    keeps the address limit, which refuses (HTTP 403) only with ``enforce_limit``.
    """

    def __init__(
        self,
        world: World,
        clock: VirtualClock,
        port: int = 0,
        host: str = "127.0.0.1",
        enforce_limit: bool = False,
        ban_s: float = 600.0,
        stream_faults: StreamFaults | None = None,
    ) -> None:
        self.endpoints = Endpoints(world)
        self.clock = clock
        self.streams = Streams(world, self.endpoints, clock, stream_faults)
        self.requests: Counter[str] = Counter()
        self.connections = 0
        self.limit = AddressLimit(ban_s)
        self.enforce_limit = enforce_limit
        self._address = (host, port)
        self._http: _Http | None = None
        self._thread: threading.Thread | None = None
        self.lock = threading.Lock()

    @property
    def base_url(self) -> str:
        """``http://host:port`` of the running server; raises RuntimeError before ``start``."""
        if self._http is None:
            raise RuntimeError("the sandbox server is not running")
        return f"http://{self._address[0]}:{self._http.server_address[1]}"

    def start(self) -> str:
        """Listen and serve in the background; returns ``base_url``. OSError if the port is taken."""
        self._http = _Http(self._address, self)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self.base_url

    def stop(self) -> None:
        """Stop listening and cut every open connection; does nothing when not running."""
        if self._http is None or self._thread is None:
            return
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        self._http.cut_connections()
        self._http = self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], sandbox: SandboxServer) -> None:
        self.sandbox = sandbox
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self.sandbox.lock:
            self.sandbox.connections += 1
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.sandbox.lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        """Wake every handler that waits for a next request, so that its thread ends and closes its socket."""
        with self.sandbox.lock:
            waiting = list(self._open)
        for connection in waiting:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError as gone:  # the client has already left
                _log.debug("closing a connection: %s", gone)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if isinstance(error, ConnectionError):
            _log.debug("client %s left: %s", client_address, error)
        else:
            _log.error("while serving %s", client_address, exc_info=error)


class _Handler(BaseHTTPRequestHandler):
    server: _Http
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 18  # head and body leave in one write

    def do_GET(self) -> None:
        sandbox = self.server.sandbox
        url = urlsplit(self.path)
        with sandbox.lock:
            sandbox.requests[url.path] += 1
        if url.path in sandbox.streams and self.headers.get("Upgrade"):
            self.close_connection = True
            sandbox.streams.serve(url.path, self._handshake(), self.connection)
            return
        admitted = sandbox.limit.admits(time.monotonic())
        if sandbox.enforce_limit and not admitted:
            self._reply(403, "text/plain", b"access too frequent")
        elif url.path not in sandbox.endpoints:
            self._reply(404, "text/plain", b"404 page not found")
        else:
            body = sandbox.endpoints.answer(url.path, dict(parse_qsl(url.query)), sandbox.clock.now_ms())
            self._reply(200, "application/json", body)

    def _handshake(self) -> bytes:
        lines = [self.requestline, *(f"{name}: {value}" for name, value in self.headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    def _reply(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)
