"""The samplers with noise predictors that are exactly right: what is measured is the sampler alone.

Where x_0 is a Gaussian, the exact ε(x_t, t) is a straight line in x_t, so each step is an affine
map plus noise, and mean and variance of the whole way follow from two short recursions, written
here in float64 without the helper.
"""

import functools
import math

import numpy as np
import pytest
import torch

import ddpm_utils as d
from ddpm_utils import cosine_schedule, ddim_sample, ddpm_sample, dpm_solver_sample, linear_schedule

MEAN, STD = 0.3, 0.2  # of x_0
N = 40_000
BETAS = np.linspace(0.02, 0.4, 12)  # mild, so that a wrong model's x_t stays small
quiet = {"clip": False, "progress": False}
half = lambda xt, t: 0.5 * xt  # wrong but simple
far_off = lambda xt, t: -5 * torch.ones_like(xt)  # so much noise that x̂_0 is far outside [-1, 1]


def exact_noise(schedule, mean=MEAN, std=STD):
    """E[ε given x_t] where x_0 ~ N(mean, std²)."""
    return d.exact_noise_predictor(d.GaussianMixture([1.0], [mean], [std]), schedule)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ the steps, in float64


def alpha_bars_of(betas, places):
    """ᾱ at these t; ᾱ_0 is 1."""
    return np.concatenate([[1.0], np.cumprod(1 - betas)])[places]


def linear_alpha_bars(T, steps):
    """From ᾱ_T up to ᾱ_0, in even steps."""
    betas = np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999)
    return alpha_bars_of(betas, [round(T * (1 - i / steps)) for i in range(steps + 1)])


def eq_11(x, x0, noise, now, then, sigma):
    """DDPM: x_{t-1} = (x_t - β/√(1-ᾱ) ε)/√α + σ z, less its last part; and σ."""
    beta = 1 - now / then
    variance = beta if sigma == "beta" else beta * (1 - then) / (1 - now)
    return (x - beta / math.sqrt(1 - now) * noise) / math.sqrt(1 - beta), math.sqrt(variance)


def eq_12(x, x0, noise, now, then, eta):
    """DDIM, with Eq. 16: √ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-σ²) ε + σ z, less its last part; and σ."""
    sigma = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
    return math.sqrt(then) * x0 + math.sqrt(1 - then - sigma**2) * noise, sigma


PLACES = [12, 9, 8, 2, 0]


@pytest.mark.parametrize("model, clip", [(half, False), (half, True), (far_off, True)])
@pytest.mark.parametrize("sample, equation, places, how", [
    *[(ddpm_sample, eq_11, range(12, -1, -1), {"sigma": s}) for s in ("beta", "beta_tilde")],
    *[(functools.partial(ddim_sample, steps=PLACES), eq_12, PLACES, {"eta": eta})
      for eta in (0.0, 0.5, 1.0)]])
def test_each_step_with_the_samplers_own_draws(sample, equation, places, how, model, clip):
    """None is drawn for the last step, nor with eta 0. The clip is one of x̂_0: x_t may be outside
    [-1, 1], and the ε is the one that fits."""
    generator, draws = seeded(3), seeded(3)
    way = sample(model, d.NoiseSchedule(BETAS), 50, shape=(3,), clip=clip, generator=generator,
                 return_trajectory=True, progress=False, **how)
    torch.testing.assert_close(way[0], torch.randn(50, 3, generator=draws), rtol=0, atol=0)
    alpha_bars = alpha_bars_of(BETAS, places)
    for x, after, now, then in zip(way.double(), way[1:].double(), alpha_bars, alpha_bars[1:]):
        x0 = (x - math.sqrt(1 - now) * model(x, None)) / math.sqrt(now)
        x0 = x0.clamp(-1, 1) if clip else x0
        noise = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        expected, sigma = equation(x, x0, noise, now, then, **how)
        if sigma > 0 and then < 1:
            expected += sigma * torch.randn(50, 3, generator=draws)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(generator.get_state(), draws.get_state())


# ------------------------------------------------------------------ the law of a Gaussian


def law(alpha_bars, equation, **how):
    """Mean and variance of x_0: a step is an affine map, known by two points, plus noise."""
    mean, variance = 0.0, 1.0
    for now, then in zip(alpha_bars, alpha_bars[1:]):
        x = np.array([mean, mean + 1])
        noise = (x - math.sqrt(now) * MEAN) * math.sqrt(1 - now) / (now * STD**2 + 1 - now)
        x0 = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
        (mean, ahead), sigma = equation(x, x0, noise, now, then, **how)
        variance = (ahead - mean) ** 2 * variance + (sigma**2 if then < 1 else 0)
    return mean, variance


