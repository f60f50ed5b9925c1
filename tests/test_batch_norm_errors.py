"""Errors of batch_norm_act, in addition to those of its entry in ops.py."""

import pytest
import torch
from helpers import HOST_BACKENDS, random
from torch.utils.flop_counter import FlopCounterMode

import gradfuse
from gradfuse._codes import Activation
from gradfuse._records import BatchNormOptions, BatchNormSaved


def call(x=None, mean=None, var=None, **options):
    x = random(4, 3, 5) if x is None else x
    return gradfuse.batch_norm_act(x, mean, var, **{"training": True, **options})


@HOST_BACKENDS
def test_one_value_per_channel(backend):
    """The message is torch's own and does not begin with the function's name."""
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        call(torch.ones(1, 3))


@HOST_BACKENDS
def test_statistics_stay_when_a_later_argument_is_wrong(backend):
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="bias"):
        call(mean=mean, var=var, bias=torch.ones(7))
    assert not mean.any()
    assert var.eq(1).all()


@pytest.mark.parametrize("drop", ["p", "drop_path"])
@pytest.mark.parametrize("wrong", ["generator", 1.5])
def test_statistics_stay_when_nothing_can_be_drawn(drop, wrong):
    mean, var = torch.zeros(3), torch.ones(3)
    options = {drop: 0.5, "generator": "x"} if wrong == "generator" else {drop: wrong}
    with pytest.raises((TypeError, ValueError), match=f"generator|{drop} must lie between 0 and 1"):
        call(mean=mean, var=var, **options)
    assert not mean.any()
    assert var.eq(1).all()


@pytest.mark.parametrize("options", [{"p": 0.5}, {"residual": torch.ones(2, 1, 1, 5)}])
def test_statistics_stay_when_a_later_activation_is_wrong(options):
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(TypeError, match="negative_slope must be a number, got 'x'"):
        call(mean=mean, var=var, activation="leaky_relu", negative_slope="x", **options)
    assert not mean.any()
    assert var.eq(1).all()


@HOST_BACKENDS
def test_a_dropout_draws_as_one_after_the_norm(backend):
    x, r = random(4, 3, 5), random(4, 3, 5, seed=1)
    one, two = (torch.Generator().manual_seed(7) for _ in range(2))
    fused = call(x, residual=r, activation=None, p=0.5, generator=one)
    turns = gradfuse.dropout_add(call(x, activation=None), r, 0.5, generator=two)
    assert torch.equal(fused == r, turns == r)  # dropped
    torch.testing.assert_close(fused, turns)
    assert torch.equal(one.get_state(), two.get_state())


@pytest.mark.parametrize(
    ("mean", "var", "message"),
    [
        (torch.zeros(3), None, "must come together, got only running_mean"),
        (torch.zeros(3), torch.ones(4), "running_var must have one element per channel"),
        (torch.zeros(1), torch.ones(1), "running_mean must have one element per channel"),
    ],
)
def test_running_statistics_are_checked_on_the_way_to_a_graph(mean, var, message):
    with FlopCounterMode(display=False), pytest.raises(ValueError, match=message):
        call(mean=mean, var=var)
    assert not mean.any()


def test_freed_storage_is_no_crash(native):
    x = random(4, 3, 5)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="storage of at least 240 bytes, got 0"):
        call(x)
    w = torch.ones(3)
    w.untyped_storage().resize_(4)
    with pytest.raises(RuntimeError, match="weight must have storage"):
        call(weight=w)


def test_another_device(native):
    with pytest.raises(TypeError, match="weight must be on"):
        call(weight=torch.ones(3, device="meta"))


def backward(native, grad_output, options, **saved):
    """Calls the native backward with these saved tensors; the others are None."""
    tensors = BatchNormSaved(**dict.fromkeys(BatchNormSaved._fields) | saved)
    return native.batch_norm_backward(grad_output, tensors, options, (True, False, False, False))


def test_backward_arguments_are_checked(native):
    g = random(4, 3, 5)
    stats = torch.zeros(3, 3)
    relu = BatchNormOptions(False, True, 1e-5, Activation.RELU, 0.0)
    mask = torch.zeros(1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="mask must be"):
        backward(native, g, relu, input=g, mask=mask, stats=stats)
    with pytest.raises(ValueError, match="got None for input, output or mask"):
        backward(native, g, relu, stats=stats)
    for wrong in (stats[:2], stats.double()):
        with pytest.raises(ValueError, match=r"stats must be \[3 or 5, channels\] of Float"):
            backward(native, g, relu, input=g, output=g, stats=wrong)
    with pytest.raises(ValueError, match="activation must be"):
        backward(native, g, relu._replace(activation=11), input=g, output=g, stats=stats)


def test_records_are_tuples_of_their_fields(native):
    """Without the check, a shorter record would be read past its end."""
    for call in (
        lambda: native.batch_norm_forward((random(4, 3, 5),)),
        lambda: native.batch_norm_forward(None),
        lambda: native.batch_norm_backward(random(4, 3, 5), (None,) * 6, (), (True,) * 4),
    ):
        with pytest.raises(TypeError, match=r"BatchNorm(Call|Saved): expected a tuple of"):
            call()


def test_a_mask_that_the_activation_has_no_use_for_is_not_read(native):
    """A kernel would read the mask in place of the output, or the output as a null pointer."""
    g, y = random(4, 3, 5), random(4, 3, 5, seed=1).sigmoid()
    stats = torch.ones(3, 3)
    mask = torch.zeros(12, 1, dtype=torch.uint8)
    sigmoid = BatchNormOptions(False, False, 1e-5, Activation.SIGMOID, 0.0)
    with_mask, without = (
        backward(native, g, sigmoid, input=g, output=y, mask=m, stats=stats)[0]
        for m in (mask, None)
    )
    assert torch.equal(with_mask, without)
