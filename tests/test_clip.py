"""Drop-in for torch.nn.utils: the same arguments, semantics, and results where torch is right."""

import inspect
import math
import warnings

import pytest
import torch
from helpers import (
    COMPLEX,
    NORM_TYPES,
    REAL,
    assert_as_close_as_torch,
    assert_norm,
    assert_values,
    bits,
    norm_rtol,
    owner,
    owners,
    random,
    result_dtype,
    short,
    true_norm,
    truly_clipped,
    wide,
)

import gradfuse

pytestmark = pytest.mark.usefixtures("backend")

SHARED = ["get_total_norm", "clip_grad_norm_", "clip_grads_with_norm_", "clip_grad_value_"]


def layouts(dtype, device):
    """Gradients of every layout that may be written, by name."""
    base = random(6, 8, 10, 12, dtype=dtype, device=device)
    return {
        "dense": base.clone(),
        "0-d": random(dtype=dtype, device=device),
        "zero-size": torch.empty(3, 0, dtype=dtype, device=device),
        "transposed": base.clone().permute(3, 1, 0, 2),
        "stepped": base.clone()[:, ::2, :, 1::3],
        "four strides": base.clone()[:, :4, :6, :9],
        "narrow": base.clone().narrow(2, 3, 5),
        "channels_last": base.clone().contiguous(memory_format=torch.channels_last),
        "column": base.clone()[..., 7],
        "long column": random(9000, 3, dtype=dtype, device=device)[:, 1],
    }


@pytest.mark.no_kernel
@pytest.mark.parametrize("name", SHARED)
def test_signature_is_torchs(name):
    ours = inspect.signature(getattr(gradfuse, name)).parameters
    torchs = inspect.signature(getattr(torch.nn.utils, name)).parameters
    shared = [(p.name, p.default, p.kind) for p in ours.values()][: len(torchs)]
    assert shared == [(p.name, p.default, p.kind) for p in torchs.values()]
    extra = list(ours.values())[len(torchs) :]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in extra)


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=short)
def test_any_strides(dtype, device):
    for name, grad in layouts(dtype, device).items():
        norm = true_norm([grad])
        truth = truly_clipped(grad, norm, 0.25)
        strides = grad.stride()
        assert_norm(gradfuse.get_total_norm([grad]), norm, [dtype])
        assert_norm(gradfuse.clip_grad_norm_(owner(grad), 0.25), norm, [dtype])
        assert_values(torch.view_as_real(grad) if dtype.is_complex else grad, *parts(truth, dtype))
        assert grad.stride() == strides, name


def parts(truth, dtype):
    """The truth as real numbers, and the relative error that is allowed."""
    real = truth[..., None].view(truth.real.dtype) if dtype.is_complex else truth
    return real, norm_rtol([dtype])


def test_strided_views_leave_their_gaps_alone(device):
    base = random(64, 50, device=device)
    before = base.clone()
    grad = base[1::2, 5:40:3]
    gradfuse.clip_grad_norm_(owner(grad), 1e-3)
    outside = torch.ones_like(base, dtype=torch.bool)
    outside[1::2, 5:40:3] = False
    assert bits(base[outside]) == bits(before[outside])
    assert not torch.equal(base, before)


def test_mixed_dtypes_are_one_vector(device):
    grads = [random(50, 3, dtype=d, device=device) for d in [*REAL, *COMPLEX]]
    dtypes = [g.dtype for g in grads]
    norm = true_norm(grads)
    truth = [truly_clipped(g, norm, 2.0) for g in grads]
    assert_norm(gradfuse.clip_grad_norm_(owners(grads), 2.0), norm, dtypes)
    for grad, expected, dtype in zip(grads, truth, dtypes, strict=True):
        assert grad.dtype == dtype
        shown = torch.view_as_real(grad) if dtype.is_complex else grad
        assert_values(shown, parts(expected, dtype)[0], norm_rtol(dtypes))


@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=short)
def test_norm_is_float32_or_wider_on_the_gradients_device(dtype, device):
    grads = [random(5, dtype=dtype, device=device)]
    for norm in (gradfuse.get_total_norm(grads), gradfuse.clip_grad_norm_(owners(grads), 1.0)):
        assert norm.dtype == result_dtype([dtype])
        assert norm.device.type == device.type
        assert norm.shape == ()


@pytest.mark.parametrize("norm_type", [2, 1, "inf", "2.0", float("inf")])
def test_norm_type_is_converted_as_in_torch(norm_type):
    grads = [random(10), random(3, 4)]
    got = gradfuse.get_total_norm(grads, norm_type)
    torch.testing.assert_close(got, torch.nn.utils.get_total_norm(grads, norm_type))


def test_generators_lists_and_single_tensors(device):
    grads = [random(30, device=device), random(4, 4, device=device)]
    expected = gradfuse.get_total_norm(grads)
    for wrap in (tuple, iter, lambda x: (g for g in x), dict.fromkeys):
        assert torch.equal(gradfuse.get_total_norm(wrap(grads)), expected)
    one = torch.nn.utils.get_total_norm(grads[0])
    torch.testing.assert_close(gradfuse.get_total_norm(grads[0]), one)

    clipped = []
    for wrap in (list, tuple, iter, lambda x: (p for p in x)):
        copies = [g.clone() for g in grads]
        assert torch.equal(gradfuse.clip_grad_norm_(wrap(owners(copies)), 1.0), expected)
        clipped.append(bits(copies))
    assert all(c == clipped[0] for c in clipped)
    assert clipped[0] != bits(grads)


