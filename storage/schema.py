"""Tables of ``market.duckdb`` as one versioned list of steps.

Every instant is a ``TIMESTAMP_MS`` in **UTC**. Prices are in quote units, volume in base units, as the source gave
them; an absent value is NULL, never 0.

``candles`` carries no PRIMARY KEY although (category, symbol, interval, kind, open_time) is its key: an index makes
the file 3.4 times bigger and appends 5 to 7 times slower. The write path (``storage/merge.py``) keeps the key unique
by joining what arrives with what is stored, inside the one writing transaction that may exist at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb

from recur.vocabulary import UsageError

QUANTILES = tuple(f"q{percent:02d}" for percent in range(5, 100, 5))
"""Names of the stored quantile columns: q05, q10, … q95."""

CANDLE_KEY = ("category", "symbol", "interval", "kind", "open_time")
CANDLE_VALUES = ("open", "high", "low", "close", "volume", "turnover")
FUNDING_KEY = ("category", "symbol", "funding_time")
FUNDING_VALUES = ("rate",)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of numbers on a time axis, with its table of revisions; ``key`` ends with the time column."""

    name: str
    revisions: str
    key: tuple[str, ...]
    values: tuple[str, ...]

    @property
    def time(self) -> str:
        return self.key[-1]

    @property
    def series(self) -> tuple[str, ...]:
        """The key without the time: what names one series."""
        return self.key[:-1]


_POINT_KEY = ("category", "symbol", "interval", "ts")
CANDLES = Table("candles", "candle_revisions", CANDLE_KEY, CANDLE_VALUES)
FUNDING = Table("funding", "funding_revisions", FUNDING_KEY, FUNDING_VALUES)
OPEN_INTEREST = Table("open_interest", "open_interest_revisions", _POINT_KEY, ("open_interest",))
LONG_SHORT = Table("long_short", "long_short_revisions", _POINT_KEY, ("buy_ratio", "sell_ratio"))
POINTS = {table.name: table for table in (OPEN_INTEREST, LONG_SHORT)}
"""Measures that the venue gives at instants on a grid, by the name of their table."""


def _doubles(names: tuple[str, ...], prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name} DOUBLE" for name in names)


_VERSION_1 = (
    f"""CREATE TABLE candles (
        category VARCHAR NOT NULL, symbol VARCHAR NOT NULL, interval VARCHAR NOT NULL, kind VARCHAR NOT NULL,
        open_time TIMESTAMP_MS NOT NULL, {_doubles(CANDLE_VALUES)},
        source VARCHAR NOT NULL, first_seen TIMESTAMP_MS NOT NULL)""",
    f"""CREATE TABLE candle_revisions (
        category VARCHAR NOT NULL, symbol VARCHAR NOT NULL, interval VARCHAR NOT NULL, kind VARCHAR NOT NULL,
        open_time TIMESTAMP_MS NOT NULL, seen_at TIMESTAMP_MS NOT NULL, source VARCHAR NOT NULL,
        {_doubles(CANDLE_VALUES, "old_")}, {_doubles(CANDLE_VALUES, "new_")})""",
    """CREATE TABLE funding (
        category VARCHAR NOT NULL, symbol VARCHAR NOT NULL, funding_time TIMESTAMP_MS NOT NULL, rate DOUBLE,
        source VARCHAR NOT NULL, first_seen TIMESTAMP_MS NOT NULL)""",
    """CREATE TABLE funding_revisions (
        category VARCHAR NOT NULL, symbol VARCHAR NOT NULL, funding_time TIMESTAMP_MS NOT NULL,
        seen_at TIMESTAMP_MS NOT NULL, source VARCHAR NOT NULL, old_rate DOUBLE, new_rate DOUBLE)""",
    """CREATE TABLE open_interest (
        category VARCHAR NOT NULL, symbol VARCHAR NOT NULL, interval VARCHAR NOT NULL, ts TIMESTAMP_MS NOT NULL,
        open_interest DOUBLE, first_seen TIMESTAMP_MS NOT NULL)""",
    """CREATE TABLE long_short (
        category VARCHAR NOT NULL, symbol VARCHAR NOT NULL, interval VARCHAR NOT NULL, ts TIMESTAMP_MS NOT NULL,
        buy_ratio DOUBLE, sell_ratio DOUBLE, first_seen TIMESTAMP_MS NOT NULL)""",
    """CREATE TABLE instruments (
        category VARCHAR NOT NULL, symbol VARCHAR NOT NULL, status VARCHAR, launch_time TIMESTAMP_MS,
        tick_size DOUBLE, qty_step DOUBLE, details VARCHAR, seen_at TIMESTAMP_MS NOT NULL)""",
    """CREATE TABLE news (
        news_id VARCHAR NOT NULL, published_at TIMESTAMP_MS, first_seen TIMESTAMP_MS NOT NULL, title VARCHAR,
        body VARCHAR, url VARCHAR, source VARCHAR, tags VARCHAR[], version INTEGER NOT NULL)""",
    """CREATE TABLE sentiment (
        news_id VARCHAR NOT NULL, version INTEGER NOT NULL, run_id VARCHAR NOT NULL,
        scored_at TIMESTAMP_MS NOT NULL, p_negative DOUBLE, p_neutral DOUBLE, p_positive DOUBLE)""",
    """CREATE TABLE fetch_windows (
        category VARCHAR NOT NULL, symbol VARCHAR NOT NULL, interval VARCHAR NOT NULL, kind VARCHAR NOT NULL,
        since TIMESTAMP_MS NOT NULL, until TIMESTAMP_MS NOT NULL,
        expected BIGINT, "rows" BIGINT, missing BIGINT,
        status VARCHAR NOT NULL CHECK (status IN ('done', 'gap')), reason VARCHAR NOT NULL,
        source VARCHAR NOT NULL, asked_at TIMESTAMP_MS NOT NULL)""",
    f"""CREATE TABLE forecasts (
        seq BIGINT NOT NULL, unique_id VARCHAR NOT NULL, cutoff TIMESTAMP_MS NOT NULL, ds TIMESTAMP_MS NOT NULL,
        horizon INTEGER NOT NULL, model VARCHAR NOT NULL, run_id VARCHAR NOT NULL,
        made_at TIMESTAMP_MS NOT NULL, known_at TIMESTAMP_MS, late BOOLEAN, {_doubles(QUANTILES)},
        mean DOUBLE, prob_up DOUBLE, vol DOUBLE, close DOUBLE,
        entry_hash VARCHAR NOT NULL, prev_hash VARCHAR NOT NULL)""",
)


