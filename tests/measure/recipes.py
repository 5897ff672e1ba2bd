"""The comparison behind notebook 04's table "what made it better, measured": one change a row, at equal time.

    python tests/measure/recipes.py --rates      measure, on an idle machine, how many steps each recipe does in five minutes
    python tests/measure/recipes.py              train each recipe for that many steps, and measure it; goes on where it stopped
    python tests/measure/recipes.py --table      print the results

Every recipe sees Fashion-MNIST (DDPM_DATA or data/), makes 2,000 pictures by DDIM in 20 steps from the same noise, and
gets their Fréchet distance to the training set in the shipped classifier's features. Because the steps were counted
beforehand, the runs themselves may share the machine with other work. Results: tests/measure/recipes.json.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import ddpm_utils as d  # noqa: E402

RESULTS = HERE / "recipes.json"
MINUTES = 5
SAMPLES = 2_000

# The recipe that the others are compared with; a row below says what it changes.
REFERENCE = {
    "channels": (16, 32, 64),
    "patch": 1,
    "batch_size": 64,
    "lr": 2e-3,
    "decay": True,
    "ema": 0.995,
    "schedule": "cosine",
    "target": "v",
    "min_snr": None,
    "bf16": True,
    "channels_last": False,
    "muon": None,
    "seed": 0,
}
# Notebook 04's ten lines, with the network that a plain U-Net tutorial would take
TEN_LINES = {
    "channels": (32, 64, 128),
    "batch_size": 128,
    "lr": 1e-3,
    "decay": False,
    "ema": None,
    "target": "noise",
    "bf16": False,
}
RECIPES = {
    "ours": {},
    "ten lines": TEN_LINES,
    "predict the noise": {"target": "noise"},
    "batch 32": {"batch_size": 32},
    "learning rate 4e-3": {"lr": 4e-3},
    "no EMA": {"ema": None},
    "linear schedule": {"schedule": "linear"},
    "Min-SNR weights": {"min_snr": 5},
    "Min-SNR weights, rate 4e-3": {"min_snr": 5, "lr": 4e-3},
    "Min-SNR weights, rate 4e-3, batch 32": {"min_snr": 5, "lr": 4e-3, "batch_size": 32},
    "Min-SNR weights, rate 4e-3, batch 16": {"min_snr": 5, "lr": 4e-3, "batch_size": 16},
    "Min-SNR weights, rate 8e-3, batch 32": {"min_snr": 5, "lr": 8e-3, "batch_size": 32},
    "Min-SNR weights, rate 4e-3, batch 32, seed 1": {
        "min_snr": 5,
        "lr": 4e-3,
        "batch_size": 32,
        "seed": 1,
    },
    "Min-SNR weights, rate 4e-3, batch 32, seed 2": {
        "min_snr": 5,
        "lr": 4e-3,
        "batch_size": 32,
        "seed": 2,
    },
    **{
        f"Muon, Min-SNR weights, rate 4e-3, batch 32, seed {seed}": {
            "min_snr": 5,
            "lr": 4e-3,
            "batch_size": 32,
            "muon": 5,
            "seed": seed,
        }
        for seed in range(3)
    },
    "Min-SNR weights with gamma 1": {"min_snr": 1},
    "Min-SNR weights with gamma 20": {"min_snr": 20},
    "float32": {"bf16": False},
    "ten lines, seed 1": {**TEN_LINES, "seed": 1},
    "batch 128": {"batch_size": 128},
    "channels 24, 48, 96": {"channels": (24, 48, 96)},
    "channels 32, 64, 128": {"channels": (32, 64, 128)},
    "patch of 2, channels 32, 64": {"channels": (32, 64), "patch": 2},
    "patch of 2, channels 64, 128": {"channels": (64, 128), "patch": 2},
    "ours, seed 1": {"seed": 1},
    "ours, seed 2": {"seed": 2},
    "ten lines, seed 2": {**TEN_LINES, "seed": 2},
    "constant rate": {"decay": False},
    "learning rate 1e-3": {"lr": 1e-3},
    "EMA 0.999": {"ema": 0.999},
    "channels last": {"channels_last": True},
    "predict x0": {"target": "x0"},
    "channels 32, 64, 128, predict the noise": {"channels": (32, 64, 128), "target": "noise"},
}


class Muon(torch.optim.Adam):
    """Adam, but for inner convolutions steps that are orthogonal matrices, times lr * times.

    Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks": the momentum's
    singular values are brought near 1 by five Newton-Schulz iterations.
    """

    def __init__(self, params, lr, times, fused):
        super().__init__(params, lr=lr, fused=fused)
        self.times = times

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.dim() == 4 and min(p.shape[:2]) >= 8:  # not the stem and the last layer
                state = self.state[p]
                momentum = state.setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 0.05)
                step = orthogonal(p.grad.lerp(momentum, 0.95).flatten(1))
                size = self.param_groups[0]["lr"] * self.times * max(1, len(p) / p[0].numel()) ** 0.5
                p.sub_(step.view_as(p), alpha=size)
                p.grad = None  # so that Adam leaves it alone
        super().step(closure)


def orthogonal(a):
    """About U Vᵀ, where a = U S Vᵀ."""
    tall = a.shape[0] > a.shape[1]
    a = (a.T if tall else a).bfloat16()
    a = a / (a.norm() + 1e-7)
    for _ in range(5):
        s = a @ a.T
        a = 3.4445 * a + (-4.7750 * s + 2.0315 * s @ s) @ a
    return (a.T if tall else a).float()


def build(recipe):
    torch.manual_seed(recipe["seed"])
    model = d.UNet(channels=recipe["channels"], patch=recipe["patch"])
    if recipe["channels_last"]:
        model = model.to(memory_format=torch.channels_last)
    schedule = {"cosine": d.cosine_schedule, "linear": d.linear_schedule}[recipe["schedule"]]()
    return model, schedule


def loss_of(recipe):
    """The helper's losses, and that of x_0, which the series does not use."""

    def x0_loss(model, schedule, x0, t, noise):
        return F.mse_loss(model(schedule.q_sample(x0, t, noise), t), x0)

    v_loss = functools.partial(d.v_loss, gamma=recipe["min_snr"])
    return {"noise": d.simple_loss, "v": v_loss, "x0": x0_loss}[recipe["target"]]


