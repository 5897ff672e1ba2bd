"""Notebook 11: Euler and Heun against exact ends, flow_loss, NoiseFromFlow, shipped networks.

That velocity, noise, score and x_0 are translations of one another, that DDIM is Euler's method in
s, and where the loss is π/2 times that of v, the notebook itself asserts.
"""
import json
import math
import re
from functools import partial

import pytest
import torch
from series import ROOT, SAMPLERS, SCHEDULE, WEIGHTS, defined_in, run, small_unet

import ddpm_utils as d

COSINE, BUMPS = d.cosine_schedule(), d.two_bumps()
flow_sample = partial(d.flow_sample, progress=False)
velocity = defined_in("11", "world", "exact_velocity")["exact_velocity"]
exact = partial(velocity, world=BUMPS)  # a perfect network
constant = lambda x, t: torch.ones_like(x)


# ------------------------------------------------------------------ flow_sample

@pytest.mark.parametrize("steps, heun, close", [
    (5, False, 0.15), (20, False, 0.04), (100, False, 0.008), (5, True, 0.12), (20, True, 0.01),
    (100, True, 0.0004)])
def test_quantiles_of_the_bumps(steps, heun, close):
    """In one dimension a flow carries the quantiles of the noise to those of the data."""
    ranks = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    x = flow_sample(exact, 2000, steps, heun, shape=(), x_T=torch.special.ndtri(ranks))
    shares = torch.special.ndtr((x[:, None] - BUMPS.means) / BUMPS.stds) @ BUMPS.weights.double()
    assert x.dtype == torch.float64 and (shares - ranks).abs().max() < close


