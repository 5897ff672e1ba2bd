"""What the notebooks of this series share: first what they teach, then the plumbing.

copy_taught.py copies what a notebook teaches. `python ddpm_utils.py` says what is missing.

t is the paper's t, 1 ... T; arrays over t have T + 1 entries; entry 0 is the clean image. Images
are float32 (B, C, H, W) in [-1, 1], data sets uint8 (N, C, H, W). "DDPM": arXiv 2006.11239.
"""
import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
import pathlib
import random
import socket
import sys
import tempfile
import warnings
from zlib import crc32

try:
    import matplotlib.pyplot as plt
    import numpy as np
    import torch
    import torch.nn.functional as F
    import torchvision
    from packaging.version import Version
    from PIL import Image, ImageDraw, ImageOps
    from torch import nn
    from torchvision.datasets.utils import check_integrity, download_and_extract_archive
    from torchvision.transforms import functional as TF
    from tqdm import tqdm
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"missing: the package {error.name}: pip install -r requirements.txt")


def require(ok, message):
    """ValueError with this message unless ok: for mistakes that would otherwise go unnoticed."""
    if not ok:
        raise ValueError(message)


def check_t(t, batch, low, high):
    """ValueError unless t is an int64 tensor (batch,) with values low ... high."""
    if not (torch.is_tensor(t) and t.dtype == torch.int64 and t.shape == (batch,)):
        # not by require: to print t takes longer than a small network
        raise ValueError(f"t must be int64, as torch.full(({batch},), 1); got {t!r:.80}")
    if t.device.type == "cpu":  # on another device this look would make every step wait
        require(low <= int(t.min()) and int(t.max()) <= high,
                f"t must be between {low} and {high}; got {int(t.min())} to {int(t.max())}")


# --- 01: schedule and forward noising

def at(values, t, x):
    """values[t] in a shape that multiplies x: (T + 1,), (B,), (B, …) give (B, 1, …)."""
    return values[t].view(-1, *[1] * (x.dim() - 1))


class GaussianMixture:
    """Bumps w_k N(m_k, s_k² I): a data distribution whose noised versions are known exactly.

    weights (K,), means (K,) or (K, d), stds (K,). Points x, (B,) or (B, d), are
    signal · x_0 + noise · ε; signal and noise are numbers or (B,).
    """

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = map(torch.as_tensor, (weights, means, stds))

    def sample(self, n, generator=None):
        """n clean points, (n,) or (n, d)."""
        bump = torch.multinomial(self.weights, n, replacement=True, generator=generator)   # (n,)
        noise = torch.randn(n, *self.means.shape[1:], generator=generator)
        return self.means[bump] + at(self.stds, bump, noise) * noise

    def log_parts(self, x, signal=1.0, noise=0.0):
        """log of w_k N(x; signal · m_k, (signal² s_k² + noise²) I): each bump's share, (B, K)."""
        signal, noise = (torch.as_tensor(v, dtype=x.dtype).view(-1, 1) for v in (signal, noise))
        variance = signal**2 * self.stds**2 + noise**2                      # (B, K) or (1, K)
        centre = signal[..., None] * self.means.view(len(self.means), -1)   # (B, K, d) or (1, K, d)
        away = x.view(len(x), 1, -1) - centre                               # (B, K, d)
        return (self.weights.log() - away.square().sum(dim=2) / (2 * variance)
                - away.shape[2] / 2 * (2 * math.pi * variance).log())

    def log_density(self, x, signal=1.0, noise=0.0):
        """log q(x) of the noised mixture, (B,)."""
        return self.log_parts(x, signal, noise).logsumexp(dim=1)


def two_bumps():
    """The one-dimensional world of this series: 35% around -0.7, 65% around 0.5."""
    return GaussianMixture([0.35, 0.65], [-0.7, 0.5], [0.12, 0.18])


