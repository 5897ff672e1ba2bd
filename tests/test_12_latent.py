"""Notebook 12: components against numpy's, scales, bad inputs, training on latents, the filter."""
import json
import math
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from series import NOTEBOOKS, ROOT, WEIGHTS, Stop, defined_in, run, small_unet, stop_at

import ddpm_utils as d


def smooth_images(n=40, channels=3, height=24, width=32, seed=0):
    r = torch.Generator().manual_seed(seed)
    x = F.avg_pool2d(torch.randn(n, channels, height + 4, width + 4, generator=r), 5, 1)
    return d.to_uint8(2.5 * x)


def fit(images, patch=4, components=16, **options):
    return d.PatchPCA(patch, components).fit(images, **options)


nb = types.SimpleNamespace(**defined_in("12", "LinearFilter", "Decoder", "decoder_loss",
                                        "seam_ratio"))
COSINE, IMAGES = d.cosine_schedule(), smooth_images()
X = d.to_model_range(IMAGES)
LATENTS = fit(IMAGES).encode(X)[:, :, :4, :8]


# ------------------------------------------------------------------ the components

@pytest.mark.parametrize("components", [1, 4, 7, 16, 40, 48])
def test_against_numpys_svd(components):
    """Mean, directions and variances, and the error: what the components left out hold, which is
    as little as only orthonormal ones leave out."""
    rows = np.stack([x[:, i:i + 4, j:j + 4].flatten() for x in X.double().numpy()
                     for i in range(0, 24, 4) for j in range(0, 32, 4)])
    _, s, vt = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    pca = fit(IMAGES[:20], components=components).fit(IMAGES, power=1.0)  # a second fit starts anew
    np.testing.assert_allclose(pca.mean, rows.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(pca.scale, s[:components] / math.sqrt(len(rows)), rtol=2e-3)
    alike = np.abs((pca.basis[:7].numpy() * vt[:components][:7]).sum(axis=1))
    np.testing.assert_allclose(alike, 1, atol=1e-3)
    error = float((pca.decode(pca.encode(X)) - X).square().sum())
    assert error / len(rows) == pytest.approx((s[components:] ** 2).sum() / len(rows), 1e-3, 1e-6)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_scales(power):
    """scale is std to the power, up to one factor; the latents' mean variance is 1."""
    pca = fit(IMAGES, power=power)
    variances = pca.encode(X).var(dim=(0, 2, 3), correction=0)
    assert float(variances.mean()) == pytest.approx(1, abs=1e-3)
    factor = pca.scale / (variances.sqrt() * pca.scale) ** power
    assert torch.allclose(factor, factor[:1].expand(16), rtol=1e-3)


@pytest.mark.parametrize("patch, height, width", [(4, 24, 32), (8, 24, 32), (2, 6, 10), (3, 9, 15)])
@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip_with_all_components(patch, height, width, channels):
    images, numbers = smooth_images(60, channels, height, width), channels * patch**2
    pca = d.PatchPCA(patch, numbers, channels).fit(images)
    other_size = smooth_images(2, channels, 3 * patch, 5 * patch, seed=9)
    for x in (d.to_model_range(images), d.to_model_range(other_size)):
        z, (n, _, H, W) = pca.encode(x), x.shape
        assert z.shape == (n, numbers, H // patch, W // patch) and z.dtype == torch.float32
        assert torch.allclose(pca.decode(z), x, atol=1e-3)


WRONG = [  # what is raised, words of the message, a call, its wrong values
    (ValueError, "floats, sides multiples of 4; got torch", d.PatchPCA(4, 16).encode,
     [X[..., :30], X[:, :, :23], X[0, :, :, :31], IMAGES]),
    (RuntimeError, None, d.PatchPCA(4, 16).encode, [X[:, :1], X[:, [0, 1, 2, 0]], X[0]]),  # torch
    (ValueError, "uint8", fit, [X]),
    (ValueError, "multiples of 5", lambda patch: fit(IMAGES, patch), [5]),
    (RuntimeError, "basis", lambda components: fit(IMAGES, 4, components), [49]),  # of 48 numbers
    (ValueError, "both sides of 0", lambda pixels: d.train(d.UNet(3, (8, 16)), COSINE, pixels, 1),
     [IMAGES[..., :8, :8] / 255, IMAGES[..., :8, :8] / 255 + 0.5])]


@pytest.mark.parametrize("error, message, call, wrong",
                         [(*row, value) for *row, values in WRONG for value in values])
def test_what_does_not_fit_is_refused(error, message, call, wrong):
    with pytest.raises(error, match=message):
        call(wrong)


# ------------------------------------------------------------------ training on latents

def test_latents_are_trained_on_as_they_are():
    """No conversion: what the loss is given are rows of the latents, whose range is their own."""
    seen = []

    def loss(model, schedule, x0, t, noise):
        seen.extend(x0.clone())
        return d.v_loss(model, schedule, x0, t, noise)

    loss.target = "v"
    run(3, small_unet(in_channels=16), LATENTS, batch_size=5, loss_function=loss)
    assert len(seen) == 15 and all((LATENTS == z).flatten(1).all(dim=1).any() for z in seen)
    assert LATENTS.abs().max() > 1.5, "what the test needs: values that pixels don't have"


def test_a_training_on_latents_resumes_to_the_same_numbers(tmp_path):
    def training(file, latents=LATENTS, callback=None):
        model = small_unet(in_channels=16, classes=5)
        ema = d.EMA(model, decay=0.9)
        _, losses = run(9, model, latents, ema=ema, labels=torch.arange(40) % 5, callback=callback,
                        callback_every=4, checkpoint=tmp_path / file, checkpoint_every=3,
                        loss_function=d.v_loss)
        return torch.tensor(losses), *model.parameters(), *ema.model.parameters()

    assert not LATENTS.is_contiguous()
    with pytest.raises(Stop):
        training("cut.pt", callback=stop_at(4))
    assert all(map(torch.equal, training("cut.pt"), training("whole.pt")))
    with pytest.raises(ValueError, match="another run .*images"):
        training("cut.pt", LATENTS * 2)


# ------------------------------------------------------------------ files

def test_a_checkpoint_with_components_comes_back_and_moves(tmp_path):
    pca, path, model = fit(IMAGES), tmp_path / "mine.pt", small_unet(in_channels=16).half()
    d.save_checkpoint(path, model, COSINE)
    with pytest.raises(ValueError, match="works on pixels"):
        d.load_components(path)
    d.save_checkpoint(path, model, COSINE, target="v", pca=pca.state_dict())
    again, there = d.load_components(path), d.load_components(path, "meta")
    assert again.patch == 4 and torch.equal(again.encode(X), pca.encode(X))
    assert {buffer.device.type for buffer in there.buffers()} == {"meta"}
    assert d.load_network(path)[0].target == "v"


def test_the_shipped_weights():
    """float32, ε, five labels and none; components that are orthonormal."""
    (model, schedule), pca = d.load_pretrained("flowers_latent"), d.load_components()
    assert isinstance(model, d.NoiseFromV) and model.model.classes == 5 and pca.patch == 8
    assert torch.allclose(schedule.betas, COSINE.betas)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.allclose(pca.basis @ pca.basis.T, torch.eye(16), atol=1e-4)
    z = d.dpm_solver_sample(model, schedule, 2, 4, (16, 16, 16), clip=False, progress=False,
                            generator=torch.Generator().manual_seed(0))
    x = pca.decode(z)
    assert 0.3 < float(z.std()) < 3 and x.shape == (2, 3, 128, 128) and x.isfinite().all()


# ------------------------------------------------------------------ what only the notebook has

def test_the_filter_is_the_conditional_mean_of_its_gaussian():
    """On draws from itself no scaling of the guess errs less, and the error is the formula's."""
    field = nb.LinearFilter(d.to_model_range(smooth_images(200, 3, 16, 16)))
    g = torch.Generator().manual_seed(1)
    x0 = field.sample(400, g)
    guess = field.predict_x0(0.6 * x0 + 0.8 * torch.randn(x0.shape, generator=g), 0.6, 0.8)
    less, error, more = (float((field.mean + factor * (guess - field.mean) - x0).square().mean())
                         for factor in (0.9, 1, 1.1))
    P = torch.linalg.eigvalsh(field.power).double().clamp(min=0)
    assert error == pytest.approx(float((P * 0.64 / (0.36 * P + 0.64)).mean()), rel=0.02)
    assert error < less and error < more


def test_the_filter_draws_what_it_has_measured():
    field = nb.LinearFilter(d.to_model_range(smooth_images(300, 2, 8, 8)))
    drawn = field.sample(4000, torch.Generator().manual_seed(2))
    again = nb.LinearFilter(drawn)
    assert drawn.shape == (4000, 2, 8, 8) and drawn.dtype == torch.float32
    assert torch.allclose(again.mean, field.mean, atol=0.02)
    assert float((again.power - field.power).abs().max() / field.power.abs().max()) < 0.1


def test_the_decoder_begins_as_the_linear_one_and_learns():
    pca = fit(IMAGES, components=8)
    z, decoder, losses = pca.encode(X), nb.Decoder(pca, width=16), []
    assert torch.equal(decoder(z), pca.decode(z))
    assert all(name.startswith("body.") for name, _ in decoder.named_parameters())  # not of the PCA
    optimizer = torch.optim.Adam(decoder.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(nb.decoder_loss(decoder(z), X))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_seams():
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert nb.seam_ratio(x) == pytest.approx(1, abs=0.1)
    assert nb.seam_ratio(F.interpolate(x[..., :4, :4], scale_factor=8) + 0.01 * x) > 10


# ------------------------------------------------------------------ what the pages say

def test_the_card_prints_what_was_measured():
    card = (WEIGHTS / "flowers_latent.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "tests" / "measure" / "latent.json").read_text(encoding="utf-8"))
    lines = ["| {t} | {linear:.3f} | {network:.3f} | {less:.0%} |".format(**row)
             for row in found["held out"]]
    lines += [f"| {name} | {share:.1%} |" for name, share in found["scalings"].items()]
    size = sum(p.numel() for p in d.load_network("flowers_latent")[0].parameters())
    for line in (*lines, f"{size / 1e6:.2f} million"):
        assert line in card, line


def test_notebook_07_points_here():
    assert "12_latent_space.ipynb" in (NOTEBOOKS / "07_rgb_128.ipynb").read_text(encoding="utf-8")
