"""The whole feature set: recur's polars expressions against the same features in pandas.

Both start from candles on their regular grid (some bars missing) and end with a frame of all features, BTC's state
joined in. Before anything is timed, the two are compared on the last rows. The last mile is the features of the
newest bar, standardised, from the last 4,500 bars of each series.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import polars as pl
from common import START_MS, Results, bars, goal, interleaved, main, show

from recur.pipeline.dataset import RawSeries, fit_transform, raw_features, raw_series
from recur.pipeline.features import BASE_DECAY, VARIANCE_FLOOR, FeatureTransform, week_positions
from recur.vocabulary import INTERVALS, WEEK_MS

HORIZONS = (1, 6, 24)
TAIL = 4500
MONDAY_MS = 4 * 86_400_000


def pandas_prepared(frame: pd.DataFrame, transform: FeatureTransform) -> pd.DataFrame:
    """What one bar tells, the season, the base variance and the standardised return."""
    o, h, low, c = frame["open"], frame["high"], frame["low"], frame["close"]
    hl2 = np.log(h / low) ** 2
    step, n = INTERVALS[transform.interval], week_positions(transform.interval)
    ms = frame["open_time"].dt.as_unit("ms").astype(np.int64).to_numpy()
    at = (ms - MONDAY_MS) % WEEK_MS // step
    gk = (0.5 * hl2 - (2 * np.log(2) - 1) * np.log(c / o) ** 2).clip(lower=0)
    typical = frame["volume"] * (h + low + c) / 3
    columns: dict[str, object] = {
        "r": np.log(c).diff(),
        "parkinson": hl2 / (4 * np.log(2)),
        "gk": gk,
        "place": (c - low) / (h - low),
        "lv": np.log(frame["volume"] + 1),
        "lt": np.log(frame["turnover"].fillna(typical) + 1),
        "s_now": transform.season[at] if n > 1 else 1.0,
        "ms": ms,
    }
    for horizon in transform.horizons:
        ahead = np.sum([np.roll(transform.season, -k) for k in range(1, horizon + 1)], axis=0)
        columns[f"s_{horizon}"] = ahead[at]
    out = frame.assign(**columns)
    deseason = out["gk"] / out["s_now"]
    base = deseason.ewm(alpha=1 - BASE_DECAY, adjust=True, ignore_na=True).mean()
    out["deseason"], out["base"] = deseason, base.ffill().clip(lower=VARIANCE_FLOOR)
    out["z"] = (out["r"] / np.sqrt(out["base"] * out["s_now"])).clip(-20, 20)
    return out


def rolled(x: pd.Series, n: int) -> pd.Series:
    return x.rolling(n, min_periods=max(1, n // 2)).mean()


def log_ratio(variance: pd.Series, base: pd.Series) -> pd.Series:
    return 0.5 * (np.log(variance + VARIANCE_FLOOR) - np.log(base))


def pandas_lead(own: pd.DataFrame) -> pd.DataFrame:
    """BTC's state, by open time."""
    return pd.DataFrame(
        {
            "open_time": own["open_time"],
            "btc_z": own["z"],
            "btc_base": own["base"],
            "btc_gk_1": log_ratio(own["deseason"], own["base"]),
            "btc_gk_24": log_ratio(rolled(own["deseason"], 24), own["base"]),
        }
    )


