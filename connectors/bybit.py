"""Public market data of Bybit v5 through pybit: candles, funding and instruments as frames.

pybit sends the request; everything around it is done here, since pybit retries few failures and lets foreign
exceptions through: the rate, the retries, the check of the whole envelope, and the translation of failures
(``failures.py``). Nothing needs a key. Method and field names are the venue's
(https://bybit-exchange.github.io/docs/v5/market/kline and its neighbours), frames are ours.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, Protocol, TypeVar
from urllib.parse import urlsplit

import polars as pl
from pybit.unified_trading import HTTP
from requests.models import Response

from recur.connectors import failures
from recur.connectors.answers import FUNDING_SCHEMA, candle_frame, closed, envelope, funding_frame, rows
from recur.connectors.ratelimit import DEFAULT_BURST, DEFAULT_RATE_PER_S, TokenBucket
from recur.connectors.windows import PAGE_ROWS, Window, verify
from recur.vocabulary import (
    Series,
    UsageError,
    VenueError,
    VenueRefused,
    VenueUnreachable,
    did_you_mean,
    iso,
)

PUBLIC_URL = "https://api.bybit.com"
VENUE_INTERVALS = {
    "1m": "1", "3m": "3", "5m": "5", "15m": "15", "30m": "30", "1h": "60", "2h": "120", "4h": "240",
    "6h": "360", "12h": "720", "1d": "D", "1w": "W", "1M": "M",
}  # fmt: skip
FUNDING_PAGE_ROWS = 200
INSTRUMENT_PAGE_ROWS = 1000
_LONG_AGO_MS = 1
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.25, 8.0
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}

T = TypeVar("T")


class MarketApi(Protocol):
    """The part of ``pybit.unified_trading.HTTP`` in use: keyword arguments as the venue names them."""

    def get_server_time(self) -> Any: ...
    def get_kline(self, **params: Any) -> Any: ...
    def get_mark_price_kline(self, **params: Any) -> Any: ...
    def get_index_price_kline(self, **params: Any) -> Any: ...
    def get_premium_index_price_kline(self, **params: Any) -> Any: ...
    def get_instruments_info(self, **params: Any) -> Any: ...
    def get_funding_rate_history(self, **params: Any) -> Any: ...


class BybitConnector:
    """Asks the venue, from any number of threads at once; one HTTP session per thread.

    ``base_url``    None for the public venue, else e.g. ``http://127.0.0.1:8000``
    ``rate``        requests per second over all threads (the venue allows 120)
    ``workers``     threads a caller should use
    ``timeout_s``   of connecting and of each read
    ``attempts``    of one request, at most; ``deadline_s`` ends the retries of one request earlier
    ``clock``       seconds that never go back; ``sleep`` waits for seconds (and is cut short by ``stop``)

    Every method raises only VenueError and its children (see ``recur.vocabulary``).
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        rate: float = DEFAULT_RATE_PER_S,
        workers: int = 16,
        timeout_s: float = 10.0,
        attempts: int = 5,
        deadline_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.base_url = _checked_url(base_url or PUBLIC_URL)
        self.workers = workers
        self.timeout_s = timeout_s
        self.attempts = attempts
        self.deadline_s = deadline_s
        self.rate = rate
        self._clock = clock
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._bucket = TokenBucket(
            rate, max(1, min(DEFAULT_BURST, int(rate))), clock=clock, sleep=self._sleep
        )
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._requests = 0
        self._halt: tuple[VenueError, float] | None = None  # banned or forbidden, until this clock time

    @property
    def requests(self) -> int:
        """Requests sent so far, retries included."""
        return self._requests

    def stop(self) -> None:
        """End every wait now; later and waiting calls raise VenueUnreachable. For use on Ctrl-C."""
        self._stopped.set()

    # -- questions ------------------------------------------------------------------------------------

    def server_time_ms(self) -> int:
        """The venue's clock."""
        return self._ask("server time", lambda api: api.get_server_time(), lambda reply: int(reply["time"]))

    def candles(self, window: Window) -> pl.DataFrame:
        """The closed bars of ``window`` as a candle frame, sorted: maybe fewer than expected, never wrong.

        A bar counts as closed by the venue's own clock. VenueError when the answer breaks ``windows.verify``.
        """

        def read(reply: dict[str, Any]) -> pl.DataFrame:
            return verify(window, closed(candle_frame(window.series, reply), window.series, reply["time"]))[0]

        return self._ask(
            str(window),
            lambda api: self._kline(api, window.series, window.since_ms, window.until_ms - 1, PAGE_ROWS),
            read,
        )

    def first_open(self, series: Series) -> int | None:
        """Open time of the first bar the venue has (its stated launch time is no lower bound); None if no bar."""

        def read(reply: dict[str, Any]) -> int | None:
            opens = candle_frame(series, reply)["open_time"].dt.epoch("ms")
            return int(opens[0]) if len(opens) else None

        return self._ask(
            f"first bar of {series}", lambda api: self._kline(api, series, _LONG_AGO_MS, None, 1), read
        )

    def funding(self, category: str, symbol: str, since_ms: int, until_ms: int) -> pl.DataFrame:
        """Funding events in ``[since_ms, until_ms)``: category, symbol, funding_time, rate (a fraction), sorted.

        Pages go backward from the end, since the spacing of events changes over a symbol's life.
        """
        pages = [pl.DataFrame(schema=FUNDING_SCHEMA)]
        end_ms = until_ms - 1
        while end_ms >= since_ms:
            page = self._funding_page(category, symbol, since_ms, end_ms)
            if page.is_empty():
                break
            pages.append(page)
            end_ms = int(page["funding_time"].dt.epoch("ms").min()) - 1  # type: ignore[arg-type]
        return pl.concat(pages).sort("funding_time")

    def instruments(self, category: str, **params: str) -> list[dict[str, Any]]:
        """All instruments of ``category`` as the venue describes them; by default those trading now."""
        found: list[dict[str, Any]] = []
        seen: set[str] = set()
        cursor = ""
        while True:
            query: dict[str, Any] = {"category": category, "limit": INSTRUMENT_PAGE_ROWS, **params}
            if cursor:
                query["cursor"] = cursor  # already percent-encoded: goes back as it came
            page, cursor = self._ask(
                f"instruments of {category}",
                lambda api, query=query: api.get_instruments_info(**query),  # type: ignore[misc]
                lambda reply: (rows(reply, dict), str(reply["result"].get("nextPageCursor") or "")),
            )
            found += page
            if not page or not cursor or cursor in seen:
                return found
            seen.add(cursor)

    def check_symbols(self, category: str, symbols: Iterable[str]) -> None:
        """VenueRefused naming the first of ``symbols`` that ``category`` does not have, delisted ones included."""
        wanted = set(symbols)
        known = {str(row.get("symbol")) for row in self.instruments(category)}
        if category != "spot":
            for status in ("PreLaunch", "Delivering", "Closed"):
                if wanted <= known:
                    break
                known |= {str(row.get("symbol")) for row in self.instruments(category, status=status)}
        for symbol in sorted(wanted - known):
            raise VenueRefused(
                f"The venue has no symbol '{symbol}' in category '{category}'.{did_you_mean(symbol, known)}",
                f"It knows {len(known)} {category} symbols, such as {', '.join(sorted(known)[:3]) or 'none'}.",
                10001,
            )

    # -- one request ----------------------------------------------------------------------------------

    def _kline(self, api: MarketApi, series: Series, start_ms: int, end_ms: int | None, limit: int) -> Any:
        method = {
            "trade": api.get_kline,
            "mark": api.get_mark_price_kline,
            "index": api.get_index_price_kline,
            "premium": api.get_premium_index_price_kline,
        }[series.kind]
        params: dict[str, Any] = {
            "category": series.category,
            "symbol": series.symbol,
            "interval": VENUE_INTERVALS[series.interval],
            "start": start_ms,
            "limit": limit,
        }
        if end_ms is not None:
            params["end"] = end_ms
        return method(**params)

    def _funding_page(self, category: str, symbol: str, since_ms: int, end_ms: int) -> pl.DataFrame:
        what = f"funding of {category} {symbol} to {iso(end_ms)}"

        def read(reply: dict[str, Any]) -> pl.DataFrame:
            page = funding_frame(category, symbol, reply)
            times = page["funding_time"].dt.epoch("ms")
            if len(page) and not times.is_between(since_ms, end_ms).all():
                raise VenueError(f"{what}: the answer holds events outside the range that was asked.")
            if times.is_duplicated().any() or not page["rate"].is_finite().all():
                raise VenueError(f"{what}: the answer holds an event twice or a rate that is no number.")
            return page

        return self._ask(
            what,
            lambda api: api.get_funding_rate_history(
                category=category, symbol=symbol, startTime=since_ms, endTime=end_ms, limit=FUNDING_PAGE_ROWS
            ),
            read,
        )

    def _ask(self, what: str, call: Callable[[MarketApi], Any], read: Callable[[dict[str, Any]], T]) -> T:
        """Ask until an answer can be read, asking again cannot help, or attempts or time are used up."""
        started = self._clock()
        attempt = 0
        while True:
            attempt += 1
            self._raise_if_halted()
            self._bucket.take()
            self._raise_if_halted()
            try:
                return read(envelope(self._send(what, call)))
            except _Failed as failed:
                failure, cause = failed.failure, failed.__cause__
            except VenueError as error:  # an answer came, but what it says cannot be
                if what not in error.message:
                    error = VenueError(f"{what}: {error.message}", error.hint)
                failure, cause = failures.Failure(error, again=True), error.__cause__
            if failure.halt_s:
                self._halt = (failure.error, self._clock() + failure.halt_s)
            if failure.wait_s:
                self._bucket.slow_down()
                self._bucket.pause(failure.wait_s)
            wait_s = _backoff_s(attempt)
            late = self._clock() - started + wait_s + failure.wait_s > self.deadline_s
            if not failure.again or attempt >= self.attempts or late:
                _give_up(failure.error, attempt, cause)
            self._sleep(wait_s)

    def _send(self, what: str, call: Callable[[MarketApi], Any]) -> Any:
        with self._lock:
            self._requests += 1
        self._thread.seen = failures.Seen()
        try:
            return call(self._api())
        except Exception as error:
            raise _Failed(failures.classify(error, self._thread.seen, what, self.base_url)) from error

    def _raise_if_halted(self) -> None:
        if self._stopped.is_set():
            raise VenueUnreachable("The fetch was stopped.", "Run the same command again to go on.")
        if self._halt and self._clock() < self._halt[1]:
            raise self._halt[0]

    def _api(self) -> MarketApi:
        api: MarketApi | None = getattr(self._thread, "api", None)
        if api is None:
            api = self._thread.api = self._new_session()
        return api

    def _new_session(self) -> MarketApi:
        with self._lock:  # the constructor touches a logger that all sessions share
            # retry_codes must not be empty, or pybit's defaults apply; code 0 is never looked up.
            session = HTTP(timeout=(min(5.0, self.timeout_s), self.timeout_s), max_retries=1, retry_codes={0})
            _quiet_pybit()
        session.endpoint = self.base_url
        session.client.trust_env = urlsplit(self.base_url).hostname not in _LOOPBACK  # no proxy to ourselves
        session.client.hooks["response"].append(self._remember)
        api: MarketApi = session
        return api

    def _remember(self, response: Response, *_: object, **__: object) -> None:
        """Keep what pybit's exceptions lose; runs in the thread that asked."""
        headers = response.headers
        self._thread.seen = failures.Seen(
            status=response.status_code,
            body="" if response.is_redirect else response.text,
            reset_ms=_int_or_none(headers.get("X-Bapi-Limit-Reset-Timestamp")),
            now_ms=_int_or_none(headers.get("Timenow")) or int(time.time() * 1000),
        )


class _Failed(Exception):
    """Carries a classified failure to the retry loop."""

    def __init__(self, failure: failures.Failure) -> None:
        self.failure = failure


def _give_up(error: VenueError, attempts: int, cause: BaseException | None) -> NoReturn:
    if attempts > 1:
        error.message = f"{error.message.rstrip('.')}; gave up after {attempts} attempts."
        error.args = (error.message,)
    raise error from cause


def _backoff_s(attempt: int) -> float:
    """Doubling, capped, with half of it random so that threads do not come back together."""
    full = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * float(2 ** (attempt - 1)))
    return full * (0.5 + 0.5 * random.random())


def _quiet_pybit() -> None:
    """Undo the handler that pybit installs for itself; records still reach handlers of the application."""
    logging.getLogger("pybit._http_manager").handlers.clear()
    if not logging.getLogger("pybit").handlers:
        logging.getLogger("pybit").addHandler(logging.NullHandler())


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"'{url}' is not a base URL.", "Give it as in https://api.bybit.com, with the scheme."
        )
    return url.rstrip("/")


def _int_or_none(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
