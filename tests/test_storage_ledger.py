"""The forecast ledger in the store: appended once, chained, and tampering found."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from recur.storage.ledger import GENESIS, first_broken
from recur.storage.schema import QUANTILES
from recur.storage.store import Store
from recur.vocabulary import HOUR_MS, parse_time

T0 = parse_time("2025-07-01")


def forecasts(*cutoffs: int, symbol: str = "BTCUSDT", mean: float = 0.1) -> pl.DataFrame:
    at = pl.Series(cutoffs, dtype=pl.Int64)
    quantiles = {name: -0.5 + 0.05 * i for i, name in enumerate(QUANTILES)}
    return pl.DataFrame(
        {
            "unique_id": f"bybit:linear:{symbol}:1h",
            "cutoff": at.cast(pl.Datetime("ms", "UTC")),
            "ds": (at + HOUR_MS).cast(pl.Datetime("ms", "UTC")),
            "horizon": 1,
            "model": "gru",
            "run_id": "train-gru-1",
            "made_at": (at + 5000).cast(pl.Datetime("ms", "UTC")),
            "known_at": (at + 1000).cast(pl.Datetime("ms", "UTC")),
            "late": False,
            **quantiles,
            "mean": mean,
            "prob_up": 0.5,
            "vol": 0.01,
            "close": 100.0,
        }
    )


def test_forecasts_are_appended_once_and_chained(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.append_forecasts(forecasts(T0, T0 + HOUR_MS)) == 2
    assert store.append_forecasts(forecasts(T0 + HOUR_MS, T0 + 2 * HOUR_MS, mean=0.9)) == 1
    assert store.append_forecasts(forecasts(T0, symbol="ETHUSDT")) == 1
    entries = store.forecasts()
    assert entries.get_column("seq").to_list() == [1, 2, 3, 4]
    assert entries.get_column("mean").to_list() == [0.1, 0.1, 0.9, 0.1]
    assert entries.get_column("prev_hash").to_list() == [
        GENESIS,
        *entries.get_column("entry_hash").to_list()[:-1],
    ]
    assert first_broken(entries) is None
    assert store.forecasts(2).get_column("seq").to_list() == [3, 4]
    assert store.forecasts(10, ["ETHUSDT"]).get_column("seq").to_list() == [4]


def test_the_hash_of_a_forecast_is_fixed_for_all_time(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.append_forecasts(forecasts(T0).with_columns(pl.lit(float("nan")).alias("vol")))
    assert store.forecasts().get_column("vol").to_list() == [None]
    assert (
        store.forecasts().item(0, "entry_hash")
        == "63475e743301bad7c2b448153810cb2af7f9623a6c2165c65b74f9a7937d18f1"
    )


@pytest.mark.parametrize(
    ("tamper", "broken"),
    [
        ("UPDATE forecasts SET mean = 0.2 WHERE seq = 2", 2),
        ("UPDATE forecasts SET made_at = make_timestamp_ms(0) WHERE seq = 3", 3),
        ("DELETE FROM forecasts WHERE seq = 2", 3),
        ("UPDATE forecasts SET late = NULL WHERE seq = 1", 1),
    ],
)
def test_an_altered_ledger_is_found_at_the_altered_entry(tmp_path: Path, tamper: str, broken: int) -> None:
    store = Store(tmp_path)
    store.append_forecasts(forecasts(T0, T0 + HOUR_MS, T0 + 2 * HOUR_MS))
    with store.write() as con:
        con.execute(tamper)
    assert first_broken(store.forecasts()) == broken


def test_forecasts_without_a_cutoff_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="lack the columns cutoff"):
        Store(tmp_path).append_forecasts(forecasts(T0).drop("cutoff"))
