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
quiet = {"clip": False, "progress": False}


class GaussianNoise:
    """E[ε given x_t] where x_0 ~ N(mean, std²)."""

    def __init__(self, schedule, mean=MEAN, std=STD):
        self.schedule, self.mean, self.std = schedule, mean, std

    def __call__(self, xt, t):
        alpha_bar = self.schedule.alpha_bars[int(t[0])].double()
        line = (1 - alpha_bar).sqrt() / (alpha_bar * self.std**2 + 1 - alpha_bar)
        return (line * (xt.double() - alpha_bar.sqrt() * self.mean)).float()


def to_a_tenth(schedule):
    """The exact noise where x_0 is 0.1."""
    return GaussianNoise(schedule, 0.1, 0.0)


def half(xt, t):
    """A model that is wrong but simple."""
    return 0.5 * xt


def far_off(xt, t):
    """Says so much noise that x̂_0 is far outside [-1, 1]."""
    return -5 * torch.ones_like(xt)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def alpha_bars_of(betas):
    """ᾱ_0 … ᾱ_T in float64."""
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


def linear_alpha_bars(T):
    return alpha_bars_of(np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999))


# ------------------------------------------------------------------ the law of a Gaussian


def exact_line(alpha_bar):
    """ε(x) = a x + b."""
    a = math.sqrt(1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
    return a, -a * math.sqrt(alpha_bar) * MEAN


def ddpm_law(T, sigma):
    """Mean and variance of x_0 by Eq. 11: x_{t-1} = (x_t - β/√(1-ᾱ) ε)/√α + σ z."""
    alpha_bars, mean, variance = linear_alpha_bars(T), 0.0, 1.0
    for now, then in zip(alpha_bars[:0:-1], alpha_bars[-2::-1]):
        a, b = exact_line(now)
        beta, root = 1 - now / then, math.sqrt(now / then)
        pull = beta / math.sqrt(1 - now)
        mean = (mean - pull * (a * mean + b)) / root
        variance = variance * ((1 - pull * a) / root) ** 2
        if then < 1:
            variance += beta if sigma == "beta" else beta * (1 - then) / (1 - now)
    return mean, variance


def ddim_law(T, steps, eta):
    """Mean and variance of x_0 by DDIM Eq. 12 and 16: √ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-σ²) ε + σ z."""
    alpha_bars, mean, variance = linear_alpha_bars(T), 0.0, 1.0
    places = [round(T * (1 - i / steps)) for i in range(steps + 1)]
    for now, then in zip(alpha_bars[places[:-1]], alpha_bars[places[1:]]):
        a, b = exact_line(now)
        sigma = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        along = math.sqrt(1 - then - sigma**2)
        factor = math.sqrt(then / now) * (1 - math.sqrt(1 - now) * a) + along * a
        mean = factor * mean + (along - math.sqrt(then / now) * math.sqrt(1 - now)) * b
        variance = factor**2 * variance + sigma**2
    return mean, variance


def assert_follows(law, sample, T, **options):
    schedule = linear_schedule(T)
    x = sample(GaussianNoise(schedule), schedule, N, shape=(1,), **options, **quiet).double()
    assert x.shape == (N, 1) and torch.isfinite(x).all()
    mean, variance = law
    # 5 standard errors of a Gaussian sample's mean and variance, and float32's rounding over
    # many steps
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(variance / N) + 1e-4
    assert abs(float(x.var()) - variance) < 5 * variance * math.sqrt(2 / N) + 1e-5


@pytest.mark.parametrize("T", [20, 100, 1000])
@pytest.mark.parametrize("sigma", ["beta", "beta_tilde"])
def test_ddpm_with_the_exact_noise_of_a_gaussian(T, sigma):
    assert_follows(ddpm_law(T, sigma), ddpm_sample, T, sigma=sigma)


@pytest.mark.parametrize("steps, eta", [(20, 0.0), (100, 0.0), (1000, 0.0), (40, 0.5)])
def test_ddim_with_the_exact_noise_of_a_gaussian(steps, eta):
    assert_follows(ddim_law(1000, steps, eta), ddim_sample, 1000, steps=steps, eta=eta)


@pytest.mark.parametrize("T", [20, 100, 1000])
def test_ddim_with_eta_1_over_all_steps_is_ddpm_number_for_number(T):
    """Both draw one noise a step, so with the same generator the very samples agree."""
    for schedule in (linear_schedule(T), cosine_schedule(T)):
        model, options = GaussianNoise(schedule), {"shape": (2,), **quiet}
        ddpm = ddpm_sample(model, schedule, 500, sigma="beta_tilde", generator=seeded(5), **options)
        ddim = ddim_sample(model, schedule, 500, T, 1.0, generator=seeded(5), **options)
        torch.testing.assert_close(ddpm, ddim, rtol=0, atol=2e-4)


def test_the_error_at_finite_steps_vanishes_as_they_grow():
    """Of the laws, which the samplers were shown to follow. Fact: N(0.3, 0.2²), linear T = 1000,
    comes out with a standard deviation of 0.14 in 20 steps of DDIM, 0.186 in 100."""
    ddim = [math.sqrt(ddim_law(1000, steps, 0.0)[1]) for steps in (20, 100, 1000)]
    assert ddim[:2] == [pytest.approx(0.14, abs=0.001), pytest.approx(0.186, abs=0.0005)]
    assert STD - ddim[0] > 3 * (STD - ddim[1]) > 9 * (STD - ddim[2]) > 0
    for sigma in ("beta", "beta_tilde"):  # goes to the truth like 1/T
        off = [abs(math.sqrt(ddpm_law(T, sigma)[1]) - STD) for T in (20, 100, 1000, 10_000)]
        assert off[0] > 2 * off[1] > 4 * off[2] and off[3] < off[2] / 5 and off[3] < 1e-3
        assert ddpm_law(10_000, sigma)[0] == pytest.approx(MEAN, abs=2e-3)


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


# ------------------------------------------------------------------ step by step, and the clip


def fitting_noise(model, x, alpha_bar, clip):
    """What model says, or where its x̂_0 is clipped the ε that goes with that; and x̂_0."""
    x0 = (x - math.sqrt(1 - alpha_bar) * model(x, None)) / math.sqrt(alpha_bar)
    x0 = x0.clamp(-1, 1) if clip else x0
    return (x - math.sqrt(alpha_bar) * x0) / math.sqrt(1 - alpha_bar), x0


@pytest.mark.parametrize("model, clip", [(half, False), (far_off, True)])
@pytest.mark.parametrize("sigma", ["beta", "beta_tilde"])
def test_ddpm_adds_noise_of_the_right_size_but_none_in_the_last_step(sigma, model, clip):
    """Eq. 11; the clip is one of x̂_0: x_t may be outside [-1, 1]."""
    n = 20_000
    betas = np.linspace(0.02, 0.4, 12)  # mild, so that a wrong model's x_t stays small
    alpha_bars = alpha_bars_of(betas)
    way = ddpm_sample(model, d.NoiseSchedule(betas), n, shape=(1,), sigma=sigma, clip=clip,
                      return_trajectory=True, progress=False).double()
    for i, t in enumerate(range(12, 0, -1)):
        beta, now, then = betas[t - 1], alpha_bars[t], alpha_bars[t - 1]
        noise, _ = fitting_noise(model, way[i], now, clip)
        added = way[i + 1] - (way[i] - beta / math.sqrt(1 - now) * noise) / math.sqrt(1 - beta)
        if t == 1:
            assert float(added.abs().max()) < 1e-4
        else:
            variance = beta if sigma == "beta" else beta * (1 - then) / (1 - now)
            assert abs(float(added.var()) - variance) < 5 * variance * math.sqrt(2 / n) + 1e-6, t
            assert abs(float(added.mean())) < 5 * math.sqrt(variance / n) + 1e-5, t


@pytest.mark.parametrize("model, clip, eta", [(half, False, 0.0), (half, False, 1.0),
                                              (far_off, True, 0.0), (far_off, True, 1.0)])
def test_ddim_steps_along_the_noise_and_ends_at_the_predicted_x0(model, clip, eta):
    """Eq. 12 with the ε that fits a clipped x̂_0. With eta 0 nothing is drawn after x_T; with more
    only the end is known, which is x̂_0."""
    schedule, x_T, places = linear_schedule(100), torch.randn(50, 3), [100, 70, 62, 10, 0]
    before = torch.get_rng_state()
    way = ddim_sample(model, schedule, 50, places, eta, shape=(3,), clip=clip, x_T=x_T,
                      return_trajectory=True, progress=False).double()
    assert torch.equal(torch.get_rng_state(), before) == (eta == 0)
    for i in range(3 if eta else 0, 4):
        now, then = (linear_alpha_bars(100)[t] for t in places[i:i + 2])
        noise, x0 = fitting_noise(model, way[i], now, clip)
        expected = math.sqrt(then) * x0 + math.sqrt(1 - then) * noise
        torch.testing.assert_close(way[i + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sample", [ddpm_sample, ddim_sample, dpm_solver_sample])
@pytest.mark.parametrize("clip", [True, False])
def test_clip_keeps_x0_in_range_and_changes_nothing_where_nothing_is_outside(sample, clip):
    schedule, options = cosine_schedule(50), {"shape": (4, 4), "clip": clip, "progress": False}
    x = sample(far_off, schedule, 8, **options)
    if clip:
        assert float(x.max()) == pytest.approx(1, abs=1e-6) and float(x.min()) >= -1
    else:
        assert float(x.max()) > 1.5
    x = sample(to_a_tenth(schedule), schedule, 8, **options)
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


@pytest.mark.parametrize("T", [7, 50, 1000])
def test_ddim_visits_as_many_different_steps_as_asked_for_evenly_spaced(T):
    for steps in range(1, T + 1) if T <= 50 else (1, 2, 3, 7, 30, 333, 999, 1000):
        found = d.stops(T, steps)
        gaps = [a - b for a, b in zip(found[:-1], found[1:])]
        assert found[0] == T and found[-1] == 0 and all(isinstance(stop, int) for stop in found)
        assert len(gaps) == steps and min(gaps) >= 1 and max(gaps) - min(gaps) <= 1
        assert visited(ddim_sample, T, steps) == found[:-1]


def test_ddpm_visits_every_step_and_the_others_stops_of_ones_own():
    assert visited(ddpm_sample, 15) == list(range(15, 0, -1))
    for sample in (ddim_sample, dpm_solver_sample):
        assert visited(sample, 50, [50, 31, 8, 0]) == [50, 31, 8]
    for steps, power in ((10, 1.6), (50, 3.0)):
        found = d.stops(50, steps, power)
        gaps = [a - b for a, b in zip(found[:-1], found[1:])]
        assert found[0] == 50 and found[-1] == 0 and all(isinstance(stop, int) for stop in found)
        assert min(gaps) >= 1 and gaps[0] <= gaps[-1]


@pytest.mark.parametrize("wrong", [[50, 8], [50, 8, 8, 0], [8, 50, 0], [51, 8, 0], [0], []])
def test_stops_that_do_not_fall_to_0_are_refused(wrong):
    with pytest.raises(ValueError, match="stops must fall"):
        ddim_sample(half, linear_schedule(50), 1, steps=wrong, shape=(1,), progress=False)


# ------------------------------------------------------------------ arguments and what comes back


@pytest.mark.parametrize("sample, stages", [
    (ddpm_sample, 21), (functools.partial(ddim_sample, steps=6), 7),
    (functools.partial(dpm_solver_sample, steps=6), 7)], ids=["ddpm", "ddim", "dpm_solver"])
def test_shapes_generator_and_trajectory(sample, stages):
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


def test_the_bar_shows_or_not(capsys):
    for progress in (False, True):
        ddim_sample(half, linear_schedule(10), 1, 5, shape=(1,), progress=progress)
        out, err = capsys.readouterr()
        assert err == ""  # stderr is red in a notebook
        assert "sampling" in out and "5/5" in out if progress else out == ""


@pytest.mark.parametrize("name, T, options, theirs", [
    ("DDPM", 100, {"sigma": "beta"}, {"variance_type": "fixed_large"}),
    ("DDPM", 100, {"sigma": "beta_tilde"}, {"variance_type": "fixed_small"}),
    ("DDIM", 1000, {"steps": 50, "eta": 0.0}, {"timestep_spacing": "trailing"}),
    ("DDIM", 1000, {"steps": 50, "eta": 1.0}, {"timestep_spacing": "trailing"})])
def test_diffusers_has_the_same_steps(name, T, options, theirs):
    """Where it is installed: the same x_T, the same draws; their t is one less than the paper's."""
    diffusers = pytest.importorskip("diffusers")
    schedule, x, draws = linear_schedule(T), torch.randn(4, 1, 8, 8), seeded(7)
    way = {"DDPM": ddpm_sample, "DDIM": ddim_sample}[name](
        half, schedule, 4, shape=(1, 8, 8), x_T=x, return_trajectory=True, generator=seeded(7),
        progress=False, **options)
    scheduler = getattr(diffusers, f"{name}Scheduler")(
        num_train_timesteps=T, trained_betas=schedule.betas[1:].numpy(), **theirs)
    scheduler.set_timesteps(len(way) - 1)
    assert [int(t) + 1 for t in scheduler.timesteps] == d.stops(T, len(way) - 1)[:-1]
    more = {"eta": options["eta"], "use_clipped_model_output": True} if name == "DDIM" else {}
    for i, t in enumerate(scheduler.timesteps):
        if options.get("eta") and i == 49:
            break  # they add noise there or only draw it, by version; the end is tested above
        x = scheduler.step(half(x, None), t, x, generator=draws, **more).prev_sample
        torch.testing.assert_close(way[i + 1], x, rtol=0, atol=2e-4)
