"""Stopped, run twice, run at once, and in awkward places: the right result or a clear sentence, and no half file.

pytest -m again                                      what takes minutes: whole notebooks, and ten kills
"""

import os
import pathlib
import random
import shutil
import subprocess
import sys
import textwrap

import nbformat
import pytest
from nbclient import NotebookClient
from series import ROOT, everything_in, kill_a_run, run, same_weights, small_unet

from ddpm_utils import EMA, load_checkpoint

LIGHT = ["01_schedule_and_forward_noising", "03_loss_derivation"]


@pytest.fixture
def checkout(tmp_path):
    """checkout(name) copies what a learner has: the helper and the notebooks with their weights."""

    def make(name):
        shutil.copytree(
            ROOT / "notebooks", tmp_path / name / "notebooks", ignore=shutil.ignore_patterns(".*")
        )
        shutil.copy(ROOT / "ddpm_utils.py", tmp_path / name)
        return tmp_path / name

    return make


def environment(**change):
    """Fashion-MNIST where this machine has it; no way to this checkout's helper."""
    data = pathlib.Path(os.environ.get("DDPM_DATA") or ROOT / "data").resolve()
    return {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DDPM_MAINTAINER")},
        "DDPM_DATA": str(data),
        **change,
    }


def python(code, folder, *before, **change):
    """Runs code in a process of its own, with folder as the working folder and the place of ddpm_utils."""
    return subprocess.run(
        [*before, sys.executable, "-c", textwrap.dedent(code)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(PYTHONPATH=str(folder), **change),
    )


def run_all(notebook, folder):
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute(env=environment())


def printed(notebook):
    return [
        "".join(o.text for o in cell.outputs if o.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


# ------------------------------------------------------------------ killed


@pytest.mark.again
def test_ten_kills_at_random_moments_end_where_an_undisturbed_run_ends(tmp_path, one_thread):
    """Saved after every step, so that most kills come while a checkpoint is being written."""
    file, moments, steps = tmp_path / "run.pt", random.Random(7), 2000
    done = 0
    for _ in range(10):
        kill_a_run(file, after=done + moments.randint(1, 9))
        saved = load_checkpoint(file)["step"]  # whole, whenever the kill came
        assert saved > done
        done = saved
    model, whole = small_unet(seed=50), small_unet()
    ema, whole_ema = EMA(model, 0.9), EMA(whole, 0.9)
    _, losses = run(steps, model, ema=ema, checkpoint=file, checkpoint_every=1000)
    _, undisturbed = run(steps, whole, ema=whole_ema)
    assert losses == undisturbed
    assert same_weights(model, whole) and same_weights(ema.model, whole_ema.model)


# ------------------------------------------------------------------ twice


def sections(cells):
    """The cells from one heading of a section to the next."""
    parts = [[]]
    for cell in cells:
        if cell.cell_type == "markdown" and cell.source.startswith("## "):
            parts.append([])
        parts[-1].append(cell)
    return parts


@pytest.mark.again
@pytest.mark.parametrize("stem", LIGHT)
@pytest.mark.parametrize("what", ["each section", "all"])
def test_cells_that_run_twice(stem, what, checkout):
    folder = checkout("twice") / "notebooks"
    notebook = nbformat.read(folder / f"{stem}.ipynb", as_version=4)
    before, cells = everything_in(folder), [c for c in notebook.cells if c.cell_type == "code"]
    parts = sections(notebook.cells) if what == "each section" else [notebook.cells]
    notebook.cells = [cell.copy() for part in parts for cell in part + part]
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"c{i}"
    run_all(notebook, folder)  # an error in a cell, an assert that fails included, is an error here
    texts = printed(notebook)
    assert len(texts) == 2 * len(cells)
    assert {k: v for k, v in everything_in(folder).items() if "__pycache__" not in k} == before


# ------------------------------------------------------------------ at once


@pytest.mark.again
def test_two_notebooks_at_once_in_one_folder(checkout):
    folder = checkout("at once") / "notebooks"
    code = """
        import sys, nbformat
        from nbclient import NotebookClient
        NotebookClient(nbformat.read(sys.argv[1], as_version=4), timeout=1800, kernel_name="python3").execute()
    """
    running = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), f"{stem}.ipynb"],
            cwd=folder,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for stem in LIGHT
    ]
    for process in running:
        error = process.communicate()[1]
        assert process.returncode == 0, error[-2000:]
    assert not [*folder.parent.rglob("*.partial"), *folder.parent.rglob(".new-*")]


def test_two_trainings_at_once_with_a_checkpoint_each(tmp_path):
    """And a third and a fourth that share one file: it is whole, and of one of the two, which are the same run."""
    code = """
        import sys
        sys.path[:0] = [{tests!r}]
        from series import d, run, small_unet, torch
        torch.set_num_threads(1)
        model = small_unet()
        run(20, model, ema=d.EMA(model, 0.9), seed=int(sys.argv[1]), checkpoint=sys.argv[2], checkpoint_every=1)
    """
    code = textwrap.dedent(code.format(tests=str(ROOT / "tests")))
    runs = [("1", "one.pt"), ("2", "two.pt"), ("3", "shared.pt"), ("3", "shared.pt")]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *run],
            cwd=tmp_path,
            env=environment(PYTHONPATH=str(ROOT)),
            stderr=subprocess.PIPE,
            text=True,
        )
        for run in runs
    ]
    for process in started:
        error = process.communicate()[1]
        assert process.returncode == 0, error[-2000:]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.pt", "shared.pt", "two.pt"]
    # and alone, in a process of the same kind: another one may take its sums in another order
    for seed, file in runs[:3]:
        subprocess.run(
            [sys.executable, "-c", code, seed, "alone.pt"],
            cwd=tmp_path,
            check=True,
            env=environment(PYTHONPATH=str(ROOT)),
        )
        model, alone = small_unet(seed=9), small_unet(seed=8)
        assert load_checkpoint(tmp_path / file, model)["step"] == 20
        assert load_checkpoint(tmp_path / "alone.pt", alone)["step"] == 20 and same_weights(
            model, alone
        )
        (tmp_path / "alone.pt").unlink()


