"""Rows of a report: as a table to print, and as a JSON file."""

import json

from hpcinfer.io.atomic import replacing


def text_table(headings, rows):
    """Lines of a table; columns of numbers are set to the right.

    Parameters
    ----------
    headings : list of str
    rows : list of lists of str, as long as `headings`

    Returns
    -------
    str
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


def write_json(path, rows):
    """Write a list of dicts as JSON.

    Raises
    ------
    RuntimeError
        If the file cannot be written.
    """
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=1, allow_nan=False)
        file.write("\n")
