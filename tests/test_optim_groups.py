"""A clip of its own for a parameter group of gradfuse.optim, and what a step reports of each."""

import copy
import io
import math

import pytest
import torch
from helpers import HOST_BACKENDS, bits, random

import gradfuse
from gradfuse.optim import SGD, AdamW
from gradfuse.policies import AGC, AdaGC, SpikeSkip, Value, ZClip

pytestmark = [pytest.mark.usefixtures("backend"), HOST_BACKENDS]


def parameters(n=6):
    return [torch.nn.Parameter(random(5, 4, seed=i)) for i in range(n)]


def fill(params, step, scale=1.0):
    for i, p in enumerate(params):
        p.grad = random(*p.shape, seed=100 * step + i, scale=scale)


def three_groups(params, **clips):
    """Groups of two parameters: one without a clip, and one for each that is given."""
    groups = [{"params": params[2 * i : 2 * i + 2]} for i in range(3)]
    for group, clip in zip(groups[1:], clips.values(), strict=True):
        group["clip"] = clip
    return groups


@pytest.mark.parametrize("rule", [SGD, AdamW], ids=lambda r: r.__name__)
@pytest.mark.parametrize("materialize", [False, True], ids=["", "materialize"])
def test_each_group_has_its_own_norm(rule, materialize):
    """The numbers of three optimizers."""
    params, apart = parameters(), parameters()
    optimizer = rule(
        three_groups(params, own=0.5, none=None), lr=0.1, clip=1.0,
        materialize_clipped_grads=materialize,
    )  # fmt: skip
    others = [
        rule(apart[2 * i : 2 * i + 2], lr=0.1, clip=clip, materialize_clipped_grads=materialize)
        for i, clip in enumerate((1.0, 0.5, None))
    ]
    for step in range(3):
        fill(params, step)
        fill(apart, step)
        optimizer.step()
        for other in others:
            other.step()
        assert bits(params) == bits(apart)
        assert bits([p.grad for p in params]) == bits([p.grad for p in apart])
        norms = [report.total_norm for report in optimizer.reports]
        assert norms == [other.report.total_norm for other in others]
        assert [report.max_norm for report in optimizer.reports] == [1.0, 0.5, math.inf]
        names = [[p.name for p in report.parameters] for report in optimizer.reports]
        assert names == [["0", "1"], ["2", "3"], ["4", "5"]]
        assert optimizer.report is optimizer.reports[0]


def test_groups_without_a_clip_share_the_whole():
    params = parameters()
    optimizer = SGD(three_groups(params, own=0.5, none=None), clip=1.0)
    del optimizer.param_groups[2]["clip"]
    fill(params, 0)
    optimizer.step()
    first, own, last = optimizer.reports
    assert first is last
    together = [p.grad for p in params[:2] + params[4:]]
    assert first.total_norm == pytest.approx(float(gradfuse.get_total_norm(together)))
    assert own.total_norm == pytest.approx(
        float(gradfuse.get_total_norm(p.grad for p in params[2:4]))
    )
    del optimizer.param_groups[1]["clip"]
    optimizer.step()
    assert {id(report) for report in optimizer.reports} == {id(optimizer.report)}
    optimizer.param_groups[0]["clip"] = 2.0
    optimizer.step()
    assert [r.max_norm for r in optimizer.reports] == [2.0, 1.0, 1.0]


def test_all_groups_with_a_clip_of_their_own():
    params = parameters()
    groups = three_groups(params, own=0.5, other=1.0)
    groups[0]["clip"] = None
    optimizer = SGD(groups, clip=9.0)
    fill(params, 0)
    optimizer.step()
    assert optimizer.report is None
    assert [r.max_norm for r in optimizer.reports] == [math.inf, 0.5, 1.0]


