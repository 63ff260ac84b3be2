"""Reading rows on a time axis: what the store holds now, or what was known at an earlier instant."""

from __future__ import annotations

from collections.abc import Sequence

import duckdb
import polars as pl

from recur.storage.frames import READ_ROWS, aware
from recur.storage.schema import Table


def read_rows(
    con: duckdb.DuckDBPyConnection,
    table: Table,
    schema: pl.Schema,
    wanted: dict[str, str | None],
    symbols: Sequence[str] | None,
    since_ms: int | None,
    until_ms: int | None,
    as_of_ms: int | None = None,
    first_values: bool = False,
) -> pl.DataFrame:
    """Rows of ``table`` as a frame of ``schema``, sorted by the key; None means any.

    ``wanted``: values of the key's other columns. ``as_of_ms``: only rows first seen by then, with the values they had
    then; ``first_values`` takes rows first seen later as well, with the values they had at first.
    """
    if as_of_ms is None and symbols is not None and None not in wanted.values():
        parts = [
            one_series(con, table, wanted | {"symbol": symbol}, since_ms, until_ms)
            for symbol in sorted(set(symbols))
        ]
        parts = [part.select(schema.names()) for part in parts]
        return parts[0] if len(parts) == 1 else pl.concat([schema.to_frame(), *parts])
    where, params = _between(table.time, since_ms, until_ms)
    for name, value in wanted.items():
        if value is not None:
            where.append(f"c.{name} = ?")
            params.append(value)
    if symbols is not None:
        where.append("c.symbol IN (SELECT unnest(?::VARCHAR[]))")
        params.append(list(symbols))
    values, joined = [f"c.{v}" for v in table.values], ""
    if as_of_ms is not None:
        values = [f"CASE WHEN r.revised THEN r.old_{v} ELSE c.{v} END AS {v}" for v in table.values]
        keys = ", ".join(table.key)
        joined = f"""LEFT JOIN (
            SELECT DISTINCT ON ({keys}) {keys}, {", ".join(f"old_{v}" for v in table.values)}, true AS revised
            FROM {table.revisions} WHERE seen_at > make_timestamp_ms(?) ORDER BY {keys}, seen_at, rowid) r
            ON {" AND ".join(f"r.{k} = c.{k}" for k in table.key)}"""
        params.insert(0, as_of_ms)
        if not first_values:
            where.append("c.first_seen <= make_timestamp_ms(?)")
            params.append(as_of_ms)
    keys = ", ".join(f"c.{k}" for k in table.key)
    query = f"SELECT {keys}, {', '.join(values)} FROM {table.name} c {joined} WHERE {' AND '.join(where)} ORDER BY {keys}"
    found: pl.DataFrame = con.sql(query, params=params).pl(READ_ROWS)
    return aware(found, schema)


def _between(time: str, since_ms: int | None, until_ms: int | None) -> tuple[list[str], list[object]]:
    where, params = ["true"], list[object]()
    for bound, sign in ((since_ms, ">="), (until_ms, "<")):
        if bound is not None:
            where.append(f"c.{time} {sign} make_timestamp_ms(?)")
            params.append(bound)
    return where, params


def one_series(
    con: duckdb.DuckDBPyConnection,
    table: Table,
    names: dict[str, str | None],
    since_ms: int | None,
    until_ms: int | None,
) -> pl.DataFrame:
    """One series without sorting what is in order already and without reading its name from every row."""
    where, params = _between(table.time, since_ms, until_ms)
    where += [f"c.{name} = ?" for name in names]
    found: pl.DataFrame = con.sql(
        f"SELECT {', '.join((table.time, *table.values))} FROM {table.name} c WHERE {' AND '.join(where)}",
        params=[*params, *names.values()],
    ).pl(READ_ROWS)
    time = found.get_column(table.time).dt.replace_time_zone("UTC")
    if not time.is_sorted():
        found = found.with_columns(time).sort(table.time)
        time = found.get_column(table.time)
    return found.with_columns(time.set_sorted(), *(pl.lit(v).alias(k) for k, v in names.items()))
