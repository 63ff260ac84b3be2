"""What an effect may know: the fault, the request it strikes, and the venue behind it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from recur.connectors.sandbox.faults import Fault
from recur.connectors.sandbox.wire import Reply, Request


class Venue(Protocol):
    """The part of the server that a fault can put out of order."""

    def ban(self, seconds: float) -> None: ...
    def go_away(self, seconds: float, stalling: bool = False) -> None: ...


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault at one request. ``again(changes)`` is the true answer to the request with other parameters
    (None removes one)."""

    fault: Fault
    request: Request
    now_ms: int
    again: Callable[[Mapping[str, str | None]], bytes]
    venue: Venue

    def number(self, option: str) -> float:
        return float(self.fault.options[option])

    def text(self, option: str) -> str:
        return str(self.fault.options[option])

    def rows_of(self, **changes: str | None) -> list[Any]:
        """The rows of ``again``; none when that was refused."""
        found: list[Any] = json.loads(self.again(changes))["result"].get("list", [])
        return found

    def error(self, code: int, message: str) -> bytes:
        """An envelope that refuses."""
        document = {"retCode": code, "retMsg": message, "result": {}, "retExtInfo": {}, "time": self.now_ms}
        return json.dumps(document).encode()


Effect = Callable[[Strike, Reply], Reply]


def edited(change: Callable[[Strike, dict[str, Any]], object]) -> Effect:
    """An effect that changes the decoded JSON of a good answer in place; an error answer stays as it is."""

    def effect(strike: Strike, reply: Reply) -> Reply:
        document = json.loads(reply.body)
        if document["retCode"] == 0:
            change(strike, document)
            reply.body = json.dumps(document).encode()
        return reply

    return effect
