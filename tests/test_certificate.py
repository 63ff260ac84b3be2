"""The certificate: holes with reasons, counts by their rules, hashes of content, and what training refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recur import cli
from recur.connectors.files import read_candles
from recur.pipeline.backtest import run_backtest
from recur.pipeline.certificate import UNEXPLAINED, Hole, certify, content_hash, holes, outliers
from recur.pipeline.config import Config
from recur.pipeline.load import refuse_unexplained, stored_series
from recur.pipeline.train import train_price
from recur.storage.store import CANDLE_SCHEMA, Store, WindowRows
from recur.vocabulary import DAY_MS, HOUR_MS, DataMissing, Series, iso, parse_time
from tests.market import candles, funding_frame

T0 = parse_time("2025-07-01")
BTC = Series("linear", "BTCUSDT", "1h")
REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "candles_binance_spot_1h.parquet"


def hour(n: float) -> int:
    return T0 + int(n * HOUR_MS)


def times(*hours: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([hour(n) for n in hours], dtype=np.int64)


def test_a_hole_takes_the_reason_of_the_last_request_and_is_cut_where_reasons_change() -> None:
    asked = [
        (hour(0), hour(6), "gap", "venue empty"),
        (hour(4), hour(9), "gap", "maintenance"),
        (hour(20), hour(22), "done", ""),
    ]
    assert holes(times(0, 1, 8, 12, 20), "1h", asked) == [
        Hole(hour(2), hour(4), 2, "venue empty"),
        Hole(hour(4), hour(8), 4, "maintenance"),
        Hole(hour(9), hour(12), 3, UNEXPLAINED),
        Hole(hour(13), hour(20), 7, UNEXPLAINED),
        Hole(hour(21), hour(22), 1, UNEXPLAINED),  # recorded as complete, and is not
    ]


def test_before_the_first_and_after_the_last_row_only_what_was_asked_counts() -> None:
    asked = [
        (hour(-5), hour(-3), "gap", "before listing"),
        (hour(-2), hour(2), "gap", "before listing"),
        (hour(2), hour(4), "gap", "delisted"),
        (hour(9), hour(9), "done", "start of the record"),
    ]
    assert holes(times(0, 1), "1h", asked) == [
        Hole(hour(-5), hour(-3), 2, "before listing"),
        Hole(hour(-2), hour(0), 2, "before listing"),
        Hole(hour(2), hour(4), 2, "delisted"),
    ]
    assert holes(times(0, 1), "1h", []) == [] == holes(times(), "1h", asked)


def test_months_and_weeks_have_their_own_grid() -> None:
    months = np.array([parse_time(day) for day in ("2025-01-01", "2025-02-01", "2025-05-01")])
    assert holes(months, "1M", []) == [
        Hole(parse_time("2025-03-01"), parse_time("2025-05-01"), 2, UNEXPLAINED)
    ]
    weeks = np.array([parse_time(day) for day in ("2025-06-02", "2025-06-16")])
    assert holes(weeks, "1w", []) == [
        Hole(parse_time("2025-06-09"), parse_time("2025-06-16"), 1, UNEXPLAINED)
    ]


@given(
    st.sets(st.integers(0, 40), min_size=1),
    st.lists(st.tuples(st.integers(-5, 45), st.integers(0, 12), st.booleans()), max_size=6),
)
def test_rows_and_holes_together_are_the_grid_and_never_overlap(
    present: set[int], asks: list[tuple[int, int, bool]]
) -> None:
    asked = [(hour(a), hour(a + n), "gap" if gap else "done", f"r{i}") for i, (a, n, gap) in enumerate(asks)]
    found = holes(times(*sorted(present)), "1h", asked)
    absent = [k for h in found for k in range(h.since_ms, h.until_ms, HOUR_MS)]
    assert len(absent) == len(set(absent)) == sum(h.bars for h in found)
    assert absent == sorted(absent) and not set(absent) & {hour(n) for n in present}
    inside = {hour(n) for n in range(min(present), max(present))} - {hour(n) for n in present}
    assert inside <= set(absent)
    for ms in absent:
        last = [a for a in asked if a[0] <= ms < a[1]][-1:]
        reason = last[0][3] if last and last[0][2] == "gap" else UNEXPLAINED
        assert [h.reason for h in found if h.since_ms <= ms < h.until_ms] == [reason]


def test_outliers_are_counted_between_neighbouring_bars_only() -> None:
    close = 100 * np.exp(np.cumsum(np.random.default_rng(0).normal(0, 0.01, 60)))
    at = times(*range(60))
    assert outliers(at, close, "1h") == 0
    jumped = close.copy()
    jumped[40:] *= 1.5
    assert outliers(at, jumped, "1h") == 1
    assert outliers(np.delete(at, 40), np.delete(jumped, 40), "1h") == 0  # across a gap nothing is known
    assert outliers(at, np.full(60, 7.0), "1h") == 0


def test_the_hash_of_a_series_is_what_its_description_says() -> None:
    frame = pl.DataFrame(
        {"ts": pl.Series([T0, T0 + 1], dtype=pl.Int64).cast(pl.Datetime("ms", "UTC")), "x": [-0.0, None]}
    )
    plain = (
        b"name\nts,x\n"
        + struct.pack("<qq", T0, T0 + 1)
        + struct.pack("<d", 0.0)
        + bytes.fromhex("000000000000f87f")
    )
    assert content_hash("name", frame) == hashlib.sha256(plain).hexdigest()


def test_two_stores_with_the_same_rows_have_one_hash_and_a_changed_digit_another(tmp_path: Path) -> None:
    frame, funding = candles("BTCUSDT", T0, 50), funding_frame("BTCUSDT", T0, 3)
    first, second = Store(tmp_path / "a"), Store(tmp_path / "b")
    first.put_candles(frame, source="file", now_ms=1)
    first.put_funding(funding, source="file", now_ms=1)
    second.put_funding(funding.reverse(), source="venue", now_ms=9)
    for part in (frame[30:], frame[:10], frame[5:35]):
        second.put_candles(part, source="venue", now_ms=9)
    one, other = certify(first, T0), certify(second, T0)
    assert one["sha256"] == other["sha256"]
    assert [r["sha256"] for r in one["series"]] == [r["sha256"] for r in other["series"]]
    second.put_candles(frame[:1].with_columns(pl.col("close") * (1 + 1e-15)), source="venue", now_ms=10)
    assert certify(second, T0)["sha256"] != one["sha256"]
    assert certify(second, T0)["series"][0]["revisions"] == 1


def test_a_copied_file_and_an_exported_backup_restore_the_same_content(tmp_path: Path) -> None:
    store, frame = Store(tmp_path / "a"), candles("BTCUSDT", T0, 51)
    store.put_candles(frame[:50], source="file", now_ms=1)
    store.put_funding(funding_frame("BTCUSDT", T0, 3), source="file", now_ms=1)
    with store.session():
        store.put_candles(candles("ETHUSDT", T0, 50), source="file", now_ms=1)
    assert [path.name for path in store.home.iterdir()] == ["market.duckdb"]  # no log: the file is everything
    copied, imported = Store(tmp_path / "b"), Store(tmp_path / "c")
    for other in (copied, imported):
        other.home.mkdir()
    shutil.copy(store.path, copied.path)
    with duckdb.connect(str(store.path), read_only=True) as con:
        con.execute(f"EXPORT DATABASE '{tmp_path / 'backup'}' (FORMAT parquet)")
    with duckdb.connect(str(imported.path)) as con:
        con.execute(f"IMPORT DATABASE '{tmp_path / 'backup'}'")
    expected = certify(store, T0)
    assert certify(copied, T0) == expected == certify(imported, T0)
    again = imported.put_candles(frame, source="venue", now_ms=2)
    assert (again.new, again.same) == (1, 50)


def test_a_certificate_counts_rows_gaps_quiet_bars_and_what_is_still_to_come(tmp_path: Path) -> None:
    store = Store(tmp_path)
    frame = candles("BTCUSDT", T0, 50).with_columns(
        pl.when(pl.int_range(pl.len()) == 3).then(0.0).otherwise("volume").alias("volume")
    )
    kept = frame.filter(~pl.col("open_time").dt.epoch("ms").is_in([hour(10), hour(11), hour(20)]))
    window = WindowRows(BTC, hour(-2), hour(50), kept, 52, "gap", "venue empty")
    store.put_windows([window], source="x", now_ms=T0)
    store.put_funding(funding_frame("BTCUSDT", T0, 2), source="x", now_ms=T0)
    found = certify(store, hour(53.5))
    (row,), (funding,) = found["series"], found["measures"]
    assert row["series"] == "bybit:linear:BTCUSDT:1h"
    expected = {"rows": 47, "gaps": 2, "missing": 3, "unexplained": 0, "zero_volume": 1, "revisions": 0}
    assert {key: row[key] for key in expected} == expected
    assert (row["first"], row["last"], row["age_hours"], row["behind"]) == (iso(T0), iso(hour(49)), 4.5, 3)
    assert [(h["since"], h["bars"], h["reason"]) for h in row["holes"]] == [
        (iso(hour(-2)), 2, "venue empty"),
        (iso(hour(10)), 2, "venue empty"),
        (iso(hour(20)), 1, "venue empty"),
    ]
    assert (funding["series"], funding["rows"], funding["gaps"]) == ("bybit:linear:BTCUSDT:funding", 2, None)


@pytest.mark.skipif(not REAL.exists(), reason="the shared real candles are not here")
def test_the_real_outages_of_an_exchange_are_found_listed_and_explained(tmp_path: Path) -> None:
    store = Store(tmp_path)
    frame = read_candles(REAL, category="spot").filter(pl.col("symbol") == "BTCUSDT")
    store.put_candles(frame, source="file", now_ms=T0)
    (row,) = certify(store, T0)["series"]
    assert (row["rows"], row["gaps"], row["missing"], row["unexplained"]) == (71050, 28, 128, 0)
    assert (row["zero_volume"], len(row["holes"])) == (4, 28)
    assert {hole["reason"] for hole in row["holes"]} == {"absent in file"}
    assert max((hole["bars"], hole["until"]) for hole in row["holes"]) == (33, "2018-02-09T10:00:00Z")


def two_pieces(home: Path) -> Store:
    """A series of two parts; what lies between was never asked for."""
    store = Store(home)
    frame = candles("BTCUSDT", T0, 24 * 60)
    for part in (frame[:700], frame[730:]):
        first = int(part["open_time"].dt.epoch("ms")[0])
        window = WindowRows(BTC, first, first + part.height * HOUR_MS, part, part.height)
        store.put_windows([window], source="x", now_ms=T0)
    return store


def configured() -> Config:
    config = Config()
    return replace(config, market=replace(config.market, symbols=("BTCUSDT",)))


def test_training_and_backtests_refuse_a_range_with_an_unexplained_hole(tmp_path: Path) -> None:
    two_pieces(tmp_path)
    message = "lacks 30 bars in 1 holes that nothing explains, the first 2025-07-30T04:00:00Z to 2025-07-31T10:00:00Z"
    with pytest.raises(DataMissing, match=message) as caught:
        train_price(tmp_path, configured(), resume=None, progress=False)
    assert caught.value.exit_code == 3 and "--allow-gaps" in caught.value.hint
    with pytest.raises(DataMissing, match="nothing explains"):
        run_backtest(tmp_path, configured(), run=None, progress=False)


def test_allowed_gaps_are_trained_on(tmp_path: Path) -> None:
    two_pieces(tmp_path)
    config = configured()
    config = replace(
        config,
        model=replace(config.model, hidden=4, layers=1),
        train=replace(config.train, epochs=1, window=32, burn_in=8, val_days=10, device="cpu"),
    )
    metrics = train_price(tmp_path, config, resume=None, progress=False, allow_gaps=True)
    assert len(metrics["val_pinball"]) == 1


def test_a_range_beside_the_hole_and_an_explained_hole_are_not_refused(tmp_path: Path) -> None:
    store = two_pieces(tmp_path)
    refuse_unexplained(store, configured(), None, hour(700))
    refuse_unexplained(store, configured(), hour(730), None)
    with pytest.raises(DataMissing):
        refuse_unexplained(store, configured(), hour(650), hour(760))
    asked = WindowRows(BTC, hour(700), hour(730), CANDLE_SCHEMA.to_frame(), 30, "gap", "venue empty")
    store.put_windows([asked], source="x", now_ms=T0 + 1)
    refuse_unexplained(store, configured())


def test_the_command_line_exits_3_for_an_unexplained_hole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    two_pieces(tmp_path / "h")
    assert cli.run(["train", "--home", "h", "-s", "BTCUSDT", "--epochs", "1"]) == 3
    assert "nothing explains" in capsys.readouterr().err
    assert cli.run(["status", "--home", "h", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["series"]
    assert (row["unexplained"], row["gaps"], row["missing"]) == (30, 1, 30)
    assert cli.run(["status", "--home", "h"]) == 0
    shown = capsys.readouterr().out
    assert "unexplained" in shown and row["sha256"][:12] in shown


def test_a_forecast_as_of_an_earlier_instant_sees_what_a_following_store_knew_then(tmp_path: Path) -> None:
    store, frame = Store(tmp_path), candles("BTCUSDT", T0, 100)
    store.put_candles(frame[:50], source="x", now_ms=hour(50))
    wrong = frame[49:50].with_columns(pl.col("close") * 2, pl.col("high") * 2)
    store.put_candles(wrong, source="x", now_ms=hour(51) + 1)
    store.put_candles(frame[50:], source="x", now_ms=hour(100))

    def closes(as_of: int) -> list[float]:
        (series,) = stored_series(store, configured(), None, as_of, as_of)
        return series.frame["close"].to_list()

    assert closes(hour(51)) == frame["close"][:50].to_list()
    assert closes(hour(100) + DAY_MS)[49] == wrong["close"].item()
    assert len(closes(hour(80))) == 80  # it was not following then: what it learned later