def as_noise(model, schedule, target):
    if target == "v":
        return d.NoiseFromV(model, schedule)
    if target == "x0":
        return lambda xt, t: (
            (xt - d.at(schedule.signal_scale, t, xt) * model(xt, t))
            / d.at(schedule.noise_scale, t, xt)
        )
    return model


def train(recipe, images, steps, progress=True):
    model, schedule = build(recipe)
    ema = d.EMA(model, recipe["ema"]) if recipe["ema"] else None
    amp, rate, adam = d.amp_dtype, d.learning_rate, torch.optim.Adam
    if not recipe["bf16"]:
        d.amp_dtype = lambda device: None
    if not recipe["decay"]:
        d.learning_rate = lambda step, steps, peak, warmup: peak
    if recipe["muon"]:
        torch.optim.Adam = functools.partial(Muon, times=recipe["muon"])
    try:
        losses = d.train(
            model,
            schedule,
            images,
            steps,
            recipe["batch_size"],
            recipe["lr"],
            ema=ema,
            warmup=100,
            clip=1.0 if recipe["decay"] else 1e9,
            seed=recipe["seed"],
            loss_function=loss_of(recipe),
            progress=progress,
        )
    finally:
        d.amp_dtype, d.learning_rate, torch.optim.Adam = amp, rate, adam
    return (ema.model if ema else model), schedule, losses


