"""Selects the combinations of a test's parameters: all with --full, else a covering sample."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

from implementations import PTX_REQUIRED


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all combinations of parameters")


def covering(variants, strength):
    """A sample of a test's variants that covers every combination of `strength` parameter values
    that occurs in any variant. It is always the same, and usually close to the smallest."""
    order = random.Random(0).sample(variants, len(variants))
    covers = {}
    for item in order:
        values = sorted((name, repr(v)) for name, v in item.callspec.params.items())
        covers[item] = set(itertools.combinations(values, min(strength, len(values))))
    missing, kept = set().union(*covers.values()), []
    while missing:
        best = max(order, key=lambda item: len(covers[item] & missing))
        kept.append(best)
        missing -= covers[best]
    return kept


def left_out(items):
    """The variants that the samples leave out.

    Each pair of values runs on the CPU kernels and on a GPU. Elsewhere only each single value runs:
    the emulator is a thousand times slower, narrower instruction sets share the source, and the
    reference has hardly any code for a particular dtype or layout.
    """
    by_test = defaultdict(list)
    for item in items:
        if getattr(item, "callspec", None):
            parameters = item.callspec.params
            backend = "ptx" if "ptx" in item.fixturenames else parameters.get("backend")
            on = backend, parameters.get("isa"), item.get_closest_marker("pairs") is not None
            by_test[item.path, item.cls, item.originalname, on].append(item)
    for (*_, (backend, isa, marked)), variants in by_test.items():
        pairs = marked or (backend in (None, "cpu", "cuda") and not isa)
        kept = set(covering(variants, 2 if pairs else 1))
        yield from (v for v in variants if v not in kept)


def pytest_collection_modifyitems(config, items):
    """Leaves out what the samples do not need, and the slow tests unless -m selects tests."""
    out = set() if config.getoption("--full") else set(left_out(items))
    if not config.getoption("markexpr"):
        out |= {item for item in items if item.get_closest_marker("slow")}
    config.hook.pytest_deselected(items=list(out))
    items[:] = [item for item in items if item not in out]


class EmulatedTests:
    """Makes a session fail in which no emulator test passed although the emulator is required."""

    def __init__(self):
        self.passed = 0

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed and "ptx" in report.nodeid:
            self.passed += 1

    def pytest_sessionfinish(self, session):
        if not self.passed and session.exitstatus == 0:
            print("\nGRADFUSE_PTX: no test ran on the emulator")
            session.exitstatus = 1


def pytest_configure(config):
    # Only in the main process: with several, it receives all reports and runs no tests.
    if PTX_REQUIRED and not hasattr(config, "workerinput"):
        config.pluginmanager.register(EmulatedTests())
