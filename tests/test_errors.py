"""Bad input: one sentence that names function, expected and got, and no gradient written."""

import functools
import math
import re

import pytest
import torch
from helpers import assert_ran, bits, owner, random, run_python
from torch.testing._internal.two_tensor import TwoTensor

import gradfuse

pytestmark = pytest.mark.usefixtures("backend")


def clip_with_clipper(params):
    gradfuse.GradClipper(params, 0.1).clip_()


# Every function that writes gradients, by the name its messages begin with.
WRITERS = {
    "clip_grad_norm_": lambda ps: gradfuse.clip_grad_norm_(ps, 0.1),
    "clip_grads_with_norm_": lambda ps: gradfuse.clip_grads_with_norm_(ps, 0.1, torch.tensor(9.0)),
    "clip_grad_value_": lambda ps: gradfuse.clip_grad_value_(ps, 0.1),
    "adaptive_clip_grad_": lambda ps: gradfuse.adaptive_clip_grad_(ps),
    "GradClipper|clip_grad_norm_": clip_with_clipper,
}
FUNCTIONS = {
    **WRITERS,
    "get_total_norm": lambda ps: gradfuse.get_total_norm([getattr(p, "grad", p) for p in ps]),
}
each_writer = pytest.mark.parametrize("name", WRITERS)
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def assert_refused(call, error, words, params, name=""):
    """call raises this error in these words, and every gradient keeps its bits and version."""
    kept = [p.grad for p in params if torch.is_tensor(p) and p.grad is not None]
    kept = [g for g in kept if type(g) is torch.Tensor and g.layout == torch.strided]
    kept = [g for g in kept if g.device.type != "meta" and not g.is_nested]
    before, versions = bits(kept), [g._version for g in kept]
    with pytest.raises(error, match=words) as raised:
        call()
    assert re.match(name, str(raised.value)), f"{raised.value} does not begin with {name}"
    assert bits(kept) == before
    assert [g._version for g in kept] == versions


def good(device="cpu"):
    return owner(random(40, 3, device=device))


def of_dtype(dtype):
    return owner(torch.ones(3, 2).to(dtype))


def of_layout(convert):
    parameter = convert(torch.eye(3))
    parameter.grad = convert(torch.eye(3))
    return parameter


def sparse_grad_of_dense():
    parameter = torch.zeros(3, 3)
    parameter.grad = torch.eye(3).to_sparse()
    return parameter


BAD_GRADIENTS = {
    "int64": (lambda: of_dtype(torch.int64), "expected float16.* got .*(Long|int64)"),
    "int8": (lambda: of_dtype(torch.int8), "expected float16.* got .*(Char|int8)"),
    "bool": (lambda: of_dtype(torch.bool), "expected float16.* got .*[Bb]ool"),
    "float8": (lambda: of_dtype(torch.float8_e4m3fn), "expected float16.* got .*[Ff]loat8_e4m3fn"),
    "complex32": (lambda: of_dtype(torch.complex32), "expected (float16|real).* got .*[Cc]omplex"),
    "sparse coo": (sparse_grad_of_dense, "expected dense gradients, got layout .*[Ss]parse"),
    "sparse csr": (
        lambda: of_layout(torch.Tensor.to_sparse_csr),
        "expected dense gradients, got layout .*[Ss]parse",
    ),
    "meta": (lambda: owner(torch.ones(3, device="meta")), "expected gradients .* got meta"),
}


@each_function
@pytest.mark.parametrize("kind", BAD_GRADIENTS)
@pytest.mark.filterwarnings(
    "ignore:Sparse CSR", "ignore:ComplexHalf", "ignore:The PyTorch API of nested"
)
def test_unsupported_gradients(name, kind, device):
    make, words = BAD_GRADIENTS[kind]
    params = [good(device), make(), good(device)]
    words = f"{words}.* for tensor 1"
    assert_refused(lambda: FUNCTIONS[name](params), TypeError, words, params, name)


