"""How fashion.pt was trained: for so many minutes of a GPU, the curve of distance measured on the way. A script, no test.

    python tests/measure/train_fashion.py --minutes 7 --loss v_loss --out runs/fashion_v.pt

A short training, thrown away, tells how many steps fit into the minutes; then the rate falls to 0 over as many. Beside
the weights (the EMA's) it writes a .json with the curve, the speed and the loss. On a CPU it works too, slowly.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402
from quality import quick  # noqa: E402

import ddpm_utils as d  # noqa: E402

parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--minutes", type=float, default=7)
parser.add_argument("--loss", default="v_loss", choices=["v_loss", "min_snr_loss"])
parser.add_argument("--drop", type=float, default=0.5)
parser.add_argument("--batch", type=int, default=256)
parser.add_argument("--rate", type=float, default=2e-3)
parser.add_argument("--trial", type=int, default=400, help="steps of the training thrown away")
parser.add_argument("--points", type=int, default=6, help="of the curve")
parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/fashion.pt"))
chosen = parser.parse_args()

device = d.set_up(seed=0)
data = d.load_fashion_mnist("train")
if data.is_stand_in:
    sys.exit("The training needs Fashion-MNIST.")
schedule = d.cosine_schedule()
model = d.UNet(classes=10).to(device, memory_format=torch.channels_last)
start = {name: value.clone() for name, value in model.state_dict().items()}
fast = torch.compile(model, mode="reduce-overhead") if device.type == "cuda" else model
classifier, reference = d.load_classifier(device)
curve, clock = {}, {}


def train(steps, ema, callback=None, every=500):
    return d.train(fast, schedule, data.images, steps, chosen.batch, chosen.rate, ema=ema, seed=0,
                   loss_function=getattr(d, chosen.loss), labels=data.labels, drop=chosen.drop,
                   callback=callback, callback_every=every, progress=False)


def distance(network, n=1_000):
    """By DDIM in 50 steps, no label, as in quality.py."""
    predict = quick(d.NoiseFromV(network, schedule.to(device)))
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        x = d.ddim_sample(predict, schedule.to(device), n, 50, generator=generator, progress=False)
    features, _ = d.garment_features(classifier, x)
    return d.frechet_distance(*d.feature_statistics(features), *reference)


def look(step):
    if time.perf_counter() > clock["start"] + 60 * chosen.minutes:
        raise KeyboardInterrupt  # train then keeps what it has
    if step % (steps // chosen.points) < every:
        curve[f"{step * chosen.batch / 1e6:.2f}"] = round(distance(ema.model), 2)
        print(step, curve, flush=True)


def now(step):
    if device.type == "cuda":
        torch.cuda.synchronize()
    clock[step] = time.perf_counter()


train(chosen.trial, d.EMA(model), now, chosen.trial // 2)
seconds = (clock[chosen.trial] - clock[chosen.trial // 2]) / (chosen.trial - chosen.trial // 2)
model.load_state_dict(start)
distance(model, 100)
steps, clock["start"] = int(60 * chosen.minutes * 0.96 / seconds), time.perf_counter()
every = max(1, steps // 200)
print(f"{seconds * 1000:.2f} ms a step, {steps} steps", flush=True)
ema = d.EMA(model, decay=0.9995)
losses = train(steps, ema, look, every)
minutes = (time.perf_counter() - clock["start"]) / 60
d.save_checkpoint(chosen.out, ema.model, schedule)
about = {"steps planned": steps, "steps": len(losses), "minutes": round(minutes, 2),
         "images": len(losses) * chosen.batch, "loss": round(statistics.mean(losses[-1000:]), 4),
         "torch": torch.__version__, "curve": curve,
         "settings": {k: str(v) for k, v in vars(chosen).items()},
         "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
         "distance at the end": round(distance(ema.model), 2)}
chosen.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
print(about, flush=True)