class NoiseSchedule:
    """The numbers of the forward process, and the three formulas that use them.

    betas: T variances β_1 … β_T, each between 0 and 1. Every array is computed in float64, kept as
    float32, and has T + 1 entries; entry 0 is the clean image. `.T`, `.betas`, `.alphas`,
    `.alpha_bars` as in DDPM, section 2; `.signal_scale` = √ᾱ, `.noise_scale` = √(1-ᾱ).
    ValueError for betas of another shape or range.
    """

    def __init__(self, betas):
        betas = torch.as_tensor(betas, dtype=torch.float64).cpu()
        require(betas.dim() == 1 and len(betas) > 0 and bool(((betas > 0) & (betas < 1)).all()),
                f"betas must be T numbers between 0 and 1; got {betas!r:.80}")
        betas = torch.cat([torch.zeros(1, dtype=torch.float64), betas])     # (T + 1,)
        alpha_bars = torch.cumprod(1 - betas, dim=0)
        self.T = len(betas) - 1
        self.betas = betas.float()
        self.alphas = (1 - betas).float()
        self.alpha_bars = alpha_bars.float()
        self.signal_scale = alpha_bars.sqrt().float()                       # √ᾱ_t
        self.noise_scale = (1 - alpha_bars).sqrt().float()                  # √(1-ᾱ_t)

    def to(self, device):
        """The same schedule with its arrays on device."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if torch.is_tensor(value):
                setattr(moved, name, value.to(device))
        return moved

    def snr(self):
        """The signal-to-noise ratio ᾱ_t / (1 - ᾱ_t), (T + 1,); infinite at t = 0."""
        return (self.signal_scale / self.noise_scale) ** 2

    def q_sample(self, x0, t, noise):
        """DDPM Eq. 4: x_t from x_0 at once. x0, noise (B, …), t (B,) from 0 to T; gives (B, …)."""
        require(x0.shape == noise.shape, f"x0 {tuple(x0.shape)} and noise {tuple(noise.shape)} "
                                         "must have the same shape")
        require(x0.is_floating_point(), f"x0 must be floats in [-1, 1]; got {x0.dtype}")
        check_t(t, len(x0), 0, self.T)
        return at(self.signal_scale, t, x0) * x0 + at(self.noise_scale, t, x0) * noise

    def predict_x0(self, xt, t, noise):
        """Eq. 4 solved for x_0. xt, noise (B, …), t (B,) from 1 to T; gives (B, …)."""
        require(xt.shape == noise.shape, f"xt {tuple(xt.shape)} and noise {tuple(noise.shape)} "
                                         "must have the same shape")
        check_t(t, len(xt), 1, self.T)
        return (xt - at(self.noise_scale, t, xt) * noise) / at(self.signal_scale, t, xt)

    def q_posterior(self, x0, xt, t):
        """DDPM Eq. 6-7: mean (B, …) and variance (B, 1, …) of q(x_{t-1} given x_t, x_0).

        x0, xt (B, …), t (B,) from 1 to T. The variance is β̃_t, and 0 at t = 1.
        """
        require(x0.shape == xt.shape, f"x0 {tuple(x0.shape)} and xt {tuple(xt.shape)} "
                                      "must have the same shape")
        check_t(t, len(xt), 1, self.T)
        beta, before = at(self.betas, t, xt), at(self.noise_scale, t - 1, xt) ** 2   # 1 - ᾱ_{t-1}
        rest = at(self.noise_scale, t, xt) ** 2                                      # 1 - ᾱ_t
        mean = (at(self.signal_scale, t - 1, xt) * beta / rest * x0
                + at(self.alphas, t, xt).sqrt() * before / rest * xt)
        return mean, beta * before / rest


def linear_schedule(T=1000):
    """DDPM section 4: β from 1e-4 to 0.02 on a straight line, times 1000/T so that every T ends in
    noise; at most 0.999. T: an integer of at least 2. Returns a NoiseSchedule."""
    require(T >= 2, f"T must be at least 2; got {T}")
    betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * 1000 / T
    return NoiseSchedule(betas.clamp(max=0.999))


def cosine_schedule(T=1000):
    """Nichol & Dhariwal 2021 (arXiv 2102.09672) Eq. 17: ᾱ follows a squared cosine; β at most
    0.999. T: an integer of at least 2. Returns a NoiseSchedule."""
    require(T >= 2, f"T must be at least 2; got {T}")
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bars = f / f[0]
    betas = 1 - alpha_bars[1:] / alpha_bars[:-1]
    return NoiseSchedule(betas.clamp(max=0.999))


# --- 02: U-Net

class UNet(nn.Module):
    """The noise predictor ε_θ(x_t, t): x (B, in_channels, H, W), t int64 (B,) give the shape of x.

    channels: the width at each size of feature map, from the full size down, each a multiple of 8;
    every entry after the first halves the map. patch: the stem folds patch x patch pixels into
    channels, and the last layer unfolds them (notebook 07). So H and W must be multiples of
    patch * 2^(len(channels) - 1). classes: with a number, forward takes labels y int64 (B,) from 0
    to classes, the last of which means "no label" and is what y=None gives (notebook 10).
    ValueError for other x and t. Ronneberger et al. 2015 (arXiv 1505.04597) for the shape, DDPM
    appendix B for the parts.
    """

    def __init__(self, in_channels=1, channels=(32, 64, 128), patch=1, classes=0):
        super().__init__()
        require(len(channels) >= 2 and all(c % 8 == 0 for c in channels),
                f"channels must be multiples of 8, such as (32, 64, 128); got {channels}")
        self.config = {"in_channels": in_channels, "channels": list(channels), "patch": patch,
                       "classes": classes}
        self.patch, self.classes = patch, classes
        time_dim = 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(channels[0], time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim), nn.SiLU())
        size = 3 if patch == 1 else 1    # a 3x3 stem would mix a patch with its neighbours
        self.stem = nn.Conv2d(in_channels * patch**2, channels[0], size, padding=size // 2)
        self.down_blocks, self.downs = nn.ModuleList(), nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        for wide, wider in zip(channels[:-1], channels[1:]):
            self.down_blocks.append(ResidualBlock(wide, wide, time_dim))
            self.downs.append(nn.Conv2d(wide, wider, 3, stride=2, padding=1))     # halves H and W
            self.up_blocks.append(ResidualBlock(wider + wide, wide, time_dim))    # + wide: the skip
        self.middle1 = ResidualBlock(channels[-1], channels[-1], time_dim)
        self.attention = SelfAttention(channels[-1])
        self.middle2 = ResidualBlock(channels[-1], channels[-1], time_dim)
        self.norm = nn.GroupNorm(8, channels[0])
        self.out = zero_init(nn.Conv2d(channels[0], in_channels * patch**2, 3, padding=1))
        if classes:
            self.label = nn.Embedding(classes + 1, time_dim)
            nn.init.zeros_(self.label.weight)         # untrained, a label changes nothing

    def forward(self, x, t, y=None):
        multiple = self.patch * 2 ** len(self.downs)
        require(x.dim() == 4 and x.shape[1] == self.config["in_channels"]
                and x.shape[2] % multiple == 0 and x.shape[3] % multiple == 0,
                f"x must be (B, {self.config['in_channels']}, H, W) with H and W multiples of "
                f"{multiple}; got {tuple(x.shape)}")
        check_t(t, len(x), 0, math.inf)
        time = self.time(time_embedding(t, self.stem.out_channels))         # (B, time_dim)
        if self.classes:
            time = time + self.label(torch.full_like(t, self.classes) if y is None else y)
        h = self.stem(F.pixel_unshuffle(x, self.patch))                     # with patch=1: stem(x)
        skips = []
        for block, down in zip(self.down_blocks, self.downs):
            h = block(h, time)
            skips.append(h)
            h = down(h)
        h = self.middle2(self.attention(self.middle1(h, time)), time)
        for block in reversed(self.up_blocks):
            h = F.interpolate(h, scale_factor=2.0, mode="nearest")          # doubles H and W
            h = block(torch.cat([h, skips.pop()], dim=1), time)
        return F.pixel_shuffle(self.out(F.silu(self.norm(h))), self.patch)


def time_embedding(t, dim):
    """Sines and cosines of t at dim/2 frequencies (Vaswani et al. 2017, section 3.5): (B,) gives
    (B, dim)."""
    k = torch.arange(dim // 2, device=t.device)
    frequencies = torch.exp(-math.log(10_000) * k / (dim // 2))             # (dim/2,)
    angles = t[:, None].float() * frequencies                               # (B, dim/2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)                   # (B, dim)


def zero_init(layer):
    """Sets a layer's weights and biases to 0, and returns it."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a scale and shift that depend on the step, plus a shortcut.

    (B, in_channels, H, W) and the step's vector (B, time_dim) give (B, out_channels, H, W).
    """

    def __init__(self, in_channels, out_channels, time_dim):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(8, out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x)))                               # (B, out, H, W)
        scale, shift = self.time(time)[:, :, None, None].chunk(2, dim=1)    # (B, out, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """Every position looks at every position (Vaswani et al. 2017, Eq. 1), plus a shortcut.

    (B, C, H, W) keeps its shape.
    """

    def __init__(self, channels, heads=4):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).view(B, 3, self.heads, C // self.heads, H * W)
        q, k, v = qkv.transpose(3, 4).unbind(dim=1)                 # each (B, heads, H*W, C/heads)
        mixed = F.scaled_dot_product_attention(q, k, v)                     # softmax(q kᵀ / √d) v
        return x + self.out(mixed.transpose(2, 3).reshape(B, C, H, W))


# --- 03: loss

def simple_loss(model, schedule, x0, t=None, noise=None):
    """DDPM Eq. 14: the mean squared error of the predicted noise; a scalar.

    x0 (B, …) in [-1, 1]; t int64 (B,) from 1 to T, drawn uniformly where not given; noise like x0,
    drawn likewise.
    """
    if t is None:
        t = torch.randint(1, schedule.T + 1, (len(x0),), device=x0.device)
    if noise is None:
        noise = torch.randn_like(x0)
    xt = schedule.q_sample(x0, t, noise)
    return F.mse_loss(model(xt, t), noise)


def exact_x0(mixture, x, signal, noise):
    """E[x_0 given x], where x = signal · x_0 + noise · ε and x_0 comes from a GaussianMixture.

    x (B,) or (B, d); signal and noise are numbers or (B,). The best guess of x_0 that there is.
    """
    share = mixture.log_parts(x, signal, noise).softmax(dim=1)              # which bump? (B, K)
    signal, noise = (torch.as_tensor(v, dtype=x.dtype).view(-1, 1) for v in (signal, noise))
    pull = signal * mixture.stds**2 / (signal**2 * mixture.stds**2 + noise**2)   # (B, K) or (1, K)
    means = mixture.means.view(len(mixture.means), -1)                      # (K, d)
    away = x.view(len(x), 1, -1) - signal[..., None] * means                # (B, K, d)
    return (share[..., None] * (means + pull[..., None] * away)).sum(dim=1).view(x.shape)


def exact_noise_predictor(mixture, schedule):
    """model(xt, t) that gives E[ε given x_t], as a perfect network would for a GaussianMixture."""
    def model(xt, t):
        signal, noise = schedule.signal_scale[t], schedule.noise_scale[t]   # (B,)
        x0 = exact_x0(mixture, xt, signal, noise)
        return (xt - at(schedule.signal_scale, t, xt) * x0) / at(schedule.noise_scale, t, xt)
    return model


# --- 04: training

class EMA:
    """A second copy of the network whose parameters are a running average of the first one's.

    `.model` is that copy. decay: the share of the old average kept at each update; early updates
    keep less, so that the random start is soon forgotten. Buffers are copied, not averaged.
    """

    def __init__(self, model, decay=0.999):
        require(not hasattr(decay, "parameters") and 0 <= decay < 1,
                f"decay must be between 0 and 1, such as 0.999; got {decay!r:.40}")
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model):
        """One step of the average: average ← decay · average + (1 - decay) · parameters."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for average, current in zip(self.model.parameters(), model.parameters()):
            average.lerp_(current, 1 - decay)
        for average, current in zip(self.model.buffers(), model.buffers()):
            average.copy_(current)


