"""The table of a bench: its columns are declared once, each with its heading."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hpcinfer.io.rows import text_table

Row = dict[str, Any]


@dataclass(frozen=True)
class BenchColumn:
    """A column of a printed table.

    Attributes
    ----------
    heading : what stands above it
    value : key of the rows' dicts, or a function of a row
    form : format of a number, "" for text and whole numbers as they are
    scale : what a number is multiplied by, such as 1e3 for milliseconds
    """

    heading: str
    value: str | Callable[[Row], Any]
    form: str = ""
    scale: float = 1.0

    def cell(self, row: Row) -> str:
        """What stands in a row: "-" where there is nothing to say."""
        value = self.value(row) if callable(self.value) else row[self.value]
        if value is None:
            return "-"
        return format(self.scale * value, self.form) if self.form else str(value)


def percent(heading: str, key: str, form: str = ".0f") -> BenchColumn:
    """Column of a share, in percent."""
    return BenchColumn(heading, key, form, 100)


OF_LIMIT = percent("of limit %", "share_of_limit")


def text_of(head: str, columns: Sequence[BenchColumn], rows: Sequence[Row]) -> str:
    """Lines above a table, and the table."""
    cells = [[column.cell(row) for column in columns] for row in rows]
    return head + text_table([column.heading for column in columns], cells)
