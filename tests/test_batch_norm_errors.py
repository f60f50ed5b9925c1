"""What batch_norm_act refuses: one sentence, before anything is written."""

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
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "activation must be None, 'relu'.* got 'swish'"),
        ({"save": "nothing"}, ValueError, "save must be 'bitmask' or 'output', got 'nothing'"),
        (
            {"save": "output", "activation": "leaky_relu", "negative_slope": -1.0},
            ValueError,
            "negative_slope must be >= 0 .* got -1.0",
        ),
        ({"eps": -1.0}, ValueError, "eps must be >= 0, got -1"),
        ({"eps": float("nan")}, ValueError, "eps must be >= 0, got nan"),
        ({"eps": 0.0}, ValueError, "eps must be > 0 when training, got 0"),
        ({"x": torch.ones(1, 3)}, ValueError, "Expected more than 1 value per channel"),
        ({"x": torch.ones(3)}, ValueError, r"input must be \[N, C, ...\], got \[3\]"),
        ({"x": torch.ones(4, 3, dtype=torch.int32)}, TypeError, "input must be float16, bfloat16"),
        ({"x": torch.ones(4, 3, dtype=torch.complex64)}, TypeError, "input must be float16"),
        ({"x": torch.ones(4, 3).to_sparse()}, TypeError, "input must be dense"),
        ({"x": [1.0]}, TypeError, "input must be a Tensor, got list"),
        ({"weight": torch.ones(4)}, ValueError, "weight must have one element per channel"),
        ({"bias": torch.ones(3, 1)}, ValueError, "bias must have one element per channel"),
        ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, "weight must be float16"),
        ({"residual": 1.0}, TypeError, "residual must be a Tensor, got float"),
        (
            {"residual": torch.ones(7)},
            ValueError,
            r"residual must broadcast .*\[4, 3, 5\], got \[7\]",
        ),
        ({"x": [1.0], "residual": torch.ones(3)}, TypeError, "input must be a Tensor, got list"),
        ({"momentum": None}, TypeError, "momentum must be a number .* got None"),
        ({"training": False}, ValueError, "running_mean and running_var must be given"),
        ({"mean": torch.zeros(3)}, ValueError, "must come together, got only running_mean"),
        (
            {"mean": torch.zeros(1).expand(3), "var": torch.ones(3)},
            RuntimeError,
            "expanded tensor",
        ),
        (
            {"momentum": torch.ones(2), "mean": torch.zeros(3), "var": torch.ones(3)},
            ValueError,
            "momentum must be one number",
        ),
    ],
)
@pytest.mark.elsewhere
def test_refused(backend, arguments, error, message):
    kept = {k: v.clone() for k, v in arguments.items() if k in ("mean", "var")}
    with pytest.raises(error, match=message):
        call(**arguments)
    for name, value in kept.items():
        assert torch.equal(arguments[name], value)


@HOST_BACKENDS
def test_nothing_is_written_when_a_later_argument_is_wrong(backend):
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(ValueError, match="bias"):
        call(mean=mean, var=var, bias=torch.ones(7))
    assert not mean.any()
    assert var.eq(1).all()


@HOST_BACKENDS
@pytest.mark.parametrize(
    "residual",
    [
        torch.ones(4, 3, 5, dtype=torch.complex64),
        torch.ones(4, 3, 5, dtype=torch.float64, device="meta"),
        torch.ones(4, 3, 5, dtype=torch.float64).to_sparse(),
    ],
    ids=["complex", "elsewhere", "sparse"],
)
@pytest.mark.no_kernel
def test_nothing_is_written_when_the_residual_is_wrong(backend, residual):
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(TypeError, match="residual must be"):
        call(mean=mean, var=var, residual=residual)
    assert not mean.any()


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
    """The native backward with these saved tensors, the others None."""
    tensors = BatchNormSaved(**dict.fromkeys(BatchNormSaved._fields) | saved)
    return native.batch_norm_backward(grad_output, tensors, options, (True, False, False, False))


def test_backward_arguments_are_checked(native):
    g = random(4, 3, 5)
    stats = torch.zeros(3, 3, dtype=torch.float64)
    relu = BatchNormOptions(False, True, 1e-5, Activation.RELU, 0.0)
    mask = torch.zeros(1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="mask must be"):
        backward(native, g, relu, input=g, mask=mask, stats=stats)
    with pytest.raises(ValueError, match="got None for input, output or mask"):
        backward(native, g, relu, stats=stats)
    with pytest.raises(ValueError, match="stats must be"):
        backward(native, g, relu, input=g, output=g, stats=stats[:2])
    with pytest.raises(ValueError, match="activation must be"):
        backward(native, g, relu._replace(activation=11), input=g, output=g, stats=stats)


def test_records_are_tuples_of_their_fields(native):
    """A record of another length would be read past its end."""
    for call in (
        lambda: native.batch_norm_forward((random(4, 3, 5),)),
        lambda: native.batch_norm_forward(None),
        lambda: native.batch_norm_backward(random(4, 3, 5), (None,) * 6, (), (True,) * 4),
    ):
        with pytest.raises(TypeError, match=r"BatchNorm(Call|Saved): expected a tuple of"):
            call()


def test_a_mask_that_the_activation_has_no_use_for_is_not_read(native):
    """It would be read in place of the output, or the output as a null pointer."""
    g, y = random(4, 3, 5), random(4, 3, 5, seed=1).sigmoid()
    stats = torch.ones(3, 3, dtype=torch.float64)
    mask = torch.zeros(12, 1, dtype=torch.uint8)
    sigmoid = BatchNormOptions(False, False, 1e-5, Activation.SIGMOID, 0.0)
    with_mask, without = (
        backward(native, g, sigmoid, input=g, output=y, mask=m, stats=stats)[0]
        for m in (mask, None)
    )
    assert torch.equal(with_mask, without)