def learning_rate(step, steps, peak, warmup):
    """Up on a straight line for warmup steps, then down to 0 along half a cosine; step from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def v_loss(model, schedule, x0, t=None, noise=None, gamma=None):
    """The mean squared error of v = √ᾱ ε - √(1-ᾱ) x_0 (Salimans & Ho 2022, arXiv 2202.00512).

    model predicts v; the rest as in simple_loss. gamma: a number gives the error of x_0 the weight
    min(SNR_t, gamma) (Min-SNR, Hang et al. 2023, arXiv 2303.09556, section 3.4), which is
    min(SNR_t, gamma) / (SNR_t + 1) on that of v.
    """
    if t is None:
        t = torch.randint(1, schedule.T + 1, (len(x0),), device=x0.device)
    if noise is None:
        noise = torch.randn_like(x0)
    xt = schedule.q_sample(x0, t, noise)
    v = at(schedule.signal_scale, t, x0) * noise - at(schedule.noise_scale, t, x0) * x0
    error = (model(xt, t) - v).square()
    if gamma is not None:
        snr = at(schedule.snr(), t, x0)
        error = error * snr.clamp(max=gamma) / (snr + 1)
    return error.mean()


v_loss.target = "v"                             # train notes it, so that samplers can tell


class NoiseFromV(nn.Module):
    """Makes a network that predicts v look like one that predicts ε: ε = √ᾱ v + √(1-ᾱ) x_t."""

    def __init__(self, model, schedule):
        super().__init__()
        self.model, self.target = model, "noise"
        self.register_buffer("signal_scale", schedule.signal_scale, persistent=False)
        self.register_buffer("noise_scale", schedule.noise_scale, persistent=False)

    def forward(self, xt, t, *label):
        v = self.model(xt, t, *label).float()
        return at(self.signal_scale, t, xt) * v + at(self.noise_scale, t, xt) * xt


def min_snr_loss(model, schedule, x0, t=None, noise=None):
    """v_loss with Min-SNR weights, γ = 5; a scalar. The rest as there."""
    return v_loss(model, schedule, x0, t, noise, gamma=5)


min_snr_loss.target = "v"


# --- 05: sampling

def start_noise(model, schedule, n, shape, x_T, generator):
    """x_T: the one given, checked, or n standard normal draws on the schedule's device."""
    require(getattr(model, "target", None) in (None, "noise"), "this network does not predict the "
            "noise: wrap it for the samplers, as in NoiseFromV(model, schedule)")
    if x_T is None:
        return torch.randn(n, *shape, device=schedule.betas.device, generator=generator)
    require(tuple(x_T.shape) == (n, *shape),
            f"x_T must have the shape {(n, *shape)}; got {tuple(x_T.shape)}")
    return x_T.to(schedule.betas.device).float()


@torch.no_grad()
def ddpm_sample(model, schedule, n, shape=(1, 28, 28), clip=True, sigma="beta", x_T=None,
                generator=None, return_trajectory=False, progress=True):
    """DDPM Algorithm 2: n images from noise, one step of Eq. 11 for each t from T to 1.

    model: anything that gives ε as model(xt, t). clip: keep x̂_0 in [-1, 1]. sigma: "beta" for
    σ_t² = β_t, "beta_tilde" for σ_t² = β̃_t. x_T: (n, *shape), drawn where not given. Returns x0
    (n, *shape) on the schedule's device, or with return_trajectory the T + 1 stages x_T … x_0,
    (T + 1, n, *shape), on the cpu.
    """
    require(sigma in ("beta", "beta_tilde"), f'sigma must be "beta" or "beta_tilde"; got {sigma!r}')
    x = start_noise(model, schedule, n, shape, x_T, generator)
    trajectory = [x.cpu()]
    for step in progress_bar(range(schedule.T, 0, -1), "sampling", progress):
        t = torch.full((n,), step, device=x.device)
        x0 = schedule.predict_x0(x, t, model(x, t))                         # the predicted x_0
        if clip:
            x0 = x0.clamp(-1, 1)
        mean, variance = schedule.q_posterior(x0, x, t)                     # Eq. 7
        if sigma == "beta":
            variance = schedule.betas[step]
        x = mean
        if step > 1:                                                        # none in the last step
            x = x + variance.sqrt() * torch.randn(x.shape, device=x.device, generator=generator)
        if return_trajectory:
            trajectory.append(x.cpu())
    return torch.stack(trajectory) if return_trajectory else x


def stops(T, steps, power=1.0):
    """Where a sampler of few steps looks: a list of steps + 1 integers from T down to 0.

    steps: a number from 1 to T, or a list of stops of your own, which is checked. power: 1 for an
    even spacing, more for stops closer together near T, less for closer together near 0 (where two
    would fall on one integer, they are one stop).
    """
    if isinstance(steps, (list, tuple)):
        require(len(steps) >= 2 and 1 <= steps[0] <= T and steps[-1] == 0
                and all(a > b for a, b in zip(steps[:-1], steps[1:])),
                f"a list of stops must fall from T = {T} or below to 0; got {steps!r:.80}")
        return list(steps)
    require(1 <= steps <= T, f"steps must be between 1 and T = {T}; got {steps}")
    return sorted({round(T * (1 - (k / steps) ** power)) for k in range(steps + 1)}, reverse=True)


@torch.no_grad()
def ddim_sample(model, schedule, n, steps=50, eta=0.0, shape=(1, 28, 28), clip=True, x_T=None,
                generator=None, return_trajectory=False, progress=True):
    """DDIM (Song et al. 2020, arXiv 2010.02502) Eq. 12 and 16: n images from noise in few steps.

    steps: 1 to T, evenly spaced, or a list of stops from T down to 0. eta: 0 adds no noise on the
    way, 1 as much as DDPM with β̃_t. The rest, and what is returned, as in ddpm_sample; a
    trajectory has one stage per stop.
    """
    require(0 <= eta <= 1, f"eta must be between 0 and 1; got {eta}")
    x = start_noise(model, schedule, n, shape, x_T, generator)
    places = stops(schedule.T, steps)
    trajectory = [x.cpu()]
    for now, then in progress_bar(list(zip(places[:-1], places[1:])), "sampling", progress):
        t = torch.full((n,), now, device=x.device)
        noise = model(x, t)
        x0 = schedule.predict_x0(x, t, noise)
        if clip:                                    # then ε has to be the one that fits this x̂_0
            x0 = x0.clamp(-1, 1)
            noise = (x - schedule.signal_scale[now] * x0) / schedule.noise_scale[now]
        ratio = schedule.signal_scale[now] / schedule.signal_scale[then]
        sigma = (eta * schedule.noise_scale[then] / schedule.noise_scale[now]
                 * (1 - ratio**2).sqrt())                                   # Eq. 16
        along = (schedule.noise_scale[then]**2 - sigma**2).clamp(min=0).sqrt()
        x = schedule.signal_scale[then] * x0 + along * noise                # Eq. 12
        if eta > 0 and then > 0:
            x = x + sigma * torch.randn(x.shape, device=x.device, generator=generator)
        if return_trajectory:
            trajectory.append(x.cpu())
    return torch.stack(trajectory) if return_trajectory else x


# --- 06: measuring

class GarmentClassifier(nn.Module):
    """A small network that names garments: images (B, 1, 28, 28) in [-1, 1] give logits (B, 10).

    `.features(x)` gives the 64 numbers (B, 64) before the last layer, in which Fréchet distances
    are measured.
    """

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.MaxPool2d(2),                                                # (B, 32, 14, 14)
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.MaxPool2d(2),                                                # (B, 64, 7, 7)
            nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),                                        # (B, 128, 2, 2)
            nn.Flatten(), nn.Dropout(0.3), nn.Linear(512, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def feature_statistics(features):
    """Mean (D,) and covariance (D, D) of features (N, D), N at least 2, in float64."""
    require(features.dim() == 2 and len(features) >= 2,
            f"features must be (N, D) with N at least 2; got {tuple(features.shape)}")
    features = features.cpu().double()
    return features.mean(dim=0), torch.cov(features.T).view(features.shape[1], -1)


def frechet_distance(mean1, cov1, mean2, cov2):
    """The Fréchet distance of two Gaussians, squared, as in FID (Heusel et al. 2017, arXiv
    1706.08500, Eq. 6). Means (D,) and covariances (D, D) in float64 on the cpu; a float, 0 where
    the two agree."""
    require(mean1.shape == mean2.shape and cov1.shape == cov2.shape == (len(mean1), len(mean1)),
            f"means (D,) and covariances (D, D) must fit one another; got {tuple(mean1.shape)}, "
            f"{tuple(cov1.shape)}, {tuple(mean2.shape)}, {tuple(cov2.shape)}")
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T     # the root of cov1
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return max(float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross), 0.0)


# --- 09: a faster solver

