"""Notebook 09: the solver against the paper's own formula, and the functions out of its cells."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from series import defined_in
from test_05_samplers import MEAN, STD, GaussianNoise, half, quiet, to_a_tenth, visited

import ddpm_utils as d
from ddpm_utils import cosine_schedule, ddim_sample, dpm_solver_sample, linear_schedule

# ------------------------------------------------------------------ DPM-Solver++(2M)

def by_the_papers_formula(schedule, predicted, x, steps):
    """Lu et al. 2022, Algorithm 2, for one float64 number: with r = h_before / h, D by r, and
    α (e^{-h} - 1)."""
    alpha_bars = schedule.alpha_bars.double()
    signal, spread = alpha_bars.sqrt().tolist(), (1 - alpha_bars).sqrt().tolist()
    stops = [round(schedule.T * (1 - (k / steps) ** 1.6)) for k in range(steps + 1)]
    older = h_before = None
    for now, then in zip(stops[:-1], stops[1:]):
        x0 = predicted(x, signal[now], spread[now])
        if then == 0:
            return x0  # h is infinite: σ = 0 and e^{-h} = 0
        h = math.log(signal[then] / spread[then]) - math.log(signal[now] / spread[now])
        r = h_before / h if older is not None else 1
        D = x0 if older is None else (1 + 1 / (2 * r)) * x0 - older / (2 * r)
        x = spread[then] / spread[now] * x - signal[then] * (math.exp(-h) - 1) * D
        older, h_before = x0, h


@pytest.mark.parametrize("schedule", [linear_schedule(1000), cosine_schedule(1000)],
                         ids=["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 50])
def test_dpm_solver_is_the_papers_formula(schedule, steps):
    def predicted(x, signal, spread):
        return math.tanh(x / (signal + spread))  # any belief that is no straight line in x

    def noise(xt, t):
        signal, spread = schedule.signal_scale[t[0]], schedule.noise_scale[t[0]]
        return (xt - signal * (xt / (signal + spread)).tanh()) / spread

    x_T = torch.tensor([[-1.5], [-0.2], [0.0], [0.7], [2.0]])
    x = dpm_solver_sample(noise, schedule, 5, steps, shape=(1,), clip=False, x_T=x_T,
                          progress=False)
    wanted = [by_the_papers_formula(schedule, predicted, float(start), steps) for start in x_T]
    torch.testing.assert_close(x[:, 0], torch.tensor(wanted), rtol=0, atol=2e-3)


def test_dpm_solver_is_exact_for_one_picture_and_one_step_of_it_is_ddims():
    schedule, x_T = cosine_schedule(100), torch.randn(6, 3)

    for steps in (1, 2, 7, 100):
        x = dpm_solver_sample(to_a_tenth(schedule), schedule, 6, steps, shape=(3,), x_T=x_T,
                              progress=False)
        torch.testing.assert_close(x, torch.full((6, 3), 0.1), rtol=0, atol=1e-3)
    one = [sample(half, schedule, 6, steps=1, shape=(3,), x_T=x_T, clip=False, progress=False)
           for sample in (ddim_sample, dpm_solver_sample)]
    assert torch.equal(*one)


def test_dpm_solver_is_of_second_order_and_ddim_of_first():
    """Gaussian data: the flow keeps a point at the same number of standard deviations from the mean."""
    schedule = cosine_schedule(10_000)
    x_T = torch.linspace(-2, 2, 9)[:, None]
    a = float(schedule.alpha_bars[-1])
    end = MEAN + STD * (x_T - math.sqrt(a) * MEAN) / math.sqrt(a * STD**2 + 1 - a)
    slopes = []
    for sample in (ddim_sample, dpm_solver_sample):
        errors = [float((sample(GaussianNoise(schedule), schedule, 9, n, shape=(1,), x_T=x_T,
                                **quiet) - end).abs().mean()) for n in (40, 160)]
        slopes.append(math.log(errors[1] / errors[0]) / math.log(4))
    assert -1.1 < slopes[0] < -0.9 and -2.7 < slopes[1] < -1.8


@pytest.mark.parametrize("T", [7, 50, 1000])
def test_dpm_solver_steps_down_from_T_and_denser_there(T):
    for steps in (1, 2, 5, 7, T):
        seen = visited(d.dpm_solver_sample, T, steps)
        assert seen == d.stops(T, steps, 1.6)[:-1]  # which fall from T: test_05_samplers.py
        gaps = [a - b for a, b in zip(seen, seen[1:] + [0])]
        assert gaps[0] <= gaps[-1] and (len(seen) == steps or len(seen) < steps and T < steps**1.6)


# ------------------------------------------------------------------ the functions of the notebook

@pytest.fixture(scope="module")
def space():
    return defined_in("09", "world", "velocity", "solve", "log_density_by_flow", "bumps_noise",
                      "exact_divergence", "probes", "hutchinson", "histogram_bits", "slerp")


@pytest.mark.parametrize("heun, order", [(False, 1), (True, 2)])
def test_order_of_euler_and_heun(space, heun, order):
    x = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    end = space["solve"](x, 3200, True)
    errors = [float((space["solve"](x, n, heun) - end).norm(dim=1).mean()) for n in (200, 400)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_ddim_is_eulers_method_in_sigma():
    """dy/dσ = ε with y = x/√ᾱ and σ = √((1-ᾱ)/ᾱ): in float64, over 20 stops."""
    schedule, x_T = linear_schedule(1000), torch.randn(6, 1)
    found = ddim_sample(GaussianNoise(schedule), schedule, 6, 20, shape=(1,), x_T=x_T,
                        **quiet).double()
    a = schedule.alpha_bars.double()
    sigma, y = ((1 - a) / a).sqrt(), x_T.double() / a[1000].sqrt()
    for now in range(1000, 0, -50):
        x = y * a[now].sqrt()
        line = (1 - a[now]).sqrt() / (a[now] * STD**2 + 1 - a[now])
        y = y + (sigma[now - 50] - sigma[now]) * line * (x - a[now].sqrt() * MEAN)
    torch.testing.assert_close(found, y, rtol=0, atol=2e-3)


def test_likelihood_by_the_flow_is_the_density(space):
    """On a grid of points in the plane, with the exact divergence."""
    side = torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)
    x = torch.cartesian_prod(side, side)
    sigmas = np.logspace(-2, 2, 101).tolist()
    found = space["log_density_by_flow"](space["bumps_noise"], space["exact_divergence"], x, sigmas)
    known = space["world"].log_density(x, 1.0, sigmas[0])
    near = known > -8
    torch.testing.assert_close(found[near], known.double()[near], rtol=0, atol=0.03)


def test_hutchinson_is_unbiased(space):
    """For a linear map the divergence is the trace, and signs make each diagonal one exact."""
    A = torch.randn(4, 4, dtype=torch.float64)
    y = torch.randn(20_000, 4, dtype=torch.float64, requires_grad=True)
    found = space["hutchinson"](y @ A.T, y)
    error = float(found.std()) / math.sqrt(20_000)
    assert abs(float(found.mean() - A.trace())) < 5 * error
    diagonal = torch.diag(torch.diag(A))
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(space["hutchinson"](y @ diagonal, y), A.trace().expand(3))


def test_histogram_probabilities_add_up(space):
    train = torch.randint(0, 256, (50, 1, 28, 28), dtype=torch.uint8)
    every = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(-1, 1, 28, 28)
    for k in (0, 100, 783):  # level by level, at one pixel
        levels = train[:1].expand(256, -1, -1, -1).clone().flatten(1)
        levels[:, k] = every.flatten(1)[:, k]
        bits = space["histogram_bits"](train, levels.view(256, 1, 28, 28)).double() * 784
        rest = bits - bits.min()
        counts = torch.ones(256).index_add(0, train.flatten(1)[:, k].long(), torch.ones(50))
        expected = -(counts / counts.sum()).log2().double()
        torch.testing.assert_close(rest, expected - expected.min(), rtol=0, atol=1e-2)


def test_slerp_keeps_the_angle_even_and_the_length(space):
    a, b = F.normalize(torch.randn(2, 784, generator=torch.Generator().manual_seed(0)))
    quarter = space["slerp"](a, b, 0.25)
    assert float(quarter.norm()) == pytest.approx(1, abs=1e-5)
    angles = [float((a @ v).clamp(-1, 1).acos()) for v in (quarter, b)]
    assert angles[0] == pytest.approx(angles[1] / 4, abs=1e-4)
