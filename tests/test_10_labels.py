"""Notebook 10: guidance against quadrature, `Guided` in every sampler, its bad inputs, inpainting."""

import json
import math
import re

import pytest
import torch
from series import ROOT, SAMPLERS, WEIGHTS, defined_in, four_samples, small_unet

import ddpm_utils
from ddpm_utils import (
    Guided,
    NoiseFromV,
    cosine_schedule,
    ddim_sample,
    dpm_solver_sample,
    drop_labels,
    garment_features,
    linear_schedule,
    load_classifier,
    load_pretrained,
)

COSINE = cosine_schedule()


@pytest.fixture(scope="module")
def space():
    space = defined_in("10", "cosine", "world", "left_open", "bump_noise", "inpaint")
    space["bump_noise"].classes = 2
    return space


def labels(*values):
    return torch.tensor(values or (0, 1, 2, 2))


# ------------------------------------------------------------------ the exact mixture


GRID = torch.linspace(-9, 9, 3601, dtype=torch.float64)  # 0.005 apart


def bump(mean):
    """The density N(mean, 0.5²) on the grid, by hand."""
    return torch.exp(-((GRID - mean) ** 2) / 0.5) / math.sqrt(2 * math.pi * 0.25)


def noised(density, step, x):
    """q_t at the points x: the integral of density(x_0) N(x; signal x_0, noise²) over the grid."""
    a = COSINE.alpha_bars[step].double()
    path = torch.exp(-((x[:, None] - a.sqrt() * GRID) ** 2) / (2 * (1 - a)))
    return (path * density).sum(dim=1) * 0.005 / (2 * math.pi * (1 - a)).sqrt()


@pytest.mark.parametrize("w", [0, 1, 2, 4])
@pytest.mark.parametrize("step", [100, 500, 900])
def test_guided_noise_is_the_score_of_the_densities_to_the_powers(space, w, step):
    """Against quadrature and differences: -noise_scale d/dx log(q_t^{1-w} q_t(. given y)^w)."""
    x = torch.tensor([-1.0, -0.2, 0.4, 1.3], dtype=torch.float64)
    both, one = (bump(-1) + bump(1)) / 2, bump(1)
    log = lambda at: (1 - w) * noised(both, step, at).log() + w * noised(one, step, at).log()
    slope = (log(x + 1e-4) - log(x - 1e-4)) / 2e-4
    guided = Guided(space["bump_noise"], labels(1, 1, 1, 1), w)
    found = guided(x.float(), torch.full((4,), step)).double()
    expected = -COSINE.noise_scale[step].double() * slope
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("eta", [0.0, 1.0], ids=["ODE", "SDE"])
@pytest.mark.parametrize("w", [0, 1, 2, 4])
def test_what_guided_samplers_end_in(space, w, eta, one_thread):
    """Up to w = 1 the tilted density, by quadrature; beyond it something else."""
    tilted = ((bump(-1) + bump(1)) / 2) ** (1 - w) * bump(1) ** w
    tilted = tilted.nan_to_num() / tilted.nan_to_num().sum()
    mean = float((tilted * GRID).sum())
    std = float((tilted * (GRID - mean) ** 2).sum().sqrt())
    n = 4000
    x = ddim_sample(
        Guided(space["bump_noise"], torch.ones(n, dtype=torch.int64), w),
        COSINE,
        n,
        200,
        eta,
        shape=(),
        clip=False,
        progress=False,
        generator=torch.Generator().manual_seed(3),
    )
    away = float(x.mean()) - mean
    if w <= 1:
        assert abs(away) < 5 * std / math.sqrt(n) + 0.01
        assert float(x.std()) == pytest.approx(std, rel=0.05)
    else:
        assert away > (0.1 if eta else 0.2) and float(x.std()) < std
        assert w == 2 or away > 0.3 or eta