@each_function
def test_tensors_without_memory_of_their_own(name, backend):
    """A subclass that wraps others."""
    if backend == "reference":
        pytest.skip("the reference runs torch's ops on a subclass, which is free to define them")
    wrapper = torch.zeros(2, 2)
    wrapper.grad = TwoTensor(torch.ones(2, 2), torch.ones(2, 2))
    params = [good(), wrapper]
    words = "expected plain tensors, got a wrapper"
    assert_refused(lambda: FUNCTIONS[name](params), TypeError, words, params, name)
    assert wrapper.grad.a.eq(1.0).all()
    assert wrapper.grad.b.eq(1.0).all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors():
    """They cannot be a .grad."""
    tensors = [torch.ones(2), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]
    call = functools.partial(gradfuse.get_total_norm, tensors)
    assert_refused(call, TypeError, "expected .* for tensor 1", [], "get_total_norm")


@each_writer
def test_expanded_gradients(name, device):
    for shape, size in (((1,), (5,)), ((3, 1), (3, 4)), ((1, 1, 2), (4, 4, 2))):
        params = [good(device), owner(random(*shape, device=device).expand(size))]
        call = functools.partial(WRITERS[name], params)
        assert_refused(call, RuntimeError, "expanded.* for tensor 1", params, name)


@each_writer
def test_gradients_that_share_part_of_their_memory(name, device):
    """Threads would write the same memory; one after the other would write it twice."""
    base = random(8, 8, device=device)
    for other in (base[:4], base[:, :4], base.view(torch.float64), base.view(-1)[:1]):
        for grads in ((base, other), (other, base)):
            params = [good(device), *map(owner, grads)]
            call = functools.partial(WRITERS[name], params)
            words = "expected gradients that do not overlap in memory.* for tensor 2"
            assert_refused(call, RuntimeError, words, params, name)
    params = [owner(base[:4]), owner(base[:, :4])]  # as many elements from the same address on
    call = functools.partial(WRITERS[name], params)
    assert_refused(call, RuntimeError, "do not overlap in memory", params, name)


def test_complex_has_no_order(device):
    for dtype in (torch.complex64, torch.complex128):
        params = [good(device), owner(random(4, dtype=dtype, device=device))]
        words = "expected real gradients.* got .* for tensor 1"
        call = functools.partial(gradfuse.clip_grad_value_, params, 0.1)
        assert_refused(call, TypeError, words, params, "clip_grad_value_")


@each_function
@pytest.mark.parametrize("item", ["text", 1.5, None, [torch.ones(2)]], ids=str)
def test_items_that_are_no_tensors(name, item):
    params = [good(), item]
    words = f"expected .*[tT]ensor.* got {type(item).__name__}|must be Tensors .* got"
    assert_refused(lambda: FUNCTIONS[name](params), TypeError, words, params, name)


@pytest.mark.parametrize("what", [5, None, 1.5], ids=str)
def test_no_iterable(what):
    calls = {
        **WRITERS,
        "get_total_norm": gradfuse.get_total_norm,
        "GradClipper": lambda ps: gradfuse.GradClipper(ps, 1.0),
    }
    for name, call in calls.items():
        words = f"expected .*tensor.* got {type(what).__name__}"
        call = functools.partial(call, what)
        assert_refused(call, TypeError, f"(?i){words}", [], name)


@each_writer
@pytest.mark.no_kernel
def test_an_error_of_the_callers_generator_is_the_callers(name):
    """Also a TypeError, which is what walking a thing that is no iterable raises."""
    params = [good()]

    def broken():
        yield params[0]
        raise TypeError("from the generator")

    assert_refused(lambda: WRITERS[name](broken()), TypeError, "^from the generator$", params)


