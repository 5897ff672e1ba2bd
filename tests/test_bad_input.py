"""Every public function's wrong shapes, types and ranges give a ValueError that names the argument."""
import inspect
import re

import numpy as np
import pytest
import torch

import ddpm_utils as d

SCHEDULE = d.linear_schedule(20)
UNET = d.UNet(channels=(8, 16))
X, NOISE = torch.zeros(3, 1, 8, 8), torch.zeros(3, 1, 8, 8)
T = torch.tensor([1, 10, 20])
BYTES = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
MEAN, COV = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
CLASSIFIER = d.GarmentClassifier().eval()


def silent(xt, t):
    return torch.zeros_like(xt)


def train(**change):
    return d.train(**{"model": d.UNet(channels=(8, 16)), "schedule": SCHEDULE, "images": BYTES, "steps": 1,
                      "batch_size": 2, "progress": False, **change})


def ddpm(**change):
    return d.ddpm_sample(**{"model": silent, "schedule": SCHEDULE, "n": 2, "shape": (1, 8, 8), "progress": False, **change})


def ddim(**change):
    return d.ddim_sample(**{"model": silent, "schedule": SCHEDULE, "n": 2, "steps": 5, "shape": (1, 8, 8),
                            "progress": False, **change})


def dpm(**change):
    return d.dpm_solver_sample(**{"model": silent, "schedule": SCHEDULE, "n": 2, "steps": 5, "shape": (1, 8, 8),
                                  "progress": False, **change})


def gif(folder, **change):
    return d.save_gif(**{"frames": BYTES, "path": folder / "a.gif", **change})


NOT_WHOLE = [0, -1, 1.5, "10", None, True]  # where a whole number from 1 on is wanted
NOT_BYTES = [BYTES.float(), BYTES[0], BYTES[:0], BYTES.numpy(), None]
NOT_PICTURES = [torch.zeros(2, 8, 8), torch.zeros(2, 2, 8, 8), torch.zeros(0, 1, 8, 8), np.zeros((2, 1, 8, 8)), [1], None,
                torch.zeros(2, 1, 8, 8, dtype=torch.int64)]
NOT_FLOATS = [BYTES[:3], X.long(), X.numpy(), None, torch.tensor(1.0), torch.zeros(0, 1, 8, 8)]
NOT_STEPS = [T.int(), T.float(), T[:2], T[:, None], [1, 10, 20], 5, None, torch.tensor(5), T - 2, T + 1]
NOT_T = [1, 0, -5, 2.5, "1000", None, True]
NOT_SHAPES = [28, "28", (1, 28.0, 28), (0, 28, 28), (1, -28), None]

