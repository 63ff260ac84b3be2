"""Stored bars against trade archives, and ``doctor`` on archives and after crashes."""

from __future__ import annotations

import gzip
import json
import os
import random
from pathlib import Path

import polars as pl
import pytest

from recur import cli
from recur.pipeline.archive import check_archives, read_trades, rebuild
from recur.pipeline.repair import repair
from recur.storage.runs import RunFolder
from recur.storage.store import CANDLE_SCHEMA, Store
from recur.vocabulary import HOUR_MS, MINUTE_MS, DataMissing, StoreCorrupt, UsageError, parse_time
from tests.market import candles

DAY = parse_time("2025-07-01")
Trade = tuple[float, float, float]  # milliseconds after midnight, price, size


def some_trades(minutes: int = 180, seed: int = 3) -> list[Trade]:
    """A few trades in most minutes, none in some."""
    draw, price, out = random.Random(seed), 100.0, list[Trade]()
    for minute in range(minutes):
        for _ in range(draw.choice([0, 1, 3, 6])):
            price = round(price + draw.choice([-0.5, 0.0, 0.5]), 1)
            at = round(minute * MINUTE_MS + draw.uniform(0, MINUTE_MS - 1), 1)
            out.append((at, price, draw.randint(1, 9) / 1000))
    return sorted(out, key=lambda trade: trade[0])


