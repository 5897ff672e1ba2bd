"""How good the shipped garments are: the numbers and pictures of notebooks/weights/fashion.md. A script, not a test.

    python tests/measure/quality.py                       measure each row that is missing; goes on where it stopped
    python tests/measure/quality.py --only "DDIM 20"      some rows
    python tests/measure/quality.py --weights FILE        another checkpoint of the same network
    python tests/measure/quality.py --table               print what was measured
    python tests/measure/quality.py --pictures            draw the card's pictures (after the row DDIM 20)

The distances are Fréchet's, to the 60,000 training images in the shipped classifier's features; each row also measures
how near its images are to the nearest training image, and the floors are those of as many real test images. The
rows with 10,000 images take from four minutes (DDIM 10) to forty (DDIM 100) on one core, each of the ancestral ones forty.
Results: tests/measure/quality.json; the images themselves stay in outputs/, which git ignores.
"""

import argparse
import hashlib
import json
import pathlib
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

import ddpm_utils as d  # noqa: E402

RESULTS = HERE / "quality.json"
WEIGHTS = HERE.parent.parent / "notebooks" / "weights"
BATCH = 500  # images sampled together; each batch has its own seed, so that a killed run goes on
ROWS = {  # name: (sampler, its options, how many images)
    "DDIM 10": (d.ddim_sample, {"steps": 10}, 10_000),
    "DDIM 20": (d.ddim_sample, {"steps": 20}, 10_000),
    "DDIM 50": (d.ddim_sample, {"steps": 50}, 10_000),
    "DDIM 100": (d.ddim_sample, {"steps": 100}, 10_000),
    "DPM-Solver++ 10": (d.dpm_solver_sample, {"steps": 10, "clip": False}, 10_000),
    "DPM-Solver++ 20": (d.dpm_solver_sample, {"steps": 20, "clip": False}, 10_000),
    "ancestral, beta": (d.ddpm_sample, {"sigma": "beta"}, 1_000),
    "ancestral, beta_tilde": (d.ddpm_sample, {"sigma": "beta_tilde"}, 1_000),
}


def file_of(key, row):
    return d.output_path(f"quality_{key}_{row.replace(' ', '_').replace(',', '')}.pt")


def quick(model):
    """The same network in the device's fast type."""

    def network(xt, t, *y):
        half = d.amp_dtype(xt.device)
        with torch.autocast(xt.device.type, dtype=half or torch.bfloat16, enabled=half is not None):
            return model(xt, t, *y).float()

    return network


def sample(model, schedule, row, n, seed):
    sampler, options, _ = ROWS[row]
    generator = torch.Generator(schedule.betas.device).manual_seed(seed)
    with torch.no_grad():
        x = sampler(quick(model), schedule, n, generator=generator, progress=False, **options)
    return d.to_uint8(x).cpu()


