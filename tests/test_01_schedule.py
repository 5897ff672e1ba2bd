"""The forward process: a schedule's arrays and the three formulas that use them, against a chain."""

import math

import numpy as np
import pytest
import torch

import ddpm_utils as d

SCHEDULES = [d.linear_schedule, d.cosine_schedule]
each_schedule = pytest.mark.parametrize("make", SCHEDULES, ids=["linear", "cosine"])


def steps(*values):
    return torch.tensor(values, dtype=torch.int64)


@each_schedule
@pytest.mark.parametrize("T", [10, 50, 200, 1000])
def test_form_of_the_arrays(make, T):
    schedule = make(T)
    for name in ("betas", "alphas", "alpha_bars", "signal_scale", "noise_scale"):
        values = getattr(schedule, name)
        assert values.shape == (T + 1,) and values.dtype == torch.float32, name
        assert torch.isfinite(values).all(), name
    # entry 0 is the clean image
    assert schedule.betas[0] == 0 and schedule.alphas[0] == 1 and schedule.alpha_bars[0] == 1
    assert schedule.noise_scale[0] == 0 and schedule.T == T
    assert schedule.q_posterior(torch.ones(1), torch.ones(1), steps(1))[1] == 0
    assert (schedule.betas[1:] > 0).all() and float(schedule.betas.max()) <= 0.999 + 1e-7
    # almost nothing is left at T
    assert (schedule.alpha_bars.diff() < 0).all() and 0 < schedule.alpha_bars[T] < 1e-4


def test_a_short_chain_with_the_betas_of_a_long_one_keeps_signal():
    betas = np.linspace(1e-4, 0.02, 200)
    left = math.prod(1 - b for b in betas)
    assert left == pytest.approx(0.13, abs=0.005)
    assert float(d.NoiseSchedule(betas).alpha_bars[200]) == pytest.approx(left, rel=1e-5)


def test_linear_betas_by_hand():
    for T in (10, 200, 1000):
        schedule = d.linear_schedule(T)
        for t in (1, 2, T // 2, T):
            beta = (1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)) * 1000 / T
            assert float(schedule.betas[t]) == pytest.approx(min(beta, 0.999), rel=1e-6)
    schedule = d.linear_schedule()
    assert float(schedule.betas[1]) == pytest.approx(1e-4) and schedule.T == 1000


def test_cosine_alpha_bars_by_hand():
    T, s = 1000, 0.008
    schedule = d.cosine_schedule(T)

    def f(t):
        return math.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2

    for t in (1, 10, 250, 500, 900, 990):  # before β reaches 0.999, near T
        assert float(schedule.alpha_bars[t]) == pytest.approx(f(t) / f(0), rel=1e-5)
        assert float(schedule.betas[t]) == pytest.approx(1 - f(t) / f(t - 1), rel=1e-5)
    assert float(schedule.betas[T]) == pytest.approx(0.999)


@each_schedule
@pytest.mark.parametrize("T", [20, 1000])
def test_closed_form_is_the_iterated_chain_exactly(make, T):
    """x_t = √α x_{t-1} + √β ε keeps the mean's factor and the variance in two short recursions."""
    schedule = make(T)
    factor, variance = 1.0, 0.0
    for t in range(1, T + 1):
        beta = float(schedule.betas[t])
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        # float32 β leave a relative error of about 1e-7 a step in the factor,
        # more where 1 - β is small
        assert float(schedule.signal_scale[t]) == pytest.approx(factor, rel=5e-4), t
        assert float(schedule.noise_scale[t]) ** 2 == pytest.approx(variance, rel=5e-5), t


