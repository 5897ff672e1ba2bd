"""The samplers with noise predictors that are exactly right, so that what is measured is the sampler alone.

Where x_0 is a Gaussian, the exact ε(x_t, t) is a straight line in x_t, so each step is an affine map plus noise, and
mean and variance of the whole way follow from two short recursions, written here in float64 without the helper.
"""

import math

import numpy as np
import pytest
import torch

from ddpm_utils import (
    NoiseSchedule,
    cosine_schedule,
    ddim_sample,
    ddpm_sample,
    dpm_solver_sample,
    linear_schedule,
    stops,
)

MEAN, STD = 0.3, 0.2  # of x_0
N = 40_000
quiet = {"clip": False, "progress": False}


class GaussianNoise:
    """E[ε given x_t] where x_0 ~ N(MEAN, STD²)."""

    def __init__(self, schedule):
        self.schedule = schedule

    def __call__(self, xt, t):
        alpha_bar = self.schedule.alpha_bars[int(t[0])].double()
        line = (1 - alpha_bar).sqrt() / (alpha_bar * STD**2 + 1 - alpha_bar)
        return (line * (xt.double() - alpha_bar.sqrt() * MEAN)).float()


def to_a_tenth(schedule):
    """The exact noise where x_0 is 0.1."""

    def predict(xt, t):
        alpha_bar = schedule.alpha_bars[t[0]]
        return (xt - 0.1 * alpha_bar.sqrt()) / (1 - alpha_bar).sqrt()

    return predict


def linear_alpha_bars(T):
    betas = np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999)
    return np.concatenate([[1.0], np.cumprod(1 - betas)])


def exact_line(alpha_bar):
    """ε(x) = a x + b."""
    a = math.sqrt(1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)
    return a, -a * math.sqrt(alpha_bar) * MEAN


def ddpm_law(T, sigma):
    """Mean and variance of x_0 by Eq. 11: x_{t-1} = (x_t - β/√(1-ᾱ) ε)/√α + σ z."""
    alpha_bars = linear_alpha_bars(T)
    mean, variance = 0.0, 1.0
    for t in range(T, 0, -1):
        alpha = alpha_bars[t] / alpha_bars[t - 1]
        a, b = exact_line(alpha_bars[t])
        pull = (1 - alpha) / math.sqrt(1 - alpha_bars[t])
        mean = (mean - pull * (a * mean + b)) / math.sqrt(alpha)
        variance = variance * ((1 - pull * a) / math.sqrt(alpha)) ** 2
        if t > 1:
            small = (1 - alpha) * (1 - alpha_bars[t - 1]) / (1 - alpha_bars[t])
            variance += 1 - alpha if sigma == "beta" else small
    return mean, variance


def ddim_law(T, steps):
    """Mean and variance of x_0 by an Euler step of dx̄ = ε dσ, x̄ = x/√ᾱ and σ = √((1-ᾱ)/ᾱ) (DDIM Eq. 14)."""
    alpha_bars = linear_alpha_bars(T)
    mean, variance = 0.0, 1.0
    stops = [round(T * (1 - i / steps)) for i in range(steps + 1)]
    for now, then in zip(stops[:-1], stops[1:]):
        a, b = exact_line(alpha_bars[now])
        s_now, s_then = (math.sqrt((1 - alpha_bars[t]) / alpha_bars[t]) for t in (now, then))
        keep, bring = math.sqrt(alpha_bars[now]), math.sqrt(alpha_bars[then])
        factor = bring * (1 / keep + (s_then - s_now) * a)
        mean, variance = factor * mean + bring * (s_then - s_now) * b, factor**2 * variance
    return mean, variance


def assert_has_law(x, mean, variance):
    assert x.shape == (N, 1) and torch.isfinite(x).all()
    x = x.double()
    # 5 standard errors of a Gaussian sample's mean and variance, and
    # float32's rounding over many steps
    assert abs(float(x.mean()) - mean) < 5 * math.sqrt(variance / N) + 1e-4
    assert abs(float(x.var()) - variance) < 5 * variance * math.sqrt(2 / N) + 1e-5


