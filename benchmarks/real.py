"""Real Bybit candles, end to end, by the command line alone: the numbers of the README.

1. ``recur fetch --source FILE`` of the hourly candles and the funding into one home.
2. The same bars through pybit from ``recur sandbox serve --replay`` of those files into another home;
   the candle tables must hold the same rows.
3. ``recur backtest --model gru`` on 2025-07-01 … 2026-02-08 for BTC, ETH, SOL and BNB, with a pool of other
   candle files for training, on two seeds of the network.

Run with the data folder beside the checkout: ``python benchmarks/real.py [../shared/data]``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import duckdb

RECUR = [sys.executable, "-m", "recur.cli"]
SPAN = ["--test-since", "2025-07-01", "--test-until", "2026-02-08"]


def recur(home: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [*RECUR, "--home", str(home), "--json", *arguments], stdout=subprocess.PIPE, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rows_of(home: Path) -> list[Any]:
    query = """SELECT category, symbol, interval, kind, open_time, open, high, low, close, volume, turnover
        FROM candles ORDER BY ALL"""
    with duckdb.connect(str(home / "market.duckdb"), read_only=True) as con:
        return con.execute(query).fetchall()


def replayed(candles: Path, funding: Path, home: Path) -> None:
    """Fetch through pybit and HTTP from a sandbox in another process."""
    server = subprocess.Popen(
        [*RECUR, "sandbox", "serve", "--replay", str(candles), "--replay", str(funding), "--port", "8897"],
        stdout=subprocess.DEVNULL,
    )
    try:
        time.sleep(5)
        recur(
            home, "fetch", "--source", "sandbox", "--base-url", "http://127.0.0.1:8897", "--since", "2023-11-29",
            "-s", "BTCUSDT,ETHUSDT,SOLUSDT,BNBUSDT", "--kinds", "candles,funding",
        )  # fmt: skip
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    data = Path(sys.argv[1] if len(sys.argv) > 1 else "../shared/data").resolve()
    candles, funding = data / "candles_bybit_perp_1h.parquet", data / "funding_bybit.parquet"
    if not candles.exists():
        sys.exit(f"{candles} is not there: give the folder that holds it.")
    pool = [data / f for f in ("candles_binance_perp_1h.parquet", "candles_binance_spot_1h.parquet")]
    with tempfile.TemporaryDirectory() as scratch:
        from_files, from_venue = Path(scratch) / "files", Path(scratch) / "venue"
        recur(from_files, "fetch", "--source", str(candles), "--source", str(funding))
        replayed(candles, funding, from_venue)
        a, b = rows_of(from_files), rows_of(from_venue)
        print(f"candles from the file {len(a)}, through pybit {len(b)}, identical: {a == b}")
        if a != b:
            sys.exit(1)
        results = {}
        for seed in ("0", "1"):
            started = time.monotonic()
            pools = [part for file in pool for part in ("--pool", str(file))]
            found = recur(
                from_files, "backtest", "--model", "gru", "--folds", "1", "--seed", seed, *SPAN, *pools
            )
            results[seed] = found
            print(f"\nseed {seed}, {time.monotonic() - started:.0f} s: {found['verdict']['skill']}")
            print("| horizon | random_walk | ewma | har | 50 % band | 90 % band | QLIKE vs ewma |")
            print("|---|---|---|---|---|---|---|")
            for h, f in found["forecast"].items():
                cells = []
                for name in ("random_walk", "ewma", "har"):
                    s = f["baselines"][name]
                    p = "< .001" if s["dm_p"] < 0.001 else f"{s['dm_p']:.3f}"
                    low, high = 100 * s["crps_skill_low"], 100 * s["crps_skill_high"]
                    cells.append(f"{100 * s['crps_skill']:+.2f} % [{low:+.2f}, {high:+.2f}] p {p}")
                qlike = f["baselines"]["ewma"]["qlike_diff"]
                bands = f"{100 * f['coverage_50']:.1f} % | {100 * f['coverage_90']:.1f} % | {qlike:+.3f}"
                print(f"| {h} | {' | '.join(cells)} | {bands} |")
            trading = found["trading"]
            print(f"net Sharpe {trading['net_sharpe']:.2f}, break-even {trading['break_even_bps']:.1f} bp")


if __name__ == "__main__":
    main()
