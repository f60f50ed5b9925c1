"""What setup.py decides."""

import runpy
from pathlib import Path

import pytest
import setuptools


@pytest.mark.parametrize(
    ("nvcc", "archs"),
    [
        ((11, 8), "7.5;8.0;8.6;9.0+PTX"),
        ((12, 6), "7.5;8.0;8.6;9.0+PTX"),
        ((12, 8), "7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
        ((13, 0), "7.5;8.0;8.6;9.0;10.0;12.0+PTX"),
    ],
)
def test_architectures_are_those_that_nvcc_knows(nvcc, archs, monkeypatch):
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    script = runpy.run_path(Path(__file__).parent.parent / "setup.py")
    assert script["default_archs"](nvcc) == archs
