"""Fetching at the venue's ceiling: five years of 1m candles of one symbol, and three years of 1h of fifty.

Two processes share this machine: the sandbox exchange, which answers each request 150 ms late and bans an address
that sends more than 600 in 5 seconds, and a fetch that plans, asks through pybit, checks, and stores. The ceiling is
120 requests per second. The clock of the fetch runs from its first request to its last committed row.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import Results, bars, goal, main, show

CEILING_PER_S = 120.0
LATENCY_S = 0.15
CASES = {"1 symbol, 5 years of 1m": (1, "1m", 2_629_800), "50 symbols, 3 years of 1h": (50, "1h", 26_280)}
QUICK = {"1 symbol of 1m": (1, "1m", 300_000), "10 symbols of 1h": (10, "1h", 10_000)}


def serve(symbols: int, interval: str, n: int) -> None:
    """The exchange: answers until its standard input ends, then says what it saw."""
    import polars as pl

    from recur.connectors.sandbox.replay import ReplayMarket
    from recur.connectors.sandbox.server import SandboxServer, VirtualClock

    world = ReplayMarket(pl.concat([bars(f"C{k:02d}USDT", n, interval, seed=k) for k in range(symbols)]))
    server = SandboxServer(world, VirtualClock(world.end_ms), enforce_limit=True)
    server.endpoints = _Late(server.endpoints)  # type: ignore[assignment]
    with server:
        used = time.process_time()
        print(json.dumps({"url": server.base_url, "since": world.start_ms}), flush=True)
        sys.stdin.read()
        seen: dict[str, float] = {"requests": sum(server.requests.values()), "refused": server.limit.refused}
        seen["cpu_s"] = time.process_time() - used
        print(json.dumps(seen | {"most_in_5_s": server.limit.most_in_window}), flush=True)


class _Late:
    """Endpoints that answer ``LATENCY_S`` later."""

    def __init__(self, endpoints: Any) -> None:
        self._endpoints = endpoints

    def __contains__(self, path: str) -> bool:
        return path in self._endpoints

    def answer(self, path: str, query: Any, now_ms: int) -> Any:
        due = time.monotonic() + LATENCY_S
        body = self._endpoints.answer(path, query, now_ms)
        time.sleep(max(0.0, due - time.monotonic()))
        return body


def fetch(url: str, since_ms: int, symbols: int, interval: str, home: str) -> None:
    """The fetch, in a process of its own so that its memory is its own."""
    from recur.connectors.bybit import BybitConnector
    from recur.pipeline.fetch import FetchRequest, plan_fetch, run_fetch
    from recur.storage.store import Store

    store, connector = Store(Path(home)), BybitConnector(url)
    names = tuple(f"C{k:02d}USDT" for k in range(symbols))
    started = time.monotonic()
    used = time.process_time()
    plan = plan_fetch(store, connector, FetchRequest(names, interval=interval, since_ms=since_ms))
    planned = time.monotonic()
    summary = run_fetch(store, connector, plan)
    seconds = time.monotonic() - started
    print(
        json.dumps(
            {
                "seconds": seconds,
                "planning_s": planned - started,
                "cpu_s": time.process_time() - used,
                "requests": connector.requests,
                "rows": summary.new,
                "gaps": summary.gaps,
                "peak_mib": _peak_mib(),
                "store_mib": store.path.stat().st_size / 2**20,
            }
        )
    )


def _peak_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def run(symbols: int, interval: str, n: int) -> dict[str, Any]:
    command = [sys.executable, __file__]
    with (
        tempfile.TemporaryDirectory() as home,
        subprocess.Popen(
            [*command, "--serve", str(symbols), interval, str(n)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as exchange,
    ):  # fmt: skip
        assert exchange.stdout is not None and exchange.stdin is not None
        told = json.loads(exchange.stdout.readline())
        work = [*command, "--fetch", told["url"], str(told["since"]), str(symbols), interval, home]
        done = subprocess.run(work, stdout=subprocess.PIPE, text=True, check=True)
        exchange.stdin.close()
        result: dict[str, Any] = json.loads(done.stdout)
        result["exchange"] = json.loads(exchange.stdout.readline())
    assert result["rows"] == symbols * n and result["gaps"] == 0, result
    result["requests_per_s"] = result["requests"] / result["seconds"]
    result["rows_per_s"] = result["rows"] / result["seconds"]
    result["fraction"] = result["requests_per_s"] / CEILING_PER_S
    return result


def take_cost_us(n: int = 20_000) -> float:
    """Microseconds that one turn of the shared budget costs when nothing has to be waited for."""
    from recur.connectors.ratefile import PaceFile
    from recur.connectors.ratelimit import RateLimiter

    with tempfile.TemporaryDirectory() as folder:
        limiter = RateLimiter(1e9, 8, file=PaceFile("bench", Path(folder)))
        limiter.take()
        start = time.perf_counter()
        for _ in range(n):
            limiter.take()
        return 1e6 * (time.perf_counter() - start) / n


def measure(quick: bool) -> Results:
    results: Results = {"take_us": take_cost_us()}
    rows = []
    for name, case in (QUICK if quick else CASES).items():
        found = results[name] = run(*case)
        rows.append(
            (
                name,
                f"{found['requests']:,}",
                f"{found['requests_per_s']:.1f}",
                f"{found['rows_per_s']:,.0f}",
                f"{100 * found['fraction']:.1f} %",
                goal(found["fraction"], 0.8),
                f"{found['peak_mib']:.0f}",
                f"{found['cpu_s'] / found['seconds']:.2f}",
                f"{found['exchange']['cpu_s'] / found['seconds']:.2f}",
                f"{found['exchange']['most_in_5_s']}",
                f"{found['exchange']['refused']}",
            )
        )
    show(
        "Fetch over HTTP, 150 ms per request, at most 600 requests in 5 s, store included",
        (
            "",
            "requests",
            "req/s",
            "rows/s",
            "of 120/s",
            "goal",
            "peak MiB",
            "cores",
            "its cores",
            "most in 5 s",
            "refused",
        ),
        rows,
    )
    print(f"\nOne turn of the shared budget: {results['take_us']:.1f} µs")
    return results


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    elif sys.argv[1:2] == ["--fetch"]:
        fetch(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], sys.argv[6])
    else:
        main(measure, __doc__)
