"""Public market data of Bybit v5: candles, funding, open interest, long/short ratio, instruments, maintenance.

Nothing needs a key. Method and field names are the venue's
(https://bybit-exchange.github.io/docs/v5/market/kline and its neighbours), frames are ours. How one question is
asked is in ``session.py``, how an answer is read in ``answers.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import polars as pl

from recur.connectors.answers import (
    FUNDING_SCHEMA,
    Reply,
    candle_bars,
    candle_frame,
    day_amounts,
    funding_frame,
    instrument_frame,
    maintenance_ranges,
    point_frame,
    rows,
)
from recur.connectors.session import PUBLIC_URL, VenueSession
from recur.connectors.windows import PAGE_ROWS, Bars, Window, check
from recur.vocabulary import (
    INTERVALS,
    Series,
    UnknownSymbol,
    VenueError,
    did_you_mean,
    floor_open,
    iso,
    next_open,
)

__all__ = ["PUBLIC_URL", "BybitConnector"]

VENUE_INTERVALS = {
    "1m": "1", "3m": "3", "5m": "5", "15m": "15", "30m": "30", "1h": "60", "2h": "120", "4h": "240",
    "6h": "360", "12h": "720", "1d": "D", "1w": "W", "1M": "M",
}  # fmt: skip
POINT_INTERVALS = {"5m": "5min", "15m": "15min", "30m": "30min", "1h": "1h", "4h": "4h", "1d": "1d"}
"""Our name to the venue's of the spacings of open interest and long/short ratio."""

FUNDING_PAGE_ROWS = 200
POINT_PAGE_ROWS = {"open_interest": 200, "long_short": 500}
INSTRUMENT_PAGE_ROWS = 1000
ANNOUNCEMENT_PAGE_ROWS = 20
STATUSES = ("Trading", "PreLaunch", "Delivering", "Closed")
"""What instruments can be; spot lists only those trading."""

_KLINES = {
    "trade": "get_kline",
    "mark": "get_mark_price_kline",
    "index": "get_index_price_kline",
    "premium": "get_premium_index_price_kline",
}
_LONG_AGO_MS = 1


