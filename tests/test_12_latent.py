"""Notebook 12: components against numpy's, errors, scales, bad inputs, training on latents, the filter."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from series import NOTEBOOKS, ROOT, WEIGHTS, defined_in

import ddpm_utils
from ddpm_utils import (
    EMA,
    PatchPCA,
    UNet,
    cosine_schedule,
    dpm_solver_sample,
    load_checkpoint,
    load_components,
    load_network,
    load_pretrained,
    save_checkpoint,
    to_model_range,
    to_uint8,
    train,
    v_loss,
)

COSINE = cosine_schedule()


def smooth_images(n=40, channels=3, height=24, width=32, seed=0):
    r = torch.Generator().manual_seed(seed)
    x = F.avg_pool2d(torch.randn(n, channels, height + 4, width + 4, generator=r), 5, 1)
    return to_uint8(2.5 * x)


@pytest.fixture(scope="module")
def images():
    return smooth_images()


# ------------------------------------------------------------------ the components


def rows_by_hand(images, p):
    """Patches as rows, in the order of pixel_unshuffle, by loops."""
    x = to_model_range(images).numpy()
    N, C, H, W = x.shape
    return np.stack(
        [
            x[n, :, i : i + p, j : j + p].reshape(C * p * p)
            for n in range(N)
            for i in range(0, H, p)
            for j in range(0, W, p)
        ]
    )


@pytest.mark.parametrize("components", [1, 7, 48])
def test_against_numpy_svd(images, components):
    """The eigenvectors and variances are those of a singular value decomposition of all rows."""
    pca = PatchPCA(4, components).fit(images, power=1.0)
    rows = rows_by_hand(images, 4).astype(np.float64)
    _, s, vt = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(pca.mean, rows.mean(axis=0), atol=1e-5)
    std = s[:components] / math.sqrt(len(rows))
    np.testing.assert_allclose(pca.scale, std, rtol=2e-3)
    alike = np.abs((pca.basis.numpy()[: min(components, 7)] * vt[: min(components, 7)]).sum(axis=1))
    np.testing.assert_allclose(alike, 1, atol=1e-3)


def test_rows_are_orthonormal(images):
    for components in (1, 16, 48):
        basis = PatchPCA(4, components).fit(images).basis.double()
        assert torch.allclose(
            basis @ basis.T, torch.eye(components, dtype=torch.float64), atol=1e-5
        )


@pytest.mark.parametrize("components", [1, 4, 16, 40, 48])
def test_the_error_is_what_the_discarded_components_hold(images, components):
    pca, x = PatchPCA(4, components).fit(images), to_model_range(images)
    values = np.linalg.eigvalsh(np.cov(rows_by_hand(images, 4).T, bias=True))[::-1]
    error = float((pca.decode(pca.encode(x)) - x).square().mean()) * 48
    assert error == pytest.approx(values[components:].sum(), rel=1e-3, abs=1e-6)


def test_no_other_directions_miss_less(images):
    pca, x = PatchPCA(4, 5).fit(images), to_model_range(images)
    best = float((pca.decode(pca.encode(x)) - x).square().mean())
    torch.manual_seed(0)
    for _ in range(5):
        other = PatchPCA(4, 5)
        q, _ = torch.linalg.qr(pca.basis.T + 0.05 * torch.randn(48, 5))
        other.load_state_dict({"mean": pca.mean, "basis": q.T, "scale": pca.scale})
        assert float((other.decode(other.encode(x)) - x).square().mean()) > best


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_scales(images, power):
    """scale is std to the power, up to one factor; the latents' mean variance is 1."""
    pca = PatchPCA(4, 16).fit(images, power)
    z = pca.encode(to_model_range(images))
    variances = z.var(dim=(0, 2, 3), correction=0)
    assert float(variances.mean()) == pytest.approx(1, abs=1e-3)
    std = variances.sqrt() * pca.scale  # of the unscaled components
    factor = pca.scale / std**power
    assert torch.allclose(factor, factor[:1].expand(16), rtol=1e-3)
    if power == 1:
        assert torch.allclose(variances, torch.ones(16), atol=1e-3)


