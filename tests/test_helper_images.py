"""Images of one's own and the flowers: what is found, how it is cut, what is left out and named."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from conftest import send
from PIL import Image

import ddpm_utils as d
from ddpm_utils import load_flowers, load_images


@pytest.fixture(autouse=True)
def no_folder_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.delenv("DDPM_DOWNLOAD", raising=False)
    monkeypatch.setenv("DDPM_DATA", str(tmp_path / "data"))


def put(path, colour=(200, 10, 30), size=(40, 20), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_subfolders_are_classes_and_loose_files_one_more(tmp_path):
    for name in ("b/1.png", "a/deep/2.jpg", "a/3.PNG", "loose.png", ".ipynb_checkpoints/4.png",
                 "a/.hidden.png"):
        put(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = load_images(tmp_path, 16)
    assert found.images.shape == (4, 3, 16, 16) and found.images.dtype == torch.uint8
    assert found.classes == sorted(["a", "b", tmp_path.name])
    assert sorted(found.labels.bincount().tolist()) == [1, 1, 2] and not found.is_stand_in
    found = load_images(str(tmp_path / "b"), 8)  # a flat folder, and a single file is enough
    assert found.classes == ["b"] and found.labels.tolist() == [0] and len(found) == 1


@pytest.mark.parametrize("side", [8, 32, 64, 128])
def test_the_middle_square_or_the_whole_image(tmp_path, side):
    image = Image.new("RGB", (60, 20), (0, 0, 255))
    image.paste((255, 0, 0), (20, 0, 40, 20))  # red in the middle third
    image.save(tmp_path / "a.png")
    cut = load_images(tmp_path, side).images[0].float()
    assert cut.shape == (3, side, side)
    assert float(cut[0].mean()) > 245 and float(cut[2].mean()) < 10  # blue only at the very edge
    whole = load_images(tmp_path, side, crop=False, background=90).images[0]
    assert (whole[:, 0] == 90).all() and int(whole[2, side // 2, 0]) > 250


def test_a_phones_portrait_stays_upright(tmp_path):
    """EXIF orientation 6: the file lies on its side, and says so."""
    image, exif = Image.new("RGB", (40, 20)), Image.Exif()
    image.paste((255, 255, 255), (0, 0, 20, 20))  # left half white: upright, the upper half
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = load_images(tmp_path, 20, crop=False, background=0, grey=True).images[0, 0].float()
    assert float(upright[:9, 10].mean()) > 200 and float(upright[11:, 10].mean()) < 50


def test_grey_by_what_the_files_are_or_by_request(tmp_path):
    put(tmp_path / "a.png", 77, mode="L")
    assert load_images(tmp_path, 8).images.shape == (1, 1, 8, 8)
    assert (load_images(tmp_path, 8).images == 77).all()
    assert load_images(tmp_path, 8, grey=False).images.shape == (1, 3, 8, 8)
    put(tmp_path / "b.png")
    assert load_images(tmp_path, 8).images.shape == (2, 3, 8, 8)
    assert load_images(tmp_path, 8, grey=True).images.shape == (2, 1, 8, 8)


def test_sixteen_bits_are_scaled_and_transparency_lies_on_the_background(tmp_path):
    Image.fromarray(np.full((10, 10), 32_768, np.uint16)).save(tmp_path / "deep.png")
    assert abs(int(load_images(tmp_path, 4).images[0, 0, 0, 0]) - 127) <= 1
    (tmp_path / "deep.png").unlink()
    put(tmp_path / "clear.png", (9, 9, 9, 0), mode="RGBA")
    assert (load_images(tmp_path, 4).images == 255).all()
    assert (load_images(tmp_path, 4, background=0).images == 0).all()


def test_broken_and_animated_files_are_named_and_left_out(tmp_path, capsys):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 not an image")
    (tmp_path / "nothing").mkdir()
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / "no folder"):
        with pytest.raises(ValueError, match=f"no images to read in .*{folder.name}"):
            load_images(folder, 8)
    put(tmp_path / "good.png")
    frames = [Image.new("L", (8, 8), value) for value in (0, 200)]
    frames[0].save(tmp_path / "moves.gif", save_all=True, append_images=frames[1:])
    capsys.readouterr()
    assert len(load_images(tmp_path, 8)) == 1
    out = capsys.readouterr().out
    assert "2 files left out" in out and "torn.jpg" in out and "moves.gif (animated)" in out


# ------------------------------------------------------------------ the flowers

def put_flowers(folder):
    for name, colour in (("daisy", (250, 250, 250)), ("roses", (200, 10, 30))):
        for i in range(3):
            put(folder / "flower_photos" / name / f"{i}.jpg", colour, (150, 128))
    return folder / "flower_photos"


def test_flowers_that_are_there(tmp_path, capsys):
    put_flowers(tmp_path / "data")
    flowers = load_flowers(32)
    assert flowers.source == "flower_photos" and flowers.images.shape == (6, 3, 32, 32)
    assert flowers.classes == ["daisy", "roses"] and capsys.readouterr().out == ""


def test_the_stand_in_where_there_are_none(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("DDPM_DOWNLOAD", "0")
    flowers = load_flowers(32)
    assert flowers.is_stand_in and flowers.images.shape == (2000, 3, 32, 32)
    assert flowers.images.dtype == torch.uint8 and "stand-in" in capsys.readouterr().out
    assert torch.equal(flowers.images, load_flowers(32).images)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("trouble", [None, "another file", "404"])
def test_the_download_is_whole_or_leaves_nothing(tmp_path, serve, monkeypatch, capsys, trouble):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(put_flowers(tmp_path / "made"), "flower_photos")
    data = packed.getvalue()
    server = serve(lambda r: r.send_error(404) if trouble == "404" else send(r, data))
    monkeypatch.setattr(d, "FLOWERS", f"{server.url}/flowers.tgz")
    digest = "0" * 32 if trouble == "another file" else hashlib.md5(data).hexdigest()
    monkeypatch.setattr(d, "FLOWERS_MD5", digest)
    flowers = load_flowers(16)
    assert flowers.is_stand_in == (trouble is not None) and "218 MiB" in capsys.readouterr().out
    left = [path.name for path in (tmp_path / "data").iterdir()]
    assert left == ([] if trouble else ["flower_photos"])