def sample_row(model, schedule, row, key):
    """The row's images, uint8 (n, 1, 28, 28); written down after every batch."""
    file = file_of(key, row)
    images = list(torch.load(file, weights_only=True).split(BATCH)) if file.exists() else []
    batches = range(len(images), ROWS[row][2] // BATCH)
    for batch in d.progress_bar(batches, row, sys.stdout.isatty()):
        images.append(sample(model, schedule, row, BATCH, batch))
        d._write_whole(file, lambda f: torch.save(torch.cat(images), f))
    return torch.cat(images)


def nearest(images, training):
    """Root mean squared difference, in grey levels 0 … 255, to the nearest training image, and which one that is."""
    size, device = images[0].numel(), "cuda" if torch.cuda.is_available() else "cpu"
    all_of_them = training.to(device).flatten(1).float()
    squares, distances, which = all_of_them.square().sum(dim=1), [], []
    for batch in images.to(device).flatten(1).float().split(500):
        gap = batch.square().sum(dim=1, keepdim=True) + squares - 2 * batch @ all_of_them.T
        best = gap.min(dim=1)
        which.append(best.indices)
        distances.append((batch - all_of_them[best.indices]).square().sum(dim=1).div(size).sqrt())
    return torch.cat(distances).cpu(), torch.cat(which).cpu()


def measure(images, training, classifier, statistics):
    features, probabilities = d.garment_features(classifier, images)
    kinds = probabilities.argmax(dim=1).bincount(minlength=10) / len(images)
    gaps = nearest(images, training)[0]
    return {
        "images": len(images),
        "distance": round(d.frechet_distance(*d.feature_statistics(features), *statistics), 3),
        "confidence": round(float(probabilities.max(dim=1).values.mean()), 4),
        "rarest class": round(float(kinds.min()), 4),
        "commonest class": round(float(kinds.max()), 4),
        "nearest, median": round(float(gaps.median()), 2),
        "nearest, 1st percentile": round(float(gaps.quantile(0.01)), 2),
    }


def read():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write(key, row, value):
    results = read()  # read again: two of these may run at once
    results.setdefault(key, {})[row] = value
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def draw(model, schedule, key, training, test):
    """The card's pictures: samples of every row over real images, the ten that are nearest to a
    training image, the curve of the training."""
    rows = [sample(model, schedule, row, 20, seed=0) for row in ROWS]
    d.show_images(torch.cat([*rows, test[:20]]), columns=20, scale=0.5).savefig(
        WEIGHTS / "fashion_samples.png", bbox_inches="tight")
    print("rows of fashion_samples.png:", ", ".join([*ROWS, "test images"]))
    images = torch.load(file_of(key, "DDIM 20"), weights_only=True)
    gaps, which = nearest(images, training)
    closest = gaps.argsort()[:10]
    d.show_images(
        torch.cat([images[closest], training[which[closest]]]), columns=10, scale=0.7
    ).savefig(WEIGHTS / "fashion_closest.png", bbox_inches="tight")
    print(
        "the ten closest pairs, root mean squared difference in grey levels:",
        [round(float(g), 1) for g in gaps[closest]],
    )
    about = json.loads((HERE / "train_fashion.json").read_text())
    figure, axis = plt.subplots()
    axis.plot([float(seen) for seen in about["curve"]], list(about["curve"].values()), marker="o",
              label="samples, DDIM in 50 steps")
    axis.axhline(read()["real test images"]["1000"]["distance"], color="grey", linestyle="--",
                 label="real test images")
    axis.set(xlabel="training images seen, in millions", ylabel="Fréchet distance, 1,000 images",
             ylim=0)
    axis.legend()
    figure.savefig(WEIGHTS / "fashion_curve.png", bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=pathlib.Path, default=WEIGHTS / "fashion.pt")
    parser.add_argument(
        "--only", nargs="*", default=list(ROWS), choices=list(ROWS), help="names of rows"
    )
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--pictures", action="store_true")
    chosen = parser.parse_args()
    key = hashlib.sha256(chosen.weights.read_bytes()).hexdigest()[:12]
    if chosen.table:
        real = {
            f"real test images, {n}": found
            for n, found in read().get("real test images", {}).items()
        }
        for row, found in {**read().get(key, {}), **real}.items():
            print(f"{row:26s}", ", ".join(f"{what} {number}" for what, number in found.items()))
        return
    training, test = d.load_fashion_mnist("train"), d.load_fashion_mnist("test")
    if training.is_stand_in:
        sys.exit("The measures need Fashion-MNIST.")
    device = d.set_up()
    model, schedule = d.load_pretrained(chosen.weights, device)
    if chosen.pictures:
        draw(model, schedule, key, training.images, test.images)
        return
    classifier, statistics = d.load_classifier()
    for n in (1_000, 10_000):  # the floors: real images against real ones; at 1,000 the mean of ten
        if str(n) not in read().get("real test images", {}):
            mixed = test.images[
                torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
            ]
            parts = [
                measure(part, training.images, classifier, statistics) for part in mixed.split(n)
            ]
            mean = {
                what: round(sum(part[what] for part in parts) / len(parts), 4) for what in parts[0]
            }
            write("real test images", str(n), {**mean, "images": n})
    for row in chosen.only:
        if row not in read().get(key, {}):
            start = time.perf_counter()
            images = sample_row(model, schedule, row, key)
            write(key, row, measure(images, training.images, classifier, statistics))
            print(key, row, read()[key][row], f"{time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