@pytest.mark.parametrize("heun, order", [(False, 1), (True, 2)], ids=["Euler", "Heun"])
def test_order(heun, order):
    """The flow of N(m, d²) ends at m + d ε: a noise keeps its number of deviations."""
    x_T = torch.randn(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = partial(velocity, world=d.GaussianMixture([1.0], [0.3], [0.2]))
    ends = [flow_sample(model, 300, n, heun, shape=(), x_T=x_T) for n in (50, 100, 200)]
    gaps = [float((end - (0.3 + 0.2 * x_T)).abs().mean()) for end in ends]
    for coarse, fine in zip(gaps[:-1], gaps[1:]):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("heun", [False, True])
def test_where_it_looks(heun):
    seen = []
    flow_sample(lambda x, t: seen.append(t) or torch.zeros_like(x), 3, 4, heun, shape=(2,))
    places = [1000, 750, 750, 500, 500, 250, 250] if heun else [1000, 750, 500, 250]
    assert all(t.dtype == torch.int64 for t in seen)
    assert [t.tolist() for t in seen] == [[place] * 3 for place in places]


def test_a_constant_velocity_is_followed_exactly_from_any_stops():
    options = {"shape": (2,), "x_T": torch.randn(3, 2)}
    for places in (1, 7, [1000, 400, 399, 0], [1000, 0]):
        x = flow_sample(constant, 3, places, **options)
        torch.testing.assert_close(x, options["x_T"] - 1)
    stages = flow_sample(constant, 3, 4, T=8, return_trajectory=True, **options)
    falls = torch.linspace(0, 1, 5).view(5, 1, 1)
    torch.testing.assert_close(stages, options["x_T"] - falls)


def test_guided_velocities_go_through_flow_sample_which_draws_by_its_generator(network):
    network.target, y = "flow", torch.tensor([0, 1, 2, 2])
    by_hand = lambda x, t: 2 * network(x, t, y) - network(x, t)
    one, other = (flow_sample(model, 4, 5, True, shape=(1, 8, 8),
                              generator=torch.Generator().manual_seed(5))
                  for model in (d.Guided(network, y, 2.0), by_hand))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert one.shape == (4, 1, 8, 8) and not one.requires_grad


# ------------------------------------------------------------------ flow_loss

def test_flow_loss_against_brute_force():
    """Image by image, in float64."""
    x0, noise, t = torch.randn(4, 1, 3, 3), torch.randn(4, 1, 3, 3), torch.tensor([1, 20, 35, 50])
    model, total = lambda x, t: 0.3 * x**2 - t.view(-1, 1, 1, 1) / 7, 0.0
    for step, c, e in zip(t.tolist(), x0.double().numpy(), noise.double().numpy()):
        x = (1 - step / 50) * c + step / 50 * e
        total += ((0.3 * x**2 - step / 7 - (e - c)) ** 2).sum()
    found = float(d.flow_loss(model, SCHEDULE, x0, t, noise))
    assert found == pytest.approx(total / 36, rel=1e-5)


def test_flow_loss_draws_every_t_and_noise():
    seen, x0 = [], torch.zeros(20_000, 2)
    model = lambda x, t: seen.extend(t.tolist()) or torch.zeros_like(x)
    assert float(d.flow_loss(model, d.linear_schedule(10), x0)) == pytest.approx(1, abs=0.03)
    assert sorted(set(seen)) == list(range(1, 11))


# ------------------------------------------------------------------ what is refused

def that_predicts(target):
    model = small_unet()
    model.target = target
    return model


X0, T = torch.zeros(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
WRAPPED = d.NoiseFromV(small_unet(), COSINE)
loss, wrap = partial(d.flow_loss, constant, SCHEDULE), partial(d.NoiseFromFlow, schedule=COSINE)
sample = partial(flow_sample, n=2, steps=3, shape=(1, 8, 8))
CASES = [  # the call that lacks one argument, that argument, words of the message, wrong values
    (partial(loss, t=T, noise=X0), "x0", "x0 and noise must be floats", [X0.byte()]),
    (partial(loss, X0, T), "noise", "one shape", [X0[..., :1], X0[0, 0]]),  # would broadcast
    (partial(loss, X0), "t", "t must be between 1 and 50", [T - 1, T + 47]),
    (partial(loss, X0), "t", "t must be int64", [T / 9, T[:2]]),
    (partial(sample, exact), "x_T", "x_T must have the shape (2, 1, 8, 8)", [X0[:2, 0]]),
    (partial(sample, exact), "steps", "steps must be", [0, 1001]),
    (partial(sample, exact), "steps", "a list of stops must", [[500, 600, 0], [1000, 500]]),
    (sample, "model", "predicts 'noise'", [that_predicts("noise"), WRAPPED]),
    (wrap, "model", "predicts 'noise'", [that_predicts("noise")]),
    *[(call, "model", "predicts 'v'", [that_predicts("v")]) for call in (sample, wrap)],
    (partial(run, 1, loss_function=d.flow_loss), "model", "predicts v, the loss flow",
     [that_predicts("v")]),
    *[(partial(f, schedule=SCHEDULE, n=2, shape=(1, 8, 8)), "model", "wrap it for the samplers",
       [that_predicts("flow")]) for f, _ in SAMPLERS.values()]]


@pytest.mark.parametrize("call, argument, message, wrong",
                         [(*row, value) for *row, values in CASES for value in values])
def test_silent_mistakes_are_named(call, argument, message, wrong):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**{argument: wrong})


# ------------------------------------------------------------------ training, saving, loading

def test_train_save_and_load(tmp_path, one_thread):
    model, path = small_unet(), str(tmp_path / "mine.pt")
    ema = d.EMA(model, 0.9)
    run(12, model, loss_function=d.flow_loss, ema=ema)
    assert model.target == ema.model.target == "flow"
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([1, 25, 50])
    for saved in (ema.model, d.NoiseFromFlow(ema.model, SCHEDULE, 50)):
        d.save_checkpoint(path, saved, SCHEDULE)
        bare, schedule = d.load_network(path)
        assert bare.target == "flow" and schedule.T == 50
        assert torch.equal(bare(x, t), ema.model(x, t))
        loaded, schedule = d.load_pretrained(path)
        assert isinstance(loaded, d.NoiseFromFlow) and loaded.T == 50
        assert torch.equal(loaded(x, t), d.NoiseFromFlow(ema.model, schedule, 50)(x, t))


# ------------------------------------------------------------------ NoiseFromFlow
# In every sampler, and under guidance: test_10_labels.py.

@pytest.mark.parametrize("step", [1, 100, 500, 900, 1000])
@pytest.mark.parametrize("schedule", [COSINE, d.linear_schedule()], ids=["cosine", "linear"])
def test_noise_from_flow_gives_the_noise_of_the_bumps(schedule, step):
    """Against the slope of the log density at x_s; the clock's rounding is the only error."""
    a, b = (float(f[step]) for f in (schedule.signal_scale, schedule.noise_scale))
    s, x = b / (a + b), torch.linspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(d.two_bumps().log_density(x, 1 - s, s).sum(), x)
    xt = (x * (a + b)).detach().float()
    found = d.NoiseFromFlow(exact, schedule)(xt, torch.full((41,), step)).double()
    wrong_by = 0.02 + 5 * abs(max(1, round(1000 * s)) / 1000 - s) / s
    torch.testing.assert_close(found, -s * slope, rtol=wrong_by, atol=wrong_by)


@pytest.mark.parametrize("clock", [1000, 50])
def test_the_clock_asked_is_the_nearest_and_never_0(clock):
    asked, s = [], COSINE.noise_scale / (COSINE.signal_scale + COSINE.noise_scale)
    model = lambda x, t: asked.append(t) or torch.zeros_like(x)
    d.NoiseFromFlow(model, COSINE, clock)(torch.zeros(1000, 1), torch.arange(1, 1001))
    assert asked[0].dtype == torch.int64
    assert (asked[0] / clock - s[1:].clamp(min=1 / clock)).abs().max() <= 0.501 / clock


# ------------------------------------------------------------------ the shipped networks

def test_the_shipped_flow_has_learned_garments(one_thread):
    """Its loss in training ended at 0.204; 64 images tell it to 10% or so. Saying 0 costs 1.7."""
    network, schedule = d.load_network("fashion_flow")
    assert network.classes == 10 and network.target == "flow" and schedule.T == 1000
    test = d.load_fashion_mnist("test")
    if test.is_stand_in:
        pytest.skip("trained on Fashion-MNIST")
    x0, t = d.to_model_range(test.images[:64]), torch.randint(1, 1001, (64,))
    with torch.no_grad():
        assert float(d.flow_loss(network, schedule, x0, t)) < 0.28


def start(row):
    """Of "flow, DDIM, 20 calls, 1000 images", how its line begins in a card's table."""
    sampler, calls = re.search(r"([^,]+), (\d+) calls", row).groups()
    return f"| {sampler.strip()} | {calls} |"


def test_the_cards_print_what_was_measured():
    found = json.loads((ROOT / "tests" / "measure" / "flow.json").read_text())
    found = {name: {row: f"{numbers['distance']:.1f}" for row, numbers in rows.items()}
             for name, rows in found.items()}
    flow, reflow = ((WEIGHTS / f"fashion_{name}.md").read_text(encoding="utf-8")
                    for name in ("flow", "reflow"))
    before, after = (found[d.WEIGHTS[f"fashion_{name}"][:12]] for name in ("flow", "reflow"))
    assert before and after
    for row, distance in before.items():
        assert f"{start(row)} {int(row.split()[-2]):,} | {distance} |" in flow, row
    for row, distance in after.items():
        assert f"{start(row)} {before[row]} | {distance} |" in reflow, row
    pairs = [found[f"pair, {steps} steps"] for steps in (5000, 20000, 42000)]
    for row in (row for row in pairs[0] if row.startswith("flow")):
        both = [pair.get(name, "") for pair in pairs for name in ("v" + row[4:], row)]
        assert f"{start(row)} {' | '.join(both)} |".replace("  ", " ") in flow, row
    trial = found["reflow, 4096 pairs, 800 steps"].values()
    assert "{},\n{} and {}".format(*trial) in reflow
