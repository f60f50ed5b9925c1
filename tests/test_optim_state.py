"""gradfuse.optim works like torch.optim: groups, schedulers, resuming, state in both directions."""

import copy
import io
import os
import pickle
import random as chance
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import bits, random
from test_optim import BOTH, TORCHS, contents, fill, fresh, made

from gradfuse.optim import SGD, AdamW
from gradfuse.policies import AutoClip

pytestmark = pytest.mark.usefixtures("backend")
SHAPES = [(9, 5), (4099,), ()]


def steps_of(optimizer, params, numbers):
    for step in numbers:
        fill(params, step)
        optimizer.step()


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=2e-6, atol=1e-7)


@BOTH
@pytest.mark.parametrize("more", [{}, {"fused": True}, {"capturable": True}, {"amsgrad": True}])
def test_resumes_a_torch_run_and_goes_back(rule, more, device):
    if rule is SGD and more.keys() & {"capturable", "amsgrad"}:
        pytest.skip("only AdamW has these options")
    options = {"lr": 0.01, **({"momentum": 0.9, "dampening": 0.5} if rule is SGD else {})}
    ours, theirs = fresh(device=device, shapes=SHAPES), fresh(device=device, shapes=SHAPES)
    if more.keys() & {"capturable"} and device.type == "cpu":
        first = TORCHS[rule](ours, **options)
        steps_of(first, ours, range(2))
        for group in first.param_groups:
            group["capturable"] = True
    else:
        first = TORCHS[rule](ours, **options, **more)
        steps_of(first, ours, range(2))
    whole = TORCHS[rule](theirs, **options, **({"amsgrad": True} if "amsgrad" in more else {}))
    steps_of(whole, theirs, range(6))

    middle = rule(ours, **options)
    middle.load_state_dict(first.state_dict())
    steps_of(middle, ours, range(2, 4))
    state = middle.state_dict()
    assert {"state", "param_groups"} <= state.keys()
    last = TORCHS[rule](ours, **options)
    last.load_state_dict(state)
    for group in last.param_groups:
        group["capturable"] = False
    steps_of(last, ours, range(4, 6))
    assert_close(ours, theirs)


@BOTH
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "weights_only", "load_state_dict"])
@pytest.mark.parametrize("extra", [{}, {"master_weights": True}, {"stochastic_rounding": True}])
def test_copies_go_on_bitwise(rule, how, extra, device):
    params = fresh(torch.bfloat16, device, SHAPES)
    optimizer = made(rule, params, clip=1.0, **extra)
    steps_of(optimizer, params, range(2))
    params[0].grad[0, 0] = float("nan")
    optimizer.step()
    if how == "deepcopy":
        others, again = copy.deepcopy((params, optimizer))
    elif how == "pickle":
        others, again = pickle.loads(pickle.dumps((params, optimizer)))
    else:
        others = [torch.nn.Parameter(p.detach().clone()) for p in params]
        again = made(rule, others, clip=1.0, **extra)
        state = copy.deepcopy(optimizer.state_dict())  # loading does not copy the tensors
        if how == "weights_only":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        again.load_state_dict(state)
    assert again.skipped_steps == 1
    assert again.clip == 1.0
    steps_of(optimizer, params, range(2, 4))
    steps_of(again, others, range(2, 4))
    assert contents(again) == contents(optimizer)


@BOTH
def test_groups_and_their_options(rule, device):
    def run(make):
        a = fresh(device=device, shapes=SHAPES)
        extra = fresh(device=device, shapes=[(6,)])
        groups = [{"params": a[:1], "lr": 0.1}, {"params": a[1:], "weight_decay": 0.5}]
        optimizer = make(groups)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
        for step in range(6):
            if step == 3:
                optimizer.add_param_group({"params": extra, "lr": 0.03})
            fill([*a, *extra], step)
            if step == 4:
                a[0].grad = None
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return [*a, *extra]

    assert_close(run(lambda g: made(rule, g)), run(lambda g: made(TORCHS[rule], g)))


@BOTH
def test_closure_and_hooks(rule, device):
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = made(rule, [p])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        seen.append("closure")
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert sorted(seen) == ["after", "before", "closure"]
    assert (p < 1).all()


@BOTH
def test_parameters_and_state_changed_between_steps(rule, device):
    def run(make):
        params = fresh(device=device, shapes=SHAPES)
        optimizer = make(params)
        name = "momentum_buffer" if rule is SGD else "exp_avg"
        for step in range(8):
            fill(params, step)
            if step == 1:
                params[0].grad = None
                params[0].requires_grad_(False)
            if step == 2:
                params[0].requires_grad_(True)
                params[1].data = params[1].detach() * 2.0
            if step == 3:
                optimizer.state[params[1]][name] = torch.full_like(params[1], 0.25)
            if step == 4:
                optimizer.state[params[0]][name].mul_(3.0)
            if step == 5:
                optimizer.state.clear()
            if step == 6:
                params[0].data = random(9, 5, device=device).t().contiguous().t()
            optimizer.step()
        return params

    assert_close(run(lambda p: made(rule, p)), run(lambda p: made(TORCHS[rule], p)))


