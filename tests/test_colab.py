"""As in Colab: a notebook alone in an empty folder, the helper and the weights from the repository's address.

    pip install -r requirements.txt ipywidgets==7.7.1 ipython==7.34.0 matplotlib==3.10.0 "numpy==2.1.*"
    pytest -m colab                      every notebook, some minutes each
    pytest -m colab -k "01 or fails"     one of them, and the addresses that fail

A local server stands in for the repository's address, and an empty package for google.colab. In an environment with
other versions the same tests run; the first one then says by a skip which versions it wanted.
"""
import contextlib
import http.server
import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
VERSIONS = {"ipywidgets": "7.7.1", "ipython": "7.34", "matplotlib": "3.10.0", "numpy": "2.1."}
SENTENCE = re.compile(r"ddpm_utils\.py could not be fetched \(.+\): upload ddpm_utils\.py, from the repository's top "
                      r"folder, beside this notebook and run this cell again$", re.MULTILINE | re.DOTALL)
pytestmark = pytest.mark.colab


def test_the_versions_are_those_of_colab():
    found = {name: importlib.metadata.version(name) for name in VERSIONS}
    if not all(found[name].startswith(version) for name, version in VERSIONS.items()):
        pytest.skip(f"wanted {VERSIONS}, found {found}")


@contextlib.contextmanager
def repository(answer=None):
    """A server of this checkout's files; answer(request) may answer instead. Gives (address, paths asked for)."""
    asked, ending = [], threading.Event()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(ROOT))

        def do_GET(self):
            asked.append(self.path)
            self.ending = ending
            with contextlib.suppress(OSError):  # who asked may have gone
                super().do_GET() if answer is None else answer(self)

        def log_message(self, *text):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        ending.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def colab(tmp_path, monkeypatch):
    """colab(address) makes the folder /content of a new machine; google.colab can be imported there."""
    packages = tmp_path / "packages"
    (packages / "google" / "colab").mkdir(parents=True)
    (packages / "google" / "colab" / "__init__.py").write_text("")
    data = pathlib.Path(os.environ.get("DDPM_DATA") or ROOT / "data").resolve()
    monkeypatch.setenv("DDPM_DATA", str(data))  # Fashion-MNIST where this machine has it, or the stand-in
    monkeypatch.setenv("PYTHONPATH", str(packages))  # and not this checkout
    monkeypatch.delenv("DDPM_MAINTAINER", raising=False)
    content = tmp_path / "content"
    content.mkdir()

    def start(address):
        monkeypatch.setenv("DDPM_URL", address)
        return content

    return start


def run(notebook, folder):
    NotebookClient(notebook, timeout=3600, kernel_name="python3",
                   resources={"metadata": {"path": str(folder)}}).execute()


def alone(path, folder):
    shutil.copy(path, folder / path.name)
    return nbformat.read(folder / path.name, as_version=4)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_alone(path, colab):
    with repository() as (address, asked):
        folder = colab(address)
        notebook = alone(path, folder)
        needs = re.search(r"load_pretrained|load_classifier", "".join(c.source for c in notebook.cells))
        run(notebook, folder)
    assert not [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs
                if o.output_type == "error"]
    assert asked.count("/ddpm_utils.py") == 1
    weights = [name for name in asked if name.endswith(".pt")]
    assert len(weights) == len(set(weights)) and bool(weights) == bool(needs), asked
    assert (folder / "ddpm_utils.py").read_bytes() == (ROOT / "ddpm_utils.py").read_bytes()
    for file in (folder / "weights").glob("*.pt"):
        assert file.read_bytes() == (ROOT / "notebooks" / "weights" / file.name).read_bytes()
    assert not list(folder.rglob("*.part"))


def test_with_the_helper_at_hand_nothing_is_fetched(colab):
    with repository() as (address, asked):
        folder = colab(address)
        shutil.copy(ROOT / "ddpm_utils.py", folder)
        notebook = alone(PATHS[0], folder)
        notebook.cells = [c for c in notebook.cells if "setup" in c.metadata.get("tags", [])]
        run(notebook, folder)
    assert asked == []


# ------------------------------------------------------------------ addresses that fail

def half(request):
    request.send_response(200)
    request.send_header("Content-Length", "60000")
    request.end_headers()
    request.wfile.write((ROOT / "ddpm_utils.py").read_bytes()[:20_000])


def half_without_a_length(request):
    request.send_response(200)
    request.end_headers()
    request.wfile.write((ROOT / "ddpm_utils.py").read_bytes()[:20_000])


def page(request):
    request.send_response(200)
    request.end_headers()
    request.wfile.write(b"<html><form>Your room number, please</form></html>")


FAILURES = {"404": lambda request: request.send_error(404), "503": lambda request: request.send_error(503),
            "closes": lambda request: None, "half a file": half, "half a file, no length": half_without_a_length,
            "login page": page, "empty": lambda request: (request.send_response(200), request.end_headers()),
            "no http": lambda request: request.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n"),
            "hangs": lambda request: request.ending.wait(90)}


def set_up_alone(folder):
    """The set-up cell, run as a script: its last line of error, and the seconds allowed are less than a minute."""
    cell = next(c for c in nbformat.read(PATHS[0], as_version=4).cells if "setup" in c.metadata.get("tags", []))
    return subprocess.run([sys.executable, "-c", cell.source], cwd=folder, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("failure", FAILURES)
def test_an_address_that_fails(colab, failure):
    with repository(FAILURES[failure]) as (address, asked):
        folder = colab(address)
        done = set_up_alone(folder)
        assert asked == ["/ddpm_utils.py"]
    assert done.returncode == 1 and SENTENCE.search(done.stderr), done.stderr
    assert list(folder.iterdir()) == []  # no half-written file
    with repository() as (address, asked):  # and the same cell once more, when the network is back
        assert set_up_alone(colab(address)).returncode == 0


def test_an_address_that_fails_because_nobody_is_there(colab):
    done = set_up_alone(colab("http://127.0.0.1:9"))
    assert SENTENCE.search(done.stderr), done.stderr


def test_an_address_that_fails_is_read_in_the_notebook(colab):
    """What the learner sees is that sentence, as the error of the first cell."""
    folder = colab("http://127.0.0.1:9")
    with pytest.raises(CellExecutionError) as caught:
        run(alone(PATHS[0], folder), folder)
    assert SENTENCE.search(re.sub(r"\x1b\[[0-9;]*m", "", str(caught.value)))


def test_it_fails_outside_colab_without_asking_anybody(colab, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    with repository() as (address, asked):
        done = set_up_alone(colab(address))
    assert "ddpm_utils.py is neither here nor one folder up: upload" in done.stderr and asked == []


def test_nothing_is_installed():
    for path in PATHS:
        source = "".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]
                         if c["cell_type"] == "code")
        assert not re.search(r"\bpip\b|\bconda\b|\bapt\b", source), path.name