@pytest.mark.parametrize("bad", range(6))
@pytest.mark.parametrize("nonfinite", ["skip", "error", "propagate"])
def test_a_nan_in_one_group_is_one_in_the_step(bad, nonfinite):
    params = parameters()
    policy = ZClip()
    optimizer = SGD(
        three_groups(params, agc=AGC(), z=policy), clip=1.0, momentum=0.9, nonfinite=nonfinite
    )
    fill(params, 0)
    optimizer.step()
    fill(params, 1)
    params[bad].grad[0, 0] = math.nan
    grads = [p.grad for p in params]
    before, grads_before = bits(params), bits(grads)
    state = copy.deepcopy(policy.state)
    if nonfinite == "error":
        with pytest.raises(RuntimeError, match="expected a finite total norm"):
            optimizer.step()
        assert (bits(params), bits(grads)) == (before, grads_before)
        assert policy.state == state
        return
    optimizer.step()
    if nonfinite == "skip":
        assert bits(params) == before
        assert all(report.skipped for report in optimizer.reports)
        assert optimizer.skipped_steps == 1
    else:
        changed = [not torch.isfinite(p).all() for p in params]
        assert changed[bad]
        assert not any(changed[i] for i in range(6) if i // 2 != bad // 2)


def test_a_policy_that_skips_skips_the_whole_step():
    params = parameters()
    optimizer = SGD(three_groups(params, spike=SpikeSkip(warmup=2), value=Value(0.5)), clip=1.0)
    for step in range(4):
        fill(params, step)
        optimizer.step()
    fill(params, 9)
    params[2].grad *= 1e6
    before = bits(params)
    optimizer.step()
    assert bits(params) == before
    assert optimizer.skipped_steps == 1
    fill(params, 10)
    optimizer.step()
    assert bits(params) != before


def test_the_state_of_groups_policies_is_saved():
    def made(params):
        return AdamW(three_groups(params, z=ZClip(warmup=2), ada=AdaGC(warmup=1)), clip=1.0)

    params = parameters()
    optimizer = made(params)
    for step in range(5):
        fill(params, step)
        optimizer.step()
    saved = optimizer.state_dict()
    kinds = [type(group.get("clip")).__name__ for group in saved["param_groups"]]
    assert kinds == ["NoneType", "str", "str"]
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = made(others)
    again.load_state_dict(saved)
    assert [type(g.get("clip")).__name__ for g in again.param_groups] == [
        "NoneType",
        "ZClip",
        "AdaGC",
    ]
    for step in range(5, 9):
        scale = 100.0 if step == 7 else 1.0
        fill(params, step, scale)
        fill(others, step, scale)
        optimizer.step()
        again.step()
    assert bits(params) == bits(others)
    assert [r.to_dict() for r in optimizer.reports] == [r.to_dict() for r in again.reports]


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
def test_distributed_checkpoints_keep_groups_policies(flat):
    from torch.distributed.checkpoint import state_dict as dcp

    def made():
        model = torch.nn.Linear(3, 3)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "clip": ZClip()}]
        return model, AdamW(groups, clip=AdaGC())

    model, optimizer = made()
    for step in range(3):
        fill(model.parameters(), step)
        optimizer.step()
    options = dcp.StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=options)
    other, again = made()
    dcp.set_optimizer_state_dict(other, again, saved, options=options)
    assert isinstance(again.param_groups[1]["clip"], ZClip)
    if flat:  # torch keeps only what live groups have as well
        return
    for ours, theirs in zip(again._policies(), optimizer._policies(), strict=True):
        assert ours.state.keys() == theirs.state.keys() != set()
        assert all(torch.equal(ours.state[k], theirs.state[k]) for k in theirs.state)


def test_numbers_are_loaded_as_other_options_are():
    optimizer = SGD(three_groups(parameters(), own=0.5, none=None), clip=1.0)
    saved = optimizer.state_dict()
    again = SGD(three_groups(parameters(), own=0.25, none=1.0), clip=1.0)
    again.load_state_dict(saved)
    assert [g.get("clip", "whole") for g in again.param_groups] == ["whole", 0.5, None]


def test_a_load_that_fails_leaves_groups_policies_alone():
    params = parameters()
    optimizer = SGD(three_groups(params, z=ZClip(), none=None))
    fill(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    fill(params, 1)
    optimizer.step()
    policy = optimizer.param_groups[1]["clip"]
    before = {k: v.clone() for k, v in policy.state.items()}

    def fail(_):
        raise OSError("a hook")

    optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(OSError, match="a hook"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[1]["clip"] is policy
    assert {k: float(v) for k, v in policy.state.items()} == {
        k: float(v) for k, v in before.items()
    }


def test_errors():
    params = parameters()
    optimizer = SGD(params[:2])
    for clip in (-1.0, math.nan):
        with pytest.raises(ValueError, match="SGD: clip must be >= 0"):
            optimizer.add_param_group({"params": params[2:4], "clip": clip})
    policy = ZClip()
    optimizer.add_param_group({"params": params[2:4], "clip": policy})
    with pytest.raises(ValueError, match="SGD: expected a policy for each group"):
        optimizer.add_param_group({"params": params[4:], "clip": policy})
    assert len(optimizer.param_groups) == 2
    with pytest.warns(UserWarning, match="SGD: clip=0 sets all gradients to 0"):
        optimizer.add_param_group({"params": params[4:], "clip": 0})
    assert "clip: ZClip(" in repr(optimizer)


@pytest.mark.parametrize("scaler", [torch.amp.GradScaler, gradfuse.optim.GradScaler])
def test_a_grad_scaler(scaler):
    params, apart = parameters(), parameters()
    optimizer = SGD(three_groups(params, own=0.5, none=None), lr=0.1, clip=1.0)
    other = SGD(three_groups(apart, own=0.5, none=None), lr=0.1, clip=1.0)
    scaler = scaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    for step in range(3):
        fill(params, step, 8.0 if step != 1 else math.inf)
        fill(apart, step if step != 1 else 0)
        if step == 1:
            for p in params[:4] + params[5:]:
                p.grad.fill_(1.0)
        if step == 2:
            fill(params, step, 4.0)
        before = bits(params)
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert bits(params) == before
            assert scaler.get_scale() == 4.0
        else:
            other.step()
    assert all(torch.allclose(p, q) for p, q in zip(params, apart, strict=True))
    assert optimizer.skipped_steps == 1


def test_a_copy_keeps_the_groups_clips():
    params = parameters()
    optimizer = SGD(three_groups(params, z=ZClip(), none=None), clip=1.0)
    fill(params, 0)
    optimizer.step()
    again = copy.deepcopy(optimizer)
    clip = again.param_groups[1]["clip"]
    assert isinstance(clip, ZClip)
    assert clip is not optimizer.param_groups[1]["clip"]
    fill([p for g in again.param_groups for p in g["params"]], 1)
    again.step()
    assert len(again.reports) == 3
