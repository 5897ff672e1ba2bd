"""From the bound to L_simple: Bayes on a grid, integrals, and a second road to Eq. 12's weight."""

import math

import numpy as np
import pytest
import torch

import ddpm_utils as d

each_schedule = pytest.mark.parametrize("make", [d.linear_schedule, d.cosine_schedule])
each_loss = pytest.mark.parametrize("loss", [d.simple_loss, d.v_loss, d.min_snr_loss])


def density(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


@each_schedule
@pytest.mark.parametrize(
    "T, t", [(1000, 2), (1000, 50), (1000, 500), (1000, 990), (20, 2), (20, 19), (20, 20)])
def test_posterior_is_bayes_on_a_grid(make, T, t):
    """q(x_{t-1} given x_t, x_0) ∝ q(x_t given x_{t-1}) q(x_{t-1} given x_0), multiplied out."""
    s, x0 = make(T), 0.6
    xt = float(s.signal_scale[t] * x0 - 1.3 * s.noise_scale[t])  # 1.3 deviations below its mean
    mean, variance = map(float, s.q_posterior(*torch.tensor([[x0], [xt]]), torch.tensor([t])))
    beta, before = float(s.betas[t]), float(s.alpha_bars[t - 1])
    centre, spread = math.sqrt(before) * x0, math.sqrt(1 - before)
    grid = np.linspace(centre - 9 * spread, centre + 9 * spread, 400_001)
    product = density(xt, math.sqrt(1 - beta) * grid, beta) * density(grid, centre, 1 - before)
    product /= product.sum()
    grid_mean = (grid * product).sum()
    assert mean == pytest.approx(grid_mean, abs=2e-4 * max(1, math.sqrt(variance)))
    # 1 - ᾱ_1 from float32 has three digits less
    assert variance == pytest.approx(((grid - grid_mean) ** 2 * product).sum(), rel=2e-3)
    at_1 = map(float, s.q_posterior(*torch.tensor([[x0], [-3.0]]), torch.tensor([1])))
    assert [*at_1] == [pytest.approx(x0, abs=1e-6), 0]  # x_0 itself


def test_small_and_large_variance_differ_only_at_small_t():
    s, zeros = d.linear_schedule(1000), torch.zeros(1000)
    ratio = s.q_posterior(zeros, zeros, torch.arange(1, 1001))[1] / s.betas[1:]
    assert ratio[[2 - 1, 51 - 1]].tolist() == pytest.approx([0.45, 0.96], abs=0.005)
    assert (ratio[51:] > 0.96).all() and (ratio < 1).all()


@each_schedule
@pytest.mark.parametrize("t", [2, 10, 60, 100, 349, 700, 900, 990, 999, 1000])
def test_kl_term_is_the_weighted_noise_error(make, t):
    """L_{t-1}, a numerical integral, is a constant + |μ̃ - μ_θ|²/(2σ²), Eq. 8.

    And that is the constant + weight · |ε - ε_θ|², Eq. 12.
    """
    s, step = make(1000), torch.tensor([t])
    x0, noise, guess = torch.tensor([[0.4], [0.9], [-0.2]])
    xt = s.q_sample(x0, step, noise)
    mean, variance = map(float, s.q_posterior(x0, xt, step))
    model_mean = float(s.q_posterior(s.predict_x0(xt, step, guess), xt, step)[0])
    beta, alpha, a = (float(v[t]) for v in (s.betas, s.alphas, s.alpha_bars))
    eq_11 = float(xt - beta / math.sqrt(1 - a) * guess) / math.sqrt(alpha)
    assert model_mean == pytest.approx(eq_11, rel=1e-4, abs=2e-4)
    for sigma2 in (beta, variance):
        reach = 12 * math.sqrt(max(variance, sigma2)) + abs(mean - model_mean)
        x = np.linspace(mean - reach, mean + reach, 400_001)
        log_ratio = ((x - model_mean) ** 2 / sigma2 - (x - mean) ** 2 / variance
                     + math.log(sigma2 / variance)) / 2
        integrated = (density(x, mean, variance) * log_ratio).sum() * (x[1] - x[0])
        constant = (variance / sigma2 - 1 + math.log(sigma2 / variance)) / 2  # 0 for β̃
        weight = beta**2 / (2 * sigma2 * alpha * (1 - a))
        eq_8, eq_12 = (mean - model_mean) ** 2 / (2 * sigma2), weight * float(noise - guess) ** 2
        assert integrated == pytest.approx(constant + eq_8, rel=1e-4)
        assert integrated == pytest.approx(constant + eq_12, rel=5e-3)
    # A second road to the weight, for σ_t² = β̃_t: L_{t-1} = ½ (SNR(t-1) - SNR(t)) |x_0 - x̂_0|²
    # (Kingma et al. 2021, arXiv 2107.00630), and |x_0 - x̂_0|² = |ε - ε_θ|²/SNR(t)
    assert weight == pytest.approx(float(s.snr()[t - 1] / s.snr()[t] - 1) / 2, rel=5e-3)


# ---- the best guess that there is


def test_the_noised_mixture_and_the_best_guess_are_bayes_on_a_grid():
    """In numpy: q(x) = ∫ q(x_0) N(x; signal x_0, noise²) dx_0, and E[x_0 given x] is the mean of
    x_0 with the weights q(x_0) N(x; signal x_0, noise²)."""
    bumps, x, grid = d.two_bumps(), torch.tensor([-1.0, -0.2, 0.4, 1.1]), np.linspace(-3, 3, 60_001)
    clean = 0.35 * density(grid, -0.7, 0.12**2) + 0.65 * density(grid, 0.5, 0.18**2)
    assert bumps.log_density(x).exp().numpy() == pytest.approx(np.interp(x, grid, clean), rel=1e-4)
    for signal, noise in ((0.99, 0.1), (0.8, 0.6), (0.1, 0.995)):
        joint = clean * density(x.numpy()[:, None], signal * grid, noise**2)  # (4, 60001)
        q, x0 = bumps.log_density(x, signal, noise).exp(), d.exact_x0(bumps, x, signal, noise)
        assert q.numpy() == pytest.approx(joint.sum(axis=1) * 1e-4, rel=1e-4)
        assert x0.numpy() == pytest.approx(joint @ grid / joint.sum(axis=1), abs=1e-4)


def test_the_exact_noise_is_minus_the_scaled_score():
    """E[ε given x_t] = -√(1-ᾱ) ∇ log q(x_t), by autograd, each point at its own t."""
    s, t = d.cosine_schedule(), torch.tensor([1, 40, 50, 300, 500, 600, 950, 1000])
    plane = d.GaussianMixture([0.3, 0.7], [[0.0, 1.0], [1.5, -0.5]], [0.2, 0.4])
    for mixture in (plane, d.GaussianMixture([1.0], [0.3], [0.2])):
        x = torch.randn(8, *mixture.means.shape[1:], requires_grad=True)
        log_q = mixture.log_density(x, s.signal_scale[t], s.noise_scale[t])
        expected = -d.at(s.noise_scale, t, x) * torch.autograd.grad(log_q.sum(), x)[0]
        found = d.exact_noise_predictor(mixture, s)(x.detach(), t)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ---- the losses


@pytest.mark.parametrize("trailing", [(), (2,), (1, 4, 4)])
def test_simple_loss_is_the_loop(trailing):
    s, t, errors = d.linear_schedule(100), torch.tensor([1, 50, 100]), []
    x0, noise = torch.rand(3, *trailing), torch.randn(3, *trailing)
    for b in range(3):
        a = math.prod(1 - float(beta) for beta in s.betas[1 : t[b] + 1])
        for x, e in zip(x0[b].flatten().tolist(), noise[b].flatten().tolist()):
            errors.append((e - 0.5 * (math.sqrt(a) * x + math.sqrt(1 - a) * e)) ** 2)
    loss = d.simple_loss(lambda xt, t: 0.5 * xt, s, x0, t, noise)
    assert loss.shape == () and float(loss) == pytest.approx(sum(errors) / len(errors), rel=1e-4)


@each_schedule
@pytest.mark.parametrize("gamma", [None, 1, 5, 20.0])
def test_v_loss_weighs_the_error_of_x0(make, gamma):
    """Hang et al. 2023 state their weight for x_0: picture by picture in float64, through
    x̂_0 = √ᾱ x_t - √(1-ᾱ) v̂."""
    s, t, wanted = make(1000), torch.tensor([1, 40, 250, 400, 600, 990]), []
    x0, noise, guess = torch.rand(6, 2, 4) * 2 - 1, torch.randn(6, 2, 4), torch.randn(6, 2, 4)
    for a, x, e, v in zip(*(values.double() for values in (s.alpha_bars[t], x0, noise, guess))):
        signal, spread, snr = a.sqrt(), (1 - a).sqrt(), float(a / (1 - a))
        of_x0 = float((signal * (signal * x + spread * e) - spread * v - x).square().mean())
        wanted.append(of_x0 * (snr + 1 if gamma is None else min(snr, gamma)))
    loss = d.v_loss(lambda xt, t: guess, s, x0, t, noise, gamma)
    assert loss.shape == () and float(loss) == pytest.approx(sum(wanted) / 6, rel=2e-3)
    if gamma == 5:
        assert torch.equal(loss, d.min_snr_loss(lambda xt, t: guess, s, x0, t, noise))


@each_loss
def test_t_is_drawn_evenly_from_1_to_T_and_noise_is_standard_normal_anew_in_every_call(loss):
    s, T, n, seen = d.linear_schedule(5), 5, 20_000, []

    def model(xt, t):
        seen.append((xt, t))
        return 0.5 * xt

    torch.manual_seed(3)
    first, second = loss(model, s, torch.zeros(n, 1)), loss(model, s, torch.zeros(n, 1))
    torch.manual_seed(3)
    assert loss(model, s, torch.zeros(n, 1)) == first != second
    xt, t = seen[0]
    counts = torch.bincount(t, minlength=T + 1)
    assert t.dtype == torch.int64 and t.shape == (n,) and counts[0] == 0 and len(counts) == T + 1
    assert ((counts[1:] - n / T).abs() < 5 * math.sqrt(n / T * (1 - 1 / T))).all()
    noise, other = (xt[:, 0] / s.noise_scale[t] for xt, t in seen[:2])  # x_0 is 0
    assert not torch.allclose(noise, other, atol=0.1)
    assert abs(float(noise.mean())) < 5 / math.sqrt(n)
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / n)


@each_loss
def test_gradient_by_finite_differences(loss):
    """So that a weight that is detached or misplaced is found out."""
    s, x0, noise = d.cosine_schedule(100), torch.rand(16, 3) * 2 - 1, torch.randn(16, 3)
    t, w = torch.randint(1, 101, (16,)), torch.tensor(0.3, requires_grad=True)
    here, above, below = (loss(lambda xt, t: k * xt, s, x0, t, noise) for k in (w, 0.4, 0.2))
    here.backward()
    assert float(w.grad) == pytest.approx(float(above - below) / 0.2, rel=1e-4)  # a parabola: exact


def test_the_weight_of_eq_12_in_numbers():
    schedule = d.linear_schedule(1000)
    beta, noise_variance = schedule.betas[1:].double(), schedule.noise_scale[1:].double() ** 2
    weight = beta / (2 * (1 - beta) * noise_variance)  # σ_t² = β_t
    for t, value in ((1, 0.50), (50, 0.019), (349, 0.0050), (1000, 0.010)):
        assert float(weight[t - 1]) == pytest.approx(value, rel=0.03)
    assert abs(int(weight.argmin()) + 1 - 349) <= 2
