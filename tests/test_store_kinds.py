"""Open interest, long/short ratios, instruments, news and scores in the store; upgrading an old store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from recur.storage import schema
from recur.storage.frames import (
    INSTRUMENT_SCHEMA,
    LONG_SHORT_SCHEMA,
    NEWS_SCHEMA,
    OPEN_INTEREST_SCHEMA,
    SENTIMENT_SCHEMA,
)
from recur.storage.store import PutResult, Store
from recur.vocabulary import DAY_MS, HOUR_MS, Series, parse_time
from tests.market import candles, funding_frame

T0 = parse_time("2025-07-01")
TIME = pl.Datetime("ms", "UTC")


def at(*times: int | None) -> pl.Series:
    return pl.Series(times, dtype=pl.Int64).cast(TIME)


def interest(values: list[float], first: int = 0, symbol: str = "BTCUSDT") -> pl.DataFrame:
    times = [T0 + HOUR_MS * (first + k) for k in range(len(values))]
    return pl.DataFrame(
        {"category": "linear", "symbol": symbol, "interval": "1h", "ts": at(*times), "open_interest": values},
        schema=OPEN_INTEREST_SCHEMA,
    )


OI = Series("linear", "BTCUSDT", "1h", "open_interest")


def test_open_interest_is_stored_with_its_window_revised_and_read_as_of_then(tmp_path: Path) -> None:
    store = Store(tmp_path)
    asked = [(OI, T0, T0 + 3 * HOUR_MS)]
    put = store.put_points("open_interest", interest([1.0, 2.0, 3.0]), source="x", now_ms=1, windows=asked)
    assert put == PutResult(new=3)
    again = store.put_points("open_interest", interest([9.0], 1), source="x", now_ms=5)
    assert again == PutResult(changed=1)
    read = store.points("open_interest", "linear", ["BTCUSDT"], "1h")
    assert read.schema == OPEN_INTEREST_SCHEMA and read["open_interest"].to_list() == [1.0, 9.0, 3.0]
    before = store.points("open_interest", "linear", as_of_ms=4)
    assert before["open_interest"].to_list() == [1.0, 2.0, 3.0]
    assert store.points("open_interest", since_ms=T0 + 1, until_ms=T0 + 2 * HOUR_MS)["ts"].to_list() == [
        at(T0 + HOUR_MS).item()
    ]
    assert store.windows(OI) == [(T0, T0 + 3 * HOUR_MS)]
    assert store.last_open(OI) == T0 + 2 * HOUR_MS


def test_a_window_of_points_that_the_venue_leaves_short_is_recorded_as_a_gap(tmp_path: Path) -> None:
    store = Store(tmp_path)
    asked = [(OI, T0, T0 + 4 * HOUR_MS)]
    store.put_points("open_interest", interest([1.0, 2.0]), source="x", now_ms=1, windows=asked)
    empty = [(Series("linear", "BTCUSDT", "1h", "long_short"), T0, T0 + HOUR_MS)]
    store.put_points("long_short", LONG_SHORT_SCHEMA.to_frame(), source="x", now_ms=1, windows=empty)
    assert store.asked(OI) == [(T0, T0 + 4 * HOUR_MS, "gap", "venue empty")]
    assert store.asked(empty[0][0]) == [(T0, T0 + HOUR_MS, "gap", "venue empty")]


def test_a_whole_record_of_what_was_asked_is_kept_as_it_is(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = (OI, T0, T0 + 4 * HOUR_MS, 4, 2, "gap", "maintenance")
    store.put_points("open_interest", interest([1.0, 2.0]), source="x", now_ms=1, windows=[record])
    assert store.asked(OI) == [(T0, T0 + 4 * HOUR_MS, "gap", "maintenance")]


def test_a_table_of_points_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Did you mean 'long_short'"):
        Store(tmp_path).put_points("longshort", LONG_SHORT_SCHEMA.to_frame(), source="x", now_ms=1)


def test_funding_is_read_as_it_was_known_then(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_funding(funding_frame("BTCUSDT", T0, 2), source="x", now_ms=10)
    changed = funding_frame("BTCUSDT", T0, 1).with_columns(pl.lit(0.5).alias("rate"))
    store.put_funding(changed, source="x", now_ms=20)
    assert store.funding()["rate"].to_list() == [0.5, 0.0002]
    assert store.funding(as_of_ms=19)["rate"].to_list() == [0.0001, 0.0002]
    assert store.funding(as_of_ms=9).is_empty()


def instrument(symbol: str, **facts: Any) -> pl.DataFrame:
    row: dict[str, Any] = {"category": "linear", "symbol": symbol, "status": "Trading", "tick_size": 0.1}
    row |= facts
    for name in ("launch_time", "delivery_time"):
        row[name] = at(row.get(name)).item()
    return pl.DataFrame([row], schema_overrides={k: INSTRUMENT_SCHEMA[k] for k in row})


def test_instruments_are_snapshots_that_grow_only_when_something_changed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    btc = instrument("BTCUSDT", launch_time=T0, turnover_24h=5.0)
    assert store.put_instruments(btc, source="x", now_ms=T0) == PutResult(new=1)
    assert store.put_instruments(btc, source="x", now_ms=T0 + 1) == PutResult(same=1)
    busier = instrument("BTCUSDT", launch_time=T0, turnover_24h=6.0)
    assert store.put_instruments(busier, source="x", now_ms=T0 + HOUR_MS) == PutResult(same=1)
    assert store.put_instruments(busier, source="x", now_ms=T0 + DAY_MS) == PutResult(changed=1)
    finer = instrument("BTCUSDT", launch_time=T0, turnover_24h=6.0, tick_size=0.01)
    assert store.put_instruments(finer, source="x", now_ms=T0 + DAY_MS + 1) == PutResult(changed=1)
    assert store.instruments()["tick_size"].to_list() == [0.01]
    assert store.instruments("linear", T0 + DAY_MS)["turnover_24h"].to_list() == [6.0]
    assert store.instruments("linear", T0)["turnover_24h"].to_list() == [5.0]
    assert store.instruments("spot").is_empty()


def test_the_universe_of_a_day_holds_what_was_launched_and_not_yet_delivered(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = [
        instrument("OLDUSDT", launch_time=T0 - 10 * DAY_MS),
        instrument("DEADUSDT", status="Closed", launch_time=T0 - 9 * DAY_MS, delivery_time=T0 - 2 * DAY_MS),
        instrument("NEWUSDT", launch_time=T0 + DAY_MS),
        instrument("NODATEUSDT"),
        instrument("EARLYUSDT", launch_time=T0 + DAY_MS),
    ]
    store.put_instruments(pl.concat(rows, how="diagonal"), source="x", now_ms=T0)
    store.put_candles(candles("EARLYUSDT", T0 - 5 * DAY_MS, 3), source="x", now_ms=T0)

    def names(when: int) -> list[str]:
        return store.universe("linear", when)["symbol"].to_list()

    assert names(T0 - 20 * DAY_MS) == []
    assert names(T0 - 5 * DAY_MS) == ["DEADUSDT", "EARLYUSDT", "OLDUSDT"]
    assert names(T0 - 2 * DAY_MS) == ["EARLYUSDT", "OLDUSDT"]
    assert names(T0) == ["EARLYUSDT", "NODATEUSDT", "OLDUSDT"]
    assert names(T0 + DAY_MS) == ["EARLYUSDT", "NEWUSDT", "NODATEUSDT", "OLDUSDT"]


def test_a_universe_is_described_by_what_was_seen_by_then(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for day, turnover in enumerate((1.0, 2.0, 3.0)):
        row = instrument("BTCUSDT", launch_time=T0 - DAY_MS, turnover_24h=turnover)
        store.put_instruments(row, source="x", now_ms=T0 + day * DAY_MS)
    seen = [
        store.universe("linear", T0 + hours * HOUR_MS)["turnover_24h"].item() for hours in (-1, 0, 30, 60)
    ]
    assert seen == [1.0, 1.0, 2.0, 3.0]


def item(news_id: str, title: str = "Up", published: int = T0, **more: Any) -> pl.DataFrame:
    row: dict[str, Any] = {"news_id": news_id, "published_at": at(published).item()}
    row |= {"published_precision": "minute"}
    row |= {"title": title, "body": "b", "url": "u", "tags": '["btc"]', "story_id": news_id} | more
    return pl.DataFrame([row], schema_overrides={k: NEWS_SCHEMA[k] for k in row})


def test_an_edited_news_item_is_a_new_version_and_the_old_one_is_read_as_of_then(tmp_path: Path) -> None:
    store = Store(tmp_path)
    both = pl.concat([item("a"), item("b", published=T0 + 5)])
    assert store.put_news(both, source="feed", now_ms=100) == PutResult(new=2)
    assert store.put_news(item("a", story_id="other"), source="feed", now_ms=150) == PutResult(same=1)
    assert store.put_news(item("a", "Down"), source="feed", now_ms=200) == PutResult(changed=1)
    now = store.news()
    assert now.schema == NEWS_SCHEMA
    assert now.select("news_id", "title", "version", "source").rows() == [
        ("a", "Down", 2, "feed"),
        ("b", "Up", 1, "feed"),
    ]
    assert now["first_seen"].dt.epoch("ms").to_list() == [200, 100]
    assert store.news(as_of_ms=199).select("title", "version").rows() == [("Up", 1), ("Up", 1)]
    assert store.news(as_of_ms=99).is_empty()
    assert store.news(since_ms=T0 + 1, until_ms=T0 + 6)["news_id"].to_list() == ["b"]


def test_news_without_an_id_or_with_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="unknown precision of news: hour"):
        store.put_news(item("a", published_precision="hour"), source="x", now_ms=1)
    with pytest.raises(ValueError, match="news_id"):
        store.put_news(item("a").with_columns(pl.lit(None, pl.String).alias("news_id")), source="x", now_ms=1)
    assert store.news().is_empty()


def test_scores_are_kept_once_per_version_and_run_and_what_is_unscored_is_known(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_news(pl.concat([item("a"), item("b")]), source="x", now_ms=1)
    store.put_news(item("a", "Down"), source="x", now_ms=2)
    left = store.unscored("run-1").select("news_id", "version").rows()
    assert left == [("a", 1), ("a", 2), ("b", 1)]
    scores = pl.DataFrame(
        [
            ("a", 1, "run-1", at(9).item(), 0.1, 0.2, 0.7, False),
            ("a", 2, "run-1", at(9).item(), 0.7, 0.2, 0.1, True),
        ],
        schema=SENTIMENT_SCHEMA,
        orient="row",
    )
    assert store.put_sentiment(scores) == 2
    assert store.put_sentiment(scores.with_columns(pl.lit(0.0).alias("p_negative"))) == 0
    assert store.unscored("run-1").select("news_id", "version").rows() == [("b", 1)]
    assert store.unscored("run-2").height == 3
    assert store.sentiment("run-1").equals(scores) and store.sentiment("run-2").is_empty()


def test_a_store_of_version_1_is_upgraded_in_place_and_keeps_its_rows(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with duckdb.connect(str(store.path)) as con:
        con.execute("CREATE TABLE schema_version (version INTEGER, applied_at TIMESTAMP_MS)")
        for statement in schema.STEPS[0]:
            con.execute(statement)
        con.execute("INSERT INTO schema_version VALUES (1, make_timestamp_ms(0))")
        con.execute(
            """INSERT INTO candles VALUES ('linear', 'BTCUSDT', '1h', 'trade', make_timestamp_ms(?), 1, 2, 0.5, 1.5, 9,
            NULL, 'bybit', make_timestamp_ms(7))""",
            [T0],
        )
        con.execute(
            "INSERT INTO news VALUES ('n', make_timestamp_ms(0), make_timestamp_ms(1), 't', 'b', 'u', 's', ['x', 'y'], 1)"
        )
        con.execute(
            """INSERT INTO open_interest VALUES ('linear', 'BTCUSDT', '1h', make_timestamp_ms(?), 4.0,
            make_timestamp_ms(1))""",
            [T0],
        )
    assert store.candles().select("close", "turnover").rows() == [(1.5, None)]
    assert store.news()["tags"].to_list() == ['["x","y"]']
    assert store.points("open_interest")["open_interest"].to_list() == [4.0]
    store.put_instruments(instrument("BTCUSDT"), source="x", now_ms=1)
    with store.read() as con:
        versions = con.execute("SELECT version FROM schema_version ORDER BY version").fetchall()
    assert versions == [(n,) for n in range(1, schema.VERSION + 1)]


def test_an_upgrade_that_fails_leaves_the_old_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.put_instruments(instrument("BTCUSDT"), source="x", now_ms=1)
    broken = ("CREATE TABLE half (x INTEGER)", "SELECT * FROM nowhere")
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, broken))
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    with pytest.raises(duckdb.CatalogException, match="nowhere"):
        store.put_instruments(instrument("ETHUSDT"), source="x", now_ms=1)
    monkeypatch.undo()
    assert store.instruments()["symbol"].to_list() == ["BTCUSDT"]
    with store.read() as con:
        assert con.execute("SELECT 1 FROM duckdb_tables() WHERE table_name = 'half'").fetchall() == []
