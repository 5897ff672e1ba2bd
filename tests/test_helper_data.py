"""Where the data comes from, and what happens where it can't be had. Servers are local ones."""

import functools
import gzip
import hashlib
import multiprocessing
import os
import pathlib
import random
import shutil
import socket
import time
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import send
from PIL import Image
from series import ROOT, everything_in

import ddpm_utils as d

NAMES = list(d.MD5)
RAW = pathlib.Path("FashionMNIST", "raw")


def idx_file(array):
    """Fashion-MNIST's format: two zeros, the type (8: uint8), the dimensions, then the bytes."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def files(monkeypatch):
    """Four small files in the right format, and packed ones, which helper and torchvision take for
    the right ones: {name: bytes}."""
    r, made = np.random.default_rng(0), {}
    for part, n in (("train", 30), ("t10k", 20)):
        made[f"{part}-images-idx3-ubyte"] = idx_file(r.integers(0, 256, (n, 28, 28)))
        made[f"{part}-labels-idx1-ubyte"] = idx_file(np.arange(n) % 10)
    made |= {f"{name}.gz": gzip.compress(data) for name, data in made.items()}
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in made.items()}
    monkeypatch.setattr(d, "MD5", {name: md5[name] for name in NAMES})
    resources = [(f"{name}.gz", md5[f"{name}.gz"]) for name in NAMES]
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.resources", resources)
    return made


@pytest.fixture(autouse=True)
def no_folder_of_this_machine(monkeypatch, tmp_path):
    for variable in ("DDPM_DATA", "DDPM_DOWNLOAD"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(d, "HERE", tmp_path / "helper")


@pytest.fixture
def server(serve, monkeypatch, files):
    """What torchvision takes for Fashion-MNIST's server. A test may change how it answers."""
    server = serve(lambda request: server.answer(request))
    server.answer = lambda request: send(request, files[request.path.lstrip("/")])
    monkeypatch.setattr("torchvision.datasets.FashionMNIST.mirrors", [server.url + "/"])
    return server


def put(folder, files, names=NAMES):
    (folder / RAW).mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / RAW / name).write_bytes(files[name])
    return folder