@torch.no_grad()
def dpm_solver_sample(model, schedule, n, steps=20, shape=(1, 28, 28), clip=True, x_T=None,
                      generator=None, return_trajectory=False, progress=True):
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2): n images in few steps.

    DDIM's step with η = 0 and with x̂_0 carried on to the middle of the step, along the line
    through the last two. steps: 1 to T, denser near T, or a list of stops from T down to 0. The
    rest, and what is returned, as in ddim_sample.
    """
    x = start_noise(model, schedule, n, shape, x_T, generator)
    places = stops(schedule.T, steps, power=1.6)
    log_snr = (schedule.signal_scale / schedule.noise_scale).log()       # the paper's λ at each t
    trajectory, previous = [x.cpu()], None                      # (t, x̂_0) of the last step
    for now, then in progress_bar(list(zip(places[:-1], places[1:])), "sampling", progress):
        t = torch.full((n,), now, device=x.device)
        x0 = schedule.predict_x0(x, t, model(x, t))
        if clip:
            x0 = x0.clamp(-1, 1)
        middle = x0
        if previous is not None and then > 0:                               # else DDIM's step
            half_step = (log_snr[then] - log_snr[now]) / 2
            middle = x0 + half_step * (x0 - previous[1]) / (log_snr[now] - log_snr[previous[0]])
        previous = (now, x0)
        noise = (x - schedule.signal_scale[now] * middle) / schedule.noise_scale[now]
        x = schedule.signal_scale[then] * middle + schedule.noise_scale[then] * noise
        if return_trajectory:
            trajectory.append(x.cpu())
    return torch.stack(trajectory) if return_trajectory else x


# --- 10: labels and guidance

def drop_labels(y, drop, none, generator=None):
    """Labels (B,) of which each is replaced by none ("no label") with probability drop, by itself.

    Ho & Salimans 2022 (arXiv 2207.12598), Algorithm 1.
    """
    return torch.where(torch.rand(y.shape, device=y.device, generator=generator) < drop, none, y)


class Guided(nn.Module):
    """A network with labels under guidance, for any sampler: (xt, t) gives ε_∅ + w (ε_y - ε_∅).

    model: gives ε as model(xt, t, y); it or its .model has .classes, the label of "no label". y:
    int64 (B,), one label per image, from 0 to classes - 1. w: a number or (B,); 0 ignores the
    label, 1 samples with it. ValueError for others. Ho & Salimans 2022 (arXiv 2207.12598), Eq. 6,
    whose w is ours minus 1. Both answers come from one batch of 2B.
    """

    def __init__(self, model, y, w):
        super().__init__()
        none = getattr(getattr(model, "model", model), "classes", 0)
        require(none > 0, "this network takes no labels: build it as UNet(classes=10)")
        require(torch.is_tensor(y) and y.dtype == torch.int64 and y.dim() == 1 and len(y) > 0
                and 0 <= int(y.min()) and int(y.max()) < none,
                f"y must be int64 (B,) from 0 to {none - 1}; got {y!r:.80}")
        w = torch.as_tensor(w, dtype=torch.float32, device=y.device)
        require(w.shape in ((), y.shape), f"w must be a number or {tuple(y.shape)}; got {w!r:.80}")
        self.model, self.target = model, getattr(model, "target", None)
        self.register_buffer("labels", torch.cat([y, torch.full_like(y, none)]))
        self.register_buffer("w", w)

    def forward(self, xt, t):
        require(2 * len(xt) == len(self.labels),
                f"y must hold one label per image, {len(xt)}; got {len(self.labels) // 2}")
        labels, w = self.labels.to(xt.device), self.w.to(xt.device)
        both = self.model(torch.cat([xt, xt]), torch.cat([t, t]), labels)
        with_label, without = both.chunk(2)
        return without + w.view(-1, *[1] * (xt.dim() - 1)) * (with_label - without)


# --- 11: flow matching

@torch.no_grad()
def flow_sample(model, n, steps=20, heun=False, T=1000, shape=(1, 28, 28), x_T=None,
                generator=None, return_trajectory=False, progress=True):
    """n images along dx/ds = v from noise, s = 1, to s = 0, by Euler's method or Heun's.

    model: gives the velocity v as model(x, t), with t = s T. steps: 1 to T, evenly spaced, or a
    list of stops from T down to 0. heun: the mean slope of both ends of a step; the last step has
    one, so the calls are 2 · steps - 1. The device is that of x_T, or else of the model. The rest,
    and what is returned, as in ddim_sample. ValueError for a model that predicts something else.
    """
    require(getattr(model, "target", None) in (None, "flow"), "model must predict the velocity of "
            f"flow matching; this one predicts {getattr(model, 'target', None)!r}")
    require(x_T is None or tuple(x_T.shape) == (n, *shape),
            f"x_T must have the shape {(n, *shape)}; got {x_T is not None and tuple(x_T.shape)}")
    weights = model.parameters() if isinstance(model, nn.Module) else []
    device = next((w.device for w in weights), "cpu")
    x = torch.randn(n, *shape, device=device, generator=generator) if x_T is None else x_T
    trajectory, places = [x.cpu()], stops(T, steps)
    for now, then in progress_bar(list(zip(places[:-1], places[1:])), "sampling", progress):
        v = model(x, torch.full((n,), now, device=x.device))
        if heun and then > 0:
            ahead = x + (then - now) / T * v
            v = (v + model(ahead, torch.full((n,), then, device=x.device))) / 2
        x = x + (then - now) / T * v
        if return_trajectory:
            trajectory.append(x.cpu())
    return torch.stack(trajectory) if return_trajectory else x


def flow_loss(model, schedule, x0, t=None, noise=None):
    """The mean squared error of the velocity ε - x_0 at x_s = (1 - s) x_0 + s ε; a scalar.

    s = t / T, and of the schedule only T is used. model predicts the velocity; x0, t and noise as
    in simple_loss. Lipman et al. 2023 (arXiv 2210.02747), Liu et al. 2022 (arXiv 2209.03003).
    """
    if t is None:
        t = torch.randint(1, schedule.T + 1, (len(x0),), device=x0.device)
    if noise is None:
        noise = torch.randn_like(x0)
    require(x0.is_floating_point() and x0.shape == noise.shape, "x0 and noise must be floats of "
            f"one shape; got {x0.dtype} {tuple(x0.shape)} and {tuple(noise.shape)}")
    check_t(t, len(x0), 1, schedule.T)
    s = (t.to(x0) / schedule.T).view(-1, *[1] * (x0.dim() - 1))             # (B, 1, …)
    return F.mse_loss(model((1 - s) * x0 + s * noise, t), noise - x0)


flow_loss.target = "flow"


class NoiseFromFlow(nn.Module):
    """Makes a network that predicts the velocity of flow matching look like one that predicts ε.

    At (xt, t) of the schedule it asks model at x_s = x_t / (√ᾱ + √(1-ᾱ)), with
    s = √(1-ᾱ) / (√ᾱ + √(1-ᾱ)), and t' = T s rounded, at least 1; ε = x_s + (1 - s) v. T: the steps
    that model was trained with. Labels are handed on. ValueError for a model that predicts
    something else.
    """

    def __init__(self, model, schedule, T=1000):
        super().__init__()
        require(getattr(model, "target", None) in (None, "flow"), "model must predict the velocity "
                f"of flow matching; this one predicts {getattr(model, 'target', None)!r}")
        self.model, self.target, self.T = model, "noise", T
        total = schedule.signal_scale + schedule.noise_scale                # (schedule.T + 1,)
        self.register_buffer("total", total, persistent=False)
        self.register_buffer("s", schedule.noise_scale / total, persistent=False)

    def forward(self, xt, t, *label):
        xs = xt / at(self.total, t, xt)
        nearest = (self.T * self.s[t]).round().long().clamp(min=1)          # (B,)
        return xs + (1 - at(self.s, t, xt)) * self.model(xs, nearest, *label).float()


# --- 12: a latent space

class PatchPCA(nn.Module):
    """An autoencoder without training: of each patch of an image its largest principal components.

    encode: images (B, channels, H, W), floats, to latents (B, components, H/patch, W/patch);
    decode: back. The buffers mean (numbers,), basis (components, numbers), with orthonormal rows,
    and scale (components,), for numbers = channels · patch², are filled by fit or load_state_dict.
    ValueError for sides that are no multiples of patch, and for bytes where floats are meant.
    """

    def __init__(self, patch=8, components=16, channels=3):
        super().__init__()
        self.patch, numbers = patch, channels * patch**2
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("basis", torch.eye(components, numbers))
        self.register_buffer("scale", torch.ones(components))

    def fold(self, x):  # (B, numbers, H/patch, W/patch)
        require(x.is_floating_point() and x.shape[-2] % self.patch == x.shape[-1] % self.patch == 0,
                f"images must be floats, sides multiples of {self.patch}; got {x.dtype} {x.shape}")
        return F.pixel_unshuffle(x, self.patch)

    def fit(self, images, power=0.5):
        """From uint8 images, a few hundred or more: scale = std**power, times what makes the
        latents' mean variance 1."""
        rows = self.fold(to_model_range(images)).transpose(0, 1).flatten(1)     # (numbers, patches)
        values, vectors = torch.linalg.eigh(torch.cov(rows, correction=0).double())
        std = values.flip(0)[: len(self.scale)].clamp(min=1e-12).sqrt()         # the largest first
        scale = std**power * (std ** (1 - power)).square().mean().sqrt()
        basis = vectors.T.flip(0)[: len(scale)]
        self.load_state_dict({"mean": rows.mean(dim=1), "basis": basis, "scale": scale})
        return self

    def encode(self, x):
        rows = self.fold(x) - self.mean[:, None, None]
        return torch.einsum("kc,bchw->bkhw", self.basis / self.scale[:, None], rows)

    def decode(self, z):
        rows = torch.einsum("kc,bkhw->bchw", self.basis * self.scale[:, None], z)
        return F.pixel_shuffle(rows + self.mean[:, None, None], self.patch)