def test_scaling_is_undone_exactly(images):
    """Powers of two as scales: the image is the same to the last bit."""
    plain, x = PatchPCA(4, 16).fit(images), to_model_range(images)
    plain.scale.fill_(1.0)
    scaled = PatchPCA(4, 16)
    scaled.load_state_dict(plain.state_dict())
    scaled.scale.copy_(2.0 ** (torch.arange(16) % 5 - 2))
    assert torch.equal(
        scaled.encode(x) * scaled.scale[:, None, None], plain.encode(x)
    ) or torch.allclose(scaled.encode(x) * scaled.scale[:, None, None], plain.encode(x), atol=1e-6)
    assert torch.allclose(scaled.decode(scaled.encode(x)), plain.decode(plain.encode(x)), atol=1e-5)


def test_a_second_fit_starts_anew(images):
    pca, again = PatchPCA(4, 8).fit(images), PatchPCA(4, 8).fit(images[:20]).fit(images)
    assert torch.equal(again.scale, pca.scale) and torch.equal(again.mean, pca.mean)


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize("patch, height, width", [(4, 24, 32), (8, 24, 32), (2, 6, 10), (3, 9, 15)])
@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_with_all_components(patch, height, width, channels):
    images = smooth_images(60, channels, height, width)
    numbers = channels * patch**2
    pca, x = PatchPCA(patch, numbers, channels).fit(images), to_model_range(images)
    z = pca.encode(x)
    assert z.shape == (60, numbers, height // patch, width // patch) and z.dtype == torch.float32
    assert torch.allclose(pca.decode(z), x, atol=1e-3)
    other = to_model_range(smooth_images(2, channels, 3 * patch, 5 * patch, seed=9))
    assert torch.allclose(pca.decode(pca.encode(other)), other, atol=1e-3), "another size"


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3, 24, 30),
        torch.zeros(2, 3, 25, 32),
        torch.zeros(3, 24, 31),
        torch.zeros(2, 3, 24, 32, dtype=torch.uint8),
    ],
)
def test_what_does_not_fit_is_named(images, x):
    pca = PatchPCA(4, 16).fit(images)
    with pytest.raises(ValueError, match="floats, sides multiples of 4; got torch"):
        pca.encode(x)


@pytest.mark.parametrize("shape", [(2, 1, 24, 32), (2, 4, 24, 32), (3, 24, 32)])
def test_other_channels_and_a_missing_batch_are_torchs_to_refuse(images, shape):
    with pytest.raises(RuntimeError):
        PatchPCA(4, 16).fit(images).encode(torch.zeros(shape))


def test_fit_wants_bytes_of_sides_that_divide(images):
    with pytest.raises(ValueError, match="uint8"):
        PatchPCA(4, 16).fit(to_model_range(images))
    with pytest.raises(ValueError, match="multiples of 5"):
        PatchPCA(5, 16).fit(images)
    with pytest.raises(RuntimeError, match="basis"):
        PatchPCA(4, 49).fit(images)  # a patch has 48 numbers


# ------------------------------------------------------------------ training on latents


@pytest.fixture
def latents(images):
    return PatchPCA(4, 16).fit(images).encode(to_model_range(images))[:, :, :4, :8]


def small(seed=1, **options):
    torch.manual_seed(seed)
    return UNet(in_channels=16, channels=(8, 16), **options)


