"""Helpers of all tests: gradients to clip, the truth in float64, comparisons."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
NORM_TYPES = (2.0, 1.0, 0.5, 3.0, 7.3, math.inf)
# For tests that hold only if the host can read the gradients, or that run another process.
HOST_BACKENDS = pytest.mark.backends("cpu", "reference")
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs g++")
SANITIZED = os.environ.get("GRADFUSE_SANITIZE") == "1"


def short(value: object) -> str:
    """A parametrize id: "float16" for torch.float16."""
    return str(value).removeprefix("torch.")


def owner(grad: Tensor) -> Tensor:
    """A parameter of zeros that has this gradient."""
    parameter = torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device)
    if grad.layout == torch.sparse_csr:  # a dense parameter accepts no CSR gradient
        parameter = grad.clone()
    parameter.grad = grad
    return parameter


def owners(grads: Sequence[Tensor]) -> list[Tensor]:
    return [owner(g) for g in grads]


def random(*shape: int, dtype=torch.float32, device="cpu", scale=1.0, seed=0) -> Tensor:
    """Normally distributed values, the same on every device."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return (torch.randn(shape, dtype=wide, generator=generator) * scale).to(dtype).to(device)


def bits(tensors: Tensor | Sequence[Tensor]) -> list[bytes]:
    """The exact contents, NaN payloads and signs of zero included."""
    listed = [tensors] if isinstance(tensors, Tensor) else tensors
    flat = [t.detach().cpu().flatten().clone(memory_format=torch.contiguous_format) for t in listed]
    return [t.view(torch.uint8).numpy().tobytes() if t.numel() else b"" for t in flat]


def wide(x: Tensor) -> np.ndarray:
    """A copy of the values in float64 or complex128, as numpy."""
    dtype = torch.complex128 if x.is_complex() else torch.float64
    return x.detach().cpu().to(dtype).numpy().copy()


class Norm(NamedTuple):
    """value * 2**exponent: a norm that may lie beyond float64."""

    value: np.longdouble
    exponent: int

    def __float__(self) -> float:
        with np.errstate(over="ignore"):
            return float(np.ldexp(float(self.value), self.exponent))


def true_norm(tensors: Sequence[Tensor], p: float = 2.0) -> Norm:
    """The p-norm of finite tensors as one vector, by numpy in scaled extended precision."""
    parts = [np.abs(wide(t)).reshape(-1) for t in tensors]
    flat = np.concatenate([np.zeros(1), *parts])
    exponent = int(np.frexp(flat.max())[1])
    flat = np.ldexp(flat, -exponent).astype(np.longdouble)
    top = flat.max()
    if math.isinf(p) or top == 0.0:
        return Norm(top, exponent)
    with np.errstate(under="ignore"):
        return Norm(top * np.sum((flat / top) ** p) ** (1 / np.longdouble(p)), exponent)


def truly_clipped(grad: Tensor, norm: Norm, max_norm: float) -> np.ndarray:
    """grad * min(1, max_norm / (norm + 1e-6)), left alone if norm <= max_norm."""
    if float(norm) <= max_norm:
        return wide(grad)
    floor = np.ldexp(np.longdouble(1e-6), -norm.exponent)
    factor = np.ldexp(np.longdouble(max_norm) / (norm.value + floor), -norm.exponent)
    return (wide(grad) * factor).astype(wide(grad).dtype)


def norm_rtol(dtypes: Sequence[torch.dtype]) -> float:
    """The allowed relative error of a norm: 32 additions in float32, unless all is float64."""
    wide_ones = (torch.float64, torch.complex64, torch.complex128)
    return 1e-12 if all(d in wide_ones for d in dtypes) else 1.2e-6


def result_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The dtype of a norm over gradients of these dtypes."""
    return torch.float64 if {torch.float64, torch.complex128} & {*dtypes} else torch.float32


def assert_norm(got: Tensor, norm: Norm, dtypes: Sequence[torch.dtype]) -> None:
    """got equals the norm to the precision of the gradients' dtypes, and has the right dtype."""
    assert got.dtype == result_dtype(dtypes)
    assert got.shape == ()
    rounding = torch.finfo(got.dtype).eps
    largest, tiny = torch.finfo(got.dtype).max, torch.finfo(got.dtype).smallest_normal
    truth = float(norm)
    if truth > largest:
        assert math.isinf(got.item())
    else:
        bound = (norm_rtol(dtypes) + rounding) * truth + rounding * tiny
        assert abs(got.item() - truth) <= bound, f"got {got.item()!r}, expected {truth!r}"


def assert_values(got: Tensor, truth: np.ndarray, rtol: float) -> None:
    """Every element is within rtol and one rounding of the truth."""
    info = torch.finfo(got.dtype)
    error = np.abs(wide(got) - truth)
    bound = (rtol + info.eps) * np.abs(truth) + info.smallest_normal * info.eps
    worst = np.argmax(error - bound) if error.size else None
    assert np.all(error <= bound), (
        f"element {worst}: got {wide(got).flat[worst]!r}, expected {truth.flat[worst]!r}"
    )


def assert_as_close_as_torch(
    ours: Tensor, truth64: np.ndarray | float, torch_value: Tensor
) -> None:
    """The largest error is at most 4x torch's, plus the roundings of coefficient and product."""
    truth = np.asarray(truth64)
    size = np.abs(truth).max(initial=0.0)
    error = np.abs(wide(ours) - truth).max(initial=0.0)
    allowed = np.abs(wide(torch_value) - truth).max(initial=0.0)
    assert error <= 4.0 * allowed + 2.0 * torch.finfo(ours.dtype).eps * size, (
        f"error {error:.3g}, torch's is {allowed:.3g}, values are up to {size:.3g}"
    )


def ulps_apart(a: Tensor, b: Tensor) -> int:
    """The largest distance between corresponding elements, counted in representable values."""
    kind = {2: np.int16, 4: np.int32, 8: np.int64}[a.element_size()]

    def ordered(x: Tensor) -> list[int]:
        signed = np.frombuffer(bits(x)[0], dtype=kind).tolist()
        low = int(np.iinfo(kind).min)
        return [i if i >= 0 else low - i for i in signed]

    return max((abs(x - y) for x, y in zip(ordered(a), ordered(b), strict=True)), default=0)


def run_python(code: str, timeout: float = 150, **environment: str) -> subprocess.CompletedProcess:
    """Runs a script in a fresh interpreter, with these environment variables added. After the
    timeout the script and its children are killed, so that a hang fails only this test."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_ran(done: subprocess.CompletedProcess) -> str:
    """Asserts that a script succeeded, and returns its output."""
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