# (what, its arguments by name: a good call with one argument replaced, the argument's name, its wrong values)
CASES = [
    ("set_up", lambda seed: d.set_up(seed), "seed", [-1, 1.5, "0", None, 2**32, True]),
    ("load_fashion_mnist", lambda split: d.load_fashion_mnist(split), "split", ["valid", "", None, 0, True]),
    ("to_model_range", lambda u8: d.to_model_range(u8), "u8", [X, X.long(), BYTES.numpy(), None, 3]),
    ("to_uint8", lambda x: d.to_uint8(x), "x", [BYTES, X.long(), X.numpy(), None, 0.5]),
    ("show_images", lambda images: d.show_images(images), "images", NOT_PICTURES),
    ("show_images", lambda titles: d.show_images(BYTES, titles), "titles", [["a"], [], ["a"] * 5, 3]),
    ("show_images", lambda columns: d.show_images(BYTES, columns=columns), "columns", [-1, 1.5, "2"]),
    ("show_images", lambda scale: d.show_images(BYTES, scale=scale), "scale", [0, -1, "1", None]),
    ("save_gif", lambda frames, folder: gif(folder, frames=frames), "frames",
     [torch.zeros(8, 8), torch.zeros(2, 2, 8, 8), torch.zeros(2, 3, 8, 8, 1), BYTES[:0], BYTES.numpy(), None, BYTES.long()]),
    ("save_gif", lambda enlarge, folder: gif(folder, enlarge=enlarge), "enlarge", [0, -1, 1.5, "2", None, 33]),
    ("save_gif", lambda milliseconds, folder: gif(folder, milliseconds=milliseconds), "milliseconds", [-1, "60", None]),
    ("save_gif", lambda hold, folder: gif(folder, hold=hold), "hold", [-1, "60", None]),

    ("NoiseSchedule", lambda betas: d.NoiseSchedule(betas), "betas",
     [[], [0.1, 0.0], [0.1, 1.0], [-0.1], [[0.1]], 0.1, [float("nan")]]),
    ("linear_schedule", lambda T: d.linear_schedule(T), "T", NOT_T),
    ("cosine_schedule", lambda T: d.cosine_schedule(T), "T", NOT_T),
    ("q_sample", lambda x0: SCHEDULE.q_sample(x0, T, NOISE), "x0", [*NOT_FLOATS, X[:2], X[:, :, :4]]),
    ("q_sample", lambda noise: SCHEDULE.q_sample(X, T, noise), "noise", [*NOT_FLOATS, X[:2], X[:, :, :4]]),
    ("q_sample", lambda t: SCHEDULE.q_sample(X, t, NOISE), "t", NOT_STEPS),
    ("predict_x0", lambda xt: SCHEDULE.predict_x0(xt, T, NOISE), "xt", [*NOT_FLOATS, X[:2], X[:, :, :4]]),
    ("predict_x0", lambda noise: SCHEDULE.predict_x0(X, T, noise), "noise", [*NOT_FLOATS, X[:2], X[:, :, :4]]),
    ("predict_x0", lambda t: SCHEDULE.predict_x0(X, t, NOISE), "t", [*NOT_STEPS, T - 1]),
    ("q_posterior", lambda x0: SCHEDULE.q_posterior(x0, X, T), "x0", [*NOT_FLOATS, X[:2], X[:, :, :4]]),
    ("q_posterior", lambda xt: SCHEDULE.q_posterior(X, xt, T), "xt", [*NOT_FLOATS, X[:2], X[:, :, :4]]),
    ("q_posterior", lambda t: SCHEDULE.q_posterior(X, X, t), "t", [*NOT_STEPS, T - 1]),

    ("UNet", lambda in_channels: d.UNet(in_channels), "in_channels", NOT_WHOLE),
    ("UNet", lambda channels: d.UNet(channels=channels), "channels",
     [(32,), (), (30, 60), (32, 0), (32, -8), (32, 64.0), 32, "32", None]),
    ("UNet.forward", lambda x: UNET(x, T), "x", [*NOT_FLOATS, torch.zeros(3, 3, 8, 8), torch.zeros(3, 1, 7, 8),
                                                 torch.zeros(3, 1, 8, 9), torch.zeros(3, 8, 8)]),
    ("UNet.forward", lambda t: UNET(X, t), "t", [T.int(), T.float(), T[:2], T[:, None], [1, 10, 20], 5, None, T - 2]),

    ("v_loss", lambda x0: d.v_loss(silent, SCHEDULE, x0), "x0", NOT_FLOATS),
    ("v_loss", lambda gamma: d.v_loss(silent, SCHEDULE, X, gamma=gamma), "gamma", [-1, "5", float("nan")]),
    ("min_snr_loss", lambda noise: d.min_snr_loss(silent, SCHEDULE, X, T, noise), "noise", [BYTES[:3], X[:2], X.numpy()]),
    ("simple_loss", lambda x0: d.simple_loss(silent, SCHEDULE, x0), "x0", NOT_FLOATS),
    ("simple_loss", lambda t: d.simple_loss(silent, SCHEDULE, X, t), "t",
     [T.int(), T.float(), T[:2], T[:, None], [1, 10, 20], 5, T + 1, T - 2]),
    ("simple_loss", lambda noise: d.simple_loss(silent, SCHEDULE, X, T, noise), "noise", [BYTES[:3], X[:2], X.numpy()]),

    ("EMA", lambda decay: d.EMA(UNET, decay), "decay", [-0.1, 1.0, 1.5, "0.9", None, float("nan")]),
    ("train", lambda images: train(images=images), "images", NOT_BYTES),
    ("train", lambda steps: train(steps=steps), "steps", NOT_WHOLE),
    ("train", lambda batch_size: train(batch_size=batch_size), "batch_size", NOT_WHOLE),
    ("train", lambda checkpoint_every: train(checkpoint_every=checkpoint_every), "checkpoint_every", NOT_WHOLE),
    ("train", lambda callback_every: train(callback_every=callback_every), "callback_every", NOT_WHOLE),
    ("train", lambda warmup: train(warmup=warmup), "warmup", [-1, 1.5, "10", None]),
    ("train", lambda lr: train(lr=lr), "lr", [-1e-3, "1e-3", None, float("nan")]),
    ("train", lambda clip: train(clip=clip), "clip", [-1, "1", None, float("nan")]),
    ("train", lambda seed: train(seed=seed), "seed", [1.5, "0", None]),

    ("ddpm_sample", lambda n: ddpm(n=n), "n", NOT_WHOLE),
    ("ddpm_sample", lambda shape: ddpm(shape=shape), "shape", NOT_SHAPES),
    ("ddpm_sample", lambda sigma: ddpm(sigma=sigma), "sigma", ["", "BETA", None, 0.5]),
    ("ddpm_sample", lambda x_T: ddpm(x_T=x_T), "x_T", [torch.zeros(3, 1, 8, 8), torch.zeros(2, 8, 8), BYTES[:2], [0.0]]),
    ("ddim_sample", lambda n: ddim(n=n), "n", NOT_WHOLE),
    ("ddim_sample", lambda shape: ddim(shape=shape), "shape", NOT_SHAPES),
    ("ddim_sample", lambda steps: ddim(steps=steps), "steps", [*NOT_WHOLE, 21]),
    ("ddim_sample", lambda eta: ddim(eta=eta), "eta", [-0.1, 1.1, "0", None, float("nan")]),
    ("ddim_sample", lambda x_T: ddim(x_T=x_T), "x_T", [torch.zeros(3, 1, 8, 8), torch.zeros(2, 8, 8), BYTES[:2], [0.0]]),
    ("dpm_solver_sample", lambda n: dpm(n=n), "n", NOT_WHOLE),
    ("dpm_solver_sample", lambda shape: dpm(shape=shape), "shape", NOT_SHAPES),
    ("dpm_solver_sample", lambda steps: dpm(steps=steps), "steps", [*NOT_WHOLE, 21]),
    ("dpm_solver_sample", lambda x_T: dpm(x_T=x_T), "x_T", [torch.zeros(3, 1, 8, 8), torch.zeros(2, 8, 8), BYTES[:2], [0.0]]),
    # a model that answers in another shape is found out at its first answer
    ("ddpm_sample", lambda noise: ddpm(model=lambda xt, t: noise), "noise", [torch.zeros(2, 3, 8, 8), None]),
    ("ddim_sample", lambda noise: ddim(model=lambda xt, t: noise), "noise", [torch.zeros(2, 3, 8, 8), None]),
    ("dpm_solver_sample", lambda noise: dpm(model=lambda xt, t: noise), "noise", [torch.zeros(2, 3, 8, 8), None]),

    ("garment_features", lambda images: d.garment_features(CLASSIFIER, images), "images",
     [torch.zeros(2, 3, 28, 28), torch.zeros(2, 28, 28), torch.zeros(2, 1, 32, 32), torch.zeros(0, 1, 28, 28), None,
      torch.zeros(2, 1, 28, 28, dtype=torch.int64)]),
    ("garment_features", lambda batch_size: d.garment_features(CLASSIFIER, torch.zeros(2, 1, 28, 28), batch_size),
     "batch_size", [0, -1, 1.5]),
    ("feature_statistics", lambda features: d.feature_statistics(features), "features",
     [torch.zeros(1, 3), torch.zeros(3), torch.zeros(3, 2, 2), torch.zeros(3, 2).long(), np.zeros((3, 2)), None]),
    ("frechet_distance", lambda mean1: d.frechet_distance(mean1, COV, MEAN, COV), "mean1",
     [MEAN[:2], MEAN[None], None]),
    ("frechet_distance", lambda cov1: d.frechet_distance(MEAN, cov1, MEAN, COV), "cov1",
     [COV[:2], COV[:2, :2], MEAN, None]),
    ("frechet_distance", lambda mean2: d.frechet_distance(MEAN, COV, mean2, COV), "mean2",
     [MEAN[:2], MEAN[None], None]),
    ("frechet_distance", lambda cov2: d.frechet_distance(MEAN, COV, MEAN, cov2), "cov2",
     [COV[:2], COV[:2, :2], MEAN, None]),
]