@pytest.mark.parametrize("bad", [-1.0, -1e-30, -math.inf, math.nan], ids=str)
def test_bounds_below_zero(bad, device):
    params = [good(device)]
    clipper = gradfuse.GradClipper(params, 1.0)
    total = torch.tensor(9.0)
    calls = [
        ("clip_grad_norm_: max_norm", lambda: gradfuse.clip_grad_norm_(params, bad)),
        (
            "clip_grads_with_norm_: max_norm",
            lambda: gradfuse.clip_grads_with_norm_(params, bad, total),
        ),
        ("clip_grad_value_: clip_value", lambda: gradfuse.clip_grad_value_(params, bad)),
        ("adaptive_clip_grad_: clip_factor", lambda: gradfuse.adaptive_clip_grad_(params, bad)),
        ("adaptive_clip_grad_: eps", lambda: gradfuse.adaptive_clip_grad_(params, 0.1, bad)),
        ("GradClipper: max_norm", lambda: gradfuse.GradClipper(params, bad)),
        ("GradClipper: max_norm", lambda: setattr(clipper, "max_norm", bad)),
    ]
    for name, call in calls:
        assert_refused(call, ValueError, f"must be >= 0, got {bad}", params, name)
    assert clipper.max_norm == 1.0


@pytest.mark.parametrize("bad", [0, 0.0, -1, -2.0, -math.inf, math.nan, "-inf"], ids=str)
@pytest.mark.no_kernel
def test_norm_types_that_are_no_norm(bad, device):
    params = [good(device)]
    calls = {
        "get_total_norm": lambda: gradfuse.get_total_norm([p.grad for p in params], bad),
        "clip_grad_norm_": lambda: gradfuse.clip_grad_norm_(params, 0.1, bad),
        "adaptive_clip_grad_": lambda: gradfuse.adaptive_clip_grad_(params, norm_type=bad),
        "GradClipper": lambda: gradfuse.GradClipper(params, 0.1, bad),
    }
    for name, call in calls.items():
        words = f"norm_type must be > 0 or inf, got {float(bad)}"
        assert_refused(call, ValueError, words, params, name)


@pytest.mark.no_kernel
def test_unknown_policy():
    params = [good()]
    for name, call in (
        ("clip_grad_norm_", lambda: gradfuse.clip_grad_norm_(params, 0.1, nonfinite="ignore")),
        ("GradClipper", lambda: gradfuse.GradClipper(params, 0.1, nonfinite="ignore")),
    ):
        words = "nonfinite must be 'propagate', 'error' or 'zero', got 'ignore'"
        assert_refused(call, ValueError, words, params, name)


@pytest.mark.no_kernel
def test_contradictory_policy():
    params = [good()]
    assert_refused(
        lambda: gradfuse.clip_grad_norm_(params, 0.1, error_if_nonfinite=True, nonfinite="zero"),
        ValueError,
        "error_if_nonfinite contradicts nonfinite='zero'",
        params,
        "clip_grad_norm_",
    )


@pytest.mark.parametrize(
    "total", [torch.ones(2), torch.ones(0), torch.tensor(1j)], ids=["two", "none", "complex"]
)
def test_a_total_norm_that_is_not_one_real_number(total):
    params = [good()]
    assert_refused(
        lambda: gradfuse.clip_grads_with_norm_(params, 0.1, total),
        ValueError,
        "total_norm must be one real number, got",
        params,
        "clip_grads_with_norm_",
    )


def test_adaptive_op_checks_that_weights_and_gradients_match():
    """A parameter's own .grad has its shape; the op behind torch.compile takes any two lists."""
    op = torch.ops.gradfuse.adaptive_clip_grads_
    for weight, grad in (((4, 3), (3, 4)), ((12,), (3, 4)), ((), (1,))):
        params = [good(), owner(torch.ones(grad))]
        grads, weights = [p.grad for p in params], [torch.ones(40, 3), torch.ones(weight)]
        call = functools.partial(op, weights, grads, 0.01, 1e-3, 2.0)
        words = "expected a gradient of the parameter's shape .* got .* parameter 1"
        assert_refused(call, ValueError, words, params, "adaptive_clip_grad_")


def test_grad_clipper_takes_tensors_and_named_tensors_only():
    params = [good()]
    for items in (["text"], [("name", 3)], [("a", params[0], 1)], {"a": params[0]}):
        with pytest.raises(TypeError, match="GradClipper: parameters must be Tensors or"):
            gradfuse.GradClipper(items, 1.0)
    clipper = gradfuse.GradClipper(params, 1.0)
    with pytest.raises(TypeError, match=r"GradClipper\.add: expected a Tensor, got str"):
        clipper.add("text")
    assert clipper.names == ["0"]


