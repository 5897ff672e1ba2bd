"""The forward process: a schedule's arrays and the formulas that use them, against the chain."""

import math

import pytest
import torch

import ddpm_utils as d

each_schedule = pytest.mark.parametrize("T, s", [
    pytest.param(T, make(T), id=f"{make.__name__}({T})")
    for make in (d.linear_schedule, d.cosine_schedule) for T in (10, 20, 50, 200, 1000)])


@each_schedule
def test_form_of_the_arrays_and_almost_nothing_is_left_at_T(T, s):
    assert s.T == T and 0 < s.alpha_bars[T] < 1e-4
    for values in (s.betas, s.alphas, s.alpha_bars, s.signal_scale, s.noise_scale):
        assert values.shape == (T + 1,) and values.dtype == torch.float32
        assert values.isfinite().all()
    # entry 0 is the clean picture
    assert (s.betas[0], s.alphas[0], s.alpha_bars[0], s.noise_scale[0]) == (0, 1, 1, 0)
    assert s.q_posterior(torch.ones(1), torch.ones(1), torch.tensor([1]))[1] == 0
    assert (s.betas[1:] > 0).all() and float(s.betas.max()) <= 0.999 + 1e-7
    assert (s.alpha_bars.diff() < 0).all() and (s.snr().diff() < 0).all()
    a = s.alpha_bars.double()
    torch.testing.assert_close(s.snr().double(), a / (1 - a), rtol=2e-3, atol=0)  # ∞ at 0


def test_linear_betas_by_hand():
    for T in (10, 200, 1000):
        for t in (1, 2, T // 2, T):
            beta = (1e-4 + (0.02 - 1e-4) * (t - 1) / (T - 1)) * 1000 / T
            found = float(d.linear_schedule(T).betas[t])
            assert found == pytest.approx(min(beta, 0.999), rel=1e-6)


def test_cosine_alpha_bars_by_hand():
    s = d.cosine_schedule(1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1000)]
    for t in (1, 10, 250, 500, 900, 990):  # before β reaches 0.999, near T
        assert float(s.alpha_bars[t]) == pytest.approx(f[t] / f[0], rel=1e-5)
        assert float(s.betas[t]) == pytest.approx(1 - f[t] / f[t - 1], rel=1e-5)
    assert float(s.betas[1000]) == pytest.approx(0.999)
    assert d.linear_schedule().T == d.cosine_schedule().T == 1000


@each_schedule
def test_closed_form_is_the_iterated_chain_exactly(T, s):
    """x_t = √α x_{t-1} + √β ε keeps the mean's factor and the variance in two short recursions."""
    factor, variance = 1.0, 0.0
    for t, beta in enumerate(s.betas.tolist()):
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        # float32 β leave a relative error of about 1e-7 a step in the factor,
        # more where 1 - β is small
        assert float(s.signal_scale[t]) == pytest.approx(factor, rel=5e-4), t
        assert float(s.noise_scale[t]) ** 2 == pytest.approx(variance, rel=5e-5), t


@pytest.mark.parametrize("trailing", [(), (2,), (1, 28, 28), (3, 16, 8)])
def test_any_trailing_shape_and_each_picture_its_own_t(trailing):
    s, t = d.cosine_schedule(100), torch.tensor([1, 30, 2, 100, 99])
    x0, noise = torch.rand(5, *trailing), torch.randn(5, *trailing)
    assert torch.equal(s.q_sample(x0, 0 * t, noise), x0)
    xt = s.q_sample(x0, t, noise)
    mean, variance = s.q_posterior(x0, xt, t)
    assert xt.shape == mean.shape == x0.shape and variance.shape == (5, *[1] * len(trailing))
    for i in range(5):  # one by one gives the same
        one, a = slice(i, i + 1), float(s.alpha_bars[t[i]])
        by_hand = math.sqrt(a) * x0[i] + math.sqrt(1 - a) * noise[i]
        torch.testing.assert_close(xt[i], by_hand, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(s.q_posterior(x0[one], xt[one], t[one])[0][0], mean[i])


@each_schedule
def test_predict_x0_undoes_q_sample(T, s):
    t = torch.arange(1, T + 1)
    x0, noise = torch.rand(T, 1, 8, 8) * 2 - 1, torch.randn(T, 1, 8, 8)
    back = s.predict_x0(s.q_sample(x0, t, noise), t, noise)
    # float32's rounding, divided by the signal's scale
    assert ((back - x0).flatten(1).abs().amax(dim=1) < 1e-5 / s.signal_scale[t]).all()


def test_to_moves_a_copy():
    s = d.linear_schedule(10)
    moved = s.to("meta")  # a device that every machine has
    assert moved.T == 10 and isinstance(moved, d.NoiseSchedule)
    assert (moved.betas.device.type, s.betas.device.type) == ("meta", "cpu")


def test_computed_in_float64():
    """With a thousand tiny β a float32 product of α would be off in the fifth digit of 1 - ᾱ."""
    found = float(d.NoiseSchedule([1e-7] * 1000).noise_scale[1000]) ** 2
    assert found == pytest.approx(1 - (1 - 1e-7) ** 1000, rel=1e-6)


# ---- the mixture (its density in one dimension: in test_03, with the best guess)

PLANE = d.GaussianMixture([0.3, 0.7], [[0.0, 1.0], [1.5, -0.5]], [0.2, 0.4])


def test_density_in_the_plane_integrates_to_one():
    side = torch.linspace(-6, 6, 601)
    density = PLANE.log_density(torch.cartesian_prod(side, side), 0.7, 0.7).exp()
    assert float(density.sum() * 0.02**2) == pytest.approx(1, abs=1e-4)


def test_a_batch_may_have_a_noise_level_of_its_own_for_each_point():
    x, (signal, noise) = torch.randn(3, 2), torch.tensor([[0.9, 0.5, 0.2], [0.3, 0.8, 1.0]])
    together = PLANE.log_density(x, signal, noise)
    for i in range(3):
        alone = PLANE.log_density(x[i : i + 1], float(signal[i]), float(noise[i]))
        assert float(together[i]) == pytest.approx(float(alone), abs=1e-5)


def test_samples_have_the_shares_and_spreads_of_the_bumps():
    n = 40_000
    x = d.two_bumps().sample(n, torch.Generator().manual_seed(1))
    left = x < -0.15  # the bumps hardly overlap
    assert x.shape == (n,) and abs(float(left.float().mean()) - 0.35) < 5 * math.sqrt(0.23 / n)
    assert float(x[left].mean()) == pytest.approx(-0.7, abs=0.006)
    assert float(x[~left].std()) == pytest.approx(0.18, abs=0.006)
    assert PLANE.sample(5).shape == (5, 2)