@pytest.mark.parametrize("T", [20, 100, 1000])
@pytest.mark.parametrize("sigma", ["beta", "beta_tilde"])
def test_ddpm_with_the_exact_noise_of_a_gaussian(T, sigma):
    schedule = linear_schedule(T)
    x = ddpm_sample(GaussianNoise(schedule), schedule, N, shape=(1,), sigma=sigma, **quiet)
    assert_has_law(x, *ddpm_law(T, sigma))


@pytest.mark.parametrize("steps", [20, 100, 1000])
def test_ddim_with_the_exact_noise_of_a_gaussian(steps):
    schedule = linear_schedule(1000)
    x = ddim_sample(GaussianNoise(schedule), schedule, N, steps=steps, shape=(1,), **quiet)
    assert_has_law(x, *ddim_law(1000, steps))


@pytest.mark.parametrize("T", [20, 100, 1000])
def test_ddim_with_eta_1_over_all_steps_is_ddpm_with_the_small_variance(T):
    schedule = linear_schedule(T)
    x = ddim_sample(GaussianNoise(schedule), schedule, N, steps=T, eta=1.0, shape=(1,), **quiet)
    assert_has_law(x, *ddpm_law(T, "beta_tilde"))


def test_ddim_with_eta_1_over_all_steps_is_ddpm_number_for_number():
    """Both draw one noise a step, so with the same generator not only the law but the very samples agree."""
    schedule = cosine_schedule(60)
    first, second = (torch.Generator().manual_seed(5) for _ in range(2))
    ddpm = ddpm_sample(
        GaussianNoise(schedule),
        schedule,
        500,
        shape=(2,),
        sigma="beta_tilde",
        generator=first,
        **quiet,
    )
    ddim = ddim_sample(
        GaussianNoise(schedule), schedule, 500, 60, eta=1.0, shape=(2,), generator=second, **quiet
    )
    torch.testing.assert_close(ddpm, ddim, rtol=0, atol=2e-4)