# What could end the process runs in one of its own.
STORAGES = """
import torch, gradfuse

def owner(grad):
    parameter = torch.ones(grad.shape)
    parameter.grad = grad
    return parameter

def trimmed(size):
    grad = torch.ones(100, 100)
    parameter = owner(grad)
    grad.untyped_storage().resize_(size)
    return parameter

calls = [
    lambda ps: gradfuse.get_total_norm([p.grad for p in ps]),
    lambda ps: gradfuse.clip_grad_norm_(ps, 0.1),
    lambda ps: gradfuse.clip_grads_with_norm_(ps, 0.1, torch.tensor(9.0)),
    lambda ps: gradfuse.clip_grad_value_(ps, 0.1),
    lambda ps: gradfuse.adaptive_clip_grad_(ps),
    lambda ps: gradfuse.GradClipper(ps, 0.1).clip_(),
]
for size in (0, 4, 39996):
    for call in calls:
        first = owner(torch.ones(5, 5))
        try:
            call([first, trimmed(size)])
        except RuntimeError as error:
            words = f"expected storage of at least 40000 bytes, got {size} for tensor 1"
            assert words in str(error), error
        else:
            raise SystemExit("no error")
        assert first.grad.eq(1.0).all() and first.grad._version == 0
print("refused")
"""


@pytest.mark.elsewhere
def test_storage_that_was_freed_or_shrunk(backend):
    environment = {"GRADFUSE_NATIVE": "0"} if backend == "reference" else {}
    assert assert_ran(run_python(STORAGES, **environment)) == "refused\n"


IMPOSTORS = """
import unittest.mock, torch, gradfuse

impostor = unittest.mock.Mock(spec=torch.Tensor)
assert isinstance(impostor, torch.Tensor)
good = torch.ones(3)
good.grad = torch.ones(3)
calls = [
    lambda: gradfuse.get_total_norm([good.grad, impostor]),
    lambda: gradfuse.clip_grad_norm_([good, impostor], 0.1),
    lambda: gradfuse.clip_grads_with_norm_([good, impostor], 0.1, torch.tensor(9.0)),
    lambda: gradfuse.clip_grad_value_([good, impostor], 0.1),
    lambda: gradfuse.adaptive_clip_grad_([good, impostor]),
    lambda: gradfuse.GradClipper([good, impostor], 0.1).clip_(),
    lambda: gradfuse.get_total_norm(impostor),
    lambda: gradfuse.clip_grad_norm_(impostor, 0.1),
]
for call in calls:
    try:
        call()
    except TypeError:
        assert good.grad.eq(1.0).all()
    else:
        raise SystemExit("no error")
print("refused")
"""


@pytest.mark.elsewhere
def test_objects_that_only_isinstance_takes_for_tensors(backend):
    environment = {"GRADFUSE_NATIVE": "0"} if backend == "reference" else {}
    assert assert_ran(run_python(IMPOSTORS, **environment)) == "refused\n"


LENGTHS = """
import torch, gradfuse

for weights, grads in ((1, 2), (2, 1), (0, 1)):
    listed = [torch.ones(3) for _ in range(grads)]
    try:
        torch.ops.gradfuse.adaptive_clip_grads_(
            [torch.ones(3) for _ in range(weights)], listed, 0.01, 1e-3, 2.0
        )
    except ValueError as error:
        assert str(error).startswith("adaptive_clip_grad_: expected"), error
    else:
        raise SystemExit("no error")
    assert all(g.eq(1.0).all() for g in listed)
print("refused")
"""


@pytest.mark.elsewhere
def test_adaptive_op_with_lists_of_different_lengths(backend):
    environment = {"GRADFUSE_NATIVE": "0"} if backend == "reference" else {}
    assert assert_ran(run_python(LENGTHS, **environment)) == "refused\n"