def test_guided_ode_against_another_integrator(space):
    """dy/dσ = ε_w by Runge-Kutta in float64, with ε_w written out by hand."""
    w, x = 4, torch.tensor([-1.5, -0.3, 0.2, 1.0], dtype=torch.float64)
    sigma = (COSINE.noise_scale / COSINE.signal_scale).double()

    def noise(y, s):
        away = [y + 1, y - 1]
        share = torch.softmax(torch.stack([-(a**2) / (2 * (0.25 + s**2)) for a in away]), dim=0)
        each = [a * s / (0.25 + s**2) for a in away]
        alone = share[0] * each[0] + share[1] * each[1]
        return alone + w * (each[1] - alone)

    s, y = float(sigma[980]), x * math.sqrt(1 + float(sigma[980]) ** 2)
    times = torch.linspace(math.log(s), math.log(1e-3), 2001, dtype=torch.float64).exp().tolist()
    for now, then in zip(times[:-1], times[1:]):
        h, middle = then - now, (now + then) / 2
        k1 = noise(y, now)
        k2 = noise(y + h / 2 * k1, middle)
        k3 = noise(y + h / 2 * k2, middle)
        k4 = noise(y + h * k3, then)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    found = ddim_sample(
        Guided(space["bump_noise"], labels(1, 1, 1, 1), w),
        COSINE,
        4,
        list(range(980, -1, -1)),
        shape=(),
        x_T=x.float(),
        clip=False,
        progress=False,
    )
    torch.testing.assert_close(found.double(), y, rtol=0, atol=0.02)


# ------------------------------------------------------------------ Guided is a model like any other


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("predicts", ["noise", "v"])
def test_guided_in_every_sampler(network, name, predicts):
    """w = 0 and 1 are the network without and with its labels, w = 2.5 two calls added by hand."""
    schedule, y = linear_schedule(20), labels()
    model = network if predicts == "noise" else NoiseFromV(network, schedule)
    by_hand = {
        0: lambda xt, t: model(xt, t),
        1: lambda xt, t: model(xt, t, y),
        2.5: lambda xt, t: 2.5 * model(xt, t, y) - 1.5 * model(xt, t),
    }
    for w, expected in by_hand.items():
        ends = [
            four_samples(name, predict, schedule) for predict in (Guided(model, y, w), expected)
        ]
        torch.testing.assert_close(*ends, rtol=0, atol=1e-3)  # of another batch size


def test_two_answers_are_one_call_with_twice_the_batch(network):
    sizes = []
    network.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    Guided(network, labels(), 2.0)(torch.randn(4, 1, 8, 8), torch.full((4,), 3))
    assert sizes == [8]


