"""The write path: add rows that are not stored yet, revise those whose values changed, leave the rest alone.

One join of what arrives with what is stored in the same time range decides all three. It keeps the key unique
without an index (see ``storage/schema.py``), so it must run inside the store's single writing transaction.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import polars as pl


@dataclass(frozen=True, slots=True)
class PutResult:
    """Rows by what became of them: ``new`` appended, ``changed`` revised, ``same`` known already."""

    new: int = 0
    changed: int = 0
    same: int = 0

    def __add__(self, other: PutResult) -> PutResult:
        return PutResult(self.new + other.new, self.changed + other.changed, self.same + other.same)


def merge(
    con: duckdb.DuckDBPyConnection,
    frame: pl.DataFrame,
    *,
    table: str,
    revisions: str,
    key: tuple[str, ...],
    values: tuple[str, ...],
    source: str,
    now_ms: int,
) -> PutResult:
    """Merge ``frame`` (columns ``key + values``; the last key column is the time, naive UTC ms) into ``table``.

    A key that stands twice in ``frame`` counts once, the later row wins. A null never erases a stored value. A row
    whose values differ updates the stored one, whose ``first_seen`` stays, and leaves old and new values in
    ``revisions``.
    """
    if frame.is_empty():
        return PutResult()
    time = key[-1]
    frame = frame.select(*key, *values)
    if frame.select(pl.struct(key).is_duplicated().any()).item():
        frame = frame.unique(list(key), keep="last", maintain_order=True)
    first, last = _span(frame, time)
    fixed = {k: frame.item(0, k) for k in key[:-1] if frame.get_column(k).n_unique() == 1}
    matched = [k for k in key if k not in fixed]  # what is the same in every row filters better than it joins
    within = "".join(f" AND {k} = ?" for k in fixed)
    keys, names = ", ".join(key), ", ".join(values)
    merged = ", ".join(f"coalesce(i.{v}, c.{v}) AS {v}, c.{v} AS old_{v}" for v in values)
    differs = " OR ".join(f"coalesce(i.{v}, c.{v}) IS DISTINCT FROM c.{v}" for v in values)
    con.register("incoming", frame)
    con.execute(
        f"""CREATE OR REPLACE TEMP TABLE delta AS
        SELECT {", ".join(f"i.{k}" for k in key)}, {merged}, c.first_seen IS NOT NULL AS known
        FROM incoming i LEFT JOIN (
            SELECT {keys}, {names}, first_seen FROM {table}
            WHERE {time} BETWEEN make_timestamp_ms(?) AND make_timestamp_ms(?){within}) c USING ({", ".join(matched)})
        WHERE c.first_seen IS NULL OR {differs}""",
        [first, last, *fixed.values()],
    )
    con.unregister("incoming")
    ((touched, changed),) = con.execute("SELECT count(*), count(*) FILTER (known) FROM delta").fetchall()
    if touched > changed:
        con.execute(
            f"""INSERT INTO {table} ({keys}, {names}, source, first_seen)
            SELECT {keys}, {names}, ?, make_timestamp_ms(?) FROM delta WHERE NOT known ORDER BY {keys}""",
            [source, now_ms],
        )
    if changed:
        olds, news = ", ".join(f"old_{v}" for v in values), ", ".join(f"new_{v}" for v in values)
        con.execute(
            f"""INSERT INTO {revisions} ({keys}, seen_at, source, {olds}, {news})
            SELECT {keys}, make_timestamp_ms(?), ?, {olds}, {names} FROM delta WHERE known ORDER BY {keys}""",
            [now_ms, source],
        )
        con.execute(
            f"""UPDATE {table} SET {", ".join(f"{v} = d.{v}" for v in values)}, source = ?
            FROM delta d WHERE d.known AND {" AND ".join(f"{table}.{k} = d.{k}" for k in key)}
            AND {table}.{time} BETWEEN make_timestamp_ms(?) AND make_timestamp_ms(?)""",
            [source, first, last],
        )
    con.execute("DROP TABLE delta")
    return PutResult(new=touched - changed, changed=changed, same=frame.height - touched)


def _span(frame: pl.DataFrame, time: str) -> tuple[int, int]:
    opens = frame.get_column(time).to_physical()
    return int(opens.min() or 0), int(opens.max() or 0)  # type: ignore[arg-type]
