"""What several tests share: reading notebooks, functions out of their cells, and small runs."""

import ast
import functools
import json
import math
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ddpm_utils as d

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
WEIGHTS = NOTEBOOKS / "weights"
SCHEDULE = d.linear_schedule(50)
SAMPLERS = {
    "ddpm": (d.ddpm_sample, {}),
    "ddim": (d.ddim_sample, {"steps": 5}),
    "ddim, eta 1": (d.ddim_sample, {"steps": 5, "eta": 1.0}),
    "dpm": (d.dpm_solver_sample, {"steps": 5}),
}

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
    space |= {"math": math, "torch": torch, "np": np, "F": F, "nn": nn,
              "device": torch.device("cpu")}
    for cell in code_cells(path):
        if any(tag.startswith(("exercise", "check", "setup")) for tag in cell["tags"]):
            continue
        for node in ast.parse(cell["source"]).body:
            targets = [leaf for target in getattr(node, "targets", []) for leaf in ast.walk(target)]
            names = {leaf.id for leaf in targets if isinstance(leaf, ast.Name)}
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = {node.name}
            if names & set(wanted):
                exec(compile(ast.Module([node], []), path.name, "exec"), space)
    missing = set(wanted) - set(space)
    assert not missing, f"{path.name} defines no {missing}"
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


def run(steps=12, model=None, images=None, **options):
    """A training of a second: (model, losses)."""
    model = model or small_unet()
    options = {"batch_size": 4, "warmup": 3, "progress": False, **options}
    images = some_images() if images is None else images
    return model, d.train(model, SCHEDULE, images, steps, **options)


def same_weights(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values())
    return all(torch.equal(a, b) for a, b in pairs)


class Stop(Exception):
    """What a callback raises where a test wants a run to end in the middle."""


def stop_at(step):
    def callback(now):
        if now == step:
            raise Stop

    return callback


def unfinished(file, **options):
    """A run of 12 steps that was stopped at step 4, in file."""
    model = options.pop("model", None) or small_unet()
    with pytest.raises(Stop):
        run(12, model, checkpoint=file, checkpoint_every=4, callback=stop_at(4), callback_every=4,
            **options)
    return file


CHILD = """
    import sys
    sys.path[:0] = {paths!r}
    from series import d, run, small_unet, torch
    torch.set_num_threads(1)
    model = small_unet()
    run(2000, model, ema=d.EMA(model, 0.9), checkpoint={file!r}, checkpoint_every=1,
        callback=lambda step: print(step, flush=True), callback_every=1)
"""


def kill_a_run(file, after):
    """Starts a training in a process of its own and kills it when it has done `after` steps."""
    code = textwrap.dedent(CHILD.format(paths=[str(ROOT), str(ROOT / "tests")], file=str(file)))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line.strip().isdigit() and int(line) == after:
                child.kill()
                break
        child.wait()