# --- plumbing: nothing below is taught

HERE = pathlib.Path(__file__).resolve().parent
SOURCE = "https://raw.githubusercontent.com/OWNER/diffusion-notebooks/main"
WAIT = 15  # seconds without a byte after which a server is given up
# Okabe and Ito's colours: they stay apart for the colour-blind, and in grey
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]


def set_up(seed=0):
    """Seeds everything, picks the fastest device, sets the look of the plots, says so in one line.

    Returns a torch.device: cuda, else mps, else cpu.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a letter that the terminal lacks must not end a run
        sys.stdout.reconfigure(errors="replace")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    plt.rcParams.update({
        "axes.prop_cycle": plt.cycler(color=COLOURS), "font.size": 12, "axes.titlesize": 13,
        "figure.figsize": (8, 4), "figure.dpi": 80, "savefig.bbox": "tight", "image.cmap": "gray",
        "image.interpolation": "nearest",  # pixels stay squares, and the saved file small
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
    kind = ("cuda" if torch.cuda.is_available() else
            "mps" if torch.backends.mps.is_available() else "cpu")
    what = torch.cuda.get_device_name() if kind == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"device: {kind} ({what}), seed: {seed}, torch {torch.__version__.split('+')[0]}")
    return torch.device(kind)


def check(number, attempt):
    """Runs an exercise's attempt(), which returns a hint, or None where all is right."""
    try:
        hint = attempt()
    except NotImplementedError:
        hint = "not attempted yet"
    print(f"Exercise {number}: {hint or 'correct'}")


def progress_bar(items, desc, show=True, **options):
    """A tqdm bar over items (an iterable with a length); show=False gives a silent one.

    Plain text rather than a widget: it looks the same in JupyterLab, in Colab and in a saved page.
    """
    return tqdm(items, desc, file=sys.stdout, disable=not show, ncols=100, **options)


def output_path(name):
    """Where a notebook writes the file called name: `outputs/`, which git ignores, and in a
    read-only checkout `outputs/` in your home. With the environment variable DDPM_MAINTAINER=1
    pictures go to `img/`, which the README shows."""
    to_img = name.endswith((".png", ".jpg", ".gif")) and os.environ.get("DDPM_MAINTAINER") == "1"
    home = HERE if os.access(HERE, os.W_OK) else pathlib.Path.home()
    folder = home / ("img" if to_img else "outputs")
    folder.mkdir(exist_ok=True)
    return folder / name


@contextlib.contextmanager
def _aside(folder):
    """A new folder inside folder, gone afterwards: what is downloaded or written there is moved to
    its place when it is whole. A server that sends nothing is given up, which torch's downloads
    don't do by themselves."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(WAIT)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as room:
            yield pathlib.Path(room)
    finally:
        socket.setdefaulttimeout(before)


def _write_whole(path, write):
    """The file is there whole or not at all: written aside, then moved."""
    path = pathlib.Path(path).expanduser().resolve()  # a symbolic link stays a link
    try:
        with _aside(path.parent) as room:
            with open(room / path.name, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise OSError(f"{path.name} could not be written ({error}); the old one stays") from error


# --- data

CLASSES = ["T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker",
           "bag", "ankle boot"]
# MD5 of the unpacked files: torchvision checks only the packed ones, and only after a download
MD5 = {"train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
       "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
       "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
       "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965"}
FLOWERS = "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
FLOWERS_MD5 = "6f87fb78e9cc9ab41eff2015b380011d"


@dataclasses.dataclass
class ImageSet:
    """`.images` uint8 (N, C, H, W), `.labels` int64 (N,), `.classes` names, `.source` a text;
    `.is_stand_in` is True where the images are drawn by code and not those of the data set."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: list
    source: str

    def __len__(self):
        return len(self.images)

    @property
    def is_stand_in(self):
        return "stand-in" in self.source


def _data_folder(root=None):
    """root, else DDPM_DATA, else data/; a relative one is meant from the folder of this file."""
    return HERE / pathlib.Path(root or os.environ.get("DDPM_DATA") or "data").expanduser()


def _bad_files(folder):
    """The names of Fashion-MNIST's four unpacked files that are missing or damaged."""
    raw = folder / "FashionMNIST" / "raw"
    return [name for name, md5 in MD5.items() if not check_integrity(raw / name, md5)]


