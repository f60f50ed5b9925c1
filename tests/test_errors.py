"""Bad input raises one sentence that names function, expected and got, and writes no gradient."""

import functools
import math
import re

import pytest
import torch
from helpers import assert_ran, bits, owner, owners, random, run_python
from ops import clip_grad_norm_
from torch.testing._internal.two_tensor import TwoTensor

import gradfuse

pytestmark = pytest.mark.usefixtures("backend")


def clip_with_clipper(params):
    gradfuse.GradClipper(params, 0.1).clip_()


# Functions that write gradients, by the name that their messages begin with. test_ops.py tests the
# errors that the functions in tests/ops.py have in common.
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
    """call raises this error with these words, and every gradient keeps its bits and version."""
    kept = [p.grad for p in params if torch.is_tensor(p) and p.grad is not None]
    kept = [g for g in kept if type(g) is torch.Tensor and g.layout == torch.strided]
    kept = [g for g in kept if g.device.type != "meta" and not g.is_nested]
    kept = [g for g in kept if g.untyped_storage().nbytes() >= g.nbytes]  # leaves out freed ones
    before, versions = bits(kept), [g._version for g in kept]
    with pytest.raises(error, match=words) as raised:
        call()
    assert re.match(name, str(raised.value)), f"{raised.value} does not begin with {name}"
    assert bits(kept) == before
    assert [g._version for g in kept] == versions


def good(device="cpu"):
    return owner(random(40, 3, device=device))


@pytest.mark.parametrize(
    "bad", [b for b in clip_grad_norm_.errors if not b.in_python], ids=lambda b: b.what
)
def test_the_clipper_refuses_what_the_function_does(bad, device):
    sample = next(iter(clip_grad_norm_.samples(torch.float32, device)))
    bad.change(sample)
    params = owners(sample.grads())
    call = functools.partial(clip_with_clipper, params)
    assert_refused(call, bad.error, bad.match, params, "GradClipper|clip_grad_norm_")


@each_function
def test_tensors_without_memory_of_their_own(name, backend):
    """A tensor subclass that wraps other tensors."""
    if backend == "reference":
        pytest.skip("the reference runs torch's ops, which a tensor subclass may define")
    wrapper = torch.zeros(2, 2)
    wrapper.grad = TwoTensor(torch.ones(2, 2), torch.ones(2, 2))
    params = [good(), wrapper]
    words = "expected plain tensors, got a wrapper"
    assert_refused(lambda: FUNCTIONS[name](params), TypeError, words, params, name)
    assert wrapper.grad.a.eq(1.0).all()
    assert wrapper.grad.b.eq(1.0).all()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors():
    """They cannot be a .grad, so only get_total_norm can receive them."""
    tensors = [torch.ones(2), torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]
    call = functools.partial(gradfuse.get_total_norm, tensors)
    assert_refused(call, TypeError, "expected .* for tensor 1", [], "get_total_norm")


@each_function
@pytest.mark.parametrize("item", ["text", 1.5, None, [torch.ones(2)]], ids=str)
def test_items_that_are_no_tensors(name, item):
    params = [good(), item]
    words = f"expected .*[tT]ensor.* got {type(item).__name__}|must be Tensors .* got"
    assert_refused(lambda: FUNCTIONS[name](params), TypeError, words, params, name)


@pytest.mark.no_kernel
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


@pytest.mark.no_kernel
@each_writer
def test_an_error_of_the_callers_generator_is_the_callers(name):
    """Even a TypeError, which iterating over something that is no iterable raises too."""
    params = [good()]

    def broken():
        yield params[0]
        raise TypeError("from the generator")

    assert_refused(lambda: WRITERS[name](broken()), TypeError, "^from the generator$", params)


@pytest.mark.no_kernel
def test_options_of_the_clipper(device):
    params = [good(device)]
    clipper = gradfuse.GradClipper(params, 1.0)
    for bad in (-1.0, -1e-30, -math.inf, math.nan):
        words = f"max_norm must be >= 0, got {bad}"
        for call in (
            functools.partial(gradfuse.GradClipper, params, bad),
            functools.partial(setattr, clipper, "max_norm", bad),
        ):
            assert_refused(call, ValueError, words, params, "GradClipper")
    assert clipper.max_norm == 1.0
    for bad in (0, 0.0, -1, -2.0, -math.inf, math.nan, "-inf"):
        words = f"norm_type must be > 0 or inf, got {float(bad)}"
        call = functools.partial(gradfuse.GradClipper, params, 0.1, bad)
        assert_refused(call, ValueError, words, params, "GradClipper")
    words = "nonfinite must be 'propagate', 'error' or 'zero', got 'ignore'"
    call = functools.partial(gradfuse.GradClipper, params, 0.1, nonfinite="ignore")
    assert_refused(call, ValueError, words, params, "GradClipper")


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


def test_adaptive_op_checks_that_weights_and_gradients_match():
    """A parameter's own .grad has its shape; the torch.library op accepts any two lists."""
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


# These scripts could crash the process, so they run in another one.
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


SCRIPTS = {"storages": STORAGES, "impostors": IMPOSTORS, "lengths": LENGTHS}


@pytest.mark.no_kernel
def test_what_could_end_the_process(native):
    script = "".join(SCRIPTS.values())
    assert assert_ran(run_python(script)) == "refused\n" * len(SCRIPTS)


@pytest.mark.backends("reference")
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_reference_refuses_the_same(name, backend, capsys):
    exec(SCRIPTS[name], {})
    assert capsys.readouterr().out == "refused\n"


SET_TO_ZERO = {
    "clip_grad_norm_": (lambda p: gradfuse.clip_grad_norm_([p], 0.0), "max_norm"),
    "clip_grads_with_norm_": (
        lambda p: gradfuse.clip_grads_with_norm_([p], 0.0, torch.tensor(1.0)),
        "max_norm",
    ),
    "GradClipper": (lambda p: gradfuse.GradClipper([p], 0.0), "max_norm"),
    "Norm": (lambda p: gradfuse.policies.Norm(0.0), "max_norm"),
    "SGD": (lambda p: gradfuse.optim.SGD([p], clip=0.0), "clip"),
    "AdamW": (lambda p: gradfuse.optim.AdamW([p], clip=0), "clip"),
    "clip_in_step": (
        lambda p: gradfuse.optim.clip_in_step(torch.optim.SGD([p], fused=True), 0.0),
        "max_norm",
    ),
}


@pytest.mark.backends("cpu", "reference", arithmetic=False)
@pytest.mark.elsewhere
@pytest.mark.parametrize("name", SET_TO_ZERO)
def test_a_max_norm_of_zero_warns_where_it_is_given(backend, name):
    """Several trainers mean no clipping by it."""
    call, argument = SET_TO_ZERO[name]
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.warns(UserWarning, match=f"^{name}: {argument}=0 sets all gradients to 0"):
        call(p)
