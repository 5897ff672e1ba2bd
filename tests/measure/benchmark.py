"""Prints how fast the series is on this machine. A script, not a test: run it on an idle machine.

    python tests/measure/benchmark.py       the helper: import, training, sampling, memory

The seconds of each notebook are printed by `python notebooks/refresh.py`.
"""

import argparse
import functools
import os
import pathlib
import platform
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
IMPORT = "import torch, time; start = time.perf_counter(); import ddpm_utils; print(time.perf_counter() - start)"


def best_of(times, function):
    """The fastest of a few runs: what else the machine does can only make them slower."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_memory():
    """The most memory that this process ever held, in GiB; None where it can't be known (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        peak / 2**30 if sys.platform == "darwin" else peak / 2**20
    )  # macOS counts bytes, Linux kilobytes


def show(what, value):
    print(f"{what:<58}{value}", flush=True)


def import_seconds():
    run = [sys.executable, "-c", IMPORT]
    return min(
        float(subprocess.run(run, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    )


def plain_loop(model, schedule, images, steps, batch):
    """Algorithm 1 in ten lines, with nothing that makes it good."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        x0 = d.to_model_range(images[torch.randint(len(images), (batch,), device=images.device)])
        loss = d.simple_loss(model, schedule, x0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def helper_figures(steps, batch):
    device = d.set_up()
    images, schedule = (
        d.load_fashion_mnist("train").images.to(device),
        d.cosine_schedule().to(device),
    )

    def training(loop):
        model = d.UNet().to(device)
        loop(model, 3)  # the first steps are slower
        return steps * batch / best_of(2, lambda: loop(model, steps))

    def full(model, steps):
        return d.train(
            model, schedule, images, steps, batch_size=batch, ema=d.EMA(model), progress=False
        )

    def network_alone(model, steps):
        """What no training can do without: the loss of one fixed batch and its gradient, in train's number type."""
        x0, half = d.to_model_range(images[:batch]), d.amp_dtype(device)
        t, noise = torch.full((batch,), 500, device=device), torch.randn(x0.shape, device=device)
        xt = schedule.q_sample(x0, t, noise)
        for _ in range(steps):
            with torch.autocast(
                device.type, dtype=half or torch.bfloat16, enabled=half is not None
            ):
                loss = torch.nn.functional.mse_loss(model(xt, t), noise)
            model.zero_grad(set_to_none=True)
            loss.backward()

    show(
        f"training, plain loop in float32, images/s (batch {batch})",
        f"{training(lambda model, steps: plain_loop(model, schedule, images, steps, batch)):.0f}",
    )
    alone, ours = training(network_alone), training(full)
    show(
        f"training, train() with EMA, {d.amp_dtype(device) or 'float32'}, images/s".replace(
            "torch.", ""
        ),
        f"{ours:.0f}",
    )
    show("of that time outside the network (target under 5 %)", f"{100 * (1 - ours / alone):.0f} %")

    try:
        model, schedule = d.load_pretrained("fashion", device)
    except (OSError, ValueError) as error:
        print(f"no shipped weights, so an untrained network: {error}")
        model = d.UNet().to(device).eval()
    seconds = best_of(2, lambda: d.ddim_sample(model, schedule, 16, 50, progress=False).cpu())
    show("sixteen garments by DDIM in 50 steps, seconds (limit 10)", f"{seconds:.1f}")
    seconds = best_of(1, lambda: d.ddim_sample(model, schedule, 64, 10, progress=False).cpu())
    show("network evaluations while sampling, images/s (batch 64)", f"{640 / seconds:.0f}")
    plain, labelled = d.UNet().to(device).eval(), d.UNet(classes=10).to(device).eval()
    wished = functools.partial(labelled, y=torch.arange(64, device=device) % 10)
    for name, network in (("without labels", plain), ("with labels", wished)):
        took = best_of(2, lambda: d.ddim_sample(network, schedule, 64, 5, progress=False).cpu())
        show(f"the same, {name}", f"{320 / took:.0f}")
    show("so one picture by DDPM in all steps, seconds", f"{schedule.T * seconds / 640:.2f}")
    if torch.cuda.is_available():
        show("peak memory of the GPU, GiB", f"{torch.cuda.max_memory_allocated() / 2**30:.2f}")
    if peak_memory():
        show("peak memory of this process, GiB (limit 3)", f"{peak_memory():.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60, help="training steps that are timed")
    parser.add_argument("--batch", type=int, default=64, help="images in a training batch")
    options = parser.parse_args()

    import torch

    import ddpm_utils as d

    show(
        "machine",
        f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, load now {os.getloadavg()[0]:.1f}"
        if hasattr(os, "getloadavg")
        else f"{os.cpu_count()} CPUs, {platform.system()}, torch {torch.__version__}",
    )
    show("import of the helper after torch, seconds (limit 4)", f"{import_seconds():.2f}")
    helper_figures(options.steps, options.batch)
