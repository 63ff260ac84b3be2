"""Merging and as-of reading against a model of a few lines that keeps everything in dictionaries."""

from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from recur.storage.frames import CANDLE_SCHEMA
from recur.storage.inventory import duplicates
from recur.storage.store import PutResult, Store
from recur.vocabulary import HOUR_MS, parse_time

T0 = parse_time("2025-07-01")
Row = tuple[str, int, float, float | None]
ROWS = st.lists(
    st.tuples(
        st.sampled_from(["BTCUSDT", "ETHUSDT", "SOLUSDT"]),
        st.integers(0, 12),
        st.sampled_from([1.0, 2.0]),
        st.sampled_from([None, 5.0, 6.0]),
    ),
    max_size=20,
)


def frame(rows: list[Row]) -> pl.DataFrame:
    n = len(rows)
    return pl.DataFrame(
        {
            "category": ["linear"] * n,
            "symbol": [r[0] for r in rows],
            "interval": ["1h"] * n,
            "kind": ["trade"] * n,
            "open_time": pl.Series([T0 + HOUR_MS * r[1] for r in rows], dtype=pl.Int64).cast(
                pl.Datetime("ms", "UTC")
            ),
            **{name: [r[2] for r in rows] for name in ("open", "high", "low", "close", "volume")},
            "turnover": [r[3] for r in rows],
        },
        schema=CANDLE_SCHEMA,
    )


class Model:
    """What each key said, and since when."""

    def __init__(self) -> None:
        self.history: dict[tuple[str, int], list[tuple[int, float, float | None]]] = {}

    def put(self, rows: list[Row], now: int) -> PutResult:
        new = changed = same = 0
        for (symbol, hour), (close, turnover) in {(r[0], r[1]): (r[2], r[3]) for r in rows}.items():
            said = self.history.setdefault((symbol, hour), [])
            if not said:
                said.append((now, close, turnover))
                new += 1
                continue
            after = (close, turnover if turnover is not None else said[-1][2])
            if after == said[-1][1:]:
                same += 1
            else:
                said.append((now, *after))
                changed += 1
        return PutResult(new, changed, same)

    def at(self, now: int) -> list[Row]:
        out = []
        for (symbol, hour), said in sorted(self.history.items()):
            known = [entry for entry in said if entry[0] <= now]
            if known:
                out.append((symbol, hour, known[-1][1], known[-1][2]))
        return out


@given(st.lists(ROWS, min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_the_store_is_what_a_dictionary_would_be_now_and_at_every_earlier_instant(
    puts: list[list[Row]],
) -> None:
    model = Model()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        with store.session():
            for now, rows in enumerate(puts, start=1):
                expected = model.put(rows, now)
                assert store.put_candles(frame(rows), source="x", now_ms=now) == expected
            if not store.path.exists():
                return
            assert store.candles("linear", interval="1h").equals(frame(model.at(len(puts))))
            for now in range(len(puts) + 1):
                assert store.candles(as_of_ms=now).equals(frame(model.at(now))), now
            with store.read() as con:
                assert duplicates(con) == []
                ((revisions,),) = con.execute("SELECT count(*) FROM candle_revisions").fetchall()
        assert revisions == sum(len(said) - 1 for said in model.history.values())


def test_first_values_show_what_was_first_stored_also_of_rows_that_came_later(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_candles(frame([("BTCUSDT", 0, 1.0, 5.0)]), source="x", now_ms=10)
    store.put_candles(frame([("BTCUSDT", 0, 2.0, 5.0), ("BTCUSDT", 1, 1.0, 5.0)]), source="x", now_ms=20)
    store.put_candles(frame([("BTCUSDT", 1, 2.0, 5.0)]), source="x", now_ms=30)
    then = store.candles(as_of_ms=10)
    assert then.select("open", "turnover").rows() == [(1.0, 5.0)]
    assert store.candles(as_of_ms=10, first_values=True).get_column("open").to_list() == [1.0, 1.0]
    assert store.candles(as_of_ms=25).get_column("open").to_list() == [2.0, 1.0]
    assert store.candles().get_column("open").to_list() == [2.0, 2.0]


def test_rows_that_came_out_of_order_are_read_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for hour in (5, 1, 3):
        store.put_candles(frame([("BTCUSDT", hour, 1.0, None)]), source="x", now_ms=1)
    read = store.candles("linear", ["BTCUSDT"], "1h")
    assert read.equals(frame([("BTCUSDT", h, 1.0, None) for h in (1, 3, 5)]))
    assert read.schema == CANDLE_SCHEMA
    several = store.candles("linear", ["SOLUSDT", "BTCUSDT"], "1h", since_ms=T0 + 2 * HOUR_MS)
    assert several.get_column("open_time").dt.epoch("ms").to_list() == [T0 + 3 * HOUR_MS, T0 + 5 * HOUR_MS]
