"""Fixtures: the devices and the two implementations that the tests run on."""

import os

import hypothesis
import pytest
import torch
import torch._inductor.config

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

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
NATIVE_OFF = _native.reason == "GRADFUSE_NATIVE=0"


def pytest_collection_modifyitems(config, items):
    """Leaves out the slow tests unless -m says what to run."""
    if not config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture
def native():
    """The compiled module, for tests of what only it promises. One that cannot be loaded is a
    failure, so that a broken build is never green."""
    if NATIVE_OFF:
        pytest.skip(f"no compiled module: {_native.reason}")
    assert _native.available, _native.reason
    return _native.backend


@pytest.fixture(params=["reference"] if NATIVE_OFF else ["native", "reference", "ptx"])
def backend(request, monkeypatch):
    """Which implementation gradfuse's public functions use."""
    if request.param == "native":
        request.getfixturevalue("native")
    else:
        from ptx import emulated
        b = reference if request.param == "reference" else emulated.backend()
        monkeypatch.setattr("gradfuse.ops.clip.backend", b)
        monkeypatch.setattr("gradfuse.clipper.backend", b)
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda" and _native.available and not _native.backend.cuda_version:
        pytest.skip("the compiled module was built without CUDA")
    return torch.device(request.param)


@pytest.fixture
def threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
