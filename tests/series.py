"""What several tests share: reading notebooks, functions out of their cells, and small runs."""

import ast
import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import ddpm_utils as d

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
WEIGHTS = NOTEBOOKS / "weights"
SCHEDULE = d.linear_schedule(50)
SAMPLERS = {"ddpm": (d.ddpm_sample, {}), "ddim": (d.ddim_sample, {"steps": 5}),
            "ddim, eta 1": (d.ddim_sample, {"steps": 5, "eta": 1.0}),
            "dpm": (d.dpm_solver_sample, {"steps": 5})}

each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


# ------------------------------------------------------------------ notebooks


@functools.cache
def read(path):
    """The notebook as a dict; each cell's source is one text, and its tags are at cell["tags"]."""
    notebook = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        cell["tags"] = cell["metadata"].get("tags", [])
    return notebook


def code_cells(path):
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def prose(path):
    return [cell["source"] for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]


def tagged(path, *tags):
    """The sources of the cells that have one of these tags, in their order."""
    return [cell["source"] for cell in code_cells(path) if set(tags) & set(cell["tags"])]


def printed(cell):
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


def has_figure(cell):
    return any(k.startswith("image/") for out in cell["outputs"] for k in out.get("data", {}))


def defined_in(number, *wanted):
    """A namespace with the functions, classes and constants called wanted, out of a notebook."""
    path = next(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    space = {name: value for name, value in vars(d).items() if name[0] != "_"}
    space["device"] = torch.device("cpu")
    for cell in code_cells(path):
        if any(tag.startswith(("exercise", "check", "setup")) for tag in cell["tags"]):
            continue
        for node in ast.parse(cell["source"]).body:
            names = {getattr(node, "name", None)}  # of a function or a class
            for target in getattr(node, "targets", []):
                names |= {leaf.id for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
            if names & set(wanted):
                exec(compile(ast.Module([node], []), path.name, "exec"), space)
    assert set(wanted) <= set(space), f"{path.name} doesn't define all of {wanted}"
    return space


def everything_in(folder):
    """{path inside folder: bytes} of every file in it."""
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()}


# ------------------------------------------------------------------ small runs


def small_unet(seed=1, **options):
    torch.manual_seed(seed)
    return d.UNet(channels=(8, 16), **options)


def four_samples(name, model, schedule):
    """Four images of 8x8 from one of SAMPLERS, the same noise for whichever model."""
    sampler, options = SAMPLERS[name]
    draws = torch.Generator().manual_seed(0)
    return sampler(model, schedule, 4, shape=(1, 8, 8), progress=False, generator=draws, **options)


def some_images(n=32, seed=2):
    r = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=r)


def run(steps=12, model=None, images=None, schedule=SCHEDULE, **options):
    """A training of a second: (model, losses)."""
    model, images = model or small_unet(), some_images() if images is None else images
    options = {"batch_size": 4, "warmup": 3, "progress": False, **options}
    return model, d.train(model, schedule, images, steps, **options)


def same_weights(one, other):
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


class Stop(Exception):
    """What a callback raises where a test wants a run to end in the middle."""


def stop_at(step, how=Stop):
    def callback(now):
        if now == step:
            raise how

    return callback


def unfinished(file):
    """A run of 12 steps that was stopped at step 4, in file."""
    with pytest.raises(Stop):
        run(checkpoint=file, checkpoint_every=4, callback=stop_at(4), callback_every=4)
    return file


CHILD = """
from series import d, run, small_unet, sys, torch
torch.set_num_threads(1)
model = small_unet()
run(2000, model, ema=d.EMA(model, 0.9), checkpoint=sys.argv[1], checkpoint_every=1,
    callback=lambda step: print(step, flush=True), callback_every=1)
"""


def kill_a_run(file, after):
    """Starts a training in a process of its own and kills it when it has done `after` steps."""
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", CHILD, file], env=paths, stdout=subprocess.PIPE,
                          text=True) as child:
        for line in child.stdout:
            if line == f"{after}\n":
                child.kill()
