"""The measures, and the shipped weights."""
import hashlib
import http.server
import json
import math
import os
import pathlib
import shutil
import threading

import pytest
import torch

import ddpm_utils
from ddpm_utils import (GarmentClassifier, NoiseSchedule, feature_statistics, frechet_distance, garment_features,
                        load_classifier, load_fashion_mnist, load_pretrained, simple_loss, to_model_range)

WEIGHTS = pathlib.Path(ddpm_utils.__file__).parent / "notebooks" / "weights"
needs_weights = pytest.mark.skipif(not (WEIGHTS / "fashion.pt").is_file(), reason="notebooks/weights/fashion.pt is absent")


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def random_covariance(d):
    root = torch.randn(d, d, dtype=torch.float64)
    return root @ root.T / d


# ------------------------------------------------------------------ Fréchet distance

@pytest.mark.parametrize("m1, s1, m2, s2", [(0, 1, 0, 1), (0.5, 2, -1, 0.3), (3, 0, 1, 0.5), (1, 0, 1, 0)])
def test_frechet_distance_in_one_dimension(m1, s1, m2, s2):
    """(μ₁ - μ₂)² + (σ₁ - σ₂)², also where a deviation is 0."""
    found = frechet_distance(numbers(m1), numbers(s1**2).view(1, 1), numbers(m2), numbers(s2**2).view(1, 1))
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
    c1, c2, m1, m2 = random_covariance(8), random_covariance(8), torch.randn(8).double(), torch.randn(8).double()
    eigenvalues = torch.linalg.eigvals(c1 @ c2)
    expected = ((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * eigenvalues.real.clamp(min=0).sqrt().sum()
    assert frechet_distance(m1, c1, m2, c2) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_of_two_dimensions_in_closed_form():
    """In two dimensions the trace of a root is known: √(tr + 2√det)."""
    c1, c2 = random_covariance(2), random_covariance(2)
    product = c1 @ c2
    expected = c1.trace() + c2.trace() - 2 * (product.trace() + 2 * torch.linalg.det(product).sqrt()).sqrt()
    assert frechet_distance(torch.zeros(2).double(), c1, torch.zeros(2).double(), c2) == pytest.approx(float(expected))


def test_frechet_distance_is_0_for_the_same_symmetric_and_moves_with_the_mean():
    c1, c2, m = random_covariance(64), random_covariance(64), torch.randn(64).double()
    assert frechet_distance(m, c1, m, c1) == pytest.approx(0, abs=1e-9 * 64)
    assert frechet_distance(m, c1, -m, c2) == pytest.approx(frechet_distance(-m, c2, m, c1), rel=1e-9)
    step = frechet_distance(m, c1, m + 0.5, c2) - frechet_distance(m, c1, m, c2)
    assert step == pytest.approx(64 * 0.25, rel=1e-9)
    thin = torch.randn(64, 3).double() @ torch.randn(3, 64).double()
    thin = thin @ thin.T  # of rank 3, as from four pictures
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
    assert features.shape == (7, 64) and probabilities.shape == (7, 10) and not features.requires_grad
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(7))
    again = garment_features(classifier, to_model_range(images), batch_size=500)
    torch.testing.assert_close(features, again[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(probabilities, classifier(to_model_range(images)).softmax(1).detach(), rtol=1e-3, atol=1e-4)


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
    with torch.no_grad():  # answers with 0 have a loss of 1; also on the stand-in these weights know noise well
        assert float(simple_loss(model, schedule, x0, t, noise)) < 0.2
    twin, same = load_pretrained("fashion", torch.device("cpu"))
    assert torch.equal(twin(x0[:2], t[:2]), model(x0[:2], t[:2])) and torch.equal(same.betas, schedule.betas)


@needs_weights
def test_weights_are_small_and_have_cards():
    for file in WEIGHTS.glob("*.pt"):
        assert file.stat().st_size < 10e6
        assert file.with_suffix(".md").is_file(), f"{file.name} has no model card"
        assert file.name in (WEIGHTS / "SHA256SUMS").read_text()


@needs_weights
def test_the_card_prints_what_was_measured_of_these_weights():
    key = hashlib.sha256((WEIGHTS / "fashion.pt").read_bytes()).hexdigest()[:12]
    results = json.loads((WEIGHTS.parents[1] / "tests" / "quality.json").read_text())
    lines = (WEIGHTS / "fashion.md").read_text(encoding="utf-8").splitlines()
    assert len(results[key]) >= 1, "python tests/quality.py has not measured the shipped weights"
    for row, found in {**results[key], "real": results["real test pictures"]["10000"]}.items():
        printed = [f"{found['confidence']:.3f}", f"{found['nearest, median']:.1f}", f"{found['pictures']:,}",
                   f"{found['distance']:.{2 if row == 'real' else 1}f}"]
        assert any(all(f"| {number} |" in line for number in printed) for line in lines), f"{row}: wanted {printed}"


@needs_weights
@pytest.mark.skipif(not (WEIGHTS / "classifier.pt").is_file(), reason="notebooks/weights/classifier.pt is absent")
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
    """A checkout with nothing but the weights."""
    folder = tmp_path / "notebooks" / "weights"
    folder.mkdir(parents=True)
    for name in ("fashion.pt", "SHA256SUMS"):
        shutil.copy(WEIGHTS / name, folder / name)
    monkeypatch.setattr(ddpm_utils, "HERE", tmp_path)
    return folder


@needs_weights
@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: b"<html>log in</html>",
                                    lambda data: data[:2_000_000] + bytes([data[2_000_000] ^ 1]) + data[2_000_001:]],
                         ids=["short", "empty", "web page", "one bit"])
def test_damaged_weights(copy, damage):
    assert load_pretrained()[1].T > 0
    file = copy / "fashion.pt"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="fashion.pt is damaged.*SHA-256"):
        load_pretrained()