def venue_bars(trades: list[Trade], symbol: str, category: str, step: int, interval: str) -> pl.DataFrame:
    """Bars as the venue makes them, by a loop: open at the close before, flat where nothing was traded."""
    rows, close = [], 0.0
    last = int(trades[-1][0] // step)
    for k in range(int(trades[0][0] // step), last + 1):
        inside = [t for t in trades if t[0] // step == k]
        opened = close or inside[0][1]
        prices = [opened, *(t[1] for t in inside)]
        close = prices[-1]
        size = sum(t[2] for t in inside)
        value = sum(t[2] / t[1] if category == "inverse" else t[2] * t[1] for t in inside)
        rows.append((DAY + k * step, opened, max(prices), min(prices), close, size, value))
    names = ["open_time", "open", "high", "low", "close", "volume", "turnover"]
    frame = pl.DataFrame(rows, schema=names, orient="row").with_columns(
        pl.col("open_time").cast(pl.Datetime("ms", "UTC")),
        category=pl.lit(category), symbol=pl.lit(symbol), interval=pl.lit(interval), kind=pl.lit("trade"),
    )  # fmt: skip
    return frame.select(CANDLE_SCHEMA.names())


def contract_file(folder: Path, trades: list[Trade], symbol: str = "BTCUSDT", columns: int = 11) -> Path:
    head = "timestamp,symbol,side,size,price,tickDirection,trdMatchID,grossValue,homeNotional,foreignNotional,RPI"
    lines = [",".join(head.split(",")[:columns])]
    for at, price, size in trades:
        row = [
            f"{(DAY + at) / 1000:.4f}",
            symbol,
            "Buy",
            size,
            price,
            "PlusTick",
            "id",
            1,
            size,
            price * size,
            0,
        ]
        lines.append(",".join(map(str, row[:columns])))
    path = folder / f"{symbol}2025-07-01.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def spot_file(folder: Path, trades: list[Trade]) -> Path:
    lines = ["id,timestamp,price,volume,side,rpi"]
    lines += [f"{i},{int(DAY + at)},{price},{size},buy,0" for i, (at, price, size) in enumerate(trades)]
    path = folder / "BTCUSDT_2025-07-01.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


@pytest.mark.parametrize("columns", [10, 11])
@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_bars_of_the_venue_agree_with_its_trades_in_any_order(
    tmp_path: Path, columns: int, order: str
) -> None:
    trades, store = some_trades(), Store(tmp_path)
    for step, interval in ((MINUTE_MS, "1m"), (HOUR_MS, "1h")):
        bars = venue_bars(trades, "BTCUSDT", "linear", step, interval)
        store.put_candles(bars, source="x", now_ms=1)
    written = list(trades)
    if order == "descending":
        written.reverse()
    elif order == "shuffled":
        random.Random(1).shuffle(written)
    found = check_archives(store, [contract_file(tmp_path, written, columns=columns)])
    assert found["ok"] and found["differences"] == []
    (file,) = found["files"]
    assert (file["symbol"], file["category"], file["trades"]) == ("BTCUSDT", "linear", len(trades))
    assert [(s["series"], s["equal"] == s["bars"], s["absent"]) for s in file["series"]] == [
        ("bybit:linear:BTCUSDT:1m", True, 0),
        ("bybit:linear:BTCUSDT:1h", True, 0),
    ]


def test_inverse_contracts_and_spot_files_are_understood(tmp_path: Path) -> None:
    trades, store = some_trades(60), Store(tmp_path)
    whole = [(float(int(at)), price, size) for at, price, size in trades]
    store.put_candles(venue_bars(trades, "BTCUSD", "inverse", MINUTE_MS, "1m"), source="x", now_ms=1)
    store.put_candles(venue_bars(whole, "BTCUSDT", "spot", MINUTE_MS, "1m"), source="x", now_ms=1)
    found = check_archives(store, [contract_file(tmp_path, trades, "BTCUSD"), spot_file(tmp_path, trades)])
    assert found["ok"] and [file["category"] for file in found["files"]] == ["inverse", "spot"]


def test_every_difference_is_listed_with_both_values(tmp_path: Path) -> None:
    trades = [(0.0, 100.0, 1.0), (90_000.0, 101.0, 2.0), (150_000.0, 99.0, 1.0), (200_000.0, 99.5, 1.0)]
    bars = venue_bars(trades, "BTCUSDT", "linear", MINUTE_MS, "1m")
    at = pl.int_range(pl.len())
    wrong = bars.with_columns(
        close=pl.when(at == 1).then(100.5).otherwise("close"),
        volume=pl.when(at == 1).then(5.0).otherwise("volume"),
    ).filter(at != 2)
    store = Store(tmp_path)
    store.put_candles(wrong, source="x", now_ms=1)
    found = check_archives(store, [contract_file(tmp_path, trades)])
    assert not found["ok"]
    rows = [(d["open_time"][11:16], d["column"], d["stored"], d["rebuilt"]) for d in found["differences"]]
    assert rows == [
        ("00:01", "close", 100.5, 101.0),
        ("00:01", "volume", 5.0, 2.0),
        ("00:02", "bar", None, 1.0),
    ]
    (series,) = found["files"][0]["series"]
    assert (series["bars"], series["equal"], series["differing"], series["absent"]) == (3, 2, 1, 1)


def test_a_bar_with_volume_where_nothing_was_traded_is_a_difference(tmp_path: Path) -> None:
    trades = [(0.0, 100.0, 1.0), (150_000.0, 99.0, 1.0)]
    bars = venue_bars(trades, "BTCUSDT", "linear", MINUTE_MS, "1m")
    store = Store(tmp_path)
    loud = bars.with_columns(volume=pl.when(pl.int_range(pl.len()) == 1).then(7.0).otherwise("volume"))
    store.put_candles(loud, source="x", now_ms=1)
    (only,) = check_archives(store, [contract_file(tmp_path, trades)])["differences"]
    assert (only["open_time"], only["column"], only["stored"], only["rebuilt"]) == (
        "2025-07-01T00:01:00Z", "volume", 7.0, 0.0,
    )  # fmt: skip


def test_a_file_without_a_date_is_compared_in_its_whole_minutes_only(tmp_path: Path) -> None:
    trades = some_trades(30)
    path = contract_file(tmp_path, trades).rename(tmp_path / "BTCUSDT.csv.gz")
    bars = rebuild(read_trades(path), "1m")
    assert bars["open_ms"].min() == DAY + -(-int(trades[0][0]) // MINUTE_MS) * MINUTE_MS
    assert bars["open_ms"].max() < DAY + trades[-1][0] - MINUTE_MS + 1  # type: ignore[operator]


def test_unusable_files_are_refused_with_what_is_wrong(tmp_path: Path) -> None:
    path = contract_file(tmp_path, some_trades())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="is cut short or damaged"):
        read_trades(path)
    path.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    with pytest.raises(UsageError, match="found the columns a, b"):
        read_trades(path)
    path.write_bytes(gzip.compress(b"timestamp,symbol,side,size,price\n1751328000.1,BTCUSDT,Buy,x,1\n"))
    with pytest.raises(UsageError, match="row 1 has no sane time, price and size"):
        read_trades(path)
    path.write_bytes(gzip.compress(b"timestamp,symbol,side,size,price\n1751328000123,BTCUSDT,Buy,1,1\n"))
    with pytest.raises(UsageError, match="row 1 has no sane time"):
        read_trades(path)
    path.write_bytes(gzip.compress(b"timestamp,symbol,side,size,price\n1751241600.5,BTCUSDT,Buy,1,1\n"))
    with pytest.raises(
        UsageError, match=r"its name says 2025-07-01, its trades run from 2025-06-30T00:00:00\.500Z"
    ):
        read_trades(path)
    with pytest.raises(UsageError, match="Cannot read"):
        read_trades(tmp_path / "BTCUSDT2025-07-02.csv.gz")
    with pytest.raises(UsageError, match="expected a name ending in"):
        read_trades(tmp_path / "x.parquet")


def test_without_stored_bars_an_archive_cannot_be_checked(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_candles(candles("ETHUSDT", DAY, 3), source="x", now_ms=1)
    with pytest.raises(DataMissing, match="no linear candles of BTCUSDT"):
        check_archives(store, [contract_file(tmp_path, some_trades())])


def test_doctor_exits_4_when_an_archive_contradicts_the_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trades = some_trades(60)
    path, other = contract_file(tmp_path, trades), contract_file(tmp_path, trades, "BTCUSD")
    store = Store(tmp_path / "h")
    store.put_candles(venue_bars(trades, "BTCUSDT", "linear", MINUTE_MS, "1m"), source="x", now_ms=1)
    store.put_candles(venue_bars(trades, "BTCUSD", "inverse", MINUTE_MS, "1m"), source="x", now_ms=1)
    words = ["doctor", "--home", str(tmp_path / "h"), "--archive", str(path), str(other)]
    assert cli.run(words) == 0
    assert "bybit:inverse:BTCUSD:1m" in capsys.readouterr().out
    with store.write() as con:
        con.execute("UPDATE candles SET close = close + 1 WHERE category = 'linear' AND open_time = make_timestamp_ms(?)",
                    [DAY + 7 * MINUTE_MS])  # fmt: skip
    assert cli.run([*words, "--json"]) == 4
    found = json.loads(capsys.readouterr().out)
    assert [(d["series"], d["column"]) for d in found["differences"]] == [
        ("bybit:linear:BTCUSDT:1m", "close")
    ]
    assert cli.run(["doctor", "stray"]) == 2


def test_repair_clears_up_what_died_and_keeps_every_row_and_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_candles(candles("BTCUSDT", DAY, 30), source="x", now_ms=1)
    done, dead, fresh = (RunFolder(tmp_path, f"train-gru-{k}") for k in "123")
    done.write_json("manifest.json", {"status": "complete"})
    running = RunFolder(tmp_path, "train-gru-4")
    running.write_json("manifest.json", {"status": "running"})
    damaged = RunFolder(tmp_path, "train-gru-5")
    damaged.write_text("manifest.json", "{")
    for run in (dead, fresh):
        run.write_text("config.toml", "")
    for path in (dead.path, dead.config):
        os.utime(path, (1, 1))
    litter = done.path / ".metrics.json.999999999.abcdef.tmp"
    ours = done.path / f".metrics.json.{os.getpid()}.abcdef.tmp"
    for path in (litter, ours):
        path.write_text("half")
    found = repair(tmp_path, store, DAY)
    assert found["ok"] and sorted(found["removed"]) == sorted([str(litter), str(dead.path)])
    assert found["kept"] == [fresh.run_id, damaged.run_id]
    assert ours.exists() and running.path.exists() and store.candles().height == 30
    assert (found["series"], found["duplicates"], found["ledger_broken_at"]) == (1, [], None)
    assert repair(tmp_path, store, DAY)["sha256"] == found["sha256"]


def test_repair_finds_a_key_that_stands_twice_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    store.put_candles(candles("BTCUSDT", DAY, 3), source="x", now_ms=1)
    with store.write() as con:
        con.execute("INSERT INTO candles SELECT * FROM candles LIMIT 1")
    assert cli.run(["doctor", "--repair", "--json", "--home", str(tmp_path)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["duplicates"]) == (False, ["candles: 1"])
    assert store.candles().height == 4


def test_repair_of_a_damaged_file_says_how_to_restore_and_changes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path, wait_s=0.1)
    store.put_candles(candles("BTCUSDT", DAY, 30_000), source="x", now_ms=1)
    os.truncate(store.path, store.path.stat().st_size // 2)
    before = store.path.read_bytes()
    with pytest.raises(StoreCorrupt) as caught:
        repair(tmp_path, store, DAY)
    assert "copy the backup to" in caught.value.hint
    assert store.path.read_bytes() == before


def test_a_flipped_byte_in_stored_rows_does_not_stay_hidden(tmp_path: Path) -> None:
    store = Store(tmp_path, wait_s=0.1)
    store.put_candles(candles("BTCUSDT", DAY, 30_000), source="x", now_ms=1)
    content = bytearray(store.path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    store.path.write_bytes(content)
    with pytest.raises(StoreCorrupt):
        repair(tmp_path, store, DAY)
