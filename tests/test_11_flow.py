"""Notebook 11: the dictionary, Euler and Heun against a fine reference, flow_loss, NoiseFromFlow."""

import json
import math
import re

import numpy as np
import pytest
import torch
from series import ROOT, SAMPLERS, WEIGHTS, defined_in, four_samples, run, small_unet

import ddpm_utils
from ddpm_utils import (
    EMA,
    GaussianMixture,
    Guided,
    NoiseFromFlow,
    NoiseFromV,
    cosine_schedule,
    ddim_sample,
    flow_loss,
    flow_sample,
    linear_schedule,
    load_network,
    load_pretrained,
    save_checkpoint,
    v_loss,
)

COSINE = cosine_schedule()
WEIGHT, MEAN, STD = [0.35, 0.65], [-0.7, 0.5], [0.12, 0.18]  # the two bumps, by hand


def bumps(x, s):
    """Density, E[x_0 given x] and score of the noised bumps, (B,) each, written out by hand."""
    density, x0, slope = 0, 0, 0
    for w, m, d in zip(WEIGHT, MEAN, STD):
        variance = (1 - s) ** 2 * d**2 + s**2
        away = x - (1 - s) * m
        part = w * torch.exp(-(away**2) / (2 * variance)) / (2 * math.pi * variance) ** 0.5
        density = density + part
        x0 = x0 + part * (m + (1 - s) * d**2 / variance * away)
        slope = slope - part * away / variance
    return density, x0 / density, slope / density


def exact(x, t):
    """A perfect velocity network for the two bumps; t = 1000 s, from 1."""
    s = t.to(x) / 1000
    return (x - bumps(x, s)[1]) / s


def one_gaussian(x, t, m=0.3, d=0.2):
    """The same for N(m, d²), whose flow ends at m + d ε: a noise keeps its number of deviations."""
    s = t.to(x) / 1000
    variance = (1 - s) ** 2 * d**2 + s**2
    return (x - m - (1 - s) * d**2 / variance * (x - (1 - s) * m)) / s


# ------------------------------------------------------------------ the dictionary


@pytest.mark.parametrize("s", [0.05, 0.3, 0.6, 0.95])
def test_velocity_noise_score_and_x0_are_translations(s):
    """In float64: from v back to what the bumps' formulas give."""
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    v = exact(x, torch.full((41,), 1000 * s, dtype=torch.float64))
    _, x0, score = bumps(x, s)
    torch.testing.assert_close(x - s * v, x0, rtol=0, atol=1e-12)
    torch.testing.assert_close(-(x + (1 - s) * v) / s, score, rtol=1e-9, atol=1e-9)
    noise = x + (1 - s) * v
    torch.testing.assert_close((1 - s) * x0 + s * noise, x, rtol=0, atol=1e-12)


def test_the_score_is_the_slope_of_the_log_density():
    x, h = torch.linspace(-2, 2, 41, dtype=torch.float64), 1e-5
    slope = (bumps(x + h, 0.4)[0].log() - bumps(x - h, 0.4)[0].log()) / (2 * h)
    torch.testing.assert_close(bumps(x, 0.4)[2], slope, rtol=1e-6, atol=1e-6)


def test_the_notebooks_exact_velocity_is_the_one_by_hand():
    space = defined_in("11", "world", "exact_velocity")
    x, t = torch.linspace(-2, 2, 41, dtype=torch.float64), torch.full((41,), 300)
    by_formula = space["exact_velocity"](x, t, GaussianMixture(WEIGHT, MEAN, STD))
    torch.testing.assert_close(by_formula, exact(x, t), rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", [COSINE, linear_schedule()], ids=["cosine", "linear"])
@pytest.mark.parametrize("steps", [5, 20])
def test_euler_in_s_is_ddim_at_the_same_stops(schedule, steps):
    """Any function of (x_t, t) will do for ε."""
    model = lambda xt, t: torch.sin(3 * xt) + 0.3 * xt
    x_T = torch.randn(50, generator=torch.Generator().manual_seed(0))
    places = [round(1000 * (1 - k / steps)) for k in range(steps + 1)]
    found = ddim_sample(
        model, schedule, 50, steps, shape=(), x_T=x_T, clip=False, progress=False
    ).double()
    a, b = schedule.alpha_bars.double().sqrt(), (1 - schedule.alpha_bars.double()).sqrt()
    x = x_T.double() / (a + b)[1000]
    for now, then in zip(places[:-1], places[1:]):
        xt = x * (a + b)[now]
        noise = model(xt, None)
        x0 = (xt - b[now] * noise) / a[now]
        x = x + (b[then] / (a + b)[then] - b[now] / (a + b)[now]) * (noise - x0)
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)