def load_fashion_mnist(split="train", root=None):
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747), or a drawn stand-in without network.

    split: "train" (60,000 images) or "test" (10,000). root: the folder that holds or gets
    `FashionMNIST/raw/`; without it the environment variable DDPM_DATA, then `data/` beside this
    file. Missing or damaged files are downloaded by torchvision; a server that sends nothing for
    15 seconds is given up, and DDPM_DOWNLOAD=0 forbids downloads.

    Returns an ImageSet, uint8 (N, 1, 28, 28); its `.source` is "Fashion-MNIST" or a text with
    "stand-in" in it. ValueError for another split.
    """
    require(split in ("train", "test"), f'split must be "train" or "test"; got {split!r}')
    folder = _data_folder(root)
    bad, raw = _bad_files(folder), pathlib.Path("FashionMNIST", "raw")
    if bad:
        print(f"missing or damaged: {', '.join(bad)}; downloading Fashion-MNIST (30 MB) ...")
        try:
            require(os.environ.get("DDPM_DOWNLOAD") != "0", "DDPM_DOWNLOAD=0 forbids downloads")
            with _aside(folder) as room:
                torchvision.datasets.FashionMNIST(room, download=True)
                require(not _bad_files(room), "what came is not Fashion-MNIST")
                (folder / raw).mkdir(parents=True, exist_ok=True)
                for name in MD5:
                    os.replace(room / raw / name, folder / raw / name)
        except Exception as error:  # no network, no room, a login page: the lesson goes on
            print(f"Fashion-MNIST is not available: using a drawn stand-in ({error!r:.150})")
            return _draw_stand_in(split)
    data = torchvision.datasets.FashionMNIST(folder, train=split == "train", download=False)
    return ImageSet(data.data[:, None], data.targets, CLASSES, "Fashion-MNIST")


# The stand-in's outlines: each corner's x and y, two digits each, in hundredths of a box
TOP = "2410 4008 6008 7610 {0}{1} 84{2} 7332 7695 2495 2732 16{2} {3}{1}"
OUTLINES = [TOP.format(98, 32, 40, "02"), "3004 7004 7696 5796 5030 4396 2496",
            TOP.format(96, 78, 84, "04"), "4204 5804 6040 7896 2296 4040",
            TOP.format(99, 88, 92, "01"), "0572 3060 4566 6245 9230 9570 9578 0580",
            TOP.format(95, 58, 64, "05"), "0368 3055 5040 6246 9242 9775 0378",
            "1090 1440 3238 3614 6414 6838 8640 9090", "0578 1066 4055 4512 8512 9090 0590"]


def _draw_stand_in(split):
    """Grey silhouettes of the ten kinds of garments, 28x28, varied in size, shade and position."""
    n, r = (12_000, random.Random(1)) if split == "train" else (2_000, random.Random(2))
    images, labels = torch.zeros(n, 1, 28, 28, dtype=torch.uint8), torch.arange(n) % 10
    for image, kind in zip(images, labels.tolist()):
        big = Image.new("L", (56, 56))                  # drawn at twice the size, for soft edges
        w, h, x, y = r.uniform(38, 54), r.uniform(42, 56), r.uniform(-2, 2), r.uniform(-2, 2)
        points = [(28 + x + (int(p[:2]) / 100 - 0.5) * w, 28 + y + (int(p[2:]) / 100 - 0.5) * h)
                  for p in OUTLINES[kind].split()]
        shade = r.randint(90, 255)
        ImageDraw.Draw(big).polygon(points, fill=shade)
        if kind in (4, 6):                              # a coat's and a shirt's front
            ImageDraw.Draw(big).line([(28 + x, 12), (28 + x, 50)], fill=shade // 3, width=2)
        image[0] = torch.from_numpy(np.array(big.reduce(2)))
    order = torch.from_numpy(np.random.default_rng(0).permutation(n))
    return ImageSet(images[order], labels[order], CLASSES, "stand-in, drawn by code")


def load_images(folder, side, crop=True, grey=None, background=255):
    """Your own images: every image file in folder and its subfolders, as an ImageSet.

    Each subfolder is a class; files directly in folder are one class, named after it. Files and
    folders whose names begin with a dot are left out; animated and broken files are named and left
    out. side: height and width of the result, in pixels. crop: True keeps the middle square, False
    fits the whole image in and fills the rest with background (0 ... 255), which also fills
    transparent parts. grey: True or False, or None for grey only where all files are. A phone's
    rotation mark is honoured, 16-bit grey is scaled to 8. ValueError where there are no images.
    """
    folder = pathlib.Path(folder).expanduser().resolve()
    images, names, left_out, endings = [], [], [], Image.registered_extensions()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        if path.suffix.lower() not in endings or any(part.startswith(".") for part in inside):
            continue
        try:
            with Image.open(path) as file:
                require(getattr(file, "n_frames", 1) == 1, "animated")
                image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16-bit grey
                image = Image.fromarray((np.array(image) / 257).clip(0, 255).astype(np.uint8))
            image, size = image.convert("RGBA"), (side, side)
            image = ImageOps.fit(image, size) if crop else ImageOps.pad(image, size, color=0)
            base = Image.new("RGBA", size, (background, background, background, 255))
            images.append(TF.pil_to_tensor(Image.alpha_composite(base, image).convert("RGB")))
            names.append(inside[0] if len(inside) > 1 else folder.name)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            left_out.append(f"{path.name} ({error})")
    if left_out:
        print(f"{len(left_out)} files left out: {', '.join(left_out)[:300]}")
    require(images, f"there are no images to read in {folder}")
    images = torch.stack(images)                                            # (N, 3, side, side)
    if grey or grey is None and bool((images == images[:, :1]).all()):
        images = TF.rgb_to_grayscale(images.float()).round().to(torch.uint8)
    classes, labels = np.unique(names, return_inverse=True)
    return ImageSet(images, torch.from_numpy(labels), classes.tolist(), folder.name)


def load_flowers(side=128):
    """Photographs of five kinds of flowers (TensorFlow's flower_photos), or a stand-in.

    Looked for as `flower_photos` in the data folder, downloaded (218 MiB) where they are not there
    and DDPM_DOWNLOAD is not 0. Returns an ImageSet, uint8 (N, 3, side, side).
    """
    folder = _data_folder()
    try:
        if not (folder / "flower_photos").is_dir():
            require(os.environ.get("DDPM_DOWNLOAD") != "0", "DDPM_DOWNLOAD=0 forbids downloads")
            print("flower_photos is not here: downloading 218 MiB ...")
            with _aside(folder) as room:
                download_and_extract_archive(FLOWERS, room, md5=FLOWERS_MD5)
                os.replace(room / "flower_photos", folder / "flower_photos")
        return load_images(folder / "flower_photos", side, grey=False)
    except Exception as error:
        print(f"flower_photos is not available: using a drawn stand-in ({error!r:.150})")
    drawn = _draw_stand_in("test")
    tints = torch.rand(len(drawn), 3, 1, 1, generator=torch.Generator().manual_seed(0))
    drawn.images = (TF.resize(drawn.images, [side]) * tints + 60 * (1 - tints)).to(torch.uint8)
    return drawn


def to_model_range(u8):
    """uint8 pixels 0 ... 255, any shape, to float32 in [-1, 1]. ValueError for another type."""
    require(u8.dtype == torch.uint8, f"u8 must be uint8, 0 ... 255; got {u8.dtype}")
    return u8.float() / 127.5 - 1


def to_uint8(x):
    """Floats in [-1, 1], clipped to it, any shape, to uint8 pixels 0 ... 255.

    ValueError for another type, where x is not finite, and for floats that run to 255.
    """
    require(x.is_floating_point(), f"x must be floats in [-1, 1]; got {x.dtype}")
    require(bool(torch.isfinite(x).all()), "x holds values that are not numbers (NaN or infinite)")
    require(bool((x < 0).any() or (x < 10).all()), "x must be floats in [-1, 1]; these look like "
            "0 ... 255: give them as uint8")
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


# --- pictures

def _pixels(images):
    """uint8 on the CPU, with a warning where many floats look like [0, 1], which is drawn pale."""
    if images.dtype == torch.uint8:
        return images.cpu()
    u8 = to_uint8(images).cpu()
    if len(u8) >= 8 and 0 <= images.min() < 0.02 and images.max() <= 1:
        warnings.warn("no value is below 0: if these images are in [0, 1], draw 2 * x - 1",
                      stacklevel=3)
    return u8


def show_images(images, titles=None, columns=None, rows=None, title=None, scale=1.0):
    """Draws images in a grid, all in one intensity range, and returns the figure.

    images: (N, C, H, W) with C 1 or 3; uint8, or floats of which [-1, 1] is drawn and the rest is
    cut off. titles: N texts, one over each image. columns: images in a row. rows: a name for each
    row, at its left. title: over all. scale: inches per image. ValueError for other shapes; a
    warning where eight images or more seem to be in [0, 1].
    """
    require(images.dim() == 4 and images.shape[1] in (1, 3) and len(images) > 0,
            f"images must be (N, 1, H, W) or (N, 3, H, W); got {tuple(images.shape)}")
    u8 = _pixels(images).expand(-1, 3, -1, -1)
    columns = columns or min(len(u8), 10)
    lines = math.ceil(len(u8) / columns)
    require(titles is None or len(titles) == len(u8), "titles must hold one text per image")
    require(rows is None or len(rows) == lines, f"rows must hold {lines} names, one per row")
    cells, pictures, texts, high = (lines, columns), u8, titles, lines * (scale + 0.35)
    if titles is None:  # one picture of the whole grid: much faster than an axis for each
        grid = torchvision.utils.make_grid(u8, nrow=columns, padding=1, pad_value=128)
        cells, pictures, texts, high = (1, 1), [grid], [title], lines * scale + 0.4 * bool(title)
    figure, axes = plt.subplots(*cells, figsize=(columns * scale, high), squeeze=False,
                                subplot_kw={"xticks": [], "yticks": [], "frame_on": False})
    for axis, picture, text in zip(axes.flat, pictures, texts):
        axis.imshow(picture.permute(1, 2, 0).numpy())
        axis.set_title(text, fontsize=13 if titles is None else 11)
    for i, name in enumerate(rows or []):
        axis, y = axes[i % len(axes), 0], (i // len(axes) + 0.5) * (u8.shape[2] + 1)
        axis.annotate(name, (0, y), (-5, 0), "data", "offset points", ha="right", va="center")
    if title and titles is not None:
        figure.suptitle(title)
    figure.tight_layout()
    return figure


def save_gif(frames, path, milliseconds=60, hold=2000, enlarge=1):
    """Writes frames as a GIF that loops, with Pillow. Returns the path.

    frames: uint8 (F, H, W) or (F, C, H, W), or floats of that shape in [-1, 1] (one range for all
    frames). milliseconds: per frame; hold: of the last one. enlarge: whole-number magnification.
    ValueError for other shapes; OSError where the path can't be written, with no half file left; a
    warning where eight frames or more seem to be in [0, 1].
    """
    require(frames.dim() == 3 or frames.dim() == 4 and frames.shape[1] in (1, 3),
            f"frames must be (F, H, W), (F, 1, H, W) or (F, 3, H, W); got {tuple(frames.shape)}")
    u8 = _pixels(frames)
    u8 = F.interpolate(u8.reshape(len(u8), -1, *u8.shape[-2:]), scale_factor=enlarge)
    first, *rest = [TF.to_pil_image(frame) for frame in u8]
    _write_whole(path, lambda f: first.save(f, "GIF", loop=0, save_all=True, append_images=rest,
                                            duration=[milliseconds] * len(rest) + [hold]))
    return pathlib.Path(path)


# --- training with all its comforts

def amp_dtype(device):
    """The number type of mixed precision, where the device truly has it: bfloat16, float16 or None.

    GPUs before compute capability 8.0 (a T4) emulate bfloat16 slowly, so they get float16. A CPU
    gets bfloat16 where it has instructions for it, mps and every other CPU float32 (None).
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    has_bfloat16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if kind == "cpu" and has_bfloat16() else None


def train(model, schedule, images, steps, batch_size=64, lr=1e-3, ema=None, warmup=None, clip=1.0,
          seed=0, loss_function=simple_loss, labels=None, drop=0.1, checkpoint=None,
          checkpoint_every=500, callback=None, callback_every=500, progress=True):
    """DDPM Algorithm 1 with warm-up, decay, clipping and mixed precision; trains model in place.

    images: uint8 (N, C, H, W), or floats of any scale around 0 (the latents of notebook 12), which
    are taken as they are. ema: an EMA of the model, updated after every step. lr: the peak of
    the learning rate; warmup: steps until it is reached, by default a tenth of all, at most 200;
    clip: the largest gradient norm. loss_function: simple_loss for a model that predicts ε, v_loss
    or min_snr_loss for one that predicts v, flow_loss for a velocity. labels: int64 (N,), for a
    UNet with classes; each is dropped with probability drop. checkpoint: a file; the run is saved
    there every checkpoint_every steps; an unfinished run found there is continued, to the same
    numbers as an undisturbed one, and a finished one is loaded (to train its network further:
    load_network, and another file). callback(step): called every callback_every steps.
    Interrupting (the stop button) keeps model, ema and the losses usable.

    Returns the losses so far, a list of floats. FloatingPointError if the loss stops being a
    number: the last good checkpoint is kept. ValueError for other images (floats with nothing below
    0 are pixels of another range), and for a checkpoint of another run.
    """
    are_bytes = images.dtype == torch.uint8
    require(images.dim() == 4 and len(images) > 0
            and (are_bytes or images.is_floating_point() and bool((images < 0).any())),
            "images must be uint8 (N, C, H, W), or latents: floats on both sides of 0; got "
            f"{images.dtype} {tuple(images.shape)}")
    require(ema is None or hasattr(ema, "updates"), f"ema must be EMA(model); got {ema!r:.40}")
    require(callable(loss_function), f"loss_function must be as v_loss; got {loss_function!r:.40}")
    require(any(p.requires_grad for p in model.parameters()),
            "this network is frozen: load_network gives one that can be trained further")
    inner = getattr(loss_function, "func", loss_function)  # of functools.partial(v_loss, gamma=5)
    target, classes = getattr(inner, "target", "noise"), getattr(model, "classes", 0)
    model.target = getattr(model, "target", None) or target
    require(model.target == target, f"this network predicts {model.target}, the loss {target}: "
                                    "take another, or set model.target = None to change it")
    if ema is not None:
        ema.model.target = target
    require(labels is None or classes > 0, "this network takes no labels: UNet(classes=10) does")
    require(labels is None or labels.dtype == torch.int64 and labels.shape == (len(images),)
            and 0 <= int(labels.min()) and int(labels.max()) < classes,
            f"labels must be int64, one per image, from 0 to {classes - 1}, the network's classes")
    steps, batch_size, lr, clip = int(steps), int(batch_size), float(lr), float(clip)
    warmup = min(200, steps // 10) if warmup is None else int(warmup)
    loss_name = f"{inner.__name__} {getattr(loss_function, 'keywords', '')}".strip()
    settings = {"steps": steps, "batch_size": batch_size, "lr": lr, "warmup": warmup, "clip": clip,
                "seed": int(seed), "ema": ema and float(ema.decay), "loss_function": loss_name,
                "network": getattr(model, "config", None),
                "images": crc32(images.cpu().contiguous().numpy()),
                "labels": labels is not None and [crc32(labels.cpu().numpy()), float(drop)],
                "schedule": crc32(schedule.betas.cpu().numpy())}
    device = next(model.parameters()).device
    schedule, images = schedule.to(device), images.to(device)  # all images, once: no copying later
    labels = labels if labels is None else labels.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=device.type != "mps")
    amp = amp_dtype(device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    generator = torch.Generator(device).manual_seed(settings["seed"])
    losses, step = torch.zeros(steps, device=device), 0
    path = checkpoint and pathlib.Path(checkpoint).expanduser()
    if path and path.exists():
        saved = load_checkpoint(path)  # read once: another run may write it meanwhile
        require("settings" in saved, f"{path.name} is not a training checkpoint: give another name")
        differ = [name for name in settings if saved["settings"].get(name) != settings[name]]
        require(not differ, f"{path.name} holds another run ({', '.join(differ)}): give a new name "
                "(and to train its network further, start from load_network)")
        require(saved["device"] == device.type, f"{path.name} was written on {saved['device']}")
        _fill(path, saved, model, ema)
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        generator.set_state(saved["generator"])
        losses.copy_(saved["losses"])
        step = saved["step"]
        if step == steps:
            print(f"{path.name} holds this run, finished: loaded. Delete it to train again.")
    model.train()
    bar = progress_bar(range(step, steps), "training", progress, initial=step, total=steps)
    try:
        for step in bar:
            optimizer.param_groups[0]["lr"] = learning_rate(step, steps, lr, warmup)
            pick = torch.randint(len(images), (batch_size,), device=device, generator=generator)
            x0 = to_model_range(images[pick]) if are_bytes else images[pick].float()
            t = torch.randint(1, schedule.T + 1, (batch_size,), device=device, generator=generator)
            noise = torch.randn(x0.shape, device=device, generator=generator)
            predict = model if labels is None else functools.partial(
                model, y=drop_labels(labels[pick], drop, classes, generator))
            # torch 2.4 has no autocast for Apple GPUs, not even one that is off
            with torch.autocast(device.type, dtype=amp) if amp else contextlib.nullcontext():
                loss = loss_function(predict, schedule, x0, t, noise)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            if ema is not None:
                ema.update(model)
            losses[step], done = loss.detach(), step + 1
            save = done % checkpoint_every == 0 or done == steps
            if save or done % 50 == 0:  # looking makes the device wait: not in every step
                bar.set_postfix_str(f"loss {losses[:done][-100:].mean():.4f}", refresh=False)
                if not all(torch.isfinite(x).all() for x in (losses[:done], *model.parameters())):
                    raise FloatingPointError(f"a loss or weight is not a number at step {done}: "
                                             f"try a smaller lr or clip (last good file: {path})")
            if save and path:
                save_checkpoint(path, model, schedule, ema, optimizer=optimizer.state_dict(),
                                scaler=scaler.state_dict(), generator=generator.get_state(),
                                losses=losses, step=done, settings=settings, device=device.type)
            if callback is not None and (done % callback_every == 0 or done == steps):
                callback(done)
    except KeyboardInterrupt:
        print(f"\nStopped at step {step} of {steps}: model, ema and the losses so far can be used.")
        losses = losses[:step]
    finally:
        model.eval()
    return losses.tolist()


def save_checkpoint(path, model, schedule, ema=None, **more):
    """Writes model, schedule, ema and more plain values and tensors; the whole file or none.

    What the network predicts is saved with it (model.target, "noise" where nothing else is known),
    and how to build it (model.config). OSError where it can't be written, ValueError for values
    that could not be read again: an older file of that name is then untouched.
    """
    wrapped = {"NoiseFromV": "v", "NoiseFromFlow": "flow"}.get(type(model).__name__)
    if wrapped:  # the notebook's own class, too
        model, more = model.model, {"target": wrapped, **more}
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the network
    content = {"unet": getattr(model, "config", None), "model": model.state_dict(),
               "betas": schedule.betas[1:].cpu(), "ema": ema and ema.model.state_dict(),
               "ema_updates": ema.updates if ema else 0,
               "target": getattr(model, "target", None) or "noise", **more}

    def write(file):
        torch.save(content, file)
        file.flush()
        load_checkpoint(file.name)  # what can't be read again must not replace the older file

    _write_whole(path, write)


def load_checkpoint(path, model=None, ema=None):
    """Reads a checkpoint, as a dict of plain values and tensors on the cpu; fills model and ema.

    A plain state_dict is read as well. FileNotFoundError without the file; ValueError where it is
    not a checkpoint or holds a network of another shape.
    """
    path = pathlib.Path(path).expanduser()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if not path.is_file() or isinstance(error, PermissionError) or "memory" in str(error):
            raise  # Python's and torch's own messages are clear
        raise ValueError(f"{path.name} can't be read: it is cut off, or holds more than tensors, "
                         "numbers, texts, lists, dicts (of a model, its state_dict())") from error
    if isinstance(content, dict) and content and all(map(torch.is_tensor, content.values())):
        content = {"model": content}  # a plain state_dict
    require(isinstance(content, dict) and "model" in content, f"{path.name} holds no network")
    require(ema is None or content.get("ema"), f"{path.name} holds no ema: load it without")
    _fill(path, content, model, ema)
    return content


def _fill(path, content, model, ema):
    try:
        networks = {"model": getattr(model, "_orig_mod", model), "ema": ema and ema.model}
        networks = {part: network for part, network in networks.items() if network is not None}
        for part, network in networks.items():  # before load_state_dict copies what happens to fit
            mine, given = network.state_dict(), content[part]
            if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in given.items()}:
                raise TypeError("other names or shapes")
        for part, network in networks.items():
            network.load_state_dict(content[part])
            network.target = content.get("target")
        if ema is not None:
            ema.updates = content["ema_updates"]
    except (RuntimeError, TypeError, AttributeError) as error:
        built = f"UNet(**{content['unet']})" if content.get("unet") else "another network"
        raise ValueError(f"{path} does not fit: it is of {built}") from error


# --- trained weights

WEIGHTS = {  # SHA-256 of the shipped files
    "fashion": "39cca83a72aad7fa0f5e2a34878fd3433d3c15cc6d94db9f4050da58664ef675",
    "fashion_flow": "d1e29ad683db10494d47eabaac97b8e9c0dfc6ff4e807f825549caf76f6740ed",
    "fashion_reflow": "93086fa9e716f4a24b2e1250a628df10929a85db8669bfa4cbb718e127d5d253",
    "classifier": "1240bdf1183e8058c53184b4a48de7b0694ed1eefc07c285abac7f326e2896bf",
    "flowers_128": "c49231a2989036cb658c7f91254b3e955b60b818f4e307dc583c09dcb44cb2df",
    "flowers_latent": "1fa3212e53ac7d77952f5d8e78e0de2f96739a0becdd2bf47588eccb7088114c"}


def _weights_file(name):
    """notebooks/weights/<name>.pt, or weights/ beside a helper that came alone; fetched once. A
    path that ends in .pt is a file of one's own, and handed back."""
    if str(name).endswith(".pt"):
        return name
    folder = HERE / "notebooks" / "weights"
    path = (folder if folder.exists() else HERE / "weights") / f"{name}.pt"
    if not path.exists():
        require(name in WEIGHTS, f"no weights {name!r}, only {', '.join(WEIGHTS)}, or a path.pt")
        url = f"{os.environ.get('DDPM_URL', SOURCE)}/notebooks/weights/{name}.pt"
        try:
            with _aside(path.parent):
                torch.hub.download_url_to_file(url, path, WEIGHTS[name], progress=False)
        except Exception as error:
            raise OSError(f"the weights {name} could not be fetched ({error}): put "
                          f"{url} into {path.parent}") from error
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    require(found == WEIGHTS.get(name, found), f"{path.name} is not the shipped one (SHA-256 "
            f"{found[:8]}): fetch it again, or give weights of your own another name")
    return path


def load_network(name="fashion", device="cpu"):
    """The bare network of a checkpoint, to be trained further, and its schedule, both on device.

    name: that of shipped weights, or the path of a file of your own, ending in .pt. The weights are
    the EMA's where the file has one. model.target tells what the network predicts: "noise", "v" or
    "flow".
    """
    path = _weights_file(name)
    content = load_checkpoint(path)
    require(content.get("unet"), f"{name} doesn't tell how its UNet was built: use load_checkpoint")
    model, schedule = UNet(**content["unet"]), NoiseSchedule(content["betas"]).to(device)
    _fill(path, {**content, "model": content.get("ema") or content["model"]}, model, None)
    return model.to(device).eval(), schedule


def load_pretrained(name="fashion", device="cpu"):
    """A trained network and the schedule that it was trained with, ready for the samplers.

    name: as in load_network. Whatever the network was trained to predict, model(xt, t) gives ε; it
    is in eval mode, with no gradients.
    """
    model, schedule = load_network(name, device)
    model.requires_grad_(False)
    if model.target == "flow":
        return NoiseFromFlow(model, schedule, schedule.T).eval(), schedule
    return (NoiseFromV(model, schedule).eval() if model.target == "v" else model), schedule


def load_components(name="flowers_latent", device="cpu"):
    """The PatchPCA in whose latents trained weights work, on device; name: as in load_network."""
    content = load_checkpoint(_weights_file(name)).get("pca")
    require(content, f"{name} works on pixels: it holds no components (save_checkpoint(pca=...))")
    components, numbers = content["basis"].shape
    pca = PatchPCA(round((numbers / 3) ** 0.5), components)
    pca.load_state_dict(content)
    return pca.to(device)


def load_classifier(device="cpu"):
    """The shipped GarmentClassifier, and (mean, covariance) of its features in training."""
    classifier = GarmentClassifier()
    content = load_checkpoint(_weights_file("classifier"), classifier)
    return classifier.to(device).eval().requires_grad_(False), (content["mean"], content["cov"])


@torch.no_grad()
def garment_features(classifier, images, batch_size=500):
    """Features (N, 64) and probabilities (N, 10), on the cpu, of images (N, 1, 28, 28).

    images: uint8 or floats in [-1, 1]. ValueError for a classifier in training mode.
    """
    require(not classifier.training, "the classifier is in training mode: call its eval() first")
    device = next(classifier.parameters()).device
    x = to_model_range(images if images.dtype == torch.uint8 else to_uint8(images))
    features = torch.cat([classifier.features(part.to(device)) for part in x.split(batch_size)])
    return features.cpu(), classifier.head(features).softmax(dim=1).cpu()


def _missing():
    """What a lesson would miss here: a list of sentences, empty where all is ready."""
    missing, wanted = [], HERE / "requirements.txt"
    # reversed: of two versions of a package the first is imported
    here = {found.name: found.version for found in reversed([*importlib.metadata.distributions()])}
    for line in wanted.read_text().split() if wanted.exists() else []:
        name, low = line.split(">=")
        if Version(here.get(name, "0")) < Version(low):
            missing.append(f"{name} {here.get(name, 'is not installed, or')} is older than {low}")
    if bad := _bad_files(_data_folder()):
        missing.append(f"Fashion-MNIST ({', '.join(bad)}): the first notebook downloads it")
    for name in WEIGHTS:
        try:
            _weights_file(name)
        except (OSError, ValueError) as error:
            missing.append(f"weights: {error}")
    return missing


if __name__ == "__main__":
    set_up()
    problems = _missing()
    print("\n- ".join(["missing (pip install -r requirements.txt brings packages):", *problems])
          if problems else "ready")
    if not (_data_folder() / "flower_photos").is_dir():
        print("(flower_photos, 218 MiB, is not here yet: notebook 07 downloads it)")
    sys.exit(bool(problems))
# the end
