"""What a failed call means: pybit's many exceptions become the five venue errors, once, here. Pure.

======================================================  ====================  =======
seen                                                    error                 again?
======================================================  ====================  =======
no connection, reset, time-out, cut-off body            VenueUnreachable      yes
HTTP 429 and 5xx; codes -1, 429, 10000, 10002, 10016    VenueUnreachable      yes
10006 (this endpoint is asked too often)                VenueUnreachable      yes, slower
answer without JSON or without the envelope             VenueError            yes
HTTP 403 "access too frequent", code 10018              VenueBanned           no
HTTP 403 otherwise as HTML, 10009, 10024                VenueForbidden        no
other HTTP statuses, other codes (10001 bad request)    VenueRefused          no
======================================================  ====================  =======

Codes: https://bybit-exchange.github.io/docs/v5/error. A code nobody documents is taken as permanent.
"""

from __future__ import annotations

from dataclasses import dataclass

import requests
from pybit.exceptions import FailedRequestError, InvalidRequestError

from recur.vocabulary import VenueBanned, VenueError, VenueForbidden, VenueRefused, VenueUnreachable

_TRANSIENT_CODES = {-1, 429, 10000, 10002, 10016}
_TOO_MANY_VISITS = 10006
_BAN_CODES = {10018}
_REGION_CODES = {10009, 10024}
_MAX_RESET_WAIT_S = 10.0
_FORBIDDEN_S = 600.0


@dataclass(frozen=True, slots=True)
class Failure:
    """One failed attempt: the error to raise, and whether asking again can help."""

    error: VenueError
    again: bool = False
    wait_s: float = 0.0  # at least this long before the next attempt, for every thread
    halt_s: float = 0.0  # no request of this session at all for so long


@dataclass(frozen=True, slots=True)
class Seen:
    """The last HTTP answer of a call; ``status`` 0 when none came."""

    status: int = 0
    body: str = ""  # its first 4096 characters
    size: int = 0
    reset_ms: int | None = None  # header X-Bapi-Limit-Reset-Timestamp
    now_ms: int = 0  # when it came: header Timenow, else this machine's clock


def classify(error: Exception, seen: Seen, what: str, base_url: str) -> Failure:
    """The meaning of ``error``, which pybit raised while asking ``what`` (a few words for the message)."""
    if isinstance(error, InvalidRequestError):
        return _of_code(error.status_code, str(error.message), seen, what)
    if isinstance(error, requests.RequestException):
        return unreachable(f"{what}: no answer from {base_url} ({_reason(error)}).")
    if isinstance(error, FailedRequestError):
        if seen.status in (0, 200):
            return _not_json(seen, what)
        return _of_status(seen, what)
    return malformed(f"{what}: the answer has not the venue's form ({type(error).__name__}: {error}).")


def unreachable(message: str, wait_s: float = 0.0) -> Failure:
    hint = "Check the network and --base-url; what was finished is stored, run the command again to go on."
    return Failure(VenueUnreachable(message, hint), again=True, wait_s=wait_s)


def malformed(message: str) -> Failure:
    return Failure(VenueError(message, "Nothing of it was stored; try again later."), again=True)


def _of_code(code: object, text: str, seen: Seen, what: str) -> Failure:
    if not isinstance(code, int) or isinstance(code, bool):
        return malformed(f"{what}: the answer's retCode is {code!r}, expected an integer.")
    said = f"{what}: the venue answered {code} '{text}'."
    if code == _TOO_MANY_VISITS:
        return unreachable(said, wait_s=_reset_wait_s(seen))
    if code in _TRANSIENT_CODES:
        return unreachable(said)
    if code in _BAN_CODES:
        return _banned(said)
    if code in _REGION_CODES:
        return _forbidden(said)
    return Failure(VenueRefused(said, "Check the symbol, category and interval.", code))


def _of_status(seen: Seen, what: str) -> Failure:
    said = f"{what}: HTTP status {seen.status}."
    if seen.status == 403:
        if _is_html(seen.body):
            return _forbidden(said)
        return _banned(said)
    if seen.status == 429 or seen.status >= 500:
        return unreachable(said)
    return Failure(VenueRefused(said, "Check --base-url.", seen.status))


def _not_json(seen: Seen, what: str) -> Failure:
    if _is_html(seen.body) and "block access from your country" in seen.body.lower():
        return _forbidden(f"{what}: the answer is a page that blocks this country.")
    return malformed(f"{what}: the answer is not JSON ({seen.size} bytes).")


def _banned(said: str) -> Failure:
    hint = "Too many requests from this address: stop every program that asks the venue, or give --wait-ban."
    return Failure(VenueBanned(said, hint))


def _forbidden(said: str) -> Failure:
    hint = "The venue does not serve this country or address; set --base-url to a host that serves you."
    return Failure(VenueForbidden(said, hint), halt_s=_FORBIDDEN_S)


def _is_html(body: str) -> bool:
    head = body.lstrip()[:200].lower()
    return head.startswith("<") or "<html" in head


def _reset_wait_s(seen: Seen) -> float:
    """Seconds until the limit resets when the header is sane, else one: it is absent, past or garbage at times."""
    if seen.reset_ms is None:
        return 1.0
    wait_s = (seen.reset_ms - seen.now_ms) / 1000
    return wait_s if 0 < wait_s <= _MAX_RESET_WAIT_S else 1.0


def _reason(error: Exception) -> str:
    """The innermost cause in a few words: requests nests up to four exceptions."""
    text = str(error)
    for words in ("Connection refused", "Connection reset", "timed out", "Name or service not known"):
        if words.lower() in text.lower():
            return words.lower()
    return type(error).__name__
