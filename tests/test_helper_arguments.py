"""Mistakes that would go unnoticed get a ValueError that names the argument and what is expected.

Where torch or Python raises by itself, its message is left alone, and nothing is tested here.
"""

import pytest
import torch

import ddpm_utils as d

SCHEDULE = d.linear_schedule(20)
UNET = d.UNet(channels=(8, 16))
X, T = torch.zeros(3, 1, 8, 8), torch.tensor([1, 10, 20])
BYTES = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
MEAN, COV = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
NOT_STEPS = [T.int(), T[:2], T[:, None], 5, T - 2, T + 1]  # negative ones would wrap


def silent(xt, t):
    return torch.zeros_like(xt)


def train(**change):
    return d.train(
        **{
            "model": d.UNet(channels=(8, 16)),
            "schedule": SCHEDULE,
            "images": BYTES,
            "steps": 1,
            "batch_size": 2,
            "progress": False,
            **change,
        }
    )


def sample(sampler, **change):
    return sampler(
        **{
            "model": silent,
            "schedule": SCHEDULE,
            "n": 2,
            "shape": (1, 8, 8),
            "progress": False,
            **change,
        }
    )


# (the argument's name, a call with that argument, its wrong values)
CASES = [
    ("split", d.load_fashion_mnist, ["valid", None]),
    ("u8", d.to_model_range, [X, X.long()]),
    ("x", d.to_uint8, [BYTES, X.long()]),
    ("images", d.show_images, [torch.zeros(2, 8, 8), torch.zeros(2, 2, 8, 8)]),
    ("titles", lambda titles: d.show_images(BYTES, titles), [["a"], ["a"] * 5]),
    (
        "frames",
        lambda frames: d.save_gif(frames, "a.gif"),
        [torch.zeros(2, 2, 8, 8), torch.zeros(8, 8)],
    ),
    ("betas", d.NoiseSchedule, [[], [0.1, 0.0], [0.1, 1.0], [[0.1]], [float("nan")]]),
    ("T", d.linear_schedule, [1, 0, -5]),
    ("T", d.cosine_schedule, [1, 0, -5]),
    (
        "x0",
        lambda x0: SCHEDULE.q_sample(x0, T, X),
        [X[:2], X[:, :, :4], BYTES[:3].view(3, 1, 8, 8)],
    ),
    (
        "noise",
        lambda noise: SCHEDULE.q_sample(X, T, noise),
        [X[:1], X[:, :, :1]],
    ),  # would broadcast
    ("t", lambda t: SCHEDULE.q_sample(X, t, X), NOT_STEPS),
    ("noise", lambda noise: SCHEDULE.predict_x0(X, T, noise), [X[:1], X[:, :, :1]]),
    ("t", lambda t: SCHEDULE.predict_x0(X, t, X), [*NOT_STEPS, T - 1]),
    ("x0", lambda x0: SCHEDULE.q_posterior(x0, X, T), [X[:1], X[:, :, :1]]),
    ("t", lambda t: SCHEDULE.q_posterior(X, X, t), [*NOT_STEPS, T - 1]),
    ("channels", lambda channels: d.UNet(channels=channels), [(32,), (30, 60)]),
    ("x", lambda x: UNET(x, T), [torch.zeros(3, 3, 8, 8), torch.zeros(3, 1, 7, 8), X[0]]),
    ("t", lambda t: UNET(X, t), [T.int(), T[:2], T - 2]),
    ("x0", lambda x0: d.simple_loss(silent, SCHEDULE, x0, T, X), [BYTES[:3], X[:1]]),
    ("t", lambda t: d.simple_loss(silent, SCHEDULE, X, t), NOT_STEPS),
    ("t", lambda t: d.v_loss(silent, SCHEDULE, X, t), NOT_STEPS),
    ("decay", lambda decay: d.EMA(UNET, decay), [-0.1, 1.0, 1.5]),
    ("images", lambda images: train(images=images), [BYTES.float(), BYTES[0], BYTES[:0]]),
    (
        "images",
        lambda images: train(images=images),
        [torch.rand(4, 1, 8, 8), torch.rand(4, 1, 8, 8) * 255, X.long()],
    ),
    ("ema", lambda ema: train(ema=ema), [0.995]),
    ("loss_function", lambda f: train(loss_function=f), ["v"]),
    ("sigma", lambda sigma: sample(d.ddpm_sample, sigma=sigma), ["BETA", None]),
    ("x_T", lambda x_T: sample(d.ddpm_sample, x_T=x_T), [X, torch.zeros(2, 8, 8)]),
    ("steps", lambda steps: sample(d.ddim_sample, steps=steps), [0, 21, -1]),
    ("eta", lambda eta: sample(d.ddim_sample, eta=eta), [-0.1, 1.1]),
    ("steps", lambda steps: sample(d.dpm_solver_sample, steps=steps), [0, 21]),
    ("features", d.feature_statistics, [torch.zeros(1, 3), torch.zeros(3)]),
    ("means", lambda cov: d.frechet_distance(MEAN, cov, MEAN, COV), [COV[:2], COV[:2, :2]]),
    ("means", lambda mean: d.frechet_distance(MEAN, COV, mean, COV), [MEAN[:2], MEAN[None]]),
    ("classifier", lambda c: d.garment_features(c, BYTES), [d.GarmentClassifier().train()]),
]
ONE_BY_ONE = [
    pytest.param(call, name, value, id=f"{i}-{name}-{k}")
    for i, (name, call, values) in enumerate(CASES)
    for k, value in enumerate(values)
]


@pytest.mark.parametrize("call, name, value", ONE_BY_ONE)
def test_a_silent_mistake_is_named(call, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"\b{name}\b") as caught:
        call(value)
    assert "must" in str(caught.value) or "training mode" in str(caught.value)
    assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == []


def test_good_arguments_of_the_same_calls_pass(tmp_path):
    """So that no case above is refused for another reason than the one that it is about."""
    d.show_images(BYTES, ["a"] * 4, columns=2, scale=2)
    d.save_gif(BYTES, tmp_path / "a.gif")
    for t in (T, T - 1):
        SCHEDULE.q_sample(X, t, X)
    SCHEDULE.predict_x0(X, T, X)
    SCHEDULE.q_posterior(X, X, T)
    UNET(X, T)
    d.v_loss(silent, SCHEDULE, X, T, X)
    assert len(train(warmup=0, seed=1, ema=d.EMA(UNET))) == 1
    for sampler in (d.ddim_sample, d.dpm_solver_sample):
        assert sample(sampler, x_T=X[:2], steps=20).shape == (2, 1, 8, 8)
    assert d.frechet_distance(MEAN, COV, MEAN, COV) == 0


def test_the_message_tells_what_was_given_and_what_is_expected():
    with pytest.raises(ValueError, match=r"steps must be between 1 and T = 20; got 21"):
        sample(d.ddim_sample, steps=21)
    with pytest.raises(ValueError, match=r"x0 \(3, 1, 8, 8\) and noise \(2, 1, 8, 8\) must have"):
        SCHEDULE.q_sample(X, T, X[:2])
    with pytest.raises(ValueError, match=r"t must be between 0 and 20; got 2 to 21"):
        SCHEDULE.q_sample(X, T + 1, X)