def _point_revisions(table: Table) -> str:
    return f"""CREATE TABLE {table.revisions} (
        category VARCHAR NOT NULL, symbol VARCHAR NOT NULL, interval VARCHAR NOT NULL, ts TIMESTAMP_MS NOT NULL,
        seen_at TIMESTAMP_MS NOT NULL, source VARCHAR NOT NULL,
        {_doubles(table.values, "old_")}, {_doubles(table.values, "new_")})"""


_VERSION_2 = (
    *(
        f"ALTER TABLE {name} ADD COLUMN {column}"
        for name, columns in {
            "open_interest": ("source VARCHAR DEFAULT ''",),
            "long_short": ("source VARCHAR DEFAULT ''",),
            "instruments": (
                "contract_type VARCHAR", "base_coin VARCHAR", "quote_coin VARCHAR", "settle_coin VARCHAR",
                "delivery_time TIMESTAMP_MS", "funding_minutes INTEGER", "turnover_24h DOUBLE", "source VARCHAR",
            ),
            "news": ("published_precision VARCHAR", "story_id VARCHAR"),
        }.items()
        for column in columns
    ),
    "ALTER TABLE instruments DROP COLUMN details",
    """ALTER TABLE news ALTER COLUMN tags TYPE VARCHAR USING
        CASE WHEN tags IS NULL THEN NULL ELSE '["' || array_to_string(tags, '","') || '"]' END""",
    *(_point_revisions(table) for table in POINTS.values()),
)  # fmt: skip

_VERSION_3 = (
    "ALTER TABLE news ADD COLUMN backfill BOOLEAN DEFAULT false",
    "ALTER TABLE sentiment ADD COLUMN contaminated BOOLEAN DEFAULT false",
)

STEPS: tuple[tuple[str, ...], ...] = (_VERSION_1, _VERSION_2, _VERSION_3)
"""``STEPS[n]`` takes a store from schema version n to n + 1. Never edit a released step: append one."""

VERSION = len(STEPS)


def stored_version(con: duckdb.DuckDBPyConnection) -> int:
    """Schema version of an open store: 0 when it has no tables of ours yet.

    Raises UsageError when a newer program wrote it.
    """
    try:
        ((found,),) = con.execute("SELECT max(version) FROM schema_version").fetchall()
    except duckdb.CatalogException:
        return 0
    version = int(found or 0)
    if version > VERSION:
        raise UsageError(
            f"The store has schema version {version}, this program knows versions up to {VERSION}.",
            "Update recur, or give another --home.",
        )
    return version


def upgrade(con: duckdb.DuckDBPyConnection) -> None:
    """Bring an open, writable store to ``VERSION`` in one transaction; does nothing when it is there already."""
    version = stored_version(con)
    if version == VERSION:
        return
    con.execute("BEGIN")  # a failure leaves the connection to its owner, who closes it: nothing is half done
    con.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER, applied_at TIMESTAMP_MS)")
    for number in range(version, VERSION):
        for statement in STEPS[number]:
            con.execute(statement)
        con.execute("INSERT INTO schema_version VALUES (?, make_timestamp_ms(epoch_ms(now())))", [number + 1])
    con.execute("COMMIT")
