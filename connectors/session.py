"""One question to the venue through pybit: its turn, its retries, its answer decoded, its failure translated.

pybit builds and sends the request. Around it stand the shared request budget (``ratelimit.py``), the retries that
pybit does not make, a deadline for the whole body (pybit's time-out is per read, so a dripping body outlives it) and
a decoder that leaves the rows of an answer for ``answers.py`` to read straight into numbers.
"""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import msgspec
import requests
from pybit.unified_trading import HTTP
from requests.models import Response
from urllib3.exceptions import HTTPError

from recur.connectors import failures
from recur.connectors.answers import Reply, envelope
from recur.connectors.ratefile import PaceFile
from recur.connectors.ratelimit import DEFAULT_BURST, DEFAULT_RATE_PER_S, RateLimiter
from recur.vocabulary import UsageError, VenueBanned, VenueError, VenueUnreachable, iso

PUBLIC_URL = "https://api.bybit.com"
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
DEFAULT_WORKERS = 40
"""Requests in flight: 110 per second at 150 ms need 17, a slower venue more; see ``ratelimit.py`` for the bound."""

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.25, 8.0
_MAX_BODY = 64 << 20
_MAX_BODY_TIMES = 3.0  # a body may take so many time-outs in all

_log = logging.getLogger("recur.venue")
_parts = msgspec.json.Decoder(dict[str, msgspec.Raw])

T = TypeVar("T")


