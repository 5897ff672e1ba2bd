"""Where the data comes from, and what happens where it can't be had. Servers are local ones."""

import gzip
import hashlib
import os
import pathlib
import random
import shutil
import socket
import struct
import time

import numpy as np
import pytest
import torch
import torchvision
from conftest import send
from series import ROOT, everything_in

import ddpm_utils as d
from ddpm_utils import load_fashion_mnist

NAMES = list(d.MD5)
RAW = pathlib.Path("FashionMNIST", "raw")


def idx_file(array):
    """Fashion-MNIST's format: two zeros, the type (8: uint8), the dimensions, then the bytes."""
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def files(monkeypatch):
    """Four small files in the right format, and packed ones, which helper and torchvision take for
    the right ones: {name: bytes}."""
    r, made = np.random.default_rng(0), {}
    for part, n in (("train", 30), ("t10k", 20)):
        made[f"{part}-images-idx3-ubyte"] = idx_file(r.integers(0, 256, (n, 28, 28)))
        made[f"{part}-labels-idx1-ubyte"] = idx_file(np.arange(n) % 10)
    packed = {f"{name}.gz": gzip.compress(data) for name, data in made.items()}
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in {**made, **packed}.items()}
    monkeypatch.setattr(d, "MD5", {name: md5[name] for name in NAMES})
    resources = [(f"{name}.gz", md5[f"{name}.gz"]) for name in NAMES]
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", resources)
    return made | packed


@pytest.fixture(autouse=True)
def no_folder_of_this_machine(monkeypatch, tmp_path):
    for variable in ("DDPM_DATA", "DDPM_DOWNLOAD"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(d, "HERE", tmp_path / "helper")


@pytest.fixture
def mirror(serve, monkeypatch):
    """mirror(answer) starts a server that torchvision takes for Fashion-MNIST's."""
    def start(answer):
        server = serve(answer)
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [server.url + "/"])
        return server
    return start


def put(folder, files, names=NAMES):
    (folder / RAW).mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / RAW / name).write_bytes(files[name])
    return folder


def whole(files):
    """What the data folder holds when all is well, and nothing beside it."""
    return {str(RAW / name): files[name] for name in NAMES}


def sender(files):
    return lambda request: send(request, files[request.path.lstrip("/")])


def same_pixels(data, files, part):
    return data.images.numpy().tobytes() == files[f"{part}-images-idx3-ubyte"][16:]


def assert_stand_in(data, folder, before=None):
    """The stand-in came, said so, and nothing was left in the folder or changed there."""
    assert data.is_stand_in and "stand-in" in data.source
    assert data.images.shape[1:] == (1, 28, 28)
    assert (everything_in(folder) if folder.exists() else {}) == (before or {})
    assert not list(folder.glob(".new*"))


# ------------------------------------------------------------------ which folder

def test_the_argument_goes_first_then_the_variable_then_the_folder_beside_the_helper(
        files, tmp_path, monkeypatch):
    """A relative one is meant from the helper, wherever the kernel runs; a tilde is the home."""
    places = ["argument", "variable", "helper/data", "helper/mine", "home"]
    for shift, place in enumerate(places):  # told apart by their first label
        labels = idx_file((np.arange(20) + shift) % 10)
        put(tmp_path / place, {**files, "t10k-labels-idx1-ubyte": labels})
    monkeypatch.setattr(d, "_bad_files", lambda folder: [])  # five files of labels, one MD5
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def found(root=None, variable=None):
        if variable is not None:
            monkeypatch.setenv("DDPM_DATA", variable)
        return places[int(load_fashion_mnist("test", root=root).labels[0])]

    assert found() == "helper/data"
    assert found(variable=str(tmp_path / "variable")) == "variable"
    assert found(tmp_path / "argument") == found(str(tmp_path / "argument")) == "argument"
    assert found(variable="") == "helper/data" and found(variable="mine") == "helper/mine"
    assert found("~/home") == "home"


