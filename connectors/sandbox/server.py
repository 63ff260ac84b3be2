"""The sandbox exchange as a real HTTP and WebSocket server on this machine, with a clock of its own."""

from __future__ import annotations

import contextlib
import gzip
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from recur.connectors.sandbox import wire
from recur.connectors.sandbox.clock import AddressLimit, VirtualClock
from recur.connectors.sandbox.endpoints import Endpoints
from recur.connectors.sandbox.faults import Fault, FaultPlan
from recur.connectors.sandbox.spoil import Strike, spoil
from recur.connectors.sandbox.stream import StreamFaults, Streams
from recur.connectors.sandbox.wire import Reply, Request
from recur.connectors.sandbox.world import World

__all__ = ["AddressLimit", "SandboxServer", "VirtualClock"]

_log = logging.getLogger(__name__)

_BACKLOG = 128
_LOOK_UP_S = 0.02


class SandboxServer:
    """Serves ``world`` over HTTP/1.1 on ``host``:``port`` (0 = any free port), one thread per connection.

    The same port takes WebSocket connections to ``/v5/public/{category}``.

    Use it as a context manager (gives the server; its ``base_url`` is what a client needs), or call ``start``
    and ``stop``. ``requests`` counts the requests per path, ``connections`` the sockets opened, ``limit``
    keeps the address limit, which refuses (HTTP 403) only with ``enforce_limit``.

    ``faults``     what goes wrong, and when; ``fault_counts`` says how often each fault struck
    ``latency_s``  each reply leaves so much later; connections wait on their own
    ``compress``   gzip for clients that accept it
    ``stream_faults``  the same for its WebSocket connections, see ``stream``; by default ``faults`` serve both
    """

    def __init__(
        self,
        world: World,
        clock: VirtualClock,
        port: int = 0,
        host: str = "127.0.0.1",
        enforce_limit: bool = False,
        ban_s: float = 600.0,
        faults: FaultPlan | None = None,
        latency_s: float = 0.0,
        compress: bool = False,
        stream_faults: StreamFaults | None = None,
    ) -> None:
        self.endpoints = Endpoints(world)
        self.clock = clock
        self.requests: Counter[str] = Counter()
        self.connections = 0
        self.limit = AddressLimit(ban_s)
        self.enforce_limit = enforce_limit
        self.faults = faults or FaultPlan()
        self.streams = Streams(world, self.endpoints, clock, stream_faults or self.faults)
        self.latency_s = latency_s
        self.compress = compress
        self.lock = threading.Lock()
        self._address = (host, port)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._open: set[socket.socket] = set()
        self._outage: tuple[float, bool] | None = (
            None  # (until this monotonic second, stalling instead of refusing)
        )
        self._out = threading.Event()

    @property
    def base_url(self) -> str:
        """``http://host:port`` of the running server; raises RuntimeError before ``start``."""
        if self._thread is None:
            raise RuntimeError("the sandbox server is not running")
        return f"http://{self._address[0]}:{self._port}"

    @property
    def fault_counts(self) -> Counter[str]:
        """How often each fault struck, by name."""
        return self.faults.counts

    def start(self) -> str:
        """Listen and serve in the background; returns ``base_url``. OSError if the port is taken."""
        listener = self._listener(self._address, _BACKLOG)
        self._port: int = listener.getsockname()[1]
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._listen, args=(listener,), name="sandbox", daemon=True)
        self._thread.start()
        return self.base_url

    def stop(self) -> None:
        """Stop listening and cut every open connection; does nothing when not running."""
        if self._thread is None:
            return
        self._stopping.set()
        self._thread.join()
        self._thread = None
        self._cut()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- connections ------------------------------------------------------------------------------------------

    @staticmethod
    def _listener(address: tuple[str, int], backlog: int) -> socket.socket:
        listener = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(backlog)
        except OSError:
            listener.close()
            raise
        listener.settimeout(_LOOK_UP_S)
        return listener

    def _listen(self, listener: socket.socket) -> None:
        while not self._stopping.is_set():
            if self._outage:
                listener = self._suffer(listener, *self._outage)
                continue
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            fault = self.faults.take("connect", "", self.clock.now_ms())
            with self.lock:
                self.connections += 1
            if fault:
                wire.abort(connection)
                connection.close()
                continue
            with self.lock:
                self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        listener.close()

    def _suffer(self, listener: socket.socket, until_s: float, stalling: bool) -> socket.socket:
        """Be away until then: refuse connections, or leave them without an answer. Returns the new listener."""
        address = (self._address[0], self._port)
        listener.close()
        with contextlib.ExitStack() as waiting:
            if stalling:  # a full queue: the system drops every further attempt to connect
                waiting.enter_context(self._listener(address, 0))
                for _ in range(2):
                    filler = waiting.enter_context(socket.socket())
                    filler.setblocking(False)
                    filler.connect_ex(address)
            self._cut()
            self._out.set()
            self._stopping.wait(max(0.0, until_s - time.monotonic()))
        self._outage = None
        return self._listener(address, _BACKLOG)

    def _cut(self) -> None:
        """Wake every handler that waits for a next request, so that its thread ends and closes its socket."""
        with self.lock:
            waiting = list(self._open)
        for connection in waiting:
            with contextlib.suppress(OSError):  # the client has already left
                connection.shutdown(socket.SHUT_RDWR)

    def _serve(self, connection: socket.socket) -> None:
        stopping = self._stopping
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection.makefile("rb") as reader:
                while request := wire.read_request(reader):
                    if request.path in self.streams and "upgrade" in request.headers:
                        self.streams.serve(request.path, request.head, connection)
                        break
                    reply = self.reply(request)
                    if (wait_s := self.latency_s + reply.delay_s) > 0 and stopping.wait(wait_s):
                        break
                    last = request.headers.get("connection", "").lower() == "close"
                    if not reply.send(connection, reply, stopping) or last:
                        break
        except OSError as error:
            _log.debug("a client left: %s", error)
        except Exception:  # noqa: BLE001  one bad request must not end the server
            _log.exception("while serving a request")
        finally:
            with self.lock:
                self._open.discard(connection)
            connection.close()

    # -- requests ---------------------------------------------------------------------------------------------

    def reply(self, request: Request) -> Reply:
        """What the venue answers now, spoilt by a fault when one is due."""
        with self.lock:
            self.requests[request.path] += 1
        now_ms = self.clock.now_ms()
        fault = self.faults.take(request.path, request.query.get("symbol", ""), now_ms, request.query)
        if not self.limit.admits(time.monotonic()) and (self.enforce_limit or self.limit.imposed):
            return Reply(403, b"access too frequent", "text/plain")
        if request.path not in self.endpoints:
            return Reply(404, b"404 page not found", "text/plain")
        reply = Reply(body=self.endpoints.answer(request.path, request.query, now_ms))
        if fault:
            reply = spoil(self._strike(fault, request, now_ms), reply)
        elif self.compress and "gzip" in request.headers.get("accept-encoding", ""):
            reply.body = gzip.compress(reply.body, 1)
            reply.headers["Content-Encoding"] = "gzip"
        return reply

    def _strike(self, fault: Fault, request: Request, now_ms: int) -> Strike:
        def again(changes: Mapping[str, str | None]) -> bytes:
            query = {name: value for name, value in {**request.query, **changes}.items() if value is not None}
            return self.endpoints.answer(request.path, query, now_ms)

        return Strike(fault, request, now_ms, again, self)

    # -- what faults do to the whole venue ----------------------------------------------------------------------

    def ban(self, seconds: float) -> None:
        """Ban every address now; each request while banned starts the time anew."""
        self.limit.ban(time.monotonic(), seconds)

    def go_away(self, seconds: float, stalling: bool = False) -> None:
        """Cut all connections and take no new one for ``seconds``: refused, or (``stalling``) never answered."""
        self._out.clear()
        self._outage = (time.monotonic() + seconds, stalling)
        self._out.wait(1.0)
