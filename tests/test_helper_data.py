"""Where the data comes from, and what happens where it can't be had. Every server here is a local one."""

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
from series import everything_in

import ddpm_utils
from ddpm_utils import CLASSES, ImageSet, load_fashion_mnist

NAMES = list(ddpm_utils.MD5)
PARTS = {"train": 30, "t10k": 20}


def idx_file(array):
    """Fashion-MNIST's own format: two zeros, the type (8: uint8), the dimensions, then the bytes."""
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def files(monkeypatch):
    """Four small files in the right format, taken for the right ones by helper and torchvision: {name: bytes}."""
    r = np.random.default_rng(0)
    made = {}
    for part, n in PARTS.items():
        made[f"{part}-images-idx3-ubyte"] = idx_file(r.integers(0, 256, (n, 28, 28)))
        made[f"{part}-labels-idx1-ubyte"] = idx_file(np.arange(n) % 10)
    packed = {f"{name}.gz": gzip.compress(data) for name, data in made.items()}
    assert sorted(made) == sorted(NAMES)
    monkeypatch.setattr(
        ddpm_utils, "MD5", {name: hashlib.md5(made[name]).hexdigest() for name in NAMES}
    )
    monkeypatch.setattr(
        torchvision.datasets.FashionMNIST,
        "resources",
        [(f"{name}.gz", hashlib.md5(packed[f"{name}.gz"]).hexdigest()) for name in NAMES],
    )
    made.update(packed)
    return made


@pytest.fixture(autouse=True)
def no_folder_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("DDPM_DATA", raising=False)
    monkeypatch.delenv("DDPM_DOWNLOAD", raising=False)
    monkeypatch.setattr(ddpm_utils, "HERE", tmp_path / "helper")


def put(folder, files, names=NAMES):
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for name in names:
        (raw / name).write_bytes(files[name])
    return folder


@pytest.fixture
def mirror(serve, monkeypatch):
    """mirror(answer) starts a server that torchvision takes for Fashion-MNIST's."""

    def start(answer):
        server = serve(answer)
        monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [server.url + "/"])
        return server

    return start


def sender(files):
    return lambda request: send(request, files[request.path.lstrip("/")])


def assert_stand_in(data, folder, before=None):
    """The stand-in came, said so, and nothing was left in the folder or changed there."""
    assert data.is_stand_in and "stand-in" in data.source
    assert data.images.shape[1:] == (1, 28, 28)
    assert (everything_in(folder) if folder.exists() else {}) == (before or {})
    assert not list(folder.glob(".new*")) if folder.exists() else True


# ------------------------------------------------------------------ which folder


def test_the_argument_goes_first_then_the_variable_then_the_folder_beside_the_helper(
    files, tmp_path, monkeypatch
):
    def told_apart_by_labels(place, shift):
        mine = dict(files)
        mine["t10k-labels-idx1-ubyte"] = idx_file((np.arange(20) + shift) % 10)
        return put(tmp_path / place, mine)

    places = [
        told_apart_by_labels(place, shift)
        for shift, place in enumerate(["argument", "variable", "helper/data"])
    ]
    monkeypatch.setattr(ddpm_utils, "_bad_files", lambda folder: [])  # three labels files, one MD5
    assert int(load_fashion_mnist("test").labels[0]) == 2
    monkeypatch.setenv("DDPM_DATA", str(places[1]))
    assert int(load_fashion_mnist("test").labels[0]) == 1
    assert int(load_fashion_mnist("test", root=places[0]).labels[0]) == 0
    assert int(load_fashion_mnist("test", root=str(places[0])).labels[0]) == 0
    monkeypatch.setenv("DDPM_DATA", "")
    assert int(load_fashion_mnist("test").labels[0]) == 2


def test_a_tilde_is_the_home_folder(files, tmp_path, monkeypatch):
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    put(tmp_path / "mine", files)
    assert load_fashion_mnist("test", root="~/mine").source == "Fashion-MNIST"


def test_good_files_are_read_without_a_word_and_without_network(files, tmp_path, mirror, capsys):
    server = mirror(lambda request: request.send_error(500))
    put(tmp_path, files)
    for split, part, n in (("train", "train", 30), ("test", "t10k", 20)):
        data = load_fashion_mnist(split, tmp_path)
        assert data.source == "Fashion-MNIST" and not data.is_stand_in and len(data) == n
        assert data.images.dtype == torch.uint8 and data.images.shape == (n, 1, 28, 28)
        assert data.labels.dtype == torch.int64 and data.labels.tolist() == [
            i % 10 for i in range(n)
        ]
        assert data.classes == CLASSES and len(data.classes) == 10
        assert data.images.numpy().tobytes() == files[f"{part}-images-idx3-ubyte"][16:]
    assert server.asked == [] and capsys.readouterr() == ("", "")


