"""From the bound to L_simple: Bayes on a grid, integrals, a second derivation of Eq. 12's weight."""

import math

import numpy as np
import pytest
import torch

import ddpm_utils as d


def one(value):
    return torch.tensor([float(value)])


def step(t):
    return torch.tensor([t], dtype=torch.int64)


def density(x, mean, variance):
    return np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


def posterior(schedule, x0, xt, t):
    mean, variance = schedule.q_posterior(one(x0), one(xt), step(t))
    return float(mean), float(variance)


@pytest.mark.parametrize("make", [d.linear_schedule, d.cosine_schedule], ids=["linear", "cosine"])
@pytest.mark.parametrize("T, t", [(1000, 2), (1000, 50), (1000, 500), (1000, 990), (20, 2),
                                  (20, 19), (20, 20)])
def test_posterior_is_bayes_on_a_grid(make, T, t):
    """q(x_{t-1} given x_t, x_0) ∝ q(x_t given x_{t-1}) q(x_{t-1} given x_0), on a grid."""
    schedule, x0 = make(T), 0.6
    beta, before = float(schedule.betas[t]), float(schedule.alpha_bars[t - 1])
    # 1.3 deviations below its mean
    xt = float(schedule.signal_scale[t] * x0 - 1.3 * schedule.noise_scale[t])
    mean, variance = posterior(schedule, x0, xt, t)
    centre, spread = math.sqrt(before) * x0, math.sqrt(1 - before)
    grid = np.linspace(centre - 9 * spread, centre + 9 * spread, 400_001)
    product = density(xt, math.sqrt(1 - beta) * grid, beta) * density(grid, centre, 1 - before)
    product /= product.sum()
    grid_mean = (grid * product).sum()
    grid_variance = ((grid - grid_mean) ** 2 * product).sum()
    assert mean == pytest.approx(grid_mean, abs=2e-4 * max(1, math.sqrt(variance)))
    # 1 - ᾱ_1 from float32 has three digits less
    assert variance == pytest.approx(grid_variance, rel=2e-3)


def test_posterior_at_1_is_x0_itself():
    mean, variance = posterior(d.linear_schedule(), 0.6, -3.0, 1)
    assert mean == pytest.approx(0.6, abs=1e-6) and variance == 0


def test_small_and_large_variance_differ_only_at_small_t():
    schedule = d.linear_schedule(1000)
    t = torch.arange(1, 1001)
    ratio = schedule.q_posterior(torch.zeros(1000), torch.zeros(1000), t)[1] / schedule.betas[1:]
    assert float(ratio[2 - 1]) == pytest.approx(0.45, abs=0.005)
    assert float(ratio[51 - 1]) == pytest.approx(0.96, abs=0.005)
    assert (ratio[51:] > 0.96).all() and (ratio < 1).all()