@needs_weights
def test_weights_that_are_not_there(copy):
    with pytest.raises(FileNotFoundError, match=r"trousers\.pt.*fashion\.pt"):  # what is wanted, and what there is
        load_pretrained("trousers")
    shutil.copy(copy / "fashion.pt", copy / "mine.pt")  # there, and not in SHA256SUMS
    with pytest.raises(ValueError, match="mine.pt"):
        load_pretrained("mine")


@needs_weights
def test_sums_that_are_not_there_or_no_sums(copy):
    (copy / "SHA256SUMS").write_text("<html>\n<body>please log in to this network</body>\n</html>\n")
    with pytest.raises(ValueError, match="SHA256SUMS"):
        load_pretrained()
    (copy / "SHA256SUMS").unlink()
    with pytest.raises((OSError, ValueError), match="SHA256SUMS"):
        load_pretrained()
    assert not (copy.parent.parent / "weights").exists()


@needs_weights
def test_a_notebook_that_came_alone_fetches_the_weights_once(tmp_path, monkeypatch):
    """As in Colab: no folder notebooks/ beside the helper."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            file = WEIGHTS / pathlib.PurePosixPath(self.path).name
            if not file.is_file():
                return self.send_error(404)
            data = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:1000] if half else data)

        def log_message(self, *text):
            pass

    monkeypatch.setattr(ddpm_utils, "HERE", tmp_path)
    with pytest.raises(OSError, match="fashion.pt could not be fetched"):  # nobody answers
        load_pretrained()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setenv("DDPM_URL", f"http://127.0.0.1:{server.server_address[1]}/base")
    try:
        half = True
        with pytest.raises(OSError, match="fashion.pt could not be fetched"):
            load_pretrained()
        assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.part"))
        half = False
        with pytest.raises(OSError, match="none.pt could not be fetched"):
            load_pretrained("none")
        asked.clear()
        model, schedule = load_pretrained()
        assert asked == ["/base/notebooks/weights/fashion.pt", "/base/notebooks/weights/SHA256SUMS"]
        load_pretrained()
        assert len(asked) == 2  # the second time from the disk
    finally:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------ python ddpm_utils.py

@needs_weights
def test_what_is_missing_is_said(copy, monkeypatch):
    monkeypatch.setenv("DDPM_DATA", os.fspath(copy / "no such folder"))
    (copy / "fashion.pt").unlink()
    said = "\n".join(ddpm_utils._missing())
    assert "Fashion-MNIST" in said and "is missing" in said and "weights" in said and "fashion.pt" in said
