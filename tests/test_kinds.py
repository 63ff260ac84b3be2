"""Open interest, ratios, funding, instruments, delisting and maintenance, from a small exchange over real HTTP.

It follows the venue's documented rules for exactly what is asked here: rows newest first, both ends of a range
inclusive, the newest rows when there are too many.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import polars as pl
import pytest

from recur.connectors.bybit import BybitConnector
from recur.pipeline.fetch import FetchRequest, FetchSummary, plan_fetch, run_fetch
from recur.pipeline.plan import point_interval
from recur.pipeline.symbols import expand
from recur.storage.store import Store
from recur.vocabulary import (
    DAY_MS,
    HOUR_MS,
    DataMissing,
    Series,
    UsageError,
    VenueError,
    VenueRefused,
    parse_time,
)

START = parse_time("2025-07-01")
NOW = parse_time("2025-07-21T00:30")
LAST = parse_time("2025-07-21")
GONE = START + 10 * DAY_MS

Query = dict[str, str]


def instrument(symbol: str, status: str = "Trading", delivery_ms: int = 0) -> dict[str, Any]:
    return {
        "symbol": symbol,
        "status": status,
        "launchTime": str(START - DAY_MS),
        "deliveryTime": str(delivery_ms),
    }


@dataclass
class Exchange:
    """What the venue has. ``hours`` of candles and points that are absent; ``cut`` rows at most in an answer."""

    now_ms: int = NOW
    absent: set[int] = field(default_factory=set)
    absent_points: set[int] = field(default_factory=set)
    maintenance: list[dict[str, str]] = field(default_factory=list)
    cut: int = 1000
    asked: list[str] = field(default_factory=list)
    tickers: list[Any] = field(
        default_factory=lambda: [
            {"symbol": symbol, "turnover24h": amount, "volume24h": "1"}
            for symbol, amount in {"BTCUSDT": "9000", "ETHUSDT": "7000", "SOLUSDC": "8000"}.items()
        ]
    )
    listed: list[dict[str, Any]] = field(
        default_factory=lambda: [
            instrument("BTCUSDT"),
            instrument("ETHUSDT"),
            instrument("SOLUSDC"),
            instrument("GONEUSDT", "Closed", GONE),
        ]
    )

    def answer(self, path: str, query: Query) -> dict[str, Any]:
        self.asked.append(path.rpartition("/v5/")[2])
        kind = path.rpartition("/")[2]
        if kind == "kline":
            return {"list": self._series(query, "start", "end", HOUR_MS, self.absent, self._bar, 1000)}
        if kind == "open-interest":
            step = {"5min": 300_000, "1h": HOUR_MS, "1d": DAY_MS}[query["intervalTime"]]
            return {
                "list": self._series(
                    query, "startTime", "endTime", step, self.absent_points, self._interest, 200
                )
            }
        if kind == "account-ratio":
            return {
                "list": self._series(query, "startTime", "endTime", HOUR_MS, set(), self._ratio, 500),
                "nextPageCursor": "lastid%3D0%26lasttime%3D0",
            }
        if kind == "history":
            return {"list": self._funding(query)}
        if kind == "instruments-info":
            wanted = query.get("status", "Trading")
            return {"list": [row for row in self.listed if row["status"] == wanted], "nextPageCursor": ""}
        if kind == "tickers":
            return {"list": self.tickers}
        if kind == "status":
            return {"list": self.maintenance}
        return {"timeSecond": str(self.now_ms // 1000)}

    def _series(
        self,
        query: Query,
        start: str,
        end: str,
        step: int,
        absent: set[int],
        row: Callable[[int], Any],
        most: int,
    ) -> list[Any]:
        since = max(int(query[start]) // step * step, START)
        until = min(int(query.get(end, self.now_ms)), self.now_ms)
        if query.get("symbol") == "GONEUSDT":
            until = min(until, GONE - 1)
        times = [ms for ms in range(since, until + 1, step) if (ms - START) // step not in absent]
        limit = min(int(query["limit"]), most, self.cut)
        return [row(ms) for ms in (times[-limit:] if end in query else times[:limit])[::-1]]

    def _bar(self, ms: int) -> list[str]:
        return [str(ms), "10", "12", "9", "11", "5", "55"]

    def _interest(self, ms: int) -> dict[str, str]:
        return {"openInterest": str((ms - START) // HOUR_MS + 1), "timestamp": str(ms)}

    def _ratio(self, ms: int) -> dict[str, str]:
        return {"symbol": "BTCUSDT", "buyRatio": "0.6", "sellRatio": "0.4", "timestamp": str(ms)}

    def _funding(self, query: Query) -> list[dict[str, str]]:
        """Every eight hours at first, every hour from the tenth day on."""
        times = [*range(START, GONE, 8 * HOUR_MS), *range(GONE, self.now_ms + 1, HOUR_MS)]
        times = [ms for ms in times if int(query["startTime"]) <= ms <= int(query["endTime"])]
        rows = times[-min(200, self.cut) :][::-1]
        return [
            {"symbol": query["symbol"], "fundingRate": "0.0001", "fundingRateTimestamp": str(ms)}
            for ms in rows
        ]


@pytest.fixture
def exchange() -> Iterator[tuple[Exchange, str]]:
    venue = Exchange()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            result = venue.answer(url.path, dict(parse_qsl(url.query)))
            body = json.dumps({"retCode": 0, "retMsg": "OK", "result": result, "time": venue.now_ms}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield venue, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


Running = tuple[Exchange, str]


def fetch(home: Path, url: str, *symbols: str, **wanted: Any) -> FetchSummary:
    store, connector = Store(home), BybitConnector(url, rate=1000.0, workers=4, attempts=1)
    plan = plan_fetch(store, connector, FetchRequest(symbols or ("BTCUSDT",), **wanted))
    return run_fetch(store, connector, plan)


def gaps(home: Path, kind: str = "trade") -> list[tuple[Any, ...]]:
    """(first hour, last hour + 1, rows, missing, reason) of the recorded gaps."""
    with Store(home).read() as con:
        return con.execute(
            f"""SELECT (epoch_ms(since) - {START}) // {HOUR_MS}, (epoch_ms(until) - {START}) // {HOUR_MS}, "rows",
            missing, reason FROM fetch_windows WHERE status = 'gap' AND kind = ? ORDER BY since""",
            [kind],
        ).fetchall()


# -- kinds ----------------------------------------------------------------------------------------------------


def test_open_interest_and_ratios_fill_their_grid_up_to_the_last_instant(
    exchange: Running, tmp_path: Path
) -> None:
    _, url = exchange
    summary = fetch(tmp_path, url, kinds=("open_interest", "long_short"), since_ms=START)
    n = (LAST - START) // HOUR_MS + 1
    assert n == 481
    assert (summary.windows, summary.new, summary.gaps) == (4, 2 * n, 0)
    assert summary.series == ["bybit:linear:BTCUSDT:1h:open_interest", "bybit:linear:BTCUSDT:1h:long_short"]
    found = Store(tmp_path).points("open_interest", "linear", ["BTCUSDT"], "1h")
    assert found["open_interest"].to_list() == [float(k + 1) for k in range(n)]
    assert found["ts"].dt.epoch("ms").to_list() == list(range(START, LAST + 1, HOUR_MS))
    ratios = Store(tmp_path).points("long_short", "linear", ["BTCUSDT"], "1h")
    assert ratios.select("buy_ratio", "sell_ratio").unique().rows() == [(0.6, 0.4)]


def test_points_before_the_listing_are_not_asked_for(exchange: Running, tmp_path: Path) -> None:
    _, url = exchange
    summary = fetch(
        tmp_path, url, kinds=("long_short",), since_ms=START - 100 * DAY_MS, until_ms=START + DAY_MS
    )
    assert (summary.windows, summary.requests, summary.new) == (1, 1, 24)
    assert gaps(tmp_path, "long_short") == [(-2400, 0, 0, 2400, "before listing")]


def test_points_are_fetched_again_only_at_their_end(exchange: Running, tmp_path: Path) -> None:
    venue, url = exchange
    fetch(tmp_path, url, kinds=("open_interest",), since_ms=START)
    venue.now_ms += 2 * HOUR_MS
    summary = fetch(tmp_path, url, kinds=("open_interest",))
    assert (summary.windows, summary.new, summary.changed) == (1, 2, 0)


def test_a_hole_in_the_points_is_asked_again_and_recorded(exchange: Running, tmp_path: Path) -> None:
    venue, url = exchange
    venue.absent_points = {5, 6}
    summary = fetch(tmp_path, url, kinds=("open_interest",), since_ms=START, until_ms=START + DAY_MS)
    assert (summary.new, summary.gaps, summary.missing, summary.reasons) == (22, 1, 2, {"venue empty": 2})
    assert gaps(tmp_path, "open_interest") == [(0, 24, 22, 2, "venue empty")]
    assert Store(tmp_path).windows(Series("linear", "BTCUSDT", "1h", "open_interest")) == [
        (START, START + DAY_MS)
    ]


@pytest.mark.parametrize(
    ("interval", "points"),
    [
        *(("1m", "5m"), ("3m", "5m"), ("5m", "5m"), ("30m", "30m"), ("2h", "1h"), ("6h", "1h")),
        *(("12h", "4h"), ("1d", "1d"), ("1w", "1d"), ("1M", "1d")),
    ],
)
def test_points_have_the_coarsest_spacing_that_divides_a_bar(interval: str, points: str) -> None:
    assert point_interval(interval) == points


def test_funding_is_complete_over_a_change_of_its_interval(exchange: Running, tmp_path: Path) -> None:
    venue, url = exchange
    venue.cut = 50
    summary = fetch(tmp_path, url, kinds=("funding",), since_ms=START)
    times = Store(tmp_path).funding("linear", ["BTCUSDT"])["funding_time"].dt.epoch("ms").to_list()
    assert times == [*range(START, GONE, 8 * HOUR_MS), *range(GONE, NOW, HOUR_MS)]
    assert summary.new == len(times) == 271


def test_a_snapshot_holds_delisted_instruments_and_turnover(exchange: Running, tmp_path: Path) -> None:
    _, url = exchange
    summary = fetch(tmp_path, url, kinds=("instruments",))
    assert (summary.new, summary.series) == (4, ["bybit:linear:instruments"])
    store = Store(tmp_path)
    found = store.instruments("linear").select("symbol", "status", "turnover_24h").rows()
    assert found == [
        ("BTCUSDT", "Trading", 9000.0),
        ("ETHUSDT", "Trading", 7000.0),
        ("GONEUSDT", "Closed", None),
        ("SOLUSDC", "Trading", 8000.0),
    ]
    assert store.universe("linear", GONE - 1)["symbol"].to_list() == [
        "BTCUSDT", "ETHUSDT", "GONEUSDT", "SOLUSDC"
    ]  # fmt: skip
    assert "GONEUSDT" not in store.universe("linear", GONE)["symbol"].to_list()


def test_a_snapshot_that_fails_does_not_cost_the_candles(exchange: Running, tmp_path: Path) -> None:
    venue, url = exchange
    tickers = venue.tickers
    venue.tickers = ["BTCUSDT"]
    with pytest.raises(VenueError, match="tickers of linear: The answer's list is not a list of rows"):
        fetch(tmp_path, url, kinds=("candles", "instruments"), since_ms=START)
    store = Store(tmp_path)
    assert store.candles("linear", ["BTCUSDT"], "1h").height == 480
    assert store.instruments("linear").is_empty()
    venue.tickers = tickers
    assert fetch(tmp_path, url, kinds=("candles", "instruments")).new == 4


def test_the_plan_counts_the_requests_of_every_kind(exchange: Running, tmp_path: Path) -> None:
    _, url = exchange
    kinds = ("candles", "funding", "open_interest", "long_short", "instruments")
    connector = BybitConnector(url, rate=100.0)
    plan = plan_fetch(Store(tmp_path), connector, FetchRequest(("BTCUSDT",), kinds=kinds, since_ms=START))
    assert (len(plan.windows), len(plan.funding), plan.n_tasks) == (1 + 3 + 1, 1, 7)
    assert (
        plan.n_requests == 5 + 3 + 5
    )  # windows; funding and its empty page twice; four statuses and tickers
    assert plan.seconds == 0.13


# -- gaps and their reasons -------------------------------------------------------------------------------------


def test_an_answer_cut_short_is_asked_on_until_nothing_new_comes(exchange: Running, tmp_path: Path) -> None:
    venue, url = exchange
    venue.cut = 100
    venue.absent = {7}
    summary = fetch(tmp_path, url, since_ms=START)
    assert (summary.new, summary.missing) == (479, 1)
    assert gaps(tmp_path) == [(0, 480, 479, 1, "venue empty")]


def test_gaps_say_maintenance_where_the_venue_announced_one(exchange: Running, tmp_path: Path) -> None:
    venue, url = exchange
    venue.absent = {100, 101, 300}
    venue.maintenance = [{"begin": str(START + 100 * HOUR_MS), "end": str(START + 102 * HOUR_MS)}]
    summary = fetch(tmp_path, url, since_ms=START)
    assert summary.reasons == {"maintenance": 2, "venue empty": 1}
    assert (summary.gaps, summary.missing, summary.windows) == (1, 3, 1)
    assert gaps(tmp_path) == [(0, 300, 298, 2, "maintenance"), (300, 480, 179, 1, "venue empty")]
    assert venue.asked.count("system/status") == 1


def test_nothing_is_asked_after_a_delisting(exchange: Running, tmp_path: Path) -> None:
    venue, url = exchange
    summary = fetch(tmp_path, url, "GONEUSDT", since_ms=START)
    assert (summary.new, summary.gaps, summary.reasons) == (240, 0, {"delisted": 240})
    assert gaps(tmp_path) == [(240, 480, 0, 240, "delisted")]
    venue.asked.clear()
    venue.now_ms += 5 * HOUR_MS
    assert fetch(tmp_path, url, "GONEUSDT").requests == 0
    assert gaps(tmp_path)[-1] == (480, 485, 0, 5, "delisted")


def test_a_symbol_added_later_starts_by_itself_and_leaves_the_others_alone(
    exchange: Running, tmp_path: Path
) -> None:
    _, url = exchange
    fetch(tmp_path, url, since_ms=LAST - 5 * DAY_MS)
    fetch(tmp_path, url, "BTCUSDT", "ETHUSDT", first_days=10)
    store = Store(tmp_path)
    since = [store.windows(Series("linear", symbol, "1h"))[0][0] for symbol in ("BTCUSDT", "ETHUSDT")]
    assert since == [LAST - 5 * DAY_MS, LAST - 10 * DAY_MS]
    fetch(tmp_path, url, "BTCUSDT", days=7)
    assert store.windows(Series("linear", "BTCUSDT", "1h"))[0][0] == LAST - 7 * DAY_MS


def test_a_bar_is_asked_for_only_when_it_has_been_closed_for_the_lag(
    exchange: Running, tmp_path: Path
) -> None:
    venue, url = exchange
    venue.now_ms = LAST + 1500
    assert fetch(tmp_path, url, since_ms=START, lag_ms=2000).new == 479
    venue.now_ms = LAST + 2000
    assert fetch(tmp_path, url, lag_ms=2000).new == 1


def test_rows_are_first_seen_at_the_venue_s_clock_and_the_drift_is_told(
    exchange: Running, tmp_path: Path
) -> None:
    _, url = exchange
    summary = fetch(tmp_path, url, since_ms=START)
    assert summary.clock_drift_s < -1e6  # this exchange lives in the past
    with Store(tmp_path).read() as con:
        assert con.execute("SELECT DISTINCT epoch_ms(first_seen) FROM candles").fetchall() == [(NOW,)]


@pytest.mark.parametrize("kind", ["open_interest", "long_short", "funding", "mark", "index", "premium"])
def test_what_spot_lacks_is_refused_in_one_line(exchange: Running, tmp_path: Path, kind: str) -> None:
    with pytest.raises(UsageError, match=f"^The venue has no {kind} data for category 'spot'.$"):
        fetch(tmp_path, exchange[1], category="spot", kinds=("candles", kind))


# -- which symbols ----------------------------------------------------------------------------------------------


def symbols(url: str, home: Path, *words: str, category: str = "linear") -> tuple[str, ...]:
    return expand(words, category, BybitConnector(url, rate=1000.0, attempts=1), Store(home))


def test_patterns_find_what_trades_now_and_names_stay_in_their_place(
    exchange: Running, tmp_path: Path
) -> None:
    _, url = exchange
    assert symbols(url, tmp_path, "GONEUSDT", "*usdt", "BTC/USDT:USDT") == ("GONEUSDT", "BTCUSDT", "ETHUSDT")
    assert symbols(url, tmp_path, "top:2") == ("BTCUSDT", "SOLUSDC")
    with pytest.raises(UsageError, match=r"No linear symbol that trades now fits '\*EUR'"):
        symbols(url, tmp_path, "*EUR")
    with pytest.raises(UsageError, match="Cannot read 'top:many'"):
        symbols(url, tmp_path, "top:many")
    with pytest.raises(VenueRefused, match="no symbol 'BTCUSD'"):
        fetch(tmp_path, url, "BTCUSD")


def test_the_most_traded_of_a_past_day_come_from_what_could_be_traded_then(
    exchange: Running, tmp_path: Path
) -> None:
    _, url = exchange
    at = GONE - DAY_MS
    with pytest.raises(DataMissing, match="does not know which linear symbols could be traded"):
        symbols(url, tmp_path, "top:2@2025-07-10")
    fetch(tmp_path, url, kinds=("instruments",))
    with pytest.raises(DataMissing, match="no turnover for 4 of the 4 linear symbols"):
        symbols(url, tmp_path, "top:2@2025-07-10")
    opens = pl.Series([at - DAY_MS, at, at + DAY_MS]).cast(pl.Datetime("ms", "UTC"))
    for symbol, turnover in {"BTCUSDT": 5.0, "ETHUSDT": 1.0, "GONEUSDT": 9.0, "SOLUSDC": 2.0}.items():
        # What comes later must not count: it would put ETHUSDT first.
        later = 1000.0 if symbol == "ETHUSDT" else 1.0
        bars = pl.DataFrame({"open_time": opens}).with_columns(
            *(
                pl.lit(v).alias(k)
                for k, v in {"category": "linear", "symbol": symbol, "interval": "1d"}.items()
            ),
            pl.lit("trade").alias("kind"),
            *(pl.lit(1.0).alias(name) for name in ("open", "high", "low", "close", "volume")),
            pl.Series("turnover", [turnover, later, later]),
        )
        Store(tmp_path).put_candles(bars, source="file", now_ms=NOW)
    assert symbols(url, tmp_path, "top:2@2025-07-10") == ("GONEUSDT", "BTCUSDT")
