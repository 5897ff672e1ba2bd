"""Notebook 10: guidance by quadrature, `Guided` in every sampler, bad inputs, inpainting."""
import json
import math
import re

import pytest
import torch
from series import ROOT, SAMPLERS, WEIGHTS, defined_in, four_samples, small_unet

import ddpm_utils as d

COSINE, SHORT, Y = d.cosine_schedule(), d.linear_schedule(20), torch.tensor([0, 1, 2, 2])


@pytest.fixture(scope="module")
def space():
    return defined_in("10", "cosine", "world", "left_open", "bump_noise", "inpaint")


# ------------------------------------------------------------------ the exact mixture
# What these samplers end in is compared in notebook 10 itself, with the tilted densities.

@pytest.mark.parametrize("w", [0, 1, 2, 4])
@pytest.mark.parametrize("step", [100, 500, 900])
def test_guided_noise_is_the_score_of_the_densities_to_the_powers(space, w, step):
    """Against quadrature and differences: -noise_scale d/dx log(q_t^{1-w} q_t(. given y)^w)."""
    grid = torch.linspace(-9, 9, 3601, dtype=torch.float64)
    one = torch.exp(-((grid - 1) ** 2) / 0.5)  # N(1, 0.5²), by hand, up to a factor
    a, x = COSINE.alpha_bars[step].double(), torch.tensor([-1, -0.2, 0.4, 1.3]).double()

    def log_density(x):  # q_t: the integral of density(x_0) N(x; signal x_0, noise²)
        path = torch.exp(-((x[:, None] - a.sqrt() * grid) ** 2) / (2 * (1 - a)))
        return (1 - w) * (path @ (one + one.flip(0))).log() + w * (path @ one).log()

    slope = (log_density(x + 1e-4) - log_density(x - 1e-4)) / 2e-4
    guided = d.Guided(space["bump_noise"], torch.ones(4, dtype=torch.int64), w)
    found = guided(x.float(), torch.full((4,), step)).double()
    torch.testing.assert_close(found, -(1 - a).sqrt() * slope, rtol=2e-3, atol=2e-3)


def test_guided_ode_against_another_integrator(space):
    """dy/dσ = ε_w by the midpoint method in float64, with ε_w written out by hand."""
    def noise(y, s, w=4):
        v = 0.25 + s**2
        alone, with_label = (y - torch.tanh(y / v)) * s / v, (y - 1) * s / v
        return alone + w * (with_label - alone)

    x = torch.tensor([-1.5, -0.3, 0.2, 1.0], dtype=torch.float64)
    s = float(COSINE.noise_scale[980] / COSINE.signal_scale[980])
    y, times = x * math.sqrt(1 + s**2), torch.logspace(math.log10(s), -3, 2001).tolist()
    for now, then in zip(times[:-1], times[1:]):
        middle = y + (then - now) / 2 * noise(y, now)
        y = y + (then - now) * noise(middle, (now + then) / 2)
    guided = d.Guided(space["bump_noise"], torch.ones(4, dtype=torch.int64), 4)
    found = d.ddim_sample(guided, COSINE, 4, list(range(980, -1, -1)), shape=(), x_T=x,
                          clip=False, progress=False)
    torch.testing.assert_close(found.double(), y, rtol=0, atol=0.02)


# ------------------------------------------------------------------ Guided, a model like any other

WRAPPERS = {"noise": lambda model, schedule: model, "v": d.NoiseFromV, "flow": d.NoiseFromFlow}


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("predicts", WRAPPERS)
def test_guided_in_every_sampler(network, name, predicts):
    """w = 0 and 1 are the network without and with its labels, w = 2.5 two calls added by hand;
    of v and of the velocity they are added within the wrapper."""
    network.target = predicts
    for w in (0, 1, 2.5):
        by_hand = lambda x, t: w * network(x, t, Y) + (1 - w) * network(x, t)
        model, expected = (WRAPPERS[predicts](f, SHORT) for f in (network, by_hand))
        ends = [four_samples(name, f, SHORT) for f in (d.Guided(model, Y, w), expected)]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-3)  # of another batch size


def test_two_answers_are_one_call_and_each_image_may_have_its_own_w(network):
    x, t, w, sizes = torch.randn(4, 1, 8, 8), torch.full((4,), 3), [0.0, 1.0, 2.0, 5.0], []
    network.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    together = d.Guided(network, Y, torch.tensor(w))(x, t)
    assert sizes == [8]
    alone = [d.Guided(network, Y[i:i + 1], w[i])(x[i:i + 1], t[:1]) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-4)


