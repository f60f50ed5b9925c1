"""Which of a test's parameters run: all with --full, else a sample that covers them."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import defaultdict
from pathlib import Path

from implementations import PTX_REQUIRED

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"

# Tests of the emulator itself, which do not depend on gradfuse's kernels. PROVEN has the digest of
# the files for which all of them passed: while it is that of the files at hand, they are left out.
EMULATOR = HERE / "ptx"
EMULATOR_TESTS = {
    EMULATOR / f"test_{name}.py"
    for name in ("accesses", "bugs", "checks", "collectives", "instructions")
}
PROVEN = EMULATOR / "PROVEN"


def emulator_digest() -> str:
    """Of all that the emulator's own tests depend on, and of the kernels that it must run."""
    digest = hashlib.sha256()
    folders = (EMULATOR, CSRC / "cuda", CSRC / "math")
    kinds = {".py", ".h", ".cuh", ".cu", ".cpp"}
    for file in sorted(f for folder in folders for f in folder.rglob("*") if f.suffix in kinds):
        digest.update(str(file.relative_to(HERE.parent)).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def emulator_is_proven() -> bool:
    return PROVEN.exists() and PROVEN.read_text().strip() == emulator_digest()


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="all combinations of parameters, and all tests"
    )


def covering(variants, strength):
    """Few of a test's variants in which all values of its parameters occur, or all pairs of values
    if strength is 2. Always the same ones; more than the fewest by a little."""
    order = random.Random(0).sample(variants, len(variants))
    features = {}
    for item in order:
        values = sorted((n, repr(v)) for n, v in item.callspec.params.items())
        features[item] = set(itertools.combinations(values, min(strength, len(values))))
    missing, kept = set().union(*features.values()), []
    while missing:
        best = max(order, key=lambda item: len(features[item] & missing))
        kept.append(best)
        missing -= features[best]
    return kept


def left_out(items):
    """What a covering sample does without. The emulator is a thousand times slower than the rest:
    there each value runs, elsewhere each pair of values."""
    by_test = defaultdict(list)
    for item in items:
        if getattr(item, "callspec", None):
            backend = item.callspec.params.get("backend")
            by_test[item.path, item.cls, item.originalname, backend].append(item)
    for (_, _, _, backend), variants in by_test.items():
        kept = set(covering(variants, 1 if backend == "ptx" else 2))
        yield from (v for v in variants if v not in kept)


def pytest_collection_modifyitems(config, items):
    out = set()
    if not config.getoption("--full"):
        out |= set(left_out(items))
        named = {Path(a.partition("::")[0]).resolve() for a in config.args}
        if emulator_is_proven():
            out |= {i for i in items if i.path in EMULATOR_TESTS and i.path not in named}
    if not config.getoption("markexpr"):
        out |= {item for item in items if item.get_closest_marker("slow")}
    config.hook.pytest_deselected(items=list(out))
    items[:] = [item for item in items if item not in out]


class Witness:
    """What ran, of all processes: whether the emulator did, and whether its own tests passed."""

    def __init__(self, config):
        self.config = config
        self.on_emulator = 0
        self.passed, self.failed = set(), False

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed and "ptx" in report.nodeid:
            self.on_emulator += 1
        path = self.config.rootpath / report.nodeid.partition("::")[0]
        if path in EMULATOR_TESTS:
            self.failed |= report.failed
            self.passed |= {path} if report.when == "call" and report.passed else set()

    def pytest_sessionfinish(self, session):
        if PTX_REQUIRED and not self.on_emulator and session.exitstatus == 0:
            print("\nGRADFUSE_PTX: no test ran on the emulator")
            session.exitstatus = 1
        whole = self.config.getoption("--full") and not (
            self.config.getoption("keyword") or self.config.getoption("markexpr")
        )
        if whole and self.passed == EMULATOR_TESTS and not self.failed:
            PROVEN.write_text(emulator_digest() + "\n")


def pytest_configure(config):
    # Of several processes, the one that hears of all tests and runs none.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Witness(config))
