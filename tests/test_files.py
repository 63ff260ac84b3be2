"""Reading candle and funding files: formats, time spellings, and everything that is refused."""

from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from recur.connectors.files import read_candles, read_funding, sniff
from recur.connectors.pointfiles import read_points
from recur.vocabulary import UsageError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HEADER = "symbol,interval,ts,open,high,low,close,volume"
GOOD = [
    "BTCUSDT,1h,2025-07-01T00:00:00Z,100,110,90,105,7",
    "BTCUSDT,1h,2025-07-01T01:00:00Z,105,106,104,105,0",
    "ETHUSDT,1h,2025-07-01T00:00:00Z,10,11,9,10,1.5",
]


def csv(folder: Path, *lines: str, header: str = HEADER) -> Path:
    path = folder / "bars.csv"
    path.write_text("\n".join([header, *lines]) + "\n")
    return path


def test_a_csv_becomes_a_candle_frame(tmp_path: Path) -> None:
    frame = read_candles(csv(tmp_path, GOOD[2], *GOOD[:2]), category="spot")
    assert frame.rows()[0] == (
        "spot", "BTCUSDT", "1h", "trade", datetime(2025, 7, 1, tzinfo=UTC), 100.0, 110.0, 90.0, 105.0, 7.0, None,
    )  # fmt: skip
    assert frame.get_column("symbol").to_list() == ["BTCUSDT", "BTCUSDT", "ETHUSDT"]
    assert frame.schema["open_time"] == pl.Datetime("ms", "UTC")
    assert frame.schema["turnover"] == pl.Float64


