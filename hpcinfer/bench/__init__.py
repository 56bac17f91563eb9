"""Measurements of speed beside the machine's limit, one file per `hpcinfer bench NAME`.

Every bench has `run`, which returns its rows, the same on every rank, and `table`, which makes text
of them. A row is a dict of plain numbers and words, and goes to `--json` as it is.
"""
