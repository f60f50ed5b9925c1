"""All of this folder needs nvcc."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _needs_nvcc(nvcc):
    """Skips where there is none; conftest.py above says when that is a failure."""