def test_latents_are_trained_on_as_they_are(latents, monkeypatch):
    """No conversion: what the loss is given are rows of the latents, whose range is their own."""
    seen = []

    def loss(model, schedule, x0, t, noise):
        seen.append(x0.clone())
        return v_loss(model, schedule, x0, t, noise)

    loss.target = "v"
    train(small(), COSINE, latents, 3, batch_size=5, loss_function=loss, progress=False)
    known = {tuple(z.flatten().tolist()) for z in latents}
    assert all(tuple(z.flatten().tolist()) in known for batch in seen for z in batch)
    assert latents.abs().max() > 1.5, "what the test needs: values that pixels don't have"


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_training_on_latents_resumes_to_the_same_numbers(latents, tmp_path, contiguous):
    if not contiguous:
        latents = latents.transpose(1, 3).contiguous().transpose(1, 3)
        assert not latents.is_contiguous()
    options = {"batch_size": 4, "loss_function": v_loss, "progress": False, "checkpoint_every": 3}
    y = torch.arange(len(latents)) % 5

    def run(checkpoint, callback=None):
        model = small(classes=5)
        ema = EMA(model, decay=0.9)
        losses = train(
            model,
            COSINE,
            latents,
            9,
            ema=ema,
            labels=y,
            checkpoint=checkpoint,
            callback=callback,
            callback_every=4,
            **options,
        )
        return model, ema, losses

    def stop(step):
        raise KeyboardInterrupt

    model, ema, losses = run(tmp_path / "whole.pt")
    assert len(run(tmp_path / "cut.pt", stop)[2]) < 9
    again, ema_again, losses_again = run(tmp_path / "cut.pt")
    assert losses_again == losses
    for a, b in zip(
        [*model.parameters(), *ema.model.parameters()],
        [*again.parameters(), *ema_again.model.parameters()],
    ):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="another run .*images"):
        train(
            small(classes=5),
            COSINE,
            latents * 2,
            9,
            ema=EMA(small(classes=5), decay=0.9),
            labels=y,
            checkpoint=tmp_path / "cut.pt",
            **options,
        )


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_floats_with_nothing_below_0_are_refused(images, shift):
    pixels = images[:, :, :8, :8].float() / 255 + shift
    with pytest.raises(ValueError, match="both sides of 0"):
        train(UNet(3, (8, 16)), COSINE, pixels, 1, progress=False)


# ------------------------------------------------------------------ files


def test_a_checkpoint_with_components_comes_back_and_moves(images, tmp_path):
    pca, model = PatchPCA(4, 16).fit(images), small().half()
    path = tmp_path / "mine.pt"
    save_checkpoint(path, model, COSINE, target="v", pca=pca.state_dict())
    again = load_components(path)
    assert (again.patch, again.basis.shape) == (4, (16, 48))
    x = to_model_range(images)
    assert torch.equal(again.encode(x), pca.encode(x))
    assert load_network(path)[0].target == "v"
    there = load_components(path, "meta")
    assert {buffer.device.type for buffer in there.buffers()} == {"meta"}
    assert there.encode(torch.zeros(2, 3, 8, 8, device="meta")).shape == (2, 16, 2, 2)


def test_a_file_without_components_is_named(tmp_path):
    save_checkpoint(tmp_path / "pixels.pt", small(), COSINE)
    with pytest.raises(ValueError, match="works on pixels"):
        load_components(tmp_path / "pixels.pt")


def test_the_shipped_weights():
    """float32, ε, five labels and none; components that are orthonormal; at most 10 MB."""
    model, schedule = load_pretrained("flowers_latent")
    pca = load_components()
    assert (WEIGHTS / "flowers_latent.pt").stat().st_size < 10e6
    assert load_checkpoint(WEIGHTS / "flowers_latent.pt")["target"] == "v"
    assert torch.allclose(schedule.betas, COSINE.betas)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.allclose(pca.basis @ pca.basis.T, torch.eye(16), atol=1e-4)
    assert model.model.classes == 5 and pca.patch == 8
    draws = torch.Generator().manual_seed(0)
    z = dpm_solver_sample(
        model, schedule, 2, 4, (16, 16, 16), clip=False, generator=draws, progress=False
    )
    x = pca.decode(z)
    assert x.shape == (2, 3, 128, 128) and bool(torch.isfinite(x).all())
    assert 0.3 < float(z.std()) < 3


