"""Hooks and fixtures that choose the implementation and the device of each test."""

from __future__ import annotations

import os
from contextlib import suppress

import hypothesis
import pytest
import torch
import torch._inductor.config
from implementations import DEVICES, NATIVE_OFF, PTX, PTX_REQUIRED, Recorder, backends, isas

from gradfuse import _native, reference

with suppress(ModuleNotFoundError):  # of expecttest, which a bare machine lacks
    # Loads a hypothesis profile; must come before ours.
    import torch.testing._internal.common_utils

pytest_plugins = ["selection", "budget"]

# Inductor's cache on disk does not know when an op's fake kernel changes.
torch._inductor.config.force_disable_caches = True

hypothesis.settings.register_profile(
    "local",
    deadline=None,
    max_examples=120,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,  # `backend` is the same for all examples
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.register_profile(
    "ci", hypothesis.settings.get_profile("local"), derandomize=True, database=None
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_generate_tests(metafunc):
    definition, names = metafunc.definition, metafunc.fixturenames
    if "backend" in names:
        # A test without kernels may parametrize another `backend`, such as torch.compile's.
        own = [m.args[0] for m in definition.iter_markers("parametrize")]
        if "backend" not in own:
            metafunc.parametrize("backend", backends(definition), indirect=True)
    elif "native" in names:
        metafunc.parametrize("isa", isas(definition), indirect=True, ids=lambda i: i or "widest")
    elif "device" in names:
        metafunc.parametrize("device", DEVICES, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call":
        item.passed = report.passed
    return report


@pytest.fixture
def isa(request):
    """The instruction set of the CPU kernels; the widest unless the test is parametrized."""
    name = getattr(request, "param", "")
    if name:
        _native.backend.set_isa(name)
    yield name
    if name:
        _native.backend.set_isa(os.environ.get("GRADFUSE_ISA", ""))


@pytest.fixture
def native(isa):
    """The compiled module, for tests that apply to no other implementation. The test fails if it
    cannot be loaded, so that a broken build is never green."""
    if NATIVE_OFF:
        pytest.skip(f"no compiled module: {_native.reason}")
    assert _native.available, _native.reason
    return _native.backend


@pytest.fixture(scope="session")
def nvcc():
    """The CUDA toolkit. Without one the CUDA kernels cannot be compiled to PTX."""
    from ptx.emulator import toolchain

    if PTX == "0":
        pytest.skip("GRADFUSE_PTX=0")
    if toolchain.toolkit() is None:
        assert not PTX_REQUIRED, f"GRADFUSE_PTX={PTX}, and nvcc was not found"
        pytest.skip("nvcc was not found: the CUDA kernels cannot be compiled to PTX")
    return toolchain.toolkit()


@pytest.fixture
def ptx(nvcc, monkeypatch):
    """The CUDA kernels on the emulator, reset to its initial state, as gradfuse's backend."""
    from ptx.emulator import emulated

    found = emulated.backend()
    found.reset()
    monkeypatch.setattr(_native, "backend", found)
    return found


@pytest.fixture
def backend(request, monkeypatch):
    """The name of the implementation that gradfuse's public functions use. A test that passes
    without calling it fails, because it proves nothing about the implementation."""
    name, _, isa = request.param.partition("-")
    if name == "reference":
        found = reference
    elif name == "ptx":
        found = request.getfixturevalue("ptx")
    else:
        found = request.getfixturevalue("native")
        if isa:
            found.set_isa(isa)
    recorder = Recorder(found)
    monkeypatch.setattr(_native, "backend", recorder)
    yield name
    if isa:
        found.set_isa(os.environ.get("GRADFUSE_ISA", ""))
    if getattr(request.node, "passed", False) and not recorder.called:
        markers = (request.node.get_closest_marker(m) for m in ("no_kernel", "elsewhere"))
        exempt = any(marker is not None for marker in markers)
        assert exempt, f"the test passed without a call of the {name} implementation"


@pytest.fixture
def device(request):
    """The device of the test's tensors: the backend's, or each device in turn without a backend."""
    name = getattr(request, "param", None)
    if name is None:
        on_gpu = "backend" in request.fixturenames and request.getfixturevalue("backend") == "cuda"
        name = "cuda" if on_gpu else "cpu"
    if name == "cuda" and _native.available and not _native.backend.cuda_version:
        pytest.skip("the compiled module was built without CUDA")
    return torch.device(name)


@pytest.fixture
def threads():
    """torch.set_num_threads; the previous number is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
