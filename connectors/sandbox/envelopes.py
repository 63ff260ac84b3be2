"""Faults of the answer as a whole: codes, missing and odd fields, bodies that are no JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from recur.connectors.sandbox.strike import Effect, Strike, edited
from recur.connectors.sandbox.wire import Reply


def _code(code: int, message: str) -> Effect:
    return lambda strike, reply: replace(reply, body=strike.error(code, message))


def _server_code(strike: Strike, reply: Reply) -> Reply:
    code = int(strike.number("code")) or (10000 if strike.fault.draw < 0.5 else 10016)
    return replace(reply, body=strike.error(code, "Server Timeout"))


def _without_message(strike: Strike, reply: Reply) -> Reply:
    document = json.loads(strike.error(int(strike.number("code")), ""))
    del document["retMsg"]
    return replace(reply, body=json.dumps(document).encode())


def _body(make: Callable[[Strike, bytes], bytes]) -> Effect:
    return lambda strike, reply: replace(reply, body=make(strike, reply.body))


def _not_an_object(strike: Strike, body: bytes) -> bytes:
    forms = {"list": b"[]", "null": b"null", "nan": body.replace(b'"retCode":0', b'"retCode":NaN', 1)}
    return forms[strike.text("form")]


def _retcode(strike: Strike, document: dict[str, Any]) -> None:
    form = strike.text("form")
    if form == "missing":
        del document["retCode"]
    else:
        document["retCode"] = None if form == "null" else "0"


def _result(strike: Strike, document: dict[str, Any]) -> None:
    form = strike.text("form")
    if form == "no-list":
        document["result"].pop("list", None)
    else:
        document["result"] = None if form == "null" else []


def _more_fields(strike: Strike, document: dict[str, Any]) -> None:
    document["traceId"] = document["result"]["brandNew"] = "f00d"
    for row in document["result"].get("list", []):
        if isinstance(row, list):
            row.append("7")
        else:
            row["brandNew"] = {"deep": [1, None]}


def _renamed(strike: Strike, document: dict[str, Any]) -> None:
    if "list" in document["result"]:
        document["result"]["rows"] = document["result"].pop("list")


def _echo(strike: Strike, document: dict[str, Any]) -> None:
    name = strike.text("field")
    wrong = {"symbol": "WRONGUSDT", "category": "inverse"}[name]
    if name in document["result"]:
        document["result"][name] = wrong
    for row in document["result"]["list"]:
        if isinstance(row, dict) and name in row:
            row[name] = wrong


def _skewed(strike: Strike, document: dict[str, Any]) -> None:
    document["time"] += int(strike.number("seconds") * 1000)
    if "timeSecond" in document["result"]:
        document["result"]["timeSecond"] = str(document["time"] // 1000)
        document["result"]["timeNano"] = str(document["time"] * 1_000_000)


EFFECTS: dict[str, Effect] = {
    "server-error-code": _server_code,
    "symbol-refused": _code(10001, "params error: symbol invalid"),
    "time-window-code": _code(10002, "invalid request, please check your server timestamp"),
    "retcode-malformed": edited(_retcode),
    "retmsg-missing": edited(lambda strike, document: document.pop("retMsg")),
    "error-without-retmsg": _without_message,
    "result-malformed": edited(_result),
    "empty-body": _body(lambda strike, body: b""),
    "truncated-json": _body(lambda strike, body: body[: 1 + int(strike.fault.draw * (len(body) - 1))]),
    "json-not-an-object": _body(_not_an_object),
    "unknown-fields": edited(_more_fields),
    "renamed-field": edited(_renamed),
    "retmsg-empty": edited(lambda strike, document: document.update(retMsg="")),
    "wrong-echo": edited(_echo),
    "clock-skew": edited(_skewed),
}
