"""Which of a test's parameters run: all with --full, else a sample that covers them."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

from implementations import PTX_REQUIRED


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="all combinations of parameters")


def covering(variants, strength):
    """Few of a test's variants, in which each combination of `strength` values of its parameters
    occurs that occurs in any. Always the same ones, and mostly close to the fewest."""
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
    """What the samples do without.

    Each pair of values runs on the CPU kernels and on a GPU. On the others each value does: the
    emulator is a thousand times slower, narrower instruction sets are the same source, and the
    reference has hardly any code for one dtype or layout.
    """
    by_test = defaultdict(list)
    for item in items:
        if getattr(item, "callspec", None):
            parameters = item.callspec.params
            on = parameters.get("backend"), parameters.get("isa")
            by_test[item.path, item.cls, item.originalname, on].append(item)
    for (*_, (backend, isa)), variants in by_test.items():
        pairs = backend in (None, "cpu", "cuda") and not isa
        kept = set(covering(variants, 2 if pairs else 1))
        yield from (v for v in variants if v not in kept)


def pytest_collection_modifyitems(config, items):
    """Also leaves out the slow tests, unless -m says what to run."""
    out = set() if config.getoption("--full") else set(left_out(items))
    if not config.getoption("markexpr"):
        out |= {item for item in items if item.get_closest_marker("slow")}
    config.hook.pytest_deselected(items=list(out))
    items[:] = [item for item in items if item not in out]


class EmulatedTests:
    """Where the emulator is required, a session in which none of its tests passed is a failure."""

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
    # Of several processes, the one that hears of all tests and runs none.
    if PTX_REQUIRED and not hasattr(config, "workerinput"):
        config.pluginmanager.register(EmulatedTests())