def short(value):
    if torch.is_tensor(value) or isinstance(value, np.ndarray):
        return f"{type(value).__name__} {value.dtype} {tuple(value.shape)}"
    return repr(value)


ONE_BY_ONE = [pytest.param(call, name, value, id=f"{what}-{name}-{short(value)}")
              for what, call, name, values in CASES for value in values]


@pytest.mark.parametrize("call, name, value", ONE_BY_ONE)
def test_a_wrong_argument_is_named(call, name, value, tmp_path):
    with pytest.raises(ValueError) as caught:
        call(value, tmp_path) if "folder" in inspect.signature(call).parameters else call(value)
    message = str(caught.value)
    assert re.search(rf"(?<!\w){name}(?!\w)", message), message
    assert "want" in message or "must" in message, message  # and what is wanted
    assert len(message) < 400
    assert list(tmp_path.iterdir()) == []


def test_good_arguments_of_the_same_calls_pass(tmp_path):
    """So that no case above is refused for another reason than the one it is about."""
    d.show_images(BYTES, ["a"] * 4, columns=2, scale=2)
    gif(tmp_path, milliseconds=20, hold=0, enlarge=2)
    d.NoiseSchedule([0.1, 0.2])
    for t in (T, T - 1):
        SCHEDULE.q_sample(X, t, NOISE)
    SCHEDULE.predict_x0(X, T, NOISE), SCHEDULE.q_posterior(X, X, T)
    UNET(X, T), d.simple_loss(silent, SCHEDULE, X, T, NOISE)
    train(warmup=0, seed=1, lr=1, clip=2.5, callback=lambda step: None, images=BYTES)
    ddpm(x_T=torch.zeros(2, 1, 8, 8)), ddim(x_T=torch.zeros(2, 1, 8, 8), eta=1, steps=20)
    assert d.garment_features(CLASSIFIER, torch.zeros(2, 1, 28, 28), 1)[0].shape == (2, 64)
    assert d.frechet_distance(MEAN, COV, MEAN, COV) == pytest.approx(0)
    for number in (np.int64(2), 2):
        ddim(n=number, steps=np.int64(3), x_T=None)


def test_the_message_says_what_was_given_and_what_is_wanted():
    with pytest.raises(ValueError, match=r"steps is 21; wanted an integer from 1 to 20"):
        ddim(steps=21)
    with pytest.raises(ValueError, match=r"x0 has shape \(3, 1, 8, 8\), noise has shape \(2, 1, 8, 8\)"):
        SCHEDULE.q_sample(X, T, NOISE[:2])
    with pytest.raises(ValueError, match=r"t runs from 2 to 21; wanted 0 to 20"):
        SCHEDULE.q_sample(X, T + 1, NOISE)
