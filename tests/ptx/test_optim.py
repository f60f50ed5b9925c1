"""Traffic of an optimizer's step: each stream is read once and written once, 16 bytes at a time. A
skipped step writes nothing."""

import math

import pytest
import torch
from helpers import bits, random, short

from gradfuse.optim import LAMB, SGD, Adam, AdamW, Lion, ScheduleFreeAdamW
from gradfuse.policies import AGC, AdaGC, AutoClip, Norm, SpikeSkip, Value, ZClip
from ptx.test_traffic import Operations

SIZES = (32, 4096, 40_960)
# A rule for each arithmetic of an update; EVERY has those that share one, too.
RULES = pytest.mark.parametrize(
    "rule", [AdamW, SGD, Lion, ScheduleFreeAdamW], ids=lambda r: r.__name__
)
EVERY = pytest.mark.parametrize(
    "rule", [AdamW, SGD, Adam, LAMB, Lion, ScheduleFreeAdamW], ids=lambda r: r.__name__
)
MOMENTS = {SGD: 1, Lion: 1}  # else 2
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)

OPTIONS = {
    AdamW: {"update_clip": True, "amsgrad": True},
    SGD: {"stochastic_rounding": True},
    Adam: {"atan2": True, "weight_decay": 0.1},
    LAMB: {"eps_follows_clip": True},
    Lion: {"stochastic_rounding": True, "weight_decay": 0.1},
    ScheduleFreeAdamW: {"warmup_steps": 2, "weight_decay": 0.1},
}


SWEEPS = ("ratio_sums", "lamb_sums", "merge_sums")  # of an LrScale


def made(rule, params, **options):
    if rule is SGD:
        options.setdefault("momentum", 0.9)
    return rule(params, lr=0.01, **options)


def parameters(dtype, sizes=SIZES):
    params = [torch.nn.Parameter(random(n, dtype=dtype, seed=n)) for n in sizes]
    for p in params:
        p.grad = random(*p.shape, dtype=dtype, seed=1)
    return params


def moments(optimizer, p):
    return [t for t in optimizer.state[p].values() if t.dim()]


def moved(ptx, launches, t):
    """({width: bytes loaded}, {width: bytes stored}) of a tensor, in these launches."""
    name = next(b.name for b in ptx.buffers if b.start == t.data_ptr())
    found = {}, {}
    for launch in launches:
        for by_width, counted in zip(
            found, (launch.traffic.loaded, launch.traffic.stored), strict=True
        ):
            for (buffer, width), n in counted.items():
                if buffer == name:
                    by_width[width] = by_width.get(width, 0) + n
    return found


def of_the_update(ptx):
    """The launches of the last step, without those that compute the norm."""
    kernels = (*SWEEPS, "optim_update", "advance_means", "advance_steps")
    return [launch for launch in ptx.launches if launch.kernel.partition("<")[0] in kernels]


@RULES
@DTYPES
def test_every_stream_is_read_once_and_written_once(ptx, rule, dtype):
    params = parameters(dtype)
    optimizer = made(rule, params, clip=0.1)
    for _ in range(2):  # the first step creates the state
        optimizer.step()
    assert ptx.runtime.waits == 0
    launches = of_the_update(ptx)
    assert {launch.kernel.partition("<")[0] for launch in launches} == (
        {"optim_update"}
        | ({"advance_means"} if rule is ScheduleFreeAdamW else set())
        | ({"advance_steps"} if rule is not Lion else set())
    )
    for p in params:
        assert moved(ptx, launches, p.grad) == ({16: p.nbytes}, {})
        assert len(moments(optimizer, p)) == MOMENTS.get(rule, 2)
        for t in (p, *moments(optimizer, p)):
            assert moved(ptx, launches, t) == ({16: t.nbytes}, {16: t.nbytes})


@RULES
def test_a_master_costs_one_read_of_the_parameter_more(ptx, rule):
    """It says whether someone wrote the parameter. A float32 gradient is read as it is."""
    params = parameters(torch.bfloat16)
    for p in params:
        values = p.grad.float()
        p.grad = None
        p.grad_dtype = torch.float32
        p.grad = values
    optimizer = made(rule, params, clip=0.1, master_weights=True)
    for _ in range(2):
        optimizer.step()
    launches = of_the_update(ptx)
    for p in params:
        assert moved(ptx, launches, p.grad) == ({16: p.grad.nbytes}, {})
        assert len(moments(optimizer, p)) == 1 + MOMENTS.get(rule, 2)
        for t in (p, *moments(optimizer, p)):
            assert moved(ptx, launches, t) == ({16: t.nbytes}, {16: t.nbytes})


@RULES
def test_the_norm_reads_gradients_once_and_does_not_wait(ptx, rule):
    params = parameters(torch.float32)
    made(rule, params, clip=0.1).step()
    assert ptx.runtime.waits == 0
    taken = ptx.launches[: -len(of_the_update(ptx))]
    assert taken
    assert not any(launch in of_the_update(ptx) for launch in taken)
    for p in params:
        assert moved(ptx, taken, p.grad) == ({16: p.nbytes}, {})
        assert moved(ptx, taken, p) == ({}, {})


@RULES
@DTYPES
def test_a_skipped_step_moves_nothing(ptx, rule, dtype):
    params = parameters(dtype)
    optimizer = made(rule, params, clip=0.1)
    optimizer.step()
    params[1].grad[5] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    launches = of_the_update(ptx)
    assert launches
    assert sum(launch.traffic.bytes_stored() for launch in launches) == 0
    for p in params:
        for t in (p, p.grad, *moments(optimizer, p)):
            assert moved(ptx, launches, t) == ({}, {})


