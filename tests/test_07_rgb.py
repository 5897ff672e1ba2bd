"""Notebook 07: its schedule, its Gaussian and its measures, against something independent."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from series import WEIGHTS, defined_in
from torch import nn

import ddpm_utils as d


@pytest.fixture(scope="module")
def space():
    return defined_in("07", "multiplications", "gain_by_averaging", "GaussianField", "lopsided",
                      "recovered_share", "shift_log_snr", "shifted_schedule", "gaussian_v_loss",
                      "seam_ratio", "texture")


def smooth(n=60, side=16):
    """Correlated colours, as photographs have, from averaged noise."""
    noise = torch.randn(n, 3, side + 4, side + 4, generator=torch.Generator().manual_seed(0))
    x = F.avg_pool2d(noise, 5, stride=1)
    return x + 0.5 * x.mean(dim=1, keepdim=True) + torch.tensor([0.3, -0.1, 0.0]).view(3, 1, 1)


# ------------------------------------------------------------------ schedule

@pytest.mark.parametrize("make", [d.cosine_schedule, d.linear_schedule])
@pytest.mark.parametrize("side", [28, 64, 128, 256])
def test_the_shift_multiplies_the_snr_by_the_ratio_of_the_areas(space, make, side):
    schedule = make(1000)
    shifted = space["shifted_schedule"](schedule, side)
    a, b = (torch.cumprod(1 - s.betas.double(), 0)[1:] for s in (schedule, shifted))
    ratio = (b / (1 - b)) / (a / (1 - a))
    assert torch.allclose(ratio, torch.full_like(ratio, (28 / side) ** 2), rtol=1e-3)
    assert shifted.T == 1000 and bool((shifted.betas[1:] < 1).all())


def test_averaging_divides_the_noise_and_the_formula_agrees_with_draws(space):
    r = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 3, 64, 64, generator=r)
    x0 = F.interpolate(coarse, scale_factor=2) + 0.5 * torch.randn(4, 3, 128, 128, generator=r) + 2
    noise = torch.randn(60, 3, 128, 128, generator=r)
    signal = x0 - x0.mean(dim=(0, 2, 3), keepdim=True)

    def snr(x, n):
        return 10 * math.log10(float(x.var(unbiased=False) / n.var()))

    by_draws = snr(F.avg_pool2d(signal, 4), F.avg_pool2d(noise, 4)) - snr(signal, noise)
    assert space["gain_by_averaging"](x0, 4) == pytest.approx(by_draws, abs=0.05)
    flat = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert space["gain_by_averaging"](flat, 4) == pytest.approx(10 * math.log10(16), abs=1e-4)


# ------------------------------------------------------------------ the best Gaussian

def test_waves_are_a_rotation(space):
    x = smooth()
    field = space["GaussianField"](x)
    S = len(field.cosines)
    torch.testing.assert_close(field.cosines @ field.cosines.T, torch.eye(S), rtol=0, atol=1e-5)
    torch.testing.assert_close(field.from_waves(field.to_waves(x)), x, rtol=0, atol=1e-5)
    assert float(field.to_waves(x).square().sum() / x.square().sum()) == pytest.approx(1, abs=1e-4)


def test_the_filter_is_the_conditional_mean_of_a_gaussian(space):
    """Two roads: wave by wave, and C s (s² C + n² I)^-1 with the whole covariance matrix."""
    x, signal, noise = smooth(side=6), 0.8, 0.6
    field = space["GaussianField"](x)
    xt = signal * x[:5] + noise * torch.randn(5, 3, 6, 6)
    basis = field.from_waves(torch.eye(3 * 36).view(-1, 3, 6, 6)).flatten(1).double()  # (108, 108)
    C = basis.T @ (field.power.flatten().double()[:, None] * basis)
    gain = signal * C @ torch.linalg.inv(signal**2 * C + noise**2 * torch.eye(108))
    mean = field.mean.expand(1, 3, 6, 6).flatten(1).double()
    expected = mean + (xt.flatten(1).double() - signal * mean) @ gain.T
    found = field.predict_x0(xt, signal, noise).flatten(1).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_field_draws_what_it_has_measured(space):
    field = space["GaussianField"](smooth())
    drawn = field.sample(4000, torch.Generator().manual_seed(1))
    power = field.to_waves(drawn - field.mean).square().mean(dim=0)
    assert float((power / field.power - 1).abs().median()) < 0.05
    assert float((drawn.mean(dim=(0, 2, 3)) - field.mean.flatten()).abs().max()) < 0.02


def test_v_loss_of_the_gaussian_by_draws(space):
    field, schedule = space["GaussianField"](smooth(300)), d.cosine_schedule()
    for t in (100, 500, 900):
        x0, s, n = field.sample(2000), schedule.signal_scale[t], schedule.noise_scale[t]
        noise = torch.randn(x0.shape)
        guess = field.predict_x0(s * x0 + n * noise, s, n)
        of_v = float(((guess - x0) / n).square().mean())
        assert space["gaussian_v_loss"](field, schedule, t) == pytest.approx(of_v, rel=0.03)


def test_recovered_share_at_both_ends(space):
    x = smooth(40, 64)
    field, schedule = space["GaussianField"](x), d.cosine_schedule()
    shares = [space["recovered_share"](field, x[:8], schedule, t) for t in (1, 300, 700, 1000)]
    assert shares[0] > 0.99 and abs(shares[-1]) < 0.1
    assert all(a > b for a, b in zip(shares[:-1], shares[1:]))


# ------------------------------------------------------------------ network

def test_patches_change_nothing_but_the_way():
    """It sees what one with C p² channels and a 1x1 stem sees after folding by hand."""
    torch.manual_seed(0)
    folded = d.UNet(in_channels=12, channels=(8, 16))
    folded.stem = nn.Conv2d(12, 8, 1)
    patched = d.UNet(in_channels=3, channels=(8, 16), patch=2)
    for p in folded.parameters():
        nn.init.normal_(p, std=0.1)
    patched.load_state_dict(folded.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 7])
    by_hand = x.view(2, 3, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 8, 8)
    out = folded(by_hand, t).view(2, 3, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 16)
    assert torch.allclose(patched(x, t), out, atol=1e-6)
    with pytest.raises(ValueError, match="multiples of 4"):
        patched(torch.randn(2, 3, 18, 18), t)


def test_multiplications_by_hand(space):
    """Convolutions follow the area, attention the area squared, the step's layers nothing."""
    model = d.UNet(in_channels=3, channels=(8, 16), patch=2)
    plain, attention = space["multiplications"](model, 16)
    assert attention == pytest.approx(2 * 16 * (4 * 4) ** 2 / 1e6)
    doubled = space["multiplications"](model, 32)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) / 1e6
    assert doubled[0] - linear == pytest.approx(4 * (plain - linear))
    assert doubled[1] == pytest.approx(16 * attention)