def kl_by_integration(mean1, variance1, mean2, variance2):
    reach = 12 * math.sqrt(max(variance1, variance2)) + abs(mean1 - mean2)
    x = np.linspace(mean1 - reach, mean1 + reach, 400_001)
    squares = (x - mean2) ** 2 / variance2 - (x - mean1) ** 2 / variance1
    log_ratio = (squares + math.log(variance2 / variance1)) / 2
    return float((density(x, mean1, variance1) * log_ratio).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("sigma", ["beta", "beta_tilde"])
@pytest.mark.parametrize("t", [2, 60, 349, 900])
def test_kl_term_is_the_weighted_noise_error(t, sigma):
    """L_{t-1} integrated numerically = constant + |μ̃ - μ_θ|²/(2σ²) (Eq. 8)
    = constant + weight · |ε - ε_θ|² (Eq. 12)."""
    schedule, x0, noise, guess = d.linear_schedule(1000), 0.4, 0.9, -0.2
    xt = schedule.q_sample(one(x0), step(t), one(noise))
    mean, variance = schedule.q_posterior(one(x0), xt, step(t))
    believed = schedule.predict_x0(xt, step(t), one(guess))
    model_mean, _ = schedule.q_posterior(believed, xt, step(t))
    mean, variance, model_mean = float(mean), float(variance), float(model_mean)
    beta, alpha_bar = float(schedule.betas[t]), float(schedule.alpha_bars[t])
    sigma2 = beta if sigma == "beta" else variance

    constant = (variance / sigma2 - 1 + math.log(sigma2 / variance)) / 2  # 0 for β̃
    weight = beta**2 / (2 * sigma2 * (1 - beta) * (1 - alpha_bar))
    integrated = kl_by_integration(mean, variance, model_mean, sigma2)
    assert integrated == pytest.approx(constant + (mean - model_mean) ** 2 / (2 * sigma2), rel=1e-4)
    assert integrated == pytest.approx(constant + weight * (noise - guess) ** 2, rel=5e-3)


@pytest.mark.parametrize("t", [1, 2, 100, 999, 1000])
def test_mean_in_terms_of_noise(t):
    """Eq. 11 from Eq. 7: the posterior's mean at the believed x_0 is (x_t - β/√(1-ᾱ) ε)/√α."""
    schedule = d.linear_schedule(1000)
    xt, noise = torch.randn(64), torch.randn(64)
    many = torch.full((64,), t)
    mean, _ = schedule.q_posterior(schedule.predict_x0(xt, many, noise), xt, many)
    beta, alpha_bar = float(schedule.betas[t]), schedule.alpha_bars[t].item()
    direct = (xt - beta / math.sqrt(1 - alpha_bar) * noise) / math.sqrt(1 - beta)
    torch.testing.assert_close(mean, direct, rtol=1e-4, atol=2e-4)


def test_weight_of_eq_12_is_the_halved_drop_of_snr():
    """A second road to the weight, for σ_t² = β̃_t: L_{t-1} = ½ (SNR(t-1) - SNR(t)) |x_0 - x̂_0|²
    (Kingma et al. 2021, arXiv 2107.00630), and |x_0 - x̂_0|² = |ε - ε_θ|²/SNR(t). So the weight is
    ½ (SNR(t-1)/SNR(t) - 1)."""
    for schedule in (d.linear_schedule(1000), d.cosine_schedule(1000)):
        a, beta = schedule.alpha_bars.double(), schedule.betas.double()
        snr = a / (1 - a)
        for t in (2, 10, 349, 700, 990):
            variance = posterior(schedule, 0.0, 0.0, t)[1]
            weight = beta[t] ** 2 / (2 * variance * (1 - beta[t]) * (1 - a[t]))
            assert float(weight) == pytest.approx(float(snr[t - 1] / snr[t] - 1) / 2, rel=5e-3)


def test_weight_of_eq_12_in_numbers():
    schedule = d.linear_schedule(1000)
    beta, noise_variance = schedule.betas[1:].double(), schedule.noise_scale[1:].double() ** 2
    weight = beta / (2 * (1 - beta) * noise_variance)  # σ_t² = β_t
    for t, value in ((1, 0.50), (50, 0.019), (349, 0.0050), (1000, 0.010)):
        assert float(weight[t - 1]) == pytest.approx(value, rel=0.03)
    assert abs(int(weight.argmin()) + 1 - 349) <= 2


# ------------------------------------------------------------------ the best guess that there is

@pytest.mark.parametrize("signal, noise", [(0.99, 0.1), (0.8, 0.6), (0.1, 0.995)])
def test_exact_x0_is_bayes_on_a_grid(signal, noise):
    """E[x_0 given x] = ∫ x_0 q(x_0) N(x; signal x_0, noise²) dx_0 / q(x), summed in numpy."""
    x = torch.tensor([-1.0, -0.2, 0.4, 1.1])
    grid = np.linspace(-3, 3, 60_001)
    clean = 0.35 * density(grid, -0.7, 0.12**2) + 0.65 * density(grid, 0.5, 0.18**2)
    for value, found in zip(x.tolist(), d.exact_x0(d.two_bumps(), x, signal, noise).tolist()):
        weights = clean * density(value, signal * grid, noise**2)
        assert found == pytest.approx((weights * grid).sum() / weights.sum(), abs=1e-4)


def test_the_exact_noise_is_minus_the_scaled_score():
    """E[ε given x_t] = -√(1-ᾱ) ∇ log q(x_t), by autograd on the log density, each point at its t."""
    mixture = d.GaussianMixture([0.3, 0.7], [[0.0, 1.0], [1.5, -0.5]], [0.2, 0.4])
    schedule, t = d.cosine_schedule(), torch.tensor([50, 300, 600, 950])
    x = torch.randn(4, 2).requires_grad_()
    log_q = mixture.log_density(x, schedule.signal_scale[t], schedule.noise_scale[t])
    score = torch.autograd.grad(log_q.sum(), x)[0]
    expected = -schedule.noise_scale[t][:, None] * score
    found = d.exact_noise_predictor(mixture, schedule)(x.detach(), t)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_exact_noise_of_one_gaussian_is_its_straight_line():
    schedule = d.linear_schedule()
    predict = d.exact_noise_predictor(d.GaussianMixture([1.0], [0.3], [0.2]), schedule)
    for t in (1, 40, 500, 1000):
        x, a = torch.randn(50), float(schedule.alpha_bars[t])
        line = math.sqrt(1 - a) * (x - math.sqrt(a) * 0.3) / (a * 0.04 + 1 - a)
        torch.testing.assert_close(predict(x, torch.full((50,), t)), line, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------ L_simple

@pytest.mark.parametrize("trailing", [(), (2,), (1, 4, 4)])
def test_simple_loss_is_the_loop(trailing):
    schedule = d.linear_schedule(100)
    x0, noise, t = torch.rand(3, *trailing), torch.randn(3, *trailing), torch.tensor([1, 50, 100])
    total, count = 0.0, 0
    for b in range(3):
        alpha_bar = math.prod(1 - float(beta) for beta in schedule.betas[1:int(t[b]) + 1])
        for x, e in zip(x0[b].flatten().tolist(), noise[b].flatten().tolist()):
            xt = math.sqrt(alpha_bar) * x + math.sqrt(1 - alpha_bar) * e
            total, count = total + (e - 0.5 * xt) ** 2, count + 1
    loss = d.simple_loss(lambda xt, t: 0.5 * xt, schedule, x0, t, noise)
    assert loss.shape == () and float(loss) == pytest.approx(total / count, rel=1e-4)
    assert float(d.simple_loss(lambda xt, t: noise, schedule, x0, t, noise)) == 0


@pytest.mark.parametrize("loss", [d.simple_loss, d.v_loss, d.min_snr_loss])
def test_t_is_drawn_evenly_from_1_to_T_and_noise_is_standard_normal(loss):
    """Anew in every call; the seed fixes it."""
    T, n, seen, schedule = 5, 20_000, [], d.linear_schedule(5)
    for seed in (3, None, 3):
        if seed:
            torch.manual_seed(seed)
        loss(lambda xt, t: seen.append((xt, t)) or xt, schedule, torch.zeros(n, 1))
    first, second, again = seen
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, second))
    xt, t = first
    assert t.dtype == torch.int64 and t.shape == (n,)
    counts = torch.bincount(t, minlength=T + 1).double()
    assert counts[0] == 0 and len(counts) == T + 1
    assert ((counts[1:] - n / T).abs() < 5 * math.sqrt(n / T * (1 - 1 / T))).all()
    noise = xt[:, 0] / schedule.noise_scale[t]  # x_0 is 0
    assert abs(float(noise.mean())) < 5 / math.sqrt(n)
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("loss", [d.simple_loss, d.min_snr_loss])
def test_gradients(loss):
    """For a model w x_t the loss is a parabola in w, so differences are exact: a weight that is
    detached or misplaced is found out."""
    schedule, x0 = d.cosine_schedule(100), torch.rand(16, 3) * 2 - 1
    t, noise = torch.randint(1, 101, (16,)), torch.randn(16, 3)

    def at(w):
        return loss(lambda xt, t: w * xt, schedule, x0, t, noise)

    w = torch.tensor(0.3, requires_grad=True)
    at(w).backward()
    assert float(w.grad) == pytest.approx(float(at(0.4) - at(0.2)) / 0.2, rel=1e-3)


