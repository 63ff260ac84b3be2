"""Tables on narrow terminals."""

from recur.pipeline.tables import fitted

COLUMNS = ["unique_id", "cutoff", "ds", "horizon", "model", "q05", "q50", "q95"]
ROW = [
    "bybit:linear:BTCUSDT:1h", "2026-11-21T17:00:00Z", "2026-11-21T18:00:00Z", "1", "gru", "-0.0058804", "0", "0.0058804",
]  # fmt: skip


def test_a_table_that_fits_stays_as_it_is() -> None:
    assert fitted(COLUMNS, [ROW], 127) == (COLUMNS, [ROW], [])


def test_on_a_narrow_terminal_times_are_shorter_and_what_is_missed_least_goes_first() -> None:
    names, (cells,), gone = fitted(COLUMNS, [ROW], 80)
    assert gone == ["model", "cutoff", "q50"]
    assert names == ["unique_id", "ds", "horizon", "q05", "q95"]
    assert cells == ["bybit:linear:BTCUSDT:1h", "2026-11-21\u00a018:00", "1", "-0.00588", "0.00588"]


def test_the_first_column_stays_however_narrow_it_gets() -> None:
    names, rows, gone = fitted(COLUMNS, [ROW], 5)
    assert names == ["unique_id"] and rows == [["bybit:linear:BTCUSDT:1h"]]
    assert sorted(gone) == sorted(COLUMNS[1:])


def test_cells_of_several_words_are_wrapped_and_not_dropped() -> None:
    columns, row = ["horizon", "n", "vs a", "vs b", "vs c", "vs d"], ["1", "9", *["+2.94 % (p < .001)"] * 4]
    assert fitted(columns, [row], 60) == (columns, [row], [])


def test_a_table_of_few_columns_is_left_to_wrap() -> None:
    assert fitted(["check", "", "detail"], [["store", "ok", "x" * 90]], 40)[2] == []
