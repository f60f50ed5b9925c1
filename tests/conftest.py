"""Fixtures: the implementations and devices that the tests run on."""

import os
import random
from collections import defaultdict

import hypothesis
import pytest
import torch
import torch._inductor.config
import torch.testing._internal.common_utils  # loads a hypothesis profile: before ours

from gradfuse import _native, reference

# Inductor's cache on disk does not know when an op's fake kernel changes.
torch._inductor.config.force_disable_caches = True

hypothesis.settings.register_profile(
    "local",
    deadline=None,
    max_examples=120,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,  # `backend` holds for all examples
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("local"), derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

NATIVE_OFF = _native.reason == "GRADFUSE_NATIVE=0"
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
# The same tests for all: the CPU kernels, the pure-torch reference, the CUDA kernels on the
# emulator of tests/ptx, and, where there is one, on a GPU.
BACKENDS = ["reference"] if NATIVE_OFF else ["cpu", "reference", "ptx", *DEVICES[1:]]

# GRADFUSE_PTX: auto (emulate if nvcc is there), 0 (never), 1 (it must be there, and be used),
# all (the same, and none of the tests are thinned out).
PTX = os.environ.get("GRADFUSE_PTX", "auto")
PTX_REQUIRED = PTX in ("1", "all")
# The emulator takes a thousand times as long as the CPU kernels. Of a test with many combinations
# of arguments it runs about this many, and none of these files: thousands of examples, other
# processes, or what is refused before any kernel runs.
PTX_VARIANTS = 12
NOT_ON_PTX = {
    "test_hypothesis.py",
    "test_batch_norm_hypothesis.py",
    "test_process.py",
    "test_errors.py",
    "test_compile.py",
}


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        marks = metafunc.definition.iter_markers("parametrize")
        if all(mark.args[0] != "backend" for mark in marks):
            metafunc.parametrize("backend", BACKENDS, indirect=True)
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES, indirect=True)


def thinned(items):
    """Those of the tests on the emulator that are to be left out."""
    by_function = defaultdict(list)
    for item in items:
        if getattr(item, "callspec", None) and item.callspec.params.get("backend") == "ptx":
            by_function[item.path, item.originalname].append(item)
    for (path, _), variants in by_function.items():
        if PTX == "0" or (PTX != "all" and path.name in NOT_ON_PTX):
            yield from variants
        elif PTX != "all":
            kept = covering(variants)
            yield from (v for v in variants if v not in kept)


def covering(variants):
    """PTX_VARIANTS of them in a fixed random order, and more until each value of each argument
    occurs."""
    kept, seen = [], set()
    for item in random.Random(0).sample(variants, len(variants)):
        values = {(name, repr(value)) for name, value in item.callspec.params.items()}
        if len(kept) < PTX_VARIANTS or not values <= seen:
            kept.append(item)
            seen |= values
    return kept


def pytest_collection_modifyitems(config, items):
    """Leaves out the slow tests unless -m says what to run, and what the emulator need not run."""
    out = set(thinned(items))
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


@pytest.fixture
def native():
    """The compiled module, for tests of what only it promises. One that cannot be loaded is a
    failure, so that a broken build is never green."""
    if NATIVE_OFF:
        pytest.skip(f"no compiled module: {_native.reason}")
    assert _native.available, _native.reason
    return _native.backend


@pytest.fixture(scope="session")
def nvcc():
    """The CUDA toolkit. Without one the CUDA kernels cannot be compiled to PTX."""
    from ptx import toolchain

    if PTX == "0":
        pytest.skip("GRADFUSE_PTX=0")
    if toolchain.toolkit() is None:
        assert not PTX_REQUIRED, f"GRADFUSE_PTX={PTX}, and nvcc was not found"
        pytest.skip("nvcc was not found: the CUDA kernels cannot be compiled to PTX")
    return toolchain.toolkit()


@pytest.fixture
def ptx(nvcc, monkeypatch):
    """gradfuse's functions, with the CUDA kernels on the emulator as no test has left it."""
    from ptx import emulated

    found = emulated.backend()
    found.reset()
    monkeypatch.setattr(_native, "backend", found)
    return found


@pytest.fixture
def backend(request, monkeypatch):
    """Which implementation gradfuse's public functions use."""
    if request.param == "reference":
        monkeypatch.setattr(_native, "backend", reference)
    elif request.param == "ptx":
        request.getfixturevalue("ptx")
    else:
        request.getfixturevalue("native")
    return request.param


@pytest.fixture
def device(request):
    """Where the test's tensors lie: the backend's device, or one of all where there is none."""
    name = getattr(request, "param", None)
    if name is None:
        name = "cuda" if request.getfixturevalue("backend") == "cuda" else "cpu"
    if name == "cuda" and _native.available and not _native.backend.cuda_version:
        pytest.skip("the compiled module was built without CUDA")
    return torch.device(name)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