STRANGE = [
    lambda p, s: s.update(dict.fromkeys(s, "text")),
    lambda p, s: s.update({k: torch.zeros(2) for k in s}),
    lambda p, s: s.update({k: torch.zeros(1).expand(4099) for k in s if k != "step"}),
    lambda p, s: s.update({k: torch.zeros(4099, dtype=torch.int64) for k in s if k != "step"}),
    lambda p, s: s.update({k: torch.zeros(4099).to_sparse() for k in s if k != "step"}),
    lambda p, s: s.update({k: torch.zeros(4099, dtype=torch.float64) for k in s if k != "step"}),
    lambda p, s: s.update(step=torch.zeros((), dtype=torch.int64)),
    lambda p, s: s.clear(),
    lambda p, s: s.update(step=3),
]


@BOTH
@pytest.mark.parametrize("nth", range(len(STRANGE)))
def test_strange_state_is_taken_or_refused(rule, nth, device):
    """State is never read as another dtype, shape or layout than it has."""
    params = fresh(device=device, shapes=[(4099,)])
    optimizer = made(rule, params)
    steps_of(optimizer, params, range(1))
    STRANGE[nth](params[0], optimizer.state[params[0]])
    before = bits(params)
    fill(params, 1)
    try:
        optimizer.step()
    except (ValueError, TypeError, RuntimeError) as error:
        refused = str(error)
    else:
        refused = None
    if refused is not None:
        assert "\n" not in refused
        assert bits(params) == before
    else:
        assert torch.isfinite(params[0]).all()


TRAIN = """
import os, sys, torch
from gradfuse.optim import AdamW
folder, last = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
net.bfloat16()
optimizer = AdamW(net.parameters(), lr=0.01, clip=0.5, stochastic_rounding=True)
path, first = os.path.join(folder, "checkpoint"), 0
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    net.load_state_dict(saved["net"]); optimizer.load_state_dict(saved["optimizer"])
    first = saved["step"]
for step in range(first, last):
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()
    print(step, flush=True)
    if step % 3 == 2:
        state = {"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
        torch.save(state, path + ".new")
        os.replace(path + ".new", path)
torch.save([p.detach() for p in net.parameters()], os.path.join(folder, "end"))
"""


@pytest.mark.no_kernel
def test_killed_at_any_step_it_resumes_bitwise(tmp_path):
    """Child processes train. They choose their implementation themselves."""

    def train(folder, kill_after=None):
        folder.mkdir(exist_ok=True)
        child = subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(folder), "40"], stdout=subprocess.PIPE, text=True
        )
        for line in child.stdout:
            if kill_after is not None and int(line) >= kill_after:
                time.sleep(chance.random() * 0.003)
                os.kill(child.pid, signal.SIGKILL)
                break
        child.communicate()
        return child.returncode

    assert train(tmp_path / "whole") == 0
    assert train(tmp_path / "cut", chance.randrange(5, 25)) == -signal.SIGKILL
    assert train(tmp_path / "cut") == 0
    whole, cut = (torch.load(tmp_path / name / "end") for name in ("whole", "cut"))
    assert bits(whole) == bits(cut)


def test_amsgrad_turned_on_mid_run(device):
    params = fresh(device=device, shapes=SHAPES)
    optimizer = AdamW(params)
    steps_of(optimizer, params, range(1))
    optimizer.param_groups[0]["amsgrad"] = True
    steps_of(optimizer, params, range(1, 3))
    assert all("max_exp_avg_sq" in optimizer.state[p] for p in params)


@BOTH
@pytest.mark.no_kernel
def test_torchs_options_are_taken_with_torchs_meaning(rule):
    for name in ("fused", "foreach", *(["capturable"] if rule is AdamW else [])):
        params = fresh()
        optimizer = rule(params, lr=0.1, **{name: True})
        assert type(optimizer)(params, **optimizer.defaults).defaults == optimizer.defaults
    for wrong in ({"differentiable": True}, {"fused": True, "foreach": True}):
        with pytest.raises((ValueError, RuntimeError), match=f"^{rule.__name__}: .*, got"):
            rule(fresh(), lr=0.1, **wrong)
        with pytest.raises((ValueError, RuntimeError), match=f"^{rule.__name__}: .*, got"):
            rule([{"params": fresh(), **wrong}], lr=0.1)


@BOTH
@pytest.mark.no_kernel
def test_repr_names_the_clip(rule):
    assert "clip: 1.5\nnonfinite: error\n)" in repr(rule(fresh(), clip=1.5, nonfinite="error"))
    assert "clip: AutoClip(percentile=10.0, history=1000)" in repr(rule(fresh(), clip=AutoClip()))


MOMENT = {SGD: "momentum_buffer", AdamW: "exp_avg"}


