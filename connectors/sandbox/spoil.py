"""What each fault does to a reply: transport and status here, the JSON of a reply in ``envelopes`` and ``contents``."""

from __future__ import annotations

import gzip
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from recur.connectors.sandbox import contents, envelopes, wire
from recur.connectors.sandbox.strike import Strike
from recur.connectors.sandbox.wire import Reply, Sender

__all__ = ["EFFECTS", "Strike", "spoil"]

_COUNTRY_PAGE = (
    b"<!DOCTYPE HTML><HTML><HEAD><TITLE>ERROR: The request could not be satisfied</TITLE></HEAD><BODY>"
    b"The Amazon CloudFront distribution is configured to block access from your country.</BODY></HTML>"
)
_SERVER_ERRORS = (500, 502, 503, 504)
_FAR_MS = 3_600_000


def spoil(strike: Strike, reply: Reply) -> Reply:
    """``reply`` as it looks after the fault; may be the same object, changed."""
    return EFFECTS[strike.fault.name](strike, reply)


def _sent(send: Sender) -> Callable[[Strike, Reply], Reply]:
    def effect(strike: Strike, reply: Reply) -> Reply:
        return replace(reply, send=send, seconds=float(strike.fault.options.get("seconds", 0.0)))

    return effect


def _refuse(strike: Strike, reply: Reply) -> Reply:
    strike.venue.go_away(strike.number("seconds"))
    return replace(reply, send=wire.nothing)


def _stall(strike: Strike, reply: Reply) -> Reply:
    strike.venue.go_away(strike.number("seconds"), stalling=True)
    return replace(reply, send=wire.nothing)


def _corrupt_gzip(strike: Strike, reply: Reply) -> Reply:
    packed = bytearray(gzip.compress(reply.body, 1))
    middle = len(packed) // 2
    packed[middle : middle + 8] = b"\xff" * 8
    return replace(reply, body=bytes(packed), headers=reply.headers | {"Content-Encoding": "gzip"})


def _late(strike: Strike, reply: Reply) -> Reply:
    return replace(reply, delay_s=strike.number("seconds"))


def _ban(strike: Strike, reply: Reply) -> Reply:
    strike.venue.ban(strike.number("seconds"))
    return Reply(403, b"access too frequent", "text/plain")


def _page(status: int, body: bytes, content_type: str) -> Callable[[Strike, Reply], Reply]:
    return lambda strike, reply: Reply(status, body, content_type)


def _server_error(strike: Strike, reply: Reply) -> Reply:
    drawn = _SERVER_ERRORS[int(strike.fault.draw * len(_SERVER_ERRORS))]
    return Reply(int(strike.number("status")) or drawn, b"<html>gateway</html>", "text/html")


def _redirect(strike: Strike, reply: Reply) -> Reply:
    return Reply(302, b"", "text/plain", {"Location": strike.text("location")})


def _too_many_visits(strike: Strike, reply: Reply) -> Reply:
    now_ms = int(time.time() * 1000)  # clients compare with their own clock
    reset = {"past": str(now_ms - 1000), "garbage": "soon", "far": str(now_ms + _FAR_MS)}
    headers = {"X-Bapi-Limit": "10", "X-Bapi-Limit-Status": "0"}
    form = strike.text("reset")
    if form in reset:
        headers["X-Bapi-Limit-Reset-Timestamp"] = reset[form]
    return Reply(body=strike.error(10006, "Too many visits!"), headers=headers if form != "none" else {})


EFFECTS: Mapping[str, Callable[[Strike, Reply], Reply]] = {
    "connect-refused": _refuse,
    "connect-stall": _stall,
    "close-before-headers": _sent(wire.nothing),
    "reset-before-headers": _sent(wire.reset),
    "silence-after-headers": _sent(wire.head_only),
    "drip": _sent(wire.drip),
    "content-length-too-long": _sent(wire.too_short),
    "broken-chunked": _sent(wire.broken_chunks),
    "corrupt-gzip": _corrupt_gzip,
    "silent-keep-alive-close": _sent(wire.whole_then_close),
    "latency-spike": _late,
    "ip-ban": _ban,
    "geo-403": _page(403, _COUNTRY_PAGE, "text/html"),
    "geo-200": _page(200, _COUNTRY_PAGE, "text/html"),
    "path-blocked": _page(403, _COUNTRY_PAGE, "text/html"),
    "http-429": _page(429, b"too many requests", "text/plain"),
    "http-404": _page(404, b"404 page not found", "text/plain"),
    "http-5xx": _server_error,
    "redirect": _redirect,
    "too-many-visits": _too_many_visits,
    **envelopes.EFFECTS,
    **contents.EFFECTS,
}
"""By name, for every fault of the catalogue that strikes a request."""