# ------------------------------------------------------------------ the loss on v, and its weights

@pytest.mark.parametrize("make", [d.linear_schedule, d.cosine_schedule], ids=["linear", "cosine"])
@pytest.mark.parametrize("gamma", [None, 1, 5, 20.0])
def test_v_loss_weighs_the_error_of_x0(make, gamma):
    """Hang et al. 2023 state their weight for x_0; image by image in float64, through
    x̂_0 = √ᾱ x_t - √(1-ᾱ) v̂."""
    schedule, t = make(1000), torch.tensor([1, 40, 250, 400, 600, 990])
    x0, noise, guess = torch.rand(6, 2, 4) * 2 - 1, torch.randn(6, 2, 4), torch.randn(6, 2, 4)
    wanted = []
    for i, a in enumerate(schedule.alpha_bars[t].double().tolist()):
        signal, spread = math.sqrt(a), math.sqrt(1 - a)
        xt = signal * x0[i].double() + spread * noise[i].double()
        of_x0 = float((signal * xt - spread * guess[i].double() - x0[i].double()).square().mean())
        snr = a / (1 - a)
        wanted.append(of_x0 * (snr + 1 if gamma is None else min(snr, gamma)))
    loss = d.v_loss(lambda xt, t: guess, schedule, x0, t, noise, gamma)
    assert float(loss) == pytest.approx(sum(wanted) / 6, rel=2e-3)
    if gamma == 5:
        assert torch.equal(loss, d.min_snr_loss(lambda xt, t: guess, schedule, x0, t, noise))


def test_v_loss_of_a_perfect_model():
    schedule, x0 = d.cosine_schedule(100), torch.rand(8, 1, 4, 4) * 2 - 1
    t, noise = torch.randint(1, 101, (8,)), torch.randn(8, 1, 4, 4)
    v = d.at(schedule.signal_scale, t, x0) * noise - d.at(schedule.noise_scale, t, x0) * x0
    for loss in (d.v_loss, d.min_snr_loss):
        assert float(loss(lambda xt, t: v, schedule, x0, t, noise)) == 0