def assert_form(data, n, source):
    assert isinstance(data, d.ImageSet) and len(data) == n and data.source == source
    assert data.is_stand_in == (source != "Fashion-MNIST")
    assert data.images.shape == (n, 1, 28, 28) and data.images.dtype == torch.uint8
    assert data.labels.bincount().tolist() == [n // 10] * 10 and data.labels.dtype == torch.int64
    assert len(data.labels[:100].unique()) == 10  # mixed, not sorted
    assert data.classes == d.CLASSES and len(data.classes) == 10


def assert_real(files, folder, split="test"):
    """The real images come; the folder holds the four files whole, and what else it held before."""
    before, data = everything_in(folder), d.load_fashion_mnist(split, folder)
    part, n = ("train", 30) if split == "train" else ("t10k", 20)
    assert_form(data, n, "Fashion-MNIST")
    assert data.images.numpy().tobytes() == files[f"{part}-images-idx3-ubyte"][16:]
    assert data.labels.tolist() == [i % 10 for i in range(n)]
    assert everything_in(folder) == before | {str(RAW / name): files[name] for name in NAMES}
    assert not list(folder.glob(".new*"))


def assert_stand_in(capsys, folder, *words, split="test"):
    """The stand-in comes, says so and why, and nothing is left in the folder or changed there."""
    before, timeout = everything_in(folder), socket.getdefaulttimeout()
    data = d.load_fashion_mnist(split, folder)
    out, err = capsys.readouterr()
    assert_form(data, 12_000 if split == "train" else 2_000, "stand-in, drawn by code")
    for text in ("Fashion-MNIST is not available: using a drawn stand-in", *words):
        assert text in out
    assert "Traceback" not in out + err
    assert everything_in(folder) == before and not list(folder.glob(".new*"))
    assert socket.getdefaulttimeout() == timeout


# ------------------------------------------------------------------ which folder

@pytest.mark.parametrize("root, variable, place", [
    (None, None, "helper/data"), (None, "", "helper/data"), (None, "mine", "helper/mine"),
    (None, "~/variable", "variable"), ("~/argument", "~/variable", "argument")])
def test_which_folder_is_taken(server, tmp_path, monkeypatch, root, variable, place):
    """The argument goes first, then the variable, then the folder beside the helper. A relative one
    is meant from the helper, wherever the kernel runs; a tilde is the home."""
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    if variable is not None:
        monkeypatch.setenv("DDPM_DATA", variable)
    monkeypatch.chdir(tmp_path)
    assert d.load_fashion_mnist("test", root).source == "Fashion-MNIST"
    assert set(tmp_path.rglob("*-ubyte")) == {tmp_path / place / RAW / name for name in NAMES}


def test_downloads_can_be_forbidden(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DDPM_DOWNLOAD", "0")
    assert_stand_in(capsys, tmp_path / "new", "DDPM_DOWNLOAD=0")
    assert not (tmp_path / "new").exists() and server.asked == []


# ------------------------------------------------------------------ a good server

def test_a_download_and_then_neither_network_nor_words(files, server, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert_real(files, folder)
    assert server.asked and "downloading" in capsys.readouterr().out
    server.asked.clear()
    for split in ("train", "test"):
        assert_real(files, folder, split)
    assert server.asked == [] and capsys.readouterr() == ("", "")


def test_a_slow_download_that_progresses_goes_on(files, server, tmp_path, monkeypatch):
    monkeypatch.setattr(d, "WAIT", 2)

    def slowly(request):  # the largest file in 12 pieces and 2.4 seconds, more than WAIT
        data = files[request.path.lstrip("/")]
        send(request, b"", len(data))
        for i in range(0, len(data), 2000):
            request.wfile.write(data[i:i + 2000])
            time.sleep(0.2)

    server.answer = slowly
    assert_real(files, tmp_path)


DAMAGES = {
    "half of it": lambda data: data[: len(data) // 2],
    "an image short": lambda data: data[:-784],
    "empty": lambda data: b"",
    "one bit turned": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "too long": lambda data: data + b"\0",
    "a web page": lambda data: b"<html>Please log in</html>"}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_file_is_named_never_used_and_replaced(files, server, tmp_path, capsys, damage):
    good, server.answer = server.answer, FAILURES["503"]
    for name, split in ((NAMES[2], "test"), (NAMES[0], "train")):
        folder = put(tmp_path / split, {**files, name: damage(files[name])})
        assert_stand_in(capsys, folder, "damaged", name, split=split)
    server.answer = good
    assert_real(files, folder, "train")
    out = capsys.readouterr().out
    assert "damaged" in out and name in out


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_or_half_downloaded_file_is_fetched(files, server, tmp_path, name):
    """Half: what an interrupted download of torchvision's own leaves, packed and unpacked."""
    assert_real(files, put(tmp_path, files, [n for n in NAMES if n != name]))
    half = {n: data[:1000] for n, data in files.items()}
    assert_real(files, put(tmp_path, half, [name, f"{name}.gz"]))


# ------------------------------------------------------------------ servers that fail

LOG_IN = b"<html><form>Your room number, please</form></html>"


def reply(request, status, header, value, data=b""):
    request.send_response(status)
    request.send_header(header, value)
    request.end_headers()
    request.wfile.write(data)


def hang_half_way(request):
    send(request, b"\x1f\x8b" + bytes(500), 10_000)
    request.server.ending.wait(60)


FAILURES = {
    "404": lambda r: r.send_error(404), "503": lambda r: r.send_error(503),
    "login page": lambda r: send(r, LOG_IN),
    "sent to a login page": lambda r: (
        send(r, LOG_IN) if r.path == "/login" else reply(r, 302, "Location", "/login")),
    "sent round and round": lambda r: reply(r, 302, "Location", r.path + "x"),
    "sent to nowhere": lambda r: reply(r, 302, "Location", "http://["),
    "half a file": lambda r: send(r, b"\x1f\x8b" + bytes(500), 10_000),
    "half a file in chunks": lambda r: reply(r, 200, "Transfer-Encoding", "chunked", b"ff\r\n00"),
    "empty file": lambda r: send(r, b""),
    "no http": lambda r: r.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "closes": lambda r: None,
    "sends nothing": lambda r: r.server.ending.wait(60), "hangs half way": hang_half_way}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("good_before", [0, 3], ids=["at once", "at the last file"])
def test_a_server_that_fails(server, tmp_path, monkeypatch, capsys, failure, good_before):
    """Also one that gives three good files first: four or none are kept."""
    paths, good = [f"/{name}.gz" for name in NAMES[:good_before]], server.answer
    server.answer = lambda request: (good if request.path in paths else failure)(request)
    monkeypatch.setattr(d, "WAIT", 1)
    start = time.monotonic()
    assert_stand_in(capsys, tmp_path)
    # far from the 60 seconds for which a server hangs
    assert server.asked and time.monotonic() - start < 20


@pytest.mark.parametrize("why, place, value", [
    ("refused", "torchvision.datasets.FashionMNIST.mirrors", ["http://127.0.0.1:9/"]),
    ("Name not known", "socket.getaddrinfo",
     mock.Mock(side_effect=socket.gaierror(-2, "Name not known"))),
    ("No space left", "torchvision.datasets.FashionMNIST.download",
     mock.Mock(side_effect=OSError(28, "No space left on device"))),
    ("not Fashion", "ddpm_utils.MD5", dict.fromkeys(NAMES, "0" * 32))])  # torchvision takes them
def test_no_server_or_no_room_or_other_files(
        files, server, tmp_path, monkeypatch, capsys, why, place, value):
    monkeypatch.setattr(place, value)
    assert_stand_in(capsys, put(tmp_path, files, NAMES[:2]), why)


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert_stand_in(capsys, tmp_path / "file" / "data")


def test_a_stopped_download_leaves_nothing(server, tmp_path, monkeypatch):
    stop = mock.Mock(side_effect=KeyboardInterrupt)  # after the first file has come
    monkeypatch.setattr("torchvision.datasets.utils.extract_archive", stop)
    timeout = socket.getdefaulttimeout()
    with pytest.raises(KeyboardInterrupt):
        d.load_fashion_mnist("train", tmp_path)
    assert list(tmp_path.iterdir()) == [] and socket.getdefaulttimeout() == timeout


def source(folder):
    return d.load_fashion_mnist("train", folder).source


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_that_download_at_once(files, server, tmp_path):
    good = server.answer

    def answer(request):  # nobody is answered before both have asked
        while len(server.asked) < 2 and not server.ending.is_set():
            time.sleep(0.01)
        good(request)

    server.answer = answer
    with multiprocessing.get_context("fork").Pool(2) as pool:
        found = pool.map_async(source, [tmp_path / "data"] * 2, chunksize=1).get(timeout=60)
    assert found == ["Fashion-MNIST"] * 2
    assert server.asked.count("/train-images-idx3-ubyte.gz") >= 2
    assert_real(files, tmp_path / "data")


# ------------------------------------------------------------------ the stand-in

drawn = functools.cache(d._draw_stand_in)


def test_the_stand_in_is_varied():
    images, labels = drawn("train").images, drawn("train").labels
    different = {image.tobytes() for image in images.numpy()}
    assert len(different) > 11_900
    # no test image learned
    assert sum(image.tobytes() in different for image in drawn("test").images.numpy()) < 20
    ink = (images[:, 0] > 40).float()
    size, shade = ink.sum(dim=(1, 2)), images.amax(dim=(1, 2, 3))
    centres = [(ink.sum(dim=across) * torch.arange(28)).sum(dim=1) / size for across in (1, 2)]
    features = torch.stack([size, shade, *centres], dim=1)  # each of them must vary in each kind
    for own in (labels == kind for kind in range(10)):
        assert (features[own].std(dim=0) > torch.tensor([15, 20, 0.3, 0.3])).all()
        assert 0.08 < ink[own].mean() < 0.8, "neither empty nor a block"
        assert (images[own] == 0).any(dim=0).float().mean() > 0.2


def test_the_kinds_of_the_stand_in_differ():
    """The nearest mean silhouette names the kind of unseen images much more often than chance."""
    x, y = ((drawn(split).images.flatten(1) > 40).float() for split in ("train", "test"))
    means = torch.stack([x[drawn("train").labels == kind].mean(dim=0) for kind in range(10)])
    named = torch.cdist(y, means).argmin(dim=1)
    assert (named == drawn("test").labels).float().mean() > 0.5


def test_the_stand_in_is_always_the_same_and_disturbs_no_random_numbers():
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    start = time.process_time()
    again = d._draw_stand_in("test")
    assert time.process_time() - start < 10  # far less on an idle machine
    assert torch.equal(again.images, drawn("test").images)
    assert torch.equal(again.labels, drawn("test").labels)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert (np.random.get_state()[1] == state[2]).all()


# ------------------------------------------------------------------ the real data, where it is

REAL = pathlib.Path(os.environ.get("DDPM_DATA") or ROOT / "data")


@pytest.mark.skipif(not (REAL / RAW / NAMES[0]).is_file(), reason="Fashion-MNIST is not here")
def test_the_real_data(capsys):
    train = d.load_fashion_mnist("train", REAL)
    assert_form(train, 60_000, "Fashion-MNIST")
    assert_form(d.load_fashion_mnist("test", REAL), 10_000, "Fashion-MNIST")
    assert float(train.images.float().mean()) == pytest.approx(72.94, abs=0.01)
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------ the flowers

@pytest.mark.parametrize("trouble", [None, "404", "another file", "forbidden"])
def test_flowers_come_whole_and_once_or_not_at_all(tmp_path, serve, monkeypatch, capsys, trouble):
    for name in ("daisy", "roses"):
        (tmp_path / "made" / "flower_photos" / name).mkdir(parents=True)
        Image.new("RGB", (150, 128)).save(tmp_path / "made" / "flower_photos" / name / "1.jpg")
    packed = shutil.make_archive(tmp_path / "made", "gztar", tmp_path / "made")
    data = pathlib.Path(packed).read_bytes()
    server = serve(lambda r: r.send_error(404) if trouble == "404" else send(r, data))
    monkeypatch.setattr(d, "FLOWERS", f"{server.url}/flowers.tgz")
    digest = "0" * 32 if trouble == "another file" else hashlib.md5(data).hexdigest()
    monkeypatch.setattr(d, "FLOWERS_MD5", digest)
    monkeypatch.setenv("DDPM_DATA", str(tmp_path / "data"))
    if trouble == "forbidden":
        monkeypatch.setenv("DDPM_DOWNLOAD", "0")
    flowers, out = d.load_flowers(32), capsys.readouterr().out
    assert ("218 MiB" in out) == bool(server.asked) == (trouble != "forbidden")
    assert (tmp_path / "data").exists() == (trouble != "forbidden")
    server.asked.clear()
    assert torch.equal(flowers.images, d.load_flowers(32).images)
    left = [path.name for path in tmp_path.glob("data/*")]
    if trouble:
        assert flowers.is_stand_in and "stand-in" in out and left == []
        assert flowers.images.shape == (2000, 3, 32, 32) and flowers.images.dtype == torch.uint8
    else:  # the second time they are there
        assert flowers.source == "flower_photos" and flowers.images.shape == (2, 3, 32, 32)
        assert flowers.classes == ["daisy", "roses"] and left == ["flower_photos"]
        assert server.asked == [] and capsys.readouterr().out == ""
