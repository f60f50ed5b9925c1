"""The emulated module, and what happens without nvcc."""

import os

import pytest

from ptx import toolchain

# CI sets it where nvcc is there: a test that did not run is a failure then.
REQUIRED = os.environ.get("GRADFUSE_REQUIRE_PTX") == "1"
HERE = "tests/ptx/"


@pytest.fixture(scope="session", autouse=True)
def _toolkit():
    if toolchain.toolkit() is None:
        assert not REQUIRED, "GRADFUSE_REQUIRE_PTX=1, and nvcc was not found"
        pytest.skip("nvcc was not found: the CUDA kernels cannot be compiled to PTX")


@pytest.fixture
def ptx():
    """gradfuse's module on the emulator, with nothing set that an earlier test may have set."""
    from ptx import emulated

    found = emulated.backend()
    found.machine.order = "forward"
    found.machine.only_blocks = None
    found.machine.budget = 2_000_000_000
    found.runtime.reset()
    return found
