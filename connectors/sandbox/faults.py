"""Which fault strikes which request: rules from a file or from code, the same for the same seed.

A file (TOML or JSON) holds a ``seed`` and a list ``rule``::

    seed = 7
    [[rule]]
    fault = "http-5xx"                  # a name of catalogue.CATALOGUE
    endpoint = "/v5/market/*kline"      # glob over the path; default: wherever the fault can strike
    symbol = "BTC*"                     # glob; default: any. A request without a symbol fits every rule
    skip = 3                            # let so many fitting requests pass first
    count = 5                           # strike so often, then never again; default: for ever
    probability = 0.5                   # of striking a fitting request; default 1
    since = "2025-07-01"                # by the venue's clock, [since, until)
    from_request = 100                  # by the number of requests served before, [from_request, to_request)
    status = 503                        # an option of the fault

At most one fault strikes a request: that of the first rule that is due.
"""

from __future__ import annotations

import json
import random
import threading
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from recur.connectors.sandbox.catalogue import CATALOGUE, Kind, Option
from recur.vocabulary import UsageError, did_you_mean, parse_time


@dataclass(frozen=True, slots=True)
class Fault:
    """One strike. ``draw`` is uniform in [0, 1), the rule's own; ``symbol`` the rule's glob."""

    name: str
    options: Mapping[str, Option]
    draw: float = 0.0
    symbol: str = "*"


@dataclass(frozen=True, slots=True)
class Rule:
    """When a fault strikes, see the head of this file. UsageError for what makes no sense."""

    fault: str
    endpoint: str = "*"
    symbol: str = "*"
    skip: int = 0
    count: int | None = None
    probability: float = 1.0
    since_ms: int | None = None
    until_ms: int | None = None
    from_request: int = 0
    to_request: int | None = None
    options: Mapping[str, Option] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = CATALOGUE.get(self.fault)
        if kind is None:
            raise UsageError(f"Unknown fault '{self.fault}'.{did_you_mean(self.fault, CATALOGUE)}")
        if not 0 <= self.probability <= 1:
            raise UsageError(f"Fault {self.fault}: the probability is {self.probability}, expected 0 to 1.")
        if self.skip < 0 or (self.count is not None and self.count < 1):
            raise UsageError(f"Fault {self.fault}: expected skip >= 0 and count >= 1.")
        for name, value in self.options.items():
            if name not in kind.options:
                known = ", ".join(kind.options) or "none"
                raise UsageError(f"Fault {self.fault} has no option '{name}'; it has {known}.")
            default = kind.options[name]
            if isinstance(default, str) != isinstance(value, str) or isinstance(value, bool):
                raise UsageError(
                    f"Fault {self.fault}: {name} is {value!r}, expected a value like {default!r}."
                )
            if isinstance(default, str) and "|" in default and value not in default.split("|"):
                raise UsageError(f"Fault {self.fault}: {name} is '{value}', expected one of {default}.")

    @property
    def kind(self) -> Kind:
        return CATALOGUE[self.fault]

    def settings(self) -> dict[str, Option]:
        """The options with defaults filled in."""
        defaults = {k: v.partition("|")[0] if isinstance(v, str) else v for k, v in self.kind.options.items()}
        return {**defaults, **self.options}


class FaultPlan:
    """Hands out the fault of each request, if any; safe to share by threads. ``counts``: strikes per name."""

    def __init__(self, rules: Iterable[Rule] = (), seed: int = 0) -> None:
        self.rules = tuple(rules)
        self.counts: Counter[str] = Counter()
        self.requests = 0
        self._lock = threading.Lock()
        self._fitted = [0] * len(self.rules)
        self._struck = [0] * len(self.rules)
        self._draws = [random.Random(f"{seed}/{number}") for number in range(len(self.rules))]

    def take(
        self, endpoint: str, symbol: str, now_ms: int, query: Mapping[str, str] | None = None
    ) -> Fault | None:
        """The fault that strikes now, counted; None when all goes well.

        ``endpoint``: a path of the REST interface, ``connect`` or ``stream/…`` (see ``catalogue``); ``symbol``
        may be empty. ``query``: the parameters, for faults that need one.
        """
        if not self.rules:
            return None
        with self._lock:
            is_request = endpoint.startswith("/")
            number, self.requests = self.requests, self.requests + is_request
            for i, rule in enumerate(self.rules):
                if _fits(rule, endpoint, symbol, now_ms, query or {}) and self._is_due(i, rule, number):
                    self._struck[i] += 1
                    self.counts[rule.fault] += 1
                    return Fault(rule.fault, rule.settings(), self._draws[i].random(), rule.symbol)
        return None

    def _is_due(self, i: int, rule: Rule, number: int) -> bool:
        if number < rule.from_request or (rule.to_request is not None and number >= rule.to_request):
            return False
        if rule.count is not None and self._struck[i] >= rule.count:
            return False
        self._fitted[i] += 1
        return self._fitted[i] > rule.skip and self._draws[i].random() < rule.probability


def _fits(rule: Rule, endpoint: str, symbol: str, now_ms: int, query: Mapping[str, str]) -> bool:
    kind = rule.kind
    return (
        any(fnmatchcase(endpoint, path) for path in kind.paths)
        and fnmatchcase(endpoint, rule.endpoint)
        and (not symbol or fnmatchcase(symbol, rule.symbol))
        and (rule.since_ms is None or now_ms >= rule.since_ms)
        and (rule.until_ms is None or now_ms < rule.until_ms)
        and (not kind.needs or kind.needs in query)
    )


_RULE_KEYS: dict[str, type | tuple[type, ...]] = {
    "fault": str, "endpoint": str, "symbol": str, "skip": int, "count": int, "probability": (int, float),
    "since": str, "until": str, "from_request": int, "to_request": int,
}  # fmt: skip


def read_faults(path: Path) -> FaultPlan:
    """The plan in a TOML or JSON file. UsageError naming the rule that cannot be used."""
    try:
        text = path.read_text("utf-8")
        document: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"The faults in {path} cannot be read: {error}.", "Give TOML, or JSON as *.json."
        ) from None
    if isinstance(document, list):
        document = {"rule": document}
    if (
        not isinstance(document, dict)
        or not isinstance(document.get("rule"), list)
        or set(document) - {"rule", "seed"}
    ):
        raise UsageError(f"{path} holds no faults: expected a list 'rule' and maybe a 'seed'.")
    seed = document.get("seed", 0)
    if not isinstance(seed, int):
        raise UsageError(f"{path}: the seed is {seed!r}, expected a whole number.")
    rules = []
    for number, row in enumerate(document["rule"], start=1):
        try:
            rules.append(_rule(row))
        except UsageError as error:
            raise UsageError(f"{path}, rule {number}: {error.message}", error.hint) from None
    return FaultPlan(rules, seed)


def _rule(row: object) -> Rule:
    if not isinstance(row, dict) or "fault" not in row:
        raise UsageError("Expected a table with at least 'fault'.")
    known = {key: value for key, value in row.items() if key in _RULE_KEYS}
    for key, value in known.items():
        if not isinstance(value, _RULE_KEYS[key]) or isinstance(value, bool):
            raise UsageError(f"{key} is {value!r}, which is not what it can be.")
    for key in ("since", "until"):
        if key in known:
            known[f"{key}_ms"] = parse_time(known.pop(key))
    return Rule(**known, options={key: value for key, value in row.items() if key not in _RULE_KEYS})