def test_flow_loss_is_that_of_v_with_the_ideal_cosine_times_half_pi():
    """For one wrong network of the bumps, by quadrature over x and the noise level."""
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    x = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    wrong = lambda ratio: 0.1 + 0.2 / (1 + ratio**2)  # an error of ε for each noise / signal

    def mean(parts):
        return float(torch.stack(parts).mean())

    flow, v = [], []
    for s in u.tolist():
        q = bumps(x, s)[0] * 0.01
        flow.append(((wrong(s / (1 - s)) / (1 - s)) ** 2 * q).sum())
        v.append(torch.tensor((wrong(math.tan(math.pi * s / 2)) / math.cos(math.pi * s / 2)) ** 2))
    cut = 40  # both integrals grow without bound at pure noise: the same λ are left out
    edge = u[-cut] / (1 - u[-cut])
    keep = sum(math.tan(math.pi * s / 2) < edge for s in u.tolist())
    a, b = mean(flow[:-cut]) * (2000 - cut), mean(v[:keep]) * keep
    assert a / b == pytest.approx(math.pi / 2, rel=0.01)


# ------------------------------------------------------------------ flow_sample


def moments(x):
    return torch.tensor([x.mean(), x.std(), (x**3).mean(), (x < -0.1).double().mean()])


@pytest.mark.parametrize(
    "steps, heun, close",
    [(5, False, 0.2), (20, False, 0.06), (100, False, 0.012), (5, True, 0.2), (20, True, 0.02)]
    + [(100, True, 0.001)],
)
def test_moments_of_the_bumps_against_a_fine_reference(steps, heun, close):
    """The reference: Runge-Kutta of order 4 by hand, 4,000 steps of s in float64."""
    ranks = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    x_T = torch.special.ndtri(ranks)
    x, times = x_T, np.linspace(1, 1e-4, 4001)
    at = lambda x, s: exact(x, torch.full((len(x),), 1000 * s, dtype=torch.float64))
    for now, then in zip(times[:-1], times[1:]):
        h, middle = then - now, (now + then) / 2
        k1 = at(x, now)
        k2 = at(x + h / 2 * k1, middle)
        k3 = at(x + h / 2 * k2, middle)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + at(x + h * k3, then))
    found = flow_sample(exact, 2000, steps, heun, shape=(), x_T=x_T, progress=False)
    assert found.dtype == torch.float64
    assert (moments(found) - moments(x)).abs().max() < close
    assert float(x.mean()) == pytest.approx(0.35 * -0.7 + 0.65 * 0.5, abs=2e-3)