def test_ddim_with_a_middle_eta():
    """DDIM Eq. 12 and 16 with η = 0.5 in float64: √ᾱ_{t-1} x̂_0 + √(1-ᾱ_{t-1}-σ²) ε + σ z."""
    T, steps, eta = 1000, 40, 0.5
    alpha_bars, mean, variance = linear_alpha_bars(T), 0.0, 1.0
    for i in range(steps):
        now, then = (alpha_bars[T - (i + k) * T // steps] for k in (0, 1))
        a, b = exact_line(now)
        sigma = eta * math.sqrt((1 - then) / (1 - now)) * math.sqrt(1 - now / then)
        along = math.sqrt(1 - then - sigma**2)
        factor = math.sqrt(then / now) * (1 - math.sqrt(1 - now) * a) + along * a
        mean = factor * mean + (along - math.sqrt(then / now) * math.sqrt(1 - now)) * b
        variance = factor**2 * variance + sigma**2
    schedule = linear_schedule(T)
    x = ddim_sample(GaussianNoise(schedule), schedule, N, steps=steps, eta=eta, shape=(1,), **quiet)
    assert_has_law(x, mean, variance)


def test_the_error_at_finite_steps_vanishes_as_they_grow():
    """Fact: N(0.3, 0.2²), linear T = 1000, comes out with a standard deviation of 0.14 in 20 steps of DDIM, 0.186 in 100."""
    schedule = linear_schedule(1000)
    noise = GaussianNoise(schedule)
    ddim = [
        float(ddim_sample(noise, schedule, N, steps=s, shape=(1,), **quiet).std())
        for s in (20, 100, 1000)
    ]
    error = 5 * STD / math.sqrt(2 * N)
    assert ddim[0] == pytest.approx(0.14, abs=0.005) and ddim[1] == pytest.approx(0.186, abs=error)
    assert STD - ddim[0] > 3 * (STD - ddim[1]) and STD - ddim[1] > 3 * (STD - ddim[2])
    for sigma in ("beta", "beta_tilde"):
        off = []
        for T in (20, 100, 1000):
            schedule = linear_schedule(T)
            x = ddpm_sample(GaussianNoise(schedule), schedule, N, shape=(1,), sigma=sigma, **quiet)
            off.append(abs(float(x.std()) - STD))
        assert off[0] > 2 * off[1] and off[1] > 2 * off[2]
        # and the exact recursion, which the sampler was shown to follow, goes to the truth like 1/T
        law = [abs(math.sqrt(ddpm_law(T, sigma)[1]) - STD) for T in (1000, 10_000)]
        assert law[1] < law[0] / 5 and law[1] < 1e-3
        assert ddpm_law(10_000, sigma)[0] == pytest.approx(MEAN, abs=2e-3)


# ------------------------------------------------------------------ two bumps

BUMPS = [(0.4, -0.5, 0.15), (0.6, 0.6, 0.1)]  # weight, mean, standard deviation


def bumps_noise(schedule):
    """-√(1-ᾱ) times the score of q(x_t), by autograd on its log-density: no formula shared with the helper."""

    def noise(xt, t):
        alpha_bar = float(schedule.alpha_bars[int(t[0])])
        x = xt.double().requires_grad_()
        with torch.enable_grad():
            parts = [
                math.log(w) - (x - math.sqrt(alpha_bar) * m) ** 2 / (2 * v) - math.log(v) / 2
                for w, m, v in ((w, m, alpha_bar * s**2 + 1 - alpha_bar) for w, m, s in BUMPS)
            ]
            log_q = torch.logsumexp(torch.stack(parts), dim=0).sum()
        return (-math.sqrt(1 - alpha_bar) * torch.autograd.grad(log_q, x)[0]).float()

    return noise


def draw_bumps(n):
    which = torch.rand(n) < BUMPS[0][0]
    (_, m1, s1), (_, m2, s2) = BUMPS
    return torch.where(which, m1 + s1 * torch.randn(n), m2 + s2 * torch.randn(n))


def kolmogorov_smirnov(x, y):
    """The largest distance of two samples' distribution functions."""
    x, y = np.sort(x.numpy().ravel()), np.sort(y.numpy().ravel())
    everywhere = np.concatenate([x, y])
    return np.abs(
        np.searchsorted(x, everywhere, "right") / len(x)
        - np.searchsorted(y, everywhere, "right") / len(y)
    ).max()


@pytest.mark.parametrize("sampler", ["beta", "beta_tilde", "ddim"])
def test_two_bumps_at_1000_steps(sampler):
    n, schedule = 8000, linear_schedule(1000)
    noise = bumps_noise(schedule)
    if sampler == "ddim":
        x = ddim_sample(noise, schedule, n, steps=1000, shape=(1,), **quiet)
    else:
        x = ddpm_sample(noise, schedule, n, shape=(1,), sigma=sampler, **quiet)
    limit = 1.95 * math.sqrt(2 / n)  # passed by chance once in a thousand samples of the same law
    assert kolmogorov_smirnov(x, draw_bumps(n)) < limit
    # that limit does tell: 0.03 off, or one bump a fifth wider, is seen
    assert kolmogorov_smirnov(draw_bumps(n) + 0.03, draw_bumps(n)) > limit


def test_few_steps_are_seen_by_that_distance():
    schedule, n = linear_schedule(1000), 8000
    x = ddim_sample(bumps_noise(schedule), schedule, n, steps=8, shape=(1,), **quiet)
    assert kolmogorov_smirnov(x, draw_bumps(n)) > 1.95 * math.sqrt(2 / n)


# ------------------------------------------------------------------ step by step


def half(xt, t):
    """A model that is wrong but simple."""
    return 0.5 * xt


@pytest.mark.parametrize("sigma", ["beta", "beta_tilde"])
def test_ddpm_adds_noise_of_the_right_size_but_none_in_the_last_step(sigma):
    T, n = 12, 20_000
    betas = np.linspace(0.02, 0.4, T)  # mild, so that a wrong model's x_t stays small
    schedule, alpha_bars = NoiseSchedule(betas), np.concatenate([[1.0], np.cumprod(1 - betas)])
    way = ddpm_sample(
        half, schedule, n, shape=(1,), sigma=sigma, return_trajectory=True, **quiet
    ).double()
    for t in range(T, 0, -1):
        now, then = way[T - t], way[T - t + 1]
        alpha = alpha_bars[t] / alpha_bars[t - 1]
        mean = (now - (1 - alpha) / math.sqrt(1 - alpha_bars[t]) * 0.5 * now) / math.sqrt(alpha)
        added = then - mean
        small = (1 - alpha) * (1 - alpha_bars[t - 1]) / (1 - alpha_bars[t])
        variance = 1 - alpha if sigma == "beta" else small
        if t == 1:
            assert float(added.abs().max()) < 1e-4
        else:
            assert abs(float(added.var()) - variance) < 5 * variance * math.sqrt(2 / n) + 1e-6, t
            assert abs(float(added.mean())) < 5 * math.sqrt(variance / n) + 1e-5, t


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_ends_at_the_predicted_x0(eta):
    schedule = linear_schedule(100)
    way = ddim_sample(half, schedule, 50, 10, eta=eta, shape=(3,), return_trajectory=True, **quiet)
    last_but_one = way[-2]  # at t = 10
    alpha_bar = float(schedule.alpha_bars[10])
    predicted = (last_but_one - math.sqrt(1 - alpha_bar) * 0.5 * last_but_one) / math.sqrt(
        alpha_bar
    )
    torch.testing.assert_close(way[-1], predicted, rtol=1e-4, atol=1e-5)


def test_ddim_with_eta_0_draws_nothing_after_x_T():
    schedule, x_T = linear_schedule(100), torch.randn(4, 1, 8, 8)
    before = torch.get_rng_state()
    first = ddim_sample(half, schedule, 4, 10, shape=(1, 8, 8), x_T=x_T, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(
        first, ddim_sample(half, schedule, 4, 10, shape=(1, 8, 8), x_T=x_T, progress=False)
    )


@pytest.mark.parametrize("T", [7, 50, 1000])
def test_ddim_visits_as_many_different_steps_as_asked_for(T):
    schedule = linear_schedule(T)
    for steps in range(1, T + 1) if T <= 50 else (1, 2, 3, 7, 30, 333, 999, 1000):
        seen = []

        def model(xt, t):
            assert t.shape == (2,) and t.dtype == torch.int64 and t[0] == t[1]
            seen.append(int(t[0]))
            return xt

        ddim_sample(model, schedule, 2, steps, shape=(1,), progress=False)
        assert len(seen) == steps and seen[0] == T and seen[-1] >= 1
        gaps = [a - b for a, b in zip(seen, seen[1:] + [0])]
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1  # evenly spaced


def test_ddpm_visits_every_step():
    seen = []

    def model(xt, t):
        assert t.shape == (3,) and t.dtype == torch.int64
        seen.append(int(t[0]))
        return xt

    ddpm_sample(model, linear_schedule(15), 3, shape=(1,), progress=False)
    assert seen == list(range(15, 0, -1))


# ------------------------------------------------------------------ clipping


def far_off(xt, t):
    """Says so much noise that x̂_0 is far outside [-1, 1]."""
    return -5 * torch.ones_like(xt)


@pytest.mark.parametrize("sample", [ddpm_sample, ddim_sample, dpm_solver_sample])
def test_clip_keeps_x0_in_range_and_no_clip_does_not(sample):
    schedule = cosine_schedule(50)
    clipped = sample(far_off, schedule, 8, shape=(1, 4, 4), progress=False)
    assert float(clipped.max()) == pytest.approx(1, abs=1e-6) and float(clipped.min()) >= -1
    assert (
        float(sample(far_off, schedule, 8, shape=(1, 4, 4), clip=False, progress=False).max()) > 1.5
    )


def test_ddpm_clips_the_predicted_x0_and_not_xt():
    schedule, x_T = cosine_schedule(50), torch.full((1, 4), 3.0)
    way = ddpm_sample(
        far_off, schedule, 1, shape=(4,), x_T=x_T, return_trajectory=True, progress=False
    )
    assert torch.equal(way[0], x_T)  # outside [-1, 1], and left so
    mean, _ = schedule.q_posterior(
        torch.ones(20_000), torch.full((20_000,), 0.2), torch.full((20_000,), 25)
    )
    half_way = NoiseSchedule(schedule.betas[1:26])  # the same chain, its last 25 steps only
    many = ddpm_sample(
        far_off,
        half_way,
        20_000,
        shape=(),
        x_T=torch.full((20_000,), 0.2),
        return_trajectory=True,
        progress=False,
    )
    error = 5 * math.sqrt(float(schedule.betas[25]) / 20_000)
    assert float(many[1].mean()) == pytest.approx(float(mean[0]), abs=error)


def test_ddim_recomputes_the_noise_after_clipping():
    schedule, x_T = cosine_schedule(50), torch.tensor([[0.5]])
    way = ddim_sample(
        far_off, schedule, 1, 5, shape=(1,), x_T=x_T, return_trajectory=True, progress=False
    )
    for i in range(5):
        now, then = (float(schedule.alpha_bars[50 - 10 * k]) for k in (i, i + 1))
        x = float(way[i])
        noise = (x - math.sqrt(now) * 1.0) / math.sqrt(1 - now)  # ε that goes with x̂_0 = 1
        assert float(way[i + 1]) == pytest.approx(
            math.sqrt(then) * 1.0 + math.sqrt(1 - then) * noise, abs=1e-4
        )


def test_clipping_changes_nothing_where_nothing_is_outside():
    schedule, x_T = linear_schedule(50), torch.randn(16, 2)
    both = [
        ddim_sample(
            to_a_tenth(schedule), schedule, 16, 25, shape=(2,), x_T=x_T, clip=clip, progress=False
        )
        for clip in (True, False)
    ]
    torch.testing.assert_close(*both, rtol=0, atol=1e-3)
    torch.testing.assert_close(both[0], torch.full((16, 2), 0.1), rtol=0, atol=1e-3)


# ------------------------------------------------------------------ stops


@pytest.mark.parametrize("steps, power", [(1, 1.0), (7, 1.0), (50, 1.0), (10, 1.6), (50, 3.0)])
def test_stops_fall_from_T_to_0(steps, power):
    found = stops(50, steps, power)
    assert found[0] == 50 and found[-1] == 0 and all(isinstance(stop, int) for stop in found)
    assert all(a > b for a, b in zip(found[:-1], found[1:]))
    assert len(found) == steps + 1 or power > 1
    gaps = [a - b for a, b in zip(found[:-1], found[1:])]
    assert max(gaps) - min(gaps) <= 1 if power == 1 else gaps[0] <= gaps[-1]


@pytest.mark.parametrize("sample", [ddim_sample, dpm_solver_sample])
def test_stops_of_ones_own(sample):
    schedule, x_T, seen = linear_schedule(50), torch.randn(3, 2), []

    def model(xt, t):
        seen.append(int(t[0]))
        return 0.5 * xt

    x = sample(model, schedule, 3, steps=[50, 31, 8, 0], shape=(2,), x_T=x_T, progress=False)
    assert seen == [50, 31, 8] and x.shape == (3, 2)
    even = sample(half, schedule, 3, steps=stops(50, 5, 1.0), shape=(2,), x_T=x_T, progress=False)
    if sample is ddim_sample:
        assert torch.equal(
            even, sample(half, schedule, 3, steps=5, shape=(2,), x_T=x_T, progress=False)
        )


@pytest.mark.parametrize("wrong", [[50, 8], [50, 8, 8, 0], [8, 50, 0], [51, 8, 0], [0], []])
def test_stops_that_do_not_fall_to_0_are_refused(wrong):
    with pytest.raises(ValueError, match="stops must fall"):
        ddim_sample(half, linear_schedule(50), 1, steps=wrong, shape=(1,), progress=False)


# ------------------------------------------------------------------ arguments and what comes back


@pytest.mark.parametrize(
    "sample, stages",
    [
        (ddpm_sample, 21),
        (lambda *a, **k: ddim_sample(*a, steps=6, **k), 7),
        (lambda *a, **k: dpm_solver_sample(*a, steps=6, **k), 7),
    ],
    ids=["ddpm", "ddim", "dpm_solver"],
)
def test_shapes_generator_and_trajectory(sample, stages):
    schedule = linear_schedule(20)
    for shape in ((), (1,), (2,), (1, 28, 28), [3, 8, 4]):
        x = sample(half, schedule, 3, shape=shape, progress=False)
        assert x.shape == (3, *shape) and x.dtype == torch.float32 and not x.requires_grad
    assert sample(half, schedule, 1, progress=False).shape == (1, 1, 28, 28)

    first, again, other = (
        sample(
            half,
            schedule,
            2,
            shape=(5,),
            progress=False,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.get_rng_state()
    sample(
        half, schedule, 2, shape=(5,), progress=False, generator=torch.Generator().manual_seed(1)
    )
    # with a generator the global one is left alone
    assert torch.equal(torch.get_rng_state(), state)

    x_T = torch.randn(2, 5)
    kept = x_T.clone()
    way = sample(
        half,
        schedule,
        2,
        shape=(5,),
        x_T=x_T,
        return_trajectory=True,
        progress=False,
        generator=torch.Generator().manual_seed(1),
    )
    end = sample(
        half,
        schedule,
        2,
        shape=(5,),
        x_T=x_T,
        progress=False,
        generator=torch.Generator().manual_seed(1),
    )
    assert way.shape == (stages, 2, 5) and way.device.type == "cpu"
    assert torch.equal(way[0], kept) and torch.equal(way[-1], end)
    assert torch.equal(x_T, kept)  # the caller's x_T is not written to


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_start_in_another_float_type_is_taken(dtype):
    x = ddim_sample(
        half, linear_schedule(50), 2, 3, shape=(4,), x_T=torch.randn(2, 4).to(dtype), progress=False
    )
    assert x.dtype == torch.float32


@pytest.mark.parametrize("sample", [ddpm_sample, ddim_sample, dpm_solver_sample])
def test_no_gradients_are_kept(sample):
    model = torch.nn.Linear(4, 4)
    x = sample(lambda xt, t: model(xt), linear_schedule(50), 2, shape=(4,), progress=False)
    assert not x.requires_grad


def test_the_bar_shows_or_not(capsys):
    ddim_sample(half, linear_schedule(10), 1, 5, shape=(1,), progress=False)
    assert capsys.readouterr() == ("", "")
    ddim_sample(half, linear_schedule(10), 1, 5, shape=(1,))
    out, err = capsys.readouterr()
    assert "sampling" in out and "5/5" in out and err == ""  # stderr is red in a notebook


# ------------------------------------------------------------------ against diffusers, where it happens to be installed


def diffusers_options(schedule):
    return {
        "num_train_timesteps": schedule.T,
        "trained_betas": schedule.betas[1:].numpy(),
        "clip_sample": True,
        "prediction_type": "epsilon",
    }


@pytest.mark.parametrize("sigma, theirs", [("beta", "fixed_large"), ("beta_tilde", "fixed_small")])
def test_ddpm_is_diffusers_ddpm(sigma, theirs):
    """Step by step from the same x_T with the same draws; their t is one less than the paper's."""
    diffusers = pytest.importorskip("diffusers")
    schedule, x_T = linear_schedule(100), torch.randn(4, 1, 8, 8)
    way = ddpm_sample(
        half,
        schedule,
        4,
        shape=(1, 8, 8),
        sigma=sigma,
        x_T=x_T,
        return_trajectory=True,
        generator=torch.Generator().manual_seed(7),
        progress=False,
    )
    scheduler = diffusers.DDPMScheduler(variance_type=theirs, **diffusers_options(schedule))
    generator, x = torch.Generator().manual_seed(7), x_T
    for t in range(99, -1, -1):
        x = scheduler.step(half(x, None), t, x, generator=generator).prev_sample
        torch.testing.assert_close(way[100 - t], x, rtol=0, atol=2e-4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_is_diffusers_ddim(eta):
    diffusers = pytest.importorskip("diffusers")
    schedule, x_T = linear_schedule(1000), torch.randn(4, 1, 8, 8)
    way = ddim_sample(
        half,
        schedule,
        4,
        50,
        eta=eta,
        shape=(1, 8, 8),
        x_T=x_T,
        return_trajectory=True,
        generator=torch.Generator().manual_seed(7),
        progress=False,
    )
    scheduler = diffusers.DDIMScheduler(
        timestep_spacing="trailing", set_alpha_to_one=True, **diffusers_options(schedule)
    )
    scheduler.set_timesteps(50)
    assert [int(t) + 1 for t in scheduler.timesteps] == list(range(1000, 0, -20))
    generator, x = torch.Generator().manual_seed(7), x_T
    for i, t in enumerate(scheduler.timesteps):
        if eta and i == 49:
            break  # they add noise of size 0 there or draw it anyway, by version; the end is tested above
        x = scheduler.step(
            half(x, None), t, x, eta=eta, use_clipped_model_output=True, generator=generator
        ).prev_sample
        torch.testing.assert_close(way[i + 1], x, rtol=0, atol=2e-4)