def test_seams_and_texture(space):
    ramp = torch.arange(128.0).expand(1, 3, 128, 128)
    assert space["seam_ratio"](ramp) == pytest.approx(1)
    steps = (torch.arange(128) // 4 * 4).float().expand(1, 3, 128, 128)
    assert space["seam_ratio"](ramp + steps) == pytest.approx(5)  # 1 inside, 1 + 4 at borders
    noise = torch.randn(8, 3, 128, 128)
    median, kurtosis, _ = space["texture"](noise)
    assert kurtosis == pytest.approx(3, abs=0.1)
    assert median == pytest.approx(0.6745 * math.sqrt(2), abs=0.02)


def test_what_has_no_side_is_not_lopsided(space):
    x = torch.randint(0, 256, (400, 1, 16, 16), dtype=torch.uint8)
    assert space["lopsided"](x) == pytest.approx(1, abs=0.25)
    x[..., :4] = 255
    assert space["lopsided"](x) > 5


# ------------------------------------------------------------------ weights

def test_shipped_weights_come_back_as_float32_with_the_shifted_schedule(space):
    file = WEIGHTS / "flowers_128.pt"
    assert {v.dtype for v in d.load_checkpoint(file)["model"].values()} == {torch.float16}
    model, schedule = d.load_pretrained("flowers_128")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = space["shifted_schedule"](d.cosine_schedule(), 128)
    assert np.allclose(schedule.alpha_bars, expected.alpha_bars, atol=1e-5)
    out = model(torch.randn(1, 3, 128, 128), torch.tensor([500]))
    assert out.shape == (1, 3, 128, 128)