def test_each_image_may_have_its_own_w(network):
    x, t, w = torch.randn(4, 1, 8, 8), torch.full((4,), 3), [0.0, 1.0, 2.0, 5.0]
    together = Guided(network, labels(), torch.tensor(w))(x, t)
    for i in range(4):
        alone = Guided(network, labels()[i : i + 1], w[i])(x[i : i + 1], t[:1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)


def test_a_network_that_predicts_v_is_refused_unless_wrapped(network):
    network.target = "v"
    with pytest.raises(ValueError, match="NoiseFromV"):
        ddim_sample(Guided(network, labels(), 2.0), linear_schedule(20), 4, 5, shape=(1, 8, 8))


WRONG = [
    (labels(0, 1, 2, 3), 2.0, "y must be int64 (B,) from 0 to 2"),  # 3 means "no label"
    (labels(0, -1, 2, 2), 2.0, "y must be int64 (B,) from 0 to 2"),
    (labels().float(), 2.0, "y must be int64"),
    (labels().int(), 2.0, "y must be int64"),
    (labels()[:, None], 2.0, "y must be int64"),
    (labels()[:0], 2.0, "y must be int64"),
    ([0, 1, 2, 2], 2.0, "y must be int64"),
    (9, 2.0, "y must be int64"),
    (labels(), torch.ones(3), "w must be a number or (4,)"),
    (labels(), torch.ones(4, 1), "w must be a number or (4,)"),
]


@pytest.mark.parametrize("y, w, message", WRONG)
def test_wrong_labels_and_w_are_named(network, y, w, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Guided(network, y, w)


def test_another_number_of_labels_than_images_is_named(network):
    guided = Guided(network, labels(), 2.0)
    for n in (2, 8):
        with pytest.raises(ValueError, match=f"one label per image, {n}; got 4"):
            ddim_sample(guided, linear_schedule(20), n, 5, shape=(1, 8, 8), progress=False)


def test_a_network_without_labels_is_named():
    for model in (small_unet(), NoiseFromV(small_unet(), COSINE), lambda xt, t: xt):
        with pytest.raises(ValueError, match="takes no labels"):
            Guided(model, labels(), 2.0)


def test_drop_labels_tosses_a_coin_for_each_and_keeps_the_type():
    y = torch.arange(10).repeat(1000)
    dropped = drop_labels(y, 0.3, 10, torch.Generator().manual_seed(0))
    assert dropped.dtype == torch.int64
    counts = (dropped == 10).view(-1, 100).sum(dim=1).double()  # 100 batches
    assert abs(float(counts.mean()) - 30) < 5 * math.sqrt(21 / 100)
    assert float(counts.var()) == pytest.approx(21, rel=0.5)  # of one coin a batch: 2,100
    assert torch.equal(dropped[dropped < 10], y[dropped < 10])


# ------------------------------------------------------------------ the shipped network


def test_the_shipped_network_draws_what_it_is_asked_for():
    """98% of 10,000 at w = 3 (tests/measure/guidance.json); here 50, which may miss a few."""
    model, schedule = load_pretrained("fashion_labels")
    y = torch.arange(10).repeat(5)
    images = dpm_solver_sample(
        Guided(model, y, 3.0),
        schedule,
        50,
        8,
        progress=False,
        generator=torch.Generator().manual_seed(0),
    )
    named = garment_features(load_classifier()[0], images)[1].argmax(dim=1)
    assert (named == y).float().mean() >= 0.9


# ------------------------------------------------------------------ inpainting


def test_visits_bring_the_unknown_half_to_its_conditional_mean(space):
    """N(0, C) in three dimensions, two of them known: the mean of the third by the normal equations."""
    A = torch.tensor([[0.5, 0.0, 0.0], [0.3, 0.4, 0.0], [0.3, 0.2, 0.2]])
    C = A @ A.T
    expected = C[2, :2] @ torch.linalg.solve(C[:2, :2], torch.tensor([0.9, 0.8]))

    def noise(xt, t):
        a = COSINE.alpha_bars[t[0]]
        return (1 - a).sqrt() * torch.linalg.solve(a * C + (1 - a) * torch.eye(3), xt.T).T

    known, mask = (
        torch.tensor([[0.9, 0.8, 7.0]]).expand(3000, 3),
        torch.tensor([True, True, False]),
    )
    gaps = []
    for visits in (1, 3, 10):
        x = space["inpaint"](noise, COSINE, known, mask, 100, visits, clip=False, progress=False)
        assert torch.equal(x[:, :2], known[:, :2])
        gaps.append(abs(float(x[:, 2].mean() - expected)))
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 0.3 * gaps[0]


@pytest.mark.parametrize("visits", [1, 4])
def test_inpainting_calls_the_network_once_for_each_visit(space, visits):
    seen = []
    known, mask = torch.rand(2, 1, 8, 8), torch.rand(1, 8, 8) < 0.5
    x = space["inpaint"](
        lambda xt, t: seen.append(int(t[0])) or xt, COSINE, known, mask, 5, visits, progress=False
    )
    assert seen == [t for t in (1000, 800, 600, 400) for _ in range(visits)] + [200]
    assert torch.equal(x[:, mask], known[:, mask]) and x.abs().max() <= 1


def test_the_card_and_the_readme_print_what_was_measured():
    found = json.loads((ROOT / "tests" / "measure" / "guidance.json").read_text())
    rows = found[ddpm_utils.WEIGHTS["fashion_labels"][:12]]
    card = (WEIGHTS / "fashion_labels.md").read_text(encoding="utf-8")
    for row, numbers in rows.items():
        w, n = re.match(r"w = ([\d.]+), (\d+) images", row).groups()
        start = f"| {w} | {int(n):,} | {numbers['distance']:.1f} | "
        assert start in card, row
        assert w == "0" or f"{start}{numbers['accuracy']:.1%} |" in card
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"(notebook 10) | 10,000 | {rows['w = 1, 10000 images']['distance']:.1f} |" in readme
