"""Notebook 08, out of its cells: scores, Langevin walks, the SDE and its reverse, against something independent."""

import math

import pytest
import torch
from series import defined_in

import ddpm_utils as d


@pytest.fixture(scope="module")
def space():
    return defined_in("08", "world", "draws", "grad_log_q", "walk", "nearest_bump", "shares",
                      "beta_at", "alpha_bar_at", "reverse_sde_step", "flow_step")


@pytest.mark.parametrize("a", [1.0, 0.6, 0.05])
def test_the_score_is_the_weighed_pull_of_the_bumps_and_the_slope_of_log_q(space, a):
    world, x = space["world"], torch.randn(30, 2, dtype=torch.float64)
    means, variances = world.means.double(), (a * world.stds**2 + 1 - a).double()
    away = math.sqrt(a) * means - x[:, None]  # (30, 3, 2)
    weights = world.weights * torch.exp(-away.square().sum(2) / (2 * variances)) / variances
    by_hand = (weights[..., None] * away / variances[:, None]).sum(1) / weights.sum(1, keepdim=True)
    found = space["grad_log_q"](x, a)
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-5)
    for axis in (0, 1):
        h = torch.zeros(2, dtype=torch.float64)
        h[axis] = 1e-5
        scales = (a**0.5, (1 - a) ** 0.5)
        slope = (world.log_density(x + h, *scales) - world.log_density(x - h, *scales)) / 2e-5
        torch.testing.assert_close(found[:, axis], slope, rtol=1e-4, atol=1e-4)


def test_a_langevin_walk_keeps_the_distribution_it_is_in(space):
    """At a level where the bumps are one, samples of q stay samples of q, and jitter=0 climbs."""
    world, a, r = space["world"], 0.3, torch.Generator().manual_seed(0)
    x = math.sqrt(a) * world.sample(3000, r) + math.sqrt(1 - a) * torch.randn(3000, 2, generator=r)
    space["draws"].manual_seed(1)
    after = space["walk"](x.double(), a, 60)
    assert float((after.mean(0) - x.mean(0)).abs().max()) < 0.08
    assert float((after.var(0) / x.var(0) - 1).abs().max()) < 0.12
    log_q = world.log_density(space["walk"](x.double(), a, 60, jitter=0.0), a**0.5, (1 - a) ** 0.5)
    assert float(log_q.mean()) > float(world.log_density(x, a**0.5, (1 - a) ** 0.5).mean()) + 0.5


def test_alpha_bar_is_the_integral_and_the_limit_of_the_chains(space):
    s = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    by_integral = math.exp(-float(torch.trapezoid(space["beta_at"](s), s)))
    assert space["alpha_bar_at"](1.0) == pytest.approx(by_integral, rel=1e-6)
    errors = [abs(float(d.linear_schedule(T).alpha_bars[int(0.4 * T)]) / space["alpha_bar_at"](0.4)
                  - 1) for T in (500, 1000, 10_000)]
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.1)  # slope -1 in T
    assert errors[2] < errors[1] / 8


@pytest.mark.parametrize("s", [0.05, 0.2, 0.5])
def test_the_flow_carries_the_density_as_fokker_planck_says(space, s):
    """∂q/∂s = -∂(v q)/∂x with v = -β/2 (x + ∂log q), in one dimension, by differences alone."""
    bumps, h = d.two_bumps(), 1e-3
    x = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)

    def q(x, s):
        a = space["alpha_bar_at"](s)
        return bumps.log_density(x, a**0.5, (1 - a) ** 0.5).exp()

    def stream(x):
        slope = (q(x + h, s).log() - q(x - h, s).log()) / (2 * h)
        return -0.5 * space["beta_at"](s) * (x + slope) * q(x, s)

    by_time = (q(x, s + 1e-4) - q(x, s - 1e-4)) / 2e-4
    by_space = -(stream(x + h) - stream(x - h)) / (2 * h)
    torch.testing.assert_close(by_time, by_space, rtol=2e-2, atol=2e-2)


def solve(space, how, n=4000, steps=400):
    """From noise to the three bumps, backwards in s, with the exact score."""
    r = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2, generator=r, dtype=torch.float64)
    times = torch.linspace(1, 0.002, steps + 1).tolist()
    for now, then in zip(times[:-1], times[1:]):
        arrow = space["grad_log_q"](x, space["alpha_bar_at"](now))
        beta_h = math.log(space["alpha_bar_at"](then) / space["alpha_bar_at"](now))
        fresh = torch.randn(n, 2, generator=r, dtype=torch.float64)
        x = how(x, arrow, beta_h, fresh)
    return x


def off(space, x):
    """How far the shares of the three bumps, and their spreads, are from the truth."""
    bump = space["nearest_bump"](x)
    shares = bump.bincount(minlength=3) / len(x)
    spreads = torch.stack([(x[bump == k] - x[bump == k].mean(0)).square().mean().sqrt()
                           for k in range(3)])
    wanted = space["world"]
    return max(float((shares - wanted.weights).abs().max()),
               float((spreads / wanted.stds - 1).abs().max()))


def test_both_ways_back_end_in_the_data_and_the_mixed_up_ones_do_not(space):
    sde = space["reverse_sde_step"]
    flow = space["flow_step"]
    assert off(space, solve(space, sde)) < 0.08
    assert off(space, solve(space, lambda x, g, b, z: flow(x, g, b))) < 0.08
    full_score_in_the_flow = solve(space, lambda x, g, b, z: x + (0.5 * x + g) * b)
    half_score_in_the_sde = solve(space, lambda x, g, b, z: x + 0.5 * (x + g) * b + b**0.5 * z)
    assert off(space, full_score_in_the_flow) > 0.2 and off(space, half_score_in_the_sde) > 0.2


def test_one_step_on_a_standard_normal(space):
    """For data N(0, 1) the score is -x at every time: the flow stands still, the SDE keeps the variance."""
    r = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 400_000, dtype=torch.float64, generator=r)
    assert torch.equal(space["flow_step"](x, -x, 0.01), x)
    assert float(space["reverse_sde_step"](x, -x, 0.01, noise).var()) == pytest.approx(1, abs=0.01)
