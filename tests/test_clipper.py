"""GradClipper, and the GradReport of each of its steps."""

import copy
import io
import json
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import COMPLEX, NORM_TYPES, REAL, bits, owner, owners, random, short, true_norm, wide

import gradfuse

pytestmark = pytest.mark.usefixtures("backend")


def model(device="cpu"):
    """A small net with gradients, freshly made."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    net.to(device)
    fill(net.parameters())
    return net


def fill(params, scale=1.0):
    for i, p in enumerate(params):
        p.grad = random(*p.shape, dtype=p.dtype, device=p.device, scale=scale, seed=i)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_clips_as_the_function_does(norm_type, device):
    params = list(model(device).parameters())
    report = gradfuse.GradClipper(params, 0.5, norm_type).clip_()
    clipped = bits([p.grad for p in params])
    fill(params)
    norm = gradfuse.clip_grad_norm_(params, 0.5, norm_type)
    assert bits([p.grad for p in params]) == clipped
    assert bits(report.norm_tensor) == bits(norm)


def test_names(device):
    net = model(device)
    named = gradfuse.GradClipper(net.named_parameters(), 1.0)
    assert named.names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert [p.name for p in named.clip_().parameters] == named.names
    assert gradfuse.GradClipper(net.parameters(), 1.0).names == ["0", "1", "2", "3"]
    assert gradfuse.GradClipper(net[0].weight, 1.0).names == ["0"]
    mixed = gradfuse.GradClipper([("first", net[0].weight), net[0].bias], 1.0)
    assert mixed.names == ["first", "1"]


def test_a_parameter_given_twice_is_held_once(device):
    grad = torch.full((4,), 2.0, device=device)
    param = owner(grad)
    clipper = gradfuse.GradClipper([("a", param), ("b", param)], 2.0)
    clipper.add(param, "c")
    assert clipper.names == ["a"]
    assert clipper.clip_().total_norm == 4.0
    assert torch.allclose(grad, torch.full_like(grad, 1.0))


def test_parameters_that_share_a_gradient_count_once(device):
    grad = torch.full((4,), 2.0, device=device)
    first, second = owner(grad), torch.zeros(4, device=device)
    second.grad = grad
    report = gradfuse.GradClipper([first, second], 2.0).clip_()
    assert report.total_norm == 4.0
    assert [p.norm for p in report.parameters] == [4.0, 4.0]
    assert torch.allclose(grad, torch.full_like(grad, 1.0))


def test_add(device):
    params = owners([torch.full((4,), 2.0, device=device) for _ in range(3)])
    clipper = gradfuse.GradClipper(params[:1], math.inf)
    before = clipper.clip_()
    clipper.add(params[1], "late")
    clipper.add(params[2])
    assert clipper.names == ["0", "late", "2"]
    assert clipper.clip_().total_norm == pytest.approx(math.sqrt(48))
    assert [p.name for p in before.parameters] == ["0"]


def test_gradients_that_come_go_and_change(device):
    """Set to None, replaced, moved to another dtype or shape: each step sees what is there."""
    param, other = (torch.zeros(6, device=device) for _ in range(2))
    clipper = gradfuse.GradClipper([("param", param), ("other", other)], 1.0)
    assert clipper.clip_().parameters == []
    assert clipper.clip_().total_norm == 0.0

    other.grad = torch.full((6,), 0.01, device=device)
    for dtype in (*REAL, *COMPLEX, torch.float32):
        param.grad = None
        param.data = torch.zeros(9, dtype=dtype, device=device)
        for scale in (2.0, 4.0):
            param.grad = torch.full((9,), scale, dtype=dtype, device=device)
            report = clipper.clip_()
            norm = math.hypot(3 * scale, 0.01 * math.sqrt(6))
            assert report.parameters[0].norm == 3 * scale
            assert report.total_norm == pytest.approx(norm, rel=1e-3)
            assert wide(param.grad) == pytest.approx(np.full(9, scale / norm), rel=1e-2)
            assert [p.name for p in report.parameters] == ["param", "other"]
            other.grad = torch.full((6,), 0.01, device=device)
    param.grad = None
    assert [p.name for p in clipper.clip_().parameters] == ["other"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_that_move_to_cuda_and_back():
    param = torch.zeros(6)
    clipper = gradfuse.GradClipper(param, 1.0)
    for device in ("cpu", "cuda", "cpu"):
        param.grad = None
        param.data = torch.zeros(6, device=device)
        param.grad = torch.full((6,), 2.0, device=device)
        assert clipper.clip_().total_norm == pytest.approx(math.sqrt(24))
        assert param.grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_max_norm_may_change_between_steps(device):
    grad = torch.full((4,), 2.0, device=device)
    clipper = gradfuse.GradClipper(owner(grad), math.inf)
    assert clipper.clip_().clipped is False
    clipper.max_norm = 2
    report = clipper.clip_()
    assert (report.clipped, report.max_norm) == (True, 2.0)
    assert report.clipped_norm == pytest.approx(2.0, rel=1e-6)
    assert grad.norm().item() == pytest.approx(2.0, rel=1e-6)


def test_settings_are_readable():
    clipper = gradfuse.GradClipper([], 3, "inf", "zero")
    assert (clipper.max_norm, clipper.norm_type, clipper.nonfinite) == (3.0, math.inf, "zero")
    assert "max_norm=3" in repr(clipper)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("dtype", [*REAL, *COMPLEX], ids=short)
def test_report_against_numpy(dtype, max_norm, device):
    grads = [
        random(9000, dtype=dtype, device=device),
        torch.zeros(50, dtype=dtype, device=device),
        random(70, 60, dtype=dtype, device=device).t()[1::2],
        torch.empty(0, dtype=dtype, device=device),
        random(dtype=dtype, device=device),
    ]
    grads[0][5000:5100] = 0.0
    before = [np.abs(wide(g)) for g in grads]
    norm = float(true_norm(grads))
    report = gradfuse.GradClipper(owners(grads), max_norm).clip_()
    coefficient = max_norm / (norm + 1e-6) if norm > max_norm else 1.0
    assert report.total_norm == pytest.approx(norm, rel=1.2e-6)
    assert report.norm_tensor.item() == pytest.approx(norm, rel=1.2e-6)
    assert report.coefficient == pytest.approx(coefficient, rel=1.2e-6)
    assert report.clipped_norm == pytest.approx(norm * coefficient, rel=2.4e-6)
    assert report.clipped is (norm > max_norm)
    assert report.void is False
    assert (report.max_norm, report.norm_type, report.nonfinite) == (max_norm, 2.0, "propagate")
    for row, a in zip(report.parameters, before, strict=True):
        assert row.norm == pytest.approx(np.linalg.norm(a), rel=1.2e-6, abs=0.0)
        assert row.largest == pytest.approx(a.max(initial=0.0), rel=1e-15, abs=0.0)
        assert (row.nonfinite, row.zeros, row.numel) == (0, (a == 0).sum(), a.size)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
def test_report_counts_what_is_not_finite(norm_type, device):
    grads = [random(40000, device=device) for _ in range(3)]
    for i in (7, 4095, 4096, 33000, 39999):
        grads[1][i] = math.nan
    grads[2][::2] = -math.inf
    grads[2][1] = 0.0
    report = gradfuse.GradClipper(owners(grads), 1.0, norm_type).clip_()
    first, second, third = report.parameters
    assert (first.nonfinite, second.nonfinite, third.nonfinite) == (0, 5, 20000)
    assert (first.zeros, second.zeros, third.zeros) == (0, 0, 1)
    assert math.isfinite(first.norm)
    assert math.isnan(second.norm)
    assert math.isnan(second.largest)
    assert third.norm == third.largest == math.inf
    assert math.isnan(report.total_norm)
    assert report.first_nonfinite() == second


def test_report_shows_the_l2_norm_whatever_the_order(device):
    grad = torch.tensor([3.0, -4.0], device=device)
    for norm_type, total in ((1.0, 7.0), (math.inf, 4.0), (2.0, 5.0)):
        report = gradfuse.GradClipper(owner(grad), math.inf, norm_type).clip_()
        assert report.total_norm == total
        assert report.parameters[0].norm == 5.0


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-160, 1e-200, 1e-300])
def test_coefficient_of_tiny_gradients(scale, device):
    """1e-6 is far above a tiny norm, and the coefficient far above the elements it multiplies."""
    grad = torch.full((4,), scale, dtype=torch.float64, device=device)
    report = gradfuse.GradClipper(owner(grad), scale).clip_()
    expected = scale / (2 * scale + 1e-6)
    assert report.coefficient == pytest.approx(expected, rel=1e-12, abs=0.0)
    assert report.clipped


def test_the_norm_tensor_is_the_callers(device):
    for dtype in REAL:
        grad = torch.full((4,), 2.0, dtype=dtype, device=device)
        report = gradfuse.GradClipper(owner(grad), 1.0).clip_()
        report.norm_tensor.zero_()
        assert report.total_norm == 4.0


def test_worst_and_first_nonfinite(device):
    values = {"small": 0.1, "nan": math.nan, "large": 50.0, "inf": math.inf, "zero": 0.0}
    params = {k: owner(torch.full((3,), v, device=device)) for k, v in values.items()}
    report = gradfuse.GradClipper(params.items(), 1.0).clip_()
    worst = [p.name for p in report.worst(10)]
    assert {*worst[:2]} == {"nan", "inf"}
    assert worst[2:] == ["large", "small", "zero"]
    assert len(report.worst()) == 5
    assert [p.name for p in report.worst(3)] == worst[:3]
    assert report.worst(0) == []
    assert report.first_nonfinite().name == "nan"
    fine = gradfuse.GradClipper(owner(torch.ones(3, device=device)), 1.0).clip_()
    assert fine.first_nonfinite() is None


def test_to_dict_is_json(device):
    net = model(device)
    report = gradfuse.GradClipper(net.named_parameters(), 0.5, nonfinite="zero").clip_()
    again = json.loads(json.dumps(report.to_dict()))
    assert again == report.to_dict()
    assert again["total_norm"] == report.total_norm
    assert again["clipped"] is True
    assert again["void"] is False
    assert [p["name"] for p in again["parameters"]] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert again["parameters"][0] == report.parameters[0]._asdict()
    assert all(type(p["zeros"]) is int for p in again["parameters"])


def test_table(device):
    net = model(device)
    clipper = gradfuse.GradClipper(net.named_parameters(), 0.5)
    report = clipper.clip_()
    text = str(report)
    for name in clipper.names:
        assert name in text
    assert f"{report.total_norm:.6g}" in text
    assert "scaled by" in text
    assert text.splitlines()[2].startswith(report.worst(1)[0].name)
    assert f"{report.total_norm:.6g}" in repr(report)
    clipper.max_norm = 1.0
    assert "left alone" in str(clipper.clip_())

    net[0].bias.grad.fill_(math.nan)
    clipper = gradfuse.GradClipper(net.named_parameters(), 0.5, nonfinite="zero")
    assert "void" in str(clipper.clip_())
    assert "gradient norm" in str(gradfuse.GradClipper([], 1.0).clip_())

    many = owners([random(3, device=device, seed=i) for i in range(40)])
    text = str(gradfuse.GradClipper(many, 0.1).clip_())
    assert len(text.splitlines()) < 20
    assert "30 more" in text


def test_reports_outlive_later_steps(device):
    """This test reads the reports late: each must still show its own step."""
    params = owners([torch.full((4,), 1.0, device=device) for _ in range(2)])
    clipper = gradfuse.GradClipper(params, math.inf)
    reports = []
    for step in range(5):
        for p in params:
            p.grad.fill_(step)
        reports.append(clipper.clip_())
        clipper.max_norm = 100.0 + step
    params[0].grad = None
    clipper.clip_()
    assert [r.total_norm for r in reports] == pytest.approx([math.sqrt(8) * s for s in range(5)])
    assert [r.parameters[1].largest for r in reports] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [r.max_norm for r in reports] == [math.inf, 100.0, 101.0, 102.0, 103.0]


def test_deepcopy_follows_the_copied_parameters(device):
    net = model(device)
    clipper = gradfuse.GradClipper(net.named_parameters(), 0.5, 1.0, "zero")
    twin, copied = copy.deepcopy((net, clipper))
    assert (copied.names, copied.max_norm, copied.norm_type) == (clipper.names, 0.5, 1.0)
    assert copied.nonfinite == "zero"
    before = bits([p.grad for p in net.parameters()])
    fill(twin.parameters(), 2.0)
    assert copied.clip_().clipped_norm == pytest.approx(0.5, rel=1e-5)
    assert bits([p.grad for p in net.parameters()]) == before
    copied.add(twin[0].weight)
    assert copied.names == clipper.names
    twin[0].weight.grad.fill_(math.nan)
    assert copied.clip_().void


def test_pickle_and_torch_save(device):
    net = model(device)
    clipper = gradfuse.GradClipper(net.named_parameters(), 0.5)
    stored = io.BytesIO()
    torch.save({"net": net, "clipper": clipper}, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    fill(loaded["net"].parameters())
    fill(net.parameters())
    assert loaded["clipper"].clip_().to_dict() == clipper.clip_().to_dict()
    clipped = bits([p.grad for p in loaded["net"].parameters()])
    assert clipped == bits([p.grad for p in net.parameters()])
    assert pickle.loads(pickle.dumps(clipper)).names == clipper.names


def test_reports_can_be_copied_and_pickled(device):
    report = gradfuse.GradClipper(model(device).parameters(), 0.5).clip_()
    for again in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert again.to_dict() == report.to_dict()
        assert str(again) == str(report)


def test_holds_its_parameters(device):
    """The caller may drop them; a later step still finds their gradients."""
    clipper = gradfuse.GradClipper(owners([torch.full((4,), 2.0, device=device)]), 1.0)
    assert clipper.clip_().total_norm == 4.0


def test_a_training_loop_is_the_same_with_function_and_clipper(device):
    def train(clip):
        net = model(device)
        optimizer = torch.optim.SGD(net.parameters(), 0.5)
        step = clip(net)
        inputs = random(32, 8, device=device)
        for _ in range(10):
            optimizer.zero_grad()
            net(inputs).square().sum().backward()
            step()
            optimizer.step()
        return bits(list(net.parameters()))

    function = train(lambda net: lambda: gradfuse.clip_grad_norm_(net.parameters(), 1.0))
    assert train(lambda net: gradfuse.GradClipper(net.parameters(), 1.0).clip_) == function
    assert train(lambda net: lambda: None) != function
