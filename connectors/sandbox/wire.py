"""HTTP/1.1 on a socket, by hand: requests read fast, replies sent well or in each way a network can spoil them."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import BinaryIO
from urllib.parse import parse_qsl, urlsplit

_LONGEST_LINE = 65_536


@dataclass(frozen=True, slots=True)
class Request:
    """One request: ``query`` decoded once, header names in lower case, ``head`` the bytes as they came."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    head: bytes


@dataclass(slots=True)
class Reply:
    """What to answer, and how: ``send`` puts it on the wire and says whether the connection lives on."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    seconds: float = 0.0
    send: Sender = field(default_factory=lambda: whole)


Sender = Callable[[socket.socket, Reply, threading.Event], bool]
"""(connection, reply, set when the server stops) -> whether another request may follow."""


def read_request(reader: BinaryIO) -> Request | None:
    """The next request, None when the client is done. ConnectionError for what is no HTTP."""
    line = reader.readline(_LONGEST_LINE)
    if not line:
        return None
    lines, headers = [line], {}
    while (more := reader.readline(_LONGEST_LINE)) not in (b"\r\n", b"\n", b""):
        lines.append(more)
        name, _, value = more.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    words = line.decode("latin-1").split()
    if len(words) != 3 or not more:
        raise ConnectionError("the client sent no whole HTTP request")
    if headers.get("content-length", "0") != "0":
        reader.read(int(headers["content-length"]))
    url = urlsplit(words[1])
    return Request(words[0], url.path, dict(parse_qsl(url.query)), headers, b"".join([*lines, more]))


def whole(connection: socket.socket, reply: Reply, stopping: threading.Event) -> bool:
    """As it should be: head and body in one write."""
    connection.sendall(_head(reply) + reply.body)
    return True


def whole_then_close(connection: socket.socket, reply: Reply, stopping: threading.Event) -> bool:
    """All of the reply, then the connection is gone, although nothing announced it."""
    whole(connection, reply, stopping)
    return False


def nothing(connection: socket.socket, reply: Reply, stopping: threading.Event) -> bool:
    """FIN before any byte."""
    return False


def reset(connection: socket.socket, reply: Reply, stopping: threading.Event) -> bool:
    """RST before any byte."""
    abort(connection)
    return False


def head_only(connection: socket.socket, reply: Reply, stopping: threading.Event) -> bool:
    """The headers, then silence for ``reply.seconds``."""
    connection.sendall(_head(reply))
    stopping.wait(reply.seconds)
    return False


def drip(connection: socket.socket, reply: Reply, stopping: threading.Event) -> bool:
    """The body in fifty pieces spread over ``reply.seconds``."""
    connection.sendall(_head(reply))
    size = max(1, -(-len(reply.body) // 50))
    for at in range(0, len(reply.body), size):
        if stopping.wait(reply.seconds / 50):
            return False
        connection.sendall(reply.body[at : at + size])
    return True


def too_short(connection: socket.socket, reply: Reply, stopping: threading.Event) -> bool:
    """A Content-Length of 100 bytes more than there are, then FIN."""
    connection.sendall(_head(reply, len(reply.body) + 100) + reply.body)
    return False


def broken_chunks(connection: socket.socket, reply: Reply, stopping: threading.Event) -> bool:
    """One good chunk, then a length that is no number."""
    reply.headers["Transfer-Encoding"] = "chunked"
    half = reply.body[: len(reply.body) // 2]
    connection.sendall(_head(reply, None) + b"%x\r\n%s\r\nno length\r\n" % (len(half), half))
    return False


def abort(connection: socket.socket) -> None:
    """Close with RST instead of FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _head(reply: Reply, length: int | None = -1) -> bytes:
    lines = [
        f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}",
        f"Content-Type: {reply.content_type}",
    ]
    if length is not None:
        lines.append(f"Content-Length: {len(reply.body) if length < 0 else length}")
    lines += [f"{name}: {value}" for name, value in reply.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")