def test_good_files_are_read_without_a_word_and_without_network(files, tmp_path, mirror, capsys):
    server = mirror(lambda request: request.send_error(500))
    put(tmp_path, files)
    for split, part, n in (("train", "train", 30), ("test", "t10k", 20)):
        data = load_fashion_mnist(split, tmp_path)
        assert data.source == "Fashion-MNIST" and not data.is_stand_in and len(data) == n
        assert data.images.dtype == torch.uint8 and data.images.shape == (n, 1, 28, 28)
        assert data.labels.dtype == torch.int64
        assert data.labels.tolist() == [i % 10 for i in range(n)]
        assert data.classes == d.CLASSES and len(data.classes) == 10
        assert same_pixels(data, files, part)
    assert server.asked == [] and capsys.readouterr() == ("", "")


def test_downloads_can_be_forbidden(tmp_path, mirror, monkeypatch, capsys):
    server = mirror(lambda request: request.send_error(500))
    monkeypatch.setenv("DDPM_DOWNLOAD", "0")
    assert_stand_in(load_fashion_mnist("test", tmp_path / "new"), tmp_path / "new")
    assert not (tmp_path / "new").exists() and server.asked == []
    assert "DDPM_DOWNLOAD=0" in capsys.readouterr().out


# ------------------------------------------------------------------ a good server

def test_the_download(files, tmp_path, mirror, capsys):
    server, folder = mirror(sender(files)), tmp_path / "new" / "folder"
    data = load_fashion_mnist("train", folder)
    assert data.source == "Fashion-MNIST" and len(data) == 30 and same_pixels(data, files, "train")
    assert everything_in(folder) == whole(files)
    assert "downloading" in capsys.readouterr().out
    asked = len(server.asked)
    assert load_fashion_mnist("test", folder).source == "Fashion-MNIST"
    assert len(server.asked) == asked  # the second time nothing is fetched


