"""News items with their versions, and the scores that runs gave them. Nothing here is ever overwritten."""

from __future__ import annotations

import duckdb
import polars as pl

from recur.storage.frames import NEWS_PRECISIONS, NEWS_SCHEMA, SENTIMENT_SCHEMA, aware, naive
from recur.storage.merge import PutResult

_CONTENT = ("published_at", "published_precision", "title", "body", "url", "tags")
"""What makes a version: another value in one of these is an edit. The source and the story are not part of it."""
_GIVEN = pl.Schema({k: v for k, v in NEWS_SCHEMA.items() if k not in ("first_seen", "version", "backfill")})
_SCORED = ("news_id", "version", "run_id")


def put(
    con: duckdb.DuckDBPyConnection, frame: pl.DataFrame, source: str, now_ms: int, backfill: bool
) -> PutResult:
    """Store items (columns of ``NEWS_SCHEMA`` without ``first_seen`` and ``version``; absent ones are null).

    An item is compared with its newest version: ``new`` ids, ``changed`` ones that got a further version, ``same``.
    ``backfill`` marks items of an archive: their ``first_seen`` does not tell when they could have been known.
    Of one id several times in ``frame`` the last counts. ``source`` names the origin of items that name none.
    Raises ValueError for items without ``news_id`` and for an unknown precision.
    """
    columns = [
        (pl.col(name) if name in frame.columns else pl.lit(None).alias(name)).cast(kind)
        for name, kind in _GIVEN.items()
    ]
    rows = naive(frame.select(columns), _GIVEN).with_columns(pl.col("source").fill_null(source))
    if rows.get_column("news_id").has_nulls():
        raise ValueError("news need a news_id")
    odd = set(rows.get_column("published_precision").drop_nulls()) - set(NEWS_PRECISIONS)
    if odd:
        raise ValueError(f"unknown precision of news: {', '.join(sorted(odd))}")
    rows = rows.unique("news_id", keep="last", maintain_order=True)
    con.register("incoming", rows.with_row_index("place"))
    differs = " OR ".join(f"l.{name} IS DISTINCT FROM i.{name}" for name in _CONTENT)
    con.execute(
        f"""CREATE OR REPLACE TEMP TABLE delta AS
        SELECT i.*, coalesce(l.version, 0) + 1 AS version FROM incoming i LEFT JOIN (
            SELECT DISTINCT ON (news_id) * FROM news WHERE news_id IN (SELECT news_id FROM incoming)
            ORDER BY news_id, version DESC) l ON l.news_id = i.news_id
        WHERE l.news_id IS NULL OR {differs}"""
    )
    con.unregister("incoming")
    ((new, changed),) = con.execute(
        "SELECT count(*) FILTER (version = 1), count(*) FILTER (version > 1) FROM delta"
    ).fetchall()
    names = ", ".join(_GIVEN)
    con.execute(
        f"""INSERT INTO news ({names}, version, first_seen, backfill)
        SELECT {names}, version, make_timestamp_ms(?), ? FROM delta ORDER BY place""",
        [now_ms, backfill],
    )
    con.execute("DROP TABLE delta")
    return PutResult(new, changed, rows.height - new - changed)


def read(
    con: duckdb.DuckDBPyConnection, since_ms: int | None, until_ms: int | None, as_of_ms: int | None
) -> pl.DataFrame:
    """The newest version of each item known at ``as_of_ms`` (None: now), if published in ``[since, until)``."""
    known = "true" if as_of_ms is None else f"first_seen <= make_timestamp_ms({int(as_of_ms)})"
    where = [
        f"published_at {sign} make_timestamp_ms({int(bound)})"
        for bound, sign in ((since_ms, ">="), (until_ms, "<"))
        if bound is not None
    ]
    found: pl.DataFrame = con.sql(
        f"""SELECT * FROM (SELECT DISTINCT ON (news_id) {", ".join(NEWS_SCHEMA)} FROM news WHERE {known}
            ORDER BY news_id, version DESC)
        WHERE {" AND ".join(where) or "true"} ORDER BY published_at, news_id"""
    ).pl()
    return aware(found, NEWS_SCHEMA)


def versions(con: duckdb.DuckDBPyConnection) -> pl.DataFrame:
    """All versions of all items."""
    found: pl.DataFrame = con.sql(
        f"SELECT {', '.join(NEWS_SCHEMA)} FROM news ORDER BY published_at, news_id, version"
    ).pl()
    return aware(found, NEWS_SCHEMA)


def unscored(con: duckdb.DuckDBPyConnection, run_id: str) -> pl.DataFrame:
    """All versions of items without a score of ``run_id``."""
    found: pl.DataFrame = con.sql(
        f"""SELECT {", ".join(NEWS_SCHEMA)} FROM news n WHERE NOT EXISTS (
            SELECT 1 FROM sentiment s WHERE s.run_id = ? AND s.news_id = n.news_id AND s.version = n.version)
        ORDER BY published_at, news_id, version""",
        params=[run_id],
    ).pl()
    return aware(found, NEWS_SCHEMA)


def put_sentiment(con: duckdb.DuckDBPyConnection, frame: pl.DataFrame) -> int:
    """Append the scores whose (item, version, run) has none yet; returns how many."""
    rows = naive(frame, SENTIMENT_SCHEMA).unique(_SCORED, keep="first", maintain_order=True)
    con.register("incoming", rows)
    names = ", ".join(SENTIMENT_SCHEMA)
    same = " AND ".join(f"s.{name} = i.{name}" for name in _SCORED)
    ((added,),) = con.execute(
        f"""INSERT INTO sentiment ({names}) SELECT {names} FROM incoming i
        WHERE NOT EXISTS (SELECT 1 FROM sentiment s WHERE {same})"""
    ).fetchall()
    con.unregister("incoming")
    return int(added)


def sentiment(con: duckdb.DuckDBPyConnection, run_id: str | None) -> pl.DataFrame:
    """The scores of a run (None: of all)."""
    where, params = ("run_id = ?", [run_id]) if run_id is not None else ("true", [])
    query = (
        f"SELECT {', '.join(SENTIMENT_SCHEMA)} FROM sentiment WHERE {where} ORDER BY run_id, news_id, version"
    )
    found: pl.DataFrame = con.sql(query, params=params).pl()
    return aware(found, SENTIMENT_SCHEMA)