class BybitConnector(VenueSession):
    """What the venue knows, a method per kind. See ``VenueSession`` for the arguments and the errors."""

    def server_time_ms(self) -> int:
        """The venue's clock."""
        return self.ask("server time", lambda api: api.get_server_time(), lambda reply: reply.time_ms)

    def read_clock(self) -> tuple[int, int]:
        """The venue's clock, and by how many milliseconds it is ahead of this machine's at the middle of the call."""
        before = time.time()
        server_ms = self.server_time_ms()
        return server_ms, server_ms - int(500 * (before + time.time()))

    # -- candles --------------------------------------------------------------------------------------

    def bars(self, window: Window) -> tuple[Bars, list[int], int]:
        """The closed bars of ``window``, sorted, the open times that are missing, and the venue's clock.

        A bar counts as closed by the venue's own clock. VenueError when the answer breaks ``windows.check``.
        """

        def read(reply: Reply) -> tuple[Bars, list[int], int]:
            bars = candle_bars(window.series, reply).closed(reply.time_ms)
            return *check(window, bars), reply.time_ms

        return self.ask(
            str(window),
            lambda api: _kline(api, window.series, window.since_ms, window.until_ms - 1, PAGE_ROWS),
            read,
        )

    def candles(self, window: Window) -> pl.DataFrame:
        """``bars`` as a candle frame: maybe fewer than expected, never wrong."""
        return candle_frame(window.series, [self.bars(window)[0]])

    def first_open(self, series: Series) -> int | None:
        """Open time of the first bar the venue has (its stated launch time is no lower bound); None if no bar."""

        def read(reply: Reply) -> tuple[int | None, int]:
            opens = candle_bars(series, reply).open_ms
            first = int(opens.min()) if len(opens) else None
            if first is not None and (first > reply.time_ms or floor_open(first, series.interval) != first):
                raise VenueError(f"The first bar is said to open at {first} ms, which cannot be.")
            return first, reply.time_ms

        def ask(end_ms: int | None) -> tuple[int | None, int]:
            return self.ask(what, lambda api: _kline(api, series, _LONG_AGO_MS, end_ms, 1), read)

        what = f"first bar of {series}"
        for _ in range(self.attempts):
            first, time_ms = ask(None)
            if first is None or next_open(next_open(first, series.interval), series.interval) <= time_ms:
                return first
            # So young a symbol is rare, and a venue that overlooks the start looks just so: a bar before it tells.
            if ask(first - 1)[0] is None:
                return first
        raise VenueError(f"{what}: the venue overlooks the start of the range.", "Try again later.")

    # -- funding, open interest, long/short ratio ---------------------------------------------------------

    def funding(self, category: str, symbol: str, since_ms: int, until_ms: int) -> pl.DataFrame:
        """Funding events in ``[since_ms, until_ms)``: category, symbol, funding_time, rate (a fraction), sorted.

        The spacing of events changes over a symbol's life, so nothing is assumed of it. Only an empty page ends the
        paging, and only when it is empty twice.
        """

        def page(end_ms: int) -> pl.DataFrame:
            found = page_once(end_ms)
            return page_once(end_ms) if found.is_empty() else found

        def page_once(end_ms: int) -> pl.DataFrame:
            return self._timed_page(
                f"funding of {category} {symbol} to {iso(end_ms)}",
                lambda api: api.get_funding_rate_history(
                    category=category,
                    symbol=symbol,
                    startTime=since_ms,
                    endTime=end_ms,
                    limit=FUNDING_PAGE_ROWS,
                ),
                lambda reply: funding_frame(category, symbol, reply),
                (since_ms, end_ms),
            )

        pages = [pl.DataFrame(schema=FUNDING_SCHEMA), *_backward(page, since_ms, until_ms, "funding_time")]
        return pl.concat(pages).sort("funding_time")

    def points(self, series: Series, since_ms: int, until_ms: int) -> pl.DataFrame:
        """Open interest or long/short ratio (``series.kind``) at the instants in ``[since_ms, until_ms)``, sorted.

        Columns category, symbol, interval, ts and open_interest (base coin, for inverse USD; both sides counted) or
        buy_ratio and sell_ratio (fractions of accounts). ``series.interval`` is one of ``POINT_INTERVALS``.
        """
        spacing, limit = POINT_INTERVALS[series.interval], POINT_PAGE_ROWS[series.kind]
        step = INTERVALS[series.interval]
        query: dict[str, Any] = {"category": series.category, "symbol": series.symbol, "startTime": since_ms}
        expected = max(0, -(-until_ms // step) - -(-since_ms // step))

        def call(api: Any, end_ms: int) -> Any:
            if series.kind == "open_interest":
                return api.get_open_interest(intervalTime=spacing, endTime=end_ms, limit=limit, **query)
            return api.get_long_short_ratio(period=spacing, endTime=end_ms, limit=limit, **query)

        def page(end_ms: int) -> pl.DataFrame:
            what = f"{series} to {iso(end_ms)}"
            return self._timed_page(
                what,
                lambda api: call(api, end_ms),
                lambda reply: _sound_points(what, series, point_frame(series, reply)),
                (since_ms, end_ms),
            )

        found: list[pl.DataFrame] = []
        for part in _backward(page, since_ms, until_ms, "ts"):
            found.append(part)
            if sum(frame.height for frame in found) >= expected:
                break
        return pl.concat(found).sort("ts") if found else _no_points(series)

    def _timed_page(
        self,
        what: str,
        call: Callable[[Any], Any],
        read: Callable[[Reply], pl.DataFrame],
        span: tuple[int, int],
    ) -> pl.DataFrame:
        """One page of rows that carry an instant of ``span`` (both ends included); equal rows count once."""

        def checked(reply: Reply) -> pl.DataFrame:
            frame = read(reply).unique(maintain_order=True)
            times = _times(frame)
            if not times.is_between(*span).all():
                raise VenueError(f"{what}: the answer holds rows outside the range that was asked.")
            if times.is_duplicated().any():
                raise VenueError(f"{what}: the answer says two things about one instant.")
            return frame

        return self.ask(what, call, checked)

    # -- what there is ------------------------------------------------------------------------------------

    def instruments(self, category: str, **params: str) -> list[dict[str, Any]]:
        """All instruments of ``category`` as the venue describes them; by default those trading now."""
        found: list[dict[str, Any]] = []
        seen: set[str] = set()
        cursor = ""
        while True:
            query: dict[str, Any] = {"category": category, "limit": INSTRUMENT_PAGE_ROWS, **params}
            if cursor:
                query["cursor"] = cursor  # already percent-encoded: goes back as it came
            page, cursor = self.ask(
                f"instruments of {category}",
                lambda api, query=query: api.get_instruments_info(**query),  # type: ignore[misc]
                lambda reply: (rows(reply, dict), str(reply.document().get("nextPageCursor") or "")),
            )
            found += page
            if not page or not cursor or cursor in seen:
                return found
            seen.add(cursor)

    def all_instruments(self, category: str) -> pl.DataFrame:
        """Every instrument of ``category``, delisted ones included, with what it trades in a day."""
        statuses = STATUSES[:1] if category == "spot" else STATUSES
        found = [row for status in statuses for row in self.instruments(category, status=status)]
        return instrument_frame(category, found, self.day_amounts(category))

    def day_amounts(self, category: str) -> dict[str, float | None]:
        """Amount traded in the last 24 hours by symbol: in quote coin, for inverse contracts in USD."""
        return self.ask(
            f"tickers of {category}",
            lambda api: api.get_tickers(category=category),
            lambda reply: day_amounts(category, reply),
        )

    def describe_symbols(self, category: str, symbols: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The venue's description of each of ``symbols``, delisted ones included.

        UnknownSymbol naming the first that ``category`` does not have.
        """
        wanted = set(symbols)
        known: dict[str, dict[str, Any]] = {}
        for status in STATUSES[:1] if category == "spot" else STATUSES:
            known |= {str(row.get("symbol")): row for row in self.instruments(category, status=status)}
            if wanted <= known.keys():
                break
        for symbol in sorted(wanted - known.keys()):
            raise UnknownSymbol(
                f"The venue has no symbol '{symbol}' in category '{category}'.{did_you_mean(symbol, known)}",
                f"It knows {len(known)} {category} symbols, such as {', '.join(sorted(known)[:3]) or 'none'}.",
                10001,
            )
        return {symbol: known[symbol] for symbol in wanted}

    def check_symbols(self, category: str, symbols: Iterable[str]) -> None:
        """UnknownSymbol naming the first of ``symbols`` that ``category`` does not have, delisted ones included."""
        self.describe_symbols(category, symbols)

    def announcements_page(self, locale: str, page: int) -> list[dict[str, Any]]:
        """Announcements of one page (from 1), the newest first, as the venue describes them."""
        return self.ask(
            f"announcements, page {page}",
            lambda api: api.get_announcement(locale=locale, page=page, limit=ANNOUNCEMENT_PAGE_ROWS),
            lambda reply: rows(reply, dict),
        )

    def maintenance(self) -> list[tuple[int, int]]:
        """(begin, end) of the maintenance the venue has announced, past and to come, in UTC ms."""
        return self.ask("system status", lambda api: api.get_system_status(), maintenance_ranges)


def _kline(api: Any, series: Series, start_ms: int, end_ms: int | None, limit: int) -> Any:
    params: dict[str, Any] = {
        "category": series.category,
        "symbol": series.symbol,
        "interval": VENUE_INTERVALS[series.interval],
        "start": start_ms,
        "limit": limit,
    }
    if end_ms is not None:
        params["end"] = end_ms
    return getattr(api, _KLINES[series.kind])(**params)


def _backward(
    page: Callable[[int], pl.DataFrame], since_ms: int, until_ms: int, time: str
) -> Iterable[pl.DataFrame]:
    """Pages from the end to the begin of ``[since_ms, until_ms)``: each ends before the oldest row so far.

    The end moves down with every page, so a venue that repeats itself cannot keep it going.
    """
    end_ms = until_ms - 1
    while end_ms >= since_ms:
        frame = page(end_ms)
        if frame.is_empty():
            return
        yield frame
        end_ms = int(frame[time].dt.epoch("ms").min()) - 1  # type: ignore[arg-type]


def _times(frame: pl.DataFrame) -> pl.Series:
    return frame[next(name for name in ("funding_time", "ts") if name in frame.columns)].dt.epoch("ms")


def _sound_points(what: str, series: Series, frame: pl.DataFrame) -> pl.DataFrame:
    """VenueError when an instant is off the grid, an amount below zero or a fraction above one."""
    times = frame["ts"].dt.epoch("ms")
    off = [ms for ms in times if floor_open(ms, series.interval) != ms]
    values = frame.drop("category", "symbol", "interval", "ts")
    most = 1.0 if series.kind == "long_short" else float("inf")
    bad = [name for name in values.columns if not values[name].is_between(0.0, most).all()]
    if off or bad:
        said = f"{iso(off[0])} is not on its grid" if off else f"an impossible {bad[0]}"
        raise VenueError(f"{what}: the answer holds {said}.")
    return frame


def _no_points(series: Series) -> pl.DataFrame:
    return point_frame(series, Reply(msgspec.Raw(b'{"list":[]}'), 0))
