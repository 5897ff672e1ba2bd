"""Notebook 07: its schedule, its measures and its loader, run as they stand in its cells, against something independent."""
import ast
import hashlib
import http.server
import io
import json
import math
import os
import pathlib
import socket
import tarfile
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import ddpm_utils as d

PATH = next((pathlib.Path(__file__).resolve().parent.parent / "notebooks").glob("07_*.ipynb"))


@pytest.fixture
def space():
    """The imports and the loader of the notebook, and the functions that stand beside their checks."""
    wanted = {"multiplications", "gain_by_averaging", "log_snr", "shifted_schedule", "seam_ratio"}
    made = {"os": os, "pathlib": pathlib, "urllib": urllib, "device": torch.device("cpu")}
    for cell in json.loads(PATH.read_text(encoding="utf-8"))["cells"]:
        source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if cell["cell_type"] == "code" and "needed" in tags:
            exec(compile(source, PATH.name, "exec"), made)
        elif cell["cell_type"] == "code" and not tags:
            for node in ast.parse(source).body:
                if isinstance(node, ast.FunctionDef) and node.name in wanted:
                    exec(compile(ast.Module([node], []), PATH.name, "exec"), made)
    assert wanted | {"load_flowers"} <= set(made)
    return made


# ------------------------------------------------------------------ schedule

@pytest.mark.parametrize("make", [d.cosine_schedule, d.linear_schedule])
@pytest.mark.parametrize("side", [28, 64, 128, 256])
def test_the_shift_multiplies_the_snr_by_the_ratio_of_the_areas(space, make, side):
    schedule = make(1000)
    shifted = space["shifted_schedule"](schedule, side)
    a, b = (torch.cumprod(1 - s.betas.double(), 0)[1:] for s in (schedule, shifted))
    ratio = (b / (1 - b)) / (a / (1 - a))
    assert torch.allclose(ratio, torch.full_like(ratio, (28 / side)**2), rtol=1e-3)
    assert shifted.T == 1000 and bool((shifted.betas[1:] < 1).all())


def test_averaging_divides_the_noise_by_the_block_and_the_formula_says_what_draws_say(space):
    r = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, 3, 64, 64, generator=r)
    x0 = F.interpolate(coarse, scale_factor=2, mode="nearest") + 0.5 * torch.randn(4, 3, 128, 128, generator=r) + 2
    noise = torch.randn(60, 3, 128, 128, generator=r)
    signal = x0 - x0.mean(dim=(0, 2, 3), keepdim=True)
    snr = lambda x, n: 10 * math.log10(float(x.var(unbiased=False) / n.var()))
    by_draws = snr(F.avg_pool2d(signal, 4), F.avg_pool2d(noise, 4)) - snr(signal, noise)
    assert space["gain_by_averaging"](x0) == pytest.approx(by_draws, abs=0.05)
    flat = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert space["gain_by_averaging"](flat) == pytest.approx(10 * math.log10(16), abs=1e-4)


# ------------------------------------------------------------------ network

@pytest.mark.parametrize("patch", [1, 4])
def test_the_network_at_128(patch):
    model = d.UNet(in_channels=3, channels=(8, 16, 24), patch=patch)
    loss = d.v_loss(model, d.cosine_schedule(), torch.randn(1, 3, 128, 128))
    loss.backward()
    assert model(torch.randn(1, 3, 128, 128), torch.tensor([7])).shape == (1, 3, 128, 128)
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())


def test_multiplications_by_hand(space):
    """A network's convolutions, added up from its shapes: the only ones at full size are known in closed form."""
    model = d.UNet(in_channels=3, channels=(8, 16), patch=2)
    plain, attention = space["multiplications"](model, 16)
    assert attention == 2 * 16 * (4 * 4)**2
    halved = space["multiplications"](model, 32)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert halved[0] - linear == 4 * (plain - linear)        # convolutions follow the area, the step's layers don't
    assert halved[1] == 16 * attention