@pytest.mark.parametrize("sample, equation, T, steps, how", [
    *[(ddpm_sample, eq_11, T, {}, {"sigma": sigma})
      for T in (20, 100, 1000) for sigma in ("beta", "beta_tilde")],
    *[(ddim_sample, eq_12, 1000, {"steps": steps}, {"eta": eta})
      for steps, eta in ((20, 0.0), (100, 0.0), (1000, 0.0), (40, 0.5))]])
def test_with_the_exact_noise_of_a_gaussian(sample, equation, T, steps, how):
    schedule = linear_schedule(T)
    x = sample(exact_noise(schedule), schedule, N, shape=(1,), **steps, **how, **quiet).double()
    assert x.shape == (N, 1) and torch.isfinite(x).all()
    mean, variance = law(linear_alpha_bars(T, steps.get("steps", T)), equation, **how)
    # 5 standard errors of a Gaussian sample's mean and variance, and float32's rounding over
    # many steps
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(variance / N) + 1e-4
    assert abs(float(x.var()) - variance) < 5 * variance * math.sqrt(2 / N) + 1e-5


@pytest.mark.parametrize("T", [20, 100, 1000])
def test_ddim_with_eta_1_over_all_steps_is_ddpm_number_for_number(T):
    """Both draw one noise a step, so with the same generator the very samples agree."""
    for schedule in (linear_schedule(T), cosine_schedule(T)):
        model, options = exact_noise(schedule), {"shape": (2,), **quiet}
        ddpm = ddpm_sample(model, schedule, 500, sigma="beta_tilde", generator=seeded(5), **options)
        ddim = ddim_sample(model, schedule, 500, T, 1.0, generator=seeded(5), **options)
        torch.testing.assert_close(ddpm, ddim, rtol=0, atol=2e-4)


def test_the_error_at_finite_steps_vanishes_as_they_grow():
    """Of the laws, which the samplers were shown to follow. Fact: N(0.3, 0.2²), linear T = 1000,
    comes out with a standard deviation of 0.14 in 20 steps of DDIM, 0.186 in 100."""
    ddim = [law(linear_alpha_bars(1000, n), eq_12, eta=0.0)[1] ** 0.5 for n in (20, 100, 1000)]
    assert ddim == pytest.approx([0.1401, 0.1863, 0.1985], abs=1e-4)
    for sigma, stds in (("beta", [0.26848, 0.20976, 0.20093, 0.20009]),  # to 0.2 like 1/T
                        ("beta_tilde", [0.12749, 0.17514, 0.19630, 0.19955])):
        laws = [law(linear_alpha_bars(T, T), eq_11, sigma=sigma) for T in (20, 100, 1000, 10_000)]
        assert [variance**0.5 for _, variance in laws] == pytest.approx(stds, abs=1e-5)
        assert laws[3][0] == pytest.approx(MEAN, abs=1e-5)


# ------------------------------------------------------------------ two bumps

BUMPS = d.GaussianMixture([0.4, 0.6], [-0.5, 0.6], [0.15, 0.1])


def distance_from_bumps(x):
    """Kolmogorov and Smirnov's: the largest between x's distribution function and the exact one."""
    x = x.double().view(-1, 1).sort(dim=0).values
    exact = (BUMPS.weights * torch.special.ndtr((x - BUMPS.means) / BUMPS.stds)).sum(dim=1)
    return float((torch.arange(1, len(x) + 1) / len(x) - exact).abs().max())


LIMIT = 1.95 / math.sqrt(8000)  # passed by chance once in a thousand samples of the same law


@pytest.mark.parametrize("sample, options", [
    (ddpm_sample, {"sigma": "beta"}), (ddpm_sample, {"sigma": "beta_tilde"}),
    (ddim_sample, {"steps": 1000})])
def test_two_bumps_at_1000_steps(sample, options):
    schedule = linear_schedule(1000)
    noise = d.exact_noise_predictor(BUMPS, schedule)
    assert distance_from_bumps(sample(noise, schedule, 8000, shape=(), **options, **quiet)) < LIMIT


def test_that_distance_sees_few_steps_and_0_03_off():
    schedule, x = linear_schedule(1000), BUMPS.sample(8000)
    assert distance_from_bumps(x) < LIMIT < distance_from_bumps(x + 0.03)
    noise = d.exact_noise_predictor(BUMPS, schedule)
    assert distance_from_bumps(ddim_sample(noise, schedule, 8000, 8, shape=(), **quiet)) > LIMIT


# ------------------------------------------------------------------ the clip