@BOTH
def test_a_load_hook_may_give_another_state(rule, device):
    """Of three parameters a fine-tuned model has the last two, in another order."""
    params = fresh(torch.bfloat16, device, SHAPES)
    whole = made(rule, params, clip=1.0, master_weights=True)
    steps_of(whole, params, range(2))

    def last_two(optimizer, state_dict):
        group = {**state_dict["param_groups"][0], "params": [2, 1]}
        return {**state_dict, "param_groups": [group]}

    tuned = made(rule, [params[2], params[1]], clip=1.0, master_weights=True)
    tuned.register_load_state_dict_pre_hook(last_two)
    tuned.load_state_dict(whole.state_dict())
    for p in params[1:]:
        names = MOMENT[rule], "master_param"
        assert bits([tuned.state[p][n] for n in names]) == bits([whole.state[p][n] for n in names])
    assert len(tuned._optimizer_load_state_dict_pre_hooks) == 1  # ours are gone
    assert not tuned._optimizer_load_state_dict_post_hooks


@BOTH
def test_a_hook_after_loading_has_the_last_word(rule, device):
    params = fresh(torch.bfloat16, device, SHAPES)
    optimizer = made(rule, params, clip=1.0, master_weights=True)
    steps_of(optimizer, params, range(2))

    def edit(loaded):
        for state in loaded.state.values():
            for name in (MOMENT[rule], "master_param"):
                state[name] = torch.full_like(state[name], 0.1)

    optimizer.register_load_state_dict_post_hook(edit)
    optimizer.load_state_dict(optimizer.state_dict())
    for p in params:
        for name in (MOMENT[rule], "master_param"):
            assert (optimizer.state[p][name] == torch.tensor(0.1)).all()


@BOTH
@pytest.mark.parametrize("fault", ["groups", "policy", "hook"])
def test_a_load_that_raises_leaves_all_as_it_was(rule, fault, device):
    params = fresh(torch.bfloat16, device, SHAPES)
    optimizer = made(rule, params, clip=AutoClip(), master_weights=True)
    steps_of(optimizer, params, range(2))
    other = made(rule, fresh(torch.bfloat16, device, SHAPES), clip=AutoClip(), master_weights=True)
    steps_of(other, other.param_groups[0]["params"], range(3, 4))
    saved = other.state_dict()
    saved["param_groups"][0]["gradfuse"]["skipped_steps"] = 5
    if fault == "groups":
        saved["param_groups"] = []
    elif fault == "policy":
        saved["param_groups"][0]["gradfuse"]["policy"] = {"norms": 3.0}
    else:

        def refuse(loaded):
            raise ValueError("not this one")

        optimizer.register_load_state_dict_post_hook(refuse)
    before = contents(optimizer), bits([*optimizer.clip.state.values()]), optimizer.skipped_steps
    with pytest.raises((ValueError, AttributeError)):
        optimizer.load_state_dict(saved)
    after = contents(optimizer), bits([*optimizer.clip.state.values()]), optimizer.skipped_steps
    assert after == before


@BOTH
def test_what_older_versions_saved_loads(rule, device):
    """They had the state of the policy beside torch's keys."""
    params = fresh(device=device, shapes=SHAPES)
    optimizer = made(rule, params, clip=AutoClip())
    steps_of(optimizer, params, range(3))
    saved = optimizer.state_dict()
    saved["gradfuse"] = saved["param_groups"][0].pop("gradfuse") | {"skipped_steps": 2}
    again = made(rule, params, clip=AutoClip())
    again.load_state_dict(saved)
    assert again.skipped_steps == 2
    assert bits([*again.clip.state.values()]) == bits([*optimizer.clip.state.values()])


@BOTH
def test_distributed_checkpoints_keep_policy_and_skipped_steps(rule, device):
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def model_and_optimizer():
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3).to(device)
        return model, made(rule, model.parameters(), clip=AutoClip())

    model, optimizer = model_and_optimizer()
    params = list(model.parameters())
    steps_of(optimizer, params, range(3))
    params[0].grad[0, 0] = float("nan")
    optimizer.step()
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))  # as through a file
    other, again = model_and_optimizer()
    set_optimizer_state_dict(other, again, saved)
    assert again.skipped_steps == optimizer.skipped_steps == 1
    assert bits([*again.clip.state.values()]) == bits([*optimizer.clip.state.values()])
    assert all("gradfuse" not in group for group in again.param_groups)
    other.load_state_dict(model.state_dict())
    for p, q in zip(params, other.parameters(), strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step(), again.step()
    assert contents(again) == contents(optimizer)


@BOTH
@pytest.mark.no_kernel
def test_a_rank_does_not_clip_by_its_own_norm(rule, tmp_path):
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer

    store = f"file://{tmp_path}/store"
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        ZeroRedundancyOptimizer(fresh(), optimizer_class=rule, lr=0.1).step()
        with pytest.raises(RuntimeError, match=f"^{rule.__name__}: expected clip=None .*, got 1.0"):
            ZeroRedundancyOptimizer(fresh(), optimizer_class=rule, lr=0.1, clip=1.0)
    finally:
        dist.destroy_process_group()
    made(rule, fresh(), clip=1.0)
