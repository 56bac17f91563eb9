"""Sum of the pytest sessions of `tests/run.sh`, in the form of pytest's own closing line.

    python tests/total.py FOLDER START STEP:STATUS ...

START is in seconds since the epoch. A step `ranks-N` leaves a JUnit report ``FOLDER/ranks-N.xml``
if its rank 0 comes to the end. A step that ended with a status its report does not explain (a
crash, a time limit, a linter's complaint) counts as one failure and is named.
"""

import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

NO_TESTS = 5  # pytest's exit status when nothing was selected


def read_report(path):
    """Return (outcome, test) of every test in a JUnit report; None if there is no whole report."""
    try:
        cases = list(ET.parse(path).getroot().iter("testcase"))
    except (OSError, ET.ParseError):
        return None
    return [(outcome(case), f"{case.get('classname')}::{case.get('name')}") for case in cases]


def outcome(case):
    """Return passed, failed, skipped, xfailed or error for one test case of a report."""
    if case.find("failure") is not None:
        return "failed"
    if case.find("error") is not None:
        return "error"
    skipped = case.find("skipped")
    if skipped is None:
        return "passed"
    return "xfailed" if skipped.get("type") == "pytest.xfail" else "skipped"


def judge(folder, step):
    """Return the outcomes of one step, (outcome, name) each; an unexplained status is a failure."""
    name, _, status = step.rpartition(":")
    report = read_report(Path(folder) / f"{name}.xml")
    outcomes = report or []
    blame = any(kind in ("failed", "error") for kind, _ in outcomes)
    if int(status) not in (0, NO_TESTS) and not blame:
        outcomes.append(("failed", f"ended with status {status}"))
    elif name.startswith("ranks-") and report is None:
        outcomes.append(("failed", "left no report"))
    return [(kind, f"{name} {test}") for kind, test in outcomes]


def closing_line(total, seconds):
    """Return pytest's closing line for the outcomes."""
    kinds = ("failed", "passed", "skipped", "xfailed", "error")
    parts = [f"{total[kind]} {kind}" for kind in kinds if total[kind]]
    if total["error"] > 1:
        parts[-1] += "s"
    return f" {', '.join(parts) or 'no tests ran'} in {seconds:.2f}s ".center(80, "=")


def main(folder, start, *steps):
    """Print the sum; return 0 if all passed, 1 if anything failed, 5 if there was nothing to do."""
    outcomes = [item for step in steps for item in judge(folder, step)]
    total = Counter(kind for kind, _ in outcomes)
    for kind, name in outcomes:
        if kind in ("failed", "error"):
            print(f"{kind.upper()} {name}")
    print(closing_line(total, time.time() - float(start)))
    if total["failed"] or total["error"]:
        return 1
    return 0 if outcomes else NO_TESTS


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
