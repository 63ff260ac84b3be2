"""A server that answers by a script, and a connector whose waits take no time."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import polars as pl

from recur.connectors.bybit import BybitConnector
from recur.connectors.windows import Window
from recur.vocabulary import HOUR_MS, Series, parse_time

START = parse_time("2025-07-01")
NOW = parse_time("2025-08-30T12:34")
BTC = Series("linear", "BTCUSDT", "1h")
TWO_HOURS = Window(BTC, START, START + 2 * HOUR_MS, 2)

Reply = tuple[int, str, dict[str, str]]


class Scripted:
    """A server that gives ``replies`` in turn and then the last one for ever."""

    def __init__(self, replies: list[Reply]) -> None:
        self.replies = replies
        self.asked = 0
        self.paths: list[str] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body, headers = script.replies[min(script.asked, len(script.replies) - 1)]
                script.asked += 1
                script.paths.append(self.path)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()

    def stop(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class Clock:
    """Seconds that pass only by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def patient(base_url: str, **options: Any) -> tuple[BybitConnector, Clock]:
    """A connector whose waits take no time, and the clock that counts them."""
    clock = Clock()
    return BybitConnector(base_url, clock=clock, sleep=clock.sleep, **options), clock


def ok(result: object, **extra: object) -> Reply:
    return 200, json.dumps({"retCode": 0, "retMsg": "", "result": result, "time": NOW, **extra}), {}


def code(number: object, text: str = "no") -> Reply:
    return 200, json.dumps({"retCode": number, "retMsg": text, "result": {}, "time": NOW}), {}


def row(hour: int, *values: str) -> list[str]:
    return [str(START + hour * HOUR_MS), *(values or ("10", "12", "9", "11", "5", "55"))]


GOOD = ok({"category": "linear", "symbol": "BTCUSDT", "list": [row(1), row(0)]})
HTML = "<html><body>The distribution is configured to block access from your country.</body></html>"


def opens(frame: pl.DataFrame) -> list[int]:
    return frame["open_time"].dt.epoch("ms").to_list()
