"""Mistakes that would go unnoticed get a ValueError that names the argument and what is expected.

Where torch or Python raises by itself, its message is left alone, and nothing is tested here.
"""

from functools import partial

import pytest
import torch

import ddpm_utils as d

SCHEDULE, UNET, LABELS = d.linear_schedule(20), d.UNet(channels=(8, 16)), torch.tensor([0, 3, 9, 9])
X, T, MEAN, COV = torch.zeros(3, 1, 8, 8), torch.tensor([1, 10, 20]), torch.zeros(3), torch.eye(3)
BYTES, TWO_PLANES = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 2, 8, 8)
# the first would broadcast; of the others the negative ones would wrap
BROADCAST, NO_T = [X[:1], X[:, :, :1]], [T.int(), T[:2], T[:, None], 5, T - 2, T + 1]

FROM_0 = r"t must be (int64, as torch.full\(\(3,\), 1\)|between 0 and 20; got (-1 to 18|2 to 21))"
FROM_1 = FROM_0.replace("between 0", "between 1").replace("-1 to 18", "-1 to 18|0 to 19")
X0 = r"x0 \(.*\) and (noise|xt) \(3, 1, 8, 8\) must have the same|x0 must be floats .* torch.uint8"
NOISE = r" \(3, 1, 8, 8\) and noise \((1, 1, 8|2, 1, 8|3, 1, 1), 8\) must have the same shape"
FIT = r"means \(D,\) and covariances \(D, D\) must fit one another"

given = {"schedule": SCHEDULE, "model": UNET, "progress": False}
train = partial(d.train, images=BYTES, steps=1, batch_size=2, **given)
ddpm, ddim, solver = (partial(sampler, n=2, shape=(1, 8, 8), **given) for sampler in (
    d.ddpm_sample, d.ddim_sample, d.dpm_solver_sample))

CASES = [  # the call that lacks one argument, that argument, words of the message, wrong values
    (d.load_fashion_mnist, "split", 'split must be "train" or "test"; got', ["valid", None]),
    (d.to_model_range, "u8", "u8 must be uint8, 0 ... 255; got torch", [X, X.long()]),
    (d.to_uint8, "x", r"x must be floats in \[-1, 1\]; got torch", [BYTES, X.long()]),
    (d.show_images, "images", r"images must be \(N, 1, H, W\) or", [X[:, 0], TWO_PLANES]),
    (partial(d.show_images, BYTES), "titles", "titles must hold one text", [["a"], ["a"] * 5]),
    (partial(d.show_images, BYTES, columns=2), "rows", "must hold 2 names", [["a"], ["a"] * 3]),
    (partial(d.save_gif, path="a.gif"), "frames", r"frames must be \(F, ", [TWO_PLANES, X[0, 0]]),
    (d.NoiseSchedule, "betas", "betas must be T numbers between 0 and 1; got",
     [[], [0.1, 0.0], [0.1, 1.0], [[0.1]], [float("nan")]]),
    (d.linear_schedule, "T", "T must be at least 2; got (1|0|-5)$", [1, 0, -5]),
    (d.cosine_schedule, "T", "T must be at least 2; got (1|0|-5)$", [1, 0, -5]),
    (partial(SCHEDULE.q_sample, t=T, noise=X), "x0", X0, [X[:2], X[:, :, :4], BYTES[:3]]),
    (partial(SCHEDULE.q_sample, X, T), "noise", "x0" + NOISE, [*BROADCAST, X[:2]]),
    (partial(SCHEDULE.q_sample, X, noise=X), "t", FROM_0, NO_T),
    (partial(SCHEDULE.predict_x0, X, T), "noise", "xt" + NOISE, BROADCAST),
    (partial(SCHEDULE.predict_x0, X, noise=X), "t", FROM_1, [*NO_T, T - 1]),
    (partial(SCHEDULE.q_posterior, xt=X, t=T), "x0", X0, BROADCAST),
    (partial(SCHEDULE.q_posterior, X, X), "t", FROM_1, [*NO_T, T - 1]),
    (d.UNet, "channels", r"channels must be multiples of 8, such as", [(32,), (30, 60)]),
    (partial(UNET, t=T), "x", r"x must be \(B, 1, H, W\) .* of 2", [TWO_PLANES, X[:, :, 1:], X[0]]),
    (partial(UNET, X), "t", "t must be (int64|between 0 and inf; got -1)", [T.int(), T[:2], T - 2]),
    (partial(d.simple_loss, UNET, SCHEDULE, t=T, noise=X), "x0", X0, [BYTES[:3], X[:1]]),
    *[(partial(loss, UNET, SCHEDULE, X), "t", FROM_0, NO_T) for loss in (d.simple_loss, d.v_loss)],
    (partial(d.EMA, UNET), "decay", "decay must be between 0 and 1, such as", [-0.1, 1.0, 1.5]),
    (train, "images", r"images must be uint8 \(N, C, H, W\), or latents: floats on both sides of 0",
     [BYTES.float(), BYTES[0], BYTES[:0], X + 0.5, X + 255, X.long()]),
    (train, "ema", r"ema must be EMA\(model\); got 0.995", [0.995]),
    (train, "loss_function", "loss_function must be as v_loss; got 'v'", ["v"]),
    (train, "labels", r"this network takes no labels: UNet\(classes=10\) does", [LABELS]),
    (partial(train, model=d.UNet(classes=10)), "labels", "labels must be int64, .* from 0 to 9, ",
     [LABELS[:3], LABELS + 1, LABELS - 1, LABELS.float()]),
    (ddpm, "sigma", 'sigma must be "beta" or "beta_tilde"; got', ["BETA", None]),
    (ddpm, "x_T", r"x_T must have the shape \(2, 1, 8, 8\); got", [X, X[:2, 0]]),
    (ddim, "steps", r"steps must be between 1 and T = 20; got (0|21|-1)$", [0, 21, -1]),
    (ddim, "eta", "eta must be between 0 and 1; got", [-0.1, 1.1]),
    (solver, "steps", "steps must be between 1 and T = 20; got (0|21)$", [0, 21]),
    (d.feature_statistics, "features", r"features must be \(N, D\)", [torch.zeros(1, 3), MEAN]),
    (partial(d.frechet_distance, MEAN, mean2=MEAN, cov2=COV), "cov1", FIT, [COV[:2], torch.eye(2)]),
    (partial(d.frechet_distance, MEAN, COV, cov2=COV), "mean2", FIT, [MEAN[:2], MEAN[None]]),
    (partial(d.garment_features, images=BYTES), "classifier", "is in training mode",
     [d.GarmentClassifier()])]


@pytest.mark.parametrize("call, argument, words, wrong", CASES, ids=[case[1] for case in CASES])
def test_a_silent_mistake_is_named(call, argument, words, wrong, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in wrong:
        with pytest.raises(ValueError, match=words) as caught:
            call(**{argument: value})
        assert len(str(caught.value)) < 400
    assert list(tmp_path.iterdir()) == []