@DTYPES
def test_update_clipping_reads_gradient_and_second_moment_once_more(ptx, dtype):
    params = parameters(dtype)
    optimizer = AdamW(params, lr=0.01, clip=0.1, update_clip=True)
    for _ in range(2):
        optimizer.step()
    launches = of_the_update(ptx)
    for p in params:
        state, n = optimizer.state[p], p.nbytes
        assert moved(ptx, launches, p.grad) == ({16: 2 * n}, {})
        assert moved(ptx, launches, state["exp_avg_sq"]) == ({16: 2 * n}, {16: n})
        assert moved(ptx, launches, state["exp_avg"]) == ({16: n}, {16: n})
        assert moved(ptx, launches, p) == ({16: n}, {16: n})


@DTYPES
def test_a_trust_ratio_reads_every_stream_once_more(ptx, dtype):
    """12 values an element with those of the norm. Groups whose ratio is 1 take one sweep."""
    adapted, left = parameters(dtype), parameters(dtype)
    groups = [{"params": adapted}, {"params": left, "weight_decay": 0.0}]
    optimizer = LAMB(groups, lr=0.01, clip=0.1)
    for _ in range(2):
        optimizer.step()
    launches = of_the_update(ptx)
    for params, times in ((adapted, 2), (left, 1)):
        for p in params:
            assert moved(ptx, launches, p.grad) == ({16: times * p.nbytes}, {})
            for t in (p, *moments(optimizer, p)):
                assert moved(ptx, launches, t) == ({16: times * t.nbytes}, {16: t.nbytes})


@RULES
def test_700_parameters_take_a_launch_for_each_320(ptx, rule):
    params = parameters(torch.float32, [1 + i % 67 for i in range(700)])
    made(rule, params, clip=0.1).step()
    names = [launch.kernel.partition("<")[0] for launch in of_the_update(ptx)]
    assert names.count("optim_update") == 3
    assert names.count("advance_means") == (3 if rule is ScheduleFreeAdamW else 0)
    assert names.count("advance_steps") == (0 if rule is Lion else 3)


@RULES
def test_a_learning_rate_on_the_device_is_not_waited_for(ptx, rule, monkeypatch):
    """The emulator treats every tensor as on the device; torch sees them all on the host."""
    outcomes = []
    for lr in (0.5, torch.tensor(0.5)):
        monkeypatch.setattr("gradfuse.optim.base.as_number", lambda value: value)
        params = parameters(torch.float32)
        optimizer = rule(params, lr=lr, clip=0.1)
        optimizer.step()
        assert ptx.runtime.waits == 0
        outcomes.append(torch.cat([p.detach() for p in params]))
    assert torch.equal(*outcomes)


POLICIES = (None, 1.0, Norm(1.0), Value(0.1), AGC(), ZClip(), AutoClip(), AdaGC(), SpikeSkip())


@RULES
@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_no_policy_waits(ptx, rule, policy, monkeypatch):
    """The emulator does not see .item() as a wait, because its memory is the host's."""
    monkeypatch.setattr("gradfuse.optim.base.as_number", lambda value: value)
    optimizer = made(rule, parameters(torch.float32, (33, 4097)), clip=policy)
    optimizer.step()
    with Operations() as operations:
        for _ in range(2):
            optimizer.step()
            assert ptx.runtime.waits == 0
    assert "_local_scalar_dense" not in operations.names


@EVERY
@DTYPES
def test_a_step_captured_in_a_graph(ptx, rule, dtype, monkeypatch):
    """A replay takes all that may change from the device: gradients, the learning rate, the number
    of steps."""
    monkeypatch.setattr("gradfuse.optim.base.as_number", lambda value: value)
    captured, eager = parameters(dtype, (5, 4099)), parameters(dtype, (5, 4099))
    rates = [torch.tensor(0.5) for _ in range(2)]
    by_graph, by_hand = (
        rule(ps, lr=lr, clip=1.0, **OPTIONS[rule])
        for ps, lr in zip((captured, eager), rates, strict=True)
    )
    by_graph.step()  # makes the state
    with ptx.capturing() as graph:
        by_graph.step()
    state = [t for p in captured for t in by_graph.state[p].values()]
    used = [*captured, *(p.grad for p in captured), *state, rates[0]]
    for _ in range(2):
        by_hand.step()
    for seed in (2, 3):
        for ps, rate in zip((captured, eager), rates, strict=True):
            rate.mul_(0.5)
            for p in ps:
                p.grad.copy_(random(*p.shape, dtype=dtype, seed=seed))
        ptx.replay(graph, used)
        by_hand.step()
        assert bits(captured) == bits(eager)
    moments_of = [[*moments(o, ps[1])] for o, ps in ((by_graph, captured), (by_hand, eager))]
    assert bits(moments_of[0]) == bits(moments_of[1])


@EVERY
@DTYPES
def test_any_order_of_the_blocks_gives_the_same_bits(ptx, rule, dtype):
    found = {}
    for order in ("forward", "backward", "shuffled"):
        ptx.machine.order = order
        params = parameters(dtype, (1, 4099, 40_961))
        optimizer = made(rule, params, clip=0.1, **OPTIONS[rule])
        for _ in range(2):
            optimizer.step()
        found[order] = bits([t for p in params for t in (p, *moments(optimizer, p))])
    assert found["forward"] == found["backward"] == found["shuffled"]
