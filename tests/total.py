"""Sum of the pytest sessions of `tests/run.sh`, in the form of pytest's own closing line.

    python tests/total.py FOLDER START STEP:STATUS ...

START is in seconds since the epoch. A step `ranks-N` leaves the numbers of its closing line in
``FOLDER/ranks-N.json`` if its rank 0 comes to the end. A step that ended with a status that they do
not explain (a crash, a linter's complaint) counts as one failure and is named.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

NO_TESTS = 5  # pytest's exit status when nothing was selected
KINDS = ("failed", "passed", "skipped", "xfailed", "xpassed", "warnings", "error")


def judge(folder, step):
    """Return (counts by kind, lines on what failed) of one step."""
    # Take what pytest counted.
    name, _, status = step.rpartition(":")
    path = Path(folder) / f"{name}.json"
    report = json.loads(path.read_text()) if path.exists() else {"counts": {}, "names": {}}
    counts = Counter({kind: report["counts"].get(kind, 0) for kind in KINDS})
    lines = [f"{k.upper()} {name} {test}" for k, names in report["names"].items() for test in names]

    # Count a status that this does not explain as a failure.
    reason = None
    if int(status) not in (0, NO_TESTS) and not lines:
        reason = f"ended with status {status}"
    elif name.startswith("ranks-") and not path.exists():
        reason = "left no report"
    if reason:
        counts["failed"] += 1
        lines.append(f"FAILED {name} {reason}")
    return counts, lines


def closing_line(total, seconds):
    """Return pytest's closing line for the counts."""
    parts = [f"{total[kind]} {word_for(kind, total[kind])}" for kind in KINDS if total[kind]]
    minutes = f" ({int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02})"
    spent = f"{seconds:.2f}s" + minutes * (seconds >= 60)
    return f" {', '.join(parts) or 'no tests ran'} in {spent} ".center(80, "=")


def word_for(kind, n):
    """Return pytest's word for n of a kind: warnings and errors have a plural."""
    return {"warnings": "warning", "error": "error"}.get(kind, kind) + "s" * (
        n != 1 and kind in ("warnings", "error")
    )


def main(folder, start, *steps):
    """Print the sum; return 0 if all passed, 1 if anything failed, 5 if there was nothing to do."""
    total = Counter()
    for step in steps:
        counts, lines = judge(folder, step)
        total += counts
        for line in lines:
            print(line)
    print(closing_line(total, time.time() - float(start)))
    if total["failed"] or total["error"]:
        return 1
    return 0 if total else NO_TESTS


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