def test_all_formats_give_the_same_frame(tmp_path: Path) -> None:
    path = csv(tmp_path, *GOOD)
    expected = read_candles(path)
    (tmp_path / "bars.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    expected.drop("category").rename({"open_time": "ts"}).write_parquet(tmp_path / "bars.parquet")
    expected.with_columns(pl.col("open_time").dt.cast_time_unit("ns")).write_ipc(tmp_path / "bars.feather")
    for name in ("bars.csv.gz", "bars.parquet", "bars.feather"):
        assert read_candles(tmp_path / name).equals(expected), name


@pytest.mark.parametrize(
    "spelling",
    [
        "2025-07-01",
        "2025-07-01 00:00",
        "2025-07-01T00:00:00",
        "2025-07-01T00:00:00.000Z",
        "2025-07-01 00:00:00+00:00",
        "2025-07-01T02:00+02:00",
        "2025-06-30T19:00:00-0500",
        "1751328000000",
    ],
)
def test_every_spelling_of_a_time_is_understood(tmp_path: Path, spelling: str) -> None:
    frame = read_candles(csv(tmp_path, f"BTCUSDT,1h,{spelling},1,1,1,1,0"))
    assert frame.item(0, "open_time") == datetime(2025, 7, 1, tzinfo=UTC)


def test_turnover_category_and_extra_columns_are_taken_or_ignored(tmp_path: Path) -> None:
    header = "comment,symbol,interval,open_time,open,high,low,close,volume,turnover,category"
    path = csv(tmp_path, "hi,btcusd,1M,2025-07-01,1,1,1,1,2,3,inverse", header=header)
    assert read_candles(path).select("category", "symbol", "interval", "turnover").row(0) == (
        "inverse", "BTCUSD", "1M", 3.0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("spelling", "category", "symbol"),
    [
        ("BTC/USDT", "spot", "BTCUSDT"),
        ("btc/usdt:usdt", "linear", "BTCUSDT"),
        ("BTC/USD:BTC", "inverse", "BTCUSD"),
        ("BTC-26JUN26", "linear", "BTC-26JUN26"),
        ("币安人生USDT", "linear", "币安人生USDT"),
    ],
)
def test_a_symbol_may_have_its_ccxt_spelling_which_names_the_category(
    tmp_path: Path, spelling: str, category: str, symbol: str
) -> None:
    frame = read_candles(csv(tmp_path, f"{spelling},1h,2025-07-01,1,1,1,1,0"))
    assert frame.select("category", "symbol").row(0) == (category, symbol)


def test_a_category_that_contradicts_the_spelling_of_the_symbol_is_refused(tmp_path: Path) -> None:
    header = "symbol,interval,ts,open,high,low,close,volume,category"
    path = csv(tmp_path, "BTC/USDT:USDT,1h,2025-07-01,1,1,1,1,0,spot", header=header)
    with pytest.raises(UsageError, match="row 1: category is missing or contradicts the symbol"):
        read_candles(path)


def test_a_bar_or_payment_that_lies_ahead_is_refused(tmp_path: Path) -> None:
    bars = csv(tmp_path, "BTCUSDT,1h,2025-07-01T00:00Z,1,1,1,1,0", "BTCUSDT,1h,2025-07-01T01:00Z,1,1,1,1,0")
    assert read_candles(bars, now_ms=1_751_335_200_000).height == 2
    with pytest.raises(UsageError) as caught:
        read_candles(bars, now_ms=1_751_335_199_000)
    assert "refused: row 2: bar is not closed at 2025-07-01T01:59:59Z" in caught.value.message
    month = csv(tmp_path, "BTCUSDT,1M,2025-06-01,1,1,1,1,0")
    assert read_candles(month, now_ms=1_751_328_000_000).height == 1
    with pytest.raises(UsageError, match="row 1: bar is not closed at 2025-06-30T23:59:59Z"):
        read_candles(month, now_ms=1_751_327_999_000)
    rates = csv(tmp_path, "BTCUSDT,2025-07-01T00:00Z,0.1", header="symbol,ts,rate")
    assert read_funding(rates, now_ms=1_751_328_000_000).height == 1
    with pytest.raises(UsageError, match="row 1: payment is still to come"):
        read_funding(rates, now_ms=1_751_327_999_000)


@pytest.mark.parametrize("absent", ["open", "close"])
def test_the_one_price_that_is_missing_is_named(tmp_path: Path, absent: str) -> None:
    names = [n for n in ("open", "high", "low", "close") if n != absent]
    path = csv(
        tmp_path, "BTCUSDT,1h,2025-07-01,1,1,1,0", header=f"symbol,interval,ts,{','.join(names)},volume"
    )
    assert sniff(path) == "candles"
    with pytest.raises(UsageError, match=f"column {absent} is missing"):
        read_candles(path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("BTCUSDT,1h,2025-07-01T02:00:00Z,100,90,95,92,1", "high is below low"),
        ("BTCUSDT,1h,2025-07-01T02:00:00Z,100,99,90,95,1", "high is below open or close"),
        ("BTCUSDT,1h,2025-07-01T02:00:00Z,100,110,101,105,1", "low is above open or close"),
        ("BTCUSDT,1h,2025-07-01T02:00:00Z,100,110,0,105,1", "price is not above 0"),
        ("BTCUSDT,1h,2025-07-01T02:00:00Z,100,inf,90,105,1", "high is not a finite number"),
        ("BTCUSDT,1h,2025-07-01T02:00:00Z,NaN,110,90,105,1", "open is not a finite number"),
        ("BTCUSDT,1h,2025-07-01T02:00:00Z,100,110,90,,1", "close is not a finite number"),
        ("BTCUSDT,1h,2025-07-01T02:00:00Z,100,110,90,abc,1", "close is not a finite number"),
        ("BTCUSDT,1h,2025-07-01T02:00:00Z,100,110,90,105,-1", "volume or turnover is below 0"),
        ("BTCUSDT,1h,2025-07-01T02:00:00Z,100,110,90,105,abc", "volume is not finite"),
        ("BTCUSDT,1h,2025-07-01T02:30:00Z,100,110,90,105,1", "open time is off the grid of its interval"),
        ("BTCUSDT,1w,2025-07-01,100,110,90,105,1", "open time is off the grid of its interval"),
        ("BTCUSDT,1M,2025-07-02,100,110,90,105,1", "open time is off the grid of its interval"),
        ("BTCUSDT,7h,2025-07-01T02:00:00Z,100,110,90,105,1", "unknown interval"),
        ("BTCUSDT,,2025-07-01T02:00:00Z,100,110,90,105,1", "unknown interval"),
        (",1h,2025-07-01T02:00:00Z,100,110,90,105,1", "symbol is missing"),
        ("BTC USDT,1h,2025-07-01T02:00:00Z,100,110,90,105,1", "symbol is not a name such as BTCUSDT"),
        ("BTC/,1h,2025-07-01T02:00:00Z,100,110,90,105,1", "symbol is not a name such as BTCUSDT"),
        ("x';--,1h,2025-07-01T02:00:00Z,100,110,90,105,1", "symbol is not a name such as BTCUSDT"),
        ("BTCUSDT,1h,yesterday,100,110,90,105,1", "time is missing or cannot be read"),
        ("BTCUSDT,1h,2025-07-01T01:00:00Z,105,106,104,105,0", "duplicate time in its series"),
        ("BTCUSDT,1h,2025-06-30T23:00:00Z,100,110,90,105,1", "time goes backwards in its series"),
        ("BTCUSDT,1h,1970-01-21T06:00:00Z,100,110,90,105,1", "time is not of 2009 to 2100"),
    ],
)
def test_a_bad_row_is_refused_with_its_number_and_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = csv(tmp_path, *GOOD, line)
    with pytest.raises(UsageError) as caught:
        read_candles(path)
    assert caught.value.message == f"{path} is refused: row 4: {reason}."
    assert "\n" not in caught.value.message


