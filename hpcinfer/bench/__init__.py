"""Measurements of speed beside the machine's limit, one file per `hpcinfer bench NAME`.

Every bench has `run`, which returns its rows, the same on every rank, and `table`, which makes text
of them. A row is a dict of plain numbers and words, and goes to `--json` as it is, and to `--plot`
as a picture. `drive` loads a model for the benches that need one; `limits` and `measure` hold the
clocks, `work` counts what a step must read and compute.
"""
