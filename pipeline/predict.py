"""``recur predict``: forecasts from the last closed bar, printed and appended to the ledger once."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from recur.models.registry import model_label
from recur.pipeline.artefact import open_trained
from recur.pipeline.config import Config, MarketConfig
from recur.pipeline.dataset import arrays
from recur.pipeline.inference import Forecast, cutoffs, forecast
from recur.pipeline.load import open_store, stored_news, stored_series
from recur.pipeline.rows import forecast_rows, json_rows
from recur.pipeline.settings import load_config
from recur.storage.runs import latest_run
from recur.storage.store import Store
from recur.vocabulary import INTERVALS, DataMissing, UsageError, from_ms, iso, next_open

_GRACE_MS = 120_000
"""How long after its close a bar may be missing before a warning is due."""

_log = logging.getLogger(__name__)


def predict(
    home: Path, config: Config, *, run: str | None, as_of_ms: int | None, trust: bool = False
) -> dict[str, Any]:
    """``{"forecasts": [rows], "appended": n}``: one row per configured series and horizon.

    Only bars closed at ``as_of_ms`` (now) are used, as the store knew them then (see ``stored_series``). A series
    whose cutoff is in the ledger already is forecast again for the reader, but appended nothing. ``trust`` lets a
    run of a user's own model run its code. Raises DataMissing without a trained run or without bars.

    A market that ended long before the newest of the others is left out, so that it does not cost them their
    forecasts. A warning says so, and likewise that a forecast starts from a bar which is no longer the last one.
    """
    now_ms = int(time.time() * 1000)
    run = run or latest_run(home, "train")
    if run is None:
        raise DataMissing(f"There is no trained run in {home}.", "Run 'recur train price' first.")
    folder, made = open_trained(home, run, trust=trust)
    theirs, _ = load_config([folder.config], [], {})
    # A run knows its market; symbols may be chosen, the interval may not.
    default = MarketConfig()
    symbols = theirs.market.symbols if config.market.symbols == default.symbols else config.market.symbols
    if config.market.interval not in (default.interval, theirs.market.interval):
        raise UsageError(
            f"Run {run} forecasts {theirs.market.interval} bars, {config.market.interval} was asked for.",
            "Train a model for that interval, or name another --run.",
        )
    config = replace(theirs, market=replace(theirs.market, symbols=symbols), store=config.store)
    interval = config.market.interval
    store = open_store(home, config)
    as_of = now_ms if as_of_ms is None else as_of_ms
    # BTC's state is an input of every other series.
    lead = ("BTCUSDT",) if "BTCUSDT" in theirs.market.symbols and "BTCUSDT" not in symbols else ()
    needed = (made.transform.lookback + config.train.window + 8) * (INTERVALS[interval] or 31 * 86_400_000)
    closes = _last_closes(store, config, (*symbols, *lead), as_of)
    since = max(closes.values()) - needed
    ended = [s for s, close in closes.items() if close <= since]
    wanted = replace(
        config, market=replace(config.market, symbols=tuple(s for s in (*symbols, *lead) if s not in ended))
    )
    for symbol in ended:
        _log.warning(
            "%s is left out: its last stored bar closed at %s. 'recur fetch -s %s' brings newer ones, if there are any.",
            symbol, iso(closes[symbol]), symbol,
        )  # fmt: skip
    series = stored_series(store, wanted, since, as_of, as_of_ms, stored_news(store, wanted))
    series = [replace(s, frame=s.frame.filter(pl.col("close_time") <= from_ms(as_of))) for s in series]
    out: list[Forecast] = []
    for data in arrays([s for s in series if s.frame.height], made.transform):
        if data.symbol not in symbols:
            continue
        usable = cutoffs(data, 0, as_of + 1)
        if not len(usable):
            _log.warning("%s is left out: it has too few bars to forecast from.", data.symbol)
            continue
        last = int(data.close_ms[usable[-1]])
        if next_open(last, interval) + _GRACE_MS < as_of:
            _log.warning(
                "%s is forecast from %s, the close of its last stored bar: later ones are missing. Run 'recur fetch'.",
                data.symbol, iso(last),
            )  # fmt: skip
        out += forecast(made.net, [data], made.symbols, last, last + 1, config.train.window)
    if not out:
        raise DataMissing(
            f"None of {', '.join(symbols)} has a usable closed bar at {iso(as_of)}.",
            "Run 'recur fetch' first.",
        )
    rows = forecast_rows(out, made.transform.horizons, interval, model_label(config.model.name), run).drop(
        "actual"
    )
    known = _known_at(store, config, since, as_of)
    rows = rows.with_columns(
        pl.lit(from_ms(now_ms)).dt.cast_time_unit("ms").alias("made_at"),
        pl.col("unique_id").replace_strict(known, return_dtype=pl.Datetime("ms", "UTC")).alias("known_at"),
        pl.Series(
            "late",
            [now_ms > next_open(int(t), interval) for t in rows["cutoff"].dt.epoch("ms")],
        ),
    )
    appended = store.append_forecasts(rows)
    return {"run_id": run, "forecasts": json_rows(rows), "appended": appended}


def _last_closes(store: Store, config: Config, symbols: Sequence[str], as_of: int) -> dict[str, int]:
    """When the last bar of each of ``symbols`` that opened before ``as_of`` closed; DataMissing when none has one."""
    market = config.market
    with store.read() as con:
        found = con.execute(
            """SELECT symbol, epoch_ms(max(open_time)) FROM candles WHERE category = ? AND interval = ?
            AND kind = 'trade' AND epoch_ms(open_time) < ? AND list_contains(?, symbol) GROUP BY symbol""",
            [market.category, market.interval, as_of, list(symbols)],
        ).fetchall()
    if not found:
        raise DataMissing(
            f"The store holds no {market.category} {market.interval} bar of {', '.join(symbols)} before {iso(as_of)}.",
            f"Run 'recur fetch -s {','.join(symbols)} -i {market.interval}' first.",
        )
    return {str(symbol): next_open(int(newest), market.interval) for symbol, newest in found}


def _known_at(store: Store, config: Config, since: int, as_of: int) -> dict[str, Any]:
    """Latest instant at which this store first held any bar that a forecast used, per series."""
    market = config.market
    with store.read() as con:
        found = con.execute(
            """SELECT symbol, epoch_ms(max(first_seen)) FROM candles WHERE category = ? AND interval = ?
            AND kind = 'trade' AND epoch_ms(open_time) >= ? AND epoch_ms(open_time) < ? GROUP BY symbol""",
            [market.category, market.interval, since, as_of],
        ).fetchall()
    newest = max((int(ms) for _, ms in found), default=0)
    return {f"bybit:{market.category}:{s}:{market.interval}": from_ms(newest) for s, _ in found}
