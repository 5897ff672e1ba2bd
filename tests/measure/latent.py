"""The latent flowers of notebook 12: held-out error, scalings, pictures of the card. A script, not a test.

    python tests/measure/latent.py               measure, write latent.json; about a minute of one core
    python tests/measure/latent.py --pictures    and draw the card's pictures into notebooks/weights/

It needs the photographs that the weights were trained on. "trainings" in latent.json holds what was written down during the
GPU trainings (held-out loss of v by step, and by t for the three scalings); everything else is computed here.
"""

import argparse
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
from series import defined_in  # noqa: E402

import ddpm_utils as d  # noqa: E402

RESULTS = HERE / "latent.json"
CARD = ROOT / "notebooks" / "weights"
PLACES = (50, 100, 200, 300, 400, 500, 600, 700, 800, 900)
POWERS = {"none": 0.0, "half-whitened": 0.5, "whitened": 1.0}


def guess_errors(predict, z0, schedule):
    """RMS errors of x̂_0 over PLACES, the same noise for whoever asks."""
    draws, found = torch.Generator().manual_seed(1), []
    for step in PLACES:
        noise, t = torch.randn(z0.shape, generator=draws), torch.full((len(z0),), step)
        guess = predict(schedule.q_sample(z0, t, noise), t)
        found.append(float((guess - z0).square().mean().sqrt()))
    return found


def by_filter(field, schedule):
    def predict(zt, t):
        signal, noise = schedule.signal_scale[t[0]], schedule.noise_scale[t[0]]
        return field.predict_x0(zt, signal, noise)

    return predict


def draw(images, columns, path, rows=None):
    figure = d.show_images(images, columns=columns, rows=rows, scale=1.7)
    figure.savefig(path, dpi=80, pil_kwargs={"quality": 85})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", action="store_true")
    pictures = parser.parse_args().pictures
    device = d.set_up(0)
    data = d.load_flowers()
    hidden = torch.arange(len(data)) % 10 == 0
    both = torch.cat([data.images[~hidden], data.images[~hidden].flip(3)])
    model, schedule = d.load_pretrained("flowers_latent")
    pca, filters = d.load_components(), defined_in("12", "LinearFilter")["LinearFilter"]
    z = torch.cat([pca.encode(d.to_model_range(part)) for part in both.split(500)])
    fresh = pca.encode(d.to_model_range(data.images[hidden]))

    @torch.no_grad()
    def by_network(zt, t):
        parts = zip(zt.split(100), t.split(100))
        return torch.cat([schedule.predict_x0(x, s, model(x, s)) for x, s in parts])

    content = json.loads(RESULTS.read_text())
    errors = [
        guess_errors(f, fresh, schedule) for f in (by_filter(filters(z), schedule), by_network)
    ]
    content["held out"] = [
        {"t": t, "linear": a, "network": b, "less": 1 - b / a} for t, a, b in zip(PLACES, *errors)
    ]
    content["scalings"] = {}
    variances = (z * pca.scale[:, None, None]).var(dim=(0, 2, 3))
    for name, power in POWERS.items():
        scale = variances.sqrt() ** power
        scale = scale * (variances / scale**2).mean().sqrt()
        change = (pca.scale / scale)[:, None, None]
        errors = guess_errors(by_filter(filters(z * change), schedule), fresh * change, schedule)
        filter_v = [(e / float(schedule.noise_scale[t])) ** 2 for e, t in zip(errors, PLACES)]
        network_v = content["trainings"]["v by t"][name]
        shares = [1 - a / b for a, b in zip(network_v, filter_v)]
        content["scalings"][name] = sum(shares) / len(shares)
        print(
            f"{name}: squared error of v below the linear filter's by {content['scalings'][name]:.1%}"
        )
    for row in content["held out"]:
        print(f"| {row['t']} | {row['linear']:.3f} | {row['network']:.3f} | {row['less']:.0%} |")

    def sample(predict, n, seed, x_T=None):
        draws = torch.Generator().manual_seed(seed)
        return d.dpm_solver_sample(
            predict, schedule, n, 30, (16, 16, 16), False, x_T, draws, progress=False
        )

    x_T = torch.randn(6, 16, 16, 16, generator=torch.Generator().manual_seed(11))
    y = torch.arange(5).repeat_interleave(6)
    asked = sample(d.Guided(model, y, 2.0), 30, 0, x_T.repeat(5, 1, 1, 1))
    free = sample(model, 12, 12)
    size = (pca.scale / 192**0.5)[:, None, None]
    flat = lambda z: (z * size).flatten(1) / 16  # noqa: E731
    for name, some in (("samples", torch.cat([free, asked])), ("held out", fresh)):
        far, which = torch.cdist(flat(some), flat(z)).topk(2, largest=False)
        ratio = far[:, 0] / far[:, 1]
        content[f"nearest, {name}"] = {
            "median": float(far[:, 0].median()),
            "least": float(far[:, 0].min()),
            "least over the second": float(ratio.min()),
        }
        print(name, content[f"nearest, {name}"])
        if name == "samples" and pictures:
            closest = far[:, 0].argsort()[:4]
            pair = [pca.decode(some[closest]), d.to_model_range(both[which[closest, 0]])]
            draw(torch.cat(pair), 4, CARD / "flowers_latent_closest.jpg", ["samples", "nearest"])
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    if pictures:
        draw(pca.decode(asked), 6, CARD / "flowers_latent_samples.jpg", data.classes)
        curve = content["trainings"]["curve"]
        figure, axis = plt.subplots(figsize=(7, 3))
        millions = [point["images"] / 1e6 for point in curve]
        axis.plot(millions, [p["without"] for p in curve], "-o", label="without the label")
        axis.plot(millions, [p["with"] for p in curve], "--s", label="with it")
        axis.set(xlabel="latents seen, millions", ylabel="held-out loss of $v$")
        axis.legend()
        figure.savefig(CARD / "flowers_latent_curve.png", dpi=80)