def test_seams(space):
    ramp = torch.arange(128.0).expand(1, 3, 128, 128)
    assert space["seam_ratio"](ramp) == pytest.approx(1)
    steps = (torch.arange(128) // 4 * 4).float().expand(1, 3, 128, 128)
    assert space["seam_ratio"](ramp + steps) == pytest.approx(5)       # jumps of 1 inside, 1 + 4 at borders


def test_mirrors(space):
    x = torch.randint(0, 256, (60, 3, 16, 16), dtype=torch.uint8)
    both = torch.cat([x, x.flip(3)])
    assert torch.equal(both[60:].flip(3), x) and torch.equal(both[60:, :, 0, 0], x[:, :, 0, -1])


# ------------------------------------------------------------------ loader

def put_photographs(folder, sizes=((200, 100), (100, 200), (128, 128))):
    for kind, colour in (("daisy", (250, 250, 250)), ("roses", (200, 10, 30))):
        (folder / kind).mkdir(parents=True)
        for i, size in enumerate(sizes):
            picture = Image.new("RGB", size, (0, 0, 255))
            side = min(size)
            picture.paste(colour, ((size[0] - side) // 2, (size[1] - side) // 2, (size[0] + side) // 2, (size[1] + side) // 2))
            picture.save(folder / kind / f"{i}.jpg", quality=95)


def test_photographs_are_cut_to_the_middle(space, tmp_path, capsys):
    put_photographs(tmp_path / "flower_photos")
    data = space["load_flowers"](tmp_path)
    assert data.source == "flower_photos" and not data.is_stand_in
    assert data.images.shape == (6, 3, 128, 128) and data.images.dtype == torch.uint8
    assert data.classes == ["daisy", "roses"] and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    middle = data.images[:, :, 20:108, 20:108].float()
    assert (middle[3:].mean(dim=(0, 2, 3)) - torch.tensor([200.0, 10, 30])).abs().max() < 6    # no blue from the sides
    assert "stand-in" not in capsys.readouterr().out


def test_the_variable_names_the_folder(space, tmp_path, monkeypatch):
    put_photographs(tmp_path / "flower_photos")
    monkeypatch.setenv("DDPM_DATA", str(tmp_path))
    assert len(space["load_flowers"](side=32)) == 6


def test_a_broken_photograph_is_left_out_and_named(space, tmp_path, capsys):
    put_photographs(tmp_path / "flower_photos")
    (tmp_path / "flower_photos" / "daisy" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a picture")
    assert len(space["load_flowers"](tmp_path)) == 6
    assert "1 files" in (out := capsys.readouterr().out) and "torn.jpg" in out


@pytest.mark.parametrize("what", ["nothing", "no kinds", "empty kinds", "all broken"])
def test_a_folder_without_photographs_gives_the_stand_in(space, tmp_path, capsys, what):
    folder = tmp_path / "flower_photos"
    if what != "nothing":
        folder.mkdir()
    if what in ("empty kinds", "all broken"):
        (folder / "daisy").mkdir()
    if what == "all broken":
        (folder / "daisy" / "torn.jpg").write_bytes(b"nothing")
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    data = space["load_flowers"](tmp_path, side=16)
    assert data.is_stand_in and data.images.shape == (1000, 3, 16, 16)
    assert data.labels.bincount().tolist() == [200] * 5
    assert "using a stand-in" in capsys.readouterr().out
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_drawn_flowers_are_varied_and_always_the_same(space):
    one, other = (space["draw_flowers"](32, n=10).images for _ in range(2))
    assert torch.equal(one, other)
    assert len(torch.unique(one.flatten(1), dim=0)) == 10


# ------------------------------------------------------------------ download, from a server here

@pytest.fixture
def server(tmp_path):
    put_photographs(tmp_path / "made" / "flower_photos")
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(tmp_path / "made" / "flower_photos", "flower_photos")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(packed.getvalue())))
            self.end_headers()

        def do_GET(self):
            self.do_HEAD()
            self.wfile.write(packed.getvalue())

        def log_message(self, *text):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}/flowers.tgz", hashlib.md5(packed.getvalue()).hexdigest()
    running.shutdown()
    running.server_close()


def test_download(space, server, tmp_path, monkeypatch, capsys):
    space["FLOWERS"], space["FLOWERS_MD5"] = server
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    data = space["load_flowers"](tmp_path / "data", side=32)
    assert data.source == "flower_photos" and len(data) == 6
    assert "218 MiB" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["flower_photos"]


@pytest.mark.parametrize("trouble", ["another file", "stopped"])
def test_a_download_that_fails_leaves_nothing(space, server, tmp_path, monkeypatch, capsys, trouble):
    space["FLOWERS"], space["FLOWERS_MD5"] = server
    if trouble == "another file":
        space["FLOWERS_MD5"] = "0" * 32
    else:
        def stop(*arguments, **options):
            raise KeyboardInterrupt
        space["download_and_extract_archive"] = stop
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    assert space["load_flowers"](tmp_path / "data", side=16).is_stand_in
    assert not list((tmp_path / "data").iterdir())
    assert "stand-in" in capsys.readouterr().out


def test_a_test_run_downloads_nothing(space, server, tmp_path, capsys):
    space["FLOWERS"], space["FLOWERS_MD5"] = server
    assert space["load_flowers"](tmp_path, side=16).is_stand_in
    assert "a test run does not download" in capsys.readouterr().out


def test_a_server_that_never_answers_is_given_up_in_time(space):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        start = time.monotonic()
        reason = space["why_no_answer"](f"http://127.0.0.1:{silent.getsockname()[1]}/", seconds=1)
        assert reason and time.monotonic() - start < 10


# ------------------------------------------------------------------ weights

def test_shipped_weights_come_back_as_float32_with_the_shifted_schedule(space):
    file = d.HERE / "notebooks" / "weights" / "flowers_128.pt"
    assert file.stat().st_size < 20e6
    stored = d.load_checkpoint(file)["model"]
    assert {v.dtype for v in stored.values()} == {torch.float16}
    model, schedule = d.load_pretrained("flowers_128")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    wanted = space["shifted_schedule"](d.cosine_schedule(), 128)
    assert np.allclose(schedule.alpha_bars, wanted.alpha_bars, atol=1e-5)
    assert model(torch.randn(1, 3, 128, 128), torch.tensor([500])).shape == (1, 3, 128, 128)
