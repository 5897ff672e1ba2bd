"""Notebook 06: the measures and the classifier; and the shipped weights, their cards, their fetching."""

import hashlib
import json
import math
import os
import shutil

import pytest
import torch
from conftest import send
from series import ROOT, WEIGHTS

import ddpm_utils
from ddpm_utils import (
    GarmentClassifier,
    NoiseSchedule,
    feature_statistics,
    frechet_distance,
    garment_features,
    load_classifier,
    load_fashion_mnist,
    load_pretrained,
    simple_loss,
    to_model_range,
)

needs_weights = pytest.mark.skipif(
    not (WEIGHTS / "fashion.pt").is_file(), reason="notebooks/weights/fashion.pt is absent"
)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_covariance(d):
    root = torch.randn(d, d, dtype=torch.float64)
    return root @ root.T / d


# ------------------------------------------------------------------ Fréchet distance


@pytest.mark.parametrize(
    "m1, s1, m2, s2", [(0, 1, 0, 1), (0.5, 2, -1, 0.3), (3, 0, 1, 0.5), (1, 0, 1, 0)]
)
def test_frechet_distance_in_one_dimension(m1, s1, m2, s2):
    """(μ₁ - μ₂)² + (σ₁ - σ₂)², also where a deviation is 0."""
    found = frechet_distance(
        numbers(m1), numbers(s1**2).view(1, 1), numbers(m2), numbers(s2**2).view(1, 1)
    )
    assert isinstance(found, float)
    assert found == pytest.approx((m1 - m2) ** 2 + (s1 - s2) ** 2, abs=1e-12)


def test_frechet_distance_where_the_covariances_commute():
    """With the same axes it is one dimension after the other."""
    d = 6
    axes = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    v1, v2, m1, m2 = (torch.rand(d, dtype=torch.float64) * 3 for _ in range(4))
    found = frechet_distance(m1, axes @ v1.diag() @ axes.T, m2, axes @ v2.diag() @ axes.T)
    expected = sum((a - b) ** 2 for a, b in zip(m1.tolist(), m2.tolist()))
    expected += sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(v1.tolist(), v2.tolist()))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_any_covariances():
    """A second road: the trace of (C₁C₂)^½ is the sum of the roots of that matrix's eigenvalues."""
    c1, c2, m1, m2 = (
        random_covariance(8),
        random_covariance(8),
        torch.randn(8).double(),
        torch.randn(8).double(),
    )
    eigenvalues = torch.linalg.eigvals(c1 @ c2)
    expected = (
        ((m1 - m2) ** 2).sum()
        + c1.trace()
        + c2.trace()
        - 2 * eigenvalues.real.clamp(min=0).sqrt().sum()
    )
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_of_two_dimensions_in_closed_form():
    """In two dimensions the trace of a root is known: √(tr + 2√det)."""
    c1, c2 = random_covariance(2), random_covariance(2)
    product = c1 @ c2
    expected = (
        c1.trace()
        + c2.trace()
        - 2 * (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    )
    assert frechet_distance(
        torch.zeros(2).double(), c1, torch.zeros(2).double(), c2
    ) == pytest.approx(float(expected))


def test_frechet_distance_is_0_for_the_same_symmetric_and_moves_with_the_mean():
    c1, c2, m = random_covariance(64), random_covariance(64), torch.randn(64).double()
    assert frechet_distance(m, c1, m, c1) == pytest.approx(0, abs=1e-9 * 64)
    assert frechet_distance(m, c1, -m, c2) == pytest.approx(
        frechet_distance(-m, c2, m, c1), rel=1e-9
    )
    step = frechet_distance(m, c1, m + 0.5, c2) - frechet_distance(m, c1, m, c2)
    assert step == pytest.approx(64 * 0.25, rel=1e-9)
    thin = torch.randn(64, 3).double() @ torch.randn(3, 64).double()
    thin = thin @ thin.T  # of rank 3, as from four images
    assert frechet_distance(m, thin, m, thin) == pytest.approx(0, abs=1e-6 * float(thin.trace()))


def test_feature_statistics_by_hand():
    features = torch.randn(7, 3)
    mean, cov = feature_statistics(features)
    assert mean.dtype == cov.dtype == torch.float64 and mean.shape == (3,) and cov.shape == (3, 3)
    rows = features.tolist()
    means = [sum(row[j] for row in rows) / 7 for j in range(3)]
    for j in range(3):
        assert float(mean[j]) == pytest.approx(means[j], abs=1e-6)
        for k in range(3):
            by_hand = sum((row[j] - means[j]) * (row[k] - means[k]) for row in rows) / 6
            assert float(cov[j, k]) == pytest.approx(by_hand, abs=1e-6)


def test_feature_statistics_of_one_feature():
    mean, cov = feature_statistics(torch.tensor([[1.0], [3.0]]))
    assert cov.tolist() == [[2.0]]  # (D, D), as promised
    assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0)