# ------------------------------------------------------------------ awkward places


def mounted(how, folder):
    """The words before a command that runs it in a namespace of its own where folder is mounted in that way."""
    mount = {
        "read-only": 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"',
        "full": 'mount -t tmpfs -o size=64k none "$0"',
    }[how]
    words = ["unshare", "-rm", "sh", "-c", f'{mount} && cd "$0" && exec "$@"', str(folder)]
    if (
        not shutil.which("unshare")
        or subprocess.run([*words, "true"], capture_output=True).returncode
    ):
        pytest.skip("this system lets nobody mount (unshare)")
    return words


def test_a_read_only_checkout(checkout, tmp_path):
    (tmp_path / "home").mkdir()
    folder = checkout("read-only")
    before = everything_in(folder)
    done = python(
        """
        import pathlib, torch
        import ddpm_utils as d
        d.set_up()
        try:
            pathlib.Path("new").write_text("")
        except OSError:
            print("nothing can be written here")
        data = d.load_fashion_mnist("test")  # into data/ beside the helper, which can't be made
        print("source:", data.source)
        d.show_images(data.images[:4], title="found: α ≠ β")
        path = d.save_gif(data.images[:4, 0], d.output_path("a.gif"))
        print("picture:", path.stat().st_size > 100, d.HERE not in path.parents)
        model, schedule = d.load_pretrained()
        try:
            d.save_checkpoint("run.pt", model, schedule)
        except OSError as error:
            print(error)
    """,
        folder,
        *mounted("read-only", folder),
        HOME=str(tmp_path / "home"),
        DDPM_DATA="",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nothing can be written here" in done.stdout
    assert "is not available" in done.stdout and "source: stand-in" in done.stdout
    assert "picture: True True" in done.stdout
    assert "run.pt could not be written" in done.stdout and "Read-only" in done.stdout
    assert "Traceback" not in done.stderr
    assert everything_in(folder) == before


@pytest.mark.again
def test_a_notebook_in_a_read_only_checkout(checkout, tmp_path):
    folder = checkout("read-only")
    code = f"""
        import nbformat
        from nbclient import NotebookClient
        NotebookClient(nbformat.read("notebooks/{LIGHT[0]}.ipynb", as_version=4), timeout=1800, kernel_name="python3",
                       resources={{"metadata": {{"path": "notebooks"}}}}).execute()
    """
    (tmp_path / "home").mkdir()
    done = python(code, folder, *mounted("read-only", folder), HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_path_with_spaces_and_accents(checkout):
    folder = checkout("mes leçons d'été %20 #1")
    shutil.copytree(folder, folder / "data")  # something is there
    done = subprocess.run(
        [sys.executable, "ddpm_utils.py"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.stdout.splitlines()[-1] == "ready"
        or "Fashion-MNIST" in done.stdout
        and "weights" not in done.stdout
    )
    done = python(
        """
        import ddpm_utils as d
        model, schedule = d.load_pretrained()
        d.save_checkpoint(d.output_path("modèle n° 1.pt"), model, schedule)
        d.save_gif(d.load_fashion_mnist("test").images[:3], d.output_path("été.gif"))
        print(sorted(p.name for p in (d.HERE / "outputs").iterdir()) == ["modèle n° 1.pt", "été.gif"])
    """,
        folder,
        PYTHONIOENCODING="utf-8",
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "True", done.stderr[-2000:]


@pytest.mark.again
def test_a_notebook_in_a_path_with_spaces_and_accents(checkout):
    folder = checkout("mes leçons d'été %20 #1") / "notebooks"
    run_all(nbformat.read(folder / f"{LIGHT[0]}.ipynb", as_version=4), folder)


def test_a_disk_that_is_truly_full(checkout, tmp_path):
    folder = checkout("room")
    small = tmp_path / "small disk"
    small.mkdir()
    done = python(
        """
        import os, torch
        import ddpm_utils as d
        small = os.environ["SMALL"]
        schedule, path = d.linear_schedule(10), os.path.join(small, "a.pt")
        d.save_checkpoint(path, torch.nn.Linear(4, 4), schedule)
        before = open(path, "rb").read()
        noise = torch.randint(0, 256, (40, 64, 64), dtype=torch.uint8)
        for write in (lambda: d.save_checkpoint(path, torch.nn.Linear(200, 200), schedule),
                      lambda: d.save_gif(noise, os.path.join(small, "a.gif"))):
            try:
                write()
            except OSError as error:
                print(error)
        print(open(path, "rb").read() == before, os.listdir(small))
    """,
        folder,
        *mounted("full", small),
        SMALL=str(small),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout.splitlines()
    assert "a.pt could not be written" in said[0] and "a.gif could not be written" in said[1]
    assert said[2] == "True ['a.pt']"