WRONG = {  # words of the message: what is given, beside good values for the rest
    "y must be int64 (B,) from 0 to 2": [{"y": y} for y in (  # 3 means "no label"
        torch.tensor([0, 1, 2, 3]), torch.tensor([0, -1, 2, 2]), Y.float(), Y.int(), Y[:, None],
        Y[:0], [0, 1, 2, 2], 9)],
    "w must be a number or (4,)": [{"w": torch.ones(3)}, {"w": torch.ones(4, 1)}],
    "one label per image, 2; got 4": [{"n": 2}],
    "one label per image, 8; got 4": [{"n": 8}],
    "this network takes no labels": [{"model": model} for model in (
        small_unet(), d.NoiseFromV(small_unet(), COSINE), lambda xt, t: xt)],
    "wrap it for the samplers, as in NoiseFromV": [{"target": "v"}]}


@pytest.mark.parametrize("message, given", [(m, given) for m in WRONG for given in WRONG[m]])
def test_silent_mistakes_are_named(network, given, message):
    network.target = given.get("target")
    given = {"model": network, "y": Y, "w": 2.0, "n": 4, **given}
    with pytest.raises(ValueError, match=re.escape(message)):
        guided = d.Guided(given["model"], given["y"], given["w"])
        d.ddim_sample(guided, SHORT, given["n"], 5, shape=(1, 8, 8), progress=False)


def test_drop_labels_tosses_a_coin_for_each_and_keeps_the_type():
    y = torch.arange(10).repeat(1000)
    dropped = d.drop_labels(y, 0.3, 10, torch.Generator().manual_seed(0))
    counts = (dropped == 10).view(-1, 100).sum(dim=1).double()  # 100 batches
    assert abs(float(counts.mean()) - 30) < 5 * math.sqrt(21 / 100)
    assert float(counts.var()) == pytest.approx(21, rel=0.5)  # of one coin a batch: 2,100
    assert dropped.dtype == torch.int64 and torch.equal(dropped[dropped < 10], y[dropped < 10])


# ------------------------------------------------------------------ the shipped network

def test_the_shipped_network_draws_what_it_is_asked_for():
    """99% of 10,000 at w = 3 (tests/measure/guidance.json); here 50, which may miss a few."""
    (model, schedule), y = d.load_pretrained(), torch.arange(10).repeat(5)
    images = d.dpm_solver_sample(d.Guided(model, y, 3.0), schedule, 50, 8, progress=False,
                                 generator=torch.Generator().manual_seed(0))
    named = d.garment_features(d.load_classifier()[0], images)[1].argmax(dim=1)
    assert (named == y).float().mean() >= 0.9


def test_the_card_and_the_readme_print_what_was_measured():
    found = json.loads((ROOT / "tests" / "measure" / "guidance.json").read_text())
    rows = found[d.WEIGHTS["fashion"][:12]]
    card = (WEIGHTS / "fashion.md").read_text(encoding="utf-8")
    for row, numbers in rows.items():
        w, n = re.match(r"w = ([\d.]+), (\d+) images", row).groups()
        start = f"| {w} | {int(n):,} | {numbers['distance']:.1f} | "
        assert start in card, row
        assert w == "0" or f"{start}{numbers['accuracy']:.1%} |" in card
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"(notebook 10) | 10,000 | {rows['w = 1, 10000 images']['distance']:.1f} |" in readme


# ------------------------------------------------------------------ inpainting
# That visits bring the unknown half to its conditional mean, notebook 10 asserts in two dimensions.

@pytest.mark.parametrize("visits", [1, 4])
def test_inpainting_calls_the_network_once_for_each_visit(space, visits):
    seen, known, mask = [], torch.rand(2, 1, 8, 8), torch.rand(1, 8, 8) < 0.5
    model = lambda xt, t: seen.append(int(t[0])) or xt
    x = space["inpaint"](model, COSINE, known, mask, 5, visits, progress=False)
    assert seen == [t for t in (1000, 800, 600, 400) for _ in range(visits)] + [200]
    assert torch.equal(x[:, mask], known[:, mask]) and x.abs().max() <= 1
