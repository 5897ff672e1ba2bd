"""As in Colab: a notebook alone in an empty folder, the helper and the weights from the repository's address.

    pip install -r requirements.txt ipywidgets==7.7.1 ipython==7.34.0 matplotlib==3.10.0 "numpy==2.1.*"
    pytest -m colab                      every notebook, some minutes each
    pytest -m colab -k "01 or fails"     one of them, and the addresses that fail

A local server is used as the repository's address. In an environment with other versions the same
tests run; the first one then tells by a skip which versions it expected.
"""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import send
from nbclient import NotebookClient
from series import PATHS, ROOT, code_cells, tagged

HELPER = (ROOT / "ddpm_utils.py").read_bytes()
VERSIONS = {"ipywidgets": "7.7.1", "ipython": "7.34", "matplotlib": "3.10.0", "numpy": "2.1."}
pytestmark = pytest.mark.colab


def test_the_versions_are_those_of_colab():
    found = {name: importlib.metadata.version(name) for name in VERSIONS}
    if not all(found[name].startswith(version) for name, version in VERSIONS.items()):
        pytest.skip(f"wanted {VERSIONS}, found {found}")


def repository(request):
    """Answers as the repository's address does, with the files of this checkout."""
    file = ROOT / request.path.lstrip("/")
    send(request, file.read_bytes()) if file.is_file() else request.send_error(404)


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """colab(address) gives the folder /content of a new machine, where that address is used."""
    data = pathlib.Path(os.environ.get("DDPM_DATA") or ROOT / "data").resolve()
    # Fashion-MNIST where this machine has it, or the stand-in
    monkeypatch.setenv("DDPM_DATA", str(data))
    monkeypatch.delenv("PYTHONPATH", raising=False)  # not this checkout
    monkeypatch.delenv("DDPM_MAINTAINER", raising=False)
    content = tmp_path / "content"
    content.mkdir(exist_ok=True)

    def start(address):
        monkeypatch.setenv("DDPM_URL", address)
        return content

    return start


def run(notebook, folder):
    NotebookClient(
        notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()


def alone(path, folder):
    shutil.copy(path, folder / path.name)
    return nbformat.read(folder / path.name, as_version=4)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_alone(path, colab, serve):
    server = serve(repository)
    folder = colab(server.url)
    notebook, asked = alone(path, folder), server.asked
    source = "".join(cell["source"] for cell in code_cells(path))
    needs = re.search(r"load_pretrained\(|load_network\(|load_classifier\(", source)
    run(notebook, folder)
    assert not [
        o
        for cell in notebook.cells
        if cell.cell_type == "code"
        for o in cell.outputs
        if o.output_type == "error"
    ]
    assert asked.count("/ddpm_utils.py") == 1
    weights = [name for name in asked if name.endswith(".pt")]
    assert len(weights) == len(set(weights)) and bool(weights) == bool(needs), asked
    assert (folder / "ddpm_utils.py").read_bytes() == (ROOT / "ddpm_utils.py").read_bytes()
    for file in (folder / "weights").glob("*.pt"):
        assert file.read_bytes() == (ROOT / "notebooks" / "weights" / file.name).read_bytes()
    assert not [*folder.rglob("*.partial"), *folder.rglob(".new-*")]


def set_up_alone(folder):
    """The set-up cell, run as a script, in less than a minute."""
    return subprocess.run(
        [sys.executable, "-c", tagged(PATHS[0], "setup")[0]],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_with_the_helper_beside_it_nothing_is_fetched(colab, serve):
    server = serve(repository)
    folder = colab(server.url)
    shutil.copy(ROOT / "ddpm_utils.py", folder)
    assert set_up_alone(folder).returncode == 0
    assert server.asked == []


FAILURES = {
    "404": lambda request: request.send_error(404),
    "closes": lambda request: None,
    "half a file": lambda request: send(request, HELPER[:20_000], len(HELPER)),
    "half a file, no length": lambda request: send(request, HELPER[:20_000]),
    "login page": lambda request: send(request, b"<html>Your room number, please</html>"),
    "no http": lambda request: request.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "hangs": lambda request: request.server.ending.wait(90),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_address_that_fails_leaves_nothing_and_the_cell_can_be_run_again(colab, serve, failure):
    folder = colab(serve(FAILURES[failure]).url)
    done = set_up_alone(folder)
    assert done.returncode == 1 and "Traceback" in done.stderr
    if failure in ("half a file, no length", "login page"):
        assert "upload ddpm_utils.py beside this notebook" in done.stderr
    assert list(folder.iterdir()) == []
    colab(serve(repository).url)  # and the same cell once more, when the network is back
    assert set_up_alone(folder).returncode == 0


def test_nothing_is_installed():
    for path in PATHS:
        source = "".join(cell["source"] for cell in code_cells(path))
        assert not re.search(r"\bpip\b|\bconda\b|\bapt\b", source), path.name
