"""Rows of a report: as a table to print, and as a JSON file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hpcinfer.io.atomic import AnyPath, replacing
from hpcinfer.io.claims import target_of


def text_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a table; columns of numbers are set to the right.

    Parameters
    ----------
    headings : one for each column
    rows : of cells, as many as there are headings
    """
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [all(c[:1].isdigit() or c in ("", "-") for c in column[1:]) for column in columns]
    lines = []
    for row in [headings, *rows]:
        cells = [
            c.rjust(n) if right else c.ljust(n)
            for c, n, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def write_json(path: AnyPath, rows: list[dict[str, Any]]) -> None:
    """Write a list of dicts as JSON.

    Raises
    ------
    RuntimeError
        If the file cannot be written.
    """
    with replacing(target_of(path)) as partial, open(partial, "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=1, allow_nan=False)
        file.write("\n")