def pandas_features(
    prepared: pd.DataFrame, lead: pd.DataFrame | None, transform: FeatureTransform
) -> pd.DataFrame:
    """The features of ``recur.pipeline.features.catalogue``, by name; repeated parts are computed once."""
    d = prepared.merge(lead, on="open_time", how="left") if lead is not None else prepared
    base, r, lv, lt, z, ms = (d[k] for k in ("base", "r", "lv", "lt", "z", "ms"))
    r2, ra = r**2, r.abs()
    r2s, parkinson, impact = r2 / d["s_now"], d["parkinson"] / d["s_now"], ra / lt
    f: dict[str, object] = {"observed": d["observed"].astype(np.float64), "ret_1": z}
    for n in (3, 6, 24, 72, 168):
        f[f"ret_{n}"] = r.rolling(n, min_periods=max(1, n // 2)).sum() / np.sqrt(base * n)
    for n in (1, 6, 24, 72, 168, 720):
        f[f"rv_{n}"] = log_ratio(rolled(r2s, n), base)
    for n in (1, 3, 6, 24, 72, 168, 720):
        f[f"gk_{n}"] = log_ratio(rolled(d["deseason"], n), base)
    for n in (1, 24):
        f[f"parkinson_{n}"] = log_ratio(rolled(parkinson, n), base)
    f["base_level"] = 0.5 * np.log(base)
    f["down_share_24"] = rolled(r2.where((r < 0) | r.isna(), 0.0), 24) / (rolled(r2, 24) + VARIANCE_FLOOR)
    largest = ra.rolling(24, min_periods=12).max()
    f["jump_24"] = np.log1p(largest / np.sqrt(rolled(d["gk"], 24) + VARIANCE_FLOOR))
    f["volume_1"] = lv - rolled(lv, 168)
    f["volume_24"] = rolled(lv, 24) - rolled(lv, 720)
    f["volume_same_hour"] = lv - lv.shift(24)
    f["turnover_1"] = lt - rolled(lt, 24)
    f["turnover_6"] = rolled(lt, 6) - rolled(lt, 168)
    f["impact_24"] = np.log(rolled(impact, 24)) - np.log(rolled(impact, 168))
    f["place_in_bar"] = d["place"]
    for n in (24, 168):
        top = d["high"].rolling(n, min_periods=1).max()
        bottom = d["low"].rolling(n, min_periods=1).min()
        f[f"place_{n}"] = (d["close"] - bottom) / (top - bottom)
    for n in (24, 168):
        f[f"trend_{n}"] = z.ewm(alpha=1 / n, adjust=True, ignore_na=True).mean()
    for name, period in (("hour", 86_400_000), ("week", WEEK_MS)):
        angle = (ms - MONDAY_MS) % period / period * (2 * np.pi)
        f[f"{name}_sin"], f[f"{name}_cos"] = np.sin(angle), np.cos(angle)
    month = (d["open_time"].dt.day_of_year - 1) / 366 * (2 * np.pi)
    f["month_sin"], f["month_cos"] = np.sin(month), np.cos(month)
    f["weekend"] = (d["open_time"].dt.day_of_week >= 5).astype(np.float64)
    f["season_now"] = np.log(d["s_now"])
    for h in transform.horizons:
        f[f"season_{h}"] = np.log(d[f"s_{h}"] / h)
    f["funding"] = (d["funding"] * 1e4).clip(-50, 50)
    f["funding_change"] = ((d["funding"] - d["funding"].shift(24)) * 1e4).clip(-50, 50)
    f["btc_ret_1"], f["btc_ret_24"] = d["btc_z"], rolled(d["btc_z"], 24)
    f["btc_gk_1"], f["btc_gk_24"] = d["btc_gk_1"], d["btc_gk_24"]
    f["btc_base"] = 0.5 * (np.log(d["btc_base"]) - np.log(base))
    return pd.DataFrame(f)


def with_pandas(frames: Sequence[pd.DataFrame], lead: int, transform: FeatureTransform) -> list[pd.DataFrame]:
    """Features of every series; ``lead`` is BTC's place among them, prepared once for all."""
    prepared = [pandas_prepared(f, transform) for f in frames]
    state = pandas_lead(prepared[lead])
    return [pandas_features(p, state, transform) for p in prepared]


def with_recur(series: Sequence[RawSeries], transform: FeatureTransform) -> list[pl.DataFrame]:
    return [raw for _, raw in raw_features(series, transform)]


def market(symbols: int, n: int, interval: str) -> tuple[list[RawSeries], FeatureTransform]:
    """Generated series with 0.1 % of their bars missing and funding, and a transform fitted on two thirds."""
    names = ["BTCUSDT", *(f"COIN{k}USDT" for k in range(1, symbols))]
    candles = pl.concat([bars(name, n, interval, seed, holes=n // 1000) for seed, name in enumerate(names)])
    payments = n * INTERVALS[interval] // 28_800_000 + 1
    times = START_MS + 28_800_000 * np.arange(payments, dtype=np.int64)
    rates = 1e-4 * np.random.default_rng(9).normal(1, 1, payments)
    funding = pl.DataFrame(
        {"funding_time": pl.Series(times).cast(pl.Datetime("ms", "UTC")), "rate": rates}
    ).select(pl.lit("linear").alias("category"), pl.lit("BTCUSDT").alias("symbol"), pl.all())
    funding = pl.concat([funding.with_columns(pl.lit(name).alias("symbol")) for name in names])
    series = raw_series(candles, "store", funding)
    until = START_MS + n * 2 // 3 * INTERVALS[interval]
    return series, fit_transform(series, interval, HORIZONS, until)


def agreement(ours: pl.DataFrame, theirs: pd.DataFrame, names: Sequence[str], rows: int = 2000) -> float:
    """Largest difference on the last rows where both are defined, relative to the value (or to 0.001 near zero).

    Raises SystemExit naming the features when one differs by more than 1e-6 or is never defined in both.
    """
    worst, off = 0.0, []
    for name in names:
        a = ours[name].tail(rows).fill_null(np.nan).to_numpy().astype(np.float64)
        b = theirs[name].to_numpy(dtype=np.float64)[-rows:]
        both = np.isfinite(a) & np.isfinite(b)
        gap = np.abs(a - b)[both] / np.maximum(np.abs(b[both]), 1e-3)
        if not both.any() or gap.max() > 1e-6:
            off.append(f"{name} ({gap.max() if both.any() else 'never defined':.2g})")
        worst = max(worst, float(gap.max(initial=0.0)))
    if off:
        raise SystemExit(f"recur and pandas disagree: {', '.join(off)}")
    return worst


def measure(quick: bool) -> Results:
    cases = {"1 symbol": (1, 100_000 if quick else 1_580_000, "1m", 4.0, 5.0)}
    cases["20 symbols"] = (20, 5_000 if quick else 26_280, "1h", 1.5, 25.0)
    whole, mile = [], []
    results: Results = {}
    for name, (symbols, n, interval, wanted, wanted_ms) in cases.items():
        series, transform = market(symbols, n, interval)
        frames = [s.frame.to_pandas() for s in series]
        newest = [RawSeries(s.unique_id, s.symbol, s.group, s.frame.tail(TAIL)) for s in series]
        newest_pandas = [f.tail(TAIL).reset_index(drop=True) for f in frames]
        names, place = transform.names, [s.symbol for s in series].index("BTCUSDT")
        pairs = zip(with_recur(series, transform), with_pandas(frames, place, transform), strict=True)
        worst = max(agreement(a, b, names) for a, b in pairs)

        def whole_recur(s: list[RawSeries] = series, t: FeatureTransform = transform) -> None:
            with_recur(s, t)

        def whole_pandas(
            f: list[pd.DataFrame] = frames, k: int = place, t: FeatureTransform = transform
        ) -> None:
            with_pandas(f, k, t)

        def mile_recur(s: list[RawSeries] = newest, t: FeatureTransform = transform) -> None:
            for raw in with_recur(s, t):
                t.standardise(raw.tail(1))

        def mile_pandas(
            f: list[pd.DataFrame] = newest_pandas, k: int = place, t: FeatureTransform = transform
        ) -> None:
            for raw in with_pandas(f, k, t):
                row = (raw.tail(1)[t.names].to_numpy(dtype=np.float64) - t.mean) / t.std
                np.clip(np.nan_to_num(row), -6, 6)

        took = interleaved({"recur": whole_recur, "pandas": whole_pandas}, 2 if quick else 5)
        near = interleaved({"recur": mile_recur, "pandas": mile_pandas}, 5 if quick else 21, warm=3)
        ratio = took["pandas"] / took["recur"]
        title = f"{name} × {n:,} bars of {interval}"
        whole.append(
            (title, f"{took['recur']:.3f} s", f"{took['pandas']:.3f} s", f"{ratio:.2f}", goal(ratio, wanted))
        )
        ms, ms_pandas = 1e3 * near["recur"], 1e3 * near["pandas"]
        mile.append(
            (
                f"{name} × {TAIL:,} bars",
                f"{ms:.1f} ms",
                f"{ms_pandas:.1f} ms",
                f"{ms_pandas / ms:.2f}",
                goal(ms, wanted_ms, at_least=False) + " (ms)",
            )
        )
        results[name.replace(" ", "_")] = {
            "bars": n,
            "interval": interval,
            "features": len(names),
            "recur_s": took["recur"],
            "pandas_s": took["pandas"],
            "pandas_over_recur": ratio,
            "goal": wanted,
            "last_mile_recur_ms": ms,
            "last_mile_pandas_ms": ms_pandas,
            "last_mile_goal_ms": wanted_ms,
            "largest_relative_difference": worst,
        }
        print(
            f"{title}: all {len(names)} features agree with pandas on the last 2,000 rows, worst {worst:.1e}"
        )
    header = ("", "recur", "pandas", "pandas / recur", "goal")
    show("Whole feature set (medians)", header, whole)
    show("Last mile: the newest bar's features, standardised (medians)", header, mile)
    return results


if __name__ == "__main__":
    main(measure, __doc__)
