"""A pytest plugin for a run that may be cut off at any moment: PYTHONPATH=bench pytest -p at_once, with or without -n.

A test that fails is named at once, with its time and the last line of its error. $AT_ONCE_TSV is a file that gets a line for
every test as it ends: outcome, seconds, test. From $AT_ONCE_UNTIL (seconds since 1970) on tests are skipped, so that the run
ends in order. Tests that make hundreds of random calls come last: each call may compile for seconds.
"""

import os
import time

import pytest

LAST = ("fuzz", "thousand", "million")
OUT_OF_TIME = "the time is over"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: any(word in item.name for word in LAST))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    if time.time() > float(os.environ.get("AT_ONCE_UNTIL", "inf")):
        pytest.skip(OUT_OF_TIME)


class AtOnce:
    """Of the process that reports, not of xdist's workers."""

    def __init__(self, config):
        self.config = config
        self.path = os.environ.get("AT_ONCE_TSV")
        self.counts, self.failed = {}, []

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        outcome = report.outcome
        if outcome == "skipped" and OUT_OF_TIME in str(report.longrepr):
            outcome = "no time"
        self.counts[outcome] = self.counts.get(outcome, 0) + 1
        if self.path:
            with open(self.path, "a") as file:
                file.write(f"{outcome}\t{report.duration:.2f}\t{report.nodeid}\n")
        if outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            lines = (crash.message if crash else str(report.longrepr)).strip().splitlines() or [""]
            self.failed.append(report.nodeid)
            terminal = self.config.pluginmanager.get_plugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_line(f"\nFAILED {report.nodeid} after {report.duration:.0f} s: {lines[0][:300]}")

    def pytest_terminal_summary(self, terminalreporter):
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(self.counts.items()))
        terminalreporter.write_line(f"at once: {counts}")
        for name in self.failed:
            terminalreporter.write_line(f"at once: failed {name}")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(AtOnce(config))