@pytest.mark.parametrize("trailing", [(), (2,), (1, 28, 28), (3, 16, 8)])
def test_any_trailing_shape_and_each_image_its_own_t(trailing):
    schedule = d.cosine_schedule(100)
    x0, noise, t = torch.rand(5, *trailing), torch.randn(5, *trailing), steps(1, 30, 2, 100, 99)
    xt = schedule.q_sample(x0, t, noise)
    mean, variance = schedule.q_posterior(x0, xt, t)
    assert xt.shape == mean.shape == x0.shape
    assert variance.shape == (5, *[1] * len(trailing))
    assert torch.equal(schedule.q_sample(x0, 0 * t, noise), x0)  # t = 0 gives x_0 back
    for i in range(5):  # one by one gives the same
        one = slice(i, i + 1)
        signal = math.sqrt(schedule.alpha_bars[t[i]])
        spread = math.sqrt(1 - float(schedule.alpha_bars[t[i]]))
        torch.testing.assert_close(xt[i], signal * x0[i] + spread * noise[i], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(schedule.q_posterior(x0[one], xt[one], t[one])[0][0], mean[i])


@each_schedule
def test_predict_x0_undoes_q_sample(make):
    schedule = make(1000)
    t = steps(1, 10, 300, 700, 950)
    x0, noise = torch.rand(5, 1, 8, 8) * 2 - 1, torch.randn(5, 1, 8, 8)
    back = schedule.predict_x0(schedule.q_sample(x0, t, noise), t, noise)
    error = (back - x0).flatten(1).abs().amax(dim=1)
    # float32's rounding, divided by the signal's scale
    assert (error < 1e-5 / schedule.signal_scale[t]).all()


def test_snr():
    schedule = d.linear_schedule(100)
    snr = schedule.snr()
    assert snr.shape == (101,) and torch.isinf(snr[0])
    a = schedule.alpha_bars[1:].double()
    torch.testing.assert_close(snr[1:].double(), a / (1 - a), rtol=2e-3, atol=0)
    assert (snr.diff()[1:] < 0).all()


def test_to_moves_a_copy():
    schedule = d.linear_schedule(10)
    moved = schedule.to("meta")  # a device that every machine has
    assert moved.T == 10 and isinstance(moved, d.NoiseSchedule)
    assert all(v.device.type == "meta" for v in vars(moved).values() if torch.is_tensor(v))
    assert schedule.betas.device.type == "cpu"


def test_computed_in_float64():
    """With a thousand tiny β a float32 product of α would be off in the fifth digit of 1 - ᾱ."""
    schedule = d.NoiseSchedule([1e-7] * 1000)
    exact = 1 - (1 - 1e-7) ** 1000
    assert float(schedule.noise_scale[1000]) ** 2 == pytest.approx(exact, rel=1e-6)


def test_at_picks_and_reshapes():
    values = torch.arange(5.0)
    picked = d.at(values, steps(4, 2), torch.zeros(2, 3, 4))
    assert picked.shape == (2, 1, 1) and picked.flatten().tolist() == [4, 2]
    assert d.at(values, steps(3), torch.zeros(1)).shape == (1,)


# ------------------------------------------------------------------ the mixture

PLANE = ([0.3, 0.7], [[0.0, 1.0], [1.5, -0.5]], [0.2, 0.4])


@pytest.mark.parametrize("signal, noise", [(1.0, 0.0), (0.8, 0.6), (0.1, 0.995)])
def test_the_noised_mixture_is_the_convolution_of_the_clean_one(signal, noise):
    """q(x) = the sum over x_0 of q(x_0) N(x; signal x_0, noise²), on a grid, in numpy."""
    x = torch.tensor([-1.0, -0.2, 0.4, 1.1])
    grid = np.linspace(-3, 3, 60_001)
    clean = sum(w / (s * math.sqrt(2 * math.pi)) * np.exp(-((grid - m) ** 2) / (2 * s**2)) for w, m,
                s in ((0.35, -0.7, 0.12), (0.65, 0.5, 0.18)))
    for value, found in zip(x.tolist(), d.two_bumps().log_density(x, signal, noise).exp().tolist()):
        if noise == 0:
            expected = np.interp(value, grid, clean)
        else:
            kernel = np.exp(-((value - signal * grid) ** 2) / (2 * noise**2))
            expected = (clean * kernel).sum() * 1e-4 / (noise * math.sqrt(2 * math.pi))
        assert found == pytest.approx(expected, rel=1e-4)


def test_density_in_the_plane_integrates_to_one():
    side = torch.linspace(-6, 6, 601)
    log_density = d.GaussianMixture(*PLANE).log_density(torch.cartesian_prod(side, side), 0.7, 0.7)
    assert float(log_density.exp().sum() * 0.02**2) == pytest.approx(1, abs=1e-4)


def test_a_batch_may_have_a_noise_level_of_its_own_for_each_point():
    mixture, x = d.GaussianMixture(*PLANE), torch.randn(3, 2)
    signal, noise = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.3, 0.8, 1.0])
    together = mixture.log_density(x, signal, noise)
    for i in range(3):
        alone = mixture.log_density(x[i : i + 1], float(signal[i]), float(noise[i]))
        assert float(together[i]) == pytest.approx(float(alone), abs=1e-5)


def test_samples_have_the_shares_and_spreads_of_the_bumps():
    n = 40_000
    x = d.two_bumps().sample(n, torch.Generator().manual_seed(1))
    left = x < -0.15  # the bumps hardly overlap
    assert x.shape == (n,) and abs(float(left.float().mean()) - 0.35) < 5 * math.sqrt(0.23 / n)
    assert float(x[left].mean()) == pytest.approx(-0.7, abs=0.006)
    assert float(x[~left].std()) == pytest.approx(0.18, abs=0.006)
    assert d.GaussianMixture(*PLANE).sample(5).shape == (5, 2)
