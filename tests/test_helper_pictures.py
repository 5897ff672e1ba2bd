"""Pixels, grids of images, GIFs, and where they are written."""

import os
import random
import subprocess
import sys
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from series import ROOT, everything_in

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
    assert x.min() == -1 and x.max() == 1
    torch.testing.assert_close(x, (2 * torch.arange(256) / 255 - 1).view(shape))  # evenly
    for given in (x, x.double().requires_grad_()):
        again = to_uint8(given)
        assert torch.equal(again, u8) and again.dtype == torch.uint8 and torch.equal(u8, kept)


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
    """The pixels of every picture: colours in bytes, which matplotlib stretches to no range."""
    pictures = [image.get_array() for axis in figure.axes for image in axis.get_images()]
    assert all(pixels.dtype == np.uint8 and pixels.shape[2:] == (3,) for pixels in pictures)
    return [np.asarray(pixels) for pixels in pictures]


@pytest.mark.parametrize("channels, high", [(3, 255), (1, 50)])
def test_a_grid_has_every_image_in_its_place_and_a_dark_one_stays_dark(channels, high):
    images = ramp(7, channels, high)
    (grid,), (same,) = (drawn(show_images(x, columns=3)) for x in (images, to_model_range(images)))
    assert np.array_equal(grid, same)
    for i, image in enumerate(images.expand(-1, 3, -1, -1)):  # a border of one pixel around each
        top, left = 1 + (i // 3) * 7, 1 + (i % 3) * 7
        assert np.array_equal(grid[top:top + 6, left:left + 6], image.permute(1, 2, 0)), i


def test_titles_rows_and_title():
    figure = show_images(ramp(3, high=50), ["one", "two", "three"], columns=2, title="above")
    assert [axis.get_title() for axis in figure.axes][:3] == ["one", "two", "three"]
    assert figure._suptitle.get_text() == "above"
    assert np.array_equal([pixels[:, :, 0] for pixels in drawn(figure)], ramp(3, high=50)[:, 0])
    (axis,) = show_images(ramp(4), columns=2, rows=["noisy", "clean"]).axes
    labels = [(label.get_text(), label.xy) for label in axis.texts]
    assert labels == [("noisy", (0, 3.5)), ("clean", (0, 10.5))]  # the middle of 6 + 1 pixels
    figure = show_images(ramp(4), list("abcd"), columns=2, rows=["noisy", "clean"])
    found = [[label.get_text() for label in axis.texts] for axis in figure.axes]
    assert found == [["noisy"], [], ["clean"], []]


def test_one_image_and_many():
    small, large = show_images(ramp(1)), show_images(ramp(1), scale=3)
    assert isinstance(small, plt.Figure) and large.get_figwidth() > small.get_figwidth()
    show_images(ramp(23))
    show_images(torch.zeros(2, 1, 5, 9).requires_grad_())


# ------------------------------------------------------------------ GIF

def read_gif(path):
    """The frames, RGB, their milliseconds, and the number of rounds (0: for ever)."""
    with Image.open(path) as gif:
        read = [(np.asarray(frame.convert("RGB")).copy(), frame.info["duration"])
                for frame in ImageSequence.Iterator(gif)]
        return *zip(*read), gif.info.get("loop")


@pytest.mark.parametrize("form", [lambda x: x, lambda x: x[:, 0], to_model_range])
def test_a_gif_has_the_frames_exactly(tmp_path, form):
    """Each uses a fifth of the range, and must not be stretched to all of it."""
    frames, place = ramp(5, size=8), tmp_path / "deep" / "a.gif"
    assert save_gif(form(frames), place, milliseconds=70, hold=1500) == place
    read, durations, loop = read_gif(place)
    assert np.array_equal(read, frames.permute(0, 2, 3, 1).repeat(1, 1, 1, 3))
    assert durations == (70, 70, 70, 70, 1500) and loop == 0


def test_enlarged_and_coloured_and_still(tmp_path):
    frames = torch.randint(0, 2, (2, 3, 4, 4), dtype=torch.uint8) * 255
    read, _, _ = read_gif(save_gif(frames, str(tmp_path / "a.gif"), enlarge=3))
    large = frames.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    assert np.array_equal(read, large.permute(0, 2, 3, 1))
    still = save_gif(ramp(1).repeat(4, 1, 1, 1), tmp_path / "c.gif", milliseconds=50, hold=1000)
    assert sum(read_gif(still)[1]) == 1150  # frames that don't change last as long


def test_a_gif_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = save_gif(ramp(), tmp_path / "a.gif")
    (tmp_path / "folder.gif").mkdir()
    before = everything_in(tmp_path)
    for place in ("a.gif/b.gif", "folder.gif"):  # a file is no folder, and the other way round
        with pytest.raises(OSError, match=r"^(b|folder)\.gif could not be written"):
            save_gif(ramp(9), tmp_path / place)
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_gif(ramp(9), path)
    assert everything_in(tmp_path) == before and len(list(tmp_path.iterdir())) == 2


# ------------------------------------------------------------------ where it goes; set_up

@pytest.mark.parametrize("maintainer, place", [
    (None, "here/outputs/a.png"), ("", "here/outputs/a.png"), ("0", "here/outputs/a.png"),
    ("1", "here/img/a.png"), ("1", "here/outputs/run.pt"), (None, "home/outputs/a.gif")])
def test_a_learner_writes_to_outputs_a_maintainer_to_img(tmp_path, monkeypatch, maintainer, place):
    """In a checkout that can't be written, outputs/ lies in the home folder: not under the system's
    temporary one, where another user may write too."""
    path = tmp_path / place
    path.parents[1].mkdir()
    monkeypatch.setattr(d, "HERE", tmp_path / "here")
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path / "home"))
    monkeypatch.delenv("DDPM_MAINTAINER", raising=False)
    if maintainer is not None:
        monkeypatch.setenv("DDPM_MAINTAINER", maintainer)
    if place.startswith("home"):
        monkeypatch.setattr(os, "access", lambda *args: False)
    assert output_path(path.name) == path
    assert list(tmp_path.rglob("*")) == [path.parents[1], path.parent]
    assert {"outputs/", "data/"} <= set((ROOT / ".gitignore").read_text().split())


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
    code = "import sys, ddpm_utils as d; d.set_up(); print(len(d.load_images(sys.argv[1], 8)))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment,
                          capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert b"1 files left out: ?aj.jpg" in done.stdout and done.stdout.split()[-1] == b"1"
