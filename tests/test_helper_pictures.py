"""Pixels, grids of images, GIFs, and where they are written."""

import os
import pathlib
import random
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from series import ROOT

import ddpm_utils as d
from ddpm_utils import output_path, save_gif, show_images, to_model_range, to_uint8


def ramp(n=4, channels=1, high=255, size=6):
    """n images whose pixels run evenly from 0 to high."""
    values = torch.linspace(0, high, n * channels * size * size).round().to(torch.uint8)
    return values.view(n, channels, size, size)


# ------------------------------------------------------------------ pixels

@pytest.mark.parametrize("shape", [(256,), (2, 1, 8, 16), (2, 2, 8, 8)])
def test_every_pixel_value_survives_the_round_trip(shape):
    u8 = torch.arange(256, dtype=torch.uint8).view(shape)
    x, kept = to_model_range(u8), u8.clone()
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1 and x.shape == shape
    torch.testing.assert_close(x.flatten(), (2 * torch.arange(256) / 255 - 1).float())  # evenly
    assert torch.equal(to_uint8(x), u8) and torch.equal(u8, kept)
    again = to_uint8(x.double().requires_grad_())
    assert torch.equal(again, u8) and again.dtype == torch.uint8


def test_what_is_outside_is_cut_off_and_what_is_between_is_rounded():
    x = torch.tensor([-9.0, -1.001, -1.0, 0.0, 1.0, 1.001, 9.0, -1 + 0.9 / 127.5, -1 + 0.4 / 127.5])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 255, 255, 255, 1, 0]


@pytest.mark.parametrize("value, words", [(float("nan"), "not numbers"),
                                          (float("inf"), "not numbers"), (255.0, "uint8")])
def test_what_would_be_drawn_black_or_white_is_refused(tmp_path, value, words):
    x = torch.zeros(2, 1, 8, 8)
    x[1, 0, 2, 2] = value
    for draw in (to_uint8, show_images, lambda x: save_gif(x, tmp_path / "a.gif")):
        with pytest.raises(ValueError, match=words):
            draw(x)
    assert not list(tmp_path.iterdir())
    for fine in (20 * torch.randn(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), torch.empty(0, 1, 8, 8)):
        to_uint8(fine)  # a sampler without clipping may go far, to both sides


def test_floats_from_0_to_1_are_not_drawn_pale_without_a_word(tmp_path, recwarn):
    x = torch.linspace(0, 1, 8 * 64).view(8, 1, 8, 8)
    for draw in (show_images, lambda x: save_gif(x, tmp_path / "a.gif")):
        with pytest.warns(UserWarning, match="2 \\* x - 1") as seen:
            draw(x)
        assert seen[0].filename == __file__, "the warning doesn't point at the caller"
        recwarn.clear()
        for fine in (2 * x - 1, x / 2 + 0.5, x[:7], (255 * x).to(torch.uint8), 1.5 * x):
            draw(fine)
        assert not recwarn.list


# ------------------------------------------------------------------ grids

def drawn(figure):
    return [np.asarray(image.get_array()) for axis in figure.axes for image in axis.get_images()]