@pytest.mark.parametrize("sample", [ddpm_sample, ddim_sample, dpm_solver_sample])
@pytest.mark.parametrize("clip", [True, False])
def test_clip_keeps_x0_in_range_and_changes_nothing_where_nothing_is_outside(sample, clip):
    schedule, options = cosine_schedule(50), {"shape": (4, 4), "clip": clip, "progress": False}
    x = sample(far_off, schedule, 8, **options)
    assert x.min() >= -1 and (abs(x.max() - 1) < 1e-6 if clip else x.max() > 1.5)
    x = sample(exact_noise(schedule, 0.1, 0.0), schedule, 8, **options)
    torch.testing.assert_close(x, torch.full((8, 4, 4), 0.1), rtol=0, atol=5e-4)


# ------------------------------------------------------------------ where the samplers stop


def visited(sample, T, *steps):
    seen = []

    def model(xt, t):
        assert t.shape == (2,) and t.dtype == torch.int64 and t[0] == t[1]
        seen.append(int(t[0]))
        return 0.5 * xt

    assert sample(model, linear_schedule(T), 2, *steps, shape=(1,), progress=False).shape == (2, 1)
    return seen


def gaps(found):
    """Of stops that fall from T to 0."""
    assert found[-1] == 0 and all(isinstance(stop, int) for stop in found)
    return [a - b for a, b in zip(found, found[1:])]


@pytest.mark.parametrize("T", [7, 50, 1000])
def test_ddim_visits_as_many_different_steps_as_asked_for_evenly_spaced(T):
    for steps in range(1, T + 1) if T <= 50 else (1, 2, 3, 7, 30, 50, 333, 999, 1000):
        found = d.stops(T, steps)
        assert sum(gaps(found)) == T and len(gaps(found)) == steps
        assert min(gaps(found)) >= 1 and max(gaps(found)) - min(gaps(found)) <= 1
        assert visited(ddim_sample, T, steps) == found[:-1]


def test_ddpm_visits_every_step_and_the_others_stops_of_ones_own():
    assert visited(ddpm_sample, 15) == list(range(15, 0, -1))
    for sample in (ddim_sample, dpm_solver_sample):
        assert visited(sample, 50, [50, 31, 8, 0]) == [50, 31, 8]
    for steps, power in ((10, 1.6), (50, 3.0)):
        wider = gaps(d.stops(50, steps, power))
        assert sum(wider) == 50 and min(wider) >= 1 and wider[0] <= wider[-1]


@pytest.mark.parametrize("wrong", [[50, 8], [50, 8, 8, 0], [8, 50, 0], [51, 8, 0], [0], []])
def test_stops_that_do_not_fall_to_0_are_refused(wrong):
    with pytest.raises(ValueError, match="stops must fall"):
        ddim_sample(half, linear_schedule(50), 1, steps=wrong, shape=(1,), progress=False)


# ------------------------------------------------------------------ arguments and what comes back


@pytest.mark.parametrize("sample, stages", [
    (ddpm_sample, 21), (functools.partial(ddim_sample, steps=6), 7),
    (functools.partial(dpm_solver_sample, steps=6), 7)], ids=["ddpm", "ddim", "dpm_solver"])
def test_shapes_generator_trajectory_and_bar(capsys, sample, stages):
    schedule, weight = linear_schedule(20), torch.nn.Parameter(torch.tensor(0.5))

    def draw(seed=1, **options):
        options = {"shape": (5,), "generator": seeded(seed), "progress": False, **options}
        return sample(lambda xt, t: weight * xt, schedule, 2, **options)

    for shape in ((), (1,), (2,), (1, 28, 28), [3, 8, 4]):
        x = draw(shape=shape)
        assert x.shape == (2, *shape) and x.dtype == torch.float32 and not x.requires_grad
    assert sample(half, schedule, 1, progress=False).shape == (1, 1, 28, 28)

    state = torch.get_rng_state()
    assert torch.equal(draw(), draw()) and not torch.equal(draw(), draw(2))
    # with a generator the global one is left alone
    assert torch.equal(torch.get_rng_state(), state)

    x_T = torch.randn(2, 5)
    kept = x_T.clone()
    way, end = draw(x_T=x_T, return_trajectory=True), draw(x_T=x_T)
    assert way.shape == (stages, 2, 5) and way.device.type == "cpu"
    assert torch.equal(way[0], kept) and torch.equal(way[-1], end)
    assert torch.equal(x_T, kept)  # the caller's x_T is not written to
    assert all(draw(x_T=x_T.to(t)).dtype == torch.float32 for t in (torch.float64, torch.float16))

    assert capsys.readouterr() == ("", "")
    draw(progress=True)
    out, err = capsys.readouterr()
    assert "sampling" in out and f"{stages - 1}/{stages - 1}" in out
    assert err == ""  # it is red in a notebook
