"""Faults of what an answer tells: wrong, missing, late and repeated rows; cursors; the announcement feed."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, quote

from recur.connectors.sandbox.endpoints import INTERVAL_OF_CODE
from recur.connectors.sandbox.strike import Effect, Strike, edited
from recur.connectors.sandbox.wire import Reply
from recur.vocabulary import DAY_MS, HOUR_MS, next_open, parse_time

Rows = list[Any]
_YEAR_MS = 365 * DAY_MS
_LOCAL_TAGS = {"Spot": "現物", "Derivatives": "デリバティブ", "Futures": "先物", "Delistings": "上場廃止"}


def _rows(change: Callable[[Strike, Rows], Rows]) -> Effect:
    """An effect on the rows of an answer, newest first; one without rows stays as it is."""

    def on_document(strike: Strike, document: dict[str, Any]) -> None:
        if document["result"].get("list"):
            document["result"]["list"] = change(strike, document["result"]["list"])

    return edited(on_document)


def _closes(strike: Strike, row: list[str]) -> int:
    return next_open(int(row[0]), INTERVAL_OF_CODE[strike.request.query["interval"]])


def _is_kline(strike: Strike) -> bool:
    return strike.request.path.endswith("kline")


# -- which rows come ------------------------------------------------------------------------------------------


def _earlier_page(strike: Strike, rows: Rows) -> Rows:
    """What the same question about the range just before would have brought."""
    names = ("start", "end") if _is_kline(strike) else ("startTime", "endTime")
    start, end = (strike.request.query.get(name) for name in names)
    if start is None or end is None:
        return rows
    shift = int(end) + 1 - int(start)
    return strike.rows_of(**{names[0]: str(int(start) - shift), names[1]: str(int(start) - 1)}) or rows


def _row_before(strike: Strike, rows: Rows) -> Rows:
    return rows + strike.rows_of(start=None, end=str(int(rows[-1][0]) - 1), limit="1")


def _row_after(strike: Strike, rows: Rows) -> Rows:
    return strike.rows_of(start=str(int(strike.request.query["end"]) + 1), end=None, limit="1") + rows


def _ignoring_end(strike: Strike, rows: Rows) -> Rows:
    if _is_kline(strike):
        return strike.rows_of(end=None)
    return strike.rows_of(startTime=None, endTime=None)


def _older_too(strike: Strike, rows: Rows) -> Rows:
    more = str(int(strike.number("rows")))
    return rows + strike.rows_of(start=None, end=str(int(rows[-1][0]) - 1), limit=more)


def _without_late(strike: Strike, rows: Rows) -> Rows:
    wait_ms = int(strike.number("seconds") * 1000)
    return [r for r in rows if not _closes(strike, r) <= strike.now_ms < _closes(strike, r) + wait_ms]


def _between(strike: Strike, row: list[str]) -> bool:
    return parse_time(strike.text("from")) <= int(row[0]) < parse_time(strike.text("to"))


def _flat(strike: Strike, rows: Rows) -> Rows:
    return [[r[0], *[r[1]] * 4, *["0"] * (len(r) - 5)] if _between(strike, r) else r for r in rows]


def _in_order(strike: Strike, rows: Rows) -> Rows:
    if strike.text("form") == "ascending":
        return rows[::-1]
    return random.Random(strike.fault.draw).sample(rows, len(rows))


def _twice(strike: Strike, rows: Rows) -> Rows:
    middle = len(rows) // 2
    return rows[: middle + 1] + rows[middle:]


def _hole(strike: Strike, rows: Rows) -> Rows:
    middle = len(rows) // 2
    return rows[:middle] + rows[middle + 1 :]


def _sparse(strike: Strike, rows: Rows) -> Rows:
    before_ms = parse_time(strike.text("before"))
    times = [int(row["fundingRateTimestamp"]) for row in rows]
    return [
        row for row, at in zip(rows, times, strict=True) if at >= before_ms or at // (8 * HOUR_MS) % 2 == 0
    ]


# -- what the rows say ----------------------------------------------------------------------------------------


def _unrevised(strike: Strike, rows: Rows) -> Rows:
    closed = [i for i, row in enumerate(rows) if _closes(strike, row) <= strike.now_ms]
    if closed:
        row = rows[closed[0]]
        row[4] = row[1]
        if len(row) > 5:
            row[5] = str(float(row[5]) / 2)
    return rows


def _malformed(strike: Strike, rows: Rows) -> Rows:
    row = rows[len(rows) // 2]
    true = row[4]
    digits, _, fraction = true.partition(".")
    row[4] = {
        "empty": "",
        "zero": "0",
        "tiny": "1e-7",
        "exponent": f"{float(true):.16e}",
        "nan": "NaN",
        "huge": f"{digits}.{fraction or '0'}{'0' * 60}",
        "comma": f"{float(true):,.1f}" if float(true) >= 1000 else f"1,{true}",
    }[strike.text("form")]
    return rows


def _impossible(strike: Strike, rows: Rows) -> Rows:
    row = rows[len(rows) // 2]
    if strike.text("form") == "crossed":
        row[2], row[3] = str(float(row[3]) * 0.9), str(float(row[2]) * 1.1)
    elif len(row) > 5:
        row[5] = "-1"
    return rows


def _mistimed(strike: Strike, rows: Rows) -> Rows:
    form = strike.text("form")
    if form == "seconds":
        return [[str(int(row[0]) // 1000), *row[1:]] for row in rows]
    row = rows[len(rows) // 2]
    row[0] = str(int(row[0]) + (1000 if form == "misaligned" else 10 * _YEAR_MS))
    return rows


def _relaunched(strike: Strike, rows: Rows) -> Rows:
    for row in rows:
        if "launchTime" in row:
            row["launchTime"] = str(int(row["launchTime"]) + int(strike.number("days") * DAY_MS))
    return rows


def _delisted(strike: Strike, document: dict[str, Any]) -> None:
    rows, query = document["result"]["list"], strike.request.query
    if _is_kline(strike):
        at_ms = parse_time(strike.text("at"))
        document["result"]["list"] = [row for row in rows if int(row[0]) < at_ms]
        return
    kept = [row for row in rows if row["symbol"] != strike.fault.symbol]
    if query.get("status") == "Closed":
        at = str(parse_time(strike.text("at")))
        gone = [
            row for row in strike.rows_of(status=None, cursor=None) if row["symbol"] == strike.fault.symbol
        ]
        kept += [row | {"status": "Closed", "deliveryTime": at} for row in gone]
    document["result"]["list"] = kept


def _renamed(strike: Strike, reply: Reply) -> Reply:
    if _is_kline(strike):
        reply.body = strike.error(10001, "params error: symbol invalid")
        return reply

    def rename(strike: Strike, rows: Rows) -> Rows:
        to, old = strike.text("to"), strike.fault.symbol
        return [row | {"symbol": to} if row["symbol"] == old else row for row in rows]

    return _rows(rename)(strike, reply)


# -- paging ---------------------------------------------------------------------------------------------------


def _same_cursor(strike: Strike, document: dict[str, Any]) -> None:
    asked, own = strike.request.query.get("cursor", ""), document["result"].get("nextPageCursor")
    again = quote(asked, safe="") if asked else own
    document["result"]["nextPageCursor"] = again or quote("first=A&last=A&lasttime=1", safe="")


def _empty_with_cursor(strike: Strike, document: dict[str, Any]) -> None:
    document["result"] |= {"list": [], "nextPageCursor": quote("lastid=0&lasttime=1&last=A", safe="")}


def _encoded_twice(strike: Strike, document: dict[str, Any]) -> None:
    document["result"]["nextPageCursor"] = quote(document["result"].get("nextPageCursor", ""), safe="")


def _shifted(strike: Strike, rows: Rows) -> Rows:
    last = parse_qs(strike.request.query["cursor"]).get("last", [""])[0]
    return strike.rows_of(symbol=last, cursor=None) + rows


# -- announcements --------------------------------------------------------------------------------------------


def _inserted(strike: Strike, rows: Rows) -> Rows:
    page = int(strike.request.query.get("page", "1"))
    if page == 1:
        return rows
    shifted = strike.rows_of(page=str(page - 1))[-1:] + rows
    return shifted[: int(strike.request.query.get("limit", "20"))]


def _retitled(strike: Strike, rows: Rows) -> Rows:
    return [rows[0] | {"title": rows[0]["title"] + " (updated)"}, *rows[1:]]


def _each(change: Callable[[Strike, dict[str, Any]], dict[str, Any]]) -> Effect:
    return _rows(lambda strike, rows: [change(strike, row) for row in rows])


def _unpublished(strike: Strike, row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "publishTime"}


def _misspelt(strike: Strike, row: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("DateTimestamp", "DataTimestamp"): value for key, value in row.items()}


def _dated_ahead(strike: Strike, row: dict[str, Any]) -> dict[str, Any]:
    return row | {"dateTimestamp": row["dateTimestamp"] + int(strike.number("days") * DAY_MS)}


def _localised(strike: Strike, row: dict[str, Any]) -> dict[str, Any]:
    return row | {"tags": [_LOCAL_TAGS.get(tag, tag) for tag in row["tags"]]}


def _miscounted(strike: Strike, document: dict[str, Any]) -> None:
    document["result"]["total"] = 3 * document["result"]["total"] + 7


EFFECTS: dict[str, Effect] = {
    "swapped-reply": _rows(_earlier_page),
    "open-candle-absent": _rows(lambda s, rows: [r for r in rows if _closes(s, r) <= s.now_ms]),
    "row-before-start": _rows(_row_before),
    "limit-lowered": _rows(lambda s, rows: rows[: int(s.number("rows"))]),
    "start-ignored": _rows(lambda s, rows: s.rows_of(start=None, startTime=None)),
    "end-ignored": _rows(_ignoring_end),
    "empty-page": _rows(lambda s, rows: []),
    "missing-bars": _rows(lambda s, rows: [r for r in rows if not _between(s, r)]),
    "flat-bars": _rows(_flat),
    "duplicate-rows": _rows(_twice),
    "page-overlap": _rows(_row_after),
    "row-order": _rows(_in_order),
    "short-page": _rows(lambda s, rows: rows[: -int(s.number("rows"))]),
    "long-page": _rows(_older_too),
    "late-revision": _rows(_unrevised),
    "late-bar": _rows(_without_late),
    "malformed-number": _rows(_malformed),
    "impossible-bar": _rows(_impossible),
    "wrong-timestamp": _rows(_mistimed),
    "launch-time-wrong": _rows(_relaunched),
    "delisted-midway": edited(_delisted),
    "symbol-renamed": _renamed,
    "cursor-repeats": edited(_same_cursor),
    "cursor-on-empty-page": edited(_empty_with_cursor),
    "cursor-expired": lambda s, reply: Reply(body=s.error(10001, "params error: cursor invalid")),
    "cursor-double-encoded": edited(_encoded_twice),
    "funding-interval-change": _rows(_sparse),
    "series-hole": _rows(_hole),
    "series-duplicate": _rows(_twice),
    "instruments-shift": _rows(_shifted),
    "announcement-inserted": _rows(_inserted),
    "announcement-edited": _rows(_retitled),
    "publish-time-missing": _each(_unpublished),
    "date-fields-misspelt": _each(_misspelt),
    "announcement-dated-ahead": _each(_dated_ahead),
    "tags-localised": _each(_localised),
    "total-wrong": edited(_miscounted),
}
