"""Everything that can go wrong with the venue, by name: what it is, where it can strike, what can be set.

``number`` is that of the catalogue of faults in docs/sandbox.md; variants of one fault share it. ``paths`` are
globs: the fault strikes only there, whatever a rule's ``endpoint`` says. ``stream/…`` are moments of a WebSocket
connection, ``connect`` is the moment in which a connection is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Option = str | int | float

ANY = ("/v5/*",)
KLINE = ("/v5/market/*kline",)
INSTRUMENTS = ("/v5/market/instruments-info",)
HISTORY = (
    "/v5/market/*kline",
    "/v5/market/funding/history",
    "/v5/market/open-interest",
    "/v5/market/account-ratio",
)
POSITIONS = ("/v5/market/open-interest", "/v5/market/account-ratio")
PAGED = (*POSITIONS, *INSTRUMENTS)
NEWS = ("/v5/announcements/index",)


@dataclass(frozen=True, slots=True)
class Kind:
    """One fault. ``options`` holds every setting with its default; a text default may list the choices ("a|b"),
    the first of which it is. ``needs`` names a query parameter without which the fault cannot strike."""

    number: int
    meaning: str
    paths: tuple[str, ...] = ANY
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: str = ""


def _stream(number: int, meaning: str, moment: str) -> Kind:
    return Kind(number, meaning, (f"stream/{moment}",))


CATALOGUE: dict[str, Kind] = {
    # -- transport
    "connect-refused": Kind(1, "every connection is cut and new ones are refused", options={"seconds": 0.5}),
    "connect-stall": Kind(3, "new connections get no answer at all", options={"seconds": 0.5}),
    "accept-reset": Kind(4, "a connection is taken, then reset", ("connect",)),
    "close-before-headers": Kind(5, "the connection ends before the first byte of a reply"),
    "reset-before-headers": Kind(5, "the connection is reset before the first byte of a reply"),
    "silence-after-headers": Kind(6, "the headers come, the body never", options={"seconds": 5.0}),
    "drip": Kind(7, "the body comes in fifty pieces, each soon enough for a time-out", options={"seconds": 10.0}),
    "content-length-too-long": Kind(8, "the body ends before its stated length"),
    "broken-chunked": Kind(9, "a chunk has a length that is no number"),
    "corrupt-gzip": Kind(10, "the compressed body has wrong bytes"),
    "silent-keep-alive-close": Kind(11, "the connection is closed between two requests without a word"),
    "latency-spike": Kind(12, "the reply comes late", options={"seconds": 8.0}),
    "swapped-reply": Kind(13, "the reply to an earlier request of the same path comes"),
    # -- HTTP statuses
    "ip-ban": Kind(14, "403 'access too frequent'; asking during the ban extends it", options={"seconds": 600.0}),
    "geo-403": Kind(15, "403 with a page that blocks this country"),
    "geo-200": Kind(16, "the same page with status 200"),
    "http-429": Kind(17, "429: the system protects itself"),
    "http-5xx": Kind(18, "500, 502, 503 or 504 (status 0: one of them)", options={"status": 0}),
    "http-404": Kind(19, "404"),
    "redirect": Kind(20, "302 to another host", options={"location": "http://127.0.0.1:9/"}),
    "path-blocked": Kind(21, "one path is blocked with the country page, the others serve"),
    # -- envelope
    "too-many-visits": Kind(22, "10006", options={"reset": "none|past|garbage|far"}),
    "server-error-code": Kind(23, "10000 or 10016 (code 0: one of them)", options={"code": 0}),
    "symbol-refused": Kind(24, "10001 for one symbol", needs="symbol"),
    "time-window-code": Kind(25, "10002"),
    "retcode-malformed": Kind(26, "retCode is missing, null or text", options={"form": "missing|null|text"}),
    "retmsg-missing": Kind(27, "a success without retMsg"),
    "error-without-retmsg": Kind(27, "an error without retMsg", options={"code": 10000}),
    "result-malformed": Kind(28, "result is null, a list, or without its list", options={"form": "null|list|no-list"}),
    "empty-body": Kind(29, "status 200 and no body"),
    "truncated-json": Kind(30, "the JSON ends at a random byte"),
    "json-not-an-object": Kind(31, "the JSON is a list, null or NaN", options={"form": "list|null|nan"}),
    "unknown-fields": Kind(32, "more fields than documented, and a column more in each row"),
    "renamed-field": Kind(32, "the list goes by another name"),
    "retmsg-empty": Kind(33, "a success with an empty retMsg"),
    "wrong-echo": Kind(34, "the reply names another symbol or category", HISTORY, {"field": "symbol|category"}),
    "clock-skew": Kind(35, "the envelope's time is off", options={"seconds": 5.0}),
    # -- content of series
    "open-candle-absent": Kind(36, "the candle that is open now does not come", KLINE),
    "row-before-start": Kind(37, "one row more, from before the start", KLINE, needs="start"),
    "limit-lowered": Kind(38, "only the newest 200 rows of a page, whatever the limit says", KLINE, {"rows": 200}),
    "start-ignored": Kind(39, "the newest rows up to the end come, whatever the start", HISTORY),
    "end-ignored": Kind(39, "the newest rows of all come, whatever the end", HISTORY),
    "empty-page": Kind(40, "an empty list in the middle of history", HISTORY),
    "missing-bars": Kind(41, "bars that open from `from` to before `to` do not exist", KLINE, {"from": "", "to": ""}),
    "flat-bars": Kind(41, "the same bars are flat and without volume", KLINE, {"from": "", "to": ""}),
    "duplicate-rows": Kind(42, "a row comes twice", HISTORY),
    "page-overlap": Kind(42, "the page also holds the last row of its newer neighbour", KLINE, needs="end"),
    "row-order": Kind(43, "rows ascend or are shuffled", HISTORY, {"form": "ascending|shuffled"}),
    "short-page": Kind(44, "the oldest rows of a page are left out although they exist", HISTORY, {"rows": 10}),
    "long-page": Kind(45, "more rows than the limit", KLINE, {"rows": 10}),
    "late-revision": Kind(46, "the newest closed bar reads differently from what it will read later", KLINE),
    "late-bar": Kind(47, "the newest closed bar comes only after a while", KLINE, {"seconds": 30.0}),
    "malformed-number": Kind(
        48, "a price is no plain number", KLINE, {"form": "empty|zero|tiny|exponent|nan|huge|comma"}
    ),
    "impossible-bar": Kind(49, "high below low, or less than no volume", KLINE, {"form": "crossed|negative-volume"}),
    "wrong-timestamp": Kind(50, "an open time in seconds, off the grid or in the future", KLINE,
                            {"form": "seconds|misaligned|future"}),
    "launch-time-wrong": Kind(51, "launchTime is off by so many days", INSTRUMENTS, {"days": 5.0}),
    "delisted-midway": Kind(52, "Closed from now on; no bar after `at`", (*KLINE, *INSTRUMENTS), {"at": ""}),
    "symbol-renamed": Kind(53, "the symbol goes by another name", (*KLINE, *INSTRUMENTS), {"to": "OTHERUSDT"}),
    # -- paging
    "cursor-repeats": Kind(54, "each page ends with the same cursor", PAGED),
    "cursor-on-empty-page": Kind(55, "an empty list with a cursor", PAGED),
    "cursor-expired": Kind(56, "10001 for a cursor", PAGED, needs="cursor"),
    "cursor-double-encoded": Kind(56, "the cursor is percent-encoded twice", PAGED),
    "funding-interval-change": Kind(58, "before `before` only every second event exists", ("/v5/market/funding/history",),
                                    {"before": ""}),
    "series-hole": Kind(59, "a row in the middle of the page is missing", POSITIONS),
    "series-duplicate": Kind(59, "two rows carry the same time", POSITIONS),
    "instruments-shift": Kind(60, "a listing between two pages: a page begins with a row of the one before",
                              INSTRUMENTS, needs="cursor"),
    "announcement-inserted": Kind(61, "an item appears between page 1 and page 2", NEWS),
    "announcement-edited": Kind(61, "a title changes, its url does not", NEWS),
    "publish-time-missing": Kind(61, "no publishTime", NEWS),
    "date-fields-misspelt": Kind(61, "startDataTimestamp instead of startDateTimestamp", NEWS),
    "announcement-dated-ahead": Kind(61, "dateTimestamp lies days ahead", NEWS, {"days": 30.0}),
    "tags-localised": Kind(61, "tags in the language of the locale", NEWS),
    "total-wrong": Kind(61, "total is not the number of items", NEWS),
    # -- WebSocket, carried out by ``stream``
    "handshake-403": _stream(62, "the handshake is answered with 403", "connect"),
    "handshake-429": _stream(62, "the handshake is answered with 429", "connect"),
    "handshake-503": _stream(62, "the handshake is answered with 503", "connect"),
    "no-ack": _stream(63, "a subscription is never acknowledged", "subscribe"),
    "reject": _stream(64, "a subscription is refused for one bad topic", "subscribe"),
    "args-size": _stream(64, "'args size >10' without req_id", "subscribe"),
    "ack-at-once": _stream(65, "the ack comes within microseconds", "subscribe"),
    "close-1000": _stream(66, "close frame 1000", "kline"),
    "close-1001": _stream(66, "close frame 1001", "kline"),
    "close-1006": _stream(66, "the connection ends without a close frame", "kline"),
    "reset": _stream(67, "RST", "kline"),
    "half-open": Kind(68, "the connection stays and nothing comes any more", ("stream/connect", "stream/kline")),
    "no-pong": _stream(68, "pings are not answered", "ping"),
    "outage-short": _stream(69, "away for 0.05 s", "kline"),
    "outage": _stream(69, "away for 3 s", "kline"),
    "outage-long": _stream(69, "away for 60 s", "kline"),
    "no-confirm": _stream(70, "a closed candle without confirm=true", "kline"),
    "two-confirms": _stream(70, "confirm=true twice", "kline"),
    "late-confirm": _stream(70, "confirm=true five seconds late", "kline"),
    "out-of-order": _stream(71, "an older start after a newer one", "kline"),
    "duplicate": _stream(71, "a frame twice", "kline"),
    "gap": _stream(72, "candles closed during a reconnect never come", "kline"),
    "bad-json": _stream(73, "a frame that is no JSON", "kline"),
    "binary": _stream(73, "a binary frame", "kline"),
    "no-topic": _stream(73, "a frame without topic", "kline"),
    "unknown-topic": _stream(73, "a frame for a topic nobody asked for", "kline"),
    "delta-first": _stream(74, "a ticker delta before its snapshot", "tickers"),
    "burst": _stream(75, "ten thousand messages at once", "kline"),
    "disagree": _stream(76, "a closed candle that REST tells otherwise", "kline"),
}  # fmt: skip