def test_a_relative_folder_is_meant_from_the_helpers_place(files, tmp_path, monkeypatch):
    """The same from the top folder, where the tests run, as from notebooks/, where the kernels do."""
    put(tmp_path / "helper" / "mine", files)
    monkeypatch.setenv("DDPM_DATA", "mine")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_fashion_mnist("test").source == "Fashion-MNIST"


def test_downloads_can_be_forbidden(tmp_path, mirror, monkeypatch, capsys):
    server = mirror(lambda request: request.send_error(500))
    monkeypatch.setenv("DDPM_DOWNLOAD", "0")
    assert_stand_in(load_fashion_mnist("test", tmp_path / "new"), tmp_path / "new")
    assert not (tmp_path / "new").exists() and server.asked == []
    assert "DDPM_DOWNLOAD=0" in capsys.readouterr().out


# ------------------------------------------------------------------ a good server


def test_the_download(files, tmp_path, mirror, capsys):
    server = mirror(sender(files))
    data = load_fashion_mnist("train", tmp_path / "new" / "folder")
    assert data.source == "Fashion-MNIST" and len(data) == 30
    assert data.images.numpy().tobytes() == files["train-images-idx3-ubyte"][16:]
    kept = everything_in(tmp_path / "new" / "folder")
    assert kept == {str(pathlib.Path("FashionMNIST", "raw", name)): files[name] for name in NAMES}
    assert "downloading" in capsys.readouterr().out
    asked = len(server.asked)
    assert load_fashion_mnist("test", tmp_path / "new" / "folder").source == "Fashion-MNIST"
    assert len(server.asked) == asked  # the second time nothing is fetched