def speed_key(recipe):
    """What decides the speed: recipes that agree in it do the same number of steps."""
    return json.dumps(
        [recipe[k] for k in ("channels", "patch", "batch_size", "bf16", "channels_last")]
        + [recipe["ema"] is not None]
        + ["muon"] * (recipe["muon"] is not None)
    )


def steps_in_time(recipe, images):
    """How many steps the recipe does in five minutes, from its speed beside the reference's: speeds drift, ratios less."""

    def speed(recipe):
        train(recipe, images, 5, progress=False)
        n = max(10, 2_000 // recipe["batch_size"])
        start = time.perf_counter()
        train(recipe, images, n, progress=False)
        return n / (time.perf_counter() - start)

    reference = read()["rates"].get(speed_key(REFERENCE))
    if reference is None:
        return round(MINUTES * 60 * statistics.median(speed(REFERENCE) for _ in range(5)))
    return round(reference * statistics.median(speed(recipe) / speed(REFERENCE) for _ in range(5)))


def measure(model, schedule, classifier, training):
    generator = torch.Generator().manual_seed(123)
    pictures = torch.cat(
        [
            d.ddim_sample(model, schedule, 250, steps=20, generator=generator, progress=False)
            for _ in range(SAMPLES // 250)
        ]
    )
    features, probabilities = d.garment_features(classifier, pictures)
    counts = probabilities.argmax(dim=1).bincount(minlength=10)
    return pictures, {
        "distance": round(d.frechet_distance(*d.feature_statistics(features), *training), 2),
        "confidence": round(float(probabilities.max(dim=1).values.mean()), 3),
        "rarest": round(int(counts.min()) / SAMPLES, 4),
        "commonest": round(int(counts.max()) / SAMPLES, 4),
    }


def read():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rates": {}, "runs": {}}


def write(part, key, value):
    results = read()  # read again: two of these may run at once
    results[part][key] = value
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--only", nargs="*", help="names of recipes")
    parser.add_argument(
        "--pictures", type=pathlib.Path, help="a folder for a sheet of samples of each"
    )
    chosen = parser.parse_args()
    recipes = {
        name: {**REFERENCE, **change}
        for name, change in RECIPES.items()
        if not chosen.only or name in chosen.only
    }
    if chosen.table:
        for name, run in sorted(read()["runs"].items(), key=lambda item: item[1]["distance"]):
            print(
                f"{name:32s} {run['steps']:6d} steps   distance {run['distance']:7.2f}   confidence {run['confidence']:.3f}"
            )
        return
    data = d.load_fashion_mnist("train")
    if data.is_stand_in:
        sys.exit("The comparison needs Fashion-MNIST.")
    for name, recipe in recipes.items():
        key = speed_key(recipe)
        if chosen.rates:
            if key not in read()["rates"]:
                write("rates", key, steps_in_time(recipe, data.images))
            print(f"{name}: {read()['rates'][key]} steps in {MINUTES} minutes", flush=True)
            continue
        claim = RESULTS.with_name(f".{name.replace(' ', '_')}.running")  # another process is at it
        if name in read()["runs"] or claim.exists():
            continue
        claim.write_text(str(os.getpid()))
        try:
            model, schedule, losses = train(
                recipe, data.images, read()["rates"][key], progress=False
            )
            pictures, result = measure(
                as_noise(model, schedule, recipe["target"]), schedule, *d.load_classifier()
            )
            write(
                "runs",
                name,
                {"steps": len(losses), "loss": round(sum(losses[-100:]) / 100, 4), **result},
            )
            print(name, read()["runs"][name], flush=True)
            if chosen.pictures:
                d.show_images(
                    pictures[:100], columns=20, scale=0.5, title=f"{name}: {result['distance']}"
                ).savefig(chosen.pictures / f"{name.replace(' ', '_').replace(',', '')}.png")
        finally:
            claim.unlink()


if __name__ == "__main__":
    main()
