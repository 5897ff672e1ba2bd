"""Notebook 08, out of its cells: scores, Langevin walks, the SDE and its reverse.

That the flow carries the density as Fokker and Planck say, where ᾱ is that integral of β, the
notebook itself asserts.
"""

import math
import types

import pytest
import torch
from series import defined_in

import ddpm_utils as d

nb = types.SimpleNamespace(**defined_in(
    "08", "world", "draws", "grad_log_q", "walk", "nearest_bump", "beta_at", "alpha_bar_at",
    "reverse_sde_step", "flow_step"))


@pytest.mark.parametrize("a", [1.0, 0.6, 0.05])
def test_the_score_is_the_weighed_pull_of_the_bumps(a):
    """Written out by hand; the notebook differentiates log q."""
    world, x = nb.world, torch.randn(30, 2, dtype=torch.float64)
    variances = (a * world.stds**2 + 1 - a).double()
    away = math.sqrt(a) * world.means.double() - x[:, None]  # (30, 3, 2)
    weights = world.weights * torch.exp(-away.square().sum(2) / (2 * variances)) / variances
    by_hand = (weights[..., None] * away / variances[:, None]).sum(1) / weights.sum(1, keepdim=True)
    torch.testing.assert_close(nb.grad_log_q(x, a), by_hand, rtol=1e-5, atol=1e-5)


def test_a_langevin_walk_keeps_the_distribution_it_is_in():
    """At a level where the bumps are one, samples of q stay samples of q, and jitter=0 climbs."""
    a, r, scales = 0.3, torch.Generator().manual_seed(0), (math.sqrt(0.3), math.sqrt(0.7))
    x = scales[0] * nb.world.sample(3000, r) + scales[1] * torch.randn(3000, 2, generator=r)
    nb.draws.manual_seed(1)
    after, peaks = (nb.walk(x.double(), a, 60, jitter) for jitter in (1.0, 0.0))
    assert float((after.mean(0) - x.mean(0)).abs().max()) < 0.08
    assert float((after.var(0) / x.var(0) - 1).abs().max()) < 0.12
    before, climbed = (float(nb.world.log_density(y, *scales).mean()) for y in (x, peaks))
    assert climbed > before + 0.5


def test_alpha_bar_is_the_integral_and_the_limit_of_the_chains():
    for end in (0.05, 0.2, 0.5, 1.0):
        s = torch.linspace(0, end, 100_001, dtype=torch.float64)
        by_integral = math.exp(-float(torch.trapezoid(nb.beta_at(s), s)))
        assert nb.alpha_bar_at(end) == pytest.approx(by_integral, rel=1e-6)
    chains = [float(d.linear_schedule(T).alpha_bars[int(0.4 * T)]) for T in (500, 1000, 10_000)]
    errors = [abs(chain / nb.alpha_bar_at(0.4) - 1) for chain in chains]
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)  # slope -1 in T
    assert errors[2] < errors[1] / 8


@pytest.mark.parametrize("step, right", [
    (nb.reverse_sde_step, True),
    (lambda x, arrow, beta_h, z: nb.flow_step(x, arrow, beta_h), True),
    (lambda x, arrow, beta_h, z: x + (0.5 * x + arrow) * beta_h, False),
    (lambda x, arrow, beta_h, z: x + 0.5 * (x + arrow) * beta_h + beta_h**0.5 * z, False)],
    ids=["SDE", "flow", "flow with the whole score", "SDE with half of it"])
def test_both_ways_back_end_in_the_data_and_the_mixed_up_ones_do_not(step, right):
    """With the exact score, by the shares of the three bumps and their spreads."""
    r = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 2, generator=r, dtype=torch.float64)
    levels = [nb.alpha_bar_at(s) for s in torch.linspace(1, 0.002, 401).tolist()]
    for now, then in zip(levels[:-1], levels[1:]):
        fresh = torch.randn(x.shape, generator=r, dtype=x.dtype)
        x = step(x, nb.grad_log_q(x, now), math.log(then / now), fresh)
    groups = [x[nb.nearest_bump(x) == k] for k in range(3)]
    shares = torch.tensor([len(group) / len(x) for group in groups])
    spreads = torch.stack([(group - group.mean(0)).square().mean().sqrt() for group in groups])
    off = torch.cat([shares - nb.world.weights, spreads / nb.world.stds - 1]).abs().max()
    assert off < 0.08 if right else not off <= 0.2  # nan where a bump gets no point


def test_one_step_on_a_standard_normal():
    """For data N(0, 1) the score is -x at every time: the flow stands still, the SDE keeps the
    variance."""
    r = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 400_000, dtype=torch.float64, generator=r)
    assert torch.equal(nb.flow_step(x, -x, 0.01), x)
    assert float(nb.reverse_sde_step(x, -x, 0.01, noise).var()) == pytest.approx(1, abs=0.01)
