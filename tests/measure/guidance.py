"""What guidance costs: Fréchet distance, accuracy and more of labelled samples over w. A script, not a test.

    python tests/measure/guidance.py                         measure each w that is missing; goes on where it stopped
    python tests/measure/guidance.py --w 1 2 --images 2000   some, with fewer images
    python tests/measure/guidance.py --table                 print what was measured

DPM-Solver++(2M) in 20 steps, clipped, as many images of each class, judged as in quality.py. w = 0 is the network
without a label. 10,000 images take five to ten minutes of one core with bfloat16. Results: tests/measure/guidance.json.
"""

import argparse
import hashlib
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402
from quality import quick  # noqa: E402

import ddpm_utils as d  # noqa: E402

RESULTS = HERE / "guidance.json"
WEIGHTS = HERE.parent.parent / "notebooks" / "weights" / "fashion.pt"
BATCH = 500  # fifty of each class


def sample(model, schedule, w, n):
    model = quick(model)
    y = torch.arange(BATCH, device=schedule.betas.device) % 10
    nobody = torch.full_like(y, 10)

    def network(xt, t):
        if w in (0, 1):
            return model(xt, t, y if w else nobody)
        both = model(torch.cat([xt, xt]), torch.cat([t, t]), torch.cat([y, nobody]))
        with_label, without = both.chunk(2)
        return without + w * (with_label - without)

    for batch in d.progress_bar(range(n // BATCH), f"w = {w:g}", sys.stdout.isatty()):
        generator = torch.Generator(schedule.betas.device).manual_seed(batch)
        yield d.dpm_solver_sample(
            network, schedule, BATCH, 20, generator=generator, progress=False
        ).cpu()


def measure(samples, classifier, statistics):
    features, probabilities = d.garment_features(classifier, samples)
    y = torch.arange(len(samples)) % 10
    right = probabilities.argmax(dim=1) == y
    return {
        "distance": round(d.frechet_distance(*d.feature_statistics(features), *statistics), 3),
        "accuracy": round(float(right.float().mean()), 4),
        "accuracy by class": [round(float(right[y == k].float().mean()), 3) for k in range(10)],
        "distance within a class": round(
            sum(float(torch.pdist(features[y == k][:500]).mean()) for k in range(10)) / 10, 3
        ),
        "pixels at the limit": round(float((samples.abs() > 0.999).float().mean()), 4),
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--w", type=float, nargs="*", default=[1, 2, 0, 3, 1.5, 4])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--weights", type=pathlib.Path, default=WEIGHTS)
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    read = lambda: json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    key = hashlib.sha256(chosen.weights.read_bytes()).hexdigest()[:12]
    if chosen.table:
        for row, found in read().get(key, {}).items():
            print(row, found)
        return
    device = d.set_up()
    model, schedule = d.load_pretrained(chosen.weights, device)
    classifier, statistics = d.load_classifier()
    for w in chosen.w:
        row = f"w = {w:g}, {chosen.images} images"
        if row in read().get(key, {}):
            continue
        samples = torch.cat(list(sample(model, schedule, w, chosen.images)))
        results = read()
        results.setdefault(key, {})[row] = measure(samples, classifier, statistics)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(row, results[key][row], flush=True)


if __name__ == "__main__":
    main()
