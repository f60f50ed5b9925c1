"""--slowest-files=N prints the N slowest test files, with their time summed over all processes."""

from __future__ import annotations

from collections import Counter


def pytest_addoption(parser):
    parser.addoption("--slowest-files", type=int, default=0, help="print the N slowest test files")


class Budget:
    def __init__(self, number):
        self.number = number
        self.seconds, self.tests = Counter(), Counter()

    def pytest_runtest_logreport(self, report):
        file = report.nodeid.partition("::")[0]
        self.seconds[file] += report.duration
        self.tests[file] += report.when == "call"

    def pytest_terminal_summary(self, terminalreporter):
        total = sum(self.seconds.values())
        terminalreporter.section(f"{self.number} slowest files of {total:.0f} s")
        for file, seconds in self.seconds.most_common(self.number):
            line = f"{seconds:7.1f} s  {self.tests[file]:5d} tests  {file}"
            terminalreporter.write_line(line)


def pytest_configure(config):
    if config.getoption("--slowest-files"):
        config.pluginmanager.register(Budget(config.getoption("--slowest-files")))
