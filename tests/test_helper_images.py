"""Images of one's own: what is found, how it is cut, what is left out and named."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_utils import load_images


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
    assert load_images(tmp_path, 8).images.tolist() == [[[[77] * 8] * 8]]
    assert load_images(tmp_path, 8, grey=False).images.shape == (1, 3, 8, 8)
    put(tmp_path / "b.png")
    assert load_images(tmp_path, 8).images.shape == (2, 3, 8, 8)
    assert load_images(tmp_path, 8, grey=True).images.shape == (2, 1, 8, 8)


def test_sixteen_bits_are_scaled_and_transparency_lies_on_the_background(tmp_path):
    Image.fromarray(np.full((10, 10), 32_768, np.uint16)).save(tmp_path / "deep.png")
    assert abs(int(load_images(tmp_path, 4).images[0, 0, 0, 0]) - 127) <= 1
    put(tmp_path / "deep.png", (9, 9, 9, 0), mode="RGBA")
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
