"""Notebook 06: the measures and the classifier; and the shipped weights: cards and fetching."""

import hashlib
import json
import math
import os
import pathlib
import shutil

import pytest
import torch
from conftest import send
from series import ROOT, WEIGHTS

import ddpm_utils as d

# ------------------------------------------------------------------ Fréchet distance


def test_frechet_distance_along_the_axes():
    """The sum of (μ₁ - μ₂)² + (σ₁ - σ₂)², also where a deviation is 0."""
    m1, s1 = torch.tensor([[0, 0.5, 3, 1], [1, 2, 0, 1]], dtype=torch.float64)
    m2, s2 = torch.tensor([[0, -1, 1, 1], [1, 0.3, 0.5, 0]], dtype=torch.float64)
    found = d.frechet_distance(m1, s1.square().diag(), m2, s2.square().diag())
    assert isinstance(found, float)
    assert found == pytest.approx(float(((m1 - m2) ** 2 + (s1 - s2) ** 2).sum()), abs=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 6, 8, 64])
def test_frechet_distance_of_any_covariances(dim):
    """A second road: the trace of (C₁C₂)^½ is the sum of the roots of that matrix's eigenvalues."""
    m1, m2 = torch.randn(2, dim, dtype=torch.float64)
    c1, c2 = (x @ x.T / dim for x in torch.randn(2, dim, dim, dtype=torch.float64))
    roots = torch.linalg.eigvals(c1 @ c2).real.clamp(min=0).sqrt()
    expected = float((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * roots.sum())
    assert d.frechet_distance(m1, c1, m2, c2) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n, error", [(4, 1e-6), (30, 1e-6), (200, 1e-9)])
def test_a_set_and_itself_are_at_no_distance_and_never_at_a_negative_one(n, error):
    """Also of fewer images than features: then the covariance is of rank n - 1."""
    for _ in range(20):
        mean, cov = d.feature_statistics(torch.randn(n, 64))
        assert 0 <= d.frechet_distance(mean, cov, mean, cov) < error * float(cov.trace())
        moved = d.frechet_distance(mean, cov, mean + 0.5, cov)
        assert moved == pytest.approx(64 * 0.25, abs=error * float(cov.trace()))
    # what is no number is never the best score
    assert math.isnan(d.frechet_distance(mean * math.nan, cov, mean, cov))


def test_feature_statistics_by_hand():
    for features in (torch.randn(7, 3), torch.tensor([[1.0], [3.0]])):
        mean, cov = d.feature_statistics(features)
        away = features.double() - mean
        torch.testing.assert_close(mean, features.double().sum(dim=0) / len(features))
        torch.testing.assert_close(cov, away.T @ away / (len(features) - 1))  # (D, D), as promised


# ------------------------------------------------------------------ the classifier


def test_garment_features_in_batches_and_from_bytes():
    classifier = d.GarmentClassifier().eval()
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    x = d.to_model_range(images)
    expected = classifier.features(x).detach(), classifier(x).softmax(dim=1).detach()
    for given, size in ((images, 3), (x, 500)):
        found = d.garment_features(classifier, given, batch_size=size)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found[1].sum(dim=1), torch.ones(7))
        assert not found[0].requires_grad and not found[1].requires_grad


def test_load_classifier():
    classifier, (mean, cov) = d.load_classifier()
    assert not classifier.training and mean.shape == (64,) and cov.shape == (64, 64)
    assert mean.dtype == cov.dtype == torch.float64
    test = d.load_fashion_mnist("test")
    if test.is_stand_in:
        pytest.skip("Fashion-MNIST is not on this machine")
    features, shares = d.garment_features(classifier, test.images[:2000])
    assert (shares.argmax(dim=1) == test.labels[:2000]).float().mean() > 0.85
    real, noise = map(d.feature_statistics, (
        features, d.garment_features(classifier, torch.rand(500, 1, 28, 28) * 2 - 1)[0]))
    assert 0 <= d.frechet_distance(*real, mean, cov) < 0.1 * d.frechet_distance(*noise, mean, cov)


# ------------------------------------------------------------------ the shipped weights


