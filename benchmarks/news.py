"""Are news worth anything? The ablation and the placebo on real candles and real news, 2021 to 2023.

Hourly BTC candles (Binance spot from 2017 on) and four archives of dated headlines go into a store; a sentiment model is
trained on labelled texts without dates (Financial PhraseBank, Twitter, crypto headlines), so that none of what it learned
from is an item of the archives unless its words are (two passes of fine-tuning, to be done in minutes); ``recur backtest --ablate news --placebo N`` judges 2023-07-01 …
2024-01-01. Run with the data folder beside the checkout:

    python benchmarks/news.py [--data ../shared/data] [--placebo 10] [--home FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import show

CANDLES = "candles_binance_spot_1h.parquet"
NEWS = (
    "news_bitcoin_2021_2024.parquet", "news_coindesk_btc_2013_2024.parquet", "news_cryptonews_2021_2022.parquet",
    "news_crypto_2024q2.parquet",
)  # fmt: skip
TEXTS = (
    "text_financial_phrasebank.parquet", "text_twitter_financial_news.parquet", "text_crypto_headlines_5level.parquet",
)  # fmt: skip
SPAN = ("--test-since", "2023-07-01", "--test-until", "2024-01-01", "--folds", "1")


def recur(home: Path, *words: str) -> dict[str, Any]:
    """One command's JSON document; ends the benchmark when the command fails."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "recur.cli", "--home", str(home), "--json", *words],
        capture_output=True,
        check=False,
        text=True,
    )
    if done.returncode:
        sys.exit(f"recur {' '.join(words[:3])} failed: {done.stderr.strip()[-500:]}")
    print(f"{time.monotonic() - started:6.0f} s  recur {' '.join(words[:2])}", file=sys.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--placebo", type=int, default=10)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--home", type=Path, help="keep the store and the runs here")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = asked.home or Path(folder)
        recur(home, "fetch", "--category", "spot", "--source", str(asked.data / CANDLES))
        items = [recur(home, "fetch", "--source", str(asked.data / name)) for name in NEWS]
        labelled = [word for name in TEXTS for word in ("--data", str(asked.data / name))]
        model = recur(home, "train", "sentiment", "--epochs", "2", *labelled)["run_id"]
        scored = recur(home, "sentiment", "--stored", "--run", model)
        result = recur(
            home, "backtest", "--ablate", "news", "--placebo", str(asked.placebo), "--seed", asked.seed, *SPAN,
            "--set", "market.category=spot", "--set", "market.symbols=BTCUSDT", "--set", f"features.news_run={model}",
        )  # fmt: skip
    rows = []
    for h, part in result["horizons"].items():
        gains = part.get("placebo_gains") or [float("nan")]
        rows.append(
            (h, f"{part['gain']:+.2f} %", f"{part['dm_p']:.3f}", f"{min(gains):+.2f} … {max(gains):+.2f} %",
             f"{part.get('placebo_p', float('nan')):.2f}")
        )  # fmt: skip
    show("CRPS gained by news", ("bars ahead", "gain", "DM p", "placebo gains", "placebo p"), rows)
    trading = result["trading"]
    print(
        f"net Sharpe {trading['net_sharpe_without']:.2f} without, {trading['net_sharpe_with']:.2f} with news"
    )
    print(f"{sum(i['new'] for i in items):,} items, {scored['scored']:,} versions scored; {result['text']}")
    if asked.json:
        asked.json.write_text(
            json.dumps({"items": items, "scored": scored, **result}, indent=2, default=str) + "\n"
        )


if __name__ == "__main__":
    main()