@pytest.mark.parametrize("heun, order", [(False, 1), (True, 2)], ids=["Euler", "Heun"])
def test_order(heun, order):
    x_T = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gaps = [
        (flow_sample(one_gaussian, 300, n, heun, shape=(), x_T=x_T, progress=False)
         - (0.3 + 0.2 * x_T)).abs().mean().item()
        for n in (50, 100, 200)
    ]  # fmt: skip
    for coarse, fine in zip(gaps[:-1], gaps[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("heun", [False, True])
def test_where_it_looks(heun):
    seen = []

    def model(x, t):
        seen.append(int(t[0]))
        assert t.dtype == torch.int64 and t.shape == (3,)
        return torch.zeros_like(x)

    flow_sample(model, 3, 4, heun, shape=(2,), progress=False)
    assert seen == ([1000, 750, 750, 500, 500, 250, 250] if heun else [1000, 750, 500, 250])


def test_a_constant_velocity_is_followed_exactly_from_any_stops():
    x_T = torch.randn(3, 2)
    for places in (1, 7, [1000, 400, 399, 0], [1000, 0]):
        x = flow_sample(lambda x, t: torch.ones_like(x), 3, places, shape=(2,), x_T=x_T,
                        progress=False)  # fmt: skip
        torch.testing.assert_close(x, x_T - 1)
    stages = flow_sample(lambda x, t: torch.ones_like(x), 3, 4, T=8, shape=(2,), x_T=x_T,
                         return_trajectory=True, progress=False)  # fmt: skip
    assert stages.shape == (5, 3, 2)
    torch.testing.assert_close(stages[2], x_T - 0.5)


def test_one_step_lands_on_the_mean_of_the_data():
    x = flow_sample(exact, 100, 1, shape=(), progress=False)
    torch.testing.assert_close(x, torch.full((100,), 0.08), rtol=0, atol=1e-5)


def test_flow_sample_draws_by_its_generator(network):
    options = {"shape": (1, 8, 8), "progress": False}
    one, other = (
        flow_sample(network, 2, 3, generator=torch.Generator().manual_seed(5), **options)
        for _ in range(2)
    )
    assert torch.equal(one, other) and one.shape == (2, 1, 8, 8) and not one.requires_grad


def test_other_targets_and_shapes_are_refused(network):
    for target in ("noise", "v"):
        network.target = target
        with pytest.raises(ValueError, match=f"predicts '{target}'"):
            flow_sample(network, 2, 3, shape=(1, 8, 8))
        with pytest.raises(ValueError, match=f"predicts '{target}'"):
            NoiseFromFlow(network, COSINE)
    with pytest.raises(ValueError, match="velocity"):
        flow_sample(load_pretrained("fashion")[0], 2, 3)
    with pytest.raises(ValueError, match=re.escape("x_T must have the shape (2, 1, 8, 8)")):
        flow_sample(exact, 2, 3, shape=(1, 8, 8), x_T=torch.randn(2, 8, 8))
    for steps in (0, 1001, [500, 600, 0], [1000, 500]):
        with pytest.raises(ValueError, match="steps|stops"):
            flow_sample(exact, 2, steps, shape=())


# ------------------------------------------------------------------ flow_loss


def test_flow_loss_against_brute_force():
    x0, noise, t = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3), torch.tensor([1, 20, 35, 50])
    model = lambda x, t: 0.3 * x**2 - t.view(-1, 1, 1, 1) / 7
    total = 0.0
    for b in range(4):
        s = int(t[b]) / 50
        for e, clean in zip(noise[b].flatten().tolist(), x0[b].flatten().tolist()):
            x = (1 - s) * clean + s * e
            total += (0.3 * x**2 - int(t[b]) / 7 - (e - clean)) ** 2
    found = flow_loss(model, linear_schedule(50), x0, t, noise)
    assert float(found) == pytest.approx(total / 36, rel=1e-5)
    again = flow_loss(model, cosine_schedule(50), x0, t, noise)
    assert torch.equal(found, again), "of the schedule only T is used"


def test_flow_loss_draws_every_t_and_noise():
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    x0 = torch.zeros(20_000, 2)
    assert float(flow_loss(model, linear_schedule(10), x0)) == pytest.approx(1, abs=0.03)
    assert sorted(set(seen[0].tolist())) == list(range(1, 11))


def test_the_perfect_network_has_the_smallest_loss():
    x0 = GaussianMixture(WEIGHT, MEAN, STD).sample(200_000, torch.Generator().manual_seed(0))
    t, noise = torch.randint(1, 1001, (200_000,)), torch.randn(200_000)
    loss = lambda change: float(flow_loss(lambda x, t: exact(x, t) + change(x, t), COSINE, x0, t, noise))  # fmt: skip
    best = loss(lambda x, t: 0)
    assert loss(lambda x, t: 0.1) == pytest.approx(best + 0.01, abs=2e-3)
    assert loss(lambda x, t: 0.2 * torch.sin(x)) > best


WRONG = [
    (
        {"x0": torch.zeros(4, 1, 8, 8, dtype=torch.uint8), "noise": torch.zeros(4, 1, 8, 8)},
        "x0 and noise must be floats",
    ),
    ({"noise": torch.zeros(4, 1, 8, 1)}, "one shape"),
    ({"noise": torch.zeros(8, 8)}, "one shape"),
    ({"t": torch.tensor([0, 1, 2, 3])}, "t must be between 1 and 50"),
    ({"t": torch.tensor([1, 2, 3, 51])}, "t must be between 1 and 50"),
    ({"t": torch.rand(4)}, "t must be int64"),
    ({"t": torch.tensor([1, 2])}, "t must be int64"),
]


@pytest.mark.parametrize("given, message", WRONG)
def test_bad_input_of_the_loss_is_named(given, message):
    given = {"x0": torch.zeros(4, 1, 8, 8), "t": torch.tensor([1, 2, 3, 4]), **given}
    with pytest.raises(ValueError, match=re.escape(message)):
        flow_loss(lambda x, t: x, linear_schedule(50), **given)


# ------------------------------------------------------------------ training, saving, loading


def test_train_save_and_load(tmp_path, one_thread):
    model = small_unet()
    ema = EMA(model, 0.9)
    _, losses = run(12, model, loss_function=flow_loss, ema=ema)
    assert len(losses) == 12 and model.target == ema.model.target == "flow"
    plain, wrapped = tmp_path / "plain.pt", tmp_path / "wrapped.pt"
    save_checkpoint(plain, ema.model, linear_schedule(50))
    save_checkpoint(wrapped, NoiseFromFlow(ema.model, linear_schedule(50), 50), linear_schedule(50))
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 25, 50])
    for path in (plain, wrapped):
        bare, schedule = load_network(str(path))
        assert bare.target == "flow" and schedule.T == 50
        assert torch.equal(bare(x, t), ema.model(x, t))
        loaded, schedule = load_pretrained(str(path))
        assert type(loaded).__name__ == "NoiseFromFlow" and loaded.T == 50
        assert torch.equal(loaded(x, t), NoiseFromFlow(ema.model, schedule, 50)(x, t))
        with pytest.raises(ValueError, match="wrap"):
            ddim_sample(bare, schedule, 2, 5, shape=(1, 8, 8))