def test_load_pretrained():
    model, schedule = d.load_pretrained()
    assert isinstance(schedule, d.NoiseSchedule) and 0 < schedule.alpha_bars[-1] < 1e-4
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    x0 = d.to_model_range(d.load_fashion_mnist("test").images[:64])
    t, noise = torch.randint(1, schedule.T + 1, (64,)), torch.randn(x0.shape)
    # answers with 0 have a loss of 1; also on the stand-in these weights know noise well
    assert float(d.simple_loss(model, schedule, x0, t, noise)) < 0.2
    twin, same = d.load_pretrained("fashion", torch.device("cpu"))
    assert torch.equal(twin(x0[:2], t[:2]), model(x0[:2], t[:2]))
    assert torch.equal(same.betas, schedule.betas)


def test_weights_are_small_and_have_cards():
    assert {file.stem for file in WEIGHTS.glob("*.pt")} == set(d.WEIGHTS)
    for file in WEIGHTS.glob("*.pt"):
        assert file.stat().st_size < 10e6
        assert file.with_suffix(".md").is_file(), f"{file.name} has no model card"
        assert hashlib.sha256(file.read_bytes()).hexdigest() == d.WEIGHTS[file.stem], file.name


def test_the_card_prints_what_was_measured_of_these_weights():
    results = json.loads((ROOT / "tests" / "measure" / "quality.json").read_text())
    lines = (WEIGHTS / "fashion.md").read_text(encoding="utf-8").splitlines()
    measured = results[d.WEIGHTS["fashion"][:12]]  # by python tests/measure/quality.py
    assert measured
    for row, found in {**measured, "real": results["real test images"]["10000"]}.items():
        printed = [f"{found['confidence']:.3f}", f"{found['nearest, median']:.1f}",
                   f"{found['images']:,}", f"{found['distance']:.{2 if row == 'real' else 1}f}"]
        assert any(all(f"| {number} |" in line for number in printed) for line in lines), (
            f"{row}: wanted {printed}")


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A checkout with nothing but the weights of the garments."""
    (tmp_path / "notebooks" / "weights").mkdir(parents=True)
    monkeypatch.setattr(d, "HERE", tmp_path)
    return pathlib.Path(shutil.copy(WEIGHTS / "fashion.pt", tmp_path / "notebooks" / "weights"))


def test_damaged_weights_are_refused(copy):
    good = copy.read_bytes()
    assert d.load_pretrained()[1].T > 0
    one_bit = good[:999] + bytes([good[999] ^ 1]) + good[1000:]
    for bad in (good[:-100], b"<html>log in</html>", one_bit):
        copy.write_bytes(bad)
        with pytest.raises(ValueError, match="fashion.pt is not the shipped one.*SHA-256"):
            d.load_pretrained()


def test_weights_of_ones_own_beside_the_shipped_ones(copy):
    with pytest.raises(ValueError, match="no weights 'trousers', only fashion"):
        d.load_pretrained("trousers")
    mine = shutil.copy(copy, copy.with_name("mine.pt"))
    for name in ("mine", mine):  # not listed anywhere, and not damaged
        assert d.load_pretrained(name)[1].T == 1000


def test_a_notebook_that_came_alone_fetches_the_weights_once(tmp_path, monkeypatch, serve):
    """As in Colab: no folder notebooks/ beside the helper."""
    good = (WEIGHTS / "fashion.pt").read_bytes()
    monkeypatch.setattr(d, "HERE", tmp_path)
    for answer in (None,  # nobody answers
                   lambda r: send(r, good[:1000], len(good)),
                   lambda r: send(r, b"<html>Please log in</html>"),
                   lambda r: r.send_error(404)):
        if answer:
            server = serve(answer)
            monkeypatch.setenv("DDPM_URL", server.url)
        with pytest.raises(OSError, match="fashion could not be fetched"):
            d.load_pretrained()
        assert not answer or server.asked == ["/notebooks/weights/fashion.pt"]
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    server = serve(lambda r: send(r, good))
    monkeypatch.setenv("DDPM_URL", f"{server.url}/base")
    for _ in range(2):  # the second time from the disk
        assert d.load_pretrained()[1].T == 1000
    assert server.asked == ["/base/notebooks/weights/fashion.pt"]


def test_python_ddpm_utils_says_what_is_missing(copy, monkeypatch):
    monkeypatch.setenv("DDPM_DATA", os.fspath(copy.parent / "no such folder"))
    copy.unlink()
    (d.HERE / "requirements.txt").write_text("torch>=99.0\nno-such-package>=1.0\n")
    said = "\n".join(d._missing())
    for what in ("Fashion-MNIST", "weights: the weights fashion", "no-such-package",
                 "is older than 99.0"):
        assert what in said