class VenueSession:
    """Asks one venue from any number of threads at once; one pybit session per thread.

    ``base_url``    None for the public venue, else e.g. ``http://127.0.0.1:8000``
    ``rate``        requests per second of this machine (the venue allows 120 to its address)
    ``workers``     threads a caller should use
    ``timeout_s``   of connecting and of each read; a body may take three of them
    ``attempts``    of one request, at most; ``deadline_s`` ends the retries of one request earlier
    ``wait_ban``    wait a ban out instead of raising VenueBanned
    ``clock``       seconds that never go back; ``sleep`` waits for seconds (and is cut short by ``stop``).
                    With a clock of its own a session does not share its budget with other processes.

    Every method raises only VenueError and its children (see ``recur.vocabulary``).
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        rate: float = DEFAULT_RATE_PER_S,
        workers: int = DEFAULT_WORKERS,
        timeout_s: float = 10.0,
        attempts: int = 5,
        deadline_s: float = 120.0,
        wait_ban: bool = False,
        clock: Callable[[], float] | None = None,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.base_url = _checked_url(base_url or PUBLIC_URL)
        self.workers = workers
        self.timeout_s = timeout_s
        self.attempts = attempts
        self.deadline_s = deadline_s
        self.wait_ban = wait_ban
        self.rate = rate
        self._clock = clock or time.monotonic
        self._stopped = threading.Event()
        self._sleep = sleep or self._stopped.wait
        self._limiter = RateLimiter(
            rate,
            max(1, min(DEFAULT_BURST, int(rate))),
            file=_budget(self.base_url) if clock is None else None,
            clock=self._clock,
            wall=clock or time.time,
            sleep=self._sleep,
        )
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._requests = 0
        self._forbidden: tuple[VenueError, float] | None = None  # until this clock time
        self._told_ban = 0.0

    @property
    def requests(self) -> int:
        """Requests sent so far, retries included."""
        return self._requests

    @property
    def is_public(self) -> bool:
        """Whether this is a venue of the world rather than a server on this machine."""
        return urlsplit(self.base_url).hostname not in LOOPBACK

    def stop(self) -> None:
        """End every wait now; later and waiting calls raise VenueUnreachable. For use on Ctrl-C."""
        self._stopped.set()

    def ask(self, what: str, call: Callable[[HTTP], Any], read: Callable[[Reply], T]) -> T:
        """Ask until an answer can be read, asking again cannot help, or attempts or time are used up.

        ``what`` names the question in errors, ``call`` makes it, ``read`` turns the answer into the result and
        raises VenueError for one that cannot be.
        """
        started = self._clock()
        attempt = 0
        while True:
            attempt += 1
            started += self._wait_for_turn()
            try:
                return read(envelope(self._send(what, call)))
            except _Failed as failed:
                failure, cause = failed.failure, failed.__cause__
            except VenueError as error:  # an answer came, but what it says cannot be
                if what not in error.message:
                    error = VenueError(f"{what}: {error.message}", error.hint)
                failure, cause = failures.Failure(error, again=True), error.__cause__
            if isinstance(failure.error, VenueBanned):
                until = self._limiter.ban()
                if self.wait_ban:
                    attempt -= 1
                    continue
                _append(failure.error, f"; banned until {iso(int(until) * 1000)}.")
            elif failure.halt_s:
                self._forbidden = (failure.error, self._clock() + failure.halt_s)
            if failure.wait_s:
                self._limiter.slow_down(failure.wait_s)
            wait_s = _backoff_s(attempt)
            late = self._clock() - started + wait_s + failure.wait_s > self.deadline_s
            if not failure.again or attempt >= self.attempts or late:
                _give_up(failure.error, attempt, cause)
            self._sleep(wait_s)

    def _wait_for_turn(self) -> float:
        """Take a place in the budget; returns the seconds for which a ban was waited out."""
        waited = 0.0
        while True:
            self._raise_if_halted()
            try:
                self._limiter.take()
            except VenueBanned:
                if not self.wait_ban:
                    raise
                waited += self._wait_ban_out()
                continue
            self._raise_if_halted()
            return waited

    def _wait_ban_out(self) -> float:
        left_s = self._limiter.ban_left_s()
        with self._lock:
            news = self._told_ban < self._clock()
            self._told_ban = self._clock() + left_s if news else self._told_ban
        if news:
            _log.warning("the venue has banned this address; waiting %.0f s for the end of the ban", left_s)
        self._sleep(left_s + random.random())
        return left_s

    def _send(self, what: str, call: Callable[[HTTP], Any]) -> Any:
        with self._lock:
            self._requests += 1
        self._thread.seen = failures.Seen()
        try:
            return call(self._api())
        except Exception as error:
            raise _Failed(failures.classify(error, self._thread.seen, what, self.base_url)) from error

    def _raise_if_halted(self) -> None:
        if self._stopped.is_set():
            raise VenueUnreachable("The fetch was stopped.", "Run the same command again to go on.")
        if self._forbidden and self._clock() < self._forbidden[1]:
            raise self._forbidden[0]

    def _api(self) -> HTTP:
        api: HTTP | None = getattr(self._thread, "api", None)
        if api is None:
            api = self._thread.api = self._new_session()
        return api

    def _new_session(self) -> HTTP:
        with self._lock:  # the constructor touches a logger that all sessions share
            # retry_codes must not be empty, or pybit's defaults apply; code 0 is never looked up.
            session = HTTP(timeout=(min(5.0, self.timeout_s), self.timeout_s), max_retries=1, retry_codes={0})
            _quiet_pybit()
        session.endpoint = self.base_url
        session.client.trust_env = self.is_public  # no proxy to ourselves
        session.client.hooks["response"].append(self._receive)
        return session

    def _receive(self, response: Response, *_: object, **__: object) -> None:
        """Read the body within a deadline and decode it; runs in the thread that asked, before pybit looks."""
        headers = response.headers
        body = _body(response, time.monotonic() + _MAX_BODY_TIMES * self.timeout_s)
        self._thread.seen = failures.Seen(
            status=response.status_code,
            body=body[:4096].decode("utf-8", "replace"),
            size=len(body),
            reset_ms=_int_or_none(headers.get("X-Bapi-Limit-Reset-Timestamp")),
            now_ms=_int_or_none(headers.get("Timenow")) or int(time.time() * 1000),
        )
        response._content, response._content_consumed = body, True
        response.json = lambda **_: decoded(body)  # type: ignore[method-assign]


class _Failed(Exception):
    """Carries a classified failure to the retry loop."""

    def __init__(self, failure: failures.Failure) -> None:
        self.failure = failure


def decoded(body: bytes) -> Any:
    """The JSON document ``body``, but for ``result``, which stays text (``msgspec.Raw``) when it is an object's.

    Raises ``json.JSONDecodeError``, as pybit expects of its decoder.
    """
    try:
        parts = _parts.decode(body)
        return {k: v if k == "result" else msgspec.json.decode(v) for k, v in parts.items()}
    except msgspec.ValidationError:  # JSON, but not an object
        return json.loads(body)
    except msgspec.DecodeError as error:
        raise json.JSONDecodeError(str(error), body[:80].decode("utf-8", "replace"), 0) from error


def _body(response: Response, deadline_s: float) -> bytes:
    """All of the body, unzipped. Raises a requests error when it breaks off, takes too long or is huge."""
    chunks: list[bytes] = []
    size = 0
    try:
        while chunk := response.raw.read1(1 << 20, decode_content=True):
            chunks.append(chunk)
            size += len(chunk)
            if time.monotonic() > deadline_s:
                raise requests.ReadTimeout("the body timed out")
            if size > _MAX_BODY:
                raise requests.ConnectionError("the body is larger than 64 MiB")
    except HTTPError as error:
        response.close()
        raise requests.ConnectionError(error) from error
    except requests.RequestException:
        response.close()
        raise
    response.raw.release_conn()
    return b"".join(chunks)


def _budget(base_url: str) -> PaceFile | None:
    """The shared budget: one for all public hosts, which count an address together, and one per local server."""
    parts = urlsplit(base_url)
    name = f"loopback-{parts.port or 80}" if parts.hostname in LOOPBACK else "venue"
    try:
        return PaceFile(name)
    except OSError as error:
        _log.warning("the request budget cannot be shared with other processes: %s", error)
        return None


def _append(error: VenueError, text: str) -> None:
    error.message = error.message.rstrip(".") + text
    error.args = (error.message,)


def _give_up(error: VenueError, attempts: int, cause: BaseException | None) -> NoReturn:
    if attempts > 1:
        _append(error, f"; gave up after {attempts} attempts.")
    raise error from cause


def _backoff_s(attempt: int) -> float:
    """Doubling, capped, with half of it random so that threads do not come back together."""
    full = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * float(2 ** (attempt - 1)))
    return full * (0.5 + 0.5 * random.random())


def _quiet_pybit() -> None:
    """Undo the handler that pybit installs for itself; records still reach handlers of the application."""
    logging.getLogger("pybit._http_manager").handlers.clear()
    if not logging.getLogger("pybit").handlers:
        logging.getLogger("pybit").addHandler(logging.NullHandler())


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            f"'{url}' is not a base URL.", "Give it as in https://api.bybit.com, with the scheme."
        )
    return url.rstrip("/")


def _int_or_none(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None