def test_a_v_network_is_not_trained_on_as_a_flow(one_thread):
    model, _ = run(4, loss_function=v_loss)
    with pytest.raises(ValueError, match="predicts v, the loss flow"):
        run(4, model, loss_function=flow_loss)


# ------------------------------------------------------------------ NoiseFromFlow


@pytest.mark.parametrize("step", [1, 100, 500, 900, 1000])
@pytest.mark.parametrize("schedule", [COSINE, linear_schedule()], ids=["cosine", "linear"])
def test_noise_from_flow_gives_the_noise_of_the_bumps(schedule, step):
    """Against the score of x_t by hand; the clock's rounding is the only error."""
    a, b = (float(f[step]) for f in (schedule.signal_scale, schedule.noise_scale))
    xt = torch.linspace(-2, 2, 21) * (a + b)
    t = torch.full((21,), step)
    found = NoiseFromFlow(exact, schedule)(xt, t)
    s = b / (a + b)
    expected = -s * bumps((xt / (a + b)).double(), s)[2]
    near = max(1, round(1000 * s)) / 1000
    assert abs(near - s) < 5.1e-4
    wrong_by = 0.02 + 5 * abs(near - s) / s
    torch.testing.assert_close(found.double(), expected, rtol=wrong_by, atol=wrong_by)


