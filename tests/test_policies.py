"""Policies: what a step multiplies its gradients by, decided from their norms."""

import math

import pytest
import torch
from torch.nn import Parameter

from gradfuse import optim
from gradfuse.policies import Decision, Norm, Policy, Value


class Halve(Policy):
    """The user's policy of the module's docstring."""

    def decide(self, norm, norms, state):
        level = state.get("level", norm)
        coefficient = (level / norm).clamp(max=1.0)
        return Decision(coefficient, state={"level": 0.9 * level + 0.1 * norm})


class Each(Policy):
    """Every gradient to norm 1 at most."""

    def decide(self, norm, norms, state):
        return Decision((1.0 / norms.clamp(min=1e-30)).clamp(max=1.0))


class Never(Policy):
    def decide(self, norm, norms, state):
        return Decision(torch.ones_like(norm), skip=norm > 0)


def parameters(*grads: list[float]) -> list[Parameter]:
    out = []
    for values in grads:
        p = Parameter(torch.zeros(len(values)))
        p.grad = torch.tensor(values)
        out.append(p)
    return out


def stepped(
    policy: Policy | float, *grads: list[float], scale: float | None = None
) -> list[torch.Tensor]:
    """The parameters after a step of plain SGD with lr 1 from zero: minus the gradients used."""
    ps = parameters(*grads)
    optimizer = optim.SGD(ps, lr=1.0, clip=policy)
    if scale is not None:
        for p in ps:
            p.grad *= scale
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
    optimizer.step()
    return [p.detach() for p in ps]


@pytest.mark.parametrize("scale", [None, 4096.0])
def test_norm_is_the_number(backend, scale):
    grads = [3.0, 0.0], [0.0, 4.0]
    for ours, number in zip(stepped(Norm(1.0), *grads, scale=scale), stepped(1.0, *grads)):  # noqa: B905
        torch.testing.assert_close(ours, number)


@pytest.mark.parametrize("scale", [None, 4096.0])
def test_value_clamps_elements(backend, scale):
    (moved,) = stepped(Value(0.5), [2.0, -3.0, 0.25], scale=scale)
    torch.testing.assert_close(moved, torch.tensor([-0.5, 0.5, -0.25]))


def test_value_is_materialized(backend):
    (p,) = parameters([2.0, -3.0, 0.25])
    optim.SGD([p], lr=1.0, clip=Value(0.5), materialize_clipped_grads=True).step()
    torch.testing.assert_close(p.grad, torch.tensor([0.5, -0.5, 0.25]))


@pytest.mark.parametrize("scale", [None, 4096.0])
def test_a_coefficient_for_each(backend, scale):
    moved = stepped(Each(), [3.0, 4.0], [0.5, 0.0], scale=scale)
    torch.testing.assert_close(moved[0], torch.tensor([-0.6, -0.8]))
    torch.testing.assert_close(moved[1], torch.tensor([-0.5, 0.0]))


def test_state_follows_the_norms_and_ignores_nan(backend):
    (p,) = parameters([1.0, 0.0])
    policy = Halve()
    optimizer = optim.SGD([p], lr=1.0, clip=policy)
    level, where = 1.0, 0.0
    for g in (1.0, 5.0, math.nan, 2.0, 0.5):
        p.grad = torch.tensor([g, 0.0])
        optimizer.step()
        if g == g:
            where -= g * min(1.0, level / g)
            level = 0.9 * level + 0.1 * g
        assert float(policy.state["level"]) == pytest.approx(level)
        assert float(p.detach()[0]) == pytest.approx(where)
    assert optimizer.skipped_steps == 1


def test_state_is_saved_and_found_inf_leaves_it(backend):
    (p,) = parameters([2.0])
    optimizer = optim.SGD([p], lr=1.0, clip=Halve())
    optimizer.step()
    saved = optimizer.state_dict()
    p.grad = torch.tensor([100.0])
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert optimizer.clip.state["level"] == saved["gradfuse"]["policy"]["level"]
    again = optim.SGD([p], lr=1.0, clip=Halve())
    again.load_state_dict(saved)
    assert again.clip.state["level"] == 2.0


def test_a_policy_skips(backend):
    (moved,) = stepped(Never(), [1.0, 2.0])
    assert (moved == 0).all()


@pytest.mark.parametrize("make", [Norm, Value])
@pytest.mark.parametrize("bad", [-1.0, math.nan])
def test_errors(make, bad):
    with pytest.raises(ValueError, match=rf"{make.__name__}: .* must be >= 0, got"):
        make(bad)