# ------------------------------------------------------------------ the classifier


def test_classifier_shapes():
    classifier = GarmentClassifier().eval()
    x = torch.rand(3, 1, 28, 28) * 2 - 1
    assert classifier(x).shape == (3, 10) and classifier.features(x).shape == (3, 64)
    torch.testing.assert_close(classifier(x), classifier.head(classifier.features(x)))


def test_garment_features_in_batches_and_from_bytes():
    classifier = GarmentClassifier().eval()
    images = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8)
    features, probabilities = garment_features(classifier, images, batch_size=3)
    assert (
        features.shape == (7, 64) and probabilities.shape == (7, 10) and not features.requires_grad
    )
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(7))
    again = garment_features(classifier, to_model_range(images), batch_size=500)
    torch.testing.assert_close(features, again[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        probabilities, classifier(to_model_range(images)).softmax(1).detach(), rtol=1e-3, atol=1e-4
    )


# ------------------------------------------------------------------ the shipped weights


@needs_weights
def test_load_pretrained():
    model, schedule = load_pretrained()
    assert isinstance(schedule, NoiseSchedule) and 0 < schedule.alpha_bars[-1] < 1e-4
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    x0 = to_model_range(load_fashion_mnist("test").images[:64])
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(1, schedule.T + 1, (64,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    with (
        torch.no_grad()
    ):  # answers with 0 have a loss of 1; also on the stand-in these weights know noise well
        assert float(simple_loss(model, schedule, x0, t, noise)) < 0.2
    twin, same = load_pretrained("fashion", torch.device("cpu"))
    assert torch.equal(twin(x0[:2], t[:2]), model(x0[:2], t[:2])) and torch.equal(
        same.betas, schedule.betas
    )


@needs_weights
def test_weights_are_small_and_have_cards():
    for file in WEIGHTS.glob("*.pt"):
        assert file.stat().st_size < 10e6
        assert file.with_suffix(".md").is_file(), f"{file.name} has no model card"
        sums = ddpm_utils.WEIGHTS[file.stem]
        assert hashlib.sha256(file.read_bytes()).hexdigest() == sums, f"{file.name} is another one"


@needs_weights
def test_the_card_prints_what_was_measured_of_these_weights():
    key = hashlib.sha256((WEIGHTS / "fashion.pt").read_bytes()).hexdigest()[:12]
    results = json.loads((ROOT / "tests" / "measure" / "quality.json").read_text())
    lines = (WEIGHTS / "fashion.md").read_text(encoding="utf-8").splitlines()
    assert len(results[key]) >= 1, (
        "python tests/measure/quality.py has not measured the shipped weights"
    )
    for row, found in {**results[key], "real": results["real test images"]["10000"]}.items():
        printed = [
            f"{found['confidence']:.3f}",
            f"{found['nearest, median']:.1f}",
            f"{found['images']:,}",
            f"{found['distance']:.{2 if row == 'real' else 1}f}",
        ]
        assert any(all(f"| {number} |" in line for number in printed) for line in lines), (
            f"{row}: wanted {printed}"
        )


@needs_weights
@pytest.mark.skipif(
    not (WEIGHTS / "classifier.pt").is_file(), reason="notebooks/weights/classifier.pt is absent"
)
def test_load_classifier():
    classifier, (mean, cov) = load_classifier()
    assert not classifier.training and mean.shape == (64,) and cov.shape == (64, 64)
    assert mean.dtype == cov.dtype == torch.float64
    test = load_fashion_mnist("test")
    if test.is_stand_in:
        pytest.skip("Fashion-MNIST is not on this machine")
    features, probabilities = garment_features(classifier, test.images[:2000])
    assert (probabilities.argmax(dim=1) == test.labels[:2000]).float().mean() > 0.85
    noise = feature_statistics(garment_features(classifier, torch.rand(500, 1, 28, 28) * 2 - 1)[0])
    real = feature_statistics(features)
    assert 0 <= frechet_distance(*real, mean, cov) < 0.1 * frechet_distance(*noise, mean, cov)


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A checkout with nothing but the weights of the garments."""
    folder = tmp_path / "notebooks" / "weights"
    folder.mkdir(parents=True)
    shutil.copy(WEIGHTS / "fashion.pt", folder / "fashion.pt")
    monkeypatch.setattr(ddpm_utils, "HERE", tmp_path)
    return folder


@needs_weights
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: b"<html>log in</html>",
        lambda data: data[:999] + bytes([data[999] ^ 1]) + data[1000:],
    ],
    ids=["short", "web page", "one bit"],
)
def test_damaged_weights(copy, damage):
    assert load_pretrained()[1].T > 0
    file = copy / "fashion.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="fashion.pt is not the shipped one.*SHA-256"):
        load_pretrained()


@needs_weights
def test_weights_of_ones_own_beside_the_shipped_ones(copy):
    with pytest.raises(ValueError, match="no weights 'trousers', only fashion"):
        load_pretrained("trousers")
    shutil.copy(copy / "fashion.pt", copy / "mine.pt")
    assert load_pretrained("mine")[1].T == 1000  # not listed anywhere, and not damaged
    assert load_pretrained(copy / "mine.pt")[1].T == 1000


@needs_weights
def test_a_notebook_that_came_alone_fetches_the_weights_once(tmp_path, monkeypatch, serve):
    """As in Colab: no folder notebooks/ beside the helper."""
    good = (WEIGHTS / "fashion.pt").read_bytes()
    monkeypatch.setattr(ddpm_utils, "HERE", tmp_path)
    with pytest.raises(OSError, match="fashion could not be fetched"):  # nobody answers
        load_pretrained()
    answers = {
        "half": lambda r: send(r, good[:1000], len(good)),
        "good": lambda r: send(r, good),
        "login": lambda r: send(r, b"<html>Please log in</html>"),
        "404": lambda r: r.send_error(404),
    }
    for name in ("half", "login", "404", "good"):
        server = serve(answers[name])
        monkeypatch.setenv("DDPM_URL", f"{server.url}/base")
        if name == "good":
            assert load_pretrained()[1].T == 1000
        else:
            with pytest.raises(OSError, match="fashion could not be fetched"):
                load_pretrained()
            assert not [path for path in tmp_path.rglob("*") if path.is_file()], name
        assert server.asked[0] == "/base/notebooks/weights/fashion.pt"
    load_pretrained()
    assert len(server.asked) == 1  # the second time from the disk


# ------------------------------------------------------------------ python ddpm_utils.py


@needs_weights
def test_what_is_missing_is_said(copy, monkeypatch):
    monkeypatch.setenv("DDPM_DATA", os.fspath(copy / "no such folder"))
    (copy / "fashion.pt").unlink()
    (copy.parent.parent / "requirements.txt").write_text("torch>=99.0\nno-such-package>=1.0\n")
    said = "\n".join(ddpm_utils._missing())
    for what in (
        "Fashion-MNIST",
        "weights: the weights fashion",
        "no-such-package",
        "is older than 99.0",
    ):
        assert what in said


def test_features_need_a_classifier_that_is_not_training():
    """In training mode the numbers are others at each call, and the call changes the classifier."""
    with pytest.raises(ValueError, match="eval"):
        garment_features(GarmentClassifier().train(), torch.zeros(2, 1, 28, 28))


def test_identical_sets_are_not_at_a_negative_distance():
    for seed in range(20):
        features = torch.randn(30, 64, generator=torch.Generator().manual_seed(seed))
        mean, cov = feature_statistics(features)
        assert 0 <= frechet_distance(mean, cov, mean, cov) < 1e-3