def test_the_clock_asked_is_the_nearest_and_never_0():
    asked = []
    model = lambda x, t: asked.append(t) or torch.zeros_like(x)
    NoiseFromFlow(model, COSINE)(torch.zeros(1000, 1), torch.arange(1, 1001))
    s = COSINE.noise_scale / (COSINE.signal_scale + COSINE.noise_scale)
    assert asked[0].dtype == torch.int64 and int(asked[0].min()) >= 1 and asked[0][-1] == 1000
    assert (asked[0] / 1000 - s[1:]).abs().max() <= 5.01e-4
    NoiseFromFlow(model, linear_schedule(20), T=50)(torch.zeros(20, 1), torch.arange(1, 21))
    assert int(asked[1].max()) <= 50


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("w", [0, 1, 2.5])
def test_every_sampler_takes_it_and_guided_too(network, name, w):
    """Guided through the wrapper against velocities guided by hand, within a wrapper."""
    network.target, y, schedule = "flow", torch.tensor([0, 1, 2, 2]), linear_schedule(20)
    by_hand = lambda x, t: w * network(x, t, y) + (1 - w) * network(x, t)
    ends = [
        four_samples(name, model, schedule)
        for model in (
            Guided(NoiseFromFlow(network, schedule), y, w),
            NoiseFromFlow(by_hand, schedule),
        )
    ]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-3)  # of another batch size


def test_guided_velocities_go_through_flow_sample(network):
    network.target, y = "flow", torch.tensor([0, 1, 2, 2])
    by_hand = lambda x, t: 2 * network(x, t, y) - network(x, t)
    x_T = torch.randn(4, 1, 8, 8)
    options = {"shape": (1, 8, 8), "x_T": x_T, "progress": False}
    ends = [flow_sample(f, 4, 5, True, **options) for f in (Guided(network, y, 2.0), by_hand)]
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)


def test_an_unwrapped_flow_is_refused_by_the_samplers(network):
    network.target = "flow"
    for sampler, _ in SAMPLERS.values():
        with pytest.raises(ValueError, match="wrap"):
            sampler(network, linear_schedule(20), 2, shape=(1, 8, 8))


def test_noise_from_v_is_still_noise_from_v():
    model, schedule = load_pretrained("fashion")
    assert isinstance(model, NoiseFromV) and schedule.T == 1000


# ------------------------------------------------------------------ the shipped network


def test_the_shipped_flow_has_learned_garments(one_thread):
    """Its loss in training ended at 0.204; 64 test images tell it to 10% or so. Saying 0 costs 1.7."""
    network, schedule = load_network("fashion_flow")
    assert network.classes == 10 and network.target == "flow" and schedule.T == 1000
    test = ddpm_utils.load_fashion_mnist("test")
    if test.is_stand_in:
        pytest.skip("trained on Fashion-MNIST")
    x0, t = ddpm_utils.to_model_range(test.images[:64]), torch.randint(1, 1001, (64,))
    with torch.no_grad():
        assert float(flow_loss(network, schedule, x0, t)) < 0.28


def test_the_card_prints_what_was_measured():
    found = json.loads((ROOT / "tests" / "measure" / "flow.json").read_text())
    card = (WEIGHTS / "fashion_flow.md").read_text(encoding="utf-8")
    rows = found[ddpm_utils.WEIGHTS["fashion_flow"][:12]]
    assert rows
    for row, numbers in rows.items():
        sampler, calls, n = re.match(r"(.+), (\d+) calls, (\d+) images", row).groups()
        assert f"| {sampler} | {calls} | {int(n):,} | {numbers['distance']:.1f} |" in card, row
    reflow = (WEIGHTS / "fashion_reflow.md").read_text(encoding="utf-8")
    for row, after in found[ddpm_utils.WEIGHTS["fashion_reflow"][:12]].items():
        sampler, calls = re.match(r"(.+), (\d+) calls", row).groups()
        before = rows[row]["distance"]
        assert f"| {sampler} | {calls} | {before:.1f} | {after['distance']:.1f} |" in reflow, row
    assert "49.2,\n26.3 and 16.9" in reflow
    trial = found["reflow, 4096 pairs, 800 steps"].values()
    assert [round(numbers["distance"], 1) for numbers in trial] == [49.2, 26.3, 16.9]