def test_a_grid_has_every_image_in_its_place():
    images = ramp(7, channels=3)
    (grid,), (same,) = (drawn(show_images(x, columns=3)) for x in (images, to_model_range(images)))
    assert np.array_equal(grid, same)
    for i in range(7):  # a border of one pixel around each
        top, left = 1 + (i // 3) * 7, 1 + (i % 3) * 7
        assert np.array_equal(grid[top:top + 6, left:left + 6], images[i].permute(1, 2, 0)), i


@pytest.mark.parametrize("titles", [None, ["a", "b"]])
def test_one_range_for_all(titles):
    """A dark image stays dark beside a bright one, and alone."""
    dark, bright = ramp(1, high=50), ramp(1, high=200)
    for images in (torch.cat([dark, bright]), torch.cat([dark, dark])):
        for values in drawn(show_images(images, titles)):
            assert values.dtype == np.uint8 and values.ndim == 3 and values.shape[2] == 3


def test_titles_rows_and_title():
    figure = show_images(ramp(3), ["one", "two", "three"], columns=2, title="above")
    assert [axis.get_title() for axis in figure.axes][:3] == ["one", "two", "three"]
    assert figure._suptitle.get_text() == "above" and len(drawn(figure)) == 3
    for values, image in zip(drawn(figure), ramp(3)):
        assert np.array_equal(values[:, :, 0], image[0])
    (axis,) = show_images(ramp(4), columns=2, rows=["noisy", "clean"]).axes
    assert [label.get_text() for label in axis.texts] == ["noisy", "clean"]
    assert [label.xy for label in axis.texts] == [(0, 3.5), (0, 10.5)]  # the middle of 6 + 1 pixels
    figure = show_images(ramp(4), list("abcd"), columns=2, rows=["noisy", "clean"])
    found = [[label.get_text() for label in axis.texts] for axis in figure.axes]
    assert found == [["noisy"], [], ["clean"], []]
    for wrong in (["one"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="rows must hold 2 names"):
            show_images(ramp(4), columns=2, rows=wrong)


def test_one_image_and_many():
    small, large = show_images(ramp(1)), show_images(ramp(1), scale=3)
    assert isinstance(small, plt.Figure)
    assert large.get_size_inches()[0] > small.get_size_inches()[0]
    show_images(ramp(23))
    show_images(torch.zeros(2, 1, 5, 9).requires_grad_())


# ------------------------------------------------------------------ GIF

def read_gif(path):
    """The frames, RGB, their milliseconds, and the number of rounds (0: for ever)."""
    with Image.open(path) as gif:
        read = [(np.asarray(frame.convert("RGB")).copy(), frame.info["duration"])
                for frame in ImageSequence.Iterator(gif)]
        return *zip(*read), gif.info.get("loop")


@pytest.mark.parametrize("form", ["(F, 1, H, W)", "(F, H, W)", "floats"])
def test_a_gif_has_the_frames_exactly(tmp_path, form):
    frames = ramp(5, size=8)
    given = {"(F, H, W)": frames[:, 0], "floats": to_model_range(frames)}.get(form, frames)
    path = save_gif(given, tmp_path / "deep" / "a.gif", milliseconds=70, hold=1500)
    assert path == tmp_path / "deep" / "a.gif" and isinstance(path, pathlib.Path)
    read, durations, loop = read_gif(path)
    assert np.array_equal(read, frames.permute(0, 2, 3, 1).repeat(1, 1, 1, 3))
    assert durations == (70, 70, 70, 70, 1500) and loop == 0


def test_one_range_for_all_frames(tmp_path):
    """A frame that uses a tenth of the range must not be stretched to all of it."""
    full = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    read, _, _ = read_gif(save_gif(torch.cat([0.1 * full, full]), tmp_path / "a.gif"))
    assert [(frame.min(), frame.max()) for frame in read] == [(115, 140), (0, 255)]


def test_enlarged_and_coloured_and_still(tmp_path):
    frames = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    frames[0, 0], frames[1, 2] = 255, 255  # red, then blue
    red, blue = read_gif(save_gif(frames, str(tmp_path / "a.gif"), enlarge=3))[0]
    assert red.shape == blue.shape == (12, 12, 3)
    assert (red == [255, 0, 0]).all() and (blue == [0, 0, 255]).all()
    checks = ((torch.arange(4)[:, None] + torch.arange(4)) % 2 * 255).to(torch.uint8)
    ((read,), _, _) = read_gif(save_gif(checks[None], tmp_path / "b.gif", enlarge=2))
    assert np.array_equal(read[:, :, 0], checks.numpy().repeat(2, 0).repeat(2, 1))
    still = save_gif(ramp(1).repeat(4, 1, 1, 1), tmp_path / "c.gif", milliseconds=50, hold=1000)
    assert sum(read_gif(still)[1]) == 1150  # frames that don't change last as long


def test_a_gif_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder.gif").mkdir()
    for place in ("file/a.gif", "folder.gif"):
        with pytest.raises(OSError, match=f"{pathlib.Path(place).name} could not be written"):
            save_gif(ramp(), tmp_path / place)
    path = save_gif(ramp(), tmp_path / "a.gif")
    before = path.read_bytes()
    monkeypatch.setattr(d.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_gif(ramp(9), path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "file", "folder.gif"]


# ------------------------------------------------------------------ where it goes; set_up

def test_a_learner_writes_to_outputs_and_a_maintainer_to_img(tmp_path, monkeypatch):
    """In a checkout that can't be written, outputs/ lies in the home folder: not under the system's
    temporary one, where another user may write too."""
    monkeypatch.setattr(d, "HERE", tmp_path)
    for value in ("", "0"):
        monkeypatch.setenv("DDPM_MAINTAINER", value)
        assert output_path("a.png") == tmp_path / "outputs" / "a.png"
    monkeypatch.delenv("DDPM_MAINTAINER")
    assert output_path("a.png") == tmp_path / "outputs" / "a.png"
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    monkeypatch.setenv("DDPM_MAINTAINER", "1")
    assert output_path("a.png") == tmp_path / "img" / "a.png" and (tmp_path / "img").is_dir()
    assert output_path("run.pt") == tmp_path / "outputs" / "run.pt", "img/ is for pictures"
    monkeypatch.delenv("DDPM_MAINTAINER")
    (tmp_path / "home").mkdir()
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.setattr(d.os, "access", lambda *args: False)
    assert output_path("a.gif") == tmp_path / "home" / "outputs" / "a.gif"
    save_gif(ramp(), output_path("a.gif"))
    ignored = (ROOT / ".gitignore").read_text().split()
    assert "outputs/" in ignored and "data/" in ignored


def test_set_up_seeds_everything_and_says_so_in_one_line(capsys):
    def draws(seed):
        d.set_up(seed)
        return random.random(), np.random.rand(), torch.rand(1).item()

    with plt.rc_context():
        assert draws(3) == draws(3) and all(a != b for a, b in zip(draws(3), draws(4)))
        capsys.readouterr()
        device = d.set_up()
    out, err = capsys.readouterr()
    assert isinstance(device, torch.device) and device.type in ("cuda", "mps", "cpu")
    assert out.startswith(f"device: {device.type}") and out.count("\n") == 1 and err == ""


@pytest.mark.parametrize("encoding", ["ascii", "cp437"])
def test_a_letter_that_the_terminal_lacks_ends_no_run(tmp_path, encoding):
    (tmp_path / "čaj.jpg").write_bytes(b"no image")
    Image.new("L", (8, 8)).save(tmp_path / "tea.png")
    code = ("import sys; sys.path.insert(0, sys.argv[1]);"
            "from ddpm_utils import load_images, set_up;"
            "set_up(); print(len(load_images(sys.argv[2], 8)))")
    command = [sys.executable, "-c", code, str(ROOT), str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"1 files left out: ?aj.jpg" in done.stdout and done.stdout.split()[-1] == b"1"