def test_a_slow_download_that_progresses_goes_on(files, tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(d, "WAIT", 2)

    def slowly(request):
        data = files[request.path.lstrip("/")]
        send(request, b"", len(data))
        pieces = 12 if "train-images" in request.path else 1  # 3 seconds in all, more than WAIT
        for i in range(pieces):
            request.wfile.write(data[i * len(data) // pieces:(i + 1) * len(data) // pieces])
            request.wfile.flush()
            time.sleep(0.25 if pieces > 1 else 0)

    mirror(slowly)
    assert load_fashion_mnist("train", tmp_path).source == "Fashion-MNIST"


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit turned": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "too long": lambda data: data + b"\0",
    "a web page": lambda data: b"<html>Please log in</html>"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_never_used_and_replaced(files, tmp_path, mirror, capsys, damage):
    for name, split, part in ((NAMES[2], "test", "t10k"), (NAMES[0], "train", "train")):
        folder = put(tmp_path / split, {**files, name: DAMAGES[damage](files[name])})
        before = everything_in(folder)
        assert_stand_in(load_fashion_mnist(split, folder), folder, before)
        out = capsys.readouterr().out
        assert "damaged" in out and name in out and "stand-in" in out
    mirror(sender(files))  # from here on the server answers
    data = load_fashion_mnist("train", folder)
    out = capsys.readouterr().out
    assert "damaged" in out and name in out
    assert data.source == "Fashion-MNIST" and same_pixels(data, files, part)
    assert everything_in(folder) == whole(files)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_half_downloaded_file_is_fetched(files, tmp_path, mirror, name):
    """Half: what an interrupted download of torchvision's own leaves, packed and unpacked."""
    mirror(sender(files))
    put(tmp_path, files, [n for n in NAMES if n != name])
    assert load_fashion_mnist("test", tmp_path).source == "Fashion-MNIST"
    assert everything_in(tmp_path) == whole(files)
    put(tmp_path, {n: data[:1000] for n, data in files.items()}, [name, f"{name}.gz"])
    assert load_fashion_mnist("test", tmp_path).source == "Fashion-MNIST"
    assert whole(files).items() <= everything_in(tmp_path).items()


# ------------------------------------------------------------------ servers that fail

LOG_IN = b"<html><form>Your room number, please</form></html>"


def hang_half_way(request):
    send(request, b"\x1f\x8b" + bytes(500), 10_000)
    request.wfile.flush()
    request.server.ending.wait(60)


def half_a_file_in_chunks(request):
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"ff\r\n" + bytes(100))


def send_on(request, place):
    request.send_response(302)
    request.send_header("Location", place)
    request.end_headers()


FAILURES = {
    "404": lambda request: request.send_error(404),
    "503": lambda request: request.send_error(503),
    "login page": lambda request: send(request, LOG_IN),
    "sent to a login page": lambda request: (
        send(request, LOG_IN) if request.path == "/login" else send_on(request, "/login")),
    "sent round and round": lambda request: send_on(request, request.path + "x"),
    "sent to nowhere": lambda request: send_on(request, "http://["),
    "half a file": lambda request: send(request, b"\x1f\x8b" + bytes(500), 10_000),
    "half a file in chunks": half_a_file_in_chunks,
    "empty file": lambda request: send(request, b""),
    "no http": lambda request: request.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "closes": lambda request: None}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("good_before", [0, 3], ids=["at once", "at the last file"])
def test_a_server_that_fails(files, tmp_path, mirror, capsys, failure, good_before):
    """Also one that gives three good files first: four or none are kept."""
    def answer(request):
        good = [f"/{name}.gz" for name in NAMES[:good_before]]
        (sender(files) if request.path in good else FAILURES[failure])(request)

    server, timeout = mirror(answer), socket.getdefaulttimeout()
    assert_stand_in(load_fashion_mnist("test", tmp_path), tmp_path)
    assert server.asked and socket.getdefaulttimeout() == timeout
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if "not available" in line and "stand-in" in line]
    assert "Traceback" not in out + err


@pytest.mark.parametrize("answer", [lambda r: r.server.ending.wait(60), hang_half_way])
def test_a_server_that_sends_nothing_is_given_up(
        files, tmp_path, mirror, monkeypatch, capsys, answer):
    monkeypatch.setattr(d, "WAIT", 1)
    mirror(answer)
    start = time.monotonic()
    data = load_fashion_mnist("test", tmp_path)
    assert time.monotonic() - start < 20  # far from the 60 seconds for which the server hangs
    assert_stand_in(data, tmp_path)
    assert "stand-in" in capsys.readouterr().out


@pytest.mark.parametrize("trouble", ["refuses", "unknown name", "full disk", "other files"])
def test_no_server_or_no_room_or_other_files(
        files, tmp_path, monkeypatch, mirror, capsys, trouble):
    def fail(*args, **options):
        raise socket.gaierror(-2, "Name not known") if trouble == "unknown name" else OSError(
            28, "No space left on device")

    before = everything_in(put(tmp_path, files, NAMES[:2]))
    with socket.socket() as closed:  # bound and never listening
        closed.bind(("127.0.0.1", 0))
        mirrors = [f"http://127.0.0.1:{closed.getsockname()[1]}/"]
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", mirrors)
        if trouble == "unknown name":
            monkeypatch.setattr(socket, "getaddrinfo", fail)
        elif trouble == "full disk":
            monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", fail)
        elif trouble == "other files":  # torchvision takes them
            mirror(sender(files))
            monkeypatch.setattr(d, "MD5", dict.fromkeys(NAMES, "0" * 32))
        assert_stand_in(load_fashion_mnist("test", tmp_path), tmp_path, before)
    why = {"full disk": "No space left", "unknown name": "Name", "other files": "not Fashion"}
    out = capsys.readouterr().out
    assert "stand-in" in out and why.get(trouble, "refused") in out


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    data = load_fashion_mnist("test", tmp_path / "file" / "data")
    assert data.is_stand_in and "stand-in" in capsys.readouterr().out


def test_a_stopped_download_leaves_nothing(files, tmp_path, monkeypatch):
    def stopped(self):
        pathlib.Path(self.raw_folder).mkdir(parents=True)
        (pathlib.Path(self.raw_folder) / NAMES[0]).write_bytes(files[NAMES[0]][:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", stopped)
    timeout = socket.getdefaulttimeout()
    with pytest.raises(KeyboardInterrupt):
        load_fashion_mnist("train", tmp_path)
    assert list(tmp_path.iterdir()) == [] and socket.getdefaulttimeout() == timeout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_that_download_at_once(files, mirror, tmp_path):
    together = []

    def answer(request):  # nobody is answered before both have asked
        together.append(request.path)
        deadline = time.monotonic() + 10
        while len(together) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        sender(files)(request)

    mirror(answer)
    children = [os.fork(), 0]
    if children[0]:
        children[1] = os.fork()
    if 0 in children:  # one of the two
        code = 1
        try:
            found = load_fashion_mnist("train", tmp_path / "data")
            code = 0 if found.source == "Fashion-MNIST" else 2
        finally:
            os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert len([path for path in together if path.endswith("train-images-idx3-ubyte.gz")]) >= 2
    assert everything_in(tmp_path / "data") == whole(files)
    assert not list((tmp_path / "data").glob(".new*"))


# ------------------------------------------------------------------ the stand-in

@pytest.fixture(scope="module")
def drawn():
    return {split: d._draw_stand_in(split) for split in ("train", "test")}


def test_form_of_the_stand_in(drawn):
    for split, n in (("train", 12_000), ("test", 2_000)):
        data = drawn[split]
        assert isinstance(data, d.ImageSet) and len(data) == n
        assert data.images.shape == (n, 1, 28, 28) and data.images.dtype == torch.uint8
        assert data.labels.shape == (n,) and data.labels.dtype == torch.int64
        assert data.classes == d.CLASSES and "stand-in" in data.source and data.is_stand_in
        assert torch.bincount(data.labels, minlength=10).tolist() == [n // 10] * 10
        assert len(data.labels[:100].unique()) == 10  # mixed, not sorted


def test_the_stand_in_is_varied(drawn):
    images, labels = drawn["train"].images.float(), drawn["train"].labels
    assert len(np.unique(drawn["train"].images.numpy().reshape(12_000, -1), axis=0)) > 11_900
    for kind in range(10):
        own = images[labels == kind][:, 0]
        ink = (own > 40).float()
        assert ink.sum(dim=(1, 2)).std() > 15, "size"
        assert own.amax(dim=(1, 2)).std() > 20, "shade"
        for across in (1, 2):
            centre = (ink.sum(dim=across) * torch.arange(28)).sum(dim=1) / ink.sum(dim=(1, 2))
            assert centre.std() > 0.3, "position"
        assert 0.08 < ink.mean() < 0.8, "neither empty nor a block"
        assert (own == 0).any(dim=0).float().mean() > 0.2


def test_the_kinds_of_the_stand_in_differ(drawn):
    """The nearest mean silhouette names the kind of unseen images much more often than chance."""
    x, y = ((drawn[split].images.flatten(1) > 40).float() for split in ("train", "test"))
    means = torch.stack([x[drawn["train"].labels == kind].mean(dim=0) for kind in range(10)])
    named = torch.cdist(y, means).argmin(dim=1)
    assert (named == drawn["test"].labels).float().mean() > 0.5


def test_the_stand_in_is_always_the_same_and_disturbs_no_random_numbers(drawn):
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    start = time.process_time()
    again = d._draw_stand_in("test")
    assert time.process_time() - start < 10  # far less on an idle machine
    assert torch.equal(again.images, drawn["test"].images)
    assert torch.equal(again.labels, drawn["test"].labels)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert (np.random.get_state()[1] == state[2]).all()
    train = {image.tobytes() for image in drawn["train"].images.numpy()}
    # no test image learned
    assert sum(image.tobytes() in train for image in drawn["test"].images.numpy()) < 20


# ------------------------------------------------------------------ the real data, where it is

REAL = pathlib.Path(os.environ.get("DDPM_DATA") or ROOT / "data")


@pytest.mark.skipif(not (REAL / RAW / NAMES[0]).is_file(), reason="Fashion-MNIST is not here")
def test_the_real_data(tmp_path, capsys):
    train, test = load_fashion_mnist("train", REAL), load_fashion_mnist("test", REAL)
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(train.labels).tolist() == [6000] * 10 and train.source == "Fashion-MNIST"
    assert float(train.images.float().mean()) == pytest.approx(72.94, abs=0.01)
    assert capsys.readouterr().out == ""
    shutil.copytree(REAL / RAW, tmp_path / RAW, ignore=shutil.ignore_patterns("*.gz"))
    file = tmp_path / RAW / "train-images-idx3-ubyte"
    file.chmod(0o644)
    with file.open("r+b") as f:  # torchvision would take this one as it finds it
        f.truncate(47_040_016 - 784)
    assert load_fashion_mnist("train", tmp_path).is_stand_in
    assert "train-images-idx3-ubyte" in capsys.readouterr().out
