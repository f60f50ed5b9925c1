"""All tests of this folder need nvcc."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _needs_nvcc(nvcc):
    """Skips without nvcc; the parent conftest.py decides when that is a failure."""