def test_five_bad_rows_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    lines = [f"BTCUSDT,1h,2025-07-01T{hour:02d}:00:00Z,1,1,1,0,1" for hour in range(8)]
    with pytest.raises(UsageError) as caught:
        read_candles(csv(tmp_path, *lines))
    shown = "; ".join(f"row {row}: price is not above 0" for row in range(1, 6))
    assert caught.value.message.endswith(f"is refused: {shown}; and 3 more rows.")


def test_epoch_seconds_and_nanoseconds_are_not_taken_for_milliseconds(tmp_path: Path) -> None:
    for number in ("1751328000", "1751328000000000000"):
        with pytest.raises(UsageError, match="row 1: time is not of 2009 to 2100"):
            read_candles(csv(tmp_path, f"BTCUSDT,1h,{number},1,1,1,1,0"))


def test_an_unknown_category_is_refused(tmp_path: Path) -> None:
    path = csv(tmp_path, "BTCUSDT,1h,2025-07-01,1,1,1,1,2,future", header=HEADER + ",category")
    with pytest.raises(UsageError, match="row 1: unknown category"):
        read_candles(path)
    with pytest.raises(UsageError, match="Did you mean 'linear'"):
        read_candles(csv(tmp_path, *GOOD), category="liner")


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = csv(tmp_path, "BTCUSDT,1h,1,1,1,1", header="symbol,interval,open,high,low,close")
    with pytest.raises(UsageError, match=r"column volume, open_time\|ts is missing"):
        read_candles(path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", HEADER.encode() + b"\n", "has no rows"),
        ("a.csv", b"\xff\xfe\x00\x01,\n\xff\xff,", "Cannot read|does not fit"),
        ("a.csv.gz", gzip.compress(b"symbol,interval\n" * 999)[:-20], "Cannot read|does not fit"),
        ("a.parquet", b"PAR1 nonsense", "Cannot read"),
        ("a.feather", b"ARROW1 nonsense", "Cannot read"),
        ("a.xlsx", b"x", "Cannot tell the format"),
        ("a.json", None, "Cannot tell the format"),
        ("a.csv", None, "There is no file"),
    ],
)
def test_an_unreadable_file_is_a_usage_error(
    tmp_path: Path, name: str, content: bytes | None, reason: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=reason) as caught:
        read_candles(path)
    assert "\n" not in caught.value.message


def test_funding_is_read_and_checked(tmp_path: Path) -> None:
    header = "symbol,ts,funding_rate"
    lines = ["BTCUSDT,2025-07-01T00:00:00Z,0.0001", "BTCUSDT,2025-07-01T08:00:00Z,-0.0002"]
    path = csv(tmp_path, *lines, header=header)
    assert sniff(path) == "funding"
    assert read_funding(path).rows() == [
        ("linear", "BTCUSDT", datetime(2025, 7, 1, tzinfo=UTC), 0.0001),
        ("linear", "BTCUSDT", datetime(2025, 7, 1, 8, tzinfo=UTC), -0.0002),
    ]
    with pytest.raises(UsageError, match="row 3: rate is not a finite number"):
        read_funding(csv(tmp_path, *lines, "BTCUSDT,2025-07-01T16:00:00Z,", header=header))
    with pytest.raises(UsageError, match="row 3: duplicate time"):
        read_funding(csv(tmp_path, *lines, lines[1], header="symbol,funding_time,rate"))


def test_sniffing_tells_candles_and_refuses_other_files(tmp_path: Path) -> None:
    assert sniff(csv(tmp_path, *GOOD)) == "candles"
    with pytest.raises(
        UsageError, match=r"holds none of candles, funding, .*: found the columns text, label"
    ):
        sniff(csv(tmp_path, "hello,1", header="text,label"))


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data folder is not here")
def test_real_files_are_read_whole() -> None:
    spot = read_candles(DATA / "candles_binance_spot_1h.parquet", category="spot")
    assert spot.height == 359664
    assert spot.filter(pl.col("symbol") == "BTCUSDT").height == 71050
    assert read_funding(DATA / "funding_bybit.parquet").height == 9453
    assert sniff(DATA / "funding_bybit.parquet") == "funding"


def test_open_interest_and_ratios_are_told_and_read(tmp_path: Path) -> None:
    path = tmp_path / "oi.csv"
    path.write_text("symbol,interval,ts,open_interest\nBTCUSDT,1h,2025-01-01T00:00:00Z,70000.5\n")
    assert sniff(path) == "open_interest"
    (row,) = read_points(path, "open_interest").to_dicts()
    assert (row["symbol"], row["interval"], row["open_interest"]) == ("BTCUSDT", "1h", 70000.5)
    path = tmp_path / "ratio.csv"
    path.write_text("symbol,interval,ts,buy_ratio,sell_ratio\nBTCUSDT,1h,2025-01-01T00:00:00Z,0.6,-1\n")
    assert sniff(path) == "long_short"
    with pytest.raises(UsageError, match="row 1: sell_ratio is no number of 0 or more"):
        read_points(path, "long_short")
