"""Notebook 09: the solver against the paper's own formula, and the functions out of its cells.

The notebook itself asserts the orders of Euler, Heun, DDIM and the solver, that DDIM is Euler's
method in σ (its steps by hand: test_05_samplers.py), and that probes are unbiased.
"""

import math
import types

import numpy as np
import pytest
import torch
from series import defined_in
from test_05_samplers import visited

import ddpm_utils as d
from ddpm_utils import cosine_schedule, dpm_solver_sample, linear_schedule

nb = types.SimpleNamespace(**defined_in(
    "09", "world", "log_density_by_flow", "bumps_noise", "exact_divergence", "probes", "hutchinson",
    "histogram_bits", "slerp"))

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

    x_T = torch.tensor([-1.5, -0.2, 0.0, 0.7, 2.0])
    x = dpm_solver_sample(noise, schedule, 5, steps, shape=(), clip=False, x_T=x_T, progress=False)
    wanted = [by_the_papers_formula(schedule, predicted, start, steps) for start in x_T.tolist()]
    torch.testing.assert_close(x, torch.tensor(wanted), rtol=0, atol=2e-3)


@pytest.mark.parametrize("T", [7, 50, 1000])
def test_dpm_solver_steps_down_from_T_and_denser_there(T):
    for steps in (1, 2, 5, 7, T):
        seen = visited(dpm_solver_sample, T, steps)
        assert seen == d.stops(T, steps, 1.6)[:-1]  # which fall from T: test_05_samplers.py
        gaps = [a - b for a, b in zip(seen, seen[1:] + [0])]
        assert gaps[0] <= gaps[-1] and (len(seen) == steps or len(seen) < steps and T < steps**1.6)


# ------------------------------------------------------------------ the functions of the notebook

def test_likelihood_by_the_flow_is_the_density():
    """On a grid of points in the plane, with the exact divergence."""
    side = torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)
    x, sigmas = torch.cartesian_prod(side, side), np.logspace(-2, 2, 101).tolist()
    found = nb.log_density_by_flow(nb.bumps_noise, nb.exact_divergence, x, sigmas)
    known = nb.world.log_density(x, 1.0, sigmas[0]).double()
    torch.testing.assert_close(found[known > -8], known[known > -8], rtol=0, atol=0.03)


def test_a_probe_of_signs_is_exact_where_the_coordinates_do_not_mix():
    """For a linear map the divergence is the trace."""
    diagonal = torch.diag(torch.randn(4, dtype=torch.float64))
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(nb.hutchinson(y @ diagonal, y), diagonal.trace().expand(3))


def test_histogram_bits_count_the_images_with_the_same_level():
    """(1 + how many of 50) / (50 + 256) adds up to 1 over the levels."""
    train, images = (torch.randint(0, 256, (n, 1, 28, 28), dtype=torch.uint8) for n in (50, 4))
    images[:2] = train[:2]
    same = (images == train[:, 0]).sum(dim=1)  # (4, 28, 28)
    expected = -((1 + same) / 306).log2().mean(dim=(1, 2))
    torch.testing.assert_close(nb.histogram_bits(train, images), expected, rtol=1e-5, atol=0)


def test_slerp_goes_evenly_along_the_circle():
    point = lambda angle: 3 * torch.tensor([math.cos(angle), math.sin(angle)])
    torch.testing.assert_close(nb.slerp(point(0.2), point(2.2), 0.25), point(0.7))