def test_what_latents_cost_the_helper():
    """At most 25 lines of code, docstrings and blank lines not counted."""
    text = (ROOT / "ddpm_utils.py").read_text(encoding="utf-8")
    body = re.search(r"\nclass PatchPCA.*?(?=\n\n\n)", text, re.DOTALL)[0]
    body = re.sub(r'""".*?"""', "", body, flags=re.DOTALL)
    assert len([line for line in body.splitlines() if line.strip()]) <= 25


# ------------------------------------------------------------------ what only the notebook has


@pytest.fixture(scope="module")
def space():
    return defined_in("12", "LinearFilter", "Decoder", "decoder_loss", "seam_ratio", "cosine")


def test_the_filter_is_the_conditional_mean_of_its_gaussian(space):
    """On draws from itself no scaling of the guess errs less, and the error is the formula's."""
    field = space["LinearFilter"](to_model_range(smooth_images(200, 3, 16, 16)))
    g = torch.Generator().manual_seed(1)
    x0 = field.sample(400, g)
    xt = 0.6 * x0 + 0.8 * torch.randn(x0.shape, generator=g)
    guess = field.predict_x0(xt, 0.6, 0.8)
    error = float((guess - x0).square().mean())
    P = torch.linalg.eigvalsh(field.power).double().clamp(min=0)
    assert error == pytest.approx(float((P * 0.64 / (0.36 * P + 0.64)).mean()), rel=0.02)
    for factor in (0.9, 1.1):
        other = field.mean + factor * (guess - field.mean)
        assert float((other - x0).square().mean()) > error


def test_the_filter_draws_what_it_has_measured(space):
    x = to_model_range(smooth_images(300, 2, 8, 8))
    field = space["LinearFilter"](x)
    drawn = field.sample(4000, torch.Generator().manual_seed(2))
    assert drawn.shape == (4000, 2, 8, 8) and drawn.dtype == torch.float32
    again = space["LinearFilter"](drawn)
    assert torch.allclose(again.mean, field.mean, atol=0.02)
    size = float(field.power.abs().max())
    assert float((again.power - field.power).abs().max()) < 0.1 * size


def test_the_decoder_begins_as_the_linear_one_and_learns(space, images):
    pca = PatchPCA(4, 8).fit(images)
    torch.manual_seed(0)
    decoder, x = space["Decoder"](pca, width=16), to_model_range(images)
    z = pca.encode(x)
    assert torch.equal(decoder(z), pca.decode(z))
    assert {name for name, _ in decoder.named_parameters()} == {
        f"body.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")
    }, "the components are not trained"
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    before = space["decoder_loss"](decoder(z), x).item()
    for _ in range(60):
        loss = space["decoder_loss"](decoder(z), x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.9 * before


def test_seams(space):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert space["seam_ratio"](x) == pytest.approx(1, abs=0.1)
    blocks = F.interpolate(x[..., :4, :4], scale_factor=8) + 0.01 * x
    assert space["seam_ratio"](blocks) > 10


def test_the_card_prints_what_was_measured():
    card = (WEIGHTS / "flowers_latent.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "tests" / "measure" / "latent.json").read_text(encoding="utf-8"))
    for row in found["held out"]:
        line = f"| {row['t']} | {row['linear']:.3f} | {row['network']:.3f} | {row['less']:.0%} |"
        assert line in card, line
    for name, share in found["scalings"].items():
        assert f"| {name} | {share:.1%} |" in card, name
    size = sum(p.numel() for p in ddpm_utils.load_network("flowers_latent")[0].parameters())
    assert f"{size / 1e6:.2f} million" in card


def test_notebook_07_points_here():
    assert "12_latent_space.ipynb" in (NOTEBOOKS / "07_rgb_128.ipynb").read_text(encoding="utf-8")
