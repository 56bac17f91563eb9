"""What became of the tests so far, in a file: a session that ends in the middle is gone on with.

Each line is one JSON object: a test began, a phase of it has a report, or the job ended in it.
"""

import json
import os
from pathlib import Path

import pytest


class Record:
    """Plugin of pytest that writes down what becomes of tests, and takes earlier ones as they were.

    Parameters
    ----------
    path : file; absent if there was no session before
    writes : True on the rank that writes the reports
    give_up : True to run no more test
    """

    def __init__(self, config, path, writes, give_up):
        self._config, self._path, self._writes, self._give_up = config, path, writes, give_up
        self._item, self._reports, self._reasons = None, {}, {}
        lines = Path(path).read_text().splitlines() if os.path.exists(path) else []
        for fields in map(json.loads, lines):
            reports = self._reports.setdefault(fields["test"], [])
            reports += [fields["report"]] if "report" in fields else []
            if "ended" in fields:
                self._reasons.setdefault(fields["test"], fields["ended"])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        """Report a test that has been run before as it was; let the others run."""
        reports = self._earlier(item)
        if reports is None:
            self._item = item
            if self._writes:
                self._append(item.nodeid)
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_runtest_logreport(self, report):
        """Write down the report of a phase."""
        if self._writes and self._item is not None:
            to_dict = self._config.hook.pytest_report_to_serializable
            self._append(report.nodeid, report=to_dict(config=self._config, report=report))

    def pytest_runtest_logfinish(self):
        self._item = None

    def end(self, text):
        """Write down that the job ends in the test under way, and why."""
        if self._item is not None:
            self._append(self._item.nodeid, ended=text)

    def _append(self, test, **fields):
        """Add one line, whole, from whichever rank."""
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, (json.dumps({"test": test} | fields) + "\n").encode())
        os.close(file)

    def _earlier(self, item):
        """Reports of a test that is not to be run; None for one that is."""
        # Take a test that came to its end as it was.
        if item.nodeid not in self._reports:
            return (
                [_failed(item, "not run: the job had ended too often")] if self._give_up else None
            )
        found = [self._report(fields) for fields in self._reports[item.nodeid]]
        phases = {report.when for report in found}
        if "teardown" in phases and item.nodeid not in self._reasons:
            return found

        # Fail one in which the job ended.
        reason = self._reasons.get(item.nodeid, "the job ended in this test; see the ranks' logs")
        phase = "teardown" if "call" in phases else "call"
        return [*found, _failed(item, reason, phase)]

    def _report(self, fields):
        """A report as it was before it was written down; the place of a skip is a tuple."""
        from_dict = self._config.hook.pytest_report_from_serializable
        report = from_dict(config=self._config, data=fields)
        if isinstance(report.longrepr, list):
            report.longrepr = tuple(report.longrepr)
        return report


def _failed(item, reason, phase="setup"):
    """Report of a test that has none of its own."""
    words = dict.fromkeys(item.keywords, 1)
    return pytest.TestReport(item.nodeid, item.location, words, "failed", reason, phase)