def test_a_slow_download_that_progresses_goes_on(files, tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(ddpm_utils, "WAIT", 2)

    def slowly(request):
        data = files[request.path.lstrip("/")]
        send(request, b"", len(data))
        pieces = 12 if "train-images" in request.path else 1  # 3 seconds in all, more than WAIT
        for i in range(pieces):
            request.wfile.write(data[i * len(data) // pieces : (i + 1) * len(data) // pieces])
            request.wfile.flush()
            time.sleep(0.25 if pieces > 1 else 0)

    mirror(slowly)
    assert load_fashion_mnist("train", tmp_path).source == "Fashion-MNIST"


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit turned": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "too long": lambda data: data + b"\0",
    "a web page": lambda data: b"<html>Please log in</html>",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_said_and_replaced(files, tmp_path, mirror, capsys, damage):
    name = "train-images-idx3-ubyte"
    mirror(sender(files))
    put(tmp_path, {**files, name: DAMAGES[damage](files[name])})
    data = load_fashion_mnist("train", tmp_path)
    out = capsys.readouterr().out
    assert "damaged" in out and name in out
    assert (
        data.source == "Fashion-MNIST"
        and data.images.numpy().tobytes() == files["train-images-idx3-ubyte"][16:]
    )
    assert everything_in(tmp_path) == {
        str(pathlib.Path("FashionMNIST", "raw", n)): files[n] for n in NAMES
    }


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_never_used(files, tmp_path, capsys, damage):
    name = "t10k-images-idx3-ubyte"
    put(tmp_path, {**files, name: DAMAGES[damage](files[name])})
    before = everything_in(tmp_path)
    assert_stand_in(load_fashion_mnist("test", tmp_path), tmp_path, before)
    out = capsys.readouterr().out
    assert "damaged" in out and name in out and "stand-in" in out


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_fetched(files, tmp_path, mirror, name):
    mirror(sender(files))
    put(tmp_path, files, [n for n in NAMES if n != name])
    assert load_fashion_mnist("test", tmp_path).source == "Fashion-MNIST"
    assert len(everything_in(tmp_path)) == 4


def test_a_half_download_of_torchvision_is_replaced(files, tmp_path, mirror):
    """What an interrupted download of torchvision itself leaves: a packed file, whole or half, and a half unpacked one."""
    mirror(sender(files))
    raw = put(tmp_path, files, NAMES[1:]) / "FashionMNIST" / "raw"
    (raw / NAMES[0]).write_bytes(files[NAMES[0]][:1000])
    (raw / f"{NAMES[0]}.gz").write_bytes(files[f"{NAMES[0]}.gz"][:1000])
    data = load_fashion_mnist("train", tmp_path)
    assert data.source == "Fashion-MNIST" and data.images.numpy().tobytes() == files[NAMES[0]][16:]


# ------------------------------------------------------------------ servers that fail


def hang(request):
    request.server.ending.wait(60)


def hang_half_way(request):
    send(request, b"\x1f\x8b" + bytes(500), 10_000)
    request.wfile.flush()
    request.server.ending.wait(60)


def half_a_file(request):
    send(request, b"\x1f\x8b" + bytes(500), 10_000)


def half_a_file_in_chunks(request):
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    request.wfile.write(b"ff\r\n" + bytes(100))


def go_to_log_in(request):
    if request.path == "/login":
        send(request, b"<html><form>Your room number, please</form></html>")
    else:
        request.send_response(302)
        request.send_header("Location", "/login")
        request.end_headers()


def round_and_round(request):
    request.send_response(302)
    request.send_header("Location", request.path + "x")
    request.end_headers()


FAILURES = {
    "404": lambda request: request.send_error(404),
    "503": lambda request: request.send_error(503),
    "login page": lambda request: send(
        request, b"<html><form>Your room number, please</form></html>"
    ),
    "sent to a login page": go_to_log_in,
    "sent round and round": round_and_round,
    "sent to nowhere": lambda request: (
        request.send_response(302),
        request.send_header("Location", "http://["),
        request.end_headers(),
    ),
    "half a file": half_a_file,
    "half a file in chunks": half_a_file_in_chunks,
    "empty file": lambda request: send(request, b""),
    "no http": lambda request: request.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "closes": lambda request: None,
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("good_before", [0, 3], ids=["at once", "at the last file"])
def test_a_server_that_fails(files, tmp_path, mirror, capsys, failure, good_before):
    """Also one that gives three good files first: four or none are kept."""

    def answer(request):
        good = [f"/{name}.gz" for name in NAMES[:good_before]]
        (sender(files) if request.path in good else FAILURES[failure])(request)

    server = mirror(answer)
    timeout = socket.getdefaulttimeout()
    assert_stand_in(load_fashion_mnist("test", tmp_path), tmp_path)
    assert server.asked
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if "not available" in line and "stand-in" in line]
    assert "Traceback" not in out + err
    assert socket.getdefaulttimeout() == timeout


@pytest.mark.parametrize("answer", [hang, hang_half_way])
def test_a_server_that_sends_nothing_is_given_up(
    files, tmp_path, mirror, monkeypatch, capsys, answer
):
    monkeypatch.setattr(ddpm_utils, "WAIT", 1)
    mirror(answer)
    start = time.monotonic()
    data = load_fashion_mnist("test", tmp_path)
    assert time.monotonic() - start < 20  # far from the 60 seconds for which the server hangs
    assert_stand_in(data, tmp_path)
    assert "stand-in" in capsys.readouterr().out


def test_a_server_that_refuses(tmp_path, monkeypatch, capsys):
    with socket.socket() as closed:  # bound and never listening
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            torchvision.datasets.FashionMNIST,
            "mirrors",
            [f"http://127.0.0.1:{closed.getsockname()[1]}/"],
        )
        assert_stand_in(load_fashion_mnist("test", tmp_path), tmp_path)
    assert "stand-in" in capsys.readouterr().out


def test_a_name_that_is_not_known(tmp_path, monkeypatch, capsys):
    def unknown(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", ["http://mirror.invalid/"])
    assert_stand_in(load_fashion_mnist("test", tmp_path), tmp_path)
    assert "stand-in" in capsys.readouterr().out


def test_files_that_torchvision_takes_and_that_are_not_fashion_mnist(
    files, tmp_path, mirror, monkeypatch
):
    mirror(sender(files))
    monkeypatch.setattr(ddpm_utils, "MD5", {name: "0" * 32 for name in NAMES})
    assert_stand_in(load_fashion_mnist("test", tmp_path), tmp_path)


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


def test_a_full_disk(files, tmp_path, monkeypatch, capsys):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "download", full)
    before = everything_in(put(tmp_path, files, NAMES[:2]))
    assert_stand_in(load_fashion_mnist("test", tmp_path), tmp_path, before)
    assert "No space left" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_that_download_at_once(files, mirror, tmp_path):
    together = []

    def answer(request):
        together.append(request.path)
        deadline = time.monotonic() + 10
        while (
            len(together) < 2 and time.monotonic() < deadline
        ):  # nobody is answered before both have asked
            time.sleep(0.01)
        sender(files)(request)

    mirror(answer)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                found = load_fashion_mnist("train", tmp_path / "data")
                code = 0 if found.source == "Fashion-MNIST" else 2
            except BaseException:
                pass
            os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert len([path for path in together if path.endswith("train-images-idx3-ubyte.gz")]) >= 2
    assert everything_in(tmp_path / "data") == {
        f"FashionMNIST/raw/{name}": files[name] for name in NAMES
    }
    assert not list((tmp_path / "data").glob(".new*"))


# ------------------------------------------------------------------ the stand-in


@pytest.fixture(scope="module")
def drawn():
    return {split: ddpm_utils._draw_stand_in(split) for split in ("train", "test")}


def test_form_of_the_stand_in(drawn):
    for split, n in (("train", 12_000), ("test", 2_000)):
        data = drawn[split]
        assert isinstance(data, ImageSet) and len(data) == n
        assert data.images.shape == (n, 1, 28, 28) and data.images.dtype == torch.uint8
        assert data.labels.shape == (n,) and data.labels.dtype == torch.int64
        assert data.classes == CLASSES and "stand-in" in data.source and data.is_stand_in
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
        rows = (ink.sum(dim=2) * torch.arange(28)).sum(dim=1) / ink.sum(dim=(1, 2))
        columns = (ink.sum(dim=1) * torch.arange(28)).sum(dim=1) / ink.sum(dim=(1, 2))
        assert rows.std() > 0.3 and columns.std() > 0.3, "position"
        assert 0.08 < ink.mean() < 0.8, "neither empty nor a block"
        assert own.amax() <= 255 and (own == 0).any(dim=0).float().mean() > 0.2


def test_the_kinds_of_the_stand_in_differ(drawn):
    """The nearest mean silhouette names the kind much more often than chance, on pictures not seen before."""
    x = (drawn["train"].images.flatten(1) > 40).float()
    means = torch.stack([x[drawn["train"].labels == kind].mean(dim=0) for kind in range(10)])
    y = (drawn["test"].images.flatten(1) > 40).float()
    named = torch.cdist(y, means).argmin(dim=1)
    assert (named == drawn["test"].labels).float().mean() > 0.5


def test_the_stand_in_is_always_the_same_and_disturbs_no_random_numbers(drawn):
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    start = time.process_time()
    again = ddpm_utils._draw_stand_in("test")
    assert time.process_time() - start < 10  # far less on an idle machine
    assert torch.equal(again.images, drawn["test"].images) and torch.equal(
        again.labels, drawn["test"].labels
    )
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert (np.random.get_state()[1] == state[2]).all()
    train = {picture.tobytes() for picture in drawn["train"].images.numpy()}
    # no test picture learned
    assert sum(picture.tobytes() in train for picture in drawn["test"].images.numpy()) < 20


# ------------------------------------------------------------------ the real data, where it is

REAL = pathlib.Path(
    os.environ.get("DDPM_DATA") or pathlib.Path(__file__).resolve().parent.parent / "data"
)


@pytest.mark.skipif(
    not (REAL / "FashionMNIST" / "raw" / NAMES[0]).is_file(),
    reason="Fashion-MNIST is not on this machine",
)
def test_the_real_data(tmp_path, capsys):
    train, test = load_fashion_mnist("train", REAL), load_fashion_mnist("test", REAL)
    assert train.images.shape == (60_000, 1, 28, 28) and test.images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(train.labels).tolist() == [6000] * 10 and train.source == "Fashion-MNIST"
    assert float(train.images.float().mean()) == pytest.approx(72.94, abs=0.01)
    assert capsys.readouterr().out == ""
    shutil.copytree(
        REAL / "FashionMNIST" / "raw",
        tmp_path / "FashionMNIST" / "raw",
        ignore=shutil.ignore_patterns("*.gz"),
    )
    file = tmp_path / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    file.chmod(0o644)
    with file.open("r+b") as f:  # torchvision would take this one as it finds it
        f.truncate(47_040_016 - 784)
    assert load_fashion_mnist("train", tmp_path).is_stand_in
    assert "train-images-idx3-ubyte" in capsys.readouterr().out