def test_every_function_takes_a_generator():
    def walk(call):
        grads = [random(30), random(4, 4)]
        call(p for p in owners(grads))
        return bits(grads) != bits([random(30), random(4, 4)])

    assert walk(lambda ps: gradfuse.clip_grads_with_norm_(ps, 1.0, torch.tensor(9.0)))
    assert walk(lambda ps: gradfuse.clip_grad_value_(ps, 0.1))
    assert walk(lambda ps: gradfuse.adaptive_clip_grad_(ps))
    assert walk(lambda ps: gradfuse.GradClipper(ps, 0.1).clip_())


def test_empty_list_has_norm_zero():
    for got in (gradfuse.get_total_norm([]), gradfuse.clip_grad_norm_([], 1.0)):
        assert got.item() == 0.0
        assert got.dtype == torch.float32
    gradfuse.clip_grads_with_norm_([], 1.0, torch.tensor(1.0))
    gradfuse.clip_grad_value_([], 1.0)
    gradfuse.adaptive_clip_grad_([])


def test_zero_size_gradients_have_norm_zero():
    """Also for order inf, where torch raises because an empty maximum has no identity."""
    for norm_type in NORM_TYPES:
        assert gradfuse.clip_grad_norm_(owner(torch.empty(0, 3)), 1.0, norm_type).item() == 0.0


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("clip_grad_norm_", (1.0,)),
        ("get_total_norm", ()),
        ("clip_grads_with_norm_", (1.0, torch.tensor(1.0))),
    ],
)
def test_empty_generator_warns_exactly_where_torch_does(name, args):
    def warned(library):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            getattr(library, name)((p for p in []), *args)
        return [(str(w.message), w.filename == __file__) for w in caught]

    theirs = warned(torch.nn.utils)
    assert warned(gradfuse) == [(message, True) for message, _ in theirs]
    assert len(theirs) == (name == "clip_grad_norm_")


def test_parameters_without_gradient_are_skipped(device):
    grads = [random(30, device=device), random(4, 4, device=device)]
    without = torch.zeros(3, device=device, requires_grad=True)
    expected = gradfuse.get_total_norm(grads)
    params = owners(grads)
    mixed = [without, params[0], without, params[1]]
    assert torch.equal(gradfuse.clip_grad_norm_(mixed, 1.0), expected)
    assert without.grad is None
    assert gradfuse.clip_grad_norm_([without], 1.0).item() == 0.0
    gradfuse.clip_grad_value_(mixed, 0.01)
    gradfuse.adaptive_clip_grad_([without])
    assert max(g.abs().max().item() for g in grads) <= 0.01


def test_error_if_nonfinite_raises_as_torch_does():
    bad = [random(5), torch.tensor([1.0, math.nan])]
    for call in (
        lambda lib: lib.get_total_norm(bad, error_if_nonfinite=True),
        lambda lib: lib.clip_grad_norm_(owners(bad), 1.0, error_if_nonfinite=True),
    ):
        with pytest.raises(RuntimeError, match="finite"):
            call(torch.nn.utils)
        with pytest.raises(RuntimeError, match="finite"):
            call(gradfuse)
    fine = [random(5)]
    expected = torch.nn.utils.get_total_norm(fine, error_if_nonfinite=True)
    torch.testing.assert_close(gradfuse.get_total_norm(fine, error_if_nonfinite=True), expected)


@pytest.mark.parametrize("total", [4.0, torch.tensor(4.0), torch.tensor([4.0]).double()])
def test_clip_grads_with_norm_scales_by_the_given_norm(total, device):
    grad = random(100, device=device)
    truth = wide(grad) * (1.0 / (4.0 + 1e-6))
    stock = grad.clone()
    torch.nn.utils.clip_grads_with_norm_(owner(stock), 1.0, torch.tensor(4.0, device=device))
    gradfuse.clip_grads_with_norm_([owner(grad)], 1.0, total)
    assert_as_close_as_torch(grad, truth, stock)


def test_max_norm_may_be_a_tensor(device):
    grad, same = random(100, device=device), random(100, device=device)
    gradfuse.clip_grad_norm_(owner(grad), torch.tensor(0.5))
    gradfuse.clip_grad_norm_(owner(same), 0.5)
    assert bits(grad) == bits(same)


def test_tied_parameters_count_and_are_scaled_once(device):
    grad = torch.full((16,), 2.0, device=device)
    tied, other = owner(grad), torch.zeros(16, device=device)
    other.grad = grad
    for params in ([tied, tied], [tied, other]):
        grad.fill_(2.0)
        assert gradfuse.clip_grad_norm_(params, 4.0).item() == 8.0
        torch.testing.assert_close(grad, torch.full_like(grad, 1.0))
        gradfuse.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0))
        torch.testing.assert_close(grad, torch.full_like(grad, 0.5))


