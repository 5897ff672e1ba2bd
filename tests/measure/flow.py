"""Flow matching by numbers: Fréchet distances over samplers and calls. A script, not a test.

    python tests/measure/flow.py                          measure each row of the shipped weights that is missing
    python tests/measure/flow.py --images 10000           with more images
    python tests/measure/flow.py --pair v.pt flow.pt      of two networks that were trained alike (see the card)
    python tests/measure/flow.py --twins 2                of small networks, trained alike here, two seeds
    python tests/measure/flow.py --reflow 10000 4000 f.pt a round of reflow from fashion_flow.pt, trained here
    python tests/measure/flow.py --table                  print what was measured

Nothing is clipped, no label is given; images 100 k to 100 k + 99 start from the noise of seed k, whatever the network and
the sampler. Judged as in quality.py. Results: tests/measure/flow.json.
"""

import argparse
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import torch  # noqa: E402
from quality import quick  # noqa: E402

import ddpm_utils as d  # noqa: E402

RESULTS = HERE / "flow.json"
BATCH = 100
SAMPLERS = ("DPM-Solver++(2M)", "DDIM", "Euler in s")
CALLS = (20, 10, 5)


def sample(network, schedule, sampler, calls, n):
    """n images of a bare network, whose target tells how to wrap it."""
    wrapped = (d.NoiseFromFlow if network.target == "flow" else d.NoiseFromV)(network, schedule)

    for k in range(n // BATCH):
        x_T = torch.randn(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(k))
        options = {"x_T": x_T.to(schedule.betas.device), "progress": False}
        if sampler == "Euler in s":
            yield d.flow_sample(quick(network), BATCH, calls, **options).cpu()
        else:
            run = d.ddim_sample if sampler == "DDIM" else d.dpm_solver_sample
            yield run(quick(wrapped), schedule, BATCH, calls, clip=False, **options).cpu()


def measure(key, prefix, network, schedule, n, judge, all_calls=CALLS, samplers=SAMPLERS, **more):
    classifier, statistics = judge
    for calls in all_calls:
        for sampler in samplers:
            row = f"{prefix}{sampler}, {calls} calls, {n} images"
            if row in read().get(key, {}) or (sampler == "Euler in s" and network.target != "flow"):
                continue
            images = torch.cat(list(sample(network, schedule, sampler, calls, n)))
            features, probabilities = d.garment_features(classifier, images)
            distance = d.frechet_distance(*d.feature_statistics(features), *statistics)
            results = read()
            results.setdefault(key, {})[row] = {
                "distance": round(distance, 3),
                "confidence": round(float(probabilities.max(dim=1).values.mean()), 3),
                **more,
            }
            RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
            print(key, row, results[key][row], flush=True)


def twins(seed, n, judge, steps=1_200):
    """Notebook 11's pair of small networks, trained longer: DPM-Solver++ and DDIM in 20 steps."""
    images, schedule, key = (
        d.load_fashion_mnist("train").images,
        d.cosine_schedule(),
        f"twins, {steps} steps",
    )
    for loss in (d.flow_loss, d.v_loss):
        prefix = f"seed {seed}, {loss.target}, "
        if any(row.startswith(prefix) for row in read().get(key, {})):
            continue
        torch.manual_seed(seed)  # the same start
        model = d.UNet(channels=(16, 32, 64))
        ema = d.EMA(model, decay=0.99)
        losses = d.train(model, schedule, images, steps, batch_size=32, lr=2e-3, ema=ema, seed=seed,
                         loss_function=loss, progress=False)  # fmt: skip
        measure(key, prefix, ema.model, schedule, n, judge, (20,), SAMPLERS[:2],
                loss=round(sum(losses[-200:]) / 200, 4))  # fmt: skip


def pair_loss(model, schedule, pairs, t, noise):
    """flow_loss of given pairs (B, 2, H, W), an end and the noise that it came from."""
    return d.flow_loss(model, schedule, pairs[:, :1], t, pairs[:, 1:])


pair_loss.target = "flow"


def reflow(pairs, steps, file):
    """One round from the shipped weights: noises and their own ends, then training on their lines."""
    network, schedule = d.load_network("fashion_flow")
    wrapped, part = d.NoiseFromFlow(network, schedule).eval(), pathlib.Path(f"{file}.pairs")
    if not part.exists():
        draws = torch.Generator().manual_seed(10_000)
        noises = torch.randn(pairs, 1, 28, 28, generator=draws).split(100)
        ends = [d.dpm_solver_sample(wrapped, schedule, 100, 20, clip=False, x_T=x, progress=False)
                for x in d.progress_bar(noises, "pairs")]  # fmt: skip
        torch.save(torch.cat([torch.cat(ends), torch.cat(noises)], dim=1), part)
    ema = d.EMA(network, decay=0.998)
    d.train(network, schedule, torch.load(part, weights_only=True), steps, batch_size=32, lr=3e-4,
            ema=ema, loss_function=pair_loss, checkpoint=f"{file}.part")  # fmt: skip
    d.save_checkpoint(file, ema.model, schedule)


def read():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1_000)
    parser.add_argument("--pair", nargs=2, help="checkpoints of two networks, whose EMA is taken")
    parser.add_argument("--twins", type=int, default=0, metavar="SEEDS")
    parser.add_argument("--reflow", nargs=3, metavar=("PAIRS", "STEPS", "FILE"))
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    if chosen.table:
        for key, rows in read().items():
            for row, found in rows.items():
                print(f"{key:20} {row:45} {found}")
        return
    device = d.set_up()
    judge, n = d.load_classifier(device), chosen.images
    for seed in range(chosen.twins):
        twins(seed, n, judge)
    if chosen.twins:
        return
    if chosen.reflow:
        return reflow(int(chosen.reflow[0]), int(chosen.reflow[1]), chosen.reflow[2])
    if chosen.pair is None:
        for name, *what in (("fashion_flow", CALLS, SAMPLERS),
                            ("fashion_flow", (1, 2, 4), SAMPLERS[2:]),
                            ("fashion_reflow", (1, 2, 4, 20), SAMPLERS[2:])):  # fmt: skip
            network, schedule = d.load_network(name, device)
            network.requires_grad_(False)
            measure(d.WEIGHTS[name][:12], "", network, schedule, n, judge, *what)
        return
    steps = {d.load_checkpoint(path).get("step", 0) for path in chosen.pair}
    d.require(len(steps) == 1, f"the pair must have been trained equally long; steps {steps}")
    for path in chosen.pair:
        network, schedule = d.load_network(path, device)
        network.requires_grad_(False)
        measure(f"pair, {max(steps)} steps", f"{network.target}, ", network, schedule, n, judge)


if __name__ == "__main__":
    main()
