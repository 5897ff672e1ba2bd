"""Notebook 07: its schedule, its Gaussian and its measures, against something independent.

That the v-loss of the Gaussian is what draws give, the notebook itself asserts.
"""

import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from series import WEIGHTS, defined_in
from torch import nn

import ddpm_utils as d

nb = types.SimpleNamespace(**defined_in(
    "07", "multiplications", "gain_by_averaging", "GaussianField", "lopsided", "recovered_share",
    "shift_log_snr", "shifted_schedule", "seam_ratio", "texture"))


def smooth(n=60, side=16):
    """Correlated colours, as photographs have, from averaged noise."""
    noise = torch.randn(n, 3, side + 4, side + 4, generator=torch.Generator().manual_seed(0))
    x = F.avg_pool2d(noise, 5, stride=1)
    return x + 0.5 * x.mean(dim=1, keepdim=True) + torch.tensor([0.3, -0.1, 0.0]).view(3, 1, 1)


# ------------------------------------------------------------------ schedule

@pytest.mark.parametrize("make", [d.cosine_schedule, d.linear_schedule])
@pytest.mark.parametrize("side", [28, 64, 128, 256])
def test_the_shift_multiplies_the_snr_by_the_ratio_of_the_areas(make, side):
    schedule = make(1000)
    shifted = nb.shifted_schedule(schedule, side)
    a, b = (torch.cumprod(1 - s.betas.double(), 0)[1:] for s in (schedule, shifted))
    ratio = (b / (1 - b)) / (a / (1 - a))
    assert torch.allclose(ratio, torch.full_like(ratio, (28 / side) ** 2), rtol=1e-3)
    assert shifted.T == 1000 and bool((shifted.betas[1:] < 1).all())


def test_averaging_keeps_what_a_block_has_in_common():
    """Of blocks of ±1 and pixels of ±2 a fifth of the variance; the mean colour is no signal. That
    the noise is divided by 16, the notebook asserts by draws."""
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(4, 4)
    x0 = board.repeat_interleave(4, 0).repeat_interleave(4, 1) + 2 * board.repeat(4, 4)
    colours = torch.tensor([2.0, -1.0, 0.5]).view(3, 1, 1)
    gain = nb.gain_by_averaging((x0 + colours).expand(2, 3, 32, 32), 4)
    assert gain == pytest.approx(10 * math.log10(16 / 5), abs=1e-4)


# ------------------------------------------------------------------ the best Gaussian

def test_waves_are_a_rotation_and_the_filter_the_conditional_mean_of_a_gaussian():
    """Two roads: wave by wave, and C s (s² C + n² I)^-1 with the whole covariance matrix."""
    x, signal, noise, eye = smooth(side=6), 0.8, 0.6, torch.eye(108, dtype=torch.float64)
    field, single = nb.GaussianField(x), eye.float().view(-1, 3, 6, 6)
    basis, turned = (f(single).flatten(1).double() for f in (field.from_waves, field.to_waves))
    torch.testing.assert_close(basis @ basis.T, eye, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned, basis.T, rtol=0, atol=1e-5)
    xt = signal * x[:5] + noise * torch.randn(5, 3, 6, 6)
    C = basis.T @ (field.power.flatten().double()[:, None] * basis)
    gain = signal * C @ torch.linalg.inv(signal**2 * C + noise**2 * eye)
    mean = field.mean.expand(1, 3, 6, 6).flatten(1).double()
    expected = mean + (xt.flatten(1).double() - signal * mean) @ gain.T
    found = field.predict_x0(xt, signal, noise).flatten(1).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_field_draws_what_it_has_measured():
    field = nb.GaussianField(smooth())
    drawn = field.sample(4000, torch.Generator().manual_seed(1))
    power = field.to_waves(drawn - field.mean).square().mean(dim=0)
    assert float((power / field.power - 1).abs().median()) < 0.05
    assert float((drawn.mean(dim=(0, 2, 3)) - field.mean.flatten()).abs().max()) < 0.02


def test_recovered_share_falls_from_1_to_0():
    x, schedule = smooth(40, 64), d.cosine_schedule()
    field = nb.GaussianField(x)
    shares = [nb.recovered_share(field, x[:8], schedule, t) for t in (1, 300, 700, 1000)]
    assert shares[0] > 0.99 and abs(shares[3]) < 0.1
    assert all(a > b for a, b in zip(shares, shares[1:]))


# ------------------------------------------------------------------ network

def test_patches_change_nothing_but_the_way():
    """It sees what one with C p² channels and a 1x1 stem sees after folding by hand."""
    torch.manual_seed(0)
    folded, patched = d.UNet(12, channels=(8, 16)), d.UNet(3, channels=(8, 16), patch=2)
    folded.stem = nn.Conv2d(12, 8, 1)
    for p in folded.parameters():
        nn.init.normal_(p, std=0.1)
    patched.load_state_dict(folded.state_dict())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([1, 7])
    by_hand = x.view(2, 3, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 8, 8)
    out = folded(by_hand, t).view(2, 3, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 16)
    assert torch.allclose(patched(x, t), out, atol=1e-6)
    with pytest.raises(ValueError, match="multiples of 4"):
        patched(torch.randn(2, 3, 18, 18), t)


def test_multiplications_by_hand():
    """Convolutions follow the area, attention the area squared, the step's layers nothing."""
    model = d.UNet(in_channels=3, channels=(8, 16), patch=2)
    (plain, attention), doubled = (nb.multiplications(model, side) for side in (16, 32))
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)) / 1e6
    assert attention == pytest.approx(2 * 16 * (4 * 4) ** 2 / 1e6)
    assert doubled == pytest.approx((linear + 4 * (plain - linear), 16 * attention))


# ------------------------------------------------------------------ measures

def test_seams_and_texture_of_a_staircase():
    """Jumps of 1 within the 32 patches, of 5 at their 31 borders, upwards and downwards."""
    up = torch.arange(128.0) + torch.arange(128) // 4 * 4
    x = torch.stack([up, -up])[:, None, None].expand(2, 3, 128, 128)
    kurtosis = 127 * (96 + 31 * 5**4) / (96 + 31 * 5**2) ** 2
    assert nb.texture(x) == pytest.approx((1, kurtosis, 5))


def test_what_has_no_side_is_not_lopsided():
    x = torch.randint(0, 256, (400, 1, 16, 16), dtype=torch.uint8)
    assert nb.lopsided(x) == pytest.approx(1, abs=0.25)
    x[..., :4] = 255
    assert nb.lopsided(x) > 5


# ------------------------------------------------------------------ weights

def test_shipped_weights_come_back_as_float32_with_the_shifted_schedule():
    saved = d.load_checkpoint(WEIGHTS / "flowers_128.pt")["model"]
    model, schedule = d.load_pretrained("flowers_128")
    assert {v.dtype for v in saved.values()} == {torch.float16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = nb.shifted_schedule(d.cosine_schedule(), 128)
    assert np.allclose(schedule.alpha_bars, expected.alpha_bars, atol=1e-5)
    x = torch.randn(1, 3, 128, 128)
    assert model(x, torch.tensor([500])).shape == x.shape