@pytest.mark.parametrize("view", ["detach", "ravel", "t"])
def test_views_of_one_gradient_count_and_are_scaled_once(view, device):
    grad = torch.full((800, 900), 2.0, device=device)
    params = [owner(grad), owner(getattr(grad, view)())]
    norm = 2.0 * math.sqrt(grad.numel())
    assert gradfuse.clip_grad_norm_(params, norm / 2).item() == pytest.approx(norm)
    torch.testing.assert_close(grad, torch.full_like(grad, 1.0))
    gradfuse.clip_grads_with_norm_(params, 1.0, torch.tensor(2.0))
    torch.testing.assert_close(grad, torch.full_like(grad, 0.5))


def test_neighbours_in_one_buffer_are_no_views_of_each_other(device):
    """Gradients lie like this in the buckets of DistributedDataParallel."""
    bucket = torch.full((100,), 2.0, device=device)
    params = owners([bucket[:40], bucket[40:40], bucket[40:41], bucket[41:]])
    assert gradfuse.clip_grad_norm_(params, 10.0).item() == 20.0
    torch.testing.assert_close(bucket, torch.full_like(bucket, 1.0))


def test_total_norm_counts_a_repeated_tensor_as_often_as_it_comes(device):
    x = random(20, device=device)
    expected = torch.nn.utils.get_total_norm([x, x])
    torch.testing.assert_close(gradfuse.get_total_norm([x, x]), expected)


def test_expanded_tensors_are_measured(device):
    x = random(5, 1, 3, device=device).expand(5, 40, 3)
    assert_norm(gradfuse.get_total_norm([x]), true_norm([x]), [x.dtype])
    y = random(1, device=device).expand(5000)
    assert_norm(gradfuse.get_total_norm([y], 1.0), true_norm([y], 1.0), [y.dtype])


def test_zero_size_expanded_gradients_are_fine(device):
    """They have no memory to share. torch accepts them too."""
    empty = torch.empty(1, 0, device=device).expand(3, 0)
    assert gradfuse.clip_grad_norm_(owner(empty), 1.0).item() == 0.0


def test_conjugate_and_negative_views(device):
    z = random(50, dtype=torch.complex64, device=device)
    for lazy in (z.clone().conj(), z.clone().conj().imag):
        norm = true_norm([lazy])
        truth = truly_clipped(lazy, norm, 1.0)
        assert_norm(gradfuse.clip_grad_norm_(owner(lazy), 1.0), norm, [torch.float32])
        assert abs(wide(lazy) - truth).max() <= 1e-6
    negative = z.clone().conj().imag
    values = wide(negative).clip(-0.3, 0.7)
    gradfuse.clip_grad_value_(owner(negative), 0.3)
    assert abs(wide(negative) - values.clip(-0.3, 0.3)).max() <= 1e-7


def test_lazily_cloned_gradients_are_copied_before_they_are_written(device):
    original = random(1000, device=device)
    before = bits(original)
    grad = torch._lazy_clone(original)
    gradfuse.clip_grad_norm_(owner(grad), 0.1)
    assert bits(original) == before
    assert bits(grad) != before


def test_gradients_that_require_grad(device):
    """create_graph=True produces such gradients."""
    x = random(20, device=device).requires_grad_()
    (x.grad,) = torch.autograd.grad(x.square().sum(), x, create_graph=True)
    assert x.grad.requires_grad
    version = x.grad._version
    norm = gradfuse.clip_grad_norm_(x, 1.0)
    assert not norm.requires_grad
    assert x.grad._version > version
    torch.testing.assert_close(x.grad.norm(), torch.tensor(1.0, device=device))
    assert not gradfuse.get_total_norm([x.grad]).requires_grad


def test_inference_tensors(device):
    with torch.inference_mode():
        grad = torch.full((4,), 3.0, device=device)
        gradfuse.clip_grad_norm_(owner(grad), 3.0)
        torch.testing.assert_close(grad, torch.full_like(grad, 1.5))


def test_thousands_of_tensors(backend, device):
    number = 1100 if backend == "ptx" else 3000  # one launch takes 1024
    grads = [random(1 + i % 7, device=device, seed=i) for i in range(number)]
    norm = true_norm(grads)
    truth = [truly_clipped(g, norm, 1.0) for g in grads]
    assert_norm(gradfuse.clip_grad_norm_(owners(grads), 1.0), norm, [torch.float32])
    for grad, expected in zip(grads, truth, strict=True):
        assert_values(grad, expected, 1.2e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_and_cpu_in_one_call():
    grads = [random(50), random(60, device="cuda"), random(2000, dtype=torch.float16)]
    norm = true_norm(grads)
    truth = [truly_clipped(g, norm, 1.0) for g in grads]
    got = gradfuse.clip_grad_norm_(owners(grads), 1.0)
    assert got.device.type == "cpu"
    assert_norm(got, norm, [torch.float32])
    for grad, expected in zip(grads, truth, strict=True):
        assert_values(grad, expected, 1.2e-6)
